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
    """A ratio of a way, in a measure, that is not what it was in the old file."""

    case: results.Case
    way: str
    measure: str
    old: results.Ratio
    new: results.Ratio

    @property
    def is_worse(self) -> bool:
        """Whether the new ratio is the greater one."""
        return self.new.value > self.old.value

    @property
    def factor(self) -> float:
        """By how much it has grown."""
        return self.new.value / self.old.value if self.old.value else math.inf


def moved(old: results.Result, new: results.Result) -> list[Move]:
    """The ratios that differ by more than noise, in rows that both results have.

    A ratio has moved if the intervals have no number in common, and it is 1 % greater
    or less. A time with fewer than three samples has to be twice the other.

    Raises:
      ValueError: If no case is in both, or if the baseline of one differs.
    """
    both = [case for case in old.cases() if case in set(new.cases())]
    if not both:
        examples = [next((x.title for x in r.cases()), "none") for r in (old, new)]
        raise ValueError(
            "no case is in both results. The old one has, for example, "
            f"{examples[0]!r}, the new one {examples[1]!r}; measure with the same "
            f"flags as the old one: {old.environment.get('command')}"
        )
    return [move for case in both for move in _moved(case, old, new)]


def _moved(
    case: results.Case, old: results.Result, new: results.Result
) -> Iterator[Move]:
    _check_baseline(case, old, new)
    before, after = (
        {line.row.way: line.ratios for line in show.lines(result, case)}
        for result in (old, new)
    )
    for way, ratios in before.items():
        for measure, ratio in ratios.items():
            if found := after.get(way, {}).get(measure):
                move = Move(case, way, measure, ratio, found)
                if _has_moved(move):
                    yield move


def _check_baseline(
    case: results.Case, old: results.Result, new: results.Result
) -> None:
    before, after = old.baseline(case).way, new.baseline(case).way
    if before == after:
        return
    failed = {failure.way: failure.error for failure in new.failures(case)}
    why = f" ({before!r} failed there: {failed[before]})" if before in failed else ""
    raise ValueError(
        f"the baseline of {case.title!r} is {before!r} in the old result and "
        f"{after!r} in the new one{why}, so that ratios cannot be compared; "
        f"measure the new one with --baseline={before!r}"
    )


def _has_moved(move: Move) -> bool:
    count = min(move.old.rounds, move.new.rounds)
    is_few = move.measure.endswith("_s") and count < _FEW
    least = _LARGE if is_few else _SMALL
    change = max(move.factor, 1 / move.factor if move.factor else math.inf)
    return not move.old.agrees(move.new) and change - 1 > least


def report(old: results.Result, new: results.Result) -> tuple[str, bool]:
    """What has become worse and better, and what cannot be told; raises as `moved`.

    Returns:
      A text of several lines, and whether something is worse: a ratio, or a way that
      was measured in the old result and failed in the new one.
    """
    moves = sorted(moved(old, new), key=lambda move: move.factor)
    worse = [move for move in reversed(moves) if move.is_worse]
    better = [move for move in moves if not move.is_worse]
    before, after = ([(row.case, row.way) for row in x.rows] for x in (old, new))
    failed = [(failure.case, failure.way) for failure in new.failed]
    broken = [row for row in failed if row in before and row not in after]
    gone = [row for row in before if row not in after + broken]
    added = [row for row in after if row not in before]
    lines = [
        *_environments(old.environment, new.environment),
        *_section("worse", worse),
        *_section("better", better),
        *_listed("failed, and did not in the old result", broken),
        *_listed("in the old result only", gone),
        *_listed("in the new result only", added),
        f"{len(worse)} ratios are worse and {len(better)} are better, of "
        f"{len(after) - len(added)} rows in both results",
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
        for name in before | after
        if before.get(name) != after.get(name)
    ]
    return [f"not alike: {', '.join(changes)}"] if changes else []


def _section(title: str, moves: list[Move]) -> list[str]:
    """A table of moves, those that moved most first."""
    titles = [title, "way", "measure", "old ratio", "new ratio", "change"]
    rows = [
        [
            *(move.case.title, move.way, show.SHOWN[move.measure].name),
            *(str(move.old), str(move.new), f"x {move.factor:.2f}"),
        ]
        for move in moves
    ]
    return _table.aligned(_table.Table(titles, rows)) if moves else []


def _listed(title: str, rows: list[tuple[results.Case, str]]) -> list[str]:
    """A line for each case, with its ways."""
    found: dict[results.Case, list[str]] = {}
    for case, way in rows:
        found.setdefault(case, []).append(way)
    lines = [f"  {case.title}: {', '.join(ways)}" for case, ways in found.items()]
    return [f"{title}:", *lines] if lines else []
