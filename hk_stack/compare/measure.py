"""Measures a case: builds it in each way, checks that all agree, then runs in rounds.

What fails in one way is written down, and the other ways go on.
"""

import functools
import gc
import importlib.metadata
import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.extend import core as jex

import hk_stack
from hk_stack import _equations
from hk_stack.compare import cases, results

Run = Callable[[], Any]
_T = TypeVar("_T")


def build(task: cases.Task) -> tuple[Callable[..., Any], dict[str, float]]:
    """Traces, lowers and compiles a program.

    Returns:
      The compiled function, and measures: times of the three steps, and what XLA and
      the jaxpr say of it.
    """
    function = _jitted(task)
    gc.collect()  # Not in one of the phases.
    times, processor = [time.perf_counter()], time.process_time()
    traced = function.trace(*task.args)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    processor = time.process_time() - processor
    names = ("trace_s", "lower_s", "compile_s")
    spent = (end - start for start, end in itertools.pairwise(times))
    return compiled, {
        **dict(zip(names, spent, strict=True)),
        "build_cpu_s": processor,
        "equations": number_of_equations(traced.jaxpr.jaxpr),
        "hlo_bytes": len(lowered.as_text()),
        **_analysed(compiled),
    }


def _jitted(task: cases.Task) -> Any:
    # A new function, as JAX remembers what it traced.
    return jax.jit(lambda *args: task.function(*args))


def number_of_equations(jaxpr: jex.Jaxpr) -> int:
    """All equations of a jaxpr, with those inside of others."""
    return sum(1 for _ in _equations.with_inner(jaxpr.eqns))


def _analysed(compiled: Any) -> dict[str, float]:
    """What XLA says of a program, if the backend can tell, and what a device has held.

    On a GPU or TPU that is the most of the process so far; a CPU does not know.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    sizes = {
        f"{kind}_bytes": getattr(memory, f"{kind}_size_in_bytes")
        for kind in ("temp", "argument", "output")
        if memory is not None
    }
    names = {"flops": "flops", "bytes accessed": "accessed_bytes"}
    sizes |= {ours: cost[xla] for xla, ours in names.items() if xla in cost}
    held = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [x["peak_bytes_in_use"] for x in held if "peak_bytes_in_use" in x]
    return sizes | ({"peak_bytes": max(peaks)} if peaks else {})


def seconds(run: Run, times: int = 1) -> float:
    """Mean time of a run, until its result is there."""
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / times


class Options(NamedTuple):
    """How to measure.

    Attributes:
      repeat: Rounds in all.
      builds: How often to build anew, at most.
      patience: Seconds; what took longer to compile is not built again.
      shortest: Seconds that a sample takes at least.
    """

    repeat: int
    builds: int = 1
    patience: float = 10.0
    shortest: float = 0.005


class Measured(NamedTuple):
    """What came of a case.

    Attributes:
      rows: A row for each way.
      failed: What failed.
      is_stopped: Whether it was interrupted; then the rows hold what there was.
    """

    rows: list[results.Row]
    failed: list[results.Failure]
    is_stopped: bool


def measured(
    case: results.Case,
    ways: Sequence[tuple[str, str]],
    options: Options,
    tell: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measures a case in some ways, given as pairs of a framework and a way.

    Args:
      case: What to measure.
      ways: In which ways.
      options: How.
      tell: Is told what is done, never within a round.
    """
    ways_of = _Ways(case, options)
    is_stopped = False
    try:
        ways_of.build(ways, tell)
        tell("rounds")
        for i, rounds in enumerate(_split(options.repeat, options.builds)):
            if i:
                ways_of.each(_Way.build)
            ways_of.rounds("run_s", rounds)
        ways_of.each(_Way.first_without_jit)
        rounds = options.repeat
        if case.mode == "init":  # Each may compile anew.
            rounds = max(2, rounds // 5)
        ways_of.rounds("eager_s", rounds)
    except KeyboardInterrupt:
        is_stopped = True
    rows = [way.row() for way in ways_of.built.values()]
    rows = [row for row in rows if {"run_s", "eager_s"} & row.measures.keys()]
    failed = [results.Failure(case, *pair) for pair in ways_of.failed.items()]
    return Measured(rows, failed, is_stopped)


def _split(repeat: int, builds: int) -> list[int]:
    """Rounds for each build."""
    parts = np.array_split(np.arange(repeat), min(repeat, builds))
    return [len(part) for part in parts]


class _Ways:
    """The ways of doing a case: those that are built, and why others failed."""

    def __init__(self, case: results.Case, options: Options):
        self.case, self.options = case, options
        self.built: dict[str, _Way] = {}
        self.failed: dict[str, str] = {}

    def build(
        self, ways: Sequence[tuple[str, str]], tell: Callable[[str], None]
    ) -> None:
        """Builds each way, and checks it against the first that there is."""
        expected: dict[str, Any] = {}

        def build(name: str, *pair: str) -> None:
            task = cases.task(self.case, *pair)
            if task is None:
                return
            way = _Way(self.case, name, task, self.options)
            values = task.values(way.program)
            if not expected:
                expected.update(cases.finite(values))
            way.parity = cases.parity(values, expected, self.case.dtype)
            self.built[name] = way

        for pair in ways:
            name = " ".join(pair)
            tell(name)
            self._try(name, functools.partial(build, name, *pair))

    def each(self, do: "Callable[[_Way], None]") -> None:
        """Does something with each way."""
        for name, way in list(self.built.items()):
            self._try(name, functools.partial(do, way))

    def rounds(self, measure: str, count: int) -> None:
        """Runs all in alternating rounds, after two that are dropped.

        A round repeats a run as often as it takes to last `shortest` seconds. Rounds
        that are over are kept, also if a later one is interrupted.
        """
        shortest = self.options.shortest if measure == "run_s" else 0.0
        timers: dict[str, Callable[[], float]] = {}

        def prepare(way: _Way) -> None:
            if run := way.runs(measure):
                fastest = min(seconds(run), seconds(run))
                times = 1 + int(shortest / fastest)
                timers[way.name] = functools.partial(seconds, run, times)

        self.each(prepare)
        samples: dict[str, list[float]] = {name: [] for name in timers}
        rng = np.random.default_rng(0)
        try:
            for _ in range(count):
                able = [name for name in timers if name in self.built]
                # Each time in another order: no run always follows the same one.
                order = rng.permutation(able).tolist()
                spent = {name: self._try(name, timers[name]) for name in order}
                for name in able:
                    samples[name].append(spent[name] or 0.0)
        finally:
            for name in samples.keys() & self.built.keys():
                if samples[name]:
                    self.built[name].add(measure, samples[name])

    def _try(self, name: str, do: Callable[[], _T]) -> _T | None:
        """What a way does; one that fails is left out of all that follows."""
        try:
            return do()
        except Exception as error:
            self.failed[name] = _first_line(error)
            self.built.pop(name, None)
            return None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]


class _Way:
    """A way of doing a case, and its samples so far."""

    def __init__(
        self, case: results.Case, name: str, task: cases.Task, options: Options
    ):
        self.case, self.name = case, name
        self.task, self.options = task, options
        self.measures: dict[str, list[Any]] = {}
        self.parity: dict[str, float] = {}
        self.program = task.function
        if task.is_compiled:
            # What programs have in common JAX keeps, and the first would pay for it.
            _jitted(task).lower(*task.args)
        self.build()
        if task.temp_bytes is not None:
            self.measures["temp_bytes"] = [task.temp_bytes()]

    def build(self) -> None:
        """Builds anew, unless that would take too long."""
        last = self.measures.get("compile_s", [0.0])[-1]
        if not self.task.is_compiled or last > self.options.patience:
            return
        self.program, found = build(self.task)
        found["first_s"] = seconds(lambda: self.program(*self.task.args))
        for name, value in found.items():
            if not name.endswith("_s"):  # Sizes are the same each time.
                self.measures.pop(name, None)
            self.add(name, value)

    def first_without_jit(self) -> None:
        """The first run outside of `jit`, if there are any."""
        if run := self.runs("eager_s"):
            self.add("eager_first_s", seconds(run))

    def runs(self, measure: str) -> Run | None:
        """What is measured by `run_s` or by `eager_s`; None if that is not."""
        task = self.task
        if measure == "run_s":
            return (lambda: self.program(*task.args)) if task.is_compiled else None
        is_eager = not task.is_compiled or self.case.mode == "init"
        return (lambda: task.function(*task.args)) if is_eager else None

    def add(self, measure: str, value: Any) -> None:
        self.measures.setdefault(measure, []).append(value)

    def row(self) -> results.Row:
        return results.Row(self.case, self.name, self.measures, self.parity)


_PACKAGES = ("dm-haiku", "jax", "jaxlib", "flax", "equinox", "optax")


def environment() -> dict[str, Any]:
    """The device and the versions that a result belongs to."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {"hk_stack": hk_stack.__version__}
        | {name: _version(name) for name in _PACKAGES},
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
