"""Modules that Flax and Haiku both have: one table that drives the tests of porting."""

import dataclasses
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hk_stack import port

nn = pytest.importorskip("flax.linen")

B, T, D = 2, 5, 6


@dataclasses.dataclass(frozen=True)
class Case:
    """One model in both frameworks.

    Attributes:
      flax: A function of the inputs, inside a compact Linen module.
      haiku: A function of the inputs, inside a Haiku transform.
      shape: Of the inputs.
      rules: For the port.
      exact: Whether all values of Flax can be written in Haiku: not so for the forget
        bias of an LSTM, to which Haiku adds one by itself.
      integers: Whether the inputs are token ids.
    """

    name: str
    flax: Callable[[Any], Any]
    haiku: Callable[[Any], Any]
    shape: tuple[int, ...] = (B, T, D)
    rules: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact: bool = True
    integers: bool = False

    def inputs(self, dtype=np.float32):
        rng = np.random.default_rng(0)
        if self.integers:
            return rng.integers(0, 4, self.shape).astype(np.int32)
        return rng.normal(size=self.shape).astype(dtype)

    def linen(self):
        run = self.flax

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                return run(x)

        return Model()

    def transformed(self):
        return hk.transform_with_state(self.haiku)

    def variables(self, dtype=np.float32, seed=0):
        """Random values everywhere, so that nothing is zero or one."""
        init = self.linen().init
        types = jax.eval_shape(init, jax.random.key(0), self.inputs())
        return randomised(types, dtype, seed)

    def like(self, dtype=np.float32):
        init = self.transformed().init
        like = jax.eval_shape(init, jax.random.key(0), self.inputs())
        return jax.tree.map(lambda leaf: as_float(leaf, dtype), like)


def as_float(leaf, dtype):
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, dtype if is_float else leaf.dtype)


def randomised(tree, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        if "var" in jax.tree_util.keystr(path) or "sigma" in jax.tree_util.keystr(path):
            value = np.abs(value) + 0.5
        return np.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def haiku_batch_norm(x, name=None):
    with jax.numpy_dtype_promotion("standard"):
        return hk.BatchNorm(True, True, 0.9, eps=1e-5, name=name)(
            x, is_training=hk.running_init()
        )


def flax_rnn(cell):
    return lambda x: nn.RNN(cell(x.dtype))(x)


def haiku_rnn(core):
    def run(x):
        rnn = core()
        start = rnn.initial_state(x.shape[0])
        start = jax.tree.map(lambda leaf: leaf.astype(x.dtype), start)
        with jax.numpy_rank_promotion("allow"):
            return hk.dynamic_unroll(rnn, x, start, time_major=False)[0]

    return run


def haiku_attention(x):
    init = hk.initializers.VarianceScaling()
    return hk.MultiHeadAttention(2, 3, w_init=init, model_size=D)(x, x, x)


def flax_two(make):
    def run(x):
        for _ in range(2):
            x = make()(x)
        return x

    return run


def rank_free(run):
    """Haiku's norms add biases of lower rank, which strict promotion refuses."""

    def free(x):
        with jax.numpy_rank_promotion("allow"):
            return run(x)

    return free


class Normalised(hk.Module):
    """A linear layer whose weights are divided by something."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def __call__(self, x):
        init = hk.initializers.VarianceScaling()
        w = hk.get_parameter("w", [x.shape[-1], 4], x.dtype, init)
        b = hk.get_parameter("b", [4], x.dtype, jnp.zeros)
        y = x @ self.weights(w)
        return y + jnp.broadcast_to(b, y.shape)


def spectral(w):
    norm = hk.SpectralNorm(eps=1e-12, name="spectral")
    return norm(w, update_stats=hk.running_init())


def by_scale(w):
    scale = hk.get_parameter("scale", [w.shape[-1]], w.dtype, jnp.ones)
    norm = jnp.sqrt(jnp.sum(w**2, axis=0))
    return w * jnp.broadcast_to(scale / norm, w.shape)


IMAGE = (B, 5, 5, 4)
VOLUME = (B, 3, 3, 3, 2)

CASES = [
    Case("dense", lambda x: nn.Dense(4)(x), lambda x: hk.Linear(4)(x)),
    Case(
        "dense without bias",
        lambda x: nn.Dense(4, use_bias=False)(x),
        lambda x: hk.Linear(4, with_bias=False)(x),
    ),
    Case(
        "two dense",
        flax_two(lambda: nn.Dense(D)),
        flax_two(lambda: hk.Linear(D)),
    ),
    Case(
        "mlp",
        lambda x: nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])(x),
        lambda x: hk.nets.MLP([4, 3])(x),
    ),
    Case(
        "dense general",
        lambda x: nn.DenseGeneral((2, 3))(x).reshape(*x.shape[:-1], 6),
        lambda x: hk.Linear(6)(x),
    ),
    Case(
        "dense general over two axes",
        lambda x: nn.DenseGeneral(4, axis=(-2, -1))(x),
        lambda x: hk.Linear(4)(x.reshape(*x.shape[:-2], -1)),
    ),
    Case("conv 1d", lambda x: nn.Conv(4, (3,))(x), lambda x: hk.Conv1D(4, 3)(x)),
    Case(
        "conv 2d",
        lambda x: nn.Conv(4, (3, 3), strides=2)(x),
        lambda x: hk.Conv2D(4, 3, stride=2)(x),
        IMAGE,
    ),
    Case(
        "conv 3d",
        lambda x: nn.Conv(2, (3, 3, 3))(x),
        lambda x: hk.Conv3D(2, 3)(x),
        VOLUME,
    ),
    Case(
        "depthwise conv",
        lambda x: nn.Conv(8, (3, 3), feature_group_count=4)(x),
        lambda x: hk.DepthwiseConv2D(2, 3)(x),
        IMAGE,
    ),
    Case(
        "grouped conv",
        lambda x: nn.Conv(6, (3, 3), feature_group_count=2)(x),
        lambda x: hk.Conv2D(6, 3, feature_group_count=2)(x),
        IMAGE,
    ),
    Case(
        "transposed conv 1d",
        lambda x: nn.ConvTranspose(4, (3,), (2,))(x),
        lambda x: hk.Conv1DTranspose(4, 3, stride=2)(x),
    ),
    Case(
        "transposed conv 2d, square",
        lambda x: nn.ConvTranspose(4, (3, 3), (2, 2))(x),
        lambda x: hk.Conv2DTranspose(4, 3, stride=2)(x),
        IMAGE,
    ),
    Case(
        "transposed conv 3d",
        lambda x: nn.ConvTranspose(3, (3, 3, 3))(x),
        lambda x: hk.Conv3DTranspose(3, 3)(x),
        VOLUME,
    ),
    Case(
        "embed",
        lambda x: nn.Embed(4, D)(x),
        lambda x: hk.Embed(4, D)(x),
        (B, T),
        integers=True,
    ),
    Case(
        "layer norm",
        lambda x: nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)(x),
        lambda x: hk.LayerNorm(-1, True, True)(x),
    ),
    Case(
        "layer norm without scale",
        lambda x: nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, use_scale=False)(
            x
        ),
        lambda x: hk.LayerNorm(-1, False, True)(x),
    ),
    Case(
        "rms norm",
        lambda x: nn.RMSNorm(epsilon=1e-5)(x),
        lambda x: hk.RMSNorm(-1)(x),
    ),
    Case(
        "group norm",
        lambda x: nn.GroupNorm(2, epsilon=1e-5, use_fast_variance=False)(x),
        rank_free(lambda x: hk.GroupNorm(2)(x)),
        IMAGE,
    ),
    Case(
        "instance norm",
        lambda x: nn.InstanceNorm(epsilon=1e-5, use_fast_variance=False)(x),
        lambda x: hk.InstanceNorm(True, True)(x),
        IMAGE,
    ),
    Case(
        "batch norm",
        lambda x: nn.BatchNorm(use_running_average=True)(x),
        haiku_batch_norm,
    ),
    Case(
        "batch norm of images",
        lambda x: nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)),
        lambda x: haiku_batch_norm(hk.Conv2D(4, 3)(x)),
        IMAGE,
    ),
    Case(
        "attention",
        lambda x: nn.MultiHeadDotProductAttention(2)(x, x),
        haiku_attention,
    ),
    Case(
        "lstm",
        flax_rnn(lambda dtype: nn.LSTMCell(4, param_dtype=dtype)),
        haiku_rnn(lambda: hk.LSTM(4)),
        exact=False,
    ),
    Case(
        "optimised lstm",
        flax_rnn(lambda dtype: nn.OptimizedLSTMCell(4, param_dtype=dtype)),
        haiku_rnn(lambda: hk.LSTM(4)),
        exact=False,
    ),
    Case(
        "spectral norm",
        lambda x: nn.SpectralNorm(nn.Dense(4))(x, update_stats=False),
        lambda x: Normalised(spectral)(x),
        rules={
            "rename": {
                "SpectralNorm_0/Dense_0/kernel": "normalised/spectral",
                "Dense_0": "normalised",
            }
        },
    ),
    Case(
        "weight norm of the user's own",
        lambda x: nn.WeightNorm(nn.Dense(4))(x),
        lambda x: Normalised(by_scale)(x),
        rules={
            "rename": {
                "WeightNorm_0/Dense_0/kernel/scale": "normalised/scale",
                "Dense_0": "normalised",
            }
        },
    ),
    Case(
        "transposed conv of a name of its own",
        lambda x: nn.ConvTranspose(4, (3, 3), (2, 2), name="up")(x),
        lambda x: hk.Conv2DTranspose(4, 3, stride=2, name="up")(x),
        IMAGE,
        rules={"leaf": {"up/kernel": port.TRANSPOSED}},
    ),
    Case(
        "gru",
        flax_rnn(lambda dtype: nn.GRUCell(4, param_dtype=dtype)),
        haiku_rnn(lambda: port.GRU(4)),
    ),
]
