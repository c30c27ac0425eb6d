"""Moves an S4 language model that was trained in Flax to Haiku, and trains it further.

    python examples/port_s4.py
    python examples/port_s4.py --layers=8 --steps=400

The walk-through of `port_transformer.py` on the same text, with layers whose parameters
are of no standard kind: `hk_stack.flax_to_haiku` leaves such leaves as they are, and
matches them by their names. The two models are those that `hk_stack.compare` measures.
Flax, with `nn.scan`, computes the convolution kernels of S4 layer by layer in its loop;
in Haiku, `hk_stack.layer_stack` computes all of them before the loop.

The gradients of S4's step sizes and eigenvalues are small differences of large numbers:
in single precision some are off by one part in thousands, in either framework. So the
ported model is compared in double precision as well, where nothing hides behind that.

A minute on two cores. Writes to `out/port_s4` (`--out`):

    checkpoint/    what Flax had after its part of the training, by Orbax
    curves.png     the loss, first in Flax, then in Haiku

Needs pip install 'hk_stack[checkpoint,examples,flax]'.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import haiku as hk
import jax
from absl import app
from port_transformer import (
    NUM_CHARACTERS,
    Case,
    Training,
    define_flags,
    parsed,
    text_batches,
    walk_through,
)

import hk_stack
from hk_stack.compare import in_haiku, in_linen


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """How to train which S4 model."""

    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-2
    layers: int = 4
    width: int = 64
    state_size: int = 16
    length: int = 64
    dropout: float = 0.05


def flax_model(config: Config) -> nn.Module:
    """S4 in Flax, on `nn.scan`."""
    block = functools.partial(
        in_linen.S4Block, state_size=config.state_size, dropout_rate=config.dropout
    )
    layers = in_linen.ScanStack(block, config.layers)
    return in_linen.NextToken(layers, config.width, NUM_CHARACTERS)


def haiku_model(config: Config) -> hk.TransformedWithState:
    """S4 in Haiku, on `hk_stack.layer_stack`."""

    def model(tokens: jax.Array, is_training: bool) -> jax.Array:
        layers = functools.partial(
            in_haiku.s4_stack,
            layer_stack=hk_stack.layer_stack,
            num_layers=config.layers,
            state_size=config.state_size,
            dropout_rate=config.dropout,
            is_training=is_training,
        )
        return in_haiku.next_token(
            tokens, layers, width=config.width, num_tokens=NUM_CHARACTERS
        )

    return hk.transform_with_state(model)


def s4(config: Config) -> Case:
    """S4 in both frameworks, and Python's manual."""
    batch, test = text_batches(config.length, config.batch_size, config.seed)
    return Case(
        title="S4 on Python's manual: trained in Flax, then in Haiku",
        flax=flax_model(config),
        haiku=haiku_model(config),
        rules={},  # All names are the same in both.
        batch=batch,
        test=test,
        double=True,
    )


def main(argv: Sequence[str]) -> None:
    """Runs the walk-through with the S4 model that the flags ask for."""
    config, out = parsed(Config, argv)
    walk_through(s4(config), config, out)


if __name__ == "__main__":
    define_flags(Config(), "out/port_s4", state_size="States of each feature.")
    app.run(main)
