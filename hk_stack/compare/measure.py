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
from typing import Any, TypeVar

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


# Seconds: a sample takes the first at least; what took more than the second to compile
# is not built again.
SHORTEST, PATIENCE = 0.005, 10.0


def measured(
    result: results.Result,
    case: results.Case,
    ways: Sequence[tuple[str, str]],
    repeat: int,
    builds: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> bool:
    """Measures a case in some ways: adds rows to a result, and what failed.

    Args:
      result: Of the command so far.
      case: What to measure.
      ways: Pairs of a framework and a way.
      repeat: Rounds in all.
      builds: How often to build anew, at most.
      tell: Is told what is done, never within a round.

    Returns:
      Whether it was interrupted; then the rows hold what there was.
    """
    ways_of = _Ways(case, result.failed)
    is_stopped = False
    try:
        ways_of.build(ways, tell)
        tell("rounds")
        for i, part in enumerate(np.array_split(range(repeat), min(repeat, builds))):
            if i:
                ways_of.each(_Way.build)
            ways_of.rounds("run_s", len(part))
        if case.mode == "init":  # Each may compile anew.
            repeat = max(2, repeat // 5)
        ways_of.rounds("eager_s", repeat)
    except KeyboardInterrupt:
        is_stopped = True
    rows = [way.row for way in ways_of.built.values()]
    result.rows.extend(x for x in rows if {"run_s", "eager_s"} & x.measures.keys())
    return is_stopped


class _Ways:
    """The ways of doing a case that are built; the failures of others go to a list."""

    def __init__(self, case: results.Case, failed: list[results.Failure]):
        self.case, self.failed = case, failed
        self.built: dict[str, _Way] = {}

    def build(
        self, ways: Sequence[tuple[str, str]], tell: Callable[[str], None]
    ) -> None:
        """Builds each way, and checks it against the first that there is."""
        expected: dict[str, Any] = {}

        def build(name: str, *pair: str) -> None:
            task = cases.task(self.case, *pair)
            if task is None:
                return
            way = _Way(self.case, name, task)
            values = task.values(way.program)
            if not expected:
                expected.update(cases.finite(values))
            way.row.parity.update(cases.parity(values, expected, self.case.dtype))
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

        A round repeats a run as often as it takes to last `SHORTEST` seconds. Rounds
        that are over are kept, also if a later one is interrupted.
        """
        timers: dict[str, Callable[[], float]] = {}

        def prepare(way: _Way) -> None:
            if not (run := way.runs(measure)):
                return
            first, times = seconds(run), 1
            again = seconds(run)
            if measure == "run_s":
                times += int(SHORTEST / min(first, again))
            else:
                way.add("eager_first_s", first)
            timers[way.row.way] = functools.partial(seconds, run, times)

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
            text = f"{type(error).__name__}: {error}".strip()
            line = text.splitlines()[0][:500]
            self.failed.append(results.Failure(self.case, name, line))
            self.built.pop(name, None)
            return None


class _Way:
    """A way of doing a case: its program, and a row with its samples so far."""

    def __init__(self, case: results.Case, name: str, task: cases.Task):
        self.row = results.Row(case, name, {}, {})
        self.task, self.program = task, task.function
        if task.is_compiled:
            # What programs have in common JAX keeps, and the first would pay for it.
            _jitted(task).lower(*task.args)
        self.build()
        if task.temp_bytes is not None:
            self.add("temp_bytes", task.temp_bytes())

    def build(self) -> None:
        """Builds anew, unless that would take too long."""
        last = self.row.measures.get("compile_s", [0.0])[-1]
        if not self.task.is_compiled or last > PATIENCE:
            return
        self.program, found = build(self.task)
        found["first_s"] = seconds(lambda: self.program(*self.task.args))
        for name, value in found.items():
            if not name.endswith("_s"):  # Sizes are the same each time.
                self.row.measures.pop(name, None)
            self.add(name, value)

    def runs(self, measure: str) -> Run | None:
        """What is measured by `run_s` or by `eager_s`; None if that is not."""
        task = self.task
        if measure == "run_s":
            return (lambda: self.program(*task.args)) if task.is_compiled else None
        is_eager = not task.is_compiled or self.row.case.mode == "init"
        return (lambda: task.function(*task.args)) if is_eager else None

    def add(self, measure: str, value: Any) -> None:
        self.row.measures.setdefault(measure, []).append(value)


_PACKAGES = ("dm-haiku", "jax", "jaxlib", "flax", "equinox", "optax")


def environment() -> dict[str, Any]:
    """The device and the versions that a result belongs to."""
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {"hk_stack": hk_stack.__version__}
        | {name: installed.get(name) for name in _PACKAGES},
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": time.strftime("%Y-%m-%d"),
    }
