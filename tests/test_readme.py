"""What README.md shows works, and its figures are those of the committed results."""

import contextlib
import functools
import io
import pathlib
import re

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIGURES = (ROOT / "docs" / "figures.md").read_text()
SETUP = (ROOT / "docs" / "setup.md").read_text()
DEPTH = (ROOT / "docs" / "depth.md").read_text()
SCALE = (ROOT / "docs" / "scale.md").read_text()


PAGES = """start hoisting loops migrate reuse checkpoints depth scale optimisers
setup""".split()


def run_blocks(name, text, is_one_program):
    """What is right below one, in a block of its own, is what it prints."""
    blocks = re.finditer(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", text, re.DOTALL)
    namespace = {}
    found = list(blocks)
    # As a reader has it; optax relies on both.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in found:
            above = "\n" * text[: block.start(1)].count("\n")
            if not is_one_program:
                namespace, above = {}, ""
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(above + block[1], name, "exec"), namespace)
            if is_one_program and (not block[2] or "model.py:" in block[2]):
                continue  # A file of the reader's.
            assert printed.getvalue().strip("\n") == block[2].strip("\n")
    return len(found)


def test_each_program_of_the_readme_prints_what_is_below_it():
    assert run_blocks("model.py", README, is_one_program=False) == 3


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_run_one_after_the_other(name):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    assert run_blocks(f"{name}.md", text, is_one_program=True)


def test_shell_commands_are_those_of_ci():
    assert '.venv/bin/pip install --quiet --editable ".[test]"' in README
    assert ".venv/bin/pytest -n 2" in README
    assert 'pytest" -n 2' in (ROOT / ".ci" / "run").read_text()


@functools.cache
def _result(machine):
    from hk_stack.compare import results

    return results.load(ROOT / "docs" / "results" / f"{machine}.json")


def _case(machine, text):
    """A case: `model, mode, layers[, batch 4][, length 512]`."""
    model, mode, layers, *more = text.split(", ")
    sizes = {"model": model, "mode": mode, "layers": int(layers)}
    sizes |= {name: int(size) for name, size in (text.split() for text in more)}
    cases = _result(machine).cases()
    (found,) = (case for case in cases if sizes.items() <= case._asdict().items())
    return found


def _row(machine, case, way):
    return _result(machine).of(_case(machine, case))[way]


def _ratio(machine, case, way, measure):
    """To the baseline of the case."""
    from hk_stack.compare import results

    base = _result(machine).baseline(_case(machine, case))
    return results.ratio(_row(machine, case, way), base, measure)


MEASURES = {"run": "run_s", "temp": "temp_bytes", "eager": "eager_s"}


def test_figures_of_two_machines_are_those_of_the_result_files():
    row = r"^\| `(.+?)` \| `(.+?)` \| (run|temp|eager) \| ([\d.]+) \| ([\d.]+|-) \|$"
    rows = re.findall(row, FIGURES, re.MULTILINE)
    assert sum(shown != "-" for *_, shown in rows) >= 7
    for case, way, measure, *shown in rows:
        for machine, text in zip(("cpu", "h100"), shown, strict=True):
            if text == "-":
                continue
            ratio = _ratio(machine, case, way, MEASURES[measure])
            assert f"{ratio.value:.2f}" == text, (case, way, machine)


@pytest.mark.parametrize(
    "text", [FIGURES, SETUP, DEPTH], ids=["figures.md", "setup.md", "depth.md"]
)
def test_figures_of_options_are_those_of_the_result_file(text):
    row = r"^\| `(.+?)` \| `(.+?)` \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) >= 10
    for case, way, *shown in rows:
        found = (_ratio("cpu", case, way, name) for name in ("run_s", "temp_bytes"))
        assert [f"{ratio.value:.2f}" for ratio in found] == shown, (case, way)


def test_figures_of_python_loops_are_those_of_the_result_file():
    row = r"^\| `(\w+, eager, .+?)` \| `(.+?)` \| ([\d.]+) \|$"
    rows = re.findall(row, DEPTH, re.MULTILINE)
    assert len(rows) == 2
    for case, way, shown in rows:
        assert f"{_ratio('cpu', case, way, 'eager_s').value:.2f}" == shown, case


def test_rematerialisation_saves_memory_at_the_speed_of_that_by_hand():
    for model in ("mlp", "transformer"):
        ratio = functools.partial(_ratio, "cpu", f"{model}, remat, 48")
        each = ratio("hk_stack + remat", "temp_bytes").value
        assert ratio("hk_stack + remat, sqrt", "temp_bytes").value < each <= 0.1
        for ours, by_hand in (
            ("hk_stack + remat", "plain checkpoint"),
            ("hk_stack + remat, sqrt", "plain checkpoint, groups"),
        ):
            run = ratio(ours, "run_s").value
            assert run <= 1.03 * ratio(by_hand, "run_s").value


def test_programs_of_thousands_of_layers_are_built_as_fast():
    rows = re.findall(r"^\| `(\w+, \w+), (\d+)` \| ([\d.]+) \|$", DEPTH, re.MULTILINE)
    assert len(rows) == 8
    for case, layers, shown in rows:
        few, many = (_row("cpu", f"{case}, {n}", "hk_stack auto") for n in (10, layers))
        ratio = many.median("build_cpu_s") / few.median("build_cpu_s")
        assert f"{ratio:.2f}" == shown, case
        # Setup of ten layers of S4 is one batch, of more a loop over batches.
        assert ratio <= (1.35 if case == "s4, grad" else 1.3), case


def test_initialisation_in_shards_takes_little_beside_them():
    row = r"^\| `(transformer, init_sharded, 32)` \| `(.+?)` \| ([\d.]+) \|$"
    rows = re.findall(row, SCALE, re.MULTILINE)
    assert len(rows) == 6
    for case, way, shown in rows:
        row = _row("cpu", case, way)
        share = row.median("output_bytes")
        assert 4 * 100e6 / 8 < share < 4 * 102e6 / 8
        part = row.median("temp_bytes") / share
        assert f"{part:.2f}" == shown, way
        assert part <= 0.25 or not way.startswith("hk_stack")


COMPARISON = (ROOT / "docs" / "comparison.md").read_text()


def test_figures_of_the_comparison_are_those_of_the_result_file():
    row = r"^\| `(\w+, \w+, \d+)` \| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|$"
    rows = [x for x in re.findall(row, README + COMPARISON, re.M) if "[" in x[2]]
    assert len(rows) > 20
    for case, way, *shown in rows:
        ratio = functools.partial(_ratio, "cpu", f"{case}, length 128", way)
        run, build, memory = map(ratio, ("run_s", "build_s", "temp_bytes"))
        expected = [
            f"{run.value:.2f} [{run.low:.2f}, {run.high:.2f}]",
            f"{build.value:.2f}",
            f"{memory.value:.2f}",
        ]
        assert shown == expected, (case, way)


def test_porting_costs_less_than_two_copies():
    (case,) = (case for case in _result("cpu").cases() if case.mode == "port")
    rows = _result("cpu").of(case)
    assert len(rows) == 8
    for way, row in rows.items():
        assert _ratio("cpu", "transformer, port, 24", way, "eager_s").value < 2, way
        assert row.median("temp_bytes") < 0.5e6


def test_committed_results_can_be_read_and_are_small():
    from hk_stack.compare import show

    made = show.markdown(_result("cpu"))
    kept = (ROOT / "docs/results/table.md").read_text()
    # Versions of NumPy round a last digit otherwise.
    number = r"\d+(?:\.\d+)?"
    assert re.sub(number, "", made) == re.sub(number, "", kept)
    numbers = ([float(n) for n in re.findall(number, text)] for text in (made, kept))
    np.testing.assert_allclose(*numbers, rtol=0.02, atol=0.011)
    size = sum(x.stat().st_size for x in (ROOT / "docs").rglob("*") if x.is_file())
    assert size < 700_000


def test_figures_of_loops_are_those_of_one_run_of_the_example():
    text = (ROOT / "docs" / "results" / "seed_as_it_is.txt").read_text()
    measured = re.findall(
        r"  ([\d.]+) +([\d.]+) +([\d.]+) +[\de.+-]+$", text, re.MULTILINE
    )
    page = (ROOT / "docs" / "loops.md").read_text()
    shown = re.findall(
        r"^\|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE
    )
    assert shown == measured
    assert len(shown) == 6
