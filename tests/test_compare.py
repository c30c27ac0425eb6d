"""`python -m hk_stack.compare`: all ways agree, and what fails is said and left out."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from absl import app, flags
from absl.testing import flagsaver

import hk_stack
from hk_stack.compare import __main__ as command
from hk_stack.compare import cases, in_haiku, measure, models, results
from hk_stack.compare.results import Case

ROOT = pathlib.Path(__file__).parents[1]
FRAMEWORKS = ("haiku", "plain", "hk_stack", "linen", "nnx", "equinox")
OPTIONS = cases.Options(repeat=2, shortest=0.0)


@pytest.fixture(autouse=True)
def promotion():
    """As users run it: other frameworks rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def case(model="mlp", mode="grad", layers=2, **sizes):
    return Case(model, mode, layers, **{**SIZES, **sizes})


SIZES = {"dtype": "float32", "batch": 2, "length": 8}


def run(*arguments):
    """The command in this process: its exit status."""
    with flagsaver.flagsaver():
        return command.main(flags.FLAGS(["compare", *map(str, arguments)]))


def start(module, *arguments):
    """A command in a process of its own, on the code of this repository."""
    line = [sys.executable, "-m", module, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=env, capture_output=True, text=True)


# Parity


def compiled(task):
    """What a task returns; compiled in a hurry, as that takes most of the time."""
    fast = {"xla_backend_optimization_level": 0}
    return task.values(jax.jit(task.program.function, compiler_options=fast))


@functools.cache
def expected_of(one):
    return compiled(cases.task(one, "haiku", "layer_stack"))


def differences(some, reference, dtype="float32"):
    smallest = cases.TOLERANCES[dtype]["smallest"]
    return {
        name: cases.largest_difference(value, reference[name], smallest)
        for name, value in some.items()
    }


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("model", models.MODELS)
def test_losses_and_gradients_are_those_of_haiku(model, framework):
    one = case(model)
    expected = expected_of(one)
    found = 0
    # To compile takes long; the rest differs in the stack, not in the blocks.
    few = None if model in ("s4", "mlp") else 1
    for way in ways_of(framework)[:few]:
        task = cases.task(one, framework, way)
        if task is not None:
            difference = differences(compiled(task), expected)
            assert difference["output"] < 1e-5, way
            assert difference["gradient"] < 1e-3, way
            found += 1
    assert found


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("mode", ["fwd", "decode"])
def test_outputs_are_those_of_haiku_on_several_devices(mode, framework):
    one = case("s4", mode)
    expected = expected_of(one)
    tasks = {way: cases.task(one, framework, way) for way in ways_of(framework)}
    found = {way: compiled(task) for way, task in tasks.items() if task is not None}
    assert found
    for way, values in found.items():
        assert differences(values, expected)["output"] < 1e-5, way


def ways_of(framework):
    return models.framework(framework).WAYS


def test_decoding_is_the_forward_pass_step_by_step():
    one = case("s4", "fwd", length=3)
    y = cases.task(one, "haiku", "layer_stack")
    model, (params, x) = models.MODELS["s4"], y.program.args
    decoder = models.framework("nnx").decoder("nnx.scan", model, 2, params, x)
    states, outputs = decoder.states, []
    for t in range(3):
        out, states = decoder.step(decoder.known, x[:, t], states)
        outputs.append(out)
    expected = y.program.function(params, x)
    assert jnp.allclose(jnp.stack(outputs, 1), expected, atol=1e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_initial_parameters_have_the_shapes_of_haiku(framework):
    one = case(mode="init")
    expected = expected_of(one)
    tasks = {way: cases.task(one, framework, way) for way in ways_of(framework)}
    found = {way: compiled(task) for way, task in tasks.items() if task is not None}
    assert bool(found) == (framework != "plain")
    assert all(shapes == expected for shapes in found.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        ways = [("haiku", "layer_stack"), ("linen", "nn.scan"), ("hk_stack", "auto")]
        found = cases.measured(case(dtype=dtype), ways, OPTIONS)
    assert not found.failed
    assert len(found.rows) == 3
    bound = cases.TOLERANCES[dtype]["output"]
    assert all(row.parity["output"] <= bound for row in found.rows[1:])


def test_the_batch_is_split_over_devices():
    task = cases.task(case(batch=4), "haiku", "layer_stack")
    params, x = task.program.args
    assert jax.device_count() == 4
    assert len(x.sharding.device_set) == 4
    assert not x.sharding.is_fully_replicated
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))


# Measures


def test_every_measure_is_there():
    ways = [("haiku", "layer_stack"), ("hk_stack", "prepared"), ("plain", "split")]
    (row,) = cases.measured(case(mode="init"), ways, OPTIONS).rows
    expected = set(results.MEASURES) - {"build_s", "peak_bytes"}  # None on a CPU.
    assert row.measures.keys() == expected
    assert all(x > 0 for build in row.samples("eager_s") for x in build)
    assert row.median("hlo_bytes") > row.median("equations") > 10


def test_a_program_is_built_as_often_as_asked():
    options = OPTIONS._replace(repeat=5, builds=2)
    (row,) = cases.measured(case(mode="fwd"), [("plain", "scan")], options).rows
    assert [len(rounds) for rounds in row.samples("run_s")] == [3, 2]
    assert len(row.samples("build_s")) == 2


def test_what_takes_long_to_compile_is_built_once():
    options = OPTIONS._replace(builds=2, patience=0.0)
    (row,) = cases.measured(case(mode="fwd"), [("plain", "scan")], options).rows
    assert len(row.samples("run_s")) == 2
    assert len(row.samples("build_s")) == 1


def test_builds_in_a_fresh_process():
    options = OPTIONS._replace(repeat=1, fresh=True)
    found = cases.measured(case(mode="fwd"), [("plain", "scan")], options)
    assert not found.failed
    assert found.rows[0].median("build_s") > 0


def equations(framework, way, layers):
    task = cases.task(case(layers=layers), framework, way)
    return measure.build(task.program).sizes["equations"]


def test_only_programs_of_loops_grow_with_depth():
    assert equations("hk_stack", "auto", 2) == equations("hk_stack", "auto", 6)
    assert equations("haiku", "loop", 6) > 2 * equations("haiku", "loop", 2)


def test_with_batches_of_one_a_stack_holds_no_more_than_its_derived_values():
    one = case("s4", "fwd", layers=16, length=32)
    params, x = cases.task(one, "haiku", "layer_stack").program.args
    model, temp = models.MODELS["s4"], {}
    for name, layers in {
        "scan": hk_stack.layer_stack(16, name="layers", setup="inline"),
        "auto": hk_stack.layer_stack(16, name="layers", setup_batch_size=1),
    }.items():
        apply = in_haiku.applied(in_haiku.network(model, layers))
        program = measure.Program(name, apply, (params, x))
        temp[name] = measure.build(program).sizes["temp_bytes"]
    spectra = 16 * model.width * (one.length + 1) * 8  # [L, D, T + 1], complex64
    assert temp["auto"] <= 1.02 * (temp["scan"] + spectra)


# What fails


@pytest.fixture
def odd(monkeypatch):
    """A framework with ways that fail, if there is more than one layer."""

    def interrupted(params, x):
        raise KeyboardInterrupt

    def broken(params, x):
        raise RuntimeError("no such kernel\nand more lines")

    def wrong(way, model, num_layers, params, x):
        net = real("plain").stack("scan", model, num_layers, params, x)
        way = "right" if num_layers == 1 else way
        return net._replace(
            apply={
                "doubled": lambda params, x: 2 * net.apply(params, x),
                "broken": broken,
                "interrupted": interrupted,
                "infinite": lambda params, x: jnp.inf * net.apply(params, x),
                "right": net.apply,
            }[way]
        )

    module = types.SimpleNamespace(
        WAYS=("doubled", "broken", "interrupted", "infinite", "right"), stack=wrong
    )
    real = models.framework
    monkeypatch.setattr(
        models, "framework", lambda name: module if name == "odd" else real(name)
    )


def test_what_fails_is_left_out_and_the_rest_is_measured(odd):
    ways = [("haiku", "layer_stack"), ("odd", "doubled"), ("odd", "broken")]
    found = cases.measured(case(), [*ways, ("odd", "right")], OPTIONS)
    assert [row.way for row in found.rows] == ["haiku layer_stack", "odd right"]
    assert "differs from that of the first way by" in found.failed["odd doubled"]
    assert found.failed["odd broken"] == "RuntimeError: no such kernel"


def test_values_that_are_not_finite_are_no_reference(odd):
    ways = [("odd", "infinite"), ("haiku", "layer_stack")]
    found = cases.measured(case(mode="fwd"), ways, OPTIONS)
    assert [row.way for row in found.rows] == ["haiku layer_stack"]
    assert "its output is not finite" in found.failed["odd infinite"]


def test_what_has_other_names_or_shapes_is_no_parity():
    for other in ({"b": jnp.ones(2)}, {"a": jnp.ones((2, 1))}):
        with pytest.raises(ValueError, match="not of the same names and shapes"):
            cases.largest_difference({"a": jnp.ones(2)}, other, 1e-3)


def test_rounds_that_are_interrupted_are_kept():
    calls = []

    def interrupted():
        calls.append(None)
        if len(calls) > 4:  # Two to see how long it takes, two rounds.
            raise KeyboardInterrupt
        return jnp.ones(2)

    added = []
    one = types.SimpleNamespace(run=interrupted)
    one.add = lambda name, value: added.append((name, len(value)))
    with pytest.raises(KeyboardInterrupt):
        cases.rounds({"way": one}, {}, lambda one: one.run, "run_s", 9, 0.0)
    assert added == [("run_s", 2)]


def test_what_fails_while_it_runs_is_left_out():
    def failing():
        raise RuntimeError("out of memory")

    good = types.SimpleNamespace(run=lambda: jnp.ones(2), samples=[])
    good.add = lambda name, value: good.samples.append((name, len(value)))
    built = {"good": good, "bad": types.SimpleNamespace(run=failing)}
    failed = {}
    cases.rounds(built, failed, lambda one: one.run, "run_s", 3, 0.0)
    assert failed == {"bad": "RuntimeError: out of memory"}
    assert good.samples == [("run_s", 3)]


def test_ctrl_c_keeps_what_was_measured(odd, monkeypatch, tmp_path, capsys):
    ways = [("haiku", "layer_stack"), ("odd", "interrupted")]
    monkeypatch.setattr(
        command, "_ways", lambda skipped, say: (ways, "haiku layer_stack")
    )
    sizes = ["--model=mlp", "--mode=fwd", "--length=4", "--repeat=1"]
    out = tmp_path / "out"
    assert run(*sizes, "--layers=1,2,3", f"--out={out}") == 130
    assert "stopped; what was measured is kept" in capsys.readouterr().out
    rows = results.load(out / "results.json").rows
    assert [(row.case.layers, row.way) for row in rows] == [
        (1, "haiku layer_stack"),
        (1, "odd interrupted"),
    ]
    assert (out / "report.html").exists()


def test_a_framework_that_is_not_installed_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "equinox", None)
    monkeypatch.delitem(sys.modules, "hk_stack.compare.in_equinox", raising=False)
    sizes = ["--model=mlp", "--mode=fwd", "--layers=1", "--length=4", "--repeat=1"]
    assert run(*sizes, "--frameworks=plain,equinox") == 0
    assert "without equinox: " in (printed := capsys.readouterr().out)
    assert "pip install equinox" in printed
    assert "plain scan" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=s5"], "--model: ['s5'] not among s4, recurrence"),
        (["--frameworks=torch"], "--frameworks: ['torch'] not among equinox, haiku"),
        (["--mode=backward"], "--mode: ['backward'] not among init, fwd"),
        (["--layers=4,x"], "--layers: 'x' is no number of layers"),
        (["--layers=0"], "--layers: '0' is no number of layers"),
        (["--layers="], "--layers: '' is no number of layers"),
        (["--model="], "--model: [] not among s4"),
        (
            ["--baseline=haiku scan"],
            "'haiku scan' not among equinox filter_vmap + scan, haiku",
        ),
        (["--model=mlp", "--mode=decode"], "mlp does not decode; s4 does"),
        (["--model=s4", "--dtype=bfloat16"], "s4 runs in float32 or float64"),
        (["--mode=init", "--dtype=float64"], "init makes parameters in float32"),
        (["--out=/dev/null/x"], "--out: cannot write to the folder /dev/null/x"),
        (["--against=/no/such.json"], "/no/such.json is no result of"),
        (["/no/such.json"], "/no/such.json is no result of"),
        (["a", "b"], "one results.json at most"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(app.UsageError) as error:
        run(*arguments)
    assert message in str(error.value)


def test_a_flag_of_the_wrong_kind_is_a_line_not_a_traceback():
    done = start("hk_stack.compare", "--repeat=0")
    assert done.returncode != 0
    assert "repeat" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# The command as a whole


def test_the_command(tmp_path):
    out = tmp_path / "new"
    sizes = ["--layers=2", "--length=8", "--repeat=2", "--mode=fwd,train"]
    done = start("hk_stack.compare", "--model=mlp", *sizes, f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    ways = [f"{name} {way}" for name, way in cases.all_ways(sorted(FRAMEWORKS))]
    ways.sort(key=lambda way: way != "haiku layer_stack")  # The baseline is first.
    result = results.load(out / "results.json")
    # A model without setup, and no decoding.
    odd = ("plain split", "plain reused", "linen nn.scan, cache")
    assert list(result.of(result.cases()[0])) == [x for x in ways if x not in odd]
    assert all(row.way in done.stdout for row in result.rows)
    assert not result.failed and not result.skipped
    assert [one.mode for one in result.cases()] == ["fwd", "train"]
    assert result.environment["versions"]["jax"] == jax.__version__
    assert "--layers=2" in result.environment["command"]
    assert "<svg" in (out / "report.html").read_text()
    assert "| haiku layer_stack" in (out / "table.md").read_text()
    assert len(list((out / "plots").glob("*.png"))) >= 4


def test_what_would_take_too_long_to_build_is_left_out(tmp_path, capsys):
    sizes = ["--model=mlp", "--mode=fwd", "--length=4", "--repeat=1", "--layers=1,2"]
    out = tmp_path / "out"
    assert run(*sizes, "--frameworks=haiku", "--patience=0", f"--out={out}") == 0
    assert "haiku loop would take about" in capsys.readouterr().out
    result = results.load(out / "results.json")
    assert [row.way for row in result.of(result.cases()[1]).values()] == [
        "haiku layer_stack"  # The baseline is always measured.
    ]
    assert "2 layers" in result.skipped[0]["what"]


def test_results_are_held_against_older_ones(tmp_path, capsys):
    sizes = ["--model=mlp", "--mode=fwd", "--layers=1", "--length=4", "--repeat=4"]
    out = tmp_path / "new"
    assert run(*sizes, "--frameworks=haiku,hk_stack", f"--out={out}") == 0
    new = out / "results.json"
    assert run(new, f"--against={new}") == 0
    document = json.loads(new.read_text())
    for row in document["rows"]:
        if row["way"] == "hk_stack auto":
            row["measures"]["run_s"] = [[x / 9 for x in row["measures"]["run_s"][0]]]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document))
    capsys.readouterr()
    assert run(new, f"--against={old}") == 1
    assert "hk_stack auto" in capsys.readouterr().out


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(app.UsageError, match="it has schema 99, expected 1"):
        run(path)


# The tables of the library's own options


def test_a_table(tmp_path):
    out = tmp_path / "result.json"
    tables = ["--tables=recurrence", "--repeat=2", f"--out={out}"]
    done = start("hk_stack.compare.tables", *tables)
    assert done.returncode == 0, done.stderr
    assert "recurrence, gradient" in done.stdout
    result = json.loads(out.read_text())
    assert result["environment"]["versions"]["jax"]
    row = result["tables"]["recurrence, forward"]["hk_stack auto"]
    assert len(row["run_s"]) == 2 and min(row["run_s"]) > 0
    assert row.keys() == {"run_s", "temp_bytes", "trace_s", "compile_s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables=s5"], "s5"),
        (["--repeat=0"], "--repeat"),
        (["--tables=recurrence", "--out=/no/such/folder/x.json"], "cannot write"),
        (["s4"], "unrecognized arguments"),
    ],
)
def test_mistakes_in_tables(arguments, message, capsys):
    from hk_stack.compare import tables

    with pytest.raises(SystemExit):
        tables.main(arguments)
    assert message in capsys.readouterr().err
