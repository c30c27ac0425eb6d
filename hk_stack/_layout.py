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

from hk_stack import _checks

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
    `hk.layer_stack` and `hk_stack.layer_stack`. For these, names begin inside of the
    module around the stack: `block_{}`, which the whole tree has as `model/block_{}`.
    Nested stacks take one map for each level:
    `NumberedLayers("outer_*/inner_{}", "outer_*/inner")`, then
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
        _check_per_layer(self.per_layer)
        names = (self.stacked,) if isinstance(self.stacked, str) else self.stacked
        if names == ():
            names = (re.sub(r"[_/.]?\{\}", "", self.per_layer),)
        _check_stacked(names, self.per_layer)
        object.__setattr__(self, "stacked", tuple(names))
        depth = self.num_layers
        if depth is not None and (type(depth) is not int or depth < 1):
            raise ValueError(
                f"NumberedLayers: num_layers must be a positive int, found {depth!r}. "
                "Leave it out to stack all layers that a tree holds."
            )

    def stacked_to_flat(self, stacked_module_name: str, scan_idx: int) -> str:
        """The name of a stacked module in layer `scan_idx`.

        Raises:
          ValueError: If the module is no part of the stack.
        """
        for position, name in enumerate(self.stacked):
            match = re.fullmatch(pattern(name, ""), stacked_module_name)
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
        regex = pattern(template, number if has_number else habit)
        match = re.fullmatch(regex, unstacked_module_name)
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
            match = re.fullmatch(pattern(name, ""), stacked_module_name)
            if match:
                return match.groups()[:-1]
        return ()

    def __str__(self) -> str:
        names = self.stacked[0] if len(self.stacked) == 1 else self.stacked
        more = f", num_layers={self.num_layers}" if self.num_layers is not None else ""
        return f"NumberedLayers({self.per_layer!r}, {names!r}{more})"


def _check_per_layer(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"NumberedLayers: expected a name such as 'block_{{}}', found {name!r}."
        )
    if name.count("{}") > 1:
        raise ValueError(
            f"NumberedLayers: {name!r} has more than one '{{}}'. Nested stacks take "
            "one map for each level, with '*' for the other numbers: "
            "'outer_*/inner_{}', then 'outer_{}'."
        )
    if re.search(r"[{}]", name.replace("{}", "")):
        raise ValueError(
            f"NumberedLayers: {name!r} has a brace that is not part of '{{}}'. The "
            "layer's number is written '{}', with nothing in it: 'block_{}'."
        )
    numbered = name if "{}" in name else f"{name}{{}}"
    if re.search(r"\*\*|\*\{\}|\{\}\*", numbered):
        raise ValueError(
            f"NumberedLayers: in {name!r} nothing tells where the text of '*' ends. "
            "Write '{}' for the layer's number, and something between it and '*': "
            "'*_{}' or '*/block_{}'."
        )


def _check_stacked(names: Any, per_layer: str) -> None:
    wrong = [n for n in names if not isinstance(n, str)] if _is_list(names) else [names]
    if wrong:
        raise TypeError(
            f"NumberedLayers: the stacked name must be a name such as 'block', or a "
            f"sequence of names for a pattern of blocks; found {wrong[0]!r}."
        )
    for name in names:
        if not name:
            raise ValueError(
                f"NumberedLayers: {per_layer!r} leaves no name for the stack. Give "
                f"one: NumberedLayers({per_layer!r}, 'layers')."
            )
        if name.count("*") != per_layer.count("*") or re.search(r"[{}]", name):
            raise ValueError(
                f"NumberedLayers: the stacked name {name!r} must have no '{{}}', "
                f"and as many '*' as {per_layer!r}."
            )
    for one, other in itertools.permutations(names, 2):
        if f"{other}/".startswith(f"{one}/"):
            raise ValueError(
                f"NumberedLayers: two blocks of the pattern {tuple(names)} have one "
                f"name, or one is inside of the other: {one!r} and {other!r}. Give "
                "each a name of its own."
            )


def _is_list(names: Any) -> bool:
    return isinstance(names, Sequence) and len(names) > 0


def pattern(template: str, number: str) -> str:
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
      Leaves outside of the stack are those of `tree`, not copies. What an optimiser
      does by a parameter's number of axes, it does to a stack with one axis more: mask
      by name instead.

    Raises:
      ValueError: If no module of the tree is known to the map, two modules claim one
        layer, a layer misses a leaf, the layers' leaves differ in shape or dtype, or
        an optimiser keeps something else than one number for each parameter.
    """
    _checks.naming_map(naming_map, "naming_map", "stack_params")

    def has_layers(module: str) -> bool:
        return naming_map.flat_to_stacked(module) is not None

    def convert(modules: Modules, _: Sequence[Modules]) -> dict[str, Any]:
        rest = {m: _plain(leaves) for m, leaves in modules.items() if not has_layers(m)}
        _none_taken([m for m in rest if is_stacked(naming_map, m)], "stack_params")
        return rest | stack_modules(modules, naming_map)

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
    _checks.naming_map(naming_map, "naming_map", "unstack_params")
    is_member = functools.partial(is_stacked, naming_map)

    def convert(modules: Modules, trees: Sequence[Modules]) -> dict[str, Any]:
        flat = {m: _plain(leaves) for m, leaves in modules.items() if not is_member(m)}
        of_stack = {m: leaves for m, leaves in modules.items() if m not in flat}
        for members in _stacks(naming_map, of_stack):
            depth = _depth(members, trees, num_layers)
            _check_depth(naming_map, depth)
            layers = unstack_modules(members, naming_map, depth)
            _none_taken(sorted(flat.keys() & layers.keys()), "unstack_params")
            flat |= layers
        return flat

    return _convert(tree, is_member, convert, f"unstack_params with {naming_map}")


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
    for place, found in layers.items():
        depth = depths[_stack_of(naming_map, place.module)]
        _none_missing(place, found, depth, naming_map)
        trees = [found[i] for i in range(depth)]
        _same_types(trees, [place.in_layer(i, naming_map) for i in range(depth)])
        of_module = stacked.setdefault(place.module, {})
        of_module[place.leaf] = jax.tree.map(_stack, *trees)
    return {module: _whole(leaves) for module, leaves in stacked.items()}


def unstack_modules(
    modules: Modules, naming_map: hk.LayerStackTransparencyMapping, num_layers: int
) -> dict[str, dict[str, Any]]:
    """The modules of each layer, for a tree that holds the stack's modules only.

    Raises:
      ValueError: As `unstack_params`.
    """
    flat: dict[str, dict[str, Any]] = {}
    for module, leaves in modules.items():
        split = {n: _unstack(leaf, num_layers) for n, leaf in _by_name(leaves).items()}
        for i in range(num_layers):
            flat_name = naming_map.stacked_to_flat(module, i)
            if flat_name in flat:
                raise ValueError(
                    f"unstack_params: layer {i} of {module} maps to {flat_name}, which "
                    "another layer has taken. Give each layer a name of its own."
                )
            flat[flat_name] = _whole({n: of_layer[i] for n, of_layer in split.items()})
    return flat


def drop_layers(tree: Any) -> Any:
    """The types of the leaves `[L, ...]` of `tree` without their `L`."""

    def first(leaves: list[jax.Array]) -> list[jax.Array]:
        return [jax.lax.index_in_dim(leaf, 0, keepdims=False) for leaf in leaves]

    leaves, structure = jax.tree.flatten(tree)
    # Unlike a `jax.ShapeDtypeStruct` these types can be traced in a `jax.shard_map`.
    return jax.tree.unflatten(structure, jax.make_jaxpr(first)(leaves).out_avals)


# Whole trees


def _convert(
    tree: Any,
    is_known: Callable[[str], bool],
    convert: Callable[[Modules, Sequence[Modules]], Any],
    what: str,
) -> Any:
    """`tree` with all trees of modules in it converted, wherever they are.

    `convert` takes one of them, and all.
    """

    def is_modules(node: Any) -> bool:
        return isinstance(node, Mapping) and any(
            isinstance(name, str) and is_known(name) and _is_module(leaves)
            for name, leaves in node.items()
        )

    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_modules)
    found = [(path, node) for path, node in nodes if is_modules(node)]
    if not found:
        raise ValueError(
            f"{what}: no module of the tree belongs to the stack. It holds: "
            f"{_some_modules(tree)}. Write names as the tree does, from the outermost "
            "module on ('*' stands for one), or is the tree converted already?"
        )
    _no_other_shapes(found, what)
    trees = [node for _, node in found]
    return jax.tree.map(
        lambda node: convert(node, trees) if is_modules(node) else node,
        tree,
        is_leaf=is_modules,
    )


def _is_module(leaves: Any) -> bool:
    return isinstance(leaves, Mapping) or not jax.tree.leaves(leaves)


def _plain(leaves: Any) -> Any:
    """A module as a dictionary, which in old checkpoints of Haiku it is not."""
    return dict(leaves) if isinstance(leaves, Mapping) else leaves


def _by_name(leaves: Any) -> Mapping[str, Any]:
    """A module's leaves by name; one without any, masked by optax, as a whole."""
    return leaves if isinstance(leaves, Mapping) and leaves else {"": leaves}


def _whole(leaves: dict[str, Any]) -> Any:
    """The inverse of `_by_name`."""
    return leaves.get("", leaves)


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


def _no_other_shapes(found: Sequence[tuple[Any, Modules]], what: str) -> None:
    """Refuses optimiser states that stacking would change the meaning of.

    Trees with the leaf names of the parameters (`mu`, `nu`) must have their shapes too:
    an optimiser that keeps norms or factors of a parameter takes a stack of layers for
    one parameter, and keeps others.
    """
    seen: dict[Any, tuple[str, Any]] = {}
    for path, modules in found:
        places = frozenset(place for place, _ in _leaves(modules))
        for place, leaf in _leaves(modules):
            if not jax.tree.leaves(leaf):
                continue
            shape = str(jax.tree.map(np.shape, leaf))  # Of sm3, a list of them.
            at = f"{jax.tree_util.keystr(path)}[{place.module!r}][{place.leaf!r}]"
            first, expected = seen.setdefault((places, place), (at, shape))
            if shape != expected:
                raise ValueError(
                    f"{what}: {first} has shape {expected}, and {at} has shape "
                    f"{shape}. If this is the state of an optimiser, it keeps "
                    "something else than one number for each parameter, and would "
                    "keep another for a stack of layers: convert the parameters, and "
                    "start its state anew with optimiser.init(params). If these are "
                    "two models, convert them one by one."
                )


def is_stacked(naming_map: hk.LayerStackTransparencyMapping, module: str) -> bool:
    """Whether a module is one of a stack, to a naming map."""
    try:
        flat = naming_map.stacked_to_flat(module, 0)
    except Exception:  # Maps other than ours may raise what they like.
        return False
    return naming_map.flat_to_stacked(flat) == (module, 0)


def _none_taken(taken: Sequence[str], what: str) -> None:
    if taken:
        raise ValueError(
            f"{what}: the name {taken[0]} is taken by a module that is no part of the "
            "stack. Give the stack another name, NumberedLayers(per_layer, stacked), "
            "or is the tree converted already?"
        )


# Stacks


class _Place(NamedTuple):
    module: str
    leaf: str

    def __str__(self) -> str:
        return f"{self.module}/{self.leaf}" if self.leaf else self.module

    def in_layer(self, i: int, naming_map: hk.LayerStackTransparencyMapping) -> str:
        return str(_Place(naming_map.stacked_to_flat(self.module, i), self.leaf))


def _leaves(modules: Modules) -> Iterator[tuple[_Place, Any]]:
    for module, leaves in modules.items():
        for name, leaf in _by_name(leaves).items():
            yield _Place(module, name), leaf


def _by_layer(
    modules: Modules, naming_map: hk.LayerStackTransparencyMapping
) -> dict[_Place, dict[int, Any]]:
    """Leaves of per-layer modules, by their place in the stack and their layer."""
    layers: dict[_Place, dict[int, Any]] = {}
    for flat, leaf in _leaves(modules):
        stacked = naming_map.flat_to_stacked(flat.module)
        if stacked is None:
            continue
        place, layer = _Place(stacked[0], flat.leaf), stacked[1]
        taken = layers.setdefault(place, {})
        if layer in taken:
            raise ValueError(
                f"stack_params: {flat} maps to layer {layer} of {place}, which another "
                "module has taken. Give each layer a name of its own in the naming map."
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


def _depth(members: Modules, trees: Sequence[Modules], num_layers: int | None) -> int:
    """How many layers the modules of a stack have.

    The leaves of optimiser states may all be masked. Those of `trees` that have the
    same modules, such as the parameters, tell then.
    """
    depth = _leading_axis(members, num_layers)
    if depth is not None:
        return depth
    alike = [tree for tree in trees if members.keys() <= tree.keys()]
    found = [_leading_axis({m: tree[m] for m in members}, None) for tree in alike]
    depths = {depth for depth in found if depth is not None}
    if len(depths) != 1:
        raise ValueError(
            f"unstack_params: no array says how many layers {next(iter(members))} has. "
            "Convert the parameters together with this tree, or give num_layers: "
            "unstack_params(tree, naming_map, num_layers)."
        )
    return depths.pop()


def _leading_axis(modules: Modules, num_layers: int | None) -> int | None:
    """The leading axis of all leaves of a stack, if there are any."""
    shapes = [
        (place, np.shape(leaf))
        for place, tree in _leaves(modules)
        for leaf in jax.tree.leaves(tree)
    ]
    says = "num_layers"
    if num_layers is None and shapes and shapes[0][1]:
        says, num_layers = f"{shapes[0][0]} of shape {shapes[0][1]}", shapes[0][1][0]
    for place, shape in shapes:
        if shape[:1] != (num_layers,):
            depth = "" if num_layers is None else f" of {num_layers}, as {says} says"
            raise ValueError(
                f"unstack_params: {place} has shape {shape}; expected a leading axis "
                f"of layers{depth}. Are all modules of that name part of the stack, "
                "and stacked?"
            )
    return num_layers


def _check_depth(naming_map: hk.LayerStackTransparencyMapping, num_layers: int) -> None:
    if not isinstance(naming_map, NumberedLayers) or naming_map.num_layers is None:
        return
    if num_layers > naming_map.num_layers:
        raise ValueError(
            f"unstack_params: the tree holds {num_layers} layers, more than "
            f"{naming_map}. Give the map num_layers={num_layers}, or leave it out."
        )


def _none_missing(
    place: _Place,
    found: Mapping[int, Any],
    depth: int,
    naming_map: hk.LayerStackTransparencyMapping,
) -> None:
    missing = (i for i in range(depth) if i not in found)
    some = list(itertools.islice(missing, _MOST))  # Of a wrong number, not millions.
    if some:
        count = depth - len(found)
        names = [place.in_layer(i, naming_map) for i in some]
        advice = ""
        if isinstance(naming_map, NumberedLayers):
            advice = _advice(some[0], count, depth, len(naming_map.stacked))
        raise ValueError(
            f"stack_params: {place} has {len(found)} of {depth} layers; missing: "
            f"{_listed(names, count)}.{advice}"
        )


def _advice(first: int, count: int, depth: int, pattern: int) -> str:
    """What to do about `count` missing layers, where `first` is the first of them."""
    if first == 0 and count == 1:
        return " Layers are numbered from 0."
    if first > 0 and count == depth - first:
        return (
            " To leave a remainder outside of the stack, give the naming map "
            f"num_layers={first}."
        )
    if pattern > 1:
        return ""
    return " For blocks that take turns, give the naming map a pattern of names."


def _same_types(trees: Sequence[Any], names: Sequence[str]) -> None:
    """Checks that the leaves of all layers can be stacked."""
    first, *_ = types = [jax.tree.map(_type_of, tree) for tree in trees]
    structure: Any = jax.tree.structure(first)
    for of_layer, name in zip(types, names, strict=True):
        found = f"stack_params: {name} is {of_layer}, {names[0]} is {first}."
        if jax.tree.structure(of_layer) != structure:
            raise ValueError(
                f"{found} All layers of a stack must have one structure; what masks "
                "or labels parameters for an optimiser must treat them alike."
            )
        if jax.tree.leaves(of_layer) != jax.tree.leaves(first):
            raise ValueError(
                f"{found} All layers of a stack must have the same shapes and dtypes."
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
        if not isinstance(leaf, jax.Array):
            return leaf[i, ...]  # Not leaf[i], which of scalars is no view.
        if is_on_host(leaf):
            of_layer = empty(leaf.shape[1:], leaf.dtype)
            of_layer[...] = np.asarray(leaf)[i]
            return as_given(of_layer, [leaf])
        return leaf[i]

    tree = jax.tree.map(_not_sharded_by_layer, tree)
    return [
        jax.tree.map(functools.partial(layer, i=i), tree) for i in range(num_layers)
    ]


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
    shardings = {_sharding(leaf) for leaf in leaves}
    sharding = shardings.pop()
    return None if shardings else _with_spec(sharding, lambda spec: (None, *spec))


def _unstacked_on(leaf: Any) -> jax.sharding.Sharding | None:
    return _with_spec(_sharding(leaf), lambda spec: spec[1:])


def _with_spec(
    sharding: jax.sharding.Sharding | None, change: Callable[[Any], Any]
) -> jax.sharding.Sharding | None:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    spec = jax.sharding.PartitionSpec(*change(sharding.spec))
    kind = sharding.memory_kind
    return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=kind)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding that an array of more or fewer axes can have as well."""
    if isinstance(leaf, jax.core.Tracer):
        return None
    sharding = getattr(leaf, "sharding", None)
    kept: Any = jax.sharding.NamedSharding
    if isinstance(leaf, jax.ShapeDtypeStruct):
        kept = (kept, jax.sharding.SingleDeviceSharding)
    return sharding if isinstance(sharding, kept) else None


def is_on_host(leaf: Any) -> bool:
    """Whether `np.asarray` gives the leaf's values without a program of its own.

    From a device other than the CPU it copies them; the stack is copied back there.
    """
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
    """`array` as a JAX array if all `examples` are, bound to a device as they are.

    Programs over several devices take arrays that are bound to none.
    """
    if not all(isinstance(example, jax.Array) for example in examples):
        return array
    bound = [example.sharding for example in examples if example.committed]
    with jax.enable_x64(True):  # Keeps float64 as it is.
        return jax.device_put(array, *bound[:1])
