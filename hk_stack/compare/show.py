"""Results for a person: tables for the terminal, for Markdown and for the page."""

import math
from typing import NamedTuple

from hk_stack import _table
from hk_stack.compare import results


class Shown(NamedTuple):
    """How a measure is shown: its name, and how many of a unit one of the file is."""

    name: str
    scale: float
    unit: str


SHOWN = {
    "run_s": Shown("run", 1e3, "ms"),
    "eager_s": Shown("eager", 1e3, "ms"),
    "build_s": Shown("build", 1.0, "s"),
    "temp_bytes": Shown("temp", 1e-6, "MB"),
}
# Of which a table has the interval: single builds have none, and memory does not vary.
_INTERVALS = ("run_s", "eager_s")


class Line(NamedTuple):
    """What tables say of one way of a case.

    Attributes:
      row: What was measured.
      is_baseline: Whether the ratios of the case are to this row.
      ratios: To the baseline, by measure; without those that one of both lacks.
      best: Measures in which it is lowest, or not told from the lowest; none of those
        in which all ways are.
    """

    row: results.Row
    is_baseline: bool
    ratios: dict[str, results.Ratio]
    best: frozenset[str]

    def amount(self, measure: str) -> str:
        """The median of a measure in its unit, "-" if the row has none."""
        median = self.row.median(measure)
        return "-" if median is None else digits(median * SHOWN[measure].scale)

    def ratio(self, measure: str, *, interval: bool = False) -> str:
        """The ratio; with a star if there is none that is known to be lower."""
        if measure not in self.ratios:
            return "-"
        if self.is_baseline:
            return "1" + "*" * (measure in self.best)
        ratio = self.ratios[measure]
        text = str(ratio) if interval else f"{ratio.value:.2f}"
        return text + "*" * (measure in self.best)


def lines(result: results.Result, case: results.Case) -> list[Line]:
    """The ways of a case, in the order in which they were measured."""
    base = result.baseline(case)
    rows = result.of(case)
    ratios = {way: _ratios(row, base) for way, row in rows.items()}
    best = {name: _best(name, ratios) for name in SHOWN}
    return [
        Line(
            row,
            way == base.way,
            ratios[way],
            frozenset(name for name in SHOWN if way in best[name]),
        )
        for way, row in rows.items()
    ]


_Ratios = dict[str, results.Ratio]


def _ratios(row: results.Row, base: results.Row) -> _Ratios:
    found = {name: results.ratio(row, base, name) for name in SHOWN}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _best(measure: str, ratios: dict[str, _Ratios]) -> set[str]:
    """The ways that are best in a measure."""
    found = {way: r[measure] for way, r in ratios.items() if measure in r}
    lowest = min(found.values(), key=lambda ratio: ratio.value, default=None)
    # Of two that noise cannot tell apart, neither is better.
    best = {way for way, ratio in found.items() if lowest and ratio.agrees(lowest)}
    return best if len(best) < len(found) else set()


def digits(number: float) -> str:
    """A number with three digits, or with as many as it has before the point.

    >>> [digits(number) for number in (0, 0.01234, 1.5, 12.34, 99.99, 12340)]
    ['0', '0.0123', '1.50', '12.3', '100', '12,340']
    """
    if number == 0 or not math.isfinite(number):
        return f"{number:.0f}"
    rounded = float(f"{number:.3g}")  # 99.99 has two digits before it is rounded.
    decimals = 2 - math.floor(math.log10(abs(rounded)))
    return f"{number:,.{max(0, decimals)}f}"


def is_ours(way: str) -> bool:
    """Whether a way is one of hk_stack, or given to it, to make it stand out."""
    return way.startswith("hk_stack") or way.endswith(("+ roll", "+ setup_first"))


def run_measure(row: results.Row) -> str:
    """The measure of a run: compiled, or outside of `jit` if there is no other."""
    return "run_s" if row.measures.get("run_s") else "eager_s"


def table(result: results.Result, case: results.Case) -> _table.Table:
    """A case: a row for each way, and for each that failed.

    The lowest ratio of a column, and those that noise cannot tell from it, have a star.
    """
    found = lines(result, case)
    shown = [n for n in SHOWN if any(line.row.samples(n) for line in found)]
    titles = ["way"]
    for name in shown:
        ratio = "ratio [95 %]" if name in _INTERVALS else "ratio"
        titles += [f"{SHOWN[name].name}, {SHOWN[name].unit}", ratio]
    titles.append("parity")
    rows = [_cells(line, shown) for line in found]
    for failure in result.failures(case):
        rows.append([failure.way, f"failed: {failure}", *[""] * (len(titles) - 2)])
    return _table.Table(titles, rows, numbers=titles[1:])


def _cells(line: Line, shown: list[str]) -> list[str]:
    cells = [line.row.way]
    for name in shown:
        ratio = line.ratio(name, interval=name in _INTERVALS)
        cells += [line.amount(name), ratio]
    parity = line.row.parity.values()
    return [*cells, f"{max(parity):.0e}" if parity else "-"]


def caption(result: results.Result, case: results.Case) -> str:
    """What the ratios of a case are to."""
    return f"{case.title}; ratios are to {result.baseline(case).way}"


def glance(result: results.Result) -> _table.Table:
    """The ratios of run times of the deepest cases, all ways beside one another."""
    ways = result.ways()
    rows = []
    for *_, case in results.by_depth(result):
        texts = {x.row.way: x.ratio(run_measure(x.row)) for x in lines(result, case)}
        failed = {failure.way: "failed" for failure in result.failures(case)}
        cells = [(failed | texts).get(way, "-") for way in ways]
        rows.append([f"{case.model}, {case.mode}, {case.layers} layers", *cells])
    return _table.Table(["deepest case", *ways], rows, numbers=ways)


READING = (
    "Ratios are to the baseline of the case, in the same process and the same round; "
    "below 1 is better. Behind a ratio is the interval that holds 95 % of its "
    "bootstrap. A star is at the lowest of a column, and at those not told from it."
)


def markdown(result: results.Result) -> str:
    """A part of a Markdown document: a table for each case."""
    parts = [READING]
    for case in result.cases():
        parts.append(f"### {_table.escaped(caption(result, case))}")
        parts.append(_table.markdown(table(result, case)))
    return "\n\n".join([*parts, _table.escaped(environment(result))]) + "\n"


def environment(result: results.Result) -> str:
    """On what, with what and when a result was measured, in one sentence."""
    found = result.environment
    cores = found.get("cores")
    counted = f"{cores} core{'' if cores == 1 else 's'}" if cores else None
    machine = [found.get("device"), found.get("machine"), counted]
    versions = {"Python": found.get("python"), **found.get("versions", {})}
    tools = [f"{name} {version}" for name, version in versions.items() if version]
    return (
        f"Measured on {', '.join(text for text in machine if text)}, on "
        f"{found.get('date', 'an unknown day')}, with {', '.join(tools)}."
    )
