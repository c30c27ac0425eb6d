"""Models as their authors write them, in each framework: a Python loop of layers each.

None of them knows of `hk_stack`. They are small copies of published programs, with the
idioms of these: `@nn.compact` loops and lists in `setup`, numbered names, keys that
are split, folded or counted, a list of dictionaries, `w[i]` of stacked parameters.

Shapes: `L` layers over `B` sequences of `T` steps of `D` features.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hk_stack.compare import s4

eqx = pytest.importorskip("equinox")
nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

B, T, D, HEADS, TOKENS = 2, 6, 8, 2, 11
RATE = 0.25  # Of all dropout.


class Case(NamedTuple):
    """A model, and what of it is a loop.

    Attributes:
      name: Of the case.
      make: From a number of layers to a pure function of arrays, the parameters first,
        and its arguments. It returns all that a call returns: new state too.
      loops: The number of blocks of each loop, in order, in a model of `num_layers`.
      num_layers: `L`.
      step: A model of so many more layers has the same loops, and so the same program.
      draws: Whether a call draws random numbers.
    """

    name: str
    make: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]
    loops: tuple[int, ...] = (4,)
    num_layers: int = 4
    step: int = 1
    draws: bool = False


# What the models are given


def values(tree: Any) -> Any:
    """Arrays of the given types: small numbers, zeros if whole, keys."""
    rng = np.random.default_rng(0)

    def leaf(typed: Any) -> jax.Array:
        if jnp.issubdtype(typed.dtype, jax.dtypes.prng_key):
            seeds = rng.integers(2**31, size=typed.shape)
            return jax.vmap(jax.random.key)(seeds.ravel()).reshape(typed.shape)
        if not jnp.issubdtype(typed.dtype, jnp.inexact):
            return jnp.zeros(typed.shape, typed.dtype)
        return jnp.asarray(rng.uniform(-0.5, 0.5, typed.shape), typed.dtype)

    return jax.tree.map(leaf, tree)


def tokens(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(TOKENS, size=[B, T]))


def activations() -> jax.Array:
    return values(jax.ShapeDtypeStruct((B, T, D), jnp.float32))


def images() -> jax.Array:
    return values(jax.ShapeDtypeStruct((B, 4, 4, 3), jnp.float32))


def of_linen(model: Any, *inputs: Any, mutable: Any = False) -> Any:
    """A Linen model as a function of parameters, state, a key and inputs."""
    key = jax.random.key(1)
    rngs = {"params": key, "dropout": key}
    variables = values(dict(jax.eval_shape(model.init, rngs, *inputs)))
    params = variables.pop("params")
    state = {name: variables[name] for name in variables if name in (mutable or ())}

    def fn(params: Any, state: Any, key: jax.Array, *inputs: Any) -> Any:
        variables = {"params": params, **state}
        return model.apply(variables, *inputs, rngs={"dropout": key}, mutable=mutable)

    return fn, (params, state, key, *inputs)


def of_haiku(forward: Callable[..., Any], *inputs: Any) -> Any:
    """A function with Haiku modules as one of parameters, a key and inputs."""
    model, key = hk.transform(forward), jax.random.PRNGKey(1)
    return model.apply, (values(jax.eval_shape(model.init, key, *inputs)), key, *inputs)


def of_nnx(make: Callable[[Any], Any], *inputs: Any) -> Any:
    """An NNX model as a function of parameters, the rest of its state and inputs."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: Any, rest: Any, *inputs: Any) -> Any:
        rest = jax.tree.map(lambda leaf: leaf, rest)  # Variables of this trace.
        model = nnx.merge(graph, params, rest)
        results = model(*inputs)
        return results, nnx.state(model, nnx.Not(nnx.Param))

    return fn, (values(params), values(rest), *inputs)


# Flax Linen


class FeedForward(nn.Module):
    rate: float = RATE

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(2 * x.shape[-1])(x))
        y = nn.Dropout(self.rate, deterministic=False)(y)
        return nn.Dense(x.shape[-1])(y)


class PreNorm(nn.Module):
    """Also the block of other models below."""

    rate: float = RATE

    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            HEADS, dropout_rate=self.rate, deterministic=False
        )(y, y, mask=mask)
        x = x + nn.Dropout(self.rate, deterministic=False)(y)
        return x + FeedForward(self.rate)(nn.LayerNorm()(x))


class LanguageModel(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(TOKENS, D)
        positions = self.param("positions", nn.initializers.normal(), (T, D))
        x, mask = embed(tokens) + positions, nn.make_causal_mask(tokens)
        for _ in range(self.num_layers):
            x = PreNorm()(x, mask)
        return embed.attend(nn.LayerNorm()(x))


class SSM(nn.Module):
    """`setup` is dear, and depends on the parameters alone."""

    states: int = 4

    def setup(self):
        self.system = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (shape, init) in s4.parameters(D, self.states).items()
        }
        self.kernel = s4.kernel(s4.dplr(self.system), T)

    def __call__(self, u):
        return s4.convolve(u, self.kernel) + self.system["d"] * u


class SequenceBlock(nn.Module):
    def setup(self):
        self.norm = nn.LayerNorm()
        self.seq = SSM()
        self.out = nn.Dense(D)

    def __call__(self, x):
        return x + self.out(nn.gelu(self.seq(self.norm(x))))


class ListOfLayers(nn.Module):
    num_layers: int

    def setup(self):
        self.encoder = nn.Dense(D)
        self.layers = [SequenceBlock() for _ in range(self.num_layers)]
        self.decoder = nn.Dense(3)

    def __call__(self, x):
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x)
        return nn.log_softmax(self.decoder(x))


class VisionTransformer(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(D, (2, 2), strides=(2, 2), padding="VALID", name="embedding")(
            images
        )
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, c))
        x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
        size = (1, x.shape[1], c)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), size)
        x = nn.Dropout(RATE, deterministic=False)(x)
        for i in range(self.num_layers):
            x = PreNorm(name=f"encoderblock_{i}")(x)
        x = nn.LayerNorm(name="encoder_norm")(x)
        return nn.Dense(5, name="head")(x[:, 0])


class Rematerialised(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, x):
        block = nn.remat(PreNorm)
        for i in range(self.num_layers):
            x = block(name=f"layer_{i}")(x)
        return x


class ResidualBlock(nn.Module):
    filters: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9)
        y = nn.Conv(self.filters, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.filters, (3, 3), use_bias=False)(y)
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    stage_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv_init")(images))
        for i, block_count in enumerate(self.stage_sizes):
            for j in range(block_count):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = ResidualBlock(4 * 2**i, strides=strides)(x)
        return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))


class CachedBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(HEADS, decode=True)(y)
        return x + y


class Decoder(nn.Module):
    """One step of time; keys and values of all before are in `cache`."""

    num_layers: int

    def setup(self):
        self.blocks = [CachedBlock() for _ in range(self.num_layers)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def linen_cache(num_layers):
    fn, args = of_linen(Decoder(num_layers), activations(), mutable=["cache"])
    return fn, (*args[:-1], activations()[:, :1])


class DecoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, encoded, mask):
        attention = functools.partial(nn.MultiHeadDotProductAttention, HEADS)
        y = nn.LayerNorm()(x)
        x = x + attention(name="self_attention")(y, y, mask=mask)
        x = x + attention(name="cross_attention")(nn.LayerNorm()(x), encoded)
        return x + FeedForward()(nn.LayerNorm()(x))


class Translator(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, sources, targets):
        embed = nn.Embed(TOKENS, D, name="shared_embedding")
        encoded, padding = embed(sources), nn.make_attention_mask(sources > 0, sources)
        for i in range(self.num_layers):
            encoded = PreNorm(name=f"encoder_{i}")(encoded, padding)
        encoded = nn.LayerNorm(name="encoder_norm")(encoded)
        x, mask = embed(targets), nn.make_causal_mask(targets)
        for i in range(self.num_layers):
            x = DecoderBlock(name=f"decoder_{i}")(x, encoded, mask)
        return embed.attend(nn.LayerNorm(name="decoder_norm")(x))


class Experts(nn.Module):
    """A mixture of two experts; reports its loss and features."""

    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(2, name="router")(x))
        load = jnp.mean(gates, axis=(0, 1))
        self.sow("losses", "balance", 2 * jnp.sum(load**2))
        experts = [nn.Dense(D, name=f"expert_{i}")(x) for i in range(2)]
        y = sum(gates[..., i, None] * nn.relu(e) for i, e in enumerate(experts))
        self.sow("intermediates", "features", y)
        return x + y


class MixtureOfExperts(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.num_layers):
            x = Experts()(x)
        return x


def linen_sow(num_layers):
    collections = ["losses", "intermediates"]
    model = MixtureOfExperts(num_layers)
    apply, args = of_linen(model, activations(), mutable=collections)

    def fn(*args):
        y, sown = apply(*args)
        return y, sum(jax.tree.leaves(sown["losses"])), sown["intermediates"]

    params, _, *rest = args
    return fn, (params, {}, *rest)


class ConvNeXtBlock(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(D, (3,), feature_group_count=D, name="depthwise")(x)
        y = nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(nn.LayerNorm()(y))))
        y = self.param("gamma", nn.initializers.constant(1e-6), (D,)) * y
        # Stochastic depth: one number for a whole sequence.
        return x + nn.Dropout(self.rate, (1, 2), deterministic=False)(y)


class ConvNeXt(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_layers):
            x = ConvNeXtBlock(RATE * i / (self.num_layers - 1))(x)
        return x


# Flax NNX


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, D, dropout_rate=RATE, deterministic=False, decode=False, rngs=rngs
        )
        self.dropout = nnx.Dropout(RATE, deterministic=False, rngs=rngs)
        self.norm_out = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.dropout(self.attention(self.norm(x), mask=mask))
        return x + self.down(nnx.gelu(self.up(self.norm_out(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, num_layers, rngs):
        self.embed = nnx.Embed(TOKENS, D, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(num_layers)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, tokens):
        x, mask = self.embed(tokens), nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.embed.attend(self.norm(x))


class NnxMlp(nnx.Module):
    def __init__(self, num_layers, rngs):
        self.num_layers = num_layers
        for i in range(num_layers):
            setattr(self, f"linear_{i}", nnx.Linear(D, D, rngs=rngs))
            setattr(self, f"norm_{i}", nnx.BatchNorm(D, rngs=rngs))
        self.dropout = nnx.Dropout(RATE)

    def __call__(self, x, key):
        rngs = nnx.Rngs(dropout=key)
        for i in range(self.num_layers):
            y = getattr(self, f"norm_{i}")(getattr(self, f"linear_{i}")(x))
            x = x + self.dropout(nnx.relu(y), rngs=rngs)
        return x


def rotary(x, positions, base):
    """Rotates pairs of features of `x` `[B, T, heads, size]`."""
    fraction = 2 * jnp.arange(x.shape[-1] // 2) / x.shape[-1]
    angle = positions[..., None] / base**fraction
    sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class GemmaBlock(nnx.Module):
    """Grouped queries, gated units, and a scale of its depth."""

    def __init__(self, index, rngs, window=None):
        size = D // HEADS
        self.scale = 1 / math.sqrt(index + 1)
        self.window = window
        self.norm_in = nnx.RMSNorm(D, rngs=rngs)
        self.query = nnx.Einsum("BTD,NDH->BTNH", (HEADS, D, size), rngs=rngs)
        self.key_value = nnx.Einsum("BSD,CKDH->CBSKH", (2, 1, D, size), rngs=rngs)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (HEADS, size, D), rngs=rngs)
        self.norm_out = nnx.RMSNorm(D, rngs=rngs)
        self.gate = nnx.Linear(D, 2 * D, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, use_bias=False, rngs=rngs)

    def __call__(self, x, positions, mask):
        y = self.norm_in(x)
        key, value = self.key_value(y)
        base = 10_000 if self.window is None else 1_000
        query, key = (rotary(z, positions, base) for z in (self.query(y), key))
        grouped = (
            query.reshape(*query.shape[:2], 1, HEADS, -1) * query.shape[-1] ** -0.5
        )
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key)
        if self.window is not None:
            near = positions[:, :, None] - positions[:, None] < self.window
            mask = mask & near[:, None, None]
        weights = nnx.softmax(jnp.where(mask, logits, -1e30))
        y = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value)
        x = x + self.scale * self.out(y.reshape(query.shape))
        y = self.norm_out(x)
        return x + self.scale * self.down(nnx.gelu(self.gate(y)) * self.up(y))


class Gemma(nnx.Module):
    def __init__(self, num_layers, rngs, windows=(None,)):
        self.embed = nnx.Embed(TOKENS, D, rngs=rngs)
        self.blocks = nnx.List(
            GemmaBlock(i, rngs, windows[i % len(windows)]) for i in range(num_layers)
        )
        self.norm = nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) * math.sqrt(D)
        positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        mask = nnx.make_causal_mask(tokens, dtype=bool)[:, None]
        for block in self.blocks:
            x = block(x, positions, mask)
        return jnp.tanh(self.embed.attend(self.norm(x)) / 30) * 30


# Equinox


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm_out: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        attention_key, mlp_key = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(D)
        self.attention = eqx.nn.MultiheadAttention(
            HEADS, D, dropout_p=RATE, key=attention_key
        )
        self.norm_out = eqx.nn.LayerNorm(D)
        self.mlp = eqx.nn.MLP(D, D, 2 * D, 1, jax.nn.gelu, key=mlp_key)
        self.dropout = eqx.nn.Dropout(RATE)

    def __call__(self, x, mask, *, key):
        attention_key, first, second = jax.random.split(key, 3)
        y = jax.vmap(self.norm)(x)
        y = self.attention(y, y, y, mask, key=attention_key)
        x = x + self.dropout(y, key=first)
        y = jax.vmap(self.mlp)(jax.vmap(self.norm_out)(x))
        return x + self.dropout(y, key=second)


class EquinoxTransformer(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, num_layers, key):
        embed_key, head_key, *keys = jax.random.split(key, num_layers + 2)
        self.embed = eqx.nn.Embedding(TOKENS, D, key=embed_key)
        self.blocks = [EquinoxBlock(key) for key in keys]
        self.head = eqx.nn.Linear(D, TOKENS, key=head_key)

    def __call__(self, tokens, *, key):
        x, mask = jax.vmap(self.embed)(tokens), jnp.tri(len(tokens), dtype=bool)
        keys = jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys, strict=True):
            x = block(x, mask, key=block_key)
        return jax.vmap(self.head)(x)


def equinox_transformer(num_layers):
    make = functools.partial(EquinoxTransformer, num_layers)
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    typed, static = eqx.partition(
        model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )

    def fn(params, key, tokens):
        keys = jax.random.split(key, len(tokens))
        model = eqx.combine(params, static)
        return jax.vmap(lambda tokens, key: model(tokens, key=key))(tokens, keys)

    return fn, (values(typed), jax.random.key(1), tokens())


# Haiku


class MixerBlock(hk.Module):
    def __call__(self, x):
        y = hk.LayerNorm(-1, True, True)(x).swapaxes(1, 2)
        y = hk.nets.MLP([D, x.shape[1]], activation=jax.nn.gelu, name="tokens")(y)
        x = x + y.swapaxes(1, 2)
        y = hk.LayerNorm(-1, True, True)(x)
        return x + hk.nets.MLP([D, D], activation=jax.nn.gelu, name="channels")(y)


def haiku_mixer(num_layers):
    def forward(images):
        x = hk.Conv2D(D, 2, stride=2, padding="VALID", name="stem")(images)
        x = x.reshape(len(x), -1, D)
        for _ in range(num_layers):
            x = MixerBlock()(x)
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(5, w_init=jnp.zeros, name="head")(x.mean(1))

    return of_haiku(forward, images())


class HaikuTransformer(hk.Module):
    """After the example of a transformer that comes with Haiku."""

    def __init__(self, num_layers, name=None):
        super().__init__(name)
        self.num_layers = num_layers

    def __call__(self, h, mask):
        init = hk.initializers.VarianceScaling(2 / self.num_layers)
        for _ in range(self.num_layers):
            attention = hk.MultiHeadAttention(
                HEADS, D // HEADS, model_size=D, w_init=init
            )
            h_norm = self.norm(h)
            h = h + self.drop(attention(h_norm, h_norm, h_norm, mask=mask))
            dense = hk.Sequential(
                [
                    hk.Linear(2 * D, w_init=init),
                    jax.nn.gelu,
                    hk.Linear(D, w_init=init),
                ]
            )
            h = h + self.drop(dense(self.norm(h)))
        return self.norm(h)

    def norm(self, x):
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    def drop(self, x):
        return hk.dropout(hk.next_rng_key(), RATE, x)


def haiku_language_model(num_layers):
    def forward(tokens):
        embed = hk.Embed(TOKENS, D)
        init = hk.initializers.TruncatedNormal(0.02)
        positions = hk.get_parameter("positions", [T, D], init=init)
        is_padding = (tokens > 0)[:, None, None, :]
        mask = is_padding * np.tril(np.ones((1, 1, T, T)))
        h = HaikuTransformer(num_layers)(embed(tokens) + positions, mask)
        return h @ embed.embeddings.T

    return of_haiku(forward, tokens())


# Plain JAX


def layer_norm(x, g, b, eps=1e-5):
    mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return g * (x - mean) / jnp.sqrt(variance + eps) + b


def linear(x, w, b):
    return x @ w + b


def mha(x, c_attn, c_proj):
    qkv = jnp.split(linear(x, **c_attn), 3, axis=-1)
    mask = (1 - np.tri(x.shape[0], dtype=x.dtype)) * -1e10
    heads = [jnp.split(z, HEADS, axis=-1) for z in qkv]
    out = [
        jax.nn.softmax(q @ k.T / np.sqrt(q.shape[-1]) + mask) @ v
        for q, k, v in zip(*heads, strict=True)
    ]
    return linear(jnp.hstack(out), **c_proj)


def gpt2_block(x, mlp, attn, ln_1, ln_2):
    x = x + mha(layer_norm(x, **ln_1), **attn)
    h = jax.nn.gelu(linear(layer_norm(x, **ln_2), **mlp["c_fc"]))
    return x + linear(h, **mlp["c_proj"])


def gpt2(params, inputs):
    x = params["wte"][inputs] + params["wpe"][jnp.arange(len(inputs))]
    for block in params["blocks"]:
        x = gpt2_block(x, **block)
    return layer_norm(x, **params["ln_f"]) @ params["wte"].T


def plain_skips(num_layers):
    """A U-Net of vectors: the way up reads what the way down left, last first."""

    def fn(params, x):
        skips = []
        for layer in params["down"]:
            x = x + jnp.tanh(linear(x, **layer))
            skips.append(x)
        for layer in params["up"]:
            x = jnp.tanh(linear(jnp.concatenate([x, skips.pop()], -1), **layer))
        return x

    params = {"down": [dense(D, D)] * num_layers, "up": [dense(2 * D, D)] * num_layers}
    return fn, (values(params), activations())


def typed(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense(m, n):
    return {"w": typed(m, n), "b": typed(n)}


def plain_list(num_layers):
    norm = {"g": typed(D), "b": typed(D)}
    block = {
        "attn": {"c_attn": dense(D, 3 * D), "c_proj": dense(D, D)},
        "mlp": {"c_fc": dense(D, 4 * D), "c_proj": dense(4 * D, D)},
        "ln_1": norm,
        "ln_2": norm,
    }
    tables = {"wte": typed(TOKENS, D), "wpe": typed(T, D), "ln_f": norm}
    return gpt2, (values({**tables, "blocks": [block] * num_layers}), tokens()[0])


def plain_stacked(num_layers):
    def fn(params, x, key):
        masks = []
        for i in range(num_layers):
            y = jnp.tanh(x @ params["w"][i] + params["b"][i])
            mask = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - RATE, y.shape)
            x = x + jnp.where(mask, y / (1 - RATE), 0)
            masks.append(mask)
        return x, masks

    params = {"w": typed(num_layers, D, D), "b": typed(num_layers, D)}
    return fn, (values(params), activations(), jax.random.key(1))


CASES = [
    Case(
        "linen_transformer", lambda n: of_linen(LanguageModel(n), tokens()), draws=True
    ),
    Case("linen_list", lambda n: of_linen(ListOfLayers(n), activations())),
    Case("linen_vit", lambda n: of_linen(VisionTransformer(n), images()), draws=True),
    Case(
        "linen_remat",
        lambda n: of_linen(Rematerialised(n), activations()),
        draws=True,
    ),
    Case(
        "linen_resnet",
        lambda n: of_linen(ResNet((n, n + 1)), images(), mutable=["batch_stats"]),
        loops=(4, 4),
    ),
    Case(
        "linen_encoder_decoder",
        lambda n: of_linen(Translator(n), tokens(), tokens(1)),
        loops=(4, 4),
        draws=True,
    ),
    Case("linen_sow", linen_sow),
    Case("linen_cache", linen_cache),
    Case(  # The first has a rate of nothing, and so draws nothing.
        "linen_stochastic_depth",
        lambda n: of_linen(ConvNeXt(n), activations()),
        loops=(3,),
        draws=True,
    ),
    Case(
        "nnx_transformer",
        lambda n: of_nnx(functools.partial(NnxTransformer, n), tokens()),
        draws=True,
    ),
    Case(
        "nnx_numbered",
        lambda n: of_nnx(
            functools.partial(NnxMlp, n), activations(), jax.random.key(1)
        ),
        draws=True,
    ),
    Case("nnx_gemma", lambda n: of_nnx(functools.partial(Gemma, n), tokens())),
    Case(
        "nnx_local_local_global",
        lambda n: of_nnx(functools.partial(Gemma, n, windows=(3, 3, None)), tokens()),
        loops=(3,),
        num_layers=9,
        step=3,
    ),
    Case("equinox_transformer", equinox_transformer, draws=True),
    Case("haiku_mixer", haiku_mixer),
    Case("haiku_language_model", haiku_language_model, draws=True),
    Case("plain_list", plain_list),
    Case("plain_skips", plain_skips, loops=(4, 4)),
    Case("plain_stacked", plain_stacked, draws=True),
]

by_name = {case.name: case for case in CASES}
