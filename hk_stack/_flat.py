"""Jaxprs as flat lists of equations, of which parts can be run on their own.

`flatten` opens `jit` and rematerialised (`jax.checkpoint`) equations and notes for each
equation which inputs it depends on. `program` puts the equations that some values need
back together, each inside the rematerialised regions that it came from.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from hk_stack import _cost, _equations, _source
from hk_stack._equations import Atom, fresh, variables


class Node(NamedTuple):
    """One equation of a flattened jaxpr.

    Attributes:
      eqn: The equation.
      regions: The rematerialised equations around it, outermost first.
      reads: The inputs that it depends on, as a bit set. The bit past the last input
        stands for side effects.
    """

    eqn: jex.JaxprEqn
    regions: tuple[jex.JaxprEqn, ...]
    reads: int


class Flat(NamedTuple):
    """A jaxpr without constants, whose chosen equations are opened.

    Attributes:
      jaxpr: Where it came from; its constants are the first inputs.
      nodes: The equations, in order.
      outputs: The output atoms.
      reads: For each variable the inputs that it depends on, as a bit set.
    """

    jaxpr: jex.Jaxpr
    nodes: list[Node]
    outputs: list[Atom]
    reads: dict[jex.Var, int]

    def dependencies(self, atom: Atom) -> int:
        """The inputs that `atom` depends on, as a bit set."""
        return 0 if isinstance(atom, jex.Literal) else self.reads[atom]


class Exposed(NamedTuple):
    """An equation in two steps, of which the first can be looked into.

    Attributes:
      before: What to compute first, from the inputs of the equation.
      after: Given these values, the equation that computes the rest.
    """

    before: jex.ClosedJaxpr
    after: Callable[[list[Atom]], jex.JaxprEqn]


Expose = Callable[[jex.JaxprEqn, list[int]], Exposed | None]


def bits(flags: Iterable[bool]) -> int:
    """The bit set of the positions at which `flags` is true.

    >>> bits([True, False, True])
    5
    """
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def positions(bits: int) -> Iterator[int]:
    """The positions in a bit set.

    >>> list(positions(5))
    [0, 2]
    """
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def flatten(
    closed: jex.ClosedJaxpr,
    opens: Callable[[jex.Jaxpr, int], bool],
    expose: Expose = lambda eqn, reads: None,
) -> Flat:
    """Flattens `closed`, with what each equation depends on.

    Args:
      closed: A traced function. Its constants count as its first inputs.
      opens: Given what a `jit` or remat equation runs, and the bit set of what it
        reads, whether to put its equations in its place.
      expose: Given any other equation and the bit sets of what its inputs depend on,
        the same in two steps, or None to leave it whole.

    Returns:
      The equations in a flat list.
    """
    jaxpr = without_constants(closed.jaxpr)
    reads = {var: 1 << i for i, var in enumerate(jaxpr.invars)}
    flat = Flat(jaxpr, [], [], reads)
    outputs = _Flattening(flat, opens, expose).visit(jaxpr, jaxpr.invars, _Place())
    return flat._replace(outputs=outputs)


class _Place(NamedTuple):
    """Where in the traced function equations are.

    Attributes:
      regions: The rematerialised equations around them, outermost first. What runs
        twice is two of them, as each is made anew.
      source: What they say of their source, if they are those of a library: who called
        it, and its name.
      is_exposed: Whether they were made of one that was exposed.
    """

    regions: tuple[jex.JaxprEqn, ...] = ()
    source: Any = None
    is_exposed: bool = False


class _Flattening(NamedTuple):
    """The walk through a traced function; its attributes are those of `flatten`."""

    flat: Flat
    opens: Callable[[jex.Jaxpr, int], bool]
    expose: Expose

    def visit(
        self, jaxpr: jex.Jaxpr, args: Sequence[Atom], place: _Place
    ) -> list[Atom]:
        """Adds the equations of `jaxpr`, run on `args`; returns its results."""
        env = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env.get(atom, atom)

        for eqn in jaxpr.eqns:
            now, invars = eqn, list(map(read, eqn.invars))
            if place.source or invars != eqn.invars:
                now = _equations.replace(eqn, invars=invars, source_info=place.source)
            env.update(zip(eqn.outvars, self._enter(now, place), strict=True))
        return list(map(read, jaxpr.outvars))

    def _enter(self, eqn: jex.JaxprEqn, place: _Place) -> list[Atom]:
        """Adds an equation, or those it stands for; returns their results."""
        masks = list(map(self.flat.dependencies, eqn.invars))
        mask, body = _union(masks), _equations.body_in_place(eqn)
        if body is not None and self.opens(body, mask):
            regions = place.regions
            if eqn.primitive.name in _equations.REMAT:
                regions = (*regions, _equations.replace(eqn))
            source = _source.of_body(eqn, body, place.source)
            inside = _Place(regions, source, place.is_exposed)
            return self.visit(body, eqn.invars, inside)
        # What an exposed equation became is not exposed again.
        if not place.is_exposed and (exposed := self.expose(eqn, masks)):
            before = place._replace(is_exposed=True)
            made = self.visit(exposed.before.jaxpr, eqn.invars, before)
            eqn = exposed.after(made)
            mask = _union(map(self.flat.dependencies, eqn.invars))
        return self._add(Node(eqn, place.regions, mask))

    def _add(self, node: Node) -> list[Atom]:
        """Adds an equation as it is; returns its results."""
        eqn, regions, mask = node
        reads = self.flat.reads
        if not reads.keys().isdisjoint(eqn.outvars):
            # Bodies are shared, and so are variables by bodies made from one another.
            outvars = [fresh(v) if v in reads else v for v in eqn.outvars]
            eqn = _equations.replace(eqn, outvars=outvars)
        if eqn.effects or eqn.primitive.name in _cost.OPAQUE:
            mask |= 1 << len(self.flat.jaxpr.invars)
        reads.update(dict.fromkeys(eqn.outvars, mask))
        self.flat.nodes.append(Node(eqn, regions, mask))
        return eqn.outvars


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)


def program(
    flat: Flat,
    outputs: Sequence[Atom],
    given: Sequence[jex.Var] = (),
    *,
    with_effects: bool = False,
) -> tuple[jex.ClosedJaxpr, tuple[int, ...]]:
    """The part of `flat` that computes `outputs`, and nothing else.

    Args:
      flat: A flattened jaxpr.
      outputs: What to compute.
      given: Variables that come in from outside, before the inputs.
      with_effects: Whether equations with side effects are kept.

    Returns:
      A closed jaxpr that takes `given` and the inputs that it reads, and the
      positions of these inputs.
    """
    nodes = needed(flat.nodes, outputs, given, with_effects=with_effects)
    eqns = _restore_regions(nodes, 0, outputs)
    reads = variables([*outputs, *(a for e in eqns for a in e.invars)])
    inputs = flat.jaxpr.invars
    positions = tuple(i for i, v in enumerate(inputs) if v in reads and v not in given)
    jaxpr = _equations.replace(
        flat.jaxpr,
        invars=[*given, *(inputs[i] for i in positions)],
        outvars=list(outputs),
        eqns=eqns,
        effects=_effects(eqns),
    )
    return jex.ClosedJaxpr(jaxpr, []), positions


def needed(
    nodes: Iterable[Node],
    outputs: Sequence[Atom],
    given: Iterable[jex.Var] = (),
    *,
    with_effects: bool = False,
) -> list[Node]:
    """The nodes that `outputs` depend on once `given` comes in from outside."""
    outside = set(given)
    live = set(variables(outputs)) - outside
    kept = []
    for node in reversed(list(nodes)):
        eqn = node.eqn
        if live.isdisjoint(eqn.outvars) and not (with_effects and eqn.effects):
            continue
        if not outside.isdisjoint(eqn.outvars):
            # One output may come in from outside while another is needed.
            outvars = [fresh(v) if v in outside else v for v in eqn.outvars]
            node = node._replace(eqn=_equations.replace(eqn, outvars=outvars))
        kept.append(node)
        live.update(variables(eqn.invars).keys() - outside)
    return kept[::-1]


def _restore_regions(
    nodes: Sequence[Node], depth: int, outputs: Sequence[Atom]
) -> list[jex.JaxprEqn]:
    """The equations of `nodes`, with the rematerialised regions put around them."""

    def region(node: Node) -> jex.JaxprEqn | None:
        return node.regions[depth] if len(node.regions) > depth else None

    eqns: list[jex.JaxprEqn] = []
    live = variables(outputs)
    groups = [(key, list(group)) for key, group in itertools.groupby(nodes, region)]
    for key, group in reversed(groups):
        if key is None:
            new = [node.eqn for node in group]
        else:
            made = {v for node in group for v in node.eqn.outvars}
            body = _restore_regions(group, depth + 1, [v for v in live if v in made])
            new = [_remat(key, body, [v for v in live if v in made])]
        eqns = new + eqns
        live |= {v: None for eqn in new for v in variables(eqn.invars)}
    return eqns


def _remat(
    eqn: jex.JaxprEqn, body: list[jex.JaxprEqn], outvars: list[Atom]
) -> jex.JaxprEqn:
    """The rematerialised equation `eqn` with another body."""
    made = {v for e in body for v in e.outvars}
    reads = {v: None for e in body for v in variables(e.invars) if v not in made}
    invars: list[Atom] = list(reads)
    jaxpr = _equations.replace(
        eqn.params["jaxpr"],
        invars=invars,
        outvars=outvars,
        eqns=body,
        effects=_effects(body),
    )
    return _equations.with_remat_body(eqn, invars, jaxpr)


def without_constants(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """`jaxpr` with its constants as its first inputs."""
    return _equations.replace(
        jaxpr, constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]
    )


def _effects(eqns: Iterable[jex.JaxprEqn]) -> set[Any]:
    return set().union(*(eqn.effects for eqn in eqns))
