"""What users of a stack can get wrong, and what the errors say.

Each message names the stack and the layer function, says what was found and what was
expected, and what to write instead.
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from hk_stack import _equations


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


def stack_name(name: Any) -> None:
    """Checks the name of a stack."""
    if not (name is None or isinstance(name, str)):
        raise TypeError(
            f"layer_stack: name must be a str or None, not {name!r} "
            f"({type(name).__name__})."
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


def unroll(value: Any, num_layers: int, where: str) -> int:
    """How many layers one step of the loop holds; True is all of them."""
    if isinstance(value, (bool, np.bool_)):
        return num_layers if value else 1
    return positive(value, "unroll", where)


def policy(remat: Any, where: str) -> Callable[..., Any] | None:
    """What `remat` keeps, as a policy of `jax.checkpoint`."""
    if isinstance(remat, (bool, np.bool_)):
        return None
    known = jax.checkpoint_policies
    if isinstance(remat, str):
        hint = (
            f": remat=jax.checkpoint_policies.{remat}" if hasattr(known, remat) else ""
        )
        raise TypeError(
            f"{where}: remat must be True, False or a policy, not {remat!r}. Give the "
            f"function{hint or ' of jax.checkpoint_policies'}."
        )
    if not callable(remat):
        raise TypeError(
            f"{where}: remat must be True, False or a policy such as "
            f"jax.checkpoint_policies.dots_saveable, not {remat!r}."
        )
    for name in _MAKERS_OF_POLICIES:
        if remat is getattr(known, name, None):
            raise TypeError(
                f"{where}: remat=jax.checkpoint_policies.{name} is no policy, but "
                f"makes one; as it is, it would keep everything. Call it with its "
                f"arguments: jax.checkpoint_policies.{name}(...)."
            )
    return remat


_MAKERS_OF_POLICIES = (
    "offload_dot_with_no_batch_dims",
    "save_and_offload_only_these_names",
    "save_any_names_but_these",
    "save_anything_except_these_names",
    "save_from_both_policies",
    "save_only_these_names",
)


def floating(dtype: Any, where: str) -> Any:
    """`dtype` as the floating-point type of a carry; None stays None."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = dtype
    if found is None or (
        isinstance(found, np.dtype) and jnp.issubdtype(found, jnp.floating)
    ):
        return found
    raise TypeError(
        f"{where}: carry_dtype must be a floating-point type such as jnp.bfloat16, "
        f"not {dtype!r}."
    )


def layer_function(f: Any, name: str, with_per_layer_inputs: bool) -> None:
    """Checks that `f` can be stacked."""
    if not callable(f):
        raise TypeError(
            f"layer_stack {name!r}: the layer function must be callable, not "
            f"{type(f).__name__}. Write layer_stack(num_layers)(layer_function)(x)."
        )
    _makes_values(f, name)
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except ValueError:  # Builtins have no signature.
        return
    starred = [p.name for p in parameters[:1] if p.kind is p.VAR_POSITIONAL]
    if starred and not with_per_layer_inputs:
        raise ValueError(
            f"{describe(name, f)}: the layer function takes *{starred[0]}, so it "
            "cannot be known what it carries from layer to layer. Name its arguments, "
            f"as in def {name_of(f)}(x, y), or pass one tuple."
        )


def _makes_values(f: Callable[..., Any], name: str) -> None:
    """Refuses what makes, once called, something else than arrays."""
    where, code = describe(name, f), _innermost(f)
    if isinstance(code, type):
        made = f"{code.__name__}(...)"
        raise TypeError(
            f"{where}: expected a function, found a class. Make an object of it, in "
            f"each layer: layer_stack(num_layers)(lambda x: {made}(x))(x)."
        )
    for is_kind, kind, instead in (
        (inspect.iscoroutinefunction, "coroutine function", "def for async def"),
        (inspect.isasyncgenfunction, "asynchronous generator", "def for async def"),
        (inspect.isgeneratorfunction, "generator function", "return for yield"),
    ):
        if is_kind(code) or is_kind(type(code).__call__):
            raise TypeError(
                f"{where}: a {kind} returns no arrays when it is called. Write "
                f"{instead}."
            )


def _innermost(f: Any) -> Any:
    return _innermost(f.func) if isinstance(f, functools.partial) else f


def only_function(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> None:
    """Checks that the second call of `layer_stack` takes the layer function alone."""
    if args or kwargs:
        more = [type(a).__name__ for a in args] + [f"{key}=..." for key in kwargs]
        raise TypeError(
            f"layer_stack {name!r}: the second call takes the layer function alone, "
            f"and was given {', '.join(more)} too. Write "
            "layer_stack(num_layers)(layer_function)(x)."
        )


def result(value: Any, where: str) -> None:
    """Checks that a layer function returns arrays."""
    for path, leaf in jax.tree.leaves_with_path(value):
        if isinstance(leaf, _ARRAYS) or hasattr(leaf, "__jax_array__"):
            continue
        at = f" (at {_path_name(path)})" if path else ""
        hint = ""
        if callable(leaf):
            hint = " Call it: what it returns then is meant, presumably."
        raise TypeError(
            f"{where}: the layer function must return arrays, but it returned a "
            f"{type(leaf).__name__}{at}.{hint}"
        )


_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def inside_transform(name: str, f: Callable[..., Any]) -> None:
    """Checks that a Haiku transform is running."""
    try:
        hk.experimental.current_name()
    except ValueError:
        raise ValueError(
            f"{describe(name, f)} was called outside of a Haiku transform. Call it "
            "inside the function that you give to hk.transform or "
            "hk.transform_with_state."
        ) from None


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
    return [_path_name(path) for path, _ in leaves]


def _path_name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def per_layer_inputs(
    per_layer: tuple[Any, ...], num_layers: int, names: Sequence[str], where: str
) -> None:
    """Checks that per-layer inputs are arrays `[L, ...]`."""
    for name, tree in zip(names, per_layer, strict=True):
        for path, leaf in jax.tree.leaves_with_path(tree):
            found = f"{where}: per-layer input `{name}`"
            if path:
                found += f" (at {_path_name(path)})"
            if not hasattr(leaf, "shape"):
                raise TypeError(
                    f"{found} is a Python {type(leaf).__name__} ({leaf!r}); expected "
                    f"an array with leading axis {num_layers}. Write "
                    "jnp.asarray([...]) for a list of numbers; pass what all layers "
                    "share by keyword."
                )
            if leaf.ndim == 0 or leaf.shape[0] != num_layers:
                raise ValueError(
                    f"{found} has shape {leaf.shape}; expected a leading axis of "
                    f"{num_layers}, one entry for each layer. Pass what all layers "
                    "share by keyword."
                )


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


@contextlib.contextmanager
def in_layer(
    where: str,
    index: int | None,
    doing: str,
    advise: Callable[[Exception], Iterable[str]],
) -> Iterator[None]:
    """Says in which stack an error came up, in which layer, and what to write."""
    try:
        yield
    except Exception as error:
        is_innermost = not any(n.startswith(_HERE) for n in _notes(error))
        advice = list(advise(error)) if is_innermost else []
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


def carried(args: Sequence[Any], names: Sequence[str], where: str) -> None:
    """Checks that what a stack is given by position are arrays."""
    for name, tree in zip(names, args, strict=True):
        by_keyword = (
            "expected an array. By keyword it stays as it is, and all layers share it: "
            f"stack(f)(x, {name}=...)."
        )
        arrays(tree, f"{where}: argument `{name}`", by_keyword)


def same_outputs(before: Any, after: Any, where: str) -> None:
    """Checks that a layer returns outputs of the structure of another layer's."""
    if before is not None and before != after:
        raise TypeError(
            f"{where}: outputs per layer are stacked, so all layers must return the "
            f"same pytree; one returned {before}, the next {after}."
        )


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


def is_pair(result: Any, where: str) -> None:
    """Checks what a layer function with per-layer inputs returned."""
    if not (isinstance(result, tuple) and len(result) == 2):
        found = "an array" if isinstance(result, jax.Array) else type(result).__name__
        if isinstance(result, (tuple, list)):
            found = f"a {found} of {len(result)}"
        raise TypeError(
            f"{where}: with_per_layer_inputs=True, the layer function must return a "
            f"pair (x, y), but it returned {found}. {_pair_advice(result)}"
        )


def _pair_advice(result: Any) -> str:
    if result is None:
        return _NO_RETURN
    if isinstance(result, (tuple, list)) and len(result) > 2:
        return "Return (x, (y, z)) if there are several outputs per layer."
    if isinstance(result, list):
        return "Return a tuple."
    return "Return (x, None) if there is no output per layer."


_NO_RETURN = "Is a `return` missing?"


def same_structure(
    before: tuple[Any, ...],
    after: Any,
    names: Sequence[str],
    where: str,
    with_per_layer_inputs: bool,
) -> None:
    """Checks that a layer returns the pytree that it was given."""
    old: Any = jax.tree.structure(before)
    new: Any = jax.tree.structure(after)
    if old == new:
        return
    took, returned = (before[0], after[0]) if len(before) == 1 else (before, after)
    names = names[: len(before)]
    advice = _structure_advice(took, returned, names, with_per_layer_inputs)
    raise TypeError(
        f"{where}: the layer function must return what it takes "
        f"({', '.join(names)}), as the next layer is given it: took "
        f"{jax.tree.structure(took)}, returned {jax.tree.structure(returned)}.{advice}"
    )


def _structure_advice(
    took: Any, returned: Any, names: Sequence[str], with_per_layer_inputs: bool
) -> str:
    """What to write for a result of another structure."""
    outputs = (
        " If there are outputs per layer, write layer_stack(num_layers, "
        "with_per_layer_inputs=True), and return (x, outputs)."
    )
    if not names:
        return (
            " Give what goes from layer to layer by position: stack(f)(x). What is "
            "given by keyword, all layers share."
        )
    if returned is None:
        return f" {_NO_RETURN}"
    if len(names) == 1:
        if isinstance(took, list):
            return (
                f" `{names[0]}` is a list, so + and * do what they do to lists. "
                f"jnp.asarray({names[0]}) makes one array of numbers, "
                f"jnp.stack({names[0]}) one of arrays."
            )
        is_more = isinstance(returned, tuple) and len(returned) > 1
        return outputs if is_more and not with_per_layer_inputs else ""
    if isinstance(returned, list) and len(returned) == len(names):
        return " Return a tuple, not a list."
    return (
        f" Return one value for each argument: ({', '.join(names)}). What all layers "
        f"share goes by keyword: stack(f)({names[0]}, {names[1]}=...).{outputs}"
    )


def same_carry(
    before: tuple[Any, ...], after: Any, names: Sequence[str], where: str
) -> None:
    """Checks that a layer keeps the shape and dtype of each leaf of the carry."""
    for i, name in enumerate(names[: len(before)]):
        old = jax.tree.leaves_with_path(before[i])
        new = jax.tree.leaves(after[i])
        for (path, x), y in zip(old, new, strict=True):
            if x.shape == y.shape and x.dtype == y.dtype:
                continue
            leaf = f"`{name}`" + (f" (at {_path_name(path)})" if path else "")
            raise TypeError(
                f"{where}: a layer must keep the shape and dtype of what it is given, "
                f"but {leaf} goes from {x.dtype}{list(x.shape)} to "
                f"{y.dtype}{list(y.shape)}. {_carry_advice(x, y)}"
            )


def _carry_advice(x: Any, y: Any) -> str:
    is_key = [jnp.issubdtype(v.dtype, jax.dtypes.prng_key) for v in (x, y)]
    if any(is_key):
        if all(is_key):
            return "Return a key of the kind that came in."
        return (
            "Return a key for a key, as of jax.random.split or fold_in; "
            "jax.random.wrap_key_data makes one of its data."
        )
    if x.shape != y.shape:
        return "Return the shape that came in, or change it outside of the stack."
    result = f"Cast the result with .astype(jnp.{x.dtype})"
    given = f"the input with .astype(jnp.{y.dtype})"
    old, new = (_rank(v.dtype) for v in (x, y))
    if old == new == _rank(np.float32):
        return (
            f"{result}, or {given}, or let the stack do so: carry_dtype=jnp.{x.dtype}."
        )
    if old < new == _rank(np.complex64):
        return f"Cast {given}, or return a part, as of jnp.real."
    return f"Cast {given}, or the result back." if old < new else f"{result}."


def _rank(dtype: Any) -> int:
    """Of the kind of numbers, each of which holds those before."""
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    return max(
        (i + 1 for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)),
        default=0,
    )


def depth(params: Any, state: Any, num_layers: int, where: str) -> None:
    """Checks that parameters and state are those of `num_layers` layers."""
    for kind, tree in (("parameter", params), ("state", state)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if leaf.ndim == 0 or leaf.shape[0] != num_layers:
                deep = f"of {leaf.shape[0]} layers" if leaf.ndim else "of no stack"
                raise ValueError(
                    f"{where}: {kind} {_path_name(path)} has shape {leaf.shape}; "
                    f"expected a leading axis of num_layers={num_layers}. If these are "
                    f"parameters {deep}, change num_layers. If they come from a Python "
                    "loop of layers, stack them with hk_stack.stack_params(params, "
                    "naming_map)."
                )


def not_sharded_by_layer(trees: Mapping[str, Any], where: str) -> None:
    """Checks that no type says that layers are on other devices than one another."""
    for kind, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            sharding = _equations.explicit(jax.typeof(leaf))
            if sharding and sharding.spec[0] is not None:
                whole = jax.sharding.PartitionSpec(None, *sharding.spec[1:])
                raise ValueError(
                    f"{where}: {kind} {_path_name(path)} is sharded over its layers, "
                    f"{jax.typeof(leaf).str_short()}, on a mesh axis of type Explicit; "
                    "a loop needs each layer on all devices. Write "
                    f"jax.sharding.reshard(leaf, jax.P{tuple(whole)}) before the "
                    "stack, or shard another axis, or make the mesh axis one of type "
                    "Auto."
                )


def has_params(
    init: Callable[..., Any],
    spec: tuple[Any, ...],
    params: Any,
    stored: Any,
    naming_map: hk.LayerStackTransparencyMapping | None,
    where: str,
    error: Exception,
) -> None:
    """Checks that `params` holds all that a layer asks for.

    Called once a layer has failed, as Haiku's own error for a parameter that is missing
    or of another shape knows nothing of the stack.

    Args:
      init: The layer's `init`.
      spec: What `init` takes.
      params: The layer's parameters.
      stored: All parameters of the transform, to show what there is instead.
      naming_map: Of a transparent stack.
      where: Names the stack.
      error: Why the layer failed. It is shown unless there is a better reason.
    """
    try:
        expected, _ = jax.eval_shape(init, *spec)
    except Exception as other:
        if where in str(other):
            raise other from None
        if str(other) != str(error):  # Else the layer fails for a reason of its own.
            error.add_note(
                f"{where}: whether the parameters are those of the layers could not be "
                f"checked, as it cannot be initialised ({other}). They hold: "
                f"{_some_leaves(stored)}."
            )
        return
    if params and _LACK in str(error):
        return  # A stack inside knows better.
    for module, leaves in expected.items():
        for name, leaf in leaves.items():
            found = params.get(module, {}).get(name)
            if found is None:
                raise ValueError(
                    f"{where}: {_LACK} {module}/{name}, of shape "
                    f"{leaf.shape} in each layer. They hold: {_some_leaves(stored)}. "
                    f"{_advice(expected, stored, module, naming_map)}"
                )
            if found.shape != leaf.shape:
                raise ValueError(
                    f"{where}: parameter {module}/{name} has shape {found.shape} "
                    f"in each layer; the layer function expects {leaf.shape}."
                )


_LACK = "the parameters lack"


def _some_leaves(stored: Any) -> str:
    names = leaf_names(stored)
    return ", ".join(names[:8]) + (", ..." if names[8:] else "") or "nothing"


def _advice(
    expected: Any,
    stored: Any,
    module: str,
    naming_map: hk.LayerStackTransparencyMapping | None,
) -> str:
    """What to do about a module of the layers that is missing."""
    if naming_map is not None:
        return (
            f"By the transparency_map, layer 0 has it as "
            f"{naming_map.stacked_to_flat(module, 0)}; give the map the names that the "
            "parameters have."
        )
    for path, num_layers in _stacks_of(expected, stored):
        return (
            f"All that the layers ask for is there for {num_layers} layers, in {path}: "
            f"if that is this stack, saved under another name, write "
            f"layer_stack({num_layers}, name={path.rpartition('/')[-1]!r})."
        )
    return (
        "If they come from a Python loop of layers, stack them with "
        "hk_stack.stack_params(params, naming_map), or store them per layer: "
        "transparent=True with a transparency_map."
    )


def _stacks_of(expected: Any, stored: Any) -> Iterator[tuple[str, int]]:
    """Modules that hold all `expected` parameters, stacked, and how many layers."""
    leaves = [(m, name, leaf) for m in expected for name, leaf in expected[m].items()]
    first = f"/{leaves[0][0]}"
    for path in (m.removesuffix(first) for m in stored if m.endswith(first)):
        found = [stored.get(f"{path}/{m}", {}).get(name) for m, name, _ in leaves]
        shapes = list(map(np.shape, found))
        depth = shapes[0][:1]
        if depth and shapes == [(*depth, *leaf.shape) for *_, leaf in leaves]:
            yield path, *depth


def nothing_shared(
    outside: Mapping[str, Mapping[str, Any]],
    captured: set[str],
    plain: Callable[[str], str],
    where: str,
) -> contextlib.AbstractContextManager[Any]:
    """Refuses parameters of a module that also has them outside of the stack.

    A module that was made outside has parameters of its own in each layer, so what
    looks shared would not be.

    Args:
      outside: Parameters of the transform around the stack.
      captured: Names of modules that were made outside and are used inside.
      plain: Gives the name of a module, from that which it has while it runs.
      where: Names the stack.
    """

    def on_get(next_getter: Any, value: Any, context: Any) -> Any:
        if not captured:
            return next_getter(value)
        owner = plain(context.module_name)
        comes_from = [n for n in captured if owner == n or owner.startswith(f"{n}/")]
        if comes_from and context.name in outside.get(owner, {}):
            raise ValueError(
                f"{where}: module {comes_from[0]!r} was made outside of the stack and "
                f"has the parameter {owner}/{context.name} there; inside, each layer "
                "would silently get one of its own. To share it, read the value "
                "outside and close over it; to have one per layer, make the module "
                "inside the layer function."
            )
        return next_getter(value)

    return hk.custom_getter(on_get)


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
        at = f"{what} (at {_path_name(path)})" if path else what
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
            at = f" (at {_path_name(path)})" if path else ""
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
            found.append(f"{_path_name(path)} by up to {most:.3g}")
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
            at = f"`{name}`" + (f" (at {_path_name(path)})" if path else "")
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
