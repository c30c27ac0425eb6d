"""Results for a person: a table for the terminal, and Markdown for a README."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hk_stack.compare import results

RUN, EAGER, BUILD, TEMP = "run_s", "eager_s", "build_s", "temp_bytes"
SHOWN = (RUN, EAGER, BUILD, TEMP)

NAMES = {RUN: "run", EAGER: "eager call", BUILD: "build", TEMP: "temporary memory"}
# How many of the unit that a person reads are one unit of the file, and its name.
_UNITS = {
    RUN: (1e3, "ms"),
    EAGER: (1e3, "ms"),
    BUILD: (1.0, "s"),
    TEMP: (1e-6, "MB"),
}


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


def lines(result: results.Result, case: results.Case) -> list[Line]:
    """The ways of a case, in the order in which they were measured."""
    base = result.baseline(case)
    rows = result.of(case)
    ratios = {way: _ratios(row, base) for way, row in rows.items()}
    best = _best(ratios)
    return [
        Line(row, way == base.way, ratios[way], best[way]) for way, row in rows.items()
    ]


_Ratios = dict[str, results.Ratio]


def _ratios(row: results.Row, base: results.Row) -> _Ratios:
    found = {name: results.ratio(row, base, name) for name in SHOWN}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _best(ratios: dict[str, _Ratios]) -> dict[str, frozenset[str]]:
    """Of each way, the measures in which it is best."""
    best = {}
    for name in SHOWN:
        found = {way: of_way[name] for way, of_way in ratios.items() if name in of_way}
        lowest = min(found.values(), key=lambda ratio: ratio.value, default=None)
        # Of two that noise cannot tell apart, neither is better.
        best[name] = {way for way, r in found.items() if lowest and r.agrees(lowest)}
        if len(best[name]) == len(found):
            best[name] = set()
    return {way: frozenset(n for n in SHOWN if way in best[n]) for way in ratios}


def amount(row: results.Row, measure: str) -> str:
    """The median of a measure in its unit, "-" if the row has none.

    >>> case = results.Case("s4", "grad", 8, "float32", 4, 256)
    >>> amount(results.Row(case, "hk_stack auto", {"run_s": [[0.0125]]}, {}), "run_s")
    '12.5'
    """
    median = row.median(measure)
    return "-" if median is None else digits(median * _UNITS[measure][0])


def quartiles(row: results.Row, measure: str) -> str:
    """The quartiles of a measure in its unit, "" if the row has none."""
    spread = row.spread(measure)
    if spread is None:
        return ""
    low, high = (digits(value * _UNITS[measure][0]) for value in spread)
    return f"{low}-{high}"


def unit(measure: str) -> str:
    """The unit in which `amount` and `quartiles` are."""
    return _UNITS[measure][1]


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
    """Whether a way is one of hk_stack, to make it stand out."""
    return way.startswith("hk_stack")


def called(row: results.Row) -> str:
    """The measure of a call: a compiled run, or an eager call if there is no other."""
    return RUN if row.measures.get(RUN) else EAGER


def failures(result: results.Result, case: results.Case) -> list[dict[str, Any]]:
    """What failed of a case."""
    return [entry for entry in result.failed if case_of(entry) == case]


def case_of(failed: Mapping[str, Any]) -> results.Case:
    """The case that a failure is of."""
    return results.Case(*(failed[name] for name in results.Case._fields))


# The terminal


def table(result: results.Result, case: results.Case) -> Any:
    """A case as a `rich.table.Table`, a row for each way.

    The lowest of a column, and those that noise cannot tell from it, have a star.
    """
    import rich.table
    import rich.text

    found = lines(result, case)
    eager = any(EAGER in line.ratios for line in found)
    caption = rich.text.Text(_caption(result, case))
    drawn = rich.table.Table(
        title=rich.text.Text(case.title, style="bold"),
        caption=caption,
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    drawn.add_column("way", no_wrap=True, min_width=max(len(x.row.way) for x in found))
    for title in _titles(eager):
        # Where the screen is narrow, quartiles move to a line of their own first.
        fixed = title == _INTERVAL and not eager
        drawn.add_column(title, justify="right", no_wrap=fixed)
    for line in found:
        way = rich.text.Text(
            line.row.way, style="bold" if is_ours(line.row.way) else ""
        )
        drawn.add_row(way, *(rich.text.Text(*cell) for cell in _cells(line, eager)))
    return drawn


_INTERVAL = "\nratio [95 %]"


def _titles(eager: bool) -> list[str]:
    # With eager calls there is no room for the quartiles of the others.
    run = ["run\nms" if eager else "run, ms\n(quartiles)", _INTERVAL]
    called = ["eager\nms", _INTERVAL] if eager else []
    return [*run, *called, "build\ns", "\nratio", "temp\nMB", "\nratio"]


def _cells(line: Line, eager: bool) -> list[tuple[str, str]]:
    """Texts and their styles, two for each measure."""
    cells = []
    for name in SHOWN if eager else (RUN, BUILD, TEMP):
        is_best = name in line.best
        text = amount(line.row, name) + ("*" if is_best else " ")
        if name == RUN and not eager and RUN in line.row.measures:
            text += f" ({quartiles(line.row, name)})"
        style = "bold green" if is_best else ""
        cells.append((text, style))
        cells.append((ratio_text(line, name, short=name in (BUILD, TEMP)), style))
    return cells


def ratio_text(line: Line, measure: str, *, short: bool = False) -> str:
    """A ratio with its interval, or without; "baseline" for the baseline itself."""
    if measure not in line.ratios:
        return "-"
    if line.is_baseline:
        return "1" if short else "baseline"
    ratio = line.ratios[measure]
    return f"{ratio.value:.2f}" if short else str(ratio)


def _caption(result: results.Result, case: results.Case) -> str:
    base = result.baseline(case).way
    text = (
        f"Ratios are to {base}; below 1 is better.\n"
        "* is the lowest of its column, or not told from it."
    )
    failed = [f"{x['way']}: {first_line(x['error'])}" for x in failures(result, case)]
    return "\n".join([text, *(f"Failed: {line}" for line in failed)])


def first_line(error: str) -> str:
    """The first line of an error, which names what went wrong."""
    return (error.strip().splitlines() or [""])[0]


# Markdown


def markdown(result: results.Result) -> str:
    """A part of a Markdown document: tables by model and mode, ways by sizes."""
    parts = [
        "Ratios to the baseline, with 95 % intervals; below 1 is better, and **bold** "
        "is the lowest of its column, or not told from it. The first line of a cell is "
        "the time of a run; under it are build time and temporary memory.",
    ]
    for (model, mode), cases in results.groups(result.cases()).items():
        parts.append(f"### {_escaped(f'{model}, {mode}')}")
        parts.append(_markdown_table(result, cases))
    failed = [
        f"- {case_of(entry).title}, {entry['way']}: {first_line(entry['error'])}"
        for entry in result.failed
    ]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(map(_escaped, failed)))
    return "\n\n".join([*parts, _escaped(environment(result))]) + "\n"


def _markdown_table(result: results.Result, cases: Sequence[results.Case]) -> str:
    found = {case: {x.row.way: x for x in lines(result, case)} for case in cases}
    ways = dict.fromkeys(way for of_case in found.values() for way in of_case)
    rows = [["way", *column_titles(cases)], ["---"] + ["---:"] * len(cases)]
    for way in ways:
        cells = [_markdown_cell(found[case].get(way)) for case in cases]
        name = f"**{_escaped(way)}**" if is_ours(way) else _escaped(way)
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def column_titles(cases: Sequence[results.Case]) -> list[str]:
    """What tells each of some cases of one model and mode from the others."""
    names = {
        "layers": "{} layers",
        "dtype": "{}",
        "batch": "batch {}",
        "length": "length {}",
    }
    differ = [n for n in names if len({getattr(case, n) for case in cases}) > 1]
    return [
        ", ".join(names[n].format(getattr(case, n)) for n in differ or ["layers"])
        for case in cases
    ]


def _markdown_cell(line: Line | None) -> str:
    if line is None:
        return "-"
    first = called(line.row)
    if line.is_baseline:
        texts = [f"{amount(line.row, n)} {unit(n)}" for n in (first, BUILD, TEMP)]
        return f"baseline: {texts[0]}<br>build {texts[1]}, memory {texts[2]}"
    run, build, memory = (
        f"**{text}**" if name in line.best else text
        for name in (first, BUILD, TEMP)
        for text in [ratio_text(line, name, short=name != first)]
    )
    return f"{run}<br>build {build}, memory {memory}"


def _escaped(text: str) -> str:
    """Text that Markdown, and the HTML in it, leaves as it is."""
    # Underscores inside of a word mean nothing in Markdown.
    special = r"[\\`*{}\[\]<>|#]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, r"\\\g<0>", text)


def environment(result: results.Result) -> str:
    """On what, with what and when a result was measured, in one sentence."""
    found = result.environment
    cores = found.get("cores")
    counted = f"{cores} core{'' if cores == 1 else 's'}" if cores else None
    machine = [found.get("device"), found.get("machine"), counted]
    versions = {"Python": found.get("python"), **found.get("versions", {})}
    tools = [f"{name} {version}" for name, version in versions.items() if version]
    parts = [
        f"on {', '.join(text for text in machine if text)}",
        f"on {found.get('date', 'an unknown day')}",
        f"with {', '.join(tools)}",
    ]
    return f"Measured {' '.join(parts)}."
