"""The walk-throughs of porting run, find both models equal, and refuse bad flags."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

# The extras "checkpoint", "examples" and "flax" may not be installed.
for module in ("absl", "flax", "matplotlib", "optax", "orbax", "sklearn", "tqdm"):
    pytest.importorskip(module)

ROOT = pathlib.Path(__file__).parents[1]
TEXT = ["--layers=2", "--length=8", "--dropout=0.1"]
TINY = {
    "transformer": ["--width=8", "--heads=2", *TEXT],
    "s4": ["--width=4", "--state_size=4", *TEXT],
    "resnet": ["--width=4", "--groups=2"],
}
EXAMPLES = pytest.mark.parametrize("name", TINY)
ONE_EXAMPLE = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "transformer" else pytest.mark.long)
        for name in TINY
    ],
)


def run(name, *arguments):
    """Runs an example in a process of its own, on the code of this repository."""
    example = ROOT / "examples" / f"port_{name}.py"
    sizes = [*TINY[name], "--steps=4", "--batch_size=8"]
    command = [sys.executable, str(example), *sizes, *map(str, arguments)]
    # Compilation takes most of the time, and sizes are tiny.
    fast = "--xla_backend_optimization_level=0"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": fast}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@ONE_EXAMPLE
def test_walk_through(name, tmp_path):
    out = tmp_path / "new" / "folder"
    done = run(name, f"--out={out}")
    assert done.returncode == 0, done.stderr
    for bar in ("Flax", "Haiku"):
        assert re.search(rf"{bar}: 100%.* 4/4 .*loss \d\.\d+", done.stderr)
    assert_plan(done.stdout, name)
    assert_equal_models(done.stdout, name)
    assert_summary(done.stdout)
    assert_picture(out / "curves.png")


def assert_plan(text, name):
    """Every leaf of the table has found its place."""
    pattern = r"^(?:\d+ leaves of Flax|  params/|  batch_stats/).*"
    header, *rows = re.findall(pattern, text, re.M)
    assert "leaves of Haiku" in header
    assert rows
    assert all(row.rstrip().endswith(" ok") for row in rows)
    assert any("batch_stats/" in row for row in rows) == (name == "resnet")


def assert_equal_models(text, name):
    """What is compared last of each mode is as good as equal."""
    lines = re.findall(r"Differences in (\w+), in (\w+) precision: (.*)", text)
    found = {mode: (precision, parsed(line)) for mode, precision, line in lines}
    modes = {"evaluation", "training"} if name == "resnet" else {"evaluation"}
    assert found.keys() == modes
    for precision, differences in found.values():
        assert precision == ("double" if name == "s4" else "single")
        assert {"logits", "loss", "gradients"} <= differences.keys()
        assert all(value < 1e-5 for value in differences.values())
    assert ("statistics" in found["evaluation"][1]) == (name == "resnet")


def parsed(line):
    """`logits 3e-07, loss 0e+00` as a dictionary."""
    return {name: float(value) for name, value in (x.split() for x in line.split(", "))}


def assert_summary(text):
    """Porting changes no held-out loss, there or back; training does."""
    number, small = r"(\d+\.\d\d)", r"(\d+e[-+]\d\d)"
    summary = re.fullmatch(
        f"Held-out loss {number} in Flax, {number} ported, {number} after training on "
        f"in Haiku; largest difference of logits {small}, of gradients {small}",
        text.splitlines()[-1],
    )
    in_flax, ported, trained, logits, gradients = map(float, summary.groups())
    assert in_flax == ported != trained
    assert max(logits, gradients) < 1e-5
    back = re.search(r"Moved back, the held-out loss is (\d+\.\d+) in Flax", text)
    assert float(back[1]) == pytest.approx(trained, abs=0.006)


def assert_picture(path):
    import matplotlib.image

    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) >= 400
    assert np.std(image[..., :3]) > 0.05


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("transformer", ["--heads=3"], "--heads must be a divisor of --width"),
        ("transformer", ["haiku"], "Unknown arguments: haiku"),
        ("s4", ["--dropout=1"], "must be at least 0 and less than 1"),
        ("resnet", ["--groups=5"], "--groups"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_bad_flags(name, arguments, message, tmp_path):
    done = run(name, *arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_refuses_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    done = run("transformer", f"--out={tmp_path / 'file' / 'folder'}")
    assert done.returncode != 0
    assert re.fullmatch(r"Cannot write to --out=.*Not a directory.*\n", done.stderr)
