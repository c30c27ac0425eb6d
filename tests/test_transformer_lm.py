"""The deep language model learns, and goes on from wherever it was killed."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_example import FOLDER, as_script, assert_picture, load, run

from hk_stack import checkpoint

# The extras "checkpoint" and "examples" may not be installed.
for module in ("jmp", "matplotlib", "optax", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(module)

SIZES = {"layers": 4, "width": 8, "heads": 2, "length": 8}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]
TINY += ["--steps=8", "--batch_size=16", "--save_every=3", "--learning_rate=0.05"]

# Runs an example, and kills it right before the nth use of a function.
KILLED = """
import os, pkgutil, runpy, signal, sys

nth, owner, name, *sys.argv = sys.argv[1:]
owner = pkgutil.resolve_name(owner)
original, uses = getattr(owner, name), []

def last(*args, **kwargs):
    uses.append(name)
    if len(uses) == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, last)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill(nth, owner, name, *flags):
    """Runs the example in a process of its own until the nth use of a function."""
    example = str(FOLDER / "transformer_lm.py")
    command = [sys.executable, "-c", KILLED, str(nth), owner, name, example, *TINY]
    # What `as_script` sets here, so that both compute the same, bit for bit.
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # What is compiled here is not compiled again there.
    env |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([*command, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("lm") / "new" / "folder"
    run("transformer_lm", *TINY, f"--out={out}")
    return out


def saved(out):
    return checkpoint.load(out / "checkpoint.safetensors")


def test_learns_and_draws(trained):
    assert {path.name for path in trained.iterdir()} == {
        "checkpoint.safetensors",
        "curves.png",
    }
    assert_picture(trained / "curves.png")
    found = saved(trained)
    assert found["losses"].shape == (8,)
    done, held_out = found["held_out"].T
    assert done.tolist() == [3, 6, 8]
    assert 0 < held_out[2] < held_out[1] < held_out[0] < 9
    assert checkpoint.metadata(trained / "checkpoint.safetensors").depth == 4


def test_goes_on_from_wherever_it_was_killed(trained, tmp_path, capsys):
    # While the second checkpoint is written, before it takes the place of the first.
    out = f"--out={tmp_path}"
    kill(2, "os", "replace", out)
    assert len(saved(tmp_path)["losses"]) == 3
    assert list(tmp_path.glob(".*.tmp"))
    run("transformer_lm", *TINY, out)
    assert "Goes on after step 3" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(trained))
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path), saved(trained))


def test_evaluates_in_another_loop(trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    run("transformer_lm", *TINY, "--loop=python", "--remat=none", f"--out={out}")
    shown = capsys.readouterr().out
    assert "Goes on after step 8" in shown
    last = shown.splitlines()[-1]
    loss = re.match(r"Held-out loss (\d\.\d{3}) bits per character, 4\.\d+ from", last)
    # Half precision: other programs round otherwise.
    expected = saved(trained)["held_out"][-1, 1]
    assert float(loss[1]) == pytest.approx(expected, rel=1e-2)


def test_refuses_a_checkpoint_of_other_sizes(trained):
    before = (trained / "checkpoint.safetensors").read_bytes()
    with pytest.raises(SystemExit) as caught:
        run("transformer_lm", *TINY, "--layers=3", "--heads=1", f"--out={trained}")
    assert str(caught.value) == (
        f"{trained}/checkpoint.safetensors is of a model with --layers=4 --width=8 "
        "--heads=2 --length=8; these flags ask for --layers=3 --width=8 --heads=1 "
        "--length=8. Give the sizes of the checkpoint, or another --out."
    )
    assert (trained / "checkpoint.safetensors").read_bytes() == before


def test_refuses_an_altered_checkpoint(trained, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes((trained / "checkpoint.safetensors").read_bytes()[:-1])
    with pytest.raises(SystemExit, match="is truncated or was altered"):
        run("transformer_lm", *TINY, f"--out={tmp_path}")


def test_says_which_layer_is_not_finite(tmp_path):
    flags = "--check_finite", "--learning_rate=1e30", "--layers=2", "--remat=none"
    with pytest.raises(SystemExit, match=r"^Stopped in step \d: .* in layer \d of"):
        run("transformer_lm", *TINY, *flags, f"--out={tmp_path}")


@pytest.fixture
def example():
    with as_script():
        yield load("transformer_lm")


@pytest.fixture
def config(example):
    training = {"steps": 8, "batch_size": 16, "learning_rate": 0.05}
    return dataclasses.replace(example.DEFAULT, **SIZES, **training)


def test_stops_before_it_saves_what_is_not_finite(
    example, config, tmp_path, monkeypatch
):
    nan = float("nan")
    update = lambda training, key, batch: (training, nan)  # noqa: E731
    monkeypatch.setattr(example.common, "update", lambda *args: update)
    with pytest.raises(SystemExit, match=r"step 7: the loss is nan.*--check_finite"):
        example.step_of(config)({}, 6)
    path = tmp_path / "checkpoint.safetensors"
    example.save(path, config, {}, example.Losses([1.0], [(1, nan)]))
    assert not path.exists()


def test_only_matrices_decay(example, config):
    params, _ = jax.eval_shape(lambda: example.start(config))
    axes = {"layers": 3, "head": 2}
    for module, leaves in example.is_decayed(params).items():
        for name, is_decayed in leaves.items():
            is_matrix = params[module][name].ndim == axes.get(module.split("/")[0])
            assert is_decayed == is_matrix, (module, name)


def test_precision(example, config):
    params, _ = jax.eval_shape(lambda: example.start(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    apply = example.language_model(config).apply
    x = jax.ShapeDtypeStruct([2, 8], jnp.int32)
    closed = jax.make_jaxpr(apply, static_argnums=3)(params, jax.random.key(0), x, True)
    assert closed.out_avals[0].dtype == jnp.float32
    scan = next(e for e in closed.eqns if e.primitive.name == "scan")
    carry = scan.outvars[0].aval
    assert (carry.dtype, carry.shape) == (jnp.bfloat16, (2, 8, 8))
