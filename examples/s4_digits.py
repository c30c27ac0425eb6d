"""Trains an S4 classifier on handwritten digits, each read pixel by pixel.

    python examples/s4_digits.py
    python examples/s4_digits.py --layer_stack=haiku
    python examples/s4_digits.py --framework=linen

The data are the 1,797 images of 8x8 pixels inside scikit-learn, so nothing is
downloaded; a fifth of them is held out. Six S4 layers run over the 64 pixels of an
image as a sequence. Each layer turns its parameters into a convolution kernel: setup,
which `hk_stack` computes for all layers before it loops over them. The same
model runs on `hk.layer_stack` and, written in Flax Linen, on `nn.scan`. Kernels of 64
steps are cheap, so all three take about as long here: a minute on two cores.

Writes to `out/s4_digits` (`--out`):

    curves.png    loss and accuracy during training, in training and held out
    digits.png    held-out digits with their predictions, the mistakes first
    params.npz    the trained parameters, under Haiku's names in either framework

Needs pip install 'hk_stack[examples]'; for Linen, 'hk_stack[examples,flax]'.
"""

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hk_stack
from hk_stack.compare import in_haiku

NUM_CLASSES = 10
NUM_TRAIN, NUM_TEST = 1437, 360
LAYER_STACKS = {"hk_stack": hk_stack.layer_stack, "haiku": hk.layer_stack}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, and how. The flags of the same names say what each field is."""

    framework: str = "haiku"
    layer_stack: str | None = None
    layers: int = 6
    width: int = 32
    state_size: int = 16
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-2
    dropout: float = 0.1
    seed: int = 0

    @property
    def title(self) -> str:
        """Framework and stack, for people to read."""
        if self.framework == "linen":
            return "Flax Linen, nn.scan"
        module = "hk" if self.layer_stack == "haiku" else "hk_stack"
        return f"Haiku, {module}.layer_stack"


class Model(NamedTuple):
    """A classifier of sequences `[B, T, features]` in either framework.

    Attributes:
      init: `(key, x) -> params`.
      logits: `(params, key, x, is_training) -> [B, NUM_CLASSES]`.
      to_haiku: Those parameters as Haiku names them: `{module: {name: array}}`.
    """

    init: Callable[..., Any]
    logits: Callable[..., jax.Array]
    to_haiku: Callable[[Any], Mapping[str, Mapping[str, jax.Array]]]


class Digits(NamedTuple):
    """Images as sequences `x` `[N, 64, 2]`, and their labels `y` `[N]`."""

    x: np.ndarray
    y: np.ndarray


class Epoch(NamedTuple):
    """How an epoch went. In training: the mean over its batches, dropout on."""

    loss: float
    accuracy: float
    test_loss: float
    test_accuracy: float


class Result(NamedTuple):
    """What training gives: the parameters, one row for each epoch, test predictions."""

    params: dict[str, np.ndarray]
    history: list[Epoch]
    predictions: np.ndarray
    seconds: float


# Data


def digits() -> tuple[Digits, Digits]:
    """The training and the held-out digits; the same split every time."""
    images, labels = load_digits(return_X_y=True)
    ink = (images / 16).astype(np.float32)  # [N, 64], row by row, in [0, 1]
    # With ink alone, the first layer norm would remove all shades: while the encoder's
    # bias is zero they only scale its output.
    x = np.stack([ink, 1 - ink], axis=-1)
    x, x_test, y, y_test = train_test_split(
        x, labels, test_size=NUM_TEST, stratify=labels, random_state=0
    )
    return Digits(x, y), Digits(x_test, y_test)


def batches(data: Digits, size: int, rng: np.random.Generator) -> Iterator[Digits]:
    """The whole batches of one epoch, in random order."""
    order = rng.permutation(len(data.y))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield Digits(data.x[chosen], data.y[chosen])


# Model


def haiku_model(config: Config) -> Model:
    """The classifier in Haiku, on the chosen stack."""

    def classify(x: jax.Array, is_training: bool) -> jax.Array:
        layers = functools.partial(
            in_haiku.s4_stack,
            layer_stack=LAYER_STACKS[config.layer_stack or "hk_stack"],
            num_layers=config.layers,
            state_size=config.state_size,
            dropout_rate=config.dropout,
            is_training=is_training,
        )
        return in_haiku.classifier(
            x, layers, width=config.width, num_classes=NUM_CLASSES
        )

    model = hk.transform(classify)
    return Model(
        init=lambda key, x: model.init(key, x, is_training=False),
        logits=model.apply,
        to_haiku=lambda params: params,
    )


def linen_model(config: Config) -> Model:
    """The same classifier in Flax Linen, on `nn.scan`."""
    from hk_stack.compare import in_linen  # Flax is not needed for Haiku.

    block = functools.partial(
        in_linen.S4Block, state_size=config.state_size, dropout_rate=config.dropout
    )
    layers = in_linen.ScanStack(block, config.layers)
    model = in_linen.Classifier(layers, config.width, NUM_CLASSES)

    def logits(
        variables: Any, key: jax.Array | None, x: jax.Array, is_training: bool
    ) -> jax.Array:
        rngs = {} if key is None else {"dropout": key}
        return model.apply(variables, x, is_training, rngs=rngs)

    def to_haiku(variables: Any) -> Any:
        x = jax.ShapeDtypeStruct((1, 64, 2), jnp.float32)
        like = jax.eval_shape(haiku_model(config).init, jax.random.key(0), x)
        return hk_stack.flax_to_haiku(variables, (like, {}))[0]

    return Model(model.init, logits, to_haiku)


MODELS = {"haiku": haiku_model, "linen": linen_model}


# Training


def loss_and_logits(
    model: Model, params: Any, key: jax.Array | None, data: Digits, is_training: bool
) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy, and the logits that it comes from."""
    logits = model.logits(params, key, data.x, is_training)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.y)
    return jnp.mean(losses), logits


def train_step(
    model: Model, optimiser: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, jax.Array, jax.Array]]:
    """`(params, optimiser state, key, batch) -> (params, state, loss, accuracy)`."""

    def step(params: Any, state: Any, key: jax.Array, batch: Digits) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            return loss_and_logits(model, params, key, batch, is_training=True)

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state, params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch.y)
        return optax.apply_updates(params, updates), state, value, accuracy

    return jax.jit(step, donate_argnums=(0, 1))


def adam(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam; its learning rate rises for a tenth of the time, then falls to zero."""
    steps = config.epochs * steps_per_epoch
    return optax.adam(
        optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, warmup_steps=steps // 10, decay_steps=steps
        )
    )


def train(config: Config, data: Digits, test: Digits) -> Result:
    """Trains a classifier with a progress bar, and tests it after every epoch."""
    start = time.perf_counter()
    model = MODELS[config.framework](config)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(init_key, data.x[:1])
    steps_per_epoch = len(data.y) // config.batch_size
    optimiser = adam(config, steps_per_epoch)
    state = optimiser.init(params)
    step = train_step(model, optimiser)
    evaluate = jax.jit(
        functools.partial(loss_and_logits, model, key=None, is_training=False)
    )

    rng = np.random.default_rng(config.seed)
    history: list[Epoch] = []
    with tqdm.tqdm(total=config.epochs * steps_per_epoch, unit="step") as bar:
        for epoch in range(config.epochs):
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}", refresh=False)
            rows = []
            for batch in batches(data, config.batch_size, rng):
                step_key = jax.random.fold_in(key, bar.n)
                params, state, loss, accuracy = step(params, state, step_key, batch)
                rows.append((float(loss), float(accuracy)))
                bar.set_postfix_str(progress(rows, history), refresh=False)
                bar.update()
            test_loss, logits = evaluate(params=params, data=test)
            predictions = np.argmax(logits, -1)
            test_accuracy = np.mean(predictions == test.y)
            means = np.mean(rows, axis=0)
            history.append(Epoch(*map(float, (*means, test_loss, test_accuracy))))
        bar.set_postfix_str(progress(rows, history))
    seconds = time.perf_counter() - start
    return Result(flat(model.to_haiku(params)), history, predictions, seconds)


def progress(rows: Sequence[tuple[float, float]], history: Sequence[Epoch]) -> str:
    """The state of training in one line: this epoch so far, and the last test."""
    loss, accuracy = np.mean(rows, axis=0)
    line = f"loss {loss:.3f}, accuracy {accuracy:.1%}"
    return line + (f", held out {history[-1].test_accuracy:.1%}" if history else "")


def flat(params: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, np.ndarray]:
    """Parameters as one dictionary: `layers/block/gate/w` -> array `[L, ...]`."""
    return {
        f"{module}/{name}": np.asarray(value)
        for module, values in params.items()
        for name, value in values.items()
    }


# Pictures


def draw_curves(result: Result, title: str, path: pathlib.Path) -> None:
    """Draws loss and accuracy, in training and held out, over the epochs."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(f"S4 on handwritten digits ({title})")
    loss, accuracy = figure.subplots(1, 2)
    epochs = range(1, len(result.history) + 1)
    columns = dict(zip(Epoch._fields, zip(*result.history, strict=True), strict=True))
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        scale = 100 if name == "accuracy" else 1
        train = np.multiply(scale, columns[name])
        test = np.multiply(scale, columns[f"test_{name}"])
        axes.plot(epochs, train, "o--", ms=4, label="training, with dropout")
        axes.plot(epochs, test, "s-", ms=4, label="held out")
        axes.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set(ylabel="cross entropy", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_locator(NullLocator())
    accuracy.set(ylabel="accuracy (%)", ylim=(0, 102))
    figure.savefig(path, dpi=120)


def draw_digits(test: Digits, predictions: np.ndarray, path: pathlib.Path) -> None:
    """Draws 32 held-out digits with their predictions: mistakes first, up to half."""
    wrong = np.flatnonzero(predictions != test.y)
    right = np.flatnonzero(predictions == test.y)
    first = wrong[: max(16, 32 - len(right))]
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(
        f"32 of {len(test.y)} held-out digits: first {len(first)} of the "
        f"{len(wrong)} mistakes (✗), then others"
    )
    shown = [*first, *right][:32]
    for axes, i in zip(figure.subplots(4, 8).flat, shown, strict=True):
        draw_digit(axes, test.x[i, :, 0].reshape(8, 8), predictions[i], test.y[i])
    figure.savefig(path, dpi=120)


def draw_digit(axes: Any, image: np.ndarray, predicted: int, true: int) -> None:
    """Draws one image, titled with its prediction."""
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.7")
    title = axes.set_title(f"predicted {predicted}\ntrue {true}", fontsize=10)
    if predicted != true:
        title.set(text=f"{title.get_text()}  ✗", color="firebrick", weight="bold")
        axes.spines[:].set(color="firebrick", linewidth=4)


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
    flags.DEFINE_enum(
        "layer_stack",
        default.layer_stack,
        list(LAYER_STACKS),
        "Whose layer_stack the Haiku model uses; hk_stack's if not given.",
    )
    flags.DEFINE_integer("layers", default.layers, "Number of layers.", lower_bound=1)
    flags.DEFINE_integer(
        "width", default.width, "Features in each layer.", lower_bound=1
    )
    flags.DEFINE_integer(
        "state_size", default.state_size, "States of each feature.", lower_bound=1
    )
    flags.DEFINE_integer(
        "epochs", default.epochs, "Passes over the training images.", lower_bound=1
    )
    flags.DEFINE_integer(
        "batch_size",
        default.batch_size,
        "Images in a training step.",
        lower_bound=1,
        upper_bound=NUM_TRAIN,
    )
    flags.DEFINE_float(
        "learning_rate", default.learning_rate, "Highest rate of Adam.", lower_bound=0
    )
    flags.DEFINE_float("dropout", default.dropout, "Share of values to drop.")
    flags.DEFINE_integer(
        "seed", default.seed, "Of initial values, order and dropout.", lower_bound=0
    )
    flags.DEFINE_string("out", "out/s4_digits", "Folder to write to.")
    flags.register_validator(
        "dropout", lambda rate: 0 <= rate < 1, "must be at least 0 and less than 1"
    )
    flags.register_multi_flags_validator(
        ["framework", "layer_stack"],
        lambda given: given["framework"] == "haiku" or given["layer_stack"] is None,
        "--layer_stack goes with --framework=haiku only: Linen stacks with nn.scan",
    )


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say, and writes the results."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    given = flags.FLAGS.flag_values_dict()
    config = Config(**{f.name: given[f.name] for f in dataclasses.fields(Config)})
    out = writable(given["out"])
    data, test = digits()
    result = train(config, data, test)
    draw_curves(result, config.title, out / "curves.png")
    draw_digits(test, result.predictions, out / "digits.png")
    np.savez(out / "params.npz", **result.params)
    print(f"Wrote curves.png, digits.png and params.npz to {out}")
    print(
        f"Held-out accuracy {result.history[-1].test_accuracy:.1%}, trained in "
        f"{result.seconds:.1f} s, compilation included ({config.title})"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
