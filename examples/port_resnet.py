"""Moves a ResNet that was trained in Flax to Haiku, and trains it further there.

    python examples/port_resnet.py
    python examples/port_resnet.py --blocks=4 --width=32

The walk-through of `port_transformer.py`, on the 1,797 images of 8x8 pixels inside
scikit-learn, with what a ResNet adds:

- Its equal blocks are a Python loop in Flax, so that the checkpoint numbers them:
  `block_0`, `block_1`. In Haiku they are a `hk_stack.layer_stack`, which keeps all of
  them in one array. `hk_stack.flax_to_haiku` finds that the numbers count layers.
- `BatchNorm` keeps running statistics. They move as well, so that evaluation gives the
  same; and one step of training in either framework moves them to the same new values.
- Modules without a name of their own match by default: `Conv_0` and `conv2_d`,
  `BatchNorm_0` and `batch_norm`. One that has another name in Haiku needs a rule.

Three quarters of a minute on two cores. Writes to `out/port_resnet` (`--out`):

    checkpoint/    what Flax had after its part of the training, by Orbax
    curves.png     the loss, first in Flax, then in Haiku

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
import numpy as np
import port_walk_through
from common import flag
from example_data import Batch
from port_walk_through import Case, walk_through

import hk_stack

NUM_CLASSES = 10
DECAY = 0.9  # of the running statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(port_walk_through.Config):
    """How to train which ResNet."""

    groups: int = flag(
        "Groups of blocks; each but the first halves the image.", default=3, below=5
    )
    blocks: int = flag("Equal blocks of each group.", default=2)
    width: int = flag("Channels of the first group; they double in each.", default=16)


DEFAULT = Config(steps=60, batch_size=64, learning_rate=5e-4, out="out/port_resnet")


# The model in Flax


class FlaxBlock(nn.Module):
    """Two convolutions, and a way around them."""

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Applies the block to `x` `[B, H, W, C]`."""
        width = x.shape[-1]
        h = nn.relu(flax_norm(is_training)(flax_convolution(width)(x)))
        h = flax_norm(is_training)(flax_convolution(width)(h))
        return nn.relu(x + h)


class FlaxGroup(nn.Module):
    """A convolution to another size, then equal blocks by a loop."""

    blocks: int
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Applies the group to `x` `[B, H, W, C]`."""
        x = flax_convolution(self.width, self.stride)(x)
        x = nn.relu(flax_norm(is_training)(x))
        for i in range(self.blocks):
            x = FlaxBlock(name=f"block_{i}")(x, is_training)
        return x


class FlaxModel(nn.Module):
    """Images `[B, H, W, 1]` -> logits `[B, NUM_CLASSES]`."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> jax.Array:
        """Runs the groups, pools and classifies."""
        blocks = self.config.blocks
        for i, (width, stride) in enumerate(sizes(self.config)):
            x = FlaxGroup(blocks, width, stride, name=f"group_{i}")(x, is_training)
        return nn.Dense(NUM_CLASSES)(jnp.mean(x, axis=(1, 2)))


def sizes(config: Config) -> list[tuple[int, int]]:
    """Width and stride of each group: all but the first halve the image."""
    return [(config.width * 2**i, min(2, 1 + i)) for i in range(config.groups)]


def flax_convolution(width: int, stride: int = 1) -> nn.Conv:
    """A convolution by 3x3 pixels, without bias as a norm follows."""
    return nn.Conv(width, (3, 3), (stride, stride), use_bias=False)


def flax_norm(is_training: bool) -> nn.BatchNorm:
    """Batch norm; its running statistics are for evaluation."""
    return nn.BatchNorm(use_running_average=not is_training, momentum=DECAY)


# The model in Haiku


def haiku_model(config: Config) -> hk.TransformedWithState:
    """The same model in Haiku, its blocks on `hk_stack.layer_stack`."""

    def model(x: jax.Array, is_training: bool) -> jax.Array:
        for i, (width, stride) in enumerate(sizes(config)):
            with hk.name_scope(f"group_{i}"):
                x = haiku_group(x, is_training, config.blocks, width, stride)
        # Haiku's own ResNets call this layer logits.
        return hk.Linear(NUM_CLASSES, name="logits")(jnp.mean(x, axis=(1, 2)))

    return hk.transform_with_state(model)


def haiku_group(
    x: jax.Array, is_training: bool, blocks: int, width: int, stride: int
) -> jax.Array:
    """`FlaxGroup` in Haiku."""
    x = haiku_convolution(width, stride)(x)
    x = jax.nn.relu(haiku_norm()(x, is_training))
    block = functools.partial(haiku_block, is_training=is_training)
    # On CPUs, XLA's convolutions are several times slower in a loop: unroll it.
    return hk_stack.layer_stack(blocks, unroll=blocks, name="block")(block)(x)


def haiku_block(x: jax.Array, is_training: bool) -> jax.Array:
    """`FlaxBlock` in Haiku."""
    width = x.shape[-1]
    h = jax.nn.relu(haiku_norm()(haiku_convolution(width)(x), is_training))
    h = haiku_norm()(haiku_convolution(width)(h), is_training)
    return jax.nn.relu(x + h)


def haiku_convolution(width: int, stride: int = 1) -> hk.Conv2D:
    """As `flax_convolution`."""
    return hk.Conv2D(width, 3, stride, with_bias=False)


def haiku_norm() -> hk.BatchNorm:
    """As `flax_norm`; what Flax calls momentum is the decay rate here."""
    return hk.BatchNorm(True, True, decay_rate=DECAY)


def as_images(data: Batch) -> Batch:
    """Digits as images `[N, 8, 8, 1]`."""
    return data._replace(x=(data.x / 16).astype(np.float32).reshape(-1, 8, 8, 1))


def main(config: Config) -> None:
    """Takes the walk-through with the ResNet that the flags ask for."""
    data, test = map(as_images, example_data.digits())
    case = Case(
        title="A ResNet on handwritten digits: trained in Flax, then in Haiku",
        flax=FlaxModel(config),
        haiku=haiku_model(config),
        rules={"rename": {"Dense_0": "logits"}},
        batch=functools.partial(example_data.shuffled, data, config),
        test=test,
        modes=(False, True),
        yscale="log",
    )
    walk_through(case, config)


if __name__ == "__main__":
    common.run(main, DEFAULT)
