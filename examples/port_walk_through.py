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
from datasets import Batch
from flax.training import train_state
from matplotlib.figure import Figure

import hk_stack

TOLERANCE = 1e-5  # of the comparison of both frameworks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """How to train any model."""

    steps: int = flag("Training steps in Flax, and then as many in Haiku.")


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


def walk_through(case: Case, config: Config) -> None:
    """Trains in Flax, saves, ports, compares, trains in Haiku, draws and reports."""
    optimiser = optax.adam(common.schedule(config, 2 * config.steps))
    in_flax, before = train_in_flax(case, optimiser, config)
    save(in_flax, config.folder / "checkpoint")

    restored = load(config.folder / "checkpoint")
    variables = {x: restored[x] for x in ("params", "batch_stats") if restored[x]}
    ported = port(case, variables, restored["opt_state"])
    logits, gradients = compare(case, variables, ported)

    in_haiku, after = train_in_haiku(case, optimiser, ported, config)
    back = hk_stack.haiku_to_flax(in_haiku[:2], variables, **case.rules)
    held_out = {
        "in Flax": flax_test_loss(case, variables),
        "ported": haiku_test_loss(case, ported),
        "after training on in Haiku": haiku_test_loss(case, in_haiku),
    }
    print(f"Moved back, the held-out loss is {flax_test_loss(case, back):.3f} in Flax")
    draw(case, before, after, held_out).savefig(config.folder / "curves.png", dpi=120)
    print(f"Wrote checkpoint/ and curves.png to {config.out}")
    print(
        f"Held-out loss {', '.join(f'{x:.2f} {name}' for name, x in held_out.items())}; "
        f"largest difference of logits {logits:.0e}, of gradients {gradients:.0e}"
    )


# In Flax


class FlaxState(train_state.TrainState):
    """Flax's training state, with the running statistics of `nn.BatchNorm` if any."""

    batch_stats: Any


def train_in_flax(
    case: Case, optimiser: optax.GradientTransformation, config: Config
) -> tuple[FlaxState, Losses]:
    """The first half of training."""
    init = jax.jit(functools.partial(case.flax.init, is_training=False))
    variables = init(jax.random.key(config.seed), case.test.x[:1])
    state = FlaxState.create(
        apply_fn=case.flax.apply,
        params=variables["params"],
        tx=optimiser,
        batch_stats=variables.get("batch_stats", {}),
    )
    return common.train(
        lambda state, step: flax_step(state, jax.random.key(step), case.batch(step)),
        state,
        range(config.steps),
        name="Flax",
    )


@jax.jit
def flax_step(state: FlaxState, key: Any, batch: Batch) -> tuple[FlaxState, jax.Array]:
    """One step of training in Flax, as its documentation writes it."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch.x,
            is_training=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return common.cross_entropy(logits, batch.y), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    return state.replace(batch_stats=updates.get("batch_stats", {})), value


def flax_test_loss(case: Case, variables: Any) -> float:
    """The held-out loss in Flax."""
    logits = jax.jit(case.flax.apply, static_argnums=2)(variables, case.test.x, False)
    return float(common.cross_entropy(logits, case.test.y))


def save(state: FlaxState, path: pathlib.Path) -> None:
    """Saves a checkpoint, as Flax recommends it."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), state, force=True)


# From Flax to Haiku


class HaikuState(NamedTuple):
    """What training in Haiku goes on from."""

    params: Any
    state: Any
    optimiser: optax.OptState


def load(path: pathlib.Path) -> Mapping[str, Any]:
    """A checkpoint as dictionaries of NumPy arrays. This needs Orbax, but not Flax."""
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(path.absolute()))


def port(case: Case, variables: Any, opt_state: Any) -> HaikuState:
    """All that training in Haiku needs, from a checkpoint of Flax."""
    init = functools.partial(case.haiku.init, is_training=True)
    like = jax.eval_shape(init, jax.random.key(0), case.test.x[:1])
    print(hk_stack.port.plan(variables, like, **case.rules))
    params, state = hk_stack.flax_to_haiku(variables, like, **case.rules)
    in_adam, in_schedule = opt_state
    adam = optax.ScaleByAdamState(
        in_adam["count"],
        port_gradients(case, in_adam["mu"], params),
        port_gradients(case, in_adam["nu"], params),
    )
    schedule = optax.ScaleByScheduleState(in_schedule["count"])
    return HaikuState(params, state, (adam, schedule))


def port_gradients(case: Case, gradients: Any, like: Any) -> Any:
    """Ports gradients, or Adam's averages of them: they are shaped like parameters."""
    in_flax = {"params": gradients}
    return hk_stack.flax_to_haiku(in_flax, (like, {}), **case.rules)[0]


# Comparison


def compare(case: Case, variables: Any, ported: HaikuState) -> tuple[float, float]:
    """Prints how far the results of both are apart.

    Returns:
      The largest differences of logits and of gradients.

    Raises:
      SystemExit: if any is more than `TOLERANCE`.
    """
    largest = compare_in("single", case, variables, ported)
    if case.double:
        with jax.enable_x64(True):
            in_double = jax.tree.map(as_double, (variables, ported))
            largest = compare_in("double", case, *in_double)
    if not max(largest.values()) < TOLERANCE:
        raise SystemExit(f"Expected less than {TOLERANCE}: the two models differ")
    return largest["logits"], largest["gradients"]


def as_double(x: np.ndarray) -> np.ndarray:
    """Numbers in double precision."""
    return np.asarray(x, "f8") if jnp.issubdtype(x.dtype, jnp.floating) else x


def compare_in(
    precision: str, case: Case, variables: Any, ported: HaikuState
) -> dict[str, float]:
    """Prints and returns the largest differences in one precision."""
    rows = []
    for is_training in case.modes:
        in_flax = flax_results(case, variables, ported, is_training)
        in_haiku = haiku_results(case, variables, ported, is_training)
        rows.append(
            {name: differences(in_haiku[name], x) for name, x in in_flax.items() if x}
        )
        mode = "training" if is_training else "evaluation"
        line = ", ".join(f"{name} {x:.0e}" for name, x in rows[-1].items())
        print(f"Differences in {mode}, in {precision} precision: {line}")
    return {name: max(row[name] for row in rows) for name in rows[0]}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest difference of two dictionaries, entry by entry.

    Gradients are compared by module, not by array: that of an attention's key bias is
    zero, as softmax does not see it, so both frameworks have rounding errors there.
    """
    return max(common.difference(found[name], x) for name, x in expected.items())


def flax_results(
    case: Case, variables: Any, ported: HaikuState, is_training: bool
) -> dict[str, Mapping[str, Any]]:
    """Results in Flax for a batch, without dropout; gradients shaped as in Haiku."""
    batch = case.batch(0)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        given = {**variables, "params": params}
        logits, updates = case.flax.apply(
            given, batch.x, is_training, mutable=["batch_stats"]
        )
        return common.cross_entropy(logits, batch.y), (logits, updates)

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (logits, updates)), grads = value_and_grad(variables["params"])
    return {
        "logits": {"": logits},
        "loss": {"": value},
        "gradients": port_gradients(case, grads, ported.params),
        "statistics": updates.get("batch_stats", {}),
    }


def haiku_results(
    case: Case, variables: Any, ported: HaikuState, is_training: bool
) -> dict[str, Mapping[str, Any]]:
    """The same in Haiku; statistics shaped as in Flax."""
    batch = case.batch(0)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, state = case.haiku.apply(
            params, ported.state, None, batch.x, is_training
        )
        return common.cross_entropy(logits, batch.y), (logits, state)

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (logits, state)), gradients = value_and_grad(ported.params)
    back = hk_stack.haiku_to_flax((ported.params, state), variables, **case.rules)
    return {
        "logits": {"": logits},
        "loss": {"": value},
        "gradients": gradients,
        "statistics": back.get("batch_stats", {}),
    }


# In Haiku


def train_in_haiku(
    case: Case,
    optimiser: optax.GradientTransformation,
    ported: HaikuState,
    config: Config,
) -> tuple[HaikuState, Losses]:
    """The second half of training."""

    @jax.jit
    def update(training: HaikuState, key: Any, batch: Batch) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, state = case.haiku.apply(
                params, training.state, key, batch.x, is_training=True
            )
            return common.cross_entropy(logits, batch.y), state

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(training.params)
        updates, opt_state = optimiser.update(grads, training.optimiser)
        params = optax.apply_updates(training.params, updates)
        return HaikuState(params, state, opt_state), value

    return common.train(
        lambda training, step: update(training, jax.random.key(step), case.batch(step)),
        ported,
        range(config.steps, 2 * config.steps),
        name="Haiku",
    )


def haiku_test_loss(case: Case, training: HaikuState) -> float:
    """The held-out loss in Haiku."""
    apply = jax.jit(case.haiku.apply, static_argnums=4)
    logits, _ = apply(training.params, training.state, None, case.test.x, False)
    return float(common.cross_entropy(logits, case.test.y))


def draw(
    case: Case, before: Losses, after: Losses, held_out: Mapping[str, float]
) -> Figure:
    """Draws the loss in Flax, then in Haiku.

    Args:
      case: For title and scale.
      before: Losses of the first steps, in Flax.
      after: Losses of the other steps, in Haiku.
      held_out: Losses at the join in both frameworks, and at the end.
    """
    join = len(before.training)
    end = join + len(after.training)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    common.draw_smooth(axes, range(join), before.training, "trained in Flax")
    common.draw_smooth(axes, range(join, end), after.training, "trained on in Haiku")
    at = zip((join, join, end), "sxD", held_out.items(), strict=True)
    for step, marker, (name, loss) in at:
        label = f"held out: {loss:.2f} {name}"
        axes.plot(step, loss, f"k{marker}", mfc="none", ms=9, clip_on=0, label=label)
    axes.axvline(join, color="0.3", lw=1)
    labels = {"ylabel": "cross entropy", "yscale": case.yscale, "xlim": (0, end)}
    common.finish(axes, title=case.title, **labels)
    return figure
