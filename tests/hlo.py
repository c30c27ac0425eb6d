"""What XLA made of a program: its collectives, and what its loops carry."""

import math
import re
from typing import NamedTuple

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
INNER = re.compile(r"\w=\{?((?:%[\w.-]+(?:, )?)+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


class Collective(NamedTuple):
    """One that a device takes part in.

    Attributes:
      kind: As XLA calls it.
      count: How many arrays it makes.
      nbytes: Of them all.
      times: How often it runs, where loops say how long they are.
      depth: In how many loops it is.
    """

    kind: str
    count: int
    nbytes: int
    times: int
    depth: int


def collectives(compiled):
    """All of a compiled program."""
    texts, entry = blocks(compiled)

    def found(name, times, depth):
        for line in texts.get(name, ()):
            if match := COLLECTIVE.search(line):
                made = [BYTES[kind] * math.prod(x) for kind, x in arrays(match[1])]
                yield Collective(match[2], len(made), sum(made), times, depth)
            is_loop, trips = " while(" in line, TRIPS.search(line)
            often = times * int(trips[1]) if is_loop and trips else times
            for names in INNER.findall(line):
                for inner in names.split(", "):
                    yield from found(inner.lstrip("%"), often, depth + is_loop)

    return list(found(entry, 1, 0))


def carried(compiled):
    """Of each loop, the shapes that go from turn to turn."""
    loops = re.findall(r"= \((.*?)\) while\(", compiled.as_text())
    return [[shape for _, shape in arrays(text)] for text in loops]


def blocks(compiled):
    """The lines of each computation, by name, and the name of the first to run."""
    texts, entry = {}, None
    for block in compiled.as_text().split("\n\n"):
        first, *lines = block.strip().splitlines() or [""]
        name = first.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
        texts[name] = lines
        entry = name if first.startswith("ENTRY ") else entry
    return texts, entry


def arrays(text):
    """Dtypes and shapes in a type of HLO: `f32[2,3]{1,0}`."""
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text):
        yield dtype, tuple(int(size) for size in dims.split(",") if size)
