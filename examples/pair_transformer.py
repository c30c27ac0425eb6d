"""A transformer with pair bias, on nested stacks as in AlphaFold 3.

    python examples/pair_transformer.py
    python examples/pair_transformer.py --super_blocks=2 --blocks=4 --out=out/smaller

Of a chain of points in space, all distances are known, but noisy: a transformer learns
to take the noise off. Its blocks attend with a bias that is a linear map of a pair
representation `[N, N, P]`, one map for each block. All blocks read the same pair
representation, so no bias needs to wait for the block before. The bias is computed in
one of three ways:

- *in the loop*, block by block, as it is written down most easily;
- *hoisted*: the same with `hk_stack.hoist` around it. The stack does not move it of its
  own accord, as it depends on an activation that the layer function closes over; a mark
  moves it, out of both stacks, or out of the inner one only (`setup="inline"` of the
  outer one), so that biases of one super-block exist at a time;
- *by hand*, as AlphaFold 3 has it: one projection for a whole super-block, whose slices
  are per-layer inputs of the inner stack. Parameters then have another tree.

After training, all ways run on the trained parameters and are compared, with and
without `remat` of both stacks: outputs, gradients, time and memory.

Biases ahead of the loops are all there at once. On two cores, in the forward pass, they
took 3.1 times the temporary memory of biases in the loop if hoisted out of both stacks,
1.4 times if out of the inner one or by hand; the time was about the same. Gradients
need far more memory for what they keep: there it was 0.98 to 1.06 of that in the loop,
with `remat` a quarter, or a third with biases hoisted out of both stacks.

A few minutes on two cores, half of it to compile and to measure.

Writes to `out/pair_transformer` (`--out`):

    curves.png    the loss, in training and held out
    chain.png     distances in a held-out chain, as given, and without the noise

Needs pip install 'hk_stack[examples]'.
"""

import dataclasses
import functools
import time
from typing import Any, Literal, NamedTuple

import common
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import flag
from example_data import Batch
from matplotlib.figure import Figure

import hk_stack

PULL = 0.15  # how much a chain turns towards its start, so that it folds
NUM_TEST = 64  # held-out chains


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
    setup: Literal["auto", "inline"] = "auto"
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


def chain(key: jax.Array, num_points: int) -> jax.Array:
    """A random walk that folds: `[N, 3]`."""

    def step(state: Any, turn: jax.Array) -> Any:
        point, direction = state
        direction = direction + 0.7 * turn - PULL * point
        direction = direction / jnp.linalg.norm(direction)
        return (point + direction, direction), point

    start, *turns = jax.random.normal(key, [num_points + 1, 3])
    points: jax.Array
    _, points = jax.lax.scan(step, (jnp.zeros(3), start), jnp.stack(turns))
    return points


def between(points: jax.Array) -> jax.Array:
    """Distances `[N, N]` of points `[N, 3]`."""
    return jnp.linalg.norm(points[:, None] - points[None], axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_batch(key: jax.Array, num_points: int, size: int) -> Batch:
    """Noisy distances `[B, N, N]` in new chains, with steps of 1, and exact ones."""

    def one(key: jax.Array) -> Batch:
        chain_key, noise_key = jax.random.split(key)
        exact = between(chain(chain_key, num_points))
        noise = jnp.triu(jax.random.normal(noise_key, exact.shape), 1)
        return Batch(jnp.abs(exact + noise + noise.T), exact)

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


def pair_representation(config: Config, distances: jax.Array) -> jax.Array:
    """How far points are from each other, in space and in the chain: `[N, N, P]`."""
    order = jnp.arange(config.points)
    apart = jnp.clip(order[:, None] - order[None, :], -8, 8)
    centres = jnp.linspace(0, 8, 12)[None, None]
    near = jnp.exp(-((distances[..., None] - centres) ** 2))
    h = jnp.concatenate([near, jax.nn.one_hot(apart + 8, 17)], axis=-1)
    h = jax.nn.gelu(hk.Linear(config.pair_width, name="pair_in")(h))
    return hk.Linear(config.pair_width, name="pair_out")(h)


def denoiser(config: Config, way: Way) -> hk.Transformed:
    """Distances `[N, N]` -> the same without noise."""

    def model(distances: jax.Array) -> jax.Array:
        x = jnp.concatenate([distances, jnp.eye(config.points)], axis=-1)
        x = hk.Linear(config.width, name="embed")(x)
        x = transformer(config, way, x, pair_representation(config, distances))
        left, right = jnp.split(
            hk.Linear(2 * config.width)(norm(x, "norm")), 2, axis=-1
        )
        added = left @ right.T / config.width
        return distances + added + added.T

    return hk.without_apply_rng(hk.transform(model))


def loss(config: Config, way: Way, params: hk.Params, batch: Batch) -> jax.Array:
    """Mean square error; of the distances as given it is about one."""
    denoise = jax.vmap(denoiser(config, way).apply, in_axes=(None, 0))
    return jnp.mean((denoise(params, batch.x) - batch.y) ** 2)


def train(config: Config, test: Batch) -> tuple[hk.Params, common.Losses]:
    """Trains a denoiser."""
    way = WAYS["bias hoisted"]
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(denoiser(config, way).init)(init_key, test.x[0])
    adam = optax.adam(common.schedule(config, config.steps), b2=0.99)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), adam)
    update = common.update(functools.partial(loss, config, way), optimiser)
    evaluate = jax.jit(functools.partial(loss, config, way))

    def step(training: Any, number: int) -> Any:
        key_of_step = jax.random.fold_in(key, number)
        batch = random_batch(key_of_step, config.points, config.batch_size)
        return update(training, batch)

    (params, _), losses = common.train(
        step,
        (params, optimiser.init(params)),
        range(config.steps),
        held_out=lambda training: evaluate(training[0], test),
    )
    return params, losses


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
    all_built = []
    for name, way in WAYS.items():
        of_way = functools.partial(loss, config, way)
        fn: Any = jax.grad(of_way) if kind == "gradient" else of_way
        built = common.build(fn, move(way, params), batch)
        all_built.append(built)
        expected = all_built[0].run()
        expected = move(way, expected) if kind == "gradient" else expected
        if not common.difference(built.run(), expected) < 1e-4:
            raise SystemExit(f"{name}: the {kind} differs from that of the first way")
    seconds = common.run_times([each.run for each in all_built], config.rounds)
    temps = [each.memory for each in all_built]
    low, middle, high = np.quantile(seconds / seconds[0], (0.25, 0.5, 0.75), axis=1)
    print(f"\n{kind:32}{'run':^20}{'memory':>7}")
    for i, name in enumerate(WAYS):
        run = f"{middle[i]:6.2f} [{low[i]:4.2f}, {high[i]:4.2f}]"
        print(f"{name:32}{run}{temps[i] / temps[0]:7.2f}")
    first = f"{1e3 * np.median(seconds[0]):.0f} ms and {temps[0] / 1e6:.1f} MB"
    print(f"Medians and quartiles of the ratios to the first, which took {first}.")


def draw_chain(exact: jax.Array, given: jax.Array, found: jax.Array) -> Figure:
    """Draws the distances in a chain, those that are given, and what was found."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    maps = {"in a held-out chain": exact, "as given": given, "by the model": found}
    panels = figure.subplots(1, 3)
    for axes, (name, distances) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(distances, cmap="viridis_r", vmin=0, vmax=np.max(given))
        off = np.sqrt(np.mean((distances - exact) ** 2))
        axes.set(title=f"{name}: off by {off:.2f}" if off else name)
        axes.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=panels, shrink=0.7, label="distance, in steps of a chain")
    return figure


def main(config: Config) -> None:
    """Trains, writes the pictures, and prints what the ways take."""
    start = time.perf_counter()
    key = jax.random.key(config.seed + 1)
    test = random_batch(key, config.points, NUM_TEST)
    params, losses = train(config, test)
    trained = time.perf_counter() - start
    given = jnp.mean((test.x - test.y) ** 2)
    common.draw_losses(
        losses,
        config.folder / "curves.png",
        title=f"Taking noise off distances; as given, the error is {given:.2f}",
        ylabel="mean square error",
    )
    found = denoiser(config, WAYS["bias hoisted"]).apply(params, test.x[0])
    figure = draw_chain(test.y[0], test.x[0], found)
    figure.savefig(config.folder / "chain.png", dpi=120)

    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], test)
    for kind in ("loss", "gradient"):
        compare(config, params, batch, kind)
    print("Results of all ways are equal, up to rounding.")
    print(f"Wrote curves.png and chain.png to {config.out}")
    print(
        f"Held-out loss {losses.held_out[-1][1]:.3f}, without a model "
        f"{given:.3f}; took {trained:.0f} s to train, "
        f"{time.perf_counter() - start:.0f} s in all"
    )


if __name__ == "__main__":
    common.run(main, DEFAULT)
