"""Carries out a plan: new arrays for one tree, from those of the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hk_stack import _layout
from hk_stack.port import _plan
from hk_stack.port._cells import Array
from hk_stack.port._layers import Side
from hk_stack.port._leaves import Piece
from hk_stack.port._rules import Function


def ported(plan: _plan.Plan, source: int, tree: Any, like: Any) -> Any:
    """A tree as `like`, with the moves of a plan from the side `source` (0 is Flax)."""
    given = jax.tree.leaves(tree)
    made, structure = jax.tree.flatten(like)
    for move in plan.moves:
        change = move.change.to_flax if source else move.change.to_haiku
        filled = _filled(move.sides[source], move.sides[1 - source], change, given)
        for place, array in filled.items():
            made[place] = _as_like(array, made[place])
    return jax.tree.unflatten(structure, made)


def _filled(
    old: Side, new: Side, change: Function, given: Sequence[Any]
) -> Mapping[int, Array]:
    """New arrays for the pieces that a move fills, by their place in the tree."""
    arrays = {p.place: _values(given[p.place], p) for p in old.pieces}
    filled = {p.place: _layout.empty(p.shape, p.dtype) for p in new.pieces}
    for layer in range(new.num_layers):
        value = old.leaves[0].codec.read(old.views(layer, arrays))
        try:
            value = np.asarray(change(value))
        except Exception as error:
            raise ValueError(
                f"port: the rule in leaf= for {old.leaves[0]} fails: {error!r}"
            ) from error
        _check(value, new)
        new.leaves[0].codec.write(value, new.views(layer, filled))
    return filled


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
