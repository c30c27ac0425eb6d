"""How a model that was trained in Flax moves to Haiku: what `port_*.py` have in common.

Nothing here depends on the model, which a `Case` has in both frameworks.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import common
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from common import Losses, flag
from example_data import Batch
from matplotlib.figure import Figure

import hk_stack

TOLERANCE = 1e-5  # of the comparison of both frameworks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """How to train any model."""

    steps: int = flag("Training steps in Flax, then as many in Haiku.", default=400)


class Case(NamedTuple):
    """A model in both frameworks, and its data.

    Attributes:
      title: Of the picture.
      flax: The model in Flax; used as `flax(x, is_training) -> logits`.
      haiku: The same model in Haiku, with the same arguments.
      rules: Keyword arguments for the port: where names do not match by themselves.
      batch: `step -> batch`: the same each time.
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


class Training(NamedTuple):
    """What training goes on from, in either framework.

    Attributes:
      params: The parameters.
      state: Running statistics of batch norm, if any: Flax's `batch_stats`.
      opt_state: Of the optimiser.
    """

    params: Any
    state: Any
    opt_state: optax.OptState


# `(params, state, key, x, is_training) -> (logits, state)`, as Haiku has it.
Apply = Callable[..., tuple[jax.Array, Any]]


def walk_through(case: Case, config: Config) -> None:
    """Trains in Flax, saves, ports, compares, trains in Haiku, draws and reports."""
    optimiser = optax.adam(common.schedule(config, 2 * config.steps))
    flax, haiku = functools.partial(flax_apply, case.flax), case.haiku.apply
    first, second = range(config.steps), range(config.steps, 2 * config.steps)
    start = flax_start(case, optimiser, config.seed)
    in_flax, before = train("Flax", case, flax, optimiser, start, first)
    save(in_flax, config.folder / "checkpoint")

    in_flax = load(config.folder / "checkpoint")
    ported = port(case, in_flax)
    logits, gradients = compare(case, in_flax, ported)

    in_haiku, after = train("Haiku", case, haiku, optimiser, ported, second)
    back = port_back(case, in_haiku, like=in_flax)
    held_out = {
        "in Flax": test_loss(flax, in_flax, case.test),
        "ported": test_loss(haiku, ported, case.test),
        "after training on in Haiku": test_loss(haiku, in_haiku, case.test),
    }
    moved_back = test_loss(flax, back, case.test)
    print(f"Moved back, the held-out loss is {moved_back:.3f} in Flax")
    draw(case, before, after, held_out).savefig(config.folder / "curves.png", dpi=120)
    print(f"Wrote checkpoint/ and curves.png to {config.out}")
    losses = ", ".join(f"{x:.2f} {name}" for name, x in held_out.items())
    print(
        f"Held-out loss {losses}; largest difference of logits {logits:.0e}, of "
        f"gradients {gradients:.0e}"
    )


# Training


def flax_start(
    case: Case, optimiser: optax.GradientTransformation, seed: int
) -> Training:
    """Initial values in Flax."""
    init = jax.jit(functools.partial(case.flax.init, is_training=False))
    variables = init(jax.random.key(seed), case.test.x[:1])
    params, state = variables["params"], variables.get("batch_stats", {})
    return Training(params, state, optimiser.init(params))


def flax_apply(
    model: nn.Module, params: Any, state: Any, key: Any, x: Any, is_training: bool
) -> tuple[jax.Array, Any]:
    """What Haiku's `apply` does, in Flax."""
    logits, updates = model.apply(
        {"params": params, "batch_stats": state},
        x,
        is_training=is_training,
        rngs={} if key is None else {"dropout": key},
        mutable=["batch_stats"],
    )
    return logits, updates.get("batch_stats", {})


def loss(
    apply: Apply, params: Any, state: Any, key: Any, batch: Batch, is_training: bool
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Cross entropy, and the logits and the next state."""
    logits, state = apply(params, state, key, batch.x, is_training)
    return common.cross_entropy(logits, batch.y), (logits, state)


def train(
    name: str,
    case: Case,
    apply: Apply,
    optimiser: optax.GradientTransformation,
    training: Training,
    steps: range,
) -> tuple[Training, Losses]:
    """Trains in either framework."""

    @jax.jit
    def update(training: Training, key: Any, batch: Batch) -> tuple[Training, Any]:
        params, state, opt_state = training
        of_batch = functools.partial(loss, apply, is_training=True)
        value_and_grad = jax.value_and_grad(of_batch, has_aux=True)
        (value, (_, state)), grads = value_and_grad(params, state, key, batch)
        updates, opt_state = optimiser.update(grads, opt_state)
        return Training(optax.apply_updates(params, updates), state, opt_state), value

    def step(training: Training, number: int) -> Any:
        return update(training, jax.random.key(number), case.batch(number))

    return common.train(step, training, steps, name=name)


def test_loss(apply: Apply, training: Training, test: Batch) -> float:
    """The held-out loss."""
    of_test = functools.partial(loss, apply, key=None, batch=test, is_training=False)
    return float(jax.jit(of_test)(training.params, training.state)[0])


# From Flax to Haiku


def save(training: Training, path: pathlib.Path) -> None:
    """Saves a checkpoint, as Flax recommends it."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), training._asdict(), force=True)


def load(path: pathlib.Path) -> Training:
    """A checkpoint as dictionaries of NumPy arrays. This needs Orbax, but not Flax."""
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path.absolute())
    return Training(**jax.tree.map(np.asarray, restored))


def variables_of(training: Training) -> dict[str, Any]:
    """What Flax's own `apply` takes."""
    variables = {"params": training.params, "batch_stats": training.state}
    return {name: tree for name, tree in variables.items() if tree}


def port(case: Case, in_flax: Training) -> Training:
    """All that training in Haiku needs, from a checkpoint of Flax."""
    variables = variables_of(in_flax)
    init = functools.partial(case.haiku.init, is_training=True)
    like = jax.eval_shape(init, jax.random.key(0), case.test.x[:1])
    print(hk_stack.port.plan(variables, like, **case.rules))
    params, state = hk_stack.flax_to_haiku(variables, like, **case.rules)
    in_adam, in_schedule = in_flax.opt_state
    adam = optax.ScaleByAdamState(
        in_adam["count"],
        port_gradients(case, in_adam["mu"], params),
        port_gradients(case, in_adam["nu"], params),
    )
    schedule = optax.ScaleByScheduleState(in_schedule["count"])
    return Training(params, state, (adam, schedule))


def port_gradients(case: Case, gradients: Any, like: Any) -> Any:
    """Ports gradients, or Adam's averages of them: they are shaped like parameters."""
    in_flax = {"params": gradients}
    return hk_stack.flax_to_haiku(in_flax, (like, {}), **case.rules)[0]


def port_back(case: Case, in_haiku: Training, like: Training) -> Training:
    """Parameters and statistics of Haiku in Flax, shaped `like` others."""
    variables = in_haiku.params, in_haiku.state
    back = hk_stack.haiku_to_flax(variables, variables_of(like), **case.rules)
    return Training(back["params"], back.get("batch_stats", {}), opt_state=None)


# Comparison


def compare(case: Case, in_flax: Training, ported: Training) -> tuple[float, float]:
    """Prints how far the results of both are apart.

    Returns:
      The largest differences of logits and of gradients.

    Raises:
      SystemExit: if any is more than `TOLERANCE`.
    """
    largest = compare_in("single", case, in_flax, ported)
    if case.double:
        with jax.enable_x64(True):
            in_double = jax.tree.map(as_double, (in_flax, ported))
            largest = compare_in("double", case, *in_double)
    if not max(largest.values()) < TOLERANCE:
        raise SystemExit(f"Expected less than {TOLERANCE}: the two models differ")
    return largest["logits"], largest["gradients"]


def as_double(x: np.ndarray) -> np.ndarray:
    """Numbers in double precision."""
    return np.asarray(x, "f8") if jnp.issubdtype(x.dtype, jnp.floating) else x


def compare_in(
    precision: str, case: Case, in_flax: Training, ported: Training
) -> dict[str, float]:
    """Prints and returns the largest differences in one precision."""
    rows = [differences(case, in_flax, ported, mode) for mode in case.modes]
    for is_training, row in zip(case.modes, rows, strict=True):
        mode = "training" if is_training else "evaluation"
        line = ", ".join(f"{name} {x:.0e}" for name, x in row.items())
        print(f"Differences in {mode}, in {precision} precision: {line}")
    return {name: max(row[name] for row in rows) for name in rows[0]}


def differences(
    case: Case, in_flax: Training, ported: Training, is_training: bool
) -> dict[str, float]:
    """How far the results for a batch, without dropout, are apart."""

    def results(apply: Apply, training: Training) -> Any:
        of_batch = functools.partial(loss, apply, is_training=is_training)
        value_and_grad = jax.jit(jax.value_and_grad(of_batch, has_aux=True))
        return value_and_grad(training.params, training.state, None, case.batch(0))

    flax = functools.partial(flax_apply, case.flax)
    (loss_1, (logits_1, state_1)), gradients_1 = results(flax, in_flax)
    (loss_2, (logits_2, state_2)), gradients_2 = results(case.haiku.apply, ported)
    gradients_1 = port_gradients(case, gradients_1, ported.params)
    found = {
        "logits": common.difference(logits_2, logits_1),
        "loss": common.difference(loss_2, loss_1),
        # By module, not by array: the gradient of an attention's key bias is zero, as
        # softmax does not see it, so both frameworks have rounding errors there.
        "gradients": max(
            common.difference(gradients_2[name], x) for name, x in gradients_1.items()
        ),
    }
    if state_1:
        back = port_back(case, ported._replace(state=state_2), like=in_flax)
        found["statistics"] = common.difference(back.state, state_1)
    return found


def draw(
    case: Case, before: Losses, after: Losses, held_out: Mapping[str, float]
) -> Figure:
    """Draws the loss in Flax, then in Haiku, and what is held out at join and end."""
    join = len(before.training)
    end = join + len(after.training)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    common.draw_smooth(axes, range(join), before.training, "trained in Flax")
    common.draw_smooth(axes, range(join, end), after.training, "trained on in Haiku")
    at = zip((join, join, end), "sxD", held_out.items(), strict=True)
    for step, marker, (name, value) in at:
        label = f"held out: {value:.2f} {name}"
        axes.plot(step, value, f"k{marker}", mfc="none", ms=9, clip_on=0, label=label)
    axes.axvline(join, color="0.3", lw=1)
    labels = {"ylabel": "cross entropy", "yscale": case.yscale, "xlim": (0, end)}
    common.finish(axes, title=case.title, **labels)
    return figure
