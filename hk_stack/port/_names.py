"""Names on both sides: what Flax and Haiku call the same module.

Names are compared part by part, after three habits are evened out: Flax names a
module without a name of its own `Dense_0`, Haiku `linear`; Haiku numbers from the
second on (`linear`, `linear_1`); and Haiku writes `~` for methods other than the call.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Path = tuple[str, ...]

_ALIASES = {
    "Dense": "linear",
    "DenseGeneral": "linear",
    "GRUCell": "gru",
    "LSTMCell": "lstm",
    "LinearGeneral": "linear",
    "MultiHeadDotProductAttention": "multi_head_attention",
    "OptimizedLSTMCell": "lstm",
    "SelfAttention": "multi_head_attention",
}
_LEAVES = {
    "bias": "b",
    "embedding": "embeddings",
    "kernel": "w",
    "offset": "b",
    "u": "u0",
}
_CONVOLUTION = re.compile("(?:depthwise_)?conv([123])_d(_transpose)?")


class Part(NamedTuple):
    """One part of a module's name: `block_3` is `("block", 3)`, `block` `("block", 0)`.

    Attributes:
      base: The name without its number, as Haiku writes it.
      number: From 0.
    """

    base: str
    number: int


Module = tuple[Part, ...]


def parts(path: Iterable[str], literal: bool = False) -> Module:
    """The parts of a module's name, in either framework's habit; or as it is written.

    >>> parts(["Block_2", "Dense_0"]) == parts(["block_2", "~", "linear"])
    True
    >>> parts(["layers", "3", "kernel"])  # a list of modules in NNX
    (Part(base='layers', number=3), Part(base='kernel', number=0))
    """
    return _parts(tuple(path), literal)


@functools.lru_cache(maxsize=2**14)
def _parts(path: Path, literal: bool) -> Module:
    found: list[Part] = []
    before = ""
    for name in path:
        if name == "~":
            continue
        if name.isdecimal() and before and not before.isdecimal():
            found[-1] = Part(before, int(name))
        else:
            found.append(_part(name, literal))
        before = name
    return tuple(found)


def written(module: Module) -> str:
    """As Haiku writes it."""
    return "/".join(f"{base}_{n}" if n else base for base, n in module)


@functools.cache
def _part(name: str, literal: bool) -> Part:
    if name.isdecimal():
        return Part("", int(name))
    match = re.fullmatch(r"(.+?)_(\d+)", name)
    base, number = (match[1], int(match[2])) if match else (name, 0)
    if literal:
        return Part(base, number)
    if convolution := _CONVOLUTION.fullmatch(base):
        base = "conv" + (convolution[2] or "")
    return Part(_ALIASES.get(base) or _snake_case(base), number)


def _snake_case(name: str) -> str:
    """`S4Block` as Haiku names it: `s4_block`."""
    if not name[:1].isupper():
        return name
    return re.sub(r"((?<=[a-z0-9])[A-Z]|(?!^)[A-Z](?=[a-z]))", r"_\1", name).lower()


def leaf(name: str) -> str:
    """The name of a leaf in its module, the same for both frameworks."""
    return _LEAVES.get(name, name)


def kernel_rank(module: Sequence[str]) -> int | None:
    """How many axes the kernel of a module of Haiku has, if the name tells."""
    last = next((name for name in reversed(module) if name != "~"), "")
    if _part(last, False).base == "linear":
        return 2
    match = _CONVOLUTION.fullmatch(_part(last, True).base)
    return int(match[1]) + 2 if match else None


def is_transposed(module: Module) -> bool | None:
    """Whether a name is that of a transposed convolution; None if it may be."""
    base = module[-1].base if module else ""
    if re.search("transpos|deconv", base):
        return True
    return False if re.fullmatch("conv_?[0-9]*|linear", base) else None


def starred(paths: Sequence[Path]) -> str:
    """Paths that differ in numbers only as one, with `*` for these."""
    columns = map(set, zip(*paths, strict=False))
    return "/".join(
        re.sub("[0-9]+$", "*", max(texts, key=len)) if len(texts) > 1 else texts.pop()
        for texts in columns
    )


def numbers(paths: Sequence[Path]) -> list[int]:
    """What numbers paths have, if they differ in one only; otherwise none."""
    columns = zip(*map(parts, paths), strict=False)
    varied = [column for column in columns if len(set(column)) > 1]
    is_one = len(varied) == 1 and len({base for base, _ in varied[0]}) == 1
    return [number for _, number in varied[0]] if is_one else []


def common_end(one: Path, other: Path) -> int:
    """How many parts two paths have both at their ends."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return len(list(same))


def without_end(module: Path, count: int) -> Path:
    """The module around another, as many levels up; a number in a list is none."""
    module = tuple(name for name in module if name != "~")
    keep = max(0, len(parts(module)) - count)
    while len(parts(module)) > keep:
        module = module[:-1]
    return module
