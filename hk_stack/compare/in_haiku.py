"""The models in Haiku, with its `layer_stack` and in a Python loop.

Shapes: `B` sequences of `T` steps of `D` features; `L` layers. The stacks are told
which `layer_stack` to use: `hk_stack.layer_stack`, `hk.layer_stack` or the `layer_loop`
of this file. In all of them a layer's modules are called `block/...`.

`s4_stack` runs over whole sequences, for training. `s4_stack_step` has the same
parameters and runs one step of time, for decoding. The states that it takes and returns
are arrays like any other, so both are pure functions of their arguments.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import hk_stack
from hk_stack.compare import models, s4

Layer = Callable[[jax.Array], jax.Array]
LayerStack = Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]
Norm = Literal["layer", "batch"]
Mode = Literal["convolution", "term by term", "recurrence"]


class S4(hk.Module):
    """One S4 layer, `[B, T, D] -> [B, T, D]`: `y = K * u + d u`."""

    def __init__(
        self,
        state_size: int,
        mode: Mode = "convolution",
        name: str | None = None,
    ):
        """Constructs the layer.

        Args:
          state_size: number of states of each feature, `N`.
          mode: whether to run as a convolution (with `s4.kernel`, or "term by term"
            with `s4.kernel_term_by_term`) or as a recurrence; same parameters, same
            outputs.
          name: the module's name.
        """
        super().__init__(name=name)
        self.state_size = state_size
        self.mode = mode

    def __call__(self, u: jax.Array) -> jax.Array:
        """Filters each feature of `u` `[B, T, D]` by its own linear system."""
        _, length, features = u.shape
        params = self._parameters(features)
        system = s4.dplr(params)
        if self.mode == "recurrence":
            y = s4.recur(u, s4.discretise(system, length))
        else:
            y = s4.convolve(u, s4.KERNELS[self.mode](system, length))
        return y + params["d"][None, None] * u

    def step(
        self, u: jax.Array, state: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """One step of time, on the parameters of `__call__`, whatever the mode.

        Args:
          u: activations at one time `[B, D]`.
          state: complex `[B, D, N]`, zeros at first.
          length: the length `T` of the sequences that the parameters were trained on.

        Returns:
          The output `[B, D]` and the next state `[B, D, N]`.
        """
        params = self._parameters(u.shape[-1])
        state, y = s4.step(s4.discretise(s4.dplr(params), length), state, u)
        return y + params["d"][None] * u, state

    def _parameters(self, features: int) -> dict[str, jax.Array]:
        table = s4.parameters(features, self.state_size)
        return {
            name: hk.get_parameter(name, shape, init=_with_next_key(init))
            for name, (shape, init) in table.items()
        }


class S4Block(hk.Module):
    """`x + dropout(glu(dropout(gelu(S4(norm(x))))))`, `[B, T, D] -> [B, T, D]`."""

    def __init__(
        self,
        state_size: int,
        dropout_rate: float = 0.0,
        *,
        norm: Norm = "layer",
        mode: Mode = "convolution",
        name: str | None = None,
    ):
        """Constructs the block.

        Args:
          state_size: number of states of each feature, `N`.
          dropout_rate: probability of dropping a value, in training.
          norm: `"layer"` or `"batch"`; the latter keeps running statistics.
          mode: see `S4`.
          name: the module's name.
        """
        super().__init__(name=name)
        self.state_size = state_size
        self.dropout_rate = dropout_rate
        self.norm = norm
        self.mode = mode

    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        rate = self.dropout_rate if is_training else 0.0
        h = _norm(self.norm, x, is_training, "norm")
        h = S4(self.state_size, self.mode, name="s4")(h)
        return x + _gated(h, rate)


class TransformerBlock(hk.Module):
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""

    def __init__(
        self, num_heads: int, dropout_rate: float = 0.0, name: str | None = None
    ):
        """Constructs the block.

        Args:
          num_heads: number of attention heads, a divisor of `D`.
          dropout_rate: probability of dropping a value, in training.
          name: the module's name.
        """
        super().__init__(name=name)
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate

    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        _, length, width = x.shape
        rate = self.dropout_rate if is_training else 0.0
        attention = hk.MultiHeadAttention(
            self.num_heads,
            width // self.num_heads,
            w_init=hk.initializers.VarianceScaling(),
            model_size=width,
            name="attention",
        )
        h = _norm("layer", x, is_training, "attention_norm")
        h = attention(h, h, h, mask=jnp.tri(length, dtype=bool)[None, None])
        x = x + _dropout(h, rate)
        h = _norm("layer", x, is_training, "mlp_norm")
        h = jax.nn.gelu(_linear(4 * width, "mlp_in")(h))
        return x + _dropout(_linear(width, "mlp_out")(h), rate)


class RecurrenceBlock(hk.Module):
    """`x + tanh(K * x)`, with a kernel made step by step; `[B, T, D] -> [B, T, D]`."""

    def __init__(self, state_size: int, name: str | None = None):
        """Constructs the block of `state_size` states, `N`."""
        super().__init__(name=name)
        self.state_size = state_size

    def __call__(self, x: jax.Array, is_training: bool = False) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        del is_training
        normal = hk.initializers.RandomNormal
        decay = hk.get_parameter("decay", [self.state_size], x.dtype, normal())
        b = hk.get_parameter("b", [self.state_size], x.dtype, normal(0.01))
        kernel = models.recurrence_kernel(decay, b, x.shape[1])
        return x + jnp.tanh(models.convolve(x, kernel))


class SpectralLinear(hk.Module):
    """A linear layer of which the weights are over their largest singular value."""

    def __init__(self, size: int, iterations: int, name: str | None = None):
        """Constructs the layer of `size` outputs; `iterations` of the power method."""
        super().__init__(name=name)
        self.size = size
        self.iterations = iterations

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to `x` `[B, T, D]`."""
        init = hk.initializers.VarianceScaling()
        w = hk.get_parameter("w", [x.shape[-1], self.size], x.dtype, init)
        b = hk.get_parameter("b", [self.size], x.dtype, jnp.zeros)
        return x @ models.normalised(w, self.iterations) + b[None, None]


class SpectralBlock(hk.Module):
    """`x + down(gelu(up(x)))` with two `SpectralLinear`."""

    def __init__(self, iterations: int, name: str | None = None):
        """Constructs the block; `iterations` of the power method."""
        super().__init__(name=name)
        self.iterations = iterations

    def __call__(self, x: jax.Array, is_training: bool = False) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        del is_training
        width = x.shape[-1]
        h = jax.nn.gelu(SpectralLinear(4 * width, self.iterations, "up")(x))
        return x + SpectralLinear(width, self.iterations, "down")(h)


class MlpBlock(hk.Module):
    """`x + down(gelu(up(norm(x))))`, of four times the width; nothing to hoist."""

    def __call__(self, x: jax.Array, is_training: bool = False) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        h = _norm("layer", x, is_training, "norm")
        h = jax.nn.gelu(_linear(4 * x.shape[-1], "up")(h))
        return x + _linear(x.shape[-1], "down")(h)


def s4_stack(
    x: jax.Array,
    *,
    layer_stack: LayerStack,
    num_layers: int,
    state_size: int,
    dropout_rate: float = 0.0,
    norm: Norm = "layer",
    mode: Mode = "convolution",
    is_training: bool = False,
    **stack_options: Any,
) -> jax.Array:
    """`L` S4 blocks, `[B, T, D] -> [B, T, D]`.

    Args:
      x: activations `[B, T, D]`.
      layer_stack: `hk_stack.layer_stack` or one that takes the same arguments.
      num_layers: number of blocks, `L`.
      state_size: see `S4Block`.
      dropout_rate: see `S4Block`.
      norm: see `S4Block`.
      mode: see `S4Block`.
      is_training: whether to drop values and to update running statistics.
      **stack_options: passed on to `layer_stack`.
    """

    def layer(x: jax.Array) -> jax.Array:
        block = S4Block(state_size, dropout_rate, norm=norm, mode=mode, name="block")
        return block(x, is_training)

    return layer_stack(num_layers, name="layers", **stack_options)(layer)(x)


def s4_stack_step(
    x: jax.Array,
    states: jax.Array,
    *,
    layer_stack: LayerStack,
    num_layers: int,
    state_size: int,
    length: int,
    **stack_options: Any,
) -> tuple[jax.Array, jax.Array]:
    """One step of time of an `s4_stack` with layer norm, on the same parameters.

    Run over a sequence from the states of `s4_states`, it gives what `s4_stack` gives
    for the whole sequence.

    Args:
      x: activations at one time `[B, D]`.
      states: of all layers, complex `[L, B, D, N]`.
      layer_stack: `hk_stack.layer_stack` or `hk.layer_stack`.
      num_layers: number of blocks, `L`.
      state_size: see `S4Block`.
      length: the length `T` of the sequences that the parameters were trained on.
      **stack_options: passed on to `layer_stack`.

    Returns:
      The activations `[B, D]` after the last layer, and the next states.
    """

    def layer(x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        with hk.name_scope("block"):
            h = _norm("layer", x, False, "norm")
            h, state = S4(state_size, name="s4").step(h, state, length)
            return x + _gated(h), state

    stack = layer_stack(
        num_layers, with_per_layer_inputs=True, name="layers", **stack_options
    )
    return stack(layer)(x, states)


def s4_states(
    num_layers: int,
    batch_size: int,
    width: int,
    state_size: int,
    dtype: Any = jnp.complex64,
) -> jax.Array:
    """The states before the first `s4_stack_step`: zeros `[L, B, D, N]`."""
    return jnp.zeros((num_layers, batch_size, width, state_size), dtype)


def transformer_stack(
    x: jax.Array,
    *,
    layer_stack: LayerStack,
    num_layers: int,
    num_heads: int,
    dropout_rate: float = 0.0,
    is_training: bool = False,
    **stack_options: Any,
) -> jax.Array:
    """`L` transformer blocks, `[B, T, D] -> [B, T, D]`; arguments as in `s4_stack`."""

    def layer(x: jax.Array) -> jax.Array:
        return TransformerBlock(num_heads, dropout_rate, name="block")(x, is_training)

    return layer_stack(num_layers, name="layers", **stack_options)(layer)(x)


def classifier(
    x: jax.Array, layers: Layer, *, width: int, num_classes: int
) -> jax.Array:
    """Sequences `[B, T, features]` -> logits `[B, num_classes]`.

    Args:
      x: input sequences.
      layers: a stack, `[B, T, width] -> [B, T, width]`; for instance `s4_stack` with
        its keyword arguments bound by `functools.partial`.
      width: number of features inside the stack.
      num_classes: number of classes.
    """
    h = layers(_linear(width, "encoder")(x))
    return _linear(num_classes, "decoder")(jnp.mean(h, axis=1))


def next_token(
    tokens: jax.Array, layers: Layer, *, width: int, num_tokens: int
) -> jax.Array:
    """Tokens `[B, T]` -> logits `[B, T, num_tokens]` of the tokens after them.

    Args:
      tokens: integers below `num_tokens`, or `num_tokens` itself: the start.
      layers: a causal stack, `[B, T, width] -> [B, T, width]`.
      width: number of features inside the stack.
      num_tokens: number of different tokens.
    """
    h = layers(_encoded(tokens, width, num_tokens))
    return _linear(num_tokens, "decoder")(h)


def next_token_step(
    tokens: jax.Array,
    states: Any,
    layers: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    *,
    width: int,
    num_tokens: int,
) -> tuple[jax.Array, Any]:
    """One step of time of `next_token`, on the same parameters.

    Args:
      tokens: at one time, `[B]`.
      states: of the layers, as `layers` takes them.
      layers: one step of the stack, `([B, width], states) -> ([B, width], states)`;
        for instance `s4_stack_step` with its keyword arguments bound.
      width: see `next_token`.
      num_tokens: see `next_token`.

    Returns:
      Logits `[B, num_tokens]` of the next tokens, and the next states.
    """
    h, states = layers(_encoded(tokens, width, num_tokens), states)
    return _linear(num_tokens, "decoder")(h), states


def layer_loop(num_layers: int, *, name: str = "layers") -> Callable[[Layer], Layer]:
    """The plain Python loop, called as a `layer_stack` is; scopes `layers_0`, ..."""

    def loop(layer: Layer) -> Layer:
        def layers(x: jax.Array) -> jax.Array:
            for i in range(num_layers):
                with hk.name_scope(f"{name}_{i}"):
                    x = layer(x)
            return x

        return layers

    return loop


def _linear(size: int, name: str) -> hk.Linear:
    return hk.Linear(size, w_init=hk.initializers.VarianceScaling(), name=name)


def _encoded(tokens: jax.Array, width: int, num_tokens: int) -> jax.Array:
    return _linear(width, "encoder")(jax.nn.one_hot(tokens, num_tokens + 1))


def _gated(h: jax.Array, rate: float = 0.0) -> jax.Array:
    """What an S4 block does after S4, with dropout at `rate`; keeps the shape."""
    h = _dropout(jax.nn.gelu(h), rate)
    h = jax.nn.glu(_linear(2 * h.shape[-1], "gate")(h))
    return _dropout(h, rate)


def _norm(kind: Norm, x: jax.Array, is_training: bool, name: str) -> jax.Array:
    if kind == "batch":
        norm = hk.BatchNorm(True, True, decay_rate=0.9, eps=1e-5, name=name)
        # hk.BatchNorm raises a float to an integer, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return norm(x, is_training)
    return hk.LayerNorm(-1, True, True, eps=1e-5, name=name)(x)


def _dropout(x: jax.Array, rate: float) -> jax.Array:
    if rate == 0.0:
        return x
    # hk.dropout multiplies a boolean mask by x, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        return hk.dropout(hk.next_rng_key(), rate, x)


def _with_next_key(init: s4.Initializer) -> hk.initializers.Initializer:
    return lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)


# What `models` asks of a framework

WAYS = ("layer_stack", "loop")

BLOCKS: dict[str, Any] = {
    "s4": S4Block,
    "recurrence": RecurrenceBlock,
    "transformer": TransformerBlock,
    "spectral": SpectralBlock,
    "mlp": MlpBlock,
}
_LOOP = hk_stack.NumberedLayers("layers_{}", "layers")


def stack(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Stack:
    """The blocks in `hk.layer_stack`, or in a Python loop."""
    del x
    if way == "layer_stack":
        net = network(model, hk.layer_stack(num_layers, name="layers"))
        return models.Stack(params, applied(net), net.init, lambda params: params)
    net = network(model, layer_loop(num_layers))
    return models.Stack(
        hk_stack.unstack_params(params, _LOOP),
        applied(net),
        net.init,
        lambda params: hk_stack.stack_params(params, _LOOP),
    )


def decoder(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Decoder | None:
    """The S4 blocks of `hk.layer_stack`, one step of time."""
    if way != "layer_stack":
        return None
    step = stepper(hk.layer_stack, model, num_layers, x.shape[1])
    return models.Decoder(params, step, states(model, num_layers, x))


def layer(model: models.Model) -> Layer:
    """One layer of a model."""
    block = functools.partial(BLOCKS[model.name], **model.options, name="block")
    return lambda x: block()(x, False)


def network(model: models.Model, layers: Callable[[Layer], Layer]) -> hk.Transformed:
    """A model of which `layers` makes a stack of one layer."""
    return hk.transform(lambda x: layers(layer(model))(x))


def applied(net: hk.Transformed) -> Callable[[Any, jax.Array], jax.Array]:
    """Without its argument for random keys."""
    return lambda params, x: net.apply(params, None, x)


def stepper(
    layer_stack: LayerStack,
    model: models.Model,
    num_layers: int,
    length: int,
    **stack_options: Any,
) -> Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]:
    """`s4_stack_step` as a function `(params, x, states) -> (y, states)`."""
    step = functools.partial(
        s4_stack_step,
        layer_stack=layer_stack,
        num_layers=num_layers,
        length=length,
        **model.options,
        **stack_options,
    )
    net = hk.transform(step)
    return lambda params, x, states: net.apply(params, None, x, states)


def states(model: models.Model, num_layers: int, x: jax.Array) -> jax.Array:
    """The states before the first step: zeros `[L, B, D, N]`."""
    sizes = num_layers, len(x), x.shape[-1], model.options["state_size"]
    return s4_states(*sizes, np.result_type(x.dtype, np.complex64))
