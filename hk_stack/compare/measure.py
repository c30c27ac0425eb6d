"""What one program costs: to trace, lower and compile it, to hold it, and to run it."""

import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex

from hk_stack import _equations

Run = Callable[[], Any]


class Program(NamedTuple):
    """Something to measure: `function(*args)` under `jit`."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]


class Build(NamedTuple):
    """A program, made from scratch.

    Attributes:
      run: The compiled function, which takes the arguments.
      seconds: To trace, lower and compile, by the names in `results.MEASURES`.
      sizes: What XLA and the jaxpr say of it, by the same names.
    """

    run: Callable[..., Any]
    seconds: Mapping[str, float]
    sizes: Mapping[str, float]


def build(program: Program) -> Build:
    """Traces, lowers and compiles a program."""
    # A new function, as JAX remembers what it traced.
    function = jax.jit(lambda *args: program.function(*args))
    gc.collect()  # Not in one of the phases.
    times = [time.perf_counter()]
    traced = function.trace(*program.args)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    names = ("trace_s", "lower_s", "compile_s")
    spent = (end - start for start, end in itertools.pairwise(times))
    sizes = {
        "equations": number_of_equations(traced.jaxpr.jaxpr),
        "hlo_bytes": len(lowered.as_text()),
        **_memory(compiled),
        **_cost(compiled),
    }
    return Build(compiled, dict(zip(names, spent, strict=True)), sizes)


def warm_up(program: Program) -> None:
    """Traces what programs have in common, which JAX keeps, and the first would pay."""
    jax.jit(lambda *args: program.function(*args)).lower(*program.args)


def number_of_equations(jaxpr: jex.Jaxpr) -> int:
    """All equations of a jaxpr, with those inside of others."""
    return sum(
        1 + sum(map(number_of_equations, _equations.bodies(eqn))) for eqn in jaxpr.eqns
    )


def _memory(compiled: Any) -> dict[str, float]:
    found = compiled.memory_analysis()  # None where the backend cannot tell.
    kinds = ("temp", "argument", "output") if found is not None else ()
    return {f"{kind}_bytes": getattr(found, f"{kind}_size_in_bytes") for kind in kinds}


def _cost(compiled: Any) -> dict[str, float]:
    found = compiled.cost_analysis() or {}
    names = {"flops": "flops", "bytes accessed": "accessed_bytes"}
    return {ours: found[xla] for xla, ours in names.items() if xla in found}


def peak_bytes() -> int | None:
    """Most device memory that this process has held; None if the backend keeps none."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [
        stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats
    ]
    return max(peaks, default=None)


def seconds(run: Run, calls: int = 1) -> float:
    """Mean time of a call, until its result is there."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / calls


class Failed(Exception):
    """A run that failed in `steady`: its name, and the error as `__cause__`."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def steady(
    runs: Sequence[tuple[str, Run]],
    repeat: int,
    shortest: float = 0.0,
    samples: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each run in `repeat` alternating rounds, after two that are dropped.

    Args:
      runs: Names, and what to run.
      repeat: The number of rounds.
      shortest: A round calls a run as often as it takes to last this long, in seconds.
      samples: A dictionary to put them in: what is there if a round is interrupted.

    Raises:
      Failed: If a run fails.
    """
    samples = {} if samples is None else samples
    calls = {
        name: 1 + int(shortest / min(_named(name, run), _named(name, run)))
        for name, run in runs
    }
    rng = np.random.default_rng(0)
    for _ in range(repeat):
        # Each time in another order: no run always follows the same one.
        for i in rng.permutation(len(runs)):
            name, run = runs[i]
            samples.setdefault(name, []).append(_named(name, run, calls[name]))
    return {name: samples[name] for name, _ in runs}


def _named(name: str, run: Run, calls: int = 1) -> float:
    try:
        return seconds(run, calls)
    except Exception as error:
        raise Failed(name) from error
