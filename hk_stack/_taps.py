"""Taps: values out of the middle of a traced program, by name."""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hk_stack import _checks, _eager, _equations, _finite, _frames, _marks, _naming
from hk_stack._traceback import hidden
from hk_stack._types import Tree

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Collector:
    """What `collect` wants; part of the key of JAX's caches.

    Attributes:
      patterns: Globs of the paths to collect.
      adding: What to add; equal by identity, so that all taps are met again.
    """

    patterns: tuple[str, ...]
    adding: "_Adding | None"


@dataclasses.dataclass(frozen=True, eq=False)
class _Adding:
    """Values to add to taps, by path; and the paths of all taps that were met."""

    values: Mapping[str, jax.Array]
    met: set[str] = dataclasses.field(default_factory=set)


# JAX's caches know the value, so what was traced under one is not used under another.
_collecting: Any = jax.make_user_context(None)


def are_heard() -> bool:
    """Whether somebody collects taps."""
    return _collecting.value is not None


@hidden
def tap(value: T, name: str) -> T:
    """Lets `collect` read `value` under a name, from the middle of a model.

    The result is `value` itself, and unless somebody collects, the traced program is
    the same as without the tap. Parameters and names do not change.

    A stack with `check_finite=True` checks the values at its taps.

    Args:
      value: Any pytree of arrays. Each leaf is tapped, with its path after the name.
      name: Of the tap. Its path is that of the module that calls it, as in the
        parameter tree: `layers/attention/scores`.

    Returns:
      The same pytree. Use it instead of `value` where something is to be added to it or
      differentiated by it (`collect(..., add=...)`).

    Raises:
      TypeError: If the name is no text.
      ValueError: If the name is empty.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"hk_stack.tap: the name must be a str, not {_checks.shown(name)}. "
            'Write hk_stack.tap(value, "hidden").'
        )
    if not name:
        raise ValueError("hk_stack.tap: the name is empty; name what is tapped.")
    if _frames.is_init() or not (are_heard() or _frames.is_checked()):
        return value
    start = [_frames.path(), name]

    def one(at: tuple[Any, ...], leaf: Tree) -> Tree:
        path = "/".join(filter(None, [*start, _checks.path_name(at)]))
        return _tap_leaf(leaf, path)

    tapped: T = jax.tree.map_with_path(one, value)
    return tapped


def _tap_leaf(leaf: Tree, path: str) -> Tree:
    collector = _collecting.value
    if collector and collector.adding:
        collector.adding.met.add(path)
        if path in (added := _added()):
            leaf = _add(leaf, added[path], path)
    if _frames.is_checked():
        leaf = _finite.say_finite({f"tap {path}": leaf}, leaf)
    if collector and any(fnmatch.fnmatchcase(path, p) for p in collector.patterns):
        leaf = say(leaf, path)
    return leaf


def say(value: jax.Array, path: str) -> jax.Array:
    """Passes a tapped value on to whoever traces this program."""
    return _marks.Mark(_marks.TAP, path).on(value)


def _add(leaf: jax.Array, added: jax.Array, path: str) -> jax.Array:
    found, expected = jnp.shape(added), jnp.shape(leaf)
    if found != expected:
        raise ValueError(
            f"hk_stack.collect: what is to be added at {path} has shape {found} for "
            f"each layer; the tapped value has {expected}. Give it the shape that "
            "collect(fn)(...) returns for this path."
        )
    kind, of_added = jnp.asarray(leaf).dtype, jnp.asarray(added).dtype
    if not jnp.can_cast(of_added, kind, "same_kind"):
        raise ValueError(
            f"hk_stack.collect: what is to be added at {path} is {of_added}, the "
            f"tapped value is {kind}, which cannot hold it. Cast one of them."
        )
    return leaf + jnp.asarray(added).astype(kind)


def _added() -> Mapping[str, jax.Array]:
    """What is to be added at the taps of the code that runs, by path."""
    if around := _frames.frames():
        return around[-1].added
    collector = _collecting.value
    return collector.adding.values if collector and collector.adding else {}


def added_below(path: str, num_layers: int, where: str) -> dict[str, jax.Array]:
    """What is to be added at the taps of a stack: arrays `[L, ...]`, by path."""
    here = _added()
    below = {at: value for at, value in here.items() if at.startswith(f"{path}/")}
    for at, value in below.items():
        shape = jnp.shape(value)
        if not shape or shape[0] != num_layers:
            raise ValueError(
                f"{where}: what is to be added at {at} has shape {shape}; expected "
                f"a leading axis of {num_layers}, one entry for each layer."
            )
    return below


@hidden
def collect(
    fn: Callable[P, R],
    select: str | Sequence[str] = "*",
    *,
    add: Mapping[str, Any] | None = None,
) -> Callable[P, tuple[R, dict[str, Any]]]:
    """`fn`, returning besides what it returns the values at the taps inside of it.

    For a stack `layer_stack(L, name="layers")` of

    ```
    def layer(x):
        x = hk_stack.tap(f(x), "hidden")
        return g(x)
    ```

    `out, taps = collect(apply)(params, rng, x)` is equal to

    ```
    for i in range(L):
        x = taps["layers/hidden"][i] = f(x)
        x = g(x)
    ```

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     return hk_stack.tap(jnp.tanh(hk.Linear(4)(x)), "hidden")
    >>> model = hk.transform(hk_stack.layer_stack(3, name="layers")(layer))
    >>> params = model.init(jax.random.key(0), jnp.ones([2, 4]))
    >>> out, taps = hk_stack.collect(model.apply)(params, None, jnp.ones([2, 4]))
    >>> jax.tree.map(jnp.shape, taps)
    {'layers/hidden': (3, 2, 4)}

    The gradient of a result by a tapped value is that by what is added to it:

    >>> def score(shift):
    ...     return hk_stack.collect(model.apply, add=shift)(params, None, x)[0].sum()
    >>> x = jnp.ones([2, 4])
    >>> jax.tree.map(jnp.shape, jax.grad(score)({k: 0 * v for k, v in taps.items()}))
    {'layers/hidden': (3, 2, 4)}

    Args:
      fn: Any function, such as the `apply` of a transform, also one that takes
        gradients. It is traced on its arrays; numbers, booleans and other arguments
        stay as they are.
      select: Globs of the paths to collect, as in `fnmatch`: `*` also matches slashes.
        What is not selected is neither computed nor kept for it.
      add: Arrays `[L, ...]` to add to the tapped values, by path, wherever there is a
        tap of this path. The layer must use what `tap` returns. Outside of stacks
        without `L`; in nested stacks `[L_outer, L_inner, ...]`. They need not be
        selected.

    Returns:
      A function that takes what `fn` takes, and returns what it returns and a dict of
      the tapped values `[L, ...]`, by path; `[L_outer, L_inner, ...]` in nested stacks,
      `[T, ...]` in a `scan` of T turns. A path that is there more than once is
      numbered: `scores`, `scores_1`. It may be used under `jit`, `grad` and `vmap`.
      Under a `vmap` inside of `fn`, the batch axis is where `vmap` has put it.

    Raises:
      TypeError: If `fn` is no function, or `select` no text.
      ValueError: If nothing matches what is selected; if what is added fits no tap; if
        a tap is in a conditional, a `while` or a function with its own derivative,
        which no value can leave.
    """
    patterns = _patterns(fn, select)
    values = None if add is None else _values(add)

    @functools.wraps(fn)
    @hidden
    def collected(*args: P.args, **kwargs: P.kwargs) -> tuple[R, dict[str, Any]]:
        adding = None if values is None else _Adding(values)
        with _collecting(_Collector(patterns, adding)):
            marks, run = _traced(fn, args, kwargs)
        what = None
        if not marks and patterns != ("*",):
            what = f"no tap matches {select!r}"
        elif adding and (lost := sorted({*adding.values} - adding.met)):
            what = f"nothing was added at {', '.join(lost)}, as there is no such tap"
        if what:
            there_are = _there_are(fn, args, kwargs)
            raise ValueError(f"hk_stack.collect: {what}. {there_are}")
        result, found = run()
        names = _naming.unique([mark.label for mark in marks])
        return result, dict(zip(names, found, strict=True))

    return collected


def _values(add: object) -> dict[str, jax.Array]:
    """What is to be added, checked."""
    if not isinstance(add, Mapping):
        raise TypeError(
            "hk_stack.collect: add must be a dict of arrays by path, not "
            f'{_checks.shown(add)}. Write add={{"layers/hidden": array}}.'
        )
    for path, value in add.items():
        if not isinstance(path, str):
            raise TypeError(
                f"hk_stack.collect: the paths in add must be text, not "
                f"{_checks.shown(path)}."
            )
        _checks.arrays(value, f"hk_stack.collect: add at {path}", "expected an array.")
        if value is None:
            raise TypeError(f"hk_stack.collect: add at {path} is None; leave it out.")
    return {path: jnp.asarray(value) for path, value in add.items()}


def _patterns(fn: object, select: Any) -> tuple[str, ...]:
    """Checks what `collect` is given; returns the globs."""
    _checks.function(fn, "hk_stack.collect")
    is_several = isinstance(select, Sequence) and not isinstance(select, str)
    patterns = tuple(select) if is_several else (select,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                "hk_stack.collect: select must be a glob or several, not "
                f"{_checks.shown(pattern)}. "
                "Arguments of the function come after, in parentheses of their own: "
                "collect(apply)(params, rng, x)."
            )
    return patterns


def _there_are(
    fn: Callable[..., Tree], args: Sequence[Tree], kwargs: Mapping[str, Tree]
) -> str:
    """What an error says of all taps."""
    adding = _Adding({})
    with _collecting(_Collector((), adding)):
        jax.eval_shape(*on_arrays(fn, args, kwargs))
    taps = sorted(adding.met)
    if not taps:
        return "There are no taps in it; hk_stack.tap(value, name) makes one."
    more = f", and {len(taps) - 20} more" if len(taps) > 20 else ""
    return f"There are {', '.join(taps[:20])}{more}."


def on_arrays(
    fn: Callable[..., Tree], args: Sequence[Tree], kwargs: Mapping[str, Tree]
) -> tuple[Callable[[dict[int, Any]], Any], dict[int, Any]]:
    """`fn` as a function of its arrays alone, and these; all else stays as it is."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)}

    def run(arrays: dict[int, Any]) -> Any:
        now = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(tree, now)
        return fn(*args, **kwargs)

    return run, arrays


def _traced(
    fn: Callable[..., Tree], args: Sequence[Tree], kwargs: Mapping[str, Tree]
) -> tuple[list[_marks.Mark], Callable[[], tuple[Any, list[jax.Array]]]]:
    """The marks in `fn`; and what runs it, returning its result and what is there."""
    run, arrays = on_arrays(fn, args, kwargs)
    closed, shapes = jax.make_jaxpr(run, return_shape=True)(arrays)
    program, constants, marks = _marks.expose(closed)
    inputs = [*constants, *arrays.values()]
    structure: Any = jax.tree.structure(shapes)

    def evaluate(values: list[jax.Array]) -> list[jax.Array]:
        return _equations.run(program, *values)

    def compiled() -> tuple[Any, list[jax.Array]]:
        if program.effects:  # Checks are such.
            leaves = evaluate(inputs)
        else:
            leaves = _eager.run(evaluate, inputs, lambda known: known(program))
        count = structure.num_leaves
        return jax.tree.unflatten(structure, leaves[:count]), leaves[count:]

    return marks, compiled


def heard(
    fn: Callable[..., T], *args: Tree
) -> tuple[T, list[tuple[_marks.Mark, jax.Array]]]:
    """Runs a layer; returns its result and, if somebody collects, what is at marks."""
    if not are_heard():
        return fn(*args), []
    marks, run = _traced(fn, args, {})
    result, values = run()
    return result, list(zip(marks, values, strict=True))


def say_layers(
    found: Mapping[int, Sequence[tuple[_marks.Mark, jax.Array]]],
    through: T,
    axis: int = 0,
) -> T:
    """Passes on what the layers of a Python loop tap, as one if all of them do.

    Args:
      found: What is at marks, by layer.
      through: What the rest of the program is computed from.
      axis: Of the layers in what is passed on.

    Returns:
      `through`, which must be used from here on.
    """
    kept: list[jax.Array] = []
    taps: dict[tuple[str, int], dict[int, jax.Array]] = {}
    for i in sorted(found):
        numbers: dict[str, int] = {}  # Of taps with one path in one layer.
        for mark, value in found[i]:
            if mark.kind == _marks.FINITE:
                kept.append(_marks.unbatched(value, mark))
                continue
            number = numbers[mark.label] = numbers.get(mark.label, 0) + 1
            taps.setdefault((mark.label, number), {})[i] = value
    for (path, _), values in taps.items():
        kinds = {(jnp.shape(v), jnp.result_type(v)) for v in values.values()}
        if len(values) == len(found) and len(kinds) == 1:
            kept.append(say(jnp.stack(list(values.values()), axis), path))
        else:
            kept += [say(value, f"{path}[{i}]") for i, value in values.items()]
    return _marks.tied(through, kept)
