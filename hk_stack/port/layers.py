"""Where the layers of some leaves are in either tree, and how one layer changes.

`nn.scan` may put the layers on any axis, and a leaf of Flax may be read in several
ways: `[4, 4, 8]` as one array, as four layers on axis 0, or as four on axis 1. A
*reading* is one such way that fits the leaf in Haiku, where layers are always in front.
Readings in the same *order* give the same values; where readings of other orders fit
too, the user has to say which is meant.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hk_stack.port import names
from hk_stack.port.leaves import Gates, Leaf, Shape

Axes = tuple[int, ...]


class Group(NamedTuple):
    """Leaves that hold the same layers, in the order of the layers' numbers.

    Attributes:
      flax: In Flax.
      haiku: In Haiku.
      same: Those that have the same numbers in both.
      holes: Names of layers that are not there, in either tree.
    """

    flax: tuple[Leaf, ...]
    haiku: tuple[Leaf, ...]
    same: tuple[tuple[Leaf, Leaf], ...] = ()
    holes: tuple[str, ...] = ()

    def alone(self) -> list["Group"]:
        """Without numbers as layers: only what has the same numbers in both trees."""
        if len(self.flax) == len(self.haiku) == 1:
            return []
        return [Group((a,), (b,)) for a, b in self.same]


class Change(NamedTuple):
    """How one layer of a leaf changes on its way.

    Attributes:
      label: What a person reads.
      to_haiku: From Flax's array of one layer to Haiku's.
      to_flax: The inverse.
    """

    label: str
    to_haiku: Callable[[np.ndarray], np.ndarray]
    to_flax: Callable[[np.ndarray], np.ndarray]


class Side(NamedTuple):
    """Where the layers of a move are in one tree.

    Attributes:
      leaves: Numbered leaves, in the order of their numbers.
      axes: The layer axes, outermost first; () if there are none.
      sizes: Their sizes.
      interleaved: Whether a step along the axes passes all numbered leaves, as in a
        scan over blocks of layers; otherwise each leaf is a stack of its own.
    """

    leaves: tuple[Leaf, ...]
    axes: Axes = ()
    sizes: Shape = ()
    interleaved: bool = True

    @property
    def num_layers(self) -> int:
        """All layers, on axes and by number."""
        return len(self.leaves) * math.prod(self.sizes)

    @property
    def num_levels(self) -> int:
        """How often layers are nested."""
        return len(self.axes) + (len(self.leaves) > 1)

    @property
    def is_mixed(self) -> bool:
        """Whether layers are on axes and by number."""
        return len(self.leaves) > 1 and bool(self.sizes)

    @property
    def factors(self) -> Shape:
        """Numbers of layers on each axis and by number, outermost first."""
        count = (len(self.leaves),)
        factors = self.sizes + count if self.interleaved else count + self.sizes
        return tuple(n for n in factors if n != 1)

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """Axes and their sizes, those of layers first; -1 is the number in names."""
        shape = self.leaves[0].pieces[-1].shape
        front = [axis % len(shape) for axis in self.axes]
        rest = [i for i in range(len(shape)) if i not in front]
        number = [-1] if len(self.leaves) > 1 else []
        front = front + number if self.interleaved else number + front
        sizes = {-1: len(self.leaves), **dict(enumerate(shape))}
        return tuple((i, sizes[i]) for i in (*front, *rest) if i < 0 or shape[i] != 1)

    def place(self, layer: int) -> tuple[Leaf, Axes]:
        """The leaf that holds a layer, and the layer's index on the layer axes."""
        if self.interleaved:
            step, leaf = divmod(layer, len(self.leaves))
        else:
            leaf, step = divmod(layer, math.prod(self.sizes))
        return self.leaves[leaf], tuple(map(int, np.unravel_index(step, self.sizes)))

    def views(self, layer: int, arrays: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        """The pieces of a layer, as views of the arrays of a tree."""
        leaf, index = self.place(layer)
        views = []
        for piece in leaf.pieces:
            at: list[Any] = [slice(None)] * len(piece.shape)
            for axis, i in zip(self.axes, index, strict=True):
                at[axis] = i
            views.append(arrays[piece.place][(*at, ...)])
        return views

    def one_layer(self) -> Shape | None:
        """The shape of one layer of the leaves, if it is that of all."""
        shapes = {_without(self.axes, leaf) for leaf in self.leaves}
        return shapes.pop() if len(shapes) == 1 else None


def _without(axes: Axes, leaf: Leaf) -> Shape | None:
    """The shape of a leaf without some axes of its pieces."""
    rest = []
    for piece in leaf.pieces:
        ndim = len(piece.shape)
        dropped = {axis % ndim for axis in axes}
        rest.append(tuple(n for i, n in enumerate(piece.shape) if i not in dropped))
    if min(map(len, rest)) < leaf.codec.rank:
        return None
    return leaf.codec.shape(rest)


class Move(NamedTuple):
    """Some leaves of either tree that hold the same layers.

    Attributes:
      flax: Where they are in Flax.
      haiku: Where they are in Haiku.
      change: How each layer changes on its way.
    """

    flax: Side
    haiku: Side
    change: Change

    @property
    def effect(self) -> Hashable:
        """What tells apart moves that give other values: what becomes of each axis."""
        old, new = self.flax.order, self.haiku.order
        if self.change.label == _RULE:  # Which sees one layer, whichever that is.
            return _RULE, old, new, self.flax.axes, self.haiku.axes
        if self.change.to_haiku is swapped:
            old = (*old[:-2], old[-1], old[-2])
        has_gates = isinstance(self.flax.leaves[0].codec, Gates)
        return (not has_gates and _atoms(old, new)) or (old, new)

    @property
    def is_in_order(self) -> bool:
        """Whether layers are in front in both trees, those by number first."""
        return all(list(x.order) == sorted(x.order) for x in (self.flax, self.haiku))

    @property
    def is_mixed(self) -> bool:
        """Whether layers are on axes and by number in one of the trees."""
        return self.flax.is_mixed or self.haiku.is_mixed

    @property
    def is_sure(self) -> bool:
        """Whether it is ported, if it is the only reading."""
        return self.is_alike and self.change is not _UNSAID_SWAP

    @property
    def is_alike(self) -> bool:
        """Whether a step of each loop is one in the other, if both have several."""
        one, other = self.flax.factors, self.haiku.factors
        return min(len(one), len(other)) < 2 or one == other

    @property
    def where(self) -> Hashable:
        """Where the layers are in both trees, which is the same for all of a module."""
        sides = (self.flax, self.haiku)
        return tuple((side.axes, side.sizes, side.interleaved) for side in sides)


def _atoms(
    old: Iterable[tuple[int, int]], new: Iterable[tuple[int, int]]
) -> Hashable | None:
    """Which part of an axis goes where in a reshape; None if axes are cut across."""
    left, right, atoms = list(old), list(new), []
    strides: dict[Any, int] = collections.defaultdict(lambda: 1)
    while left and right:
        (a, m), (b, n) = left.pop(), right.pop()
        size = min(m, n)
        if m % size or n % size:
            return None
        atoms.append((b, strides["new", b], a, strides["old", a], size))
        strides["new", b] *= size
        strides["old", a] *= size
        left += [(a, m // size)] * (m > size)
        right += [(b, n // size)] * (n > size)
    merged: list[tuple[int, ...]] = []
    for b, outer, a, inner, size in sorted(atoms):
        if merged and merged[-1][:3:2] == (b, a):
            *_, before, inside, count = merged[-1]
            if (merged[-1][1] * count, inside * count) == (outer, inner):
                merged[-1] = (b, merged[-1][1], before, inside, count * size)
                continue
        merged.append((b, outer, a, inner, size))
    return tuple(merged)


class Refusal(NamedTuple):
    """Why a group does not go.

    Attributes:
      why: What to tell the user.
      fits: Whether it is that some readings fit, but not one alone.
    """

    why: str
    fits: bool = False


class Options(NamedTuple):
    """What users may say; see `flax_to_haiku`."""

    leaf: names.Rules
    layer_axis: names.Rules
    interleave: bool | None


def moves(groups: Sequence[Group], options: Options) -> Iterator[Move | Refusal]:
    """How each group goes from one tree to the other, or why it does not."""
    depths = _depths(groups)
    read = [_Reader(group, depths, options).read() for group in groups]
    for one in _same_around_numbers(_same_in_module(read)):
        yield _chosen(one)


# Readings


class _Readings(NamedTuple):
    """All readings of a group that its rules leave.

    Attributes:
      group: The group.
      fits: The moves that fit.
      why: What to say if none fits.
      said: The axes that the user names.
    """

    group: Group
    fits: list[Move]
    why: str
    said: Sequence[Axes] = ()

    @property
    def module(self) -> tuple[str, str]:
        """Where the group is in Flax."""
        leaf = self.group.flax[0]
        return leaf.collection, leaf.raw.rpartition("/")[0]


class _Reader:
    """Finds the readings of a group."""

    def __init__(self, group: Group, depths: Mapping[Any, Any], options: Options):
        self._group = group
        self._options = options
        self._depth = _depth(group, depths)
        self._failures: list[str] = []

    def read(self) -> _Readings:
        """Tries all axes, or those that the user names."""
        group, options = self._group, self._options
        if differ := _other_rules(group, options):
            return _Readings(group, [], differ)
        if group.holes:
            return _Readings(group, [], _difference(group))
        rule = options.layer_axis.find(*group.flax[0].paths)
        choices = _every_axis(group) if rule is None else self._said(*rule)
        fits = [move for axes in choices for move in self._moves(axes)]
        why = self._failures[0] if self._failures else ""
        if rule and not fits and not why:
            others = [move for axes in _every_axis(group) for move in self._moves(axes)]
            why = _not_on_axis(group, rule[0], others)
        said = _meant(rule[0]) if rule else ()
        return _Readings(group, fits, why or _difference(group), said)

    def _said(self, said: int | Axes, match: re.Match[str]) -> list[Axes]:
        """The axes that the user may mean: those of a stack, if the rule is for one."""
        meant = _meant(said)
        if _is_of_path(self._group, match) or self._is_stack():
            return meant
        return [(), *(axes for axes in meant if axes)]

    def _is_stack(self) -> bool:
        """Whether a leaf has layers on some axis in Flax for certain."""
        leaf, *more = self._group.flax
        if _is_of_batch_norm(leaf):
            return len(leaf.pieces[0].shape) > 1
        return not more and bool(self._depth)

    def _moves(self, axes: Axes) -> Iterator[Move]:
        """The readings with layers on some axes in Flax."""
        in_front = [tuple(range(n)) for n in range(max(3, len(axes) + 1))]
        for flax in _sides(self._group.flax, [axes], self._options):
            for haiku in _sides(self._group.haiku, in_front, self._options):
                if _count_the_same(flax, haiku):
                    for change in self._changes(flax, haiku):
                        move = Move(flax, haiku, change)
                        # Who nests otherwise does not also turn the axes.
                        if move.is_alike or sorted(axes) == list(axes):
                            yield move

    def _changes(self, flax: Side, haiku: Side) -> Iterator[Change]:
        """How one layer may change; nothing if it does not fit."""
        old, new = flax.one_layer(), haiku.one_layer()
        leaf, depth = flax.leaves[0], self._depth
        if old is None or new is None or (flax.axes and len(old) < leaf.least_rank):
            return
        is_other = depth not in (None, len(haiku.axes))
        if is_other and haiku.axes:
            return
        rule = self._options.leaf.find(*leaf.paths)
        if rule is not None and rule[0] != (same, same):
            found = None if is_other else _by_rule(rule[0], old, new, leaf)
            if isinstance(found, str):
                self._failures.append(found)
            elif found:
                yield found
            return
        rank = len(new) - (depth or 0) * (not haiku.axes)
        if leaf.is_kernel and len(old) == len(new) and rank >= 3:
            is_usual = rule is not None
            yield from _convolution(leaf, haiku.leaves[0], old, new, is_usual)
        elif old == new:
            yield Change("", same, same)
        elif _is_reshape(leaf, old, new):
            yield Change("reshape", lambda x: x.reshape(new), lambda x: x.reshape(old))


def _is_of_batch_norm(leaf: Leaf) -> bool:
    """Whether it has one axis in one layer, which norms of other kinds may not."""
    *module, name = leaf.path
    if leaf.kind == "state":
        return name in ("mean", "var")
    return bool(module) and names.parts(module)[-1].base == "batch_norm"


def _every_axis(group: Group) -> list[Axes]:
    """No layer axis, one, and two in any order, for a scan in a scan."""
    ndim = min(len(piece.shape) for leaf in group.flax for piece in leaf.pieces)
    several = (itertools.permutations(range(ndim), n) for n in range(3))
    return list(itertools.chain.from_iterable(several))


def _meant(axes: int | Axes) -> list[Axes]:
    """What a user may mean by the axes of layers: an axis may be that of two scans."""
    if isinstance(axes, tuple):
        return [axes]
    return [(axes,)] if axes < 0 else [(axes,), (axes, axes + 1)]


def _is_of_path(group: Group, match: re.Match[str]) -> bool:
    """Whether a rule is for a path, which is that of a stack; not for a whole tree."""
    leaf = group.flax[0]
    inside = (match["inside"] or "").strip("/")
    return inside not in leaf.paths


def _other_rules(group: Group, options: Options) -> str:
    """What to say if a rule is for some layers of a group only."""
    for rules in (options.leaf, options.layer_axis):
        found = {
            leaf.raw: rule and (id(rule[0]), rule[1].re.pattern)
            for leaf in group.flax
            for rule in [rules.find(*leaf.paths)]
        }
        if len(set(found.values())) > 1:
            return (
                f"the rules in {rules.argument}= are not the same for all layers "
                f"({', '.join(list(found)[:3])}, ...); write one, with * for the number"
            )
    return ""


def _sides(
    leaves: tuple[Leaf, ...], choices: Iterable[Axes], options: Options
) -> Iterator[Side]:
    """Leaves with layers on some axes, in all orders of these and the numbers."""
    for axes in choices:
        side = _side(leaves, axes)
        if side is None:
            continue
        if not side.is_mixed:
            yield side
            continue
        for interleaved in (True, False):
            if options.interleave in (None, interleaved):
                yield side._replace(interleaved=interleaved)


def _count_the_same(flax: Side, haiku: Side) -> bool:
    """Whether both have the same number of layers."""
    if flax.num_layers != haiku.num_layers:
        return False
    is_nested = flax.axes and haiku.axes and flax.num_levels != haiku.num_levels
    if is_nested or min(len(flax.leaves), len(haiku.leaves)) == 1:
        return True
    # Where names have other numbers in both trees, one of them has axes too.
    return flax.is_mixed != haiku.is_mixed


def _side(leaves: tuple[Leaf, ...], axes: Axes) -> Side | None:
    """Leaves with layers on `axes`; None if they have not all of these."""
    sizes = set()
    for piece in (piece for leaf in leaves for piece in leaf.pieces):
        ndim = len(piece.shape)
        if any(not -ndim <= axis < ndim for axis in axes):
            return None
        sizes.add(tuple(piece.shape[axis] for axis in axes))
        if len({axis % ndim for axis in axes}) < len(axes):
            return None
    return Side(leaves, axes, sizes.pop()) if len(sizes) == 1 else None


def _same_in_module(read: Sequence[_Readings]) -> list[_Readings]:
    """Drops readings that the other leaves of a module do not have.

    A scan puts all parameters of a module on the same axes.
    """
    modules: dict[Any, list[set[Hashable]]] = collections.defaultdict(list)
    for one in read:
        if one.fits:
            modules[one.module].append({move.where for move in one.fits})
    common = {module: set.intersection(*found) for module, found in modules.items()}
    return [
        one._replace(fits=[x for x in one.fits if x.where in common[one.module]])
        if common.get(one.module)
        else one
        for one in read
    ]


def _same_around_numbers(read: Sequence[_Readings]) -> list[_Readings]:
    """Drops scans over numbered blocks in which not all leaves of the blocks are.

    So the numbers of a loop are not those of blocks in a scan where a bias, say, has
    no axis for its steps.
    """
    blocks: dict[Any, list[set[tuple[int, int]]]] = collections.defaultdict(list)
    for one in read:
        if one.fits and len(one.group.flax) > 1:
            axes = {
                pair
                for move in one.fits
                for pair in zip(move.flax.axes, move.flax.sizes, strict=True)
            }
            blocks[_numbered_scope(one.group)].append(axes)

    def may_be(one: _Readings, side: Side) -> bool:
        if not (side.is_mixed and side.interleaved):
            return True
        step = (side.axes[0], side.sizes[0])
        return all(step in axes for axes in blocks[_numbered_scope(one.group)])

    kept = [[move for move in one.fits if may_be(one, move.flax)] for one in read]
    return [one._replace(fits=k or one.fits) for one, k in zip(read, kept, strict=True)]


def _numbered_scope(group: Group) -> tuple[str, ...]:
    """The path in Flax up to the first number that counts layers."""
    parts = zip(*(leaf.paths[1].split("/") for leaf in group.flax), strict=True)
    starred = [_starred(set(part)) for part in parts]
    ends = (i for i, part in enumerate(starred, start=1) if part.endswith("*"))
    return tuple(starred[: next(ends, None)])


# One reading


def _chosen(read: _Readings) -> Move | Refusal:
    """The one reading that fits, or why that is not clear."""
    if not read.fits:
        return Refusal(read.why)
    found = _by_effect(read.fits, read.said)
    move, *others = found
    if not others and move.is_sure:
        return move
    return Refusal(_unclear(read.group, found), fits=True)


def _by_effect(fits: Iterable[Move], said: Sequence[Axes]) -> list[Move]:
    """One move of each effect: as the user says it, or else the simplest."""

    def rank(move: Move) -> tuple[bool, bool, bool, int]:
        axes = move.flax.axes
        return not move.is_sure, axes not in said, not move.is_mixed, len(axes)

    found: dict[Hashable, Move] = {}
    for move in sorted(fits, key=rank):
        found.setdefault(move.effect, move)
    return list(found.values())


def unused(found: Iterable[Move], options: Options) -> list[str]:
    """What to say of an axis for the whole tree, or an order, that nothing has."""
    found = list(found)
    lines = []
    for pattern, said in options.layer_axis.rules.items():
        meant = _meant(said)
        is_in_front = all(axes == tuple(range(len(axes))) for axes in meant)
        if not is_in_front and not any(move.flax.axes in meant for move in found):
            lines.append(
                f"layer_axis: no layers are on axis {said}; leave {pattern!r} out."
            )
    if options.interleave is not None and not any(move.is_mixed for move in found):
        lines.append(
            f"interleave={options.interleave}: no layers are both numbered and on an "
            "axis in one tree, and otherwise in the other; leave it out."
        )
    return lines


def _unclear(group: Group, found: Sequence[Move]) -> str:
    """What to say where several readings fit, or one that is nested otherwise."""
    path = f"{_scope(group)}/kernel"
    if any(move.change.label == _RULE for move in found):
        return (
            "its rule in leaf= may be for all of it, or for each of its layers; say "
            f'layer_axis={{"{_scope(group)}": ()}}, or the axis of the '
            "layers instead of ()"
        )
    texts = []
    if any(move.change is _UNSAID_SWAP for move in found):
        texts.append(
            f"{_shapes(group)}: it may be a transposed convolution; if so, say "
            f'leaf={{"{path}": hk_stack.port.TRANSPOSED}}'
        )
        found = [move for move in found if move.change is not _UNSAID_SWAP]
        if any(move.is_alike for move in found):
            texts[0] += (
                f', else leaf={{"{path}": hk_stack.port.SAME}}; or '
                'leaf={"": hk_stack.port.SAME} if none of the model is transposed'
            )
    alike = [move for move in found if move.is_alike]
    if len(alike) < len(found):
        texts.append(_nested(next(move for move in found if not move.is_alike)))
    if alike and len(found) > 1:
        texts.append(_which(group, alike))
    return "; ".join(texts)


def _nested(move: Move) -> str:
    return (
        f"its layers may be nested as {move.flax.factors} in Flax, and as "
        f"{move.haiku.factors} in Haiku, which are not ported into one another: if so, "
        "port into a tree that is nested alike"
    )


def _which(group: Group, found: Sequence[Move]) -> str:
    """The rules that choose between readings."""
    axes = list(dict.fromkeys(move.flax.axes for move in found))
    if len(axes) == 1 and len(found) > 1:
        return (
            "its layers are both numbered and on an axis; say interleave=True if a "
            "step along the axis runs all numbered modules (a scan over blocks of "
            "layers), or interleave=False if each numbered module is a stack"
        )
    where = [f"axis {', '.join(map(str, a))}" for a in axes if a]
    text = f"its layers may be {'on ' * bool(where)}{' or '.join(where[:4])}"
    text += (", or " * bool(where) + "in front,") * (() in axes)
    chosen = sorted(found, key=lambda move: not move.flax.axes)
    rules = ", or ".join(_rule(group, move) for move in chosen[:4])
    rules += " if they are in front or there are none" * (() in axes)
    return (
        f"{_shapes(group)}: {text} as some sizes are equal; say which, as nn.scan was "
        f'told (variable_axes={{"{group.flax[0].collection}": ...}}): {rules}'
    )


def _rule(group: Group, move: Move) -> str:
    """What to write for one reading."""
    rule = f'layer_axis={{"{_scope(group)}": {move.flax.axes}}}'
    interleaved = {x.interleaved for x in (move.flax, move.haiku) if x.is_mixed}
    return rule + "".join(f" with interleave={value}" for value in interleaved)


def _scope(group: Group) -> str:
    """The module of a group in Flax as a rule says it, with * for numbers."""
    paths = [leaf.raw.split("/") for leaf in group.flax]
    parts = [_starred(set(parts)) for parts in zip(*paths, strict=True)]
    return "/".join(parts[:-1] or parts)


def _starred(texts: set[str]) -> str:
    first, last = min(texts), max(texts)
    return first if first == last else "".join(names.beginning(first, last)) + "*"


def _not_on_axis(group: Group, said: int | Axes, others: Sequence[Move]) -> str:
    """What to say where a rule does not fit, and what would."""
    fitting = [move for move in _by_effect(others, said=()) if move.is_sure]
    rules = ", or ".join(_rule(group, move) for move in fitting[:4])
    text = f"its layers are not on axis {said}, as layer_axis= says"
    return f"{text}: {_difference(group)}" + (f"; this fits: {rules}" if rules else "")


def _depths(groups: Iterable[Group]) -> dict[Any, set[int]]:
    """How many layer axes the modules in Haiku have that hold a bias.

    It has one axis in one layer, so all axes before are of layers, in all its module.
    """
    depths: dict[Any, set[int]] = collections.defaultdict(set)
    for group in groups:
        flax, leaf = group.flax[0], group.haiku[0]
        if flax.standard and not flax.is_kernel:
            depths[leaf.kind, leaf.path[:-1]].add(len(_shape(leaf)) - 1)
    return depths


def _depth(group: Group, depths: Mapping[Any, set[int]]) -> int | None:
    """How many layer axes a group has in Haiku, if names or its module tell."""
    flax, leaf = group.flax[0], group.haiku[0]
    if flax.is_kernel and names.kernel_rank(leaf.raw.split("/")[:-1]) is not None:
        return layer_axes(flax, leaf)
    known = depths.get((leaf.kind, leaf.path[:-1]), set())
    return next(iter(known)) if flax.standard and len(known) == 1 else None


def layer_axes(flax: Leaf, haiku: Leaf) -> int | None:
    """How many of the axes of a leaf in Haiku are of layers, if its name tells."""
    if len(haiku.pieces) > 1:
        return len(haiku.pieces[0].shape)  # A counter has no axes of its own.
    if flax.is_kernel:
        rank = names.kernel_rank(haiku.raw.split("/")[:-1])
        return None if rank is None else max(0, len(_shape(haiku)) - rank)
    if flax.rank is None:
        return None
    depth = sum(size != 1 for size in _shape(haiku)) - flax.rank
    return depth if depth >= 0 else None


def _shape(leaf: Leaf) -> Shape:
    """With layer axes, for leaves of which the axes are in front."""
    return leaf.codec.shape([piece.shape for piece in leaf.pieces])


# Changes of one layer


def same(array: np.ndarray) -> np.ndarray:
    """No change."""
    return array


def swapped(array: np.ndarray) -> np.ndarray:
    """With the last two axes the other way round."""
    return np.swapaxes(array, -1, -2)


_RULE = "rule"
_SWAP = Change("last axes swapped", swapped, swapped)
_UNSAID_SWAP = Change("last axes swapped, which nothing says", swapped, swapped)


def _by_rule(rule: Any, old: Shape, new: Shape, leaf: Leaf) -> Change | str:
    """What a user's rule does, or why it does not fit."""
    to_haiku, to_flax = rule
    found = _result_of(to_haiku, old, leaf.dtype)
    if isinstance(found, str):
        return f"its rule in leaf= fails on shape {list(old)}: {found}"
    if found == new:
        return _SWAP if rule == _SWAP[1:] else Change(_RULE, to_haiku, to_flax)
    return f"its rule in leaf= makes {list(found)} of {list(old)}, not {list(new)}"


@functools.lru_cache(maxsize=1024)
def _result_of(function: Any, shape: Shape, dtype: np.dtype) -> Shape | str:
    """The shape that a user's function gives for one, or how it fails."""
    try:
        return np.shape(function(np.zeros(shape, dtype)))
    except Exception as error:
        return repr(error)


def _convolution(
    flax: Leaf, haiku: Leaf, old: Shape, new: Shape, is_usual: bool
) -> Iterator[Change]:
    """Transposed convolutions have their last two axes the other way round."""
    said = {names.is_transposed(leaf.raw.split("/")[:-1]) for leaf in (flax, haiku)}
    if True not in said and old == new:
        yield Change("", same, same)
    if (*old[:-2], old[-1], old[-2]) == new:
        if True in said:
            yield _SWAP
        elif said == {None} and not is_usual:
            yield _UNSAID_SWAP


def _is_reshape(leaf: Leaf, old: Shape, new: Shape) -> bool:
    if not leaf.is_kernel and [n for n in old if n != 1] == [n for n in new if n != 1]:
        return True  # A norm keeps axes of size one in Haiku.
    if not leaf.standard or len(old) <= len(new):
        return False
    if not leaf.is_kernel:
        return len(new) == 1 and math.prod(old) == new[0]
    splits = ((math.prod(old[:i]), math.prod(old[i:])) for i in range(1, len(old)))
    return len(new) == 2 and new in splits


# What does not fit


def _shapes(group: Group) -> str:
    old, new = _shape(group.flax[0]), _shape(group.haiku[0])
    return f"shape {list(old)} in Flax, {list(new)} in Haiku"


def _difference(group: Group) -> str:
    """Why the leaves of a group are not the same."""
    if group.holes:
        return f"layers are missing: {', '.join(group.holes[:8])}"
    flax, haiku = group.flax[0], group.haiku[0]
    old, new = _shape(flax), _shape(haiku)
    text = _shapes(group)
    numbered = [
        f"{len(side)} numbered leaves in {name}"
        for side, name in ((group.flax, "Flax"), (group.haiku, "Haiku"))
        if len(side) > 1
    ]
    if len(numbered) == 2:
        return (
            f"{' and '.join(numbered)}, but with other numbers: where they are the "
            "same layers, give both the same numbers, module by module, with rename="
        )
    if numbered:
        return f"{text}, with {numbered[0]}"
    if len(old) == len(new):
        axes = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        text += "".join(f"; axis {i} is {old[i]}, not {new[i]}" for i in axes)
    return text
