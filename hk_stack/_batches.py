"""Many layers independently of one another: setup and initialisers, in batches."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_batches(
    run: Callable[[list[Any]], list[Any]],
    run_several: Callable[[list[Any]], list[Any]],
    values: list[Any],
    *,
    size: int,
    remat: bool | None = None,
) -> list[Any]:
    """Runs all layers independently of one another, `size` of them at a time.

    Equal to this loop, with the results stacked:

    ```
    for i in range(L):
        results[i] = run([value[i] for value in values])
    ```

    Args:
      run: One layer.
      run_several: A batch of layers, all arrays with a leading axis.
      values: Arrays `[L, ...]`.
      size: Layers in a batch; the last batch may be smaller. A batch of one layer is no
        batch: `run` runs it. So it is where `run_several` fails: some primitives have
        no batches, or not of all their uses.
      remat: Whether the backward pass runs each batch again instead of keeping what it
        computed on the way, which may be large; by default, if there is more than one.

    Returns:
      Arrays `[L, ...]`.
    """
    num_layers = values[0].shape[0]
    if size > 1 and num_layers > 1:
        with contextlib.suppress(Exception):  # Of any kind: the primitive's author's.
            return _in_batches(run_several, values, size, remat)
    return _in_batches(run, values, 1, remat)


def _in_batches(
    batch: Callable[[list[Any]], list[Any]],
    values: list[Any],
    size: int,
    remat: bool | None,
) -> list[Any]:
    num_layers = values[0].shape[0]
    if size < num_layers if remat is None else remat:
        # In the loop over batches nothing can be merged with the backward pass; outside
        # of one XLA would undo the rematerialisation.
        batch = jax.checkpoint(batch, prevent_cse=size >= num_layers)
    if num_layers == 1:
        return [result[None] for result in batch([v[0] for v in values])]
    if size == 1:
        return list(jax.lax.map(batch, values))
    if size >= num_layers:
        return batch(values)
    whole = num_layers - num_layers % size
    split = [v[:whole].reshape(-1, size, *v.shape[1:]) for v in values]
    results = jax.lax.map(batch, split)
    results = [r.reshape(whole, *r.shape[2:]) for r in results]
    if whole == num_layers:
        return results
    rest = batch([v[whole:] for v in values])
    return [jnp.concatenate(pair) for pair in zip(results, rest, strict=True)]


def batch_size(num_layers: int, nbytes: int, limit: int | None = None) -> int:
    """How many layers to run at once, if the largest value of each takes `nbytes`.

    Batching is for work made of many small steps. Past a limit it saves nothing and
    costs cache and memory: the more so, the larger the values are.

    >>> batch_size(12, 2**10, limit=2**23)
    12
    >>> batch_size(12, 2**21, limit=2**23)
    4
    >>> batch_size(13, 2**21, limit=2**23)  # 3 batches of 4, and one more layer
    4

    Args:
      num_layers: `L`.
      nbytes: Of the largest value of a layer.
      limit: How large this value of a batch may be; by default, what is good for the
        default backend.
    """
    limit = _limit_of_backend() if limit is None else limit
    return even(num_layers, max(1, min(num_layers, limit // max(1, nbytes))))


def even(num_layers: int, most: int) -> int:
    """How many layers to take at once, of at most so many.

    A divisor of `L` spares the program a second copy of the layer, for what is left
    over; one that is much less than `most` is not worth it.

    >>> even(12, 4), even(9, 4), even(10, 4), even(13, 4)
    (4, 3, 4, 4)
    """
    divisor = max(k for k in range(1, most + 1) if num_layers % k == 0)
    return divisor if 2 * divisor > most else most


@functools.cache
def _limit_of_backend() -> int:
    platform = jax.default_backend()
    stats = None if platform == "cpu" else jax.local_devices()[0].memory_stats()
    return limit_of(platform, (stats or {}).get("bytes_limit"))


def limit_of(platform: str, memory: int | None) -> int:
    """How many bytes the largest value of a batch may take.

    A CPU's is measured, for S4 kernels and for random initial values: its caches are
    small. Accelerators run many small steps one after the other, each far below what
    they can do at once, so there the memory is the limit.

    >>> limit_of("cpu", None) // 2**20, limit_of("gpu", 80 * 2**30) // 2**20
    (8, 256)
    >>> limit_of("tpu", 8 * 2**30) // 2**20
    128
    """
    if platform == "cpu":
        return 8 * 2**20
    return min(256 * 2**20, memory // 64) if memory else 256 * 2**20


def most_in_branches() -> int:
    """How large values of one layer may be for a batch with conditionals to pay.

    Measured on a CPU for matrix exponentials: from width 16 on, one layer after another
    was faster, as each runs its own branch alone, and large products fill a core.
    """
    return 2**10 if jax.default_backend() == "cpu" else limit_of("", None)
