"""The models in Haiku, with its `layer_stack` and in a Python loop.

Shapes: `B` sequences of `T` steps of `D` features; `L` layers. The stacks are told
which `layer_stack` to use: `hk_stack.layer_stack`, `hk.layer_stack` or the `layer_loop`
of this file. In all of them a layer's modules are called `block/...`.

`s4_stack` runs over whole sequences, for training. `s4_stack_step` has the same
parameters and runs one step of time, for decoding. The states that it takes and returns
are arrays like any other, so both are pure functions of their arguments.
"""

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp

import hk_stack
from hk_stack.compare import models, s4
from hk_stack.compare.models import Part

Layer = Callable[[jax.Array], jax.Array]
LayerStack = Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]
Norm = Literal["layer", "batch"]
Mode = Literal["convolution", "term by term", "recurrence"]


def _parts(parts: Mapping[str, Part], **made: Layer) -> Any:
    """The modules and parameters of a block, by name; some may be made already."""
    rest = {n: _MAKE[p.kind](n, p) for n, p in parts.items() if n not in made}
    return SimpleNamespace(**made, **rest)


def _layer_norm(name: str, part: Part | None = None) -> Layer:
    return hk.LayerNorm(-1, True, True, eps=1e-5, name=name)


def _attention(name: str, part: Part) -> Layer:
    attention = hk.MultiHeadAttention(
        int(part.other),
        part.size // int(part.other),
        w_init=hk.initializers.VarianceScaling(),
        model_size=part.size,
        name=name,
    )
    return lambda h: attention(
        h, h, h, mask=jnp.tri(h.shape[1], dtype=bool)[None, None]
    )


def _spectral(name: str, part: Part) -> Layer:
    with hk.name_scope(name):
        init = hk.initializers.VarianceScaling()
        w = hk.get_parameter("w", [part.size, int(part.other)], init=init)
        b = hk.get_parameter("b", [int(part.other)], init=jnp.zeros)
    return lambda x: x @ models.normalised(w) + b[None, None]


def _s4(name: str, part: Part) -> dict[str, jax.Array]:
    with hk.name_scope(name):
        return {
            name: hk.get_parameter(name, shape, init=_with_next_key(init))
            for name, (shape, init) in s4.parameters(part.size, int(part.other)).items()
        }


def _vector(name: str, part: Part) -> jax.Array:
    init = hk.initializers.RandomNormal(part.other)
    return hk.get_parameter(name, [part.size], init=init)


_MAKE: dict[str, Callable[[str, Part], Any]] = {
    "norm": _layer_norm,
    "linear": lambda name, part: _linear(int(part.other), name),
    "attention": _attention,
    "spectral": _spectral,
    "s4": _s4,
    "vector": _vector,
}


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
      state_size: number of states of each feature, `N`.
      dropout_rate: probability of dropping a value, in training.
      norm: `"layer"` or `"batch"`; the latter keeps running statistics.
      mode: how S4 runs, see `s4.run`.
      is_training: whether to drop values and to update running statistics.
      **stack_options: passed on to `layer_stack`.
    """

    def block(x: jax.Array) -> jax.Array:
        other = {"norm": _batch_norm("norm", is_training)} if norm == "batch" else {}
        parts = _parts(models.s4_parts(x.shape[-1], state_size), **other)
        return models.s4_block(parts, x, dropout, mode)

    dropout = _dropout(dropout_rate if is_training else 0.0)
    layer = _in_scope(block)
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
      state_size: number of states of each feature, `N`.
      length: the length `T` of the sequences that the parameters were trained on.
      **stack_options: passed on to `layer_stack`.

    Returns:
      The activations `[B, D]` after the last layer, and the next states.
    """

    def layer(x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        with hk.name_scope("block"):
            parts = _parts(models.s4_parts(x.shape[-1], state_size))
            return models.s4_step(parts, x, state, length)

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

    def block(x: jax.Array) -> jax.Array:
        parts = _parts(models.transformer_parts(x.shape[-1], num_heads))
        return models.transformer_block(parts, x, dropout)

    dropout = _dropout(dropout_rate if is_training else 0.0)
    layer = _in_scope(block)
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


def _in_scope(block: Layer) -> Layer:
    """A layer function that runs a block in a scope of its own."""

    def layer(x: jax.Array) -> jax.Array:
        with hk.name_scope("block"):
            return block(x)

    return layer


def _linear(size: int, name: str) -> hk.Linear:
    return hk.Linear(size, w_init=hk.initializers.VarianceScaling(), name=name)


def _encoded(tokens: jax.Array, width: int, num_tokens: int) -> jax.Array:
    return _linear(width, "encoder")(jax.nn.one_hot(tokens, num_tokens + 1))


def _batch_norm(name: str, is_training: bool) -> Layer:
    norm = hk.BatchNorm(True, True, decay_rate=0.9, eps=1e-5, name=name)

    def run(x: jax.Array) -> jax.Array:
        # hk.BatchNorm raises a float to an integer, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return norm(x, is_training)

    return run


def _dropout(rate: float) -> models.Dropout:
    def drop(index: int, x: jax.Array) -> jax.Array:
        del index
        if rate == 0.0:
            return x
        # hk.dropout multiplies a boolean mask by x, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return hk.dropout(hk.next_rng_key(), rate, x)

    return drop


def _with_next_key(init: s4.Initializer) -> hk.initializers.Initializer:
    return lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)


# What `models` asks of a framework

WAYS = ("layer_stack", "loop")
WAYS_OF = {"remat": ("layer_stack", "layer_stack + hk.remat"), "eager": ("loop",)}
_LOOP = hk_stack.NumberedLayers("layers_{}", "layers")


def stack(way: str, given: models.Given) -> models.Stack:
    """The blocks in `hk.layer_stack`, or in a Python loop."""
    model, num_layers, params, _ = given
    if way == "loop":
        net = network(model, layer_loop(num_layers))
        params = hk_stack.unstack_params(params, _LOOP)
        return models.Stack(params, applied(net), net.init, _stacked)
    layers = hk.layer_stack(num_layers, name="layers")
    if way == "layer_stack + hk.remat":
        net = network(model, lambda layer: layers(_rematerialised(layer)))
    else:
        net = network(model, layers)
    return models.Stack(params, applied(net), net.init, lambda params: params)


def _stacked(params: models.Params) -> models.Params:
    return hk_stack.stack_params(params, _LOOP)


def _rematerialised(layer: Layer) -> Layer:
    return lambda x: hk.remat(layer)(x)


def decoder(way: str, given: models.Given) -> models.Decoder | None:
    """The S4 blocks of `hk.layer_stack`, one step of time."""
    model, num_layers, params, x = given
    if way != "layer_stack":
        return None
    step = stepper(hk.layer_stack, model, num_layers, x.shape[1])
    return models.Decoder(params, step, given.states)


def network(model: models.Model, layers: Callable[[Layer], Layer]) -> hk.Transformed:
    """A model of which `layers` makes a stack of one layer."""

    def block(x: jax.Array) -> jax.Array:
        return model.block(_parts(model.parts), x)

    return hk.transform(lambda x: layers(_in_scope(block))(x))


def applied(net: hk.Transformed) -> Callable[[Any, jax.Array], jax.Array]:
    """Without its argument for random keys."""
    return lambda params, x: net.apply(params, None, x)


def stepper(
    layer_stack: LayerStack,
    model: models.Model,
    num_layers: int,
    length: int,
) -> Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]:
    """`s4_stack_step` as a function `(params, x, states) -> (y, states)`."""
    step = functools.partial(
        s4_stack_step,
        layer_stack=layer_stack,
        num_layers=num_layers,
        state_size=model.state_size,
        length=length,
    )
    net = hk.transform(step)
    return lambda params, x, states: net.apply(params, None, x, states)
