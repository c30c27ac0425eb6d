"""Examples learn, write what they say, and say what is wrong if they cannot."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from run_example import FOLDER, as_script, assert_picture, load, run

import hk_stack
from hk_stack import checkpoint

# The extras that the examples need may not be installed.
for module in ("flax", "jmp", "matplotlib", "optax", "orbax", "sklearn", "tqdm"):
    pytest.importorskip(module)

EXAMPLES = [path.stem for path in FOLDER.glob("*.py") if "run(main" in path.read_text()]
S4 = ["--layers=2", "--width=8", "--state_size=4", "--dropout=0"]
S4 += ["--batch_size=64", "--learning_rate=0.03"]


def test_runs_from_any_folder(tmp_path):
    """As a process of its own, which finds the files that examples share."""
    command = [sys.executable, FOLDER / "s4_digits.py", "--help"]
    env = {"PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: s4_digits.py [--FLAG=VALUE ...]\n")
    assert done.stderr == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_help(name, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        run(name, "--help")
    shown = capsys.readouterr().out
    example = load(name)
    assert example.__doc__.strip() in shown
    for field, value in vars(example.DEFAULT).items():
        assert f"--{field}" in shown
        assert value is None or f"Default: {value}." in re.sub(r"\s+", " ", shown)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("s4_digits", "--framework=linen --layer_stack=haiku", "Linen stacks with"),
        ("s4_digits", "--framework=nnx", "invalid choice: 'nnx'"),
        ("s4_digits", "--dropout=1", "a number, at least 0 and less than 1, not '1'"),
        ("s4_digits", "--layers=two", "an integer, at least 1, not 'two'"),
        ("s4_digits", "haiku", "unrecognized arguments: haiku"),
        ("s4_generate", "--temperature=0", "--temperature: must be a number, at least"),
        ("pair_transformer", "--points=2", "--points: must be an integer, at least 4"),
        ("pair_transformer", "--heads=3", "--heads must be a divisor of --width"),
        ("transformer_lm", "--heads=3", "--heads must be a divisor of --width"),
        ("seed_as_it_is", "--depths=4,0", "--depths must be integers, at least 1"),
        ("port_resnet", "--groups=5", "at least 1 and less than 5, not '5'"),
    ],
)
def test_refuses_bad_flags(name, flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run(name, *flags.split(), f"--out={tmp_path / 'out'}")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refuses_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^Cannot write to --out=.*Not a directory"):
        run("s4_digits", f"--out={tmp_path / 'file' / 'folder'}")


# The smallest settings of examples that run for a person to look at.
SMALLEST = {
    "slow_setup": "--layers=1 --states=1 --steps=1",
    "seed_as_it_is": "--layers=1 --depths=1 --width=1 --state_size=1 --length=1 "
    "--batch_size=1 --rounds=1",
    "s4_digits": "--layers=1 --width=1 --state_size=1 --epochs=1 --batch_size=1000",
    "s4_generate": "--layers=1 --width=1 --state_size=1 --epochs=1 --batch_size=1000 "
    "--completions=1",
    "transformer_lm": "--layers=1 --width=1 --heads=1 --length=2 --steps=1 "
    "--batch_size=1",
    "pair_transformer": "--super_blocks=1 --blocks=1 --points=4 --width=1 "
    "--pair_width=1 --heads=1 --steps=1 --rounds=1 --batch_size=1",
}


def process(name, *flags, **options):
    """An example as a person runs it, its output in pipes."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env["PYTHONPATH"] = str(FOLDER.parent)
    command = [sys.executable, FOLDER / f"{name}.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes, **options)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_smallest_settings(name, tmp_path):
    """Lines of progress and no others on stderr; files below out/ only."""
    example = process(name, *SMALLEST[name].split(), cwd=tmp_path)
    out, err = example.communicate()
    assert example.returncode == 0, err
    line = r"100%, 1/1 steps, loss \d.*|1 layers: 6 ways are built"
    assert all(re.fullmatch(line, found) for found in err.splitlines())
    assert not re.search(r"\bnan\b|DIFFERENT", out + err)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


@pytest.mark.long
def test_ctrl_c_in_training(tmp_path):
    flags = SMALLEST["s4_digits"].replace("--epochs=1", "--epochs=9999").split()
    example = process("s4_digits", *flags, cwd=tmp_path)
    assert example.stderr.readline().startswith("0%, 1/9999 steps, loss")
    example.send_signal(signal.SIGINT)
    _, err = example.communicate()
    assert example.returncode == 130 and "Traceback" not in err
    assert err.endswith("\nStopped.\n")


def test_ctrl_c_is_a_line(capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^130$"):
        load("common").run(interrupted, load("slow_setup").DEFAULT, [])
    assert capsys.readouterr().err == "\nStopped.\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_is_a_bar_or_lines(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    steps, every = range(2, 7), 3
    load("common").train(lambda x, n: (x, n), 0, steps, lambda x: 0.5, every, name="A")
    shown = sys.stderr.getvalue()
    if stream is Terminal:
        assert re.search(r"\rA: 100%.* 7/7 .*loss 4.000, held out 0.500", shown)
    else:
        assert shown == (
            "A: 43%, 3/7 steps, loss 2.000, held out 0.500\n"
            "A: 86%, 6/7 steps, loss 3.500, held out 0.500\n"
            "A: 100%, 7/7 steps, loss 4.000, held out 0.500\n"
        )


@pytest.mark.parametrize(
    ("loss", "held_out", "message"),
    [
        (math.nan, 1, "Stopped in step 1: the loss is nan; a lower --learning_rate"),
        (1, math.inf, "Stopped in step 2: the held-out loss is inf"),
    ],
)
def test_losses_that_are_not_finite_stop_training(loss, held_out, message):
    with pytest.raises(SystemExit, match=message):
        load("common").train(
            lambda x, n: (x, loss), 0, range(2), held_out=lambda x: held_out
        )


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("yscale", ["linear", "log"])
def test_curves_of_few_steps(steps, yscale):
    """What is in the legend is seen; ticks are whole steps, and labelled in digits."""
    common = load("common")
    figure = common.Figure()
    axes = figure.subplots()
    losses = np.linspace(2.5, 2.4, steps)
    common.draw_smooth(axes, range(steps), losses, "training")
    common.finish(axes, title="T", ylabel="loss", xlim=(0, steps), yscale=yscale)
    figure.draw_without_rendering()
    (line,) = axes.get_legend().legend_handles
    assert steps > 1 or line.get_marker() == "o"
    assert np.allclose(axes.lines[0].get_ydata(), np.median(losses), atol=0.06)
    assert all(tick.is_integer() for tick in axes.get_xticks())
    labels = [text.get_text() for text in axes.yaxis.get_ticklabels(which="both")]
    assert any(labels) and not any("$" in text for text in labels)


def test_differences_where_all_is_zero():
    difference = load("common").difference
    zero, one = {"w": np.zeros(2)}, {"w": np.ones(2)}
    assert [difference(zero, zero), difference(one, zero), difference(one, one)] == [
        *(0, 1, 0)
    ]


def test_slow_setup(capsys):
    run("slow_setup", "--layers=3", "--states=4", "--steps=16")
    shown = capsys.readouterr().out
    assert re.search(r"gradient: run, ms +\d+\.\d +\d+\.\d\n", shown)
    assert "are equal" in shown


def test_slow_kernel_leaves_the_loop():
    example = load("slow_setup")
    config = example.Config(layers=3, states=4, steps=16)
    x = jnp.ones(16)

    def inside(layer_stack):
        model = example.transform(config, layer_stack)
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        jaxpr = jax.make_jaxpr(model.apply)(params, x).jaxpr
        return "scan" in jaxprs.names(jaxprs.body(jaxpr, 3))

    assert inside(hk.layer_stack)
    assert not inside(hk_stack.layer_stack)


# The layers of the Flax thread, small.
SEED = {"width": 4, "state_size": 2, "length": 8, "batch_size": 1}


def losses_of_processes(folder, *flags):
    sizes = "--layers=2", "--width=8", "--steps=9", "--every=3"
    run("multi_process", f"--out={folder}", *sizes, *flags)
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return dict(map(json.loads, lines))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Losses of a run that nothing happened to."""
    found = losses_of_processes(tmp_path_factory.mktemp("whole"))
    assert found[8] < 0.95 * found[0]
    return found


@pytest.mark.long
@pytest.mark.parametrize("step", [1, 3, 4, 8])  # At 3, right after a save.
def test_processes_that_die(step, expected, tmp_path, capfd):
    found = losses_of_processes(tmp_path, f"--kill_at={step}")
    assert "all begin again" in capfd.readouterr().out
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.long
def test_processes_that_die_while_they_save(expected, tmp_path):
    example = load("multi_process")
    sizes = {"layers": 2, "width": 8, "steps": 9, "every": 1}
    config = example.Config(out=str(tmp_path), **sizes)
    log, begun = tmp_path / "losses.jsonl", 0
    log.touch()

    def saving():
        return set(tmp_path.glob(".*.hk_stack.tmp"))  # Not whole yet.

    for rank, steps in ((0, 1), (1, 2), (0, 2), (1, 1)):
        known = len(log.read_text().splitlines())
        children = example.start(config)
        before = saving()
        while len(log.read_text().splitlines()) < known + steps or saving() <= before:
            assert None in [child.poll() for child in children]
            time.sleep(0.001)
        children[rank].kill()
        example.wait(children)
        begun += bool(saving())
    assert begun
    assert checkpoint.latest(tmp_path)
    found = losses_of_processes(tmp_path, "--every=1")
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("numbers", [(2, 1), (1, 2)], ids=str)
def test_processes_that_are_more_or_fewer_then(numbers, expected, tmp_path):
    before, after = ((f"--processes={n}", f"--devices={4 // n}") for n in numbers)
    first = losses_of_processes(tmp_path, *before, "--steps=6")
    then = losses_of_processes(tmp_path, *after)
    assert first == {step: then[step] for step in range(6)}
    assert then == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_seed_as_it_is(tmp_path, capsys):
    flags = [f"--{name}={size}" for name, size in SEED.items()]
    flags += ["--layers=4", "--depths=4", "--rounds=2", f"--out={tmp_path}"]
    run("seed_as_it_is", *flags)
    shown = capsys.readouterr().out
    table = (tmp_path / "table.txt").read_text()
    assert table in shown
    rows = r"^(\S.*?)  +[\d.]+ +[\d.]+ +[\d.]+ +\de[-+]\d\d$"
    names = re.findall(rows, table, re.M)
    assert len(names) == 6
    assert names[:2] == ["list", "list + roll"]
    assert "are equal, up to rounding" in shown.splitlines()[-1]
    assert_picture(tmp_path / "build.png")


def test_kernels_of_the_seed_leave_the_loop():
    example = load("seed_as_it_is")
    config = example.Config(**SEED, out="none")

    def kernels(jaxpr):
        """Each takes an inverse FFT of complex numbers, which no call does."""
        found = (eqn.params.get("fft_type") for eqn in jaxprs.equations(jaxpr))
        return sum(kind == jax.lax.FftType.IFFT for kind in found)

    with as_script():
        programs = {
            name: jax.make_jaxpr(way.apply)(way.params, example.inputs(config)).jaxpr
            for name, way in example.all_ways(config, 4).items()
        }
    assert kernels(programs.pop("list")) == 4
    assert kernels(jaxprs.body(programs.pop("nn.scan"), 4)) == 1
    for name, jaxpr in programs.items():
        assert not kernels(jaxprs.body(jaxpr, 4)), name


@pytest.mark.parametrize(
    "way",
    [
        "--layer_stack=hk_stack",
        pytest.param("--layer_stack=haiku", marks=pytest.mark.long),
        pytest.param("--framework=linen", marks=pytest.mark.long),
    ],
)
def test_digits(way, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    run("s4_digits", *S4, way, "--epochs=8", f"--out={out}")
    shown = capsys.readouterr()
    assert re.search(r"176/176 .*loss \d\.\d+, held out \d\.\d+", shown.err)
    last = shown.out.splitlines()[-1]
    accuracy = re.match(r"Held-out accuracy (\d+\.\d)%, trained in \d+\.\d s", last)[1]
    assert float(accuracy) > 25
    for picture in ("curves.png", "digits.png"):
        assert_picture(out / picture)
    with np.load(out / "params.npz", allow_pickle=False) as file:
        shapes = {name: value.shape for name, value in file.items()}
    # Names and shapes are the same whichever framework trained them.
    assert shapes["layers/block/s4/log_step"] == (2, 8)
    assert shapes["decoder/w"] == (8, 10)
    assert len(shapes) == 15


def test_generate(tmp_path, capsys):
    run("s4_generate", *S4, "--epochs=2", "--completions=2", f"--out={tmp_path}")
    assert_picture(tmp_path / "completions.png")
    shown = capsys.readouterr().out
    assert "partition of" in shown
    table = re.findall(r"^(.+?)  +([\d,]+) +([\d,]+) +[\d.]+ ms$", shown, re.M)
    ways = ["hk_stack.partition", "hk_stack.layer_stack alone", "hk.layer_stack"]
    assert [name for name, *_ in table] == ways
    last = shown.splitlines()[-1]
    bits = re.fullmatch(r"Held-out bits per pixel (\d\.\d+); 2\.976 for .*", last)[1]
    assert float(bits) < 2.976


@pytest.mark.parametrize("loop", ["in_one_program", "one_by_one"])
def test_generate_keeps_what_is_given_and_draws_the_rest(loop):
    example = load("s4_generate")
    start, unknown, shades = example.START, example.UNKNOWN, example.NUM_SHADES

    def counting(weight, tokens, states):
        return weight * jax.nn.one_hot((tokens + 1) % shades, shades), states

    pixel = example.pixel_of(example.Decoder(None, counting, ()), temperature=1.0)
    given = jnp.array([[3, unknown, unknown, 9, unknown], [unknown] * 5])
    carry = jnp.full(2, start), ()
    keys = jax.random.split(jax.random.key(0), 5)
    drawn = getattr(example, loop)(pixel)(jnp.float32(1e3), carry, given.T, keys)
    assert np.transpose(drawn).tolist() == [[3, 4, 5, 9, 10], [1, 2, 3, 4, 5]]
