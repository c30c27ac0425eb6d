"""The leaves of both trees in one vocabulary, which is Haiku's.

A *leaf* here is one array of a Haiku module, such as an LSTM's `linear/w`. On either
side it may be stored in several *pieces*: Flax keeps an LSTM's weights gate by gate,
Haiku keeps a moving average with its counter. A *codec* puts pieces together and takes
them apart, one layer at a time.
"""

import collections
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hk_stack.port import _cells, _names
from hk_stack.port._cells import Array, Codec, Shape
from hk_stack.port._names import Path
from hk_stack.port._rules import Rules, paths_of, renamed


class Piece(NamedTuple):
    """One array of a tree: its whole name, and its place among the tree's leaves."""

    name: str
    place: int
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}".replace(", ", ",")


class Average(Codec):
    """A moving average of Haiku: its counter, its hidden value and the average.

    Haiku's average is `hidden / (1 - decay ** counter)`, Flax's has no such division.
    A large counter makes the two one, now and in all steps to come.
    """

    label = "moving average"

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        counter, hidden, average = pieces
        counter[...] = 2**30
        hidden[...] = average[...] = leaf


class Leaf(NamedTuple):
    """One array in Haiku's vocabulary, and where it is stored.

    Attributes:
      collection: Flax's collection, or Haiku's "params" or "state".
      raw: Its path without the collection, as the tree has it.
      path: Its module in Haiku's words, and its name.
      pieces: What it is made of.
      codec: How.
      has_kernel: Whether it is in a module of Flax with a kernel.
    """

    collection: str
    raw: Path
    path: Path
    pieces: tuple[Piece, ...]
    codec: Codec = Codec()
    has_kernel: bool = False

    @property
    def kind(self) -> str:
        return "params" if self.collection == "params" else "state"

    @property
    def name(self) -> Hashable:
        """What it is matched by."""
        return self.kind, _names.parts(self.path[:-1]), _names.leaf(self.path[-1])

    @property
    def paths(self) -> tuple[str, str]:
        """What rules for it may say."""
        return paths_of(self.collection, self.raw)

    @property
    def is_kernel(self) -> bool:
        return self.has_kernel and self.raw[-1] == "kernel"

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias beside a `kernel`."""
        return self.has_kernel and self.raw[-1] == "bias"

    @property
    def is_of_batch_norm(self) -> bool:
        """Whether it has one axis in a layer, which other norms may not."""
        module = _names.parts(self.path[:-1])
        is_average = self.kind == "state" and self.path[-1] in ("mean", "var")
        return is_average or (bool(module) and module[-1].base == "batch_norm")

    @property
    def dtypes(self) -> set[np.dtype]:
        """Those of its values, which a counter is not."""
        is_average = isinstance(self.codec, Average)
        return {p.dtype for p in (self.pieces[-1:] if is_average else self.pieces)}

    @property
    def shape(self) -> Shape:
        """With layer axes, as if these were in front."""
        return self.codec.shape([piece.shape for piece in self.pieces])

    @property
    def ndim(self) -> int:
        """How many axes all its pieces have."""
        return min(len(piece.shape) for piece in self.pieces)

    def __str__(self) -> str:
        if len(self.pieces) == 1:
            return str(self.pieces[0])
        scope = os.path.commonpath([piece.name for piece in self.pieces])
        inside = ",".join(piece.name[len(scope) + 1 :] for piece in self.pieces)
        return f"{scope}/{{{inside}}} {str(self.pieces[-1]).rpartition(' ')[2]}"


# Flax


Scope = tuple[str, Path]  # A collection, and a module.


def of_flax(variables: Any, rename: Rules[str]) -> list[Leaf]:
    """The leaves of Linen's variables, an NNX state, or a plain dict of either."""
    arrays = _paths(variables)
    if isinstance(variables.get("params"), Mapping):
        at: list[Scope] = [(path[0], path[1:] or path) for path, _ in arrays]
    else:
        at = list(zip(_collections(variables, arrays), dict(arrays), strict=True))
    inside: dict[Scope, dict[str, Piece]] = collections.defaultdict(dict)
    for place, ((path, leaf), (collection, inner)) in enumerate(
        zip(arrays, at, strict=True)
    ):
        piece = _piece("/".join(path), place, leaf)
        for i in range(len(inner)):
            # NNX writes `if_` for a gate, as `if` is a word of Python.
            name = "/".join(inner[i:]).replace("if_/", "if/")
            inside[collection, inner[:i]][name] = piece
    leaves: list[Leaf] = []
    for (collection, module), found in inside.items():
        for path, names, codec in _cells.leaves_of(
            {n: p.shape for n, p in found.items()}
        ):
            pieces = tuple(found[name] for name in names)
            new, count = renamed(rename, collection, module)
            whole = (*new, *module[count:], *path)
            leaves.append(Leaf(collection, (*module, *path), whole, pieces, codec))
    taken = {piece.place for leaf in leaves for piece in leaf.pieces}
    for place, (collection, path) in enumerate(at):
        if place not in taken:
            leaves.append(_flax_leaf(collection, path, inside, rename))
    return leaves


def _flax_leaf(
    collection: str,
    path: Path,
    inside: Mapping[Scope, Mapping[str, Piece]],
    rename: Rules[str],
) -> Leaf:
    found = [
        "linear"
        if part == "out" and _is_attention(inside["params", path[:i]])
        else part
        for i, part in enumerate(path)
    ]
    siblings = inside[collection, path[:-1]]
    is_offset = path[-1] == "bias" and "kernel" not in siblings
    found[-1] = "offset" if is_offset else _names.leaf(path[-1])
    new, count = renamed(rename, collection, path)
    pieces = (siblings[path[-1]],)
    whole = (*new, *found[count:])
    return Leaf(collection, path, whole, pieces, has_kernel="kernel" in siblings)


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
            leaves.append(Leaf(kind, module, path, pieces, Average()))
        else:
            for name, piece in found.items():
                path = (*module, name)
                leaves.append(Leaf(kind, path, path, (piece,)))
    return leaves


def _is_average(module: Path, pieces: Mapping[str, Piece]) -> bool:
    """Whether a module is one of the moving averages of a BatchNorm."""
    if module[-1:] not in (("mean_ema",), ("var_ema",)):
        return False
    if pieces.keys() != {"average", "counter", "hidden"}:
        return False
    hidden, average = pieces["hidden"], pieces["average"]
    is_alike = (hidden.shape, hidden.dtype) == (average.shape, average.dtype)
    return is_alike and pieces["counter"].dtype == np.int32
