"""How the layers of a stack run: in a compiled loop, or one by one in Python."""

import functools
import operator
from collections.abc import Hashable
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from hk_stack import (
    _checks,
    _cut,
    _eager,
    _finite,
    _initialize,
    _layout,
    _loop,
    _marks,
    _scopes,
    _summary,
    _taps,
)
from hk_stack._layer import Call, Given, as_array, promote, run_one


def compiled(
    call: Call, layer: _initialize.Layer, given: Given
) -> tuple[Any, Any, Any]:
    """Runs setup for all layers, then the loop; returns carry, outputs and state."""
    options, where = call.options, call.where
    closed, given, shapes = _trace(call, layer, given)
    constants = closed.consts
    marks: list[_marks.Mark] = []
    if call.check_finite or _taps.are_heard():
        closed, constants, marks = _marks.expose(closed)
    inputs = _inputs(constants, given, call.arguments)
    parts = _cut.cut(closed, inputs, options.setup, where)
    _summary.record(call, given.params, parts)
    num_carry = len(jax.tree.leaves(given.carry))
    start = len(constants) + len(jax.tree.leaves(given[:3]))
    plan = _Plan(
        parts,
        tuple(i.layered for i in inputs),
        range(start, start + num_carry),
        options.num_layers,
        call.loop == "unrolled",
        options.unroll,
        call.reverse,
        options.remat,
        options.setup_batch_size,
        options.setup_remat,
    )
    values = [*constants, *jax.tree.leaves(given)]
    leaves = _eager.call(plan.run, values, plan.key)
    count = len(leaves) - len(marks)
    results = jax.tree.unflatten(jax.tree.structure(shapes), leaves[:count])
    (carry, outputs), state = _pass_on(call, marks, leaves[count:], results)
    return carry, outputs, state


def _pass_on(
    call: Call, marks: list[_marks.Mark], values: list[Any], results: Any
) -> Any:
    """Tells whatever is around the stack what is at the marks, `[L, ...]`.

    Returns:
      The stack's results, computed only together with what is told.
    """
    found = list(zip(marks, values, strict=True))
    kept = [_taps.say(v, _taps.name_of(m)) for m, v in found if m.kind == _marks.TAP]
    # Where a gradient is taken of a function under `jit`, JAX drops what nobody reads.
    results = _marks.tied(results, kept)
    checks = [(m, v) for m, v in found if m.kind == _marks.FINITE]
    stack = _finite.Check(call.where, call.options.num_layers, call.reverse)
    return _finite.say_layers(stack, checks, results)


class _Plan(NamedTuple):
    """How a stack runs, once its layer is cut.

    Attributes:
      parts: Setup and call of one layer.
      layered: For each input of the layer, whether it has a layer axis.
      carry: Which inputs are the carry. The outputs begin with the next carry.
      num_layers: `L`.
      unrolled: See `loop.run`, as the next three.
      unroll: How many layers one step holds.
      reverse: Whether the last layer runs first.
      remat: What the backward pass computes again.
      setup_batch_size: See `layer_stack`.
      setup_remat: See `layer_stack`.
    """

    parts: _cut.Cut
    layered: tuple[bool, ...]
    carry: range
    num_layers: int
    unrolled: bool
    unroll: int
    reverse: bool
    remat: _loop.Remat | None
    setup_batch_size: int | None
    setup_remat: bool | None

    def key(self, structure: _eager.Structure) -> Hashable:
        """All that `run` depends on."""
        shared, setup, call, *positions = self.parts
        programs = tuple(map(structure, (shared, setup, call)))
        return programs, tuple(positions), self[1:]

    def run(self, values: list[Any]) -> list[Any]:
        """Runs setup for all layers, then the loop over calls."""
        parts = self.parts
        shared, own = _cut.derive(
            parts,
            values,
            self.layered,
            self.num_layers,
            batch_size=self.setup_batch_size,
            remat=self.setup_remat,
        )
        shared, own = (list(map(_derived, made)) for made in (shared, own))
        inputs = {i: values[i] for i in parts.call_inputs}
        layered = [i for i in inputs if self.layered[i]]
        carried = [i for i in inputs if i in self.carry]

        def step(carry: list[Any], mapped: Any) -> tuple[list[Any], list[Any]]:
            own, given = mapped
            now = {i: carry[self.carry.index(i)] for i in carried}
            read = inputs | now | dict(zip(layered, given, strict=True))
            results = jex.jaxpr_as_fun(parts.call)(*shared, *own, *read.values())
            return results[: len(carry)], results[len(carry) :]

        carry, rest = _loop.run(
            step,
            [values[i] for i in self.carry],
            (own, [inputs[i] for i in layered]),
            num_layers=self.num_layers,
            unrolled=self.unrolled,
            unroll=self.unroll,
            reverse=self.reverse,
            remat=self.remat,
        )
        return [*carry, *rest]


def _derived(value: Any) -> Any:
    """Names a derived value for policies of `jax.checkpoint` around the stack."""
    return checkpoint_name(value, _marks.DERIVED)


def _trace(
    call: Call, layer: _initialize.Layer, given: Given
) -> tuple[jex.ClosedJaxpr, Given, Any]:
    """Traces one layer; returns `given` with the carry in the types it will keep."""
    params, state, key, _, own = _layout.drop_layers(given._replace(carry=None))
    trace = jax.make_jaxpr(functools.partial(run_one, call, layer), return_shape=True)
    doing = f'tracing {call.all_layers}; loop="python" runs them one by one'
    while True:
        carry = given.carry
        with call.explained(doing):
            closed, shapes = trace(params, state, key, carry, own)
        outs = jax.tree.unflatten(
            jax.tree.structure(carry), closed.out_avals[: len(jax.tree.leaves(carry))]
        )
        promoted = jax.tree.map(promote, carry, outs)
        if all(map(operator.is_, jax.tree.leaves(carry), jax.tree.leaves(promoted))):
            return closed, given, shapes
        given = given._replace(carry=promoted)


def _inputs(constants: list[Any], given: Given, names: list[str]) -> list[_cut.Input]:
    """Describes the inputs of a traced layer for the cut."""

    def own(tree: Any, label: str, known: bool = False) -> list[_cut.Input]:
        return [
            _cut.Input(f"{label}{name}", known=known, fixed=known, layered=True)
            for name in _checks.leaf_names(tree)
        ]

    num_carry = len(given.carry)
    index = _cut.Input("the layer's index", known=True, fixed=True, layered=True)
    carry = [
        _cut.Input(f"argument `{name}{leaf}`", False, False, False)
        for name, tree in zip(names[:num_carry], given.carry, strict=True)
        for leaf in _checks.leaf_names(tree)
    ]
    per_layer = [
        entry
        for name, tree in zip(names[num_carry:], given.own.inputs, strict=True)
        for entry in own(tree, f"per-layer input `{name}`")
    ]
    return [
        *_closed_over(constants),
        *own(given.params, "parameter ", known=True),
        *own(given.state, "state "),
        *own(given.keys, "a random key"),
        *carry,
        index,
        *own(given.own.added, "what is added to the tap "),
        *per_layer,
    ]


def _closed_over(constants: list[Any]) -> list[_cut.Input]:
    """Describes what a layer closes over: it may be an activation, or be known."""
    leaves = jax.tree.leaves(hk.experimental.get_params())
    parameters = {id(leaf): leaf for leaf in leaves}  # Kept, so that ids stay theirs.

    def is_known(value: Any) -> bool:
        if not isinstance(value, jax.Array) or value.ndim == 0:
            return True
        return id(value) in parameters

    return [
        _cut.Input("an array closed over", is_known(value), True, False)
        for value in constants
    ]


def python(call: Call, layer: _initialize.Layer, given: Given) -> tuple[Any, Any, Any]:
    """Runs the layer function itself, layer by layer."""
    num_layers, where = call.options.num_layers, call.where
    _summary.record(call, given.params, None)
    call.scopes = _scopes.of_layers(call.options.name, num_layers)
    structure: Any = None

    def step(carry: Any, per_layer: Any) -> tuple[Any, Any]:
        nonlocal structure
        params, state, key, own = per_layer
        with call.explained(index=own.index):
            (after, output), state = run_one(
                call, layer, params, state, key, carry, own
            )
            output = jax.tree.map(as_array, output)
            found = jax.tree.structure(output)
            _checks.same_outputs(structure, found, where)
            structure = found
        return after, (output, state)

    own = given.own._replace(index=range(num_layers))
    carry, (outputs, state) = _loop.run(
        step,
        given.carry,
        (given.params, given.state, given.keys, own),
        num_layers=num_layers,
        unrolled=True,
        reverse=call.reverse,
    )
    return carry, outputs, state
