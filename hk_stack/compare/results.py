"""What was measured: rows, how their samples are compared, and the file they are in.

A *case* is what all frameworks do alike: a model in a mode, at some sizes. A *row* is
one way of doing it, with all samples of each measure. The file is JSON, with a line for
each row, all of them with the fields of the classes below:

```
{"schema": 2, "environment": {"device": ..., "versions": {...}, "flags": {...}, ...},
 "rows": [{"case": ["s4", "grad", 8, "float32", 4, 256, 64], "way": "hk_stack auto",
           "measures": {"trace_s": [...], "run_s": [[...], [...]], ...},
           "parity": {"output": 1e-7, "gradient": 3e-7}}], "failed": [...],
 "skipped": [{"what": ..., "why": ...}]}
```

`run_s` and `eager_s` have a list of rounds for each time that programs were built anew,
others one number for each.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SCHEMA = 2

MEASURES = {
    "trace_s": "trace, s",
    "lower_s": "lower, s",
    "compile_s": "compile, s",
    "build_s": "trace, lower and compile, s; their sum, not in the file",
    "build_cpu_s": "the same in time of the processor, of all cores, s",
    "first_s": "first run, s",
    "run_s": "run, s",
    "eager_first_s": "first run outside of jit, s",
    "eager_s": "run outside of jit, s",
    "temp_bytes": "temporary memory, bytes",
    "argument_bytes": "arguments, bytes",
    "output_bytes": "outputs, bytes",
    "peak_bytes": "peak device memory of the process so far, bytes",
    "flops": "floating-point operations",
    "accessed_bytes": "memory accessed, bytes",
    "equations": "equations of the jaxpr",
    "hlo_bytes": "text of the lowered program, bytes",
}
_BUILD = ("trace_s", "lower_s", "compile_s")


class Case(NamedTuple):
    """What is done alike in all frameworks."""

    model: str
    mode: str
    layers: int
    dtype: str
    batch: int
    length: int
    width: int

    @property
    def title(self) -> str:
        """For a person."""
        return (
            f"{self.model}, {self.mode}, {self.layers} layers, {self.dtype}, "
            f"batch {self.batch}, length {self.length}, width {self.width}"
        )


class Row(NamedTuple):
    """One way of doing a case.

    Attributes:
      case: What is done.
      way: By what, "hk_stack auto".
      measures: Samples by the names in `MEASURES`.
      parity: Largest difference of an output or a gradient from the first way's, over
        the largest value there.
    """

    case: Case
    way: str
    measures: dict[str, list[Any]]
    parity: dict[str, float]

    def samples(self, measure: str) -> list[list[float]]:
        """All samples of a measure, one list for each build; [] if it has none."""
        if measure == "build_s":
            parts = [self.measures[name] for name in _BUILD if name in self.measures]
            return [[sum(times)] for times in zip(*parts, strict=False)]
        found = self.measures.get(measure, [])
        return [list(x) if isinstance(x, list) else [x] for x in found]

    def median(self, measure: str) -> float | None:
        """The middle of all samples; None if there are none."""
        flat = [x for build in self.samples(measure) for x in build]
        return float(np.median(flat)) if flat else None


class Ratio(NamedTuple):
    """A ratio to a baseline, of so many rounds.

    From `low` to `high` is the interval that holds 95 % of its bootstrap.
    """

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        low, high = map(self._digits, (self.low, self.high))
        return self.short if self.low == self.high else f"{self.short} [{low}, {high}]"

    @property
    def short(self) -> str:
        """The ratio without its interval."""
        return self._digits(self.value)

    def _digits(self, number: float) -> str:
        return f"{number:.{2 if self.value > 0.095 else 3}f}"

    def agrees(self, other: "Ratio") -> bool:
        """Whether the intervals have a number in common."""
        return self.low <= other.high and other.low <= self.high


_ROUNDS_IN_A_ROW = 4


def ratio(row: Row, base: Row, measure: str) -> Ratio | None:
    """The ratio of a measure to that of another row of the case; None if one has none.

    It is the median, over rounds, of the ratio within a round: what slows the machine
    down for a while slows both. Rounds in a row are alike, and those of one build even
    more, so the bootstrap draws runs of a few rounds of one build, then rounds of each.
    """
    ratios = []
    for a, b in zip(row.samples(measure), base.samples(measure), strict=False):
        rounds = min(len(a), len(b))  # Of one that was stopped there are fewer.
        if rounds and min(b) > 0:
            ratios.append(np.divide(a[:rounds], b[:rounds]))
    if not ratios:
        return None
    value = float(np.median(np.concatenate(ratios)))
    runs = [
        part
        for found in ratios
        for part in np.array_split(found, max(1, len(found) // _ROUNDS_IN_A_ROW))
    ]
    low, high = _interval(runs)
    return Ratio(value, min(low, value), max(high, value), sum(map(len, runs)))


def _interval(ratios: Sequence[np.ndarray], draws: int = 1000) -> tuple[float, float]:
    if sum(map(len, ratios)) == 1:
        return float(ratios[0][0]), float(ratios[0][0])
    rng = np.random.default_rng(0)
    rounds = min(map(len, ratios))
    table = np.stack([found[:rounds] for found in ratios])
    builds = rng.integers(len(table), size=(draws, len(table), 1))
    drawn = rng.integers(rounds, size=(draws, len(table), rounds))
    medians = np.median(table[builds, drawn], axis=(1, 2))
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


class Failure(NamedTuple):
    """A way of doing a case that failed, and why."""

    case: Case
    way: str
    error: str


class Result(NamedTuple):
    """All that one run of the command found.

    Attributes:
      environment: Device, versions, flags, date; "unfinished", the titles of cases that
        were asked for and not measured, or not in all ways, as it was stopped.
      rows: What was measured.
      failed: What failed.
      skipped: Frameworks that are not there, and ways that would take too long to
        build, each with what to do about it.
    """

    environment: dict[str, Any]
    rows: list[Row]
    failed: list[Failure]
    skipped: list[dict[str, str]]

    @property
    def unfinished(self) -> list[str]:
        """The titles of cases that are not there, or not whole."""
        found: list[str] = self.environment.get("unfinished", [])
        return found

    def cases(self) -> list[Case]:
        """All cases, in the order in which they were measured."""
        return list(dict.fromkeys(row.case for row in self.rows))

    def ways(self) -> list[str]:
        """All ways, in the order in which they came first."""
        return list(dict.fromkeys(row.way for row in self.rows))

    def of(self, case: Case) -> dict[str, Row]:
        """The rows of a case by way, in the order in which they were measured."""
        return {row.way: row for row in self.rows if row.case == case}

    def failures(self, case: Case) -> list[Failure]:
        """What failed of a case."""
        return [failure for failure in self.failed if failure.case == case]

    def baseline(self, case: Case) -> Row:
        """What the ratios of a case are to: `--baseline`, or else the first row."""
        rows = self.of(case)
        name = self.environment.get("flags", {}).get("baseline")
        return rows.get(name) or next(iter(rows.values()))


def merged(parts: Sequence[Result]) -> Result:
    """Results of one device as one, with the environment of the first.

    Raises:
      ValueError: If they are of several devices, or have a row in common.
    """
    devices = sorted({str(part.environment.get("device")) for part in parts})
    if len(devices) > 1:
        raise ValueError(f"results of one device each: found {', '.join(devices)}")
    rows = [row for part in parts for row in part.rows]
    if len({(row.case, row.way) for row in rows}) < len(rows):
        raise ValueError("results that have no row in common: found one in two of them")
    commands = [str(part.environment.get("command")) for part in parts]
    return Result(
        parts[0].environment
        | {
            "command": " && ".join(commands),
            "unfinished": [title for part in parts for title in part.unfinished],
        },
        rows,
        [failure for part in parts for failure in part.failed],
        [entry for part in parts for entry in part.skipped],
    )


def by_depth(result: Result) -> list[list[Case]]:
    """Cases that differ in nothing but the number of layers, the deepest last."""
    found: dict[Case, list[Case]] = {}
    for case in result.cases():
        found.setdefault(case._replace(layers=0), []).append(case)
    return [sorted(group, key=lambda case: case.layers) for group in found.values()]


def save(path: pathlib.Path, result: Result) -> None:
    """Writes the file in one step: there is the old one, or all of the new one."""
    rows = json.dumps([row._asdict() for row in result.rows])
    document = {
        "schema": SCHEMA,
        "environment": result.environment,
        "rows": json.loads(rows, parse_float=_rounded),
        "failed": [failure._asdict() for failure in result.failed],
        "skipped": result.skipped,
    }
    new = path.with_suffix(".new")
    new.write_text(_line_by_line(document))
    new.replace(path)


def _rounded(number: str) -> float:
    """With four digits: there is more noise than that."""
    return float(f"{float(number):.4g}")


def _line_by_line(document: Mapping[str, Any]) -> str:
    """JSON with a line for each record of a list."""
    dump = functools.partial(json.dumps, separators=(",", ":"))
    parts = []
    for name, value in document.items():
        records = ",\n".join(map(dump, value)) if isinstance(value, list) else ""
        parts.append(f'"{name}": ' + (f"[\n{records}\n]" if records else dump(value)))
    return "{" + ",\n".join(parts) + "}\n"


def load(path: pathlib.Path) -> Result:
    """Reads a file that `save` wrote.

    Raises:
      ValueError: If it is no such file, or of another schema; says what was found.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give {path / 'results.json'}")
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"it has schema {document['schema']}, expected {SCHEMA}")
        rows, failed = (
            [x | {"case": Case(*x["case"])} for x in document[name]]
            for name in ("rows", "failed")
        )
        return Result(
            document["environment"],
            [Row(**row) for row in rows],
            [Failure(**failure) for failure in failed],
            document["skipped"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of `python -m hk_stack.compare --out=...` of this "
            f"version: {error!r}; measure it anew"
        ) from None
