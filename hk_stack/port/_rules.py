"""What users say about paths: patterns, and what each stands for."""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from hk_stack import _checks, _naming
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

    def __init__(self, argument: str, rules: Mapping[str, _T] | None):
        """Takes rules as the user wrote them, in the argument of that name."""
        rules = {} if rules is None else rules
        is_right, expected = _EXPECTED[argument]
        if not isinstance(rules, Mapping) or not all(isinstance(k, str) for k in rules):
            raise TypeError(
                f"port: {argument} must be a dict by the beginnings of paths, such as "
                f'{{"encoder/block_*": ...}}, not {rules!r}.'
            )
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
    template = "/".join(_parts(pattern))
    return _naming.pattern(template) if template else "(?P<inside>.*)"


def _left_open(match: "re.Match[str]") -> tuple[int, int]:
    """How much of a path a pattern does not say: what is inside, and for `*`."""
    *texts, inside = match.groups()
    return len((inside or "").strip("/")), sum(map(len, texts))


class Said:
    """All that users say; see `flax_to_haiku`."""

    def __init__(
        self,
        rename: Mapping[str, str] | None,
        leaf: Mapping[str, Rule] | None,
        ignore: Sequence[str],
        layer_axis: Axis | Mapping[str, Axis] | None,
        interleave: bool | None,
        cast: bool,
    ):
        are_paths = isinstance(ignore, Sequence) and not isinstance(ignore, str)
        if not are_paths or not all(isinstance(path, str) for path in ignore):
            raise TypeError(f"port: ignore must be a list of paths, not {ignore!r}.")
        if interleave not in (None, True, False):
            raise TypeError(f"port: interleave must be a bool, not {interleave!r}.")
        _checks.flag(cast, "cast", "port")
        of_all = isinstance(layer_axis, (int, tuple))
        by_path: Any = {"": layer_axis} if of_all else layer_axis
        self.rename = Rules("rename", rename)
        self.leaf = Rules("leaf", leaf)
        self.ignore = Rules("ignore", dict.fromkeys(ignore))
        self.layer_axis: Rules[Axis] = Rules("layer_axis", by_path)
        self.interleave, self.cast = interleave, cast

    def unused(self, everything: Sequence[Sequence[str]]) -> Iterator[str]:
        """What to say of rules that fit no leaf, of which all paths are given."""
        raw = dict.fromkeys(paths[0] for paths in everything)
        for rules in (self.rename, self.leaf, self.ignore, self.layer_axis):
            for pattern in rules.rules:
                tried = (path for paths in everything for path in paths)
                if not any(re.fullmatch(_pattern(pattern), path) for path in tried):
                    close = difflib.get_close_matches(pattern, raw, n=2, cutoff=0.4)
                    near = f" Near it are: {', '.join(close)}." if close else ""
                    what = f"{rules.argument}: {pattern!r} is the beginning of no leaf"
                    yield f"{what}'s path.{near}"


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
    return _parts(new), len(path) - len(_parts(inside or ""))


def _parts(text: str) -> Path:
    return tuple(part for part in text.split("/") if part)


def paths_of(collection: str, path: Path) -> tuple[str, str]:
    """What rules for a leaf may say: its path, without the collection or with it."""
    raw = "/".join(path)
    return raw, f"{collection}/{raw}"
