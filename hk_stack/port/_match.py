"""Which leaves of the two trees are the same.

Leaves whose names differ in numbers only are a *family*: `block_0/linear/w`,
`block_1/linear/w`, ... Families are paired by name. Where all modules of a scope have
the same numbers in both trees, numbers tell modules apart; where they do not, they
count layers, which the other tree keeps on an axis.
"""

import collections
import itertools
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from hk_stack.port import _layers, _names
from hk_stack.port._codecs import Leaf
from hk_stack.port._layers import Group, Reading, Refusal
from hk_stack.port._names import Module, Path
from hk_stack.port._rules import Said

Key = tuple[str, Path]  # Kind; bases of the modules, and the leaf's name.
Numbers = tuple[int, ...]
Family = dict[Numbers, Leaf]
Families = dict[Key, Family]


class Matched(NamedTuple):
    """What goes, what does not fit, what is left over, and renamings to propose."""

    moves: list[Reading]
    unfit: list[tuple[Group, Refusal]]
    flax: list[Leaf]
    haiku: list[Leaf]
    renames: dict[str, str]


def match(flax: Sequence[Leaf], haiku: Sequence[Leaf], said: Said) -> Matched:
    """Pairs the leaves of the two trees."""
    theirs, ours = _named_alike(flax, haiku)
    groups = list(_groups(theirs, ours))
    moves: list[Reading] = []
    unfit: list[tuple[Group, Refusal]] = []
    every = _layers.read([group for group, _ in groups], said)
    is_turned = any(found.is_turned for found in every)
    for (group, alone), found in zip(groups, every, strict=True):
        if isinstance(found, Reading):
            moves.append(found)
            continue
        # Numbers that count no layers tell modules apart, some of which are missing.
        apart = [] if found.fits else _layers.read(alone, said, is_turned)
        fits = [one for one in apart if isinstance(one, Reading)]
        moves += fits if len(fits) == len(apart) else []
        if not apart or len(fits) < len(apart):
            unfit.append((group, found))
    used = {id(x) for m in moves for x in (*m.flax.leaves, *m.haiku.leaves)}
    used |= {id(x) for group, _ in unfit for x in (*group.flax, *group.haiku)}
    left = [[leaf for leaf in side if id(leaf) not in used] for side in (flax, haiku)]
    return Matched(moves, unfit, left[0], left[1], _proposed(theirs, ours))


def _named_alike(
    flax: Sequence[Leaf], haiku: Sequence[Leaf]
) -> tuple[Families, Families]:
    """Families, without the modules that are around everything in one tree only."""
    literal = _ambiguous(flax) | _ambiguous(haiku)
    theirs, ours = _families(flax, literal), _families(haiku, literal)
    for i in range(max((len(name) for _, name in (*theirs, *ours)), default=0)):
        for old, new in ((_inside(theirs, i), ours), (theirs, _inside(ours, i))):
            if _tops(old) & _tops(new):
                return old, new
    return theirs, ours


def _module(leaf: Leaf, literal: bool = False) -> Module:
    return _names.parts(leaf.path[:-1], literal)


def _ambiguous(leaves: Sequence[Leaf]) -> set[Hashable]:
    """Names of modules, and of leaves, that several in one tree have.

    `conv1_d` and `conv2_d` are both a first convolution, `b` and `offset` both a bias:
    only what is written the same in both trees tells them apart.
    """
    modules: dict[Hashable, set[Hashable]] = collections.defaultdict(set)
    names: dict[Hashable, set[Hashable]] = collections.defaultdict(set)
    keys = [(leaf.name, _module(leaf, True), leaf.path[-1]) for leaf in leaves]
    for name, literal, written in keys:
        modules[name].add(literal)
        names[name, literal].add(written)
    found: set[Hashable] = {name[:2] for name, *_ in keys if len(modules[name]) > 1}
    return found | {name for name, at, _ in keys if len(names[name, at]) > 1}


def _families(leaves: Iterable[Leaf], ambiguous: Set[Hashable]) -> Families:
    """Leaves by name. Where two have one name and number, neither has a place."""
    families: Families = collections.defaultdict(dict)
    twice = []
    for leaf in leaves:
        kind, module, name = own = leaf.name
        if (kind, module) in ambiguous:
            module, name = _module(leaf, True), f"{name} as written"
        if own in ambiguous:
            name = f"{leaf.path[-1]} as written"
        family = families[kind, (*(part.base for part in module), name)]
        numbers = tuple(part.number for part in module)
        if family.setdefault(numbers, leaf) is not leaf:
            twice.append((family, numbers))
    for family, numbers in twice:
        family.pop(numbers, None)
    return {key: family for key, family in families.items() if family}


def _tops(families: Families) -> set[str]:
    return {name[0] for _, name in families if len(name) > 1}


def _inside(families: Families, length: int) -> Families:
    """Without the first parts of all names; nothing if these are not all the same."""
    first = {
        (name[:-1][:length], numbers[:length])
        for (_, name), family in families.items()
        for numbers in family
    }
    if len(first) != 1 or len(first.pop()[0]) < length:
        return {}
    return {
        (kind, name[length:]): {n[length:]: leaf for n, leaf in family.items()}
        for (kind, name), family in families.items()
    }


# Numbers


def _groups(theirs: Families, ours: Families) -> Iterator[tuple[Group, list[Group]]]:
    """Leaves that hold the same layers; and if they hold none, which are the same."""
    flax, haiku = _numbers(theirs), _numbers(ours)
    for key in [key for key in theirs if key in ours]:
        name = key[1]
        scopes = [(name[:i], i - 1) for i in range(1, len(name))]
        numbers = [(flax[at], haiku[at]) for at in scopes]
        same = [i for i, (one, other) in enumerate(numbers) if one == other]
        is_part = all(one <= other or other <= one for one, other in numbers)
        old, new = _split(theirs[key], same), _split(ours[key], same)
        for at in sorted(old.keys() & new.keys()):
            one, other = old[at], new[at]
            both, sizes = [n for n in one if n in other], {len(one), len(other)}
            alone = [Group((one[n],), (other[n],)) for n in both if is_part]
            if not _may_count(one, other):
                yield from ((group, []) for group in alone)
            elif both or sizes != {1}:
                holes = _holes(one) or _holes(other)
                group = Group(tuple(one.values()), tuple(other.values()), holes)
                # Numbers of two loops that only overlap may be of other modules.
                yield group, alone if len(both) == min(sizes) < max(sizes) else []


def _may_count(flax: Family, haiku: Family) -> bool:
    """Whether numbers are the same, or may count the layers that the other tree has.

    A module that is alone and has a number is none of these: `norm_1` is no `norm`.
    """
    columns = zip(zip(*flax, strict=True), zip(*haiku, strict=True), strict=True)
    pairs = [(set(one), set(other)) for one, other in columns]
    return all(a == b or all(x == {0} or len(x) > 1 for x in (a, b)) for a, b in pairs)


def _numbers(families: Families) -> dict[tuple[Path, int], set[int]]:
    """The numbers that each scope has, in whatever leaf."""
    found: dict[tuple[Path, int], set[int]] = collections.defaultdict(set)
    for (_, name), family in families.items():
        for numbers in family:
            for i, number in enumerate(numbers):
                found[name[: i + 1], i].add(number)
    return found


def _split(family: Family, places: Sequence[int]) -> dict[Numbers, Family]:
    """A family by some of its numbers, in the order of all of them."""
    found: dict[Numbers, Family] = collections.defaultdict(dict)
    for numbers in sorted(family):
        found[tuple(numbers[i] for i in places)][numbers] = family[numbers]
    return found


def _holes(family: Family) -> str:
    """What is missing for the numbers to count layers."""
    ranges = [range(min(n), max(n) + 1) for n in zip(*family, strict=True)]
    missing = [n for n in itertools.product(*ranges) if n not in family]
    if not missing:
        return ""
    there, gone = (
        ", ".join(
            "/".join(str(n) for n, r in zip(x, ranges, strict=True) if len(r) > 1)
            for x in several
        )
        for several in (family, missing[:8])
    )
    name = _names.starred([leaf.raw for leaf in family.values()])
    return f"layers are missing: {name} has the numbers {there}, not {gone}"


# Renamings to propose


def _proposed(theirs: Families, ours: Families) -> dict[str, str]:
    """Renamings for what is left over: to the one of its size that is most like it."""
    done = [name for (kind, name) in theirs if (kind, name) in ours]
    rest = {key: _size(family) for key, family in ours.items() if key not in theirs}
    rules: dict[str, str] = {}
    for key in [key for key in theirs if key not in ours]:
        kind, size = key[0], _size(theirs[key])
        sized = [other for other in rest if (other[0], rest[other]) == (kind, size)]
        alike = {other: _names.common_end(key[1], other[1]) for other in sized}
        most = max(alike.values(), default=0)
        found = [other for other, count in alike.items() if count == most > 0]
        while most and any(
            name[: len(key[1]) - most] == key[1][:-most] for name in done
        ):
            most -= 1  # What has a namesake stays where it is.
        if len(found) == 1 and most:
            del rest[found[0]]
            pair = (key, theirs[key]), (found[0], ours[found[0]])
            if rule := _rule(pair, most):
                rules.setdefault(*rule)
    return rules


def _size(family: Family) -> int:
    return sum(math.prod(leaf.shape) for leaf in family.values())


def _rule(pair: Sequence[tuple[Key, Family]], count: int) -> list[str]:
    """What to rename to what: all but the last parts of names, `*` for layers."""
    around, scopes = [], []
    for (_, name), family in pair:
        leaves = list(family.values())
        around.append(leaves[0].path[: len(_module(leaves[0])) + 1 - len(name)])
        scopes.append([_names.without_end(x.raw[:-1], count - 1) for x in leaves])
    # What is around one tree only is taken from there, and added to names here.
    old, new = scopes
    new = [(*around[0], *path[len(around[1]) :]) for path in new]
    rule, other = _names.starred(old), _names.starred(new)
    if rule.count("*") == 1 == other.count("*"):
        # Numbers at other depths may be those of blocks in one tree, stages in one.
        depths = {len(_names.parts(paths[0])) for paths in (old, new)}
        return [rule, other] if len(depths) == 1 else []
    if rule.count("*") == 1 and new[0]:
        return [rule, re.sub("(_[0-9]+)?$", "_*", other, count=1)]
    return [] if "*" in rule else [rule, other.replace("_*", "")]
