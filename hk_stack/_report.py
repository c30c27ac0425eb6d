"""The readable report of a partition: what was hoisted, and what stayed and why."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from hk_stack import _cost, _equations, _flat
from hk_stack._equations import Atom
from hk_stack._parts import Input, Parts
from hk_stack._table import Shown, Table, si


class Group(NamedTuple):
    """Derived values that come from one line of the source.

    Attributes:
      source: `file.py:line in function`.
      primitive: What computes the values.
      shapes: The derived values, as in `float32[8,64]`.
      nbytes: Their size in bytes.
      flops: Operations that setup does for them and not for an earlier group, roughly.
    """

    source: str
    primitive: str
    shapes: tuple[str, ...]
    nbytes: int
    flops: float


class Stayed(NamedTuple):
    """Work on known values that the call does.

    Attributes:
      source: `file.py:line in function`.
      primitive: What does it.
      why: Why it was not hoisted.
    """

    source: str
    primitive: str
    why: str


@dataclasses.dataclass(frozen=True)
class Report(Shown):
    """What a partition hoisted, and what stayed and why.

    Attributes:
      where: Names the function.
      hoisted: What setup computes.
      kept: How many arrays the derived values hold as they were given.
      kept_nbytes: Their size in bytes.
      stayed: What the call does with known values.
    """

    where: str
    hoisted: tuple[Group, ...]
    kept: int
    kept_nbytes: int
    stayed: tuple[Stayed, ...]

    def _parts(self) -> Iterator[str | Table]:
        yield self._headline()
        if self.hoisted:
            titles = "hoisted|primitive|derived values|bytes|FLOPs".split("|")
            yield Table(titles, list(map(cells, self.hoisted)), titles[-2:])
        if self.stayed:
            yield Table(["stays in the call", "primitive", "why"], self.stayed)

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
    read = [inputs[i] for i in parts.call_inputs]
    known = [None if i.constant else i.known for i in read]
    flags = [True] * len(parts.shared.out_avals) + known
    stayed = dict.fromkeys(_stayed(parts.call.jaxpr, flags))
    nbytes = sum(map(_cost.bytes_of, kept))
    hoisted = tuple(groups(parts.shared.jaxpr))
    return Report(where, hoisted, len(kept), nbytes, tuple(stayed))


def hoisted_names(setup: jex.Jaxpr) -> list[str]:
    """A name for each output of `setup`, unique by its number: `3_fft`."""
    digits = len(str(len(setup.outvars)))  # In order, also when sorted as text.
    made = enumerate(_origins(setup))
    return [f"{i:0{digits}}_{primitive}" for i, (_, primitive) in made]


def groups(setup: jex.Jaxpr) -> Iterator[Group]:
    """The outputs of `setup`, those of one line together."""
    nodes = [_flat.Node(eqn, (), 0) for eqn in setup.eqns]
    found: dict[tuple[str, str], list[Any]] = {}
    for v, origin in zip(setup.outvars, _origins(setup), strict=True):
        found.setdefault(origin, []).append(v)
    counted: set[jex.Var] = set()
    for (source, primitive), made in found.items():
        new = {
            node.eqn.outvars[0]: _cost.flops(node.eqn)
            for node in _flat.needed(nodes, made)
            if node.eqn.outvars and node.eqn.outvars[0] not in counted
        }
        counted |= set(new)
        shapes = tuple(f"{v.aval.dtype}{list(v.aval.shape)}" for v in made)
        yield Group(source, primitive, shapes, _cost.nbytes(made), sum(new.values()))


def _origins(jaxpr: jex.Jaxpr) -> list[tuple[str, str]]:
    """The source line and the primitive that each output comes from."""
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    return [_origin(made, value) for value in jaxpr.outvars]


def _origin(
    made: dict[jex.Var, tuple[jex.JaxprEqn, int]], value: Atom
) -> tuple[str, str]:
    """The same for one value, given which equation and output each comes from."""
    if isinstance(value, jex.Literal):
        return _flat.UNKNOWN, _CONSTANT
    if value not in made:
        return _flat.UNKNOWN, _INPUT
    eqn, i = made[value]
    before = list(_equations.variables(eqn.invars))
    is_moved = _cost.is_layout(eqn) or eqn.primitive.name == "name"
    if is_moved and len(before) == 1 and before[0] in made:
        return _origin(made, before[0])
    line = _flat.source_line(eqn)
    for body in _equations.bodies(eqn):
        if len(body.outvars) == len(eqn.outvars):
            inner, primitive = _origins(body)[i]
            if primitive not in (_CONSTANT, _INPUT):
                return (line if inner == _flat.UNKNOWN else inner), primitive
    return line, eqn.primitive.name


_CONSTANT, _INPUT = "a constant", "an input"


def _stayed(
    jaxpr: jex.Jaxpr, known: Sequence[bool | None], caller: str = _flat.UNKNOWN
) -> Iterator[Stayed]:
    """What a call does with known values, and what in it was left whole.

    Args:
      jaxpr: The call, or what one of its equations runs.
      known: Which inputs are known; None for constants, of which nobody needs to hear.
      caller: The source line of that equation.
    """
    flags: dict[jex.Var, bool | None] = dict.fromkeys(jaxpr.constvars)
    flags.update(zip(jaxpr.invars, known, strict=True))
    for eqn in jaxpr.eqns:
        read = [None if isinstance(a, jex.Literal) else flags[a] for a in eqn.invars]
        source, name = _flat.source_line(eqn), eqn.primitive.name
        source = caller if source == _flat.UNKNOWN else source
        made = True if True in read else None
        if False in read:
            made = False
            yield from _inside(eqn, read, source)
        elif name in _cost.OPAQUE or eqn.effects:
            made = False
            yield Stayed(source, name, "it has side effects or runs foreign code")
        elif made and not _cost.is_layout(eqn):
            why = "it is cheap, and no smaller than what it is made of"
            yield Stayed(source, name, why)
        flags.update(dict.fromkeys(eqn.outvars, made))


def _inside(
    eqn: jex.JaxprEqn, known: list[bool | None], source: str
) -> Iterator[Stayed]:
    """The same for what `eqn` runs."""
    name = eqn.primitive.name
    if name == "scan":
        carry = _equations.carried(eqn)
        known = [False if i in carry else flag for i, flag in enumerate(known)]
    for body in _equations.bodies(eqn):
        flags = known[len(known) - len(body.invars) :]
        if len(flags) != len(body.invars) or name == "while":
            continue
        inner = list(_stayed(body, flags, source))
        if name in _CUT:
            yield from inner
        elif inner and any(_cost.is_expensive(e, lambda: 0) for e in body.eqns):
            why = f"the cut does not look into a {name} that depends on the rest"
            yield Stayed(source, name, why)


_CUT = ("scan", *_equations.JIT, *_equations.REMAT)


def cells(group: Group) -> list[str]:
    """A row of a table."""
    shapes = ", ".join(group.shapes).replace(" ", "")
    flops, nbytes = si(group.flops), si(group.nbytes)
    return [group.source, group.primitive, shapes, f"{nbytes}B", flops]
