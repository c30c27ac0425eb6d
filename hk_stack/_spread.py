"""Layers spread over the devices of one axis of a mesh: each runs its own share.

Layers that do not depend on one another need not run on every device. For `n` devices,
arrays `[L, ...]` become `[n, M, ...]`, the first axis spread over the devices: each
holds `M` layers, the last ones copies where `n` does not divide `L`. A batch takes `k`
layers of each device, `[n, k, ...]`, so that no layer leaves its device; what the
layers make is gathered once, at the end.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hk_stack import _batches, _cost, _equations

# JAX's caches know the value, so what was traced for one axis is not used for another.
_around: Any = jax.make_user_context(None)


def over(axis: str | None) -> contextlib.AbstractContextManager[None]:
    """Spreads the stacks that run in a `with` block, unless they ask for an axis."""
    context: contextlib.AbstractContextManager[None] = _around(axis)
    return context


def not_over(axis: str) -> contextlib.AbstractContextManager[Any]:
    """Spreads no stack in a `with` block over an axis just because one is around."""
    return over(None) if _around.value == axis else contextlib.nullcontext()


def in_force(asked: str | None, where: str) -> "Devices | None":
    """The devices that a stack is spread over which asks for an axis, if for any."""
    return devices(asked or _around.value, where)


class Devices(NamedTuple):
    """The devices of an axis of the mesh around.

    Attributes:
      axis: Its name.
      size: How many there are.
      is_explicit: Whether types say what is spread over it.
    """

    axis: str
    size: int
    is_explicit: bool

    def share(self, num_layers: int) -> int:
        """How many layers each device runs."""
        return -(-num_layers // self.size)

    def why_not(self, jaxpr: jex.Jaxpr, num_layers: int) -> str:
        """Why layers that compute `jaxpr` each are not spread; "" if they are."""
        if self.size == 1:
            return "there is one device"
        if num_layers == 1:
            return "there is one layer"
        if _names(jaxpr, self.axis):
            return f"it places values on {self.axis!r} itself"
        return _cost.no_batch(jaxpr)

    def _spread(self, values: jax.Array) -> jax.Array:
        """`[L, ...]` as `[M, n, ...]`."""
        values = jnp.asarray(values)
        missing = -len(values) % self.size
        if missing:  # With zeros, setup could make NaN.
            last = jax.lax.stop_gradient(values[-1:])
            copies = jnp.broadcast_to(last, (missing, *last.shape[1:]))
            values = jnp.concatenate([values, copies])
        split = values.reshape(self.size, -1, *values.shape[1:])
        if missing and not self.is_explicit:
            # Whole, so that gradients lose the copies after one gather.
            split = _constrained(split, None)
        return jnp.swapaxes(self._placed(split), 0, 1)

    def _placed(self, values: jax.Array) -> jax.Array:
        """`[n, k, ...]`, the first axis spread over the devices."""
        spec = _typed(values)[2:]
        if self.is_explicit:
            place = PartitionSpec(
                self.axis, None, *(_without(entry, self.axis) for entry in spec)
            )
            placed: jax.Array = jax.sharding.reshard(values, place)
            return placed
        return _constrained(values, self.axis)

    def _merged(self, values: jax.Array) -> jax.Array:
        """`[k, n, ...]` as `[n * k, ...]`, each layer where it is."""
        values = self._placed(jnp.swapaxes(values, 0, 1))
        return values.reshape(-1, *values.shape[2:])

    def _split(self, values: jax.Array) -> jax.Array:
        """The inverse of `_merged`."""
        shape = (self.size, -1, *values.shape[1:])
        return jnp.swapaxes(self._placed(values.reshape(shape)), 0, 1)

    def _gathered(self, values: jax.Array, num_layers: int, aval: Any) -> jax.Array:
        """`[M, n, ...]` as `[L, ...]`, all layers on all devices, each of a type."""
        values = jnp.swapaxes(values, 0, 1)
        shape = (self.size * values.shape[1], *values.shape[2:])
        if self.is_explicit:
            place = PartitionSpec(None, *aval.sharding.spec)
            # A `reshard` alone would count as a gather of the user's: see
            # `gathers_from`. This one keeps gradients whole in the loop they come from.
            whole = jax.lax.reshape(values, shape, out_sharding=place)
            whole = jax.sharding.reshard(whole, place)
        else:
            whole = _constrained(values, None).reshape(shape)
        return whole[:num_layers]


def devices(axis: str | None, where: str) -> Devices | None:
    """The devices of an axis of the mesh around, or an error that says what to write.

    Args:
      axis: The name of the axis; None for none.
      where: Names the stack or function in errors.

    Raises:
      ValueError: If there is no mesh around, it has no such axis, or a `jax.shard_map`
        has taken the axis.
    """
    if axis is None:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    found = f"{where}: setup_sharding={axis!r} names an axis of the mesh around"
    if mesh.empty:
        raise ValueError(
            f"{found}, but there is no mesh. Write with jax.set_mesh(mesh): around this"
            ", or leave setup_sharding out."
        )
    if axis not in mesh.axis_names:
        there = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(
            f"{found}, which has {there} only. Give one of them, or make the mesh with "
            f"an axis {axis!r}."
        )
    kind = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[axis]
    if kind is AxisType.Manual:
        raise ValueError(
            f"{found}, but a jax.shard_map has taken this axis: inside of it each "
            "device runs a program of its own. Leave setup_sharding out here, or give "
            "shard_map the axis_names of the other axes only."
        )
    return Devices(axis, mesh.shape[axis], kind is AxisType.Explicit)


def in_batches(
    devices: Devices,
    run: Callable[[list[Any]], list[Any]],
    values: list[Any],
    results: Sequence[Any],
    *,
    size: int,
    remat: bool | None,
) -> list[Any]:
    """Runs all layers independently of one another, each on one of the devices.

    Args:
      devices: Where.
      run: A batch of layers, all arrays with a leading axis.
      values: Arrays `[L, ...]`.
      results: The types of what one layer makes.
      size: Layers in a batch on each device; the last batch may be smaller.
      remat: See `_batches.in_batches`.

    Returns:
      Arrays `[L, ...]`, whole on each device.
    """

    def several(rows: list[Any]) -> list[Any]:
        made = run([devices._merged(row) for row in rows])
        return [devices._split(result) for result in made]

    def one_of_each(rows: list[Any]) -> list[Any]:
        return [result[0] for result in several([row[None] for row in rows])]

    spread = [devices._spread(value) for value in values]
    made = _batches.in_batches(one_of_each, several, spread, size=size, remat=remat)
    num_layers = len(values[0])
    pairs = zip(made, results, strict=True)
    return [devices._gathered(value, num_layers, aval) for value, aval in pairs]


def _typed(values: jax.Array) -> tuple[Any, ...]:
    """What the type of an array says of the mesh axes of each of its axes."""
    sharding: Any = jax.typeof(values).sharding
    return tuple(sharding.spec)


def _constrained(values: jax.Array, axis: str | None) -> jax.Array:
    """Arrays `[n, k, ...]`, the first axis on `axis` and the second on none."""
    if values.ndim == 2:
        # Without any free axis, this would count as a gather: see `gathers_from`.
        return _constrained(values[..., None], axis)[..., 0]
    free = PartitionSpec.UNCONSTRAINED
    # Types say it for axes of the mesh that are explicit, and go before.
    rest = [free if entry is None else None for entry in _typed(values)[2:]]
    spec = PartitionSpec(axis, None, *rest)
    constrained: jax.Array = jax.lax.with_sharding_constraint(values, spec)
    return constrained


def _without(entry: Any, axis: str) -> Any:
    """An entry of a `PartitionSpec` without a mesh axis."""
    if isinstance(entry, tuple):
        return tuple(name for name in entry if name != axis) or None
    return None if entry == axis else entry


def _names(jaxpr: jex.Jaxpr, axis: str) -> bool:
    """Whether a program says what is spread over a mesh axis."""
    params = (p for e in _equations.with_inner(jaxpr.eqns) for p in e.params.values())
    return any(axis in _axes(leaf) for p in params for leaf in jax.tree.leaves(p))


def _axes(param: object) -> set[str]:
    """The mesh axes that a parameter of an equation names."""
    spec = param.spec if isinstance(param, NamedSharding) else param
    if not isinstance(spec, PartitionSpec):
        return set()
    return {a for e in spec for a in (e if isinstance(e, tuple) else (e,)) if a}
