"""What the examples share: the command line, training, curves, times."""

import argparse
import dataclasses
import functools
import logging
import math
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import median_filter

SMOOTHING = 10  # steps to each side, of which bold curves are the median


# Command line


def flag(
    text: str,
    *,
    default: Any = dataclasses.MISSING,
    least: float | None = None,
    below: float = math.inf,
    choices: Collection[str] | None = None,
) -> Any:
    """A field of a configuration that is a flag of the same name.

    Args:
      text: What `--help` says of it.
      default: What it is if nothing else is said.
      least: Of numbers; one for integers, zero for others, if not given.
      below: Of numbers: what they have to be less than.
      choices: What it may be, if not anything.
    """
    metadata = {"text": text, "least": least, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The flag of examples that write something."""

    out: str = flag("Folder to write to.")

    @property
    def folder(self) -> pathlib.Path:
        """Where to write to."""
        return pathlib.Path(self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Output):
    """What to train, and how: flags of all examples that train."""

    batch_size: int = flag("Examples in a training step.", default=32, below=1025)
    learning_rate: float = flag("Highest rate of Adam.", default=1e-2)
    seed: int = flag("Of all that is random.", default=0, least=0, below=2**31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """Flags of the transformers that read text."""

    layers: int = flag("Number of layers.", default=4)
    width: int = flag("Features in each layer.", default=64)
    heads: int = flag("Attention heads, a divisor of the width.", default=4)
    length: int = flag("Characters read at once.", default=64, least=2, below=513)
    dropout: float = flag("Share of values to drop.", default=0.05, below=1)

    def __post_init__(self) -> None:
        """Checks that the flags go together."""
        check_heads(self.width, self.heads)


def run(
    main: Callable[[Any], None], default: Any, argv: Sequence[str] | None = None
) -> None:
    """Runs an example as the command line asks, or exits with what is wrong with it.

    Args:
      main: Takes a configuration. The docstring of its module is the text of `--help`.
      default: A configuration, a dataclass of `flag`s. A ValueError from its
        `__post_init__` is a usage error.
      argv: The command line, `sys.argv` if not given.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules[main.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--FLAG=VALUE ...]",
        allow_abbrev=False,
    )
    for field in dataclasses.fields(default):
        add_flag(parser, field, getattr(default, field.name))
    try:
        config = type(default)(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))
    if isinstance(config, Output):
        make_writable(config.folder)
    for library in ("jax", "absl"):  # Of accelerators that are not there, for example.
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        main(config)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def add_flag(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], default: Any
) -> None:
    """Adds the flag of one field."""
    text, least, below, choices = field.metadata.values()
    text = text if default is None else f"{text} Default: {default}."
    options: dict[str, Any] = {"metavar": "FOLDER"}
    if field.type is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif choices:
        options = {"choices": choices}
    elif field.type in (int, float):
        least = int(field.type is int) if least is None else least
        kind = functools.partial(number, field.type, least, below)
        options = {"type": kind, "metavar": "N" if field.type is int else "X"}
    parser.add_argument(f"--{field.name}", default=default, help=text, **options)


def number(kind: type, least: float, below: float, text: str) -> Any:
    """A number within bounds."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if least <= value < below:
        return value
    bounds = f"at least {least}" + (
        f" and less than {below}" if below < math.inf else ""
    )
    name = {int: "an integer", float: "a number"}[kind]
    raise argparse.ArgumentTypeError(f"must be {name}, {bounds}, not {text!r}")


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError if a width cannot be shared out among attention heads."""
    if width % heads:
        raise ValueError("--heads must be a divisor of --width")


def make_writable(folder: pathlib.Path) -> None:
    """Makes the folder if need be; exits with one line if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SystemExit(f"Cannot write to --out={folder}: {error}") from None


# Training


class Losses(NamedTuple):
    """The loss of each step, and `(steps done, loss)` on what is held out."""

    training: list[float]
    held_out: list[tuple[int, float]]


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over all that is to be predicted, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def schedule(config: Config, steps: int) -> optax.Schedule:
    """A learning rate that rises for a tenth of the time, then falls to zero."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )


def update(
    loss: Callable[..., jax.Array], optimiser: optax.GradientTransformation
) -> Callable[..., tuple[Any, jax.Array]]:
    """`((params, state), *args) -> ((params, state), loss)`, one step of training."""

    def step(training: tuple[Any, Any], *args: Any) -> tuple[Any, jax.Array]:
        params, state = training
        value, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(step, donate_argnums=0)


def train(
    step: Callable[[Any, int], tuple[Any, Any]],
    state: Any,
    steps: range,
    held_out: Callable[[Any], Any] | None = None,
    every: int = 50,
    losses: Losses | None = None,
    save: Callable[[Any, Losses], None] = lambda state, losses: None,
    name: str | None = None,
) -> tuple[Any, Losses]:
    """Trains with a progress bar on a terminal, or else a line now and then.

    Args:
      step: `(state, number) -> (state, loss)`.
      state: Where training starts.
      steps: The numbers of its steps.
      held_out: `state -> loss`.
      every: After how many steps, and after the last, this is asked, or a line is due.
      losses: Of the steps before.
      save: Is given state and losses each time.
      name: What the bar is called.

    Returns:
      Where training ends, and its losses.

    Raises:
      SystemExit: If a loss is not finite.
    """
    losses, tested = losses or Losses([], []), ""
    bar = progress(steps, name, initial=steps.start, total=steps.stop, unit="step")
    for number in bar:
        state, loss = step(state, number)
        check(number + 1, float(loss))
        losses.training.append(float(loss))
        done = number + 1
        is_due = done % every == 0 or done == steps.stop
        if held_out and is_due:
            losses.held_out.append((done, float(held_out(state))))
            tested = f", held out {losses.held_out[-1][1]:.3f}"
            save(state, losses)
        now = f"loss {np.mean(losses.training[-20:]):.3f}{tested}"
        bar.set_postfix_str(now, refresh=False)
        if is_due:
            share = f"{done / steps.stop:.0%}, {done}/{steps.stop} steps"
            note(bar, f"{name}: {share}, {now}" if name else f"{share}, {now}")
    if losses.held_out:
        check(*losses.held_out[-1], "held-out loss")
    return state, losses


def progress(what: Iterable[Any], name: str | None, **options: Any) -> Any:
    """A bar on a terminal; elsewhere there is none, and `note` prints lines."""
    return tqdm.tqdm(what, name, disable=not sys.stderr.isatty(), **options)


def note(bar: Any, text: str) -> None:
    """A line where there is no bar to say it."""
    if bar.disable:
        print(text, file=sys.stderr, flush=True)


def check(step: int, loss: float, name: str = "loss") -> None:
    """Exits with a line if a loss is not finite: nothing can be learned any more."""
    if not math.isfinite(loss):
        why = f"the {name} is {loss}; a lower --learning_rate may help"
        raise SystemExit(f"Stopped in step {step}: {why}")


# Curves


def draw_losses(losses: Losses, path: pathlib.Path, **labels: Any) -> None:
    """Draws what a training was like; `labels` are those of `axes.set`."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    draw_smooth(axes, range(len(losses.training)), losses.training, "training")
    done, held_out = zip(*losses.held_out, strict=True)
    label = f"held out: {held_out[-1]:.2f} at the end"
    axes.plot(done, held_out, "o-", mec="black", ms=6, clip_on=False, label=label)
    finish(axes, xlim=(0, done[-1]), **labels)
    figure.savefig(path, dpi=120)


def draw_smooth(
    axes: Axes, steps: Sequence[int], losses: Sequence[float], label: str
) -> None:
    """Draws each of the losses pale, and a smooth curve bold."""
    window = min(2 * SMOOTHING + 1, len(losses) - 1 + len(losses) % 2)
    smooth = median_filter(np.asarray(losses), max(1, window))
    marker = "o" if len(losses) == 1 else None  # Of one loss there is no line to see.
    (bold,) = axes.plot(steps, smooth, marker=marker, lw=2.5, label=label)
    axes.plot(steps, losses, color=bold.get_color(), alpha=0.3, lw=1)


def finish(axes: Axes, **labels: Any) -> None:
    """What all curves over training steps have."""
    axes.set(xlabel="training step", **labels)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if labels.get("yscale") == "log":
        axes.yaxis.set_major_formatter("{x:g}")
        low, high = axes.get_ylim()
        # Over less than that, numbers are at minor ticks, too.
        axes.yaxis.set_minor_formatter("{x:.3g}" if high < 4 * low else "")
    axes.grid(alpha=0.3)
    axes.legend()


# Measurement


class Built(NamedTuple):
    """A compiled program.

    Attributes:
      run: The program, with its arguments.
      seconds: Of the processor, to trace and compile it.
      memory: Bytes that it takes beside arguments and results.
    """

    run: Callable[[], Any]
    seconds: float
    memory: int


def build(function: Callable[..., Any], *args: Any) -> Built:
    """Traces and compiles a function for some arguments."""
    start = time.process_time()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.process_time() - start
    memory: Any = compiled.memory_analysis()
    run = functools.partial(compiled, *args)
    return Built(run, seconds, memory.temp_size_in_bytes)


def run_times(programs: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Seconds `[P, R]` of each program in each round; they take turns."""
    seconds = np.zeros([len(programs), rounds])
    for turn in range(rounds):
        for i, program in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[i, turn] = time.perf_counter() - start
    return seconds


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two trees, relative to their largest number."""
    gaps = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), found, expected)
    sizes = jax.tree.map(lambda x: np.max(np.abs(x)), expected)
    gap, size = (float(np.max(jax.tree.leaves(tree))) for tree in (gaps, sizes))
    return gap / size if size else gap  # Where all is zero, nothing is relative to it.
