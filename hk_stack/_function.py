"""Whole functions of parameters, as the public verbs take them: checked and traced."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from hk_stack import _checks, _eager
from hk_stack._naming import unique
from hk_stack._parts import Input
from hk_stack._types import Tree


class Traced(NamedTuple):
    """A function, traced on arguments of which the first is known before the others.

    Attributes:
      closed: The traced function, of the leaves of its arguments.
      inputs: What its constants and the leaves are.
      structure: Of the result.
    """

    closed: jex.ClosedJaxpr
    inputs: list[Input]
    structure: Any


def trace(
    fn: Callable[..., Tree],
    args: Sequence[Tree],
    where: str,
    kwargs: Mapping[str, Any] | None = None,
) -> Traced:
    """Traces `fn`.

    Args:
      fn: A function.
      args: What it is given by position: all leaves are traced, those of the first
        argument are known.
      where: Names the function in errors.
      kwargs: What it is given by keyword, as it is.
    """
    bound = functools.partial(fn, **kwargs) if kwargs else fn
    with while_tracing(where):
        closed, result = jax.make_jaxpr(bound, return_shape=True)(*args)
    names = _checks.argument_names(fn, len(args))
    inputs = [*map(_constant, closed.consts), *_described(names, args)]
    return Traced(closed, inputs, jax.tree.structure(result))


def _constant(value: object) -> Input:
    """Describes what a function closes over: arrays may be activations."""
    is_known = not isinstance(value, jax.Array)
    return Input("a constant", known=is_known, fixed=True, constant=True)


def _described(names: list[str], arguments: Sequence[Tree]) -> Iterator[Input]:
    """What the cut must know of each leaf of the arguments: the first is known."""
    leaves = _checks.leaf_names(arguments[0])
    for label in unique([name or names[0] for name in leaves]):  # It may be one array.
        yield Input(label, known=True, fixed=True)
    for name, tree in zip(names[1:], arguments[1:], strict=True):
        yield from [Input(f"argument `{name}`")] * len(jax.tree.leaves(tree))


def check_arguments(
    fn: Callable[..., Any], args: Sequence[Tree], where: str, *, to_run: bool
) -> None:
    """Checks that what a function is given by position are arrays.

    Raises:
      TypeError: If there is nothing, or a leaf is no array; or if it is only the type
        of one, and `to_run`.
    """
    if not args:
        raise TypeError(
            f"{where}: no arguments by position. Give the parameters first, by "
            "position."
        )
    check = _checks.values if to_run else _checks.arrays
    names = _checks.argument_names(fn, len(args))
    for name, tree in zip(names, args, strict=True):
        check(tree, f"{where}: argument `{name}`", _BY_KEYWORD)


_BY_KEYWORD = (
    "expected an array. What is no array goes by keyword, or is bound before, as in "
    "functools.partial(fn, is_training=True)."
)


def run(
    traced: Traced,
    consts: Sequence[Any],
    args: Sequence[Tree],
    program: Callable[[list[Any]], list[Any]],
    key: Callable[[_eager.Structure], Hashable],
) -> Any:
    """Runs what became of a traced function.

    Args:
      traced: The function.
      consts: The constants of the program, its first inputs.
      args: What the function is given by position, its other inputs.
      program: What to run.
      key: All that it depends on: see `_eager.run`.
    """
    leaves = _eager.run(program, [*consts, *jax.tree.leaves(args)], key)
    return jax.tree.unflatten(traced.structure, leaves)


def check_call(
    fn: Callable[..., Any], where: str, args: Sequence[Tree], kwargs: Mapping[str, Any]
) -> None:
    """Checks that a function takes these arguments."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # Builtins have none.
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{where}: {_checks.name_of(fn)!r} takes {signature}: {error}. All "
            f"that comes after it goes to it: {where}(model.apply, params, rng, x)."
        ) from None


@contextlib.contextmanager
def while_tracing(where: str) -> Iterator[None]:
    """Says what to do where a function fails on traced arguments."""
    try:
        yield
    except (TypeError, jax.errors.ConcretizationTypeError) as error:
        error.add_note(
            f"{where}: this happened while tracing it on the arguments given, all of "
            "which are traced. Bind static ones before, as in "
            "functools.partial(fn, is_training=True)."
        )
        raise
