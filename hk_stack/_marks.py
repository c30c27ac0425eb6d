"""Marks: values that a traced program passes on under names.

A mark is an identity in the traced program whose name says what it is. `expose` takes
the values at taps and checks out; the cut moves what `hoist` marks.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.extend import core as jex

from hk_stack import _equations, _flat
from hk_stack._equations import Atom

T = TypeVar("T")

HOIST = "hk_stack.hoist"  # written by `hoist`: hoist this, or say why it cannot be
HOISTED = "hk_stack.hoisted"  # left by a cut: an outer cut hoists it too if it can
TAP = "hk_stack.tap"  # a value for `collect`
FINITE = "hk_stack.finite"  # what a check has found
DERIVED = "hk_stack.derived"  # what setup hands to the loop; for users' policies


class Mark(NamedTuple):
    """What the name of a mark for `expose` says.

    Attributes:
      kind: `TAP` or `FINITE`.
      label: The path of the tap, or what is checked.
    """

    kind: str
    label: str

    def on(self, value: jax.Array) -> jax.Array:
        """Marks `value`."""
        marked: jax.Array = checkpoint_name(value, f"{self.kind}:{self.label}")
        return marked


def tied(value: T, kept: Sequence[Any]) -> T:
    """`value`, computed only together with what is `kept`."""
    leaves, tree = jax.tree.flatten(value)
    if not kept or not leaves:
        return value
    together = jax.lax.optimization_barrier((leaves, list(kept)))
    result: T = jax.tree.unflatten(tree, together[0])
    return result


def unbatched(code: jax.Array, mark: Mark | None = None) -> jax.Array:
    """What a check has found, marked if there is a mark.

    Under `vmap` it is that of the example that failed first.
    """

    @custom_vmap
    def of_one(code: jax.Array) -> jax.Array:
        return mark.on(code) if mark else code

    @of_one.def_vmap
    def of_batch(
        size: int, is_batched: list[bool], codes: jax.Array
    ) -> tuple[jax.Array, bool]:
        del size, is_batched  # Nothing calls this on what is not batched.
        return of_one(first_code(codes)), False

    result: jax.Array = of_one(code)
    return result


def first_code(codes: jax.Array) -> jax.Array:
    """Of codes `[N, D]`, the digits `[D]` of the check that failed first."""
    is_first = jnp.ones(len(codes), bool)
    for column in codes.T:
        least = jnp.min(column, where=is_first, initial=2**31 - 1)
        is_first &= column == least
    return codes[jnp.argmax(is_first)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Marked:
    """A value at a mark, which functions that are traced may return."""

    mark: Mark = dataclasses.field(metadata={"static": True})
    value: Any


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
    if not _marks(jaxpr.eqns):
        return jex.ClosedJaxpr(jaxpr, []), closed.consts, []

    trace = jax.make_jaxpr(lambda *args: _evaluate(jaxpr, args), return_shape=True)
    exposed, (_, found) = trace(*(v.aval for v in jaxpr.invars))
    # Functions under `jit` may have had constants of their own.
    constants = [*exposed.consts, *closed.consts]
    exposed = jex.ClosedJaxpr(_flat.without_constants(exposed.jaxpr), [])
    return exposed, constants, [entry.mark for entry in found]


def _evaluate(jaxpr: jex.Jaxpr, args: Sequence[Any]) -> tuple[list[Any], list[_Marked]]:
    """Runs `jaxpr`, which has no constants; returns its outputs and what is marked."""
    env = dict(zip(jaxpr.invars, args, strict=True))
    found: list[_Marked] = []

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        if mark := _mark(eqn):
            results, more = inputs, [_Marked(mark, inputs[0])]
        elif _marks([eqn]):
            results, more = _open(eqn, inputs)
        else:
            results, more = _run_one(eqn, inputs), []
        env.update(zip(eqn.outvars, results, strict=True))
        found += more
    return list(map(read, jaxpr.outvars)), found


def _mark(eqn: jex.JaxprEqn) -> Mark | None:
    if eqn.primitive.name == "name":
        kind, _, label = eqn.params["name"].partition(":")
        return Mark(kind, label) if kind in (TAP, FINITE) else None
    if eqn.primitive.name == "custom_vmap_call":  # Around the mark of a check.
        marks = [_mark(inner) for body in _equations.bodies(eqn) for inner in body.eqns]
        if len(marks) == 1 and marks[0] and marks[0].kind == FINITE:
            return marks[0]
    return None


def _marks(eqns: Iterable[jex.JaxprEqn]) -> list[Mark]:
    """All marks, those inside equations too."""
    return [mark for eqn in _equations.with_inner(eqns) if (mark := _mark(eqn))]


def _run_one(eqn: jex.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    return _equations.run(_equations.alone(eqn), *inputs)


def _open(eqn: jex.JaxprEqn, inputs: Sequence[Any]) -> tuple[list[Any], list[_Marked]]:
    """Runs an equation with marks inside."""
    name, params = eqn.primitive.name, eqn.params
    if name in _equations.REMAT:
        return _open_remat(eqn, inputs)
    if name in _equations.JIT:
        closed = params["jaxpr"]
        body = _flat.without_constants(closed.jaxpr)
        return _evaluate(body, [*closed.consts, *inputs])
    if name == "scan":
        return _open_scan(eqn, inputs)
    for mark in _marks([eqn]):
        if mark.kind == TAP:
            raise ValueError(
                f"hk_stack.collect: the tap {mark.label} is inside a "
                f"{name}, which no value can leave. Return the value "
                "from there and tap it outside, or do not select it."
            )
    return _run_one(eqn, inputs), []  # Checks are left out there.


def _open_remat(
    eqn: jex.JaxprEqn, inputs: Sequence[Any]
) -> tuple[list[Any], list[_Marked]]:
    params = eqn.params
    if params["differentiated"]:  # A backward pass computes again what was there.
        return _run_one(eqn, inputs), []
    options = {k: params[k] for k in ("prevent_cse", "policy")}
    remat = jax.checkpoint(lambda *args: _evaluate(params["jaxpr"], args), **options)
    outputs, found = remat(*inputs)
    return outputs, found


def _open_scan(
    eqn: jex.JaxprEqn, inputs: Sequence[Any]
) -> tuple[list[Any], list[_Marked]]:
    params, closed = eqn.params, eqn.params["jaxpr"]
    places = _equations.carried(eqn)
    body = _flat.without_constants(closed.jaxpr)
    shared = [*closed.consts, *inputs[: places.start]]

    def turn(carry: Sequence[Any], own: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        outputs, found = _evaluate(body, [*shared, *carry, *own])
        return outputs[: len(places)], (outputs[len(places) :], found)

    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    carry, mapped = inputs[places.start : places.stop], inputs[places.stop :]
    carry, (outputs, found) = jax.lax.scan(turn, carry, mapped, **options)
    return [*carry, *outputs], [
        _Marked(m.mark, first_code(m.value) if m.mark.kind == FINITE else m.value)
        for m in found
    ]
