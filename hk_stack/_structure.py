"""What traced programs compute, as values that can be compared and hashed.

JAX knows a program by its identity. Here two programs are the same if they compute the
same, and so do their derivatives.
"""

import contextlib
from collections.abc import Hashable
from typing import Any

import jax
from jax.extend import core as jex

from hk_stack import _cost, _equations
from hk_stack._equations import Atom, Aval


def of_program(jaxpr: jex.Jaxpr, derivatives: int) -> Hashable:
    """What a jaxpr and so many derivatives of it compute, as a hashable value.

    Raises:
      ValueError: If a rule of a derivative closes over traced values, or asks what it
        is differentiated by.
    """
    return _Reading(derivatives).program(jaxpr)


class Numbering:
    """Numbers for equations: those of the same number compute the same.

    That is: of their operands, of `inner_literals`, and with the same derivatives.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._reading = _Reading(3, is_blank=True, seen={})

    def of(self, eqn: jex.JaxprEqn) -> int:
        """The number of an equation, of its own if nothing can be told of it."""
        key: Hashable = object()
        if not is_ordered(eqn) and not _cost.is_wide([eqn]):
            with contextlib.suppress(Exception):  # Of a rule, or of what has no hash.
                operands = tuple(_kind(a.aval) for a in eqn.invars)
                results = tuple((_kind(v.aval), is_weak(v.aval)) for v in eqn.outvars)
                key = self._reading.equation(eqn), operands, results
                hash(key)
        return self._numbers.setdefault(key, len(self._numbers))


def _kind(aval: Aval) -> tuple[Hashable, ...]:
    """What of a type tells what an equation computes."""
    if not isinstance(aval, jax.core.ShapedArray):
        return (aval,)
    # A type names the mesh that was set when it was made, even if that is all it says.
    spread = _equations.explicit(aval), _equations.varying(aval)
    return aval.shape, aval.dtype, *spread


def is_weak(aval: Aval) -> bool:
    """Whether a type is that of a Python number."""
    return bool(getattr(aval, "weak_type", False))


def is_ordered(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation has effects whose order matters."""
    return any(str(effect) not in ("Debug", "IO") for effect in eqn.effects)


def inner_literals(eqn: jex.JaxprEqn) -> list[jex.Literal]:
    """The numbers inside of `jit` and rematerialised functions, which may be others.

    Arrays that they close over are numbers, too.
    """
    body = _equations.body_in_place(eqn)
    if body is None:
        return []
    found: list[jex.Literal] = []
    for inner in body.eqns:
        found += (a for a in inner.invars if isinstance(a, jex.Literal))
        found += inner_literals(inner)
    return [*found, *(a for a in body.outvars if isinstance(a, jex.Literal))]


def number(literal: jex.Literal) -> Hashable:
    """The value of a literal."""
    return literal.aval, _Reading(0).value(literal.val)


class _Known:
    """A hashable value, whose hash is computed once."""

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Hashable) -> None:
        self._value = value
        self._hash = hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Known)
            and self._hash == other._hash
            and self._value == other._value
        )


class _Reading:
    """How programs are read.

    Attributes:
      derivatives: How many derivatives have to be the same, too.
      is_blank: Whether to leave out `inner_literals`.
      seen: What was read before: a jaxpr, kept so that its identity stays its own.
    """

    def __init__(
        self,
        derivatives: int,
        *,
        is_blank: bool = False,
        seen: dict[Any, tuple[jex.Jaxpr, Hashable]] | None = None,
    ) -> None:
        self.derivatives = derivatives
        self.is_blank = is_blank
        self._seen = {} if seen is None else seen

    def program(self, jaxpr: jex.Jaxpr, *, is_blank: bool = False) -> Hashable:
        """A jaxpr, with or without the numbers in it."""
        key = id(jaxpr), is_blank
        if key not in self._seen:
            self._seen[key] = jaxpr, _Known(self._program(jaxpr, is_blank))
        return self._seen[key][1]

    def _program(self, jaxpr: jex.Jaxpr, is_blank: bool) -> Hashable:
        numbers: dict[jex.Var, int] = {}
        inside = _Reading(self.derivatives, is_blank=is_blank, seen=self._seen)

        def atom(a: Atom) -> Hashable:
            if isinstance(a, jex.Literal):
                return a.aval if is_blank else number(a)
            return numbers.setdefault(a, len(numbers))

        head = tuple((atom(v), v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
        body = tuple(
            (
                tuple(map(atom, eqn.invars)),
                tuple((atom(v), v.aval) for v in eqn.outvars),
                inside.equation(eqn),
            )
            for eqn in jaxpr.eqns
        )
        return head, body, tuple(map(atom, jaxpr.outvars))

    def equation(self, eqn: jex.JaxprEqn) -> Hashable:
        """An equation, but for its operands and results."""
        is_blank = self.is_blank and _equations.body_in_place(eqn) is not None
        params = sorted(self._params(eqn).items())
        return (
            eqn.primitive,
            repr(eqn.ctx),  # How to compute: the kind of random bits, and the like.
            tuple((name, self.value(p, is_blank=is_blank)) for name, p in params),
        )

    def _params(self, eqn: jex.JaxprEqn) -> dict[str, Any]:
        """The parameters of `eqn` that bear on its value, or on its derivatives.

        A rule for derivatives is a function made anew each time: what it runs tells. A
        program keeps the rule of the first that was like it, so what a rule closes over
        must be known to be the same the next time.
        """
        if eqn.primitive.name not in _equations.CUSTOM_DERIVATIVES:
            return eqn.params
        params = {k: p for k, p in eqn.params.items() if k == "call_jaxpr"}
        if self.derivatives:
            rule = _equations.derivative(eqn)
            if any(isinstance(value, jax.core.Tracer) for value in rule.consts):
                raise ValueError("a rule that closes over values being traced")
            runs = of_program(rule.jaxpr, self.derivatives - 1)
            params["derivative"] = runs, self.value(tuple(rule.consts))
        return params

    def value(self, value: Any, *, is_blank: bool = False) -> Hashable:
        if isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr)):
            consts = () if is_blank else _equations.constants(value)
            jaxpr = value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
            return self.program(jaxpr, is_blank=is_blank), tuple(
                map(self.value, consts)
            )
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self.value(v, is_blank=is_blank) for v in value)
        if hasattr(value, "tobytes"):  # numpy arrays and scalars
            return value.dtype, value.shape, value.tobytes()
        if isinstance(value, (float, complex)):  # 0.0 and -0.0 are equal, but differ.
            return type(value), repr(value)
        return type(value), value
