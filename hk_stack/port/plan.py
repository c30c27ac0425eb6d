"""What goes where: the readable plan of a port, and what is wrong with it."""

import collections
import difflib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from hk_stack import report
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


class Plan(NamedTuple):
    """What goes where.

    Attributes:
      rows: All leaves of both trees.
      moves: Those that can go.
      near: Renamings that would pair more leaves.
      unused_rules: Rules that fit nothing.
    """

    rows: tuple[Row, ...]
    moves: tuple[layers.Move, ...]
    near: tuple[match.Near, ...]
    unused_rules: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every leaf of both trees is used, exactly once, or ignored."""
        good = all(row.status in ("ok", "ignored") for row in self.rows)
        return good and not self.unused_rules

    def __str__(self) -> str:
        rows = [_TITLES, *([*_cells(row), row.status] for row in self.rows)]
        return "\n".join([self.headline(), *report.aligned(rows), *self.problems()])

    def __rich__(self) -> Any:
        import rich.console
        import rich.table
        import rich.text

        table = rich.table.Table(*_TITLES, box=None, header_style="bold")
        for row in self.rows:
            style = "" if row.status in ("ok", "ignored") else "bold red"
            cells = [*map(rich.text.Text, _cells(row))]
            table.add_row(*cells, rich.text.Text(row.status, style=style))
        texts = map(rich.text.Text, [self.headline(), "", *self.problems()])
        first, _, *rest = texts
        return rich.console.Group(first, table, *rest)

    def headline(self) -> str:
        """How much of both trees goes where, in one line."""
        moved = [[p for x in s.leaves for p in x.pieces] for s in self._sides("flax")]
        made = [[p for x in s.leaves for p in x.pieces] for s in self._sides("haiku")]
        nbytes = sum(
            leaves.size(p.shape) * p.dtype.itemsize for pieces in made for p in pieces
        )
        bad = [row for row in self.rows if row.status not in ("ok", "ignored")]
        end = f"; {len(bad)} rows need a look" if bad else ""
        return (
            f"{sum(map(len, moved))} leaves of Flax -> {sum(map(len, made))} leaves of "
            f"Haiku, {report.si(nbytes)}B{end}"
        )

    def _sides(self, name: str) -> list[layers.Side]:
        return [getattr(move, name) for move in self.moves]

    def problems(self, most: int = 12) -> list[str]:
        """What is wrong and what to write, a line each."""
        lines = []
        for status, title in _TITLES_OF_PROBLEMS.items():
            rows = [row for row in self.rows if row.status == status]
            if rows:
                lines.append(f"{title} ({len(rows)}):")
            for why, group in itertools.groupby(rows[:most], key=lambda row: row.why):
                for row in group:
                    what = " -> ".join(name for name in (row.flax, row.haiku) if name)
                    lines.append(f"  {what}")
                lines[-1] += f": {why}" if why else ""
            if len(rows) > most:
                lines.append(f"  and {len(rows) - most} more")
        lines += self.unused_rules
        lines += self._suggestions()
        return lines

    def _suggestions(self) -> list[str]:
        """The best renaming, as one would write it."""
        if not self.near:
            return []
        old, new, hits = self.near[0]
        count = f"{hits} more names" if hits > 1 else "one more name"
        return [f'rename={{"{old}": "{new}"}} would match {count}, if all fits.']


_TITLES = ["Flax", "Haiku", "change", "shape", "status"]
_TITLES_OF_PROBLEMS = {
    "differs": "of one name, but not the same",
    "dtype": "of another dtype; cast=True converts",
    "kind": "of another kind of number, which nothing converts",
    "unused": "in Flax only",
    "missing": "in Haiku only",
}


def of_match(found: match.Matched, ignore: names.Rules, *, cast: bool) -> Plan:
    """The plan of a match.

    Args:
      found: The match.
      ignore: Patterns of leaves that may be left over.
      cast: Whether dtypes may change.
    """
    rows = []
    moves = []
    for move in sorted(found.moves, key=lambda m: m.flax.leaves[0].pieces[0].place):
        row = _moved(move, cast)
        rows.append(row)
        if row.status == "ok":
            moves.append(move)
    for unfit in found.unfit:
        rows.append(
            Row(_all(unfit.flax), _all(unfit.haiku), "", "", "differs", unfit.why)
        )
    rows += _left_over(found.flax, found.haiku, ignore, "unused")
    rows += _left_over(found.haiku, found.flax, ignore, "missing")
    return Plan(tuple(rows), tuple(moves), tuple(found.near), ())


def _moved(move: layers.Move, cast: bool) -> Row:
    flax, haiku = move.flax.leaves, move.haiku.leaves
    status, why = "ok", ""
    labels = [x.codec.label for x in (flax[0], haiku[0])] + [move.change.label]
    old, new = (set().union(*(x.dtypes for x in s)) for s in (flax, haiku))
    if len(old | new) > 1:
        text = [", ".join(sorted(map(str, dtypes))) for dtypes in (old, new)]
        labels.append(f"{text[0]} -> {text[1]}")
        if not all(map(_is_castable, *zip(*itertools.product(old, new), strict=True))):
            status, why = "kind", f"{text[0]} in Flax, {text[1]} in Haiku"
        elif not cast:
            status, why = "dtype", f"{text[0]} in Flax, {text[1]} in Haiku"
    labels.append(_layers(move))
    before, after = move.flax.one_layer(), move.haiku.one_layer()
    assert before is not None and after is not None
    shape = str(list(after)) if before == after else f"{list(before)} -> {list(after)}"
    change = ", ".join(label for label in labels if label)
    return Row(_all(flax), _all(haiku), change, shape, status, why)


def _is_castable(old: Any, new: Any) -> bool:
    """Between kinds of numbers nothing is cast, as that would lose what they mean."""
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
    counts = collections.Counter(map(_name, left))
    for leaf in left:
        is_ignored = ignore.find(leaf.raw, f"{leaf.collection}/{leaf.raw}") is not None
        found = "ignored" if is_ignored else status
        why = "" if is_ignored else _nearest(leaf, others)
        if counts[_name(leaf)] > 1 and not is_ignored:
            why = _twice(leaf, left)
        sides = (str(leaf), "") if status == "unused" else ("", str(leaf))
        yield Row(*sides, "", "", found, why)


def _name(leaf: leaves.Leaf) -> tuple[Any, ...]:
    """What a leaf is matched by."""
    return leaf.kind, names.parts(leaf.path[:-1]), leaf.path[-1]


def _twice(leaf: leaves.Leaf, left: Sequence[leaves.Leaf]) -> str:
    _, module, name = _name(leaf)
    path = "/".join(part.base for part in module)
    same = [str(one) for one in left if _name(one) == _name(leaf) and one is not leaf]
    return (
        f"{', '.join(same)} would have its name in Haiku too, {path}/{name}; rename "
        "one of them"
    )


def _nearest(leaf: leaves.Leaf, others: Sequence[leaves.Leaf]) -> str:
    """The leaves that look most like one, of those that are left over as well."""
    if leaf.path[-1] == "b_i" and isinstance(leaf.codec, leaves.Gates):
        return "hk.GRU is another function; the one of Flax is hk_stack.port.GRU"

    def likeness(other: leaves.Leaf) -> float:
        named = difflib.SequenceMatcher(None, "/".join(leaf.path), "/".join(other.path))
        same_size = leaf.num_elements == other.num_elements
        return named.ratio() + (0.5 if same_size else 0.0)

    ranked = sorted(others, key=likeness, reverse=True)[:2]
    close = [str(other) for other in ranked if likeness(other) > 0.6]
    return f"nearest are {' and '.join(close)}" if close else ""


def _cells(row: Row) -> list[str]:
    return [row.flax, row.haiku, row.change, row.shape]


def unused(rules: Sequence[names.Rules], paths: Sequence[str]) -> list[str]:
    """What to say of rules that fit no leaf."""
    lines = []
    for group in rules:
        for pattern in group.unused():
            close = difflib.get_close_matches(pattern, paths, n=2, cutoff=0.4)
            near = f" Near it are: {', '.join(close)}." if close else ""
            lines.append(
                f"{group.argument}: {pattern!r} is the beginning of no leaf's path."
                f"{near}"
            )
    return lines
