"""Which inputs of a traced program its results depend on, loops and branches included.

Sets of inputs are the bits of an int.
"""

import functools
import operator
from collections.abc import Iterable, Sequence

from jax.extend import core as jex

from hk_stack import _equations
from hk_stack._equations import Atom, Body


def results(body: Body, given: Sequence[int]) -> list[int]:
    """What each result of a program depends on.

    >>> import jax
    >>> program = jax.make_jaxpr(lambda x, y, z: (x + y, 2 * z, 1.0))(1.0, 2.0, 3.0)
    >>> results(program, [0b001, 0b010, 0b100])
    [3, 4, 0]

    Args:
      body: The program.
      given: What each of its inputs depends on.
    """
    jaxpr = _equations.opened(body)
    known = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Atom) -> int:
        return 0 if isinstance(atom, jex.Literal) else known.get(atom, 0)

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _of(eqn, [*map(read, eqn.invars)]), strict=True))
    return [*map(read, jaxpr.outvars)]


def _of(eqn: jex.JaxprEqn, given: list[int]) -> list[int]:
    """What each result of an equation depends on."""
    name = eqn.primitive.name
    if name in _RULES:
        return _RULES[name](eqn, given)
    if name in _ONCE:
        body = next(_equations.closed_bodies(eqn))
        return results(body, given)
    return [_union(given)] * len(eqn.outvars)


_ONCE = (*_equations.JIT, *_equations.REMAT, *_equations.CUSTOM_DERIVATIVES)


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)


def _cond(eqn: jex.JaxprEqn, given: list[int]) -> list[int]:
    choice, *operands = given
    branches = [results(branch, operands) for branch in eqn.params["branches"]]
    return [choice | _union(found) for found in zip(*branches, strict=True)]


def _scan(eqn: jex.JaxprEqn, given: list[int]) -> list[int]:
    carry = _equations.carried(eqn)
    start, stop = carry.start, carry.stop
    while True:
        made = results(eqn.params["jaxpr"], given)
        after = [*map(operator.or_, given[start:stop], made)]
        if after == given[start:stop]:
            return [*after, *made[len(carry) :]]
        given = [*given[:start], *after, *given[stop:]]


def _while(eqn: jex.JaxprEqn, given: list[int]) -> list[int]:
    test, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_test, of_body = given[:test], given[test : test + body]
    carry = given[test + body :]
    while True:
        [goes_on] = results(eqn.params["cond_jaxpr"], [*of_test, *carry])
        made = results(eqn.params["body_jaxpr"], [*of_body, *carry])
        after = [goes_on | one | other for one, other in zip(carry, made, strict=True)]
        if after == carry:
            return after
        carry = after


_RULES = {"cond": _cond, "scan": _scan, "while": _while}
