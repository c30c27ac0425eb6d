"""What to write where a layer function fails in its own code.

Errors of JAX and Python stay as they are, but know nothing of stacks; this says what
they mean in one.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hk_stack._options import Options
from hk_stack._types import Tree


class Situation(NamedTuple):
    """What a stack is made of, and what it is given.

    Attributes:
      options: Of the stack.
      f: The layer function.
      arguments: What the stack was given by position, by name.
      kwargs: The keyword arguments of the layer function.
    """

    options: Options
    f: Callable[..., Any]
    arguments: Mapping[str, Tree]
    kwargs: Mapping[str, Any]


@contextlib.contextmanager
def in_layer(
    where: str, index: int | None, doing: str, situation: Situation
) -> Iterator[None]:
    """Says in which stack an error came up, in which layer, and what to write."""
    try:
        yield
    except Exception as error:
        is_innermost = not any(n.startswith(_HERE) for n in _notes(error))
        advice = list(_on(error, situation)) if is_innermost else []
        if index is not None:
            error.add_note(f"{_HERE} layer {index} of {where}.")
        elif where not in str(error):
            error.add_note(f"{_HERE} {where}, {doing}.")
        for text in advice:
            if text not in _notes(error):
                error.add_note(text)
        raise


_HERE = "This was in"


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", [])


def _on(error: Exception, situation: Situation) -> Iterator[str]:
    """What to write, as far as the error tells."""
    is_ours = "layer_stack '" in str(error)
    if not is_ours:
        yield from _python_values(error, situation)
        yield from _no_arrays(error, situation)
        yield from _signature(error, situation)
        if situation.options.pipeline and isinstance(error, (TypeError, ValueError)):
            yield _MICROBATCH
    if isinstance(error, (TypeError, ValueError)):
        yield from _per_layer(situation)


ALONG = "Hand it from layer to layer as x is, stack(f)(x, mask), where f returns both"
_MICROBATCH = (
    "With pipeline= a layer is given a microbatch of what goes from layer to layer; "
    "what it closes over, or is given by keyword, is whole in each. If that has a row "
    f"for each of the batch: {ALONG[0].lower()}{ALONG[1:]}."
)
_TRACED = "layer_index(), parameters and what goes from layer to layer are traced."
_ERRORS = jax.errors
_VALUES = {
    _ERRORS.TracerArrayConversionError: "numpy takes no traced arrays: write jnp for "
    "np, and jnp.asarray(table)[i] for an entry of a table",
    _ERRORS.TracerBoolConversionError: "`if`, `and` and `while` take no traced value: "
    "write jnp.where(condition, a, b) or jax.lax.cond",
    _ERRORS.TracerIntegerConversionError: "range() and lists take no traced number: "
    "write jax.lax.fori_loop for a range, and jnp.stack(entries)[i] for an entry",
    _ERRORS.NonConcreteBooleanIndexError: "x[mask] is of no known shape: write "
    "jnp.where(mask, x, 0)",
    _ERRORS.ConcretizationTypeError: "int(), float(), .item() and shapes take no "
    "traced value: compute with the array, as in x.astype(float)",
}


def _python_values(error: Exception, situation: Situation) -> Iterator[str]:
    """Where Python or numpy wants a value, and there is a traced one."""
    if "valid module name" in str(error) and "[]" in str(error):
        yield (
            "The names of modules need no layer_index(): each layer has parameters of "
            "its own, which are stacked under one name."
        )
    kind = next((kind for kind in _VALUES if isinstance(error, kind)), None)
    if kind is None and "concrete value" in str(error):
        kind = _ERRORS.ConcretizationTypeError
    if kind is None:
        return
    yield f"{_VALUES[kind]}. {_TRACED}"
    yield from _static(situation)


def _static(situation: Situation) -> Iterator[str]:
    """Which arguments are traced, and would not have to be."""
    for name, value in situation.arguments.items():
        if isinstance(value, (bool, int, np.bool_)):
            yield (
                f"`{name}` was given by position, so it goes from layer to layer, as "
                f"an array. By keyword it stays a Python value: "
                f"stack(f)(x, {name}={value})."
            )
    for name, value in situation.kwargs.items():
        if isinstance(value, jax.core.Tracer) and value.ndim == 0:
            yield (
                f"`{name}` is traced already where the stack is called. Make it static "
                f"there: jax.jit(..., static_argnames={name!r})."
            )


_SEVERAL = "jnp.asarray(x) makes one array of numbers, jnp.stack(x) one of arrays."
_KINDS = {
    list: _SEVERAL,
    tuple: _SEVERAL,
    dict: "Name the entry that is meant, as in x['name'].",
    type(None): "Give an array.",
}


def _no_arrays(error: Exception, situation: Situation) -> Iterator[str]:
    """Where an argument is a pytree, and an operation wants an array."""
    if not isinstance(error, (TypeError, AttributeError)):
        return
    for name, value in {**situation.arguments, **situation.kwargs}.items():
        what = type(value).__name__
        if type(value) in _KINDS and re.search(rf"\b({what}|sequence)\b", str(error)):
            write = re.sub(r"\bx\b", name, _KINDS[type(value)])
            yield (
                f"The stack was given a {what} as `{name}`; a pytree, which the layer "
                f"function gets as it is. {write}"
            )


def _signature(error: Exception, situation: Situation) -> Iterator[str]:
    """Where a layer function is given other arguments than it takes."""
    f, arguments, kwargs = situation.f, situation.arguments, situation.kwargs
    try:
        signature = inspect.signature(f)
        signature.bind(*arguments.values(), **kwargs)
    except ValueError:  # Builtins have no signature.
        return
    except TypeError as reason:
        if not isinstance(error, TypeError):
            return
        given = [*arguments, *(f"{name}=" for name in kwargs)]
        yield (
            f"The layer function takes {signature} and was given "
            f"({', '.join(given)}): {reason}."
        )
        takes = signature.parameters
        is_given_reverse = situation.options.pass_reverse_to_layer_fn
        if is_given_reverse and "reverse" not in takes:
            yield "Let it take `reverse`, or leave pass_reverse_to_layer_fn out."
        elif "reverse" in takes and not is_given_reverse:
            yield "pass_reverse_to_layer_fn=True gives it `reverse`."
        elif situation.options.with_per_layer_inputs and len(arguments) == 1:
            yield "Per-layer inputs come after x: stack(f)(x, y), y of [L, ...]."


def _per_layer(situation: Situation) -> Iterator[str]:
    """Where an argument looks as if it had one entry for each layer."""
    num_layers = situation.options.num_layers
    for name, value in situation.kwargs.items():
        if _has_axis(value, num_layers):
            yield (
                f"`{name}` is given by keyword, whole to each layer. If it has one "
                f"entry for each layer, write layer_stack({num_layers}, "
                f"with_per_layer_inputs=True)(f)(x, {name}), and return a pair."
            )
    if situation.options.with_per_layer_inputs:
        return
    is_like = [_has_axis(v, num_layers) for v in situation.arguments.values()]
    if is_like[:1] == [True]:
        return
    names = [n for n, like in zip(situation.arguments, is_like, strict=True) if like]
    if names:
        yield (
            f"`{names[0]}` goes from layer to layer as a whole. If it has one entry "
            f"for each layer, write layer_stack({num_layers}, "
            "with_per_layer_inputs=True), and return a pair."
        )


def _has_axis(tree: Tree, num_layers: int) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(np.shape(leaf)[:1] == (num_layers,) for leaf in leaves)
