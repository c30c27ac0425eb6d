"""One leaf of Flax that is several in Haiku, several that are one, and other rules.

These rules go before all others: to `rename`, to the other rules in `leaf` and to the
rest of them, a leaf that is split is several leaves, and leaves that are fused are one.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from hk_stack._traceback import hidden
from hk_stack.port._codecs import Array, Leaf, Leaves, Piece, Shape
from hk_stack.port._names import Path
from hk_stack.port._rules import Pair, Regroup, Rules, Transpose, matched

# Rules to write


@hidden
def split(*names: str, axis: int, sizes: Sequence[int] = ()) -> Regroup:
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
def fuse(*names: str, axis: int) -> Regroup:
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
def tie(other: str, *, transposed: bool = False) -> Regroup:
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


@dataclasses.dataclass(frozen=True)
class Split(Regroup):
    """Several leaves that are one array in Flax, side by side; and one of them."""

    names: tuple[str, ...]
    axis: int
    sizes: tuple[int, ...]
    number: int = 0

    @property
    def share(self) -> Fraction:
        return Fraction(self.sizes[self.number], sum(self.sizes))

    @property
    def label(self) -> str:
        return f"part {self.number + 1} of {len(self.names)} on axis {self.axis}"

    def regrouped(self, leaves: Leaves, pattern: str) -> tuple[Leaves, str]:
        new, gone = [], []
        for leaf, around, end in _matching(leaves, pattern):
            gone.append(leaf)
            for i, name in enumerate(self.names):
                path = (*around[:-1], *name.split("/"), *end)
                part = dataclasses.replace(self, number=i)
                new.append(leaf._replace(raw=path, codec=part))
        return _replaced(leaves, gone, new, pattern), ""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        axis = _axis(self.axis, shapes[0])
        if axis is None or shapes[0][axis] % sum(self.sizes):
            return NO_SHAPE
        return self.read([np.broadcast_to(0, shapes[0])]).shape

    def read(self, pieces: Sequence[Array]) -> Array:
        (array,) = pieces
        *ends, total = itertools.accumulate(self.sizes)
        each = array.shape[self.axis] // total
        parts = np.split(array, [each * end for end in ends], self.axis)
        return parts[self.number]

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        self.read(pieces)[...] = leaf


@dataclasses.dataclass(frozen=True)
class Fuse(Regroup):
    """One leaf that is several arrays in Flax, side by side in Haiku."""

    names: tuple[str, ...]
    axis: int

    @property
    def label(self) -> str:
        return f"{', '.join(self.names)} side by side"

    def regrouped(self, leaves: Leaves, pattern: str) -> tuple[Leaves, str]:
        around, _, whole = pattern.rpartition("/")
        several: dict[tuple[str, Path], dict[str, Leaf]] = {}
        for name in self.names:
            for leaf, path, end in _matching(leaves, f"{around}/{name}"):
                scope = path[: len(path) - len(name.split("/"))]
                key = leaf.collection, (*scope, whole, *end)
                several.setdefault(key, {})[name] = leaf
        count = len(self.names)
        complete = {k: x.values() for k, x in several.items() if len(x) == count}
        gone = itertools.chain.from_iterable(complete.values())
        new = [Leaf(*k, _pieces(x), self) for k, x in complete.items()]
        why = "" if new else f"no module has all of {', '.join(self.names)}."
        return _replaced(leaves, gone, new, pattern), why

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        axis = _axis(self.axis, shapes[0])
        if axis is None or len({len(shape) for shape in shapes}) > 1:
            return NO_SHAPE
        sizes = [set(column) for column in zip(*shapes, strict=True)]
        sizes[axis] = {sum(shape[axis] for shape in shapes)}
        is_one = all(len(each) == 1 for each in sizes)
        return tuple(each.pop() for each in sizes) if is_one else NO_SHAPE

    def read(self, pieces: Sequence[Array]) -> Array:
        return np.concatenate(pieces, self.axis)

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        ends = itertools.accumulate(piece.shape[self.axis] for piece in pieces)
        parts = np.split(leaf, list(ends)[:-1], self.axis)
        for piece, part in zip(pieces, parts, strict=True):
            piece[...] = part


@dataclasses.dataclass(frozen=True)
class Tie(Regroup):
    """A leaf that is another one as well: of one array, or of two equal ones."""

    other: str
    transposed: bool

    @property
    def label(self) -> str:
        return "tied, last axes swapped" if self.transposed else "tied"

    def regrouped(self, leaves: Leaves, pattern: str) -> tuple[Leaves, str]:
        found = [leaf for leaf, _, end in _matching(leaves, pattern) if not end]
        if len(found) != 1:
            return leaves, (
                "port.tie is for one whole leaf, such as 'wte/embedding'; there are "
                f"{len(found)} of this path."
            )
        (first,) = found
        path = tuple(part for part in self.other.split("/") if part)
        other = leaves.get((first.collection, path))
        if other:
            new = [first._replace(pieces=_pieces([first, other]), codec=self)]
        else:
            new = [first, first._replace(raw=path, codec=self)]
        return _replaced(leaves, [first, *filter(None, [other])], new, pattern), ""

    def _change(self, array: Array) -> Array:
        return swapped(array) if self.transposed else array

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        if self.transposed and len(shapes[-1]) < 2:
            return NO_SHAPE
        shape = self._change(np.broadcast_to(0, shapes[-1])).shape
        return shape if len(shapes) == 1 or shape == shapes[0] else NO_SHAPE

    def read(self, pieces: Sequence[Array]) -> Array:
        leaf = self._change(pieces[-1])
        if len(pieces) == 2 and pieces[0].tobytes() != leaf.tobytes():
            raise ValueError(NOT_EQUAL)
        return leaf

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        pieces[-1][...] = self._change(leaf)
        if len(pieces) == 2:
            pieces[0][...] = leaf


def _matching(leaves: Leaves, pattern: str) -> Iterator[tuple[Leaf, Path, Path]]:
    """Leaves that a pattern fits; what it says of each path, and the rest."""
    for leaf in leaves.values():
        found = matched(pattern, leaf.paths)
        if found and leaf.codec.is_plain:
            end = len(leaf.raw) - found.inside
            yield leaf, leaf.raw[:end], leaf.raw[end:]


def _pieces(leaves: Iterable[Leaf]) -> tuple[Piece, ...]:
    return tuple(piece for leaf in leaves for piece in leaf.pieces)


def _replaced(
    leaves: Leaves, gone: Iterable[Leaf], new: Iterable[Leaf], pattern: str
) -> Leaves:
    left_out = {(leaf.collection, leaf.raw) for leaf in gone}
    result = {key: leaf for key, leaf in leaves.items() if key not in left_out}
    for leaf in new:
        key = leaf.collection, leaf.raw
        if result.setdefault(key, leaf) is not leaf:
            raise ValueError(
                f"port: leaf of {pattern!r} gives {'/'.join(leaf.raw)}, which Flax "
                "has already. Name it otherwise, and use rename= for what it is in "
                "Haiku."
            )
    in_order = sorted(result.items(), key=lambda item: item[1].pieces[0].place)
    return dict(in_order)


def regrouped(leaves: Leaves, rules: Rules[Regroup]) -> tuple[Leaves, list[str]]:
    """The leaves of Flax after some rules; and what to say of those that fit none."""
    unused = []
    for pattern, rule in rules.rules.items():
        changed, why = rule.regrouped(leaves, pattern)
        if changed == leaves:
            paths = [leaf.paths for leaf in leaves.values()]
            fits_none = Rules("leaf", {pattern: rule}).unused(paths)
            unused += [f"leaf: {pattern!r}: {why}"] if why else fits_none
        leaves = changed
    return leaves, unused


NO_SHAPE: Shape = (-1,)  # What no leaf has.
NOT_EQUAL = (
    "a rule in leaf= says that they are tied, but their values are not the same. Leave "
    "port.tie(...) out, and give Flax both"
)


def _axis(axis: int, shape: Shape) -> int | None:
    return axis % len(shape) if -len(shape) <= axis < len(shape) else None
