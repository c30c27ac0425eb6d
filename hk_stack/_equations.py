"""How versions of JAX spell an equation and its types: the one place that knows.

All is read from `jax.extend.core` and from public attributes. What an equation needs
that no public name makes, such as the layout of a `scan`'s operands, is taken from a
small equation of that kind, traced.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core as jex

Atom = Any  # a jex.Var or a jex.Literal; jax.extend.core has no public name for both
Aval = Any  # the type of an array, of a key, ...
Body = Any  # a jex.Jaxpr or a jex.ClosedJaxpr

# Names that versions of JAX have given to these equations.
JIT = ("jit", "pjit")
REMAT = ("checkpoint", "remat", "remat2")
_IN_PLACE = (*JIT, *REMAT)
CUSTOM_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")


Traced = TypeVar("Traced", jex.Jaxpr, jex.JaxprEqn)


def run(program: jex.ClosedJaxpr, *values: Any) -> list[jax.Array]:
    """What `program` makes of `values`."""
    results: list[jax.Array] = jex.jaxpr_as_fun(program)(*values)
    return results


def replace(traced: Traced, **changes: Any) -> Traced:
    """`traced` with some attributes changed."""
    changed: Traced = traced.replace(**changes)
    return changed


def fresh(v: Atom) -> jex.Var:
    """A new variable of the type of `v`."""
    return jex.Var(v.aval)


def variables(atoms: Iterable[Atom]) -> dict[jex.Var, None]:
    """The variables among `atoms`, once each, in order (a dict as an ordered set)."""
    return {a: None for a in atoms if not isinstance(a, jex.Literal)}


def closed_bodies(eqn: jex.JaxprEqn) -> Iterator[Any]:
    """The jaxprs that `eqn` runs, of whatever kind it is, with their constants."""
    for param in eqn.params.values():
        for one in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(one, (jex.Jaxpr, jex.ClosedJaxpr)):
                yield one


def bodies(eqn: jex.JaxprEqn) -> Iterator[jex.Jaxpr]:
    """The jaxprs that `eqn` runs, of whatever kind it is."""
    return map(opened, closed_bodies(eqn))


def with_inner(eqns: Iterable[jex.JaxprEqn]) -> Iterator[jex.JaxprEqn]:
    """`eqns`, and the equations that they run."""
    for eqn in eqns:
        yield eqn
        for body in bodies(eqn):
            yield from with_inner(body.eqns)


def opened(body: Body) -> jex.Jaxpr:
    """A body without the values that it brings along."""
    jaxpr: jex.Jaxpr = body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body
    return jaxpr


def constants(body: Body) -> Sequence[Any]:
    """The values that a body brings along."""
    return getattr(body, "consts", ())


def with_bodies(
    eqn: jex.JaxprEqn, change: Callable[[jex.Jaxpr], jex.Jaxpr]
) -> jex.JaxprEqn:
    """`eqn` with `change` of each jaxpr that it runs."""
    return with_closed_bodies(
        eqn, lambda body: jex.ClosedJaxpr(change(body.jaxpr), body.consts)
    )


def with_closed_bodies(
    eqn: jex.JaxprEqn, change: Callable[[jex.ClosedJaxpr], jex.ClosedJaxpr]
) -> jex.JaxprEqn:
    """The same, for changes that may bring constants along, where there is room."""

    def changed(param: Any) -> Any:
        if isinstance(param, jex.ClosedJaxpr):
            return change(param)
        if not isinstance(param, jex.Jaxpr):
            return param
        made = change(jex.ClosedJaxpr(param, []))
        return param if made.consts else made.jaxpr

    def is_one(param: Any) -> bool:
        return not isinstance(param, (tuple, list))

    params = list(eqn.params.values())
    made = jax.tree.map(changed, params, is_leaf=is_one)
    return replace(eqn, params=dict(zip(eqn.params, made, strict=True)))


def body_in_place(eqn: jex.JaxprEqn) -> jex.Jaxpr | None:
    """What may stand in place of a `jit` or remat equation; None if nothing may."""
    if eqn.primitive.name not in _IN_PLACE:
        return None
    params, body = eqn.params, eqn.params["jaxpr"]
    placed = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    if any(isinstance(s, jax.sharding.Sharding) for s in placed):
        return None
    return with_literals(body)


def with_literals(body: Body) -> jex.Jaxpr:
    """A jaxpr in which constants are literals, as arrays may be."""
    jaxpr, consts = opened(body), constants(body)
    if not consts:
        return jaxpr
    pairs = zip(jaxpr.constvars, consts, strict=True)
    values: dict[Atom, jex.Literal] = {v: jex.Literal(c, v.aval) for v, c in pairs}

    def read(atom: Atom) -> Atom:
        return atom if isinstance(atom, jex.Literal) else values.get(atom, atom)

    eqns = [replace(e, invars=list(map(read, e.invars))) for e in jaxpr.eqns]
    outvars = list(map(read, jaxpr.outvars))
    return replace(jaxpr, constvars=[], eqns=eqns, outvars=outvars)


def with_remat_body(
    eqn: jex.JaxprEqn, invars: list[Atom], jaxpr: jex.Jaxpr
) -> jex.JaxprEqn:
    """A rematerialised equation with another body, which takes `invars`."""
    params = {**eqn.params, "jaxpr": jaxpr}
    flags = params["prevent_cse"]
    if isinstance(flags, tuple):  # One for each input.
        atoms = zip(eqn.invars, flags, strict=True)
        known = {a: flag for a, flag in atoms if not isinstance(a, jex.Literal)}
        params["prevent_cse"] = tuple(
            any(flags) if isinstance(a, jex.Literal) else known.get(a, any(flags))
            for a in invars
        )
    outvars: list[Any] = jaxpr.outvars
    return replace(
        eqn, invars=invars, outvars=outvars, params=params, effects=jaxpr.effects
    )


def alone(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """`eqn` as a program of its own, which takes all its inputs, literals too."""
    taken: list[Any] = list(map(fresh, eqn.invars))
    return program(taken, [replace(eqn, invars=taken)], eqn.outvars)


def program(
    invars: Sequence[jex.Var], eqns: Sequence[jex.JaxprEqn], outvars: Sequence[Atom]
) -> jex.ClosedJaxpr:
    """A function of `invars` that runs `eqns`."""
    jaxpr = replace(
        _nothing(),
        invars=list(invars),
        outvars=list(outvars),
        eqns=list(eqns),
        effects=set().union(*(eqn.effects for eqn in eqns)),
    )
    return jex.ClosedJaxpr(jaxpr, [])


@functools.cache
def _nothing() -> jex.Jaxpr:
    return opened(jax.make_jaxpr(lambda: ())())


def derivative(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """What a derivative of an equation runs that has a rule of its own.

    Raises:
      ValueError: If the rule asks which inputs are differentiated, so that what it runs
        is not always the same.
    """
    if eqn.params.get("symbolic_zeros"):
        raise ValueError("a rule with symbolic zeros")
    run = jex.jaxpr_as_fun(alone(eqn))

    def traced(first: int, *values: jax.Array) -> Any:
        moving = {i: v for i, v in enumerate(values) if i >= first and is_inexact(v)}

        def of_moving(moving: dict[int, Any]) -> list[Any]:
            results = run(*(moving.get(i, v) for i, v in enumerate(values)))
            return list(filter(is_inexact, results))

        if eqn.primitive.name == "custom_jvp_call":
            return jax.jvp(of_moving, [moving], [moving])
        results, pull_back = jax.vjp(of_moving, moving)
        return pull_back(results)

    return _differentiable(eqn, traced)[0]


def tangents(
    eqn: jex.JaxprEqn, moving: Sequence[int], made: Sequence[int]
) -> jex.ClosedJaxpr:
    """What an equation makes of its inputs, and of tangents of those that move.

    Args:
      eqn: An equation.
      moving: Which of its inputs have tangents; they come after all inputs.
      made: Which of its outputs have; they come after all outputs.
    """
    run = jex.jaxpr_as_fun(alone(eqn))

    def traced(values: list[Any], changes: list[Any]) -> Any:
        def of_moving(*moved: Any) -> Any:
            given = dict(zip(moving, moved, strict=True))
            results = run(*(given.get(i, v) for i, v in enumerate(values)))
            return [results[i] for i in made], results

        primals = [values[i] for i in moving]
        _, found, results = jax.jvp(of_moving, primals, changes, has_aux=True)
        return results, found

    types = [a.aval for a in eqn.invars]
    return jax.make_jaxpr(traced)(types, [types[i] for i in moving])


def cotangents(
    eqn: jex.JaxprEqn,
) -> tuple[jex.ClosedJaxpr, jex.ClosedJaxpr, list[int], list[int]]:
    """What an equation runs forward and backward.

    Returns:
      The outputs and what is kept, from the inputs; cotangents of the inputs that have
      some, from what is kept and the cotangents of such outputs; which inputs and
      outputs these are.
    """
    run = jex.jaxpr_as_fun(alone(eqn))
    types = [a.aval for a in eqn.invars]
    made = [i for i, v in enumerate(eqn.outvars) if is_inexact(v.aval)]
    structure: Any = None

    def forward(first: int, *values: Any) -> Any:
        nonlocal structure
        moving = {i: v for i, v in enumerate(values) if i >= first and is_inexact(v)}

        def of_moving(moving: dict[int, Any]) -> Any:
            results = run(*(moving.get(i, v) for i, v in enumerate(values)))
            return [results[i] for i in made], results

        _, pull_back, results = jax.vjp(of_moving, moving, has_aux=True)
        kept, structure = jax.tree.flatten(pull_back)
        return results, kept

    def backward(kept: list[Any], given: list[Any]) -> Any:
        return jax.tree.unflatten(structure, kept)(given)

    forth, first = _differentiable(eqn, forward)
    kept = forth.out_avals[len(eqn.outvars) :]
    back = jax.make_jaxpr(backward)(kept, [eqn.outvars[i].aval for i in made])
    moving = [i for i, t in enumerate(types) if i >= first and is_inexact(t)]
    return forth, back, moving, made


def _differentiable(
    eqn: jex.JaxprEqn, differentiated: Callable[..., Any]
) -> tuple[jex.ClosedJaxpr, int]:
    """Traces a derivative of an equation by all inputs but those that are closed over.

    These come first. Inside of another rule an equation does not say how many there
    are; JAX refuses to differentiate what is more.
    """
    first = eqn.params.get("num_consts", 0)
    types = [a.aval for a in eqn.invars]
    while True:
        try:
            run = functools.partial(differentiated, first)
            return jax.make_jaxpr(run)(*types), first
        except Exception:
            first += 1
            if first >= len(types):
                raise


def is_inexact(value: jax.Array | Aval) -> bool:
    """Whether a value has derivatives."""
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def gathers_from(eqn: jex.JaxprEqn) -> int:
    """How many devices hold the same after an equation that may have shared before.

    1 if it is no such equation. Only on meshes with explicit axes, and in a
    `jax.shard_map`, does a type say how a value was spread before.
    """
    name, params = eqn.primitive.name, eqn.params
    if name.startswith("all_gather"):
        return int(params["axis_size"])
    if name == "reshard":
        aval: Any = eqn.invars[0].aval
        before = _shards(aval.sharding)
        return max(1, before // _shards(params["dst_sharding"]))
    sharding = params["sharding"] if name == "sharding_constraint" else None
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return 1
    if jax.sharding.PartitionSpec.UNCONSTRAINED in sharding.spec:
        return 1  # It says where nothing changes.
    return int(sharding.mesh.size) // _shards(sharding)


def _shards(sharding: object) -> int:
    """Over how many devices a value is spread, not counting copies."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return 1
    entries = (e if isinstance(e, tuple) else (e,) for e in sharding.spec)
    sizes = sharding.mesh.shape
    return math.prod(sizes.get(axis, 1) for entry in entries for axis in entry)


def carried(eqn: jex.JaxprEqn) -> range:
    """Which inputs of a `scan` are its carry: constants are before, the rest after."""
    if "ft_in" in eqn.params:  # From JAX 0.11 on.
        constants, carry, _ = map(len, eqn.params["ft_in"].unpack())
    else:
        constants, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    return range(constants, constants + carry)


def with_scan_body(
    eqn: jex.JaxprEqn, invars: list[Atom], body: jex.ClosedJaxpr, num_consts: int
) -> jex.JaxprEqn:
    """A `scan` with another body, of which only the constants and rows are others."""
    params = {**eqn.params, "jaxpr": body}
    if "ft_in" in params:
        carry = len(carried(eqn))
        rows = len(invars) - num_consts - carry
        params["ft_in"] = _small_scan(num_consts, carry, rows).params["ft_in"]
    else:
        params["num_consts"] = num_consts
    if "linear" in params:  # Before JAX 0.10.
        params["linear"] = (False,) * len(invars)
    return replace(eqn, invars=invars, params=params)


def scan(
    body: jex.ClosedJaxpr,
    constants: Sequence[Any],
    carry: Sequence[Any],
    rows: Sequence[Any],
    **options: Any,
) -> list[Any]:
    """`jax.lax.scan` of a body that is traced already, and is not traced again.

    Args:
      body: Takes constants, the carry and rows; returns the carry and outputs.
      constants: What is the same in all turns.
      carry: What the first turn is given, of the types that the body returns.
      rows: Arrays `[T, ...]`.
      **options: `length`, `reverse` and `unroll` of `jax.lax.scan`.

    Returns:
      The last carry, and the outputs `[T, ...]`.
    """
    outputs = len(body.out_avals) - len(carry)
    small = _small_scan(len(constants), len(carry), len(rows), outputs, **options)
    params = {**small.params, "jaxpr": body}
    results: list[Any] = small.primitive.bind(*constants, *carry, *rows, **params)
    return results


@functools.cache
def _small_scan(
    num_consts: int,
    num_carry: int,
    num_rows: int,
    num_outputs: int = 1,
    *,
    length: int = 1,
    **options: Any,
) -> jex.JaxprEqn:
    """A `scan` of so many inputs and outputs: what it says of them, others say too."""
    scalar, row = (jax.core.ShapedArray(s, jnp.dtype("int32")) for s in ((), (length,)))

    def scan(constants: list[Any], carry: list[Any], rows: list[Any]) -> Any:
        def turn(carry: list[Any], row: list[Any]) -> Any:
            total = sum([*constants, *row], jnp.int32(0))
            return [c + total for c in carry], [total] * num_outputs

        return jax.lax.scan(turn, carry, rows, length=length, **options)

    operands = [scalar] * num_consts, [scalar] * num_carry, [row] * num_rows
    eqns: list[jex.JaxprEqn] = jax.make_jaxpr(scan)(*operands).eqns
    [eqn] = [e for e in eqns if e.primitive.name == "scan"]
    return eqn


def names_an_input(effect: object) -> bool:
    """Whether an effect is on one input, such as reading a mutable reference."""
    return hasattr(effect, "input_index") or hasattr(effect, "input")


def varying(aval: Aval) -> frozenset[Any]:
    """The manual axes of a mesh over which values of this type differ."""
    kind = getattr(aval, "manual_axis_type", None)
    if kind is not None:
        return frozenset(kind.varying)
    return getattr(aval, "vma", None) or frozenset()


def vary_as(value: jax.Array, aval: Aval) -> jax.Array:
    """`value`, typed as differing over the manual axes over which `aval` does."""
    missing = varying(aval) - varying(jax.typeof(value))
    return jax.lax.pcast(value, tuple(missing), to="varying") if missing else value


def explicit(aval: Aval) -> Any:
    """The sharding that is part of a type, on a mesh with explicit axes; or None."""
    sharding = getattr(aval, "sharding", None)
    return sharding if any(getattr(sharding, "spec", ())) else None


def of_row(aval: Aval) -> Aval:
    """The type of `array[0]`, from that of `array`."""
    sharding = aval.sharding.update(spec=aval.sharding.spec[1:])
    return aval.update(shape=aval.shape[1:], sharding=sharding)


def zeros(aval: Aval) -> jax.Array:
    """Zeros of a type, its sharding and its manual axes included."""
    made = jnp.zeros(aval.shape, aval.dtype, out_sharding=explicit(aval))
    return vary_as(made, aval)
