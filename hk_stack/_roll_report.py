"""The readable report of what `roll` found, and of what it did not and why."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jax.extend import core as jex

from hk_stack import _cost, _source
from hk_stack._rolling import Missed, Rolled, Rolling
from hk_stack._table import Shown, Table, si


class RolledLoop(NamedTuple):
    """Equal blocks that run as one.

    Attributes:
      blocks: How many there are.
      equations: How many equations each has.
      carry: What goes from block to block; nothing if they run in batches.
      own_nbytes: Bytes of what each block reads of its own.
      hoisted_nbytes: Bytes of what leaves the loop, of each block.
      first: The line of the source of the first equation.
      last: The line of the last one.
    """

    blocks: int
    equations: int
    carry: tuple[str, ...]
    own_nbytes: int
    hoisted_nbytes: int
    first: str
    last: str


class Miss(NamedTuple):
    """Blocks that are alike and stay as they are.

    Attributes:
      blocks: How many there are.
      equations: How many equations each has.
      first: The line of the source of the first equation.
      why: What is in the way.
    """

    blocks: int
    equations: int
    first: str
    why: str


@dataclasses.dataclass(frozen=True)
class RollReport(Shown):
    """What a `roll` found, and what it did not and why.

    Attributes:
      where: Names the function.
      loops: What runs as loops; those inside of one come after it.
      misses: What stays as it is, the most equations first.
    """

    where: str
    loops: tuple[RolledLoop, ...]
    misses: tuple[Miss, ...]

    def _parts(self) -> Iterator[str | Table]:
        yield self._headline()
        if self.loops:
            titles = "blocks|equations|carry|own of each|hoisted of each|from|to"
            names = titles.split("|")
            yield Table(names, list(map(_cells, self.loops)), (*names[:2], *names[3:5]))
        if self.misses:
            titles = "alike|equations|from|no loop, as"
            names = titles.split("|")
            rows = [[str(cell) for cell in miss] for miss in self.misses]
            yield Table(names, rows, names[:2])

    def _headline(self) -> str:
        if not self.loops:
            return f"{self.where}: no loop found"
        blocks = " + ".join(str(loop.blocks) for loop in self.loops)
        return f"{self.where}: {blocks} blocks as {_count(len(self.loops), 'loop')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _cells(loop: RolledLoop) -> list[str]:
    carry = ", ".join(loop.carry).replace(" ", "") or "none: in batches"
    sizes = f"{si(loop.own_nbytes)}B", f"{si(loop.hoisted_nbytes)}B"
    return [
        str(loop.blocks),
        str(loop.equations),
        carry,
        *sizes,
        loop.first,
        loop.last,
    ]


def report(rolling: Rolling) -> RollReport:
    """Describes what was found in a traced function."""
    misses = dict.fromkeys(map(_miss, rolling.missed))
    # Nobody can write what is inside of a library otherwise.
    written = (miss for miss in misses if miss.first != _source.UNKNOWN)
    ordered = sorted(written, key=lambda miss: -miss.blocks * miss.equations)
    loops = tuple(map(_loop, rolling.rolled))
    return RollReport(rolling.settings.where, loops, tuple(ordered))


def nothing(found: RollReport) -> str:
    """What an error says where no loop was found."""
    return (
        f"{found}\nMake the layers alike, or change min_layers; without strict=True, "
        "the function runs as it is written."
    )


def _loop(rolled: Rolled) -> RolledLoop:
    repeat, eqns, inputs, parts = rolled
    carry = [a for i, a in inputs if i.carried]
    own = [a for i, a in inputs if i.layered]
    hoisted = _cost.nbytes(parts.setup.jaxpr.outvars)
    lines = _lines(eqns)
    return RolledLoop(
        repeat.blocks,
        repeat.period,
        tuple(f"{a.dtype}{list(a.shape)}" for a in carry),
        sum(map(_cost.bytes_of, own)),
        hoisted,
        lines[0],
        lines[-1],
    )


def _lines(eqns: Iterable[jex.JaxprEqn]) -> list[str]:
    """The known lines of the source of equations."""
    lines = [_source.line(eqn) for eqn in eqns]
    return [line for line in lines if line != _source.UNKNOWN] or [_source.UNKNOWN]


def _miss(missed: Missed) -> Miss:
    refused, eqns = missed
    eqn, why = eqns[refused.at], refused.why
    if "`" not in why:
        why = f"{why}: `{eqn.primitive.name}` at {_source.line(eqn)}"
    first = _lines(eqns[refused.start : refused.start + refused.period])[0]
    return Miss(refused.blocks, refused.period, first, why)
