"""The readable report of a partition: what was hoisted, and what stayed and why."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from hk_stack import _cost, _equations, _flat, _source, _stays
from hk_stack._equations import Atom
from hk_stack._marks import HOIST, HOISTED
from hk_stack._parts import Input, Parts
from hk_stack._stays import Stayed
from hk_stack._table import Shown, Table, si


class Group(NamedTuple):
    """Derived values that come from one line of the source.

    Attributes:
      source: `file.py:line in function`.
      primitive: What computes the values: the function of JAX that was called there,
        or a primitive.
      shapes: The derived values, as in `float32[8,64]`.
      nbytes: Their size in bytes.
      flops: Operations that setup does for them and not for an earlier group, roughly.
    """

    source: str
    primitive: str
    shapes: tuple[str, ...]
    nbytes: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Report(Shown):
    """What a partition hoisted, and what stayed and why.

    Attributes:
      where: Names the function.
      hoisted: What setup computes.
      kept: How many arrays the derived values hold as they were given.
      kept_nbytes: Their size in bytes.
      stayed: What the call does with known values, and why.
    """

    where: str
    hoisted: tuple[Group, ...]
    kept: int
    kept_nbytes: int
    stayed: tuple[Stayed, ...]

    def _parts(self) -> Iterator[str | Table]:
        yield self._headline()
        if self.hoisted:
            titles = "hoisted|function|derived values|bytes|FLOPs".split("|")
            yield Table(titles, list(map(cells, self.hoisted)), titles[-2:])
        if self.stayed:
            titles = ["stays in the call", "function", REASON]
            yield Table(titles, list(map(reason_cells, self.stayed)), is_prose=True)

    def _headline(self) -> str:
        nbytes = si(sum(group.nbytes for group in self.hoisted))
        flops = si(sum(group.flops for group in self.hoisted))
        some = f"hoisted {nbytes}B from {flops}FLOP"
        hoisted = some if self.hoisted else "nothing to hoist"
        kept = f"{self.kept} arrays ({si(self.kept_nbytes)}B) kept as they are"
        return f"{self.where}: {hoisted}; {kept}"


def report(
    parts: Parts,
    inputs: Sequence[Input],
    kept: Sequence[Any],
    where: str,
) -> Report:
    """Describes a cut.

    Args:
      parts: A cut without layers.
      inputs: What the inputs of the cut function are.
      kept: The arrays among the derived values that setup does not compute.
      where: Names the function.
    """
    nbytes = sum(map(_cost.bytes_of, kept))
    hoisted = tuple(groups(parts.shared.jaxpr))
    return Report(where, hoisted, len(kept), nbytes, stayed(parts, inputs))


def stayed(
    parts: Parts, inputs: Sequence[Input], policy: str = "auto"
) -> tuple[Stayed, ...]:
    """What the call of a cut function does that might have been setup."""
    derived = [Input("a derived value", known=True)] * parts.num_derived
    read = [*derived, *(inputs[i] for i in parts.call_inputs)]
    return _stays.stayed(parts.call.jaxpr, read, policy)


def hoisted_names(setup: jex.Jaxpr) -> list[str]:
    """A name for each output of `setup`, unique by its number: `3_fft`."""
    digits = len(str(len(setup.outvars)))  # In order, also when sorted as text.
    made = enumerate(_origins(setup))
    return [f"{i:0{digits}}_{origin.function}" for i, origin in made]


def groups(*setups: jex.Jaxpr) -> Iterator[Group]:
    """The outputs of programs of setup, those of one line together."""
    nodes = [_flat.Node(eqn, (), 0) for setup in setups for eqn in setup.eqns]
    found: dict[tuple[str, str], list[Any]] = {}
    for setup in setups:
        for v, origin in zip(setup.outvars, _origins(setup), strict=True):
            found.setdefault((origin.line(), origin.function), []).append(v)
    counted: set[jex.Var] = set()
    for (source, function), made in found.items():
        new = {
            node.eqn.outvars[0]: _cost.flops(node.eqn)
            for node in _flat.needed(nodes, made)
            if node.eqn.outvars and node.eqn.outvars[0] not in counted
        }
        counted |= set(new)
        shapes = tuple(f"{v.aval.dtype}{list(v.aval.shape)}" for v in made)
        yield Group(source, function, shapes, _cost.nbytes(made), sum(new.values()))


class _Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
      function: What made it.
      eqns: The equation that did, after those around it.
    """

    function: str
    eqns: tuple[jex.JaxprEqn, ...] = ()

    def line(self) -> str:
        """The source line."""
        lines = map(_source.line, reversed(self.eqns))
        return next(
            (line for line in lines if line != _source.UNKNOWN), _source.UNKNOWN
        )


_CONSTANT, _INPUT = _Origin("a constant"), _Origin("an input")
_Made = dict[jex.Var, tuple[jex.JaxprEqn, int]]


def _origins(jaxpr: jex.Jaxpr) -> list[_Origin]:
    """Where each output comes from."""
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    return [_origin(made, value) for value in jaxpr.outvars]


def _origin(made: _Made, value: Atom) -> _Origin:
    """Where a value comes from, given which equation and output each is."""
    if isinstance(value, jex.Literal):
        return _CONSTANT
    if value not in made:
        return _INPUT
    eqn, i = made[value]
    before = list(_equations.variables(eqn.invars))
    is_moved = _cost.is_layout(eqn) or eqn.primitive.name == "name"
    if is_moved and len(before) == 1 and before[0] in made:
        return _origin(made, before[0])
    name, called = eqn.primitive.name, _source.library_function(eqn)
    is_ours = name in _OF_BATCHES and _source.is_ours(eqn)
    behind: Iterator[_Origin] = iter(())
    if not called and (is_ours or name in _CALLS):
        behind = _from_bodies(eqn, i)
    if is_ours:  # Nobody wants to hear of that: what it is made of is the user's.
        called = called if name in _LOOPS else ""
        values = reversed(before)  # `select(flags, no, yes)`
        behind = itertools.chain(behind, (_origin(made, v) for v in values))
    if found := next((origin for origin in behind if origin.eqns), None):
        return _Origin(called or found.function, (eqn, *found.eqns))
    if name == "name" and eqn.params["name"] in (HOIST, HOISTED):
        called = "hoist"  # Of a parameter as it is.
    return _Origin(called or name, () if is_ours else (eqn,))


def _from_bodies(eqn: jex.JaxprEqn, i: int) -> Iterator[_Origin]:
    """Where an output comes from in what an equation runs."""
    for body in _equations.bodies(eqn):
        if len(body.outvars) == len(eqn.outvars):
            yield _origins(body)[i]


# What runs the user's functions, and what batches of setup are made of.
_JITS = frozenset((*_equations.JIT, *_equations.REMAT))
_CALLS = _JITS.union(_equations.CUSTOM_DERIVATIVES)
_LOOPS = frozenset(("scan", "while", "cond"))
_OF_BATCHES = _JITS | _LOOPS | {"broadcast_in_dim", "concatenate", "select_n"}


def cells(group: Group) -> list[str]:
    """A row of a table."""
    shapes = ", ".join(group.shapes).replace(" ", "")
    flops, nbytes = si(group.flops), si(group.nbytes)
    return [group.source, group.primitive, shapes, f"{nbytes}B", flops]


REASON = "why, and what to write"


def reason_cells(stayed: Stayed) -> list[str]:
    """The same for what stays."""
    return [stayed.source, stayed.primitive, f"{stayed.why}: {stayed.write}"]
