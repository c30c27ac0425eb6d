"""A result as one HTML file that needs nothing else: no network, no script.

It is as dark or light as the reader's system, and fits a phone: what is wider scrolls
by itself.
"""

import html as escaping
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hk_stack.compare import draw, results, show

TITLE = "Layer stacks side by side"


def html(result: results.Result) -> str:
    """All of a result, as the text of an HTML file."""
    cases = result.cases()
    found = {case: show.lines(result, case) for case in cases}
    groups = draw.by_depth(cases)
    body = [
        f"<h1>{TITLE}</h1>",
        _summary(result),
        _contents(groups),
        _reading(),
        _glance(result, groups, found),
        *_models(result, groups, found),
        _problems(result),
        _environment(result),
        _repeating(result),
        _measures(),
    ]
    return _PAGE.format(title=TITLE, style=_STYLE, body="\n".join(body))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1d1d1f; --soft: #5b5b60; --line: #d8d8dc;
  --ours: #fdf1e7; --accent: #a84300;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111111; --ink: #e3e3e6; --soft: #a3a3a9; --line: #37373c;
    --ours: #2b1d12; --accent: #ff9b5c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif;
}
main { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 {
  font-size: 1.4rem; margin: 3rem 0 1rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line);
}
h3 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.soft { color: var(--soft); }
nav ul { padding-left: 0; list-style: none; }
nav li { margin: .2rem 0; }
nav li a { margin-right: .8rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table {
  border-collapse: separate; border-spacing: 0;
  font-size: .875rem; line-height: 1.25rem;
}
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
caption span {
  display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 4rem);
}
th, td { padding: .25rem .625rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; text-align: right; vertical-align: bottom; }
td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
thead th[colspan] { text-align: center; }
th:first-child { text-align: left; padding-left: .3rem; }
tbody th {
  font-weight: 400; text-align: left; white-space: nowrap;
  position: sticky; left: 0; background: var(--page);
}
tr.ours th, tr.ours td { background: var(--ours); }
tr.ours th, thead th.ours { font-weight: 700; color: var(--accent); }
td.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
td b { font-weight: 700; position: relative; }
td b span { position: absolute; left: 100%; }
.pairs tbody th, .pairs th { white-space: normal; position: static; text-align: left; }
.pairs tbody th { vertical-align: top; min-width: 7rem; }
details { margin: .5rem 0; border-left: 3px solid var(--line); padding-left: .8rem; }
summary { cursor: pointer; font-weight: 600; }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; min-width: 42rem; max-width: 62rem;
  height: auto; }
figcaption { color: var(--soft); font-size: .875rem; }
pre {
  overflow-x: auto; padding: .8rem; border: 1px solid var(--line);
  font-size: .875rem;
}
"""


# The beginning of the page


def _summary(result: results.Result) -> str:
    cases = result.cases()
    ways = results.ways(result)
    parts = [
        f"{len(ways)} ways to run a layer stack, in {len(cases)} cases:",
        f"models {_listed(case.model for case in cases)};",
        f"modes {_listed(case.mode for case in cases)};",
        f"{_listed(str(case.layers) for case in cases)} layers.",
    ]
    problems = (
        f' {len(result.failed)} failed, <a href="#problems">see below</a>.'
        if result.failed
        else ""
    )
    return (
        f"<p>{_text(' '.join(parts))}{problems}</p>\n"
        f'<p class="soft">{_text(show.environment(result))}</p>'
    )


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))


def _contents(groups: Sequence[Sequence[results.Case]]) -> str:
    models: dict[str, list[str]] = {}
    for i, cases in enumerate(groups):
        link = f'<a href="#group-{i}">{_text(cases[0].mode)}</a>'
        models.setdefault(cases[0].model, []).append(link)
    items = [f"<li>{_text(m)}: {' '.join(links)}</li>" for m, links in models.items()]
    return f'<nav aria-label="Models and modes"><ul>{"".join(items)}</ul></nav>'


def _reading() -> str:
    return """<h2>How to read it</h2>
<ul>
<li>All ways of a case compute the same: the same model from the same parameters and
inputs. How far they differ is in the last column of each table.</li>
<li>A <strong>ratio</strong> is to the baseline of the case, in the same process and
the same round. Below 1 is better than the baseline: 0.5 is half of the time or memory.
Behind it is the interval that holds 95 % of its bootstrap, where there is more than one
sample.</li>
<li>Machines are noisy: trust a ratio whose interval does not hold 1, and trust
times less than ratios. Two ways whose intervals overlap are not told apart.</li>
<li>The lowest of a column, and those not told from it, are <b>bold*</b> with a star.
</li>
<li>Ways of hk_stack are highlighted.</li>
</ul>"""


def _glance(
    result: results.Result,
    groups: Sequence[Sequence[results.Case]],
    found: dict[results.Case, list[show.Line]],
) -> str:
    """The ratios of the deepest cases, all ways beside one another."""
    ways = results.ways(result)
    rows = []
    for cases in groups:
        lines = {line.row.way: line for line in found[cases[-1]]}
        failed = {entry["way"] for entry in show.failures(result, cases[-1])}
        cells = [_glance_cell(lines.get(way), way in failed) for way in ways]
        title = f"{cases[-1].model}, {cases[-1].mode}, {cases[-1].layers} layers"
        rows.append(f'<tr><th scope="row">{_text(title)}</th>{"".join(cells)}</tr>')
    heads = [f'<th scope="col"{_ours(way)}>{_text(way)}</th>' for way in ways]
    head = f'<tr><th scope="col">deepest case</th>{"".join(heads)}</tr>'
    caption = "Ratio of the run time to the baseline; below 1 is better"
    return "<h2>At a glance</h2>\n" + _table(caption, head, rows)


def _glance_cell(line: show.Line | None, has_failed: bool) -> str:
    if line is None:
        return "<td>failed</td>" if has_failed else "<td>-</td>"
    name = show.called(line.row)
    return _cell(show.ratio_text(line, name, short=True), name in line.best)


# Models and modes


def _models(
    result: results.Result,
    groups: Sequence[Sequence[results.Case]],
    found: dict[results.Case, list[show.Line]],
) -> Iterator[str]:
    drawn: dict[results.Case, dict[str, str]] = {}
    for picture in draw.pictures(result):
        drawn.setdefault(picture.case, {})[picture.kind] = _figure(picture)
    model = None
    for i, cases in enumerate(groups):
        if cases[0].model != model:
            model = cases[0].model
            yield f"<h2>{_text(model)}</h2>"
        yield f'<h3 id="group-{i}">{_text(draw.title(cases))}</h3>'
        figures = drawn.get(cases[-1], {})
        yield figures.pop("scaling", "")
        for case in reversed(cases):
            table = _case(result, case, found[case])
            yield _details(f"{case.layers} layers", table, is_open=case == cases[-1])
        if figures:
            yield _details("Pictures of phases and memory", "".join(figures.values()))


def _details(title: str, content: str, *, is_open: bool = False) -> str:
    start = "<details open>" if is_open else "<details>"
    return f"{start}<summary>{_text(title)}</summary>\n{content}</details>"


def _figure(picture: draw.Picture) -> str:
    """The picture in the colour of the page's text, and what it shows in words."""
    label = f'<svg role="img" aria-label="{_text(picture.text)}" '
    svg = draw.svg(picture).replace("<svg ", label, 1)
    svg = svg.replace(draw.INK, "currentColor")
    return (
        f"<figure>{_scrolling(picture.text, svg)}"
        f"<figcaption>{_text(picture.text)}</figcaption></figure>"
    )


def _case(
    result: results.Result, case: results.Case, lines: Sequence[show.Line]
) -> str:
    """A table of one case: what was measured of each way, and what failed."""
    shown = [n for n in show.SHOWN if any(x.row.samples(n) for x in lines)]
    first, second = ['<th scope="col" rowspan="2">way</th>'], []
    for name in shown:
        columns = [show.unit(name), *(["quartiles"] * _has_quartiles(name)), "ratio"]
        title, span = _text(show.NAMES[name]), len(columns)
        first.append(f'<th scope="colgroup" colspan="{span}">{title}</th>')
        second += [f'<th scope="col">{column}</th>' for column in columns]
    first.append('<th scope="col" rowspan="2">difference</th>')
    caption = f"{case.title}; ratios are to {result.baseline(case).way}"
    rows = [_line(line, shown) for line in lines]
    rows += [_failure(x, len(second) + 1) for x in show.failures(result, case)]
    return _table(caption, f"<tr>{''.join(first)}</tr><tr>{''.join(second)}</tr>", rows)


def _has_quartiles(measure: str) -> bool:
    return measure.endswith("_s")  # Bytes are the same each time.


def _line(line: show.Line, shown: Sequence[str]) -> str:
    cells = [f'<th scope="row">{_text(line.row.way)}</th>']
    for name in shown:
        cells.append(_cell(show.amount(line.row, name), name in line.best))
        if _has_quartiles(name):
            cells.append(_cell(show.quartiles(line.row, name) or "-"))
        cells.append(_cell(show.ratio_text(line, name)))
    parity = line.row.parity.values()
    cells.append(_cell(f"{max(parity):.0e}" if parity else "-"))
    return f"<tr{_ours(line.row.way)}>{''.join(cells)}</tr>"


def _failure(failed: dict[str, Any], columns: int) -> str:
    way, error = _text(failed["way"]), _text(show.first_line(failed["error"]))
    return (
        f'<tr><th scope="row">{way}</th>'
        f'<td class="text" colspan="{columns}">failed: {error}</td></tr>'
    )


# The end of the page


def _problems(result: results.Result) -> str:
    """What failed and what was skipped, if anything was."""
    parts = ['<h2 id="problems">Failed and skipped</h2>']
    failed = [
        (f"{show.case_of(entry).title}: {entry['way']}", entry["error"])
        for entry in result.failed
    ]
    skipped = [(entry["what"], entry["why"]) for entry in result.skipped]
    if failed:
        parts.append(_pairs("Failed", ("case and way", "error"), failed))
    if skipped:
        titles = ("what", "why, and what to do about it")
        parts.append(_pairs("Skipped", titles, skipped))
    if not failed and not skipped:
        parts.append("<p>Nothing failed, and nothing was skipped.</p>")
    return "\n".join(parts)


def _environment(result: results.Result) -> str:
    found = dict(result.environment)
    versions = found.pop("versions", {})
    flags = {f"--{name}": value for name, value in found.pop("flags", {}).items()}
    pairs = [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in (found | versions | flags).items()
    ]
    caption = "Device, versions and flags"
    return "<h2>Environment</h2>\n" + _pairs(caption, ("what", "value"), pairs)


def _repeating(result: results.Result) -> str:
    command = result.environment.get("command", "python -m hk_stack.compare")
    return (
        "<h2>To repeat it</h2>\n"
        f'<pre tabindex="0"><code>{_text(command)}</code></pre>\n'
        "<p>On another machine times will differ, and ratios less so.</p>"
    )


def _measures() -> str:
    pairs = list(results.MEASURES.items())
    titles = ("name in the file", "what, and its unit")
    table = _pairs("Measures and their units", titles, pairs)
    return f"<h2>Measures</h2>\n{table}\n<p>{_MEASURES}</p>"


_MEASURES = """After each time that the programs are built, they are run in rounds, in
each of which every way has its turn. Times are medians of all samples;
build is the sum of trace, lower and compile. Memory is what the compiler plans for one
run: temporary memory is beside arguments and outputs. The difference is the largest one
of an output or a gradient from the first way's, over the largest value there."""


# Pieces of HTML


def _text(text: str) -> str:
    return escaping.escape(text)


def _cell(text: str, is_best: bool = False) -> str:
    if is_best:
        return f"<td><b>{_text(text)}<span>*</span></b></td>"
    return f"<td>{_text(text)}</td>"


def _ours(way: str) -> str:
    return ' class="ours"' if show.is_ours(way) else ""


def _pairs(
    caption: str, titles: tuple[str, str], pairs: Iterable[tuple[str, str]]
) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    rows = [
        f'<tr><th scope="row">{_text(name)}</th>'
        f'<td class="text">{_text(text)}</td></tr>'
        for name, text in pairs
    ]
    return _table(caption, f"<tr>{head}</tr>", rows, kind="pairs")


def _table(caption: str, head: str, rows: Iterable[str], kind: str = "measured") -> str:
    table = (
        f'<table class="{kind}"><caption><span>{_text(caption)}</span></caption>\n'
        f"<thead>{head}</thead>\n"
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
    )
    return _scrolling(caption, table)


def _scrolling(label: str, content: str) -> str:
    """What may be wider than the page, which the keyboard reaches as well."""
    start = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(label)}">'
    )
    return f"{start}\n{content}\n</div>"
