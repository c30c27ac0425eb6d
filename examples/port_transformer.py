"""Moves a transformer that was trained in Flax to Haiku, and trains it further there.

    python examples/port_transformer.py
    python examples/port_transformer.py --steps=600 --width=192

A language model of characters in Flax Linen, with `nn.scan` over its layers, dropout
and tied embeddings, reads the manual that comes with Python (`pydoc_data.topics`). It
is saved by Orbax, as Flax recommends it. From there on, Haiku goes on:

1. The checkpoint is read back as plain arrays; Flax is not needed for that.
2. `hk_stack.port.plan` shows which array becomes which, `hk_stack.flax_to_haiku` moves
   them into the parameters of the same model on `hk_stack.layer_stack`.
3. Logits, loss and gradients of both are compared.
4. Adam's averages move by the same function, so that training goes on as if nothing
   had happened.
5. `hk_stack.haiku_to_flax` moves the result back.

A minute and a half on two cores. Writes to `out/port_transformer` (`--out`):

    checkpoint/    what Flax had after its part of the training, by Orbax
    curves.png     the loss, first in Flax, then in Haiku

These steps, which do not depend on the model, are in `port_walk_through.py`;
`port_s4.py` and `port_resnet.py` take them with other models.

Needs pip install 'hk_stack[checkpoint,examples,flax]'.
"""

import dataclasses
import functools

import common
import example_data
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import port_walk_through
from example_data import NUM_CHARACTERS
from port_walk_through import Case, walk_through

import hk_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.TextConfig, port_walk_through.Config):
    """How to train which transformer."""


DEFAULT = Config(heads=2, length=32, out="out/port_transformer")


# The model in Flax


class FlaxBlock(nn.Module):
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> tuple[jax.Array, None]:
        """Applies the block to `x` `[B, T, D]`; the second result is for `nn.scan`."""
        width = x.shape[-1]
        dropout = nn.Dropout(self.dropout, deterministic=not is_training)
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        h = nn.LayerNorm(name="attention_norm")(x)
        x = x + dropout(attention(h, mask=nn.make_causal_mask(x[..., 0])))
        h = nn.LayerNorm(name="mlp_norm")(x)
        h = nn.gelu(nn.Dense(4 * width, name="mlp_in")(h))
        return x + dropout(nn.Dense(width, name="mlp_out")(h)), None


class FlaxModel(nn.Module):
    """Characters `[B, T]` -> logits `[B, T, NUM_CHARACTERS]` of those after them."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, is_training: bool) -> jax.Array:
        """Embeds, runs the layers, and compares with the same embeddings."""
        config = self.config
        embed = nn.Embed(NUM_CHARACTERS, config.width, name="embed")
        positions = nn.Embed(config.length, config.width, name="positions")
        layers = nn.scan(
            FlaxBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))
        x = nn.Dropout(config.dropout, deterministic=not is_training)(x)
        x, _ = layers(config.heads, config.dropout, name="layers")(x, is_training)
        return embed.attend(nn.LayerNorm(name="norm")(x))


# The model in Haiku


def haiku_model(config: Config) -> hk.TransformedWithState:
    """The same model in Haiku, on `hk_stack.layer_stack`."""

    def model(tokens: jax.Array, is_training: bool) -> jax.Array:
        embed = hk.Embed(NUM_CHARACTERS, config.width, name="embed")
        positions = hk.Embed(config.length, config.width, name="positions")
        layer = functools.partial(haiku_layer, config, is_training=is_training)
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))
        x = haiku_dropout(config, x, is_training)
        x = hk_stack.layer_stack(config.layers, name="layers")(layer)(x)
        return haiku_norm("norm")(x) @ embed.embeddings.T

    return hk.transform_with_state(model)


def haiku_layer(config: Config, x: jax.Array, is_training: bool) -> jax.Array:
    """`FlaxBlock` in Haiku. It has no scope of its own, as `nn.scan` adds none."""
    attention = hk.MultiHeadAttention(
        config.heads,
        config.width // config.heads,
        model_size=config.width,
        w_init=hk.initializers.VarianceScaling(),
        name="attention",
    )
    # Flax calls these two layers mlp_in and mlp_out; `RULES` below says so.
    mlp = hk.nets.MLP(
        [4 * config.width, config.width], activation=jax.nn.gelu, name="mlp"
    )
    h = haiku_norm("attention_norm")(x)
    mask = jnp.tri(x.shape[1], dtype=bool)[None, None]
    x = x + haiku_dropout(config, attention(h, h, h, mask), is_training)
    return x + haiku_dropout(config, mlp(haiku_norm("mlp_norm")(x)), is_training)


def haiku_norm(name: str) -> hk.LayerNorm:
    """A layer norm as Flax makes it: Haiku would add 1e-5 to the variance."""
    return hk.LayerNorm(-1, True, True, eps=1e-6, name=name)


def haiku_dropout(config: Config, x: jax.Array, is_training: bool) -> jax.Array:
    """Dropout in training. The masks are not those of Flax: keys differ."""
    return hk.dropout(hk.next_rng_key(), config.dropout, x) if is_training else x


# All other modules have the same names in both, or their framework's default names.
RULES = {
    "rename": {
        "layers/mlp_in": "layers/mlp/~/linear_0",
        "layers/mlp_out": "layers/mlp/~/linear_1",
    }
}


def main(config: Config) -> None:
    """Takes the walk-through with the transformer that the flags ask for."""
    case = Case(
        title="A transformer on Python's manual: trained in Flax, then in Haiku",
        flax=FlaxModel(config),
        haiku=haiku_model(config),
        rules=RULES,
        batch=functools.partial(example_data.text_batch, config.length, config),
        test=example_data.test_text(config.length),
    )
    walk_through(case, config)


if __name__ == "__main__":
    common.run(main, DEFAULT)
