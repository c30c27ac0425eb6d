"""Where the layers of some leaves are in either tree, and how one layer changes.

`nn.scan` may put the layers on any axis, and a leaf of Flax may be read in several
ways: `[4, 4, 8]` as one array, as four layers on axis 0, or as four on axis 1. A
*reading* is one such way that fits the leaf in Haiku, where layers are always in front.
Where two fit that give other values, the user has to say which is meant.
"""

import functools
import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from hk_stack.port import _names
from hk_stack.port._cells import Array, Shape
from hk_stack.port._leaves import Average, Leaf, Piece
from hk_stack.port._rules import Axes, Function, Rule, Said


class Group(NamedTuple):
    """Leaves of both trees that hold the same layers, in the order of their numbers."""

    flax: tuple[Leaf, ...]
    haiku: tuple[Leaf, ...]
    holes: str = ""  # What is missing for numbers to count layers.


class Change(NamedTuple):
    """How one layer of a leaf changes on its way; the label is for people."""

    label: str
    to_haiku: Function
    to_flax: Function


class Side(NamedTuple):
    """Where layers are in one tree.

    Attributes:
      leaves: Numbered leaves, in the order of their numbers, as if these were one array
        with the number on its first axis.
      axes: The layer axes of that array, outermost first; () if there are none.
      one_layer: The shape of one layer.
    """

    leaves: tuple[Leaf, ...]
    axes: Axes
    one_layer: Shape

    @property
    def pieces(self) -> list[Piece]:
        return [piece for leaf in self.leaves for piece in leaf.pieces]

    @property
    def shape(self) -> Shape:
        """Of all leaves as one array."""
        return (len(self.leaves), *self.leaves[0].pieces[-1].shape)

    @property
    def order(self) -> list[int]:
        """The axes of that array, those of layers first."""
        rest = (i for i in range(len(self.shape)) if i not in self.axes)
        return [*self.axes, *rest]

    @property
    def sizes(self) -> Shape:
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def num_layers(self) -> int:
        return math.prod(self.sizes)

    @property
    def own_axes(self) -> Axes:
        """Those of the leaves themselves."""
        return tuple(axis - 1 for axis in self.axes if axis)

    @property
    def steps(self) -> list[tuple[int, int]]:
        """These with their sizes."""
        pairs = zip(self.axes, self.sizes, strict=True)
        return [(axis, size) for axis, size in pairs if axis]

    @property
    def interleaved(self) -> bool | None:
        """Whether a step along an axis passes all numbered leaves; None without such.

        So it is in a scan over blocks of layers; else each leaf is a stack of its own.
        """
        is_mixed = len(self.axes) > 1 and 0 in self.axes
        return self.axes[0] != 0 if is_mixed else None

    def views(self, layer: int, arrays: Mapping[int, Array]) -> list[Array]:
        """The pieces of a layer, as views of the arrays of a tree."""
        index = map(int, np.unravel_index(layer, self.sizes))
        at = dict(zip(self.axes, index, strict=True))
        pieces = self.leaves[at.get(0, 0)].pieces
        places = [at.get(i, slice(None)) for i in range(1, max(at, default=0) + 1)]
        return [arrays[piece.place][(*places, ...)] for piece in pieces]


class Reading(NamedTuple):
    """Some leaves of either tree that hold the same layers, and how these change."""

    flax: Side
    haiku: Side
    change: Change

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.flax, self.haiku

    @property
    def where(self) -> Hashable:
        """Where the layers are in both trees, which is the same for all of a module."""
        return self.flax.axes, self.haiku.axes, self.flax.sizes, self.haiku.sizes

    @property
    def is_alike(self) -> bool:
        """Whether a step of each loop is one in the other, if both have several."""
        one, other = ([n for n in side.sizes if n != 1] for side in self.sides)
        return min(len(one), len(other)) < 2 or one == other

    @property
    def interleaved(self) -> bool | None:
        """How numbers and axes take turns, where one tree has both."""
        found = (side.interleaved for side in self.sides)
        return next((order for order in found if order is not None), None)

    @property
    def is_sure(self) -> bool:
        return self.is_alike and self.change is not _UNSAID

    @property
    def effect(self) -> Hashable:
        """What tells apart readings that give other values: which axes become which."""
        # A function of the user's sees one layer, whichever that is.
        if self.change.label == _RULE or len(self.flax.leaves[0].pieces) > 1:
            return self.where
        old, new = self.flax.order, self.haiku.order
        if self.change.to_haiku is swapped:
            old = [*old[:-2], old[-1], old[-2]]
        flax = [(i, n) for i in old if (n := self.flax.shape[i]) != 1]
        haiku = [(i, n) for i in new if (n := self.haiku.shape[i]) != 1]
        if [n for _, n in flax] == [n for _, n in haiku]:
            return self.is_alike, frozenset(zip(flax, haiku, strict=True))
        return self.is_alike, (*flax, *haiku)  # Some axes are one in the other tree.


class Refusal(NamedTuple):
    """Why a group does not go; and whether that is as it could go in several ways."""

    why: str
    fits: bool


def read(groups: Sequence[Group], said: Said) -> list[Reading | Refusal]:
    """How each group goes from one tree to the other, or why it does not."""
    depths: dict[Hashable, int] = {}
    for group in groups:
        if group.flax[0].is_bias:  # It has one axis in a layer of Haiku.
            depths[group.haiku[0].path[:-1]] = len(group.haiku[0].shape) - 1
    tried = [_Reader(group, depths, said) for group in groups]
    steps: dict[str, set[tuple[int, int]]] = {}
    for one in tried:
        if one.fits:
            each = {step for reading in one.fits for step in reading.flax.steps}
            steps[one.block] = steps.get(one.block, each) & each
    for one in tried:  # A scan over numbered blocks has all of their leaves.
        one.fits = [
            reading
            for reading in one.fits
            if not reading.flax.interleaved or reading.flax.steps[0] in steps[one.block]
        ]
    where: dict[Hashable, set[Hashable]] = {}
    for one in tried:
        if one.fits:  # A scan puts all of a module on the same axes.
            found = {reading.where for reading in one.fits}
            where[one.module] = where.get(one.module, found) & found
    return [one.chosen(where.get(one.module, set())) for one in tried]


class _Reader:
    """Finds the readings of a group."""

    def __init__(self, group: Group, depths: Mapping[Hashable, int], said: Said):
        self.group = group
        self.module = group.flax[0].collection, group.flax[0].raw[:-1]
        self.block = _scope(group).partition("*")[0]
        self.fits: list[Reading] = []
        self._said = said
        self._depth = _depth(group, depths)
        self._why = group.holes or _other_rules(group, said)
        if not self._why:
            self._read()

    def _read(self) -> None:
        leaf, rules = self.group.flax[0], self._said.layer_axis
        several = (itertools.permutations(range(leaf.ndim), n) for n in range(3))
        every = list(itertools.chain.from_iterable(several))
        closest = rules.closest(leaf.paths)
        if closest is None:
            self.fits = list(self._readings(every))
            return
        axes = rules.rules[closest[0]]
        meant = [axes if isinstance(axes, tuple) else (axes,)]
        if closest[0].strip("/") in ("", leaf.collection):
            meant.append(())  # It does not say what of the tree is a stack.
        else:
            self._depth = None
        self.fits = list(self._readings(meant))
        if not self.fits and not self._why:
            others = _by_effect(list(self._readings(every)))
            self._why = _not_on_axis(self.group, axes, others)

    def chosen(self, where: Set[Hashable]) -> Reading | Refusal:
        """The one reading that fits, where all leaves of the module have theirs."""
        if not self.fits:
            return Refusal(self._why or _difference(self.group), False)
        fits = [found for found in self.fits if found.where in where] or self.fits
        found = _by_effect(fits)
        if len(found) == 1 and found[0].is_sure:
            return found[0]
        return Refusal(_unclear(self.group, found), True)

    def _readings(self, choices: Sequence[Axes]) -> Iterator[Reading]:
        depths = range(3) if self._depth is None else [self._depth]
        fronts = [tuple(range(depth)) for depth in depths]
        order = self._said.interleave
        for flax in _sides(self.group.flax, choices, order):
            for haiku in _sides(self.group.haiku, fronts, order):
                if _count_the_same(flax, haiku):
                    for change in self._changes(flax, haiku):
                        found = Reading(flax, haiku, change)
                        # Who nests otherwise does not also turn the axes.
                        axes = flax.own_axes
                        if found.is_alike or sorted(axes) == list(axes):
                            yield found

    def _changes(self, flax: Side, haiku: Side) -> Iterator[Change]:
        """How one layer may change; nothing if it does not fit."""
        leaf, old, new = flax.leaves[0], flax.one_layer, haiku.one_layer
        rule = self._said.leaf.find(leaf.paths)
        least = _LEAST.get(leaf.raw[-1], 0) if flax.own_axes else 0
        if len(old) < least or (leaf.is_of_batch_norm and len(old) > 1):
            return
        if rule not in (None, SAME):
            found = _by_rule(rule, old, new, leaf.pieces[-1].dtype)
            if isinstance(found, Change):
                yield found
            else:
                self._why = self._why or found
        elif leaf.is_kernel and len(old) == len(new) >= 3:
            yield from _convolution(leaf, haiku.leaves[0], old, new, rule is not None)
        elif old == new:
            yield _SAME
        elif _is_reshape(leaf, old, new):
            yield Change("reshape", lambda x: x.reshape(new), lambda x: x.reshape(old))


# How many axes one layer of a leaf has at the least.
_LEAST = {"kernel": 2, "embedding": 2, "scale": 1, "bias": 1, "mean": 1, "var": 1}


def _depth(group: Group, depths: Mapping[Hashable, int]) -> int | None:
    """How many layer axes a group has in Haiku, if names or its module tell."""
    flax, leaf = group.flax[0], group.haiku[0]
    if isinstance(leaf.codec, Average):
        return len(leaf.pieces[0].shape)  # A counter has no axes of its own.
    rank = _names.kernel_rank(leaf.raw[:-1]) if flax.is_kernel else None
    if rank is not None:
        return max(0, len(leaf.shape) - rank)
    return depths.get(leaf.path[:-1]) if flax.is_kernel or flax.is_bias else None


def _sides(
    leaves: tuple[Leaf, ...], choices: Sequence[Axes], order: bool | None
) -> Iterator[Side]:
    """Leaves with layers on some axes, in all orders of these and the numbers."""
    ndim = leaves[0].ndim
    for choice in choices:
        axes = tuple(axis % ndim + 1 for axis in choice if -ndim <= axis < ndim)
        one_layer = _one_layer(leaves, axes) if len(axes) == len(choice) else None
        if one_layer is not None:
            orders = [axes] if len(leaves) == 1 else [(*axes, 0), (0, *axes)]
            for each in dict.fromkeys(orders):
                side = Side(leaves, each, one_layer)
                if order is None or side.interleaved in (None, order):
                    yield side


def _one_layer(leaves: tuple[Leaf, ...], axes: Axes) -> Shape | None:
    """The shape of one layer; None if the axes are not those of all layers."""
    found, sizes = set(), set()
    for leaf in leaves:
        shapes = [piece.shape for piece in leaf.pieces]
        rest = [tuple(n for i, n in enumerate(x, 1) if i not in axes) for x in shapes]
        sizes |= {tuple(shape[i - 1 : i] for i in axes) for shape in shapes}
        if leaf.codec.rank not in (None, min(map(len, rest))):
            return None
        found.add(leaf.codec.shape(rest))
    is_one = len(found) == len(sizes) == 1 and len(set(axes)) == len(axes)
    return found.pop() if is_one else None


def _count_the_same(flax: Side, haiku: Side) -> bool:
    """Whether both have the same number of layers."""
    # Where names have other numbers in both trees, one of them has axes too.
    is_numbered = min(len(flax.leaves), len(haiku.leaves)) > 1
    is_other = is_numbered and len(flax.axes) == len(haiku.axes)
    return flax.num_layers == haiku.num_layers and not is_other


def _other_rules(group: Group, said: Said) -> str:
    """What to say if a rule is for some layers of a group only."""
    for rules in (said.leaf, said.layer_axis):
        closest = [rules.closest(leaf.paths) for leaf in group.flax]
        if len({found and found[0] for found in closest}) > 1:
            return (
                f"the rules in {rules.argument}= are not the same for all layers; "
                f'write one, with * for the number: "{_scope(group)}"'
            )
    return ""


def _scope(group: Group) -> str:
    """Its module in Flax as a rule says it, with `*` for numbers."""
    return _names.starred([leaf.raw[:-1] or leaf.raw for leaf in group.flax])


def _by_effect(fits: Sequence[Reading]) -> list[Reading]:
    """The first reading of each effect, of these a sure one if there is one."""
    found: dict[Hashable, Reading] = {}
    for one in sorted(fits, key=lambda one: not one.is_sure):
        found.setdefault(one.effect, one)
    return list(found.values())


# Changes of one layer


def same(array: Array) -> Array:
    """No change."""
    return array


def swapped(array: Array) -> Array:
    """With the last two axes the other way round."""
    return np.swapaxes(array, -1, -2)


SAME: Rule = (same, same)
TRANSPOSED: Rule = (swapped, swapped)
_RULE = "rule"
_SAME = Change("", *SAME)
_SWAP = Change("last axes swapped", *TRANSPOSED)
_UNSAID = Change("last axes swapped, which nothing says", *TRANSPOSED)


@functools.lru_cache(maxsize=1024)
def _by_rule(rule: Rule, old: Shape, new: Shape, dtype: np.dtype) -> Change | str:
    """What a user's rule does, or why it does not fit."""
    try:
        found = list(np.shape(rule[0](np.zeros(old, dtype))))
    except Exception as error:
        return f"its rule in leaf= fails on shape {list(old)}: {error!r}"
    if found == list(new):
        return _SWAP if rule == TRANSPOSED else Change(_RULE, *rule)
    return f"its rule in leaf= makes {found} of {list(old)}, not {list(new)}"


def _convolution(
    flax: Leaf, haiku: Leaf, old: Shape, new: Shape, is_usual: bool
) -> Iterator[Change]:
    """Transposed convolutions have their last two axes the other way round."""
    modules = (_names.parts(leaf.raw[:-1]) for leaf in (flax, haiku))
    said = {_names.is_transposed(module) for module in modules}
    if True not in said and old == new:
        yield _SAME
    if (*old[:-2], old[-1], old[-2]) == new:
        if True in said:
            yield _SWAP
        elif said == {None} and not is_usual:
            yield _UNSAID


def _is_reshape(leaf: Leaf, old: Shape, new: Shape) -> bool:
    if leaf.is_kernel:  # Heads, before or after the other axis.
        splits = [(math.prod(old[:i]), math.prod(old[i:])) for i in range(1, len(old))]
        return len(old) > 2 and new in splits
    if leaf.is_bias:
        return new == (math.prod(old),)
    # A norm keeps axes of size one in Haiku.
    return [n for n in old if n != 1] == [n for n in new if n != 1]


# What does not fit, and what to write


def _difference(group: Group) -> str:
    """Why the leaves of a group are not the same."""
    old, new = group.flax[0].shape, group.haiku[0].shape
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
    text = f"shape {list(old)} in Flax, {list(new)} in Haiku"
    if numbered:
        return f"{text}, with {numbered[0]}"
    pairs = enumerate(zip(old, new, strict=False)) if len(old) == len(new) else ()
    return text + "".join(
        f"; axis {i} is {a}, not {b}" for i, (a, b) in pairs if a != b
    )


def _not_on_axis(group: Group, said: int | Axes, others: Sequence[Reading]) -> str:
    """What to say where a rule does not fit, and what would."""
    rules = [_rule(group, one, {"layer_axis"}) for one in others if one.is_sure]
    fitting = f"; this fits: {'; or '.join(rules[:4])}" if rules else ""
    text = f"its layers are not on axis {said}, as layer_axis= says"
    return f"{text}: {_difference(group)}{fitting}"


_MEANING = {
    "leaf": (
        'it may be a transposed convolution; leaf={"": hk_stack.port.SAME} says that '
        "nothing in the model is"
    ),
    "layer_axis": (
        "its layers may be on several axes, as some sizes are equal; layer_axis is "
        'what nn.scan was told (variable_axes={"params": ...}), and () if layers are '
        "in front or there are none"
    ),
    "interleave": (
        "its layers are both numbered and on an axis; interleave=True if a step along "
        "the axis runs all numbered modules (a scan over blocks of layers), "
        "interleave=False if each numbered module is a stack"
    ),
}


def _unclear(group: Group, found: Sequence[Reading]) -> str:
    """What to say where several readings fit, or one that nothing says."""
    alike = [one for one in found if one.is_alike]
    differ = {
        "leaf": any(one.change is _UNSAID for one in found),
        "layer_axis": len({one.flax.own_axes for one in found}) > 1,
        "interleave": len({one.interleaved for one in alike}) > 1,
    }
    arguments = {argument for argument, is_open in differ.items() if is_open}
    texts = [_MEANING[argument] for argument in differ if argument in arguments]
    for one in [one for one in found if not one.is_alike][:1]:
        texts.append(
            f"its layers may be nested as {one.flax.sizes} in Flax, and as "
            f"{one.haiku.sizes} in Haiku, which are not ported into one another: if "
            "so, port into a tree that is nested alike"
        )
    rules = dict.fromkeys(_rule(group, one, arguments) for one in alike)
    what = f". Say {'; or '.join(rules)}" if any(rules) else ""
    return f"{_difference(group)}: {'; '.join(texts)}{what}"


def _rule(group: Group, one: Reading, arguments: set[str]) -> str:
    """What to write for one reading: its values of these arguments."""
    scope, texts = _scope(group), []
    if "layer_axis" in arguments:
        texts.append(f'layer_axis={{"{scope}": {one.flax.own_axes}}}')
    if "interleave" in arguments and one.interleaved is not None:
        texts.append(f"interleave={one.interleaved}")
    if "leaf" in arguments:
        name = "TRANSPOSED" if one.change is _UNSAID else "SAME"
        texts.append(f'leaf={{"{scope}/kernel": hk_stack.port.{name}}}')
    return ", ".join(texts)


def unused(found: Sequence[Reading], said: Said) -> list[str]:
    """What to say of an axis for the whole tree, or an order, that nothing has."""
    lines = []
    for pattern, axes in said.layer_axis.rules.items():
        meant = axes if isinstance(axes, tuple) else (axes,)
        is_in_front = meant == tuple(range(len(meant)))
        if not is_in_front and not any(one.flax.own_axes == meant for one in found):
            lines.append(
                f"layer_axis: no layers are on axis {axes}; leave {pattern!r} out."
            )
    if said.interleave is not None and all(one.interleaved is None for one in found):
        lines.append(
            f"interleave={said.interleave}: no layers are both numbered and on an "
            "axis in one tree, and otherwise in the other; leave it out."
        )
    return lines
