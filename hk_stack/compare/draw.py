"""Pictures of a result that are legible on light and on dark, with and without colour.

The background is transparent, and all colours are of a middle lightness. A colour is a
framework's; a way has its own marker.
"""

import io
import re
from collections.abc import Iterator, Sequence
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
_SETTINGS = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Text stays text: it is small, and can be searched and read aloud.
    "svg.fonttype": "none",
    "text.parse_math": False,
}


class Picture(NamedTuple):
    """Run and build times by number of layers.

    Attributes:
      name: The name of its file, without a suffix.
      case: The deepest case that it shows.
      text: What it shows, in a sentence for those who cannot see it.
      svg: The picture as an SVG element.
    """

    name: str
    case: results.Case
    text: str
    svg: str


def pictures(result: results.Result) -> Iterator[Picture]:
    """A picture for each model and mode that was measured at several depths."""
    for depths in results.by_depth(result):
        if len(depths) > 1:
            case = depths[-1]
            model, mode, _, dtype, batch, length, width = case
            parts = ("scaling", model, mode, dtype, f"b{batch}", f"t{length}")
            name = re.sub(r"[^\w-]+", "-", "_".join((*parts, f"d{width}")))
            text = f"Run and build time of each way by number of layers: {title(case)}"
            # Names inside of it are made of its own name: a page has no two alike.
            settings: Any = _SETTINGS | {"svg.hashsalt": name}
            with matplotlib.rc_context(settings):
                svg = _svg(scaling(result, depths))
            yield Picture(name, case, text, svg)


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
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, measure in zip(both, (run, "build_s"), strict=True):
        _lines(axes, result.ways(), rows, measure)
        _log_axes(axes, [case.layers for case in cases])
    about = title(cases[-1])
    figure.suptitle(about, x=0.01, ha="left", fontsize=10, color=INK)
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
    theirs = {w: w.split()[0] for w in ways if not show.is_ours(w)}
    frameworks = list(dict.fromkeys(theirs.values()))
    colours = dict(zip(frameworks, _COLOURS * len(frameworks), strict=False))
    return {way: colours.get(theirs.get(way, ""), _OURS) for way in ways}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", drawn[drawn.index("<svg") :]).rstrip()
