"""The models in Equinox: blocks made by `eqx.filter_vmap` and scanned; or in a list.

Shapes and parameters as in `in_haiku`; Equinox's own initial distributions, but for S4.
Its linear layers hold their weights transposed, and its modules see one vector at a
time, so they are vmapped over batch and time.
"""

import functools
import operator
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
    return jax.vmap(lambda h: module(h, h, h, mask))(x)


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
    """A block of a model, of its parts; with a `length`, one step of time of it."""

    parts: dict[str, Any]
    model: models.Model = eqx.field(static=True)
    length: int | None = eqx.field(static=True)

    def __init__(self, model: models.Model, length: int | None, key: jax.Array):
        self.model, self.length = model, length
        keys = jax.random.split(key, len(model.parts))
        self.parts = {
            name: _made(part, key)
            for key, (name, part) in zip(keys, model.parts.items(), strict=True)
        }

    def __call__(self, x: jax.Array, *state: jax.Array) -> Any:
        """Applies the block."""
        parts = models.bound(self.model.parts, self.parts, _RUN, length=self.length)
        return self.model.run(parts, x, *state)


# What `models` asks of a framework

WAYS = ("filter_vmap + scan", "loop", "loop + roll")
WAYS_OF = {"eager": ("loop",)}


def stack(way: str, given: models.Given) -> models.Stack | None:
    """The blocks, as pure functions of the arrays of a stacked block, or of a list."""
    is_loop = way == "loop"
    if is_loop and given.decodes:
        return None

    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, given.num_layers)
        block = functools.partial(Block, given.model, given.length)
        return [block(key) for key in keys] if is_loop else eqx.filter_vmap(block)(keys)

    module = eqx.filter_eval_shape(make, jax.random.key(0))
    like, static = eqx.partition(module, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def scan(arrays: Any, *args: jax.Array) -> Any:
        def layer(arrays: Any, *args: jax.Array) -> Any:
            return eqx.combine(arrays, static)(*args)

        x, *states = args
        return models.scan(layer, x, arrays, *states)

    def loop(arrays: Any, x: jax.Array) -> jax.Array:
        for block in eqx.combine(arrays, static):
            x = block(x)
        return x

    def init(key: jax.Array, x: jax.Array) -> Any:
        return eqx.filter(make(key), eqx.is_array)

    if not is_loop:
        params = _from_haiku(given.params, like)
        return models.Stack(params, scan, init, _to_haiku)
    stacked = _from_haiku(given.params, like[0])
    params = [jax.tree.map(operator.itemgetter(i), stacked) for i in range(len(like))]
    return models.Stack(
        params,
        loop,
        init,
        lambda blocks: _to_haiku(jax.tree.map(lambda *each: jnp.stack(each), *blocks)),
    )


def _haiku_name(path: Any) -> tuple[str, str]:
    """Module and name of a leaf in Haiku."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    *modules, name = [name.removesuffix("_proj") for name in names[1:]]
    modules = ["linear" if name == "output" else name for name in modules]
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
