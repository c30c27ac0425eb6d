"""Ways to run a random program, which must agree.

Each way is traced, with its gradients. What a traced program computes is found by a
small interpreter, since XLA would take seconds to compile it.
"""

from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from interpreter import is_key
from jax.extend import core as jex
from random_layers import DTYPES, SHAPES, real

import hk_stack


class Given:
    """What programs are given.

    Attributes:
      leaves: The shapes of their arguments, in one list.
    """

    def __init__(self, arguments: tuple[Any, ...]):
        self.leaves, self._tree = jax.tree.flatten(arguments)

    def arguments(self, leaves: list[Any]) -> Any:
        """The arguments of a program."""
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

    def with_gradients(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """Results and gradients of a program, as a function of leaves."""

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

        return run

    def trace(self, apply: Callable[..., Any]) -> jex.ClosedJaxpr:
        """The program of results, new state and gradients, as a function of leaves."""
        return jax.make_jaxpr(self.with_gradients(apply))(*self.leaves)

    def trace_all(
        self, ways: dict[str, Callable[..., Any]]
    ) -> dict[str, jex.ClosedJaxpr]:
        """The programs of all ways."""
        traced: dict[str, jex.ClosedJaxpr] = {}
        try:
            for name, apply in ways.items():
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


# When results agree.


def assert_agree(
    ways: dict[str, jex.ClosedJaxpr], given: Given, run: Callable[..., list[Any]]
) -> None:
    """All ways compute what the first does.

    Rounding can tip a comparison over. That is chance, and then the same programs agree
    on values nearby.
    """
    first, *others = ways
    for name in others:
        errors = []
        for seed in range(3):
            values = given.values(seed)
            with np.errstate(all="ignore"):
                expected, found = run(ways[first], values), run(ways[name], values)
            try:
                assert_close(found, expected, tolerance(ways[first].jaxpr))
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
