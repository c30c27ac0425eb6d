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

import common
import example_data
import haiku as hk
import jax
import port_walk_through
import s4_model
from common import flag
from example_data import NUM_CHARACTERS
from port_walk_through import Case, walk_through


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(s4_model.Config, port_walk_through.Config):
    """How to train which S4 model."""

    length: int = flag("Characters read at once.", default=64, below=513)


DEFAULT = Config(batch_size=16, out="out/port_s4")


def haiku_model(config: Config) -> hk.TransformedWithState:
    """S4 in Haiku, on `hk_stack.layer_stack`."""

    def model(tokens: jax.Array, is_training: bool) -> jax.Array:
        layers = s4_model.haiku_layers(config, is_training)
        return s4_model.haiku_ends(tokens, layers, config, NUM_CHARACTERS)

    return hk.transform_with_state(model)


def main(config: Config) -> None:
    """Takes the walk-through with the S4 model that the flags ask for."""
    case = Case(
        title="S4 on Python's manual: trained in Flax, then in Haiku",
        flax=s4_model.linen_ends(config, NUM_CHARACTERS),
        haiku=haiku_model(config),
        rules={},  # All names are the same in both.
        batch=functools.partial(example_data.text_batch, config.length, config),
        test=example_data.test_text(config.length),
        double=True,
    )
    walk_through(case, config)


if __name__ == "__main__":
    common.run(main, DEFAULT)
