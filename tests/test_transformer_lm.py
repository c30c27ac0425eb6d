"""The deep language model trains, draws, and goes on from wherever it was killed."""

import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hk_stack import checkpoint

# The extras "checkpoint" and "examples" may not be installed.
for module in ("absl", "jmp", "matplotlib", "optax", "safetensors", "tqdm"):
    pytest.importorskip(module)

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "transformer_lm.py")
SIZES = {"layers": 4, "width": 8, "heads": 2, "length": 8}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]
TINY += ["--steps=8", "--batch_size=4", "--save_every=3", "--dropout=0.2"]

# Runs a program, and kills it right before the nth call of a function.
KILLED = """
import os, pkgutil, runpy, signal, sys

nth, owner, name, *sys.argv = sys.argv[1:]
owner = pkgutil.resolve_name(owner)
original, calls = getattr(owner, name), []

def last(*args, **kwargs):
    calls.append(name)
    if len(calls) == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, last)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments, program=(EXAMPLE,)):
    """Runs the example in a process of its own, on the code of this repository."""
    command = [sys.executable, *program, *TINY, *map(str, arguments)]
    fast = "--xla_backend_optimization_level=0"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": fast}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def kill(nth, owner, name, *arguments):
    """Runs the example until the nth call of a function; returns what it printed."""
    done = run(*arguments, program=("-c", KILLED, str(nth), owner, name, EXAMPLE))
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The processes share what they compile, as that takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an undisturbed run, and what that run said."""
    out = tmp_path_factory.mktemp("lm") / "new" / "folder"
    done = run(f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out, done


def test_trains_and_draws(trained):
    out, done = trained
    assert re.search(r"8/8 .*loss \d\.\d+, held out \d\.\d+", done.stderr)
    assert 0 < held_out(done) < 9
    assert_picture(out / "curves.png")
    names = {"checkpoint.safetensors", "curves.png", "losses.csv"}
    assert {path.name for path in out.iterdir()} == names
    log = np.genfromtxt(out / "losses.csv", delimiter=",", names=True)
    assert log["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert np.all(np.isfinite(log["loss"]))
    assert log["step"][np.isfinite(log["held_out_loss"])].tolist() == [3, 6, 8]


def held_out(done):
    """The held-out loss that a run printed at its end."""
    number, last = r"(\d+\.\d{3})", done.stdout.splitlines()[-1]
    pattern = rf"Held-out loss {number} bits per character, {number} from .* \d+ s"
    return float(re.fullmatch(pattern, last)[1])


def assert_picture(path):
    import matplotlib.image

    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) >= 400
    assert np.std(image[..., :3]) > 0.05


def test_goes_on_from_wherever_it_was_killed(trained, tmp_path):
    out = f"--out={tmp_path}"
    # Between two checkpoints: after five steps, of which three are saved.
    kill(5, "tqdm:tqdm", "update", out)
    assert steps(tmp_path) == (5, 3)
    # While a checkpoint is written, before it takes the place of the one before. The
    # first call is for the log.
    assert "after step 3" in kill(2, "os", "replace", out)
    assert steps(tmp_path) == (6, 3)
    assert list(tmp_path.glob(".*.tmp"))
    # Right after that: first the log is flushed, then the new checkpoint, here both.
    assert "after step 3" in kill(3, "os", "fsync", out)
    assert steps(tmp_path) == (6, 6)
    done = run(out)
    assert "after step 6" in done.stdout
    assert_same(tmp_path, trained[0])
    assert held_out(done) == held_out(trained[1])


def steps(out):
    """How many steps the log has, and the checkpoint."""
    rows = (out / "losses.csv").read_text().count("\n") - 1
    return rows, checkpoint.load(out / "checkpoint.safetensors")["training"]["step"]


def assert_same(out, expected):
    """The same files, and in log and checkpoint the same numbers, bit for bit."""
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in expected.iterdir())
    assert (out / "losses.csv").read_text() == (expected / "losses.csv").read_text()
    trees = [checkpoint.load(x / "checkpoint.safetensors") for x in (out, expected)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize(
    "changed", [["--loop=unrolled", "--remat=sqrt"], ["--loop=python", "--remat=none"]]
)
def test_evaluates_in_another_loop(changed, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    done = run(*changed, f"--out={out}")
    assert "after step 8" in done.stdout
    # Half precision: other programs round otherwise.
    assert held_out(done) == pytest.approx(held_out(trained[1]), rel=1e-2)
    assert_same(out, trained[0])


def test_refuses_a_checkpoint_of_other_sizes(trained):
    out, _ = trained
    before = (out / "losses.csv").read_text()
    done = run("--layers=3", "--heads=1", f"--out={out}")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"{out}/checkpoint.safetensors is of a model with --layers=4 --width=8 "
        "--heads=2 --length=8; these flags ask for --layers=3 --width=8 --heads=1 "
        "--length=8. Give the sizes of the checkpoint, or another --out."
    )
    assert (out / "losses.csv").read_text() == before


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_says_which_layer_is_not_finite(loop, tmp_path):
    bad = "--check_finite", "--learning_rate=1e30", f"--loop={loop}"
    done = run(*bad, f"--out={tmp_path}")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert re.fullmatch(
        r"Stopped in step \d: the first value that is not finite is .*"
        r" in layer \d of layer_stack 'layers'.*",
        done.stderr.splitlines()[-1],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads=3"], "--heads must be a divisor of --width"),
        (["haiku"], "Unknown arguments: haiku"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_bad_flags(arguments, message, tmp_path):
    done = run(*arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def example():
    # JAX's attention itself promotes bfloat16 to float32.
    with jax.numpy_dtype_promotion("standard"):
        yield runpy.run_path(EXAMPLE)


def test_refuses_an_altered_folder(example, trained, tmp_path):
    """A log that lacks steps, a checkpoint that lacks bytes."""
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    names = "checkpoint.safetensors", "curves.png", "losses.csv"
    files, config = example["Files"](*map(out.joinpath, names)), example["Config"]
    files.log.write_text("step\n1\n2\n")
    with pytest.raises(SystemExit, match=r"has 2 steps, but .* is of step 8"):
        example["resume"](config(**SIZES), files)
    files.checkpoint.write_bytes(files.checkpoint.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="is truncated or was altered"):
        example["resume"](config(**SIZES), files)


def test_only_matrices_decay(example):
    start = jax.eval_shape(lambda: example["start"](example["Config"](**SIZES)))
    decayed = jax.tree.leaves_with_path(example["is_decayed"](start.params))
    axes = {"layers": 3, "head": 2}
    for (module, name), is_decayed in ((x[0], x[1]) for x in decayed):
        leaf = start.params[module.key][name.key]
        is_matrix = leaf.ndim == axes.get(module.key.split("/")[0])
        assert is_decayed == is_matrix, (module, name)


def test_precision(example):
    config = example["Config"](**SIZES)
    params = jax.eval_shape(lambda: example["start"](config)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    model = example["language_model"](config)
    x = jax.ShapeDtypeStruct([2, 8], jnp.int32)
    apply = lambda *args: model.apply(*args, is_training=True)  # noqa: E731
    key = jax.random.key(0)
    closed = jax.make_jaxpr(apply)(params, key, x)
    assert closed.out_avals[0].dtype == jnp.float32
    scan = next(e for e in closed.eqns if e.primitive.name == "scan")
    carry = scan.outvars[0].aval
    assert (carry.dtype, carry.shape) == (jnp.bfloat16, (2, 8, 8))


def test_stops_before_it_saves_what_is_not_finite(example):
    refuse, row = example["refuse_infinity"], example["Row"]
    refuse(row(1, 2.0, 3.0))
    for bad in (row(7, float("nan"), 1.0), row(7, 1.0, float("inf"))):
        with pytest.raises(SystemExit, match=r"step 7.*--check_finite"):
            refuse(bad)
