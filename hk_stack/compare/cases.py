"""Runs a case: builds it in each way, checks that all agree, then measures in rounds.

What fails in one way is written down, and the other ways go on.
"""

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hk_stack.compare import in_haiku, measure, models
from hk_stack.compare.results import Case, Row

MODES = ("init", "fwd", "grad", "train", "decode")

# The largest difference between two ways, over the largest value: of outputs, losses
# and activations, and of gradients. Sums in another order; the S4 kernel adds most.
# Leaves of which the gradient is small (zero but for rounding, often) are held against
# a part of the largest of the others.
TOLERANCES = {
    "float64": {"output": 1e-9, "gradient": 1e-7, "smallest": 1e-3},
    "float32": {"output": 1e-4, "gradient": 2e-3, "smallest": 1e-3},
    "bfloat16": {"output": 5e-2, "gradient": 2e-1, "smallest": 1e-1},
}


class Task(NamedTuple):
    """A program, and what its results are compared by.

    Attributes:
      program: What is measured.
      values: From the compiled program to values by the names in `TOLERANCES`, and
        "shapes", which have to be equal.
    """

    program: measure.Program
    values: Callable[[Callable[..., Any]], dict[str, Any]]


class Options(NamedTuple):
    """How to measure.

    Attributes:
      repeat: Rounds in all.
      builds: How often to build anew, at most.
      patience: Seconds; what took longer to compile is not built again.
      fresh: Whether each build is timed in a process of its own.
      shortest: Seconds that a sample takes at least.
    """

    repeat: int
    builds: int = 1
    patience: float = 10.0
    fresh: bool = False
    shortest: float = 0.005


class Measured(NamedTuple):
    """What came of a case.

    Attributes:
      rows: A row for each way.
      failed: Ways that failed, and why.
      is_stopped: Whether it was interrupted; then the rows hold what there was.
    """

    rows: list[Row]
    failed: dict[str, str]
    is_stopped: bool


def reason(case: Case) -> str:
    """Why a case cannot be run at all; "" if it can."""
    model = models.MODELS[case.model]
    if case.dtype not in model.dtypes:
        return f"{case.model} runs in {' or '.join(model.dtypes)}, not {case.dtype}"
    if case.mode == "decode" and not model.decodes:
        able = ", ".join(name for name, m in models.MODELS.items() if m.decodes)
        return f"{case.model} does not decode; {able} does"
    if case.mode == "init" and case.dtype != "float32":
        return f"init makes parameters in float32, not {case.dtype}"
    return ""


def measured(
    case: Case,
    ways: Sequence[tuple[str, str]],
    options: Options,
    tick: Callable[[str], None] = lambda way: None,
) -> Measured:
    """Measures a case in some ways, given as pairs of a framework and a way.

    Args:
      case: What to do.
      ways: By what.
      options: How to measure.
      tick: Called with each way before it is built for the first time.
    """
    failed: dict[str, str] = {}
    built: dict[str, _Built] = {}
    is_stopped = False
    try:
        _build_all(case, ways, options, tick, built, failed)
        for i, count in enumerate(_split(options.repeat, options.builds)):
            if i:
                _for_each(built, failed, _Built.build)
            rounds(built, failed, lambda b: b.run, "run_s", count, options.shortest)
        if case.mode == "init":
            _eager(built, failed, options)
    except KeyboardInterrupt:
        is_stopped = True
    rows = [one.row() for one in built.values() if "run_s" in one.measures]
    return Measured(rows, failed, is_stopped)


def _build_all(
    case: Case,
    ways: Sequence[tuple[str, str]],
    options: Options,
    tick: Callable[[str], None],
    built: dict[str, "_Built"],
    failed: dict[str, str],
) -> None:
    """Builds each way, and checks it against the first that there is."""
    expected: dict[str, Any] | None = None
    for framework, way in ways:
        name = f"{framework} {way}"
        tick(name)
        try:
            found = task(case, framework, way)
            if found is None:
                continue
            one = _Built(case, framework, way, found, options)
            values = one.values()
            expected = expected or _finite(values)
            one.check(values, expected)
            built[name] = one
        except Exception as error:
            failed[name] = _first_line(error)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the first way, which all others are held against."""
    for name, tree in values.items():
        if name != "shapes" and not all(
            bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree)
        ):
            raise ValueError(f"its {name} is not finite; not measured")
    return values


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]


def _split(repeat: int, builds: int) -> list[int]:
    """Rounds for each build."""
    builds = min(repeat, builds)
    return [len(part) for part in np.array_split(np.arange(repeat), builds)]


class _Built:
    """A way of doing a case, and its samples so far."""

    def __init__(
        self, case: Case, framework: str, way: str, task: Task, options: Options
    ):
        self.case, self.framework, self.way = case, framework, way
        self.task, self.options = task, options
        self.measures: dict[str, list[Any]] = {}
        self.parity: dict[str, float] = {}
        measure.warm_up(task.program)
        self.build()

    def build(self) -> None:
        """Builds anew, unless that would take too long."""
        last = self.measures.get("compile_s")
        if last and last[-1] > self.options.patience:
            return
        built = measure.build(self.task.program)
        self._compiled = built.run
        if self.options.fresh:
            built = built._replace(seconds=_in_fresh_process(self))
        first = measure.seconds(self.run)
        for name, value in (*built.seconds.items(), ("first_s", first)):
            self.add(name, value)
        self.measures |= {name: [value] for name, value in built.sizes.items()}
        peak = measure.peak_bytes()
        if peak is not None:
            self.measures["peak_bytes"] = [peak]

    def run(self) -> Any:
        return self._compiled(*self.task.program.args)

    def values(self) -> dict[str, Any]:
        return self.task.values(self._compiled)

    def add(self, measure: str, value: Any) -> None:
        self.measures.setdefault(measure, []).append(value)

    def check(self, values: dict[str, Any], expected: dict[str, Any]) -> None:
        """Raises if values differ from those of the first way."""
        tolerance = TOLERANCES[self.case.dtype]
        for name, value in values.items():
            if value is expected[name]:
                continue
            if name == "shapes":
                _check_same(value, expected[name])
                continue
            difference = largest_difference(
                value, expected[name], tolerance["smallest"]
            )
            if not difference <= tolerance[name]:
                raise ValueError(
                    f"its {name} differs from that of the first way by "
                    f"{difference:.2g} of the largest value, more than "
                    f"{tolerance[name]}; not measured"
                )
            self.parity[name] = difference

    def row(self) -> Row:
        return Row(
            self.case, f"{self.framework} {self.way}", self.measures, self.parity
        )


def _check_same(shapes: Any, expected: Any) -> None:
    if shapes != expected:
        raise ValueError(
            "its initial parameters are not those of the first way in names and shapes"
        )


def largest_difference(tree: Any, expected: Any, smallest: float) -> float:
    """The largest between leaves, over the largest value of the leaf.

    Or over a part of that of all leaves, `smallest`, if this is more.
    """
    shapes = [jax.tree.map(jnp.shape, _plain(t)) for t in (tree, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"not of the same names and shapes: {shapes}")
    tree, expected = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(_plain(t))]
        for t in (tree, expected)
    )
    largest = [np.max(np.abs(leaf), initial=0.0) for leaf in expected]
    scale = [max(x, smallest * max(largest), 1e-30) for x in largest]
    found = [
        np.max(np.abs(a - b), initial=0.0) / s
        for a, b, s in zip(tree, expected, scale, strict=True)
    ]
    return float(np.max(found))


def _plain(tree: Any) -> Any:
    """With one order of keys."""
    if hasattr(tree, "items"):
        return {key: _plain(value) for key, value in sorted(tree.items())}
    return tree


def _for_each(
    built: dict[str, _Built], failed: dict[str, str], do: Callable[[_Built], Any]
) -> None:
    for name, one in list(built.items()):
        try:
            do(one)
        except Exception as error:
            failed[name] = _first_line(error)
            del built[name]


def rounds(
    built: dict[str, _Built],
    failed: dict[str, str],
    get: Callable[[_Built], measure.Run],
    name: str,
    count: int,
    shortest: float,
) -> None:
    """Alternating rounds; a way that fails in one is left out of all."""
    while built:
        runs = [(way, get(one)) for way, one in built.items()]
        samples: dict[str, list[float]] = {}
        try:
            measure.steady(runs, count, shortest, samples)
        except measure.Failed as error:
            failed[error.name] = _first_line(error.__cause__ or error)
            del built[error.name]
            continue
        finally:
            if len(samples) == len(built) == len(runs):  # Also if interrupted.
                for way, found in samples.items():
                    built[way].add(name, found)
        return


def _eager(built: dict[str, _Built], failed: dict[str, str], options: Options) -> None:
    """The first call without `jit`, and some more: each may compile anew."""

    def eager(one: _Built) -> measure.Run:
        program = one.task.program
        return lambda: program.function(*program.args)

    def first(one: _Built) -> None:
        one.add("eager_first_s", measure.seconds(eager(one)))

    _for_each(built, failed, first)
    rounds(built, failed, eager, "eager_s", max(2, options.repeat // 5), 0.0)


def _in_fresh_process(built: _Built) -> dict[str, float]:
    """Times of a build in a process that has built nothing before."""
    # A GPU has two processes then: none may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        done = pool.submit(fresh_build, built.case, built.framework, built.way)
        return done.result()


def fresh_build(case: Case, framework: str, way: str) -> dict[str, float]:
    """What `measure.build` finds of a way, in this process."""
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    jax.config.update("jax_enable_compilation_cache", False)
    found = task(case, framework, way)
    assert found is not None, (case, framework, way)
    return dict(measure.build(found.program).seconds)


# From a case to programs


def task(case: Case, framework: str, way: str) -> Task | None:
    """What to measure of a case in a way; None if there is no such thing."""
    model = models.MODELS[case.model]
    params, x = _inputs(case)
    module = models.framework(framework)
    whole = _split_batch(case.batch)
    if case.mode == "decode":
        decoder = module.decoder(way, model, case.layers, params, x)
        if decoder is None:
            return None
        known = jax.device_put(decoder.known, whole)
        return _decode(decoder._replace(known=known), x[:, 0])
    stack = module.stack(way, model, case.layers, params, x)
    if stack is None:
        return None
    stack = stack._replace(params=jax.device_put(stack.params, whole))
    return _TASKS[case.mode](stack, x)


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[models.Params, jax.Array]:
    """Parameters of Haiku's stack and activations, the same for all ways.

    On several devices, the batch is split over as many as divide it.
    """
    model = models.MODELS[case.model]
    dtype = jnp.dtype(case.dtype)
    shape = (case.batch, case.length, model.width)
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    layers = hk.layer_stack(case.layers, name="layers")
    init = jax.jit(in_haiku.network(model, layers).init)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), init(jax.random.key(1), x))
    x = jax.device_put(x.astype(dtype), _split_batch(case.batch, axis=0))
    return jax.device_put(params, _split_batch(case.batch)), x


def _split_batch(batch: int, axis: int | None = None) -> jax.NamedSharding:
    """Over as many devices as divide a batch; without an axis, whole on each."""
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((_devices(batch),), ("batch",), axis_types=(auto,))
    parts = [None] * axis + ["batch"] if axis is not None else []
    return jax.NamedSharding(mesh, jax.P(*parts))


def _devices(batch: int) -> int:
    return max(n for n in range(1, jax.device_count() + 1) if batch % n == 0)


def _forward(stack: models.Stack, x: jax.Array) -> Task:
    program = measure.Program("fwd", stack.apply, (stack.params, x))
    return Task(program, lambda run: {"output": run(stack.params, x)})


def _loss(stack: models.Stack) -> Callable[[Any, jax.Array], jax.Array]:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        y = stack.apply(params, x)
        return jnp.mean(jnp.square(y.astype(jnp.promote_types(y.dtype, jnp.float32))))

    return loss


def _gradient(stack: models.Stack, x: jax.Array) -> Task | None:
    to_haiku = stack.to_haiku
    if to_haiku is None:
        return None

    def values(run: Callable[..., Any]) -> dict[str, Any]:
        loss, gradient = run(stack.params, x)
        return {"output": loss, "gradient": to_haiku(gradient)}

    function = jax.value_and_grad(_loss(stack))
    return Task(measure.Program("grad", function, (stack.params, x)), values)


def _train(stack: models.Stack, x: jax.Array) -> Task | None:
    """A step of Adam; compared by the losses before and after it."""
    if stack.to_haiku is None:
        return None
    optimiser = optax.adam(1e-3)
    loss = _loss(stack)

    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    def values(run: Callable[..., Any]) -> dict[str, Any]:
        params, state, before = run(*args)
        known = jax.device_put((params, state), _shardings(args[:2]))
        return {"output": [before, run(*known, x)[2]]}

    state = optimiser.init(stack.params)
    state = jax.device_put(state, _split_batch(len(x)))
    args = (stack.params, state, x)
    return Task(measure.Program("train", step, args), values)


def _init(stack: models.Stack, x: jax.Array) -> Task | None:
    init, to_haiku = stack.init, stack.to_haiku
    if init is None or to_haiku is None:
        return None

    def values(run: Callable[..., Any]) -> dict[str, Any]:
        params = to_haiku(run(key, x))
        return {"shapes": jax.tree.map(jnp.shape, _plain(params))}

    key = jax.random.key(2)
    return Task(measure.Program("init", init, (key, x)), values)


def _decode(decoder: models.Decoder, x: jax.Array) -> Task:
    """One step of time; compared by the outputs of the first three."""
    states = jax.device_put(decoder.states, _split_batch(len(x), axis=1))
    args = (decoder.known, x, states)

    def values(run: Callable[..., Any]) -> dict[str, Any]:
        carry, outputs = args[1:], []
        for _ in range(3):
            carry = jax.device_put(run(decoder.known, *carry), _shardings(args[1:]))
            outputs.append(carry[0])
        return {"output": outputs}

    return Task(measure.Program("decode", decoder.step, args), values)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


_TASKS: dict[str, Callable[[models.Stack, jax.Array], Task | None]] = {
    "init": _init,
    "fwd": _forward,
    "grad": _gradient,
    "train": _train,
}


def all_ways(frameworks: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of a framework and a way, of frameworks that are installed."""
    return [(name, way) for name in frameworks for way in models.framework(name).WAYS]
