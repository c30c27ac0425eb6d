"""What users say about paths: patterns, and what each stands for."""

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from hk_stack import _naming
from hk_stack.port._names import Path

Axes = tuple[int, ...]
Axis = int | Axes
Function = Callable[[np.ndarray], np.ndarray]
Rule = tuple[Function, Function]
Found = tuple[str, "re.Match[str]"]
_T = TypeVar("_T")


class Rules(Generic[_T]):
    """What users say, by the beginnings of paths.

    `*` stands for any text in one part. The empty pattern is the beginning of every
    path. Of several that fit, the closest stands: the longest, of these the one that
    leaves least to `*`, and then the last.
    """

    def __init__(self, argument: str, rules: Mapping[str, _T]):
        """Takes rules as the user wrote them, in the argument of that name."""
        if not isinstance(rules, Mapping) or not all(isinstance(k, str) for k in rules):
            raise TypeError(
                f"port: {argument} must be a dict by the beginnings of paths, such as "
                f'{{"encoder/block_*": ...}}, not {rules!r}.'
            )
        is_right, expected = _EXPECTED[argument]
        for pattern, value in rules.items():
            if not is_right(value):
                raise TypeError(
                    f"port: {argument} of {pattern!r} must be {expected}, "
                    f"not {value!r}."
                )
        self.argument = argument
        self.rules = dict(rules)

    def find(self, paths: Sequence[str]) -> _T | None:
        """What is said of a leaf that may be called by each of the `paths`."""
        found = self.closest(paths)
        return self.rules[found[0]] if found else None

    def closest(self, paths: Sequence[str]) -> Found | None:
        """The pattern of that rule, and how it fits."""
        tried = (
            (pattern, re.fullmatch(_pattern(pattern), path))
            for pattern in reversed(self.rules)
            for path in paths
        )
        fitting = ((pattern, match) for pattern, match in tried if match)
        return min(fitting, key=lambda found: _left_open(found[1]), default=None)

    def unused(self, everything: Sequence[Sequence[str]]) -> list[str]:
        """What to say of rules that fit no leaf, of which all paths are given."""
        raw = list(dict.fromkeys(paths[0] for paths in everything))
        lines = []
        for pattern in self.rules:
            tried = (path for paths in everything for path in paths)
            if not any(re.fullmatch(_pattern(pattern), path) for path in tried):
                close = difflib.get_close_matches(pattern, raw, n=2, cutoff=0.4)
                lines.append(
                    f"{self.argument}: {pattern!r} is the beginning of no leaf's path."
                    + (f" Near it are: {', '.join(close)}." if close else "")
                )
        return lines


def _is_axes(value: object) -> bool:
    axes = value if isinstance(value, tuple) else (value,)
    return all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)


def _is_rule(value: object) -> bool:
    return isinstance(value, tuple) and list(map(callable, value)) == [True, True]


_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "rename": (lambda value: isinstance(value, str), "the path in Haiku"),
    "leaf": (_is_rule, "a pair of functions, to Haiku and to Flax"),
    "layer_axis": (_is_axes, "an axis, or a tuple of axes for nested scans"),
    "ignore": (lambda value: True, ""),
}


@functools.cache
def _pattern(pattern: str) -> str:
    template = "/".join(part for part in pattern.split("/") if part)
    return _naming.pattern(template) if template else "(?P<inside>.*)"


def _left_open(match: "re.Match[str]") -> tuple[int, int]:
    """How much of a path a pattern does not say: what is inside, and for `*`."""
    *texts, inside = match.groups()
    return len((inside or "").strip("/")), sum(map(len, texts))


class Said(NamedTuple):
    """All that users say; see `flax_to_haiku`."""

    rename: Rules[str]
    leaf: Rules[Rule]
    ignore: Rules[None]
    layer_axis: Rules[Axis]
    interleave: bool | None
    cast: bool

    def unused(self, everything: Sequence[Sequence[str]]) -> list[str]:
        """What to say of rules that fit no leaf."""
        rules = (self.rename, self.leaf, self.ignore, self.layer_axis)
        return [line for each in rules for line in each.unused(everything)]


def renamed(rename: Rules[str], collection: str, path: Path) -> tuple[Path, int]:
    """The new beginning of a path, and how many of its parts it stands for."""
    found = rename.closest(paths_of(collection, path))
    if found is None:
        return (), 0
    pattern, match = found
    new, (*texts, inside) = rename.rules[pattern], match.groups()
    if new.count("*") != len(texts):
        raise ValueError(
            f"port: rename to {new!r} has {new.count('*')} '*', the path in Flax has "
            f"{len(texts)}. What they stand for is copied in order, so give as many. A "
            "number of layers is written even where Haiku has a stack: block_*."
        )
    for text in texts:
        new = new.replace("*", text, 1)
    if match.string != "/".join(path):  # The rule names the collection.
        new = new.removeprefix(f"{collection}/")
    rest = len([part for part in (inside or "").split("/") if part])
    return tuple(part for part in new.split("/") if part), len(path) - rest


def paths_of(collection: str, path: Path) -> tuple[str, str]:
    """What rules for a leaf may say: its path, without the collection or with it."""
    raw = "/".join(path)
    return raw, f"{collection}/{raw}"
