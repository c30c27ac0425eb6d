"""What goes where: the readable plan of a port, and what is wrong with it."""

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import jax.numpy as jnp

from hk_stack import _table
from hk_stack._table import Shown, Table
from hk_stack.port import layers, leaves, match, names


class Row(NamedTuple):
    """One line of a plan.

    Attributes:
      flax: Flax's leaf, or several.
      haiku: Haiku's.
      change: How it changes on its way; "" if it does not.
      shape: The shape of one layer before and after.
      status: "ok", or what is wrong: "differs", "dtype", "kind", "unused" (a leaf of
        Flax that Haiku has no place for), "missing" (the other way round), "ignored".
      why: What is wrong, in words.
    """

    flax: str
    haiku: str
    change: str
    shape: str
    status: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Plan(Shown):
    """What goes where.

    Attributes:
      rows: All leaves of both trees.
      moves: Those that can go.
      near: Renamings that would pair more leaves.
      unused_rules: Rules that fit nothing.
      has_state: Whether there is something else than parameters, in Flax and in Haiku.
      ignore: What to ignore, for what is left over.
      rename: The renamings that were given.
    """

    rows: tuple[Row, ...]
    moves: tuple[layers.Move, ...]
    near: tuple[match.Near, ...]
    unused_rules: tuple[str, ...]
    has_state: tuple[bool, bool]
    ignore: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every leaf of both trees is used, exactly once, or ignored."""
        good = all(row.status in ("ok", "ignored") for row in self.rows)
        return good and not self.unused_rules

    def _parts(self) -> Iterator[str | Table]:
        yield self.headline()
        rows = [[*_cells(row), row.status] for row in self.rows]
        is_good = [row.status in ("ok", "ignored") for row in self.rows]
        yield Table(_TITLES, rows, styles=["" if ok else "bold red" for ok in is_good])
        yield from self.problems()

    def headline(self) -> str:
        """How much of both trees goes where, in one line."""
        moved = [[p for x in m.flax.leaves for p in x.pieces] for m in self.moves]
        made = [[p for x in m.haiku.leaves for p in x.pieces] for m in self.moves]
        nbytes = sum(piece.nbytes for pieces in made for piece in pieces)
        bad = [row for row in self.rows if row.status not in ("ok", "ignored")]
        end = f"; {len(bad)} rows need a look" if bad else ""
        return (
            f"{sum(map(len, moved))} leaves of Flax -> {sum(map(len, made))} leaves of "
            f"Haiku, {_table.si(nbytes)}B{end}"
        )

    def problems(self, what: str = "flax_to_haiku", most: int = 12) -> list[str]:
        """What is wrong and what to write, a line each.

        Args:
          what: The function to call.
          most: How many rows of a kind to name.
        """
        lines = []
        for status, title in _TITLES_OF_PROBLEMS.items():
            rows = [row for row in self.rows if row.status == status]
            if rows:
                lines.append(f"{title} ({len(rows)}):")
            for why, group in itertools.groupby(rows[:most], key=lambda row: row.why):
                for row in group:
                    sides = (name for name in (row.flax, row.haiku) if name)
                    lines.append(f"  {' -> '.join(sides)}")
                lines[-1] += f": {why}" if why else ""
            if len(rows) > most:
                lines.append(f"  and {len(rows) - most} more")
        lines += self.unused_rules
        lines += [] if self.ok else [*self._calls(what), *self._without_state()]
        return lines

    def _calls(self, what: str) -> list[str]:
        """What to write for leaves that are left over: renamings, or to ignore them."""
        if not self.ignore:
            return []
        source = "variables" if what == "flax_to_haiku" else "params_and_state"
        call = f"{what}({source}, like, "
        ignore = ", ".join(f'"{path}"' for path in self.ignore)
        lines = [f"To leave these as they are: {call}ignore=[{ignore}])"]
        if not self.near:
            return [*lines, "No rename= of a path would pair them with one another."]
        old, new, hits, _ = self.near[0]
        rules = dict([*self.rename, (old, new)])
        rename = ", ".join(f'"{a}": "{b}"' for a, b in rules.items())
        count = f"{hits} more names" if hits > 1 else "one more name"
        return [
            f"To match {count}, if all fits: {call}rename={{{rename}}})",
            *lines,
        ]

    def _without_state(self) -> list[str]:
        """What to give if one tree has no state at all."""
        if self.has_state == (False, True):
            return ['The variables hold parameters only, no "batch_stats".']
        if self.has_state == (True, False):
            return ["There is no state in Haiku's tree: give (params, state)."]
        return []


_TITLES = ["Flax", "Haiku", "change", "shape", "status"]
_TITLES_OF_PROBLEMS = {
    "differs": "of one name, but not the same",
    "dtype": "of another dtype; cast=True converts",
    "kind": "of another kind of number, which nothing converts",
    "unused": "in Flax only",
    "missing": "in Haiku only",
}


class Rules(NamedTuple):
    """What users say of leaves that are left over.

    Attributes:
      rename: Renamings.
      ignore: Patterns of leaves that may be left over.
      unused: What to say of rules that fit nothing.
    """

    rename: names.Rules
    ignore: names.Rules
    unused: Sequence[str]


def of_match(
    found: match.Matched,
    flax: Sequence[leaves.Leaf],
    haiku: Sequence[leaves.Leaf],
    rules: Rules,
    *,
    cast: bool,
) -> Plan:
    """The plan of a match.

    Args:
      found: The match.
      flax: All leaves of Flax.
      haiku: All leaves of Haiku.
      rules: The user's.
      cast: Whether dtypes may change.
    """
    ignore = rules.ignore
    rows = []
    moves = []
    for move in sorted(found.moves, key=lambda m: m.flax.leaves[0].pieces[0].place):
        row = _moved(move, cast)
        rows.append(row)
        if row.status == "ok":
            moves.append(move)
    for unfit in found.unfit:
        both = (*unfit.flax, *unfit.haiku)
        is_ignored = all(ignore.find(*leaf.paths) for leaf in both)
        status, why = ("ignored", "") if is_ignored else ("differs", unfit.why)
        rows.append(Row(_all(unfit.flax), _all(unfit.haiku), "", "", status, why))
    rows += _left_over(found.flax, found.haiku, ignore, "unused")
    rows += _left_over(found.haiku, found.flax, ignore, "missing")
    return Plan(
        tuple(rows),
        tuple(moves),
        tuple(found.near),
        tuple(rules.unused),
        (_has_state(flax), _has_state(haiku)),
        _to_ignore([*found.flax, *found.haiku], [*flax, *haiku], ignore),
        tuple(rules.rename.rules.items()),
    )


def _to_ignore(
    left: Sequence[leaves.Leaf], everything: Sequence[leaves.Leaf], ignore: names.Rules
) -> tuple[str, ...]:
    """The shortest beginnings of the paths of leaves that are left over, and no others.

    With those that are ignored already; empty if nothing else is left over.
    """
    places = {id(leaf) for leaf in left}
    used = {
        path[:i]
        for leaf in everything
        if id(leaf) not in places and not ignore.find(*leaf.paths)
        for path in [tuple(leaf.paths[1].split("/"))]
        for i in range(len(path) + 1)
    }
    rest = [leaf.paths[1].split("/") for leaf in left if not ignore.find(*leaf.paths)]
    found = dict.fromkeys(_shortest(tuple(path), used) for path in rest)
    return (*ignore.rules, *found) if found else ()


def _shortest(path: names.Path, used: Set[names.Path]) -> str:
    """The shortest beginning of a path that no other path has, with its collection."""
    lengths = range(min(2, len(path)), len(path))
    free = (path[:i] for i in lengths if path[:i] not in used)
    return "/".join(next(free, path))


def _has_state(several: Sequence[leaves.Leaf]) -> bool:
    return any(leaf.kind == "state" for leaf in several)


def _moved(move: layers.Move, cast: bool) -> Row:
    flax, haiku = move.flax.leaves, move.haiku.leaves
    status, why = "ok", ""
    labels = [x.codec.label for x in (flax[0], haiku[0])] + [move.change.label]
    old, new = (set().union(*(x.dtypes for x in s)) for s in (flax, haiku))
    if len(old | new) > 1:
        text = [", ".join(sorted(map(str, dtypes))) for dtypes in (old, new)]
        labels.append(f"{text[0]} -> {text[1]}")
        if not all(is_castable(a, b) for a in old for b in new):
            status, why = "kind", f"{text[0]} in Flax, {text[1]} in Haiku"
        elif not cast:
            status, why = "dtype", f"{text[0]} in Flax, {text[1]} in Haiku"
    labels.append(_layers(move))
    before, after = move.flax.one_layer(), move.haiku.one_layer()
    assert before is not None and after is not None
    shape = str(list(after)) if before == after else f"{list(before)} -> {list(after)}"
    change = ", ".join(label for label in labels if label)
    return Row(_all(flax), _all(haiku), change, shape, status, why)


def is_castable(old: Any, new: Any) -> bool:
    """Whether two dtypes are of one kind: across kinds, casts lose what is meant."""
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer)
    return any(jnp.issubdtype(old, k) and jnp.issubdtype(new, k) for k in kinds)


def _layers(move: layers.Move) -> str:
    flax, haiku = move.flax, move.haiku
    is_whole = len(flax.leaves) == len(haiku.leaves) == 1 and move.is_in_order
    if flax.num_layers == 1 or is_whole:
        return ""
    return f"{flax.num_layers} layers {_where(flax)} -> {_where(haiku)}"


def _where(side: layers.Side) -> str:
    if not side.sizes:
        return "by name"
    by_name = "by name and " if len(side.leaves) > 1 else ""
    return f"{by_name}on axis {', '.join(map(str, side.axes))}"


def _all(several: Sequence[leaves.Leaf]) -> str:
    more = f" (and {len(several) - 1} more)" if len(several) > 1 else ""
    return f"{several[0]}{more}"


def _left_over(
    left: Sequence[leaves.Leaf],
    others: Sequence[leaves.Leaf],
    ignore: names.Rules,
    status: str,
) -> Iterator[Row]:
    same: dict[Any, list[leaves.Leaf]] = {}
    for leaf in left:
        same.setdefault(_name(leaf), []).append(leaf)
    for i, leaf in enumerate(left):
        is_ignored = ignore.find(*leaf.paths) is not None
        why = ""
        # To compare each with each takes long, and nobody reads that much.
        if not is_ignored and i < _MOST_COMPARED:
            twins = [other for other in same[_name(leaf)] if other is not leaf]
            why = _twice(leaf, twins) if twins else _nearest(leaf, others)
        sides = (str(leaf), "") if status == "unused" else ("", str(leaf))
        yield Row(*sides, "", "", "ignored" if is_ignored else status, why)


_MOST_COMPARED = 48


def _name(leaf: leaves.Leaf) -> tuple[Any, ...]:
    """What a leaf is matched by."""
    return leaf.kind, names.parts(leaf.path[:-1]), leaf.path[-1]


def _twice(leaf: leaves.Leaf, twins: Sequence[leaves.Leaf]) -> str:
    _, module, name = _name(leaf)
    path = "/".join(part.base for part in module)
    return (
        f"{', '.join(map(str, twins))} would have its name in Haiku too, "
        f"{path}/{name}; rename one of them"
    )


def _nearest(leaf: leaves.Leaf, others: Sequence[leaves.Leaf]) -> str:
    """The leaves that look most like one, of those that are left over as well."""
    if leaf.path[-1] == "b_i" and isinstance(leaf.codec, leaves.Gates):
        return "hk.GRU is another function; the one of Flax is hk_stack.port.GRU"

    def likeness(other: leaves.Leaf) -> float:
        same_size = 0.5 if leaf.num_elements == other.num_elements else 0.0
        return same_size + _likeness("/".join(leaf.path), "/".join(other.path))

    # Those of the same size alone, where there are many.
    alike = [other for other in others if leaf.num_elements == other.num_elements]
    ranked = sorted((alike or others)[:_MOST_COMPARED], key=likeness, reverse=True)[:2]
    close = [str(other) for other in ranked if likeness(other) > 0.6]
    return f"nearest are {' and '.join(close)}" if close else ""


@functools.cache
def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _cells(row: Row) -> list[str]:
    return [row.flax, row.haiku, row.change, row.shape]


def unused(
    rules: Sequence[names.Rules], everything: Sequence[leaves.Leaf]
) -> list[str]:
    """What to say of rules that fit no leaf."""
    paths = [path for leaf in everything for path in leaf.paths]
    lines = []
    for group in rules:
        for pattern in group.unused(paths):
            raw = list(dict.fromkeys(leaf.raw for leaf in everything))
            close = difflib.get_close_matches(pattern, raw, n=2, cutoff=0.4)
            near = f" Near it are: {', '.join(close)}." if close else ""
            lines.append(
                f"{group.argument}: {pattern!r} is the beginning of no leaf's path."
                f"{near}"
            )
    return lines
