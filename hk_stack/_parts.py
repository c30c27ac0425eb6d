"""A traced function in two parts, setup and call, run for all layers of a stack."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from hk_stack import (
    _batches,
    _cost,
    _equations,
    _guarded,
    _loop,
    _marks,
    _spread,
)
from hk_stack._equations import Aval


class Input(NamedTuple):
    """What the cut must know of one input of a traced function.

    Attributes:
      label: How an error names it.
      known: May setup depend on it of its own accord?
      fixed: Does it stay the same through the loop, so that a *marked* value may
        depend on it? Every known input is fixed.
      layered: Has it a leading layer axis outside the loop?
      carried: Is it a part of what each layer hands to the next?
      constant: Is it made of constants alone?
    """

    label: str
    known: bool = False
    fixed: bool = False
    layered: bool = False
    carried: bool = False
    constant: bool = False


class Parts(NamedTuple):
    """A traced function in parts, equal to it when run one after the other.

    ```
    before = parts.shared(*pick(parts.shared_inputs))
    own = parts.setup(*before, *pick(parts.setup_inputs))
    outputs = parts.call(*before[:num_shared], *own, *pick(parts.call_inputs))
    ```

    where `pick` takes the inputs at these positions.

    Attributes:
      shared: The derived values that depend on no layered input; then what only
        `setup` needs of this kind, and is too expensive to compute in each layer.
      setup: The derived values of one layer.
      call: The rest.
      shared_inputs: Positions of the inputs that `shared` reads.
      setup_inputs: Positions of the inputs that `setup` reads.
      call_inputs: Positions of the inputs that `call` reads.
      num_shared: How many derived values `shared` computes.
    """

    shared: jex.ClosedJaxpr
    setup: jex.ClosedJaxpr
    call: jex.ClosedJaxpr
    shared_inputs: tuple[int, ...]
    setup_inputs: tuple[int, ...]
    call_inputs: tuple[int, ...]
    num_shared: int

    @property
    def num_derived(self) -> int:
        """How many derived values the call is handed."""
        return self.num_shared + len(self.setup.jaxpr.outvars)

    def variables(
        self, order: Sequence[int], types: Sequence[Aval]
    ) -> tuple[list[jex.Var], list[jex.Var]]:
        """What takes the derived values in the call, and what its inputs `order`.

        Args:
          order: Positions of inputs: all that the call reads, and maybe others.
          types: Of all inputs.
        """
        taken = self.call.jaxpr.invars
        given, rest = taken[: self.num_derived], taken[self.num_derived :]
        read = dict(zip(self.call_inputs, rest, strict=True))
        return given, [read[i] if i in read else jex.Var(types[i]) for i in order]

    def taking(self, variables: Sequence[jex.Var]) -> jex.ClosedJaxpr:
        """The call as a function of its variables in another order, or unread ones."""
        jaxpr = _equations.replace(self.call.jaxpr, invars=list(variables))
        return jex.ClosedJaxpr(jaxpr, [])

    def body(self, order: Sequence[int], types: Sequence[Aval]) -> jex.ClosedJaxpr:
        """The call as the body of a `scan`.

        Args:
          order: Positions of inputs, as of `variables`: those that all turns share, the
            carry, those of each turn.
          types: Of all inputs.

        Returns:
          A function of the derived values that all turns share, the inputs `order`, and
          the derived values of each turn.
        """
        given, taken = self.variables(order, types)
        count = self.num_shared
        return self.taking([*given[:count], *taken, *given[count:]])


def all_setup(block: jex.ClosedJaxpr) -> Parts:
    """The parts of a function of layered inputs that is setup as a whole."""
    jaxpr = _equations.replace(block.jaxpr, invars=[], outvars=[], eqns=[])
    nothing = jex.ClosedJaxpr(jaxpr, [])
    everything = tuple(range(len(block.jaxpr.invars)))
    return Parts(nothing, block, nothing, (), everything, (), 0)


def derive(
    parts: Parts,
    values: Sequence[Any],
    inputs: Sequence[Input],
    num_layers: int,
    *,
    batch_size: int | None = None,
    remat: bool | None = None,
    devices: _spread.Devices | None = None,
) -> tuple[list[Any], list[Any]]:
    """Runs setup for all layers.

    Args:
      parts: A layer, cut.
      values: All inputs of the layer, the layered ones with a leading axis `[L, ...]`.
      inputs: What they are.
      num_layers: `L`.
      batch_size: How many layers run at once; by default, as many as are small enough.
      remat: Whether the backward pass runs setup again instead of keeping what it
        computed on the way; by default, if there is more than one batch.
      devices: Over which devices layers are spread; by default, each runs all.

    Returns:
      The derived values that all layers share, and those of each, `[L, ...]`.
    """
    before = _equations.run(parts.shared, *(values[i] for i in parts.shared_inputs))
    shared = before[: parts.num_shared]
    setup = parts.setup
    if not setup.jaxpr.outvars:
        return shared, []
    given = {i: values[i] for i in parts.setup_inputs}
    own = [i for i in given if inputs[i].layered]

    batched = _guarded.vmap(setup, [*[False] * len(before), *(i in own for i in given)])

    def inputs_of(own_values: list[Any]) -> list[Any]:
        return [*before, *(given | dict(zip(own, own_values, strict=True))).values()]

    def one(own_values: list[Any]) -> list[Any]:
        return _equations.run(setup, *inputs_of(own_values))

    def several(own_values: list[Any]) -> list[Any]:
        return batched(inputs_of(own_values))

    rows = [given[i] for i in own]
    if devices and not devices.why_not(setup.jaxpr, num_layers):
        share = devices.share(num_layers)
        size = batches(setup.jaxpr, share, batch_size).size
        with contextlib.suppress(Exception):  # As in batches: some have none.
            return shared, _spread.in_batches(
                devices, several, rows, setup.out_avals, size=size, remat=remat
            )
    size = batches(setup.jaxpr, num_layers, batch_size).size
    return shared, _batches.in_batches(one, several, rows, size=size, remat=remat)


class Plan(NamedTuple):
    """How a stack runs, once its layer is cut.

    Attributes:
      parts: Setup and call of one layer, whose outputs begin with the next carry.
      inputs: What the inputs of a layer are.
      schedule: How the loop runs the calls.
      setup_batch_size: See `layer_stack`.
      setup_remat: See `layer_stack`.
      devices: Over which devices setup is spread, if it is.
    """

    parts: Parts
    inputs: tuple[Input, ...]
    schedule: _loop.Schedule
    setup_batch_size: int | None
    setup_remat: bool | None
    devices: _spread.Devices | None

    def key(self, structure: Callable[[jex.ClosedJaxpr], Hashable]) -> Hashable:
        """All that `run` depends on."""
        shared, setup, call, *positions = self.parts
        programs = tuple(map(structure, (shared, setup, call)))
        kinds = tuple(i._replace(label="") for i in self.inputs)
        return programs, tuple(positions), kinds, self[2:]

    def run(self, values: list[Any]) -> list[Any]:
        """Runs setup for all layers, then the loop over calls."""
        return self.loop(values, *self.derive(values))

    def derive(self, values: list[Any]) -> tuple[list[Any], list[Any]]:
        """Runs setup for all layers: values that they share, and those of each."""
        derived = derive(
            self.parts,
            values,
            self.inputs,
            self.schedule.num_layers,
            batch_size=self.setup_batch_size,
            remat=self.setup_remat,
            devices=self.devices,
        )
        # For policies of `jax.checkpoint` around the stack.
        named: tuple[list[Any], list[Any]] = jax.tree.map(
            lambda v: checkpoint_name(v, _marks.DERIVED), derived
        )
        return named

    def loop(self, values: list[Any], shared: list[Any], own: list[Any]) -> list[Any]:
        """Runs the loop over calls on derived values."""
        parts = self.parts
        carried = [i for i, entry in enumerate(self.inputs) if entry.carried]
        layered = [i for i in parts.call_inputs if self.inputs[i].layered]
        constants = [i for i in parts.call_inputs if i not in {*carried, *layered}]

        def pick(positions: list[int]) -> list[Any]:
            return [values[i] for i in positions]

        order = [*constants, *carried, *layered]
        carry, rest = _loop.run_traced(
            parts.body(order, list(map(jax.typeof, values))),
            [*shared, *pick(constants)],
            pick(carried),
            [*pick(layered), *own],
            self.schedule,
        )
        return [*carry, *rest]


class Batches(NamedTuple):
    """How the setup of layers runs.

    Attributes:
      size: How many layers run at once.
      why: Why one by one, if so.
      write: What to write for more.
    """

    size: int
    why: str = ""
    write: str = ""


def batches(setup: jex.Jaxpr, num_layers: int, asked: int | None) -> Batches:
    """How many layers' setup runs at once, if so many were asked for."""
    if why := _cost.no_batch(setup):
        return Batches(1, why)
    if asked is not None:
        return Batches(asked)
    largest = _cost.largest_value(setup)
    if _cost.gathers(setup.eqns):
        # A batch would hold all of its layers whole on each device.
        why = "it gathers sharded values"
    elif _guarded.has_branches(setup) and largest > _batches.most_in_branches():
        why = "it has conditionals on large values"
    else:
        size = _batches.batch_size(num_layers, largest)
        if size > 1:
            return Batches(size)
        why = "one layer takes as much memory as a batch should"
    return Batches(1, why, "setup_batch_size=k runs k at once")
