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
      best: Measures in which it is lowest, or not told from the lowest: its ratio to
        that may be 1. None of those in which all ways are.
    """

    row: results.Row
    is_baseline: bool
    ratios: dict[str, results.Ratio]
    best: frozenset[str]

    def ratio(self, measure: str, *, interval: bool = False) -> str:
        """The ratio, "-" if there is none; with a star if none is known to be lower."""
        if measure not in self.ratios:
            return "-"
        ratio = self.ratios[measure]
        text = str(ratio) if interval else ratio.short
        return ("1" if self.is_baseline else text) + "*" * (measure in self.best)


def lines(result: results.Result, case: results.Case) -> list[Line]:
    """The ways of a case, in the order in which they were measured."""
    base, rows = result.baseline(case), result.of(case)
    ratios = {way: _ratios(row, base) for way, row in rows.items()}
    best = {name: _best(name, rows, ratios) for name in SHOWN}
    return [
        Line(
            row,
            row is base,
            ratios[way],
            frozenset(name for name in SHOWN if way in best[name]),
        )
        for way, row in rows.items()
    ]


_Ratios = dict[str, results.Ratio]


def _ratios(row: results.Row, base: results.Row) -> _Ratios:
    return {name: x for name in SHOWN if (x := results.ratio(row, base, name))}


def _best(
    measure: str, rows: dict[str, results.Row], ratios: dict[str, _Ratios]
) -> set[str]:
    found = {way: r[measure].value for way, r in ratios.items() if measure in r}
    if not found:
        return set()
    lowest = rows[min(found, key=lambda way: found[way])]
    # Against each other, as the baseline's noise is in the ratios to it.
    to_lowest = {way: results.ratio(rows[way], lowest, measure) for way in found}
    best = {way for way, ratio in to_lowest.items() if ratio and ratio.low <= 1}
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
        why = f"failed: {failure.error}"
        rows.append([failure.way, why, *[""] * (len(titles) - 2)])
    return _table.Table(titles, rows, numbers=titles[1:])


def _cells(line: Line, shown: list[str]) -> list[str]:
    cells = [line.row.way]
    for name in shown:
        median = line.row.median(name)
        amount = "-" if median is None else digits(median * SHOWN[name].scale)
        cells += [amount, line.ratio(name, interval=name in _INTERVALS)]
    parity = line.row.parity.values()
    largest = f"{max(parity):.0e}" if any(parity) else "0"
    return [*cells, largest if parity else "-"]


def caption(result: results.Result, case: results.Case) -> str:
    """What the ratios of a case are to."""
    return f"ratios are to {result.baseline(case).way}"


def glance(result: results.Result) -> _table.Table:
    """The ratios of run times: a row for each way, a column for each deepest case."""
    titles, columns = [], []
    for *_, case in results.by_depth(result):
        texts = {failure.way: "failed" for failure in result.failures(case)}
        texts |= {x.row.way: x.ratio(run_measure(x.row)) for x in lines(result, case)}
        titles.append(f"{case.model}, {case.mode}, {case.layers} layers")
        columns.append(texts)
    rows = [[way, *(x.get(way, "-") for x in columns)] for way in result.ways()]
    return _table.Table(["way", *titles], rows, numbers=titles)


READING = (
    "Ratios are to the baseline of the case, in the same process and the same round; "
    "below 1 is better. Behind a ratio is the interval that holds 95 % of its "
    "bootstrap. A star is at the lowest of a column and at those not told from it, "
    "unless those are all."
)


def markdown(result: results.Result) -> str:
    """A part of a Markdown document: a table for each case."""
    parts = [*filter(None, [_table.escaped(partial(result))]), READING]
    for case in result.cases():
        title = f"{case.title}; {caption(result, case)}"
        parts.append(f"### {_table.escaped(title)}")
        parts.append(_table.markdown(table(result, case)))
    return "\n\n".join([*parts, _table.escaped(environment(result))]) + "\n"


def partial(result: results.Result) -> str:
    """That a result was stopped before all was measured; "" if it was not."""
    if not (titles := result.unfinished):
        return ""
    return f"Partial: stopped before these cases were whole: {'; '.join(titles)}."


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
