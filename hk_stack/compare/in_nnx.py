"""The models in Flax NNX: blocks made by `nnx.vmap`, run by `nnx.scan`; or in a list.

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

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)[...]


def _attend(part: Part, module: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return module(x, mask=jnp.tri(x.shape[1], dtype=bool)[None, None])


def _spectral(part: Part, module: Any, x: jax.Array) -> jax.Array:
    return models.spectral(module.kernel[...], module.bias[...], x)


_RUN = {"attention": _attend, "spectral": _spectral}


def _made(part: Part, rngs: nnx.Rngs) -> Any:
    size, other = part.size, int(part.other)
    match part.kind:
        case "norm":
            return nnx.LayerNorm(size, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        case "attention":
            return nnx.MultiHeadAttention(other, size, decode=False, rngs=rngs)
        case "s4":
            return S4(part, rngs)
        case "vector":
            return nnx.Param(part.other * jax.random.normal(rngs.params(), (size,)))
    return nnx.Linear(size, other, rngs=rngs)


class Block(nnx.Module):
    """A block of a model, of its parts."""

    def __init__(self, model: models.Model, rngs: nnx.Rngs):
        self.model = model
        for name, part in model.parts.items():
            setattr(self, name, _made(part, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block."""
        return self.model.block(self.parts(), x)

    def parts(self, length: int | None = None) -> Any:
        """What `models.MODELS` takes as parts."""
        made = {name: getattr(self, name) for name in self.model.parts}
        made = {
            name: part[...] if isinstance(part, nnx.Param) else part
            for name, part in made.items()
        }
        return models.bound(self.model.parts, made, _RUN, length=length)


class ScanStack(nnx.Module):
    """`L` blocks, `[B, T, D] -> [B, T, D]`."""

    def __init__(self, model: models.Model, num_layers: int, rngs: nnx.Rngs):
        make: Any = nnx.vmap(lambda rngs: Block(model, rngs))
        each: Any = nnx.split_rngs(splits=num_layers)
        self.block = each(make)(rngs)

    def __call__(self, x: jax.Array) -> Any:
        """Applies the stack."""
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(lambda block, x: block(x))(self.block, x)

    def step(self, x: jax.Array, states: jax.Array, length: int) -> Any:
        """One step of time, from `x` `[B, D]` and states `[L, B, D, N]`."""
        scan = nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))

        def step(block: Block, x: jax.Array, state: jax.Array) -> Any:
            return models.s4_step(block.parts(length), x, state)

        return scan(step)(self.block, x, states)


class LoopStack(nnx.Module):
    """`L` blocks in a list, by a Python loop, with `L` sets of parameters."""

    def __init__(self, model: models.Model, num_layers: int, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(model, rngs) for _ in range(num_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the stack."""
        for block in self.blocks:
            x = block(x)
        return x


# What `models` asks of a framework

STACKS: dict[str, Any] = {"nnx.scan": ScanStack, "loop": LoopStack}
WAYS = ("nnx.scan", "loop", "loop + roll")
WAYS_OF = {"eager": ("loop",)}
_RULES: dict[str, Any] = {
    "nnx.scan": {"rename": {"block": "layers/block"}, "layer_axis": {"block": 0}},
    "loop": {"rename": {"blocks/*": "layers/*/block"}, "layer_axis": {"blocks": ()}},
}


def stack(way: str, given: models.Given) -> models.Stack:
    """The blocks, as pure functions of their NNX state."""
    graph, like = _split(way, given)
    typed = models.types(like, given.x.dtype)

    def init(key: jax.Array, x: jax.Array) -> Any:
        return nnx.state(STACKS[way](given.model, given.num_layers, nnx.Rngs(key)))

    return models.Stack(
        hk_stack.haiku_to_flax((given.params, {}), typed, **_RULES[way]),
        lambda state, x: nnx.merge(graph, state)(x),
        init,
        lambda state: hk_stack.flax_to_haiku(state, given.typed, **_RULES[way])[0],
    )


def decoder(way: str, given: models.Given) -> models.Stack | None:
    """The S4 blocks of `nnx.scan`, one step of time."""
    if way != "nnx.scan":
        return None
    graph, _ = _split(way, given)
    length = given.x.shape[1]

    def step(state: Any, x: jax.Array, states: Any) -> Any:
        return nnx.merge(graph, state).step(x, states, length)

    return models.Stack(stack(way, given).params, step, states=given.states)


def _split(way: str, given: models.Given) -> tuple[Any, Any]:
    """The graph and the shapes of the state, without making any array."""

    def make() -> Any:
        rngs = nnx.Rngs(jax.random.key(0))
        return STACKS[way](given.model, given.num_layers, rngs)

    return nnx.split(nnx.eval_shape(make))
