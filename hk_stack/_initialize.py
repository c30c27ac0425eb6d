"""Stacked initial parameters and state, for many layers at once.

Initial values need the initialisers only, not the forward passes of the layers. So the
initialisation of one layer is traced, all that its initial values do not depend on is
dropped, and what is left runs in batches of layers; in a loop inside `jit`, where a
batch takes longer to compile than it saves. Where an initial value depends on the
activations, the layers have to run one after the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import (
    _batches,
    _checks,
    _cost,
    _eager,
    _equations,
    _flat,
    _guarded,
    _layout,
    _loop,
)
from hk_stack._layer import Given, Invocation
from hk_stack._types import Params, State


def initialize(invocation: Invocation, given: Given) -> tuple[Params, State]:
    """Initial parameters and state of a stack.

    Equal to this loop, with the results stacked; the `apply` calls matter, and are
    made, only where initial values depend on the activations:

    ```
    for i in range(L):
        init_key, key, apply_key = jax.random.split(key, 3)
        params[i], state[i] = layer.init(init_key, carry, own[i])
        carry = layer.apply(params[i], state[i], apply_key, carry, own[i])
    ```

    Args:
      invocation: Of the stack; its option `init` says how.
      given: What the layers are given, without parameters and state; its `keys` are one
        random key, or None if the initialisers need none.

    Returns:
      Parameters and state with leaves `[L, ...]`.

    Raises:
      ValueError: If "vmap" or "map" is asked for and an initial value depends on the
        activations; it names the value.
    """
    num_layers, method = invocation.options.num_layers, invocation.options.init
    if method == "scan":
        return _one_after_another(invocation, given)
    traced = _trace(invocation, given)
    if not traced.dependent:
        return _run_initialisers(traced, num_layers, given, method)
    if method == "auto":
        return _one_after_another(invocation, given)
    raise ValueError(
        f'{invocation.where}: init="{method}" runs the initialisers without the '
        f"layers, but the initial value of {', '.join(traced.dependent)} depends on "
        'the activations. Use init="scan", or init="auto", which finds this '
        "out."
    )


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


def _trace(invocation: Invocation, given: Given) -> _Traced:
    """Traces the `init` of a layer, and finds out what depends on the activations."""
    own = _layout.drop_layers(given._replace(keys=None, carry=None))
    trace = jax.make_jaxpr(invocation.by_name(invocation.init), return_shape=True)
    closed, shapes = trace(own._replace(keys=given.keys, carry=given.carry))
    is_carry = [path[0].name == "carry" for path, _ in jax.tree.leaves_with_path(given)]
    activations = _flat.bits([False] * len(closed.consts) + is_carry)
    flattened = _flat.flatten(closed, lambda _, reads: bool(reads & activations))
    paths, tree = jax.tree.flatten_with_path(shapes)
    dependent = [
        _leaf_name(path)
        for (path, _), value in zip(paths, flattened.outputs, strict=True)
        if flattened.dependencies(value) & activations
    ]
    return _Traced(flattened, closed.consts, dependent, tree)


class _Initialisers(NamedTuple):
    """The initialisers of a layer, and what they are given.

    Attributes:
      program: Takes the values that all layers share, a key, then a layer's own values.
      num_layers: `L`.
      num_shared: How many values all layers share.
      kind: Of the key; None if there is no key.
      size: How many layers run at once.
    """

    program: jex.ClosedJaxpr
    num_layers: int
    num_shared: int
    kind: str | None
    size: int

    def key(self, structure: _eager.Structure) -> Any:
        """All that `run` depends on."""
        return structure(self.program), self[1:]

    def run(self, values: list[Any]) -> list[jax.Array]:
        """Initial values `[L, ...]`, from the shared values, the key and `[L, ...]`."""
        shared, own = values[: self.num_shared], values[self.num_shared :]

        def one(own: list[Any]) -> list[jax.Array]:
            return _equations.run(self.program, *shared, *own)

        if self.size == 1:
            return _in_turn(one, self.num_layers, bool(self.kind), own)
        if self.kind:
            keys = _in_turn(lambda key: key, self.num_layers, True, own[:1])
            own = [*keys, *own[1:]]
        has_branches = _guarded.has_branches(self.program.jaxpr)
        batch = _guarded.vmap(
            self.program, [*[False] * len(shared), *[True] * len(own)]
        )

        def guarded(numbered: list[Any]) -> list[jax.Array]:
            return batch([*shared, *numbered[1:]])

        def of_numbered(numbered: list[Any]) -> list[jax.Array]:
            return one(numbered[1:])

        def batches(numbered: list[Any]) -> list[jax.Array]:
            # The layer's number is mapped over too, as nothing else may be.
            several: Any = hk.vmap(of_numbered, split_rng=False)
            return _batches.in_batches(
                of_numbered,
                guarded if has_branches else several,
                numbered,
                size=self.size,
                remat=False,
            )

        # A transform of its own keeps all this pure, so that it can be compiled.
        numbered = [jnp.arange(self.num_layers), *own]
        return list(hk.transform(batches).apply({}, None, numbered))


def _run_initialisers(
    traced: _Traced, num_layers: int, given: Given, method: str
) -> tuple[Params, State]:
    program, reads = _flat.program(traced.flattened, traced.flattened.outputs)
    num_constants = len(traced.constants)
    # Of `given` come first the key, then the carry, which nothing reads.
    inputs = [*traced.constants, *jax.tree.leaves(given)]
    values = [inputs[i] for i in reads]
    has_key = given.keys is not None and num_constants in reads
    initialisers = _Initialisers(
        program,
        num_layers,
        sum(i < num_constants for i in reads),
        # JAX's cache does not know what kind of key an array of integers is.
        str(jax.random.key_impl(given.keys)) if has_key else None,
        _size(program.jaxpr, num_layers, method, values),
    )
    where = _of_all_processes(given)
    leaves = _eager.run(initialisers.run, values, initialisers.key, where)
    params, state = jax.tree.unflatten(traced.tree, leaves)
    return params, state


def _of_all_processes(given: Given) -> jax.sharding.Sharding | None:
    """Where initial values go, if activations are spread over several processes.

    There they would be, had the layers run; each process would make its own otherwise.
    """
    for leaf in jax.tree.leaves(given):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            where = leaf.sharding
            if not leaf.is_fully_addressable and isinstance(where, jax.NamedSharding):
                return jax.NamedSharding(where.mesh, jax.P())
    return None


def _size(program: jex.Jaxpr, num_layers: int, method: str, values: list[Any]) -> int:
    """How many layers' initialisers run at once."""
    is_in_jit = any(isinstance(value, jax.core.Tracer) for value in values)
    if method == "vmap":
        is_batched = not _cost.is_narrowed(program)
    else:
        is_batched = method == "auto" and not is_in_jit and _cost.can_batch(program)
    if not is_batched:
        return 1
    return _batches.batch_size(num_layers, _cost.largest_value(program))


def _in_turn(
    one: Callable[[list[Any]], list[jax.Array]],
    num_layers: int,
    has_key: bool,
    own: list[Any],
) -> list[jax.Array]:
    """Runs the initialisers layer after layer, with keys that are made on the way."""

    def step(key: Any, own: list[Any]) -> tuple[Any, list[jax.Array]]:
        if not has_key:
            return key, one(own)
        init_key, key, _ = jax.random.split(key, 3)
        return key, one([init_key, *own])

    key, rows = (own[0], own[1:]) if has_key else (None, own)
    return list(_loop.run(step, key, rows, _loop.Schedule(num_layers))[1])


def _one_after_another(invocation: Invocation, given: Given) -> tuple[Params, State]:
    """Initialises each layer on the activations that the one before it left."""

    def step(before: tuple[Any, Any], own: Given) -> tuple[tuple[Any, Any], Any]:
        carry, key = before
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        init_key, key, apply_key = keys
        own = own._replace(carry=carry)
        params, state = invocation.init(own._replace(keys=init_key))
        after = invocation.apply(
            own._replace(params=params, state=state, keys=apply_key)
        )
        return (after.carry, key), (params, state)

    own = given._replace(carry=None, keys=None)
    start = given.carry, given.keys
    schedule = _loop.Schedule(invocation.options.num_layers)
    params, state = _loop.run(step, start, own, schedule)[1]
    return params, state


def _leaf_name(path: tuple[Any, ...]) -> str:
    """`linear/w` for the path of a leaf in `(params, state)`."""
    kind = ("parameter", "state")[path[0].idx]
    return f"{kind} {_checks.path_name(path[1:])}"
