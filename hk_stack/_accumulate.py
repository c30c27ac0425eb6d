"""Gradients over microbatches with one setup."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hk_stack import _checks, _function, _layout
from hk_stack._partition import partition
from hk_stack._traceback import hidden
from hk_stack._types import Tree


@hidden
def accumulate(
    loss: Callable[..., Tree], params: Tree, *microbatches: Tree, has_aux: bool = False
) -> tuple[Tree, Tree]:
    """The mean loss over `M` microbatches and its gradient, with one setup.

    Equal to this loop, up to the order of floating-point operations:

    ```
    for m in range(M):
        values[m], grads[m] = jax.value_and_grad(loss)(
            params, *jax.tree.map(lambda leaf: leaf[m], microbatches)
        )
    return mean(values), mean(grads)
    ```

    but what `loss` computes from `params` alone is computed once, and its gradient is
    pulled back once (see `partition`). The microbatches run one after the other, so
    that memory is that of one of them. Use it inside `jit`: outside, it compiles anew
    each time.

    >>> import jax, jax.numpy as jnp, hk_stack
    >>> def loss(params, x, y):
    ...     return jnp.mean((x @ jax.scipy.linalg.expm(params["w"]) - y) ** 2)
    >>> params = {"w": jnp.eye(2)}
    >>> x, y = jnp.ones([4, 8, 2]), jnp.zeros([4, 8, 2])  # 4 microbatches of 8
    >>> value, grads = hk_stack.accumulate(loss, params, x, y)
    >>> whole = jax.grad(loss)(params, x.reshape(32, 2), y.reshape(32, 2))
    >>> bool(jnp.allclose(grads["w"], whole["w"], rtol=1e-5))
    True

    Args:
      loss: `(params, *microbatch) -> scalar`, or `(scalar, aux)`.
      params: A pytree of arrays. Those that are not of a floating-point dtype get
        zero gradients of dtype `float0`, as from `jax.grad` with `allow_int`.
      *microbatches: Pytrees of arrays `[M, ...]`: data, random keys (`jax.random.split`
        makes `[M]`), weights. What all microbatches share is closed over by `loss`.
      has_aux: Whether `loss` returns a pair.

    Returns:
      The mean loss and the gradients, shaped as `params`: what
      `jax.value_and_grad(loss)` returns, and an optax optimiser takes. With `has_aux`,
      `(loss, aux)` and the gradients, each leaf of `aux` being `[M, ...]`. Microbatches
      count equally: weigh the loss if they differ in size.

    Raises:
      TypeError: If there are no microbatches, or `loss` does not return what it should.
      ValueError: If leading axes differ or are empty.
    """
    where = _check_microbatches(loss, params, microbatches)
    one = _layout.drop_layers(microbatches)
    with _function.while_tracing(where):
        result = jax.eval_shape(loss, params, *one)
    _check_result(result, has_aux, where)
    split = partition(loss, params, *one)
    moving, fixed = _separate(params)

    def setup(moving: Tree) -> tuple[Tree, Tree]:
        return _separate(split.setup(_join(moving, fixed)))

    derived, pull_back, others = jax.vjp(setup, moving, has_aux=True)

    def call(derived: Tree, microbatch: tuple[Tree, ...]) -> tuple[jax.Array, Tree]:
        result = split.call(_join(derived, others), *microbatch)
        return result if has_aux else (result, None)

    (values, aux), grads = _over_all(call, derived, microbatches)
    nothing = jax.tree.map(lambda v: np.zeros(v.shape, jax.dtypes.float0), fixed)
    gradients = _join(pull_back(grads)[0], nothing)
    mean = jnp.mean(values)
    return ((mean, aux) if has_aux else mean), gradients


def _over_all(
    loss: Callable[..., Tree], params: Tree, microbatches: tuple[Tree, ...]
) -> tuple[Tree, Tree]:
    """Results of `loss`, `[M, ...]`, and the mean of its gradients."""
    run = jax.value_and_grad(loss, has_aux=True)

    def step(sums: Tree, microbatch: tuple[Tree, ...]) -> tuple[Tree, Tree]:
        result, grads = run(params, microbatch)
        return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), result

    start = jax.tree.map(_zeros, params)
    sums, results = jax.lax.scan(step, start, microbatches)
    num = jax.tree.leaves(microbatches)[0].shape[0]
    return results, jax.tree.map(lambda s, v: (s / num).astype(v.dtype), sums, params)


def _separate(tree: Tree) -> tuple[Tree, Tree]:
    """The leaves of `tree` that have gradients, and the others; None for the rest."""
    tree = jax.tree.map(jnp.asarray, tree)
    moving = jax.tree.map(lambda leaf: leaf if _is_moving(leaf) else None, tree)
    return moving, jax.tree.map(lambda leaf: None if _is_moving(leaf) else leaf, tree)


def _is_moving(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _join(one: Tree, other: Tree) -> Tree:
    """The inverse of `_separate`."""
    return jax.tree.map(
        lambda leaf, instead: instead if leaf is None else leaf,
        one,
        other,
        is_leaf=lambda leaf: leaf is None,
    )


def _zeros(leaf: jax.Array) -> jax.Array:
    """Where to sum values such as `leaf`: low precision adds up in float32."""
    return jnp.zeros_like(leaf, leaf.dtype if leaf.dtype.itemsize >= 4 else jnp.float32)


def _check_microbatches(
    loss: Callable[..., Tree], params: Tree, trees: tuple[Tree, ...]
) -> str:
    """Checks what `accumulate` is given; returns how errors name it."""
    _checks.function(loss, "accumulate", "Write accumulate(loss, params, x, y).")
    where = f"accumulate of {_checks.name_of(loss)!r}"
    first, *names = _checks.argument_names(loss, len(trees) + 1)
    _checks.arrays(params, f"{where}: argument `{first}`")
    lengths: dict[str, int] = {}
    for name, tree in zip(names, trees, strict=True):
        for at, leaf in _checks.leaves_at(tree):
            lengths[f"`{name}`{at}"] = _length(
                leaf, f"{where}: microbatches `{name}`{at}"
            )
    if not lengths:
        raise TypeError(
            f"{where}: no microbatches. Write accumulate(loss, params, x, y) with "
            "arrays [M, ...]."
        )
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        found = ", ".join(f"{length} in {at}" for at, length in lengths.items())
        raise ValueError(
            f"{where}: expected one leading axis M, at least 1, in all microbatches; "
            f"found {found}. Write x.reshape(M, -1, *x.shape[1:]) for a batch x."
        )
    return where


def _length(leaf: Tree, what: str) -> int:
    """How many microbatches a leaf holds."""
    if isinstance(leaf, jax.ShapeDtypeStruct) or not getattr(leaf, "shape", ()):
        raise TypeError(
            f"{what} is a {type(leaf).__name__} without axes; expected an array "
            "[M, ...]. Close over what all microbatches share."
        )
    return int(leaf.shape[0])


def _check_result(result: Tree, has_aux: bool, where: str) -> None:
    """Checks what a loss returns."""
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{where}: has_aux=True, the loss must return a pair (loss, aux). "
                "Return (loss, None), or leave has_aux out."
            )
        result = result[0]
    elif isinstance(result, tuple):
        raise TypeError(
            f"{where}: the loss returned a tuple of {len(result)}; expected a scalar. "
            "Pass has_aux=True if it is a pair (loss, aux)."
        )
    shape = getattr(result, "shape", None)
    if shape != () or not jnp.issubdtype(result.dtype, jnp.floating):
        found = type(result).__name__ if shape is None else jax.typeof(result)
        raise TypeError(
            f"{where}: the loss must return one floating-point number, not {found}. "
            "Take the mean."
        )
