"""The command that measures the suite: one mutant is noticed, and one is not."""

import json
import pathlib
import subprocess
import sys

import pytest

SOURCE = "def doubled(x):\n    return x + x\n"
TESTS = """
from hk_stack import _tiny


def test_doubled():
    assert _tiny.doubled(0) == 0
"""
EXPLAINED = """
[[equivalent]]
text = "return x + x"
before = "x + x"
after = "(x - x)"
why = "it is zero"
"""


@pytest.mark.long
def test_mutants(tmp_path):
    for folder, name, text in [
        ("hk_stack", "__init__.py", ""),
        ("hk_stack", "_tiny.py", SOURCE),
        ("tests", "test_tiny.py", TESTS),
        ("tests", "mutants.toml", EXPLAINED),
    ]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    out = tmp_path / "mutants.json"

    def run(*options):
        script = pathlib.Path(__file__).with_name("mutants.py")
        folders = [f"--root={tmp_path}", f"--work={tmp_path}/work", f"--out={out}"]
        command = [sys.executable, script, "hk_stack/_tiny.py", "--jobs=1", *folders]
        subprocess.run([*command, *options], check=True)

    run("--part=1/2")
    assert not out.exists()
    run()
    found = json.loads(out.read_text())
    assert found["killed of"] == {"hk_stack/_tiny.py": [1, 2]}
    assert [(m["line"], m["after"], m["why"]) for m in found["survivors"]] == [
        (2, "(x - x)", "it is zero")
    ]
    assert (tmp_path / "hk_stack/_tiny.py").read_text() == SOURCE
