"""Pictures of a result that are legible on light and on dark, with and without colour.

The background is transparent, and all colours are of a middle lightness. A colour is a
framework's; a way has its own marker, and a part of a bar its own hatch.
"""

import io
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hk_stack.compare import results, show

# Of text and axes: as far from white as from black.
INK = "#7a7a7a"
# Of Okabe and Ito's colours, which the colour-blind can tell apart, the light ones
# darkened until they show on white.
_OURS = "#d55e00"
_COLOURS = ("#1f83c4", "#7b7b7b", "#0a9a70", "#bd6a96", "#a67c00", "#8a6fd1")
_MARKERS = "os^Dv<>Pph*Xd8H"
_HATCHES = ("", r"\\\\", "//", "xxx")

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
      figure: The figure.
    """

    kind: str
    name: str
    case: results.Case
    text: str
    figure: Figure


_TEXTS = {
    "scaling": "Run time and build time of each way by number of layers: {}",
    "phases": "Time to trace, lower, compile and first run each way: {}",
    "memory": "Arguments, outputs and temporary memory of each way: {}",
}


def pictures(result: results.Result) -> Iterator[Picture]:
    """All pictures, model by model and mode by mode.

    Each is drawn only when it is asked for: together they take much memory.
    """
    for depths in results.by_depth(result):
        deepest = depths[-1]
        rows = result.of(deepest).values()
        measured = {name for row in rows for name in row.measures}
        if len(depths) > 1:
            yield _picture("scaling", deepest, scaling(result, depths))
        if PHASES.keys() <= measured:
            yield _picture("phases", deepest, bars(result, deepest, PHASES, "s", 1.0))
        if MEMORY.keys() <= measured:
            yield _picture("memory", deepest, bars(result, deepest, MEMORY, "MB", 1e-6))


def _picture(kind: str, case: results.Case, figure: Figure) -> Picture:
    about = title(case) if kind == "scaling" else case.title
    figure.suptitle(about, x=0.01, ha="left", fontsize=10, color=INK)
    model, mode, _, dtype, batch, length, width = case
    parts = (kind, model, mode, dtype, f"b{batch}", f"t{length}", f"d{width}")
    name = re.sub(r"[^\w-]+", "-", "_".join(parts))
    return Picture(kind, name, case, _TEXTS[kind].format(about), figure)


def title(case: results.Case) -> str:
    """What cases have in common that differ in the number of layers only."""
    return case.title.replace(f" {case.layers} layers,", "")


def scaling(result: results.Result, cases: Sequence[results.Case]) -> Figure:
    """Run time and build time against the number of layers, a line for each way.

    Args:
      result: What was measured.
      cases: Those that differ in the number of layers only.
    """
    rows = [row for case in cases for row in result.of(case).values()]
    run = show.run_measure(rows[-1])
    with _settings():
        figure = Figure(figsize=(9.6, 4.8), layout="constrained")
        both = figure.subplots(1, 2)
        for axes, measure in zip(both, (run, "build_s"), strict=True):
            _lines(axes, result.ways(), rows, measure)
            _log_axes(axes, [case.layers for case in cases])
        figure.legend(*both[0].get_legend_handles_labels(), **_BESIDE)
    return figure


_BESIDE = {"loc": "outside right center", "frameon": False, "fontsize": 8}


def _lines(
    axes: Axes, ways: Sequence[str], rows: Sequence[results.Row], measure: str
) -> None:
    """A measure against the number of layers."""
    name, scale, unit = show.SHOWN[measure]
    colours = _colours(ways)
    for way, marker in zip(ways, _MARKERS * len(ways), strict=False):
        medians = [
            (row.case.layers, value * scale)
            for row in rows
            if row.way == way and (value := row.median(measure))
        ]
        if medians:
            width = 2.2 if show.is_ours(way) else 1.1
            (line,) = axes.plot(*zip(*medians, strict=True), marker=marker, label=way)
            line.set(color=colours[way], linewidth=width)
    axes.set_title(f"{name}, {unit}", loc="left", fontsize=10)


def _log_axes(axes: Axes, depths: Sequence[int]) -> None:
    axes.set_xlabel("layers")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(depths, list(map(str, depths)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(True, color=INK, alpha=0.25, linewidth=0.5)


def _colours(ways: Sequence[str]) -> dict[str, str]:
    """The colour of each way, which is that of its framework."""
    frameworks = list(dict.fromkeys(w.split()[0] for w in ways if not show.is_ours(w)))
    colours = dict(zip(frameworks, _COLOURS * len(frameworks), strict=False))
    return {way: colours.get(way.split()[0], _OURS) for way in ways}


def bars(
    result: results.Result,
    case: results.Case,
    parts: Mapping[str, str],
    unit: str,
    scale: float,
) -> Figure:
    """Measures stacked on one another, a bar for each way, the first on top."""
    rows = result.of(case)
    ways = range(len(rows))
    ends = [0.0] * len(rows)
    with _settings():
        figure = Figure(figsize=(9.0, 1.1 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for i, (measure, part) in enumerate(parts.items()):
            sizes = [(row.median(measure) or 0.0) * scale for row in rows.values()]
            for bar in axes.barh(ways, sizes, left=ends, label=part, alpha=0.7):
                bar.set(color=_COLOURS[i], hatch=_HATCHES[i])
            ends = [a + b for a, b in zip(ends, sizes, strict=True)]
        axes.set_yticks(ways, list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        _name_ends(axes, ends, unit)
        above = (0, 1)
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=above, frameon=False)
    return figure


def _name_ends(axes: Axes, ends: Sequence[float], unit: str) -> None:
    """Sums behind the bars, also where a bar is far longer than most and goes on."""
    longest, middle = max(ends), sorted(ends)[len(ends) // 2]
    limit = 2 * middle if 0 < 4 * middle < longest else longest or 1.0
    axes.set_xlim(0, limit)
    axes.set_xlabel(f"{unit} (→: the bar goes on)" if longest > limit else unit)
    for i, end in enumerate(ends):
        axes.annotate(
            ("→ " if end > limit else "") + show.digits(end),
            xy=(min(end, limit), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def svg(picture: Picture) -> str:
    """A picture as an SVG element, for a file or for a page with several of them."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    # Names inside of it are made of its own name: a page has no two alike.
    with _settings(picture.name):
        picture.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", drawn[drawn.index("<svg") :]).rstrip()


def write(result: results.Result, folder: pathlib.Path) -> None:
    """Writes every picture as PNG and as SVG to a folder, made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures(result):
        with _settings():
            file = folder / f"{picture.name}.png"
            picture.figure.savefig(file, dpi=160, transparent=True)
        (folder / f"{picture.name}.svg").write_text(svg(picture) + "\n")


def _settings(salt: str = "") -> Any:
    """How pictures look while one is drawn or written.

    Args:
      salt: What the names inside of an SVG are made of.
    """
    settings: Any = _SETTINGS | {"svg.hashsalt": salt}
    return matplotlib.rc_context(settings)
