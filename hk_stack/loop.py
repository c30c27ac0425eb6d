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
