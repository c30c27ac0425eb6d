"""What README.md shows works, and its figures are those of the committed results."""

import json
import pathlib
import re
import statistics

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETUP = (ROOT / "docs" / "setup.md").read_text()
DEPTH = (ROOT / "docs" / "depth.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "docs/depth.md"])
def test_python_blocks_run_one_after_the_other(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


def test_shell_commands_are_those_of_ci():
    assert '.venv/bin/pip install --quiet --editable ".[test]"' in README
    assert ".venv/bin/pytest -n 2" in README
    assert 'pytest" -n 2' in (ROOT / ".ci" / "run").read_text()


def _figures():
    """Rows `| table | program | measure | CPU | H100 |` of README."""
    row = r"^\| `(.+?)` \| `(.+?)` \| (run|temp) \| ([\d.]+) \| ([\d.]+) \|$"
    return re.findall(row, README, re.MULTILINE)


def test_figures_are_there():
    assert len(_figures()) >= 8


@pytest.mark.parametrize("figure", _figures(), ids=" ".join)
def test_figure_is_that_of_the_result_file(figure):
    table, program, measure, *shown = figure
    for name, ratio in zip(("cpu", "h100"), shown, strict=True):
        assert _ratio(name, table, program, measure) == ratio


def _ratio(name, table, program, measure):
    """Of a program to the first of its table, as it is shown."""
    result = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    rows = result["tables"][table]
    key = {"run": "run_s", "temp": "temp_bytes"}[measure]
    samples, first = rows[program][key], next(iter(rows.values()))[key]
    ratios = [a / b for a, b in zip(samples, first, strict=True)]
    return f"{statistics.median(ratios):.2f}"


@pytest.mark.parametrize(
    "text", [README, SETUP, DEPTH], ids=["README.md", "setup.md", "depth.md"]
)
def test_figures_of_options_are_those_of_the_result_file(text):
    row = r"^\| `(.+?)` \| `(.+?)` \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) >= 10
    for table, program, run, temp in rows:
        assert _ratio("cpu", table, program, "run") == run, (table, program)
        assert _ratio("cpu", table, program, "temp") == temp, (table, program)


def test_figures_of_python_loops_are_those_of_the_result_file():
    rows = re.findall(
        r"^\| `(eager.+?)` \| `(.+?)` \| ([\d.]+) \|$", DEPTH, re.MULTILINE
    )
    assert len(rows) == 2
    for table, program, run in rows:
        assert _ratio("cpu", table, program, "run") == run, (table, program)


def test_rematerialisation_saves_memory_at_the_speed_of_that_by_hand():
    for model in ("mlp", "transformer"):
        table = f"remat, {model}, gradient"
        each = float(_ratio("cpu", table, "hk_stack remat", "temp"))
        groups = float(_ratio("cpu", table, "hk_stack remat, sqrt", "temp"))
        assert groups < each <= 0.1
        for ours, by_hand in (
            ("hk_stack remat", "by hand, each layer"),
            ("hk_stack remat, sqrt", "by hand, groups of 6"),
        ):
            run = float(_ratio("cpu", table, ours, "run"))
            assert run <= 1.03 * float(_ratio("cpu", table, by_hand, "run"))


COMPARISON = (ROOT / "docs" / "comparison.md").read_text()


def _compared():
    """Rows `| model, mode, layers | way | run | build | memory |` of comparison.md."""
    row = r"^\| `(\w+), (\w+), (\d+)` \| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|$"
    return re.findall(row, README + COMPARISON, re.MULTILINE)


def test_figures_of_the_comparison_are_those_of_the_result_file():
    from hk_stack.compare import results

    path = ROOT / "docs" / "results" / "compare" / "results.json"
    result = results.load(path)
    rows = {(row.case[:3], row.way): row for row in result.rows}
    assert len(_compared()) > 20
    for model, mode, layers, way, *shown in _compared():
        row = rows[(model, mode, int(layers)), way]
        base = result.baseline(row.case)
        run, build, memory = (
            results.ratio(row, base, name)
            for name in ("run_s", "build_s", "temp_bytes")
        )
        expected = [
            f"{run.value:.2f} [{run.low:.2f}, {run.high:.2f}]",
            f"{build.value:.2f}",
            f"{memory.value:.2f}",
        ]
        assert shown == expected, (model, mode, layers, way)


def test_porting_costs_less_than_two_copies():
    results = json.loads((ROOT / "docs" / "results" / "cpu.json").read_text())
    rows = results["tables"]["port"]
    assert {"port a scan", "port a loop", "port back", "stack, JAX"} <= rows.keys()
    assert all(float(_ratio("cpu", "port", name, "run")) < 2 for name in rows)
    assert all(row["extra_bytes"][0] < 0.5e6 for row in rows.values())
