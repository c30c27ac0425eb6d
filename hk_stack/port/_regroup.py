"""One leaf of Flax that is several in Haiku, several that are one, and other rules.

These rules go before all others: to `rename`, to the other rules in `leaf` and to the
rest of them, a leaf that is split is several leaves, and leaves that are fused are one.
"""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from hk_stack._traceback import hidden
from hk_stack.port._codecs import Array, Codec, Piece, Shape
from hk_stack.port._names import Path
from hk_stack.port._rules import (
    Found,
    Fuse,
    Pair,
    Regroup,
    Rules,
    Split,
    Tie,
    Transpose,
    matched,
    paths_of,
)

# Rules to write


@hidden
def split(*names: str, axis: int, sizes: Sequence[int] = ()) -> Split:
    """A rule for `leaf=`: a module of Flax that is several modules in Haiku.

    Each of its leaves holds theirs side by side, such as a fused attention's:

    ```
    leaf={"h/*/attn/c_attn": port.split("query", "key", "value", axis=0)}
    ```

    To all other rules, `h/*/attn/c_attn/kernel` now is `h/*/attn/query/kernel`,
    `h/*/attn/key/kernel` and `h/*/attn/value/kernel`. The path may also be a leaf's.

    Args:
      *names: What the parts are called, in their order.
      axis: On which axis of one layer in Flax they are; negative ones count from the
        end.
      sizes: Their sizes, or how these are to one another: `(4, 1, 1)` for queries
        that are four times as wide. Equal by default.

    Returns:
      The rule.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If there are no two names, or not as many sizes.
    """
    sizes = tuple(sizes) or (1,) * len(names)
    _check("split", names, axis)
    if len(sizes) != len(names) or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(
            f"port.split: sizes must be {len(names)} positive integers, one for each "
            f"name; found {sizes!r}."
        )
    return Split(names, axis, sizes)


@hidden
def fuse(*names: str, axis: int) -> Fuse:
    """A rule for `leaf=`: several modules of Flax that are one in Haiku, side by side.

    The path is that of the whole, as if Flax had it beside its parts:

    ```
    leaf={"layers/*/mlp/gate_up": port.fuse("gate", "up", axis=-1)}
    ```

    Args:
      *names: What the parts are called in Flax, in their order.
      axis: On which axis of one layer in Flax they go side by side.

    Returns:
      The rule.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If there are no two names.
    """
    _check("fuse", names, axis)
    return Fuse(names, axis)


@hidden
def tie(other: str, *, transposed: bool = False) -> Tie:
    """A rule for `leaf=`: two leaves that hold the same values, one of them in Flax.

    ```
    leaf={"wte/embedding": port.tie("lm_head/kernel", transposed=True)}
    ```

    Where Flax has the first only, Haiku is given both; on the way back they have to be
    equal still. Where Flax has both, they have to be equal, and Haiku is given one, of
    the first path.

    Args:
      other: The second leaf's path in Flax, from the root of its collection; or what
        it would be, if Flax had it.
      transposed: Whether its last two axes are the other way round.

    Returns:
      The rule.

    Raises:
      TypeError: If an argument is of the wrong type.
    """
    if not isinstance(other, str) or not isinstance(transposed, bool):
        raise TypeError(
            "port.tie: expected the path of a leaf, and transposed=True or False; "
            f"found {other!r} and {transposed!r}."
        )
    return Tie(other, transposed)


@hidden
def transpose(*axes: int) -> Pair:
    """A rule for `leaf=`: the axes of one layer in another order, as `np.transpose`.

    Axes that then are neighbours may be one axis in Haiku: with `transpose(1, 0, 2)`,
    `[heads, D, K]` is `[D, heads, K]` or `[D, heads * K]`.

    Args:
      *axes: Which of Flax's axes each of Haiku's is.

    Returns:
      The rule: two functions.

    Raises:
      ValueError: If the axes are not 0, 1, ... in some order.
    """
    if sorted(axes) != list(range(len(axes))):
        raise ValueError(
            f"port.transpose: expected 0 to {max(1, len(axes)) - 1} in some order, as "
            f"np.transpose does; found {axes!r}."
        )
    if axes == (1, 0):
        return TRANSPOSED
    back = tuple(map(int, np.argsort(axes)))
    return Transpose(lambda x: x.transpose(axes), lambda x: x.transpose(back))


@hidden
def pad_vocab(flax: int, haiku: int, axis: int = 0) -> Pair:
    """A rule for `leaf=`: a vocabulary that is longer in one tree than in the other.

    What Haiku has more is zero; on the way back it is dropped. What Flax has more must
    be zero, as it would be lost.

    Args:
      flax: How many tokens there are in Flax.
      haiku: How many there are in Haiku.
      axis: Their axis in one layer.

    Returns:
      The rule: two functions.

    Raises:
      ValueError: If a number is not positive.
    """
    if min(flax, haiku) < 1:
        raise ValueError(f"port.pad_vocab: expected sizes, found {flax} and {haiku}.")

    def to_haiku(x: Array) -> Array:
        if np.any(np.take(x, range(haiku, flax), axis)):
            raise ValueError(f"tokens from {haiku} on are not zero, and would be lost")
        return _resized(x, flax, haiku, axis)

    return to_haiku, lambda x: _resized(x, haiku, flax, axis)


def _resized(x: Array, old: int, new: int, axis: int) -> Array:
    if x.shape[axis] != old:
        raise ValueError(f"axis {axis} of {list(x.shape)} has not the {old} tokens")
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, max(0, new - old)
    return np.take(np.pad(x, widths), range(new), axis)


def same(array: Array) -> Array:
    """No change."""
    return array


def swapped(array: Array) -> Array:
    """With the last two axes the other way round."""
    return np.swapaxes(array, -1, -2)


SAME: Pair = (same, same)
TRANSPOSED: Pair = (swapped, swapped)


def _check(what: str, names: Sequence[str], axis: int) -> None:
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"port.{what}: expected names of modules, found {names!r}.")
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(f"port.{what}: axis must be an integer, found {axis!r}.")
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"port.{what}: expected several names, found {names!r}.")


# What they do to the leaves of Flax


class Stored(NamedTuple):
    """A leaf of Flax: its collection and path, what it is made of, and how."""

    collection: str
    path: Path
    pieces: tuple[Piece, ...]
    codec: Codec = Codec()


Key = tuple[str, Path]
Leaves = dict[Key, Stored]


class Part(Codec):
    """One of several leaves that are one array in Flax, side by side."""

    is_plain = False

    def __init__(self, rule: Split, number: int):
        self.axis, self.total = rule.axis, sum(rule.sizes)
        self.first, self.last = sum(rule.sizes[:number]), sum(rule.sizes[: number + 1])
        self.share = Fraction(rule.sizes[number], self.total)
        self.label = f"part {number + 1} of {len(rule.names)} on axis {rule.axis}"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        axis = _axis(self.axis, shape)
        if axis is None or shape[axis] % self.total:
            return NO_SHAPE
        size = int(shape[axis] * self.share)
        return (*shape[:axis], size, *shape[axis + 1 :])

    def read(self, pieces: Sequence[Array]) -> Array:
        (array,) = pieces
        each = array.shape[self.axis] // self.total
        index = [slice(None)] * array.ndim
        index[self.axis] = slice(self.first * each, self.last * each)
        view: Array = array[tuple(index)]
        return view

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        self.read(pieces)[...] = leaf


class Fused(Codec):
    """One leaf that is several arrays in Flax, side by side in Haiku."""

    is_plain = False

    def __init__(self, axis: int, names: Sequence[str]):
        self.axis = axis
        self.label = f"{', '.join(names)} side by side"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        axis = _axis(self.axis, shapes[0])
        if axis is None or len({len(shape) for shape in shapes}) > 1:
            return NO_SHAPE
        rests = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
        size = sum(shape[axis] for shape in shapes)
        first = shapes[0]
        whole = (*first[:axis], size, *first[axis + 1 :])
        return whole if len(rests) == 1 else NO_SHAPE

    def read(self, pieces: Sequence[Array]) -> Array:
        return np.concatenate(pieces, self.axis)

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        ends = itertools.accumulate(piece.shape[self.axis] for piece in pieces)
        parts = np.split(leaf, list(ends)[:-1], self.axis)
        for piece, part in zip(pieces, parts, strict=True):
            piece[...] = part


class Tied(Codec):
    """A leaf that is another one as well: of one array, or of two equal ones."""

    is_plain = False

    def __init__(self, rule: Tie):
        self.transposed = rule.transposed
        self.label = "tied, last axes swapped" if rule.transposed else "tied"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        if len(shapes) == 1:
            return self._turned_shape(shapes[0])
        return shapes[0] if self._turned_shape(shapes[1]) == shapes[0] else NO_SHAPE

    def read(self, pieces: Sequence[Array]) -> Array:
        if len(pieces) == 1:
            return self._turned(pieces[0])
        if pieces[0].tobytes() != self._turned(pieces[1]).tobytes():
            raise ValueError(NOT_EQUAL)
        return pieces[0]

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        pieces[-1][...] = self._turned(leaf)
        if len(pieces) == 2:
            pieces[0][...] = leaf

    def _turned(self, array: Array) -> Array:
        return swapped(array) if self.transposed else array

    def _turned_shape(self, shape: Shape) -> Shape:
        if not self.transposed:
            return shape
        return (*shape[:-2], *shape[:-3:-1]) if len(shape) > 1 else NO_SHAPE


NO_SHAPE: Shape = (-1,)  # What no leaf has.
NOT_EQUAL = (
    "a rule in leaf= says that they are tied, but their values are not the same. Leave "
    "port.tie(...) out, and give Flax both"
)


def _axis(axis: int, shape: Shape) -> int | None:
    return axis % len(shape) if -len(shape) <= axis < len(shape) else None


def regrouped(leaves: Leaves, rules: Rules[Regroup]) -> tuple[Leaves, list[str]]:
    """The leaves of Flax after some rules; and what to say of those that fit none."""
    unused = []
    for pattern, rule in rules.rules.items():
        if isinstance(rule, Split):
            changed, why = _split(leaves, pattern, rule)
        elif isinstance(rule, Fuse):
            changed, why = _fused(leaves, pattern, rule)
        else:
            changed, why = _tied(leaves, pattern, rule)
        if changed == leaves:
            paths = [paths_of(*key) for key in leaves]
            fits_none = Rules("leaf", {pattern: rule}).unused(paths)
            unused += [f"leaf: {pattern!r}: {why}"] if why else fits_none
        leaves = changed
    return leaves, unused


def _split(leaves: Leaves, pattern: str, rule: Split) -> tuple[Leaves, str]:
    result: list[Stored] = []
    for key, leaf in leaves.items():
        found = matched(pattern, paths_of(*key))
        if found is None or not leaf.codec.is_plain:
            result.append(leaf)
            continue
        around, end = _around(key, found)
        for i, name in enumerate(rule.names):
            path = (*around[:-1], *name.split("/"), *end)
            result.append(Stored(leaf.collection, path, leaf.pieces, Part(rule, i)))
    return _by_key(result, pattern), ""


def _fused(leaves: Leaves, pattern: str, rule: Fuse) -> tuple[Leaves, str]:
    around, _, whole = pattern.rpartition("/")
    several: dict[tuple[str, Path, Path], dict[str, Stored]] = {}
    for key, leaf in leaves.items():
        for name in rule.names:
            found = matched(f"{around}/{name}", paths_of(*key))
            if found and leaf.codec.is_plain:
                path, end = _around(key, found)
                scope = path[: len(path) - len(name.split("/"))]
                several.setdefault((key[0], scope, end), {})[name] = leaf
    complete = {
        (collection, (*scope, whole, *end)): [parts[name] for name in rule.names]
        for (collection, scope, end), parts in several.items()
        if len(parts) == len(rule.names)
    }
    gone = {(x.collection, x.path) for parts in complete.values() for x in parts}
    rest = [leaf for key, leaf in leaves.items() if key not in gone]
    fused = [
        Stored(*key, _pieces(parts), Fused(rule.axis, rule.names))
        for key, parts in complete.items()
    ]
    why = f"no module has all of {', '.join(rule.names)}." if not complete else ""
    return _by_key([*rest, *fused], pattern), why


def _tied(leaves: Leaves, pattern: str, rule: Tie) -> tuple[Leaves, str]:
    found = [
        key
        for key in leaves
        if (fit := matched(pattern, paths_of(*key))) and not fit.inside
    ]
    if len(found) != 1 or not leaves[found[0]].codec.is_plain:
        return leaves, (
            "port.tie is for one whole leaf, such as 'wte/embedding'; there are "
            f"{len(found)} of this path."
        )
    first = leaves[found[0]]
    other = first.collection, tuple(part for part in rule.other.split("/") if part)
    rest = [leaf for key, leaf in leaves.items() if key not in (other, found[0])]
    codec = Tied(rule)
    if other in leaves:
        both = _pieces([first, leaves[other]])
        tied = [first._replace(pieces=both, codec=codec)]
    else:
        tied = [first, Stored(*other, first.pieces, codec)]
    return _by_key([*rest, *tied], pattern), ""


def _around(key: Key, found: Found) -> tuple[Path, Path]:
    """What a pattern says of a path, and the rest."""
    path = key[1]
    return path[: len(path) - found.inside], path[len(path) - found.inside :]


def _pieces(leaves: Sequence[Stored]) -> tuple[Piece, ...]:
    return tuple(piece for leaf in leaves for piece in leaf.pieces)


def _by_key(leaves: Sequence[Stored], pattern: str) -> Leaves:
    result: Leaves = {}
    for leaf in leaves:
        key = leaf.collection, leaf.path
        if key in result:
            raise ValueError(
                f"port: leaf of {pattern!r} gives {'/'.join(leaf.path)}, which Flax "
                "has already. Name it otherwise, and use rename= for what it is in "
                "Haiku."
            )
        result[key] = leaf
    return result
