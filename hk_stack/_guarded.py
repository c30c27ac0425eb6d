"""Batches in which a branch of a conditional runs only where it was chosen.

`jax.vmap` runs all branches of a conditional for all elements and selects. A branch may
be dear, may not end for values that are not its own, or make NaN of them, which reach
gradients. Here, each branch runs at most once for the batch, if any layer chose it, and
for layers that did not choose it on the operands of one that did:

```
for i, branch in enumerate(branches):
    if any(index == i):
        operands_i = where(index == i, operands, operands[argmax(index == i)])
        results = where(index == i, vmap(branch)(operands_i), results)
```
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hk_stack import _equations
from hk_stack._equations import Atom


def vmap(
    program: jex.ClosedJaxpr, layered: Sequence[bool]
) -> Callable[[Sequence[Any]], list[jax.Array]]:
    """`jax.vmap` of a program, over some of its inputs; see above.

    Args:
      program: What each layer runs.
      layered: Which of its inputs have a leading axis `[L, ...]`.

    Returns:
      The program for a batch. It raises `NotImplementedError` for conditionals that it
      cannot reach.
    """
    if not has_branches(program.jaxpr):
        run = functools.partial(_equations.run, program)
        axes = [0 if flag else None for flag in layered]
        return lambda values: list(jax.vmap(run, axes)(*values))

    def batch(values: Sequence[Any]) -> list[jax.Array]:
        inputs = list(map(_Value, values, layered))
        [size, *_] = (v.array.shape[0] for v in inputs if v.layered)
        guard = _Guard(size)
        return guard.all_layered(guard.run(program, inputs))

    return batch


class _Value(NamedTuple):
    """A value.

    Attributes:
      array: It, or those of all layers.
      layered: Whether it has a leading axis `[L, ...]`.
    """

    array: Any
    layered: bool = False


def has_branches(jaxpr: jex.Jaxpr) -> bool:
    """Whether there are conditionals in a program."""
    inner = _equations.with_inner(jaxpr.eqns)
    return any(eqn.primitive.name == "cond" for eqn in inner)


def _has_branches(eqn: jex.JaxprEqn) -> bool:
    """Whether there is a conditional in what an equation runs."""
    inner = _equations.bodies(eqn)
    return eqn.primitive.name == "cond" or any(map(has_branches, inner))


class _Guard(NamedTuple):
    """How a batch runs.

    Attributes:
      size: How many layers it has.
      active: Which of them count, `[L]`; None if all do.
    """

    size: int
    active: Any = None

    def run(self, program: jex.ClosedJaxpr, values: Sequence[_Value]) -> list[_Value]:
        """Runs a program, step by step."""
        jaxpr = program.jaxpr
        given = [*map(_Value, program.consts), *values]
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=True))

        def read(atom: Atom) -> _Value:
            return _literal(atom) if isinstance(atom, jex.Literal) else env[atom]

        for is_guarded, group in itertools.groupby(jaxpr.eqns, _has_branches):
            eqns = list(group)
            if not is_guarded:
                env.update(self._together(eqns, env))
                continue
            for eqn in eqns:
                made = self._step(eqn, list(map(read, eqn.invars)))
                env.update(zip(eqn.outvars, made, strict=True))
        return list(map(read, jaxpr.outvars))

    def _together(
        self, eqns: list[jex.JaxprEqn], env: dict[jex.Var, _Value]
    ) -> dict[jex.Var, _Value]:
        """Runs equations without conditionals: what no layer changes, then the rest."""
        layered = {v for v, value in env.items() if value.layered}
        shared: list[jex.JaxprEqn] = []
        own: list[jex.JaxprEqn] = []
        for eqn in eqns:
            is_own = not layered.isdisjoint(_equations.variables(eqn.invars))
            (own if is_own else shared).append(eqn)
            layered.update(eqn.outvars if is_own else ())
        made: dict[jex.Var, _Value] = {}
        for part in filter(None, (shared, own)):
            outvars = [v for eqn in part for v in eqn.outvars]
            inside = set(outvars)
            read = _equations.variables(a for eqn in part for a in eqn.invars)
            invars = [v for v in read if v not in inside]
            given = [(env | made)[v] for v in invars]
            program = _equations.program(invars, part, outvars)
            results = self._plain(program, given)
            made |= zip(outvars, results, strict=True)
        return made

    def _plain(self, program: jex.ClosedJaxpr, given: Sequence[_Value]) -> list[_Value]:
        """Runs a program as JAX does."""
        run = functools.partial(_equations.run, program)
        arrays = [value.array for value in given]
        axes = [0 if value.layered else None for value in given]
        layered = axes.count(0) > 0
        if layered:
            run = jax.vmap(run, axes, axis_size=self.size)
        return [_Value(result, layered) for result in run(*arrays)]

    def all_layered(self, values: Sequence[_Value]) -> list[jax.Array]:
        """The values of all layers."""
        return [v.array if v.layered else self._repeated(v.array) for v in values]

    def _repeated(self, array: Any) -> jax.Array:
        return jnp.broadcast_to(array, (self.size, *jnp.shape(array)))

    def _step(self, eqn: jex.JaxprEqn, values: list[_Value]) -> list[_Value]:
        """Runs an equation with conditionals inside."""
        if not any(value.layered for value in values):
            return self._plain(_equations.alone(eqn), values)
        name = eqn.primitive.name
        if name in _equations.JIT:
            return self.run(eqn.params["jaxpr"], values)
        if name not in _STEPS:
            raise NotImplementedError(f"a conditional inside of a {name}")
        with jax.named_scope(str(eqn.source_info.name_stack)):  # As JAX would name it.
            arrays = _STEPS[name](self, eqn, values)
        return [_Value(array, True) for array in arrays]

    def _function(
        self, program: jex.ClosedJaxpr, layered: Sequence[bool]
    ) -> Callable[..., list[jax.Array]]:
        """A program as a function of arrays, which returns those of all layers."""

        def run(*arrays: Any) -> list[jax.Array]:
            return self.all_layered(
                self.run(program, list(map(_Value, arrays, layered)))
            )

        return run


def _literal(atom: jex.Literal) -> _Value:
    aval: Any = atom.aval
    return _Value(jnp.full([], atom.val, aval.dtype))


def _cond(guard: _Guard, eqn: jex.JaxprEqn, values: list[_Value]) -> list[jax.Array]:
    """Runs each branch that a layer chose, on what such layers give it."""
    [index, *operands] = values
    branches = eqn.params["branches"]
    if not index.layered:
        layered = [value.layered for value in operands]
        runs = [guard._function(branch, layered) for branch in branches]
        made: list[jax.Array] = jax.lax.switch(
            index.array, runs, *(v.array for v in operands)
        )
        return made
    chosen = jnp.clip(index.array.astype(jnp.int32), 0, len(branches) - 1)
    results = [guard._repeated(_equations.zeros(v.aval)) for v in eqn.outvars]
    for i, branch in enumerate(branches):
        is_mine = chosen == i
        if guard.active is not None:
            is_mine &= guard.active
        run = functools.partial(_guarded, guard, branch, is_mine, operands)
        made = jax.lax.cond(jnp.any(is_mine), run, lambda old: old, results)
        results = [_select(is_mine, m, r) for m, r in zip(made, results, strict=True)]
    return results


def _guarded(
    guard: _Guard,
    branch: jex.ClosedJaxpr,
    is_mine: jax.Array,
    operands: list[_Value],
    results: list[jax.Array],
) -> list[jax.Array]:
    """Runs a branch; layers that did not choose it borrow the operands of one."""
    del results  # Of the branches before.
    donor = jnp.argmax(is_mine)

    def safe(value: _Value) -> _Value:
        if not value.layered:
            return value
        borrowed = value.array[donor][None]
        return _Value(_select(is_mine, value.array, borrowed), True)

    inside = guard._replace(active=None)
    return inside.all_layered(inside.run(branch, list(map(safe, operands))))


def _select(is_mine: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    flags = is_mine.reshape(is_mine.shape + (1,) * (yes.ndim - 1))
    return jnp.where(flags, yes, no)


def _remat(guard: _Guard, eqn: jex.JaxprEqn, values: list[_Value]) -> list[jax.Array]:
    params = eqn.params
    run = guard._function(
        jex.ClosedJaxpr(params["jaxpr"], []), [value.layered for value in values]
    )
    options = {name: params[name] for name in ("prevent_cse", "policy")}
    again = jax.checkpoint(run, **options)
    made: list[jax.Array] = again(*(value.array for value in values))
    return made


def _scan(guard: _Guard, eqn: jex.JaxprEqn, values: list[_Value]) -> list[jax.Array]:
    params, places = eqn.params, _equations.carried(eqn)
    consts, rows = values[: places.start], values[places.stop :]
    carry = guard.all_layered(values[places.start : places.stop])
    layered = [
        *(value.layered for value in consts),
        *[True] * len(carry),
        *(value.layered for value in rows),
    ]
    run = guard._function(params["jaxpr"], layered)

    def turn(carry: Any, rows: Any) -> tuple[Any, Any]:
        results = run(*(value.array for value in consts), *carry, *rows)
        return results[: len(places)], results[len(places) :]

    # Rows are of turns first, then of layers.
    turns = [jnp.swapaxes(v.array, 0, 1) if v.layered else v.array for v in rows]
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, results = jax.lax.scan(turn, carry, turns, **options)
    return [*carry, *(jnp.swapaxes(result, 0, 1) for result in results)]


def _while(guard: _Guard, eqn: jex.JaxprEqn, values: list[_Value]) -> list[jax.Array]:
    """Runs turns until no layer goes on; those that are done keep what they have."""
    params = eqn.params
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    of_test, of_turn = values[:first], values[first:second]
    carry = guard.all_layered(values[second:])

    def run(program: jex.ClosedJaxpr, consts: list[_Value], state: Any) -> Any:
        alive, carry = state
        inside = guard._replace(active=alive)
        given = [*consts, *(_Value(array, True) for array in carry)]
        return inside.all_layered(inside.run(program, given))

    def test(state: Any) -> jax.Array:
        alive, _ = state
        [goes_on] = run(params["cond_jaxpr"], of_test, state)
        return jnp.logical_and(goes_on, alive)

    def turn(state: Any) -> Any:
        alive, carry = state
        new = run(params["body_jaxpr"], of_turn, state)
        carry = [_select(alive, n, c) for n, c in zip(new, carry, strict=True)]
        return test((alive, carry)), carry

    active = jnp.ones(guard.size, bool) if guard.active is None else guard.active
    start = test((active, carry)), carry
    return list(jax.lax.while_loop(lambda state: jnp.any(state[0]), turn, start)[1])


def _custom_jvp(
    guard: _Guard, eqn: jex.JaxprEqn, values: list[_Value]
) -> list[jax.Array]:
    """Runs a function with a rule for its tangents, and that as it runs anything."""
    layered = [value.layered for value in values]
    moving = [i for i, v in enumerate(eqn.invars) if _equations.is_inexact(v.aval)]
    made = [i for i, v in enumerate(eqn.outvars) if _equations.is_inexact(v.aval)]
    run = jax.custom_jvp(guard._function(_body(eqn), layered))
    tangents_of = guard._function(
        _equations.tangents(eqn, moving, made),
        [*layered, *(layered[i] for i in moving)],
    )

    @run.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        results = tangents_of(*primals, *(tangents[i] for i in moving))
        outputs = results[: len(eqn.outvars)]
        changes: list[Any] = [_no_tangent(v) for v in outputs]
        for i, change in zip(made, results[len(outputs) :], strict=True):
            changes[i] = change
        return outputs, changes

    found: list[jax.Array] = run(*(value.array for value in values))
    return found


def _custom_vjp(
    guard: _Guard, eqn: jex.JaxprEqn, values: list[_Value]
) -> list[jax.Array]:
    """Runs a function with a rule for its cotangents, and that as it runs anything."""
    layered = [value.layered for value in values]
    forth, back, moving, made = _equations.cotangents(eqn)
    run = jax.custom_vjp(guard._function(_body(eqn), layered))
    count = len(eqn.outvars)

    def forward(*arrays: Any) -> tuple[list[Any], list[Any]]:
        results = guard._function(forth, layered)(*arrays)
        return results[:count], results[count:]

    def backward(kept: list[Any], cotangents: Any) -> tuple[Any, ...]:
        given = [*kept, *(cotangents[i] for i in made)]
        of_layers = guard._function(back, [True] * len(given))(*given)
        found: list[Any] = [None] * len(values)
        for i, cotangent in zip(moving, of_layers, strict=True):
            found[i] = cotangent if layered[i] else jnp.sum(cotangent, 0)
        return tuple(found)

    run.defvjp(forward, backward)
    found: list[jax.Array] = run(*(value.array for value in values))
    return found


def _body(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """What an equation with a rule of its own runs."""
    [body] = _equations.closed_bodies(eqn)
    return body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, [])


def _no_tangent(value: jax.Array) -> Any:
    return np.zeros(value.shape, jax.dtypes.float0)


_STEPS: dict[str, Callable[[_Guard, jex.JaxprEqn, list[_Value]], list[jax.Array]]] = {
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    **dict.fromkeys(_equations.REMAT, _remat),
}
