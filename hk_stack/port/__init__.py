"""Porting: Flax variables to Haiku parameters and state, and back.

Both trees are read in one vocabulary (`leaves`), paired by name and layer (`match`),
and what goes where is written down (`plan`) before any array moves. Flax itself is not
needed: Linen's variables and NNX's states are taken as the trees that they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hk_stack import _layout
from hk_stack.port import layers, leaves, match, names, plans
from hk_stack.port.gru import GRU
from hk_stack.port.plans import Plan, Row

__all__ = (
    "GRU",
    "SAME",
    "TRANSPOSED",
    "Plan",
    "Row",
    "flax_to_haiku",
    "haiku_to_flax",
    "plan",
)

Axis = int | tuple[int, ...]
Rule = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]

SAME: Rule = (layers.same, layers.same)
TRANSPOSED: Rule = (layers.swapped, layers.swapped)


def flax_to_haiku(
    variables: Any,
    like: tuple[Any, Any],
    *,
    rename: Mapping[str, str] | None = None,
    leaf: Mapping[str, Rule] | None = None,
    ignore: Sequence[str] = (),
    layer_axis: Axis | Mapping[str, Axis] | None = None,
    interleave: bool | None = None,
    cast: bool = False,
    strict: bool = True,
) -> Any:
    """Flax variables as the parameters and state of the same model in Haiku.

    Equal to this loop over the rows of the plan, in which a leaf may be several arrays
    of either tree:

    ```
    for flax_leaf, haiku_leaf, change in plan(variables, like).rows:
        haiku[haiku_leaf] = change(variables[flax_leaf])
    ```

    >>> import numpy as np
    >>> variables = {"params": {"Dense_0": {"kernel": np.ones([3, 4])}}}
    >>> like = {"linear": {"w": jax.ShapeDtypeStruct([3, 4], np.float32)}}, {}
    >>> params, state = flax_to_haiku(variables, like, cast=True)
    >>> params["linear"]["w"].shape
    (3, 4)

    Args:
      variables: Linen's variables (`{"params": ..., "batch_stats": ...}`), an NNX
        state, or a plain dict of either. Gradients and moments of an optimiser, which
        are shaped like parameters, are ported as `{"params": gradients}`.
      like: The model's parameters and state, `(params, state)`: what its `init` gives,
        or what `jax.eval_shape` gives for it. `state` is `{}` for a model without.
      rename: Beginnings of paths in Flax (without the collection, or with it), and what
        they are in Haiku. `*` stands for any text in one part of a path, and is copied:
        `{"encoder/layers_*": "encoder/block_*"}`. It counts from the first number that
        no closer rule takes: `{"block_0": "first", "block_*": "rest_*"}`.
      leaf: Beginnings of paths in Flax, and two functions: from Flax's array of one
        layer to Haiku's, and back; `SAME` and `TRANSPOSED` are two such pairs.
      ignore: Beginnings of paths in Flax or Haiku that may be left over.
      layer_axis: The axis that `nn.scan` or `nn.vmap` put the layers on
        (`variable_axes={"params": 1}`): one for all stacks, or by the beginning of a
        path in Flax, which then is that of a stack; a tuple for scans in a scan, ()
        for none. By default it is found out, if just one reading of the shapes fits.
      interleave: Where layers are both numbered and on an axis (`layers/block_0` and
        `layers/block_1`, `[L/2, ...]`): True if the scan is over blocks of layers,
        False if each numbered module is a stack of its own.
      cast: Whether to convert dtypes to those of `like`.
      strict: Whether every leaf of both trees has to be used exactly once.

    Returns:
      `(params, state)`, with new arrays: NumPy arrays where `like` has these, JAX
      arrays elsewhere, sharded as `like` says. With `strict=False`, the pair of that
      and of the plan's rows that say what was left over; those leaves are as in `like`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a leaf is left over, does not fit, or could fit in two ways; if a
        rule is not used.
    """
    found = plan(
        variables,
        like,
        rename=rename,
        leaf=leaf,
        ignore=ignore,
        layer_axis=layer_axis,
        interleave=interleave,
        cast=cast,
    )
    return _port(found, "flax", variables, like, "flax_to_haiku", strict)


def haiku_to_flax(
    params_and_state: tuple[Any, Any],
    like: Any,
    *,
    rename: Mapping[str, str] | None = None,
    leaf: Mapping[str, Rule] | None = None,
    ignore: Sequence[str] = (),
    layer_axis: Axis | Mapping[str, Axis] | None = None,
    interleave: bool | None = None,
    cast: bool = False,
    strict: bool = True,
) -> Any:
    """The inverse of `flax_to_haiku`: parameters and state as Flax variables.

    Args:
      params_and_state: Haiku's `(params, state)`; `state` is `{}` for a model without.
      like: Variables, an NNX state or a plain dict of either, as the model's `init`
        gives them, or as `jax.eval_shape` gives them for it.
      rename: As in `flax_to_haiku`, from Flax to Haiku.
      leaf: As in `flax_to_haiku`.
      ignore: As in `flax_to_haiku`.
      layer_axis: As in `flax_to_haiku`.
      interleave: As in `flax_to_haiku`.
      cast: As in `flax_to_haiku`.
      strict: As in `flax_to_haiku`.

    Returns:
      A tree as `like`, with new arrays; as in `flax_to_haiku`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a leaf is left over, does not fit, or could fit in two ways; if a
        rule is not used.
    """
    found = plan(
        like,
        params_and_state,
        rename=rename,
        leaf=leaf,
        ignore=ignore,
        layer_axis=layer_axis,
        interleave=interleave,
        cast=cast,
    )
    return _port(found, "haiku", params_and_state, like, "haiku_to_flax", strict)


def plan(
    variables: Any,
    like: tuple[Any, Any],
    *,
    rename: Mapping[str, str] | None = None,
    leaf: Mapping[str, Rule] | None = None,
    ignore: Sequence[str] = (),
    layer_axis: Axis | Mapping[str, Axis] | None = None,
    interleave: bool | None = None,
    cast: bool = False,
) -> Plan:
    """What `flax_to_haiku` and `haiku_to_flax` would do, to print and to look at.

    >>> import numpy as np
    >>> of = jax.ShapeDtypeStruct
    >>> kernel = of([8, 2, 4], np.float32)
    >>> variables = {"params": {"query": {"kernel": kernel}}}
    >>> like = {"query": {"w": of([8, 8], np.float32)}}, {}
    >>> print(plan(variables, like))
    1 leaves of Flax -> 1 leaves of Haiku, 256 B
      Flax                                Haiku                        change ...
      params/query/kernel float32[8,2,4]  params/query/w float32[8,8]  reshape ...

    Args:
      variables: As in `flax_to_haiku`; arrays or `jax.ShapeDtypeStruct`s.
      like: As in `flax_to_haiku`.
      rename: As in `flax_to_haiku`.
      leaf: As in `flax_to_haiku`.
      ignore: As in `flax_to_haiku`.
      layer_axis: As in `flax_to_haiku`.
      interleave: As in `flax_to_haiku`.
      cast: As in `flax_to_haiku`.

    Returns:
      A plan: a table as text, and in colour with `rich.print`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a rule has another number of `*` than its path.
    """
    params, state = _pair(like)
    renames, by_leaf, ignored, by_axis = _rules(rename, leaf, ignore, layer_axis)
    if interleave not in (None, True, False):
        raise TypeError(f"port: interleave must be True or False, not {interleave!r}.")
    haiku = leaves.of_haiku(params, state)
    renames.count(leaves.paths_of_flax(variables), [leaf.paths for leaf in haiku])
    flax = leaves.of_flax(variables, renames)
    options = layers.Options(by_leaf, by_axis, interleave)
    found = match.match(flax, haiku, options)
    said = plans.unused((renames, by_leaf, ignored, by_axis), (*flax, *haiku))
    is_whole = not (found.unfit or found.flax or found.haiku)
    said += layers.unused(found.moves, options) if is_whole else []
    rules = plans.Rules(renames, ignored, said)
    return plans.of_match(found, flax, haiku, rules, cast=cast)


def _rules(rename: Any, leaf: Any, ignore: Any, layer_axis: Any) -> Any:
    """The users' rules, after a check of what they are."""
    if isinstance(ignore, str) or not all(isinstance(path, str) for path in ignore):
        raise TypeError(f"port: ignore must be a list of paths, not {ignore!r}.")
    if isinstance(layer_axis, (int, tuple)):
        layer_axis = {"": layer_axis}
    given = {
        "leaf": leaf or {},
        "ignore": dict.fromkeys(ignore),
        "layer_axis": {} if layer_axis is None else layer_axis,
    }
    rules: dict[str, Any] = {"rename": names.Renames(rename or {})}
    rules |= {argument: names.Rules(argument, said) for argument, said in given.items()}
    for argument, (is_right, expected) in _EXPECTED.items():
        for pattern, value in rules[argument].rules.items():
            if not is_right(value):
                raise TypeError(
                    f"port: {argument} of {pattern!r} must be {expected}, "
                    f"not {value!r}."
                )
    return list(rules.values())


def _is_axes(value: Any) -> bool:
    axes = value if isinstance(value, tuple) else (value,)
    return all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes)


_EXPECTED = {
    "rename": (lambda value: isinstance(value, str), "the path in Haiku"),
    "leaf": (
        lambda value: isinstance(value, tuple) and list(map(callable, value)) == [1, 1],
        "a pair of functions, to Haiku and to Flax",
    ),
    "layer_axis": (_is_axes, "an axis, or a tuple of axes for nested scans"),
}


def _pair(like: Any) -> tuple[Any, Any]:
    if not isinstance(like, (tuple, list)) or len(like) != 2:
        raise TypeError(
            "port: Haiku's side must be a pair (params, state), not "
            f"{type(like).__name__}. Write (params, {{}}) for a model without state."
        )
    return like[0], like[1]


def _port(
    found: Plan, source: str, tree: Any, like: Any, what: str, strict: bool
) -> Any:
    """Carries out a plan, from the side `source`."""
    bad = [row for row in found.rows if row.status not in ("ok", "ignored")]
    if found.unused_rules or (strict and bad):
        raise ValueError(
            f"{what}: {found.headline()}\n" + "\n".join(found.problems(what))
        )
    given = jax.tree.leaves(tree)
    made, structure = jax.tree.flatten(like)
    for move in found.moves:
        for index, array in _moved(move, source, given, made).items():
            made[index] = array
    result = jax.tree.unflatten(structure, made)
    return result if strict else (result, bad)


def _moved(
    move: layers.Move, source: str, given: Sequence[Any], like: Sequence[Any]
) -> dict[int, Any]:
    """New arrays for the pieces that a move fills, by their place in the tree."""
    sides = (move.flax, move.haiku)
    old, new = sides if source == "flax" else sides[::-1]
    change = move.change.to_haiku if source == "flax" else move.change.to_flax
    arrays = {p.place: _values(given[p.place], p) for x in old.leaves for p in x.pieces}
    filled = {
        p.place: _layout.empty(p.shape, p.dtype) for x in new.leaves for p in x.pieces
    }
    for layer in range(new.num_layers):
        leaf, _ = old.place(layer)
        value = _changed(change, leaf.codec.read(old.views(layer, arrays)), leaf)
        leaf, _ = new.place(layer)
        _check_value(value, new.one_layer() or (), leaf)
        leaf.codec.write(value, new.views(layer, filled))
    return {index: _as_like(array, like[index]) for index, array in filled.items()}


def _changed(change: Any, array: np.ndarray, leaf: leaves.Leaf) -> np.ndarray:
    """One layer as the other tree has it."""
    try:
        return np.asarray(change(array))
    except Exception as error:
        raise ValueError(
            f"port: the rule in leaf= for {leaf} fails: {error!r}"
        ) from error


def _check_value(value: np.ndarray, shape: tuple[int, ...], leaf: leaves.Leaf) -> None:
    if value.shape != shape:
        raise ValueError(
            f"port: {leaf} is given shape {list(value.shape)} for one layer, not "
            f"{list(shape)}. What does its rule in leaf= return?"
        )
    if value.dtype == leaf.dtype:
        return
    if not plans.is_castable(value.dtype, leaf.dtype):
        raise ValueError(
            f"port: {leaf} is given {value.dtype}. What does its rule in leaf= return?"
        )
    is_whole = jax.numpy.issubdtype(leaf.dtype, jax.numpy.integer)
    if is_whole and not np.array_equal(value.astype(leaf.dtype), value):
        raise ValueError(f"port: {leaf} cannot hold the values of {value.dtype}.")


def _values(leaf: Any, piece: leaves.Piece) -> np.ndarray:
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


def _as_like(array: np.ndarray, like: Any) -> Any:
    """`array` as NumPy or JAX has it, on the devices of `like`."""
    is_wide = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    if isinstance(like, np.ndarray) or is_wide:
        return array
    is_free = isinstance(like, jax.Array) and not like.committed
    return jax.device_put(array, None if is_free else getattr(like, "sharding", None))
