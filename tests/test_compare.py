"""The benchmark runs from the command line, and says what is wrong if it cannot."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("absl")  # The extra "examples" may not be installed.

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments):
    """Runs the benchmark in a process of its own, on the code of this repository."""
    command = [sys.executable, "-m", "hk_stack.compare", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_table(tmp_path):
    out = tmp_path / "result.json"
    done = run("--tables=recurrence", "--repeat=2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "recurrence, gradient" in done.stdout
    result = json.loads(out.read_text())
    assert result["environment"]["versions"]["jax"]
    assert result["environment"]["device"]
    row = result["tables"]["recurrence, forward"]["hk_stack auto"]
    assert len(row["run_s"]) == 2 and min(row["run_s"]) > 0
    assert row.keys() == {"run_s", "temp_bytes", "trace_s", "compile_s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables=s5"], "['s5'] not among"),
        (["--repeat=0"], "repeat"),
        (["--tables=recurrence", "--out=/no/such/folder/x.json"], "cannot write"),
        (["s4"], "unknown arguments"),
    ],
)
def test_mistakes(arguments, message):
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
