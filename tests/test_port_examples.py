"""The walk-throughs of porting find both models equal, and training goes on."""

import re

import pytest
from run_example import assert_picture, run

# The extras "checkpoint", "examples" and "flax" may not be installed.
for module in ("flax", "matplotlib", "optax", "orbax", "sklearn", "tqdm"):
    pytest.importorskip(module)

TEXT = ["--layers=2", "--length=8", "--dropout=0.1"]
TINY = {
    "transformer": ["--width=8", "--heads=2", *TEXT],
    "s4": ["--width=4", "--state_size=4", *TEXT],
    "resnet": ["--width=4", "--groups=2"],
}
TRAINING = ["--steps=20", "--batch_size=16", "--learning_rate=0.01"]


@pytest.mark.parametrize(
    "name",
    [
        "transformer",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("s4", "resnet")),
    ],
)
def test_walk_through(name, tmp_path, capsys):
    run(f"port_{name}", *TINY[name], *TRAINING, f"--out={tmp_path}")
    shown = capsys.readouterr()
    for bar, steps in (("Flax", "20/20"), ("Haiku", "40/40")):
        assert re.search(rf"{bar}: 100%.* {steps} .*loss \d\.\d+", shown.err)
    assert_plan(shown.out, name)
    assert_equal_models(shown.out, name)
    assert_summary(shown.out)
    assert_picture(tmp_path / "curves.png")


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
    """Porting changes no held-out loss, there or back; training lowers it."""
    number, small = r"(\d+\.\d\d)", r"(\d+e[-+]\d\d)"
    summary = re.fullmatch(
        f"Held-out loss {number} in Flax, {number} ported, {number} after training on "
        f"in Haiku; largest difference of logits {small}, of gradients {small}",
        text.splitlines()[-1],
    )
    in_flax, ported, trained, logits, gradients = map(float, summary.groups())
    assert in_flax == ported > trained
    assert max(logits, gradients) < 1e-5
    back = re.search(r"Moved back, the held-out loss is (\d+\.\d+) in Flax", text)
    assert float(back[1]) == pytest.approx(trained, abs=0.006)
