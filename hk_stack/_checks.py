"""What users of a stack can get wrong, and what the errors say.

Each message names the stack and the layer function, says what was found and what was
expected, and what to write instead.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from hk_stack._types import Tree


def describe(name: str, f: Callable[..., Any]) -> str:
    """How errors name a stack."""
    return f"layer_stack {name!r} of layer function {name_of(f)!r}"


def name_of(f: Callable[..., Any]) -> str:
    """The name of a function, as its author knows it."""
    if isinstance(f, functools.partial):
        return name_of(f.func)
    return getattr(f, "__name__", None) or getattr(f, "name", None) or type(f).__name__


def positive(value: Any, argument: str, where: str) -> int:
    """`value` as an int."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        hint = _SECOND_CALL if callable(value) else ""
        if isinstance(value, (float, np.floating)) and value.is_integer():
            hint = f" Write {int(value)}."
        raise TypeError(
            f"{where}: {argument} must be a positive int, not {shown(value)} "
            f"({type(value).__name__}).{hint}"
        ) from None
    if number < 1:
        hint = " A stack of no layers is the identity: leave it out."
        raise ValueError(
            f"{where}: {argument} must be a positive int, not {number}."
            f"{hint if argument == 'num_layers' else ''}"
        )
    return number


_SECOND_CALL = (
    " The layer function comes in the second call, and its arguments in the third: "
    "layer_stack(num_layers)(layer_function)(x)."
)


def flag(value: object, argument: str, where: str) -> bool:
    """`value` as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{where}: {argument} must be True or False, not {shown(value)}."
            f"{_SECOND_CALL if callable(value) else ''}"
        )
    return bool(value)


def one_of(word: object, argument: str, where: str, words: Sequence[str]) -> str:
    """`word`, if it is one of `words`."""
    if not isinstance(word, str) or word not in words:
        expected = ", ".join(f'"{w}"' for w in words)
        raise ValueError(
            f"{where}: {argument} must be one of {expected}, not {shown(word)}."
        )
    return word


def function(f: object, where: str, instead: str = "") -> None:
    """Checks that `f` can be called: a module of Flax only once it is bound."""
    is_module = all(hasattr(f, name) for name in ("init", "apply", "bind"))
    is_bound = getattr(f, "scope", None) is not None
    if callable(f) and (is_bound or not is_module):
        return
    if hasattr(f, "apply"):
        instead = "Give its apply."
    instead = instead or f"The function comes first: {where}(fn, ...)."
    raise TypeError(f"{where}: expected a function, not {type(f).__name__}. {instead}")


def shown(value: object) -> str:
    """`value` as an error shows it: itself, or what it is if that would be long."""
    text = repr(value)
    is_short = len(text) <= _SHORT and "\n" not in text
    kind = "an array" if hasattr(value, "shape") else f"a {type(value).__name__}"
    return text if is_short else kind


_SHORT = 120


def argument_names(f: Callable[..., Any], count: int) -> list[str]:
    """Names of the first `count` arguments of `f`."""
    try:
        names = list(inspect.signature(f).parameters)
    except ValueError:
        names = []
    return [names[i] if i < len(names) else f"argument {i}" for i in range(count)]


def leaf_names(tree: Tree) -> list[str]:
    """Where each leaf of `tree` is: `linear/w`."""
    leaves = jax.tree.leaves_with_path(tree)
    return [path_name(path) for path, _ in leaves]


def path_name(path: tuple[Any, ...]) -> str:
    """Where a leaf of this path is."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_at(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Each leaf of `tree` after where it is: " (at linear/w)"; "" if it is all."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield f" (at {path_name(path)})" if path else "", leaf


def arguments(
    fn: Callable[..., Any], args: Sequence[Tree], what: str, instead: str = ""
) -> list[str]:
    """Checks that arguments by position are arrays; returns their names."""
    names = argument_names(fn, len(args))
    for name, tree in zip(names, args, strict=True):
        arrays(tree, f"{what} `{name}`", instead or _BIND)
    return names


_BIND = (
    "expected arrays or jax.ShapeDtypeStructs. Bind static arguments before, as in "
    "functools.partial(fn, is_training=True)."
)


def arrays(tree: Tree, what: str, instead: str = _BIND) -> None:
    """Checks that all leaves are arrays, their types, or Python numbers."""
    for at, leaf in leaves_at(tree):
        if isinstance(leaf, getattr(jax, "Ref", ())):
            raise TypeError(
                f"{what}{at} is a jax.Ref; expected an array. Read it before."
            )
        is_number = isinstance(leaf, (int, float, complex))
        is_text = getattr(getattr(leaf, "dtype", None), "kind", "f") in "OSU"
        if is_text or not (hasattr(leaf, "shape") or is_number):
            kind = type(leaf).__name__
            raise TypeError(f"{what}{at} is a {kind} ({shown(leaf)}); {instead}")


def values(tree: Tree, what: str, instead: str = _BIND) -> None:
    """Checks that all leaves are arrays that are there, or Python numbers."""
    arrays(tree, what, instead)
    for at, leaf in leaves_at(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{what}{at} is a jax.ShapeDtypeStruct, which has no values. Give an "
                "array; for types of results, write jax.eval_shape(fn, params, ...)."
            )


def layer_axes(tree: Tree, where: str) -> list[tuple[tuple[Any, ...], int]]:
    """The leaves of what `hk_stack.layer_axes` returns, with their paths."""
    leaves = jax.tree.leaves_with_path(tree)
    for path, depth in leaves:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            found = depth if isinstance(depth, int) else type(depth).__name__
            raise TypeError(
                f"{where}: layer_axes must be a tree of ints, 0 outside of stacks; "
                f"found {found} at {path_name(path) or 'its root'}. Write "
                "layer_axes=hk_stack.layer_axes(model.apply, params, *args)."
            )
    return leaves
