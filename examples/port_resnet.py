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
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from port_transformer import (
    Batch,
    Case,
    Training,
    define_flags,
    parsed,
    walk_through,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hk_stack

NUM_CLASSES = 10
NUM_TEST = 360
DECAY = 0.9  # of the running statistics


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """How to train which ResNet."""

    steps: int = 60
    batch_size: int = 64
    learning_rate: float = 5e-4
    groups: int = 3
    blocks: int = 2
    width: int = 16


# Data


def digits(batch_size: int, seed: int) -> tuple[Any, Batch]:
    """`step -> batch` of random digits, and the held-out digits."""
    images, labels = load_digits(return_X_y=True)
    x = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(
        x, labels, test_size=NUM_TEST, stratify=labels, random_state=0
    )

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(y), size=batch_size, replace=False)
        return Batch(x[chosen], y[chosen])

    return batch, Batch(x_test, y_test)


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


def resnet(config: Config) -> Case:
    """The ResNet in both frameworks, and the digits."""
    batch, test = digits(config.batch_size, config.seed)
    return Case(
        title="A ResNet on handwritten digits: trained in Flax, then in Haiku",
        flax=FlaxModel(config),
        haiku=haiku_model(config),
        rules={"rename": {"Dense_0": "logits"}},
        batch=batch,
        test=test,
        modes=(False, True),
        yscale="log",
    )


def main(argv: Sequence[str]) -> None:
    """Runs the walk-through with the ResNet that the flags ask for."""
    config, out = parsed(Config, argv)
    walk_through(resnet(config), config, out)


if __name__ == "__main__":
    define_flags(
        Config(),
        "out/port_resnet",
        groups="Groups of blocks; each but the first halves the image.",
        blocks="Equal blocks of each group.",
        width="Channels of the first group; they double in each.",
    )
    flags.register_validator(
        "groups", lambda groups: groups <= 4, "must be at most 4: images are 8x8"
    )
    app.run(main)
