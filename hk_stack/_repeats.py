"""Repeats: blocks of equations that do the same, one after the other.

A Python loop over layers leaves blocks of equal equations in a traced program. What an
equation reads is, in each block,

- what the same block made,
- what the block before made, at the same place in all blocks: the *carry*,
- the same value from outside, which all blocks *share*, or
- another value from outside, the block's *own*: its parameters, or a number in it.

Blocks that read anything else are no loop. Equations are compared as numbers, all at
once: to find the layers of a program of thousands of equations takes milliseconds.
"""

import collections
import enum
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

from hk_stack import _cost, _equations, _source, _structure
from hk_stack._equations import Atom

Place = tuple[int, int]  # an equation of a block, and which of its results
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Kind(enum.Enum):
    """Where blocks have an operand from."""

    INNER = "the same block"
    CARRY = "the block before"
    SHARED = "outside, the same for all"
    OWN = "outside, another for each"


class Operand(NamedTuple):
    """What blocks read at one place.

    Attributes:
      kind: Where from.
      place: What makes it, in the same block or in the one before.
      atoms: What is read from outside: by the first block, of a carry; by each.
    """

    kind: Kind
    place: Place = (-1, 0)
    atoms: tuple[Atom, ...] = ()


class Repeat(NamedTuple):
    """Equal blocks of equations.

    Attributes:
      start: Where the first begins.
      period: How many equations a block has.
      blocks: How many there are.
      operands: What blocks read, by equation; numbers inside of one come last.
    """

    start: int
    period: int
    blocks: int
    operands: list[list[Operand]]

    @property
    def spared(self) -> int:
        """How many equations a loop spares."""
        return self.period * (self.blocks - 1)

    @property
    def stop(self) -> int:
        """Where the last block ends."""
        return self.start + self.period * self.blocks

    def read(self) -> Iterator[Operand]:
        """All that blocks read."""
        return itertools.chain.from_iterable(self.operands)

    def carried(self) -> dict[Hashable, Operand]:
        """The carry, by what makes it and what the first block is given."""
        carried = (o for o in self.read() if o.kind is Kind.CARRY)
        return {(o.place, identity(o.atoms[0])): o for o in carried}


class Refused(NamedTuple):
    """Blocks that are alike, and why they are no loop.

    Attributes:
      start: Where the first begins.
      period: How many equations a block has.
      blocks: How many are alike.
      at: The equation that is in the way.
      why: What it does.
    """

    start: int
    period: int
    blocks: int
    at: int
    why: str


class _Candidate(NamedTuple):
    """Equations that are those of one period before.

    Attributes:
      period: How far apart equal equations are.
      start: The first of them.
      length: How many are repeated.
    """

    period: int
    start: int
    length: int

    @property
    def spared(self) -> int:
        """How many equations a loop would spare at most."""
        return self.length // self.period * self.period

    @property
    def stop(self) -> int:
        """Where the last repeated equation ends."""
        return self.start + self.length + self.period

    def pieces(self, free: "Flags", least: int) -> Iterator["_Candidate"]:
        """The parts of it where equations are free, with so many blocks."""
        for start, stop in _runs(free[self.start : self.stop]):
            if stop - start >= self.period * least:
                length = stop - start - self.period
                yield _Candidate(self.period, self.start + start, length)

    def is_part_of(self, other: "_Candidate") -> bool:
        """Whether its blocks are some of the other's, or several of them each."""
        is_inside = other.start <= self.start and self.stop <= other.stop
        return is_inside and self.period % other.period == 0


def _runs(flags: "Flags") -> Iterator[tuple[int, int]]:
    """Where flags in a row are true: from, to."""
    ends = np.diff(np.concatenate([[0], flags.view(np.int8), [0]]))
    starts, stops = (np.flatnonzero(ends == sign) for sign in (1, -1))
    yield from zip(map(int, starts), map(int, stops), strict=True)


Worth = Callable[[Repeat], str | None]


def identity(atom: Atom) -> Hashable:
    """What tells a variable, or the number in the program, from others."""
    return _structure.number(atom) if isinstance(atom, jex.Literal) else id(atom)


class Program:
    """The equations of a traced function as arrays, to look for repeats in."""

    def __init__(
        self,
        eqns: Sequence[jex.JaxprEqn],
        numbering: _structure.Numbering,
        same: Mapping[jex.Var, jex.Var],
    ) -> None:
        """Reads equations.

        Args:
          eqns: The equations.
          numbering: What equations compute.
          same: Variables from outside that are equal to others.
        """
        self._eqns = eqns
        self._ids = np.array([numbering.of(eqn) for eqn in eqns], np.int64)
        # The operands of each equation, and the numbers inside of it.
        self._atoms = [
            [a if isinstance(a, jex.Literal) else same.get(a, a) for a in atoms]
            for atoms in ((*e.invars, *_structure.inner_literals(e)) for e in eqns)
        ]
        self._first = np.cumsum([0, *map(len, self._atoms)])
        made = {v: (i, k) for i, e in enumerate(eqns) for k, v in enumerate(e.outvars)}
        places, numbers = [], []
        number_of: dict[Hashable, int] = {}
        atom: Any
        for atom in itertools.chain.from_iterable(self._atoms):
            is_literal = isinstance(atom, jex.Literal)
            places.append(_OUTSIDE if is_literal else made.get(atom, _OUTSIDE))
            numbers.append(number_of.setdefault(identity(atom), len(number_of)))
        self._made_by, self._result = np.array(places, np.int64).reshape(-1, 2).T
        self._numbers = np.array(numbers, np.int64)

    def find(self, least: int, worth: Worth) -> list[Repeat]:
        """Repeats that do not overlap, in order; those that spare most come first.

        Args:
          least: How many blocks there must be.
          worth: Says why a repeat is not worth a loop; None if it is.
        """
        found: list[Repeat] = []
        free = np.ones(len(self._eqns), bool)
        order = itertools.count()
        heap: list[tuple[int, int, int, _Candidate, Repeat | None]] = []

        def push(candidate: _Candidate, repeat: Repeat | None = None) -> None:
            spared = repeat.spared if repeat else candidate.spared
            entry = -spared, candidate.period, next(order), candidate, repeat
            heapq.heappush(heap, entry)

        branches: list[_Candidate] = []  # Blocks without a carry, that stay.
        for candidate in self._candidates(least, self._ids):
            push(candidate)
        while heap:
            *_, candidate, repeat = heapq.heappop(heap)
            if free[candidate.start : candidate.stop].all():
                if repeat is None:
                    is_new = not any(map(candidate.is_part_of, branches))
                    repeat = self._best_of(candidate, least) if is_new else None
                    if repeat and worth(repeat) is None:
                        push(candidate, repeat)
                    elif repeat and not repeat.carried():
                        branches.append(candidate)
                    continue
                found.append(repeat)
                free[repeat.start : repeat.stop] = False
            for piece in candidate.pieces(free, least):
                push(piece)
        return sorted(found, key=lambda repeat: repeat.start)

    def _candidates(self, least: int, ids: Numbers) -> Iterator[_Candidate]:
        """Where equations are those of one period before."""
        for period in range(1, len(ids) // least + 1):
            is_same = ids[:-period] == ids[period:]
            if np.count_nonzero(is_same) < period * (least - 1):
                continue
            for start, stop in _runs(is_same):
                if stop - start >= period * (least - 1):
                    yield _Candidate(period, start, stop - start)

    def _best_of(self, candidate: _Candidate, least: int) -> Repeat | None:
        """The most blocks that are a loop, and of these the ones of smallest carry."""
        best: tuple[tuple[int, int, int], _Places] | None = None
        period = candidate.period
        most = self._most_blocks(candidate)
        starts = np.argsort(-most, kind="stable")[: 2 * period]
        for offset in map(int, starts):
            blocks = int(most[offset])
            if blocks < max(least, best[0][0] if best else 0):
                break
            first = candidate.start + offset
            places = self._places(first, period, blocks)
            if (blocks := places.leading()) >= least:
                rank = blocks, -self._carried_size(places), -first
                best = max(best or (rank, places), (rank, places), key=_rank)
        return self._repeat(best[1], best[0][0]) if best else None

    def _most_blocks(self, candidate: _Candidate) -> Numbers:
        """How many blocks a loop can have at most, by where it starts.

        Two operands a period apart fit if what makes them is a period apart, too, or
        before the loop. If not, a loop may begin after what makes the second, or have
        both in its first two blocks; else it ends before the second.
        """
        _, start, stop = candidate.period, candidate.start, candidate.stop
        period, first = candidate.period, self._first
        now = slice(first[start + period], first[stop])
        before = slice(first[start], first[stop - period])
        made, made_before = self._made_by[now], self._made_by[before]
        at = np.repeat(
            np.arange(start + period, stop), np.diff(first[start + period : stop + 1])
        )
        is_moved = (made == made_before + period) & (made_before >= start)
        is_moved &= self._result[now] == self._result[before]
        is_moved &= at - made < 2 * period
        misfits = ~(is_moved | ((made < start) & (made_before < start)))
        made = np.where(made < start, made_before, np.minimum(made, at - 2 * period))
        misfits &= made >= start
        ends = np.full(stop - start, stop)
        np.minimum.at(ends, made[misfits] - start, at[misfits])
        ends = np.minimum.accumulate(ends[::-1])[::-1]
        most: Numbers = (ends - np.arange(start, stop)) // period
        return most

    def _places(self, start: int, period: int, blocks: int) -> "_Places":
        """Where each of so many blocks has its operands from."""
        read = slice(self._first[start], self._first[start + period * blocks])
        made_by, result, numbers = (
            array[read].reshape(blocks, -1)
            for array in (self._made_by, self._result, self._numbers)
        )
        at = made_by - (start + period * np.arange(blocks)[:, None])
        return _Places(start, period, at, result, numbers, made_by < start)

    def _carried_size(self, places: "_Places") -> int:
        """The size of the carry."""
        columns = places.at[1], places.result[1], places.numbers[0]
        read, end = places.carried(), places.start + places.period
        carried = {tuple(map(int, row)) for row in np.stack(columns)[:, read].T}
        nbytes = sum(
            _cost.nbytes([self._eqns[end + at].outvars[result]])
            for at, result, _ in carried
        )
        return nbytes if isinstance(nbytes, int) else len(carried)  # Of unknown shapes.

    def _repeat(self, places: "_Places", blocks: int) -> Repeat:
        start, period = places.start, places.period
        kinds = places.kinds(blocks)

        def operand(column: int, atoms: tuple[Atom, ...]) -> Operand:
            kind = kinds[column]
            block = 1 if kind is Kind.CARRY else 0
            at = int(places.at[block, column]) % period
            if kind is Kind.INNER:
                return Operand(kind, (at, int(places.result[block, column])))
            if kind is Kind.CARRY:
                place = at, int(places.result[block, column])
                return Operand(kind, place, atoms[:1])
            return Operand(kind, atoms=atoms if kind is Kind.OWN else atoms[:1])

        columns = itertools.count()
        stop = start + period * blocks
        operands = [
            [
                operand(next(columns), atoms)
                for atoms in zip(*self._atoms[at:stop:period], strict=True)
            ]
            for at in range(start, start + period)
        ]
        return Repeat(start, period, blocks, operands)

    def refused(
        self, found: Sequence[Repeat], least: int, worth: Worth
    ) -> Iterator[Refused]:
        """Blocks that are alike, but in no repeat that was found, and why.

        Args:
          found: The repeats that were found.
          least: How many blocks there must be.
          worth: See `find`.
        """
        yield from self._broken(found)
        taken: Flags = np.zeros(len(self._eqns), bool)
        for repeat in found:
            taken[repeat.start : repeat.stop] = True
        told = np.zeros_like(taken)
        for ids, few in (
            (self._ids, least),
            (self._alike(lambda e: e.primitive.name), least),
            (self._alike(lambda e: str(e.outvars[0].aval)), least),
            (self._ids, 2),
        ):
            candidates = self._candidates(few, ids)
            for candidate in heapq.nlargest(_SHOWN, candidates, key=_spared):
                around = slice(candidate.start, candidate.stop)
                if told[around].any() or taken[around].all():
                    continue
                if refused := self._refuse(candidate, least, worth, taken):
                    told[around] = True
                    yield refused

    def _broken(self, found: Sequence[Repeat]) -> Iterator[Refused]:
        """Why one repeat that was found ends, and the next goes on as it did."""
        for repeat, after in itertools.pairwise(found):
            _, period, blocks, _ = repeat
            at, stop = repeat.stop, after.start
            while at < stop and self._ids[at] == self._ids[at - period]:
                at += 1
            if period == after.period and at < stop:
                why = self._unlike(at, period, repeat.start)
                yield Refused(repeat.start, period, blocks + after.blocks, at, why)

    def _alike(self, of: Callable[[jex.JaxprEqn], str]) -> Numbers:
        """Numbers for equations that have as many operands, and this in common."""
        pairs = zip(self._eqns, self._atoms, strict=True)
        kinds = [(of(e) if e.outvars else "", len(a)) for e, a in pairs]
        number_of = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        return np.array([number_of[kind] for kind in kinds], np.int64)

    def _refuse(
        self, candidate: _Candidate, least: int, worth: Worth, taken: Flags
    ) -> Refused | None:
        """Why equations that are alike are no loop; None if nobody expects one."""
        period, start, length = candidate
        blocks, end = 1 + length // period, start + length
        places = self._places(start, period, blocks)
        if not self._is_chain(places):
            return None
        refused = functools.partial(Refused, start, period, blocks)
        is_other = self._ids[start:end] != self._ids[start + period : end + period]
        others = np.flatnonzero(is_other) + start + period
        if len(others):
            left = (
                at for at in map(int, others) if self._is_left(at, candidate, taken)
            )
            at = next(left, None)
            return None if at is None else refused(at, self._unlike(at, period, start))
        found = self._best_of(candidate, 2)
        if found and (why := worth(found)):
            return refused(start, why)
        if places.leading() < blocks:
            at, why = self._misread(places)
            return refused(at, why) if self._is_left(at, candidate, taken) else None
        if blocks < least and not taken[start:end].any():
            return refused(start, f"{blocks} in a row, fewer than min_layers={least}")
        return None

    def _is_left(self, at: int, candidate: _Candidate, taken: Flags) -> bool:
        """Whether the block of an equation is in no loop, and might be a layer."""
        first = at - (at - candidate.start) % candidate.period
        block = slice(first, first + candidate.period)
        expensive = filter(_is_expensive, self._eqns[block])
        return not taken[block].any() and not all(map(_cost.is_reduction, expensive))

    def _is_chain(self, places: "_Places") -> bool:
        """Whether blocks might be layers: each reads what the one before made."""
        block = self._eqns[places.start : places.start + places.period]
        if all(map(_cost.is_reduction, filter(_is_expensive, block))):
            return False
        is_same = (places.at[1:] == places.at[1]).all(axis=0)
        read = places.carried() & is_same
        made = zip(places.at[1][read], places.result[1][read], strict=True)
        start = places.start + places.period
        avals: list[Any] = [self._eqns[start + at].outvars[k].aval for at, k in made]
        return any(map(_equations.is_inexact, avals))

    def _unlike(self, at: int, period: int, start: int) -> str:
        """How an equation differs from that of the block before."""
        block = (at - start) // period
        now, before = self._eqns[at], self._eqns[at - period]
        if _structure.is_ordered(now):
            return f"side effects in order, which no loop keeps: {_described(now)}"
        words = _described(now), _described(before)
        if words[0] == words[1]:
            words = _differing(now, before)
        return (
            f"layer {block} is not like layer {block - 1}: {words[0]}, where layer "
            f"{block - 1} has {words[1]}"
        )

    def _misread(self, places: "_Places") -> tuple[int, str]:
        """Which equation reads what no loop can give it, and what that is."""
        block = places.leading()
        column = int(np.argmin(places.fits()[block]))
        first = self._first[places.start + block * places.period]
        at = int(np.searchsorted(self._first, first + column, "right")) - 1
        back = -int(places.at[block, column] // places.period)
        is_outside = places.is_outside[:, column]
        if not is_outside[block] and back > 1:
            return at, f"layer {block} reads what layer {block - back} made"
        if is_outside[block] != is_outside[block - 1]:
            sides = "a value from outside", "what another layer made"
            now, before = sides if is_outside[block] else sides[::-1]
            return at, f"layer {block} reads {now}, layer {block - 1} {before}"
        return at, f"layer {block} reads another value than layer {block - 1}"


_OUTSIDE: Place = (-1, 0)
_SHOWN = 50  # Of blocks that are alike: those with the most equations.


def _spared(candidate: _Candidate) -> int:
    return candidate.spared


class _Places(NamedTuple):
    """Where blocks have their operands from; arrays `[blocks, operands of a block]`.

    Attributes:
      start: Where the first begins.
      period: How many equations a block has.
      at: The equation that makes an operand, counted from the beginning of the block.
      result: Which of its results that is.
      numbers: The identity of the operand.
      is_outside: Whether it is made before the first block.
    """

    start: int
    period: int
    at: Numbers
    result: Numbers
    numbers: Numbers
    is_outside: Flags

    def fits(self) -> Flags:
        """Whether an operand, with those of the blocks before, can be one of a loop."""
        at, result = self.at, self.result
        is_inside = ~self.is_outside & (at >= -self.period) & (at < self.period)
        is_inner = is_inside & (at == at[0]) & (result == result[0])
        is_before = is_inside & (at < 0) & (at == at[1]) & (result == result[1])
        is_before[0] = self.is_outside[0]
        ways = (is_inner, is_before, self.is_outside)
        return functools.reduce(np.logical_or, map(np.logical_and.accumulate, ways))

    def leading(self) -> int:
        """How many blocks, from the first on, are a loop."""
        fits = self.fits().all(axis=1)
        return int(np.argmin(np.append(fits, False)))

    def carried(self) -> Flags:
        """Which operands are made in the block before."""
        is_before = (self.at[1] < 0) & (self.at[1] >= -self.period)
        carried: Flags = self.is_outside[0] & ~self.is_outside[1] & is_before
        return carried

    def kinds(self, blocks: int) -> list[Kind]:
        """Where so many blocks have each of their operands from."""
        is_same = (self.numbers[:blocks] == self.numbers[0]).all(axis=0)
        return [
            Kind.INNER
            if not is_outside
            else Kind.CARRY
            if is_carried
            else Kind.SHARED
            if same
            else Kind.OWN
            for is_outside, is_carried, same in zip(
                self.is_outside[0], self.carried(), is_same, strict=True
            )
        ]


def _rank(ranked: tuple[tuple[int, int, int], _Places]) -> tuple[int, int, int]:
    return ranked[0]


def _described(eqn: jex.JaxprEqn) -> str:
    """An equation in words: `mul` of float32[4,64] at model.py:41."""
    operands = [a.aval.str_short() for a in eqn.invars]
    of = f" of {', '.join(operands)}" * bool(operands)
    return f"`{eqn.primitive.name}`{of} at {_source.line(eqn)}"


def _differing(eqn: jex.JaxprEqn, before: jex.JaxprEqn) -> tuple[str, str]:
    """What two equations of the same operands differ in: inside, or a parameter."""
    pairs = zip(_inside(eqn), _inside(before), strict=False)
    for words in (tuple(map(_described, pair)) for pair in pairs):
        if words[0] != words[1]:
            line = _source.line(eqn)
            return f"inside of `{eqn.primitive.name}` at {line}, {words[0]}", words[1]
    where = f"`{eqn.primitive.name}` at {_source.line(eqn)} has"
    for name, value in eqn.params.items():
        shown, other = f"{name}={value}", f"{name}={before.params.get(name)}"
        if shown != other and len(shown) + len(other) < _SHORT:
            return f"{where} {shown}", other
    return f"{where} other parameters, or a derivative of its own", "others"


def _inside(eqn: jex.JaxprEqn) -> Iterator[jex.JaxprEqn]:
    return _equations.with_inner(e for b in _equations.bodies(eqn) for e in b.eqns)


_SHORT = 200  # Characters of parameters that are worth showing.


def slices_first(eqns: Sequence[jex.JaxprEqn], least: int) -> list[jex.JaxprEqn]:
    """The same equations, with slices right after what they are slices of.

    So `params[i]`, whose place differs from layer to layer, is in no block. This is for
    arrays of which there are at least so many slices of one shape.
    """
    kinds = collections.Counter(map(_kind_of_slice, eqns))
    made = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
    home: dict[int, int] = {}  # Of a slice, or a row of one: after which equation.
    after: dict[int, list[jex.JaxprEqn]] = {}
    for i, eqn in enumerate(eqns):
        kind = _kind_of_slice(eqn)
        is_row = eqn.primitive.name == "squeeze"
        if not is_row and (kind is None or kinds[kind] < least):
            continue
        [operand] = eqn.invars
        source = -1 if isinstance(operand, jex.Literal) else made.get(operand, -1)
        if not is_row or source in home:
            home[i] = home.get(source, source)
            after.setdefault(home[i], []).append(eqn)
    moved = list(after.get(-1, []))
    for i, eqn in enumerate(eqns):
        if i not in home:
            moved += [eqn, *after.get(i, [])]
    return moved


def _kind_of_slice(eqn: jex.JaxprEqn) -> Hashable:
    """The array that an equation is a slice of, and of which shape; or None."""
    if eqn.primitive.name != "slice":
        return None
    shape: Any = eqn.outvars[0].aval
    return identity(eqn.invars[0]), shape.shape


def is_loop(repeat: Repeat, eqns: Sequence[jex.JaxprEqn]) -> bool:
    """Whether expensive work of a block depends on activations of the one before."""
    block = eqns[repeat.start : repeat.start + repeat.period]
    moving: set[int] = set()

    def is_moving(operand: Operand) -> bool:
        at, result = operand.place
        if operand.kind is Kind.CARRY:
            aval: Any = block[at].outvars[result].aval
            return _equations.is_inexact(aval)
        return operand.kind is Kind.INNER and at in moving

    for j, operands in enumerate(repeat.operands):
        if any(map(is_moving, operands)):
            moving.add(j)
            if _is_expensive(block[j]):
                return True
    return False


def _is_expensive(eqn: jex.JaxprEqn) -> bool:
    return _cost.is_expensive(eqn, lambda: math.inf)
