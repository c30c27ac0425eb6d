"""Compiled programs that are kept between runs outside of `jit`.

There every invocation of a stack traces its layer function anew, and JAX would
compile the result each time: it knows a program by its identity only. Here programs
are known by what they compute, so each compiles once.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
from jax.extend import core as jex

from hk_stack import _structure

T = TypeVar("T")
Structure = Callable[[jex.ClosedJaxpr], Hashable]


def run(
    function: Callable[[list[Any]], T],
    values: list[Any],
    key: Callable[[Structure], Hashable],
    where: jax.sharding.Sharding | None = None,
) -> T:
    """`function(values)`, compiled outside of `jit`, also where it is differentiated.

    Args:
      function: A pure function of a list of arrays, which closes over no arrays.
      values: The arrays.
      key: Gives all that `function` depends on, given what makes a hashable value of a
        closed jaxpr without constants; those with equal keys are interchangeable.
      where: Where results go outside of `jit`; by default, where the arrays are.

    Returns:
      What `function` returns.
    """
    is_traced = any(isinstance(value, jax.core.Tracer) for value in values)
    # Inside `jit` all is traced; under gradients only what depends on their values.
    if is_traced and isinstance(jax.lax.full([], 0), jax.core.Tracer):
        return function(values)
    structure = functools.partial(
        _structure.of_program, derivatives=3 if is_traced else 0
    )
    try:
        compiled = _compiled(
            _Program(function, key(lambda closed: structure(closed.jaxpr)), where)
        )
    except Exception:  # Some parameter cannot be hashed, or some rule cannot be traced.
        return function(values)
    result: T = compiled(values)
    return result


@dataclasses.dataclass(frozen=True)
class _Program:
    """A function known by its key."""

    run: Callable[[list[Any]], Any] = dataclasses.field(compare=False)
    key: Hashable
    where: jax.sharding.Sharding | None


@functools.lru_cache(maxsize=128)
def _compiled(program: _Program) -> Callable[[list[Any]], Any]:
    return jax.jit(program.run, out_shardings=program.where)
