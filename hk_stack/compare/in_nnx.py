"""The models in Flax NNX: blocks made by `nnx.vmap`, run by `nnx.scan`.

Shapes, parameters and initial distributions as in `in_haiku`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import hk_stack
from hk_stack.compare import models, s4
from hk_stack.compare.models import Part

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "hk_stack.compare.in_nnx needs Flax: pip install 'hk_stack[flax]'"
    ) from error


class S4(nnx.Module):
    """The parameters of S4, which are read as those of a dictionary."""

    def __init__(self, part: Part, rngs: nnx.Rngs):
        table = s4.parameters(part.size, int(part.other))
        for name, (shape, init) in table.items():
            setattr(self, name, nnx.Param(init(rngs.params(), shape, jnp.float32)))

    def __getitem__(self, name: str) -> jax.Array:
        return getattr(self, name)[...]


def _attend(part: Part, module: Any, x: jax.Array) -> jax.Array:
    return module(x, mask=jnp.tri(x.shape[1], dtype=bool)[None, None])


def _spectral(part: Part, module: Any, x: jax.Array) -> jax.Array:
    return x @ models.normalised(module.kernel[...]) + module.bias[...][None, None]


_RUN: dict[str, Callable[[Part, Any, jax.Array], jax.Array]] = {
    "norm": lambda part, module, x: module(x),
    "linear": lambda part, module, x: module(x),
    "attention": _attend,
    "spectral": _spectral,
}


def _norm(part: Part, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(part.size, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def _linear(part: Part, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(part.size, int(part.other), rngs=rngs)


def _attention(part: Part, rngs: nnx.Rngs) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(int(part.other), part.size, decode=False, rngs=rngs)


def _vector(part: Part, rngs: nnx.Rngs) -> Any:
    return nnx.Param(part.other * jax.random.normal(rngs.params(), (part.size,)))


_MAKE: dict[str, Callable[[Part, nnx.Rngs], Any]] = {
    "norm": _norm,
    "linear": _linear,
    "attention": _attention,
    "spectral": _linear,
    "s4": S4,
    "vector": _vector,
}


class Block(nnx.Module):
    """A block of a model, of its parts."""

    def __init__(self, model: models.Model, rngs: nnx.Rngs):
        self.model = model
        for name, part in model.parts.items():
            setattr(self, name, _MAKE[part.kind](part, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """From `x` `[B, T, D]` to `[B, T, D]`."""
        return self.model.block(self.parts(), x)

    def parts(self) -> Any:
        """What `models.MODELS` takes as parts."""
        made = {
            name: part[...] if isinstance(part, nnx.Param) else part
            for name, part in ((n, getattr(self, n)) for n in self.model.parts)
        }
        return models.bound(self.model.parts, made, _RUN)


class Layers(nnx.Module):
    """`L` blocks, `[B, T, D] -> [B, T, D]`."""

    def __init__(self, model: models.Model, num_layers: int, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: Block(model, rngs))
        self.block = nnx.split_rngs(splits=num_layers)(make)(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the stack."""
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(lambda block, x: block(x))(self.block, x)

    def step(
        self, x: jax.Array, states: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """One step of time, from `x` `[B, D]` and states `[L, B, D, N]`."""
        scan = nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))

        def step(block: Block, x: jax.Array, state: jax.Array) -> Any:
            return models.s4_step(block.parts(), x, state, length)

        return scan(step)(self.block, x, states)


# What `models` asks of a framework

WAYS = ("nnx.scan",)
WAYS_OF: dict[str, tuple[str, ...]] = {"eager": ()}
_RULES: Any = {"rename": {"block": "layers/block"}, "layer_axis": {"block": 0}}


def stack(way: str, given: models.Given) -> models.Stack:
    """The blocks, as pure functions of their NNX state."""
    model, num_layers, params, x = given
    del way
    graph, like = _split_abstractly(model, num_layers)
    haiku: Any = (models.types(params), {})
    return models.Stack(
        hk_stack.haiku_to_flax((params, {}), models.types(like, x.dtype), **_RULES),
        lambda state, x: nnx.merge(graph, state)(x),
        lambda key, x: nnx.state(Layers(model, num_layers, nnx.Rngs(key))),
        lambda state: hk_stack.flax_to_haiku(state, haiku, **_RULES)[0],
    )


def decoder(way: str, given: models.Given) -> models.Decoder:
    """The S4 blocks, one step of time."""
    model, num_layers, _, x = given
    graph, _ = _split_abstractly(model, num_layers)
    known = stack(way, given).params
    length = x.shape[1]

    def step(state: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return nnx.merge(graph, state).step(x, states, length)

    return models.Decoder(known, step, given.states)


def _split_abstractly(model: models.Model, num_layers: int) -> tuple[Any, Any]:
    """The graph and the shapes of the state, without making any array."""

    def make() -> Layers:
        return Layers(model, num_layers, nnx.Rngs(jax.random.key(0)))

    return nnx.split(nnx.eval_shape(make))
