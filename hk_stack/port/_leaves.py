"""Reads the leaves of both trees in one vocabulary, which is Haiku's."""

import collections
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from hk_stack.port import _cells, _names, _regroup
from hk_stack.port._codecs import Average, Leaf, Leaves, Piece
from hk_stack.port._names import Path
from hk_stack.port._rules import Rules, Said, renamed

# Flax


Scope = tuple[str, Path]  # A collection, and a module.


def of_flax(
    variables: Any, said: Said, haiku: Sequence[Leaf] = ()
) -> tuple[list[Leaf], list[str]]:
    """The leaves of Linen's variables, an NNX state, or a plain dict of either.

    Args:
      variables: The tree.
      said: Rules; `rename`, and those in `leaf` for several leaves.
      haiku: The leaves of the other tree, which may be called as these are.

    Returns:
      The leaves, and what to say of rules that none of them needs.
    """
    has_values = any(leaf.path[-1] == "value" for leaf in haiku)
    every, unused = _regroup.regrouped(stored(variables, has_values), said.regroup)
    inside: dict[Scope, dict[str, Leaf]] = collections.defaultdict(dict)
    for (collection, path), leaf in every.items():
        for i in range(len(path)):
            # NNX writes `if_` for a gate, as `if` is a word of Python.
            name = "/".join(path[i:]).replace("if_/", "if/")
            inside[collection, path[:i]][name] = leaf
    cells: list[Leaf] = []
    for (collection, module), names_in in inside.items():
        plain = ((n, x) for n, x in names_in.items() if x.codec.is_plain)
        shapes = {name: x.pieces[0].shape for name, x in plain}
        for path, names, codec in _cells.leaves_of(shapes):
            pieces = tuple(names_in[name].pieces[0] for name in names)
            cells.append(Leaf(collection, (*module, *path), pieces, codec))
    taken = {piece for leaf in cells for piece in leaf.pieces}
    rest = [
        leaf
        for leaf in every.values()  # One that is tied to a gate has its piece, too.
        if not (leaf.codec.is_plain and taken.intersection(leaf.pieces))
    ]
    has_outs = any("out" in path for _, path in every)
    ours = {_bases(leaf.path) for leaf in haiku} if has_outs else set()
    named = [_flax_leaf(one, inside, said.rename, ours) for one in (*cells, *rest)]
    return named, unused


def stored(variables: Any, has_values: bool = False) -> Leaves:
    """The arrays of a tree, by collection and path."""
    arrays = _paths(variables)
    # A state of NNX that was saved has a `value` for the box around each array.
    if not has_values and all(len(p) > 1 and p[-1] == "value" for p, _ in arrays):
        arrays = [(path[:-1], leaf) for path, leaf in arrays]
    if isinstance(variables.get("params"), Mapping):
        at: list[Scope] = [(path[0], path[1:] or path) for path, _ in arrays]
    else:
        at = list(zip(_collections(variables, arrays), dict(arrays), strict=True))
    found = {}
    for place, ((path, leaf), key) in enumerate(zip(arrays, at, strict=True)):
        piece = _piece("/".join(path), place, leaf)
        found[key] = Leaf(*key, (piece,))
    return found


def _flax_leaf(
    one: Leaf,
    inside: Mapping[Scope, Mapping[str, Leaf]],
    rename: Rules[str],
    ours: Set[Path],
) -> Leaf:
    collection, path = one.collection, one.raw
    siblings = inside[collection, path[:-1]]
    is_offset = path[-1] == "bias" and "kernel" not in siblings
    # What is no word of Flax is written as it is: both trees may have it.
    is_word = path[-1] in ("bias", "embedding", "kernel")
    name = _names.leaf(path[-1]) if is_word else path[-1]
    names: Path = (*path[:-1], "offset" if is_offset else name)
    linear = tuple(
        "linear" if x == "out" and _is_attention(inside["params", path[:i]]) else x
        for i, x in enumerate(names)
    )
    new, count = renamed(rename, collection, path)
    found: Path = (*new, *names[count:])
    other: Path = (*new, *linear[count:])
    if found != other and _alike(other, ours) > _alike(found, ours):
        found = other
    return one._replace(path=found, has_kernel="kernel" in siblings)


def _bases(path: Path) -> Path:
    """A name without the numbers in it."""
    return (*(part.base for part in _names.parts(path[:-1])), _names.leaf(path[-1]))


def _alike(path: Path, ours: Set[Path]) -> int:
    """How many parts at the end a name has in common with one of others."""
    bases = _bases(path)
    return max((_names.common_end(bases, other) for other in ours), default=-1)


def _is_attention(inside: Iterable[str]) -> bool:
    """Whether the output of a module is called `out`, and `linear` in Haiku."""
    return {name.partition("/")[0] for name in inside} >= {"query", "key", "value"}


def _paths(tree: Any) -> list[tuple[Path, Any]]:
    """Leaves by their keys; a box around an array (`nn.Partitioned`) is no key."""
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"port: expected a dict of modules, not {type(tree).__name__}. Give "
            "variables as init returns them, or nnx.state(model); {} for no state."
        )
    return [
        (tuple(part for key in path for part in _key(key)), leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _key(key: Any) -> Path:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return ()
    inside = getattr(key, "key", getattr(key, "idx", key))
    texts = inside if isinstance(inside, tuple) else str(inside).split("/")
    return tuple(str(text) for text in texts if str(text))


def _collections(variables: Any, arrays: Iterable[tuple[Path, Any]]) -> list[str]:
    """Of an NNX state, in which types tell, or of parameters without a collection."""

    def is_variable(node: Any) -> bool:
        return hasattr(node, "get_value") and hasattr(node, "get_metadata")

    are_params = [
        any(parent.__name__ == "Param" for parent in type(node).__mro__)
        for node in jax.tree.leaves(variables, is_leaf=is_variable)
        for _ in jax.tree.leaves(node)
        if is_variable(node)
    ]
    if not are_params:
        are_params = [path[-1] not in ("mean", "var") for path, _ in arrays]
    return ["params" if is_param else "batch_stats" for is_param in are_params]


def _piece(name: str, place: int, leaf: Any) -> Piece:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(
            f"port: {name} is a {type(leaf).__name__}; expected an array or a "
            "jax.ShapeDtypeStruct."
        )
    return Piece(name, place, tuple(leaf.shape), leaf.dtype)


# Haiku


def of_haiku(params: Any, state: Any) -> list[Leaf]:
    """The leaves of Haiku's parameters and state."""
    modules: dict[Scope, dict[str, Piece]] = collections.defaultdict(dict)
    arrays = [("params", *at) for at in _paths(params)]
    arrays += [("state", *at) for at in _paths(state)]
    for place, (kind, path, leaf) in enumerate(arrays):
        piece = _piece("/".join((kind, *path)), place, leaf)
        modules[kind, path[:-1]][path[-1]] = piece
    leaves: list[Leaf] = []
    for (kind, module), found in modules.items():
        if _is_average(module, found):
            pieces = tuple(found[name] for name in ("counter", "hidden", "average"))
            path = (*module[:-1], module[-1].removesuffix("_ema"))
            leaves.append(Leaf(kind, module, pieces, Average(), path))
        else:
            for name, piece in found.items():
                path = (*module, name)
                leaves.append(Leaf(kind, path, (piece,), path=path))
    return leaves


def _is_average(module: Path, pieces: Mapping[str, Piece]) -> bool:
    """Whether a module is one of the moving averages of a BatchNorm."""
    is_named_so = module[-1:] in (("mean_ema",), ("var_ema",))
    if not is_named_so or pieces.keys() != {"average", "counter", "hidden"}:
        return False
    hidden, average = pieces["hidden"], pieces["average"]
    is_alike = (hidden.shape, hidden.dtype) == (average.shape, average.dtype)
    return is_alike and pieces["counter"].dtype == np.int32
