"""What users of a stack can get wrong, and what the errors say.

Each message names the stack and the layer function, says what was found and what was
expected, and what to write instead.
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
            f"{where}: {argument} must be a positive int, not {value!r} "
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


def flag(value: Any, argument: str, where: str) -> bool:
    """`value` as a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{where}: {argument} must be True or False, not {value!r}."
            f"{_SECOND_CALL if callable(value) else ''}"
        )
    return bool(value)


def naming_map(value: Any, argument: str, where: str) -> Any:
    """`value`, if it is a naming map."""
    methods = ("flat_to_stacked", "stacked_to_flat")
    has_all = all(callable(getattr(value, name, None)) for name in methods)
    if has_all and not isinstance(value, type):
        return value
    hint = f"hk_stack.NumberedLayers({value!r})" if isinstance(value, str) else ""
    if isinstance(value, type):
        hint = f"{value.__name__}(...), an instance"
    raise TypeError(
        f"{where}: {argument} must be a naming map, not {value!r}. Write "
        f"{hint or 'hk_stack.NumberedLayers(...)'}."
    )


def one_of(word: Any, words: Sequence[str], argument: str, where: str) -> str:
    """`word`, if it is one of `words`."""
    if not isinstance(word, str) or word not in words:
        expected = ", ".join(f'"{w}"' for w in words)
        raise ValueError(
            f"{where}: {argument} must be one of {expected}, not {word!r}."
        )
    return word


def true_or_false(value: Any, argument: str, where: str) -> bool | None:
    """`value`, if it is True, False or None."""
    if not (value is None or isinstance(value, (bool, np.bool_))):
        raise TypeError(
            f"{where}: {argument} must be True, False or None (which "
            f"chooses), not {value!r}."
        )
    return None if value is None else bool(value)


def argument_names(f: Callable[..., Any], count: int) -> list[str]:
    """Names of the first `count` arguments of `f`."""
    try:
        names = list(inspect.signature(f).parameters)
    except ValueError:
        names = []
    return [names[i] if i < len(names) else f"argument {i}" for i in range(count)]


def leaf_names(tree: Any) -> list[str]:
    """Where each leaf of `tree` is: `linear/w`."""
    leaves = jax.tree.leaves_with_path(tree)
    return [path_name(path) for path, _ in leaves]


def path_name(path: tuple[Any, ...]) -> str:
    """A path as errors write it: `linear/w`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def summarised(fn: Any) -> None:
    """Checks what `summary` is given."""
    if not callable(fn):
        hint = " Give its apply." if hasattr(fn, "apply") else ""
        raise TypeError(
            f"hk_stack.summary: expected a function, not {type(fn).__name__}.{hint}"
        )


def some_stack(found: Sequence[Any], fn: Any) -> None:
    """Checks that there is something to summarise."""
    if not found:
        raise ValueError(
            f"hk_stack.summary: {name_of(fn)!r} calls no stack, or not in this call. "
            "Those of hk.layer_stack are not seen: write hk_stack.layer_stack, which "
            "takes the same arguments."
        )


def some_taps(
    patterns: Sequence[str],
    select: Any,
    found: Sequence[str],
    lost: Sequence[str],
    all_taps: Callable[[], Sequence[str]],
) -> None:
    """Checks that what `collect` was asked for is there."""
    if not found and tuple(patterns) != ("*",):
        raise ValueError(
            f"hk_stack.collect: no tap matches {select!r}. {_there_are(all_taps())}"
        )
    if lost:
        raise ValueError(
            f"hk_stack.collect: nothing was added at {', '.join(lost)}, as there is no "
            f"such tap. {_there_are(all_taps())}"
        )


def _there_are(taps: Sequence[str]) -> str:
    if not taps:
        return "There are no taps in it; hk_stack.tap(value, name) makes one."
    more = f", and {len(taps) - 20} more" if len(taps) > 20 else ""
    return f"There are {', '.join(taps[:20])}{more}."


def collected(fn: Any, select: Any) -> tuple[str, ...]:
    """Checks what `collect` is given; returns the globs."""
    if not callable(fn):
        hint = " Give its apply." if hasattr(fn, "apply") else ""
        raise TypeError(
            f"hk_stack.collect: expected a function, not {type(fn).__name__}.{hint}"
        )
    is_several = isinstance(select, Sequence) and not isinstance(select, str)
    patterns = tuple(select) if is_several else (select,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"hk_stack.collect: select must be a glob or several, not {pattern!r}. "
                "Arguments of the function go into the second call: "
                "collect(apply)(params, rng, x)."
            )
    return patterns


def partitioned(fn: Any, example_args: tuple[Any, ...]) -> str:
    """Checks what `partition` is given; returns how errors name it."""
    if not callable(fn):
        hint = " Give its apply." if hasattr(fn, "apply") else ""
        raise TypeError(
            f"partition: expected a function, not {type(fn).__name__}.{hint}"
        )
    where = f"partition of {name_of(fn)!r}"
    if not example_args:
        raise TypeError(
            f"{where}: no example arguments. Write partition(fn, params, *rest), with "
            "arrays or jax.ShapeDtypeStructs of what fn takes."
        )
    names = argument_names(fn, len(example_args))
    for name, tree in zip(names, example_args, strict=True):
        arrays(tree, f"{where}: example argument `{name}`")
    return where


_BIND = (
    "expected arrays or jax.ShapeDtypeStructs. Bind static arguments before, as in "
    "functools.partial(fn, is_training=True)."
)


def arrays(tree: Any, what: str, instead: str = _BIND) -> None:
    """Checks that all leaves are arrays, their types, or Python numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        at = f"{what} (at {path_name(path)})" if path else what
        if isinstance(leaf, getattr(jax, "Ref", ())):
            raise TypeError(f"{at} is a jax.Ref; expected an array. Read it before.")
        is_number = isinstance(leaf, (int, float, complex))
        is_text = getattr(getattr(leaf, "dtype", None), "kind", "f") in "OSU"
        if is_text or not (hasattr(leaf, "shape") or is_number):
            raise TypeError(f"{at} is a {type(leaf).__name__} ({leaf!r}); {instead}")


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


def same_leaves(given: Any, example: Any, what: str) -> None:
    """Checks that `given` has the structure and types of `example`, a tree of avals."""
    old: Any = jax.tree.structure(example)
    new: Any = jax.tree.structure(given)
    if old != new:
        lost = sorted(set(leaf_names(example)) - set(leaf_names(given)) - {""})
        more = sorted(set(leaf_names(given)) - set(leaf_names(example)) - {""})
        raise TypeError(
            f"{what} is of another structure than the example it was partitioned for:"
            f"{_some(' lacks', lost)}{_some(' has also', more)} expected {old}, found "
            f"{new}. Partition again for other arguments."
        )
    for (path, leaf), aval in zip(
        jax.tree.leaves_with_path(given), jax.tree.leaves(example), strict=True
    ):
        found = jax.typeof(leaf)
        if (found.shape, found.dtype) != (aval.shape, aval.dtype):
            at = f" (at {path_name(path)})" if path else ""
            raise ValueError(
                f"{what}{at} is {found.str_short()}; it was partitioned for "
                f"{aval.str_short()}. Partition again for other shapes or dtypes."
            )


def _some(what: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{what} {listed};" if names else ""


def derived_values(derived: Any, expected: Any, where: str) -> None:
    """Checks that `derived` is what the setup of the same partition returns."""
    try:
        same_leaves(derived, expected, f"{where}, call: `derived`")
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error} The first argument of call is what setup returns: "
            "split.call(split.setup(params), ...); values that were made before fn or "
            "its shapes changed do not fit."
        ) from None


def not_stale(expected: Any, derived: Any, where: str) -> None:
    """Checks that derived values are those of the parameters at hand."""
    found = []
    for (path, new), old in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(derived), strict=True
    ):
        new, old = map(_numbers, (new, old))
        with np.errstate(invalid="ignore"):  # An infinity equals itself.
            apart = np.where((new == old) | (new != new) & (old != old), 0, new - old)
        most = np.max(np.abs(apart), initial=0)
        largest = np.max(np.abs(new), initial=0, where=np.isfinite(new))
        if not most <= _ROUNDING * largest:
            found.append(f"{path_name(path)} by up to {most:.3g}")
    if found:
        raise ValueError(
            f"{where}: derived values are not those of these parameters; they differ "
            f"in {', '.join(found[:4])}. Run setup again whenever the parameters "
            "change: derived = split.setup(params)."
        )


# Of values of one setup, compiled alone or as part of a larger program.
_ROUNDING = 1e-5


def _numbers(leaf: Any) -> np.ndarray:
    """`leaf` as numbers that can be subtracted."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    kind = np.complex128 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else float
    return np.asarray(leaf).astype(kind)


def same_count(given: Sequence[Any], names: Sequence[str], where: str) -> None:
    """Checks the number of the arguments after `derived`."""
    if len(given) != len(names):
        raise TypeError(
            f"{where}, call: takes derived, {', '.join(names)}; was given "
            f"{len(given)} arguments after `derived`."
        )


def microbatches(loss: Any, params: Any, trees: tuple[Any, ...]) -> str:
    """Checks what `accumulate` is given; returns how errors name it."""
    if not callable(loss):
        raise TypeError(
            f"accumulate: the loss must be a function, not {type(loss).__name__}."
        )
    where = f"accumulate of {name_of(loss)!r}"
    first, *names = argument_names(loss, len(trees) + 1)
    arrays(params, f"{where}: argument `{first}`")
    lengths: dict[str, int] = {}
    for name, tree in zip(names, trees, strict=True):
        for path, leaf in jax.tree.leaves_with_path(tree):
            at = f"`{name}`" + (f" (at {path_name(path)})" if path else "")
            is_spec = isinstance(leaf, jax.ShapeDtypeStruct)
            if is_spec or not getattr(leaf, "shape", ()):
                raise TypeError(
                    f"{where}: microbatches {at} is a {type(leaf).__name__} without "
                    "axes; expected an array [M, ...]. Close over what all "
                    "microbatches share."
                )
            lengths[at] = leaf.shape[0]
    if not lengths:
        raise TypeError(
            f"{where}: no microbatches. Write accumulate(loss, params, x, y) with "
            "arrays [M, ...]."
        )
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        found = ", ".join(f"{length} in {at}" for at, length in lengths.items())
        raise ValueError(
            f"{where}: expected one leading axis M, at least 1, in all microbatches; "
            f"found {found}."
        )
    return where


def scalar_loss(result: Any, has_aux: bool, where: str) -> None:
    """Checks what a loss returns."""
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"{where}: has_aux=True, the loss must return a pair (loss, aux). "
                "Return (loss, None), or leave has_aux out."
            )
        result = result[0]
    elif isinstance(result, tuple):
        raise TypeError(
            f"{where}: the loss returned a tuple of {len(result)}; expected a scalar. "
            "Pass has_aux=True if it is a pair (loss, aux)."
        )
    shape = getattr(result, "shape", None)
    if shape != () or not jax.numpy.issubdtype(result.dtype, jax.numpy.floating):
        found = type(result).__name__ if shape is None else jax.typeof(result)
        raise TypeError(
            f"{where}: the loss must return one floating-point number, not {found}. "
            "Take the mean."
        )
