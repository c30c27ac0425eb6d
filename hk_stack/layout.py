"""Stacked and per-layer trees: one tree with leading axis `[L, ...]`, or L without.

A naming map (Haiku's `hk.LayerStackTransparencyMapping`) says which module of layer i
goes with which stacked module. `NumberedLayers` is the one for numbered names.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

Modules = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class NumberedLayers(hk.LayerStackTransparencyMapping):
    """A naming map for numbered layers: `block_0/linear`, `block_1/linear`, ...

    >>> names = NumberedLayers("blocks/block_{}", "blocks/block")
    >>> names.stacked_to_flat("blocks/block/linear", 3)
    'blocks/block_3/linear'
    >>> names.flat_to_stacked("blocks/block_3/linear")
    ('blocks/block/linear', 3)
    >>> names.flat_to_stacked("embed")  # no part of the stack

    It serves `stack_params`, `unstack_params`, and transparent stacks of both
    `hk.layer_stack` and `hk_stack.layer_stack`. Nested stacks take one map for each
    level: `NumberedLayers("outer_*/inner_{}", "outer_*/inner")`, then
    `NumberedLayers("outer_{}", "outer")`.

    Attributes:
      per_layer: Name of the layers' modules in a per-layer tree; modules inside of them
        follow. `{}` stands for the layer's number, from 0. Without it, the last part is
        numbered as Haiku numbers modules of one name: `linear`, `linear_1`, `linear_2`.
        `*` stands for any text without a slash, which is the same in `stacked`.
      stacked: Their name in the stacked tree; by default `per_layer` without `_{}`. A
        sequence of k names is a pattern of blocks that a layer of the stack holds:
        numbers `k i` to `k i + k - 1` belong to layer i.
      num_layers: `L`; larger numbers are no part of the stack. Needed only where some
        are left over, as in 26 blocks in a pattern of three: 8 layers, and 2 blocks.
    """

    per_layer: str
    stacked: str | Sequence[str] = ()
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.per_layer, str) or not self.per_layer:
            raise TypeError(
                f"NumberedLayers: expected a name such as 'block_{{}}', found "
                f"{self.per_layer!r}."
            )
        names = (self.stacked,) if isinstance(self.stacked, str) else self.stacked
        default = re.sub(r"[_/.]?\{\}", "", self.per_layer)
        object.__setattr__(self, "stacked", tuple(names) or (default,))
        if self.per_layer.count("{}") > 1:
            raise ValueError(
                f"NumberedLayers: {self.per_layer!r} has more than one '{{}}'. Nested "
                "stacks take one map for each level, with '*' for the other numbers: "
                "'outer_*/inner_{}', then 'outer_{}'."
            )
        for name in self.stacked:
            if name.count("*") != self.per_layer.count("*") or "{}" in name:
                raise ValueError(
                    f"NumberedLayers: the stacked name {name!r} must have no '{{}}', "
                    f"and as many '*' as {self.per_layer!r}."
                )
        if len(set(self.stacked)) < len(self.stacked):
            raise ValueError(
                f"NumberedLayers: two blocks of the pattern {self.stacked} have one "
                "name. Give each a name of its own."
            )

    def stacked_to_flat(self, stacked_module_name: str, scan_idx: int) -> str:
        """The name of a stacked module in layer `scan_idx`.

        Raises:
          ValueError: If the module is no part of the stack.
        """
        for position, name in enumerate(self.stacked):
            match = re.fullmatch(_pattern(name, ""), stacked_module_name)
            if match:
                *texts, inside = match.groups()
                number = scan_idx * len(self.stacked) + position
                flat = _numbered(self.per_layer, number).replace("*", "{}")
                return flat.format(*texts) + (inside or "")
        raise ValueError(
            f"{self}: {stacked_module_name!r} is no part of the stack; expected "
            f"{' or '.join(map(repr, self.stacked))}, or a module in it. Give the "
            "stacked name as second argument: NumberedLayers(per_layer, stacked)."
        )

    def flat_to_stacked(self, unstacked_module_name: str) -> tuple[str, int] | None:
        """The stacked module and the layer of a per-layer one; None if it has none."""
        number = r"(?P<number>0|[1-9]\d*)"
        habit = r"(?:_(?P<number>[1-9]\d*))?"
        has_number = "{}" in self.per_layer
        template = self.per_layer if has_number else f"{self.per_layer}{{}}"
        pattern = _pattern(template, number if has_number else habit)
        match = re.fullmatch(pattern, unstacked_module_name)
        if match is None:
            return None
        layer, position = divmod(int(match["number"] or 0), len(self.stacked))
        if self.num_layers is not None and layer >= self.num_layers:
            return None
        texts = [match[f"text{i}"] for i in range(self.per_layer.count("*"))]
        stacked = self.stacked[position].replace("*", "{}").format(*texts)
        return stacked + (match["inside"] or ""), layer

    def stack_of(self, stacked_module_name: str) -> tuple[str, ...]:
        """Tells apart stacks that one map serves: what `*` stands for."""
        for name in self.stacked:
            match = re.fullmatch(_pattern(name, ""), stacked_module_name)
            if match:
                return match.groups()[:-1]
        return ()

    def __str__(self) -> str:
        names = self.stacked[0] if len(self.stacked) == 1 else self.stacked
        more = f", num_layers={self.num_layers}" if self.num_layers is not None else ""
        return f"NumberedLayers({self.per_layer!r}, {names!r}{more})"


def _pattern(template: str, number: str) -> str:
    """A regular expression for a module of `template`, or one inside of it."""
    parts = re.split(r"(\{\}|\*)", template)
    texts = itertools.count()
    written = {"{}": lambda: number, "*": lambda: f"(?P<text{next(texts)}>[^/]*)"}
    escaped = (written[p]() if p in written else re.escape(p) for p in parts)
    return "".join(escaped) + "(?P<inside>/.*)?"


def _numbered(template: str, number: int) -> str:
    """`template` with a number in it: its own way, or Haiku's."""
    if "{}" in template:
        return template.replace("{}", str(number))
    return f"{template}_{number}" if number else template


def stack_params(tree: Any, naming_map: hk.LayerStackTransparencyMapping) -> Any:
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
      naming_map: Which per-layer module belongs to which layer of which stacked module.

    Returns:
      The same tree with leaves `[L, ...]` of the same kind, by stacked module name.

    Raises:
      ValueError: If no module of the tree is known to the map, two modules claim one
        layer, a layer misses a leaf, the layers' leaves differ in shape or dtype, or
        an optimiser keeps something else than one number for each parameter.
    """

    def has_layers(module: str) -> bool:
        return naming_map.flat_to_stacked(module) is not None

    def convert(modules: Modules) -> dict[str, dict[str, Any]]:
        rest = {m: dict(leaves) for m, leaves in modules.items() if not has_layers(m)}
        return _joined(rest, stack_modules(modules, naming_map), "stack_params")

    return _convert(tree, has_layers, convert, f"stack_params with {naming_map}")


def unstack_params(
    tree: Any,
    naming_map: hk.LayerStackTransparencyMapping,
    num_layers: int | None = None,
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
      naming_map: Which per-layer module belongs to which layer of which stacked module.
      num_layers: `L`, if it should not be read off the tree.

    Returns:
      The same tree with leaves without a layer axis, by per-layer module name. Those of
      numpy arrays are views.

    Raises:
      ValueError: If no module of the tree is known to the map, two layers map to one
        module, or leaves are of different depth.
    """

    def is_stacked(module: str) -> bool:
        try:
            flat = naming_map.stacked_to_flat(module, 0)
        except ValueError:
            return False
        return naming_map.flat_to_stacked(flat) == (module, 0)

    def convert(modules: Modules) -> dict[str, dict[str, Any]]:
        rest = {m: dict(leaves) for m, leaves in modules.items() if not is_stacked(m)}
        of_stack = {m: leaves for m, leaves in modules.items() if m not in rest}
        flat: dict[str, dict[str, Any]] = {}
        for members in _stacks(naming_map, of_stack):
            depth = _depth(members, num_layers)
            flat = _joined(flat, unstack_modules(members, naming_map, depth), "unstack")
        return _joined(rest, flat, "unstack_params")

    return _convert(tree, is_stacked, convert, f"unstack_params with {naming_map}")


def stack_modules(
    modules: Modules, naming_map: hk.LayerStackTransparencyMapping
) -> dict[str, dict[str, Any]]:
    """The stacked modules, without those that the map does not know.

    Raises:
      ValueError: As `stack_params`.
    """
    stacked: dict[str, dict[str, Any]] = {}
    layers = _by_layer(modules, naming_map)
    depths: dict[Any, int] = {}
    for (module, _), found in layers.items():
        stack = _stack_of(naming_map, module)
        depths[stack] = max(depths.get(stack, 0), 1 + max(found))
    for (module, name), found in layers.items():
        depth = depths[_stack_of(naming_map, module)]
        flat_names = [
            f"{naming_map.stacked_to_flat(module, i)}/{name}" for i in range(depth)
        ]
        missing = [flat_names[i] for i in range(depth) if i not in found]
        if missing:
            raise ValueError(
                f"stack_params: {module}/{name} has {len(found)} of {depth} layers; "
                f"missing: {', '.join(missing)}.{_advice(naming_map, found)}"
            )
        trees = [found[i] for i in range(depth)]
        _same_types(trees, flat_names)
        stacked.setdefault(module, {})[name] = jax.tree.map(_stack, *trees)
    return stacked


def unstack_modules(
    modules: Modules, naming_map: hk.LayerStackTransparencyMapping, num_layers: int
) -> dict[str, dict[str, Any]]:
    """The modules of each layer, for a tree that holds the stack's modules only.

    Raises:
      ValueError: As `unstack_params`.
    """
    flat: dict[str, dict[str, Any]] = {}
    for module, leaves in modules.items():
        split = {name: _unstack(leaf, num_layers) for name, leaf in leaves.items()}
        for i in range(num_layers):
            flat_name = naming_map.stacked_to_flat(module, i)
            if flat_name in flat:
                raise ValueError(
                    f"unstack_params: layer {i} of {module} maps to {flat_name}, which "
                    "another layer has taken. Give each layer a name of its own."
                )
            flat[flat_name] = {name: of_layer[i] for name, of_layer in split.items()}
    return flat


def drop_layers(tree: Any) -> Any:
    """The types of the leaves `[L, ...]` of `tree` without their `L`."""

    def first(leaf: jax.Array) -> jax.Array:
        return jax.lax.index_in_dim(leaf, 0, keepdims=False)

    return jax.eval_shape(lambda tree: jax.tree.map(first, tree), tree)


# Whole trees


def _convert(
    tree: Any,
    is_known: Callable[[str], bool],
    convert: Callable[[Modules], Any],
    what: str,
) -> Any:
    """`tree` with all trees of modules in it converted, wherever they are."""

    def is_modules(node: Any) -> bool:
        return (
            isinstance(node, Mapping)
            and all(isinstance(leaves, Mapping) for leaves in node.values())
            and any(isinstance(name, str) and is_known(name) for name in node)
        )

    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_modules)
    found = [(path, node) for path, node in nodes if is_modules(node)]
    if not found:
        raise ValueError(
            f"{what}: no module of the tree belongs to the stack. It holds: "
            f"{_some_modules(tree)}."
        )
    _no_other_shapes(found, what)
    return jax.tree.map(
        lambda node: convert(node) if is_modules(node) else node,
        tree,
        is_leaf=is_modules,
    )


def _some_modules(tree: Any, most: int = 8) -> str:
    """Names that a tree holds where modules should be."""
    names: dict[str, None] = {}
    for path, _ in jax.tree.leaves_with_path(tree):
        keys = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        names.update(dict.fromkeys(map(str, keys[-2:-1])))
    listed = ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")
    return listed or "none"


def _no_other_shapes(found: Sequence[tuple[Any, Modules]], what: str) -> None:
    """Refuses optimiser states that stacking would change the meaning of.

    Trees with the leaf names of the parameters (`mu`, `nu`) must have their shapes too:
    an optimiser that keeps norms or factors of a parameter takes a stack of layers for
    one parameter, and keeps others.
    """
    shapes: dict[Any, tuple[str, Any]] = {}
    for path, modules in found:
        names = tuple((m, tuple(leaves)) for m, leaves in sorted(modules.items()))
        for module, leaves in modules.items():
            for name, leaf in leaves.items():
                if not hasattr(leaf, "shape"):
                    continue
                at = f"{jax.tree_util.keystr(path)}[{module!r}][{name!r}]"
                first = shapes.setdefault((names, module, name), (at, leaf.shape))
                if first[1] != leaf.shape:
                    raise ValueError(
                        f"{what}: {first[0]} has shape {first[1]}, and {at} has shape "
                        f"{leaf.shape}. This optimiser keeps something else than one "
                        "number for each parameter, and would keep another for a stack "
                        "of layers. Convert the parameters, and start its state anew: "
                        "optimiser.init(params)."
                    )


def _joined(first: dict[str, Any], second: dict[str, Any], what: str) -> dict[str, Any]:
    taken = sorted(first.keys() & second.keys())
    if taken:
        raise ValueError(
            f"{what}: the name {taken[0]} is taken by a module that is no part of the "
            "stack. Choose other names in the naming map."
        )
    return first | second


# Stacks


class _Place(NamedTuple):
    module: str
    leaf: str


def _by_layer(
    modules: Modules, naming_map: hk.LayerStackTransparencyMapping
) -> dict[_Place, dict[int, Any]]:
    """Leaves of per-layer modules, by their place in the stack and their layer."""
    layers: dict[_Place, dict[int, Any]] = {}
    for flat_name, leaves in modules.items():
        place = naming_map.flat_to_stacked(flat_name)
        if place is None:
            continue
        module, layer = place
        for name, leaf in leaves.items():
            taken = layers.setdefault(_Place(module, name), {})
            if layer in taken:
                raise ValueError(
                    f"stack_params: {flat_name}/{name} maps to layer {layer} of "
                    f"{module}/{name}, which another module has taken. "
                    "Give each layer a name of its own in the naming map."
                )
            taken[layer] = leaf
    return layers


def _stack_of(naming_map: hk.LayerStackTransparencyMapping, module: str) -> Any:
    if isinstance(naming_map, NumberedLayers):
        return naming_map.stack_of(module)
    return ()


def _stacks(
    naming_map: hk.LayerStackTransparencyMapping, modules: Modules
) -> Iterator[Modules]:
    """The modules of each stack."""
    stacks: dict[Any, dict[str, Any]] = {}
    for module, leaves in modules.items():
        stacks.setdefault(_stack_of(naming_map, module), {})[module] = leaves
    yield from stacks.values()


def _depth(modules: Modules, num_layers: int | None) -> int:
    """The leading axis of all leaves of a stack."""
    first = "num_layers"
    for module, leaves in modules.items():
        for path, leaf in jax.tree.leaves_with_path(leaves):
            at = f"{module}/{path[0].key}"
            found = leaf.shape[0] if getattr(leaf, "shape", ()) else None
            if num_layers is None:
                first, num_layers = f"{at} of shape {leaf.shape}", found
            if found is None or found != num_layers:
                raise ValueError(
                    f"unstack_params: {at} has shape {leaf.shape}; expected a leading "
                    f"axis of {num_layers} layers, as {first} says. Is each of them "
                    "part of the same stack?"
                )
    return num_layers or 0


def _advice(
    naming_map: hk.LayerStackTransparencyMapping, found: Mapping[int, Any]
) -> str:
    whole = next(i for i in range(len(found) + 1) if i not in found)
    if not isinstance(naming_map, NumberedLayers) or len(naming_map.stacked) == 1:
        return ""
    return f" To leave a remainder outside of the stack, give num_layers={whole}."


def _same_types(trees: Sequence[Any], names: Sequence[str]) -> None:
    """Checks that the leaves of all layers can be stacked."""
    structure: Any = jax.tree.structure(trees[0])
    for tree, name in zip(trees, names, strict=True):
        if jax.tree.structure(tree) != structure:
            raise ValueError(
                f"stack_params: {name} is {jax.tree.structure(tree)}, {names[0]} is "
                f"{structure}. All layers of a stack must have one structure."
            )
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(trees[0]), strict=True):
            if _type_of(x) != _type_of(y):
                raise ValueError(
                    f"stack_params: {name} is {_type_of(x)}, {names[0]} is "
                    f"{_type_of(y)}. All layers of a stack must have the same shapes "
                    "and dtypes."
                )


def _type_of(leaf: Any) -> str:
    return f"{_dtype_of(leaf)}{list(np.shape(leaf))}"


def _dtype_of(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


# Leaves


def _stack(*leaves: Any) -> Any:
    """`jnp.stack` for leaves of any kind."""
    first = leaves[0]
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        shape = (len(leaves), *first.shape)
        return jax.ShapeDtypeStruct(shape, first.dtype, sharding=_stacked_on(leaves))
    if not all(map(is_on_host, leaves)):
        return jax.jit(_stack_arrays, out_shardings=_stacked_on(leaves))(*leaves)
    stacked = empty((len(leaves), *np.shape(first)), _dtype_of(first))
    for i, leaf in enumerate(leaves):
        stacked[i] = np.asarray(leaf)
    return as_given(stacked, leaves)


def _stack_arrays(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves)


def _unstack(tree: Any, num_layers: int) -> list[Any]:
    """`[tree[i] for i in range(L)]` for leaves of any kind."""

    def layer(leaf: Any, i: int) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            sharding = _unstacked_on(leaf)
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
        if isinstance(leaf, jax.Array) and is_on_host(leaf):
            of_layer = empty(leaf.shape[1:], leaf.dtype)
            of_layer[...] = np.asarray(leaf)[i]
            return as_given(of_layer, [leaf])
        return leaf[i]

    return [
        jax.tree.map(functools.partial(layer, i=i), tree) for i in range(num_layers)
    ]


def _stacked_on(leaves: Sequence[Any]) -> jax.sharding.Sharding | None:
    """The sharding of a stack of leaves, if they say how they are sharded."""
    shardings = {_named_sharding(leaf) for leaf in leaves}
    sharding = shardings.pop()
    if shardings or sharding is None:
        return None
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def _unstacked_on(leaf: Any) -> jax.sharding.Sharding | None:
    sharding = _named_sharding(leaf)
    if sharding is None:
        return None
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def _named_sharding(leaf: Any) -> jax.sharding.NamedSharding | None:
    if isinstance(leaf, jax.core.Tracer):
        return None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def is_on_host(leaf: Any) -> bool:
    """Whether `np.asarray` gives the leaf's values without a program of its own."""
    if not isinstance(leaf, jax.Array):
        return True
    return not (
        isinstance(leaf, jax.core.Tracer)
        or len(leaf.sharding.device_set) > 1
        or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    )


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array to fill, which JAX takes over on a CPU without another copy."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(tuple(shape))


_ALIGNMENT = 64


def as_given(array: np.ndarray, examples: Sequence[Any]) -> Any:
    """`array` as a JAX array if all `examples` are, on the device of the first."""
    if not all(isinstance(example, jax.Array) for example in examples):
        return array
    return jax.device_put(array, examples[0].sharding)
