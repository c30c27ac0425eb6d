"""A diffusion transformer with pair bias, on nested stacks as in AlphaFold 3.

    python examples/pair_transformer.py
    python examples/pair_transformer.py --super_blocks=2 --blocks=4 --out=out/smaller

A chain of points in space is to be found from its pairwise distances, of which only
noisy ones are known. As in AlphaFold 3, a transformer learns to take noise off the
points, and a chain is made from nothing but noise in a few such steps. Its blocks
attend with a bias that is a linear map of a pair representation `[N, N, P]`, one map
for each block. All blocks read the same pair representation, so no bias needs to wait
for the block before. The bias is computed in one of three ways:

- *in the loop*, block by block, as it is written down most easily;
- *hoisted*: the same with `hk_stack.hoist` around it. The stack does not move it of its
  own accord, as it depends on an activation that the layer function closes over; a mark
  moves it, out of both stacks, or out of the inner one only (`setup="inline"` of the
  outer one), so that biases of one super-block exist at a time;
- *by hand*, as AlphaFold 3 has it: one projection for a whole super-block, whose slices
  are per-layer inputs of the inner stack. Parameters then have another tree.

After training, all ways run on the trained parameters and are compared, with and
without `remat` of both stacks: outputs, gradients, time and memory.

FIGURES

Writes to `out/pair_transformer` (`--out`):

    curves.png    the loss, in training and held out
    chain.png     distances in a held-out chain, and in what the model makes of them

Needs pip install 'hk_stack[examples]'.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import flag
from matplotlib.figure import Figure

import hk_stack

PULL = 0.15  # how much a chain turns towards its start, so that it folds
DISTANCE_NOISE = 1.0  # of the distances that are given; a step of a chain is 1
SPREAD = 1.4  # of coordinates around the middle of their chain, roughly
NUM_TEST = 64  # held-out chains
NOISE_STEPS = 20  # from noise to a chain
LARGEST, SMALLEST = 15.0, 0.02  # noise at the first and after the last of these steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """What to train, and how."""

    super_blocks: int = flag("Number of super-blocks.", default=4)
    blocks: int = flag("Blocks in each of them.", default=6)
    points: int = flag("Points of a chain.", default=24, least=4, below=257)
    width: int = flag("Features of a point in each block.", default=32)
    pair_width: int = flag("Features of a pair of points.", default=32)
    heads: int = flag("Attention heads, a divisor of the width.", default=4)
    steps: int = flag("Training steps.", default=500)
    rounds: int = flag("How often each way is run to measure its time.", default=15)

    def __post_init__(self) -> None:
        """Checks that the flags go together."""
        common.check_heads(self.width, self.heads)


DEFAULT = Config(batch_size=16, learning_rate=3e-3, out="out/pair_transformer")


class Way(NamedTuple):
    """How the blocks are run; the function that is computed is always the same.

    Attributes:
      bias: Where the pair bias is computed: "in the loop", "hoisted" or "by hand".
      setup: Of the outer stack: whether what leaves the inner one may leave it too.
      remat: Whether gradients compute super-blocks, and blocks in them, again.
    """

    bias: str
    setup: str = "auto"
    remat: bool = False


WAYS = {
    "bias in the loop": Way("in the loop"),
    "bias hoisted": Way("hoisted"),
    "bias hoisted, by super-block": Way("hoisted", setup="inline"),
    "bias by hand": Way("by hand"),
    "remat, bias in the loop": Way("in the loop", remat=True),
    "remat, bias hoisted": Way("hoisted", remat=True),
    "remat, bias by hand": Way("by hand", remat=True),
}


# Data


class Batch(NamedTuple):
    """Chains `[B, N, 3]`, noisy ones, how noisy `[B]`, noisy distances `[B, N, N]`."""

    points: jax.Array
    noisy: jax.Array
    noise: jax.Array
    distances: jax.Array


def chain(key: jax.Array, num_points: int) -> jax.Array:
    """A random walk of steps of length 1 that folds, around the origin: `[N, 3]`."""

    def step(state: Any, turn: jax.Array) -> Any:
        point, direction = state
        direction = direction + 0.7 * turn - PULL * point
        direction = direction / jnp.linalg.norm(direction)
        return (point + direction, direction), point

    start, *turns = jax.random.normal(key, [num_points + 1, 3])
    _, points = jax.lax.scan(step, (jnp.zeros(3), start), jnp.stack(turns))
    return points - jnp.mean(points, axis=0, keepdims=True)


def between(points: jax.Array) -> jax.Array:
    """Distances `[..., N, N]` of points `[..., N, 3]`; a gradient is zero at zero."""
    squares = jnp.sum((points[..., :, None, :] - points[..., None, :, :]) ** 2, -1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def random_batch(key: jax.Array, num_points: int, size: int) -> Batch:
    """New chains, with noise of any size on points, of one size on distances."""

    def one(key: jax.Array) -> Batch:
        keys = jax.random.split(key, 4)
        points = chain(keys[0], num_points)
        noise = SPREAD * jnp.exp(1.2 * jax.random.normal(keys[1]) - 0.3)
        noisy = points + noise * jax.random.normal(keys[2], points.shape)
        upper = jnp.triu(jax.random.normal(keys[3], [num_points, num_points]), 1)
        distances = between(points) + DISTANCE_NOISE * (upper + upper.T)
        return Batch(points, noisy, noise, jnp.abs(distances))

    return jax.vmap(one)(jax.random.split(key, size))


# Model


def norm(x: jax.Array, name: str) -> jax.Array:
    """Layer norm over features."""
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)(x)


def block(config: Config, x: jax.Array, bias: jax.Array) -> jax.Array:
    """Attention with logits `[H, N, N]` as bias, then a transition, on `[N, D]`."""
    # What all blocks add up to has the variance of one.
    depth = 2 * config.super_blocks * config.blocks
    residual = functools.partial(
        hk.Linear, config.width, w_init=hk.initializers.VarianceScaling(1 / depth)
    )
    h = norm(x, "attention_norm")
    gate = jax.nn.sigmoid(hk.Linear(config.width, name="attention_gate")(h))
    h = hk.Linear(3 * config.width, with_bias=False, name="attention_in")(h)
    query, key, value = jnp.split(h.reshape(len(x), 3 * config.heads, -1), 3, axis=1)
    h = jax.nn.dot_product_attention(query, key, value, bias=bias)
    x = x + residual(name="attention_out")(gate * h.reshape(x.shape))
    h = hk.Linear(4 * config.width, with_bias=False, name="transition_in")(
        norm(x, "transition_norm")
    )
    gate, h = jnp.split(h, 2, axis=-1)
    return x + residual(name="transition_out")(jax.nn.silu(gate) * h)


def pair_bias(pair: jax.Array, heads: int) -> jax.Array:
    """Logits `[heads, N, N]` of a pair representation `[N, N, P]`."""
    return jnp.moveaxis(
        hk.Linear(heads, with_bias=False, name="pair_bias")(pair), -1, 0
    )


def transformer(config: Config, way: Way, x: jax.Array, pair: jax.Array) -> jax.Array:
    """All blocks, in a stack of stacks, on `[N, D]` and `[N, N, P]`."""
    pair = norm(pair, "pair_norm")
    blocks = functools.partial(
        hk_stack.layer_stack, config.blocks, name="blocks", remat=way.remat
    )

    def layer(x: jax.Array) -> jax.Array:
        bias = pair_bias(pair, config.heads)
        if way.bias == "hoisted":
            bias = hk_stack.hoist(bias)
        return block(config, x, bias)

    def layer_by_hand(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        return block(config, x, bias), None

    def super_block(x: jax.Array) -> jax.Array:
        if way.bias != "by hand":
            return blocks()(layer)(x)
        bias = pair_bias(pair, config.blocks * config.heads)
        bias = bias.reshape(config.blocks, config.heads, *bias.shape[1:])
        return blocks(with_per_layer_inputs=True)(layer_by_hand)(x, bias)[0]

    super_blocks = hk_stack.layer_stack(
        config.super_blocks, name="super_blocks", setup=way.setup, remat=way.remat
    )
    return super_blocks(super_block)(x)


def pair_representation(
    config: Config, given: jax.Array, now: jax.Array, scale: jax.Array
) -> jax.Array:
    """How far points are from each other, and should be: `[N, N, P]`."""
    order = jnp.arange(config.points)
    apart = jnp.clip(order[:, None] - order[None, :], -8, 8)
    centres = jnp.linspace(0, 8, 12)[None, None]
    features = [
        jnp.exp(-((given[..., None] - centres) ** 2)),
        jnp.exp(-((now[..., None] - centres) ** 2)),
        jnp.tanh(given - now)[..., None],
        (scale * now)[..., None],
        jax.nn.one_hot(apart + 8, 17),
    ]
    h = hk.Linear(config.pair_width, name="pair_in")(jnp.concatenate(features, -1))
    return hk.Linear(config.pair_width, name="pair_out")(jax.nn.gelu(h))


def denoiser(config: Config, way: Way) -> hk.Transformed:
    """`(noisy points [N, 3], noise [], distances [N, N]) -> points [N, 3]`."""

    def model(noisy: jax.Array, noise: jax.Array, distances: jax.Array) -> jax.Array:
        # What the network reads and what it adds have unit variance at any noise
        # (Karras et al. 2022).
        scale = jax.lax.rsqrt(noise**2 + SPREAD**2)
        log_noise = jnp.full([config.points, 1], jnp.log(noise / SPREAD))
        ends = jnp.linspace(-1, 1, config.points)[:, None]
        x = jnp.concatenate([scale * noisy, log_noise, ends], axis=-1)
        x = hk.Linear(config.width, name="embed")(x)
        pair = pair_representation(config, distances, between(noisy), scale)
        x = transformer(config, way, x, pair)
        x = hk.Linear(3, name="points")(norm(x, "norm"))
        return SPREAD**2 * scale**2 * noisy + noise * SPREAD * scale * x

    return hk.without_apply_rng(hk.transform(model))


def loss(config: Config, way: Way, params: hk.Params, batch: Batch) -> jax.Array:
    """Mean square error of what the network adds, which is 1 if it adds nothing."""
    denoise = jax.vmap(denoiser(config, way).apply, in_axes=(None, 0, 0, 0))
    found = denoise(params, batch.noisy, batch.noise, batch.distances)
    # Of the residual that is left, in units in which it has variance 1 at the start.
    weight = (batch.noise**2 + SPREAD**2) / (batch.noise * SPREAD) ** 2
    return jnp.mean(weight[:, None, None] * (found - batch.points) ** 2)


# Training, and chains from noise


def train(config: Config, test: Batch) -> tuple[hk.Params, common.Losses]:
    """Trains a denoiser."""
    way = WAYS["bias hoisted"]
    init_key, key = jax.random.split(jax.random.key(config.seed))
    example = jax.tree.map(lambda leaf: leaf[0], test)
    params = jax.jit(denoiser(config, way).init)(init_key, *example[1:])
    adam = optax.adam(common.schedule(config, config.steps), b2=0.99)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), adam)
    evaluate = jax.jit(functools.partial(loss, config, way))

    def of_step(params: hk.Params, number: int) -> jax.Array:
        key_of_step = jax.random.fold_in(key, number)
        batch = random_batch(key_of_step, config.points, config.batch_size)
        return loss(config, way, params, batch)

    (params, _), losses = common.train(
        common.update(of_step, optimiser),
        (params, optimiser.init(params)),
        range(config.steps),
        held_out=lambda training: evaluate(training[0], test),
    )
    return params, losses


def from_noise(
    denoise: Callable[..., jax.Array], key: jax.Array, distances: jax.Array
) -> jax.Array:
    """A chain `[N, 3]` with these distances, from nothing but noise.

    `denoise` is `(noisy, noise, distances) -> points`.
    """
    ratio = (SMALLEST / LARGEST) ** (1 / NOISE_STEPS)

    def step(points: jax.Array, noise: jax.Array) -> tuple[jax.Array, None]:
        clean = denoise(points, noise, distances)
        return clean + ratio * (points - clean), None

    start = LARGEST * jax.random.normal(key, [len(distances), 3])
    noises = LARGEST * ratio ** np.arange(NOISE_STEPS, dtype=np.float32)
    return jax.lax.scan(step, start, noises)[0]


# The ways, compared


def move(way: Way, params: hk.Params) -> hk.Params:
    """Parameters, or a gradient by them, as the tree of a way."""
    if way.bias != "by hand":
        return params
    # Of each block `[S, B, P, H]`, to one for a super-block `[S, P, B H]`.
    moved = dict(params)
    leaf = moved.pop("super_blocks/blocks/pair_bias")["w"]
    leaf = jnp.moveaxis(leaf, 1, 2).reshape(len(leaf), leaf.shape[2], -1)
    return {**moved, "super_blocks/pair_bias": {"w": leaf}}


def compare(config: Config, params: hk.Params, batch: Batch, kind: str) -> None:
    """Prints time and memory of the ways in ratios to the first, "loss" or "gradient".

    Raises:
      SystemExit: if two ways give different results.
    """
    programs, temps = [], []
    for name, way in WAYS.items():
        fn = functools.partial(loss, config, way)
        fn = jax.grad(fn) if kind == "gradient" else fn
        args = move(way, params), batch
        compiled = jax.jit(fn).lower(*args).compile()
        programs.append(functools.partial(compiled, *args))
        temps.append(compiled.memory_analysis().temp_size_in_bytes)
        expected = programs[0]()
        expected = move(way, expected) if kind == "gradient" else expected
        if not common.difference(programs[-1](), expected) < 1e-4:
            raise SystemExit(f"{name}: the {kind} differs from that of the first way")
    seconds = common.run_times(programs, config.rounds)
    low, middle, high = np.quantile(seconds / seconds[0], (0.25, 0.5, 0.75), axis=1)
    print(f"\n{kind:32}{'run':^20}{'memory':>7}")
    for i, name in enumerate(WAYS):
        run = f"{middle[i]:6.2f} [{low[i]:4.2f}, {high[i]:4.2f}]"
        print(f"{name:32}{run}{temps[i] / temps[0]:7.2f}")
    first = f"{1e3 * np.median(seconds[0]):.0f} ms and {temps[0] / 1e6:.1f} MB"
    print(f"Medians and quartiles of the ratios to the first, which took {first}.")


def draw_chain(points: jax.Array, given: jax.Array, found: jax.Array) -> Figure:
    """Draws the distances in a chain, those that are given, and what was found."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    maps = {
        "distances in a held-out chain": between(points),
        "as given": given,
        "in the model's chain": between(found),
    }
    panels = figure.subplots(1, 3)
    for axes, (name, distances) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(distances, cmap="viridis_r", vmin=0, vmax=np.max(given))
        axes.set(title=name, xticks=[], yticks=[])
    figure.colorbar(image, ax=panels, shrink=0.7, label="in steps of a chain")
    return figure


def main(config: Config) -> None:
    """Trains, writes the pictures, and prints what the ways take."""
    start = time.perf_counter()
    key = jax.random.key(config.seed + 1)
    test = random_batch(key, config.points, NUM_TEST)
    params, losses = train(config, test)
    trained = time.perf_counter() - start
    labels = {"ylabel": "mean square error, weighted", "ylim": (0, 1.5)}
    title = "Taking noise off chains of points; a network that adds nothing is at 1"
    common.draw_losses(losses, config.folder / "curves.png", title=title, **labels)

    denoise = functools.partial(denoiser(config, WAYS["bias hoisted"]).apply, params)
    run = jax.jit(jax.vmap(functools.partial(from_noise, denoise)))
    found = run(jax.random.split(key, NUM_TEST), test.distances)
    figure = draw_chain(test.points[0], test.distances[0], found[0])
    figure.savefig(config.folder / "chain.png", dpi=120)

    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], test)
    for kind in ("loss", "gradient"):
        compare(config, params, batch, kind)
    print("Results of all ways are equal, up to rounding.")
    print(f"Wrote curves.png and chain.png to {config.out}")
    exact = between(test.points)
    given, ours = (jnp.std(d - exact) for d in (test.distances, between(found)))
    print(
        f"Held-out loss {losses.held_out[-1][1]:.3f}, 1 without a network; distances "
        f"are off by {ours:.2f} in the model's chains, by {given:.2f} as given; took "
        f"{trained:.0f} s to train, {time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    common.run(main, DEFAULT)
