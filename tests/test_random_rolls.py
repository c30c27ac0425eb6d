"""Rolling never changes results, on random loops; and what must roll rolls.

    pytest tests/test_random_rolls.py                              # a dozen
    HK_STACK_ROLLS=2000 pytest -n 2 -v tests/test_random_rolls.py  # the long run

Programs are interpreted, not compiled: see `ways`.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import interpreter
import jax
import numpy as np
import pytest
from drawn import over
from interpreter import evaluate
from jax.extend import core as jex
from random_layers import Program, Step
from random_rolls import Loop, Model, loops
from ways import Given, assert_agree, rejoined, shape_of

import hk_stack

ROLLS = int(os.environ.get("HK_STACK_ROLLS", "12"))
SHARD = 12  # Loops in one test, so that the long run shows how far it is.

# What went wrong once, at its smallest.
PARAMETER, CONSTANT = Step("parameter", (), 6), Step("constant", (), 3)
INNER = Step("custom_vjp", (0, 0), 4, (CONSTANT._replace(variant=4),))
FOUND = {
    "marks": Loop(Program((PARAMETER, Step("hoist", (0,))))),
    "slices of what the first layer is given": Loop(
        Program((PARAMETER, Step("reshaped", (2,), 10)))
    ),
    "weak types": Loop(Program((PARAMETER,)), weak="alone"),
    "arrays in jit": Loop(Program((CONSTANT,)), wrap="jit", factor=True),
    "arrays in rules": Loop(Program((Step("custom_jvp", (0, 0), 1, (CONSTANT,)),))),
    "arrays in rules of vjp": Loop(
        Program((CONSTANT._replace(variant=4),)), wrap="custom_vjp"
    ),
    "arrays in rules of vjp in loops": Loop(
        Program((PARAMETER, Step("fori_loop", (0, 0), 10, (INNER,))))
    ),
    "effects": Loop(Program((PARAMETER,)), effect="free", around="scan"),
}


@pytest.fixture(autouse=True)
def printed(monkeypatch):
    """What programs print or call back, instead of that."""
    found = []

    def rule(values, **params):
        found.append(float(np.ravel(values[0])[0]))
        return []

    for name in ("debug_callback", "debug_print"):
        monkeypatch.setitem(interpreter.RULES, name, rule)
    return found


@pytest.mark.parametrize("shard", range(-(-ROLLS // SHARD)))
def test_all_ways_to_run_a_loop_agree(shard, printed):
    @over(loops(), min(ROLLS, SHARD), shard)
    def check(loop):
        assert_rolled_right(loop, printed)

    check()
    if shard % 25 == 24:
        jax.clear_caches()  # Or else memory grows, if slowly.


@pytest.mark.parametrize("name", FOUND)
def test_what_went_wrong_once(name, printed):
    assert_rolled_right(FOUND[name], printed)


def test_loops_roll_and_do_not():
    """The loops are such that the checks above mean something."""
    drawn = []
    over(loops(), 100)(lambda loop: drawn.append(loop))()
    assert 0.1 < sum(bool(loop.blocks()) for loop in drawn) / len(drawn) < 0.8
    assert any(loop.is_scan and loop.blocks() for loop in drawn)


def assert_rolled_right(loop, printed):
    """A loop and the same rolled agree, and what must be a loop is one."""
    given = Rolled(loop)
    arguments = given.arguments(given.leaves)
    apply = Model(loop).apply
    rolled = given.rolled(apply)
    before, after = (jax.make_jaxpr(f)(*arguments) for f in (apply, rolled))
    assert types(before) == types(after)
    report = rolled.report(*arguments)
    if expected := loop.blocks():
        found = Counter(each.blocks for each in report.loops if each.carry)
        assert any(not Counter(e) - found for e in expected), (expected, str(report))
    if not report.loops:
        assert as_text(before) == as_text(after)
    if loop.effect:
        assert_same_effects(before, after, given, printed)
    assert_agree(given.traced(), given, evaluate)


def types(program):
    """What a program returns."""
    return [(a.shape, a.dtype, a.weak_type) for a in program.out_avals]


def as_text(program):
    """A program without what says when it was made, or orders what it closes over."""
    text = re.sub("0x[0-9a-f]+| *num_consts=.*\n", "", str(program))
    return re.sub(r"\b[a-z]{1,3}\b", "_", re.sub("lambda[^;]*;", "lambda;", text))


def assert_same_effects(before, after, given, printed):
    """As many, and in order if there is one."""
    notes = []
    for program in (before, after):
        printed.clear()
        with np.errstate(all="ignore"):
            evaluate(program, given.values(0))
        notes.append(printed[:] if given.loop.effect == "ordered" else sorted(printed))
    assert len(notes[0]) >= sum(given.loop.counts)
    np.testing.assert_allclose(*notes, rtol=0.1, atol=0.1)


class Rolled(Given):
    """A loop, what it is given, and the ways to run it.

    Attributes:
      loop: The loop.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        program = loop.program
        inputs = (
            [shape_of(kind) for kind in program.carry],
            [shape_of(kind, max(loop.counts)) for kind in program.per_layer],
            shape_of("matrix"),
        )
        make = jax.random.PRNGKey if loop.raw else jax.random.key
        key = jax.eval_shape(lambda: make(0))
        params, state = jax.eval_shape(Model(loop).init, key, *inputs)
        super().__init__((params, state, key, *inputs))

    def rolled(self, apply: Callable[..., Any]) -> Any:
        loop, program = self.loop, self.loop.program
        sizes: dict[str, Any] = {
            "setup_batch_size": program.setup_batch_size,
            "setup_remat": program.setup_remat,
        }
        return hk_stack.roll(
            apply,
            min_layers=loop.least,
            setup=loop.setup,
            **(sizes if loop.setup != "inline" else {}),
            remat=loop.remat,
            remat_every=loop.remat_every if loop.remat else None,
            unroll=program.unroll,
        )

    def traced(self) -> dict[str, jex.ClosedJaxpr]:
        """The programs of all ways, with gradients."""
        traced = self.trace_all(self.ways())
        if self.loop.also != "gradients":
            return traced
        run = self.with_gradients(Model(self.loop).apply)
        rolled = self.rolled(lambda *args: run(*jax.tree.leaves(args)))
        arguments = self.arguments(self.leaves)
        traced["rolled with gradients"] = jax.make_jaxpr(rolled)(*arguments)
        return traced

    def ways(self) -> dict[str, Callable[..., Any]]:
        """The ways to run the loop; the first is what is right."""
        loop = Model(self.loop).apply
        ways = {"loop": loop, "rolled": self.rolled(loop)}
        if self.loop.also == "partition":
            arguments = self.arguments(self.leaves)
            ways["partition"] = rejoined(self.rolled(loop), arguments)
        if self.loop.is_scan:
            scan = Model(self.loop, as_scan=True).apply
            ways["scan"] = scan
            ways["setup_first"] = hk_stack.setup_first(scan)
            ways["rolled scan"] = self.rolled(scan)
        return ways
