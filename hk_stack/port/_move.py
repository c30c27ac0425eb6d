"""Carries out a plan: new arrays for one tree, from those of the other."""

import collections
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from hk_stack import _layout
from hk_stack.port import _plan, _regroup
from hk_stack.port._codecs import Array, Piece
from hk_stack.port._layers import Reading, Side
from hk_stack.port._rules import Function


def ported(plan: _plan.Plan, source: int, tree: Any, like: Any) -> Any:
    """A tree as `like`, with the moves of a plan from the side `source` (0 is Flax)."""
    given = jax.tree.leaves(tree)
    made, structure = jax.tree.flatten(like)
    shares: dict[int, Fraction] = collections.defaultdict(Fraction)
    last: dict[int, Reading] = {}
    for move in plan.moves:
        for leaf in move.sides[1 - source].leaves:
            for piece in leaf.pieces:
                shares[piece.place] += leaf.codec.share
                last[piece.place] = move
    filled: dict[int, Array] = {}
    for move in plan.moves:
        old, new = move.sides[source], move.sides[1 - source]
        change = move.change.to_flax if source else move.change.to_haiku
        before = {}
        for piece in new.pieces:
            if piece.place not in filled:
                is_whole = shares[piece.place] >= 1
                filled[piece.place] = _started(piece, is_whole, made[piece.place])
            elif new.leaves[0].codec.share == 1:
                before[piece] = filled[piece.place].tobytes()
        _fill(old, new, change, given, filled)
        for piece, values in before.items():
            if values != filled[piece.place].tobytes():
                raise ValueError(f"port: {piece.name}: {_regroup.NOT_EQUAL}.")
        for place in [p.place for p in new.pieces if last[p.place] is move]:
            array = filled.pop(place)
            is_type = isinstance(made[place], jax.ShapeDtypeStruct)
            if shares[place] >= 1 or not is_type:  # Else parts of it are missing.
                made[place] = _as_like(array, made[place])
    return jax.tree.unflatten(structure, made)


def _started(piece: Piece, is_whole: bool, like: Any) -> Array:
    """An array to fill; with what `like` has, if some of it stays."""
    if is_whole or isinstance(like, jax.ShapeDtypeStruct):
        return _layout.empty(piece.shape, piece.dtype)
    return np.array(_values(like, piece))


def _fill(
    old: Side,
    new: Side,
    change: Function,
    given: Sequence[Any],
    filled: Mapping[int, Array],
) -> None:
    """Fills the arrays of a move."""
    arrays = {p.place: _values(given[p.place], p) for p in old.pieces}
    for layer in range(new.num_layers):
        try:
            value = old.leaves[0].codec.read(old.views(layer, arrays))
            value = np.asarray(change(value))
        except Exception as error:
            raise ValueError(
                f"port: the rule in leaf= for {old.leaves[0]} fails: {error!r}"
            ) from error
        _check(value, new)
        new.leaves[0].codec.write(value, new.views(layer, filled))


def _check(value: Array, new: Side) -> None:
    leaf = new.leaves[0]
    dtype = leaf.pieces[-1].dtype
    if value.shape != new.one_layer:
        raise ValueError(
            f"port: {leaf} is given shape {list(value.shape)} for one layer, not "
            f"{list(new.one_layer)}. What does its rule in leaf= return?"
        )
    if value.dtype == dtype:
        return
    if not _plan.is_castable(value.dtype, dtype):
        raise ValueError(
            f"port: {leaf} is given {value.dtype}. What does its rule in leaf= return?"
        )
    is_whole = jax.numpy.issubdtype(dtype, jax.numpy.integer)
    if is_whole and not np.array_equal(value.astype(dtype), value):
        raise ValueError(f"port: {leaf} cannot hold the values of {value.dtype}.")


def _values(leaf: Any, piece: Piece) -> Array:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"port: {piece.name} is a jax.ShapeDtypeStruct, which has no values. Only "
            "`like` may hold these."
        )
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"port: {piece.name} is traced. Port outside of jit and grad.")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"port: {piece.name} is spread over several processes. Gather it first, "
            "for instance with jax.experimental.multihost_utils.process_allgather."
        )
    return np.asarray(leaf)


def _as_like(array: Array, like: Any) -> Any:
    """`array` as NumPy or JAX has it, on the devices of `like`."""
    is_wide = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    if isinstance(like, np.ndarray) or is_wide:
        return array
    is_free = isinstance(like, jax.Array) and not like.committed
    return jax.device_put(array, None if is_free else getattr(like, "sharding", None))
