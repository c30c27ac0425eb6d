"""A result as one HTML file that needs nothing else: no network, no script."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from hk_stack import _table
from hk_stack.compare import draw, results, show


def html(result: results.Result, pictures: Sequence[draw.Picture]) -> str:
    """All of a result, with its pictures, as the text of an HTML file."""
    folder = pathlib.Path(__file__).parent
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return made.get_template("page.html.jinja").render(
        result=result,
        groups=_groups(result, pictures),
        is_ours=show.is_ours,
        partial=show.partial(result),
        ink=draw.INK,
        glance=show.glance(result),
        reading=show.READING,
        measured=show.environment(result),
        environment=_environment(result),
        measures=_pairs(("name in the file", "what, and its unit"), results.MEASURES),
    )


def _groups(
    result: results.Result, pictures: Sequence[draw.Picture]
) -> list[dict[str, Any]]:
    """What the page has of cases that differ in the number of layers only."""
    return [
        {
            "title": draw.title(depths[-1]),
            "tables": [
                (case.layers, show.table(result, case), show.caption(result, case))
                for case in reversed(depths)
            ],
            "pictures": [x for x in pictures if x.case == depths[-1]],
        }
        for depths in results.by_depth(result)
    ]


def _environment(result: results.Result) -> _table.Table:
    found = dict(result.environment)
    found.pop("unfinished", None)  # Which is said above.
    versions = found.pop("versions", {})
    flags = {f"--{name}": value for name, value in found.pop("flags", {}).items()}
    return _pairs(("what", "value"), found | versions | flags)


def _pairs(titles: tuple[str, str], values: dict[str, Any]) -> _table.Table:
    texts = (
        [name, value if isinstance(value, str) else json.dumps(value)]
        for name, value in values.items()
    )
    return _table.Table(titles, list(texts))
