"""`python -m hk_stack.port` reads what is on people's disks, or says why not."""

import io
import os
import pathlib
import subprocess
import sys

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import hk_stack
from hk_stack import checkpoint
from hk_stack.port.__main__ import main

nn = pytest.importorskip("flax.linen")
serialization = pytest.importorskip("flax.serialization")
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


@pytest.fixture
def run(capsys):
    """Calls the command in this process: its exit code, and what it wrote."""

    def call(*arguments):
        with flagsaver.flagsaver():
            try:
                main(flags.FLAGS(["port", *map(str, arguments)]))
                code = 0
            except SystemExit as stop:
                code = stop.code
        return code, *capsys.readouterr()

    return call


def test_a_checkpoint_is_shown(variables, tmp_path, run):
    code, text, _ = run(as_npz(tmp_path / "checkpoint", variables))
    assert code == 0
    head, titles, first, *_ = text.splitlines()
    assert head == "8 leaves, 70 numbers, 280 B"
    assert titles.split() == ["Flax", "in", "Haiku", "times", "bytes"]
    flax = ["params/block_0/Dense_0/bias", "float32[4]"]
    assert first.split()[:4] == [*flax, "block/linear/b", "3"]


def test_what_would_go_where(variables, of_haiku, tmp_path, run):
    path = as_npz(tmp_path / "checkpoint", variables)
    code, text, _ = run(path, f"--like={of_haiku}")
    assert code == 0
    assert text.startswith("8 leaves of Flax -> 4 leaves of Haiku")
    other = {"params": {**variables["params"], "tail": variables["params"]["head"]}}
    path = as_npz(tmp_path / "other", other)
    code, text, _ = run(path, f"--like={of_haiku}")
    assert code == 1
    assert "in Flax only (2):\n  params/tail/bias float32[2]" in text
    assert run(path, f"--like={of_haiku}", "--ignore=tail")[0] == 0


def test_what_is_left_out(variables, of_haiku, tmp_path, run):
    moments = {"0": {"mu": variables["params"]}}
    whole = {**variables, "opt_state": moments, "step": np.int32(7)}
    path = as_npz(tmp_path / "checkpoint", whole)
    code, text, _ = run(path)
    assert code == 0 and text.startswith("8 leaves, 70 numbers, 280 B")
    assert text.splitlines()[-2:] == [
        "left out: opt_state, 8 leaves, 280 B; --collections takes it",
        "left out: step, one leaf, 4 B; --collections takes it",
    ]
    assert run(path, f"--like={of_haiku}")[0] == 0
    assert "opt_state/0/mu/block_0" in run(path, "--collections=opt_state")[1]


def test_like_a_function(variables, tmp_path, run, monkeypatch):
    (tmp_path / "model_of_mine.py").write_text(
        "import jax\n"
        "def like():\n"
        "    of = lambda *shape: jax.ShapeDtypeStruct(shape, 'float32')\n"
        "    return {'head': {'w': of(4, 2), 'b': of(2)},\n"
        "            'block/linear': {'w': of(3, 4, 4), 'b': of(3, 4)}}, {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = as_npz(tmp_path / "checkpoint", variables)
    code, text, _ = run(path, "--like=model_of_mine:like")
    assert code == 0 and text.startswith("8 leaves of Flax -> 4 leaves of Haiku")
    code, _, error = run(path, "--like=model_of_mine:none")
    assert code == 2 and "expected a checkpoint, or module:function" in error


def test_a_skeleton_is_written(variables, tmp_path, run):
    code, source, _ = run(as_npz(tmp_path / "checkpoint", variables), "--skeleton")
    assert code == 0
    assert 'x = hk_stack.layer_stack(3, name="block")(block_layer)(x)' in source
    compile(source, "skeleton", "exec")


def test_names_and_collections_on_the_command_line(variables, of_haiku, tmp_path, run):
    params = dict(variables["params"])
    params["logits"] = params.pop("head")
    other = {"params": params, "step": {"n": np.ones(1)}}
    path = as_npz(tmp_path / "checkpoint", other)
    said = [f"--like={of_haiku}", "--collections=params"]
    assert run(path, *said)[0] == 1
    assert run(path, *said, "--rename=logits=head")[0] == 0
    assert run(path, *said, "--rename=logits")[0] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npz", None, "there is no such file or folder"),
        ("a.npz", b"no", "it is no file of NumPy, or is damaged"),
        ("a.pkl", b"no", "a pickle runs code"),
    ],
)
def test_mistakes(name, content, message, tmp_path, run):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, _, error = run(tmp_path / name)
    assert code == 2
    assert message in error and name in error


def test_flax_is_not_needed():
    """Porting itself takes plain dicts, with Flax out of reach; so does the command."""
    script = """
import sys
sys.modules["flax"] = None
import jax, numpy as np, hk_stack, hk_stack.port.__main__
variables = {"params": {"Dense_0": {"kernel": np.ones([3, 4], np.float32)}}}
like = {"linear": {"w": jax.ShapeDtypeStruct([3, 4], np.float32)}}, {}
ported = hk_stack.flax_to_haiku(variables, like)
back = hk_stack.haiku_to_flax(ported, variables)
assert np.array_equal(back["params"]["Dense_0"]["kernel"], np.ones([3, 4]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("library", "module", "write", "extra"),
    [
        ("flax", "flax.serialization", as_msgpack, "flax"),
        ("safetensors", "safetensors", as_safetensors, "checkpoint"),
    ],
)
def test_libraries_that_are_missing(
    library, module, write, extra, variables, tmp_path, run, monkeypatch
):
    path = write(tmp_path / "a", variables)
    monkeypatch.setitem(sys.modules, module, None)
    code, _, error = run(path)
    assert code == 2
    assert f"this needs {library}: pip install 'hk_stack[{extra}]'" in error


def test_weights_of_pytorch(tmp_path, run):
    path = as_npz(tmp_path / "a", {"wte": {"weight": np.ones([9, 4])}})
    code, text, _ = run(path, "--family=gpt2")
    assert code == 0 and "wte/embedding" in text


def test_paths_are_whole_in_narrow_tables():
    console = pytest.importorskip("rich.console")
    path = "encoder/with_a_long_name/self_attention/query"
    leaf = jax.ShapeDtypeStruct((3, 4), np.float32)
    found = hk_stack.port.plan(
        {"params": {path: {"w": leaf}}}, ({path: {"w": leaf}}, {})
    )
    narrow = console.Console(width=60, record=True, file=io.StringIO())
    narrow.print(found)
    lines = [line.split() for line in narrow.export_text().splitlines()[2:]]
    assert "".join(line[0] for line in lines if line).startswith(f"params/{path}")
