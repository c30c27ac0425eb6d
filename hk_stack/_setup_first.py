"""`setup_first`: a function that runs its setup first, for training."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

from hk_stack import (
    _checks,
    _cut,
    _eager,
    _equations,
    _function,
    _options,
    _spread,
)
from hk_stack._traceback import hidden

P = ParamSpec("P")
R = TypeVar("R")


@hidden
def setup_first(
    fn: Callable[P, R], *, setup_sharding: str | None = None
) -> Callable[P, R]:
    """The same function, which computes first what depends on its first argument alone.

    That is whatever `layer_stack` would take out of its loop: in a scan over layers
    (Flax's `nn.scan`, `hk.layer_stack`, `jax.lax.scan`) the setup of all layers runs in
    batches, before the scan. Results agree up to the order of floating-point
    operations; so do gradients, and all else that JAX makes of functions. It is for
    training, where parameters change at each step, and keeps nothing: `partition` is
    for many runs with the same parameters.

    >>> import jax, jax.numpy as jnp, hk_stack
    >>> def model(params, x):
    ...     def layer(x, w):
    ...         return jnp.tanh(x @ jax.scipy.linalg.expm(w)), None
    ...     return jax.lax.scan(layer, x, params)[0]
    >>> params, x = jnp.zeros([6, 8, 8]), jnp.ones([2, 8])
    >>> fast = hk_stack.setup_first(model)  # six expm before the scan, none inside
    >>> bool(jnp.allclose(fast(params, x), model(params, x)))
    True

    The program is the one of this loop, should there be nothing to compute first.

    Args:
      fn: A function whose first argument are its parameters: the `apply` of a Flax
        module or a Haiku transform. Positional arguments are pytrees of arrays; what is
        given by keyword is neither traced nor known.
      setup_sharding: The name of an axis of the mesh around, over whose devices the
        setup of scans over layers, and of stacks, is spread: see `layer_stack`.

    Returns:
      The function, which is cut each time it is traced.

    Raises:
      TypeError: If `fn` is not callable, or `setup_sharding` no name; once it is
        called, if a positional argument is no array.
      ValueError: Once it is called, if a value marked with `hoist` depends on more, or
        there is no mesh with the axis `setup_sharding`.
    """
    _checks.function(fn, "setup_first")
    where = f"setup_first of {_checks.name_of(fn)!r}"
    axis = _options.axis_of_mesh(setup_sharding, "setup_sharding", where)

    @functools.wraps(fn)
    @hidden
    def first(*args: P.args, **kwargs: P.kwargs) -> R:
        _function.check_arguments(fn, args, where, to_run=True)
        devices = _spread.devices(axis, where)
        with _spread.over(axis):
            traced = _function.trace(fn, args, where, kwargs)
        parts = _cut.cut(traced.closed, traced.inputs, "auto", where, devices=devices)

        def program(values: list[Any]) -> list[Any]:
            read = (values[i] for i in parts.shared_inputs)
            derived = _equations.run(parts.shared, *read)[: parts.num_shared]
            given = (values[i] for i in parts.call_inputs)
            return _equations.run(parts.call, *derived, *given)

        def key(structure: _eager.Structure) -> Hashable:
            programs = structure(parts.shared), structure(parts.call)
            return programs, parts.shared_inputs, parts.call_inputs

        result: R = _function.run(traced, traced.closed.consts, args, program, key)
        return result

    return first
