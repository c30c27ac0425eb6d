"""A result as one HTML file that needs nothing else: no network, no script."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from hk_stack import _table
from hk_stack.compare import draw, results, show


def html(result: results.Result, pictures: Sequence[draw.Picture]) -> str:
    """All of a result, with its pictures, as the text of an HTML file."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return made.get_template("page.html.jinja").render(
        result=result,
        groups=results.by_depth(result),
        pictures=pictures,
        draw=draw,
        show=show,
        environment=_environment(result),
        measures=_pairs(("name in the file", "what, and its unit"), results.MEASURES),
    )


def _environment(result: results.Result) -> _table.Table:
    found = dict(result.environment)
    found.pop("unfinished", None)  # Which is said above.
    versions = found.pop("versions", {})
    flags = {f"--{name}": value for name, value in found.pop("flags", {}).items()}
    return _pairs(("what", "value"), found | versions | flags)


def _pairs(titles: tuple[str, str], values: Mapping[str, Any]) -> _table.Table:
    texts = (
        [name, value if isinstance(value, str) else json.dumps(value)]
        for name, value in values.items()
    )
    return _table.Table(titles, list(texts))
