"""What users say about paths: patterns, and what each stands for."""

import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from hk_stack import _checks
from hk_stack.port._codecs import Codec, Leaves
from hk_stack.port._names import Path

Axes = tuple[int, ...]
Axis = int | Axes
Function = Callable[[np.ndarray], np.ndarray]
Pair = tuple[Function, Function]
Arguments = dict[str, Any]  # Of the verbs, to propose; rules in `leaf` by their names.
_T = TypeVar("_T")


class Transpose(NamedTuple):
    """What `hk_stack.port.transpose` returns, a pair as well."""

    to_haiku: Function
    to_flax: Function


class Regroup(Codec):
    """A rule for several leaves, which then says how each is stored.

    See `hk_stack.port.split`, `fuse` and `tie`.
    """

    is_plain = False

    def regrouped(self, leaves: Leaves, pattern: str) -> tuple[Leaves, str]:
        """The leaves of Flax after the rule; and why it fits none, if paths do."""
        raise NotImplementedError


Rule = Pair | Regroup


class Found(NamedTuple):
    """How a rule fits a path.

    Attributes:
      pattern: The rule.
      path: The path.
      wildcards: Those of the rule, each with what it stands for.
      inside: How many parts of the path the rule does not say.
    """

    pattern: str
    path: str
    wildcards: tuple[tuple[str, str], ...]
    inside: int

    @property
    def left_open(self) -> tuple[int, ...]:
        """How much of a path a pattern does not say: what is inside, and for `*`."""
        end = "/".join(self.path.split("/")[-self.inside :]) if self.inside else ""
        in_wildcards = sum(len(text) for _, text in self.wildcards)
        return len(end), in_wildcards, self.pattern.count("*")


class Rules(Generic[_T]):
    """What users say, by the beginnings of paths.

    `*` stands for any text in one part, `{i}` for a number, and `{i+1}` for one that is
    larger by one. The empty pattern is the beginning of every path. Of several that
    fit, the closest stands: the longest, of these the one that leaves least to `*`, and
    then the last.
    """

    def __init__(self, argument: str, rules: Mapping[str, _T]):
        """Takes rules as the user wrote them, in the argument of that name."""
        if not isinstance(rules, Mapping) or not all(isinstance(k, str) for k in rules):
            raise TypeError(
                f"port: {argument} must be a dict by the beginnings of paths, such as "
                f'{{"encoder/block_*": ...}}, not {_checks.shown(rules)}.'
            )
        is_right, expected = _EXPECTED[argument]
        for pattern, value in rules.items():
            if not is_right(value):
                raise TypeError(
                    f"port: {argument} of {pattern!r} must be {expected}, "
                    f"not {_checks.shown(value)}."
                )
        self.argument = argument
        self.rules = dict(rules)

    def find(self, paths: Sequence[str]) -> _T | None:
        """What is said of a leaf that may be called by each of the `paths`."""
        found = self.closest(paths)
        return self.rules[found.pattern] if found else None

    def closest(self, paths: Sequence[str]) -> Found | None:
        """The pattern of that rule, and how it fits."""
        tried = (matched(pattern, paths) for pattern in reversed(self.rules))
        fitting = (found for found in tried if found)
        return min(fitting, key=lambda found: found.left_open, default=None)

    def unused(self, everything: Sequence[Sequence[str]]) -> list[str]:
        """What to say of rules that fit no leaf, of which all paths are given."""
        raw = list(dict.fromkeys(paths[0] for paths in everything))
        lines = []
        for pattern in self.rules:
            if not any(matched(pattern, paths) for paths in everything):
                close = difflib.get_close_matches(pattern, raw, n=2, cutoff=0.4)
                lines.append(
                    f"{self.argument}: {pattern!r} is the beginning of no leaf's path."
                    + (f" Near it are: {', '.join(close)}." if close else _LEAVE_OUT)
                )
        return lines


_LEAVE_OUT = " Leave it out, or say what paths begin with; plan(...) shows them."


def _is_axes(value: object) -> bool:
    axes = value if isinstance(value, tuple) else (value,)
    return all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)


def _is_rule(value: object) -> bool:
    is_pair = isinstance(value, tuple) and list(map(callable, value)) == [True, True]
    return is_pair or isinstance(value, Regroup)


_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "rename": (lambda value: isinstance(value, str), "the path in Haiku"),
    "leaf": (
        _is_rule,
        "a pair of functions, to Haiku and to Flax, or what hk_stack.port.split, fuse "
        "or tie return",
    ),
    "layer_axis": (_is_axes, "an axis, or a tuple of axes for nested scans"),
    "ignore": (lambda value: True, ""),
}


# Patterns

_WILDCARD = re.compile(r"(\*|\{[a-z](?:[+-]\d+)?\})")


def matched(pattern: str, paths: Sequence[str]) -> Found | None:
    """How a pattern fits the first of the paths that it fits."""
    compiled = _compiled(pattern)
    for path in paths:
        match = compiled.fullmatch(path)
        if match:
            *texts, inside = match.groups()
            rest = len([part for part in (inside or "").split("/") if part])
            pairs = zip(_WILDCARD.findall(_joined(pattern)), texts, strict=True)
            found = Found(pattern, path, tuple(pairs), rest)
            if _numbers(found) is not None:
                return found
    return None


@functools.cache
def _compiled(pattern: str) -> "re.Pattern[str]":
    template = _joined(pattern)
    if not template:
        return re.compile("(.*)")
    escaped = (
        re.escape(text) if i % 2 == 0 else "([^/]*)" if text == "*" else r"(\d+)"
        for i, text in enumerate(_WILDCARD.split(template))
    )
    return re.compile("".join(escaped) + "(/.*)?")


def _joined(pattern: str) -> str:
    return "/".join(part for part in pattern.split("/") if part)


def _numbers(found: Found) -> dict[str, int] | None:
    """What `i` is, if it is the same everywhere, and counts from 0."""
    numbers: dict[str, int] = {}
    for wildcard, text in found.wildcards:
        if wildcard != "*":
            name, shift = wildcard[1], int(wildcard[2:-1] or 0)
            number = int(text) - shift
            if number < 0 or numbers.setdefault(name, number) != number:
                return None
    return numbers


class Said(NamedTuple):
    """All that users say; see `flax_to_haiku`."""

    rename: Rules[str]
    leaf: Rules[Pair]
    regroup: Rules[Regroup]
    ignore: Rules[None]
    layer_axis: Rules[Axis]
    interleave: bool | None
    cast: bool

    def unused(self, everything: Sequence[Sequence[str]]) -> list[str]:
        """What to say of rules that fit no leaf."""
        rules = (self.rename, self.leaf, self.ignore, self.layer_axis)
        return [line for each in rules for line in each.unused(everything)]


def checked(
    rename: Any = None,
    leaf: Any = None,
    ignore: Any = (),
    layer_axis: Any = None,
    interleave: Any = None,
    cast: bool = False,
) -> Said:
    """What the user says, after a check of what it is."""
    are_paths = isinstance(ignore, Sequence) and not isinstance(ignore, str)
    if not are_paths or not all(isinstance(path, str) for path in ignore):
        raise TypeError(
            f"port: ignore must be a list of paths, not {_checks.shown(ignore)}. Write "
            'ignore=["head"].'
        )
    if interleave is not None:
        _checks.flag(interleave, "interleave", "port")
    _checks.flag(cast, "cast", "port")
    if isinstance(layer_axis, (int, tuple)):
        layer_axis = {"": layer_axis}
    rules = Rules("leaf", leaf or {}).rules.items()
    return Said(
        Rules("rename", rename or {}),
        Rules("leaf", {k: rule for k, rule in rules if not isinstance(rule, Regroup)}),
        Rules("leaf", {k: rule for k, rule in rules if isinstance(rule, Regroup)}),
        Rules("ignore", dict.fromkeys(ignore)),
        Rules("layer_axis", {} if layer_axis is None else layer_axis),
        interleave,
        cast,
    )


def renamed(rename: Rules[str], collection: str, path: Path) -> tuple[Path, int]:
    """The new beginning of a path, and how many of its parts it stands for."""
    raw = "/".join(path)
    found = rename.closest((raw, f"{collection}/{raw}"))
    if found is None:
        return (), 0
    new = _filled(rename.rules[found.pattern], found)
    if found.path != raw:  # The rule names the collection.
        new = new.removeprefix(f"{collection}/")
    return tuple(part for part in new.split("/") if part), len(path) - found.inside


def _filled(new: str, found: Found) -> str:
    """A path with what the wildcards of a rule stand for."""
    texts = [text for wildcard, text in found.wildcards if wildcard == "*"]
    if new.count("*") != len(texts):
        raise ValueError(
            f"port: rename to {new!r} has {new.count('*')} '*', the path in Flax has "
            f"{len(texts)}. What they stand for is copied in order, so give as many. A "
            "number of layers is written even where Haiku has a stack: block_*."
        )
    numbers = _numbers(found) or {}
    stars = iter(texts)

    def text(match: "re.Match[str]") -> str:
        wildcard = match[0]
        if wildcard == "*":
            return next(stars)
        if wildcard[1] not in numbers:
            raise ValueError(
                f"port: rename to {new!r} has {wildcard}, the path in Flax, "
                f"{found.pattern!r}, has no such number. Write it in both, as in "
                '{"block_{i+1}": "rest_{i}"}.'
            )
        number = numbers[wildcard[1]] + int(wildcard[2:-1] or 0)
        if number < 0:
            raise ValueError(
                f"port: rename of {found.path!r} to {new!r} gives the number {number}; "
                "layers are counted from 0."
            )
        return str(number)

    return _WILDCARD.sub(text, new)


def written(arguments: Arguments) -> str:
    """Arguments as one writes them."""
    return ", ".join(f"{name}={_value(value)}" for name, value in arguments.items())


def _value(value: object) -> str:
    if isinstance(value, str):
        return value if value.startswith("hk_stack.") else f'"{value}"'
    if isinstance(value, dict):
        inside = ", ".join(f'"{key}": {_value(each)}' for key, each in value.items())
        return f"{{{inside}}}"
    return repr(value)
