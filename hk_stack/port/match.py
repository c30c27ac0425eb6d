"""Which leaves of the two trees are the same.

Leaves whose names differ in numbers only are a *family*: `block_0/linear/w`,
`block_1/linear/w`, ... Families are paired by name. Where all modules of a scope have
the same numbers in both trees, numbers tell modules apart; where they do not, they
count layers, which the other tree keeps on an axis. So a pair falls into groups of
leaves that hold the same layers (`layers`).
"""

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from hk_stack.port import layers, names
from hk_stack.port.layers import Group, Move
from hk_stack.port.leaves import Leaf

Key = tuple[str, names.Path]  # Kind; bases of the modules and the leaf's name.
Numbers = tuple[int, ...]
Family = dict[Numbers, Leaf]


class Unfit(NamedTuple):
    """Leaves of one name that are not the same, and why."""

    flax: tuple[Leaf, ...]
    haiku: tuple[Leaf, ...]
    why: str


class Near(NamedTuple):
    """A renaming that would pair families of leaves, and how many.

    Attributes:
      old: The beginning of a path in Flax.
      new: What it is in Haiku.
      hits: How many families it pairs.
      is_sized: Whether leaves of one of them are of one size.
    """

    old: str
    new: str
    hits: int
    is_sized: bool


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


def match(
    flax: Sequence[Leaf], haiku: Sequence[Leaf], options: layers.Options
) -> Matched:
    """Pairs the leaves of the two trees."""
    pairs, near = _paired(flax, haiku)
    numbers = _Numbers(pairs)
    groups = [group for pair in pairs for group in pair.groups(numbers)]
    found: list[Move] = []
    unfit: list[Unfit] = []
    for group, move in zip(groups, layers.moves(groups, options), strict=True):
        if isinstance(move, Move):
            found.append(move)
            continue
        alone = [] if move.fits else list(layers.moves(group.alone(), options))
        if alone and all(isinstance(one, Move) for one in alone):
            found += [one for one in alone if isinstance(one, Move)]
        else:
            unfit.append(Unfit(group.flax, group.haiku, move.why))
    used = {id(x) for m in found for x in (*m.flax.leaves, *m.haiku.leaves)}
    used |= {id(x) for u in unfit for x in (*u.flax, *u.haiku)}
    return Matched(
        found,
        unfit,
        [leaf for leaf in flax if id(leaf) not in used],
        [leaf for leaf in haiku if id(leaf) not in used],
        near,
    )


# Families and pairs of them


class _Pair(NamedTuple):
    """Two families of one name.

    Attributes:
      flax: Leaves by the numbers in their names.
      haiku: The same.
      flax_name: The name without numbers in Flax.
      haiku_name: In Haiku, where scopes may be called otherwise.
      aligned: Which part of the one name is which of the other.
    """

    flax: Family
    haiku: Family
    flax_name: Key
    haiku_name: Key
    aligned: tuple[tuple[int, int], ...]

    def groups(self, numbers: "_Numbers") -> Iterator[Group]:
        """Leaves of modules that differ in other numbers than those of layers."""
        same = [pair for pair in self.aligned if numbers.are_same(self, pair)]
        flax = _split(self.flax, [i for i, _ in same])
        haiku = _split(self.haiku, [j for _, j in same])
        for at in sorted(flax.keys() & haiku.keys()):
            (first, *more), (other, *others) = flax[at], haiku[at]
            is_other = any(first[i] != other[j] for i, j in self.aligned)
            if more or others or not is_other:
                yield self._group(flax[at], haiku[at], numbers)

    def _group(
        self, flax: list[Numbers], haiku: list[Numbers], numbers: "_Numbers"
    ) -> Group:
        theirs = {tuple(n[i] for i, _ in self.aligned): n for n in flax}
        ours = {tuple(n[j] for _, j in self.aligned): n for n in haiku}
        both = sorted(theirs.keys() & ours.keys())
        if self.flax_name != self.haiku_name or _count_otherwise(theirs, ours):
            both = []  # Numbers are not known to be those of the same modules.
        group = Group(
            tuple(self.flax[n] for n in flax),
            tuple(self.haiku[n] for n in haiku),
            tuple((self.flax[theirs[n]], self.haiku[ours[n]]) for n in both),
        )
        holes = tuple(numbers.holes(self, flax, haiku))
        return group._replace(holes=holes)


def _count_otherwise(theirs: Iterable[Numbers], ours: Iterable[Numbers]) -> bool:
    """Whether numbers do not say of themselves which modules are the same.

    So it is where each tree has several numbers where the other has one, and where
    they have as many, but others: one counts from 0, the other from 1.
    """
    both = zip(zip(*theirs, strict=True), zip(*ours, strict=True), strict=True)
    counts = [(len(set(a)), len(set(b)), set(a) == set(b)) for a, b in both]
    if any(a == b > 1 and not are_same for a, b, are_same in counts):
        return True
    vary = {(a > 1, b > 1) for a, b, _ in counts}
    return vary >= {(True, False), (False, True)}


def _split(family: Family, positions: Sequence[int]) -> dict[Numbers, list[Numbers]]:
    """Numbers by some of them, in the order of all of them."""
    found: dict[Numbers, list[Numbers]] = collections.defaultdict(list)
    for numbers in sorted(family):
        found[tuple(numbers[i] for i in positions)].append(numbers)
    return found


class _Numbers:
    """The numbers that a scope has in each tree, in whatever leaf."""

    def __init__(self, pairs: Iterable[_Pair]):
        self._flax: dict[Key, set[int]] = collections.defaultdict(set)
        self._haiku: dict[Key, set[int]] = collections.defaultdict(set)
        for pair in pairs:
            _count(pair.flax_name, pair.flax, self._flax)
            _count(pair.haiku_name, pair.haiku, self._haiku)

    def are_same(self, pair: _Pair, position: tuple[int, int]) -> bool:
        """Whether a part of the name has the same numbers in both trees."""
        (kind, old), (_, new), (i, j) = pair.flax_name, pair.haiku_name, position
        return self._flax[kind, old[: i + 1]] == self._haiku[kind, new[: j + 1]]

    def holes(self, pair: _Pair, flax: list[Numbers], haiku: list[Numbers]) -> Any:
        """Names of the leaves that are missing for the numbers to count layers."""
        yield from _holes(pair.flax_name, flax, pair.flax, self._flax)
        yield from _holes(pair.haiku_name, haiku, pair.haiku, self._haiku)


def _holes(
    key: Key,
    numbers: Sequence[Numbers],
    family: Family,
    known: Mapping[Key, set[int]],
) -> Iterator[str]:
    (kind, name), count = key, len(numbers[0])
    for i in range(count):
        found = {n[i] for n in numbers}
        if len(found) > 1:
            several = range(max(known[kind, name[: i + 1]]) + 1)
            for number in sorted(set(several) - found):
                yield _renumbered(family[numbers[0]], i - count, number)


def _renumbered(leaf: Leaf, position: int, number: int) -> str:
    """The path of a leaf with another number in a part, counted from the end."""
    *_, name = leaf.raw.split("/")
    parts = _modules(leaf)
    parts[position] = re.sub("(_[0-9]+)?$", f"_{number}", parts[position], count=1)
    return "/".join((*parts, name))


def _modules(leaf: Leaf) -> list[str]:
    """The parts of a leaf's module, as its tree has them."""
    return [part for part in leaf.raw.split("/")[:-1] if part != "~"]


def _count(key: Key, family: Family, into: dict[Key, set[int]]) -> None:
    kind, name = key
    for numbers in family:
        for i, number in enumerate(numbers):
            into[kind, name[: i + 1]].add(number)


def _families(
    leaves: Iterable[Leaf],
    literal: frozenset[tuple[names.Part, ...]] = frozenset(),
    spoken: bool = False,
) -> dict[Key, Family]:
    """Leaves by name. Where two have one name and number, neither has a place."""
    families: dict[Key, Family] = {}
    twice = set()
    for leaf in leaves:
        *module, name = leaf.spoken if spoken else leaf.path
        found = names.parts(module, literal=True)
        found = found if found in literal else names.parts(module)
        key = (leaf.kind, (*(part.base for part in found), name))
        numbers = tuple(part.number for part in found)
        family = families.setdefault(key, {})
        if numbers in family:
            twice.add((key, numbers))
        family[numbers] = leaf
    for key, numbers in twice:
        del families[key][numbers]
    return {key: family for key, family in families.items() if family}


def _to_tell_apart(haiku: Iterable[Leaf]) -> frozenset[tuple[names.Part, ...]]:
    """Modules of Haiku that have a name of their own only as it is written.

    `conv1_d` and `conv2_d` are both the first convolution of their kind.
    """
    written: dict[Any, set[tuple[names.Part, ...]]] = collections.defaultdict(set)
    for leaf in haiku:
        module = leaf.path[:-1]
        key = leaf.kind, names.parts(module), leaf.path[-1]
        written[key].add(names.parts(module, literal=True))
    several = (found for found in written.values() if len(found) > 1)
    return frozenset(itertools.chain.from_iterable(several))


def _stripped(families: dict[Key, Family], length: int) -> dict[Key, Family]:
    """Without the first parts of all names, unless these count something."""
    first = {n[:length] for family in families.values() for n in family}
    if len(first) > 1:
        return families
    return {
        (kind, name[length:]): {n[length:]: leaf for n, leaf in family.items()}
        for (kind, name), family in families.items()
    }


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
        rest = range(len(name) - 1 - len(self.old))
        after = ((len(self.old) + n, len(self.new) + n) for n in rest)
        return (*_common_parts(self.old, self.new), *after)

    def mapping(self, theirs: Iterable[Key], ours: Iterable[Key]) -> dict[Key, Key]:
        """The families that it pairs."""
        there = set(ours)
        both = ((key, self.of(key)) for key in theirs)
        return {key: other for key, other in both if other and other in there}

    def pairs_all(self, theirs: Iterable[Key], ours: Iterable[Key]) -> bool:
        """Whether it leaves nothing over of the scopes that it speaks of."""
        old = [key for key in theirs if self.of(key)]
        new = {key for key in ours if key[1][: len(self.new)] == self.new}
        return {self.of(key) for key in old} == new

    def drops_only(self) -> bool:
        """Whether one tree has just some more scopes in the name."""
        common = _common_parts(self.old, self.new)
        return len(common) == min(len(self.old), len(self.new))

    def is_of_no_name(self) -> bool:
        """Whether it renames a scope that has the name of its class only."""
        start = len(names.beginning(self.old, self.new))
        old, new = self.old[start:], self.new[start:]
        return any(name.startswith(_OF_CLASSES) for name in (*old[:1], *new[:1]))


def _common_parts(old: names.Path, new: names.Path) -> list[tuple[int, int]]:
    """Parts that two names have both, in their order."""
    short, long = sorted((old, new), key=len)
    pairs = []
    start = 0
    for i, part in enumerate(short):
        if part in long[start:]:
            start = long.index(part, start) + 1
            pairs.append((i, start - 1))
    return pairs if short is old else [(j, i) for i, j in pairs]


# Of Flax's transforms, and of Haiku's stacks.
_OF_CLASSES = ("scan_", "vmap_", "remat_", "checkpoint_", "__layer_stack_")


def _paired(
    flax: Sequence[Leaf], haiku: Sequence[Leaf]
) -> tuple[list[_Pair], list[Near]]:
    """Families of one name, and renamings that would make more of them."""
    pairs: list[_Pair] = []
    literal = _to_tell_apart(haiku)
    theirs, ours = _families(flax, literal), _families(haiku, literal)
    old, new = _around_everything(theirs, ours)
    theirs, ours = _stripped(theirs, old), _stripped(ours, new)

    def take(theirs: dict[Key, Family], renaming: _Renaming) -> None:
        for key, other in renaming.mapping(theirs, ours).items():
            both = theirs.pop(key), ours.pop(other)
            pairs.append(_Pair(*both, key, other, renaming.aligned(key[1])))

    same = _Renaming((), ())
    take(theirs, same)
    # What looked like a module of Flax's may be one of the user's own.
    left = [leaf for family in theirs.values() for leaf in family.values()]
    left = [leaf for leaf in left if leaf.spoken != leaf.path]
    take(_stripped(_families(left, literal, spoken=True), old), same)
    paired = {id(x) for pair in pairs for x in pair.flax.values()}
    theirs = {
        key: family
        for key, family in theirs.items()
        if not any(id(leaf) in paired for leaf in family.values())
    }
    is_only = not any(_is_layered(pair.flax, pair.haiku) for pair in pairs)
    done = {
        (name[0], name[1][:-1])
        for pair in pairs
        for name in (pair.flax_name, pair.haiku_name)
    }
    while renaming := _scope_of_layers(theirs, ours, done, is_only):
        take(theirs, renaming)
    return pairs, _near(theirs, ours)


def _around_everything(
    theirs: Iterable[Key], ours: Mapping[Key, Any]
) -> tuple[int, int]:
    """How many modules are around everything in one tree and not in the other."""

    def around(keys: Iterable[Key]) -> names.Path:
        paths = [name[:-1] for _, name in keys]
        return functools.reduce(names.beginning, paths) if paths else ()

    old, new = around(theirs), around(ours)
    choices = [_Renaming(old[:i], ()) for i in range(len(old) + 1)]
    choices += [_Renaming((), new[:j]) for j in range(len(new) + 1)]
    choices.sort(key=lambda r: len(r.old) + len(r.new))
    best = max(choices, key=lambda r: len(r.mapping(theirs, ours)))
    return len(best.old), len(best.new)


def _scope_of_layers(
    theirs: Mapping[Key, Family],
    ours: Mapping[Key, Family],
    done: Set[Key],
    is_only: bool,
) -> _Renaming | None:
    """The scope of a stack that has another name in the other tree, if one will do.

    A scan is a module of its own in one tree and not in the other, where a loop may be
    around numbered modules. So scopes of layers may be left out, and renamed if nobody
    named them (`ScanBlock_0`) or each tree has no other stack but the one right there,
    where nothing is left over of either.
    """
    found: list[tuple[dict[Key, Key], _Renaming]] = []
    for renaming in _renamings(theirs, ours):
        hits = renaming.mapping(theirs, ours)
        if any((kind, name[:-1]) in done for kind, name in (*hits, *hits.values())):
            continue  # A module that has its namesake has no other partner.
        inside = [name[len(renaming.old) : -1] for _, name in hits]
        is_all = is_only and len(hits) == len(theirs) == len(ours)
        # `encoder/layers` is not `decoder/layers`, even if there is no other stack.
        is_all = is_all and not functools.reduce(names.beginning, inside)
        if (
            (is_all or renaming.drops_only() or renaming.is_of_no_name())
            and renaming.pairs_all(theirs, ours)
            and any(_is_layered(theirs[a], ours[b]) for a, b in hits.items())
        ):
            found.append((hits, renaming))
    found.sort(key=lambda f: (-len(f[0]), len(f[1].old) + len(f[1].new)))
    for hits, renaming in found:
        rivals = [other for other, _ in found if len(other) >= len(hits)]
        if not any(_are_rivals(hits, other) for other in rivals):
            return renaming
    return None


def _are_rivals(one: dict[Key, Key], other: dict[Key, Key]) -> bool:
    """Whether two choices pair one family with different ones."""
    there = {value: key for key, value in other.items()}
    return any(
        other.get(key, value) != value or there.get(value, key) != key
        for key, value in one.items()
    )


def _renamings(theirs: Iterable[Key], ours: Iterable[Key]) -> list[_Renaming]:
    """Those that pair at least one family."""
    found: dict[_Renaming, None] = {}
    ours = list(ours)
    for kind, name in theirs:
        for other_kind, other in ours:
            if kind != other_kind:
                continue
            same = len(names.beginning(name[::-1], other[::-1]))
            for end in range(1, same + 1):
                found[_Renaming(name[:-end], other[:-end])] = None
    return list(found)


def _is_layered(flax: Family, haiku: Family) -> bool:
    """Whether a pair of families is known to hold layers."""
    first, second = next(iter(flax.values())), next(iter(haiku.values()))
    depth = layers.layer_axes(first, second)
    return len(flax) != len(haiku) or bool(depth)


def _near(theirs: Mapping[Key, Family], ours: Mapping[Key, Family]) -> list[Near]:
    """Renamings that would pair families, best first, as one would write them."""
    found: dict[tuple[str, str], Near] = {}
    for renaming in _renamings(theirs, ours):
        hits = renaming.mapping(theirs, ours)
        key, other = next(iter(hits.items()))
        flax, haiku = theirs[key], ours[other]
        sized = [
            x for x in haiku.values() if x.num_elements == _first(flax).num_elements
        ]
        after = len(key[1]) - len(renaming.old)
        old, new = _written(flax, sized[0] if sized else _first(haiku), after)
        if new and new != old:
            near = Near(old, new, len(hits), bool(sized))
            found[old, new] = max(
                near, found.get((old, new), near), key=lambda n: (n.hits, n.is_sized)
            )
    return sorted(
        found.values(), key=lambda n: (-n.hits, not n.is_sized, len(n.old + n.new))
    )


def _first(family: Family) -> Leaf:
    return next(iter(family.values()))


def _written(flax: Family, haiku: Leaf, after: int) -> tuple[str, str]:
    """A rule for all but the last parts of two names, with `*` for layers' numbers.

    Args:
      flax: A family in Flax.
      haiku: A leaf of the one in Haiku.
      after: How many parts, the leaf's own included, are the same in both.
    """
    leaf = _first(flax)
    old, new = ([*_modules(x), ""] for x in (leaf, haiku))
    old, new = old[: len(old) - after], new[: len(new) - after]
    numbers = list(zip(*flax, strict=True))[: len(old)]
    around = len(_modules(leaf)) - len(next(iter(flax)))
    for i, found in enumerate(numbers, start=around):
        if len(set(found)) > 1 and i < len(old):
            base = _base(old[i])
            old[i] = f"{base}_*"
            same = [j for j, part in enumerate(new) if _base(part) == base]
            if new:
                j = same[0] if same else len(new) - 1
                new[j] = f"{_base(new[j])}_*"
    is_alike = "/".join(old).count("*") == "/".join(new).count("*")
    return ("/".join(old), "/".join(new)) if is_alike else ("", "")


def _base(part: str) -> str:
    return re.sub("_[0-9]+$", "", part)
