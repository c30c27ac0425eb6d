"""Marks: values that a traced program passes on under names.

A mark is an identity in the traced program whose name says what it is. `expose` takes
the values at taps and checks out; `_cut` moves what is marked by `hoist`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.extend import core as jex

from hk_stack import _equations, _flat

T = TypeVar("T")

HOIST = "hk_stack.hoist"  # written by `hoist`: hoist this, or say why it cannot be
HOISTED = "hk_stack.hoisted"  # left by a cut: an outer cut hoists it too if it can
TAP, FINITE = "hk_stack.tap", "hk_stack.finite"  # what a tap or a check passes on
DERIVED = "hk_stack.derived"  # what setup hands to the loop, for users' policies


class Mark(NamedTuple):
    """What the name of a mark says.

    Attributes:
      is_tap: Whether it is a tap, not a check.
      label: The path of the tap, or what is checked, after a number.
      indices: Of the layers in Python loops around the tap, and how many there are.
    """

    is_tap: bool
    label: str
    indices: tuple[tuple[int, int], ...] = ()


def read_mark(name: str) -> Mark | None:
    """What `name` says; None if `name` is no mark."""
    kind, _, rest = name.partition(":")
    if kind == FINITE:
        return Mark(False, rest)
    if kind != TAP:
        return None
    indices, _, path = rest.partition(":")
    pairs = (entry.split("/") for entry in indices.split(",") if entry)
    return Mark(True, path, tuple((int(i), int(n)) for i, n in pairs))


def tied(value: T, kept: Sequence[Any]) -> T:
    """`value`, computed only together with what is `kept`."""
    leaves, tree = jax.tree.flatten(value)
    if not kept or not leaves:
        return value
    return jax.tree.unflatten(
        tree, jax.lax.optimization_barrier((leaves, list(kept)))[0]
    )


def unbatched(digits: Any, name: str = "") -> Any:
    """The digits of a check, marked if there is a name.

    Under `vmap` they are those of the example that failed first.
    """

    @custom_vmap
    def of_one(digits: Any) -> Any:
        return checkpoint_name(digits, name) if name else digits

    @of_one.def_vmap
    def of_batch(size: int, is_batched: Any, digits: Any) -> tuple[Any, bool]:
        del size, is_batched  # Nothing calls this on what is not batched.
        return of_one(first_code(digits)), False

    return of_one(digits)


def first_code(codes: jax.Array) -> jax.Array:
    """Of codes `[N, D]`, the digits `[D]` of the check that failed first."""
    is_first = jnp.ones(len(codes), bool)
    for column in codes.T:
        least = jnp.min(jnp.where(is_first, column, jnp.iinfo(jnp.int32).max))
        is_first &= column == least
    return codes[jnp.argmax(is_first)]


def expose(
    closed: jex.ClosedJaxpr,
) -> tuple[jex.ClosedJaxpr, list[Any], list[Mark]]:
    """Takes the values at marks out of a traced function.

    Args:
      closed: A traced function.

    Returns:
      The same without marks, whose constants are its first inputs, and whose last
      outputs are the values at the marks; these constants; and what the marks are.
    """
    jaxpr = _flat.without_constants(closed.jaxpr)
    if not _has_marks(jaxpr):
        return jex.ClosedJaxpr(jaxpr, []), closed.consts, []
    found: list[Mark] = []

    def run(*args: Any) -> list[Any]:
        outputs, marked = _evaluate(jaxpr, args)
        entries = _folded(marked)
        found[:] = [entry.mark for entry in entries]
        return [*outputs, *(entry.value for entry in entries)]

    exposed = jax.make_jaxpr(run)(*(v.aval for v in jaxpr.invars))
    # Functions under `jit` may have had constants of their own.
    constants = [*exposed.consts, *closed.consts]
    exposed = jex.ClosedJaxpr(_flat.without_constants(exposed.jaxpr), [])
    return exposed, constants, found


class _Marked(NamedTuple):
    """A value at a mark."""

    mark: Mark
    value: Any


def _evaluate(jaxpr: jex.Jaxpr, args: Sequence[Any]) -> tuple[list[Any], list[_Marked]]:
    """Runs `jaxpr`, which has no constants; returns its outputs and what is marked."""
    env = dict(zip(jaxpr.invars, args, strict=True))
    found: list[_Marked] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        mark = _mark(eqn)
        if mark is not None:
            results, more = inputs, [_Marked(mark, inputs[0])]
        elif any(map(_has_marks, _equations.bodies(eqn))):
            results, more = _open(eqn, inputs)
        else:
            results, more = _run_one(eqn, inputs), []
        env.update(zip(eqn.outvars, results, strict=True))
        found += more
    return list(map(read, jaxpr.outvars)), found


def _mark(eqn: jex.JaxprEqn) -> Mark | None:
    if eqn.primitive.name == "name":
        return read_mark(eqn.params["name"])
    if eqn.primitive.name == "custom_vmap_call":  # Around the mark of a check.
        marks = [_mark(inner) for body in _equations.bodies(eqn) for inner in body.eqns]
        if len(marks) == 1 and marks[0] and not marks[0].is_tap:
            return marks[0]
    return None


def _has_marks(jaxpr: jex.Jaxpr) -> bool:
    return any(
        _mark(eqn) is not None or any(map(_has_marks, _equations.bodies(eqn)))
        for eqn in jaxpr.eqns
    )


def _run_one(eqn: jex.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Runs an equation as it is."""
    return jex.jaxpr_as_fun(_equations.alone(eqn))(*inputs)


def _open(eqn: jex.JaxprEqn, inputs: Sequence[Any]) -> tuple[list[Any], list[_Marked]]:
    """Runs an equation with marks inside."""
    name, params = eqn.primitive.name, eqn.params
    if name in _equations.REMAT:
        if params["differentiated"]:  # A backward pass computes again what was there.
            return _run_one(eqn, inputs), []
        return _open_remat(eqn, params["jaxpr"], inputs)
    if name in _equations.JIT:
        closed = params["jaxpr"]
        body = _flat.without_constants(closed.jaxpr)
        return _evaluate(body, [*closed.consts, *inputs])
    if name == "scan":
        return _open_scan(eqn, inputs)
    for inner in _equations.bodies(eqn):
        for mark in _marks(inner):
            if mark.is_tap:
                raise ValueError(
                    f"hk_stack.collect: the tap {mark.label} is inside a "
                    f"{name}, which no value can leave. Return the value "
                    "from there and tap it outside, or do not select it."
                )
    return _run_one(eqn, inputs), []  # Checks are left out there.


def _marks(jaxpr: jex.Jaxpr) -> list[Mark]:
    """All marks, those inside equations too."""
    own = [mark for eqn in jaxpr.eqns if (mark := _mark(eqn))]
    inner = (_marks(body) for eqn in jaxpr.eqns for body in _equations.bodies(eqn))
    return [*own, *itertools.chain(*inner)]


def _open_remat(
    eqn: jex.JaxprEqn, body: jex.Jaxpr, inputs: Sequence[Any]
) -> tuple[list[Any], list[_Marked]]:
    marks: list[Mark] = []

    def run(*args: Any) -> tuple[list[Any], list[Any]]:
        outputs, found = _evaluate(body, args)
        marks[:] = [entry.mark for entry in found]
        return outputs, [entry.value for entry in found]

    options = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
    outputs, values = jax.checkpoint(run, **options)(*inputs)
    return outputs, list(map(_Marked, marks, values))


def _open_scan(
    eqn: jex.JaxprEqn, inputs: Sequence[Any]
) -> tuple[list[Any], list[_Marked]]:
    params, closed = eqn.params, eqn.params["jaxpr"]
    carried = _equations.carried(eqn)
    first, count = carried.start, len(carried)
    body = _flat.without_constants(closed.jaxpr)
    shared = [*closed.consts, *inputs[:first]]
    marks: list[Mark] = []

    def turn(carry: Any, own: Any) -> tuple[Any, Any]:
        outputs, found = _evaluate(body, [*shared, *carry, *own])
        entries = _folded(found, in_scan=True)
        marks[:] = [entry.mark for entry in entries]
        return outputs[:count], (outputs[count:], [entry.value for entry in entries])

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, mapped = inputs[first : first + count], inputs[first + count :]
    carry, (outputs, values) = jax.lax.scan(turn, carry, mapped, **options)
    found = [
        _Marked(mark, value if mark.is_tap else first_code(value))
        for mark, value in zip(marks, values, strict=True)
    ]
    return [*carry, *outputs], found


def _folded(found: Sequence[_Marked], *, in_scan: bool = False) -> list[_Marked]:
    """Puts together the taps of the layers that a Python loop runs.

    Args:
      found: What is marked.
      in_scan: Whether this is in a turn of a scan. Then loops may be around the scan,
        of which there is one layer only.
    """
    groups: dict[Any, dict[Any, Any]] = {}
    for mark, value in found:
        number = 0  # Of taps with one path in one layer.
        while mark.indices in groups.get(_key(mark, number), ()):
            number += 1
        groups.setdefault(_key(mark, number), {})[mark.indices] = value
    return [
        _Marked(Mark(is_tap, label, indices), value)
        for (is_tap, label, _, _), grid in groups.items()
        for indices, value in _fold(grid, 2 if in_scan else 1).items()
    ]


def _key(mark: Mark, number: int) -> tuple[bool, str, int, int]:
    return mark.is_tap, mark.label, len(mark.indices), number


def _fold(grid: dict[Any, Any], fewest: int) -> dict[Any, Any]:
    """Stacks the values of all layers of the innermost loops, as far as they are there.

    Args:
      grid: Values, by the indices of their layers.
      fewest: Loops over fewer layers are left as they are.
    """
    rows: dict[Any, dict[int, Any]] = {}
    for indices, value in grid.items():
        if not indices or indices[-1][1] < fewest:
            return grid
        rows.setdefault((indices[:-1], indices[-1][1]), {})[indices[-1][0]] = value
    kinds = {(jnp.shape(v), jnp.asarray(v).dtype) for v in grid.values()}
    if len(kinds) > 1 or any(len(row) != n for (_, n), row in rows.items()):
        return grid
    stacked = {
        before: jnp.stack([row[i] for i in range(n)])
        for (before, n), row in rows.items()
    }
    return _fold(stacked, fewest)
