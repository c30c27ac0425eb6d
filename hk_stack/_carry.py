"""What goes from layer to layer: a layer must return what the next one can be given."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hk_stack import _checks, _equations
from hk_stack._equations import Aval
from hk_stack._types import Carry, Tree


def as_array(leaf: object) -> jax.Array:
    """`leaf`, or an array of it."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def cast(carry: Tree, dtype: DTypeLike) -> Any:
    """`carry` with its real floating-point leaves in `dtype`, unless that is None."""

    def cast(leaf: object) -> Any:
        leaf = as_array(leaf)
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_real else leaf

    return carry if dtype is None else jax.tree.map(cast, carry)


def promote(leaf: jax.Array, after: Aval) -> jax.Array:
    """A carry takes on what the first layer makes of its type, where it may.

    So does a weakly typed one, and one that is the same on all devices of a manual mesh
    axis, if the layer makes it differ.
    """
    leaf = _equations.vary_as(leaf, after)
    if not getattr(leaf, "weak_type", False) or after.shape != leaf.shape:
        return leaf
    if after.weak_type and after.dtype == leaf.dtype:
        return leaf
    return jax.lax.convert_element_type(leaf, after.dtype)


def kept(
    before: Carry,
    after: Tree,
    names: Sequence[str],
    where: str,
    with_per_layer_inputs: bool,
) -> Any:
    """Checks that a layer returns the carry that it is given; `after`, as arrays.

    What is weakly typed may take on another type.
    """
    names = names[: len(before)]
    _same_structure(before, after, names, where, with_per_layer_inputs)
    after = jax.tree.map(as_array, after)
    _same_types(jax.tree.map(promote, before, after), after, names, where)
    return after


def result(value: Tree, where: str) -> None:
    """Checks that a layer function returns arrays."""
    for at, leaf in _checks.leaves_at(value):
        if isinstance(leaf, _ARRAYS) or hasattr(leaf, "__jax_array__"):
            continue
        call = " Call it: what it returns then is meant, presumably."
        hint = call if callable(leaf) else ""
        raise TypeError(
            f"{where}: the layer function must return arrays, but it returned a "
            f"{type(leaf).__name__}{at}.{hint}"
        )


_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def pair(result: object, where: str) -> None:
    """Checks what a layer function with per-layer inputs returned."""
    if not (isinstance(result, tuple) and len(result) == 2):
        found = "an array" if isinstance(result, jax.Array) else type(result).__name__
        if isinstance(result, (tuple, list)):
            found = f"a {found} of {len(result)}"
        raise TypeError(
            f"{where}: with_per_layer_inputs=True, the layer function must return a "
            f"pair (x, y), but it returned {found}. {_pair_advice(result)}"
        )


def _pair_advice(result: object) -> str:
    if result is None:
        return _NO_RETURN
    if isinstance(result, (tuple, list)) and len(result) > 2:
        return "Return (x, (y, z)) if there are several outputs per layer."
    if isinstance(result, list):
        return "Return a tuple."
    return "Return (x, None) if there is no output per layer."


_NO_RETURN = "Is a `return` missing?"


def _same_structure(
    before: Carry,
    after: Tree,
    names: Sequence[str],
    where: str,
    with_per_layer_inputs: bool,
) -> None:
    """Checks that a layer returns the pytree that it was given."""
    old: Any = jax.tree.structure(before)
    new: Any = jax.tree.structure(after)
    if old == new:
        return
    took, returned = (before[0], after[0]) if len(before) == 1 else (before, after)
    advice = _structure_advice(took, returned, names, with_per_layer_inputs)
    raise TypeError(
        f"{where}: the layer function must return what it takes "
        f"({', '.join(names)}), as the next layer is given it: took "
        f"{jax.tree.structure(took)}, returned {jax.tree.structure(returned)}.{advice}"
    )


def _structure_advice(
    took: Tree, returned: Tree, names: Sequence[str], with_per_layer_inputs: bool
) -> str:
    """What to write for a result of another structure."""
    outputs = (
        " If there are outputs per layer, write layer_stack(num_layers, "
        "with_per_layer_inputs=True), and return (x, outputs)."
    )
    if not names:
        return (
            " Give what goes from layer to layer by position: stack(f)(x). What is "
            "given by keyword, all layers share."
        )
    if returned is None:
        return f" {_NO_RETURN}"
    if len(names) == 1:
        if isinstance(took, list):
            return (
                f" `{names[0]}` is a list, so + and * do what they do to lists. "
                f"jnp.asarray({names[0]}) makes one array of numbers, "
                f"jnp.stack({names[0]}) one of arrays."
            )
        if isinstance(returned, tuple) and len(returned) == 1:
            return f" Return {names[0]} itself, not a tuple of one."
        is_more = isinstance(returned, (tuple, dict)) and len(returned) > 1
        return outputs if is_more and not with_per_layer_inputs else ""
    if isinstance(returned, list) and len(returned) == len(names):
        return " Return a tuple, not a list."
    return (
        f" Return one value for each argument: ({', '.join(names)}). What all layers "
        f"share goes by keyword: stack(f)({names[0]}, {names[1]}=...).{outputs}"
    )


def _same_types(before: Carry, after: Tree, names: Sequence[str], where: str) -> None:
    """Checks that a layer keeps the shape and dtype of each leaf of the carry."""
    for i, name in enumerate(names):
        pairs = zip(
            _checks.leaves_at(before[i]), jax.tree.leaves(after[i]), strict=True
        )
        for (at, x), y in pairs:
            if x.shape == y.shape and x.dtype == y.dtype:
                continue
            raise TypeError(
                f"{where}: a layer must keep the shape and dtype of what it is given, "
                f"but `{name}`{at} goes from {x.dtype}{list(x.shape)} to "
                f"{y.dtype}{list(y.shape)}. {_carry_advice(x, y)}"
            )


def _carry_advice(x: jax.Array, y: jax.Array) -> str:
    is_key = [jnp.issubdtype(v.dtype, jax.dtypes.prng_key) for v in (x, y)]
    if any(is_key):
        if all(is_key):
            return "Return a key of the kind that came in."
        return (
            "Return a key for a key, as of jax.random.split or fold_in; "
            "jax.random.wrap_key_data makes one of its data."
        )
    if x.shape != y.shape:
        return "Return the shape that came in, or change it outside of the stack."
    result = f"Cast the result with .astype(jnp.{x.dtype})"
    given = f"the input with .astype(jnp.{y.dtype})"
    old, new = (_rank(v.dtype) for v in (x, y))
    if old == new == _rank(np.float32):
        return (
            f"{result}, or {given}, or let the stack do so: carry_dtype=jnp.{x.dtype}."
        )
    if old < new == _rank(np.complex64):
        return f"Cast {given}, or return a part, as of jnp.real."
    return f"Cast {given}, or the result back." if old < new else f"{result}."


def _rank(dtype: DTypeLike) -> int:
    """Of the kind of numbers, each of which holds those before."""
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    return max(
        (i + 1 for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)),
        default=0,
    )


def same_outputs(before: Any, after: Any, where: str) -> None:
    """Checks that a layer returns outputs of the structure of another layer's."""
    if before is not None and before != after:
        raise TypeError(
            f"{where}: outputs per layer are stacked, so all layers must return the "
            f"same pytree; one returned {before}, the next {after}."
        )
