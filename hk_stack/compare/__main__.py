"""Measures layer stacks in several frameworks: `python -m hk_stack.compare`.

All run the same models with the same parameters. Their outputs and gradients are
checked to be equal first; then they run in one process, in alternating rounds, as
machines are noisy, and ratios within a round much less so. Ratios are to the baseline;
below 1 is better.

With `--out=FOLDER`, every sample goes to `FOLDER/results.json`, beside a report
(`report.html`), a table for a README (`table.md`) and pictures. Ctrl-C stops, and keeps
what was measured so far. To look at results again, to make one of several, or to
compare two, give files:

    python -m hk_stack.compare results.json more.json --out=FOLDER
    python -m hk_stack.compare results.json --against=old.json
"""

import contextlib
import functools
import itertools
import pathlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

try:
    from absl import app, flags

    # Now, not after hours of measuring.
    from hk_stack.compare import against, cases, draw, measure, page
except ImportError as error:
    raise SystemExit(
        f"{error}: the comparison needs pip install 'hk_stack[compare]'"
    ) from None

import jax

from hk_stack import _table
from hk_stack.compare import models, results, show
from hk_stack.compare.results import Case, Result

_MODEL = flags.DEFINE_list("model", list(models.DEFAULT), "Models to run.")
_FRAMEWORKS = flags.DEFINE_list(
    "frameworks", models.framework_names(), "Frameworks to run them in."
)
_LAYERS = flags.DEFINE_list("layers", ["6"], "Numbers of layers.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", list(cases.TOLERANCES), "Of parameters and activations."
)
_BATCH = flags.DEFINE_integer("batch", 4, "Sequences in a batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 128, "Steps of a sequence.", lower_bound=1)
_WIDTH = flags.DEFINE_integer(
    "width", None, "Features; by default as many as the model has.", lower_bound=1
)
_MODE = flags.DEFINE_list(
    "mode",
    ["fwd", "grad", "decode"],
    "What to run: "
    + "; ".join(f"{name}, {what}" for name, (what, _) in cases.MODES.items()),
)
_REPEAT = flags.DEFINE_integer("repeat", 12, "Rounds of each case.", lower_bound=1)
_BUILDS = flags.DEFINE_integer(
    "builds",
    1,
    "How often to build each program; the rounds are shared among the builds. What "
    "takes more than ten seconds to compile is built once.",
    lower_bound=1,
)
_PATIENCE = flags.DEFINE_float(
    "patience",
    8.0,
    "Seconds; what took longer to build with fewer layers is left out.",
    lower_bound=0.0,
)
_BASELINE = flags.DEFINE_string(
    "baseline", "haiku layer_stack", "The way that ratios are to."
)
_OUT = flags.DEFINE_string("out", None, "A folder for the samples and the report.")
_AGAINST = flags.DEFINE_string(
    "against", None, "An older results.json; exits with 1 if a ratio got worse."
)
_Ways = list[tuple[str, str]]


def main(argv: list[str]) -> int:
    """Measures, or reads a result; shows it, writes it, compares it.

    Returns:
      0; 1 if a way failed, or a ratio got worse; 130 if it was interrupted.
    """
    old = _read([_AGAINST.value]) if _AGAINST.value else None
    out = _folder(_OUT.value) if _OUT.value else None
    if argv[1:]:
        result, is_stopped, status = _read(argv[1:]), False, 0
        for case in result.cases():
            _show(result, case, case.title)
    else:
        _configure()
        result, is_stopped = _measure(out, old)
        status = int(bool(result.failed))
    if partial := show.partial(result):
        _say(partial)
    if out is not None and result.rows:
        _write(out, result)
        _say(f"Written to {out}: results.json, report.html, table.md, pictures")
    if old is not None:
        with _in_usage("--against: "):
            text, is_worse = against.report(old, result)
        _say(text)
        status = status or int(is_worse)
    return 130 if is_stopped else status


@contextlib.contextmanager
def _in_usage(before: str = "") -> Iterator[None]:
    """What is wrong with a file is a line for who gave it."""
    try:
        yield
    except ValueError as error:
        raise app.UsageError(f"{before}{error}") from None


def _say(text: str) -> None:
    _tell("", "", "")
    print(text, flush=True)


def _tell(before: str, after: str, what: str) -> None:
    """On a terminal, what is being done; whatever is printed next replaces it."""
    if sys.stderr.isatty():
        text = (before + what + after)[: shutil.get_terminal_size().columns - 1]
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def _read(paths: Sequence[str]) -> Result:
    with _in_usage():
        return results.merged([results.load(pathlib.Path(path)) for path in paths])


def _folder(name: str) -> pathlib.Path:
    """Fails before hours of measuring, not after."""
    path = pathlib.Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        why = f"cannot write to the folder {path}: {error.strerror}"
        raise app.UsageError(f"--out: {why}") from None
    return path


def _write(out: pathlib.Path, result: Result) -> None:
    results.save(out / "results.json", result)
    (out / "table.md").write_text(show.markdown(result))
    pictures = list(draw.pictures(result))
    (out / "report.html").write_text(page.html(result, pictures))
    for picture in pictures:
        (out / f"{picture.name}.svg").write_text(picture.svg + "\n")


def _configure() -> None:
    """JAX as it has to be to measure; what was compiled before would be loaded."""
    jax.config.update("jax_enable_x64", _DTYPE.value == "float64")
    jax.config.update("jax_enable_compilation_cache", False)


def _measure(out: pathlib.Path | None, old: Result | None) -> tuple[Result, bool]:
    """What was found, and whether it was interrupted."""
    start = time.perf_counter()
    result = Result(measure.environment(), [], [], [])
    todo = _planned(result, old)
    result.environment.update(_asked())
    result.environment["unfinished"] = [case.title for case in todo]
    for i, (case, ways) in enumerate(todo.items()):
        place = f"{i + 1} of {len(todo)}: "
        tell = functools.partial(_tell, place, f" of {case.title}")
        ways = _in_time(result, case, ways)
        is_stopped = measure.measured(
            result, case, ways, _REPEAT.value, _BUILDS.value, tell
        )
        result.environment["seconds"] = round(time.perf_counter() - start, 1)
        if not is_stopped:
            result.unfinished.remove(case.title)
        _show(result, case, place + case.title)
        if out is not None:
            results.save(out / "results.json", result)
        if is_stopped:
            return result, True
    return result, False


def _planned(result: Result, old: Result | None) -> dict[Case, _Ways]:
    """What to measure, by what; the baseline first."""
    todo = _cases()
    if old is not None and not set(todo) & set(old.cases()):
        raise app.UsageError(
            "--against: none of its cases would be measured; ask for the same, "
            f"{old.environment.get('command')}"
        )
    installed = _installed(result)
    return {case: _ways(installed, case.mode) for case in todo}


def _show(result: Result, case: Case, title: str) -> None:
    """A table, which also says what failed; or only that."""
    if not result.of(case):
        for failure in result.failures(case):
            _say(f"failed: {case.title}: {failure.way}: {failure.error}")
        return
    lines = _table.aligned(show.table(result, case))
    _say("\n".join([f"{title}; {show.caption(result, case)}", *lines, ""]))


def _in_time(result: Result, case: Case, ways: _Ways) -> _Ways:
    """Leaves out what was slow to build with fewer layers, but for the baseline."""
    slow = {
        row.way
        for row in result.rows
        if row.case._replace(layers=case.layers) == case
        and row.case.layers < case.layers
        and (row.median("build_s") or 0.0) > _PATIENCE.value
    }
    late = [pair for pair in ways[1:] if " ".join(pair) in slow]
    for pair in late:
        why = "with fewer layers it took long to build; see --patience"
        _skip(result, f"{case.title}: {' '.join(pair)}", why)
    return [pair for pair in ways if pair not in late]


def _skip(result: Result, what: str, why: str) -> None:
    result.skipped.append({"what": what, "why": why})
    _say(f"left out: {what}: {why}")


def _asked() -> dict[str, Any]:
    """The flags, and how to ask for the same again."""
    own = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    asked = [flag for flag in own if flag.name not in ("out", "against")]
    said = [flag.serialize() for flag in asked if flag.present]
    return {
        "flags": {flag.name: flag.value for flag in asked},
        "command": shlex.join(["python", "-m", "hk_stack.compare", *said]),
    }


def _cases() -> list[Case]:
    """All cases that were asked for and make sense; says which do not."""
    _known("model", _MODEL.value, list(models.MODELS))
    _known("mode", _MODE.value, list(cases.MODES))
    found: list[Case] = []
    reasons: dict[str, None] = {}
    sizes = _DTYPE.value, _BATCH.value, _LENGTH.value
    depths = _numbers_of_layers()
    asked = itertools.product(_MODEL.value, _MODE.value, depths)
    for model, mode, layers in dict.fromkeys(asked):
        width = _WIDTH.value or models.MODELS[model].width
        case = Case(model, mode, layers, *sizes, width)
        if reason := cases.reason(case):
            reasons[reason] = None
        else:
            found.append(case)
    if not found:
        raise app.UsageError(f"nothing to measure: {'; '.join(reasons)}")
    if reasons and (_MODE.present or _DTYPE.present):
        _say(f"not measured: {'; '.join(reasons)}")
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


def _installed(result: Result) -> list[str]:
    """The frameworks that were asked for; says which are not there, and why."""
    _known("frameworks", _FRAMEWORKS.value, models.framework_names())
    found = []
    for name in dict.fromkeys(_FRAMEWORKS.value):
        try:
            models.framework(name)
            found.append(name)
        except Exception as error:  # Whatever an installation does at import.
            _skip(result, name, f"{type(error).__name__}: {error}")
    if not found:
        raise app.UsageError(f"nothing to measure: {result.skipped[0]['why']}")
    return found


def _ways(frameworks: Sequence[str], mode: str) -> _Ways:
    """Pairs of a framework and a way; the baseline first, if the mode has it."""
    found = cases.all_ways(frameworks, mode)
    names = [" ".join(pair) for pair in found]
    if not found:
        asked = ", ".join(frameworks)
        raise app.UsageError(f"nothing to measure: {asked} has no mode {mode}")
    if _BASELINE.present and _BASELINE.value not in names:
        raise app.UsageError(
            f"--baseline: {_BASELINE.value!r} not among {', '.join(names)}"
        )
    return sorted(found, key=lambda pair: " ".join(pair) != _BASELINE.value)


def run() -> None:
    """The console script."""
    if "--help" in sys.argv[1:]:  # That of absl is of the script's own flags.
        print(__doc__, flags.FLAGS.module_help(sys.modules[__name__]), sep="\n")
    else:
        app.run(_main)


def _main(argv: list[str]) -> int:
    """`main`, with a line instead of all flags for what was asked wrongly."""
    try:
        return main(argv)
    except (app.UsageError, OSError) as error:
        print(f"python -m hk_stack.compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # Not while it measures: that keeps what there is.
        _say("Stopped.")
        return 130


if __name__ == "__main__":
    run()
