"""S4 in Haiku and in Flax Linen, as the examples use it.

The layers are those that `hk_stack.compare` measures.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import example_data
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from common import Losses, flag
from example_data import Batch

import hk_stack
from hk_stack.compare import in_haiku, models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """Flags of the examples with S4."""

    layers: int = flag("Number of layers.", default=4)
    width: int = flag("Features in each layer.", default=64)
    state_size: int = flag("States of each feature.", default=16)
    dropout: float = flag("Share of values to drop.", default=0.05, below=1)


def haiku_layers(
    config: Config, is_training: bool, layer_stack: Any = hk_stack.layer_stack
) -> Callable[[jax.Array], jax.Array]:
    """Layers `[B, T, D] -> [B, T, D]` on a stack of Haiku's kind."""
    return functools.partial(
        in_haiku.layers,
        model=models.s4_model(config.state_size),
        layer_stack=layer_stack,
        num_layers=config.layers,
        dropout_rate=config.dropout,
        is_training=is_training,
    )


def linen_layers(config: Config) -> Any:
    """The same layers in Flax Linen, on `nn.scan`."""
    from hk_stack.compare import in_linen  # Flax is not needed for Haiku.

    model = models.s4_model(config.state_size)
    block = functools.partial(in_linen.Block, model, config.dropout)
    return in_linen.ScanStack(block, config.layers)


def features(x: jax.Array, outputs: int) -> jax.Array:
    """Tokens, integers below `outputs` or `outputs` itself: the start, as vectors."""
    is_token = jnp.issubdtype(x.dtype, jnp.integer)
    return jax.nn.one_hot(x, outputs + 1) if is_token else x


def linear(size: int, name: str) -> hk.Linear:
    """A linear layer that starts as Flax's do."""
    return hk.Linear(size, w_init=hk.initializers.VarianceScaling(), name=name)


def haiku_ends(
    x: jax.Array, layers: Callable[[jax.Array], jax.Array], config: Config, outputs: int
) -> jax.Array:
    """Layers between linear ones: tokens or `[B, T, features]` to `[B, T, outputs]`."""
    h = layers(linear(config.width, "encoder")(features(x, outputs)))
    return linear(outputs, "decoder")(h)


def linen_ends(config: Config, outputs: int) -> Any:
    """The same around `linen_layers`, a module to call with `(x, is_training)`."""
    import flax.linen as nn

    class Ends(nn.Module):
        layers: nn.Module

        @nn.compact
        def __call__(self, x: jax.Array, is_training: bool = False) -> jax.Array:
            h = nn.Dense(config.width, name="encoder")(features(x, outputs))
            h = self.layers(h, is_training)
            logits: jax.Array = nn.Dense(outputs, name="decoder")(h)
            return logits

    return Ends(linen_layers(config))


class Model(NamedTuple):
    """A model in either framework.

    Attributes:
      init: `(key, x) -> params`.
      apply: `(params, key, x, is_training) -> logits`.
    """

    init: Callable[..., Any]
    apply: Callable[..., jax.Array]


def of_haiku(fn: Callable[..., jax.Array]) -> Model:
    """A model from `fn(x, is_training)`, which is made of Haiku modules."""
    model = hk.transform(fn)
    return Model(functools.partial(model.init, is_training=False), model.apply)


def of_linen(module: Any) -> Model:
    """A model from a Linen module that takes `(x, is_training)`."""

    def apply(variables: Any, key: Any, x: jax.Array, is_training: bool) -> jax.Array:
        rngs = {} if key is None else {"dropout": key}
        logits: jax.Array = module.apply(variables, x, is_training, rngs=rngs)
        return logits

    return Model(module.init, apply)


def train(
    model: Model, config: Config, epochs: int, data: Batch, test: Batch
) -> tuple[Any, Losses]:
    """Trains by Adam, and tests after each epoch; returns parameters and losses."""
    steps_per_epoch = len(data.y) // config.batch_size
    optimiser = optax.adam(common.schedule(config, epochs * steps_per_epoch))

    def loss(params: Any, key: Any, batch: Batch, is_training: bool) -> jax.Array:
        logits = model.apply(params, key, batch.x, is_training)
        return common.cross_entropy(logits, batch.y)

    update = common.update(functools.partial(loss, is_training=True), optimiser)
    evaluate = jax.jit(functools.partial(loss, key=None, batch=test, is_training=False))
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key, data.x[:1])
    (params, _), losses = common.train(
        lambda training, step: update(
            training,
            jax.random.fold_in(key, step),
            example_data.shuffled(data, config, step),
        ),
        (params, optimiser.init(params)),
        range(epochs * steps_per_epoch),
        held_out=lambda training: evaluate(training[0]),
        every=steps_per_epoch,
    )
    return params, losses
