"""Which leaves of the two trees are the same, and where each layer of them is.

Leaves whose names differ in numbers only are a *family*: `block_0/linear/w`,
`block_1/linear/w`, ... Families are paired by name. Where the numbers of a pair agree,
they tell modules apart; where they do not, they count layers, which the other tree
keeps on an axis. A pair thus falls into *moves*: some leaves of one tree, some of the
other, and the same layers in both.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hk_stack.port import names
from hk_stack.port.leaves import Leaf, Shape

Key = tuple[str, names.Path]  # Kind; bases of the modules and the leaf's name.
Numbers = tuple[int, ...]
Family = dict[Numbers, Leaf]


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
      axis: The first of the layer axes.
      sizes: Sizes of the layer axes; () if there are none.
      interleaved: Whether a step along the axes passes all numbered leaves, as in a
        scan over blocks of layers; otherwise each leaf is a stack of its own.
    """

    leaves: tuple[Leaf, ...]
    axis: int = 0
    sizes: Shape = ()
    interleaved: bool = True

    @property
    def num_layers(self) -> int:
        """All layers, on axes and by number."""
        return len(self.leaves) * math.prod(self.sizes)

    def place(self, layer: int) -> tuple[Leaf, tuple[int, ...]]:
        """The leaf that holds a layer, and the layer's index on the layer axes."""
        if self.interleaved:
            step, leaf = divmod(layer, len(self.leaves))
        else:
            leaf, step = divmod(layer, math.prod(self.sizes))
        return self.leaves[leaf], tuple(map(int, np.unravel_index(step, self.sizes)))

    def views(self, layer: int, arrays: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        """The pieces of a layer, as views of the arrays of a tree."""
        leaf, index = self.place(layer)
        at: tuple[Any, ...] = (slice(None),) * self.axis + index + (...,)
        return [arrays[piece.place][at] for piece in leaf.pieces]


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


class Options(NamedTuple):
    """What users may say; see `flax_to_haiku`."""

    leaf: names.Rules
    layer_axis: names.Rules
    interleave: bool | None


class Unfit(NamedTuple):
    """Leaves of one name that are not the same, and why."""

    flax: tuple[Leaf, ...]
    haiku: tuple[Leaf, ...]
    why: str


class Near(NamedTuple):
    """A renaming that would pair families of leaves, and how many."""

    old: str
    new: str
    hits: int


class Matched(NamedTuple):
    """What came of a match.

    Attributes:
      moves: Leaves that go from one tree to the other.
      unfit: Leaves of one name that do not fit.
      flax: Leaves of Flax that nothing in Haiku is named like.
      haiku: Leaves of Haiku that nothing in Flax is named like.
      near: Renamings that would pair more leaves, and how many, best first.
    """

    moves: list[Move]
    unfit: list[Unfit]
    flax: list[Leaf]
    haiku: list[Leaf]
    near: list[Near]


def match(flax: Sequence[Leaf], haiku: Sequence[Leaf], options: Options) -> Matched:
    """Pairs the leaves of the two trees."""
    pairs, near = _paired(flax, haiku)
    groups = [group for pair in pairs for group in pair.groups()]
    depths = _Depths(groups)
    moves: list[Move] = []
    unfit: list[Unfit] = []
    for group, axis in _with_axes(groups, depths, options):
        found = axis if isinstance(axis, str) else _fit(group, axis, depths, options)
        if isinstance(found, Move):
            moves.append(found)
            continue
        alone = [_fit(one, 0, depths, options) for one in group.alone()]
        if alone and all(isinstance(move, Move) for move in alone):
            moves += [move for move in alone if isinstance(move, Move)]
        else:
            unfit.append(Unfit(group.flax, group.haiku, found))
    used = {id(x) for m in moves for x in (*m.flax.leaves, *m.haiku.leaves)}
    used |= {id(x) for u in unfit for x in (*u.flax, *u.haiku)}
    return Matched(
        moves,
        unfit,
        [leaf for leaf in flax if id(leaf) not in used],
        [leaf for leaf in haiku if id(leaf) not in used],
        near,
    )


# Families and pairs of them


class _Group(NamedTuple):
    """Leaves that hold the same layers, in the order of the layers' numbers.

    Attributes:
      flax: Leaves by their numbers in the parts of the name that both trees have.
      haiku: The same.
    """

    flax: tuple[Leaf, ...]
    haiku: tuple[Leaf, ...]
    same: tuple[tuple[Leaf, Leaf], ...] = ()

    def alone(self) -> list["_Group"]:
        """Without numbers as layers: only what has the same numbers in both trees."""
        if len(self.flax) == len(self.haiku) == 1:
            return []
        return [_Group((a,), (b,)) for a, b in self.same]


class _Pair(NamedTuple):
    """Two families of one name.

    Attributes:
      flax: Leaves by the numbers in their names.
      haiku: The same.
      aligned: Which part of the one name is which of the other.
    """

    flax: Family
    haiku: Family
    aligned: tuple[tuple[int, int], ...]

    def groups(self) -> Iterator[_Group]:
        """Leaves of modules that differ in other numbers than those of layers."""
        same = [
            (i, j)
            for i, j in self.aligned
            if {n[i] for n in self.flax} == {n[j] for n in self.haiku}
        ]
        flax, haiku = self._split(same)
        for numbers in sorted(flax.keys() & haiku.keys()):
            yield self._group(flax[numbers], haiku[numbers])

    def _split(self, positions: Sequence[tuple[int, int]]) -> Any:
        """Both families by some of their numbers, each in the order of the rest."""
        both = []
        for side, family in enumerate((self.flax, self.haiku)):
            found: dict[Numbers, list[Numbers]] = collections.defaultdict(list)
            for numbers in sorted(family):
                found[tuple(numbers[p[side]] for p in positions)].append(numbers)
            both.append(found)
        return both

    def _group(self, flax: list[Numbers], haiku: list[Numbers]) -> _Group:
        theirs = {tuple(n[i] for i, _ in self.aligned): n for n in flax}
        ours = {tuple(n[j] for _, j in self.aligned): n for n in haiku}
        return _Group(
            tuple(self.flax[n] for n in flax),
            tuple(self.haiku[n] for n in haiku),
            tuple(
                (self.flax[theirs[n]], self.haiku[ours[n]])
                for n in theirs.keys() & ours.keys()
            ),
        )


def _families(leaves: Iterable[Leaf], spoken: bool = False) -> dict[Key, Family]:
    """Leaves by name. Where two have one name and number, neither has a place."""
    families: dict[Key, Family] = {}
    twice = set()
    for leaf in leaves:
        *module, name = leaf.spoken if spoken else leaf.path
        found = names.parts(module)
        key = (leaf.kind, (*(part.base for part in found), name))
        numbers = tuple(part.number for part in found)
        family = families.setdefault(key, {})
        if numbers in family:
            twice.add((key, numbers))
        family[numbers] = leaf
    for key, numbers in twice:
        del families[key][numbers]
    return {key: family for key, family in families.items() if family}


class _Renaming(NamedTuple):
    """The beginning of a name in Flax, and what it is in Haiku."""

    old: names.Path
    new: names.Path

    def of(self, key: Key) -> Key | None:
        kind, name = key
        if len(name) <= len(self.old) or name[: len(self.old)] != self.old:
            return None
        return kind, self.new + name[len(self.old) :]

    def aligned(self, name: names.Path) -> tuple[tuple[int, int], ...]:
        """Which part of Flax's name (without the leaf's) is which of Haiku's."""
        common = len(_beginning(self.old, self.new))
        rest = range(len(name) - 1 - len(self.old))
        after = ((len(self.old) + n, len(self.new) + n) for n in rest)
        return (*((n, n) for n in range(common)), *after)

    def hits(self, theirs: Iterable[Key], ours: Mapping[Key, Any]) -> list[Key]:
        """The families that it pairs."""
        return [key for key in theirs if (other := self.of(key)) and other in ours]

    def pairs_all(self, theirs: Iterable[Key], ours: Iterable[Key]) -> bool:
        """Whether it leaves nothing over of the scopes that it speaks of."""
        old = [key for key in theirs if self.of(key)]
        new = {key for key in ours if key[1][: len(self.new)] == self.new}
        return {self.of(key) for key in old} == new

    def drops_only(self) -> bool:
        """Whether one tree has just some more scopes in the name."""
        start = len(_beginning(self.old, self.new))
        old, new = self.old[start:], self.new[start:]
        end = len(_beginning(old[::-1], new[::-1]))
        return len(old) == end or len(new) == end


def _beginning(a: names.Path, b: names.Path) -> names.Path:
    """The longest common beginning."""
    pairs = itertools.takewhile(lambda p: p[0] == p[1], zip(a, b, strict=False))
    return tuple(x for x, _ in pairs)


def _paired(
    flax: Sequence[Leaf], haiku: Sequence[Leaf]
) -> tuple[list[_Pair], list[Near]]:
    """Families of one name, and renamings that would make more of them."""
    pairs: list[_Pair] = []
    ours = _families(haiku)
    theirs = _families(flax)

    def take(theirs: dict[Key, Family], renaming: _Renaming) -> None:
        for key in renaming.hits(theirs, ours):
            family = ours.pop(renaming.of(key))  # type: ignore[arg-type]
            pairs.append(_Pair(theirs.pop(key), family, renaming.aligned(key[1])))

    whole = _whole_tree(theirs, ours)
    take(theirs, whole)
    left = [leaf for family in theirs.values() for leaf in family.values()]
    # What looked like a module of Flax's may be one of the user's own.
    own = _families([leaf for leaf in left if leaf.spoken != leaf.path], spoken=True)
    take(own, whole)
    paired = {id(x) for pair in pairs for x in pair.flax.values()}
    theirs = _families([leaf for leaf in left if id(leaf) not in paired])
    while renaming := _scope_of_layers(theirs, ours):
        take(theirs, renaming)
    return pairs, _near(theirs, ours)


def _whole_tree(theirs: Iterable[Key], ours: Mapping[Key, Any]) -> _Renaming:
    """What modules around everything are called, which one tree may not have."""

    def around(keys: Iterable[Key]) -> names.Path:
        paths = [name[:-1] for _, name in keys]
        return functools.reduce(_beginning, paths) if paths else ()

    old, new = around(theirs), around(ours)
    choices = [
        _Renaming(old[:i], new[:j])
        for i in range(len(old) + 1)
        for j in range(len(new) + 1)
    ]
    choices.sort(key=lambda r: len(r.old) + len(r.new))
    return max(choices, key=lambda r: len(r.hits(theirs, ours)))


def _scope_of_layers(
    theirs: Mapping[Key, Family], ours: Mapping[Key, Family]
) -> _Renaming | None:
    """The scope of a stack that has another name in the other tree, if one will do.

    A scan is a module of its own in one tree and not in the other, where a loop may be
    around numbered modules. So scopes of layers may be left out where nothing is left
    over, or renamed where that pairs all that has no pair yet.
    """
    found: list[tuple[list[Key], _Renaming]] = []
    for renaming in _renamings(theirs, ours):
        hits = renaming.hits(theirs, ours)
        is_all = len(hits) == len(theirs) == len(ours)
        if (
            (is_all or renaming.drops_only())
            and renaming.pairs_all(theirs, ours)
            and any(_is_layered(theirs[k], ours[renaming.of(k)]) for k in hits)  # type: ignore[index]
        ):
            found.append((hits, renaming))
    if not found:
        return None
    most = max(len(hits) for hits, _ in found)
    best = [renaming for hits, renaming in found if len(hits) == most]
    best.sort(key=lambda r: len(r.old) + len(r.new))
    meant = {frozenset((k, r.of(k)) for k in r.hits(theirs, ours)) for r in best}
    return best[0] if len(meant) == 1 else None


def _renamings(theirs: Iterable[Key], ours: Iterable[Key]) -> list[_Renaming]:
    """Those that pair at least one family."""
    found: dict[_Renaming, None] = {}
    ours = list(ours)
    for kind, name in theirs:
        for other_kind, other in ours:
            if kind != other_kind:
                continue
            same = len(_beginning(name[::-1], other[::-1]))
            for end in range(1, same + 1):
                found[_Renaming(name[:-end], other[:-end])] = None
    return list(found)


def _is_layered(flax: Family, haiku: Family) -> bool:
    """Whether a pair of families is known to hold layers."""
    first, second = next(iter(flax.values())), next(iter(haiku.values()))
    depth = _depth(first, second)
    return len(flax) != len(haiku) or bool(depth)


def _near(theirs: Mapping[Key, Family], ours: Mapping[Key, Family]) -> list[Near]:
    """Renamings that would pair families, best first."""
    found = []
    for renaming in _renamings(theirs, ours):
        hits = renaming.hits(theirs, ours)
        flax, haiku = theirs[hits[0]], ours[renaming.of(hits[0])]  # type: ignore[index]
        old = _written(renaming.old, flax)
        new = _written(renaming.new, haiku, numbered=old.count("*"))
        found.append(Near(old, new, len(hits)))
    found.sort(key=lambda near: (-near.hits, len(near.old) + len(near.new)))
    return found


def _written(scope: names.Path, family: Family, numbered: int = 0) -> str:
    """A scope as a rule names it, with `*` where there are many numbers."""
    numbers, leaf = next(iter(family.items()))
    raw = [part for part in leaf.raw.split("/") if part != "~"][: len(scope)]
    several = [len({n[i] for n in family}) > 1 for i in range(len(numbers))]
    parts = [
        f"{re.sub('_[0-9]+$', '', part)}_*" if several[i] else part
        for i, part in enumerate(raw)
    ]
    missing = numbered - "/".join(parts).count("*")
    if parts and missing > 0:  # The numbers count layers, which have no name here.
        parts[-1] += "_*" * missing
    return "/".join(parts)


# Layers


class _Depths:
    """How many layer axes Haiku's leaves have, as far as that is known.

    A bias of Flax's has one axis in one layer of Haiku, so all axes before are of
    layers. Leaves of which nothing is known have the axes of those around them.
    """

    def __init__(self, groups: Iterable[_Group]):
        self._own: dict[int, int | None] = {}
        self._around: dict[names.Path, set[Shape]] = collections.defaultdict(set)
        for group in groups:
            leaf = group.haiku[0]
            depth = _depth(group.flax[0], leaf)
            self._own[id(leaf)] = depth
            if depth is not None:
                module = leaf.path[:-1]
                for i in range(len(module) + 1):
                    self._around[module[:i]].add(_shape(leaf)[:depth])

    def of(self, group: _Group) -> int | None:
        """The number of layer axes of a group's leaves in Haiku."""
        leaf = group.haiku[0]
        depth = self._own.get(id(leaf))
        if depth is not None:
            return depth
        for i in range(len(leaf.path) - 1, -1, -1):
            around = self._around.get(leaf.path[:i])
            if around:
                (sizes, *others) = around
                fits = not others and _shape(leaf)[: len(sizes)] == sizes
                return len(sizes) if fits else None
        return None


def _depth(flax: Leaf, haiku: Leaf) -> int | None:
    if len(haiku.pieces) > 1:
        return len(haiku.pieces[0].shape)  # A counter has no axes of its own.
    if flax.rank is None:
        return None
    depth = sum(size != 1 for size in _shape(haiku)) - flax.rank
    return depth if depth >= 0 else None


def _shape(leaf: Leaf) -> Shape:
    """With layer axes, for leaves of which the axes are in front."""
    return leaf.codec.shape([piece.shape for piece in leaf.pieces])


def _with_axes(
    groups: Sequence[_Group], depths: _Depths, options: Options
) -> Iterator[tuple[_Group, int | str]]:
    """Each group with its first layer axis in Flax, or why that is not clear."""
    fits: dict[str, list[set[int]]] = collections.defaultdict(list)
    for group in groups:
        if options.layer_axis.find(*_paths(group.flax[0])) is None:
            fits[group.flax[0].collection] += _axes(group, depths, options)
    for group in groups:
        leaf = group.flax[0]
        said = options.layer_axis.find(*_paths(leaf))
        yield group, said[0] if said else _axis(fits[leaf.collection], leaf.collection)


def _paths(leaf: Leaf) -> tuple[str, str]:
    """What rules for a leaf may say: its path, with the collection or without."""
    return leaf.raw, f"{leaf.collection}/{leaf.raw}"


def _axes(group: _Group, depths: _Depths, options: Options) -> list[set[int]]:
    """Layer axes with which a group fits, if it has any."""
    moves = {k: _fit(group, k, depths, options) for k in range(_MOST_AXES)}
    fitting = {k for k, move in moves.items() if isinstance(move, Move)}
    on_axes = [move for move in moves.values() if isinstance(move, Move)]
    return [fitting] if any(move.flax.sizes for move in on_axes) else []


_MOST_AXES = 4


def _axis(fits: Sequence[set[int]], collection: str) -> int | str:
    """The one axis with which all groups of a collection fit; 0 if there is none."""
    if not fits:
        return 0
    common = set.intersection(*fits)
    if len(common) == 1:
        return common.pop()
    if common:
        return (
            "its layers may be on "
            + " or ".join(f"axis {k}" for k in sorted(common))
            + f", as all sizes are equal; say layer_axis={min(common)} (what nn.scan "
            f'was given: variable_axes={{"{collection}": {min(common)}}})'
        )
    return max(range(_MOST_AXES), key=lambda k: (sum(k in fit for fit in fits), -k))


def _fit(group: _Group, axis: int, depths: _Depths, options: Options) -> Move | str:
    """How a group goes from one tree to the other, or why it does not."""
    depth = depths.of(group)
    reason = ""
    for flax_depth, haiku_depth in _candidates(depth):
        flax = _side(group.flax, axis, flax_depth)
        haiku = _side(group.haiku, 0, haiku_depth)
        if flax is None or haiku is None or flax.num_layers != haiku.num_layers:
            continue
        change = _change(flax, haiku, depth, options)
        if isinstance(change, str):
            reason = reason or change
        elif change is not None:
            return _ordered(Move(flax, haiku, change), options)
    return reason or _difference(group, axis, depth)


def _candidates(depth: int | None) -> list[tuple[int, int]]:
    """Numbers of layer axes in Flax and in Haiku, likely ones first."""
    some = range(_MOST_DEPTH + 1)
    if depth:
        return sorted(((d, depth) for d in some), key=lambda c: abs(c[0] - depth))
    return sorted(itertools.product(some, some), key=lambda c: (sum(c), c))


_MOST_DEPTH = 2


def _side(leaves: tuple[Leaf, ...], axis: int, depth: int) -> Side | None:
    """Leaves with `depth` layer axes from `axis` on; None if they have not so many."""
    axis = axis if depth else 0
    sizes = {p.shape[axis : axis + depth] for leaf in leaves for p in leaf.pieces}
    size, *others = sizes
    if others or len(size) < depth:
        return None
    return Side(leaves, axis, size)


def one_layer(side: Side) -> set[Shape]:
    """The shapes of one layer of a side."""
    shapes = set()
    for leaf in side.leaves:
        after = side.axis + len(side.sizes)
        rest = [p.shape[: side.axis] + p.shape[after:] for p in leaf.pieces]
        if min(map(len, rest)) < leaf.codec.rank:
            return set()
        shapes.add(leaf.codec.shape(rest))
    return shapes


def _ordered(move: Move, options: Options) -> Move | str:
    """`move`, if the order of its layers is clear."""
    for side in (move.flax, move.haiku):
        if len(side.leaves) > 1 and side.sizes:
            if options.interleave is None:
                return (
                    "its layers are both numbered and on an axis; say interleave=True "
                    "if a step along the axis runs all numbered modules (a scan over "
                    "blocks of layers), or False if each numbered module is a stack"
                )
            return move._replace(
                flax=move.flax._replace(interleaved=options.interleave),
                haiku=move.haiku._replace(interleaved=options.interleave),
            )
    return move


# Changes of one layer


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _swapped(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def _change(
    flax: Side, haiku: Side, depth: int | None, options: Options
) -> Change | str | None:
    """How one layer changes; None if it does not fit, text if that is not clear."""
    before, after = one_layer(flax), one_layer(haiku)
    if len(before) != 1 or len(after) != 1:
        return None
    (old,), (new,) = before, after
    leaf = flax.leaves[0]
    rule = options.leaf.find(*_paths(leaf))
    if rule is not None:
        return _by_rule(rule[0], old, new, leaf)
    if leaf.standard and leaf.raw.endswith("kernel") and len(old) == len(new) >= 3:
        return _convolution(leaf, haiku.leaves[0], old, new, depth)
    if old == new:
        return Change("", _same, _same)
    if _is_reshape(leaf, old, new):
        return Change("reshape", lambda x: x.reshape(new), lambda x: x.reshape(old))
    return None


def _by_rule(rule: Any, old: Shape, new: Shape, leaf: Leaf) -> Change | None:
    to_haiku, to_flax = rule
    found = np.shape(to_haiku(np.zeros(old, leaf.dtype)))
    return Change("rule", to_haiku, to_flax) if found == new else None


def _convolution(
    flax: Leaf, haiku: Leaf, old: Shape, new: Shape, depth: int | None
) -> Change | str | None:
    """Transposed convolutions have their last two axes the other way round."""
    said = {
        names.is_transposed_convolution(leaf.path[:-1]) for leaf in (flax, haiku)
    } - {None}
    swapped = (*old[:-2], old[-1], old[-2])
    if True in said:
        swap = Change("last axes swapped", _swapped, _swapped)
        return swap if swapped == new else None
    # Kernels of attention have three axes too, but the depth of theirs is known.
    is_sure = False in said or (depth is None and len(old) == 3)
    if old == new == swapped and not is_sure:
        return (
            "it may be a convolution or a transposed one, as its sizes are equal; say "
            f'leaf={{"{flax.raw}": hk_stack.port.SAME}} or hk_stack.port.TRANSPOSED'
        )
    return Change("", _same, _same) if old == new else None


def _is_reshape(leaf: Leaf, old: Shape, new: Shape) -> bool:
    if [n for n in old if n != 1] == [n for n in new if n != 1]:
        return True  # A norm keeps axes of size one in Haiku.
    if not leaf.standard or len(old) <= len(new):
        return False
    if len(new) == 1:
        return math.prod(old) == new[0]
    splits = ((math.prod(old[:i]), math.prod(old[i:])) for i in range(1, len(old)))
    return len(new) == 2 and new in splits


# What does not fit


def _difference(group: _Group, axis: int, depth: int | None) -> str:
    """Why the leaves of a group are not the same."""
    flax, haiku = group.flax[0], group.haiku[0]
    numbered = [
        f"{len(side)} numbered leaves in {name}"
        for side, name in ((group.flax, "Flax"), (group.haiku, "Haiku"))
        if len(side) > 1
    ]
    old, new = _shape(flax), _shape(haiku)
    text = f"shape {list(old)} in Flax, {list(new)} in Haiku"
    if numbered:
        text += f", with {' and '.join(numbered)}"
    if len(old) == len(new) and not numbered:
        axes = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        text += "".join(f"; axis {i} is {old[i]}, not {new[i]}" for i in axes)
        if (*old[:-2], *old[-1:-3:-1]) == new and flax.standard and len(old) > 2:
            text += (
                "; for a transposed convolution say "
                f'leaf={{"{flax.raw}": hk_stack.port.TRANSPOSED}}'
            )
    return text
