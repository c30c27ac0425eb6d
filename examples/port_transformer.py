"""Moves a transformer that was trained in Flax to Haiku, and trains it further there.

    python examples/port_transformer.py
    python examples/port_transformer.py --steps=600 --width=192

A language model of characters in Flax Linen, with `nn.scan` over its layers, dropout
and tied embeddings, reads the manual that comes with Python (`pydoc_data.topics`). It
is saved as an ordinary Flax checkpoint. From there on, Haiku goes on:

1. The checkpoint is read back as plain arrays; Flax is not needed for that.
2. `hk_stack.port.plan` shows which array becomes which, `hk_stack.flax_to_haiku` moves
   them into the parameters of the same model on `hk_stack.layer_stack`.
3. Logits, loss and gradients of both are compared.
4. Adam's averages move by the same function, so that training goes on as if nothing
   had happened. Flax goes on as well, with the same batches, for comparison.
5. `hk_stack.haiku_to_flax` moves the result back.

A minute and a half on two cores. Writes to `out/port_transformer` (`--out`):

    checkpoint/    what Flax had after its part of the training, by Orbax
    curves.png     the loss, first in Flax, then in Haiku

`port_s4.py` and `port_resnet.py` do the same with other models. They import from here
what does not depend on the model: all that follows `walk_through`.

Needs pip install 'hk_stack[checkpoint,examples,flax]'.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm
from absl import app, flags, logging
from flax.training import train_state
from matplotlib.figure import Figure

import hk_stack

NUM_CHARACTERS = 128  # ASCII; others are read as question marks
NUM_TEST = 64  # held-out sequences
TOLERANCE = 1e-5  # of the comparison of both frameworks
SMOOTHING = 5  # steps to each side, of which the bold curves are medians


@dataclasses.dataclass(frozen=True)
class Training:
    """How to train any model. The flags of the same names say what each field is."""

    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-2
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """How to train which transformer."""

    layers: int = 4
    width: int = 64
    heads: int = 2
    length: int = 32
    dropout: float = 0.05


class Batch(NamedTuple):
    """Inputs `x`, and `y` of integers: what the logits should say."""

    x: np.ndarray
    y: np.ndarray


class Case(NamedTuple):
    """A model in both frameworks, and its data.

    Attributes:
      title: Of the picture.
      flax: The model in Flax; called as `flax(x, is_training) -> logits`.
      haiku: The same model in Haiku, with the same arguments.
      rules: Keyword arguments for the port: where names do not match by themselves.
      batch: `step -> batch`: the same at every call.
      test: What is held out.
      modes: The values of `is_training` with which results are compared. With dropout
        that is False only, as the two frameworks draw other masks.
      double: Whether double precision is needed to tell rounding from other errors.
      yscale: Of the picture.
    """

    title: str
    flax: nn.Module
    haiku: hk.TransformedWithState
    rules: Mapping[str, Any]
    batch: Callable[[int], Batch]
    test: Batch
    modes: Sequence[bool] = (False,)
    double: bool = False
    yscale: str = "linear"


# Data


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


def sequences(data: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Sequences `[B, length]` of the data, and the characters that follow each."""
    x = data[starts[:, None] + np.arange(length + 1)]
    return Batch(x[:, :-1], x[:, 1:])


def text_batches(
    length: int, batch_size: int, seed: int
) -> tuple[Callable[[int], Batch], Batch]:
    """`step -> batch` of random sequences, and the held-out sequences."""
    data, held_out = text()

    def batch(step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(len(data) - length, size=batch_size)
        return sequences(data, starts, length)

    starts = np.linspace(0, len(held_out) - length - 1, NUM_TEST).astype(int)
    return batch, sequences(held_out, starts, length)


# The model in Flax


class FlaxBlock(nn.Module):
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, is_training: bool) -> tuple[jax.Array, None]:
        """Applies the block to `x` `[B, T, D]`; the second result is for `nn.scan`."""
        width = x.shape[-1]
        dropout = nn.Dropout(self.dropout, deterministic=not is_training)
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        h = nn.LayerNorm(name="attention_norm")(x)
        x = x + dropout(attention(h, mask=nn.make_causal_mask(x[..., 0])))
        h = nn.LayerNorm(name="mlp_norm")(x)
        h = nn.gelu(nn.Dense(4 * width, name="mlp_in")(h))
        return x + dropout(nn.Dense(width, name="mlp_out")(h)), None


class FlaxModel(nn.Module):
    """Characters `[B, T]` -> logits `[B, T, NUM_CHARACTERS]` of those after them."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, is_training: bool) -> jax.Array:
        """Embeds, runs the layers, and compares with the same embeddings."""
        config = self.config
        embed = nn.Embed(NUM_CHARACTERS, config.width, name="embed")
        positions = nn.Embed(config.length, config.width, name="positions")
        layers = nn.scan(
            FlaxBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))
        x = nn.Dropout(config.dropout, deterministic=not is_training)(x)
        x, _ = layers(config.heads, config.dropout, name="layers")(x, is_training)
        return embed.attend(nn.LayerNorm(name="norm")(x))


# The model in Haiku


def haiku_model(config: Config) -> hk.TransformedWithState:
    """The same model in Haiku, on `hk_stack.layer_stack`."""

    def model(tokens: jax.Array, is_training: bool) -> jax.Array:
        embed = hk.Embed(NUM_CHARACTERS, config.width, name="embed")
        positions = hk.Embed(config.length, config.width, name="positions")
        layer = functools.partial(haiku_layer, config, is_training=is_training)
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))
        x = haiku_dropout(config, x, is_training)
        x = hk_stack.layer_stack(config.layers, name="layers")(layer)(x)
        return haiku_norm("norm")(x) @ embed.embeddings.T

    return hk.transform_with_state(model)


def haiku_layer(config: Config, x: jax.Array, is_training: bool) -> jax.Array:
    """`FlaxBlock` in Haiku. It has no scope of its own, as `nn.scan` adds none."""
    attention = hk.MultiHeadAttention(
        config.heads,
        config.width // config.heads,
        model_size=config.width,
        w_init=hk.initializers.VarianceScaling(),
        name="attention",
    )
    # Flax calls these two layers mlp_in and mlp_out; `RULES` below says so.
    mlp = hk.nets.MLP(
        [4 * config.width, config.width], activation=jax.nn.gelu, name="mlp"
    )
    h = haiku_norm("attention_norm")(x)
    mask = jnp.tri(x.shape[1], dtype=bool)[None, None]
    x = x + haiku_dropout(config, attention(h, h, h, mask), is_training)
    return x + haiku_dropout(config, mlp(haiku_norm("mlp_norm")(x)), is_training)


def haiku_norm(name: str) -> hk.LayerNorm:
    """A layer norm as Flax makes it: Haiku would add 1e-5 to the variance."""
    return hk.LayerNorm(-1, True, True, eps=1e-6, name=name)


def haiku_dropout(config: Config, x: jax.Array, is_training: bool) -> jax.Array:
    """Dropout in training. The masks are not those of Flax: keys differ."""
    return hk.dropout(hk.next_rng_key(), config.dropout, x) if is_training else x


# All other modules have the same names in both, or their framework's default names.
RULES = {
    "rename": {
        "layers/mlp_in": "layers/mlp/~/linear_0",
        "layers/mlp_out": "layers/mlp/~/linear_1",
    }
}


def transformer(config: Config) -> Case:
    """The transformer in both frameworks, and Python's manual."""
    batch, test = text_batches(config.length, config.batch_size, config.seed)
    return Case(
        title="A transformer on Python's manual: trained in Flax, then in Haiku",
        flax=FlaxModel(config),
        haiku=haiku_model(config),
        rules=RULES,
        batch=batch,
        test=test,
    )


# The walk-through; from here on, nothing depends on the model


class FlaxState(train_state.TrainState):
    """Flax's training state, with the running statistics of `nn.BatchNorm` if any."""

    batch_stats: Any


class HaikuState(NamedTuple):
    """What training in Haiku goes on from."""

    params: Any
    state: Any
    optimiser: optax.OptState


def walk_through(case: Case, config: Training, out: pathlib.Path) -> None:
    """Trains in Flax, saves, ports, compares, trains in Haiku, draws and reports."""
    optimiser = adam(config)
    first, second = range(config.steps), range(config.steps, 2 * config.steps)
    in_flax = new_flax_state(case, optimiser, config.seed)
    in_flax, before = train(case, "Flax", flax_step, in_flax, first)
    save(in_flax, out / "checkpoint")

    checkpoint = load(out / "checkpoint")
    variables = variables_of(checkpoint)
    ported = port(case, checkpoint)
    largest = compare(case, variables, ported)

    step = haiku_step(case, optimiser)
    in_haiku, after = train(case, "Haiku", step, ported, second)
    losses = {
        "in Flax": flax_test_loss(case, variables),
        "ported": haiku_test_loss(case, ported),
        "after training on in Haiku": haiku_test_loss(case, in_haiku),
    }
    back = port_back(case, in_haiku, like=variables)
    print(f"Moved back, the held-out loss is {flax_test_loss(case, back):.3f} in Flax")

    few = second[: 1 + len(second) // 4]
    _, otherwise = train(case, "Flax, to compare", flax_step, in_flax, few)
    draw(case, before, after, otherwise, losses, out / "curves.png")
    print(f"Wrote checkpoint/ and curves.png to {out}")
    print(
        f"Held-out loss {', '.join(f'{x:.2f} {name}' for name, x in losses.items())}; "
        f"largest difference of logits {largest.logits:.0e}, "
        f"of gradients {largest.gradients:.0e}"
    )


def train(
    case: Case, name: str, step: Callable[..., Any], state: Any, steps: range
) -> tuple[Any, list[float]]:
    """Trains with a progress bar.

    Args:
      case: Its batches are used.
      name: What the bar is called.
      step: `(state, key, batch) -> (state, loss)`.
      state: Of the training, in either framework.
      steps: Their numbers, counted through both halves.

    Returns:
      The next state, and the loss of each step.
    """
    losses = []
    with tqdm.tqdm(steps, desc=name, unit="step") as bar:
        for i in bar:
            state, loss = step(state, jax.random.key(i), case.batch(i))
            losses.append(float(loss))
            bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}", refresh=False)
    return state, losses


def adam(config: Training) -> optax.GradientTransformation:
    """Adam for all of the training: its learning rate rises, then falls to zero."""
    return optax.adam(
        optax.warmup_cosine_decay_schedule(
            0.0,
            config.learning_rate,
            warmup_steps=config.steps // 5,
            decay_steps=2 * config.steps,
        )
    )


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over all that is to be predicted."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


# Flax


def new_flax_state(
    case: Case, optimiser: optax.GradientTransformation, seed: int
) -> FlaxState:
    """The state that training in Flax starts from."""
    init = jax.jit(functools.partial(case.flax.init, is_training=False))
    variables = init(jax.random.key(seed), case.test.x[:1])
    return FlaxState.create(
        apply_fn=case.flax.apply,
        params=variables["params"],
        tx=optimiser,
        batch_stats=variables.get("batch_stats", {}),
    )


@jax.jit
def flax_step(
    state: FlaxState, key: jax.Array, batch: Batch
) -> tuple[FlaxState, jax.Array]:
    """One step of training in Flax, as its documentation writes it."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch.x,
            is_training=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, batch.y), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    return state.replace(batch_stats=updates.get("batch_stats", {})), value


def flax_test_loss(case: Case, variables: Any) -> float:
    """The held-out loss in Flax."""
    logits = flax_logits(case.flax, variables, case.test.x)
    return float(cross_entropy(logits, case.test.y))


@functools.partial(jax.jit, static_argnums=0)
def flax_logits(model: nn.Module, variables: Any, x: jax.Array) -> jax.Array:
    """Logits in evaluation."""
    return model.apply(variables, x, is_training=False)


def save(state: FlaxState, path: pathlib.Path) -> None:
    """Saves a checkpoint, as Flax recommends it."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), state, force=True)


# From Flax to Haiku


def load(path: pathlib.Path) -> Mapping[str, Any]:
    """A checkpoint as dictionaries of NumPy arrays. This needs Orbax, but not Flax."""
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(path.absolute()))


def variables_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What Flax's `apply` takes, out of a checkpoint."""
    collections = ("params", "batch_stats")
    return {name: checkpoint[name] for name in collections if checkpoint[name]}


def haiku_like(case: Case) -> tuple[Any, Any]:
    """Shapes of the parameters and the state in Haiku; computes nothing."""
    init = functools.partial(case.haiku.init, is_training=True)
    return jax.eval_shape(init, jax.random.key(0), case.test.x[:1])


def port(case: Case, checkpoint: Mapping[str, Any]) -> HaikuState:
    """All that training in Haiku needs, from a checkpoint of Flax."""
    variables, like = variables_of(checkpoint), haiku_like(case)
    print(hk_stack.port.plan(variables, like, **case.rules))
    params, state = hk_stack.flax_to_haiku(variables, like, **case.rules)
    in_adam, in_schedule = checkpoint["opt_state"]
    optimiser = (
        optax.ScaleByAdamState(
            in_adam["count"],
            port_gradients(case, in_adam["mu"], like=like[0]),
            port_gradients(case, in_adam["nu"], like=like[0]),
        ),
        optax.ScaleByScheduleState(in_schedule["count"]),
    )
    return HaikuState(params, state, optimiser)


def port_gradients(case: Case, gradients: Any, like: Any) -> Any:
    """Ports gradients, or Adam's averages of them: they are shaped like parameters."""
    in_flax = {"params": gradients}
    return hk_stack.flax_to_haiku(in_flax, (like, {}), **case.rules)[0]


def port_back(case: Case, training: HaikuState, like: Any) -> Any:
    """Variables of Flax, shaped `like` others, from those of Haiku."""
    in_haiku = training.params, training.state
    return hk_stack.haiku_to_flax(in_haiku, like, **case.rules)


class Results(NamedTuple):
    """What is compared.

    Attributes:
      logits: Of one batch.
      loss: Of the same.
      gradients: Of the loss, as Haiku's parameters are shaped.
      statistics: Flax's `batch_stats` after this batch; {} without batch norm.
    """

    logits: Any
    loss: Any
    gradients: Any
    statistics: Any


def compare(case: Case, variables: Any, ported: HaikuState) -> Results:
    """Prints how far the results of both are apart, and returns the most of it.

    Raises:
      SystemExit: if that is more than `TOLERANCE`.
    """
    largest = compare_in(case, "single precision", variables, ported)
    if case.double:
        with jax.enable_x64(True):
            in_flax, in_haiku = as_double(variables), as_double(ported)
            largest = compare_in(case, "double precision", in_flax, in_haiku)
    if not np.max(largest) < TOLERANCE:
        raise SystemExit(f"Expected less than {TOLERANCE}: the two models differ")
    return largest


def compare_in(
    case: Case, precision: str, variables: Any, ported: HaikuState
) -> Results:
    """Prints and returns the largest differences in one precision."""
    rows = []
    for is_training in case.modes:
        in_flax = flax_results(case, variables, ported, is_training)
        in_haiku = haiku_results(case, variables, ported, is_training)
        rows.append(differences(in_haiku, in_flax))
        mode = "training" if is_training else "evaluation"
        found = rows[-1]._asdict()
        if not in_flax.statistics:
            del found["statistics"]
        line = ", ".join(f"{name} {x:.0e}" for name, x in found.items())
        print(f"Differences in {mode}, in {precision}: {line}")
    return Results(*np.max(rows, axis=0))


def as_double(tree: Any) -> Any:
    """All numbers of a tree in double precision."""
    return jax.tree.map(
        lambda x: np.asarray(x, "f8") if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
    )


def flax_results(
    case: Case, variables: Any, ported: HaikuState, is_training: bool
) -> Results:
    """Results in Flax for a batch, without dropout; gradients shaped as `ported`."""
    batch = case.batch(0)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        given = {**variables, "params": params}
        logits, updates = case.flax.apply(
            given, batch.x, is_training, mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch.y), (logits, updates)

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (logits, updates)), grads = value_and_grad(variables["params"])
    gradients = port_gradients(case, grads, like=ported.params)
    return Results(logits, value, gradients, updates.get("batch_stats", {}))


def haiku_results(
    case: Case, variables: Any, ported: HaikuState, is_training: bool
) -> Results:
    """The same in Haiku; statistics shaped as the `variables` of Flax."""
    batch = case.batch(0)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, state = case.haiku.apply(
            params, ported.state, None, batch.x, is_training
        )
        return cross_entropy(logits, batch.y), (logits, state)

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (logits, state)), gradients = value_and_grad(ported.params)
    back = port_back(case, ported._replace(state=state), variables)
    return Results(logits, value, gradients, back.get("batch_stats", {}))


def differences(found: Results, expected: Results) -> Results:
    """How far each of the results is from what is expected.

    Gradients are compared by module, not by array: that of an attention's key bias is
    zero, as softmax does not see it, so both frameworks have rounding errors there.
    """
    gradients = [
        difference(found.gradients[module], expected.gradients[module])
        for module in expected.gradients
    ]
    statistics = jax.tree.map(difference, found.statistics, expected.statistics)
    return Results(
        logits=difference(found.logits, expected.logits),
        loss=difference(found.loss, expected.loss),
        gradients=np.max(gradients),
        statistics=np.max([0.0, *jax.tree.leaves(statistics)]),
    )


def difference(found: Any, expected: Any) -> np.floating:
    """The largest difference of numbers, relative to the largest of the numbers."""
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), found, expected)
    sizes = jax.tree.map(lambda x: np.max(np.abs(x)), expected)
    return np.max(jax.tree.leaves(gaps)) / np.max(jax.tree.leaves(sizes))


# Haiku


def haiku_step(
    case: Case, optimiser: optax.GradientTransformation
) -> Callable[..., tuple[HaikuState, jax.Array]]:
    """One step of training in Haiku, `(training, key, batch) -> (training, loss)`."""

    def step(training: HaikuState, key: jax.Array, batch: Batch) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, state = case.haiku.apply(
                params, training.state, key, batch.x, is_training=True
            )
            return cross_entropy(logits, batch.y), state

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(training.params)
        updates, opt_state = optimiser.update(grads, training.optimiser)
        params = optax.apply_updates(training.params, updates)
        return HaikuState(params, state, opt_state), value

    return jax.jit(step)


def haiku_test_loss(case: Case, training: HaikuState) -> float:
    """The held-out loss in Haiku."""
    logits = haiku_logits(case.haiku, training.params, training.state, case.test.x)
    return float(cross_entropy(logits, case.test.y))


@functools.partial(jax.jit, static_argnums=0)
def haiku_logits(
    model: hk.TransformedWithState, params: Any, state: Any, x: jax.Array
) -> jax.Array:
    """Logits in evaluation."""
    return model.apply(params, state, None, x, is_training=False)[0]


# Picture


def draw(
    case: Case,
    before: Sequence[float],
    after: Sequence[float],
    otherwise: Sequence[float],
    held_out: Mapping[str, float],
    path: pathlib.Path,
) -> None:
    """Draws the loss in Flax, then in Haiku, and what it would have been in Flax.

    Args:
      case: For title and scale.
      before: Losses of the first steps, in Flax.
      after: Losses of the other steps, in Haiku.
      otherwise: Losses of the same steps in Flax.
      held_out: Losses at the join in both frameworks, and at the end.
      path: Of the picture.
    """
    join, end = len(before), len(before) + len(after)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    losses = [*before, *after]
    draw_losses(axes, losses, slice(0, join + 1), "tab:blue", "trained in Flax")
    draw_losses(axes, losses, slice(join, end), "tab:orange", "trained on in Haiku")
    steps = np.arange(join, max(join + 1, join + len(otherwise) - SMOOTHING))
    stayed = smooth([*before, *otherwise])
    axes.plot(steps, stayed[steps], "k--", label="if it stays in Flax")
    at = zip((join, join, end), "sxD", held_out.items(), strict=True)
    for step, marker, (name, loss) in at:
        label = f"held out: {loss:.2f} {name}"
        axes.plot(step, loss, f"k{marker}", mfc="none", ms=9, clip_on=0, label=label)
    axes.axvline(join, color="0.3", lw=1)
    top = axes.get_xaxis_transform()
    axes.text(join, 0.96, "Flax ←  ", ha="right", va="top", transform=top)
    axes.text(join, 0.96, "  → Haiku", ha="left", va="top", transform=top)
    axes.set(title=case.title, xlabel="training step", ylabel="cross entropy")
    axes.set(yscale=case.yscale, xlim=(0, end))
    if case.yscale == "log":
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)
    figure.savefig(path, dpi=120)


def draw_losses(
    axes: Any, losses: Sequence[float], part: slice, color: str, label: str
) -> None:
    """Draws a part of the losses: each of them pale, a smooth curve bold."""
    steps = np.arange(len(losses))[part]
    axes.plot(steps, losses[part], color=color, alpha=0.3, lw=1)
    axes.plot(steps, smooth(losses)[part], color=color, lw=3, label=label)


def smooth(losses: Sequence[float]) -> np.ndarray:
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
    "steps": "Training steps in Flax, and then as many in Haiku.",
    "batch_size": "Examples in a training step.",
    "learning_rate": "Highest rate of Adam.",
    "seed": "Of initial values and batches.",
    "layers": "Number of layers.",
    "width": "Features in each layer.",
    "length": "Characters that the model reads at once.",
    "dropout": "Share of values to drop.",
}
UPPER_BOUNDS = {"length": 512, "batch_size": 1024}


def define_flags(default: Training, out: str, **more_help: str) -> None:
    """One flag for each field of the configuration, and `--out`."""
    for name, value in dataclasses.asdict(default).items():
        text = {**HELP, **more_help}[name]
        if isinstance(value, float):
            flags.DEFINE_float(name, value, text, lower_bound=0)
        else:
            bounds = 0 if name == "seed" else 1, UPPER_BOUNDS.get(name)
            flags.DEFINE_integer(name, value, text, *bounds)
        if name == "dropout":
            flags.register_validator(
                name, lambda rate: rate < 1, "must be at least 0 and less than 1"
            )
    flags.DEFINE_string("out", out, "Folder to write to.")


def parsed(kind: type, argv: Sequence[str]) -> tuple[Any, pathlib.Path]:
    """The configuration and the folder that the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax would report all that it does.
    given = flags.FLAGS.flag_values_dict()
    config = kind(**{f.name: given[f.name] for f in dataclasses.fields(kind)})
    return config, writable(given["out"])


def main(argv: Sequence[str]) -> None:
    """Runs the walk-through with the transformer that the flags ask for."""
    config, out = parsed(Config, argv)
    walk_through(transformer(config), config, out)


if __name__ == "__main__":
    define_flags(
        Config(),
        "out/port_transformer",
        heads="Attention heads, a divisor of the width.",
    )
    flags.register_multi_flags_validator(
        ["width", "heads"],
        lambda given: given["width"] % given["heads"] == 0,
        "--heads must be a divisor of --width",
    )
    app.run(main)
