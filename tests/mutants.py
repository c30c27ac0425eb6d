"""How strong the suite is: small mistakes are put into the sources, and who notices?

    python tests/mutants.py --jobs=2                    # all of it, from nothing
    python tests/mutants.py --jobs=16 --part=3/4        # a share, on a larger machine
    python tests/mutants.py hk_stack/_loop.py --count=20 --suite=tests/test_remat.py

First the suite runs once, to learn which tests run which lines. Then each mutant is
made in a copy of the project, and the tests of its line run, the fastest first, until
one fails or takes far too long. What is done is kept in the folder `--work` and not
done again. Once all is done there, by whatever machines, the report is written.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from typing import Any

import coverage
from mutant_sites import Mutant, mutants

ROOT = pathlib.Path(__file__).parents[1]
CORE = "flat cut control loop batches initialize layer layout".split()
FIRST = 15  # Tests that run first: most mutants need no more, and others import more.
NO_SOURCES = shutil.ignore_patterns(".*", "out", "build", "__pycache__", "*.egg-info")
# What pytest returns. A test that is not found is in a file that fails to import.
OUTCOMES = {
    0: "survived",
    1: "failed",
    2: "not imported",
    4: "not imported",
    -14: "took too long",
}


def main() -> None:
    options = parsed()
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = choose(options)
    tests = Tests(options)
    part, parts = map(int, options.part.split("/"))
    run_all(chosen[part - 1 :: parts], tests, options)
    done = results(options.work)
    if all(mutant.key in done for mutant in chosen):
        report([done[mutant.key] for mutant in chosen], options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    core = [f"hk_stack/_{name}.py" for name in CORE]
    add = parser.add_argument
    add("files", nargs="*", default=core)
    add("--root", type=pathlib.Path, default=ROOT, help="the project")
    add("--suite", nargs="*", default=[], help="what pytest runs; all by default")
    add("--count", type=int, default=240, help="of mutants, in all")
    add("--seed", type=int, default=0, help="which mutants")
    add("--jobs", type=int, default=2, help="processes at once")
    add("--part", default="1/1", help="which share, such as 3/4")
    add("--budget", type=float, default=90, help="seconds of tests for one mutant")
    add("--work", type=pathlib.Path, default=ROOT / "out/mutants")
    add("--out", type=pathlib.Path, default=ROOT / "tests/mutants.json")
    options = parser.parse_args()
    options.work, options.root = options.work.resolve(), options.root.resolve()
    return options


def choose(options: argparse.Namespace) -> list[Mutant]:
    """So many mutants of each file as it is large, of few lines more than one."""
    found = [
        list(mutants(file, (options.root / file).read_bytes()))
        for file in options.files
    ]
    share = options.count / sum(map(len, found))
    chosen: list[Mutant] = []
    for of_file in found:
        random.Random(options.seed).shuffle(of_file)
        by_line = collections.defaultdict[int, list[Mutant]](list)
        for mutant in of_file:
            by_line[mutant.line].append(mutant)
        of_file.sort(key=lambda mutant: by_line[mutant.line].index(mutant))
        chosen += of_file[: max(1, round(share * len(of_file)))]
    return chosen


class Tests:
    """Which tests run which lines, and how long they take."""

    def __init__(self, options: argparse.Namespace):
        self.budget = options.budget
        seconds, sources = options.work / "seconds.json", options.work / "sources"
        digest = digest_of(options.root)
        if not seconds.exists():
            record(options)
            sources.write_text(digest)
        if sources.read_text() != digest:
            sys.exit(f"The sources are not those of {options.work}: remove it.")
        self.seconds: dict[str, float] = json.loads(seconds.read_text())
        self.lines: dict[str, dict[int, set[str]]] = {}
        for path in options.work.glob("coverage.*"):
            data = coverage.CoverageData(str(path))
            data.read()
            for file in data.measured_files():
                lines = self.lines.setdefault(file, {})
                for line, contexts in data.contexts_by_lineno(file).items():
                    lines.setdefault(line, set()).update(contexts)

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that run the line of a mutant, the fastest first."""
        lines = self.lines.get(mutant.file, {})
        # Later lines of an expression may have no code of their own.
        line = max((n for n in lines if n <= mutant.line), default=0)
        contexts = lines.get(line, set()) - {""}
        if not contexts:  # It runs when it is imported.
            first, last = mutant.scope
            contexts = set().union(*(lines.get(n, ()) for n in range(first, last + 1)))
        names = [
            test
            for test in sorted(self.seconds, key=lambda test: self.seconds[test])
            if test in contexts or test.partition("::")[0] in contexts
        ]
        total = itertools.accumulate(self.seconds[name] for name in names)
        return names[: max(1, sum(seconds <= self.budget for seconds in total))]


def digest_of(root: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((*root.glob("hk_stack/**/*.py"), *root.glob("tests/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def record(options: argparse.Namespace) -> None:
    """Runs the suite once, with all that it shows written to `options.work`."""
    jobs = [f"--numprocesses={options.jobs}"] if options.jobs > 1 else []
    done = pytest([*jobs, *options.suite], options.root, options.work, "RECORD")
    print(done.stdout[-500:])
    if done.returncode not in (0, 1):  # A test that fails is left out.
        sys.exit(done.stderr)


def pytest(
    args: list[str], root: pathlib.Path, work: pathlib.Path, task: str
) -> subprocess.CompletedProcess[str]:
    # Programs of a process that was killed may be cut off in the cache.
    ignored = ["-W", "ignore:Error reading persistent", "-W", "ignore:Error writing"]
    plugins = ["-p", "mutant_plugin", "-p", "no:cacheprovider"]
    paths = (root, root / "tests", pathlib.Path(__file__).parent)
    env = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",  # Mutants are as old and as long.
        "JAX_COMPILATION_CACHE_DIR": str(work / "programs"),
        f"MUTANTS_{task}": str(work if task == "RECORD" else root / "order.json"),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *ignored, *plugins, *args],
        cwd=root,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def run_all(chosen: list[Mutant], tests: Tests, options: argparse.Namespace) -> None:
    """Runs the mutants that were not run, each in the next copy that is free."""
    done = results(options.work)
    missing = [mutant for mutant in chosen if mutant.key not in done]
    path = options.work / f"results-{options.part.replace('/', '-')}.jsonl"
    with tempfile.TemporaryDirectory() as folder, path.open("a") as file:
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for i in range(options.jobs):
            copy = pathlib.Path(folder) / str(i)
            copies.put(shutil.copytree(options.root, copy, ignore=NO_SOURCES))
        lock = threading.Lock()

        def run(mutant: Mutant) -> None:
            copy = copies.get()
            try:
                found = result(mutant, tests, copy, options.work)
            finally:
                copies.put(copy)
            with lock:
                print(json.dumps(found), file=file, flush=True)
                print(f"{found['outcome']}: {mutant.key}", flush=True)

        if missing:
            control(missing[0], tests, copies.queue[0], options.work)
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(run, missing))


def control(
    mutant: Mutant, tests: Tests, copy: pathlib.Path, work: pathlib.Path
) -> None:
    """Makes sure that what is no mutant survives."""
    same = mutant._replace(after=mutant.before)
    found = result(same, tests, copy, work)
    if found["outcome"] != "survived":
        sys.exit(f"Without a mutant: {found['outcome']}, {found['killer']}")


def result(
    mutant: Mutant, tests: Tests, copy: pathlib.Path, work: pathlib.Path
) -> dict[str, Any]:
    """What became of a mutant."""
    path, names, start = copy / mutant.file, tests.of(mutant), time.monotonic()
    source = path.read_bytes()
    path.write_bytes(mutant.applied(source))
    found = {"outcome": "survived", "killer": ""}
    for some in (names[:FIRST], names[FIRST:]):
        if some and found["outcome"] == "survived":
            limits = [[name, 30 + round(10 * tests.seconds[name])] for name in some]
            (copy / "order.json").write_text(json.dumps(limits))
            (copy / "names.txt").write_text("\n".join(some))
            found = outcome(pytest(["-x", "@names.txt"], copy, work, "ORDER"))
    path.write_bytes(source)
    seconds = round(time.monotonic() - start, 1)
    return {
        "key": mutant.key,
        **{name: getattr(mutant, name) for name in SHOWN},
        **found,
        "tests": len(names),
        "seconds": seconds,
    }


SHOWN = ("file", "line", "text", "before", "after")


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    if done.returncode not in OUTCOMES:
        sys.exit(f"pytest returned {done.returncode}:\n{done.stdout}\n{done.stderr}")
    lines = done.stdout.splitlines()
    killer = [s.split()[1] for s in lines if s.startswith(("FAILED ", "ERROR "))]
    return {"outcome": OUTCOMES[done.returncode], "killer": "".join(killer[:1])}


def results(work: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What is done, by whatever machine."""
    lines = [
        s for p in work.glob("results-*.jsonl") for s in p.read_text().splitlines()
    ]
    return {found["key"]: found for found in map(json.loads, lines)}


def report(done: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes who survived, and why if that is known."""
    path = options.root / "tests/mutants.toml"
    known = tomllib.loads(path.read_text())["equivalent"] if path.exists() else []
    reasons = {tuple(row[name] for name in SHOWN[2:]): row["why"] for row in known}
    survivors = []
    killed: dict[str, list[int]] = {}
    for mutant in done:
        is_killed = mutant["outcome"] != "survived"
        counts = killed.setdefault(mutant["file"], [0, 0])
        counts[0] += is_killed
        counts[1] += 1
        if not is_killed:
            shown = {name: mutant[name] for name in SHOWN}
            why = reasons.get(tuple(mutant[name] for name in SHOWN[2:]))
            survivors.append({**shown, "why": why})
    total = sum(counts[0] for counts in killed.values())
    print(f"{total} of {len(done)} killed.")
    lines = ",\n".join(json.dumps(row) for row in survivors)
    head = json.dumps({"seed": options.seed, "killed of": killed})
    options.out.write_text(f'{head[:-1]}, "survivors": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
