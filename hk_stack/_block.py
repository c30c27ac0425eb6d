"""Equal blocks of equations as one block, a function of what it reads."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import _equations, _repeats, _structure
from hk_stack._equations import Atom, Aval, fresh
from hk_stack._parts import Input
from hk_stack._repeats import Kind, Operand, Place, Repeat


class Block:
    """Equal blocks as one, a function of what it reads.

    Attributes:
      repeat: The blocks.
      eqns: The equations of one.
      read_after: The variables of all blocks that are read after them.
    """

    def __init__(
        self,
        repeat: Repeat,
        eqns: Sequence[jex.JaxprEqn],
        later: dict[jex.Var, None],
    ) -> None:
        """Makes a block.

        Args:
          repeat: The blocks.
          eqns: The equations that they are among.
          later: The variables that are read after them.
        """
        self.repeat = repeat
        self.eqns: list[jex.JaxprEqn] = []
        self._all = eqns
        self._inputs: dict[Any, tuple[jex.Var, Operand]] = {}
        self._env: dict[jex.Var, Atom] = {}
        self._add_carry()
        for eqn, operands in zip(self._first(), repeat.operands, strict=True):
            self._add(eqn, list(map(self._atom, operands)))
        self._collect(later)

    def _made_at(self, place: Place, block: int = 0) -> jex.Var:
        """What makes a value of a block."""
        at, result = place
        repeat = self.repeat
        return self._all[repeat.start + block * repeat.period + at].outvars[result]

    def _add_carry(self) -> None:
        """Inputs for what goes from block to block, first of all."""
        for key, operand in self.repeat.carried().items():
            taken = fresh(self._made_at(operand.place))
            self._inputs[Kind.CARRY, key] = taken, operand

    def _atom(self, operand: Operand) -> Atom:
        """What an equation of the block reads."""
        kind, place, atoms = operand
        if kind is Kind.INNER:
            made = self._made_at(place)
            return self._env.get(made, made)
        if kind is Kind.SHARED and isinstance(atoms[0], jex.Literal):
            return atoms[0]
        identities = tuple(map(_repeats.identity, atoms))
        key = (place, identities[0]) if kind is Kind.CARRY else identities
        if (kind, key) not in self._inputs:
            taken = jex.Var(_common(atoms))
            self._inputs[kind, key] = taken, operand
        return self._inputs[kind, key][0]

    def _add(self, eqn: jex.JaxprEqn, atoms: list[Atom]) -> None:
        """Adds an equation, with the numbers inside of it after its operands."""
        count = len(eqn.invars)
        now = _equations.replace(eqn, invars=atoms[:count])
        eqns, results = _with_numbers(now, atoms[count:])
        self.eqns += eqns
        self._env.update(zip(eqn.outvars, results, strict=True))

    def _collect(self, later: dict[jex.Var, None]) -> None:
        """Results: the next carry, what is read of the last block, then of others."""
        repeat = self.repeat
        carried = repeat.carried().values()
        self._next = [self._made_at(operand.place) for operand in carried]
        self._rows: list[jex.Var] = []
        self.read_after: list[jex.Var] = []
        self._picks: list[tuple[jex.Var, int]] = []
        for at, eqn in enumerate(self._first()):
            for result, made in enumerate(eqn.outvars):
                each = [self._made_at((at, result), b) for b in range(repeat.blocks)]
                blocks = [b for b, v in enumerate(each) if v in later]
                self.read_after += (each[b] for b in blocks)
                self._picks += ((made, b) for b in blocks)
                if blocks:
                    self._return(made, is_last=blocks == [repeat.blocks - 1])

    def _return(self, made: jex.Var, *, is_last: bool) -> None:
        """Has the loop return a value, of the last block or of all."""
        aval: Aval = made.aval
        is_key = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
        if not is_last or is_key or not self._next:
            self._rows.append(made)
        elif made not in self._next:  # It goes along, unread by the next block.
            self._next.append(made)
            self._inputs[Kind.CARRY, made] = fresh(made), Operand(Kind.CARRY)

    def _first(self) -> Sequence[jex.JaxprEqn]:
        start = self.repeat.start
        return self._all[start : start + self.repeat.period]

    def program(self) -> jex.ClosedJaxpr:
        """The block as a function: of `inputs`; the next carry, then rows."""
        outvars = [self._env.get(v, v) for v in (*self._next, *self._rows)]
        invars = [taken for taken, _ in self._inputs.values()]
        return _equations.program(invars, self.eqns, outvars)

    def inputs(self, is_known: Callable[[Atom], bool]) -> list[Input]:
        """What the cut must know of what the block reads."""
        described = []
        for _, (kind, _, atoms) in self._inputs.values():
            known = kind is not Kind.CARRY and all(map(is_known, atoms))
            fixed = known or kind is Kind.SHARED
            described.append(_INPUTS[kind]._replace(known=known, fixed=fixed))
        return described

    def atoms(self) -> list[tuple[Atom, ...]]:
        """What is read from outside, by input: by the first block, or by each."""
        return [operand.atoms for _, operand in self._inputs.values()]

    def types(self) -> list[Aval]:
        """The type of each input."""
        return [taken.aval for taken, _ in self._inputs.values()]

    def results(self, values: list[Any]) -> list[Any]:
        """The values of `read_after`, given the last carry and the rows."""
        ends = dict(zip(self._next, values, strict=False))
        rows = dict(zip(self._rows, values[len(self._next) :], strict=True))
        return [
            rows[made][block] if made in rows else ends[made]
            for made, block in self._picks
        ]


_INPUTS = {
    Kind.CARRY: Input("what the layer before made", carried=True),
    Kind.SHARED: Input("a value that all layers share"),
    Kind.OWN: Input("a value of each layer", layered=True),
}


def _common(atoms: Sequence[Atom]) -> Aval:
    """The type of each of several values: that of a Python number only if all are."""
    aval: Aval = atoms[0].aval
    if not _structure.is_weak(aval) or all(_structure.is_weak(a.aval) for a in atoms):
        return aval
    return aval.update(weak_type=False)


def _with_numbers(
    eqn: jex.JaxprEqn, numbers: Sequence[Atom]
) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """An equation with other numbers inside of it; and its results.

    Args:
      eqn: A `jit` equation, whose own equations take its place, or a remat one.
      numbers: What takes the place of its `inner_literals`, in their order.
    """
    body = _equations.body_in_place(eqn)
    if body is None or all(isinstance(a, jex.Literal) for a in numbers):
        results: list[Any] = list(map(fresh, eqn.outvars))
        return [_equations.replace(eqn, outvars=results)], results
    if eqn.primitive.name in _equations.JIT:
        return _renumbered(body, eqn.invars, iter(numbers))
    more = list(_equations.variables(numbers))
    eqns, outvars = _renumbered(body, body.invars, iter(numbers))
    body = _equations.replace(
        body, invars=[*body.invars, *more], eqns=eqns, outvars=outvars
    )
    eqn = _equations.with_remat_body(eqn, [*eqn.invars, *more], body)
    results = list(map(fresh, outvars))
    return [_equations.replace(eqn, outvars=results)], results


def _renumbered(
    jaxpr: jex.Jaxpr, args: Sequence[Atom], numbers: Iterator[Atom]
) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """The equations of `jaxpr`, run on `args`, with other numbers; and its results."""
    env: dict[jex.Var, Atom] = dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Atom) -> Atom:
        return next(numbers) if isinstance(atom, jex.Literal) else env[atom]

    eqns = []
    for eqn in jaxpr.eqns:
        now = _equations.replace(eqn, invars=list(map(read, eqn.invars)))
        inner = [next(numbers) for _ in _structure.inner_literals(eqn)]
        made, results = _with_numbers(now, inner)
        eqns += made
        env.update(zip(eqn.outvars, results, strict=True))
    return eqns, list(map(read, jaxpr.outvars))
