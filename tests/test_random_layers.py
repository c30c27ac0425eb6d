"""Hoisting never changes results, on random layers.

    pytest tests/test_random_layers.py                                # a few dozen
    HK_STACK_LAYERS=10000 pytest -n 2 -v tests/test_random_layers.py  # the long run

Each way to run a layer is traced, with its gradients. What a traced program computes is
found by a small interpreter, since XLA would take seconds to compile it; a few programs
are compiled nevertheless.
"""

import collections
import os
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import hypothesis
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import FAST
from drawn import over
from interpreter import evaluate, is_key
from jax.extend import core as jex
from layer_cases import layer_loop
from random_layers import DTYPES, SHAPES, Program, Step, model, programs, real

import hk_stack

LAYERS = int(os.environ.get("HK_STACK_LAYERS", "40"))
SHARD = 20  # Layers in one test, so that the long run shows how far it is.
COMPILED = 50  # One in so many is compiled too.


@pytest.mark.parametrize("shard", range(-(-LAYERS // SHARD)))
def test_all_ways_to_run_a_layer_agree(shard):
    @over(programs(), min(LAYERS, SHARD), shard)
    def check(program):
        given = Given(program)
        assert_agree(given.trace_all(), given, evaluate)

    check()
    if shard % 25 == 24:
        jax.clear_caches()  # Or else memory grows, if slowly.


@pytest.mark.parametrize("shard", range(-(-LAYERS // COMPILED)))
def test_compiled(shard):
    # One more, as Hypothesis begins with the smallest.
    @over(programs(), 2, 1_000_000 + shard)
    def check(program):
        given = Given(program)
        traced = given.trace_all()

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
        given = Given(program)
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


class Given:
    """What a program is given, and the ways to run it.

    Attributes:
      program: The program.
      leaves: The shapes of its parameters, state, key and inputs, in one list.
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
        self.leaves, self._tree = jax.tree.flatten((params, state, key, *inputs))

    def transform(self, layer_stack: Callable[..., Any], **options: Any) -> Any:
        return hk.transform_with_state(model(self.program, layer_stack, **options))

    def stacked(self, setup: str) -> Callable[..., Any]:
        return self.transform(hk_stack.layer_stack, setup=setup).apply

    def arguments(self, leaves: list[Any]) -> Any:
        """What `apply` takes."""
        return jax.tree.unflatten(self._tree, leaves)

    def values(self, seed: int) -> list[Any]:
        """Values for the leaves; those of another seed are close by."""
        numbers, nudges = np.random.default_rng(0), np.random.default_rng(seed)

        def value(leaf: Any) -> Any:
            if is_key(leaf):
                return jax.random.key(7)
            if not is_float(leaf):
                return numbers.integers(0, 3, leaf.shape).astype(leaf.dtype)
            value = 0.8 * numbers.normal(size=leaf.shape)
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                value = value + 0.5j
            nudge = 1.0 + 0.01 * seed * nudges.normal(size=leaf.shape)
            return np.asarray(value * nudge).astype(leaf.dtype)

        return list(map(value, self.leaves))

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

    def trace(self, apply: Callable[..., Any]) -> jex.ClosedJaxpr:
        """The program of results, new state and gradients, as a function of leaves."""

        def loss(floats: list[Any], others: list[Any]) -> Any:
            rest = iter(others)
            leaves = [next(rest) if f is None else f for f in floats]
            found = apply(*self.arguments(leaves))
            smooth = [real(a) for a in jax.tree.leaves(found) if is_float(a)]
            return sum(jnp.sum(jnp.sin(a)) for a in smooth), found

        def run(*leaves: Any) -> Any:
            floats = [leaf if is_float(leaf) else None for leaf in leaves]
            others = [leaf for leaf in leaves if not is_float(leaf)]
            (total, found), gradients = jax.value_and_grad(loss, has_aux=True)(
                floats, others
            )
            return total, found, gradients

        return jax.make_jaxpr(run)(*self.leaves)

    def trace_all(self) -> dict[str, jex.ClosedJaxpr]:
        """The programs of all ways."""
        traced: dict[str, jex.ClosedJaxpr] = {}
        try:
            for name, apply in self.ways().items():
                traced[name] = self.trace(apply)
        except TypeError as error:
            # JAX cannot differentiate jax.checkpoint with a policy that saves complex
            # values, if what it saves is also read by what is not differentiated.
            hypothesis.assume("reduce_precision" not in str(error))
            raise
        except AssertionError:
            # Plain JAX 0.9 cannot differentiate some loops around a conditional: then
            # it is the first way that fails, a loop without anything of ours.
            hypothesis.assume(traced)
            raise
        return traced


def rejoined(apply: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """`apply`, cut into setup and call, one after the other."""
    split = hk_stack.partition(apply, *arguments)
    return lambda params, *rest: split.call(split.setup(params), *rest)


def shape_of(kind: str, *lead: int) -> jax.ShapeDtypeStruct:
    shape, _, dtype = kind.partition(" ")
    return jax.ShapeDtypeStruct((*lead, *SHAPES[shape]), DTYPES[dtype])


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


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


# When results agree.


def assert_agree(
    ways: dict[str, jex.ClosedJaxpr], given: Given, run: Callable[..., list[Any]]
) -> None:
    """All ways compute what the first does.

    Rounding can tip a comparison over. That is chance, and then the same programs agree
    on values nearby.
    """
    for name in list(ways)[1:]:
        errors = []
        for seed in range(3):
            values = given.values(seed)
            with np.errstate(all="ignore"):
                expected, found = run(ways["loop"], values), run(ways[name], values)
            try:
                assert_close(found, expected, tolerance(ways["loop"].jaxpr))
                break
            except AssertionError as error:
                errors.append(f"{name}, values {seed}: {error}")
        else:
            pytest.fail("\n".join(errors))


def tolerance(jaxpr: jex.Jaxpr) -> float:
    """Loose, if there are half-precision numbers on the way."""
    equations = jaxprs.equations(jaxpr)
    types = {v.aval.dtype.name for eqn in equations for v in eqn.outvars}
    return 0.1 if types & {"float16", "bfloat16"} else 2e-4


def assert_close(found: list[Any], expected: list[Any], tolerance: float) -> None:
    """Up to `tolerance`; integers, and so random bits, are the same."""
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), i
        if not is_float(y):
            np.testing.assert_array_equal(x, y, f"result {i}")
            continue
        wide = np.complex128 if np.iscomplexobj(y) else np.float64
        x, y = np.asarray(x).astype(wide), np.asarray(y).astype(wide)
        finite = np.isfinite(y)  # The derivative of |z| at 0 is not, for instance.
        x, y = x[finite], y[finite]
        scale = np.max(np.abs(y), initial=1.0)
        error = np.max(np.abs(x - y), initial=0.0)
        assert error <= tolerance * scale, f"result {i}: off by {error}\n{x}\n{y}"
