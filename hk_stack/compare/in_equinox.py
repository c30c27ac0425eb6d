"""The models in Equinox: blocks made by `eqx.filter_vmap` and scanned; or in a list.

Shapes and parameters as in `in_haiku`; Equinox's own initial distributions, but for S4.
Its linear layers hold their weights transposed, and its modules see one vector at a
time, so they are vmapped over batch and time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hk_stack.compare import models, s4
from hk_stack.compare.models import Part

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "hk_stack.compare.in_equinox needs Equinox: pip install equinox"
    ) from error


def _each(part: Part, module: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """A module of vectors, for each of `x` `[..., D]`."""
    for _ in range(x.ndim - 1):
        module = jax.vmap(module)
    return module(x)


def _attend(part: Part, module: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    mask = jnp.tri(x.shape[1], dtype=bool)

    def attend(h: jax.Array) -> jax.Array:
        return module(h, h, h, mask)

    return jax.vmap(attend)(x)


def _spectral(part: Part, module: Any, x: jax.Array) -> jax.Array:
    return models.spectral(module.weight.T, module.bias, x)


_RUN = {"norm": _each, "linear": _each, "attention": _attend, "spectral": _spectral}


def _made(part: Part, key: jax.Array) -> Any:
    size, other = part.size, int(part.other)
    match part.kind:
        case "norm":
            return eqx.nn.LayerNorm(size)
        case "attention":
            names = ("query", "key", "value", "output")
            biases: dict[str, Any] = {f"use_{name}_bias": True for name in names}
            return eqx.nn.MultiheadAttention(other, size, key=key, **biases)
        case "s4":
            table = s4.parameters(size, other)
            keys = jax.random.split(key, len(table))
            return {
                name: init(key, shape, jnp.float32)
                for key, (name, (shape, init)) in zip(keys, table.items(), strict=True)
            }
        case "vector":
            return part.other * jax.random.normal(key, (size,))
    return eqx.nn.Linear(size, other, key=key)


class Block(eqx.Module):
    """A block of a model, of its parts."""

    parts: dict[str, Any]
    model: models.Model = eqx.field(static=True)

    def __init__(self, model: models.Model, key: jax.Array):
        self.model = model
        keys = jax.random.split(key, len(model.parts))
        self.parts = {
            name: _made(part, key)
            for key, (name, part) in zip(keys, model.parts.items(), strict=True)
        }

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block."""
        return self.model.block(self.bound(), x)

    def bound(self, length: int | None = None) -> Any:
        """The parts as functions."""
        return models.bound(self.model.parts, self.parts, _RUN, length=length)


# What `models` asks of a framework

WAYS = ("filter_vmap + scan", "loop", "loop + roll")
WAYS_OF = {"eager": ("loop",)}


def stack(way: str, given: models.Given) -> models.Stack:
    """The blocks, as pure functions of the arrays of a stacked block, or of a list."""
    return (_loop if way == "loop" else _scan)(given)


def _scan(given: models.Given) -> models.Stack:
    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, given.num_layers)
        return eqx.filter_vmap(lambda key: Block(given.model, key))(keys)

    arrays, static = _parts(make)

    def apply(arrays: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
            return eqx.combine(arrays, static)(x), None

        return jax.lax.scan(layer, x, arrays)[0]

    return models.Stack(
        _from_haiku(given.params, arrays),
        apply,
        lambda key, x: eqx.filter(make(key), eqx.is_array),
        _to_haiku,
    )


def _loop(given: models.Given) -> models.Stack:
    def make(key: jax.Array) -> list[Block]:
        keys = jax.random.split(key, given.num_layers)
        return [Block(given.model, key) for key in keys]

    arrays, static = _parts(make)

    def apply(arrays: Any, x: jax.Array) -> jax.Array:
        for block in eqx.combine(arrays, static):
            x = block(x)
        return x

    def params(i: int) -> models.Params:
        return jax.tree.map(lambda leaf: leaf[i], given.params)

    return models.Stack(
        [_from_haiku(params(i), like) for i, like in enumerate(arrays)],
        apply,
        lambda key, x: eqx.filter(make(key), eqx.is_array),
        lambda blocks: _to_haiku(jax.tree.map(lambda *each: jnp.stack(each), *blocks)),
    )


def decoder(way: str, given: models.Given) -> models.Stack | None:
    """The S4 blocks, one step of time."""
    if way == "loop":
        return None
    known = stack(way, given).params
    length = given.x.shape[1]

    def layer(x: jax.Array, scanned: Any) -> tuple[jax.Array, jax.Array]:
        block, state = scanned
        return models.s4_step(block.bound(length), x, state)

    def step(blocks: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return jax.lax.scan(layer, x, (blocks, states))

    return models.Stack(known, step, states=given.states)


def _parts(make: Any) -> tuple[Any, Any]:
    """The shapes of the arrays of a module, and the rest of it."""
    module = eqx.filter_eval_shape(make, jax.random.key(0))
    return eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


_MODULES = {
    "query_proj": "query",
    "key_proj": "key",
    "value_proj": "value",
    "output_proj": "linear",
}


def _haiku_name(path: Any) -> tuple[str, str]:
    """Module and name of a leaf in Haiku."""
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
    *modules, name = [_MODULES.get(name, name) for name in names if name != "parts"]
    norm = {"weight": "scale", "bias": "offset"}
    is_norm = bool(modules) and modules[-1].endswith("norm")
    known = norm if is_norm else {"weight": "w", "bias": "b"}
    return "/".join(["layers/block", *modules]), known.get(name, name)


def _transposed(name: str, leaf: jax.Array) -> jax.Array:
    return jnp.swapaxes(leaf, -1, -2) if name == "w" else leaf


def _from_haiku(params: models.Params, like: Any) -> Any:
    def leaf(path: Any, _: Any) -> jax.Array:
        module, name = _haiku_name(path)
        return _transposed(name, params[module][name])

    return jax.tree_util.tree_map_with_path(leaf, like)


def _to_haiku(tree: Any) -> models.Params:
    params: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        module, name = _haiku_name(path)
        params.setdefault(module, {})[name] = _transposed(name, leaf)
    return params
