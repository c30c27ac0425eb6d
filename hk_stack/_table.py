"""Tables: one way to show rows as text, in colour with rich, as HTML and Markdown."""

import html
import importlib
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Rows under titles.

    Attributes:
      titles: Of the columns.
      rows: As many cells each.
      numbers: The titles of columns that stand at the right in colour.
      styles: Of each row's last cell in colour; by default none.
      is_prose: Whether the last column is text that may be broken into lines.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()
    styles: Sequence[str] = ()
    is_prose: bool = False


class Shown:
    """What `print`, `rich.print` and notebooks show as lines and tables."""

    def _parts(self) -> Iterable[str | Table]:
        raise NotImplementedError

    def __str__(self) -> str:
        lines: list[str] = []
        for part in self._parts():
            lines += [part] if isinstance(part, str) else aligned(part)
        return "\n".join(lines)

    def __rich__(self) -> Any:
        console, text = map(importlib.import_module, ("rich.console", "rich.text"))
        shown = (
            text.Text(part) if isinstance(part, str) else _coloured(part)
            for part in self._parts()
        )
        return console.Group(*shown)

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(part)}</p>" if isinstance(part, str) else _in_html(part)
            for part in self._parts()
            if part
        )


def aligned(table: Table) -> list[str]:
    """Lines of a table, with its columns under one another."""
    rows = [list(table.titles), *map(list, table.rows)]
    if table.is_prose:
        *before, _ = _widths(rows)
        room = _WIDTH - 2 - sum(before) - 2 * len(before)
        rows = _broken(rows, max(_LEAST, room))
    widths = _widths(rows)
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _broken(rows: Iterable[Sequence[str]], width: int) -> list[list[str]]:
    """Rows whose last cells are at most so wide, on as many lines as that takes."""
    lines = []
    for *cells, last in rows:
        first, *rest = textwrap.wrap(last, width) or [""]
        lines += [[*cells, first], *([""] * len(cells) + [more] for more in rest)]
    return lines


_WIDTH, _LEAST = 100, 30  # Of a page, and of a column of prose on it.


def markdown(table: Table) -> str:
    """The table in Markdown."""
    sides = ["---:" if title in table.numbers else "---" for title in table.titles]
    rows = [map(escaped, table.titles), sides, *(map(escaped, r) for r in table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML in it, leaves as it is."""
    # Underscores inside of a word mean nothing in Markdown.
    special = r"[\\`*{}\[\]<>|#]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, r"\\\g<0>", text)


def _coloured(table: Table) -> Any:
    tables, texts = map(importlib.import_module, ("rich.table", "rich.text"))
    made = tables.Table(box=None, header_style="bold")
    for title in table.titles:
        side = "right" if title in table.numbers else "left"
        made.add_column(title, justify=side, overflow="fold")  # All of a path.
    styles = table.styles or [""] * len(table.rows)
    for (*cells, last), style in zip(table.rows, styles, strict=True):
        made.add_row(*map(texts.Text, cells), texts.Text(last, style=style))
    return made


def _in_html(table: Table) -> str:
    lines = [(table.titles, "th"), *((row, "td") for row in table.rows)]
    rows = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        for cells, tag in lines
    )
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def si(number: float) -> str:
    """`number` with three digits and a decimal prefix.

    >>> si(0), si(12), si(1536), si(2.5e9)
    ('0 ', '12 ', '1.54 k', '2.5 G')
    """
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"
