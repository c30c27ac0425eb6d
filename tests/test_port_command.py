"""`python -m hk_stack.port` reads what is on people's disks, or says why not."""

import os
import pathlib
import subprocess
import sys

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hk_stack
from hk_stack import checkpoint
from hk_stack.port.__main__ import read

nn = pytest.importorskip("flax.linen")
serialization = pytest.importorskip("flax.serialization")
orbax = pytest.importorskip("orbax.checkpoint")
safetensors = pytest.importorskip("safetensors.numpy")

ROOT = pathlib.Path(__file__).parents[1]
L, D = 3, 4


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(D)(x)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(L):
            x = Block(name=f"block_{i}")(x)
        return nn.Dense(2, name="head")(x)


def haiku(x):
    def block(x):
        return x + hk.Linear(D)(x)

    x = hk_stack.layer_stack(L, name="block")(block)(x)
    return hk.Linear(2, name="head")(x)


@pytest.fixture(scope="module")
def variables():
    return jax.tree.map(np.asarray, Linen().init(jax.random.key(0), jnp.ones([1, D])))


@pytest.fixture(scope="module")
def of_haiku(tmp_path_factory):
    params = hk.transform(haiku).init(jax.random.key(0), jnp.ones([1, D]))
    path = tmp_path_factory.mktemp("haiku") / "haiku.safetensors"
    checkpoint.save(path, {"params": params})
    return path


def as_msgpack(path, variables):
    path = path.with_suffix(".msgpack")
    path.write_bytes(serialization.to_bytes(variables))
    return path


def as_orbax(path, variables):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, variables)
    return path


def as_managed(path, variables):
    with orbax.CheckpointManager(path) as manager:
        manager.save(7, args=orbax.args.StandardSave(variables))
        manager.wait_until_finished()
    return path / "7"


def named(variables, separator):
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf
        for path, leaf in jax.tree.leaves_with_path(variables)
    }


def as_safetensors(path, variables, separator="."):
    path = path.with_suffix(".safetensors")
    safetensors.save_file(named(variables, separator), path)
    return path


def as_npz(path, variables):
    path = path.with_suffix(".npz")
    np.savez(path, **named(variables, "/"))
    return path


def as_own_folder(path, variables):
    checkpoint.save(path, variables)
    return path


WRITERS = [as_msgpack, as_orbax, as_managed, as_safetensors, as_npz, as_own_folder]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of orbax's own formats.
def test_every_format_is_read(write, variables, tmp_path):
    found = read(str(write(tmp_path / "checkpoint", variables)))
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    assert found == types


def run(*arguments):
    command = [sys.executable, "-m", "hk_stack.port", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_checkpoint_is_shown(variables, tmp_path):
    done = run(as_npz(tmp_path / "checkpoint", variables))
    assert done.returncode == 0, done.stderr
    head, titles, *rows = done.stdout.splitlines()
    assert head == "8 leaves, 70 numbers, 280 B"
    assert titles.split() == ["Flax", "in", "Haiku", "times", "bytes"]
    assert rows[0].split()[:4] == [
        "params/block_0/Dense_0/bias",
        "float32[4]",
        "block/linear/b",
        "3",
    ]


def test_what_would_go_where(variables, of_haiku, tmp_path):
    path = as_npz(tmp_path / "checkpoint", variables)
    done = run(path, f"--like={of_haiku}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 leaves of Flax -> 4 leaves of Haiku")
    other = {"params": {**variables["params"], "tail": variables["params"]["head"]}}
    path = as_npz(tmp_path / "other", other)
    done = run(path, f"--like={of_haiku}")
    assert done.returncode == 1
    assert "in Flax only (2):\n  params/tail/bias float32[2]" in done.stdout
    assert run(path, f"--like={of_haiku}", "--ignore=tail").returncode == 0


def test_names_and_collections_on_the_command_line(variables, of_haiku, tmp_path):
    params = dict(variables["params"])
    params["logits"] = params.pop("head")
    path = as_npz(
        tmp_path / "checkpoint", {"params": params, "step": {"n": np.ones(1)}}
    )
    said = [f"--like={of_haiku}", "--collections=params"]
    assert run(path, *said).returncode == 1
    done = run(path, *said, "--rename=logits=head")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npz", None, "there is no such file or folder"),
        ("a.safetensors", b"no", "it is no file of safetensors, or is damaged"),
        ("a.npz", b"no", "it is no file of NumPy, or is damaged"),
        ("a.msgpack", b"\xc1", "it is no file of Flax's msgpack, or is damaged"),
        ("a.pkl", b"no", "a pickle runs code"),
    ],
)
def test_mistakes(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run(tmp_path / name)
    assert done.returncode == 2
    assert message in done.stderr and name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_steps_says_what_is_inside(variables, tmp_path):
    as_managed(tmp_path / "run", variables)
    with pytest.raises(ValueError, match=r"no arrays in it\. Name what is inside.*: 7"):
        read(str(tmp_path / "run"))


def test_flax_is_not_needed(variables, tmp_path):
    """Porting itself takes plain dicts, with Flax out of reach."""
    script = """
import sys
sys.modules["flax"] = None
import jax, numpy as np, hk_stack
variables = {"params": {"Dense_0": {"kernel": np.ones([3, 4], np.float32)}}}
like = {"linear": {"w": jax.ShapeDtypeStruct([3, 4], np.float32)}}, {}
ported = hk_stack.flax_to_haiku(variables, like)
back = hk_stack.haiku_to_flax(ported, variables)
assert np.array_equal(back["params"]["Dense_0"]["kernel"], np.ones([3, 4]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    message = run_without("flax", as_msgpack(tmp_path / "a", variables))
    assert "this needs flax: pip install 'hk_stack[flax]'" in message
    message = run_without("safetensors", as_safetensors(tmp_path / "a", variables))
    assert "this needs safetensors: pip install 'hk_stack[checkpoint]'" in message


def run_without(library, path):
    script = f"""
import runpy, sys
sys.modules[{library!r}] = None
sys.argv = ["port", {str(path)!r}]
runpy.run_module("hk_stack.port", run_name="__main__")
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr
