"""Pictures of a result that are legible on light and on dark, with and without colour.

The background is transparent, and all colours are of a middle lightness. A colour is a
framework's. Ratios are on linear axes, where 20 % can be seen; times by the number of
layers on logarithmic ones, where a way has its own marker.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Ratios of all ways, or their times by number of layers.

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
    """For each model and mode its ratios, and at several depths its times by depth."""
    for depths in results.by_depth(result):
        about = "Ratios of each way to the baseline"
        yield _picture("ratios", ratios, about, result, depths)
        if len(depths) > 1:
            about = "Run and build time of each way by number of layers"
            yield _picture("scaling", scaling, about, result, depths)


def _picture(
    kind: str,
    draw: Callable[[results.Result, Sequence[results.Case]], Figure],
    about: str,
    result: results.Result,
    depths: Sequence[results.Case],
) -> Picture:
    model, mode, _, dtype, batch, length, width = depths[-1]
    parts = (kind, model, mode, dtype, f"b{batch}", f"t{length}", f"d{width}")
    name = re.sub(r"[^\w-]+", "-", "_".join(parts))
    text = f"{about}: {title(depths[-1])}"
    # Names inside of it are made of its own name: a page has no two alike.
    settings: Any = _SETTINGS | {"svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        svg = _svg(draw(result, depths), text)
    return Picture(name, depths[-1], text, svg)


def title(case: results.Case) -> str:
    """What cases have in common that differ in the number of layers only."""
    return case.title.replace(f" {case.layers} layers,", "")


def ratios(result: results.Result, cases: Sequence[results.Case]) -> Figure:
    """Ratios to the baseline, a line for each way, with intervals if there are any."""
    lines = {case: show.lines(result, case) for case in cases}
    measured = {x.row.way for case in cases for x in lines[case]}
    colours = _colours(result.ways())  # As in other pictures.
    colours = {way: colours[way] for way in colours if way in measured}
    found = {name for case in cases for x in lines[case] for name in x.ratios}
    measures = [name for name in show.SHOWN if name in found]
    figure = Figure(figsize=(9.6, 1 + 0.22 * len(colours)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for i, case in enumerate(cases):
            _ratios(axes, colours, lines[case], measure, (i + 1) / len(cases))
        _ratio_axes(axes, show.SHOWN[measure].name)
    panels[0].set_yticks(range(len(colours)), colours)
    panels[0].set_ylim(len(colours) - 0.4, -0.6)
    for label in panels[0].get_yticklabels():
        label.set(color=_OURS if show.is_ours(label.get_text()) else INK)
    if len(cases) > 1:
        *shallow, deepest = (f"{case.layers} layers" for case in cases)
        text = f"filled: {deepest}; smaller and not filled: {', '.join(shallow)}"
        figure.supxlabel(text, x=0.99, ha="right", fontsize=9, color=INK)
    return figure


# What is more is a number at the edge: it would hide all else.
_LARGEST, _EDGE = 2.0, 2.05


def _ratios(
    axes: Axes,
    colours: Mapping[str, str],
    lines: Sequence[show.Line],
    measure: str,
    depth: float,
) -> None:
    """The ratios of a case; `depth` is 1 for the deepest, less for others."""
    ratios = {x.row.way: x.ratios[measure] for x in lines if measure in x.ratios}
    found = [
        (ratios[way], place, colour)
        for place, (way, colour) in enumerate(colours.items())
        if way in ratios
    ]
    inside = [point for point in found if point[0].value <= _LARGEST]
    if inside:
        shown, ys, inks = zip(*inside, strict=True)
        lows, highs, values = ([x[i] for x in shown] for i in (1, 2, 0))
        axes.hlines(ys, lows, highs, colors=inks, linewidths=1, alpha=depth)
        faces = inks if depth == 1 else "none"
        area = (3 + 3 * depth) ** 2
        axes.scatter(values, ys, area, facecolors=faces, edgecolors=inks)
    for ratio, y, colour in found:
        if depth == 1 and ratio.value > _LARGEST:
            text = f" \N{RIGHTWARDS ARROW} {show.digits(ratio.value)}"
            axes.text(_EDGE, y, text, va="center", color=colour, fontsize=8)


def _ratio_axes(axes: Axes, name: str) -> None:
    axes.set_title(f"{name}, ratio", loc="left", fontsize=10)
    axes.set_xlim(0, _EDGE)
    axes.xaxis.set_major_locator(ticker.MultipleLocator(0.5))
    axes.xaxis.set_minor_locator(ticker.MultipleLocator(0.1))
    axes.axvline(1, color=INK, lw=1)
    axes.grid(True, color=INK, alpha=0.25, linewidth=0.5)


def scaling(result: results.Result, cases: Sequence[results.Case]) -> Figure:
    """Run time and build time against the number of layers, a line for each way."""
    rows = [row for case in cases for row in result.of(case).values()]
    run = show.run_measure(rows[-1])
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, measure in zip(both, (run, "build_s"), strict=True):
        _lines(axes, result.ways(), rows, measure)
        _log_axes(axes, [case.layers for case in cases])
    handles = both[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _lines(
    axes: Axes, ways: Sequence[str], rows: Sequence[results.Row], measure: str
) -> None:
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


def _svg(figure: Figure, text: str) -> str:
    buffer = io.StringIO()
    known: dict[str, Any] = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    known["Title"] = text  # Which is not drawn: what is around it has it.
    figure.savefig(buffer, format="svg", transparent=True, metadata=known)
    drawn = buffer.getvalue()
    drawn = re.sub(r"(?s) *<metadata>.*</metadata>\n", "", drawn)
    return re.sub(r'<g id="[^"]*"', "<g", drawn[drawn.index("<svg") :]).rstrip()
