"""The models in Flax NNX: blocks made by `nnx.vmap`, run by `nnx.scan`.

Shapes, parameters and initial distributions as in `in_haiku`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import hk_stack
from hk_stack.compare import in_haiku, models, s4

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "hk_stack.compare.in_nnx needs Flax: pip install 'hk_stack[flax]'"
    ) from error


class S4(nnx.Module):
    """One S4 layer, `[B, T, D] -> [B, T, D]`."""

    d: nnx.Param

    def __init__(self, width: int, state_size: int, rngs: nnx.Rngs):
        """Makes the parameters of `s4.parameters`."""
        for name, (shape, init) in s4.parameters(width, state_size).items():
            setattr(self, name, nnx.Param(init(rngs.params(), shape, jnp.float32)))

    def __call__(self, u: jax.Array) -> jax.Array:
        """Filters each feature of `u` `[B, T, D]` by its own linear system."""
        y = s4.convolve(u, s4.kernel(self._system(), u.shape[1]))
        return y + self.d[...][None, None] * u

    def step(
        self, u: jax.Array, state: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """One step of time, from `u` `[B, D]` and a state `[B, D, N]`."""
        system = s4.discretise(self._system(), length)
        state, y = s4.step(system, state, u)
        return y + self.d[...][None] * u, state

    def _system(self) -> s4.Dplr:
        names = s4.parameters(1, 1)
        return s4.dplr({name: getattr(self, name)[...] for name in names})


class S4Block(nnx.Module):
    """As `in_haiku.S4Block`, without dropout."""

    def __init__(self, width: int, state_size: int, rngs: nnx.Rngs):
        """Makes the block's modules."""
        self.norm = _norm(width, rngs)
        self.s4 = S4(width, state_size, rngs)
        self.gate = nnx.Linear(width, 2 * width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        return x + self._gated(self.s4(self.norm(x)))

    def step(
        self, x: jax.Array, state: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """One step of time, from `x` `[B, D]` and a state `[B, D, N]`."""
        h, state = self.s4.step(self.norm(x), state, length)
        return x + self._gated(h), state

    def _gated(self, h: jax.Array) -> jax.Array:
        return jax.nn.glu(self.gate(jax.nn.gelu(h)))


class RecurrenceBlock(nnx.Module):
    """As `in_haiku.RecurrenceBlock`."""

    def __init__(self, width: int, state_size: int, rngs: nnx.Rngs):
        """Makes the block's parameters."""
        del width
        normal = jax.nn.initializers.normal
        self.decay = nnx.Param(normal(1.0)(rngs.params(), (state_size,)))
        self.b = nnx.Param(normal(0.01)(rngs.params(), (state_size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        decay, b = self.decay[...], self.b[...]
        kernel = models.recurrence_kernel(decay, b, x.shape[1])
        return x + jnp.tanh(models.convolve(x, kernel))


class TransformerBlock(nnx.Module):
    """As `in_haiku.TransformerBlock`, without dropout."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs):
        """Makes the block's modules."""
        self.attention_norm = _norm(width, rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads, width, decode=False, rngs=rngs
        )
        self.mlp_norm = _norm(width, rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        mask = jnp.tri(x.shape[1], dtype=bool)[None, None]
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))


class SpectralLinear(nnx.Module):
    """A linear layer of which the kernel is divided by its largest singular value."""

    def __init__(self, size: int, to: int, iterations: int, rngs: nnx.Rngs):
        """Makes the parameters."""
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, to)))
        self.bias = nnx.Param(jnp.zeros(to))
        self.iterations = iterations

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to `x` `[B, T, D]`."""
        kernel = models.normalised(self.kernel[...], self.iterations)
        return x @ kernel + self.bias[...][None, None]


class SpectralBlock(nnx.Module):
    """As `in_haiku.SpectralBlock`."""

    def __init__(self, width: int, iterations: int, rngs: nnx.Rngs):
        """Makes the block's modules."""
        self.up = SpectralLinear(width, 4 * width, iterations, rngs)
        self.down = SpectralLinear(4 * width, width, iterations, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        return x + self.down(jax.nn.gelu(self.up(x)))


class MlpBlock(nnx.Module):
    """As `in_haiku.MlpBlock`."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        """Makes the block's modules."""
        self.norm = _norm(width, rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class Layers(nnx.Module):
    """`L` blocks, `[B, T, D] -> [B, T, D]`; `make_block(rngs)` makes one."""

    def __init__(
        self, make_block: Callable[[nnx.Rngs], Any], num_layers: int, rngs: nnx.Rngs
    ):
        """Makes all blocks at once."""
        make = nnx.split_rngs(splits=num_layers)(nnx.vmap(make_block))
        self.block = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the stack to `x` `[B, T, D]`."""
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(lambda block, x: block(x))(self.block, x)

    def step(
        self, x: jax.Array, states: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """One step of time, from `x` `[B, D]` and states `[L, B, D, N]`."""
        scan = nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        step = scan(lambda block, x, state: block.step(x, state, length))
        return step(self.block, x, states)


# What `models` asks of a framework

WAYS = ("nnx.scan",)

_BLOCKS: dict[str, Any] = {
    "s4": S4Block,
    "recurrence": RecurrenceBlock,
    "transformer": TransformerBlock,
    "spectral": SpectralBlock,
    "mlp": MlpBlock,
}
_RULES: Any = {"rename": {"block": "layers/block"}, "layer_axis": {"block": 0}}


def stack(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Stack:
    """The blocks, as pure functions of their NNX state."""
    del way
    graph, like = _split_abstractly(model, num_layers)
    haiku: Any = (models.types(params), {})

    def init(key: jax.Array, x: jax.Array) -> Any:
        del x
        return nnx.state(_layers(model, num_layers, key))

    return models.Stack(
        hk_stack.haiku_to_flax((params, {}), models.types(like, x.dtype), **_RULES),
        lambda state, x: nnx.merge(graph, state)(x),
        init,
        lambda state: hk_stack.flax_to_haiku(state, haiku, **_RULES)[0],
    )


def decoder(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Decoder:
    """The S4 blocks, one step of time."""
    graph, _ = _split_abstractly(model, num_layers)
    known = stack(way, model, num_layers, params, x).params
    length = x.shape[1]

    def step(state: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return nnx.merge(graph, state).step(x, states, length)

    return models.Decoder(known, step, in_haiku.states(model, num_layers, x))


def _layers(model: models.Model, num_layers: int, key: jax.Array) -> Layers:
    def make_block(rngs: nnx.Rngs) -> Any:
        return _BLOCKS[model.name](model.width, **model.options, rngs=rngs)

    return Layers(make_block, num_layers, nnx.Rngs(key))


def _split_abstractly(model: models.Model, num_layers: int) -> tuple[Any, Any]:
    """The graph and the shapes of the state, without making any array."""
    key = jax.random.key(0)
    return nnx.split(nnx.eval_shape(lambda: _layers(model, num_layers, key)))
