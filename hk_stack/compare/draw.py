"""Pictures of a result that are legible on light and on dark, with and without colour.

The background is transparent, and all colours are of a middle lightness. A colour is a
framework's; a way has its own marker and a label beside its line, and a part of a bar
its own hatch. Needs matplotlib, which is imported only once something is drawn.
"""

import io
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hk_stack.compare import results, show

# Of text and axes: as far from white as from black.
INK = "#7a7a7a"
# Of Okabe and Ito's colours, which the colour-blind can tell apart, the light ones
# darkened until they show on white.
_OURS = "#d55e00"
_COLOURS = ("#1f83c4", "#7b7b7b", "#0a9a70", "#bd6a96", "#a67c00", "#8a6fd1")
_MARKERS = "os^Dv<>Pph*Xd8H"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
# The parts of a bar: arguments or trace first.
_PARTS = (
    {"color": "#1f83c4", "hatch": ""},
    {"color": "#a67c00", "hatch": r"\\\\"},
    {"color": "#0a9a70", "hatch": "//"},
    {"color": "#bd6a96", "hatch": "xxx"},
)

PHASES = {
    "trace_s": "trace",
    "lower_s": "lower",
    "compile_s": "compile",
    "first_s": "first run",
}
MEMORY = {
    "argument_bytes": "arguments",
    "output_bytes": "outputs",
    "temp_bytes": "temporary",
}
_SETTINGS = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    # Text stays text: it is small, and can be searched and read aloud.
    "svg.fonttype": "none",
    "text.parse_math": False,
}


class Picture(NamedTuple):
    """A figure and what it is.

    Attributes:
      kind: "scaling", "phases" or "memory".
      name: The name of its file, without a suffix.
      case: The case that it shows; of a picture of all depths, the deepest.
      text: What it shows, in a sentence for those who cannot see it.
      figure: A `matplotlib.figure.Figure`.
    """

    kind: str
    name: str
    case: results.Case
    text: str
    figure: Any


def pictures(result: results.Result) -> Iterator[Picture]:
    """All pictures, model by model and mode by mode.

    Each is drawn only when it is asked for: together they take much memory.
    """
    for cases in by_depth(result.cases()):
        deepest = cases[-1]
        if len(cases) > 1:
            yield _picture("scaling", deepest, scaling(result, cases), title(cases))
        measured = {
            name for row in result.of(deepest).values() for name in row.measures
        }
        if measured & PHASES.keys():
            yield _picture("phases", deepest, phases(result, deepest), deepest.title)
        if measured & MEMORY.keys():
            yield _picture("memory", deepest, memory(result, deepest), deepest.title)


def by_depth(cases: Sequence[results.Case]) -> list[list[results.Case]]:
    """Cases that differ in nothing but the number of layers, the deepest last."""
    found: dict[results.Case, list[results.Case]] = {}
    for case in cases:
        found.setdefault(case._replace(layers=0), []).append(case)
    return [sorted(group, key=lambda case: case.layers) for group in found.values()]


def title(cases: Sequence[results.Case]) -> str:
    """What cases have in common that differ in the number of layers only."""
    return cases[0].title.replace(f" {cases[0].layers} layers,", "")


_TEXTS = {
    "scaling": "Run time and build time of each way by number of layers: {}",
    "phases": "Time to trace, lower, compile and first run each way: {}",
    "memory": "Arguments, outputs and temporary memory of each way: {}",
}


def _picture(kind: str, case: results.Case, figure: Any, about: str) -> Picture:
    sizes = (case.model, case.mode, case.dtype, f"b{case.batch}", f"t{case.length}")
    name = re.sub(r"[^\w-]+", "-", "_".join((kind, *sizes)))
    return Picture(kind, name, case, _TEXTS[kind].format(about), figure)


def scaling(result: results.Result, cases: Sequence[results.Case]) -> Any:
    """Run time and build time against the number of layers, a line for each way.

    Args:
      result: What was measured.
      cases: Those that differ in the number of layers only.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    rows = [result.of(case) for case in cases]
    run = show.called(next(iter(rows[-1].values())))
    with _settings():
        figure = _figure(9.6, 4.8)
        left, right = figure.subplots(1, 2)
        _headline(figure, title(cases))
        _lines(left, result, rows, run, f"{show.NAMES[run]}, ms", 1e3)
        _lines(right, result, rows, show.BUILD, "trace, lower and compile, s", 1.0)
    return figure


def phases(result: results.Result, case: results.Case) -> Any:
    """The phases until the first outputs are there, as bars for each way."""
    return _bars(result, case, PHASES, "s", 1.0)


def memory(result: results.Result, case: results.Case) -> Any:
    """What a program holds in memory, as bars for each way."""
    return _bars(result, case, MEMORY, "MB", 1e-6)


def svg(picture: Picture) -> str:
    """A picture as an SVG element, for a file or for a page with several of them."""
    buffer = io.StringIO()
    # Names inside of it are made of its own name: a page has no two alike.
    with _settings(picture.name):
        picture.figure.savefig(
            buffer, format="svg", transparent=True, metadata=_NO_METADATA
        )
    drawn = buffer.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", drawn[drawn.index("<svg") :]).rstrip()


_NO_METADATA = dict.fromkeys(["Date", "Creator", "Format", "Type"])


def write(result: results.Result, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes every picture as PNG and as SVG.

    Args:
      result: What was measured.
      folder: Where to write; it is made if it is not there.

    Returns:
      The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in pictures(result):
        image, drawing = (folder / f"{picture.name}.{end}" for end in ("png", "svg"))
        with _settings():
            picture.figure.savefig(image, dpi=160, transparent=True)
        drawing.write_text(svg(picture) + "\n")
        files += [image, drawing]
    return files


# Parts of figures


def _settings(salt: str = "") -> Any:
    """How pictures look while one is drawn or written.

    Args:
      salt: What the names inside of an SVG are made of.
    """
    import matplotlib

    settings: Any = _SETTINGS | {"svg.hashsalt": salt}
    return matplotlib.rc_context(settings)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _headline(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=10)


def _colours(result: results.Result) -> dict[str, str]:
    """The colour of each way, which is that of its framework."""
    ways = results.ways(result)
    others = dict.fromkeys(_framework(way) for way in ways if not show.is_ours(way))
    of = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    return {way: of.get(_framework(way), _OURS) for way in ways}


def _framework(way: str) -> str:
    return way.split()[0]


def _style(result: results.Result, way: str) -> dict[str, Any]:
    """How the line of a way looks: the same in all pictures of a result."""
    ways = results.ways(result)
    siblings = [other for other in ways if _framework(other) == _framework(way)]
    ours = show.is_ours(way)
    return {
        "color": _colours(result)[way],
        "marker": _MARKERS[ways.index(way) % len(_MARKERS)],
        "linestyle": _DASHES[siblings.index(way) % len(_DASHES)],
        "linewidth": 2.2 if ours else 1.1,
        "markersize": 6 if ours else 4.5,
        "zorder": 3 if ours else 2,
    }


def _lines(
    axes: Any,
    result: results.Result,
    rows: Sequence[dict[str, results.Row]],
    measure: str,
    title: str,
    scale: float,
) -> None:
    """A measure against the number of layers, with the ways beside their lines."""
    ends = {}
    for way in dict.fromkeys(way for of_case in rows for way in of_case):
        medians = [
            (of_case[way].case.layers, value * scale)
            for of_case in rows
            if way in of_case and (value := of_case[way].median(measure))
        ]
        if medians:
            axes.plot(*zip(*medians, strict=True), **_style(result, way))
            ends[way] = medians[-1]
    _log_axes(
        axes, sorted({r.case.layers for of_case in rows for r in of_case.values()})
    )
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("layers")
    _label(axes, ends, _colours(result))


def _log_axes(axes: Any, depths: Sequence[int]) -> None:
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(depths, map(str, depths))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(True, color=INK, alpha=0.25, linewidth=0.5)


def _label(
    axes: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]
) -> None:
    """Writes each way where its line ends, apart from one another."""
    ways = sorted(ends, key=lambda way: ends[way][1])
    # From the data to the height of the axes, of which each label takes a part.
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    gap = min(_LABEL_HEIGHT, 1 / max(1, len(ways) - 1))
    heights = _apart([to_axes(ends[way])[1] for way in ways], gap)
    for way, height in zip(ways, heights, strict=True):
        axes.annotate(
            way,
            xy=ends[way],
            xytext=(1.09, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colours[way],
            fontweight="bold" if show.is_ours(way) else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": colours[way],
                "linewidth": 0.6,
                "relpos": (0, 0.5),
            },
        )


_LABEL_HEIGHT = 0.045


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Ascending values of 0 to 1, moved until no two are closer than `gap`."""
    up, down = list(values), list(values)
    for i in range(1, len(values)):
        up[i] = max(up[i], up[i - 1] + gap)
        down[-1 - i] = min(down[-1 - i], down[-i] - gap)
    moved = [(a + b) / 2 for a, b in zip(up, down, strict=True)]
    last = len(moved) - 1
    return [min(max(y, i * gap), 1 - (last - i) * gap) for i, y in enumerate(moved)]


def _bars(
    result: results.Result,
    case: results.Case,
    parts: dict[str, str],
    unit: str,
    scale: float,
) -> Any:
    """Measures stacked on one another, a bar for each way, the first on top."""
    rows = result.of(case)
    with _settings():
        figure = _figure(9.0, 1.1 + 0.27 * len(rows))
        axes = figure.subplots()
        ends = [0.0] * len(rows)
        handles = []
        for measure, part in zip(parts, _PARTS, strict=False):
            sizes = [(row.median(measure) or 0.0) * scale for row in rows.values()]
            handles.append(_part(axes, sizes, ends, **part))
            ends = [a + b for a, b in zip(ends, sizes, strict=True)]
        axes.set_xlabel(unit)
        _name_bars(axes, list(rows), ends)
        _headline(figure, case.title)
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False}
        axes.legend(handles, list(parts.values()), ncols=len(parts), **above)
    return figure


def _part(
    axes: Any, sizes: Sequence[float], starts: Sequence[float], color: str, hatch: str
) -> tuple[Any, Any]:
    """One part of all bars; returns what the legend shows of it."""
    # In SVG a hatch is as transparent as what it is on: there are two bars.
    bars = range(len(sizes)), sizes
    below = axes.barh(*bars, left=starts, color=color, alpha=0.3, linewidth=0)
    above = axes.barh(*bars, left=starts, fill=False, edgecolor=color, hatch=hatch)
    return below, above


def _name_bars(axes: Any, ways: Sequence[str], ends: Sequence[float]) -> None:
    """Ways before their bars and sums behind them."""
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(len(ways) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    limit = _limit(ends)
    axes.set_xlim(0, limit)
    if max(ends) > limit:
        axes.set_xlabel(f"{axes.get_xlabel()} (→: the bar goes on)")
    for i, (label, end) in enumerate(zip(axes.get_yticklabels(), ends, strict=True)):
        style = {"fontweight": "bold", "color": _OURS} if show.is_ours(ways[i]) else {}
        label.set(**style)
        axes.annotate(
            ("→ " if end > limit else "") + show.digits(end),
            xy=(min(end, limit), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
            **style,
        )


def _limit(ends: Sequence[float]) -> float:
    """Where the axis ends: behind all bars, but for some that are far longer."""
    longest, middle = max(ends), sorted(ends)[len(ends) // 2]
    return 2 * middle if 0 < 4 * middle < longest else longest or 1.0
