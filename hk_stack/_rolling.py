"""Equal blocks of a traced function as one loop.

The blocks of a Python loop over layers (`_repeats`) become one block, cut into setup
and call and run by the loop that runs stacks (`_parts`). What differs from block to
block is stacked before, and what is read of single blocks later is taken out of the
results.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hk_stack import (
    _cost,
    _cut,
    _equations,
    _loop,
    _parts,
    _repeats,
    _spread,
    _structure,
)
from hk_stack._block import Block
from hk_stack._equations import Atom, Aval
from hk_stack._parts import Input, Parts
from hk_stack._repeats import Kind, Program, Refused, Repeat


class Settings(NamedTuple):
    """How loops run.

    Attributes:
      least: How many equal blocks are a loop.
      setup: What leaves a loop: see `layer_stack`, as the next two.
      setup_batch_size: How many layers' setup runs at once.
      setup_remat: Whether gradients run setup again.
      setup_sharding: The axis of the mesh around that setup is spread over.
      schedule: How so many layers run.
      where: Names the function in errors.
    """

    least: int
    setup: str
    setup_batch_size: int | None
    setup_remat: bool | None
    setup_sharding: str | None
    schedule: Callable[[int], _loop.Schedule]
    where: str


class Rolled(NamedTuple):
    """A repeat that runs as one loop, or in batches.

    Attributes:
      repeat: The blocks.
      eqns: The equations of the first block.
      inputs: What a block reads, and the type of it.
      parts: A block in setup and call.
    """

    repeat: Repeat
    eqns: list[jex.JaxprEqn]
    inputs: list[tuple[Input, Aval]]
    parts: Parts


class Missed(NamedTuple):
    """Blocks that are alike and stay as they are.

    Attributes:
      refused: Why.
      eqns: The equations they are among.
    """

    refused: Refused
    eqns: list[jex.JaxprEqn]


class Rolling:
    """The walk through a traced function and the functions that it runs.

    Attributes:
      settings: How loops run.
      explains: Whether to find out why other blocks are no loops.
      devices: Over which devices setup is spread, if it is.
      numbering: What equations compute.
      rolled: The repeats that became loops; those inside of one after it.
      missed: What did not.
    """

    def __init__(self, settings: Settings, *, explains: bool) -> None:
        """Begins a walk.

        Args:
          settings: How loops run.
          explains: Whether to find out why other blocks are no loops.
        """
        self.settings = settings
        self.explains = explains
        self.devices = _spread.devices(settings.setup_sharding, settings.where)
        self.numbering = _structure.Numbering()
        self.rolled: list[Rolled] = []
        self.missed: list[Missed] = []
        self._done: dict[Any, tuple[jex.ClosedJaxpr, jex.ClosedJaxpr]] = {}

    def roll(self, closed: jex.ClosedJaxpr, known: Sequence[bool]) -> jex.ClosedJaxpr:
        """Rolls all repeats.

        Args:
          closed: A traced function.
          known: Which of its constants and inputs setup may depend on.

        Returns:
          The function with loops for repeats; `closed` itself if there are none.
        """
        return _Level(self, closed, known).rolled()

    def inside(self, eqn: jex.JaxprEqn, known: Sequence[bool]) -> jex.JaxprEqn:
        """`eqn` with the repeats rolled in what it runs; `eqn` itself without any."""
        if eqn.primitive.name not in _OPENED:
            return eqn
        is_changed = False

        def changed(body: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
            nonlocal is_changed
            flags = [True] * len(body.consts) + _known_inside(eqn, body.jaxpr, known)
            key = id(body.jaxpr), tuple(flags)
            if key not in self._done:
                self._done[key] = body, self.roll(body, flags)
            before, after = self._done[key]
            is_changed |= after is not before
            return after

        new = _equations.with_closed_bodies(eqn, changed)
        return new if is_changed else eqn


_OPENED = (*_equations.JIT, *_equations.REMAT, "scan", "while", "cond")


def _known_inside(
    eqn: jex.JaxprEqn, body: jex.Jaxpr, known: Sequence[bool]
) -> list[bool]:
    """Which inputs are known of what an equation runs."""
    name, flags = eqn.primitive.name, list(known)
    if name == "while":
        return [False] * len(body.invars)
    if name == "scan":
        carry = _equations.carried(eqn)
        flags = [flag and i not in carry for i, flag in enumerate(flags)]
    return flags[len(flags) - len(body.invars) :]


class _Level:
    """The equations of one traced function, without those inside of them."""

    def __init__(
        self, rolling: Rolling, closed: jex.ClosedJaxpr, known: Sequence[bool]
    ) -> None:
        self._rolling = rolling
        self._closed = closed
        self._eqns = _repeats.slices_first(closed.jaxpr.eqns, rolling.settings.least)
        self._known = self._find_known(known)
        self._new: list[jex.JaxprEqn] = []
        self._made: Makers = {}
        self._env: dict[jex.Var, Atom] = {}
        self._consts: list[tuple[jex.Var, Any]] = []

    def rolled(self) -> jex.ClosedJaxpr:
        """The same function with loops for repeats."""
        program = Program(self._eqns, self._rolling.numbering, _equal(self._closed))
        least, count = self._rolling.settings.least, len(self._eqns)
        found = program.find(least, self._why_not)
        if self._rolling.explains:
            refused = program.refused(found, least, self._why_not)
            self._rolling.missed += (Missed(r, self._eqns) for r in refused)
        at = 0
        for repeat in found:
            self._keep(at, repeat.start)
            self._replace(repeat)
            at = repeat.stop
        self._keep(at, count)
        return self._finished() if found else self._with_insides()

    def _finished(self) -> jex.ClosedJaxpr:
        jaxpr, consts = self._closed.jaxpr, self._closed.consts
        outvars = list(map(self._read, jaxpr.outvars))
        jaxpr = _equations.replace(
            jaxpr,
            constvars=[*jaxpr.constvars, *(v for v, _ in self._consts)],
            eqns=_without_unread_slices(self._new, outvars),
            outvars=outvars,
        )
        return jex.ClosedJaxpr(jaxpr, [*consts, *(value for _, value in self._consts)])

    def _with_insides(self) -> jex.ClosedJaxpr:
        """The function whose equations stay, in their order, but for what they run."""
        pairs = zip(self._eqns, self._new, strict=True)
        changed = {id(old): new for old, new in pairs if new is not old}
        if not changed:
            return self._closed
        jaxpr = self._closed.jaxpr
        eqns = [changed.get(id(eqn), eqn) for eqn in jaxpr.eqns]
        jaxpr = _equations.replace(jaxpr, eqns=eqns)
        return jex.ClosedJaxpr(jaxpr, self._closed.consts)

    def _find_known(self, known: Sequence[bool]) -> set[jex.Var]:
        """The variables that setup may depend on."""
        jaxpr = self._closed.jaxpr
        inputs = zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True)
        found = {v for v, flag in inputs if flag}
        for eqn in self._eqns:
            is_pure = not eqn.effects and eqn.primitive.name not in _cost.OPAQUE
            if is_pure and _equations.variables(eqn.invars).keys() <= found:
                found.update(eqn.outvars)
        return found

    def _is_known(self, atom: Atom) -> bool:
        return isinstance(atom, jex.Literal) or atom in self._known

    def _why_not(self, repeat: Repeat) -> str | None:
        """Why blocks that could be a loop are not to be one; None if they are."""
        if _repeats.is_loop(repeat, self._eqns):
            return None
        if not repeat.carried() and self._is_setup(repeat):
            return None
        return "nothing expensive in them depends on the block before"

    def _is_setup(self, repeat: Repeat) -> bool:
        """Whether blocks without a carry are the setup of layers."""
        block = self._eqns[repeat.start : repeat.start + repeat.period]
        outside = [a for operand in repeat.read() for a in operand.atoms]
        return (
            self._rolling.settings.setup == "auto"
            and any(operand.kind is Kind.OWN for operand in repeat.read())
            and all(map(self._is_known, outside))
            and any(_cost.is_expensive(eqn, lambda: math.inf) for eqn in block)
        )

    def _read(self, atom: Atom) -> Atom:
        return atom if isinstance(atom, jex.Literal) else self._env.get(atom, atom)

    def _keep(self, start: int, stop: int) -> None:
        """Goes on with equations as they are, but for what they run."""
        for eqn in self._eqns[start:stop]:
            known = list(map(self._is_known, eqn.invars))
            new = self._rolling.inside(eqn, known)
            if not self._env.keys().isdisjoint(_equations.variables(eqn.invars)):
                new = _equations.replace(new, invars=list(map(self._read, eqn.invars)))
            self._add(new)

    def _add(self, eqn: jex.JaxprEqn) -> None:
        self._new.append(eqn)
        self._made.update((v, (eqn, i)) for i, v in enumerate(eqn.outvars))

    def _replace(self, repeat: Repeat) -> None:
        """Goes on with a loop in place of equal blocks."""
        settings, at = self._rolling.settings, len(self._rolling.rolled)
        block = Block(repeat, self._eqns, self._read_after(repeat))
        inputs = block.inputs(self._is_known)
        body = self._rolling.roll(block.program(), [i.known for i in inputs])
        sizes = settings.setup_batch_size, settings.setup_remat, self._rolling.devices
        if repeat.carried():
            parts = _cut.cut(body, inputs, settings.setup, settings.where)
            schedule = settings.schedule(repeat.blocks)
            plan = _parts.Plan(parts, tuple(inputs), schedule, *sizes)
            self._splice(block, inputs, plan.run)
        else:
            parts = _parts.all_setup(body)
            run = _in_batches(parts, inputs, repeat.blocks, *sizes)
            self._splice(block, inputs, run)
        types = zip(inputs, body.in_avals, strict=True)
        rolled = Rolled(repeat, block.eqns, list(types), parts)
        self._rolling.rolled.insert(at, rolled)

    def _read_after(self, repeat: Repeat) -> dict[jex.Var, None]:
        """The variables that are read after a repeat."""
        later = self._eqns[repeat.stop :]
        atoms = [a for eqn in later for a in eqn.invars]
        return _equations.variables([*atoms, *self._closed.jaxpr.outvars])

    def _splice(
        self,
        block: Block,
        inputs: Sequence[Input],
        run: Callable[[list[Any]], list[Any]],
    ) -> None:
        """Goes on with the equations of a loop."""
        given = [list(map(self._read, atoms)) for atoms in block.atoms()]
        stacks = [
            _stacking(atoms, aval, i.layered, self._made)
            for atoms, aval, i in zip(given, block.types(), inputs, strict=True)
        ]
        outside = list(_equations.variables(a for s in stacks for a in s.atoms))

        def whole(*values: Any) -> list[Any]:
            env = dict(zip(outside, values, strict=True))
            return block.results(run([stack.value(env) for stack in stacks]))

        traced = jax.make_jaxpr(whole)(*(v.aval for v in outside))
        env: dict[jex.Var, Atom] = dict(zip(traced.jaxpr.invars, outside, strict=True))

        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env.get(atom, atom)

        self._consts += zip(traced.jaxpr.constvars, traced.consts, strict=True)
        for eqn in traced.jaxpr.eqns:
            self._add(_equations.replace(eqn, invars=list(map(read, eqn.invars))))
        results = map(read, traced.jaxpr.outvars)
        self._env.update(zip(block.read_after, results, strict=True))


def _in_batches(
    parts: Parts,
    inputs: Sequence[Input],
    num_layers: int,
    batch_size: int | None,
    remat: bool | None,
    devices: _spread.Devices | None,
) -> Callable[[list[Any]], list[Any]]:
    """Runs blocks that do not depend on one another."""

    def run(values: list[Any]) -> list[Any]:
        return _parts.derive(
            parts,
            values,
            inputs,
            num_layers,
            batch_size=batch_size,
            remat=remat,
            devices=devices,
        )[1]

    return run


Makers = dict[jex.Var, tuple[jex.JaxprEqn, int]]  # what makes each variable


class _Stacking(NamedTuple):
    """How an input of a loop is made of what blocks read.

    Attributes:
      atoms: What it is made of: one value for all, or that of each block; zeros if it
        is of none.
      aval: The type of one.
      layered: Whether it is stacked.
      rows: Which rows of a single array blocks read, if they do; it is the only atom.
    """

    atoms: list[Atom]
    aval: Aval
    layered: bool = False
    rows: range | None = None

    def value(self, env: dict[jex.Var, Any]) -> Any:
        """The input, given the values of variables."""
        if not self.atoms:
            return _equations.zeros(self.aval)
        values = [
            _number(a) if isinstance(a, jex.Literal) else env[a] for a in self.atoms
        ]
        if self.rows is not None:
            return _rows(values[0], self.rows)
        if not _structure.is_weak(self.aval):
            values = [_strong(v) for v in values]
        if not self.layered:
            return _equations.vary_as(values[0], self.aval)
        return jnp.stack(values)


def _rows(array: jax.Array, rows: range) -> jax.Array:
    """`array[rows]`."""
    low, high = min(rows), max(rows) + 1
    if (low, high) != (0, len(array)):
        array = jax.lax.slice_in_dim(array, low, high)
    return array if rows.step > 0 else jax.lax.rev(array, (0,))


def _number(literal: jex.Literal) -> jax.Array:
    """A literal as an array, of a weak type if it is of one."""
    aval: Aval = literal.aval
    number = np.asarray(literal.val, aval.dtype)
    return jnp.asarray(number.item() if _structure.is_weak(aval) else number)


def _strong(value: jax.Array) -> jax.Array:
    """`value` of the same type as one that an equation made."""
    if not getattr(value, "weak_type", False):
        return value
    return jax.lax.convert_element_type(value, value.dtype)


def _stacking(atoms: list[Atom], aval: Aval, layered: bool, made: Makers) -> _Stacking:
    """How an input is made of what blocks read, given what makes each variable."""
    if not layered:
        return _Stacking(atoms, aval)
    found = [_row(atom, made) for atom in atoms]
    arrays = {array for array, _ in found}
    numbers = [number for _, number in found]
    step = numbers[1] - numbers[0]
    rows = range(numbers[0], numbers[0] + step * len(numbers), step or 1)
    if len(arrays) > 1 or None in arrays or list(rows) != numbers or abs(step) != 1:
        return _Stacking(atoms, aval, layered)
    return _Stacking([*arrays], aval, layered, rows)


def _row(atom: Atom, made: Makers) -> tuple[Atom | None, int]:
    """The array that `atom` is a row of, if it is one, and the number of the row."""
    if unstacked := _made_by(atom, "unstack", made):
        eqn, number = unstacked
        return (eqn.invars[0], number) if eqn.params["axis"] == 0 else (None, 0)
    squeezed = _made_by(atom, "squeeze", made)
    if not squeezed or squeezed[0].params["dimensions"] != (0,):
        return None, 0
    sliced = _made_by(squeezed[0].invars[0], "slice", made)
    if not sliced:
        return None, 0
    [array], params = sliced[0].invars, sliced[0].params
    first, *rest = params["start_indices"]
    shape: Any = array.aval
    is_whole = not any(rest) and params["limit_indices"][1:] == shape.shape[1:]
    is_dense = set(params["strides"] or [1]) == {1}
    return (array, first) if is_whole and is_dense else (None, 0)


def _made_by(atom: Atom, name: str, made: Makers) -> tuple[jex.JaxprEqn, int] | None:
    """The equation of this name that makes `atom`, and which of its results it is."""
    found = made.get(atom) if isinstance(atom, jex.Var) else None
    return found if found and found[0].primitive.name == name else None


def _equal(closed: jex.ClosedJaxpr) -> dict[jex.Var, jex.Var]:
    """Constants that are equal to another one."""
    first: dict[Any, jex.Var] = {}
    found = {}
    for v, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        if not isinstance(value, jax.Array):
            numbers = np.asarray(value)
            key = numbers.dtype, numbers.shape, numbers.tobytes()
            found[v] = first.setdefault(key, v)
    return found


def _without_unread_slices(
    eqns: Sequence[jex.JaxprEqn], outvars: Sequence[Atom]
) -> list[jex.JaxprEqn]:
    """Drops the slices of which the loops read the whole."""
    read = set(_equations.variables(outvars))
    kept = []
    for eqn in reversed(eqns):
        is_slice = eqn.primitive.name in ("slice", "squeeze")
        if not is_slice or not read.isdisjoint(eqn.outvars):
            kept.append(eqn)
            read.update(_equations.variables(eqn.invars))
    return kept[::-1]
