"""The models in Haiku, with its `layer_stack` and in a Python loop.

Shapes: `B` sequences of `T` steps of `D` features; `L` layers. The stacks are told
which `layer_stack` to use: `hk_stack.layer_stack`, `hk.layer_stack` or the `layer_loop`
of this file. In all of them a layer's modules are called `block/...`.
"""

import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

import hk_stack
from hk_stack.compare import models, s4
from hk_stack.compare.models import Part

Layer = Callable[[jax.Array], jax.Array]
LayerStack = Callable[..., Callable[[Callable[..., Any]], Callable[..., Any]]]


def layers(
    x: jax.Array,
    states: jax.Array | None = None,
    *,
    model: models.Model,
    layer_stack: LayerStack,
    num_layers: int,
    length: int | None = None,
    dropout_rate: float = 0.0,
    is_training: bool = False,
    **stack_options: Any,
) -> Any:
    """`L` blocks of a model, `[B, T, D] -> [B, T, D]`.

    With states, one step of time of blocks of S4, on the same parameters: run over a
    sequence, from states of zeros, it gives what these blocks give for all of it.

    Args:
      x: Activations `[B, T, D]`; of one step `[B, D]`.
      states: Of all layers, complex `[L, B, D, N]`; the next ones are returned, too.
      model: What the blocks are made of.
      layer_stack: `hk_stack.layer_stack` or one that takes the same arguments.
      num_layers: Number of blocks, `L`.
      length: For steps, the length `T` of the sequences in training.
      dropout_rate: Probability of dropping a value, in training.
      is_training: Whether to drop values.
      **stack_options: Passed on to `layer_stack`.
    """

    def dropout(index: int, x: jax.Array) -> jax.Array:
        # hk.dropout multiplies a boolean mask by x, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return hk.dropout(hk.next_rng_key(), dropout_rate, x)

    def layer(x: jax.Array, state: jax.Array | None = None) -> Any:
        drop = dropout if is_training and dropout_rate else models.keep
        with hk.name_scope("block"):
            parts = _parts(model, x.shape[-1], dropout=drop, length=length)
            return model.run(parts, x, state)

    if states is None:
        return layer_stack(num_layers, name="layers", **stack_options)(layer)(x)
    stack_options |= {"with_per_layer_inputs": True, "name": "layers"}
    return layer_stack(num_layers, **stack_options)(layer)(x, states)


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


def _parts(model: models.Model, width: int, **options: Any) -> Any:
    """The parts of a block, made by Haiku."""
    parts = model.make_parts(width)
    made = {name: _made(name, part) for name, part in parts.items()}
    return models.bound(parts, made, {"attention": _attend}, **options)


def _attend(part: Part, attention: Callable[..., jax.Array], h: jax.Array) -> jax.Array:
    return attention(h, h, h, mask=jnp.tri(h.shape[1], dtype=bool)[None, None])


def _made(name: str, part: Part) -> Any:
    size, other = part.size, int(part.other)
    match part.kind:
        case "norm":
            return hk.LayerNorm(-1, True, True, eps=1e-5, name=name)
        case "linear":
            return hk.Linear(other, w_init=hk.initializers.VarianceScaling(), name=name)
        case "attention":
            w_init = hk.initializers.VarianceScaling()
            return hk.MultiHeadAttention(
                other, size // other, w_init=w_init, model_size=size, name=name
            )
        case "vector":
            init = hk.initializers.RandomNormal(part.other)
            return hk.get_parameter(name, [size], init=init)
    with hk.name_scope(name):
        return {"spectral": _spectral, "s4": _s4}[part.kind](size, other)


def _spectral(size: int, features: int) -> Layer:
    w_init = hk.initializers.VarianceScaling()
    w = hk.get_parameter("w", [size, features], init=w_init)
    b = hk.get_parameter("b", [features], init=jnp.zeros)
    return functools.partial(models.spectral, w, b)


def _s4(size: int, states: int) -> dict[str, jax.Array]:
    def with_next_key(init: s4.Initializer) -> hk.initializers.Initializer:
        return lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)

    return {
        name: hk.get_parameter(name, shape, init=with_next_key(init))
        for name, (shape, init) in s4.parameters(size, states).items()
    }


def _rematerialised(num_layers: int, name: str) -> Callable[[Layer], Layer]:
    stack = hk.layer_stack(num_layers, name=name)
    return lambda layer: stack(lambda x: hk.remat(layer)(x))


# What `models` asks of a framework

WAYS = ("layer_stack", "loop", "loop + roll")
WAYS_OF = {"remat": ("layer_stack", "layer_stack + hk.remat"), "eager": ("loop",)}
_STACKS: dict[str, LayerStack] = {
    "layer_stack": hk.layer_stack,
    "layer_stack + hk.remat": _rematerialised,
    "loop": layer_loop,
}
_LOOP = hk_stack.NumberedLayers("layers_{}", "layers")


def stack(way: str, given: models.Given) -> models.Stack | None:
    """The blocks in `hk.layer_stack`, or in a Python loop."""
    if given.decodes and way != "layer_stack":
        return None
    init, apply = transformed(given, _STACKS[way])
    if way != "loop":
        return models.Stack(given.params, apply, init)
    params = hk_stack.unstack_params(given.params, _LOOP)
    to_haiku = functools.partial(hk_stack.stack_params, naming_map=_LOOP)
    return models.Stack(params, apply, init, to_haiku)


def transformed(
    given: models.Given, layer_stack: LayerStack, **options: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init` and `apply` of the blocks."""
    options |= {"model": given.model, "num_layers": given.num_layers}
    options |= {"layer_stack": layer_stack, "length": given.length}
    net = hk.transform(functools.partial(layers, **options))
    return net.init, lambda params, *args: net.apply(params, None, *args)
