"""Stacked and per-layer trees: one tree with leading axis `[L, ...]`, or L without."""

import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from hk_stack import _checks, _equations, _naming
from hk_stack._checks import path_name
from hk_stack._naming import NumberedLayers
from hk_stack._traceback import hidden

Modules = Mapping[str, Any]
_Converter = Callable[[Modules, Sequence[Modules]], dict[str, Any]]


@hidden
def stack_params(
    tree: Any, naming_map: _naming.Maps, *, per_layer: bool = False
) -> Any:
    """Stacks the parameters (or state, or optimiser state) of a Python loop of layers.

    Equal to this loop, for each stacked module `m` and leaf `w`; modules that the map
    does not know stay as they are:

    ```
    stacked[m][w] = jnp.stack(
        [params[naming_map.stacked_to_flat(m, i)][w] for i in range(L)]
    )
    ```

    >>> import numpy as np
    >>> w = np.ones([8, 8])
    >>> of_loop = {"embed": {"w": w}, "h_0/linear": {"w": w}, "h_1/linear": {"w": w}}
    >>> of_stack = stack_params(of_loop, NumberedLayers("h_{}", "layers"))
    >>> {module: leaves["w"].shape for module, leaves in of_stack.items()}
    {'embed': (8, 8), 'layers/linear': (2, 8, 8)}

    Args:
      tree: Haiku's parameters or state, or any pytree that holds such trees: optimiser
        states of optax, or params, state and optimiser state together. Leaves without a
        layer axis; numpy or JAX arrays, or `jax.ShapeDtypeStruct`s. JAX arrays may be
        sharded.
      naming_map: Which per-layer module belongs to which layer of which stacked module;
        or a sequence of maps, of which the first that knows a module names it.
      per_layer: Whether optimiser states are for `hk_stack.per_layer`, to which each
        layer is a parameter of its own: then whatever an optimiser keeps for a
        parameter can be stacked.

    Returns:
      The same tree with leaves `[L, ...]` of the same kind, by stacked module name.
      Leaves outside of the stack are those of `tree`, not copies. What an optimiser
      does by a parameter's number of axes, it does to a stack with one axis more,
      unless `hk_stack.per_layer` is around it.

    Raises:
      ValueError: If no module of the tree is known to a map, two modules claim one
        layer, a layer misses a leaf, the layers' leaves differ in shape or dtype, or
        an optimiser keeps something else than one number for each parameter and
        `per_layer` is not said.
    """
    _checks.flag(per_layer, "per_layer", "stack_params")
    names = _naming.naming_map(naming_map, "naming_map", "stack_params")

    def convert(modules: Modules, _: Sequence[Modules]) -> dict[str, Any]:
        rest = {m: modules[m] for m in modules if not _naming.is_layer(names, m)}
        taken = [m for m in rest if _naming.is_stacked(names, m)]
        _none_taken(taken, "stack_params", _naming.as_haiku_counts(names))
        return rest | stack_modules(modules, names)

    what = "stack_params"
    return _convert(tree, names, _naming.is_layer, convert, what, per_layer)


@hidden
def unstack_params(
    tree: Any,
    naming_map: _naming.Maps,
    num_layers: int | None = None,
    *,
    per_layer: bool = False,
) -> Any:
    """Splits the parameters (or state) of a stack into those of each layer.

    The inverse of `stack_params`, bit for bit:

    >>> import numpy as np
    >>> embed, linear = {"w": np.ones([8, 8])}, {"b": np.ones([2, 8])}
    >>> of_stack = {"embed": embed, "layers/linear": linear}
    >>> of_loop = unstack_params(of_stack, NumberedLayers("h_{}", "layers"))
    >>> {module: list(leaves) for module, leaves in of_loop.items()}
    {'embed': ['w'], 'h_0/linear': ['b'], 'h_1/linear': ['b']}

    Args:
      tree: As in `stack_params`, with leaves `[L, ...]` by stacked module name.
      naming_map: As in `stack_params`.
      num_layers: `L`, if it should not be read off the tree.
      per_layer: As in `stack_params`.

    Returns:
      The same tree with leaves without a layer axis, by per-layer module name. Those of
      numpy arrays are views.

    Raises:
      ValueError: If no module of the tree is known to a map, two layers map to one
        module, or leaves are of different depth.
    """
    _checks.flag(per_layer, "per_layer", "unstack_params")
    names = _naming.naming_map(naming_map, "naming_map", "unstack_params")
    if num_layers is not None:
        num_layers = _checks.positive(num_layers, "num_layers", "unstack_params")

    def convert(modules: Modules, trees: Sequence[Modules]) -> dict[str, Any]:
        is_stacked = {m: _naming.is_stacked(names, m) for m in modules}
        flat = {m: modules[m] for m in modules if not is_stacked[m]}
        stacks: dict[Hashable, dict[str, Any]] = {}
        for module in filter(is_stacked.get, modules):
            stack = stacks.setdefault(_naming.stack_of(names, module), {})
            stack[module] = modules[module]
        for members in stacks.values():
            depth = _depth(members, trees, num_layers, names)
            layers = unstack_modules(members, names, depth)
            _none_taken(sorted(flat.keys() & layers.keys()), "unstack_params")
            flat |= layers
        return flat

    what = "unstack_params"
    return _convert(tree, names, _naming.is_stacked, convert, what, per_layer)


def stack_modules(modules: Modules, names: _naming.Map) -> dict[str, Any]:
    """The stacked modules, without those that the map does not know.

    Raises:
      ValueError: As `stack_params`.
    """
    layers = _by_layer(modules, names)
    depths: dict[Hashable, int] = {}
    for module, found in layers.items():
        stack = _naming.stack_of(names, module)
        depths[stack] = max(depths.get(stack, 0), 1 + max(found))
    for module, found in layers.items():
        _check_layers(module, found, depths[_naming.stack_of(names, module)], names)
    return {
        module: jax.tree.map(_stack, *(found[i] for i in sorted(found)))
        for module, found in layers.items()
    }


def unstack_modules(
    modules: Modules, names: _naming.Map, num_layers: int
) -> dict[str, Any]:
    """The modules of each layer, for a tree that holds the stack's modules only.

    Raises:
      ValueError: As `unstack_params`.
    """
    flat: dict[str, Any] = {}
    for module, leaves in modules.items():
        for i, of_layer in enumerate(_unstack(leaves, num_layers)):
            name = names.stacked_to_flat(module, i)
            if name in flat:
                raise ValueError(
                    f"unstack_params: layer {i} of {module} maps to {name}, which "
                    "another layer has taken. Give each layer a name of its own."
                )
            flat[name] = of_layer
    return flat


def drop_layers(tree: Any) -> Any:
    """The types of the leaves `[L, ...]` of `tree` without their `L`."""
    # Unlike a `jax.ShapeDtypeStruct` these types can be traced in a `jax.shard_map`.
    return jax.tree.map(lambda leaf: _equations.of_row(jax.typeof(leaf)), tree)


# Whole trees


def _convert(
    tree: Any,
    names: _naming.Map,
    is_known: Callable[[_naming.Map, str], bool],
    convert: _Converter,
    what: str,
    per_layer: bool,
) -> Any:
    """`tree` with all trees of modules in it converted, wherever they are.

    `convert` takes one of them, and all.
    """

    def is_modules(node: Any) -> bool:
        return isinstance(node, Mapping) and any(
            isinstance(name, str) and is_known(names, name) and _is_module(leaves)
            for name, leaves in node.items()
        )

    nodes, structure = jax.tree.flatten_with_path(tree, is_leaf=is_modules)
    # In old checkpoints of Haiku, modules are no dictionaries.
    found = {
        path: {name: _plain(leaves) for name, leaves in node.items()}
        for path, node in nodes
        if is_modules(node)
    }
    known = dict.fromkeys(name for modules in found.values() for name in modules)
    for one in _naming.maps_of(names):
        if not any(is_known(one, name) for name in known):
            raise ValueError(
                f"{what} with {one}: no module of the tree belongs to the stack. It "
                f"holds: {_some_modules(tree)}. Write names as the tree does, from the "
                "outermost module on ('*' stands for one), or is the tree converted "
                "already?"
            )
    if not per_layer:
        _no_other_shapes(found, f"{what} with {names}")
    new = {path: convert(node, list(found.values())) for path, node in found.items()}
    converted = [new.get(path, node) for path, node in nodes]
    return jax.tree.unflatten(structure, converted)


def _is_module(leaves: Any) -> bool:
    return isinstance(leaves, Mapping) or not jax.tree.leaves(leaves)


def _plain(leaves: Any) -> Any:
    return dict(leaves) if isinstance(leaves, Mapping) else leaves


def _some_modules(tree: Any) -> str:
    """Names that a tree holds where modules should be."""
    names: dict[str, None] = {}
    for path, _ in jax.tree.leaves_with_path(tree):
        keys = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        names.update(dict.fromkeys(map(str, keys[-2:][:1])))
    return _listed(list(names)[:_MOST], len(names)) or "no modules"


_MOST = 8  # names in an error


def _listed(names: Sequence[str], count: int) -> str:
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return ", ".join(names) + more


def _no_other_shapes(found: Mapping[Any, Modules], what: str) -> None:
    """Refuses optimiser states that stacking would change the meaning of.

    Trees with the leaf names of the parameters (`mu`, `nu`) must have their shapes too:
    an optimiser that keeps norms or factors of a parameter takes a stack of layers for
    one parameter, and keeps others.
    """
    seen: dict[Any, tuple[str, str]] = {}
    for path, modules in found.items():
        places = frozenset(place for place, _ in _leaves(modules))
        for place, leaf in _leaves(modules):
            if not jax.tree.leaves(leaf):
                continue
            shape = str(jax.tree.map(np.shape, leaf))  # Of sm3, a list of them.
            at = f"{keystr(path)}[{place[0]!r}][{place[1]!r}]"
            first, expected = seen.setdefault((places, place), (at, shape))
            if shape != expected:
                raise ValueError(
                    f"{what}: {first} has shape {expected}, and {at} has shape "
                    f"{shape}. If this is the state of an optimiser, it keeps "
                    "something else than one number for each parameter, and would "
                    "keep another for a stack of layers: go on with "
                    "hk_stack.per_layer(optimiser, layer_axes), which keeps the same, "
                    f"and write {what.split()[0]}(..., per_layer=True); or convert the "
                    "parameters, and start its state anew with "
                    "optimiser.init(params). If these are two models, convert them one "
                    "by one."
                )


def _none_taken(taken: Sequence[str], what: str, as_haiku_counts: str = "") -> None:
    if taken:
        if as_haiku_counts:
            as_haiku_counts = f" If it is the first layer, write {as_haiku_counts}."
        raise ValueError(
            f"{what}: the name {taken[0]} is taken by a module that is no part of the "
            "stack. Give the stack another name, NumberedLayers(per_layer, stacked), "
            f"or is the tree converted already?{as_haiku_counts}"
        )


# Stacks


def _leaves(modules: Modules) -> Iterator[tuple[tuple[str, str], Any]]:
    """What modules hold, by module and name: arrays, or trees of an optimiser's."""
    for module, tree in modules.items():
        is_inside = functools.partial(operator.is_not, tree)
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_inside):
            yield (module, path_name(path)), leaf


def _by_layer(modules: Modules, names: _naming.Map) -> dict[str, dict[int, Any]]:
    """Per-layer modules, by their name in the stack and their layer."""
    layers: dict[str, dict[int, Any]] = {}
    for name, leaves in modules.items():
        place = names.flat_to_stacked(name)
        if place is None:
            continue
        module, layer = place
        taken = layers.setdefault(module, {})
        if layer in taken:
            raise ValueError(
                f"stack_params: {name} maps to layer {layer} of {module}, which "
                "another module has taken. Give each layer a name of its own in the "
                "naming map."
            )
        taken[layer] = leaves
    return layers


def _depth(
    members: Modules,
    trees: Sequence[Modules],
    num_layers: int | None,
    names: _naming.Map,
) -> int:
    """How many layers the modules of a stack have.

    The leaves of optimiser states may all be masked. Those of `trees` that have the
    same modules, such as the parameters, tell then.
    """
    depth = _leading_axis(members, num_layers)
    if depth is None:
        alike = [tree for tree in trees if members.keys() <= tree.keys()]
        found = [_leading_axis({m: tree[m] for m in members}, None) for tree in alike]
        depths = {depth for depth in found if depth is not None}
        depth = depths.pop() if len(depths) == 1 else None
    module = next(iter(members))
    if depth is None:
        raise ValueError(
            f"unstack_params: no array says how many layers {module} has. "
            "Convert the parameters together with this tree, or give num_layers: "
            "unstack_params(tree, naming_map, num_layers)."
        )
    one = _naming.map_of(names, module)
    if isinstance(one, NumberedLayers) and depth > (one.num_layers or depth):
        raise ValueError(
            f"unstack_params: the tree holds {depth} layers, more than {one}. Give the "
            f"map num_layers={depth}, or leave it out."
        )
    return depth


def _leading_axis(modules: Modules, num_layers: int | None) -> int | None:
    """The leading axis of all leaves of a stack, if there are any."""
    says = "num_layers"
    for path, leaf in jax.tree.leaves_with_path(dict(modules)):
        place, shape = path_name(path), np.shape(leaf)
        if num_layers is None and shape:
            says, num_layers = f"{place} of shape {shape}", shape[0]
        if shape[:1] != (num_layers,):
            depth = "" if num_layers is None else f" of {num_layers}, as {says} says"
            raise ValueError(
                f"unstack_params: {place} has shape {shape}; expected a leading axis "
                f"of layers{depth}. Are all modules of that name part of the stack, "
                "and stacked?"
            )
    return num_layers


def _check_layers(
    module: str, layers: Mapping[int, Any], depth: int, names: _naming.Map
) -> None:
    """Checks that all layers of a module are there, and can be stacked."""
    types: dict[str, dict[int, Any]] = {}
    for i, tree in sorted(layers.items()):
        for (_, name), leaf in _leaves({module: tree}):
            of_leaf = types.setdefault(f"/{name}" if name else "", {})
            of_leaf[i] = jax.tree.map(_type_of, leaf)
    for name, found in types.items():
        if len(found) < depth:
            raise ValueError(_missing(module, name, found, depth, names))
        odd = next((i for i in range(depth) if found[i] != found[0]), 0)
        if odd == 0:
            continue
        one, other = (names.stacked_to_flat(module, i) + name for i in (odd, 0))
        alike = "the same shapes and dtypes"
        if len({str(jax.tree.structure(found[i])) for i in (odd, 0)}) > 1:
            alike = (
                "one structure; what masks or labels parameters for an optimiser must "
                "treat them alike"
            )
        raise ValueError(
            f"stack_params: {one} is {found[odd]}, {other} is {found[0]}. All layers "
            f"of a stack must have {alike}."
        )


def _missing(
    module: str, name: str, found: Mapping[int, Any], depth: int, names: _naming.Map
) -> str:
    """What to say of a leaf that only some layers have, and what to do about it."""
    missing = (i for i in range(depth) if i not in found)
    some = list(itertools.islice(missing, _MOST))  # Of a wrong number, not millions.
    first, count = some[0], depth - len(found)
    listed = _listed([names.stacked_to_flat(module, i) + name for i in some], count)
    advice = ""
    if _naming.map_of(names, module) is not names:
        advice = "Of several maps, give first the one for fewer modules."
    elif isinstance(names, NumberedLayers):
        if first == 0 and count == 1:
            advice = "Layers are numbered from 0."
        elif first > 0 and count == depth - first:
            advice = (
                "To leave a remainder outside of the stack, give the naming map "
                f"num_layers={first}."
            )
        elif len(names.stacked) == 1:
            advice = (
                "For blocks that take turns, give the naming map a pattern of names."
            )
    return (
        f"stack_params: {module}{name} has {len(found)} of {depth} layers; missing: "
        f"{listed}. {advice}"
    ).rstrip()


def _type_of(leaf: Any) -> str:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return f"{dtype}{list(np.shape(leaf))}"


# Leaves


def _stack(*leaves: Any) -> Any:
    """`jnp.stack` for leaves of any kind."""
    first = leaves[0]
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        shape = (len(leaves), *first.shape)
        return jax.ShapeDtypeStruct(shape, first.dtype, sharding=_stacked_on(leaves))
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if is_traced or all(isinstance(leaf, jax.Array) for leaf in leaves):
        return jax.jit(_stack_arrays, out_shardings=_stacked_on(leaves))(*leaves)
    stacked = empty((len(leaves), *np.shape(first)), np.asarray(first).dtype)
    for i, leaf in enumerate(leaves):
        stacked[i] = leaf
    return stacked


def _stack_arrays(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves)


def _unstack(tree: Any, num_layers: int) -> list[Any]:
    """`[tree[i] for i in range(L)]` for leaves of any kind."""

    def layer(leaf: Any, i: int) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            sharding = _sharding(leaf, lambda spec: spec[1:])
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
        # Not leaf[i], which of numpy's scalars is no view.
        return leaf[i] if isinstance(leaf, jax.Array) else leaf[i, ...]

    leaves, structure = jax.tree.flatten(jax.tree.map(_not_sharded_by_layer, tree))
    layers = ([layer(leaf, i) for leaf in leaves] for i in range(num_layers))
    return [jax.tree.unflatten(structure, of_layer) for of_layer in layers]


def _not_sharded_by_layer(leaf: Any) -> Any:
    """`leaf` with all layers on each device, if JAX would not do so by itself."""
    if not isinstance(leaf, jax.Array):
        return leaf
    sharding = jax.typeof(leaf).sharding  # Has the axes of a mesh that are explicit.
    if sharding.spec[:1] in ((), (None,)):
        return leaf
    spec = jax.sharding.PartitionSpec(None, *sharding.spec[1:])
    on_each = jax.sharding.NamedSharding(sharding.mesh, spec)
    return jax.sharding.reshard(leaf, on_each)


def _stacked_on(leaves: Sequence[Any]) -> jax.sharding.Sharding | None:
    """The sharding of a stack of leaves, if they say how they are sharded."""
    first, *others = {_sharding(leaf, lambda spec: (None, *spec)) for leaf in leaves}
    return None if others else first


def _sharding(
    leaf: Any, change: Callable[[Any], Sequence[Any]]
) -> jax.sharding.Sharding | None:
    """The sharding of a leaf, if it says one, with the axes that `change` gives."""
    if isinstance(leaf, jax.core.Tracer) or not hasattr(leaf, "sharding"):
        return None
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*change(sharding.spec))
        kind = sharding.memory_kind
        return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=kind)
    # Arrays that are bound to no device stay so.
    is_bound = isinstance(leaf, jax.ShapeDtypeStruct)
    is_single = isinstance(sharding, jax.sharding.SingleDeviceSharding)
    return sharding if is_bound and is_single else None


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array to fill, which `jax.device_put` takes over on a CPU without a copy."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    array: np.ndarray = buffer[start : start + nbytes].view(dtype)
    return array.reshape(tuple(shape))


_ALIGNMENT = 64
