"""The only loop over layers."""

from collections.abc import Callable
from typing import Any

import jax


def scan(
    layer: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any,
    *,
    num_layers: int,
    unroll: int | bool = 1,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Runs `num_layers` layers one after the other.

    Equal to this loop, with the outputs stacked:

    ```
    for i in reversed(range(num_layers)) if reverse else range(num_layers):
        carry, outputs[i] = layer(carry, jax.tree.map(lambda leaf: leaf[i], per_layer))
    ```

    Args:
      layer: One layer, `(carry, per_layer) -> (carry, output)`.
      carry: What the first layer is given.
      per_layer: A pytree of arrays `[L, ...]`: what each layer gets of its own.
      num_layers: `L`.
      unroll: How many layers one step of the compiled loop holds.
      reverse: Whether the last layer runs first.

    Returns:
      The last carry, and the outputs `[L, ...]`.
    """
    return jax.lax.scan(
        layer, carry, per_layer, length=num_layers, unroll=unroll, reverse=reverse
    )


def in_batches(
    run: Callable[[list[Any]], list[Any]],
    values: list[Any],
    *,
    size: int,
    vmap: Callable[..., Any] = jax.vmap,
) -> list[Any]:
    """Runs all layers independently of one another, `size` of them at a time.

    Equal to this loop, with the results stacked:

    ```
    for i in range(L):
        results[i] = run([value[i] for value in values])
    ```

    With more than one batch, the backward pass runs each batch again instead of keeping
    what it computed on the way, which may be large.

    Args:
      run: One layer.
      values: Arrays `[L, ...]`.
      size: Layers in a batch; divides `L`. A batch of one layer is no batch: `run` is
        not transformed.
      vmap: What makes a batch of `run`.

    Returns:
      Arrays `[L, ...]`.
    """
    num_layers = values[0].shape[0]
    if size == num_layers > 1:
        return vmap(run)(values)
    batch = jax.checkpoint(vmap(run) if size > 1 else run, prevent_cse=False)
    shape = (num_layers // size, size) if size > 1 else (num_layers,)
    split = [value.reshape(*shape, *value.shape[1:]) for value in values]
    _, results = jax.lax.scan(lambda _, own: (None, batch(own)), None, split)
    drop = len(shape)
    return [r.reshape(num_layers, *r.shape[drop:]) for r in results]


def batch_size(num_layers: int, nbytes: int) -> int:
    """How many layers to run at once, if the largest value of each takes `nbytes`.

    Batching is for work made of many small steps. Past `BATCH_BYTES` it saves nothing
    and costs cache and memory: the more so, the larger the values are.

    >>> batch_size(12, 2**10)
    12
    >>> batch_size(12, 2**21)
    4
    """
    most = max(1, BATCH_BYTES // max(1, nbytes))
    return max(k for k in range(1, num_layers + 1) if num_layers % k == 0 and k <= most)


# Measured on a CPU, for S4 kernels and for random initial values.
BATCH_BYTES = 8 * 2**20
