"""Stacked and per-layer trees: one tree with leading axis `[L, ...]`, or L without.

A naming map (Haiku's `hk.LayerStackTransparencyMapping`) says which module of layer i
goes with which stacked module.
"""

from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

Modules = Mapping[str, Mapping[str, Any]]


def stack_params(
    params: Modules, naming_map: hk.LayerStackTransparencyMapping
) -> dict[str, dict[str, Any]]:
    """Stacks the parameters (or state) of a Python loop of layers.

    Equal to this loop, for each stacked module `m` and leaf `w`:

    ```
    stacked[m][w] = jnp.stack(
        [params[naming_map.stacked_to_flat(m, i)][w] for i in range(L)]
    )
    ```

    Args:
      params: Leaves without a layer axis, by flat module name.
      naming_map: Which flat module belongs to which layer of which stacked module.
        Modules for which `flat_to_stacked` returns None are no part of the stack.

    Returns:
      Leaves `[L, ...]`, by stacked module name.

    Raises:
      ValueError: If two flat modules claim one layer, or a layer misses a leaf.
    """
    layers: dict[tuple[str, str], dict[int, Any]] = {}
    for flat_name, leaves in params.items():
        place = naming_map.flat_to_stacked(flat_name)
        if place is None:
            continue
        module, layer = place
        for name, leaf in leaves.items():
            taken = layers.setdefault((module, name), {})
            if layer in taken:
                raise ValueError(
                    f"stack_params: {flat_name}/{name} maps to layer {layer} of "
                    f"{module}/{name}, which another module has taken. "
                    "Give each layer a name of its own in the naming map."
                )
            taken[layer] = leaf
    depth = 1 + max((layer for found in layers.values() for layer in found), default=-1)
    stacked: dict[str, dict[str, Any]] = {}
    for (module, name), found in layers.items():
        missing = [
            f"{naming_map.stacked_to_flat(module, i)}/{name}"
            for i in range(depth)
            if i not in found
        ]
        if missing:
            raise ValueError(
                f"stack_params: {module}/{name} has {len(found)} of {depth} layers; "
                f"missing: {', '.join(missing)}."
            )
        trees = [found[i] for i in range(depth)]
        stacked.setdefault(module, {})[name] = jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *trees
        )
    return stacked


def unstack_params(
    params: Modules, naming_map: hk.LayerStackTransparencyMapping, num_layers: int
) -> dict[str, dict[str, Any]]:
    """Splits the parameters (or state) of a stack into those of each layer.

    The inverse of `stack_params`, for a tree that holds the stack's modules only.

    Args:
      params: Leaves `[L, ...]`, by stacked module name.
      naming_map: Which flat module belongs to which layer of which stacked module.
      num_layers: `L`.

    Returns:
      Leaves without a layer axis, by flat module name.

    Raises:
      ValueError: If two layers map to one flat module.
    """
    flat: dict[str, dict[str, Any]] = {}
    for module, leaves in params.items():
        for i in range(num_layers):
            flat_name = naming_map.stacked_to_flat(module, i)
            if flat_name in flat:
                raise ValueError(
                    f"unstack_params: layer {i} of {module} maps to {flat_name}, which "
                    "another layer has taken. Give each layer a name of its own."
                )
            flat[flat_name] = {
                name: jax.tree.map(lambda x, i=i: x[i], leaf)
                for name, leaf in leaves.items()
            }
    return flat


def drop_layers(tree: Any) -> Any:
    """The types of the leaves `[L, ...]` of `tree` without their `L`."""

    def first(leaf: jax.Array) -> jax.Array:
        return jax.lax.index_in_dim(leaf, 0, keepdims=False)

    return jax.eval_shape(lambda tree: jax.tree.map(first, tree), tree)
