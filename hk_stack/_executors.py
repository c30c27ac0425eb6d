"""How the layers of a stack run: in a compiled loop, or one by one in Python."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax.extend import core as jex

from hk_stack import (
    _carry,
    _cut,
    _eager,
    _finite,
    _layout,
    _loop,
    _marks,
    _parts,
    _spread,
    _summary,
    _taps,
)
from hk_stack._layer import Given, Invocation, Result, describe
from hk_stack._parts import Input
from hk_stack._types import Tree


class Program(NamedTuple):
    """A traced layer, cut, and how to read what its stack returns.

    Attributes:
      plan: Setup and call of a layer, and how all of them run.
      constants: What the layer closes over: the first inputs of `plan`.
      marks: What is at its last outputs.
      shapes: A result of one layer.
    """

    plan: _parts.Plan
    constants: list[Any]
    marks: list[_marks.Mark]
    shapes: Result

    @property
    def cut(self) -> _summary.Cut:
        """What a summary reads."""
        return _summary.Cut(self.plan.parts, self.plan.inputs)

    def values(self, given: Given) -> list[Any]:
        """The inputs of `plan`."""
        return [*self.constants, *jax.tree.leaves(given)]

    def result(self, leaves: Sequence[Any]) -> tuple[Result, list[Any]]:
        """What `plan` returns: the stack's result, and what is at the marks."""
        count = len(leaves) - len(self.marks)
        result: Result = jax.tree.unflatten(
            jax.tree.structure(self.shapes), leaves[:count]
        )
        return result, list(leaves[count:])


def compiled(invocation: Invocation, given: Given) -> Result:
    """Runs setup for all layers, then the loop."""
    program, given = prepared(invocation, given, invocation.options.num_layers)
    _summary.record(invocation, given.params, program.cut)
    leaves = _eager.run(program.plan.run, program.values(given), program.plan.key)
    result, values = program.result(leaves)
    return pass_on(invocation, program.marks, values, result)


def prepared(
    invocation: Invocation, given: Given, num_layers: int
) -> tuple[Program, Given]:
    """Traces and cuts a layer.

    Args:
      invocation: Of the stack.
      given: What the layers are given.
      num_layers: How many of them run here.

    Returns:
      The program, and `given` with the carry in the types it will keep.
    """
    options = invocation.options
    # Initial values may be made anywhere, a mesh or none.
    devices = (
        None
        if hk.running_init()
        else _spread.in_force(options.setup_sharding, invocation.where)
    )
    with _spread.over(None):  # Where layers are spread, stacks in them need not be.
        closed, given, shapes = _trace(invocation, given)
    closed, constants, marks = _marks.expose(closed)
    described = describe(given, invocation.arguments)
    inputs = (*map(_closed_over(), constants), *described)
    parts = _cut.cut(closed, inputs, options.setup, invocation.where)
    schedule = _loop.Schedule(
        num_layers,
        invocation.loop == "unrolled",
        options.unroll,
        invocation.reverse,
        options.remat,
    )
    sizes = options.setup_batch_size, options.setup_remat
    plan = _parts.Plan(parts, inputs, schedule, *sizes, devices)
    return Program(plan, constants, marks, shapes), given


def pass_on(
    invocation: Invocation,
    marks: Sequence[_marks.Mark],
    values: Sequence[Any],
    results: Result,
) -> Result:
    """Tells whatever is around the stack what is at the marks, `[L, ...]`.

    Returns:
      The stack's results, computed only together with what is told.
    """
    found = list(zip(marks, values, strict=True))
    kept = [_taps.say(v, m.label) for m, v in found if m.kind == _marks.TAP]
    # Where a gradient is taken of a function under `jit`, JAX drops what nobody reads.
    results = _marks.tied(results, kept)
    checks = [(m, v) for m, v in found if m.kind == _marks.FINITE]
    num_layers = invocation.options.num_layers
    stack = _finite.Check(invocation.where, num_layers, invocation.reverse)
    return _finite.say_layers(stack, checks, results)


def _trace(invocation: Invocation, given: Given) -> tuple[jex.ClosedJaxpr, Given, Any]:
    """Traces one layer; returns `given` with the carry in the types it will keep."""
    one = _layout.drop_layers(given._replace(carry=None))

    trace = jax.make_jaxpr(invocation.by_name(invocation.run), return_shape=True)
    doing = f'tracing {invocation.all_layers}; loop="python" runs them one by one'
    while True:
        carry = given.carry
        with invocation.explained(doing):
            closed, shapes = trace(one._replace(carry=carry))
        outs = jax.tree.unflatten(
            jax.tree.structure(carry), closed.out_avals[: len(jax.tree.leaves(carry))]
        )
        promoted = jax.tree.map(_carry.promote, carry, outs)
        if all(map(operator.is_, jax.tree.leaves(carry), jax.tree.leaves(promoted))):
            return closed, given, shapes
        given = given._replace(carry=promoted)


def _closed_over() -> Any:
    """Describes what a layer closes over: it may be an activation, or be known."""
    leaves = jax.tree.leaves(hk.experimental.get_params())
    parameters = {id(leaf): leaf for leaf in leaves}  # Kept, so that ids stay theirs.

    def describe(value: object) -> Input:
        is_number = not isinstance(value, jax.Array) or value.ndim == 0
        is_known = is_number or id(value) in parameters
        return Input("an array closed over", known=is_known, fixed=True)

    return describe


def python(invocation: Invocation, given: Given) -> Result:
    """Runs the layer function itself, layer by layer."""
    num_layers, where = invocation.options.num_layers, invocation.where
    _summary.record(invocation, given.params, None)
    structure: Any = None
    found: dict[int, list[tuple[_marks.Mark, jax.Array]]] = {}

    def step(carry: Tree, own: Given) -> tuple[Any, tuple[Any, Any]]:
        nonlocal structure
        with invocation.explained(index=own.index):
            given = own._replace(carry=carry)
            result, found[own.index] = _taps.heard(invocation.run, given)
            output = jax.tree.map(_carry.as_array, result.output)
            after = jax.tree.structure(output)
            _carry.same_outputs(structure, after, where)
        structure = after
        return result.carry, (output, result.state)

    rows = given._replace(carry=None, index=range(num_layers))
    schedule = _loop.Schedule(num_layers, unrolled=True, reverse=invocation.reverse)
    carry, (outputs, state) = _loop.run(step, given.carry, rows, schedule)
    return _taps.say_layers(found, Result(carry, outputs, state))


RUN = {"scan": compiled, "unrolled": compiled, "python": python}
