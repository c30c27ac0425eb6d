"""What checkpoints hold: leaves by name, the layers among them, and how two differ.

Metadata notes of each leaf where it is in the tree, its shape and its dtype; of the
whole, whether it is stacked or per-layer, and how deep (`L`).
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, keystr

from hk_stack import _checks, _formats, _naming
from hk_stack._checks import path_name

_LAYOUTS = ("none", "stacked", "per-layer")


class Leaf(NamedTuple):
    """A leaf of a tree, or one that was saved. As text, its type.

    Attributes:
      path: Where it is: a key for each step from the root.
      spec: Its shape and dtype, and the sharding that it has to have.
      value: The leaf itself; None if it was saved.
    """

    path: tuple[Any, ...]
    spec: jax.ShapeDtypeStruct
    value: Any = None

    def __str__(self) -> str:
        return f"{self.spec.dtype.name}{list(self.spec.shape)}"

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of nested dicts."""
        return tuple(path_name((key,)) for key in self.path)

    @property
    def is_key(self) -> bool:
        return bool(jnp.issubdtype(self.spec.dtype, jax.dtypes.prng_key))


Leaves = Mapping[str, Leaf]
OF_JAX = (jax.Array, jax.ShapeDtypeStruct)


def leaves_of(tree: Any, where: str, at: str = "") -> dict[str, Leaf]:
    """The leaves of a tree by name, after a check that each is an array."""
    leaves: dict[str, Leaf] = {}
    for path, value in jax.tree.leaves_with_path(tree):
        name = "/".join(filter(None, [at, path_name(path)])) or "leaf"
        if name in leaves:
            raise ValueError(
                f"{where}: {keystr(leaves[name].path)} and {keystr(path)} would both "
                f"be named {name!r}. Rename a module or a leaf."
            )
        leaves[name] = Leaf(path, _spec(value, f"{where}: leaf {name!r}"), value)
    if not leaves or "__metadata__" in leaves:
        found = "a leaf named '__metadata__'" if leaves else "no leaves"
        raise ValueError(
            f"{where}: the tree has {found}; expected named arrays, "
            "as in {'params': params}."
        )
    return leaves


def _spec(value: Any, at: str) -> jax.ShapeDtypeStruct:
    """What a leaf is, after a check that it is an array."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{at} is traced. Save and load outside of jit and grad.")
    array = np.asarray(value) if isinstance(value, int | float | complex) else value
    is_array = isinstance(array, (*OF_JAX, np.ndarray, np.generic))
    kinds = (np.number, np.bool_, jax.dtypes.prng_key)
    if not (is_array and any(jnp.issubdtype(array.dtype, kind) for kind in kinds)):
        raise TypeError(
            f"{at} is a {type(value).__name__} ({_checks.shown(value)}); expected an "
            "array. Keep what is no number beside the checkpoint."
        )
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise ValueError(
            f"{at} is {array.dtype!r}, of foreign byte order. Write "
            "x.astype(x.dtype.newbyteorder('='))."
        )
    # None for numpy, or if JAX may choose.
    is_free = isinstance(array, jax.Array) and not array.committed
    sharding = None if is_free else getattr(array, "sharding", None)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


class _Layers(NamedTuple):
    """Whether a tree is stacked or per-layer, and how deep, by stacked module."""

    layout: str
    depths: dict[str, int]

    @property
    def depth(self) -> int | list[int]:
        depths = sorted(set(self.depths.values()))
        return depths[0] if len(depths) == 1 else depths

    def noted(self, names: _naming.Map) -> dict[str, Any]:
        """What the metadata says: by stacked module, its name in each layer.

        That of layer L, which tells a deeper tree when loading, comes last.
        """
        modules: dict[str, list[str]] = {}
        for module, depth in sorted(self.depths.items()):
            modules[module] = [names.stacked_to_flat(module, i) for i in range(depth)]
            with contextlib.suppress(ValueError, LookupError):  # It may end at L.
                modules[module].append(names.stacked_to_flat(module, depth))
        return {"layout": self.layout, "depth": self.depth, "modules": modules}


def layers_in(leaves: Leaves, names: _naming.Map, where: str) -> _Layers:
    """The layers of a tree, by the names of its modules and, in a stack, by shapes."""
    modules: dict[str, str] = {}
    for name, leaf in leaves.items():
        for key in leaf.path[:-1]:  # The last is the leaf's own.
            module = getattr(key, "key", None)
            if not isinstance(module, str):
                continue
            if _naming.is_stacked(names, module) or _naming.place_of(names, module):
                modules.setdefault(name, module)
    # The first layer may be named as a stack is: `linear`, `linear_1`.
    flat = [name for name in modules if not _naming.is_stacked(names, modules[name])]
    stacked = [name for name in modules if not _naming.place_of(names, modules[name])]
    if not modules:
        raise ValueError(
            f"{where}: no module of the tree is a layer to {names}. The leaves are: "
            f"{_formats.listed(leaves, 8)}. Give the naming map of this stack, or "
            "leave `layers` out."
        )
    if flat and stacked:
        raise ValueError(
            f"{where}: {flat[0]} is of one layer, {stacked[0]} of a stack. "
            "Convert one of them, or save the two trees on their own."
        )
    if not flat:
        return _Layers("stacked", _leading_sizes(leaves, modules, names, where))
    depths: dict[str, int] = {}
    for module in modules.values():
        of_stack, layer = _naming.place_of(names, module) or (module, 0)
        depths[of_stack] = max(depths.get(of_stack, 0), 1 + layer)
    return _Layers("per-layer", depths)


def _leading_sizes(
    leaves: Leaves, modules: Mapping[str, str], names: _naming.Map, where: str
) -> dict[str, int]:
    """Those of the leaves of each module, which are given by leaf.

    The leaves nearest to the root decide, parameters and state: an optimiser's state
    may hold some of other shapes.
    """
    sizes: dict[str, int] = {}
    nearest: dict[Any, str] = {}
    for name in sorted(modules, key=lambda name: len(leaves[name].path)):
        first = nearest.setdefault(_naming.stack_of(names, modules[name]), name)
        one, other = (leaves[name].spec.shape for name in (first, name))
        is_near = len(leaves[name].path) == len(leaves[first].path)
        if is_near and (not one or one[:1] != other[:1]):
            raise ValueError(
                f"{where}: {first} has shape {one}, {name} has shape {other}; expected "
                "one leading axis L in all leaves of the stack. Give the naming map of "
                "one stack, or leave `layers` out."
            )
        sizes[modules[name]] = one[0]
    return sizes


# Metadata


def check(content: dict[str, Any]) -> None:
    """Raises if metadata is not of its form: who writes files can write checksums."""
    depth, modules, entries = (content[key] for key in ("depth", "modules", "leaves"))
    depths = depth if isinstance(depth, list) else [depth or 0]
    names = [*modules.values(), *(entry["path"] for entry in entries.values())]
    for entry in entries.values():
        spec = jax.ShapeDtypeStruct(entry["shape"], np.dtype(entry["dtype"]))
        zero = np.zeros([], _spec(spec, "a leaf").dtype)
        np.broadcast_to(zero, entry["shape"])  # Fails if that is too large.
    saved_leaves(content)  # Fails for unknown kinds of random keys.
    _formats.nested((tuple(entry["path"]), None) for entry in entries.values())
    is_sound = (
        entries
        and content["layout"] in _LAYOUTS
        and all(type(number) is int for number in depths)
        and all(modules.values())
        and all(isinstance(entry["shape"], list) for entry in entries.values())
        and all(isinstance(keys, list) for keys in names)
        and all(isinstance(key, str) for keys in names for key in keys)
    )
    if not is_sound:
        raise ValueError("its layout, its depth, or no leaves")


# The comparison of what was saved with what it shall be loaded into.


@functools.lru_cache
def _keys_of(kind: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """The type of random keys that have data of this shape: slow to find out."""
    wrap = functools.partial(jax.random.wrap_key_data, impl=kind)
    return jax.eval_shape(wrap, jax.ShapeDtypeStruct(shape, dtype))


def saved_leaves(content: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves that were saved, in nested dicts."""
    leaves = {}
    for name, entry in content["leaves"].items():
        spec = jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]))
        if "key" in entry:
            spec = _keys_of(entry["key"], spec.shape, spec.dtype)
        leaves[name] = Leaf(tuple(map(DictKey, entry["path"])), spec)
    return leaves


def misfits(asked: Leaves, saved: Leaves, content: Mapping[str, Any]) -> Iterator[str]:
    """How a like differs from what was saved, what explains most first."""
    shapes, others = ({n: x.spec.shape for n, x in y.items()} for y in (asked, saved))
    if shapes != others:
        yield from _other_layers(asked, content)
    missing = [f"{name} {asked[name]}" for name in asked if name not in saved]
    unexpected = [f"{name} {saved[name]}" for name in saved if name not in asked]
    if missing or unexpected:
        depth = f" It is {content['layout']}, with L={content['depth']} layers."
        yield (
            "like and the checkpoint have other leaves."
            f"{_some('The checkpoint lacks', missing)}{_some('Like lacks', unexpected)}"
            f"{depth if content['depth'] else ''} Give a like of all leaves that were "
            "saved, or load a part: checkpoint.load(path, params, at='params'). "
            "checkpoint.load(path) gives all as nested dicts, to take some of them."
        )
    for name, leaf in asked.items():
        for misfit in (*_other_type(leaf, saved[name]), *_misplaced(leaf)):
            yield f"leaf {name!r} {misfit}"


def _other_layers(asked: Leaves, content: Mapping[str, Any]) -> Iterator[str]:
    """Another layout or depth, by the names that were noted."""
    layout, depth = content["layout"], content["depth"]
    try:
        found = layers_in(asked, _naming.Table(content["modules"]), "like")
    except ValueError:  # It has no one layout: leaves are compared one by one.
        return
    if found.layout != layout:
        yield (
            f"the checkpoint is {layout} (L={depth}), like is {found.layout}. With the "
            "naming map of the stack, it is converted: checkpoint.load(path, like, "
            "layers=naming_map)."
        )
    if isinstance(depth, int) and isinstance(found.depth, int) and found.depth != depth:
        # Of a deeper per-layer tree, only the first layer too many has a known name.
        more = layout == "per-layer" and found.depth > depth
        yield (
            f"the checkpoint holds L={depth} layers ({layout}), like has "
            f"{'more' if more else found.depth}. Change num_layers to {depth}, or take "
            "the layers you want from what checkpoint.load(path) gives: "
            f"{'x[:n] of leaves [L, ...]' if layout == 'stacked' else 'some modules'}."
        )


def _some(what: str, names: Sequence[str]) -> str:
    return f" {what} {len(names)}: {_formats.listed(names, 4)}." if names else ""


def _other_type(asked: Leaf, saved: Leaf) -> Iterator[str]:
    found = f"is {saved} in the checkpoint, {asked} in like"
    if asked.spec.dtype != saved.spec.dtype:
        convert = f"x.astype({asked.spec.dtype.name!r})"
        if asked.is_key or saved.is_key:
            convert = "jax.random.key_data or wrap_key_data"
        yield (
            f"{found}. Nothing is cast on the way: load into a like of "
            f"{saved.spec.dtype.name}, and convert it yourself, with {convert}."
        )
    shapes = asked.spec.shape, saved.spec.shape
    differ = [str(i) for i, (x, y) in enumerate(zip(*shapes, strict=False)) if x != y]
    what = "the number of axes"
    if asked.spec.ndim == saved.spec.ndim:
        what = f"axis {', '.join(differ)}"
    if shapes[0] != shapes[1]:
        yield f"{found}: {what} differs. Change the model."


def _misplaced(like: Leaf) -> Iterator[str]:
    """Why JAX has no arrays like `like`, or no devices to put them on."""
    sharding, dtype = like.spec.sharding, like.spec.dtype
    if not isinstance(like.value, OF_JAX):
        return
    if not like.is_key and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        yield (
            f"is {dtype.name}, which JAX has only with jax_enable_x64. Set that, or "
            "give a numpy array in like."
        )
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        yield (
            f"has an abstract sharding in like, without devices: {sharding}. Give "
            "jax.sharding.NamedSharding(mesh, spec) with a mesh of devices."
        )
    try:
        if sharding is not None:
            sharding.shard_shape(like.spec.shape)
    except ValueError as error:
        yield f"of like does not fit its sharding: {_formats.line(error)}"
