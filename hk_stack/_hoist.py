"""`hoist`: a mark on values that are setup, and how a traced program shows it."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from hk_stack import _checks, _equations
from hk_stack._marks import HOIST, HOISTED
from hk_stack._traceback import hidden

T = TypeVar("T")


@hidden
def hoist(value: T) -> T:
    """Marks `value`, computed inside a layer function, as setup.

    `layer_stack` computes a marked value of all layers, in batches, before its loop,
    and `partition` in its setup. The result is `value` itself: outside of both, or with
    `setup="inline"`, this is the identity.

    Automatic hoisting finds most setup without a mark. A mark is for what it leaves
    alone on purpose: cheap work that is still worth moving, and values that also
    depend on arrays closed over from outside the stack.

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     w = hk.get_parameter("w", [2, 2], init=hk.initializers.Identity())
    ...     return x @ hk_stack.hoist(jax.scipy.linalg.expm(w))
    >>> model = hk.transform(lambda x: hk_stack.layer_stack(3)(layer)(x))
    >>> params = model.init(jax.random.key(0), jnp.ones([2]))
    >>> print(model.apply(params, None, jnp.ones([2])).round(2))
    [20.09 20.09]

    Args:
      value: Any pytree of arrays.

    Returns:
      The same pytree of arrays.

    Raises:
      TypeError: If a leaf is no array.
      ValueError: By the stack or partition around it, if `value` depends on the layer's
        input, a random key, state, a per-layer input or a side effect. The message says
        which.
    """
    _checks.arrays(value, "hk_stack.hoist: the value", "expected a pytree of arrays.")
    marked: T = jax.tree.map(lambda leaf: checkpoint_name(leaf, HOIST), value)
    return marked


def are_marked(eqns: Iterable[jex.JaxprEqn], marks: Sequence[str]) -> bool:
    """Whether one of `eqns` is one of `marks`, or holds one."""
    return any(
        e.primitive.name == "name" and e.params["name"] in marks
        for e in _equations.with_inner(eqns)
    )


def weaken(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    """`eqn` with its mark, or the marks inside, weakened."""
    if not are_marked([eqn], (HOIST,)):
        return eqn
    if eqn.primitive.name == "name":
        return _equations.replace(eqn, params={**eqn.params, "name": HOISTED})
    return _equations.with_bodies(eqn, weakened)


def weakened(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """`jaxpr` with all marks weakened."""
    if not are_marked(jaxpr.eqns, (HOIST,)):
        return jaxpr
    return _equations.replace(jaxpr, eqns=list(map(weaken, jaxpr.eqns)))
