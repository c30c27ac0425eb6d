"""What users of a stack can get wrong, and what the errors say.

Each message names the stack and the layer function, says what was found and what was
expected, and what to write instead.
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from hk_stack import equations


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
        hint = (
            " The layer function comes in the second call: "
            "layer_stack(num_layers)(layer_function)(x)."
        )
        raise TypeError(
            f"{where}: {argument} must be a positive int, not {value!r} "
            f"({type(value).__name__}).{hint if callable(value) else ''}"
        ) from None
    if number < 1:
        hint = " A stack of no layers is the identity: leave it out."
        raise ValueError(
            f"{where}: {argument} must be a positive int, not {number}."
            f"{hint if argument == 'num_layers' else ''}"
        )
    return number


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
) -> None:
    """Checks that what `collect` was asked for is there."""
    if not found and tuple(patterns) != ("*",):
        raise ValueError(
            f"hk_stack.collect: no tap matches {select!r}. collect(fn) without a "
            "selection returns all there are; hk_stack.tap(value, name) makes one."
        )
    if lost:
        raise ValueError(
            f"hk_stack.collect: nothing was added at {', '.join(lost)}, as there is no "
            "such tap. collect(fn) returns all there are, by path."
        )


@contextlib.contextmanager
def in_layer(where: str, index: int | None, doing: str = "") -> Iterator[None]:
    """Says in which stack an error came up, and in which layer if it has an index."""
    try:
        yield
    except Exception as error:
        if index is not None:
            error.add_note(f"This was in layer {index} of {where}.")
        elif where not in str(error):
            error.add_note(f"This was in {where}, {doing}.")
        raise


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
            f"pair (x, y), but it returned {found}. Return (x, None) if there is no "
            "output per layer."
        )


def same_structure(
    before: tuple[Any, ...], after: Any, names: Sequence[str], where: str
) -> None:
    """Checks that a layer returns the pytree that it was given."""
    old: Any = jax.tree.structure(before)
    new: Any = jax.tree.structure(after)
    if old == new:
        return
    if len(before) == 1:
        old, new = jax.tree.structure(before[0]), jax.tree.structure(after[0])
    raise TypeError(
        f"{where}: the layer function must return what it takes "
        f"({', '.join(names[: len(before)])}), as the next layer is given it: took "
        f"{old}, returned {new}."
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
    if x.shape == y.shape:
        return (
            f"Cast the result with .astype(x.dtype), or the input to {y.dtype}, or let "
            f"the stack do so: carry_dtype=jnp.{x.dtype}."
        )
    return "Return the shape that came in, or change it outside of the stack."


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
            sharding = equations.explicit(jax.typeof(leaf))
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


def arrays(tree: Any, what: str) -> None:
    """Checks that all leaves are arrays, their types, or Python numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        at = f"{what} (at {_path_name(path)})" if path else what
        if isinstance(leaf, getattr(jax, "Ref", ())):
            raise TypeError(f"{at} is a jax.Ref; expected an array. Read it before.")
        is_number = isinstance(leaf, (int, float, complex))
        is_text = getattr(getattr(leaf, "dtype", None), "kind", "f") in "OSU"
        if is_text or not (hasattr(leaf, "shape") or is_number):
            raise TypeError(
                f"{at} is a {type(leaf).__name__} ({leaf!r}); expected arrays or "
                "jax.ShapeDtypeStructs. Bind static arguments before, as in "
                "functools.partial(fn, is_training=True)."
            )


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
