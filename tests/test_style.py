"""The linter, the formatter, the type checker and the floors of the house."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy"],
)
def test_tool_is_content(command):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rooms():
    """The floor of each file and folder, from the table in CONTRIBUTING.md."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Rooms")[1]
    rows = re.findall(r"^\| (\d) \| `(\w+)(?:\.py|/)` \|", table, re.MULTILINE)
    return {name: int(floor) for floor, name in rows}


def imported(path, room):
    """The rooms that a room imports from, wherever in its files it does."""
    names = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: imports by their whole names"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.split(".")[1] for name in names if name.startswith("hk_stack.")}
    return ours - {room}


def test_files_import_only_from_lower_floors():
    floors = rooms()
    paths = {path.stem: path for path in (ROOT / "hk_stack").iterdir()}
    found = {name for name in paths if not name.startswith(("__", "."))} - {"py"}
    assert found == set(floors), "CONTRIBUTING.md has a table of all"
    graph = {name: imported(paths[name], name) & found for name in found}
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if floors[other] > floors[name]
    ]
    assert not upward
    graphlib.TopologicalSorter(graph).prepare()  # Says where there is a circle.
