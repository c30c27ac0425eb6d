"""Trains S4 by convolution to write digits, then writes them pixel by pixel.

    python examples/s4_generate.py
    python examples/s4_generate.py --temperature=0.5
    python examples/s4_generate.py --framework=linen

The data are the 1,797 images of 8x8 pixels inside scikit-learn, so nothing is
downloaded; a fifth of them is held out. The model gives the probabilities of each
pixel's 17 shades from the pixels before it, row by row. In training all 64 pixels of
an image are known, and each S4 layer is a convolution. To write an image, the layers
run as recurrences on the same parameters, one pixel at a time.

A recurrence has a setup: matrices that depend on the parameters alone.
`hk_stack.partition` cuts one step of time into setup and call, so that setup runs once,
and only the call for each pixel. In Flax Linen one may write that cut by hand, as a
variable collection that is filled once and read at each step, or cut the step likewise.

At the end the speed of each way is printed, for two kinds of loop over time. Where all
of it is one compiled program, XLA moves setup out of the loop too, if the layers' loop
does not hide it. Where each pixel is a program of its own, as in an app that shows
pixels as they come, setup runs for each of them unless it was cut off.

Writes to `out/s4_generate` (`--out`):

    completions.png    held-out digits, the half that was given, several completions

Needs pip install 'hk_stack[examples]'; for Linen, 'hk_stack[examples,flax]'.
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hk_stack
from hk_stack.compare import in_haiku

SIDE = 8
LENGTH = SIDE * SIDE  # pixels of an image, the steps of time
GIVEN = LENGTH // 2  # how many of them a completion starts from
NUM_SHADES = 17
START, UNKNOWN = NUM_SHADES, -1  # what stands for no pixel, as input and as given
NUM_TRAIN, NUM_TEST = 1437, 360
REPEATS = 5  # of each timing


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, and how. The flags of the same names say what each field is."""

    framework: str = "haiku"
    layers: int = 4
    width: int = 64
    state_size: int = 16
    epochs: int = 24
    batch_size: int = 32
    learning_rate: float = 1e-2
    dropout: float = 0.25
    temperature: float = 0.8
    completions: int = 6
    seed: int = 0


class Model(NamedTuple):
    """A model of the next pixel, by convolution, in either framework.

    Attributes:
      init: `(key, tokens) -> params`.
      logits: `(params, key, tokens [B, T], is_training) -> [B, T, NUM_SHADES]`.
    """

    init: Callable[..., Any]
    logits: Callable[..., jax.Array]


class Decoder(NamedTuple):
    """The same model by recurrence, one step of time per call.

    Attributes:
      setup: `params -> derived`: what is computed once.
      step: `(derived, tokens [B], states) -> (logits [B, NUM_SHADES], states)`.
      states: The states before the first step.
      report: What setup is, for people to read.
    """

    setup: Callable[[Any], Any]
    step: Callable[..., tuple[jax.Array, Any]]
    states: Any
    report: str = ""


# Data


class Data(NamedTuple):
    """Images as rows of shades `[N, 64]`, and which digits they show `[N]`."""

    pixels: np.ndarray
    labels: np.ndarray


def digits() -> tuple[Data, Data]:
    """The training and the held-out digits; the same split every time."""
    images, labels = load_digits(return_X_y=True)
    pixels, pixels_test, labels, labels_test = train_test_split(
        images.astype(np.int32),
        labels,
        test_size=NUM_TEST,
        stratify=labels,
        random_state=0,
    )
    return Data(pixels, labels), Data(pixels_test, labels_test)


def bits_without_model(data: Data, test: Data) -> float:
    """Bits per held-out pixel for who knows only how frequent each shade is."""
    counts = np.bincount(data.pixels.ravel(), minlength=NUM_SHADES)
    return float(-np.mean(np.log2(counts / counts.sum())[test.pixels]))


# Models


def haiku_model(config: Config) -> Model:
    """The model in Haiku, on `hk_stack.layer_stack`."""

    def logits(tokens: jax.Array, is_training: bool) -> jax.Array:
        layers = functools.partial(
            in_haiku.s4_stack,
            layer_stack=hk_stack.layer_stack,
            num_layers=config.layers,
            state_size=config.state_size,
            dropout_rate=config.dropout,
            is_training=is_training,
        )
        return in_haiku.next_token(
            tokens, layers, width=config.width, num_tokens=NUM_SHADES
        )

    model = hk.transform(logits)
    return Model(lambda key, tokens: model.init(key, tokens, False), model.apply)


def haiku_decoders(config: Config, params: Any, batch_size: int) -> dict[str, Decoder]:
    """One step in Haiku, cut into setup and call, or whole on either stack."""

    def step(layer_stack: Any) -> Callable[..., tuple[jax.Array, Any]]:
        layers = functools.partial(
            in_haiku.s4_stack_step,
            layer_stack=layer_stack,
            num_layers=config.layers,
            state_size=config.state_size,
            length=LENGTH,
        )
        model = functools.partial(
            in_haiku.next_token_step,
            layers=layers,
            width=config.width,
            num_tokens=NUM_SHADES,
        )
        return hk.without_apply_rng(hk.transform(model)).apply

    states = in_haiku.s4_states(
        config.layers, batch_size, config.width, config.state_size
    )
    tokens = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    whole = step(hk_stack.layer_stack)
    split = hk_stack.partition(whole, params, tokens, states)
    return {
        "hk_stack.partition": Decoder(split.setup, split.call, states, str(split)),
        "hk_stack.layer_stack alone": Decoder(unchanged, whole, states),
        "hk.layer_stack": Decoder(unchanged, step(hk.layer_stack), states),
    }


def unchanged(params: Any) -> Any:
    """The setup of a step that is not cut."""
    return params


def linen_model(config: Config) -> Model:
    """The same model in Flax Linen, on `nn.scan`."""
    model = linen_module(config)

    def logits(
        variables: Any, key: jax.Array | None, tokens: jax.Array, is_training: bool
    ) -> jax.Array:
        rngs = {} if key is None else {"dropout": key}
        return model.apply(variables, tokens, is_training, rngs=rngs)

    return Model(model.init, logits)


def linen_decoders(
    config: Config, variables: Any, batch_size: int
) -> dict[str, Decoder]:
    """One step in Flax Linen: setup kept as variables, cut off, or in every step."""
    from hk_stack.compare import in_linen

    step = linen_module(config, mode="step", length=LENGTH)
    primed_step = linen_module(config, mode="primed step", length=LENGTH)
    tokens = jnp.zeros((batch_size, 1), jnp.int32)

    def setup(variables: Any) -> Any:
        primed = in_linen.prime(primed_step, variables["params"], tokens)
        return {**variables, "prime": primed["prime"]}

    cache = in_linen.prime(step, variables["params"], tokens)
    primed = functools.partial(linen_step, primed_step)
    whole = functools.partial(linen_step, step)
    split = hk_stack.partition(whole, variables, tokens[:, 0], cache)
    return {
        'collection "prime"': Decoder(setup, primed, cache),
        "hk_stack.partition": Decoder(split.setup, split.call, cache, str(split)),
        "setup in every step": Decoder(unchanged, whole, cache),
    }


def linen_module(config: Config, **decoding: Any) -> Any:
    """The Linen module; `decoding` are the fields of its blocks that make it decode."""
    from hk_stack.compare import in_linen  # Flax is not needed for Haiku.

    block = functools.partial(
        in_linen.S4Block,
        state_size=config.state_size,
        dropout_rate=config.dropout,
        **decoding,
    )
    layers = in_linen.ScanStack(block, config.layers)
    return in_linen.NextToken(layers, config.width, NUM_SHADES)


def linen_step(
    module: Any, variables: Any, tokens: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
    """One step of a module that decodes, as a pure function."""
    variables = {**variables, **cache}
    logits, cache = module.apply(variables, tokens[:, None], mutable=["cache"])
    return logits[:, 0], cache


MODELS = {"haiku": haiku_model, "linen": linen_model}
DECODERS = {"haiku": haiku_decoders, "linen": linen_decoders}


# Training


def bits_per_pixel(
    model: Model, params: Any, key: jax.Array | None, pixels: jax.Array, training: bool
) -> jax.Array:
    """Mean cross entropy of all pixels `[B, 64]`, each given those before it."""
    before = jnp.pad(pixels[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    logits = model.logits(params, key, before, training)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, pixels)
    return jnp.mean(losses) / np.log(2)


def train_step(
    model: Model, optimiser: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """`(params, optimiser state, key, pixels) -> (params, state, bits per pixel)`."""

    def step(params: Any, state: Any, key: jax.Array, pixels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return bits_per_pixel(model, params, key, pixels, training=True)

        bits, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, bits

    return jax.jit(step, donate_argnums=(0, 1))


def train(config: Config, data: Data, test: Data) -> tuple[Any, float]:
    """Trains with a progress bar; returns parameters and held-out bits per pixel."""
    model = MODELS[config.framework](config)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key, data.pixels[:1])
    steps_per_epoch = len(data.pixels) // config.batch_size
    steps = config.epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )
    optimiser = optax.adam(schedule)
    state = optimiser.init(params)
    step = train_step(model, optimiser)
    evaluate = jax.jit(
        functools.partial(bits_per_pixel, model, key=None, training=False)
    )
    rng = np.random.default_rng(config.seed)
    held_out = np.nan  # Not known before the first epoch ends.
    with tqdm.tqdm(total=steps, unit="step") as bar:
        for epoch in range(config.epochs):
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}", refresh=False)
            order = rng.permutation(len(data.pixels))
            size = steps_per_epoch * config.batch_size
            for chosen in order[:size].reshape(steps_per_epoch, -1):
                step_key = jax.random.fold_in(key, bar.n)
                params, state, bits = step(params, state, step_key, data.pixels[chosen])
                line = f"bits per pixel {float(bits):.3f}, held out {held_out:.3f}"
                bar.set_postfix_str(line, refresh=False)
                bar.update()
            held_out = float(evaluate(params=params, pixels=test.pixels))
    return params, held_out


# Generation


def next_pixel(
    step: Callable[..., tuple[jax.Array, Any]],
    temperature: float,
    derived: Any,
    carry: tuple[jax.Array, Any],
    now: tuple[jax.Array, jax.Array],
) -> tuple[tuple[jax.Array, Any], jax.Array]:
    """One step of time for `B` images.

    Args:
      step: That of a `Decoder`.
      temperature: Below 1, likely shades are drawn more often than they should be.
      derived: What the decoder's setup made.
      carry: The pixels before `[B]`, and the decoder's states.
      now: Given shades `[B]`, `UNKNOWN` where one is to be drawn, and a random key.

    Returns:
      The next carry, and the shades `[B]`.
    """
    given, key = now
    logits, states = step(derived, *carry)
    drawn = jax.random.categorical(key, logits / temperature)
    shades = jnp.where(given == UNKNOWN, drawn, given)
    return (shades, states), shades


def in_one_program(pixel: Callable[..., Any]) -> Callable[..., jax.Array]:
    """`(derived, carry, given [T, B], keys [T]) -> shades [T, B]`, all compiled."""
    return jax.jit(
        lambda derived, carry, given, keys: jax.lax.scan(
            functools.partial(pixel, derived), carry, (given, keys)
        )[1]
    )


def one_by_one(pixel: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """As `in_one_program`, but each pixel is a call of a compiled program."""
    pixel = jax.jit(pixel)

    def run(derived: Any, carry: Any, given: jax.Array, keys: jax.Array) -> Any:
        rows = []
        for now in zip(given, keys, strict=True):
            carry, shades = pixel(derived, carry, now)
            rows.append(shades)
        return rows

    return run


class Completions(NamedTuple):
    """Images completed in one of the ways, and what that took.

    Attributes:
      pixels: Shades `[N, completions, 64]`.
      setup: Seconds of the setup.
      in_one_program: Seconds of the loop over time as one program.
      one_by_one: Seconds of the loop with one program for each pixel.
    """

    pixels: np.ndarray
    setup: float
    in_one_program: float
    one_by_one: float


def complete(
    config: Config, decoder: Decoder, params: Any, pixels: np.ndarray
) -> Completions:
    """Completes each of `pixels` `[N, 64]` several times, from its first half."""
    given = jnp.repeat(pixels, config.completions, axis=0).T.at[GIVEN:].set(UNKNOWN)
    keys = jax.random.split(jax.random.key(config.seed), LENGTH)
    carry = jnp.full(given.shape[1], START), decoder.states
    pixel = functools.partial(next_pixel, decoder.step, config.temperature)
    derived, setup = timed(jax.jit(decoder.setup), params)
    shades, together = timed(in_one_program(pixel), derived, carry, given, keys)
    _, apart = timed(one_by_one(pixel), derived, carry, given, keys)
    completed = np.asarray(shades).T.reshape(len(pixels), config.completions, LENGTH)
    return Completions(completed, setup, together, apart)


def timed(f: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What `f` returns, and the median time in seconds of calls after the first."""
    result = jax.block_until_ready(f(*args))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        seconds.append(time.perf_counter() - start)
    return result, float(np.median(seconds))


def print_speeds(ways: Mapping[str, Completions]) -> None:
    """Prints pixels per second of each way as a table."""
    print(
        f"{'pixels per second':28}{'in one program':>16}{'one by one':>16}{'setup':>12}"
    )
    for name, done in ways.items():
        count = done.pixels.size
        print(
            f"{name:28}{count / done.in_one_program:16,.0f}"
            f"{count / done.one_by_one:16,.0f}{1e3 * done.setup:9.1f} ms"
        )


# Pictures


def draw(originals: np.ndarray, completions: np.ndarray, path: pathlib.Path) -> None:
    """Draws originals `[N, 64]`, their given halves and completions, row by row."""
    count = completions.shape[1]
    titles = ["original", "given half", *(f"completion {i + 1}" for i in range(count))]
    figure = Figure((1.15 * len(titles), 1.15 * len(originals) + 0.8), dpi=120)
    figure.set_layout_engine("constrained", h_pad=0.03, w_pad=0.03)
    figure.suptitle("Held-out digits, completed pixel by pixel below the line")
    grid = figure.subplots(len(originals), len(titles), squeeze=False)
    for row, original, completed in zip(grid, originals, completions, strict=True):
        known = np.where(np.arange(LENGTH) < GIVEN, original, np.nan)
        for axes, image in zip(row, [original, known, *completed], strict=True):
            draw_image(axes, image)
        for axes in row[1:]:
            axes.axhline(GIVEN / SIDE - 0.5, color="tab:red", linewidth=2)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    figure.savefig(path)


def draw_image(axes: Any, shades: np.ndarray) -> None:
    """Draws one image `[64]`; pixels that are not numbers stay hatched."""
    axes.set_facecolor("0.9")
    axes.imshow(shades.reshape(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=NUM_SHADES - 1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.7")


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


def define_flags() -> None:
    """One flag for each field of `Config`, and `--out`."""
    default = Config()
    flags.DEFINE_enum("framework", default.framework, list(MODELS), "Which one to use.")
    for name, text, limits in (
        ("layers", "Number of layers.", {}),
        ("width", "Features in each layer.", {}),
        ("state_size", "States of each feature.", {}),
        ("epochs", "Passes over the training images.", {}),
        ("batch_size", "Images in a training step.", {"upper_bound": NUM_TRAIN}),
        ("completions", "Of each held-out image shown.", {"upper_bound": 20}),
    ):
        value = getattr(default, name)
        flags.DEFINE_integer(name, value, text, lower_bound=1, **limits)
    flags.DEFINE_float(
        "learning_rate", default.learning_rate, "Highest rate of Adam.", lower_bound=0
    )
    flags.DEFINE_float("dropout", default.dropout, "Share of values to drop.")
    flags.DEFINE_float(
        "temperature", default.temperature, "Below 1: draw likely shades more often."
    )
    flags.DEFINE_integer(
        "seed", default.seed, "Of initial values, order, dropout, draws.", lower_bound=0
    )
    flags.DEFINE_string("out", "out/s4_generate", "Folder to write to.")
    flags.register_validator(
        "dropout", lambda rate: 0 <= rate < 1, "must be at least 0 and less than 1"
    )
    flags.register_validator(
        "temperature", lambda value: value > 0, "must be greater than 0"
    )


def main(argv: Sequence[str]) -> None:
    """Trains and generates as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    given = flags.FLAGS.flag_values_dict()
    config = Config(**{f.name: given[f.name] for f in dataclasses.fields(Config)})
    out = writable(given["out"])
    data, test = digits()
    params, bits = train(config, data, test)
    shown = test.pixels[np.unique(test.labels, return_index=True)[1]]  # one per digit
    batch_size = len(shown) * config.completions
    decoders = DECODERS[config.framework](config, params, batch_size)
    ways = {
        name: complete(config, decoder, params, shown)
        for name, decoder in decoders.items()
    }
    chosen = next(iter(ways))
    draw(shown, ways[chosen].pixels, out / "completions.png")
    print(decoders["hk_stack.partition"].report, end="\n\n")
    print_speeds(ways)
    print(f"\nWrote completions.png to {out}")
    print(
        f"Held-out bits per pixel {bits:.3f}; {bits_without_model(data, test):.3f} "
        "for who knows only how frequent each shade is"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
