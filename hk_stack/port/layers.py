"""Where the layers of some leaves are in either tree, and how one layer changes.

`nn.scan` may put the layers on any axis, and a leaf of Flax may be read in several
ways: `[4, 4, 8]` as one array, as four layers on axis 0, or as four on axis 1. A
*reading* is one such way that fits the leaf in Haiku, where layers are always in front.
Readings in the same *order* give the same values; where readings of other orders fit
too, what is around has to say which is meant, or the user has.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hk_stack.port import names
from hk_stack.port.leaves import Leaf, Shape

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
    def order(self) -> Axes:
        """Axes in the order of the layers, then the rest; -1 is the number in names."""
        shape = self.leaves[0].pieces[-1].shape
        front = [axis % len(shape) for axis in self.axes]
        rest = [i for i in range(len(shape)) if i not in front]
        number = [-1] if len(self.leaves) > 1 else []
        front = front + number if self.interleaved else number + front
        return tuple(i for i in (*front, *rest) if i < 0 or shape[i] != 1)

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
    def order(self) -> tuple[Axes, Axes]:
        """What tells apart moves that give other values."""
        return self.flax.order, self.haiku.order

    @property
    def is_mixed(self) -> bool:
        """Whether layers are on axes and by number in one of the trees."""
        return self.flax.is_mixed or self.haiku.is_mixed

    @property
    def is_in_order(self) -> bool:
        """Whether layers are in front in both trees, those by number first."""
        return all(list(axes) == sorted(axes) for axes in self.order)


class Doubt(NamedTuple):
    """Why a reading is not clear, or does not fit though it might have.

    Attributes:
      text: What to tell the user.
      stands: Whether this reading makes others unclear: "always", "doubtful" (if they
        are not in order, or also count by number), or "alone" (it does not).
    """

    text: str
    stands: str


class Options(NamedTuple):
    """What users may say; see `flax_to_haiku`."""

    leaf: names.Rules
    layer_axis: names.Rules
    interleave: bool | None


def moves(groups: Sequence[Group], options: Options) -> Iterator[Move | str]:
    """How each group goes from one tree to the other, or why it does not."""
    depths = _Depths(groups)
    read = [_Readings.of(group, depths.of(group), options) for group in groups]
    _same_in_module(read)
    votes = _Votes(read)
    for one in read:
        yield _chosen(one, votes)


# Readings


_MOST_AXES = 4
_ONE_AXIS = [(k,) for k in range(_MOST_AXES)]
_AXES: list[Axes] = [
    (),
    *_ONE_AXIS,
    *itertools.combinations(range(_MOST_AXES), 2),  # Of a scan in a scan.
]


class _Readings(NamedTuple):
    """All readings of a group.

    Attributes:
      group: The group.
      fitting: The moves that fit, by their layer axes in Flax.
      unclear: What is not clear of others, by their layer axes in Flax.
      depth: How many layer axes Haiku's leaves have, if that is known.
      said: The layer axes that the user may mean, and whether just for this path.
    """

    group: Group
    fitting: dict[Axes, list[Move]]
    unclear: dict[Axes, Doubt]
    depth: int | None
    said: tuple[list[Axes], bool] | None

    @classmethod
    def of(cls, group: Group, depth: int | None, options: Options) -> "_Readings":
        """Tries all axes, and those that the user names."""
        rule = options.layer_axis.find(*group.flax[0].paths)
        said = None
        if differ := _other_rules(group, options):
            return cls(group, {}, {(): Doubt(differ, "always")}, None, None)
        if rule is not None:
            said = _meant(rule[0]), rule[1].start("inside") != 0  # Not of all paths.
        read = cls(group, {}, {}, depth, said)
        in_front = [tuple(range(n)) for n in range(3)]
        haikus = list(_sides(group.haiku, in_front, options))
        for axes in () if group.holes else (*(said[0] if said else ()), *_AXES):
            # Several axes are those of scans in a scan, if the user names them.
            is_said = rule is not None and rule[0] == axes
            for found in _readings(group, haikus, axes, depth, options, is_said):
                if isinstance(found, Move):
                    read.fitting.setdefault(axes, []).append(found)
                else:
                    read.unclear.setdefault(axes, found)
        return read

    @property
    def module(self) -> tuple[str, str]:
        """Where the group is in Flax."""
        leaf = self.group.flax[0]
        return leaf.collection, leaf.raw.rpartition("/")[0]

    def moves(self, *which: Axes) -> list[Move]:
        """One move for each order, the simplest; of some axes only, if given."""
        found: dict[Any, Move] = {}
        for axes in which or sorted(self.fitting, key=len):
            for move in self.fitting.get(axes, ()):
                # What a rule does may depend on the axes that it is given.
                is_rule = move.change.label == _RULE
                key = (move.order, move.flax.axes) if is_rule else move.order
                found.setdefault(key, move)
        return list(found.values())


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


def _meant(axes: int | Axes) -> list[Axes]:
    """What a user may mean by the axes of layers: an axis may be that of two scans."""
    if isinstance(axes, tuple):
        return [axes]
    return [(axes,)] if axes < 0 else [(axes,), (axes, axes + 1)]


def _readings(
    group: Group,
    haikus: Sequence[Side],
    axes: Axes,
    depth: int | None,
    options: Options,
    is_said: bool,
) -> Iterator[Move | Doubt]:
    """The readings of a group with layers on some axes, and doubtful ones."""
    for flax in _sides(group.flax, [axes], options):
        for haiku in haikus:
            if not _count_the_same(flax, haiku):
                continue
            found = _change(flax, haiku, depth, options)
            if isinstance(found, Doubt):
                yield found
            elif found and _are_nested_alike(flax, haiku):
                if is_said or _is_known(flax, haiku, depth):
                    yield Move(flax, haiku, found)
                elif flax.factors != haiku.factors:
                    yield _nested(flax, haiku)
            elif found:
                is_mixed = flax.is_mixed or haiku.is_mixed
                is_meant = options.interleave is not None or not is_mixed
                yield _nested(flax, haiku, "always" if is_meant else "doubtful")


def _nested(flax: Side, haiku: Side, stands: str = "doubtful") -> Doubt:
    if flax.is_mixed or haiku.is_mixed:
        say = "say interleave=True or False"
    else:
        say = f'if so, say layer_axis={{"{flax.leaves[0].raw}": {flax.axes}}}'
    return Doubt(
        f"its layers are nested as {flax.factors} in Flax, and as {haiku.factors} in "
        f"Haiku; {say}, or port into a tree that is nested alike",
        stands,
    )


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


def _are_nested_alike(flax: Side, haiku: Side) -> bool:
    """Whether a step of each loop is one in the other, if both trees have several."""
    is_nested = min(len(flax.factors), len(haiku.factors)) > 1
    return not is_nested or flax.factors == haiku.factors


def _is_known(flax: Side, haiku: Side, depth: int | None) -> bool:
    """Whether layers that are nested in one tree only are layers for sure."""
    if not (flax.axes and haiku.axes) or flax.num_levels == haiku.num_levels:
        return True
    is_known = len(haiku.axes) == depth or _is_matrix(haiku)
    return is_known or flax.is_mixed or haiku.is_mixed


def _is_matrix(haiku: Side) -> bool:
    """Whether a layer has the weights of a linear layer, by name and by shape."""
    return _is_linear(haiku.leaves[0]) and len(haiku.one_layer() or ()) == 2


def _is_linear(haiku: Leaf) -> bool:
    return names.kernel_rank(haiku.raw.split("/")[:-1]) == 2 and haiku.path[-1] == "w"


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


def _same_in_module(read: Sequence[_Readings]) -> None:
    """Drops readings that the other leaves of a module do not have.

    A scan puts all parameters of a module on the same axes.
    """
    modules: dict[Any, list[_Readings]] = collections.defaultdict(list)
    for one in read:
        modules[one.module].append(one)
    for group in modules.values():
        having = [one for one in group if one.fitting]
        for one in having:
            for axes in [axes for axes in one.fitting if axes]:
                sizes = [
                    {move.flax.sizes for move in other.fitting.get(axes, ())}
                    for other in having
                ]
                if any(found != sizes[0] for found in sizes):
                    del one.fitting[axes]


class _Votes:
    """What the leaves in a scope that can be read in one order only say of the rest."""

    def __init__(self, read: Iterable[_Readings]):
        self._votes: dict[tuple[str, str], set[Axes]] = collections.defaultdict(set)
        self._layered: set[tuple[str, str]] = set()
        for one in read:
            if layer_axes(one.group.flax[0], one.group.haiku[0]):
                self._layered.update(_scopes(one))
            found = one.moves()
            if len(found) != 1:
                continue
            # An axis of size one is everywhere, and tells nothing.
            in_front = all(axes == tuple(range(len(axes))) for axes in one.fitting)
            if found[0].is_in_order and in_front:
                vote: Axes = ()
            elif not found[0].is_in_order and len(one.fitting) == 1:
                vote = found[0].flax.axes
            else:
                continue
            for scope in _scopes(one):
                self._votes[scope].add(vote)

    def is_free_of_layers(self, one: _Readings) -> bool:
        """Whether a kernel is that of a first convolution, in no other module.

        That of one of colours, `[3, 3, 3, 8]`, would fit as a stack too; but a layer
        that returns more than it is given cannot be stacked all by itself.
        """
        (leaf, *more), others = one.group.flax, one.group.haiku
        shape = leaf.pieces[0].shape
        is_first = not more and len(others) == 1 and leaf.raw.count("/") == 1
        if not (is_first and leaf.is_kernel and len(shape) >= 4):
            return False
        return shape[-1] != shape[-2] and one.module not in self._layered

    def of(self, one: _Readings) -> set[Axes]:
        """The votes in the nearest scope that has some."""
        found = (self._votes[scope] for scope in _scopes(one) if scope in self._votes)
        return next(found, set())


def _scopes(one: _Readings) -> Iterator[tuple[str, str]]:
    """A group's module and those around it, without the root, which holds all."""
    collection, module = one.module
    while module:
        yield collection, module
        module = module.rpartition("/")[0]


def _chosen(one: _Readings, votes: _Votes) -> Move | str:
    """The one reading that is meant, or why that is not clear."""
    found = _said(one, *one.said) if one.said else one.moves()
    stand = {"always"}
    stand |= set() if found else {"alone"}
    depth = one.depth or 0
    has_both = depth > (0 if len(one.group.haiku) > 1 else 1)
    has_both = has_both and max(len(one.group.flax), len(one.group.haiku)) > 1
    if has_both or any(not move.is_in_order or move.is_mixed for move in found):
        stand |= {"doubtful"}
    for axes, doubt in one.unclear.items():
        if doubt.stands in stand and _may_be(one, axes):
            return doubt.text
    if len(found) > 1:
        voted = votes.of(one)
        found = [
            move
            for move in found
            if voted == {() if move.is_in_order else move.flax.axes}
        ] or found
    if len(found) > 1 and not voted and votes.is_free_of_layers(one):
        found = [move for move in found if move.is_in_order]
    if len(found) == 1:
        return found[0]
    return _unclear(one, found) if found else _difference(one.group)


def _may_be(one: _Readings, axes: Axes) -> bool:
    """Whether some axes are not ruled out by those that the user names."""
    if one.said is None or not one.said[1] or not one.fitting:
        return True
    return axes in one.said[0]


def _said(one: _Readings, meant: list[Axes], is_of_path: bool) -> list[Move]:
    """The readings with the axes that the user names."""
    layered = [axes for axes in meant if axes in one.fitting]
    if not layered:
        return one.moves(())
    return one.moves(*layered) if is_of_path else one.moves(*layered, ())


def _unclear(one: _Readings, found: Sequence[Move]) -> str:
    """What to say where several readings fit."""
    leaf = one.group.flax[0]
    if len({move.flax.axes for move in found if move.flax.axes}) < 2 and any(
        side.is_mixed for move in found for side in (move.flax, move.haiku)
    ):
        return (
            "its layers are both numbered and on an axis; say interleave=True if a "
            "step along the axis runs all numbered modules (a scan over blocks of "
            "layers), or False if each numbered module is a stack"
        )
    if any(move.change.label == _RULE for move in found):
        return (
            "its rule in leaf= may be for all of it, or for each of its layers; say "
            f'layer_axis={{"{leaf.raw}": ()}}, or the axis of the layers instead of ()'
        )
    axes = list(dict.fromkeys(move.flax.axes for move in found if move.flax.axes))
    where = " or ".join(f"axis {', '.join(map(str, a))}" for a in axes[:4])
    scope = leaf.raw.rpartition("/")[0] or leaf.raw
    example = axes[0]
    return (
        f"its layers may be on {where}, or in front, as some sizes are equal; say "
        f'which, as nn.scan was told (variable_axes={{"{leaf.collection}": ...}}): '
        f'layer_axis={{"{scope}": {example}}}, or 0 if they are in front or there are '
        "none"
    )


class _Depths:
    """How many layer axes Haiku's leaves have, as far as that is known.

    A bias in Flax has one axis in one layer of Haiku, so all axes before are of layers;
    leaves of which nothing is known have the axes of those around them. That is a
    guess, good enough to tell a stack of matrices from the kernel of a convolution.
    """

    def __init__(self, groups: Iterable[Group]):
        self._around: dict[names.Path, set[Shape]] = collections.defaultdict(set)
        for group in groups:
            leaf = group.haiku[0]
            depth = layer_axes(group.flax[0], leaf)
            if depth is not None:
                for i in range(1, len(leaf.path)):
                    self._around[leaf.path[:i]].add(_shape(leaf)[:depth])

    def of(self, group: Group) -> int | None:
        """The number of layer axes of a group's leaves in Haiku."""
        leaf = group.haiku[0]
        for i in range(len(leaf.path) - 1, 0, -1):
            around = self._around.get(leaf.path[:i])
            if around:
                sizes, *others = around
                fits = not others and _shape(leaf)[: len(sizes)] == sizes
                return len(sizes) if fits else None
        return None


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


def _change(
    flax: Side, haiku: Side, depth: int | None, options: Options
) -> Change | Doubt | None:
    """How one layer changes; None if it does not fit."""
    old, new = flax.one_layer(), haiku.one_layer()
    if old is None or new is None:
        return None
    leaf = flax.leaves[0]
    if flax.axes and len(old) < leaf.least_rank:
        return None
    rank = names.kernel_rank(haiku.leaves[0].raw.split("/")[:-1])
    if leaf.is_kernel and haiku.axes and rank not in (None, len(new)):
        return None
    rule = options.leaf.find(*leaf.paths)
    is_usual = rule is not None and rule[0] == (same, same)
    if rule is not None and not is_usual:
        is_other = depth is not None and len(haiku.axes) != depth
        return None if is_other else _by_rule(rule[0], old, new, leaf)
    if leaf.is_kernel and len(old) == len(new) >= 3:
        is_stack = not haiku.axes and bool(depth)
        is_sure = is_usual or is_stack
        return _convolution(leaf, haiku.leaves[0], old, new, is_sure)
    if old == new:
        return Change("", same, same)
    if _is_reshape(leaf, old, new):
        return Change("reshape", lambda x: x.reshape(new), lambda x: x.reshape(old))
    return None


_RULE = "rule"


def _by_rule(rule: Any, old: Shape, new: Shape, leaf: Leaf) -> Change | Doubt:
    to_haiku, to_flax = rule
    found = _result_of(to_haiku, old, leaf.dtype)
    if isinstance(found, str):
        return Doubt(f"its rule in leaf= fails on shape {list(old)}: {found}", "alone")
    if found == new:
        return Change(_RULE, to_haiku, to_flax)
    text = f"its rule in leaf= makes {list(found)} of {list(old)}, not {list(new)}"
    return Doubt(text, "alone")


@functools.lru_cache(maxsize=1024)
def _result_of(function: Any, shape: Shape, dtype: np.dtype) -> Shape | str:
    """The shape that a user's function gives for one, or how it fails."""
    try:
        return np.shape(function(np.zeros(shape, dtype)))
    except Exception as error:
        return repr(error)


def _convolution(
    flax: Leaf, haiku: Leaf, old: Shape, new: Shape, is_sure: bool
) -> Change | Doubt | None:
    """Transposed convolutions have their last two axes the other way round."""
    said = {names.is_transposed(leaf.raw.split("/")[:-1]) for leaf in (flax, haiku)}
    said -= {None}
    turned = (*old[:-2], old[-1], old[-2])
    if True in said:
        swap = Change("last axes swapped", swapped, swapped)
        return swap if turned == new else None
    if old == new == turned and not (said or is_sure):
        return Doubt(
            "it may be a convolution or a transposed one, as its sizes are equal; say "
            f'leaf={{"{flax.raw}": hk_stack.port.SAME}}, or hk_stack.port.TRANSPOSED; '
            'or leaf={"": hk_stack.port.SAME} if none of the model is transposed',
            "always",
        )
    return Change("", same, same) if old == new else None


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


def _difference(group: Group) -> str:
    """Why the leaves of a group are not the same."""
    if group.holes:
        return f"layers are missing: {', '.join(group.holes[:8])}"
    flax, haiku = group.flax[0], group.haiku[0]
    old, new = _shape(flax), _shape(haiku)
    text = f"shape {list(old)} in Flax, {list(new)} in Haiku"
    numbered = [
        f"{len(side)} numbered leaves in {name}"
        for side, name in ((group.flax, "Flax"), (group.haiku, "Haiku"))
        if len(side) > 1
    ]
    if len(numbered) == 2:
        return (
            f"{' and '.join(numbered)}, but with other numbers; if they are the same "
            "layers, say so of each: rename={...}"
        )
    if numbered:
        return f"{text}, with {numbered[0]}"
    if len(old) == len(new):
        axes = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        text += "".join(f"; axis {i} is {old[i]}, not {new[i]}" for i in axes)
        is_wide = flax.is_kernel and len(old) > 2 and not _is_linear(haiku)
        if is_wide and (*old[:-2], *old[:-3:-1]) == new:
            text += (
                "; for a transposed convolution say "
                f'leaf={{"{flax.raw}": hk_stack.port.TRANSPOSED}}'
            )
    return text
