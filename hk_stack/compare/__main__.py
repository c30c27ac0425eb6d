"""Measures layer stacks side by side: `python -m hk_stack.compare`.

Each table runs programs that compute the same, in one process, in alternating rounds:
machines are noisy, ratios within a round much less so. A ratio below 1 is better than
the baseline, the first program of its table. With `--out` every sample is kept, with
the device and the versions.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from absl import app, flags

import hk_stack
from hk_stack.compare import in_haiku, plain

_TABLES = flags.DEFINE_list(
    "tables", ["s4", "recurrence", "init", "depth"], "What to measure."
)
_REPEAT = flags.DEFINE_integer("repeat", 15, "Rounds of each table.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "A JSON file for all samples.")

Run = Callable[[], Any]


class Program(NamedTuple):
    """Something to measure: `function(*args)` under `jit`."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]


def main(argv: list[str]) -> None:
    """Measures and prints the tables that were asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    known = {"s4": s4, "recurrence": recurrence, "init": init, "depth": depth}
    unknown = sorted(set(_TABLES.value) - set(known))
    if unknown:
        raise app.UsageError(f"--tables: {unknown} not among {sorted(known)}")
    if _OUT.value:
        _check_writable(pathlib.Path(_OUT.value))
    result = {"environment": environment(), "tables": {}}
    for name in _TABLES.value:
        result["tables"] |= known[name](_REPEAT.value)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + "\n")


def _check_writable(path: pathlib.Path) -> None:
    """Fails before hours of measuring, not after."""
    try:
        path.touch()
    except OSError as error:
        raise app.UsageError(f"--out: cannot write {path}: {error.strerror}") from None


def environment() -> dict[str, Any]:
    """The device and the versions that a result belongs to."""
    packages = ("dm-haiku", "jax", "jaxlib", "flax")
    versions = {name: _version(name) for name in packages}
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {"hk_stack": hk_stack.__version__} | versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def s4(repeat: int) -> dict[str, Any]:
    """Eight S4 blocks: 64 features, 32 states, length 512, batch 4."""
    layers, states, shape = 8, 32, (4, 512, 64)
    x = jax.random.normal(jax.random.key(0), shape)

    def stack(layer_stack: Callable[..., Any], **options: Any) -> hk.Transformed:
        return hk.transform(
            functools.partial(
                in_haiku.s4_stack,
                layer_stack=layer_stack,
                num_layers=layers,
                state_size=states,
                **options,
            )
        )

    params = stack(hk_stack.layer_stack).init(jax.random.key(1), x)
    in_stacks = {
        "hk.layer_stack": stack(hk.layer_stack),
        "hk_stack inline": stack(hk_stack.layer_stack, setup="inline"),
        "hk_stack auto": stack(hk_stack.layer_stack),
    }
    programs = [
        *_linen_s4(layers, states, x),
        *(
            Program(name, lambda p, x, m=model: m.apply(p, None, x), (params, x))
            for name, model in in_stacks.items()
        ),
        Program("by hand, setup in the loop", plain.scan_inside, (params, x)),
        Program("by hand, setup first", plain.setup_first, (params, x)),
        Program("by hand, layer by layer", plain.setup_layer_by_layer, (params, x)),
    ]
    return _forward_and_gradient("s4", programs, repeat)


def recurrence(repeat: int) -> dict[str, Any]:
    """Sixteen layers whose setup is 1,024 small steps in sequence."""
    layers, states, length, width = 16, 64, 1024, 16

    def layer(x: jax.Array) -> jax.Array:
        decay = hk.get_parameter("decay", [states], init=hk.initializers.RandomNormal())
        b = hk.get_parameter("b", [states], init=hk.initializers.RandomNormal(0.1))
        rate = jax.nn.sigmoid(decay)
        _, kernel = jax.lax.scan(
            lambda state, _: (state * rate, jnp.sum(state)), b, length=length
        )
        spectrum = jnp.fft.rfft(kernel, n=2 * length)[None, :, None]
        y = jnp.fft.irfft(jnp.fft.rfft(x, n=2 * length, axis=1) * spectrum, axis=1)
        return x + jnp.tanh(y[:, :length])

    def model(layer_stack: Callable[..., Any]) -> hk.Transformed:
        return hk.transform(lambda x: layer_stack(layers)(layer)(x))

    x = jax.random.normal(jax.random.key(0), (1, length, width))
    params = model(hk_stack.layer_stack).init(jax.random.key(1), x)
    models = {
        "hk.layer_stack": model(hk.layer_stack),
        "hk_stack inline": model(
            functools.partial(hk_stack.layer_stack, setup="inline")
        ),
        "hk_stack auto": model(hk_stack.layer_stack),
    }
    programs = [
        Program(name, lambda p, x, m=m: m.apply(p, None, x), (params, x))
        for name, m in models.items()
    ]
    return _forward_and_gradient("recurrence", programs, repeat)


def init(repeat: int) -> dict[str, Any]:
    """Initialisation of 48 layers of width 256: eager, and under `jit`."""
    tables = {}
    for kind in ("transformer", "s4"):
        models = {
            "hk.layer_stack": _wide(hk.layer_stack, 48, kind),
            "hk_stack auto": _wide(hk_stack.layer_stack, 48, kind),
        }
        key, x = jax.random.key(0), jnp.ones([1, 64, 256])
        programs = [Program(n, m.init, (key, x)) for n, m in models.items()]
        name = f"init, {kind}, eager, after the first call"
        rounds = max(3, repeat // 4)
        runs = [(p.name, functools.partial(p.function, *p.args)) for p in programs]
        tables[name] = _steady(runs, rounds)
        _print(name, tables[name])
        tables |= _jitted(f"init, {kind}, jit", programs, repeat)
    return tables


def depth(repeat: int) -> dict[str, Any]:
    """How trace and compile of a jitted init grow with depth."""
    args = (jax.random.key(0), jnp.ones([1, 64, 256]))
    programs = [
        Program(f"{n} layers", _wide(hk_stack.layer_stack, n, "transformer").init, args)
        for n in (4, 64)
    ]
    return _jitted("init by depth", programs, repeat)


def _wide(layer_stack: Callable[..., Any], layers: int, kind: str) -> hk.Transformed:
    stack = {
        "transformer": functools.partial(in_haiku.transformer_stack, num_heads=4),
        "s4": functools.partial(in_haiku.s4_stack, state_size=32),
    }[kind]
    return hk.transform(lambda x: stack(x, layer_stack=layer_stack, num_layers=layers))


def _linen_s4(layers: int, states: int, x: jax.Array) -> list[Program]:
    try:
        from hk_stack.compare import in_linen
    except ImportError as error:
        print(f"Without Flax: {error}", file=sys.stderr)
        return []
    block = functools.partial(in_linen.S4Block, state_size=states)
    model = in_linen.STACKS["scan"](block, layers)
    return [Program("Flax nn.scan", model.apply, (model.init(jax.random.key(1), x), x))]


def _forward_and_gradient(
    name: str, programs: list[Program], repeat: int
) -> dict[str, Any]:
    def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda params, x: jnp.mean(function(params, x) ** 2))

    gradients = [p._replace(function=gradient(p.function)) for p in programs]
    forward = _jitted(f"{name}, forward", programs, repeat)
    return forward | _jitted(f"{name}, gradient", gradients, repeat)


def _jitted(name: str, programs: list[Program], repeat: int) -> dict[str, Any]:
    """Trace, compile, temporary memory and run time of `programs` under `jit`."""
    builds = [[_build(p) for p in programs] for _ in range(min(repeat, 5))]
    compiled = [build.compiled for build in builds[-1]]
    runs = [
        (p.name, functools.partial(c, *p.args))
        for p, c in zip(programs, compiled, strict=True)
    ]
    table = _steady(runs, repeat)
    for i, p in enumerate(programs):
        table[p.name] |= {
            "temp_bytes": [compiled[i].memory_analysis().temp_size_in_bytes],
            "trace_s": [build[i].trace_s for build in builds],
            "compile_s": [build[i].compile_s for build in builds],
        }
    _print(name, table)
    return {name: table}


class _Build(NamedTuple):
    compiled: Any
    trace_s: float
    compile_s: float


def _build(program: Program) -> _Build:
    """Traces and compiles from scratch."""
    # A new function, as JAX remembers what it traced.
    function = jax.jit(lambda *args: program.function(*args))
    start = time.perf_counter()
    traced = function.trace(*program.args)
    middle = time.perf_counter()
    compiled = traced.lower().compile()
    return _Build(compiled, middle - start, time.perf_counter() - middle)


def _steady(runs: Sequence[tuple[str, Run]], repeat: int) -> dict[str, dict[str, Any]]:
    """Seconds of each run in `repeat` alternating rounds, after one that is dropped."""
    samples: dict[str, list[float]] = {name: [] for name, _ in runs}
    for i in range(repeat + 1):
        for name, run in runs:
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i:
                samples[name].append(time.perf_counter() - start)
    return {name: {"run_s": seconds} for name, seconds in samples.items()}


def _print(title: str, table: dict[str, dict[str, Any]]) -> None:
    """Prints each measure of each program, and its ratio to the first program."""
    rows = list(table.values())
    columns = [column for column in _COLUMNS if column.key in rows[0]]
    print(f"\n{title}")
    print(" " * 28 + "".join(f"{c.title:>11}{'ratio':>7}" for c in columns))
    for name, row in table.items():
        cells = [(c.value(row) * c.scale, c.ratio(row, rows[0])) for c in columns]
        print(
            f"{name:28}" + "".join(f"{v:11.4g}{r:7.2f}" for v, r in cells), flush=True
        )


class _Column(NamedTuple):
    """A measure: its key in a row and how it is shown; samples become their median."""

    key: str
    title: str
    scale: float

    def value(self, row: dict[str, Any]) -> float:
        return statistics.median(row[self.key])

    def ratio(self, row: dict[str, Any], first: dict[str, Any]) -> float:
        """Middle of the ratios within each round."""
        pairs = zip(row[self.key], first[self.key], strict=True)
        return statistics.median([a / b if b else 1.0 for a, b in pairs])


_COLUMNS = (
    _Column("run_s", "run ms", 1e3),
    _Column("temp_bytes", "temp MB", 1e-6),
    _Column("trace_s", "trace s", 1.0),
    _Column("compile_s", "compile s", 1.0),
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    app.run(main)
