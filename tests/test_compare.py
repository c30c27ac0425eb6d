"""`python -m hk_stack.compare`: all ways agree, and what fails is said and left out."""

import functools
import io
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from interpreter import computed

import hk_stack
from hk_stack.compare import __main__ as command
from hk_stack.compare import cases, in_haiku, measure, models, results
from hk_stack.compare.models import Model, Part

FRAMEWORKS = ("haiku", "plain", "hk_stack", "linen", "nnx", "equinox")
SIZES = {"dtype": "float32", "batch": 1, "length": 8, "width": 8}


@pytest.fixture(autouse=True)
def promotion():
    """As users run it: other frameworks rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def case(model="mlp", mode="grad", layers=2, **sizes):
    return results.Case(model, mode, layers, **{**SIZES, **sizes})


def measured(one, ways, repeat=2, builds=1):
    """What comes of a case, and whether it was interrupted."""
    found = results.Result({}, [], [], [])
    return found, measure.measured(found, one, ways, repeat, builds)


def run(*arguments):
    """The command in this process: its exit status."""
    try:
        with flagsaver.flagsaver():
            return command.main(flags.FLAGS(["compare", *map(str, arguments)]))
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


# Parity


def _every_part(width):
    return {
        "attention": Part("attention", width, 2),
        "up": Part("spectral", width, 2 * width),
        "down": Part("spectral", 2 * width, width),
        "decay": Part("vector", width, 1.0),
    }


def _every_block(parts, x):
    x = models.spectral_block(parts, x + parts.attention(x))
    return x * jax.nn.sigmoid(parts.decay)


@pytest.fixture(autouse=True, scope="module")
def in_short():
    """Collecting garbage before each build takes long in a process of many tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure.gc, "collect", lambda: 0)
        patched.setattr(measure, "SHORTEST", 0.0)
        yield


def drawn(init, *args):
    """Parameters, of which none is zero or one, faster than an initialisation."""
    rng = np.random.default_rng(0)
    types = jax.eval_shape(init, *args)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape), types)
    for leaves in params.values():
        if "lambda_real" in leaves:  # Systems that forget, as they do at first.
            leaves["lambda_real"] = -0.5 - abs(leaves["lambda_real"])
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


@pytest.fixture(autouse=True)
def every(monkeypatch):
    """A model of all kinds of parts that others have not, and small ones of S4."""
    monkeypatch.setattr(cases, "_initialised", drawn)
    every = Model("every", _every_part, _every_block, width=8)
    for name, mode in {"s4": "convolution", "s4_terms": "term by term"}.items():
        small = models.s4_model(4, mode, name)
        monkeypatch.setitem(models.MODELS, name, small)
    monkeypatch.setitem(models.MODELS, "every", every)
    monkeypatch.setattr(cases, "GENERATED", 4)
    few = functools.partial(models.normalised, iterations=1)
    monkeypatch.setattr(models, "normalised", few)


def in_a_hurry(task):
    """A program to compile, which takes most of the time."""
    fast = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda *args: task.function(*args), compiler_options=fast)


def compiled(task):
    """What a task returns."""
    return task.values(functools.partial(computed, task.function))


@functools.cache
def expected_of(one):
    return compiled(cases.task(one, "haiku", "layer_stack"))


def assert_agree(one, framework, way):
    task = cases.task(one, framework, way)
    values = compiled(task)
    cases.parity(values, cases.finite(expected_of(one)), one.dtype)
    return True


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_way_has_the_losses_and_gradients_of_haiku(framework):
    one = case("mlp", layers=3)  # Of two, nothing is rolled.
    able = [way for way in ways_of(framework) if cases.task(one, framework, way)]
    assert able
    for way in able:
        assert_agree(one, framework, way)


@pytest.mark.parametrize(
    ("model", "mode", "layers", "framework", "way"),
    [
        # By hand, spectral norms are another block than those without setup.
        ("transformer", "grad", 1, "plain", "scan"),
        ("every", "grad", 1, "linen", "nn.scan"),
        ("every", "grad", 1, "nnx", "nnx.scan"),
        ("every", "grad", 1, "equinox", "filter_vmap + scan"),
        ("s4", "grad", 1, "linen", "nn.scan"),
        ("s4", "grad", 1, "nnx", "nnx.scan"),
        ("s4", "grad", 1, "equinox", "filter_vmap + scan"),
        # Setup that is done before.
        ("s4", "fwd", 2, "plain", "reused"),
        ("s4", "fwd", 2, "hk_stack", "prepared"),
        ("s4_terms", "fwd", 2, "plain", "split"),
        ("recurrence", "fwd", 2, "plain", "split"),
        ("recurrence", "fwd", 2, "hk_stack", "auto"),
        ("spectral", "fwd", 2, "plain", "reused"),
        ("spectral", "fwd", 2, "hk_stack", "prepared"),
        ("s4", "fwd", 2, "linen", "nn.scan + setup_first"),
        ("recurrence", "setup", 2, "hk_stack", "1 at a time"),
        ("recurrence", "setup", 2, "hk_stack", "2 at a time, remat"),
        # Other modes.
        ("s4", "decode", 2, "hk_stack", "auto"),
        ("s4", "decode", 2, "plain", "reused"),
        ("s4", "decode", 2, "linen", "nn.scan, cache"),
        ("s4", "generate", 2, "nnx", "nnx.scan"),
        ("s4", "decode", 2, "equinox", "filter_vmap + scan"),
        ("mlp", "accumulate", 1, "hk_stack", "accumulate"),
        ("mlp", "remat", 4, "plain", "checkpoint, groups"),
        ("mlp", "remat", 4, "haiku", "layer_stack + hk.remat"),
        ("mlp", "remat", 4, "hk_stack", "+ remat, sqrt"),
        ("mlp", "train", 1, "hk_stack", "auto"),
    ],
)
def test_models_and_modes_agree_with_haiku(model, mode, layers, framework, way):
    assert_agree(case(model, mode, layers), framework, way)


@pytest.mark.parametrize(
    ("model", "mode", "framework", "way"),
    [
        ("mlp", "grad", "hk_stack", "inline"),
        ("mlp", "grad", "linen", "nn.scan + setup_first"),
        ("mlp", "fwd", "plain", "reused"),
        ("spectral", "fwd", "hk_stack", "+ remat"),
        ("spectral", "init", "linen", "nn.scan + nn.remat"),
        ("recurrence", "setup", "hk_stack", "4 at a time"),  # There are two layers.
    ],
)
def test_ways_that_are_the_program_of_another_are_not_measured(
    model, mode, framework, way
):
    assert cases.task(case(model, mode), framework, way) is None


def test_steps_of_time_in_one_program_are_those_one_by_one():
    one = case("s4", "generate", layers=1)
    found = compiled(cases.task(one, "plain", "reused"))["output"]
    step = cases.task(one._replace(mode="decode"), "plain", "reused")
    assert jnp.allclose(found, jnp.stack(compiled(step)["output"]), rtol=1e-4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_initial_parameters_have_the_shapes_of_haiku(framework):
    one = case(mode="init", layers=1)
    way = "auto" if framework == "hk_stack" else ways_of(framework)[0]
    task = cases.task(one, framework, way)
    assert (task is None) == (framework == "plain")

    def shapes(task):
        def run(*args):
            types = jax.eval_shape(task.function, *args)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)

        return task.values(run)

    expected = shapes(cases.task(one, "haiku", "layer_stack"))
    assert task is None or not any(
        cases.parity(shapes(task), expected, "float32").values()
    )


def test_initial_parameters_in_shards():
    task = cases.task(case(mode="init_sharded"), "hk_stack", "auto")
    program = in_a_hurry(task).lower(*task.args).compile()
    shapes = jax.eval_shape(task.function, *task.args)

    def is_shared_out(leaf, sharding):
        count = math.prod(sharding.shard_shape(leaf.shape))
        return count * len(jax.devices()) == leaf.size

    assert all(
        jax.tree.leaves(jax.tree.map(is_shared_out, shapes, program.output_shardings))
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        one = case(mode="fwd", dtype=dtype)
        task, first = (
            cases.task(one, *way)
            for way in (("linen", "nn.scan"), ("haiku", "layer_stack"))
        )
        found, expected = (t.values(in_a_hurry(t)) for t in (task, first))
        assert found["output"].dtype == dtype
        cases.parity(found, cases.finite(expected), dtype)


def ways_of(framework):
    return [way for _, way in cases.all_ways([framework], "grad")]


# Measures


def test_every_measure_is_there(monkeypatch):
    monkeypatch.setattr(measure, "_jitted", in_a_hurry)
    ways = [("haiku", "layer_stack"), ("hk_stack", "prepared"), ("plain", "split")]
    one = case(mode="init", layers=1)
    (row,) = measured(one, ways)[0].rows
    expected = set(results.MEASURES) - {"build_s", "peak_bytes"}  # None on a CPU.
    assert row.measures.keys() == expected
    assert all(x > 0 for build in row.samples("eager_s") for x in build)
    assert row.median("hlo_bytes") > row.median("equations") > 10


def test_eager_runs_are_not_compiled():
    ways = cases.all_ways(["haiku", "hk_stack"], "eager")
    assert ways == [("haiku", "loop"), ("hk_stack", "python")]
    found, _ = measured(case(mode="eager"), ways)
    assert not found.failed
    assert [row.measures.keys() for row in found.rows] == [
        {"eager_first_s", "eager_s"}
    ] * 2


def test_trees_are_ported_and_held_against_a_copy(monkeypatch):
    from hk_stack.compare import porting

    for name, size in {"LAYERS": 2, "WIDTH": 16, "TOKENS": 20}.items():
        monkeypatch.setattr(porting, name, size)
    porting.trees.cache_clear()
    one = case("transformer", "port", width=16)
    assert not cases.reason(one) and cases.reason(one._replace(layers=3))
    ways = cases.all_ways(FRAMEWORKS, "port")
    found, _ = measured(one, ways)
    assert not found.failed and len(found.rows) == len(ways) == 8
    assert all(row.median("temp_bytes") >= 0 for row in found.rows)


def traced(framework, way, layers):
    task = cases.task(case(layers=layers), framework, way)
    return jax.make_jaxpr(task.function)(*task.args).jaxpr


def equations(framework, way, layers):
    return measure.number_of_equations(traced(framework, way, layers))


def test_only_programs_of_loops_grow_with_depth():
    assert equations("hk_stack", "auto", 2) == equations("hk_stack", "auto", 6)
    assert equations("haiku", "loop", 6) > 2 * equations("haiku", "loop", 2)


@pytest.mark.parametrize("framework", ["haiku", "linen", "nnx", "equinox"])
def test_a_loop_that_is_rolled_is_a_loop(framework):
    few, more = (
        jaxprs.names(jaxprs.body(traced(framework, "loop + roll", layers), layers))
        for layers in (3, 5)
    )
    assert few == more and few.count("dot_general") >= 2


def test_with_batches_of_one_a_stack_holds_no_more_than_its_derived_values():
    one = case("s4", "fwd", layers=8, length=64)
    params, x = cases.task(one, "haiku", "layer_stack").args
    model, temp = models.MODELS["s4"]._replace(width=8), {}
    for name, options in {
        "scan": {"setup": "inline"},
        "auto": {"setup_batch_size": 1},
    }.items():
        given = models.Given(model, 8, params, x)
        _, apply = in_haiku.transformed(given, hk_stack.layer_stack, **options)
        task = cases.Task(apply, (params, x), lambda run: {})
        temp[name] = measure.build(task)[1]["temp_bytes"]
    spectra = 8 * model.width * (one.length + 1) * 8  # [L, D, T + 1], complex64
    assert temp["auto"] <= 1.02 * (temp["scan"] + spectra) + 4096


# What fails: made-up ways


@pytest.fixture
def odd(monkeypatch):
    """A framework with ways that fail, some only if there is more than one layer."""
    runs = []

    def interrupted(x):
        raise KeyboardInterrupt

    def broken(x):
        raise RuntimeError("no such kernel\nand more lines")

    def interrupted_later():
        runs.append(None)
        if len(runs) > 7:  # To compare, two to see how long, four rounds.
            raise KeyboardInterrupt
        return jnp.ones(2)

    functions = {
        "right": lambda x: x + 1,
        "again": lambda x: 1 + x,
        "doubled": lambda x: 2 * (x + 1),
        "broken": broken,
        "interrupted": interrupted,
        "infinite": lambda x: x / 0,
        "later": lambda x: interrupted_later(),
    }

    def task(one, framework, way):
        function = functions["right" if one.layers == 1 else way]
        args = (jnp.ones(2),)
        values = lambda run: {"output": run(*args)}  # noqa: E731
        return cases.Task(function, args, values, is_compiled=way != "later")

    monkeypatch.setattr(cases, "task", task)


def made_up(ways, layers=2, **options):
    pairs = [("odd", way) for way in ways]
    return measured(case(layers=layers), pairs, **options)


def test_what_fails_is_left_out_and_the_rest_is_measured(odd):
    found, _ = made_up(["right", "doubled", "broken", "again"])
    assert [row.way for row in found.rows] == ["odd right", "odd again"]
    errors = {failure.way: failure.error for failure in found.failed}
    assert "differs from that of the first way by" in errors["odd doubled"]
    assert errors["odd broken"] == "RuntimeError: no such kernel"
    assert found.failed[0].case == case()


def test_values_that_are_not_finite_are_no_reference(odd):
    found, _ = made_up(["infinite", "right"])
    assert [row.way for row in found.rows] == ["odd right"]
    assert "its output is not finite" in found.failed[0].error


def test_what_has_other_names_or_shapes_is_no_parity():
    for other in ({"b": jnp.ones(2)}, {"a": jnp.ones((2, 1))}):
        with pytest.raises(ValueError, match="not of the same names and shapes"):
            cases.largest_difference({"a": jnp.ones(2)}, other, 1e-3)


def test_rounds_that_are_interrupted_are_kept(odd):
    found, is_stopped = made_up(["later"], repeat=9)
    assert is_stopped and not found.failed
    assert [len(rounds) for rounds in found.rows[0].samples("eager_s")] == [4]


def test_what_fails_while_it_runs_is_left_out(odd, monkeypatch):
    build, runs = measure.build, []

    def failing(task):
        program, found = build(task)

        def run(x):
            runs.append(None)
            if len(runs) == 4:  # Not the first, nor to compare.
                raise RuntimeError("out of memory")
            return program(x)

        return (program if runs else run), found

    monkeypatch.setattr(measure, "build", failing)
    found, _ = made_up(["right", "again"], repeat=3)
    assert found.failed == [(case(), "odd right", "RuntimeError: out of memory")]
    (row,) = found.rows
    assert row.way == "odd again" and len(row.samples("run_s")[0]) == 3


def test_a_program_is_built_as_often_as_asked(odd):
    (row,) = made_up(["right"], repeat=5, builds=2)[0].rows
    assert [len(rounds) for rounds in row.samples("run_s")] == [3, 2]
    assert len(row.samples("build_s")) == 2


def test_what_takes_long_to_compile_is_built_once(odd, monkeypatch):
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    (row,) = made_up(["right"], builds=2)[0].rows
    assert len(row.samples("run_s")) == 2
    assert len(row.samples("build_s")) == 1


def test_ctrl_c_keeps_what_was_measured(odd, monkeypatch, tmp_path, capsys):
    ways = [("odd", "right"), ("odd", "interrupted")]
    monkeypatch.setattr(command, "_ways", lambda frameworks, mode: ways)
    out = tmp_path / "out"
    arguments = ["--model=mlp", "--mode=fwd", "--layers=1,2,3", f"--out={out}"]
    assert run(*arguments, "--repeat=1") == 130
    printed = capsys.readouterr().out
    found = results.load(out / "results.json")
    assert [(row.case.layers, row.way) for row in found.rows] == [
        (1, "odd right"),
        (1, "odd interrupted"),
    ]
    assert [title.split(", ")[2] for title in found.unfinished] == [
        "2 layers",
        "3 layers",
    ]
    for text in (printed, *(p.read_text() for p in out.glob("[rt]*.[hm]*"))):
        assert "Partial: stopped before these cases were whole: mlp, fwd, 2" in text


def test_what_takes_too_long_to_build_is_left_out(odd, monkeypatch, capsys):
    ways = [("odd", "right"), ("odd", "again")]
    monkeypatch.setattr(command, "_ways", lambda frameworks, mode: ways)
    sizes = ["--model=mlp", "--mode=fwd", "--layers=1,2", "--repeat=1"]
    assert run(*sizes, "--patience=0") == 0
    printed = capsys.readouterr().out
    assert "2 layers, float32, batch 4, length 128, width 64: odd again" in printed
    assert "with fewer layers it took long to build" in printed
    assert printed.count("odd right") == 4  # The baseline is always measured.


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
            "'haiku scan' not among equinox filter_vmap + scan, equinox loop",
        ),
        (["--model=mlp", "--mode=decode"], "mlp does not decode; s4, s4_terms does"),
        (["--mode=port"], "port moves one tree: --model=transformer --layers=24"),
        (
            [
                "--mode=port",
                "--model=transformer",
                "--layers=24",
                "--width=512",
                "--frameworks=nnx",
            ],
            "nnx has no mode port",
        ),
        (["--model=s4", "--dtype=bfloat16"], "s4 runs in float32 or float64"),
        (["--mode=init", "--dtype=float64"], "init makes parameters in float32"),
        (["--out=/dev/null/x"], "--out: cannot write to the folder /dev/null/x"),
        (["--against=/no/such.json"], "/no/such.json is no result of"),
        (["/no/such.json"], "/no/such.json is no result of"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(app.UsageError) as error:
        run(*arguments)
    assert message in str(error.value)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_done_is_told_on_a_terminal_only(odd, monkeypatch, stream):
    """In a line which is gone before another is printed."""
    ways = [("odd", "right"), ("odd", "again")]
    monkeypatch.setattr(command, "_ways", lambda frameworks, mode: ways)
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # One console.
    assert run("--model=mlp", "--mode=fwd", "--layers=2,1", "--repeat=1") == 0
    lines = sys.stderr.getvalue().split("\n")
    shown = [re.sub(r".*\r", "", line).replace("\x1b[K", "") for line in lines]
    title = "{} layers, float32, batch 4, length 128, width 64; ratios are to odd right"
    assert [x for x in shown if "batch" in x] == [
        f"1 of 2: mlp, fwd, {title.format(2)}",
        f"2 of 2: mlp, fwd, {title.format(1)}",
    ]
    told = re.findall(r"\r([^\r\x1b]+)\x1b", sys.stderr.getvalue())
    assert bool(told) == (stream is Terminal)
    of_way = r"[12] of 2: (odd (right|again)|rounds) of mlp, .*"
    assert all(re.fullmatch(of_way, text) for text in told)


def test_a_flag_of_the_wrong_kind_is_a_line_not_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", "--repeat=0"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
        command.run()
    printed = "".join(capsys.readouterr())
    assert stopped.value.code and "repeat" in printed and "Traceback" not in printed


# The command as a whole


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that the command wrote, of all ways but those of Equinox."""
    out = tmp_path_factory.mktemp("compare")
    hidden = pytest.MonkeyPatch()
    hidden.setitem(sys.modules, "equinox", None)
    hidden.delitem(sys.modules, "hk_stack.compare.in_equinox", raising=False)
    hidden.setattr(measure, "_jitted", in_a_hurry)
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        sizes = ["--model=mlp", "--mode=fwd", "--length=4", "--width=8", "--batch=1"]
        assert run(*sizes, "--layers=1", "--repeat=4", f"--out={out}") == 0
    hidden.undo()
    return out


def test_the_command(written):
    result = results.load(written / "results.json")
    found = [name for name in FRAMEWORKS if name != "equinox"]
    ways = [f"{name} {way}" for name, way in cases.all_ways(sorted(found), "fwd")]
    ways.sort(key=lambda way: way != "haiku layer_stack")  # The baseline is first.
    # A model without setup, no gradient and no decoding.
    none = re.compile(".*(split|reused|cache|inline|prepared|setup_first|remat)$")
    assert list(result.of(result.cases()[0])) == [x for x in ways if not none.match(x)]
    assert not result.failed
    (skipped,) = result.skipped
    assert skipped["what"] == "equinox" and "pip install equinox" in skipped["why"]
    assert result.environment["versions"]["jax"] == jax.__version__
    assert result.environment["device"] == "cpu"
    assert "--layers=1" in result.environment["command"]
    assert "haiku layer_stack" in (written / "report.html").read_text()
    assert "| haiku layer_stack" in (written / "table.md").read_text()
    assert len((written / "results.json").read_text().splitlines()) < 30


def test_results_are_held_against_older_ones(written, tmp_path, capsys):
    new = written / "results.json"
    assert run(new, f"--against={new}") == 0
    printed = capsys.readouterr().out
    assert "nnx nnx.scan" in printed and "0 ratios are worse" in printed
    document = json.loads(new.read_text())
    for row in document["rows"]:
        if row["way"] == "hk_stack auto":
            row["measures"]["run_s"] = [[x / 9999 for x in row["measures"]["run_s"][0]]]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document))
    assert run(new, f"--against={old}") == 1
    assert "hk_stack auto" in capsys.readouterr().out
    with pytest.raises(app.UsageError, match="none of its cases would be measured"):
        run("--model=mlp", "--layers=3", f"--against={old}")


def test_several_results_become_one(written, tmp_path, capsys):
    one = written / "results.json"
    with pytest.raises(app.UsageError, match="have no row in common"):
        run(one, one)
    document = json.loads(one.read_text())
    for row in document["rows"]:
        row["case"][2] += 10
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    out = tmp_path / "both"
    assert run(one, other, f"--out={out}") == 0
    assert (out / "scaling_mlp_fwd_float32_b1_t4_d8.svg").exists()
    assert (out / "report.html").read_text().count("<svg") == 2
    assert "mlp, fwd, 11 layers" in capsys.readouterr().out
    other.write_text(json.dumps(document).replace('"device": "cpu"', '"device": "x"'))
    with pytest.raises(app.UsageError, match="of one device each: found cpu, x"):
        run(one, other)


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(app.UsageError, match="it has schema 99, expected 2"):
        run(path)
