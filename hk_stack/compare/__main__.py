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
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

try:
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
    "frameworks",
    ["haiku", "plain", "hk_stack", "linen", "nnx", "equinox"],
    "Frameworks to run them in.",
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
_BASELINE = flags.DEFINE_string(
    "baseline", "haiku layer_stack", "The way that ratios are to."
)
_OUT = flags.DEFINE_string("out", None, "A folder for the samples and the report.")
_AGAINST = flags.DEFINE_string(
    "against", None, "An older results.json; exits with 1 if a ratio got worse."
)

Say = Callable[[str], None]


def main(argv: list[str]) -> int:
    """Measures, or reads a result; shows it, writes it, compares it."""
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
        result, status = _measure(console, out)
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
    console: rich.console.Console, out: pathlib.Path | None
) -> tuple[Result, int]:
    start = time.perf_counter()
    if _DTYPE.value == "float64":
        jax.config.update("jax_enable_x64", True)
    todo = _cases(functools.partial(console.print, soft_wrap=True))
    result = Result(environment() | _asked(), [], [], [])
    ways = _ways(result.skipped)
    for missing in result.skipped:
        text = f"without {missing['framework']}: {missing['why']}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    options = cases.Options(_REPEAT.value, _BUILDS.value, fresh=_FRESH.value)
    status = 0
    with _progress() as progress:
        bar = progress.add_task("", total=len(todo) * len(ways))
        for case in todo:

            def tick(way: str, case: Case = case) -> None:
                text = f"{case.model} {case.mode}, {case.layers} layers: {way}"
                progress.update(bar, advance=1, description=text)

            found = cases.measured(case, ways, options, tick)
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


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.BarColumn(20),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.description}"),
        console=rich.console.Console(stderr=True),
        transient=True,
    )


def _asked() -> dict[str, Any]:
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
        _FRESH,
        _BASELINE,
    )
    said = [flags.FLAGS[holder.name].serialize() for holder in names if holder.present]
    return {
        "flags": {holder.name: holder.value for holder in names},
        "command": " ".join(["python -m hk_stack.compare", *said]),
    }


def _cases(say: Say) -> list[Case]:
    """All cases that were asked for and make sense; says which do not."""
    _known("model", _MODEL.value, list(models.MODELS))
    _known("mode", _MODE.value, list(cases.MODES))
    found: list[Case] = []
    reasons: dict[str, None] = {}
    sizes = _DTYPE.value, _BATCH.value, _LENGTH.value
    for model, mode, layers in itertools.product(
        _MODEL.value, _MODE.value, _numbers_of_layers()
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


def _numbers_of_layers() -> Iterator[int]:
    for text in _LAYERS.value:
        if not text.strip().isdigit() or int(text) < 1:
            raise app.UsageError(f"--layers: {text!r} is no number of layers")
        yield int(text)


def _ways(skipped: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Pairs of a framework and a way; the baseline's come first."""
    _known("frameworks", _FRAMEWORKS.value, models.framework_names())
    found = []
    for name in _FRAMEWORKS.value:
        try:
            found += cases.all_ways([name])
        except ImportError as error:
            skipped.append({"framework": name, "why": str(error)})
    if not found:
        raise app.UsageError(f"nothing to measure: {skipped[0]['why']}")
    baseline = _BASELINE.value
    return sorted(found, key=lambda pair: " ".join(pair) != baseline)


def run() -> None:
    """The console script."""
    app.run(main)


if __name__ == "__main__":
    run()
