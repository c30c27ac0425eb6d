"""Two results against each other: which ratios to the baseline have moved.

Times of two machines, or of one machine on two days, are not the same even where the
programs are. The ratio of a way to the baseline of its own file is, nearly; so that is
what is compared.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hk_stack import _table
from hk_stack.compare import results, show

# What less than this changes by is not worth a word, however certain it is.
_SMALL = 0.01
# Of so few times, the interval says little of the noise; single builds of one program
# take 1.6 times longer, now and then.
_FEW, _LARGE = 3, 1.0


class Move(NamedTuple):
    """A ratio that is not what it was.

    Attributes:
      case: What is done.
      way: By what.
      measure: Of what, a name in `results.MEASURES`.
      old: The ratio to the baseline of the old file.
      new: The same of the new one.
    """

    case: results.Case
    way: str
    measure: str
    old: results.Ratio
    new: results.Ratio

    @property
    def is_worse(self) -> bool:
        """Whether the new ratio is the greater one."""
        return self.new.value > self.old.value


def moved(old: results.Result, new: results.Result) -> list[Move]:
    """The ratios that differ by more than noise, in rows that both results have.

    A ratio has moved if the intervals have no number in common, and it is 1 % greater
    or less. A time with fewer than three samples has to be twice the other.

    Args:
      old: What to compare with.
      new: What may have become worse, or better.

    Raises:
      ValueError: If no case is in both, or if the baseline of one differs.
    """
    return list(_moved(old, new))


def _moved(old: results.Result, new: results.Result) -> Iterator[Move]:
    for case in _common(old, new):
        before, after = old.of(case), new.of(case)
        bases = old.baseline(case), new.baseline(case)
        for way in before:
            if way == bases[0].way or way not in after:
                continue
            rows = before[way], after[way]
            for measure in show.SHOWN:
                ratios = _ratios(rows, bases, measure)
                if ratios and _differ(*ratios, _least(measure, (*rows, *bases))):
                    yield Move(case, way, measure, *ratios)


def _common(old: results.Result, new: results.Result) -> list[results.Case]:
    """The cases of both, if they can be compared."""
    others = set(new.cases())
    found = [case for case in old.cases() if case in others]
    if not found:
        raise ValueError(
            "no case is in both results. The old one has, for example, "
            f"{_first(old)!r}, the new one {_first(new)!r}; measure with the same "
            f"flags as the old one: {old.environment.get('command')}"
        )
    for case in found:
        _check_baseline(case, old, new)
    return found


def _check_baseline(
    case: results.Case, old: results.Result, new: results.Result
) -> None:
    before, after = old.baseline(case).way, new.baseline(case).way
    if before != after:
        failed = {entry["way"]: entry["error"] for entry in show.failures(new, case)}
        why = (
            f" ({before!r} failed there: {failed[before]})" if before in failed else ""
        )
        raise ValueError(
            f"the baseline of {case.title!r} is {before!r} in the old result and "
            f"{after!r} in the new one{why}, so that ratios cannot be compared; "
            f"measure the new one with --baseline={before!r}"
        )


def _first(result: results.Result) -> str:
    return next((case.title for case in result.cases()), "no case at all")


def _ratios(
    rows: tuple[results.Row, results.Row],
    bases: tuple[results.Row, results.Row],
    measure: str,
) -> tuple[results.Ratio, results.Ratio] | None:
    old, new = (
        results.ratio(row, base, measure) for row, base in zip(rows, bases, strict=True)
    )
    return None if old is None or new is None else (old, new)


def _least(measure: str, rows: tuple[results.Row, ...]) -> float:
    """By how much a ratio has to change at least."""
    counts = [sum(map(len, row.samples(measure))) for row in rows]
    is_few = measure.endswith("_s") and min(counts) < _FEW
    return _LARGE if is_few else _SMALL


def _differ(old: results.Ratio, new: results.Ratio, least: float) -> bool:
    if old.agrees(new):
        return False
    low, high = sorted([old.value, new.value])
    return low == 0 or high / low - 1 > least


# For a person


def report(old: results.Result, new: results.Result) -> tuple[str, bool]:
    """What has become worse and better, and what cannot be told.

    Args:
      old: What to compare with.
      new: What may have become worse, or better.

    Returns:
      A text of several lines, and whether something is worse: a ratio, or a way that
      was measured in the old result and failed in the new one.

    Raises:
      ValueError: If no case is in both, or if the baseline of one differs.
    """
    moves = moved(old, new)
    worse = [move for move in moves if move.is_worse]
    better = [move for move in moves if not move.is_worse]
    before, after = _rows(old), _rows(new)
    broken = {(show.case_of(entry), entry["way"]): None for entry in new.failed}
    broken = {row: None for row in broken if row in before and row not in after}
    lines = [
        *_environments(old.environment, new.environment),
        *_section("worse", worse),
        *_section("better", better),
        *_listed("failed, and did not in the old result", broken),
        *_listed("in the old result only", before, after | broken),
        *_listed("in the new result only", after, before),
        f"{len(worse)} ratios are worse and {len(better)} are better, of "
        f"{len(before.keys() & after)} rows in both results",
    ]
    return "\n".join(lines), bool(worse or broken)


def _environments(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What the results were measured with and on, where it differs."""
    names = ("device", "backend", "devices", "cores", "machine", "python", "xla_flags")
    before, after = (
        {name: env.get(name) for name in names} | dict(env.get("versions", {}))
        for env in (old, new)
    )
    changes = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    return [f"not alike: {', '.join(changes)}"] if changes else []


def _section(title: str, moves: list[Move]) -> list[str]:
    """A table of moves, those that moved most first."""
    if not moves:
        return []
    moves = sorted(moves, key=_factor, reverse=moves[0].is_worse)
    titles = [title, "way", "measure", "old ratio", "new ratio", "change"]
    return _table.aligned(_table.Table(titles, list(map(_cells, moves))))


def _factor(move: Move) -> float:
    return move.new.value / move.old.value if move.old.value else math.inf


def _cells(move: Move) -> list[str]:
    name, change = show.NAMES[move.measure], f"x {_factor(move):.2f}"
    return [move.case.title, move.way, name, str(move.old), str(move.new), change]


# The rows of a result by case and way, in their order.
_Rows = dict[tuple[results.Case, str], None]


def _rows(result: results.Result) -> _Rows:
    return {(row.case, row.way): None for row in result.rows}


def _listed(title: str, rows: _Rows, but: _Rows | None = None) -> list[str]:
    """Rows without some others, a line for each case."""
    found: dict[results.Case, list[str]] = {}
    for case, way in rows:
        if (case, way) not in (but or {}):
            found.setdefault(case, []).append(way)
    lines = [f"  {case.title}: {', '.join(ways)}" for case, ways in found.items()]
    return [f"{title}:", *lines] if lines else []
