"""Where the layers of some leaves are in either tree, and how one layer changes.

`nn.scan` may put the layers on any axis, and a leaf of Flax may be read in several
ways: `[4, 4, 8]` as one array, as four layers on axis 0, or as four on axis 1. A
*reading* is one such way that fits the leaf in Haiku, where layers are always in front.
Where two fit that give other values, the user has to say which is meant.
"""

import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple, TypeVar

import numpy as np

from hk_stack.port import _names
from hk_stack.port._codecs import Array, Average, Leaf, Piece, Shape
from hk_stack.port._names import Path
from hk_stack.port._regroup import NO_SHAPE, SAME, TRANSPOSED, swapped
from hk_stack.port._rules import (
    Arguments,
    Axes,
    Function,
    Pair,
    Said,
    Transpose,
    matched,
    written,
)

_T = TypeVar("_T")


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
      sizes: Their sizes.
      one_layer: The shape of one layer.
    """

    leaves: tuple[Leaf, ...]
    axes: Axes
    sizes: Shape
    one_layer: Shape

    @property
    def pieces(self) -> list[Piece]:
        return [piece for leaf in self.leaves for piece in leaf.pieces]

    @property
    def num_layers(self) -> int:
        return math.prod(self.sizes)

    @property
    def steps(self) -> list[tuple[int, int]]:
        return list(zip(self.axes, self.sizes, strict=True))

    @property
    def loops(self) -> list[int]:
        """How often each loop over layers runs that runs more than once."""
        return [n for n in self.sizes if n != 1]

    @property
    def own_axes(self) -> Axes:
        """Those of the leaves themselves."""
        return tuple(axis - 1 for axis in self.axes if axis)

    @property
    def order(self) -> list[tuple[int, int]]:
        """The axes of that array with their sizes, those of layers first."""
        shape = (len(self.leaves), *self.leaves[0].pieces[-1].shape)
        rest = ((axis, n) for axis, n in enumerate(shape) if axis not in self.axes)
        return [*self.steps, *rest]

    @property
    def interleaved(self) -> bool | None:
        """Whether a step along an axis passes all numbered leaves; None without such.

        So it is in a scan over blocks of layers; else each leaf is a stack of its own.
        """
        is_mixed = len(self.axes) > 1 and 0 in self.axes
        return self.axes[0] != 0 if is_mixed else None

    def at(self, layer: int) -> tuple[Leaf, dict[int, int]]:
        """The leaf that has a layer, and where on each of its axes this is."""
        index = map(int, np.unravel_index(layer, self.sizes))
        found = dict(zip(self.axes, index, strict=True))
        return self.leaves[found.pop(0, 0)], found

    def views(self, layer: int, arrays: Mapping[int, Array]) -> list[Array]:
        """The pieces of a layer, as views of the arrays of a tree."""
        leaf, at = self.at(layer)
        places = [at.get(i, slice(None)) for i in range(1, max(at, default=0) + 1)]
        return [arrays[piece.place][(*places, ...)] for piece in leaf.pieces]


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
        one, other = self.flax.loops, self.haiku.loops
        return min(len(one), len(other)) < 2 or one == other

    @property
    def interleaved(self) -> bool | None:
        """How numbers and axes take turns, where one tree has both."""
        order = self.flax.interleaved
        return self.haiku.interleaved if order is None else order

    @property
    def is_sure(self) -> bool:
        return self.is_alike and self.change is not _UNSAID

    @property
    def is_turned(self) -> bool:
        """Whether it is a matrix that is stored transposed."""
        is_matrix = self.flax.leaves[0].is_kernel and len(self.flax.one_layer) == 2
        return is_matrix and self.change.to_haiku is swapped

    @property
    def effect(self) -> Hashable:
        """What tells apart readings that give other values: which axes become which."""
        # A function of the user's sees one layer, whichever that is.
        if self.change.label == _RULE or not self.flax.leaves[0].codec.is_plain:
            return self.where
        flax, haiku = self.flax.order, self.haiku.order
        if self.change.to_haiku is swapped:
            flax[-2:] = flax[:-3:-1]
        old, new = ([axis for axis in x if axis[1] != 1] for x in (flax, haiku))
        if [n for _, n in old] == [n for _, n in new]:
            return self.is_alike, frozenset(zip(old, new, strict=True))
        return self.is_alike, (*old, *new)  # Some axes are one in the other tree.


class Refusal(NamedTuple):
    """Why a group does not go.

    Attributes:
      why: In words.
      fits: Whether it could go in several ways.
      rules: What to write, for each of the ways that are known.
      is_turned: Whether it fits if it is transposed.
      lead: What comes before the rules.
    """

    why: str
    fits: bool = False
    rules: tuple[Arguments, ...] = ()
    is_turned: bool = False
    lead: str = ". Say "

    def __str__(self) -> str:
        rules = dict.fromkeys(map(written, self.rules))
        return f"{self.why}{self.lead}{'; or '.join(rules)}" if rules else self.why


def read(
    groups: Sequence[Group], said: Said, is_turned: bool = False
) -> list[Reading | Refusal]:
    """How each group goes from one tree to the other, or why it does not.

    Args:
      groups: Groups of leaves.
      said: Rules.
      is_turned: Whether kernels in other groups are stored transposed.

    Returns:
      A reading or a refusal for each.
    """
    depths: dict[Hashable, int] = {}
    for group in groups:
        if group.flax[0].is_bias:  # It has one axis in a layer of Haiku.
            depths[group.haiku[0].path[:-1]] = len(group.haiku[0].shape) - 1
    tried = [_Reader(group, depths, said) for group in groups]
    if is_turned or any(one.is_turned for one in tried):
        for one in tried:
            one.doubt()
    # A scan over numbered blocks has all of their leaves.
    steps = _common(
        (one.block, {step for found in one.fits for step in found.flax.steps})
        for one in tried
        if one.fits
    )
    for one in tried:
        one.fits = [
            found
            for found in one.fits
            if not found.flax.interleaved or found.flax.steps[0] in steps[one.block]
        ]
    # A scan puts all of a module on the same axes.
    where = _common(
        (one.module, {found.where for found in one.fits}) for one in tried if one.fits
    )
    return [one.chosen(where.get(one.module, set())) for one in tried]


def _common(pairs: Iterable[tuple[Hashable, set[_T]]]) -> dict[Hashable, set[_T]]:
    """What all sets of a key have in common."""
    found: dict[Hashable, set[_T]] = {}
    for key, each in pairs:
        found[key] = found.get(key, each) & each
    return found


class _Reader:
    """Finds the readings of a group."""

    def __init__(self, group: Group, depths: Mapping[Hashable, int], said: Said):
        self.group = group
        self.module = group.flax[0].collection, group.flax[0].raw[:-1]
        self.block = _scopes(group)[0].partition("*")[0]
        self.fits: list[Reading] = []
        self._said = said
        self._depth = _depth(group, depths)
        self._rule = said.leaf.find(group.flax[0].paths)
        self._of_rule = ""  # What is wrong with it.
        self._why = Refusal(group.holes) if group.holes else _other_rules(group, said)
        if not self._why:
            self._read()

    def _read(self) -> None:
        leaf, of_axes = self.group.flax[0], self._said.layer_axis
        all_axes = range(leaf.ndim)
        every = [x for n in range(3) for x in itertools.permutations(all_axes, n)]
        closest = of_axes.closest(leaf.paths)
        choices = every
        if closest is not None:
            axes = of_axes.rules[closest.pattern]
            choices = [axes if isinstance(axes, tuple) else (axes,)]
            if closest.pattern.strip("/") in ("", leaf.collection):
                choices.append(())  # It does not say what of the tree is a stack.
            else:
                self._depth = None
        found = list(self._readings(choices))
        self.fits = [one for one in found if one.change is not _TURNED]
        if self.fits:
            return
        if found:
            why = f"{_difference(self.group)}: it may be stored transposed"
            rules = (_rules(self.group, found[0], {"leaf"}),)
            self._why = Refusal(why, rules=rules, is_turned=True)
        elif self._of_rule:
            self._why = Refusal(self._of_rule)
        elif closest is not None:
            others = _by_effect(list(self._readings(every)))
            self._why = _not_on_axis(self.group, axes, others)

    @property
    def is_turned(self) -> bool:
        """Whether it is a matrix that is stored transposed."""
        is_turned = self._why is not None and self._why.is_turned
        return is_turned or any(one.is_turned for one in self.fits)

    def doubt(self) -> None:
        """A square matrix may be transposed, too, where others are."""
        if self._rule is None and self.group.flax[0].is_kernel:
            for one in [one for one in self.fits if one.change is _SAME]:
                shape = one.flax.one_layer
                if len(shape) == 2 and shape == shape[::-1]:
                    self.fits.append(one._replace(change=_UNSAID))

    def chosen(self, where: Set[Hashable]) -> Reading | Refusal:
        """The one reading that fits, where all leaves of the module have theirs."""
        if not self.fits:
            return self._why or _differs(self.group)
        fits = [found for found in self.fits if found.where in where] or self.fits
        found = _by_effect(fits)
        if len(found) == 1 and found[0].is_sure:
            return found[0]
        return _unclear(self.group, found)

    def _readings(self, choices: Sequence[Axes]) -> Iterator[Reading]:
        depths = range(3) if self._depth is None else [self._depth]
        fronts = [tuple(range(depth)) for depth in depths]
        order = self._said.interleave
        theirs = _sides(self.group.flax, choices, order)
        ours = list(_sides(self.group.haiku, fronts, order))
        for flax, haiku in itertools.product(theirs, ours):
            # Where names have other numbers in both trees, one of them has axes too.
            is_numbered = min(len(flax.leaves), len(haiku.leaves)) > 1
            is_other = is_numbered and len(flax.loops) == len(haiku.loops)
            if flax.num_layers == haiku.num_layers and not is_other:
                for change in self._changes(flax, haiku):
                    found = Reading(flax, haiku, change)
                    # Who nests otherwise does not also turn the axes.
                    axes = flax.own_axes
                    if found.is_alike or list(axes) == sorted(axes):
                        yield found

    def _changes(self, flax: Side, haiku: Side) -> Iterator[Change]:
        """How one layer may change; nothing if it does not fit."""
        leaf, old, new = flax.leaves[0], flax.one_layer, haiku.one_layer
        rule = self._rule
        least = _LEAST.get(leaf.raw[-1], 0) if flax.own_axes else 0
        if len(old) < least or (leaf.is_of_batch_norm and len(old) > 1):
            return
        if rule not in (None, SAME):
            found = _by_rule(rule, old, new, leaf.pieces[-1].dtype)
            if isinstance(found, Change):
                yield found
            else:
                self._of_rule = self._of_rule or found
        elif leaf.is_kernel and len(old) == len(new) >= 3:
            yield from _convolution(leaf, haiku.leaves[0], old, new, rule is not None)
        elif old == new:
            yield _SAME
        elif rule is None and leaf.is_kernel and len(old) == 2 and old == new[::-1]:
            yield _TURNED
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
        found = _cut(leaves, axes) if len(set(axes)) == len(choice) else None
        if found is not None:
            sizes = {0: len(leaves), **dict(zip(axes, found[0], strict=True))}
            orders = [axes] if len(leaves) == 1 else [(*axes, 0), (0, *axes)]
            for each in dict.fromkeys(orders):
                side = Side(leaves, each, tuple(sizes[i] for i in each), found[1])
                if order is None or side.interleaved in (None, order):
                    yield side


def _cut(leaves: tuple[Leaf, ...], axes: Axes) -> tuple[Shape, Shape] | None:
    """The sizes of some axes, and the shape of the others, if all layers agree."""
    found = set()
    for leaf in leaves:
        shapes = [piece.shape for piece in leaf.pieces]
        rest = [tuple(n for i, n in enumerate(x, 1) if i not in axes) for x in shapes]
        if leaf.codec.rank not in (None, min(map(len, rest))):
            return None
        one_layer = leaf.codec.shape(rest)
        # Other leaves may have fewer axes than the first.
        found |= {
            (tuple(n for i in axes for n in x[i - 1 : i]), one_layer) for x in shapes
        }
    return found.pop() if len(found) == 1 else None


def _other_rules(group: Group, said: Said) -> Refusal | None:
    """What to say if a rule is for some layers of a group only."""
    for rules in (said.leaf, said.layer_axis):
        closest = [rules.closest(leaf.paths) for leaf in group.flax]
        if len({found and found.pattern for found in closest}) > 1:
            return Refusal(
                f"the rules in {rules.argument}= are not the same for all layers; "
                f'write one, with * for the number: "{_scopes(group)[0]}"'
            )
    return None


def _scopes(group: Group) -> list[str]:
    """Its module in Flax as a rule says it, with `*` for numbers."""
    return _patterns([leaf.raw[:-1] or leaf.raw for leaf in group.flax])


def _patterns(paths: Sequence[Path]) -> list[str]:
    """One pattern for all paths, if these differ in numbers only."""
    one = _names.starred(paths)
    every = ["/".join(path) for path in paths]
    is_right = all(matched(one, [path]) for path in every)
    return [one] if is_right else list(dict.fromkeys(every))


def _by_effect(fits: Sequence[Reading]) -> list[Reading]:
    """The first reading of each effect, of these a sure one if there is one."""
    found: dict[Hashable, Reading] = {}
    for one in sorted(fits, key=lambda one: not one.is_sure):
        found.setdefault(one.effect, one)
    return list(found.values())


# Changes of one layer


_RULE = "rule"
_SAME = Change("", *SAME)
_SWAP = Change("last axes swapped", *TRANSPOSED)
_UNSAID = Change("last axes swapped, which nothing says", *TRANSPOSED)
_TURNED = Change("last axes swapped, as nothing else fits", *TRANSPOSED)


@functools.lru_cache(maxsize=1024)
def _by_rule(rule: Pair, old: Shape, new: Shape, dtype: np.dtype) -> Change | str:
    """What a user's rule does, or why it does not fit."""
    to_haiku, to_flax = rule
    try:
        found = np.shape(to_haiku(np.zeros(old, dtype)))
    except Exception as error:
        return f"its rule in leaf= fails on shape {list(old)}: {error!r}"
    if found == new:
        return _SWAP if rule == TRANSPOSED else Change(_RULE, to_haiku, to_flax)
    if isinstance(rule, Transpose) and _is_merged(found, new):
        return Change(
            _RULE,
            lambda x: np.reshape(to_haiku(x), new),
            lambda x: to_flax(np.reshape(x, found)),
        )
    return f"its rule in leaf= makes {list(found)} of {list(old)}, not {list(new)}"


def _is_merged(old: Shape, new: Shape) -> bool:
    """Whether neighbouring axes became one, and nothing else changed."""
    ends = itertools.combinations(range(1, len(old) + 1), len(new))
    cuts = [[0, *each, len(old)] for each in ends] if len(old) > len(new) else []
    parts = ([old[a:b] for a, b in itertools.pairwise(each)] for each in cuts)
    return (*new, 1) in [tuple(map(math.prod, each)) for each in parts]


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
        return len(new) == 2 and _is_merged(old, new)
    if leaf.is_bias:
        return new == (math.prod(old),)
    # A norm keeps axes of size one in Haiku.
    return [n for n in old if n != 1] == [n for n in new if n != 1]


# What does not fit, and what to write


def _difference(group: Group) -> str:
    """Why the leaves of a group are not the same."""
    flax, haiku = group.flax[0], group.haiku[0]
    old, new = flax.shape, haiku.shape
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
    if NO_SHAPE in (old, new):
        pieces = " and ".join(map(str, flax.pieces))
        return f"the rule in leaf= for {pieces} does not fit: {flax.codec.label}"
    text = f"shape {list(old)} in Flax, {list(new)} in Haiku"
    if numbered:
        return f"{text}, with {numbered[0]}{_other_depth(group)}"
    pairs = enumerate(zip(old, new, strict=False)) if len(old) == len(new) else ()
    return text + "".join(
        f"; axis {i} is {a}, not {b}" for i, (a, b) in pairs if a != b
    )


def _other_depth(group: Group) -> str:
    """What to write if numbered leaves are not as many as a stack has layers."""
    sides = sorted((group.flax, group.haiku), key=len)
    (stack, *_), layers = sides
    depth, *shape = stack.shape or (0,)
    if sorted(shape) != sorted(layers[0].shape) or depth == len(layers):
        return ""
    return f": {len(layers)} layers there, {depth} here; build both with as many"


def _differs(group: Group) -> Refusal:
    """What to say where nothing fits: counting anew may help, if that is all."""
    paths = [leaf.raw for leaf in group.flax], [leaf.path for leaf in group.haiku]
    old, new = map(_names.numbers, paths)
    shifts = {a - b for a, b in zip(old, new, strict=False)}
    rules: tuple[Arguments, ...] = ()
    if len(old) == len(new) and len(shifts) == 1 and (shift := shifts.pop()):
        flax, haiku = (_names.starred(several).partition("*")[0] for several in paths)
        larger = f"{{i+{abs(shift)}}}"
        ends = (larger, "{i}") if shift > 0 else ("{i}", larger)
        rules = ({"rename": {flax + ends[0]: haiku + ends[1]}},)
    return Refusal(_difference(group), rules=rules)


def _not_on_axis(group: Group, said: int | Axes, others: Sequence[Reading]) -> Refusal:
    """What to say where a rule does not fit, and what would."""
    rules = [_rules(group, one, {"layer_axis"}) for one in others if one.is_sure]
    text = f"its layers are not on axis {said}, as layer_axis= says"
    why, lead = f"{text}: {_difference(group)}", "; this fits: "
    return Refusal(why, rules=tuple(rules[:4]), lead=lead)


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
_SQUARE = "it is square, and may be stored transposed, as others of this tree are"


def _unclear(group: Group, found: Sequence[Reading]) -> Refusal:
    """What to say where several readings fit, or one that nothing says."""
    alike = [one for one in found if one.is_alike]
    differ = {
        "leaf": any(one.change is _UNSAID for one in found),
        "layer_axis": len({one.flax.own_axes for one in found}) > 1,
        "interleave": len({one.interleaved for one in alike}) > 1,
    }
    arguments = {argument for argument, is_open in differ.items() if is_open}
    texts = [_MEANING[argument] for argument in differ if argument in arguments]
    if differ["leaf"] and any(one.is_turned for one in found):
        texts[0] = _SQUARE
    for one in [one for one in found if not one.is_alike][:1]:
        texts.append(
            f"its layers may be nested as {one.flax.sizes} in Flax, and as "
            f"{one.haiku.sizes} in Haiku, which are not ported into one another: if "
            "so, port into a tree that is nested alike"
        )
    rules = tuple(_rules(group, one, arguments) for one in alike) if arguments else ()
    return Refusal(f"{_difference(group)}: {'; '.join(texts)}", True, rules)


def _rules(group: Group, one: Reading, arguments: set[str]) -> Arguments:
    """What to write for one reading: its values of these arguments."""
    found: Arguments = {}
    if "layer_axis" in arguments:
        found["layer_axis"] = dict.fromkeys(_scopes(group), one.flax.own_axes)
    if "interleave" in arguments and one.interleaved is not None:
        found["interleave"] = one.interleaved
    if "leaf" in arguments:
        name = "TRANSPOSED" if one.change.to_haiku is swapped else "SAME"
        patterns = _patterns([leaf.raw for leaf in group.flax])
        found["leaf"] = dict.fromkeys(patterns, f"hk_stack.port.{name}")
    return found


def unused(found: Sequence[Reading], said: Said) -> list[str]:
    """What to say of an axis for the whole tree, or an order, that nothing has."""
    lines = []
    for pattern, axes in said.layer_axis.rules.items():
        meant = axes if isinstance(axes, tuple) else (axes,)
        is_in_front = meant == tuple(range(len(meant)))
        if not is_in_front and not any(one.flax.own_axes == meant for one in found):
            lines.append(
                f"layer_axis: no layers are on axis {axes}; leave "
                f"{repr(pattern) if pattern else 'layer_axis'} out."
            )
    if said.interleave is not None and all(one.interleaved is None for one in found):
        lines.append(
            f"interleave={said.interleave}: no layers are both numbered and on an "
            "axis in one tree, and otherwise in the other; leave it out."
        )
    return lines
