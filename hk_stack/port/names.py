"""Names on both sides: what Flax and Haiku call the same module.

Names are compared part by part, after three habits are evened out: Flax names a
module without a name of its own `Dense_0`, Haiku `linear`; Haiku numbers from the
second on (`linear`, `linear_1`); and Haiku writes `~` for methods other than the call.
"""

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hk_stack import _naming

Path = tuple[str, ...]


def beginning(a: Iterable[str], b: Iterable[str]) -> Path:
    """The longest common beginning of two names."""
    pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(a, b, strict=False))
    return tuple(x for x, _ in pairs)


_ALIASES = {
    "Conv": "conv",
    "ConvTranspose": "conv_transpose",
    "Dense": "linear",
    "DenseGeneral": "linear",
    "Embed": "embed",
    "GRUCell": "gru",
    "GroupNorm": "group_norm",
    "LSTMCell": "lstm",
    "Linear": "linear",
    "LinearGeneral": "linear",
    "MultiHeadAttention": "multi_head_attention",
    "MultiHeadDotProductAttention": "multi_head_attention",
    "OptimizedLSTMCell": "lstm",
    "SelfAttention": "multi_head_attention",
    "SpectralNorm": "spectral_norm",
    "conv1_d": "conv",
    "conv1_d_transpose": "conv_transpose",
    "conv2_d": "conv",
    "conv2_d_transpose": "conv_transpose",
    "conv3_d": "conv",
    "conv3_d_transpose": "conv_transpose",
    "depthwise_conv1_d": "conv",
    "depthwise_conv2_d": "conv",
    "depthwise_conv3_d": "conv",
    "sn_params_tree": "spectral_norm",
}


class Part(NamedTuple):
    """One part of a module's name: `block_3` is `("block", 3)`, `block` `("block", 0)`.

    Attributes:
      base: The name without its number, as Haiku writes it.
      number: From 0.
    """

    base: str
    number: int


def parts(path: Iterable[str], literal: bool = False) -> tuple[Part, ...]:
    """The parts of a module's name, in either framework's habit; or as it is written.

    >>> parts(["Block_2", "Dense_0"]) == parts(["block_2", "~", "linear"])
    True
    >>> parts(["layers", "3", "kernel"])  # a list of modules in NNX
    (Part(base='layers', number=3), Part(base='kernel', number=0))
    """
    found: list[Part] = []
    before = ""
    for name in path:
        if name == "~":
            continue
        if name.isdecimal() and before and not before.isdecimal():
            found[-1] = Part(before, int(name))
        elif name.isdecimal():
            found.append(Part("", int(name)))
        else:
            found.append(_part(name, literal))
        before = name
    return tuple(found)


@functools.cache
def _part(name: str, literal: bool) -> Part:
    match = re.fullmatch(r"(.+?)_(\d+)", name)
    base, number = (match[1], int(match[2])) if match else (name, 0)
    if literal:
        return Part(base, number)
    base = _ALIASES.get(base) or _snake_case(base)
    # Each wrapped layer has a SpectralNorm of its own in Flax, and a name in it.
    return Part(base, 0 if base == "spectral_norm" else number)


def _snake_case(name: str) -> str:
    """`S4Block` as Haiku names it: `s4_block`."""
    if not name[:1].isupper():
        return name
    return re.sub(r"((?<=[a-z0-9])[A-Z]|(?!^)[A-Z](?=[a-z]))", r"_\1", name).lower()


def kernel_rank(path: Sequence[str]) -> int | None:
    """How many axes the kernel of a module of Haiku has, if the name tells."""
    last = next((name for name in reversed(path) if name != "~"), "")
    if _part(last, False).base == "linear":
        return 2
    match = re.fullmatch(r"(depthwise_)?conv([123])_d(_transpose)?(_\d+)?", last)
    return int(match[2]) + 2 if match else None


def is_transposed(path: Sequence[str]) -> bool | None:
    """Whether a name is that of a transposed convolution; None if it may be."""
    base = parts(path)[-1].base if path else ""
    if re.search("transpos|deconv", base):
        return True
    return False if re.fullmatch("conv_?[0-9]*|linear", base) else None


@functools.cache
def _pattern(pattern: str) -> str:
    template = "/".join(part for part in pattern.split("/") if part)
    return _naming.pattern(template) if template else "(?P<inside>.*)"


class Rules:
    """What users say about paths: patterns, and what each stands for.

    A pattern is a path, or the beginning of one; `*` stands for any text in one part.
    The empty pattern is the beginning of every path. Of several that fit, the closest
    stands: the longest, of these the one that leaves least to `*`, and then the last.
    """

    def __init__(self, argument: str, rules: Mapping[str, Any]):
        """Takes rules as the user wrote them, in the argument of that name."""
        if not isinstance(rules, Mapping) or not all(isinstance(k, str) for k in rules):
            raise TypeError(
                f"port: {argument} must be a dict by the beginnings of paths, such as "
                f'{{"encoder/block_*": ...}}, not {rules!r}.'
            )
        self.argument = argument
        self.rules = dict(rules)

    def find(self, *paths: str) -> tuple[Any, re.Match[str]] | None:
        """The closest rule that fits one of the `paths`, and how."""
        found = self.closest(*paths)
        return found and (self.rules[found[0]], found[1])

    def closest(self, *paths: str) -> tuple[str, re.Match[str]] | None:
        """The pattern of that rule."""
        tried = [
            (pattern, re.fullmatch(_pattern(pattern), path))
            for pattern in reversed(self.rules)
            for path in paths
        ]
        return min(
            ((pattern, match) for pattern, match in tried if match),
            key=lambda found: _left_open(found[1]),
            default=None,
        )

    def unused(self, paths: Sequence[str]) -> list[str]:
        """Patterns that fit none of the `paths`."""
        return [
            pattern
            for pattern in self.rules
            if not any(re.fullmatch(_pattern(pattern), path) for path in paths)
        ]


def _left_open(match: re.Match[str]) -> tuple[int, int]:
    """How much of a path a pattern does not say: what is inside, and for `*`."""
    *texts, inside = match.groups()
    return len((inside or "").strip("/")), sum(map(len, texts))


class Renames(Rules):
    """Renamings, in which `*` counts from the first number that no closer rule takes.

    Such is `block_*` beside `block_0`, where the first layer is not in the stack of the
    others. If Haiku has the numbers of Flax in its names, they stay as they are.
    """

    def __init__(self, rules: Mapping[str, Any]):
        """Takes rules as the user wrote them."""
        super().__init__("rename", rules)
        self._first: dict[str, int] = {}

    def count(
        self, flax: Sequence[Sequence[str]], haiku: Iterable[Sequence[str]]
    ) -> None:
        """Finds the numbers from which to count.

        Args:
          flax: How rules may call the leaves in Flax.
          haiku: The same in Haiku.
        """
        used: dict[str, set[str]] = collections.defaultdict(set)
        for paths in flax:
            if found := self.closest(*paths):
                used[found[0]] |= set(found[1].groups()[:-1])
        texts = {f"{path}/" for paths in haiku for path in paths}
        for pattern, found_texts in used.items():
            numbers = {int(text) for text in found_texts if text.isdecimal()}
            last = self.rules[pattern].replace("*", str(max(numbers, default=0)))
            is_copied = any(text.startswith(f"{last.strip('/')}/") for text in texts)
            if pattern.count("*") == 1 and numbers and not is_copied:
                self._first[pattern] = self._left_over(pattern, numbers, flax)

    def _left_over(
        self, pattern: str, numbers: set[int], flax: Iterable[Sequence[str]]
    ) -> int:
        """The first number of a pattern, if all below are those of closer rules."""
        tried = (
            re.fullmatch(_pattern(pattern), path) for paths in flax for path in paths
        )
        texts = {match[1] for match in tried if match}
        taken = {int(text) for text in texts if text.isdecimal()} - numbers
        return next(n for n in itertools.count() if n not in taken)

    def filled(self, pattern: str, texts: Sequence[str]) -> str:
        """What a rule makes of the texts in place of `*`."""
        pieces = self.rules[pattern].split("*")
        first = self._first.get(pattern, 0)
        if first:
            texts = [str(int(t) - first) if t.isdecimal() else t for t in texts]
        rest = (text + piece for text, piece in zip(texts, pieces[1:], strict=True))
        return pieces[0] + "".join(rest)


def renamed(rename: Renames, collection: str, path: Path) -> tuple[Path, int] | None:
    """The new beginning of a path, and how many of its parts it stands for."""
    found = rename.closest("/".join(path), "/".join((collection, *path)))
    if found is None:
        return None
    pattern, match = found
    new = rename.rules[pattern]
    *texts, inside = match.groups()
    pieces = new.split("*")
    if len(pieces) != len(texts) + 1:
        raise ValueError(
            f"port: rename to {new!r} has {len(pieces) - 1} '*', the path in Flax has "
            f"{len(texts)}. What they stand for is copied in order, so give as many. A "
            "number of layers is written even where Haiku has a stack: block_*."
        )
    filled = rename.filled(pattern, texts)
    rest = len([p for p in (inside or "").split("/") if p])
    if len(match.string.split("/")) > len(path):  # The rule names the collection.
        filled = filled.removeprefix(f"{collection}/")
    return tuple(p for p in filled.split("/") if p), len(path) - rest
