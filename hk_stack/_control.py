"""The surgery on loops and conditionals: what is known inside of them goes before them.

What does not change over a `scan` or `while` runs once before it, what depends on the
known part of a `scan`'s inputs runs for all turns before it, and what the branches of a
known `cond` compute of known values runs in a `cond` before it. Each body is cut as a
whole function is; here the equation is put together again from what was cut.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from hk_stack import _equations
from hk_stack._equations import Atom, Aval, carried, fresh
from hk_stack._flat import Exposed, bits
from hk_stack._hoist import are_marked
from hk_stack._marks import HOIST, HOISTED
from hk_stack._parts import Input, Parts, derive
from hk_stack._spread import Devices


class Task(NamedTuple):
    """What a cut is to do.

    Attributes:
      inputs: The inputs of the traced function.
      policy: What to hoist: see `cut`, as the next two.
      where: Names the traced function in errors.
      reuse: Whether the derived values will be kept for many runs.
      cut: Cuts a function, given what to do.
      devices: Over which devices the setup of a `scan` is spread, if it is.
    """

    inputs: Sequence[Input]
    policy: str
    where: str
    reuse: bool
    cut: Callable[[jex.ClosedJaxpr, "Task"], Parts]
    devices: Devices | None = None

    def known(self) -> int:
        """The bit set of the known inputs."""
        return bits(i.known for i in self.inputs)

    def fixed(self) -> int:
        """The bit set of the fixed inputs."""
        return bits(i.fixed for i in self.inputs)

    def constant(self) -> int:
        """The bit set of the inputs that are constants."""
        return bits(i.constant for i in self.inputs)

    def names_of(self, reads: int) -> str:
        """The inputs `reads`, in words."""
        labels = [i.label for i in self.inputs] + ["a side effect or callback"]
        found = [label for bit, label in enumerate(labels) if reads >> bit & 1]
        return ", ".join(dict.fromkeys(found))

    def expose(self, eqn: jex.JaxprEqn, reads: list[int]) -> Exposed | None:
        """Cuts the body of a loop or the branches of a conditional.

        Args:
          eqn: An equation.
          reads: What each of its inputs depends on, as bit sets.

        Returns:
          The known part, then the equation without it; None if the equation is known as
          a whole, is of another kind, or has nothing to hoist.
        """
        expose = _EXPOSE.get(eqn.primitive.name)
        if expose is None:
            return None
        if any(map(_equations.constants, _equations.closed_bodies(eqn))):
            return None
        outer = list(map(self._describe, reads))
        if all(i.known for i in outer) or (
            all(i.fixed for i in outer) and are_marked([eqn], (HOIST, HOISTED))
        ):
            return None
        return expose(self, eqn, outer)

    def _describe(self, reads: int) -> Input:
        """An input of an inner jaxpr that depends on the inputs `reads`."""
        return Input(
            self.names_of(reads & ~self.fixed()),
            known=not reads & ~self.known(),
            fixed=not reads & ~self.fixed(),
            constant=not reads & ~self.constant(),
        )

    def inner(self, body: jex.ClosedJaxpr, inputs: Sequence[Input], what: str) -> Parts:
        """Cuts an inner jaxpr."""
        where = f"{self.where}, inside a {what}"
        return self.cut(body, self._replace(inputs=inputs, where=where))


def _expose_scan(task: Task, eqn: jex.JaxprEqn, outer: list[Input]) -> Exposed | None:
    """Moves what is known of each turn of a `scan` before it."""
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    if not length:
        return None
    places = carried(eqn)
    carry = _describe_carry(body.jaxpr, outer, places, "scan")
    mapped = [i._replace(layered=True) for i in outer[places.stop :]]
    inputs = [*outer[: places.start], *carry, *mapped]
    parts = task.inner(body, inputs, "scan")
    if not parts.num_derived:
        return None

    def run(*values: jax.Array) -> list[Any]:
        shared, own = derive(parts, values, inputs, length, devices=task.devices)
        return [*shared, *(checkpoint_name(v, HOISTED) for v in own)]

    return Exposed(_trace(run, eqn), functools.partial(_rest_of_scan, eqn, parts))


def _rest_of_scan(eqn: jex.JaxprEqn, parts: Parts, derived: list[Atom]) -> jex.JaxprEqn:
    """The `scan` of calls, given the values that all turns share, then the others."""
    places = carried(eqn)
    constants = [i for i in parts.call_inputs if i < places.start]
    mapped = [i for i in parts.call_inputs if i >= places.stop]
    order = [*constants, *places, *mapped]
    count = parts.num_shared
    read = [eqn.invars[i] for i in order]
    operands = [*derived[:count], *read, *derived[count:]]
    rest = parts.body(order, eqn.params["jaxpr"].in_avals)
    return _equations.with_scan_body(eqn, operands, rest, count + len(constants))


def _expose_while(task: Task, eqn: jex.JaxprEqn, outer: list[Input]) -> Exposed | None:
    """Moves what does not change over a `while` before it."""
    body = eqn.params["body_jaxpr"]
    of_test, of_body, carried = _consts_of_while(eqn)
    in_body = range(len(of_body), len(body.in_avals))
    inputs = [outer[i] for i in (*of_body, *carried)]
    carry = _describe_carry(body.jaxpr, inputs, in_body, "while")
    test = task.inner(
        eqn.params["cond_jaxpr"], [*(outer[i] for i in of_test), *carry], "while"
    )
    inputs = [*(outer[i] for i in of_body), *carry]
    turn = task.inner(body, inputs, "while")
    inner = _equations.with_inner(turn.shared.jaxpr.eqns)
    if any(eqn.primitive.name == "while" for eqn in inner):
        turn = task._replace(policy="inline").inner(body, inputs, "while")
    if not test.num_derived and not turn.num_derived:
        return None

    def run(*values: jax.Array) -> list[Any]:
        def shared(parts: Parts, consts: range) -> list[Any]:
            read = [values[i] for i in (*consts, *carried)]
            return _equations.run(parts.shared, *(read[i] for i in parts.shared_inputs))

        return [*shared(test, of_test), *shared(turn, of_body)]

    after = functools.partial(_rest_of_while, eqn, test, turn)
    return Exposed(_trace(run, eqn), after)


def _consts_of_while(eqn: jex.JaxprEqn) -> tuple[range, range, range]:
    """Which inputs of a `while` are constants of its test, of its body, its carry."""
    test = eqn.params["cond_nconsts"]
    body = test + eqn.params["body_nconsts"]
    return range(test), range(test, body), range(body, len(eqn.invars))


def _rest_of_while(
    eqn: jex.JaxprEqn, test: Parts, turn: Parts, derived: list[Atom]
) -> jex.JaxprEqn:
    """The `while` of calls, given the derived values of its test, then its body."""
    of_test, of_body, carried = _consts_of_while(eqn)
    rest, operands, params = list(derived), [], dict(eqn.params)
    for name, parts, consts in (("cond", test, of_test), ("body", turn, of_body)):
        read = [i for i in parts.call_inputs if i < len(consts)]
        order = [*read, *range(len(consts), len(consts) + len(carried))]
        given, taken = parts.variables(order, eqn.params[f"{name}_jaxpr"].in_avals)
        params[f"{name}_jaxpr"] = parts.taking([*given, *taken])
        params[f"{name}_nconsts"] = len(given) + len(read)
        operands += [*rest[: len(given)], *(eqn.invars[consts[i]] for i in read)]
        rest = rest[len(given) :]
    operands += [eqn.invars[i] for i in carried]
    return _equations.replace(eqn, invars=operands, params=params)


def _expose_cond(task: Task, eqn: jex.JaxprEqn, outer: list[Input]) -> Exposed | None:
    """Moves what is known in each branch of a known `cond` into one before it."""
    if not outer[0].fixed:  # Which branch runs is not known: none may run before.
        return None
    if eqn.params.get("branches_platforms") is not None:
        return None  # The platform tells which branch runs, when it is known.
    if not outer[0].known:
        task = task._replace(policy="marked")
    cuts = [task.inner(branch, outer[1:], "cond") for branch in eqn.params["branches"]]
    room, slots = _slots([parts.shared.out_avals for parts in cuts])
    if not room or any(jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in room):
        return None
    # Only what is read, as a cond of unknown operands would be cut again.
    read = sorted({i for parts in cuts for i in parts.shared_inputs})

    def filling(parts: Parts, own: list[int]) -> Callable[..., Any]:
        def branch(values: Sequence[Any]) -> list[Any]:
            given = (values[read.index(i)] for i in parts.shared_inputs)
            found = _equations.run(parts.shared, *given)
            filled = list(map(_equations.zeros, room))
            for slot, value in zip(own, found, strict=True):
                filled[slot] = jax.lax.convert_element_type(value, value.dtype)
            return filled

        return branch

    def run(index: jax.Array, *values: jax.Array) -> list[Any]:
        branches = list(map(filling, cuts, slots))
        derived: list[Any] = jax.lax.switch(index, branches, [values[i] for i in read])
        return derived

    after = functools.partial(_rest_of_cond, eqn, cuts, slots)
    return Exposed(_trace(run, eqn), after)


def _rest_of_cond(
    eqn: jex.JaxprEqn, cuts: list[Parts], slots: list[list[int]], derived: list[Atom]
) -> jex.JaxprEqn:
    """The `cond` of calls, given what the slots hold."""
    order = sorted({i for parts in cuts for i in parts.call_inputs})
    branches = []
    for parts, own, branch in zip(cuts, slots, eqn.params["branches"], strict=True):
        given, taken = parts.variables(order, branch.in_avals)
        filling = dict(zip(own, given, strict=True))
        filled = [filling.get(i) or fresh(v) for i, v in enumerate(derived)]
        branches.append(parts.taking([*filled, *taken]))
    operands = [eqn.invars[0], *derived, *(eqn.invars[1 + i] for i in order)]
    params = {**eqn.params, "branches": tuple(branches)}
    return _equations.replace(eqn, invars=operands, params=params)


_EXPOSE: dict[str, Callable[..., Exposed | None]] = {
    "scan": _expose_scan,
    "while": _expose_while,
    "cond": _expose_cond,
}


def _slots(branches: Sequence[Sequence[Aval]]) -> tuple[list[Aval], list[list[int]]]:
    """Room for the derived values of any one of several branches.

    Returns:
      The type of each slot; and the slots that hold the values of each branch.
    """
    slots: dict[tuple[Aval, int], int] = {}  # By type, and number of those of the type.
    of_branches = []
    for avals in branches:
        taken: collections.Counter[Aval] = collections.Counter()
        own = []
        for aval in (aval.update(weak_type=False) for aval in avals):
            own.append(slots.setdefault((aval, taken[aval]), len(slots)))
            taken[aval] += 1
        of_branches.append(own)
    return [aval for aval, _ in slots], of_branches


def _trace(run: Callable[..., Any], eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """`run` of the inputs of `eqn`."""
    traced = jax.make_jaxpr(run)(*(atom.aval for atom in eqn.invars))
    return jex.ClosedJaxpr(_equations.with_literals(traced), [])


def _describe_carry(
    body: jex.Jaxpr, outer: Sequence[Input], carried: range, what: str
) -> list[Input]:
    """The carry among inputs of a body: what it hands on as it came does not change."""
    return [
        outer[i]
        if body.outvars[k] is body.invars[i]
        else Input(f"the carry of a {what}")
        for k, i in enumerate(carried)
    ]
