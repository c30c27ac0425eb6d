"""Compiled programs that are kept between eager calls.

Outside of `jit` every call of a stack traces its layer function anew, and JAX would
compile the result each time: it knows a program by its identity only. Here programs
are known by what they compute, so an eager call compiles once.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.extend import core as jex


def call(
    run: Callable[[list[Any]], Any], values: list[Any], key: Callable[[], Hashable]
) -> Any:
    """`run(values)`, compiled if no value is traced.

    Args:
      run: A pure function of a list of arrays, which closes over no arrays.
      values: The arrays.
      key: Gives all that `run` depends on; runs with equal keys are interchangeable.

    Returns:
      What `run` returns.
    """
    if any(isinstance(value, jax.core.Tracer) for value in values):
        return run(values)
    try:
        compiled = _compiled(_Program(run, key()))
    except TypeError:  # Some parameter of an equation cannot be hashed.
        return run(values)
    return compiled(values)


class _Program:
    """A function known by its key."""

    def __init__(self, run: Callable[[list[Any]], Any], key: Hashable):
        self.run = run
        self.key = key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Program) and self.key == other.key


@functools.lru_cache(maxsize=128)
def _compiled(program: _Program) -> Callable[[list[Any]], Any]:
    return jax.jit(program.run)


def structure(closed: jex.ClosedJaxpr) -> Hashable:
    """What a closed jaxpr without constants computes, as a hashable value."""
    return _structure(closed.jaxpr)


def _structure(jaxpr: jex.Jaxpr) -> Hashable:
    numbers: dict[jex.Var, int] = {}

    def atom(a: Any) -> Hashable:
        if isinstance(a, jex.Literal):
            return (a.aval, _value(a.val))
        return numbers.setdefault(a, len(numbers))

    head = tuple((atom(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple(
        (
            eqn.primitive,
            repr(eqn.ctx),  # How to compute: the kind of random bits, and the like.
            tuple(map(atom, eqn.invars)),
            tuple((atom(v), v.aval) for v in eqn.outvars),
            tuple((name, _value(p)) for name, p in sorted(_params(eqn).items())),
        )
        for eqn in jaxpr.eqns
    )
    return head, body, tuple(map(atom, jaxpr.outvars))


def _params(eqn: jex.JaxprEqn) -> dict[str, Any]:
    """The parameters of `eqn` that bear on its value.

    Derivative rules do not: values that are not traced are not differentiated.
    """
    if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
        return {k: p for k, p in eqn.params.items() if k == "call_jaxpr"}
    return eqn.params


def _value(value: Any) -> Hashable:
    if isinstance(value, jex.Jaxpr):
        return _structure(value)
    if isinstance(value, jex.ClosedJaxpr):
        return _structure(value.jaxpr), tuple(map(_value, value.consts))
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_value, value))
    if hasattr(value, "tobytes"):  # numpy arrays and scalars
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, (float, complex)):  # 0.0 and -0.0 are equal, but differ.
        return type(value), repr(value)
    return type(value), value
