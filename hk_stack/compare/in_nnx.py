"""The models in Flax NNX: blocks made by `nnx.vmap`, run by `nnx.scan`; or in a list.

Shapes, parameters and initial distributions as in `in_haiku`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
    """A block of a model, of its parts; with a `length`, one step of time of it."""

    def __init__(self, model: models.Model, length: int | None, rngs: nnx.Rngs):
        self.model, self.length = model, length
        for name, part in model.parts.items():
            setattr(self, name, _made(part, rngs))

    def __call__(self, x: jax.Array, *state: jax.Array) -> Any:
        """Applies the block."""
        made = {name: getattr(self, name) for name in self.model.parts}
        made = {
            name: part[...] if isinstance(part, nnx.Param) else part
            for name, part in made.items()
        }
        parts = models.bound(self.model.parts, made, _RUN, length=self.length)
        return self.model.run(parts, x, *state)


class ScanStack(nnx.Module):
    """`L` blocks, each a function `rngs -> block`."""

    def __init__(self, block: Any, num_layers: int, rngs: nnx.Rngs):
        each: Any = nnx.split_rngs(splits=num_layers)
        self.block = each(nnx.vmap(block))(rngs)

    def __call__(self, x: jax.Array, *states: jax.Array) -> Any:
        """Applies the stack, with states `[L, B, D, N]` for a step."""
        ins = [0 for _ in states]
        scan = nnx.scan(
            in_axes=(0, nnx.Carry, *ins),
            out_axes=(nnx.Carry, *ins) if ins else nnx.Carry,
        )
        return scan(lambda block, *args: block(*args))(self.block, x, *states)


class LoopStack(nnx.Module):
    """`L` blocks in a list, by a Python loop, with `L` sets of parameters."""

    def __init__(self, block: Any, num_layers: int, rngs: nnx.Rngs):
        self.blocks = nnx.List([block(rngs) for _ in range(num_layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the stack."""
        for block in self.blocks:
            x = block(x)
        return x


# What `models` asks of a framework

WAYS = ("nnx.scan", "loop", "loop + roll")
WAYS_OF = {"eager": ("loop",)}
_STACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "nnx.scan": (
        ScanStack,
        {"rename": {"block": "layers/block"}, "layer_axis": {"block": 0}},
    ),
    "loop": (
        LoopStack,
        {"rename": {"blocks/*": "layers/*/block"}, "layer_axis": {"blocks": ()}},
    ),
}


def stack(way: str, given: models.Given) -> models.Stack | None:
    """The blocks, as pure functions of their NNX state."""
    if given.decodes and way == "loop":
        return None
    made, rules = _STACKS[way]

    def make(key: jax.Array) -> Any:
        block = functools.partial(Block, given.model, given.length)
        return made(block, given.num_layers, nnx.Rngs(key))

    # The graph and the shapes of the state, without making any array.
    graph, like = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    return models.flax_stack(
        given,
        lambda state, *args: nnx.merge(graph, state, copy=True)(*args),
        lambda key, x: nnx.state(make(key)),
        like,
        **rules,
    )
