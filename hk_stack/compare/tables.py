"""Measures what hk_stack itself offers: `python -m hk_stack.compare.tables`.

Where `python -m hk_stack.compare` holds frameworks against each other, this is about
options and functions of this library: reuse, accumulation, batches of setup, ports.
Each table runs programs that compute the same, in one process, in alternating rounds:
machines are noisy, ratios within a round much less so. A ratio below 1 is better than
the baseline, the first program of its table. With `--out` every sample is kept, with
the device and the versions.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

import hk_stack
from hk_stack.compare import deep, in_haiku, in_plain, models, porting
from hk_stack.compare import s4 as s4_maths
from hk_stack.compare.environment import environment
from hk_stack.compare.measure import Program, build, steady


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the tables that were asked for."""
    parser = argparse.ArgumentParser("python -m hk_stack.compare.tables")
    parser.add_argument(
        "--tables", default=",".join(TABLES), help="separated by commas"
    )
    parser.add_argument("--repeat", type=int, default=15, help="rounds of each table")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for all samples")
    said = parser.parse_args(arguments)
    names = said.tables.split(",")
    if unknown := sorted(set(names) - set(TABLES)):
        parser.error(f"--tables: {unknown} not among {sorted(TABLES)}")
    if said.repeat < 1:
        parser.error(f"--repeat: {said.repeat} is less than one")
    if said.out:
        try:  # Before hours of measuring, not after.
            said.out.touch()
        except OSError as error:
            parser.error(f"--out: cannot write {said.out}: {error.strerror}")
    result: dict[str, Any] = {"environment": environment(), "tables": {}}
    for name in names:
        result["tables"] |= TABLES[name](said.repeat)
    if said.out:
        said.out.write_text(json.dumps(result, indent=1) + "\n")


def s4(repeat: int) -> dict[str, Any]:
    """Eight S4 blocks: 64 features, 32 states, length 512, batch 4."""
    params, x = _s4_inputs()
    in_stacks = {
        "hk.layer_stack": _s4(hk.layer_stack),
        "hk_stack inline": _s4(hk_stack.layer_stack, setup="inline"),
        "hk_stack auto": _s4(hk_stack.layer_stack),
    }
    programs = [
        *_linen_s4(x),
        *(_applied(name, model, params, x) for name, model in in_stacks.items()),
        Program("by hand, setup in the loop", in_plain.scan_inside, (params, x)),
        Program("by hand, setup first", in_plain.setup_first, (params, x)),
        Program("by hand, layer by layer", in_plain.setup_layer_by_layer, (params, x)),
    ]
    return _forward_and_gradient("s4", programs, repeat)


def reuse(repeat: int) -> dict[str, Any]:
    """The same blocks from derived values that were computed before."""
    params, x = _s4_inputs()
    tables: dict[str, Any] = {}
    for mode in s4_maths.KERNELS:
        model = _s4(hk_stack.layer_stack, mode=mode)
        split = hk_stack.partition(model.apply, params, None, x)
        derived = split.setup(params)
        block = in_plain.s4_block(mode)
        by_hand = in_plain.setup(params, x.shape[1], block)
        programs = [
            *_linen_s4(x, mode),
            _applied("hk_stack auto", model, params, x),
            Program(
                "by hand, reused",
                lambda d, p, x, block=block: in_plain.call(d, p, x, block),
                (by_hand, params, x),
            ),
            Program(
                "hk_stack.partition, reused",
                lambda d, x, split=split: split.call(d, None, x),
                (derived, x),
            ),
        ]
        tables |= _jitted(f"reuse, {mode}, forward", programs, repeat)
    return tables


def accumulate(repeat: int) -> dict[str, Any]:
    """The mean gradient of these blocks over eight microbatches, for one update."""
    params, x = _s4_inputs()
    batches = jax.random.normal(jax.random.key(2), (8, *x.shape))
    tables: dict[str, Any] = {}
    for mode in s4_maths.KERNELS:
        model = _s4(hk_stack.layer_stack, mode=mode)
        ours = _applied("hk_stack.accumulate", model, params, batches)
        programs = [
            *(_each(p._replace(args=(p.args[0], batches))) for p in _linen_s4(x, mode)),
            _each(ours._replace(name="hk_stack auto, each")),
            ours._replace(
                function=functools.partial(hk_stack.accumulate, _loss(ours.function))
            ),
        ]
        name = f"accumulate, {mode}"
        tables |= _jitted(name, programs, max(5, repeat // 2))
    return tables


def _each(program: Program) -> Program:
    """The mean over microbatches of the gradients, with a setup for each."""
    gradient = jax.value_and_grad(_loss(program.function))

    def run(params: Any, batches: jax.Array) -> Any:
        def step(sums: Any, x: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, x)), None

        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(step, zeros, batches)
        return jax.tree.map(lambda leaf: leaf / len(batches), sums)

    return program._replace(function=run)


def setup(repeat: int) -> dict[str, Any]:
    """Gradients by the size of a batch of setup, and with and without its remat."""
    params, x = _s4_inputs()
    tables: dict[str, Any] = {}
    for mode in s4_maths.KERNELS:
        models = {
            name: _s4(hk_stack.layer_stack, mode=mode, **options)
            for name, options in _setup_options(8)
        }
        programs = [_applied(name, m, params, x) for name, m in models.items()]
        programs = [_gradient(p) for p in (*_linen_s4(x, mode), *programs)]
        name = f"setup, {mode}, gradient"
        tables |= _jitted(name, programs, max(5, repeat // 2))
    models = {
        name: _recurrence(functools.partial(hk_stack.layer_stack, **options))
        for name, options in _setup_options(16)
    }
    x = jax.random.normal(jax.random.key(0), (1, 1024, 16))
    params = _recurrence(hk_stack.layer_stack).init(jax.random.key(1), x)
    models = {"hk.layer_stack": _recurrence(hk.layer_stack)} | models
    programs = [_gradient(_applied(name, m, params, x)) for name, m in models.items()]
    return tables | _jitted("setup, recurrence, gradient", programs, repeat)


def _setup_options(num_layers: int) -> list[tuple[str, dict[str, Any]]]:
    """The default, then all batch sizes with and without remat."""
    sizes = [k for k in (1, 2, 4, 8, 16) if k <= num_layers]
    return [("default", {})] + [
        (
            f"{k} at a time{', remat' if remat else ''}",
            {"setup_batch_size": k, "setup_remat": remat},
        )
        for k in sizes
        for remat in (False, True)
    ]


def decode(repeat: int) -> dict[str, Any]:
    """Steps of time of these blocks, one to a program or many, by recurrence."""
    tables: dict[str, Any] = {}
    for batch in (1, 4, 64):
        steps = _linen_steps(batch) | _haiku_steps(batch)
        for name, loop in (("one step", False), (f"{DECODED} steps", True)):
            programs = [
                Program(way, _over_time(step) if loop else step, args)
                for way, (step, args) in steps.items()
            ]
            title = f"decode, batch {batch}, {name}"
            tables |= _jitted(title, programs, repeat)
    return tables


DECODED = 32  # steps of time in one program


def _over_time(step: Callable[..., Any]) -> Callable[..., Any]:
    """`DECODED` steps, each of which is given what the one before it returned."""

    def run(known: Any, x: jax.Array, states: Any) -> Any:
        def turn(carry: Any, _: None) -> tuple[Any, None]:
            return step(known, *carry), None

        return jax.lax.scan(turn, (x, states), length=DECODED)[0]

    return run


def _haiku_steps(batch: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Steps `(known, x, states) -> (x, states)`, and what they are given."""
    params, _ = _s4_inputs()
    states = in_haiku.s4_states(LAYERS, batch, WIDTH, STATES)
    x = jax.random.normal(jax.random.key(3), (batch, WIDTH))

    def step(layer_stack: Callable[..., Any]) -> Callable[..., Any]:
        layers = functools.partial(
            in_haiku.s4_stack_step,
            layer_stack=layer_stack,
            num_layers=LAYERS,
            state_size=STATES,
            length=LENGTH,
        )
        model = hk.transform(layers)
        return lambda params, x, states: model.apply(params, None, x, states)

    ours = step(hk_stack.layer_stack)
    split = hk_stack.partition(ours, params, x, states)
    return {
        "hk.layer_stack": (step(hk.layer_stack), (params, x, states)),
        "hk_stack auto": (ours, (params, x, states)),
        "hk_stack.partition, reused": (split.call, (split.setup(params), x, states)),
    }


def _linen_steps(batch: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The same in Flax, with setup in each step, and with its cache collection."""
    try:
        from hk_stack.compare import in_linen
    except ImportError:
        return {}
    x = jax.random.normal(jax.random.key(3), (batch, 1, WIDTH))

    def step(mode: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        block = functools.partial(
            in_linen.S4Block, state_size=STATES, mode=mode, length=LENGTH
        )
        model = in_linen.ScanStack(block, LAYERS)
        params = model.init(jax.random.key(1), x)["params"]
        made = in_linen.prime(model, params, x)
        known = {"params": params, **{k: v for k, v in made.items() if k != "cache"}}

        def run(known: Any, x: jax.Array, cache: Any) -> Any:
            return model.apply({**known, **cache}, x, mutable=["cache"])

        return run, (known, x, {"cache": made["cache"]})

    return {"Flax nn.scan": step("step"), "Flax nn.scan, cache": step("primed step")}


LAYERS, WIDTH, STATES, LENGTH, BATCH = 8, 64, 32, 512, 4  # of the S4 blocks


def _s4_inputs() -> tuple[Any, jax.Array]:
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
    return _s4(hk_stack.layer_stack).init(jax.random.key(1), x), x


def _s4(layer_stack: Callable[..., Any], **options: Any) -> hk.Transformed:
    return hk.transform(
        functools.partial(
            in_haiku.s4_stack,
            layer_stack=layer_stack,
            num_layers=LAYERS,
            state_size=STATES,
            **options,
        )
    )


def _applied(name: str, model: hk.Transformed, params: Any, x: jax.Array) -> Program:
    return Program(name, lambda params, x: model.apply(params, None, x), (params, x))


def recurrence(repeat: int) -> dict[str, Any]:
    """Sixteen layers whose setup is 1,024 small steps in sequence."""
    x = jax.random.normal(jax.random.key(0), (1, 1024, 16))
    inline = functools.partial(hk_stack.layer_stack, setup="inline")
    models = {
        "hk.layer_stack": _recurrence(hk.layer_stack),
        "hk_stack inline": _recurrence(inline),
        "hk_stack auto": _recurrence(hk_stack.layer_stack),
    }
    params = models["hk_stack auto"].init(jax.random.key(1), x)
    programs = [_applied(name, m, params, x) for name, m in models.items()]
    return _forward_and_gradient("recurrence", programs, repeat)


def _recurrence(layer_stack: Callable[..., Any]) -> hk.Transformed:
    return in_haiku.network(models.MODELS["recurrence"], layer_stack(16, name="layers"))


def init(repeat: int) -> dict[str, Any]:
    """Initialisation of 48 layers: of width 256, or of matrices of 24 small shapes."""
    tables: dict[str, Any] = {}
    for kind in ("transformer", "s4", "many shapes"):
        models = {
            "hk.layer_stack": _wide(hk.layer_stack, 48, kind),
            "hk_stack auto": _wide(hk_stack.layer_stack, 48, kind),
        }
        key, x = jax.random.key(0), jnp.ones([1, 64, 256])
        programs = [Program(n, m.init, (key, x)) for n, m in models.items()]
        name = f"init, {kind}, eager, after the first call"
        rounds = max(3, repeat // 4)
        runs = [(p.name, functools.partial(p.function, *p.args)) for p in programs]
        tables[name] = {
            name: {"run_s": seconds} for name, seconds in steady(runs, rounds).items()
        }
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


def remat(repeat: int) -> dict[str, Any]:
    """Gradients of 48 blocks: how much memory and time rematerialisation takes."""
    tables: dict[str, Any] = {}
    for name in ("mlp", "transformer"):
        programs = list(map(_gradient, deep.rematerialised(name)))
        tables |= _jitted(f"remat, {name}, gradient", programs, repeat)
    return tables


def eager(repeat: int) -> dict[str, Any]:
    """The same 48 blocks outside of `jit`, one after the other."""
    tables: dict[str, Any] = {}
    for name in ("mlp", "transformer"):
        samples = steady(deep.eager(name), repeat)
        table = {way: {"run_s": seconds} for way, seconds in samples.items()}
        _print(f"eager, {name}, forward", table)
        tables[f"eager, {name}, forward"] = table
    return tables


def port(repeat: int) -> dict[str, Any]:
    """Porting and stacking a tree of 24 layers, against copying its arrays."""
    table = porting.measured(repeat)
    _print("port", table)
    print(f"The largest leaf has {porting.largest_leaf() / 1e6:.4g} MB.")
    return {"port": table}


TABLES = {
    "s4": s4,
    "recurrence": recurrence,
    "init": init,
    "depth": depth,
    "reuse": reuse,
    "accumulate": accumulate,
    "setup": setup,
    "decode": decode,
    "remat": remat,
    "eager": eager,
    "port": port,
}


def _wide(layer_stack: Callable[..., Any], layers: int, kind: str) -> hk.Transformed:
    stacks: dict[str, Callable[..., Any]] = {
        "transformer": functools.partial(in_haiku.transformer_stack, num_heads=4),
        "s4": functools.partial(in_haiku.s4_stack, state_size=32),
        "many shapes": _many_shapes,
    }
    options = {"layer_stack": layer_stack, "num_layers": layers}
    return hk.transform(functools.partial(stacks[kind], **options))


def _many_shapes(
    x: jax.Array, layer_stack: Callable[..., Any], num_layers: int
) -> jax.Array:
    def layer(x: jax.Array) -> jax.Array:
        for i in range(24):
            init = hk.initializers.TruncatedNormal(0.1)
            x = x + jnp.sum(hk.get_parameter(f"w{i}", [8 + i, 16 + 2 * i], init=init))
        return x

    return layer_stack(num_layers)(layer)(x)


def _linen_s4(x: jax.Array, mode: Any = "convolution") -> list[Program]:
    try:
        from hk_stack.compare import in_linen
    except ImportError as error:
        print(f"Without Flax: {error}", file=sys.stderr)
        return []
    block = functools.partial(in_linen.S4Block, state_size=STATES, mode=mode)
    model = in_linen.STACKS["scan"](block, LAYERS)
    return [Program("Flax nn.scan", model.apply, (model.init(jax.random.key(1), x), x))]


def _forward_and_gradient(
    name: str, programs: list[Program], repeat: int
) -> dict[str, Any]:
    forward = _jitted(f"{name}, forward", programs, repeat)
    gradients = list(map(_gradient, programs))
    return forward | _jitted(f"{name}, gradient", gradients, repeat)


def _gradient(program: Program) -> Program:
    return program._replace(function=jax.grad(_loss(program.function)))


def _loss(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, x: jnp.mean(function(params, x) ** 2)


def _jitted(name: str, programs: list[Program], repeat: int) -> dict[str, Any]:
    """Trace, compile, temporary memory and run time of `programs` under `jit`."""
    builds = [[build(p) for p in programs] for _ in range(min(repeat, 5))]
    runs = [
        (p.name, functools.partial(made.run, *p.args))
        for p, made in zip(programs, builds[-1], strict=True)
    ]
    table: dict[str, Any] = {
        name: {"run_s": seconds} for name, seconds in steady(runs, repeat).items()
    }
    for p, made in zip(programs, zip(*builds, strict=True), strict=True):
        table[p.name] |= {
            "temp_bytes": [made[-1].sizes["temp_bytes"]],
            "trace_s": [one.seconds["trace_s"] for one in made],
            "compile_s": [
                one.seconds["lower_s"] + one.seconds["compile_s"] for one in made
            ],
        }
    _print(name, table)
    return {name: table}


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
    _Column("extra_bytes", "extra MB", 1e-6),
    _Column("trace_s", "trace s", 1.0),
    _Column("compile_s", "compile s", 1.0),
)


if __name__ == "__main__":
    main()
