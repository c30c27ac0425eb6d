"""Trains a deep transformer on text, in half precision, and survives being killed.

    python examples/transformer_lm.py
    python examples/transformer_lm.py --remat=sqrt --layers=48 --out=out/deeper
    python examples/transformer_lm.py --check_finite --learning_rate=1e30 --out=out/bad

A language model of characters, 24 pre-norm blocks on `hk_stack.layer_stack`, reads the
manual that comes with Python (`pydoc_data.topics`), of which a tenth is held out:

- Parameters are float32. Layers compute in bfloat16, and pass it on to the next
  (`jmp` policies, `carry_dtype`); norms, logits and loss are float32.
- Gradients compute layers again instead of keeping all that they computed (`--remat`).
- Later layers drop more (`hk_stack.layer_index`), and weight decay leaves out biases
  and norms, which in a stack look like matrices.
- `--check_finite` says in which layer the first infinity or NaN came up.

Stop it or kill it at any time: the same command goes on from the last checkpoint, and
every loss is what it would have been. All that a step draws at random depends on its
number, and the log is cut back to the checkpoint. A checkpoint of other `--layers`,
`--width`, `--heads` or `--length` is refused; whatever else is changed, `--loop` or
`--remat` for instance, holds from there on.

Two to three minutes on two cores. Writes to `out/transformer_lm` (`--out`):

    checkpoint.safetensors    parameters, optimiser and step, every --save_every steps
    curves.png                the loss during training, in training and held out
    losses.csv                the same as numbers, a row for each step

Needs pip install 'hk_stack[checkpoint,examples]'.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any, NamedTuple, TextIO

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import tqdm
from absl import app, flags
from jax.experimental import checkify
from matplotlib.figure import Figure

import hk_stack
from hk_stack import checkpoint

NUM_CHARACTERS = 128  # ASCII; others are read as question marks
NUM_TEST = 128  # held-out sequences
NUM_WRITTEN = 400  # characters of the sample at the end
TEMPERATURE = 0.7  # of the sample; below 1, likely characters are drawn more often
SMOOTHING = 10  # steps to each side, of which the bold curve is the median
REMAT: Mapping[str, dict[str, Any]] = {
    "none": {},
    "all": {"remat": True},
    "dots": {"remat": jax.checkpoint_policies.dots_with_no_batch_dims_saveable},
    "sqrt": {"remat": True, "remat_every": "sqrt"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, and how. The flags of the same names say what each field is."""

    layers: int = 24
    width: int = 64
    heads: int = 4
    length: int = 64
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    dropout: float = 0.05
    seed: int = 0
    save_every: int = 50
    remat: str = "all"
    loop: str = "scan"
    check_finite: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """What a checkpoint has to agree with, by flag."""
        names = "layers", "width", "heads", "length"
        return {f"--{name}": getattr(self, name) for name in names}


class Training(NamedTuple):
    """All that training goes on from: the same steps from here have the same losses.

    Attributes:
      params: Of the model, float32.
      optimiser: State of the optimiser.
      step: How many steps were done.
    """

    params: hk.Params
    optimiser: optax.OptState
    step: jax.Array


class Row(NamedTuple):
    """What the log says of a step; the losses are in nats.

    Attributes:
      step: How many steps were done.
      loss: Of the step's batch, before it.
      gradient_norm: Of the same.
      held_out_loss: After it, if the step is followed by a checkpoint.
    """

    step: int
    loss: float
    gradient_norm: float
    held_out_loss: float | None = None


class Files(NamedTuple):
    """Where things are written."""

    checkpoint: pathlib.Path
    curves: pathlib.Path
    log: pathlib.Path


# Data


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """Python's manual as characters `[N]`, to train on and held out."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    # Topics share paragraphs: without this, the held-out ones would be in training too.
    paragraphs = list(dict.fromkeys(paragraphs))
    held_out = paragraphs[::10]
    del paragraphs[::10]
    return characters(paragraphs), characters(held_out)


def characters(paragraphs: Iterable[str]) -> np.ndarray:
    """Integers below `NUM_CHARACTERS`."""
    ascii_text = "\n\n".join(paragraphs).encode("ascii", "replace")
    return np.frombuffer(ascii_text, np.uint8).astype(np.int32)


def readable(tokens: np.ndarray) -> str:
    """The inverse of `characters`; whatever cannot be printed is a question mark."""
    each = map(chr, tokens)
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in each)


def sequences(data: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """Sequences `[B, length + 1]` of the data."""
    return data[starts[:, None] + jnp.arange(length + 1)[None]]


# Model


class Head(hk.Linear):
    """A linear layer, in a class of its own for the sake of its precision."""


HALF = jmp.get_policy("params=float32,compute=bfloat16,output=bfloat16")
PRECISIONS = {
    hk.Embed: HALF,
    hk.Linear: HALF,
    hk.LayerNorm: jmp.get_policy("params=float32,compute=float32,output=bfloat16"),
    Head: jmp.get_policy("params=float32,compute=float32,output=float32"),
}


@contextlib.contextmanager
def mixed_precision() -> Iterator[None]:
    """Modules that are called in the block cast as `PRECISIONS` says."""
    with contextlib.ExitStack() as stack:
        for kind, policy in PRECISIONS.items():
            stack.enter_context(hk.mixed_precision.push_policy(kind, policy))
        yield


def language_model(config: Config) -> hk.Transformed:
    """Characters `[B, T]` -> logits `[B, T, NUM_CHARACTERS]` of those after them."""

    def model(tokens: jax.Array, is_training: bool) -> jax.Array:
        with mixed_precision():
            embed = hk.Embed(NUM_CHARACTERS, config.width, name="embed")
            positions = hk.Embed(config.length, config.width, name="positions")
            x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
            x = layers(config, is_training)(x, is_training=is_training)
            return Head(NUM_CHARACTERS, name="head")(norm("norm")(x))

    return hk.transform(model)


def layers(config: Config, is_training: bool) -> Callable[..., jax.Array]:
    """The stack of blocks."""
    stack = hk_stack.layer_stack(
        config.layers,
        name="layers",
        loop=config.loop,
        carry_dtype=jnp.bfloat16,
        # Checks need `checkify` around the program; only the training step has it.
        check_finite=config.check_finite and is_training,
        **REMAT[config.remat],
    )
    return stack(functools.partial(block, config))


def block(config: Config, x: jax.Array, is_training: bool) -> jax.Array:
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""
    # The last layer drops the most: what the first ones lose, all others would miss.
    rate = config.dropout * (hk_stack.layer_index() + 1) / config.layers

    def dropout(x: jax.Array) -> jax.Array:
        return hk.dropout(hk.next_rng_key(), rate, x) if is_training else x

    x = x + dropout(attention(config, norm("attention_norm")(x)))
    h = hk.Linear(4 * config.width, name="mlp_in")(norm("mlp_norm")(x))
    return x + dropout(residual(config, "mlp_out")(jax.nn.gelu(h)))


def attention(config: Config, x: jax.Array) -> jax.Array:
    """Multi-head causal self-attention; JAX computes its softmax in float32."""
    per_head = (*x.shape[:2], 3 * config.heads, config.width // config.heads)
    h = hk.Linear(3 * config.width, name="attention_in")(x).reshape(per_head)
    query, key, value = jnp.split(h, 3, axis=2)
    h = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return residual(config, "attention_out")(h.reshape(x.shape))


def residual(config: Config, name: str) -> hk.Linear:
    """A linear layer whose output is added to the residual stream.

    There are two in each block, so the sum of all has the variance of one.
    """
    w_init = hk.initializers.VarianceScaling(1 / (2 * config.layers))
    return hk.Linear(config.width, w_init=w_init, name=name)


def norm(name: str) -> hk.LayerNorm:
    """A layer norm over features."""
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)


# Training


def adamw(config: Config) -> optax.GradientTransformation:
    """AdamW; its rate rises for a tenth of the time, then falls to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup_steps=config.steps // 10,
        decay_steps=config.steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b2=0.95, weight_decay=config.weight_decay, mask=is_decayed
        ),
    )


def is_decayed(params: hk.Params) -> Any:
    """Weights of linear layers decay; biases, norms and embeddings do not.

    The number of axes would not tell: a bias of a stack is `[L, D]`.
    """
    return hk.data_structures.map(lambda module, name, value: name == "w", params)


def cross_entropy(
    model: hk.Transformed,
    params: hk.Params,
    key: jax.Array | None,
    batch: jax.Array,
    is_training: bool,
) -> jax.Array:
    """Mean over all characters of sequences `[B, T + 1]` but the first of each."""
    logits = model.apply(params, key, batch[:, :-1], is_training)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


def start(config: Config) -> Training:
    """What training starts from."""
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    params = language_model(config).init(
        init_key, jnp.zeros([1, config.length], jnp.int32), is_training=False
    )
    return Training(params, adamw(config).init(params), jnp.int32(0))


def train_step(config: Config) -> Callable[..., tuple[Training, jax.Array, jax.Array]]:
    """`(training, data) -> (training, loss, norm of the gradient)`."""
    loss = functools.partial(cross_entropy, language_model(config), is_training=True)
    optimiser = adamw(config)
    _, key = jax.random.split(jax.random.key(config.seed))

    def step(training: Training, data: jax.Array) -> Any:
        params, state, number = training
        # Of the step's number alone, so that it is the same after a restart.
        batch_key, dropout_key = jax.random.split(jax.random.fold_in(key, number))
        most = len(data) - config.length
        starts = jax.random.randint(batch_key, [config.batch_size], 0, most)
        batch = sequences(data, starts, config.length)
        value, grads = jax.value_and_grad(loss)(params, key=dropout_key, batch=batch)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return Training(params, state, number + 1), value, optax.global_norm(grads)

    return checked(step) if config.check_finite else jax.jit(step, donate_argnums=0)


def checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, compiled, with its checks; exits with what the first failure says."""
    compiled = jax.jit(checkify.checkify(step), donate_argnums=0)

    def run(training: Training, data: jax.Array) -> Any:
        number = int(training.step) + 1
        error, result = compiled(training, data)
        if message := error.get():
            raise SystemExit(f"Stopped in step {number}: {message.splitlines()[0]}")
        return result

    return run


def train(config: Config, training: Training, files: Files) -> Training:
    """Trains to the end with a progress bar, and writes log and checkpoints."""
    data = jnp.asarray(text()[0])
    step, test_loss = train_step(config), held_out_loss(config)
    first, last_test = int(training.step), ""
    bar = tqdm.tqdm(initial=first, total=config.steps, unit="step")
    with bar, open(files.log, "a") as log:
        for number in range(first + 1, config.steps + 1):
            training, *values = step(training, data)
            row = Row(number, *map(float, values))
            refuse_infinity(row)
            if number % config.save_every == 0 or number == config.steps:
                row = row._replace(held_out_loss=test_loss(training.params))
                last_test = f", held out {row.held_out_loss:.3f}"
            append(log, row)
            # Parameters that are not finite are not saved; the next step will say so.
            if row.held_out_loss is not None and math.isfinite(row.held_out_loss):
                save(files.checkpoint, log, config, training)
            bar.set_postfix_str(f"loss {row.loss:.3f}{last_test}", refresh=False)
            bar.update()
    return training


@functools.cache
def held_out_loss(config: Config) -> Callable[[hk.Params], float]:
    """`params -> loss` on sequences from all over the held-out text, in nats."""
    _, held_out = text()
    starts = np.linspace(0, len(held_out) - config.length - 1, NUM_TEST).astype(int)
    batch = sequences(jnp.asarray(held_out), jnp.asarray(starts), config.length)
    loss = functools.partial(cross_entropy, language_model(config), is_training=False)
    compiled = jax.jit(functools.partial(loss, key=None, batch=batch))
    return lambda params: float(compiled(params))


def refuse_infinity(row: Row) -> None:
    """Exits if the loss or its gradient is infinite or NaN: so were all that follow."""
    if not (math.isfinite(row.loss) and math.isfinite(row.gradient_norm)):
        raise SystemExit(
            f"Stopped in step {row.step}: the loss is {row.loss}, the norm of its "
            f"gradient {row.gradient_norm}. The same command with --check_finite says "
            "in which layer that begins."
        )


# Files


def append(log: TextIO, row: Row) -> None:
    """Writes a row in one piece. Numbers are written in full, to be compared."""
    log.write(",".join("" if x is None else repr(x) for x in row) + "\n")
    log.flush()


def save(path: pathlib.Path, log: TextIO, config: Config, training: Training) -> None:
    """Replaces the checkpoint in one step, once the disk has the log up to here."""
    os.fsync(log.fileno())
    tree = {"training": training, "sizes": config.sizes}
    names = hk_stack.NumberedLayers("layers_{}", "layers")
    checkpoint.save(path, tree, layers=names)


def resume(config: Config, files: Files) -> Training:
    """What the last checkpoint holds, if there is one; else a new start."""
    # What a run that was killed while it saved has left behind.
    for unfinished in files.checkpoint.parent.glob(".*.tmp"):
        unfinished.unlink()
    new = functools.partial(start, config)
    if not files.checkpoint.exists():
        cut_log(files, 0)
        return jax.jit(new)()
    training = load(files.checkpoint, config.sizes, like=jax.eval_shape(new))
    cut_log(files, int(training.step))
    print(f"Goes on after step {training.step}, from {files.checkpoint}")
    return training


def load(path: pathlib.Path, sizes: Mapping[str, int], like: Training) -> Training:
    """The training in a checkpoint; exits with one line if that is another model's."""
    try:
        saved = checkpoint.load(path).get("sizes", {})
        found = {name: saved.get(name) for name in sizes}
        if found == sizes:
            tree = checkpoint.load(path, like={"training": like, "sizes": dict(sizes)})
            return tree["training"]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    raise app.UsageError(
        f"{path} is of a model with {as_flags(found)}; these flags ask for "
        f"{as_flags(sizes)}. Give the sizes of the checkpoint, or another --out."
    )


def as_flags(sizes: Mapping[str, Any]) -> str:
    """Sizes as one would write them on the command line."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def cut_log(files: Files, step: int) -> None:
    """Removes what was logged after a step, as it will be logged again."""
    rows = []
    if files.log.exists():
        rows = files.log.read_text().splitlines(keepends=True)[1 : step + 1]
    if len(rows) < step:
        raise SystemExit(
            f"{files.log} has {len(rows)} steps, but the checkpoint beside it is of "
            f"step {step}. Put the log back, or give another --out to start anew."
        )
    shorter = files.log.with_suffix(".new")
    shorter.write_text("".join([",".join(Row._fields) + "\n", *rows]))
    os.replace(shorter, files.log)


# Text


def write_text(config: Config, params: hk.Params) -> tuple[str, str]:
    """The beginning of the held-out text, and how the model goes on."""
    model = language_model(config)
    prompt = text()[1][: config.length]

    def write(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, None, window[None], is_training=False)
        character = jax.random.categorical(key, logits[0, -1] / TEMPERATURE)
        return jnp.append(window[1:], character), character

    keys = jax.random.split(jax.random.key(config.seed), NUM_WRITTEN)
    _, written = jax.jit(jax.lax.scan, static_argnums=0)(write, prompt, keys)
    return readable(prompt), readable(np.asarray(written))


def letters_alone() -> float:
    """The held-out loss, in nats, of a model that knows how frequent characters are."""
    train_on, held_out = text()
    counts = 1 + np.bincount(train_on, minlength=NUM_CHARACTERS)
    return float(-np.mean(np.log(counts / np.sum(counts))[held_out]))


# Picture


def draw(config: Config, files: Files) -> None:
    """Draws the losses of the log, in bits."""
    log = np.genfromtxt(files.log, delimiter=",", names=True, ndmin=1)
    step, loss, held_out = log["step"], bits(log["loss"]), bits(log["held_out_loss"])
    is_tested = np.isfinite(held_out)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(step, loss, color="tab:blue", alpha=0.3, lw=1)
    label = "training, with dropout"
    axes.plot(step, smooth(loss), color="tab:blue", lw=2.5, label=label)
    label = f"held out: {held_out[-1]:.2f} at the end"
    style: Any = {"color": "tab:orange", "mec": "black", "ms": 6, "clip_on": False}
    axes.plot(step[is_tested], held_out[is_tested], "o-", label=label, **style)
    alone = bits(letters_alone())
    label = f"frequencies of characters alone: {alone:.2f}"
    axes.axhline(alone, color="0.3", ls="--", label=label)
    axes.set(title=f"A {config.layers}-layer transformer on Python's manual")
    axes.set(xlabel="training step", ylabel="bits per character")
    axes.set(xlim=(0, step[-1]))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(files.curves, dpi=120)


def bits(nats: Any) -> Any:
    """Losses in bits."""
    return nats / math.log(2)


def smooth(losses: np.ndarray) -> np.ndarray:
    """The median around each loss, over up to `SMOOTHING` steps to each side."""
    starts = [max(0, i - SMOOTHING) for i in range(len(losses))]
    stops = range(SMOOTHING + 1, SMOOTHING + 1 + len(losses))
    around = zip(starts, stops, strict=True)
    return np.array([np.median(losses[start:stop]) for start, stop in around])


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
    "layers": "Number of blocks.",
    "width": "Features in each block.",
    "heads": "Attention heads, a divisor of the width.",
    "length": "Characters that the model reads at once.",
    "steps": "Training steps.",
    "batch_size": "Sequences in a training step.",
    "learning_rate": "Highest rate of AdamW.",
    "weight_decay": "Of AdamW, for weights of linear layers.",
    "dropout": "Share of values to drop in the last block; less in those before.",
    "seed": "Of initial values, batches and dropout.",
    "save_every": "Steps from one checkpoint, and held-out loss, to the next.",
    "remat": "What gradients compute again instead of keeping it: nothing, each block, "
    "each block but for its products with weights, or groups of blocks.",
    "loop": "What runs the blocks; see layer_stack.",
    "check_finite": "Whether to look for values that are not finite in each block.",
}
CHOICES = {"remat": list(REMAT), "loop": ["scan", "unrolled", "python"]}
UPPER_BOUNDS = {"length": 512, "batch_size": 1024}


def define_flags() -> None:
    """One flag for each field of `Config`, and `--out`."""
    for name, value in dataclasses.asdict(Config()).items():
        if isinstance(value, bool):
            flags.DEFINE_bool(name, value, HELP[name])
        elif isinstance(value, float):
            flags.DEFINE_float(name, value, HELP[name], lower_bound=0)
        elif isinstance(value, str):
            flags.DEFINE_enum(name, value, CHOICES[name], HELP[name])
        else:
            bounds = 0 if name == "seed" else 1, UPPER_BOUNDS.get(name)
            flags.DEFINE_integer(name, value, HELP[name], *bounds)
    flags.DEFINE_string("out", "out/transformer_lm", "Folder to write to.")
    flags.register_validator(
        "dropout", lambda rate: rate < 1, "must be at least 0 and less than 1"
    )
    flags.register_multi_flags_validator(
        ["width", "heads"],
        lambda given: given["width"] % given["heads"] == 0,
        "--heads must be a divisor of --width",
    )


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say, or goes on with that, and writes the results."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    begin = time.perf_counter()
    given = flags.FLAGS.flag_values_dict()
    config = Config(**{f.name: given[f.name] for f in dataclasses.fields(Config)})
    out = writable(given["out"])
    names = "checkpoint.safetensors", "curves.png", "losses.csv"
    files = Files(*(out / name for name in names))
    training = train(config, resume(config, files), files)
    draw(config, files)
    prompt, written = write_text(config, training.params)
    print(f"--- Held-out text:\n{prompt}\n--- How the model goes on:\n{written}\n---")
    loss = held_out_loss(config)(training.params)
    print(f"Wrote {', '.join(x.name for x in files)} to {files.log.parent}")
    print(
        f"Held-out loss {bits(loss):.3f} bits per character, "
        f"{bits(letters_alone()):.3f} from their frequencies alone; took "
        f"{time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
