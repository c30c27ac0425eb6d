"""`roll`: a Python loop of layers, in any framework, runs as a stack."""

import functools
import types
from collections.abc import Callable
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from jax.extend import core as jex

from hk_stack import (
    _checks,
    _equations,
    _flat,
    _function,
    _loop,
    _options,
    _roll_report,
    _rolling,
)
from hk_stack._options import Setup, SetupRemat
from hk_stack._traceback import hidden

P = ParamSpec("P")
R = TypeVar("R")


class Roll(Generic[P, R]):
    """A function whose equal blocks run as loops; made by `roll`."""

    def __init__(
        self, fn: Callable[P, R], settings: _rolling.Settings, *, strict: bool
    ) -> None:
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._settings = settings
        self._is_strict = strict

    @hidden
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the function, rolled."""
        traced, program, rolling = self._roll(args, kwargs)
        if self._is_strict and not rolling.rolled:
            raise ValueError(_roll_report.nothing(self.report(*args, **kwargs)))
        closed = jex.ClosedJaxpr(_flat.without_constants(program.jaxpr), [])
        result: R = _function.run(
            traced,
            program.consts,
            args,
            lambda values: _equations.run(closed, *values),
            lambda structure: structure(closed),
        )
        return result

    @hidden
    def report(self, *args: P.args, **kwargs: P.kwargs) -> _roll_report.RollReport:
        """What is rolled, and what is not and why.

        Args:
          *args: What the function is given, or `jax.ShapeDtypeStruct`s of it.
          **kwargs: What it is given by keyword, as it is.

        Returns:
          A report to print, with `loops` and `misses` as data.
        """
        *_, rolling = self._roll(args, kwargs, explains=True)
        return _roll_report.report(rolling)

    def __get__(self, instance: object, owner: object = None) -> Any:
        """As a method, it is given the object first, as a function is."""
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<{self._settings.where}>"

    def _roll(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, explains: bool = False
    ) -> tuple[_function.Traced, jex.ClosedJaxpr, _rolling.Rolling]:
        where = self._settings.where
        _function.check_arguments(self._fn, args, where, to_run=not explains)
        traced = _function.trace(self._fn, args, where, kwargs)
        rolling = _rolling.Rolling(self._settings, explains=explains)
        program = rolling.roll(traced.closed, [i.known for i in traced.inputs])
        return traced, program, rolling


@hidden
def roll(
    fn: Callable[P, R],
    *,
    min_layers: int = 3,
    setup: Setup = "auto",
    setup_batch_size: int | None = None,
    setup_remat: SetupRemat = "auto",
    setup_sharding: str | None = None,
    remat: bool | Callable[..., Any] = False,
    remat_every: int | Literal["sqrt"] | None = None,
    unroll: int = 1,
    strict: bool = False,
) -> Roll[P, R]:
    """The same function, in which blocks of equations that repeat run as one loop.

    A model that is a Python loop over layers, in any framework, then has what a stack
    has: its program does not grow with depth, and what its layers compute from their
    parameters alone runs first, in batches. Parameters stay in the tree of the model;
    what each layer reads of its own is stacked inside, at each run.

    >>> import jax, jax.numpy as jnp, hk_stack
    >>> def model(params, x):
    ...     for w in params:
    ...         x = x + jnp.tanh(x @ w)
    ...     return x
    >>> params, x = [jnp.eye(4)] * 12, jnp.ones([2, 4])
    >>> rolled = hk_stack.roll(model)
    >>> bool(jnp.allclose(rolled(params, x), model(params, x)))
    True
    >>> [loop] = rolled.report(params, x).loops  # print the report to read it
    >>> loop.blocks, loop.equations, loop.carry
    (12, 3, ('float32[2, 4]',))

    A layer is a block of equations that is there several times in a row, one reading
    what the one before made, with something expensive in it that depends on that.
    Layers may read parameters and numbers of their own (those folded into random keys,
    a rate that grows with depth), what all share, and return values that are read
    later: losses, statistics, caches. A period may be several layers, a model may have
    several loops, and loops may be inside of `jit`, `jax.checkpoint`, `scan` and
    conditionals. Blocks without such a carry run in batches if they are setup, and stay
    as they are if not, as do blocks with side effects in order. Random draws stay the
    same bit for bit; results agree up to the order of floating-point operations.

    Args:
      fn: A function whose first argument are its parameters: the `apply` of a Flax
        module or a Haiku transform, a plain function. Positional arguments are pytrees
        of arrays; what is given by keyword goes to `fn` as it is.
      min_layers: How many equal blocks are worth a loop, at least 2.
      setup: What leaves the loops: see `layer_stack`, as the next six.
      setup_batch_size: How many layers' setup runs at once.
      setup_remat: Whether gradients run setup again, or "auto".
      setup_sharding: The axis of the mesh around that setup is spread over.
      remat: Whether gradients compute each block again; or a policy.
      remat_every: How many blocks are computed again as one group.
      unroll: How many blocks one step of a loop holds.
      strict: Whether it is an error to find no loop.

    Returns:
      The function, which is rolled each time it is traced. Its `report(*args)` says
      which loops there are, and why others are none.

    Raises:
      TypeError: If `fn` is not callable or an option is of another type; once it is
        called, if a positional argument is no array.
      ValueError: If an option is not one of those there are, or contradicts another;
        once it is called, with `strict`, if there is no loop.
    """
    _checks.function(fn, "roll")
    where = f"roll of {_checks.name_of(fn)!r}"
    is_strict = _checks.flag(strict, "strict", where)
    least = _least(min_layers, where)
    of_setup = _options.of_setup(
        setup, setup_batch_size, setup_remat, setup_sharding, where
    )

    def schedule(count: int) -> _loop.Schedule:
        again = _options.rematerialised(remat, remat_every, count, where)
        steps = _options.unrolled(unroll, count, where)
        return _loop.Schedule(count, unroll=steps, remat=again)

    schedule(least)  # Says now what is wrong with the options.
    settings = _rolling.Settings(least, *of_setup, schedule, where)
    return Roll(fn, settings, strict=is_strict)


def _least(min_layers: object, where: str) -> int:
    least = _checks.positive(min_layers, "min_layers", where)
    if least < 2:
        raise ValueError(
            f"{where}: min_layers must be at least 2, not {least}: one block is no "
            "loop."
        )
    return least
