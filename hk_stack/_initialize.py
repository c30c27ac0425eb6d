"""Stacked initial parameters and state, for many layers at once.

Initial values need the initialisers only, not the forward passes of the layers. So the
initialisation of one layer is traced, all that its initial values do not depend on is
dropped, and what is left runs in batches of layers, under `hk.vmap`; in a loop inside
`jit`, where a batch takes longer to compile than it saves. Where an initial value
depends on the activations, the layers have to run one after the other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import _cost, _eager, _flat, _layout, _loop

METHODS = ("auto", "vmap", "map", "scan")


class Layer(NamedTuple):
    """One layer as pure functions.

    Attributes:
      init: `(key, carry, per_layer) -> (params, state)`, before any call.
      apply: `(params, state, key, carry, per_layer) -> ((carry, output), state)`.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def initialize(
    layer: Layer,
    num_layers: int,
    key: jax.Array | None,
    carry: Any,
    per_layer: Any,
    *,
    method: str,
    where: str,
) -> tuple[Any, Any]:
    """Initial parameters and state of a stack.

    Equal to this loop, with the results stacked; the `apply` calls matter, and are
    made, only where initial values depend on the activations:

    ```
    for i in range(num_layers):
        init_key, key, apply_key = jax.random.split(key, 3)
        params[i], state[i] = layer.init(init_key, carry, per_layer[i])
        (carry, _), _ = layer.apply(params[i], state[i], apply_key, carry, per_layer[i])
    ```

    Args:
      layer: The layer.
      num_layers: `L`.
      key: A random key, or None if the initialisers need none.
      carry: What the first layer is given.
      per_layer: A pytree of arrays `[L, ...]`.
      method: "vmap" runs the initialisers batched, "map" one layer after another,
        "scan" the loop above. "auto" is "vmap", but "map" inside `jit`, and where a
        batch would compute other values (random bits of all keys but threefry's), and
        "scan" if an initial value depends on the activations.
      where: Names the stack in errors.

    Returns:
      Parameters and state with leaves `[L, ...]`.

    Raises:
      ValueError: If "vmap" or "map" is asked for and an initial value depends on the
        activations; it names the value.
    """
    if method != "scan":
        traced = _trace(layer, key, carry, per_layer)
        if not traced.dependent:
            own = jax.tree.leaves((key, carry, per_layer))
            return _run_initialisers(traced, num_layers, own, key is not None, method)
        if method != "auto":
            raise ValueError(
                f'{where}: init="{method}" runs the initialisers without the layers, '
                f"but the initial value of {', '.join(traced.dependent)} depends on "
                'the activations. Use init="scan", or init="auto", which finds this '
                "out."
            )
    return _one_after_another(layer, num_layers, key, carry, per_layer)


class _Traced(NamedTuple):
    """A layer's `init`, traced.

    Attributes:
      flattened: Its equations.
      constants: What it closes over: the first inputs of `flattened`.
      dependent: Names of the initial values that depend on the activations.
      tree: The structure of parameters and state.
    """

    flattened: _flat.Flat
    constants: list[Any]
    dependent: list[str]
    tree: Any


def _trace(layer: Layer, key: Any, carry: Any, per_layer: Any) -> _Traced:
    """Traces `layer.init`, and finds out what depends on the activations."""
    trace = jax.make_jaxpr(layer.init, return_shape=True)
    closed, shapes = trace(key, carry, _layout.drop_layers(per_layer))
    start = len(closed.consts) + len(jax.tree.leaves(key))
    activations = _flat.bits([False] * start + [True] * len(jax.tree.leaves(carry)))
    flattened = _flat.flatten(closed, lambda _, reads: bool(reads & activations))
    paths, tree = jax.tree.flatten_with_path(shapes)
    dependent = [
        _leaf_name(path)
        for (path, _), value in zip(paths, flattened.outputs, strict=True)
        if flattened.dependencies(value) & activations
    ]
    return _Traced(flattened, closed.consts, dependent, tree)


def _run_initialisers(
    traced: _Traced, num_layers: int, own: list[Any], has_key: bool, method: str
) -> tuple[Any, Any]:
    """Runs the initialisers of all layers; a key is the first of their `own` inputs."""
    initialisers, reads = _flat.program(traced.flattened, traced.flattened.outputs)
    inputs = [*traced.constants, *own]
    values = [inputs[i] for i in reads]
    start = len(traced.constants)
    shared = sum(i < start for i in reads)
    key = inputs[start] if has_key and start in reads else None
    in_jit = any(isinstance(value, jax.core.Tracer) for value in values)
    size = 1
    if (method == "vmap" and not _cost.is_narrowed(initialisers.jaxpr)) or (
        method == "auto" and not in_jit and _cost.can_batch(initialisers.jaxpr)
    ):
        size = _loop.batch_size(num_layers, _cost.largest_value(initialisers.jaxpr))
    # JAX's cache does not know what kind of key an array of integers is.
    kind = None if key is None else str(jax.random.key_impl(key))
    leaves = _eager.call(
        functools.partial(_run, initialisers, num_layers, shared, kind, size),
        values,
        lambda structure: (structure(initialisers), num_layers, shared, kind, size),
    )
    return jax.tree.unflatten(traced.tree, leaves)


def _run(
    initialisers: jex.ClosedJaxpr,
    num_layers: int,
    shared: int,
    kind: str | None,
    size: int,
    values: list[Any],
) -> list[jax.Array]:
    """Runs the initialisers, `size` layers at a time.

    The first `shared` of `values` are the same for all layers. Then there may be a key
    of this `kind`; the rest are `[L, ...]`.
    """
    given, own = values[:shared], values[shared:]

    def one(own: list[Any]) -> list[jax.Array]:
        return jex.jaxpr_as_fun(initialisers)(*given, *own)

    if size == 1:
        return _in_turn(one, num_layers, kind, own)
    if kind:
        own = [_init_keys(own[0], num_layers), *own[1:]]
    # The layer's number is mapped over too, as nothing else may be. A transform of its
    # own keeps all this pure, so that it can be compiled.
    run = hk.transform(
        functools.partial(
            _loop.in_batches,
            lambda numbered: one(numbered[1:]),
            size=size,
            remat=False,
            vmap=functools.partial(hk.vmap, split_rng=False),
        )
    )
    return run.apply({}, None, [jnp.arange(num_layers), *own])


def _in_turn(
    one: Callable[[list[Any]], list[jax.Array]],
    num_layers: int,
    kind: str | None,
    own: list[Any],
) -> list[jax.Array]:
    """Runs the initialisers layer after layer, with keys that are made on the way."""

    def step(key: Any, own: list[Any]) -> tuple[Any, list[jax.Array]]:
        if not kind:
            return key, one(own)
        init_key, key, _ = jax.random.split(key, 3)
        return key, one([init_key, *own])

    key, rows = (own[0], own[1:]) if kind else (None, own)
    return _loop.run(step, key, rows, num_layers=num_layers)[1]


def _one_after_another(
    layer: Layer, num_layers: int, key: jax.Array | None, carry: Any, per_layer: Any
) -> tuple[Any, Any]:
    """Initialises each layer on the activations that the one before it left."""

    def step(before: tuple[Any, Any], own: Any) -> tuple[tuple[Any, Any], Any]:
        carry, key = before
        init_key, key, apply_key = _three_keys(key)
        params, state = layer.init(init_key, carry, own)
        (carry, _), _ = layer.apply(params, state, apply_key, carry, own)
        return (carry, key), (params, state)

    return _loop.run(step, (carry, key), per_layer, num_layers=num_layers)[1]


def _three_keys(key: jax.Array | None) -> Any:
    return (None, None, None) if key is None else jax.random.split(key, 3)


def _init_keys(key: jax.Array, num_layers: int) -> jax.Array:
    """The key that each layer is initialised with, `[L, ...]`.

    ```
    for i in range(num_layers):
        keys[i], key, _ = jax.random.split(key, 3)
    ```
    """

    def step(key: jax.Array, own: None) -> tuple[jax.Array, jax.Array]:
        del own
        init_key, key, _ = jax.random.split(key, 3)
        return key, init_key

    return _loop.run(step, key, None, num_layers=num_layers)[1]


def _leaf_name(path: tuple[Any, ...]) -> str:
    """`linear/w` for the path of a leaf in `(params, state)`."""
    kind = ("parameter", "state")[path[0].idx]
    return f"{kind} {jax.tree_util.keystr(path[1:], simple=True, separator='/')}"
