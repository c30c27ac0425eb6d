"""Every example runs from the command line, and says what is wrong if it cannot."""

import functools
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for module in ("absl", "matplotlib", "optax", "sklearn", "tqdm"):
    pytest.importorskip(module)  # The extra "examples" may not be installed.

ROOT = pathlib.Path(__file__).parents[1]
DIGITS, GENERATE, SLOW = (
    ROOT / "examples" / f"{name}.py"
    for name in ("s4_digits", "s4_generate", "slow_setup")
)
SIZES = {"layers": 2, "width": 4, "state_size": 4}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]
TINY += ["--epochs=1", "--batch_size=479"]


def run(example, *arguments):
    """Runs an example in a process of its own, on the code of this repository."""
    command = [sys.executable, str(example), *map(str, arguments)]
    # Compilation takes most of the time, and sizes are tiny.
    fast = "--xla_backend_optimization_level=0"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": fast}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "way",
    [
        "--layer_stack=hk_stack",
        pytest.param("--layer_stack=haiku", marks=pytest.mark.long),
        pytest.param("--framework=linen", marks=pytest.mark.long),
    ],
)
def test_digits(way, tmp_path):
    if "linen" in way:
        pytest.importorskip("flax")
    out = tmp_path / "new" / "folder"
    done = run(DIGITS, *TINY, way, f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert_progress_and_summary(done)
    for picture in ("curves.png", "digits.png"):
        assert_picture(out / picture)
    assert_parameters(out / "params.npz")


def assert_progress_and_summary(done):
    assert re.search(r"3/3 .*loss \d.*accuracy \d.*held out \d", done.stderr)
    last = done.stdout.splitlines()[-1]
    assert re.match(r"Held-out accuracy \d+\.\d%, trained in \d+\.\d s", last)


def assert_picture(path):
    import matplotlib.image

    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) >= 400
    assert np.std(image[..., :3]) > 0.05


def assert_parameters(path):
    """The same names and shapes whichever framework trained them."""
    example = runpy.run_path(str(DIGITS))
    model = example["haiku_model"](example["Config"](**SIZES))
    expected = jax.eval_shape(model.init, jax.random.key(0), np.ones([1, 64, 2], "f4"))
    expected = {
        f"{module}/{name}": leaf.shape
        for module, leaves in expected.items()
        for name, leaf in leaves.items()
    }
    with np.load(path, allow_pickle=False) as file:
        params = dict(file)
    assert {name: value.shape for name, value in params.items()} == expected
    assert all(np.all(np.isfinite(value)) for value in params.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--framework=linen", "--layer_stack=haiku"], "Linen stacks with nn.scan"),
        (["--batch_size=2000"], "--batch_size"),
        (["--dropout=1"], "must be at least 0 and less than 1"),
        (["haiku"], "Unknown arguments: haiku"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_digits_refuses_bad_flags(arguments, message, tmp_path):
    done = run(DIGITS, *TINY, *arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_digits_refuses_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    done = run(DIGITS, *TINY, f"--out={tmp_path / 'file' / 'folder'}")
    assert done.returncode != 0
    assert re.fullmatch(r"Cannot write to --out=.*Not a directory.*\n", done.stderr)


@pytest.mark.parametrize(
    ("framework", "ways"),
    [
        (
            "haiku",
            ["hk_stack.partition", "hk_stack.layer_stack alone", "hk.layer_stack"],
        ),
        pytest.param(
            "linen",
            ['collection "prime"', "hk_stack.partition", "setup in every step"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_generate(framework, ways, tmp_path):
    if framework == "linen":
        pytest.importorskip("flax")
    out = tmp_path / "new" / "folder"
    tiny = [*TINY, "--completions=2", f"--framework={framework}"]
    done = run(GENERATE, *tiny, f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"3/3 .*bits per pixel \d\.\d+", done.stderr)
    assert_picture(out / "completions.png")
    table = re.findall(r"^(.+?)  +([\d,]+) +([\d,]+) +[\d.]+ ms$", done.stdout, re.M)
    assert [name for name, *_ in table] == ways
    assert all(int(x.replace(",", "")) > 0 for _, *row in table for x in row)
    bits = re.fullmatch(
        r"Held-out bits per pixel (\d\.\d+); 2\.976 for .*",
        done.stdout.splitlines()[-1],
    )
    assert float(bits[1]) < 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=0"], "must be greater than 0"),
        (["--completions=0"], "--completions"),
        (["--dropout=1"], "must be at least 0 and less than 1"),
        (["--framework=nnx"], "--framework"),
        (["haiku"], "Unknown arguments: haiku"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_refuses_bad_flags(arguments, message, tmp_path):
    done = run(GENERATE, *TINY, *arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loop", ["in_one_program", "one_by_one"])
def test_generate_keeps_what_is_given_and_draws_the_rest(loop):
    example = runpy.run_path(str(GENERATE))
    start, unknown, shades = (example[x] for x in ("START", "UNKNOWN", "NUM_SHADES"))

    def counting(weight, tokens, states):
        return weight * jax.nn.one_hot((tokens + 1) % shades, shades), states

    pixel = functools.partial(example["next_pixel"], counting, 1.0)
    given = jnp.array([[3, unknown, unknown, 9, unknown], [unknown] * 5])
    carry = jnp.full(2, start), ()
    keys = jax.random.split(jax.random.key(0), 5)
    drawn = example[loop](pixel)(jnp.float32(1e3), carry, given.T, keys)
    assert np.transpose(drawn).tolist() == [[3, 4, 5, 9, 10], [1, 2, 3, 4, 5]]


def test_generate_refuses_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    done = run(GENERATE, *TINY, f"--out={tmp_path / 'file' / 'folder'}")
    assert done.returncode != 0
    assert re.fullmatch(r"Cannot write to --out=.*Not a directory.*\n", done.stderr)


def test_slow_setup():
    done = run(SLOW)
    assert done.returncode == 0, done.stderr
    inside, *_ = re.findall(r"in the loop +(\d+) +(\d+)", done.stdout)
    assert int(inside[0]) > 0
    assert int(inside[1]) == 0
    assert "are equal" in done.stdout
