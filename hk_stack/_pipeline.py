"""A stack over microbatches: its layers in stages, each on devices of its own.

The layers are split over the devices of one axis of the mesh: each holds, and sets up,
its own. Microbatches go from stage to stage, so that all stages have work once the
first microbatch has come to the last: `M + S - 1` ticks for `M` microbatches and `S`
stages (Huang et al., "GPipe", 2018).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.sharding import PartitionSpec

from hk_stack import (
    _advice,
    _checks,
    _eager,
    _equations,
    _executors,
    _flat,
    _marks,
    _spread,
    _summary,
    _taps,
)
from hk_stack._layer import Given, Invocation, Result
from hk_stack._options import Pipeline
from hk_stack._types import Tree

T = TypeVar("T")

# Of the stack whose layer is traced; JAX's caches know the value.
_around: Any = jax.make_user_context(None)


class _Made(NamedTuple):
    """What layers make of all microbatches.

    Attributes:
      carry: Leaves `[M, B / M, ...]`.
      state: Of the layers, `[L, ...]`.
      rows: Outputs and what is at marks, `[L, M, ...]`.
    """

    carry: list[Any]
    state: list[Any]
    rows: list[Any]


def run(invocation: Invocation, given: Given, pipeline: Pipeline) -> Result:
    """Runs a stack, one microbatch after the other or several at once in stages."""
    _check(invocation, given, pipeline)
    split = given._replace(carry=_split(given.carry, invocation, pipeline))
    with _around(invocation.where):
        runs = _python if invocation.loop == "python" else _compiled
        result = runs(invocation, split, pipeline)
    return result._replace(carry=jax.tree.map(_merged, result.carry))


def first(invocation: Invocation, given: Given, pipeline: Pipeline) -> Given:
    """What layers are given with the first microbatch."""
    carry = _split(given.carry, invocation, pipeline)
    return given._replace(carry=jax.tree.map(lambda leaf: leaf[0], carry))


def _split(carry: Tree, invocation: Invocation, pipeline: Pipeline) -> Any:
    """`[B, ...]` as `[M, B / M, ...]`: microbatch `m` has the rows `m::M`.

    So what is spread over other devices by its batch axis stays where it is.
    """
    count, names = pipeline.microbatches, invocation.arguments
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(carry)]
    sizes = {shape[0] for shape in shapes if shape}
    for name, tree in zip(names, carry, strict=False):
        for at, leaf in _checks.leaves_at(tree):
            found = f"{invocation.where}: argument `{name}`{at} has shape {leaf.shape}"
            if not leaf.ndim or len(sizes) > 1:
                raise ValueError(
                    f"{found}; with pipeline= all that goes from layer to layer is cut "
                    "into microbatches, so it needs one leading batch axis: found "
                    f"{', '.join(map(str, shapes))}. Write jnp.broadcast_to(value, "
                    "(batch, ...)) for what has none, or return it as an output of "
                    "each layer: with_per_layer_inputs=True."
                )
            if leaf.shape[0] % count:
                raise ValueError(
                    f"{found}: its batch of {leaf.shape[0]} cannot be cut into "
                    f"microbatches={count} of one size. Give a divisor of "
                    f"{leaf.shape[0]}, or pad the batch."
                )

    shared = invocation.situation.kwargs
    named = zip(_checks.leaf_names(shared), jax.tree.leaves(shared), strict=True)
    if count > 1:
        _check_shared(invocation, {f"`{at}`": value for at, value in named}, shapes)

    def split(leaf: jax.Array) -> jax.Array:
        rows = leaf.shape[0] // count
        return jnp.swapaxes(leaf.reshape(rows, count, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, carry)


def _merged(leaf: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    count, rows, *rest = leaf.shape
    return jnp.swapaxes(leaf, 0, 1).reshape(rows * count, *rest)


def _of(given: Given, microbatch: Any, carry: Any, state: Any) -> Given:
    """What layers are given with a microbatch."""
    keys = given.keys
    if keys is not None:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, microbatch))(keys)
    added = {at: value[:, microbatch] for at, value in given.added.items()}
    return given._replace(keys=keys, added=added, carry=carry, state=state)


def _compiled(invocation: Invocation, given: Given, pipeline: Pipeline) -> Result:
    count = pipeline.microbatches
    program, given = _prepared(invocation, given, invocation.options.num_layers)
    closed_over = {
        f"the array number {i} that the layer function closes over": value
        for i, value in enumerate(program.constants)
    }
    leaves = jax.tree.leaves(given.carry)
    carry = [(v.shape[0] * v.shape[1], *v.shape[2:]) for v in leaves]
    if count > 1:
        _check_shared(invocation, closed_over, carry)
    _check_state(invocation, given.state, program.shapes.state)
    _summary.record(invocation, given.params, program.cut)
    if _num_stages(invocation, given) > 1:
        _check_types(invocation, [*jax.tree.leaves(given), *program.constants])
        run = _over_stages(invocation, pipeline)
    else:

        def run(given: Given, constants: list[Any]) -> _Made:
            return _one_after_another(_set_up(program, given, constants), given, count)

    return _result(invocation, program, _run(run, given, program.constants))


def _over_stages(invocation: Invocation, pipeline: Pipeline) -> Callable[..., _Made]:
    """What runs all microbatches, each device of the mesh axis a stage."""
    num_stages, layered = invocation.num_stages, PartitionSpec(pipeline.axis)

    @jax.shard_map(
        in_specs=layered,
        out_specs=layered,
        axis_names={pipeline.axis},
        check_vma=False,
    )
    def in_stages(given: Given, constants: list[Any]) -> _Made:
        # Traced again, as types name the mesh, and whose axes each device runs alone.
        share = invocation.options.num_layers // num_stages
        carry, constants = jax.tree.map(lambda v: v[0], (given.carry, constants))
        with _spread.not_over(pipeline.axis):
            here, given = _prepared(invocation, given._replace(carry=carry), share)
        stage = _set_up(here, given, constants)
        return _in_stages(stage, given, pipeline, num_stages)

    # Outside of `jit`, some versions of JAX refuse a mesh with other axes.
    @jax.jit
    def spread(given: Given, constants: list[Any]) -> _Made:
        carry, constants = jax.tree.map(
            lambda v: jnp.broadcast_to(v, (num_stages, *jnp.shape(v))),
            (given.carry, constants),
        )
        made = in_stages(given._replace(carry=carry), constants)
        return made._replace(carry=list(map(_of_last, made.carry)))

    return spread


def _num_stages(invocation: Invocation, given: Given) -> int:
    """Over how many stages the layers are split; arrays without a number need none."""
    sizes = [leaf.size for leaf in jax.tree.leaves(given.carry)]
    return invocation.num_stages if any(sizes) else 1


def _run(function: Callable[..., _Made], *args: Tree) -> _Made:
    """Runs what is traced once, and outside of `jit` compiled once."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    program = jex.ClosedJaxpr(_flat.without_constants(closed.jaxpr), [])
    values = [*closed.consts, *jax.tree.leaves(args)]
    evaluate = functools.partial(_evaluate, program)
    leaves = _eager.run(evaluate, values, lambda known: known(program))
    made: _Made = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return made


def _evaluate(program: jex.ClosedJaxpr, values: list[Any]) -> list[Any]:
    return _equations.run(program, *values)


def _prepared(
    invocation: Invocation, given: Given, num_layers: int
) -> tuple[_executors.Program, Given]:
    """Traces and cuts a layer; `given` has the types that its carry will keep."""
    program, one = _executors.prepared(invocation, _first(given), num_layers)
    carry = jax.tree.map(
        lambda leaf, kept: jax.lax.convert_element_type(leaf, kept.dtype),
        given.carry,
        one.carry,
    )
    return program, given._replace(carry=carry)


def _first(given: Given) -> Given:
    return _of(given, 0, jax.tree.map(lambda leaf: leaf[0], given.carry), given.state)


class _Stage(NamedTuple):
    """Layers that run one after the other, set up.

    Attributes:
      program: Of a layer.
      derived: Their derived values.
    """

    program: _executors.Program
    derived: tuple[list[Any], list[Any]]

    def only_if(self, is_there: jax.Array) -> "_Stage":
        """The same, with derivatives by what is closed over only if work is there."""
        constants, derived = _only_if(is_there, (self.program.constants, self.derived))
        return _Stage(self.program._replace(constants=constants), derived)

    def __call__(self, given: Given) -> tuple[list[Any], list[Any], list[Any]]:
        """Runs a microbatch: the carry, state, and rows `[L, ...]`."""
        plan = self.program.plan
        leaves = plan.loop(self.program.values(given), *self.derived)
        result, marked = self.program.result(leaves)
        carry, output, state = map(jax.tree.leaves, result)
        return carry, state, [*output, *marked]


def _only_if(is_there: jax.Array, tree: T) -> T:
    """`tree`, with derivatives by it only if work is there: others may be NaN."""

    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(is_there, leaf, jax.lax.stop_gradient(leaf))

    found: T = jax.tree.map(one, tree)
    return found


def _set_up(program: _executors.Program, given: Given, constants: list[Any]) -> _Stage:
    """Runs the setup of layers, once for all microbatches."""
    program = program._replace(constants=constants)
    return _Stage(program, program.plan.derive(program.values(_first(given))))


def _one_after_another(stage: _Stage, given: Given, count: int) -> _Made:
    """Runs one microbatch after the other through all layers."""
    tree = jax.tree.structure(given.state)

    def turn(state: list[Any], own: tuple[Any, Any]) -> tuple[Any, Any]:
        microbatch, carry = own
        of = _of(given, microbatch, carry, jax.tree.unflatten(tree, state))
        carry, state, rows = stage(of)
        return state, (carry, rows)

    turn = jax.checkpoint(turn, prevent_cse=False)
    own = jnp.arange(count, dtype=jnp.int32), given.carry
    state, (carry, rows) = jax.lax.scan(turn, jax.tree.leaves(given.state), own)
    return _Made(carry, state, [jnp.swapaxes(row, 0, 1) for row in rows])


def _in_stages(
    stage: _Stage, given: Given, pipeline: Pipeline, num_stages: int
) -> _Made:
    """Runs the layers of one device on the microbatches that come to it."""
    axis, count = pipeline.axis, pipeline.microbatches
    place = jax.lax.axis_index(axis)
    trees = jax.tree.structure(given.carry), jax.tree.structure(given.state)

    def at_work(microbatch: Any, carry: list[Any], state: list[Any]) -> Any:
        # A stage that waits works, too, and nothing is made of it. In a conditional it
        # would not be there where XLA has all stages pass something on, as it does to
        # split an axis that is spread over other devices.
        is_there = (microbatch >= 0) & (microbatch < count)
        choose = functools.partial(jnp.where, is_there)
        at = map(jax.tree.unflatten, trees, (carry, state))
        of = _of(given, jnp.clip(microbatch, 0, count - 1), *at)
        made, after, rows = stage.only_if(is_there)(_only_if(is_there, of))
        return list(map(choose, made, carry)), list(map(choose, after, state)), rows

    # What a stage computes on the way is computed again: else each tick would keep a
    # copy of the parameters, too. What it is given is kept.
    at_work = jax.checkpoint(at_work, prevent_cse=False)
    to_next = [(i, i + 1) for i in range(num_stages - 1)]

    def tick(carry: Any, own: Any) -> Any:
        state, received = carry
        time, entering = own
        choose = functools.partial(jnp.where, place == 0)
        taken = list(map(choose, entering, received))
        made, state, rows = at_work(time - place, taken, state)
        sent = jax.lax.ppermute(made, axis, to_next)
        return (state, sent), (made, rows)

    entering = jax.tree.leaves(given.carry)
    start = [leaf[0] for leaf in entering]
    state = jax.tree.leaves(given.state)
    spare = [leaf[-1:].repeat(num_stages - 1, 0) for leaf in entering]
    entering = list(map(lambda *both: jnp.concatenate(both), entering, spare))
    times = jnp.arange(count + num_stages - 1, dtype=jnp.int32)
    (state, _), (carry, rows) = jax.lax.scan(tick, (state, start), (times, entering))
    rows = [jax.lax.dynamic_slice_in_dim(row, place, count) for row in rows]
    carry = [leaf[None, num_stages - 1 :] for leaf in carry]
    return _Made(carry, state, [jnp.swapaxes(row, 0, 1) for row in rows])


def _of_last(values: jax.Array) -> jax.Array:
    """What the last stage has, of `[S, ...]`, on all of them."""
    if jnp.issubdtype(values.dtype, jax.dtypes.prng_key):
        words = _of_last(jax.random.key_data(values))
        keys: jax.Array = jax.random.wrap_key_data(
            words, impl=jax.random.key_impl(values)
        )
        return keys
    # A slice would be sent to the first stage, and to all from there.
    is_last = jnp.arange(len(values)) == len(values) - 1
    is_last = is_last.reshape(-1, *[1] * (values.ndim - 1))
    kept = jnp.where(is_last, values, jnp.zeros_like(values))
    whole: jax.Array = kept.sum(0).astype(values.dtype)
    return whole


def _result(invocation: Invocation, program: _executors.Program, made: _Made) -> Result:
    """The stack's result, once what is at marks is told."""
    shapes = program.shapes
    count = len(made.rows) - len(program.marks)
    result = Result(
        jax.tree.unflatten(jax.tree.structure(shapes.carry), made.carry),
        jax.tree.unflatten(jax.tree.structure(shapes.output), made.rows[:count]),
        jax.tree.unflatten(jax.tree.structure(shapes.state), made.state),
    )
    values = [
        jax.vmap(_marks.first_code)(value) if mark.kind == _marks.FINITE else value
        for mark, value in zip(program.marks, made.rows[count:], strict=True)
    ]
    return _executors.pass_on(invocation, program.marks, values, result)


def _python(invocation: Invocation, given: Given, pipeline: Pipeline) -> Result:
    """Runs the layer function itself, microbatch by microbatch, layer by layer."""
    results, found = [], {}
    for m in range(pipeline.microbatches):
        carry = jax.tree.map(lambda leaf, m=m: leaf[m], given.carry)
        one = _of(given, m, carry, given.state)
        run = functools.partial(_executors.python, invocation.again())
        result, found[m] = _taps.heard(run, one)
        given = given._replace(state=result.state)
        results.append(result)

    def stack(axis: int, trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)

    carry = stack(0, [result.carry for result in results])
    output = stack(1, [result.output for result in results])
    result = Result(carry, output, given.state)
    return _taps.say_layers(found, result, axis=1)


def _check(invocation: Invocation, given: Given, pipeline: Pipeline) -> None:
    where = invocation.where
    if _around.value is not None:
        raise ValueError(
            f"{where}: it has pipeline=, and runs in a layer of {_around.value}, which "
            "has one, too. Leave one of them out: the stages of the outer one hold "
            "whole layers."
        )
    if invocation.reverse:
        raise ValueError(
            f"{where}: reverse=True runs the last layer first, but with pipeline= "
            "microbatches go from the first stage to the last. Leave one of them out."
        )
    sizes = invocation.options.num_layers, pipeline.microbatches
    for at, value in given.added.items():
        if value.shape[:2] != sizes:
            raise ValueError(
                f"{where}: what is to be added at {at} has shape {value.shape}; with "
                f"pipeline= expected leading axes {sizes}, of layers and microbatches."
            )


def _check_state(invocation: Invocation, state: Tree, after: Tree) -> None:
    """Checks that the next microbatch can be given the state that one leaves."""
    pairs = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        if (old.shape[1:], old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"{invocation.where}: with pipeline= state goes from microbatch to "
                f"microbatch, but a layer is given {_checks.path_name(path)} as "
                f"{old.dtype}{list(old.shape[1:])} and leaves "
                f"{new.dtype}{list(new.shape)}. Give its initial value this shape and "
                "type."
            )


def _check_types(invocation: Invocation, values: list[Any]) -> None:
    """Refuses values of which a `shard_map` around keeps account."""
    for axis in sorted({a for v in values for a in _equations.varying(jax.typeof(v))}):
        raise ValueError(
            f"{invocation.where}: a jax.shard_map around has taken the mesh axis "
            f"{axis!r}, and checks which values differ along it; with pipeline= JAX "
            "would lose that, and gradients would be wrong. Give this shard_map "
            "check_vma=False, or leave the axis to XLA: "
            "jax.lax.with_sharding_constraint."
        )


def _check_shared(
    invocation: Invocation, shared: Mapping[str, Any], carry: Sequence[tuple[int, ...]]
) -> None:
    """Refuses arrays of all microbatches that seem to have a row for each of the batch.

    Numbers of a weight may be as many by chance; so it has to be a mask or tokens, or
    to be as what goes from layer to layer in its next axis, too.

    Args:
      invocation: Of the stack.
      shared: What the layer function closes over, or is given by keyword, by name.
      carry: The shapes of what goes from layer to layer.
    """
    known = {id(leaf) for leaf in jax.tree.leaves(hk.experimental.get_params())}
    for name, value in shared.items():
        if not isinstance(value, jax.Array) or id(value) in known:
            continue
        is_weight = jnp.issubdtype(value.dtype, jnp.inexact) or value.dtype == "uint32"
        axes = 2 if is_weight else 1
        if value.ndim >= axes and value.shape[:axes] in {c[:axes] for c in carry}:
            raise ValueError(
                f"{invocation.where}: {name} has shape {value.shape}, with a row for "
                f"each of the batch of {len(value)}; all of it would be in each "
                f"microbatch. {_advice.ALONG}; if this axis is no batch, give it as "
                "array[None]."
            )
