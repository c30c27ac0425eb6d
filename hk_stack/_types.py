"""Names of types that say more than `Any`."""

from typing import Any

import haiku as hk
import jax

Tree = Any  # a pytree of arrays
Params = hk.Params  # of a transform, by module and name
State = hk.State
Key = jax.Array | None  # a random key, or those of all layers
Carry = tuple[Tree, ...]  # what goes from layer to layer, by argument
Derived = dict[str, dict[str, jax.Array]]  # what `Partition.setup` returns
