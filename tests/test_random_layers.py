"""Hoisting never changes results, on random layers.

    pytest tests/test_random_layers.py                                # a few dozen
    HK_STACK_LAYERS=10000 pytest -n 2 -v tests/test_random_layers.py  # the long run

Programs are interpreted, not compiled (`ways`), but for a few.
"""

import collections
import os
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import jaxprs
import pytest
from agreement import FAST
from drawn import over
from interpreter import evaluate
from jax.extend import core as jex
from layer_cases import layer_loop
from random_layers import Program, Step, model, programs
from ways import Given, assert_agree, assert_close, rejoined, shape_of

import hk_stack

LAYERS = int(os.environ.get("HK_STACK_LAYERS", "20"))
SHARD = 20  # Layers in one test, so that the long run shows how far it is.
COMPILED = 50  # One in so many is compiled too.


@pytest.mark.parametrize("shard", range(-(-LAYERS // SHARD)))
def test_all_ways_to_run_a_layer_agree(shard):
    @over(programs(), min(LAYERS, SHARD), shard)
    def check(program):
        given = Model(program)
        assert_agree(given.trace_all(given.ways()), given, evaluate)

    check()
    if shard % 25 == 24:
        jax.clear_caches()  # Or else memory grows, if slowly.


@pytest.mark.parametrize("shard", range(-(-LAYERS // COMPILED)))
def test_compiled(shard):
    # One more, as Hypothesis begins with the smallest.
    @over(programs(), 2, 1_000_000 + shard)
    def check(program):
        given = Model(program)
        traced = given.trace_all(given.ways())

        def run(closed: jex.ClosedJaxpr, values: list[Any]) -> list[Any]:
            if closed is traced["loop"]:
                return evaluate(closed, values)
            function = jex.jaxpr_as_fun(closed)
            return jax.jit(function, compiler_options=FAST)(*values)

        assert_agree(traced, given, run)
        found = given.stacked("auto")(*given.arguments(given.values(0)))
        expected = run(traced["loop"], given.values(0))[1:]
        assert_close(
            jax.tree.leaves(found), expected[: len(jax.tree.leaves(found))], 0.1
        )

    check()


def test_programs_hoist_and_mix():
    """The layers are such that the checks above mean something."""
    hoists, mixes = [], []

    @over(programs(), 60, 0)
    def look(program):
        given = Model(program)
        arguments = given.arguments(given.leaves)
        inline, auto = (
            jax.make_jaxpr(given.stacked(setup))(*arguments).jaxpr
            for setup in ("inline", "auto")
        )
        hoists.append(jaxprs.names(inline) != jaxprs.names(auto))
        known = len(jax.tree.leaves(arguments[0]))
        flags = [i < known for i in range(len(inline.invars))]
        mixes.append(collections.Counter(mixed(inline, flags)))

    look()
    assert 2 * sum(hoists) > len(hoists)
    # The stack is a scan, too.
    assert 5 * sum(found["scan"] > 1 for found in mixes) > len(mixes)
    assert all(any(found[name] for found in mixes) for name in ("cond", "while", "jit"))


class Model(Given):
    """A program, the parameters, state, key and inputs that it is given, and its ways.

    Attributes:
      program: The program.
    """

    def __init__(self, program: Program):
        self.program = program
        inputs = (
            [shape_of(kind) for kind in program.carry],
            [shape_of(kind, program.num_layers) for kind in program.per_layer],
            shape_of("matrix"),
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        init = self.transform(hk_stack.layer_stack, setup="inline").init
        params, state = jax.eval_shape(init, key, *inputs)
        super().__init__((params, state, key, *inputs))

    def transform(self, layer_stack: Callable[..., Any], **options: Any) -> Any:
        return hk.transform_with_state(model(self.program, layer_stack, **options))

    def stacked(self, setup: str) -> Callable[..., Any]:
        return self.transform(hk_stack.layer_stack, setup=setup).apply

    def ways(self) -> dict[str, Callable[..., Any]]:
        """The ways to run the program; the first is what is right."""
        loop = self.transform(layer_loop).apply
        ways = {"loop": loop, "inline": self.stacked("inline")}
        ways["auto"] = self.stacked("auto")
        if has_marks(self.program.layer):  # Or else it is "inline".
            ways["marked"] = self.stacked("marked")
        way = self.program.partitioned
        arguments = self.arguments(self.leaves)
        ways["partition"] = rejoined(ways[way], arguments)
        return ways


def has_marks(steps: tuple[Step, ...]) -> bool:
    return any(step.op == "hoist" or has_marks(step.body) for step in steps)


def mixed(jaxpr: jex.Jaxpr, known: list[bool]) -> Iterator[str]:
    """The names of the equations that read both what is known and what is not."""
    env = dict(zip(jaxpr.invars, known, strict=True))
    for eqn in jaxpr.eqns:
        operands = [isinstance(v, jex.Literal) or env.get(v, True) for v in eqn.invars]
        known = [
            operands[i] for i, v in enumerate(eqn.invars) if isinstance(v, jex.Var)
        ]
        if any(known) and not all(known):
            yield eqn.primitive.name
        env.update(dict.fromkeys(eqn.outvars, all(known)))
        for body in jaxprs.bodies(eqn):
            if eqn.primitive.name != "while":
                yield from mixed(body, operands[-len(body.invars) :])
