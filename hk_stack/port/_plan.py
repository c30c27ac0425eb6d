"""What goes where: the readable plan of a port, and what is wrong with it."""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from hk_stack import _table
from hk_stack._table import Shown, Table
from hk_stack.port import _names
from hk_stack.port._cells import Gates
from hk_stack.port._codecs import Leaf
from hk_stack.port._layers import Reading, Side
from hk_stack.port._match import Matched
from hk_stack.port._rules import Arguments, Said, written


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

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.status in ("ok", "ignored")


class Choice(NamedTuple):
    """What to write for some leaves, in one of several ways."""

    rows: int
    ways: tuple[Arguments, ...]


_TITLES = ["Flax", "Haiku", "change", "shape", "status"]
_PROBLEMS = {
    "differs": "of one name, but not the same",
    "dtype": "of another dtype; cast=True converts",
    "kind": "of another kind of number, which nothing converts",
    "unused": "in Flax only",
    "missing": "in Haiku only",
}


@dataclasses.dataclass(frozen=True)
class Plan(Shown):
    """What goes where.

    Attributes:
      rows: All leaves of both trees.
      moves: Those that can go.
      unused_rules: What to say of rules that fit nothing.
      rename: The renamings that were given, and those that would pair more leaves.
      ignore: What to ignore, for what is left over.
      choices: What to write for leaves that do not fit, or fit in several ways.
    """

    rows: tuple[Row, ...]
    moves: tuple[Reading, ...]
    unused_rules: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every leaf of both trees is used, exactly once, or ignored."""
        return all(row.ok for row in self.rows) and not self.unused_rules

    def _parts(self) -> Iterator[str | Table]:
        yield self.headline()
        styles = ["" if row.ok else "bold red" for row in self.rows]
        yield Table(_TITLES, [row[:5] for row in self.rows], styles=styles)
        yield from self.problems()

    def headline(self) -> str:
        """How much of both trees goes where, in one line."""
        flax, haiku = (
            {piece for move in self.moves for piece in move.sides[i].pieces}
            for i in range(2)
        )
        nbytes = _table.si(sum(piece.nbytes for piece in haiku))
        bad = sum(not row.ok for row in self.rows)
        end = f"; {bad} rows need a look" if bad else ""
        leaves = f"{len(flax)} leaves of Flax -> {len(haiku)} leaves of Haiku"
        return f"{leaves}, {nbytes}B{end}"

    def problems(self, what: str = "flax_to_haiku", most: int = 12) -> list[str]:
        """What is wrong and what to write, a line each.

        Args:
          what: The function to call.
          most: How many rows of a kind to name.
        """
        lines = []
        for status, title in _PROBLEMS.items():
            rows = [row for row in self.rows if row.status == status]
            lines += [f"{title} ({len(rows)}):"] if rows else []
            for why, group in itertools.groupby(rows[:most], key=lambda row: row.why):
                names = (filter(None, (row.flax, row.haiku)) for row in group)
                lines += [f"  {' -> '.join(sides)}" for sides in names]
                lines[-1] += f": {why}" if why else ""
            lines += [f"  and {len(rows) - most} more"] if len(rows) > most else []
        return [*lines, *self.unused_rules, *self._calls(what)]

    def _calls(self, what: str) -> Iterator[str]:
        """What to write for leaves that are left over: renamings, or to ignore them."""
        source = "variables" if what == "flax_to_haiku" else "params_and_state"
        if len(self.choices) + sum(one.rows > 1 for one in self.choices) > 1:
            yield "All that is to be said of what differs, one of each line:"
            for one in self.choices:
                ways = "; or ".join(map(written, one.ways))
                yield f"  {one.rows} rows: {ways}"
        call = f"{what}({source}, like, "
        if any(row.status == "dtype" for row in self.rows):
            yield f"To convert dtypes: {call}cast=True)"
        if not self.ignore:
            return
        rename = ", ".join(f'"{old}": "{new}"' for old, new in self.rename)
        if rename:
            yield f"To match more, if these are the same: {call}rename={{{rename}}})"
        else:
            yield "No rename= pairs them for certain: look at what is nearest."
        ignore = ", ".join(f'"{path}"' for path in self.ignore)
        yield f"To leave these as they are: {call}ignore=[{ignore}])"
        flax = {row.flax.partition("/")[0] for row in self.rows if row.flax}
        has_state = any(row.haiku.startswith("state/") for row in self.rows)
        if has_state and flax == {"params"}:
            yield 'The variables hold parameters only, no "batch_stats".'
        if not has_state and "batch_stats" in flax:
            yield "There is no state in Haiku's tree: give (params, state)."


def made(
    found: Matched,
    trees: Sequence[Sequence[Leaf]],
    said: Said,
    unused: Sequence[str],
) -> Plan:
    """The plan of a match of the leaves of both trees."""
    moves = sorted(found.moves, key=lambda move: move.flax.leaves[0].pieces[0].place)
    rows = [_moved(move, said.cast) for move in moves]
    fitting = [move for move, row in zip(moves, rows, strict=True) if row.ok]
    refused = []
    for group, refusal in found.unfit:
        every = (*group.flax, *group.haiku)
        is_ignored = all(said.ignore.closest(leaf.paths) for leaf in every)
        status, why = ("ignored", "") if is_ignored else ("differs", str(refusal))
        rows.append(Row(_all(group.flax), _all(group.haiku), "", "", status, why))
        refused += [] if is_ignored else [refusal.rules]
    rows += _left_over(found.flax, trees[0], found.haiku, said, "unused")
    rows += _left_over(found.haiku, trees[1], found.flax, said, "missing")
    rename = {**said.rename.rules, **found.renames} if found.renames else {}
    return Plan(
        tuple(rows),
        tuple(fitting),
        tuple(unused),
        tuple(rename.items()),
        _to_ignore([*found.flax, *found.haiku], [*trees[0], *trees[1]], said),
        _together(refused),
    )


def _together(refused: Iterable[tuple[Arguments, ...]]) -> tuple[Choice, ...]:
    """Proposals for leaves that have the same choice, as one."""
    found: dict[str, list[tuple[Arguments, ...]]] = {}
    for ways in filter(None, refused):
        without_paths = re.sub('"[^"]*": ', "", "; ".join(map(written, ways)))
        found.setdefault(without_paths, []).append(ways)
    return tuple(
        Choice(len(rows), tuple(map(_merged, zip(*rows, strict=True))))
        for rows in found.values()
    )


def _merged(several: Iterable[Arguments]) -> Arguments:
    merged: Arguments = {}
    for name, value in (item for one in several for item in one.items()):
        is_dict = isinstance(value, dict)
        merged[name] = {**merged.get(name, {}), **value} if is_dict else value
    return merged


def _moved(move: Reading, cast: bool) -> Row:
    flax, haiku = move.flax, move.haiku
    labels = [
        flax.leaves[0].codec.label,
        haiku.leaves[0].codec.label,
        move.change.label,
    ]
    status, why = "ok", ""
    old, new = (set().union(*(x.dtypes for x in s.leaves)) for s in (flax, haiku))
    if len(old | new) > 1:
        text = [", ".join(sorted(map(str, dtypes))) for dtypes in (old, new)]
        labels.append(f"{text[0]} -> {text[1]}")
        is_of_a_kind = all(is_castable(a, b) for a in old for b in new)
        if not (is_of_a_kind and cast):
            status = "dtype" if is_of_a_kind else "kind"
            why = f"{text[0]} in Flax, {text[1]} in Haiku"
    is_whole = len(flax.leaves) == len(haiku.leaves) == 1 and flax.axes == haiku.axes
    if flax.num_layers > 1 and not is_whole:
        labels.append(f"{flax.num_layers} layers {_where(flax)} -> {_where(haiku)}")
    before, after = list(flax.one_layer), list(haiku.one_layer)
    shape = f"{after}" if before == after else f"{before} -> {after}"
    change = ", ".join(filter(None, labels))
    return Row(_all(flax.leaves), _all(haiku.leaves), change, shape, status, why)


def is_castable(old: np.dtype, new: np.dtype) -> bool:
    """Whether two dtypes are of one kind: across kinds, casts lose what is meant."""
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer)
    return any(jnp.issubdtype(old, k) and jnp.issubdtype(new, k) for k in kinds)


def _where(side: Side) -> str:
    axes = f"on axis {', '.join(map(str, side.own_axes))}" if side.own_axes else ""
    by_name = "by name" if len(side.leaves) > 1 or not axes else ""
    return " and ".join(filter(None, (by_name, axes)))


def _all(several: Sequence[Leaf]) -> str:
    more = f" (and {len(several) - 1} more)" if len(several) > 1 else ""
    return f"{several[0]}{more}"


def _left_over(
    side: Sequence[Leaf],
    tree: Sequence[Leaf],
    others: Sequence[Leaf],
    said: Said,
    status: str,
) -> Iterator[Row]:
    for i, leaf in enumerate(side):
        sides = (str(leaf), "") if status == "unused" else ("", str(leaf))
        if said.ignore.closest(leaf.paths):
            yield Row(*sides, "", "", "ignored")
        else:  # To compare each with each takes long, and nobody reads that much.
            why = _why_left(leaf, tree, others) if i < _MOST_NAMED else ""
            yield Row(*sides, "", "", status, why)


_MOST_NAMED, _MOST_COMPARED = 12, 48


def _why_left(leaf: Leaf, tree: Sequence[Leaf], others: Sequence[Leaf]) -> str:
    """Which leaves have the same name, or look most like it, of those left over."""
    twins = [x for x in tree if x is not leaf and x.name == leaf.name]
    if twins:
        module = _names.written(_names.parts(leaf.path[:-1]))
        return (
            f"{', '.join(map(str, twins))} would have its name in Haiku too, "
            f"{module}/{leaf.path[-1]}; rename one of them, or to a name as it is here"
        )
    if leaf.path[-1] == "b_i" and isinstance(leaf.codec, Gates):
        return "hk.GRU is another function; the one of Flax is hk_stack.port.GRU"
    size = math.prod(leaf.shape)
    alike = [x for x in others if math.prod(x.shape) == size] or others
    by_path = {"/".join(x.path): x for x in alike[:_MOST_COMPARED]}
    near = difflib.get_close_matches("/".join(leaf.path), by_path, n=2, cutoff=0.25)
    close = [str(by_path[path]) for path in near]
    return f"nearest are {' and '.join(close)}" if close else ""


def _to_ignore(
    left: Sequence[Leaf], everything: Sequence[Leaf], said: Said
) -> tuple[str, ...]:
    """What is ignored already, and the shortest beginnings of what else is left over.

    These are no beginnings of others; and empty if nothing else is left over.
    """
    rest = [leaf for leaf in left if not said.ignore.closest(leaf.paths)]
    if not rest:
        return ()
    free = {id(leaf) for leaf in rest}
    busy = (leaf for leaf in everything if id(leaf) not in free)
    used = {
        path
        for leaf in busy
        if not said.ignore.closest(leaf.paths)
        for path in _beginnings(leaf)
    }
    found = dict.fromkeys(
        next(
            (path for path in _beginnings(leaf)[1:] if path not in used), leaf.paths[1]
        )
        for leaf in rest
    )
    return *said.ignore.rules, *found


def _beginnings(leaf: Leaf) -> list[str]:
    """Of its path, the shortest first."""
    return list(itertools.accumulate(leaf.paths[1].split("/"), "{}/{}".format))
