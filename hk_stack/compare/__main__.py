"""Measures layer stacks in several frameworks: `python -m hk_stack.compare`.

All run the same models with the same parameters. Their outputs and gradients are
checked to be equal first; then they run in one process, in alternating rounds, as
machines are noisy, and ratios within a round much less so. Ratios are to the baseline;
below 1 is better.

With `--out=FOLDER`, every sample goes to `FOLDER/results.json`, beside a report
(`report.html`), a table for a README (`table.md`) and the plots. Ctrl-C stops, and
keeps what was measured so far.

To look at a result again, or to compare two, give files:

    python -m hk_stack.compare results.json --out=FOLDER
    python -m hk_stack.compare results.json --against=old.json
"""

import functools
import itertools
import math
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

try:
    import matplotlib  # noqa: F401 (Now, not after hours of measuring.)
    import rich.console
    import rich.progress
    from absl import app, flags

    from hk_stack.compare import cases
except ImportError as error:
    raise SystemExit(
        f"{error}: the comparison needs pip install 'hk_stack[compare]'"
    ) from None

import jax

from hk_stack.compare import against, draw, models, page, results, show
from hk_stack.compare.environment import environment
from hk_stack.compare.results import Case, Result

_MODEL = flags.DEFINE_list("model", list(models.MODELS), "Models to run.")
_FRAMEWORKS = flags.DEFINE_list(
    "frameworks", models.framework_names(), "Frameworks to run them in."
)
_LAYERS = flags.DEFINE_list("layers", ["8"], "Numbers of layers.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", list(cases.TOLERANCES), "Of parameters and activations."
)
_BATCH = flags.DEFINE_integer("batch", 4, "Sequences in a batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Steps of a sequence.", lower_bound=1)
_MODE = flags.DEFINE_list(
    "mode", ["fwd", "grad", "decode"], f"What to run: {', '.join(cases.MODES)}."
)
_REPEAT = flags.DEFINE_integer("repeat", 15, "Rounds of each case.", lower_bound=1)
_BUILDS = flags.DEFINE_integer(
    "builds",
    1,
    "How often to build each program; the rounds are shared among the builds. What "
    "takes more than ten seconds to compile is built once.",
    lower_bound=1,
)
_FRESH = flags.DEFINE_bool(
    "fresh", False, "Time each build in a process that has built nothing before."
)
_PATIENCE = flags.DEFINE_float(
    "patience",
    90.0,
    "Seconds; what would take longer to build, going by fewer layers, is left out.",
    lower_bound=0.0,
)
_BASELINE = flags.DEFINE_string(
    "baseline", "haiku layer_stack", "The way that ratios are to."
)
_OUT = flags.DEFINE_string("out", None, "A folder for the samples and the report.")
_AGAINST = flags.DEFINE_string(
    "against", None, "An older results.json; exits with 1 if a ratio got worse."
)

Say = Callable[[str], None]


def main(argv: list[str]) -> int:
    """Measures, or reads a result; shows it, writes it, compares it.

    Returns:
      0; 1 if a way failed, or a ratio got worse; 130 if it was interrupted.
    """
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=100)
    old = _read(_AGAINST.value) if _AGAINST.value else None
    out = _folder(_OUT.value) if _OUT.value else None
    if len(argv) > 2:
        raise app.UsageError(f"one results.json at most, found {argv[1:]}")
    if len(argv) == 2:
        result, status = _read(argv[1]), 0
        for case in result.cases():
            console.print(show.table(result, case))
    else:
        result, status = _measure(console, out, old)
    if out is not None and result.rows:
        _write(out, result)
        console.print(f"Written to {out}: results.json, report.html, table.md, plots")
    if old is not None:
        text, is_worse = _compared(old, result)
        console.print(text, highlight=False, soft_wrap=True)
        status = status or int(is_worse)
    return status


def _read(path: str) -> Result:
    try:
        return results.load(pathlib.Path(path))
    except ValueError as error:
        raise app.UsageError(str(error)) from None


def _compared(old: Result, new: Result) -> tuple[str, bool]:
    try:
        return against.report(old, new)
    except ValueError as error:
        raise app.UsageError(f"--against: {error}") from None


def _folder(name: str) -> pathlib.Path:
    """Fails before hours of measuring, not after."""
    path = pathlib.Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise app.UsageError(
            f"--out: cannot write to the folder {path}: {error.strerror}"
        ) from None
    return path


def _write(out: pathlib.Path, result: Result) -> None:
    results.save(out / "results.json", result)
    (out / "table.md").write_text(show.markdown(result))
    (out / "report.html").write_text(page.html(result))
    draw.write(result, out / "plots")


def _measure(
    console: rich.console.Console, out: pathlib.Path | None, old: Result | None
) -> tuple[Result, int]:
    start = time.perf_counter()
    jax.config.update("jax_enable_x64", _DTYPE.value == "float64")
    # What was compiled before would be loaded, not compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    if _FRESH.value and jax.default_backend() == "tpu":
        raise app.UsageError("--fresh: a TPU belongs to one process")
    say = functools.partial(
        console.print, highlight=False, markup=False, soft_wrap=True
    )
    todo = _cases(say)
    if old is not None and not set(todo) & set(old.cases()):
        raise app.UsageError(
            "--against: none of its cases would be measured; ask for the same, "
            f"{old.environment.get('command')}"
        )
    result = Result(environment(), [], [], [])
    ways, baseline = _ways(result.skipped, say)
    result.environment.update(_asked(baseline))
    options = cases.Options(_REPEAT.value, _BUILDS.value, fresh=_FRESH.value)
    status = 0
    with _progress() as progress:
        bar = progress.add_task("", total=len(todo) * len(ways))
        for case in todo:

            def tick(way: str, case: Case = case) -> None:
                text = f"{case.model} {case.mode}, {case.layers} layers: {way}"
                progress.update(bar, advance=1, description=text)

            able = _in_time(result, case, ways, say)
            found = cases.measured(case, able, options, tick)
            _add(result, case, found)
            result.environment["seconds"] = round(time.perf_counter() - start, 1)
            _print(console, result, case, found)
            status = status or int(bool(found.failed))
            if out is not None:
                results.save(out / "results.json", result)
            if found.is_stopped:
                console.print("stopped; what was measured is kept")
                status = 130
                break
    return result, status


def _print(
    console: rich.console.Console, result: Result, case: Case, found: cases.Measured
) -> None:
    """A table, which also says what failed; or only that."""
    if found.rows:
        console.print(show.table(result, case))
        return
    for way, error in found.failed.items():
        text = f"failed: {case.title}: {way}: {error}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _add(result: Result, case: Case, found: cases.Measured) -> None:
    result.rows.extend(found.rows)
    result.failed.extend(
        {**case._asdict(), "way": way, "error": error}
        for way, error in found.failed.items()
    )


def _in_time(
    result: Result, case: Case, ways: Sequence[tuple[str, str]], say: Say
) -> list[tuple[str, str]]:
    """Leaves out what would take too long to build."""
    found = []
    for pair in ways:
        way = " ".join(pair)
        expected = _expected_build(result, case, way)
        if expected > _PATIENCE.value and pair != ways[0]:
            why = f"would take about {expected:.0f} s to build; see --patience"
            result.skipped.append({"what": f"{case.title}: {way}", "why": why})
            say(f"left out: {case.title}: {way} {why}")
        else:
            found.append(pair)
    return found


def _expected_build(result: Result, case: Case, way: str) -> float:
    """Seconds, going by the last two cases with fewer layers; 0 if there is none.

    A loop's build grows faster the deeper it is, hence the extra half in the exponent.
    """
    fewer = [
        (row.case.layers, row.median("build_s") or 0.0)
        for row in result.rows
        if row.way == way
        and row.case.layers < case.layers
        and row.case._replace(layers=case.layers) == case
    ]
    if not fewer:
        return 0.0
    (first, before), (last, seconds) = fewer[-2:] if len(fewer) > 1 else fewer * 2
    power = math.log(seconds / before) / math.log(last / first) if first < last else 0.5
    return seconds * (case.layers / last) ** (power + 0.5)


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.BarColumn(20),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}"),
        console=rich.console.Console(stderr=True),
        transient=True,
    )


def _asked(baseline: str) -> dict[str, Any]:
    """The flags, and how to ask for the same again."""
    names = (
        _MODEL,
        _FRAMEWORKS,
        _LAYERS,
        _DTYPE,
        _BATCH,
        _LENGTH,
        _MODE,
        _REPEAT,
        _BUILDS,
        _PATIENCE,
        _FRESH,
        _BASELINE,
    )
    said = [flags.FLAGS[holder.name].serialize() for holder in names if holder.present]
    return {
        "flags": {holder.name: holder.value for holder in names}
        | {"baseline": baseline},
        "command": shlex.join(["python", "-m", "hk_stack.compare", *said]),
    }


def _cases(say: Say) -> list[Case]:
    """All cases that were asked for and make sense; says which do not."""
    _known("model", _MODEL.value, list(models.MODELS))
    _known("mode", _MODE.value, list(cases.MODES))
    found: list[Case] = []
    reasons: dict[str, None] = {}
    sizes = _DTYPE.value, _BATCH.value, _LENGTH.value
    for model, mode, layers in itertools.product(
        dict.fromkeys(_MODEL.value),
        dict.fromkeys(_MODE.value),
        dict.fromkeys(_numbers_of_layers()),
    ):
        case = Case(model, mode, layers, *sizes)
        if reason := cases.reason(case):
            reasons[reason] = None
        else:
            found.append(case)
    if not found:
        raise app.UsageError(f"nothing to measure: {'; '.join(reasons)}")
    if reasons and (flags.FLAGS["mode"].present or flags.FLAGS["dtype"].present):
        say(f"not measured: {'; '.join(reasons)}")
    return found


def _known(flag: str, values: Sequence[str], known: Sequence[str]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise app.UsageError(f"--{flag}: {unknown} not among {', '.join(known)}")


def _numbers_of_layers() -> list[int]:
    found = [text.strip() for text in _LAYERS.value]
    for text in found or [""]:
        if not (text.isascii() and text.isdecimal() and int(text) > 0):
            raise app.UsageError(f"--layers: {text!r} is no number of layers")
    return list(map(int, found))


def _ways(skipped: list[dict[str, str]], say: Say) -> tuple[list[tuple[str, str]], str]:
    """Pairs of a framework and a way; the baseline first, and its name."""
    _known("frameworks", _FRAMEWORKS.value, models.framework_names())
    found = []
    for name in dict.fromkeys(_FRAMEWORKS.value):
        try:
            found += cases.all_ways([name])
        except Exception as error:  # Whatever an installation does at import.
            why = f"{type(error).__name__}: {error}"
            skipped.append({"what": name, "why": why})
            say(f"without {name}: {why}")
    names = [" ".join(pair) for pair in found]
    if not found:
        raise app.UsageError(f"nothing to measure: {skipped[0]['why']}")
    if _BASELINE.value in names:
        first = names.index(_BASELINE.value)
    elif _BASELINE.present:
        raise app.UsageError(
            f"--baseline: {_BASELINE.value!r} not among {', '.join(names)}"
        )
    else:
        first = 0
    return [found[first], *found[:first], *found[first + 1 :]], names[first]


def run() -> None:
    """The console script."""
    app.run(_main)


def _main(argv: list[str]) -> int:
    """`main`, with a line instead of all flags for what was asked wrongly."""
    try:
        return main(argv)
    except (app.UsageError, OSError) as error:
        print(f"python -m hk_stack.compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run()
