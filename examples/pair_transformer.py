"""A diffusion transformer with pair bias, on nested stacks as in AlphaFold 3.

    python examples/pair_transformer.py
    python examples/pair_transformer.py --super_blocks=2 --blocks=4 --out=out/smaller

A chain of points in space is to be found from its pairwise distances, of which only
noisy ones are known. As in AlphaFold 3, a transformer learns to take noise off the
points, and a chain is made from nothing but noise in a few such steps. Its blocks
attend with a bias that is a linear map of a pair representation `[N, N, P]`, one map
for each block. All blocks read the same pair representation, so no bias needs to wait
for the block before. `PairTransformer` has it computed in three ways:

- *in the loop*, block by block, as it is written down most easily;
- *hoisted*: the same with `hk_stack.hoist` around it. The stack does not move it of its
  own accord, as it depends on an activation that the layer function closes over; a mark
  moves it, out of both stacks, or out of the inner one only (`setup="inline"` of the
  outer one), so that biases of one super-block exist at a time;
- *by hand*, as AlphaFold 3 has it: one projection for a whole super-block, whose slices
  are per-layer inputs of the inner stack. Parameters then have another tree.

Block and projection are modules made outside of the layer function, which closes over
them, as in AlphaFold 2. Like there, `hk.remat` may be put around the layer function;
the stacks' own `remat` does that too, also for groups of blocks.

After training, all ways run on the trained parameters and are compared: outputs,
gradients, time and memory. On two cores, ratios to biases in the loop came out so:

- Biases ahead of the loops gain nothing in the forward pass, and about a tenth of the
  time of a gradient; hoisted or by hand is all the same. Out of both stacks, they need
  2.5 times the temporary memory in the forward pass; out of the inner one, as those by
  hand, 1.2 times.
- `remat` saves more: gradients took 0.3 to 0.5 of the memory and, here, 0.5 to 0.8 of
  the time as well. With it `hoist` gains a sixth of the time, as biases in the loop are
  computed again and hoisted ones are kept, in more memory (0.35 instead of 0.26).
- `remat` of both stacks, or of groups in one stack of all blocks, keeps the least.

Two to three minutes on two cores, half of that to compile and to measure. Writes to
`out/pair_transformer` (`--out`):

    curves.png       the loss during training, in training and held out
    chain.png        a held-out chain and what the model makes of its distances
    attention.png    where some of the blocks look, and which points are in contact

Needs pip install 'hk_stack[examples]'.
"""

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags
from matplotlib.figure import Figure

import hk_stack

PULL = 0.15  # how much a chain turns towards its start, so that it folds
DISTANCE_NOISE = 1.0  # of the distances that are given; a step of a chain is 1
SPREAD = 1.4  # of coordinates around the middle of their chain, roughly
CONTACT = 1.75  # points nearer than this are in contact, unless neighbours
NUM_TEST = 64  # held-out chains
NOISE_STEPS = 20  # from noise to a chain
LARGEST, SMALLEST = 15.0, 0.02  # noise at the first and after the last of these steps
LOW = 0.3  # noise of the points at which attention is drawn


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, and how. The flags of the same names say what each field is."""

    super_blocks: int = 4
    blocks: int = 6
    points: int = 24
    width: int = 32
    pair_width: int = 32
    heads: int = 4
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 3e-3
    seed: int = 0
    rounds: int = 15

    @property
    def num_blocks(self) -> int:
        """Of all super-blocks."""
        return self.super_blocks * self.blocks


@dataclasses.dataclass(frozen=True)
class Way:
    """How the blocks are run; the function that is computed is always the same.

    Attributes:
      bias: Where the pair bias is computed: "in the loop", "hoisted" or "by hand".
      setup: Of the outer stack: whether what leaves the inner one may leave it too.
      remat: What gradients compute again: a key of `REMAT`.
      is_captured: Whether block and projection are made outside of the layer function.
    """

    bias: str = "hoisted"
    setup: str = "auto"
    remat: str = "nothing"
    is_captured: bool = True

    @property
    def is_flat(self) -> bool:
        """Whether there is one stack of all blocks."""
        return self.remat == "groups"

    @property
    def outer(self) -> dict[str, Any]:
        """Options of the stack of super-blocks."""
        return REMAT[self.remat][0]

    @property
    def inner(self) -> dict[str, Any]:
        """Options of the stack of blocks."""
        return REMAT[self.remat][1]


# Options of the outer and of the inner stack.
REMAT: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "blocks": ({}, {"remat": True}),
    "hk.remat": ({}, {}),
    "super-blocks": ({"remat": True}, {}),
    "both": ({"remat": True}, {"remat": True}),
    "groups": ({}, {"remat": True, "remat_every": "sqrt"}),
}
PLAIN = Way("in the loop")
WAYS = {
    "bias in the loop": PLAIN,
    "bias hoisted": Way(),
    "bias hoisted, by super-block": Way(setup="inline"),
    "bias by hand": Way("by hand"),
    "modules made in the layer": Way(is_captured=False),
    "remat=True, blocks": Way(remat="blocks"),
    "hk.remat, blocks": Way(remat="hk.remat"),
    "remat=True, super-blocks": Way(remat="super-blocks"),
    "the same, bias by super-block": Way(setup="inline", remat="super-blocks"),
    "remat=True, both": Way(remat="both"),
    "the same, bias in the loop": Way("in the loop", remat="both"),
    'one stack, remat_every="sqrt"': Way(remat="groups"),
}


# Data


class Batch(NamedTuple):
    """Chains `[B, ...]` to be denoised.

    Attributes:
      points: The chains, `[B, N, 3]`.
      noisy: The same with noise.
      noise: How much, `[B]`.
      distances: The given distances, `[B, N, N]`, which are noisy too.
    """

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


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_batch(key: jax.Array, num_points: int, size: int) -> Batch:
    """New chains, with noise of any size on points, of one size on distances."""
    keys = jax.random.split(key, (4, size))
    points = jax.vmap(lambda key: chain(key, num_points))(keys[0])
    noise = jax.vmap(jax.random.normal)(keys[1])
    noise = SPREAD * jnp.exp(1.2 * noise - 0.3)
    added = jax.vmap(lambda key: jax.random.normal(key, points.shape[1:]))(keys[2])
    noisy = points + noise[:, None, None] * added
    return Batch(points, noisy, noise, jax.vmap(measured)(keys[3], points))


def measured(key: jax.Array, points: jax.Array) -> jax.Array:
    """Symmetric noisy distances `[N, N]`, none below zero."""
    exact = between(points)
    upper = jnp.triu(jax.random.normal(key, exact.shape), 1)
    return jnp.abs(exact + DISTANCE_NOISE * (upper + upper.T))


# Model


def norm(x: jax.Array, name: str) -> jax.Array:
    """Layer norm over features."""
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)(x)


class Block(hk.Module):
    """Attention with pair bias, then a gated transition, both pre-norm and residual."""

    def __init__(self, config: Config, name: str = "block"):
        super().__init__(name=name)
        self.config = config

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """`[N, D]` and logits `[H, N, N]` -> `[N, D]`."""
        x = x + attention(self.config, norm(x, "attention_norm"), bias)
        return x + transition(self.config, norm(x, "transition_norm"))


def attention(config: Config, x: jax.Array, bias: jax.Array) -> jax.Array:
    """Gated multi-head attention with pair bias."""
    size = config.width // config.heads
    h = hk.Linear(3 * config.width, with_bias=False, name="attention_in")(x)
    query, key, value = jnp.moveaxis(h.reshape(-1, 3, config.heads, size), 0, 2)
    logits = query @ jnp.swapaxes(key, 1, 2) * size**-0.5 + bias
    weights = hk_stack.tap(jax.nn.softmax(logits, axis=-1), "attention")
    h = jnp.moveaxis(weights @ value, 0, 1).reshape(x.shape)
    gate = jax.nn.sigmoid(hk.Linear(config.width, name="attention_gate")(x))
    return residual(config, "attention_out")(gate * h)


def transition(config: Config, x: jax.Array) -> jax.Array:
    """A gated perceptron."""
    h = hk.Linear(4 * config.width, with_bias=False, name="transition_in")(x)
    gate, h = jnp.split(h, 2, axis=-1)
    return residual(config, "transition_out")(jax.nn.silu(gate) * h)


def residual(config: Config, name: str) -> hk.Linear:
    """A linear layer; what all of them add up to has the variance of one."""
    w_init = hk.initializers.VarianceScaling(1 / (2 * config.num_blocks))
    return hk.Linear(config.width, w_init=w_init, name=name)


class PairBias(hk.Linear):
    """A linear map of the pair representation to logits `[H, N, N]`."""

    def __init__(self, num_heads: int, name: str = "pair_bias"):
        super().__init__(num_heads, with_bias=False, name=name)

    def __call__(self, pair: jax.Array) -> jax.Array:
        """`[N, N, P]` -> `[H, N, N]`."""
        return jnp.moveaxis(super().__call__(pair), -1, 0)


class PairTransformer(hk.Module):
    """All blocks, in a stack of stacks."""

    def __init__(self, config: Config, way: Way, name: str = "transformer"):
        super().__init__(name=name)
        self.config = config
        self.way = way

    def __call__(self, x: jax.Array, pair: jax.Array) -> jax.Array:
        """`[N, D]` and a pair representation `[N, N, P]` -> `[N, D]`."""
        config, way = self.config, self.way
        pair = norm(pair, "pair_norm")
        # Modules that are made here and called in the layer function have parameters
        # for each layer, just as if they were made there; only the names differ.
        modules = make_modules(config) if way.is_captured else None
        run = blocks_by_hand if way.bias == "by hand" else blocks
        run = functools.partial(run, config, way, modules, pair)
        if way.is_flat:
            return run(config.num_blocks, x)
        super_blocks = hk_stack.layer_stack(
            config.super_blocks, name="super_blocks", setup=way.setup, **way.outer
        )
        return super_blocks(functools.partial(run, config.blocks))(x)


def make_modules(config: Config) -> tuple[Block, PairBias]:
    """What a layer is made of."""
    return Block(config), PairBias(config.heads)


def blocks(
    config: Config, way: Way, modules: Any, pair: jax.Array, number: int, x: jax.Array
) -> jax.Array:
    """A stack of blocks that compute their bias from a pair representation."""

    def layer(x: jax.Array) -> jax.Array:
        block, pair_bias = modules or make_modules(config)
        bias = pair_bias(pair)
        if way.bias == "hoisted":
            bias = hk_stack.hoist(bias)
        return block(x, bias)

    if way.remat == "hk.remat":
        layer = hk.remat(layer)
    return hk_stack.layer_stack(number, name="blocks", **way.inner)(layer)(x)


def blocks_by_hand(
    config: Config, way: Way, modules: Any, pair: jax.Array, number: int, x: jax.Array
) -> jax.Array:
    """A stack of blocks that are given their bias."""
    bias = PairBias(number * config.heads)(pair)
    bias = bias.reshape(number, config.heads, *bias.shape[1:])
    block, _ = modules

    def layer(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
        return block(x, bias), None

    stack = hk_stack.layer_stack(number, True, name="blocks", **way.inner)
    return stack(layer)(x, bias)[0]


def denoiser(config: Config, way: Way = PLAIN) -> hk.Transformed:
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
        x = PairTransformer(config, way)(x, pair)
        x = hk.Linear(3, name="points")(norm(x, "norm"))
        return SPREAD**2 * scale**2 * noisy + noise * SPREAD * scale * x

    return hk.without_apply_rng(hk.transform(model))


def pair_representation(
    config: Config, given: jax.Array, now: jax.Array, scale: jax.Array
) -> jax.Array:
    """How far points are from each other, and should be: `[N, N, P]`."""
    order = jnp.arange(config.points)
    apart = jnp.clip(order[:, None] - order[None, :], -8, 8)
    centres = jnp.linspace(0, 8, 12)
    features = [
        jnp.exp(-((given[..., None] - centres[None, None]) ** 2)),
        jnp.exp(-((now[..., None] - centres[None, None]) ** 2)),
        jnp.tanh(given - now)[..., None],
        (scale * now)[..., None],
        jax.nn.one_hot(apart + 8, 17),
    ]
    h = hk.Linear(config.pair_width, name="pair_in")(jnp.concatenate(features, -1))
    return hk.Linear(config.pair_width, name="pair_out")(jax.nn.gelu(h))


Denoise = Callable[[hk.Params, jax.Array, jax.Array, jax.Array], jax.Array]


def denoise(config: Config, way: Way = PLAIN) -> Denoise:
    """`(params, noisy, noise, distances) -> points`, for chains `[B, ...]`."""
    return jax.vmap(denoiser(config, way).apply, in_axes=(None, 0, 0, 0))


def loss(run: Denoise, params: hk.Params, batch: Batch) -> jax.Array:
    """Mean square error of what the network adds, which is 1 if it adds nothing."""
    found = run(params, batch.noisy, batch.noise, batch.distances)
    # Of the residual that is left, in units in which it has variance 1 at the start.
    weight = (batch.noise**2 + SPREAD**2) / (batch.noise * SPREAD) ** 2
    return jnp.mean(weight[:, None, None] * (found - batch.points) ** 2)


# Training


class Curve(NamedTuple):
    """The loss of each step, and `(step, loss)` on held-out chains now and then."""

    training: list[float]
    held_out: list[tuple[int, float]]


def train(config: Config, test: Batch) -> tuple[hk.Params, Curve]:
    """Trains a denoiser with a progress bar."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    example = jax.tree.map(lambda leaf: leaf[0], test)
    params = jax.jit(denoiser(config).init)(init_key, *example[1:])
    optimiser = adam(config)
    state = optimiser.init(params)
    step = train_step(config, optimiser)
    test_loss = jax.jit(functools.partial(loss, denoise(config, Way())))
    curve, last_test = Curve([], []), ""
    with tqdm.tqdm(total=config.steps, unit="step") as bar:
        for number in range(1, config.steps + 1):
            batch_key = jax.random.fold_in(key, number)
            params, state, value = step(params, state, batch_key)
            curve.training.append(float(value))
            if number % 50 == 0 or number == config.steps:
                curve.held_out.append((number, float(test_loss(params, test))))
                last_test = f", held out {curve.held_out[-1][1]:.3f}"
            now = f"loss {np.mean(curve.training[-20:]):.3f}{last_test}"
            bar.set_postfix_str(now, refresh=False)
            bar.update()
    return params, curve


def train_step(
    config: Config, optimiser: optax.GradientTransformation
) -> Callable[..., Any]:
    """`(params, optimiser state, key) -> (params, state, loss)`."""
    of_batch = functools.partial(loss, denoise(config, Way()))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: hk.Params, state: Any, key: jax.Array) -> Any:
        batch = random_batch(key, config.points, config.batch_size)
        value, grads = jax.value_and_grad(of_batch)(params, batch)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def adam(config: Config) -> optax.GradientTransformation:
    """Adam; its rate rises for a tenth of the time, then falls to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup_steps=config.steps // 10,
        decay_steps=config.steps,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


# Chains from distances


def from_noise(
    run: Denoise, params: hk.Params, key: jax.Array, distances: jax.Array
) -> jax.Array:
    """Chains `[B, N, 3]` with these distances, from nothing but noise."""
    ratio = (SMALLEST / LARGEST) ** (1 / NOISE_STEPS)
    start = LARGEST * jax.random.normal(key, (*distances.shape[:2], 3))

    def step(points: jax.Array, noise: jax.Array) -> tuple[jax.Array, None]:
        clean = run(params, points, jnp.full(len(points), noise), distances)
        return clean + ratio * (points - clean), None

    noises = LARGEST * ratio ** np.arange(NOISE_STEPS, dtype=np.float32)
    return jax.lax.scan(step, start, noises)[0]


def scaling(distances: jax.Array) -> jax.Array:
    """The points `[N, 3]` of classical multidimensional scaling."""
    squares = distances**2
    rows = jnp.mean(squares, axis=0, keepdims=True)
    gram = -0.5 * (squares - rows - rows.T + jnp.mean(squares))
    values, vectors = jnp.linalg.eigh(gram)
    return vectors[:, -3:] * jnp.sqrt(jnp.maximum(values[-3:], 0))[None]


def distance_error(found: jax.Array, points: jax.Array) -> float:
    """Root mean square error of distances `[B, N, N]`, in steps of a chain."""
    num_points = points.shape[1]
    squares = jnp.sum((found - between(points)) ** 2, axis=(1, 2))
    # It is alike for a chain and its mirror image, which distances cannot tell apart.
    return float(jnp.sqrt(jnp.mean(squares) / (num_points * (num_points - 1))))


def distance_errors(config: Config, test: Batch, found: jax.Array) -> dict[str, float]:
    """Errors of the chains that the model found, and of what needs no model."""
    others = random_batch(jax.random.key(config.seed + 2), config.points, 1024)
    typical = jnp.mean(between(others.points), axis=0, keepdims=True)
    estimates = {
        "the mean of other chains": typical,
        "the distances as given": test.distances,
        "multidimensional scaling of them": between(jax.vmap(scaling)(test.distances)),
        "the model's chains": between(found),
    }
    return {name: distance_error(d, test.points) for name, d in estimates.items()}


# The ways, compared


class Row(NamedTuple):
    """What one program of a way takes.

    Attributes:
      seconds: Run time in each round.
      temp: Bytes that it needs for a time.
      differs: How far its results are from those of the first way.
    """

    seconds: np.ndarray
    temp: int
    differs: float


def move(config: Config, way: Way, params: hk.Params) -> hk.Params:
    """Parameters of the first way, or a gradient by them, as the tree of another."""
    own = "transformer/super_blocks/blocks/"
    moved: dict[str, Any] = {m: dict(leaves) for m, leaves in params.items()}
    if way.bias == "by hand":
        # Of each block `[S, B, P, H]`, to one for a super-block `[S, P, B H]`.
        leaf = moved.pop(f"{own}transformer/pair_bias")["w"]
        leaf = jnp.moveaxis(leaf, 1, 2).reshape(len(leaf), leaf.shape[2], -1)
        moved["transformer/super_blocks/pair_bias"] = {"w": leaf}
    if not way.is_captured:
        moved = {m.replace(f"{own}transformer/", own): v for m, v in moved.items()}
    if way.is_flat:
        for name in [m for m in moved if m.startswith(own)]:
            leaves = moved.pop(name)
            flat = {n: v.reshape(-1, *v.shape[2:]) for n, v in leaves.items()}
            moved[name.replace("super_blocks/", "")] = flat
    return moved


def function(
    config: Config, way: Way, kind: str, params: hk.Params, batch: Batch
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The forward pass or the gradient of the loss, and its arguments."""
    run, params = denoise(config, way), move(config, way, params)
    if kind == "forward":
        return run, (params, *batch[1:])
    return jax.grad(functools.partial(loss, run)), (params, batch)


def compare(
    config: Config, names: Sequence[str], kind: str, params: hk.Params, batch: Batch
) -> dict[str, Row]:
    """Compiles and runs the ways of these names; forward, those that differ in it."""
    ways = {name: way for name, way in WAYS.items() if way == PLAIN or name in names}
    if kind == "forward":
        ways = {name: way for name, way in ways.items() if way.remat == "nothing"}
    programs, temps, differs = [], [], []
    for way in tqdm.tqdm(ways.values(), desc=f"{kind}: compile", unit="way"):
        fn, args = function(config, way, kind, params, batch)
        compiled = jax.jit(fn).lower(*args).compile()
        programs.append(functools.partial(compiled, *args))
        temps.append(compiled.memory_analysis().temp_size_in_bytes)
        result = programs[-1]()
        expected = programs[0]()
        if kind == "gradient":
            expected = move(config, way, expected)
        differs.append(difference(result, expected))
    seconds = run_times(programs, config, kind)
    rows = map(Row, seconds, temps, differs)
    return dict(zip(ways, rows, strict=True))


def run_times(
    functions: Sequence[Callable[[], Any]], config: Config, kind: str
) -> np.ndarray:
    """Seconds `[F, R]` of each function in each round; all take turns, in any order."""
    seconds = np.zeros([len(functions), config.rounds])
    rng = np.random.default_rng(config.seed)
    for turn in tqdm.trange(config.rounds, desc=f"{kind}: run", unit="round"):
        for i in rng.permutation(len(functions)):
            start = time.perf_counter()
            jax.block_until_ready(functions[i]())
            seconds[i, turn] = time.perf_counter() - start
    return seconds


def difference(value: Any, reference: Any) -> float:
    """The largest difference between two pytrees, relative to the largest value."""
    pairs = jax.tree.map(lambda v, r: jnp.max(abs(v - r)), value, reference)
    largest = [jnp.max(abs(leaf)) for leaf in jax.tree.leaves(reference)]
    return float(np.max(jax.tree.leaves(pairs)) / np.max(largest))


def print_table(forward: Mapping[str, Row], gradient: Mapping[str, Row]) -> None:
    """One line for each way, in ratios to the first."""
    titles = f"{'run':^20}{'memory':>7}"
    print(f"\n{'':32}{'forward':^27}  {'gradient':^27}")
    print(f"{'way':32}{titles}  {titles}{'differ by':>12}")
    for name, row in gradient.items():
        before, both = f"{'':27}", [row.differs]
        if name in forward:
            before = ratios(forward[name], *list(forward.values())[:1])
            both.append(forward[name].differs)
        after = ratios(row, *list(gradient.values())[:1])
        print(f"{name:32}{before}  {after}{np.max(both):12.0e}")
    first = ", ".join(
        f"{1e3 * np.median(row.seconds):.0f} ms and {row.temp / 1e6:.1f} MB {kind}"
        for kind, rows in {"forward": forward, "for the gradient": gradient}.items()
        for row in list(rows.values())[:1]
    )
    print(f"Medians and quartiles of the ratios to the first way, which took {first}.")
    every = [row.differs for rows in (forward, gradient) for row in rows.values()]
    equal = "equal" if np.max(every) < 1e-4 else "DIFFERENT"
    print(f"Outputs and gradients of all ways are {equal}, up to rounding.")


def ratios(row: Row, first: Row) -> str:
    """Time and memory, relative to the first way."""
    low, middle, high = np.quantile(row.seconds / first.seconds, (0.25, 0.5, 0.75))
    return f"{middle:6.2f} [{low:4.2f}, {high:4.2f}]{row.temp / first.temp:7.2f}"


# Attention


def attention_maps(config: Config, params: hk.Params, batch: Batch) -> np.ndarray:
    """What all blocks attend to, `[B, super-blocks, blocks, H, N, N]`, at low noise."""
    scale = (LOW / batch.noise)[:, None, None]
    noisy = batch.points + scale * (batch.noisy - batch.points)
    inputs = noisy, jnp.full_like(batch.noise, LOW), batch.distances
    apply = hk_stack.collect(denoiser(config, Way()).apply, "*/attention")
    run = jax.jit(jax.vmap(apply, in_axes=(None, 0, 0, 0)))
    _, taps = run(params, *inputs)
    (maps,) = taps.values()
    return np.asarray(maps)


def contacts(points: jax.Array) -> np.ndarray:
    """Which points are near one another in space, but not in the chain."""
    order = np.arange(points.shape[-2])
    is_far = abs(order[:, None] - order[None]) > 2
    return np.asarray(between(points) < CONTACT) & is_far


# Pictures


def draw_curve(curve: Curve, path: pathlib.Path) -> None:
    """Draws the loss during training."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(curve.training) + 1)
    axes.plot(steps, curve.training, color="tab:blue", alpha=0.3, lw=1)
    around = [curve.training[max(0, i - 10) : i + 10] for i in steps]
    medians = list(map(np.median, around))
    axes.plot(steps, medians, color="tab:blue", lw=2.5, label="training")
    tested, losses = zip(*curve.held_out, strict=True)
    style: Any = {"color": "tab:orange", "mec": "black", "ms": 6, "clip_on": False}
    axes.plot(tested, losses, "o-", label=f"held out: {losses[-1]:.2f}", **style)
    axes.axhline(1, color="0.3", ls="--", label="a network that adds nothing")
    axes.set(title="Taking noise off chains of points", xlabel="training step")
    axes.set(ylabel="mean square error, weighted", xlim=(0, len(steps)), ylim=(0, 1.5))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def draw_chain(test: Batch, found: jax.Array, path: pathlib.Path) -> None:
    """Draws the first held-out chain, and what the model found."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1))
    points, model = test.points[0], found[0]
    maps = {
        "distances of a held-out chain": between(points),
        "as given": test.distances[0],
        "of the model's chain": between(model),
    }
    largest = max(float(jnp.max(distances)) for distances in maps.values())
    panels = left.subplots(1, 3)
    for axes, (name, distances) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(distances, cmap="viridis_r", vmin=0, vmax=largest)
        error = distance_error(distances[None], points[None])
        axes.set(title=f"{name}: off by {error:.2f}" if error else name)
        axes.set(xticks=[], yticks=[])
    left.colorbar(image, ax=panels, shrink=0.7, label="in steps of a chain")
    axes = right.add_subplot(projection="3d")
    for line, label, color in (
        (points, "the chain", "0.3"),
        (superposed(model, points), "the model's, turned to fit", "tab:orange"),
    ):
        axes.plot(*np.transpose(line), "o-", color=color, ms=4, label=label)
    axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
    axes.set_aspect("equal")
    right.legend(loc="upper center")
    figure.savefig(path, dpi=120)


def superposed(points: jax.Array, onto: jax.Array) -> jax.Array:
    """Points turned, and mirrored if need be, to lie on others, which are centred."""
    points = points - jnp.mean(points, axis=0, keepdims=True)
    left, _, right = jnp.linalg.svd(points.T @ onto)
    return points @ left @ right


def draw_attention(maps: np.ndarray, points: jax.Array, path: pathlib.Path) -> None:
    """Draws how much each head looks at contacts, and six heads on the first chain."""
    is_contact = contacts(points)
    maps = maps.reshape(len(maps), -1, *maps.shape[3:])  # [B, blocks, H, N, N]
    on_contacts = np.einsum("blhij,bij->lh", maps, is_contact)
    on_contacts /= len(maps) * maps.shape[-1]  # Of what all points attend to.
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    axes = left.subplots()
    for block, shares in enumerate(100 * on_contacts):
        axes.plot(np.full(len(shares), block + 1), shares, "o", color="tab:blue", ms=4)
    share = 100 * np.mean(is_contact)
    axes.axhline(share, color="0.3", ls="--", label=f"at random: {share:.1f} %")
    axes.set(xlabel="block", ylabel="attention on contacts (%), a point for each head")
    axes.set(
        ylim=(0, 110 * np.max(on_contacts)),
        title=f"{len(maps)} held-out chains with little noise",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    right.suptitle("Heads most on contacts (circles), the first of these chains")
    shown = np.linspace(0, len(on_contacts) - 1, 6).round().astype(int)
    for axes, block in zip(right.subplots(2, 3).flat, shown, strict=True):
        head = int(np.argmax(on_contacts[block]))
        axes.imshow(maps[0, block, head], cmap="Blues", vmin=0)
        axes.plot(*np.nonzero(is_contact[0].T), "o", mfc="none", mec="tab:red", ms=5)
        axes.set(title=f"block {block + 1}, head {head + 1}", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


# Command line


def writable(folder: str) -> pathlib.Path:
    """The folder, made if need be; exits with one line if it cannot be written to."""
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise SystemExit(f"Cannot write to --out={folder}: {error}") from None


HELP = {
    "super_blocks": "Number of super-blocks.",
    "blocks": "Blocks in each of them.",
    "points": "Points of a chain.",
    "width": "Features of a point in each block.",
    "pair_width": "Features of a pair of points.",
    "heads": "Attention heads, a divisor of the width.",
    "steps": "Training steps.",
    "batch_size": "Chains in a training step.",
    "learning_rate": "Highest rate of Adam.",
    "seed": "Of initial values, chains and noise.",
    "rounds": "How often each program is run to measure its time.",
}
LOWER_BOUNDS = {"points": 4, "seed": 0}
UPPER_BOUNDS = {"points": 256, "batch_size": 1024, "seed": 2**31 - 3}


def define_flags() -> None:
    """One flag for each field of `Config`, and `--out`."""
    for name, value in dataclasses.asdict(Config()).items():
        if isinstance(value, float):
            flags.DEFINE_float(name, value, HELP[name], lower_bound=0)
        else:
            bounds = LOWER_BOUNDS.get(name, 1), UPPER_BOUNDS.get(name)
            flags.DEFINE_integer(name, value, HELP[name], *bounds)
    flags.DEFINE_multi_enum(
        "way",
        list(WAYS),
        list(WAYS),
        "A way to compare with the first; may be given several times. All by default.",
    )
    flags.DEFINE_string("out", "out/pair_transformer", "Folder to write to.")
    flags.register_multi_flags_validator(
        ["width", "heads"],
        lambda given: given["width"] % given["heads"] == 0,
        "--heads must be a divisor of --width",
    )


def main(argv: Sequence[str]) -> None:
    """Trains, writes the pictures, and prints what the ways take."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    begin = time.perf_counter()
    given = flags.FLAGS.flag_values_dict()
    config = Config(**{f.name: given[f.name] for f in dataclasses.fields(Config)})
    out = writable(given["out"])
    test = random_batch(jax.random.key(config.seed + 1), config.points, NUM_TEST)
    params, curve = train(config, test)
    trained = time.perf_counter() - begin
    draw_curve(curve, out / "curves.png")

    run = jax.jit(functools.partial(from_noise, denoise(config, Way())))
    found = run(params, jax.random.key(config.seed), test.distances)
    draw_chain(test, found, out / "chain.png")
    maps = attention_maps(config, params, test)
    draw_attention(maps, test.points, out / "attention.png")
    errors = distance_errors(config, test, found)

    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], test)
    tables = (
        compare(config, given["way"], kind, params, batch)
        for kind in ("forward", "gradient")
    )
    print_table(*tables)
    print(f"Attention maps were collected as {list(maps.shape[1:])} for each chain.")
    print(f"Wrote curves.png, chain.png and attention.png to {out}")
    print(
        f"Errors of the distances of {NUM_TEST} held-out chains, in steps of a chain:"
    )
    for name, error in errors.items():
        print(f"    {name:34}{error:.2f}")
    print(
        f"Held-out loss {curve.held_out[-1][1]:.3f}, 1 without a network; trained in "
        f"{trained:.0f} s of {time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
