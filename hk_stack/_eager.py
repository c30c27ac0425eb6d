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
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import _equations
from hk_stack._equations import Atom

T = TypeVar("T")
Structure = Callable[[jex.ClosedJaxpr], Hashable]


def run(
    function: Callable[[list[Any]], T],
    values: list[Any],
    key: Callable[[Structure], Hashable],
) -> T:
    """`function(values)`, compiled outside of `jit`, also where it is differentiated.

    Args:
      function: A pure function of a list of arrays, which closes over no arrays.
      values: The arrays.
      key: Gives all that `function` depends on, given what makes a hashable value of a
        closed jaxpr without constants; those with equal keys are interchangeable.

    Returns:
      What `function` returns.
    """
    is_traced = any(isinstance(value, jax.core.Tracer) for value in values)
    # Inside `jit` all is traced; under gradients only what depends on their values.
    if is_traced and isinstance(jnp.zeros([]), jax.core.Tracer):
        return function(values)
    structure = functools.partial(_structure, derivatives=3 if is_traced else 0)
    try:
        compiled = _compiled(
            _Program(function, key(lambda closed: structure(closed.jaxpr)))
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


@functools.lru_cache(maxsize=128)
def _compiled(program: _Program) -> Callable[[list[Any]], Any]:
    return jax.jit(program.run)


def _structure(jaxpr: jex.Jaxpr, derivatives: int) -> Hashable:
    """What a jaxpr and so many derivatives of it compute, as a hashable value."""
    numbers: dict[jex.Var, int] = {}

    def atom(a: Atom) -> Hashable:
        if isinstance(a, jex.Literal):
            return (a.aval, _value(a.val, 0))
        return numbers.setdefault(a, len(numbers))

    head = tuple((atom(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    body = tuple(
        (
            eqn.primitive,
            repr(eqn.ctx),  # How to compute: the kind of random bits, and the like.
            tuple(map(atom, eqn.invars)),
            tuple((atom(v), v.aval) for v in eqn.outvars),
            tuple(
                (name, _value(p, derivatives))
                for name, p in sorted(_params(eqn, derivatives).items())
            ),
        )
        for eqn in jaxpr.eqns
    )
    return head, body, tuple(map(atom, jaxpr.outvars))


def _params(eqn: jex.JaxprEqn, derivatives: int) -> dict[str, Any]:
    """The parameters of `eqn` that bear on its value, or on its derivatives.

    A rule for derivatives is a function made anew each time: what it runs tells. A
    program keeps the rule of the first that was like it, so values that a rule closes
    over must not be others the next time.

    Raises:
      ValueError: If a rule closes over arrays.
    """
    if eqn.primitive.name not in _equations.CUSTOM_DERIVATIVES:
        return eqn.params
    params = {k: p for k, p in eqn.params.items() if k == "call_jaxpr"}
    if derivatives:
        rule = _equations.derivative(eqn)
        if rule.consts:
            raise ValueError("a rule that closes over arrays")
        params["derivative"] = _structure(rule.jaxpr, derivatives - 1)
    return params


def _value(value: Any, derivatives: int) -> Hashable:
    if isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr)):
        consts = (_value(c, derivatives) for c in _equations.constants(value))
        jaxpr = value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
        return _structure(jaxpr, derivatives), tuple(consts)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_value(v, derivatives) for v in value)
    if hasattr(value, "tobytes"):  # numpy arrays and scalars
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, (float, complex)):  # 0.0 and -0.0 are equal, but differ.
        return type(value), repr(value)
    return type(value), value
