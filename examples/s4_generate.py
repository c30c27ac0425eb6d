"""Trains S4 by convolution to write digits, then writes them pixel by pixel.

    python examples/s4_generate.py
    python examples/s4_generate.py --temperature=0.5

The data are the 1,797 images of 8x8 pixels inside scikit-learn, so nothing is
downloaded; a fifth of them is held out. The model gives the probabilities of each
pixel's 17 shades from the pixels before it, row by row. In training all 64 pixels of
an image are known, and each S4 layer is a convolution. To write an image, the layers
run as recurrences on the same parameters, one pixel at a time.

A recurrence has a setup: matrices that depend on the parameters alone.
`hk_stack.partition` cuts one step of time into setup and call, so that setup runs once,
and only the call for each pixel.

At the end the speed of each way is printed, for two kinds of loop over time. Where all
of it is one compiled program, XLA moves setup out of the loop too, if the layers' loop
does not hide it. Where each pixel is a program of its own, as in an app that shows
pixels as they come, setup runs for each of them unless it was cut off.

Writes to `out/s4_generate` (`--out`):

    completions.png    held-out digits, the half that was given, several completions

Needs pip install 'hk_stack[examples]'.
"""

import dataclasses
import functools
import textwrap
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import example_data
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import s4_model
from common import flag
from example_data import Batch
from matplotlib.figure import Figure

import hk_stack
from hk_stack.compare import in_haiku, models

SIDE = 8
LENGTH = SIDE * SIDE  # pixels of an image, the steps of time
GIVEN = LENGTH // 2  # how many of them a completion starts from
NUM_SHADES = 17
START, UNKNOWN = NUM_SHADES, -1  # what stands for no pixel, as input and as given
REPEATS = 5  # of each timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(s4_model.Config):
    """What to train, and how to write."""

    epochs: int = flag("Passes over the training images.", default=24)
    temperature: float = flag(
        "Below 1: draw likely shades more often.", default=0.8, least=0.01
    )
    completions: int = flag("Of each held-out image shown.", default=6, below=21)


DEFAULT = Config(dropout=0.25, out="out/s4_generate")


def next_pixels(data: Batch) -> Batch:
    """Each pixel is to be predicted from those before it."""
    before = np.pad(data.x[:, :-1], ((0, 0), (1, 0)), constant_values=START)
    return Batch(before, data.x)


def bits_without_model(pixels: np.ndarray, test: np.ndarray) -> float:
    """Bits per held-out pixel for who knows only how frequent each shade is."""
    counts = np.bincount(pixels.ravel(), minlength=NUM_SHADES)
    return float(-np.mean(np.log2(counts / counts.sum())[test]))


# The model by convolution, and by recurrence


class Decoder(NamedTuple):
    """The model by recurrence, one step of time for each call.

    Attributes:
      setup: `params -> derived`: what is computed once.
      step: `(derived, tokens [B], states) -> (logits [B, NUM_SHADES], states)`.
      states: The states before the first step.
    """

    setup: Callable[[Any], Any]
    step: Callable[..., tuple[jax.Array, Any]]
    states: Any


def model_of(config: Config) -> s4_model.Model:
    """The model by convolution."""

    def model(tokens: jax.Array, is_training: bool) -> jax.Array:
        layers = s4_model.haiku_layers(config, is_training)
        return s4_model.haiku_ends(tokens, layers, config, NUM_SHADES)

    return s4_model.of_haiku(model)


def step_of(config: Config, layer_stack: Any) -> Callable[..., tuple[jax.Array, Any]]:
    """One step of the recurrence, `(params, tokens, states) -> (logits, states)`."""
    layers = functools.partial(
        in_haiku.layers,
        model=models.s4_model(config.state_size),
        layer_stack=layer_stack,
        num_layers=config.layers,
        length=LENGTH,
    )

    def step(tokens: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = s4_model.features(tokens, NUM_SHADES)
        h, states = layers(s4_model.linear(config.width, "encoder")(x), states)
        return s4_model.linear(NUM_SHADES, "decoder")(h), states

    return hk.without_apply_rng(hk.transform(step)).apply


def decoders_of(config: Config, params: Any, size: int) -> dict[str, Decoder]:
    """A step cut into setup and call, or whole on either stack."""
    tokens = jax.ShapeDtypeStruct([size], jnp.int32)
    sizes = config.layers, size, config.width, config.state_size
    states = jnp.zeros(sizes, jnp.complex64)
    step = step_of(config, hk_stack.layer_stack)
    split = hk_stack.partition(step, params, tokens, states)
    print(split, end="\n\n")

    def unchanged(params: Any) -> Any:
        return params

    return {
        "hk_stack.partition": Decoder(split.setup, split.call, states),
        "hk_stack.layer_stack alone": Decoder(unchanged, step, states),
        "hk.layer_stack": Decoder(unchanged, step_of(config, hk.layer_stack), states),
    }


# Generation


def pixel_of(decoder: Decoder, temperature: float) -> Callable[..., Any]:
    """One step of time for `B` images.

    Below a temperature of 1, likely shades are drawn more often than they should be.

    Returns:
      `(derived, (pixels before [B], states), (given [B], key)) -> (the next such pair,
      pixels [B])`; given pixels that are `UNKNOWN` are drawn.
    """

    def pixel(derived: Any, carry: Any, now: Any) -> Any:
        (before, states), (given, key) = carry, now
        logits, states = decoder.step(derived, before, states)
        drawn = jax.random.categorical(key, logits / temperature)
        pixels = jnp.where(given == UNKNOWN, drawn, given)
        return (pixels, states), pixels

    return pixel


def in_one_program(pixel: Callable[..., Any]) -> Callable[..., jax.Array]:
    """`(derived, carry, given [T, B], keys [T]) -> pixels [T, B]`, all compiled."""
    return jax.jit(
        lambda derived, carry, given, keys: jax.lax.scan(
            functools.partial(pixel, derived), carry, (given, keys)
        )[1]
    )


def one_by_one(pixel: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
    """As `in_one_program`, but a program for one pixel is run for each."""
    pixel = jax.jit(pixel)

    def run(derived: Any, carry: Any, given: jax.Array, keys: jax.Array) -> Any:
        rows = []
        for now in zip(given, keys, strict=True):
            carry, pixels = pixel(derived, carry, now)
            rows.append(pixels)
        return rows

    return run


def complete(
    config: Config, decoder: Decoder, params: Any, pixels: np.ndarray
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Completes each of `pixels` `[N, 64]` several times, from its first half.

    Returns:
      Shades `[N, completions, 64]`, and pixels per second of the loop as one program
      and as one for each pixel, and seconds of the setup.
    """
    given = jnp.repeat(pixels, config.completions, axis=0).T.at[GIVEN:].set(UNKNOWN)
    keys = jax.random.split(jax.random.key(config.seed), LENGTH)
    carry = jnp.full(given.shape[1], START), decoder.states
    pixel = pixel_of(decoder, config.temperature)
    derived, setup = timed(jax.jit(decoder.setup), params)
    drawn, together = timed(in_one_program(pixel), derived, carry, given, keys)
    _, apart = timed(one_by_one(pixel), derived, carry, given, keys)
    completed = np.asarray(drawn).T.reshape(len(pixels), config.completions, LENGTH)
    return completed, (given.size / together, given.size / apart, setup)


def timed(f: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What `f` returns, and the median time in seconds of runs after the first."""
    result = jax.block_until_ready(f(*args))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        seconds.append(time.perf_counter() - start)
    return result, float(np.median(seconds))


def draw(originals: np.ndarray, completions: np.ndarray) -> Figure:
    """Draws originals `[N, 64]`, their given halves and completions, row by row."""
    count = completions.shape[1]
    titles = ["original", "given half", *(f"completion {i + 1}" for i in range(count))]
    figure = Figure((1.15 * len(titles), 1.15 * len(originals) + 0.8), dpi=120)
    figure.set_layout_engine("constrained", h_pad=0.03, w_pad=0.03)
    title = "Held-out digits, completed pixel by pixel below the line"
    figure.suptitle(textwrap.fill(title, 8 * len(titles)), fontsize=11)
    grid = figure.subplots(len(originals), len(titles), squeeze=False)
    given = np.where(np.arange(LENGTH) < GIVEN, originals, np.nan)
    images = np.stack([originals, given, *np.swapaxes(completions, 0, 1)], axis=1)
    for axes, image in zip(grid.flat, images.reshape(-1, SIDE, SIDE), strict=True):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=NUM_SHADES - 1)
        axes.set(xticks=[], yticks=[], facecolor="0.9")
    for axes in grid[:, 1:].flat:
        axes.axhline(GIVEN / SIDE - 0.5, color="tab:red", linewidth=2)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def main(config: Config) -> None:
    """Trains and generates as the flags say."""
    digits, held_out = example_data.digits()
    data, test = next_pixels(digits), next_pixels(held_out)
    model = model_of(config)
    params, losses = s4_model.train(model, config, config.epochs, data, test)
    _, one_of_each = np.unique(held_out.y, return_index=True)
    shown = held_out.x[one_of_each]
    decoders = decoders_of(config, params, len(shown) * config.completions)
    titles = f"{'in one program':>16}{'one by one':>16}{'setup':>12}"
    print(f"{'pixels per second':28}{titles}")
    for name, decoder in decoders.items():
        completed, (together, apart, setup) = complete(config, decoder, params, shown)
        print(f"{name:28}{together:16,.0f}{apart:16,.0f}{1e3 * setup:9.1f} ms")
    draw(shown, completed).savefig(config.folder / "completions.png")
    print(f"\nWrote completions.png to {config.out}")
    print(
        f"Held-out bits per pixel {losses.held_out[-1][1] / np.log(2):.3f}; "
        f"{bits_without_model(data.y, test.y):.3f} for who knows only how frequent "
        "each shade is"
    )


if __name__ == "__main__":
    common.run(main, DEFAULT)
