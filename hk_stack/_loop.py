"""The only loop over layers: compiled, unrolled or in Python, and rematerialised."""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import _batches, _checks, _equations
from hk_stack._traceback import hidden
from hk_stack._types import Tree

Loop = Literal["scan", "unrolled", "python"]
LOOPS: tuple[Loop, ...] = get_args(Loop)

# JAX's caches know the value, so what was traced for one loop is not used in another.
_override: Any = jax.make_user_context(None)


@hidden
def use_loop(loop: Loop) -> contextlib.AbstractContextManager[None]:
    """Runs every stack that is called in a `with` block by one executor.

    The environment variable `HK_STACK_LOOP` does the same for a whole program. A block
    goes before it, and both go before the `loop` of each stack. What `jax.jit` has
    compiled outside of the block is traced anew inside.

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     x = x + hk.get_parameter("b", [], init=jnp.ones)
    ...     print("layer", hk_stack.layer_index(), "returns", x)
    ...     return x
    >>> model = hk.transform(hk_stack.layer_stack(3, name="layers")(layer))
    >>> params = {"layers/~": {"b": jnp.array([1.0, 2.0, 3.0])}}
    >>> with hk_stack.use_loop("python"):
    ...     y = model.apply(params, None, jnp.zeros([]))
    layer 0 returns 1.0
    layer 1 returns 3.0
    layer 2 returns 6.0

    Args:
      loop: "scan", "unrolled" or "python", as in `layer_stack`.

    Raises:
      ValueError: If there is no such executor.
    """
    _checks.one_of(loop, "loop", "use_loop", LOOPS)
    context: contextlib.AbstractContextManager[None] = _override(loop)
    return context


def in_force(loop: Loop) -> Loop:
    """The executor that runs a stack which asks for `loop`."""
    of_program: Any = os.environ.get("HK_STACK_LOOP")
    if of_program and _override.value is None:
        _checks.one_of(of_program, "its value", "variable HK_STACK_LOOP", LOOPS)
    return _override.value or of_program or loop


class Remat(NamedTuple):
    """What the backward pass computes again.

    Attributes:
      policy: What is kept nevertheless, as in `jax.checkpoint`.
      every: How many layers are one group. Between groups the carry is kept; inside of
        one it is computed again, and then each layer once more.
    """

    policy: Callable[..., Any] | None
    every: int


def describe(remat: Remat | None) -> str:
    """`remat` in words: "all", "dots_saveable, every 4"."""
    if remat is None:
        return "no"
    policy: Any = remat.policy
    words = "all"
    if policy is not None:
        known = vars(jax.checkpoint_policies).items()
        names = [name for name, value in known if value is policy]
        own = getattr(policy, "__name__", type(policy).__name__)
        words = names[0] if names else own
    return f"{words}, every {remat.every}" if remat.every > 1 else words


class Schedule(NamedTuple):
    """How a loop runs its layers.

    Attributes:
      num_layers: `L`.
      unrolled: Whether a Python loop runs the layers.
      unroll: How many layers one step of the compiled loop holds.
      reverse: Whether the last layer runs first.
      remat: What the backward pass computes again.
    """

    num_layers: int
    unrolled: bool = False
    unroll: int = 1
    reverse: bool = False
    remat: Remat | None = None


Step = Callable[[Any, Any], tuple[Any, Any]]


def run(
    layer: Step, carry: Tree, per_layer: Tree, schedule: Schedule
) -> tuple[Any, Any]:
    """Runs layers one after the other.

    Equal to this loop, with the outputs stacked:

    ```
    for i in reversed(range(L)) if reverse else range(L):
        carry, outputs[i] = layer(carry, jax.tree.map(lambda leaf: leaf[i], per_layer))
    ```

    Args:
      layer: One layer, `(carry, per_layer) -> (carry, output)`.
      carry: What the first layer is given.
      per_layer: A pytree of arrays `[L, ...]`: what each layer gets of its own. A leaf
        of an unrolled loop may be `range(L)`: then layer i gets the int i.
      schedule: How the layers run.

    Returns:
      The last carry, and the outputs `[L, ...]`.
    """
    if schedule.remat is None:
        return _turns(layer, carry, per_layer, schedule)
    policy, every = schedule.remat

    def again(step: Step, schedule: Schedule) -> Step:
        """`step`, computed again in the backward pass of its loop."""
        # In a compiled loop nothing can be merged with the backward pass; outside of
        # one XLA would undo the rematerialisation.
        outside = schedule.unrolled or schedule.unroll >= schedule.num_layers
        return jax.checkpoint(step, policy=policy, prevent_cse=outside)

    def group(count: int) -> Step:
        inner = schedule._replace(num_layers=count)
        return functools.partial(_turns, again(layer, inner), schedule=inner)

    if every == 1 or every >= schedule.num_layers:
        return group(schedule.num_layers)(carry, per_layer)
    groups, rest = divmod(schedule.num_layers, every)
    outer = schedule._replace(num_layers=groups, unroll=1)

    def whole_groups(carry: Tree, own: Tree) -> tuple[Any, Any]:
        own = jax.tree.map(lambda v: v.reshape(groups, every, *v.shape[1:]), own)
        carry, outputs = _turns(again(group(every), outer), carry, own, outer)
        whole = groups * every
        return carry, jax.tree.map(lambda v: v.reshape(whole, *v.shape[2:]), outputs)

    if not rest:
        return whole_groups(carry, per_layer)
    last_group = jax.checkpoint(group(rest), policy=policy)
    return _in_two(whole_groups, last_group, carry, per_layer, rest, schedule.reverse)


def run_traced(
    body: jex.ClosedJaxpr,
    constants: Sequence[Any],
    carry: Sequence[Any],
    rows: Sequence[Any],
    schedule: Schedule,
) -> tuple[list[Any], list[Any]]:
    """The same for a layer that is traced already: it is not traced again if it may.

    Args:
      body: Takes constants, the carry and rows; returns the carry and outputs.
      constants: What all layers share.
      carry: What the first layer is given.
      rows: Arrays `[L, ...]`: what each layer gets of its own.
      schedule: How the layers run.
    """
    count = len(carry)
    if _is_scan(body, constants, carry, rows, schedule):
        results = _equations.scan(
            body,
            constants,
            carry,
            rows,
            length=schedule.num_layers,
            reverse=schedule.reverse,
            unroll=schedule.unroll,
        )
        return results[:count], results[count:]

    def layer(carry: Sequence[Any], own: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        results = _equations.run(body, *constants, *carry, *own)
        return results[:count], results[count:]

    return run(layer, list(carry), list(rows), schedule)


def _is_scan(
    body: jex.ClosedJaxpr,
    constants: Sequence[Any],
    carry: Sequence[Any],
    rows: Sequence[Any],
    schedule: Schedule,
) -> bool:
    """Whether nothing is left to do for `jax.lax.scan` but the equation itself.

    It takes other types than a body was traced for, refuses some effects, takes out of
    the loop what a body passes on as it came, and runs a Python loop under
    `jax.disable_jit`.
    """
    if schedule.remat is not None or schedule.unrolled or body.effects:
        return False
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return False
    results = _equations.variables(body.jaxpr.outvars)
    if not results or not results.keys().isdisjoint(body.jaxpr.invars):
        return False
    types = list(map(jax.typeof, carry))
    own = [_equations.of_row(jax.typeof(row)) for row in rows]
    given = [*map(jax.typeof, constants), *types, *own]
    return bool(body.in_avals == given and body.out_avals[: len(carry)] == types)


def _in_two(
    first: Step, last: Step, carry: Tree, per_layer: Tree, rest: int, reverse: bool
) -> tuple[Any, Any]:
    """Runs the layers but for the last `rest` of them in `first`, these in `last`."""
    own = jax.tree.map(lambda leaf: leaf[:-rest], per_layer)
    own_of_last = jax.tree.map(lambda leaf: leaf[-rest:], per_layer)
    if reverse:
        carry, end = last(carry, own_of_last)
        carry, start = first(carry, own)
    else:
        carry, start = first(carry, own)
        carry, end = last(carry, own_of_last)
    return carry, jax.tree.map(lambda *ends: jnp.concatenate(ends), start, end)


def _turns(
    layer: Step, carry: Tree, per_layer: Tree, schedule: Schedule
) -> tuple[Any, Any]:
    """The loop itself, whatever is rematerialised; in Python it may see true values."""
    count, unrolled, unroll, reverse, _ = schedule
    if not unrolled:
        return jax.lax.scan(
            layer, carry, per_layer, length=count, reverse=reverse, unroll=unroll
        )
    leaves, tree = jax.tree.flatten(per_layer)
    arrays = [leaf for leaf in leaves if not isinstance(leaf, range)]
    slices = iter(_unstack(arrays, count))
    columns = [leaf if isinstance(leaf, range) else next(slices) for leaf in leaves]
    outputs: list[Any] = [None] * count
    for i in reversed(range(count)) if reverse else range(count):
        own = jax.tree.unflatten(tree, [column[i] for column in columns])
        carry, outputs[i] = layer(carry, own)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _unstack(leaves: list[Any], count: int) -> list[list[Any]]:
    """The slices of all leaves: one program, as each slice by itself takes long."""
    # The gradient of `split` is one `concatenate`; that of slices is a sum of arrays
    # of all layers.
    return [
        [jnp.squeeze(part, 0) for part in jax.lax.split(leaf, [1] * count)]
        for leaf in leaves
    ]


def square_root(num_layers: int) -> int:
    """How many layers to put into a group, so that few carries are kept.

    What is left over would be copied out of what layers have of their own, too.

    >>> square_root(48), square_root(47), square_root(2)
    (6, 6, 1)
    """
    return _batches.even(num_layers, math.isqrt(num_layers))
