"""The leaves of both trees in one vocabulary, which is Haiku's.

A *leaf* here is one array of a Haiku module, such as an LSTM's `linear/w`. On either
side it may be stored in several *pieces*: Flax keeps an LSTM's weights gate by gate,
Haiku keeps a moving average with its counter. A *codec* puts pieces together and takes
them apart, one layer at a time.
"""

import collections
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hk_stack.port import _names
from hk_stack.port._names import Path
from hk_stack.port._rules import Rules, paths_of, renamed

Shape = tuple[int, ...]
Array = np.ndarray


class Piece(NamedTuple):
    """One array of a tree.

    Attributes:
      name: Where it is: `params/Dense_0/kernel`.
      place: Among the leaves of the tree.
      shape: Its shape, with layer axes if it has some.
      dtype: Its dtype.
    """

    name: str
    place: int
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}".replace(", ", ",")


class Codec:
    """How a leaf is stored: here, as it is.

    Attributes:
      label: What a plan calls it.
      rank: How many axes the pieces of one layer have at the least.
    """

    label = ""
    rank = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The leaf's shape, from those of its pieces."""
        return shapes[-1]

    def read(self, pieces: Sequence[Array]) -> Array:
        """The leaf."""
        return pieces[-1]

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        """Fills the pieces."""
        pieces[-1][...] = leaf


class Average(Codec):
    """A moving average of Haiku: its counter, its hidden value and the average.

    Haiku's average is `hidden / (1 - decay ** counter)`, Flax's has no such division.
    A large counter makes the two one, now and in all steps to come.
    """

    label = "moving average"
    counter = 2**30

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        """Fills all three, as after infinitely many steps."""
        counter, hidden, average = pieces
        counter[...] = self.counter
        hidden[...] = average[...] = leaf


class Gates(Codec):
    """The gates of a recurrent cell, side by side on the last axis.

    Args:
      order: Which of Flax's gates each of Haiku's is.
      inputs: How many inputs the pieces read, one after the other on the last axis but
        one; 0 for biases.
      offsets: What Haiku adds to each gate by itself, and its bias has less.
    """

    label = "fused gates"

    def __init__(self, order: Sequence[int], inputs: int, offsets: Sequence[int] = ()):
        self.order = tuple(order)
        self.rank = min(2, inputs + 1)
        self.inputs = max(1, inputs)
        self.offsets = (tuple(offsets) or (0,) * len(self.order)) * self.inputs

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """All gates and inputs together."""
        each = len(shapes) // self.inputs
        width = sum(shape[-1] for shape in shapes[:each])
        height = [sum(shape[-2] for shape in shapes[::each])] if self.rank == 2 else []
        return (*shapes[0][: -self.rank], *height, width)

    def read(self, pieces: Sequence[Array]) -> Array:
        """All gates, side by side."""
        pairs = zip(self._gates(pieces), self.offsets, strict=True)
        gates = [gate - gate.dtype.type(n) if n else gate for gate, n in pairs]
        each = len(self.order)
        rows = [gates[i : i + each] for i in range(0, len(gates), each)]
        return np.concatenate([np.concatenate(row, axis=-1) for row in rows], axis=0)

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        """Fills the pieces, gate by gate."""
        gates = self._gates(pieces)
        rows = np.split(leaf, [len(gates[0])]) if self.inputs == 2 else [leaf]
        blocks = [block for row in rows for block in np.split(row, len(self.order), -1)]
        for gate, block, offset in zip(gates, blocks, self.offsets, strict=True):
            gate[...] = block + block.dtype.type(offset) if offset else block

    def _gates(self, pieces: Sequence[Array]) -> list[Array]:
        """Views of each gate of each input, in Haiku's order."""
        count = len(self.order)
        in_piece = count * self.inputs // len(pieces)
        gates = [gate for piece in pieces for gate in np.split(piece, in_piece, -1)]
        return [
            gates[row * count + i] for row in range(self.inputs) for i in self.order
        ]


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
        """Whether it is a parameter, or state."""
        return "params" if self.collection == "params" else "state"

    @property
    def paths(self) -> tuple[str, str]:
        """What rules for it may say."""
        return paths_of(self.collection, self.raw)

    @property
    def is_kernel(self) -> bool:
        """Whether it is one of Flax's `kernel`s."""
        return self.has_kernel and self.raw[-1] == "kernel"

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias beside a `kernel`, which has one axis in Haiku."""
        return self.has_kernel and self.raw[-1] == "bias"

    @property
    def name(self) -> Hashable:
        """What it is matched by."""
        return self.kind, _names.parts(self.path[:-1]), _names.leaf(self.path[-1])

    @property
    def dtypes(self) -> set[np.dtype]:
        """Those of its values, which a counter among its pieces is not."""
        is_average = isinstance(self.codec, Average)
        return {p.dtype for p in (self.pieces[-1:] if is_average else self.pieces)}

    @property
    def shape(self) -> Shape:
        """With layer axes, as if these were in front."""
        return self.codec.shape([piece.shape for piece in self.pieces])

    def __str__(self) -> str:
        if len(self.pieces) == 1:
            return str(self.pieces[0])
        scope = os.path.commonpath([piece.name for piece in self.pieces])
        inside = ",".join(piece.name[len(scope) + 1 :] for piece in self.pieces)
        last = str(self.pieces[-1]).rpartition(" ")[2]
        return f"{scope}/{{{inside}}} {last}"


# Flax


class Entry(NamedTuple):
    """An array of Flax."""

    collection: str
    path: Path
    piece: Piece

    @property
    def module(self) -> tuple[str, Path]:
        """Where it is."""
        return self.collection, self.path[:-1]


Entries = Mapping[str, Entry]  # By their paths in a module: "hi/kernel".


def entries_of(variables: Any) -> list[Entry]:
    """The arrays of Linen's variables, an NNX state, or a plain dict of either."""
    paths = _paths(variables)
    pieces = [_piece("/".join(p), i, leaf) for i, (p, leaf) in enumerate(paths)]
    if isinstance(variables.get("params"), Mapping):
        split = [(path[0], path[1:] or path) for path, _ in paths]
    else:
        every = [path for path, _ in paths]
        split = list(zip(_collections(variables, every), every, strict=True))
    return [Entry(*at, piece) for at, piece in zip(split, pieces, strict=True)]


def of_flax(entries: Sequence[Entry], rename: Rules[str]) -> list[Leaf]:
    """The leaves of these arrays, as they are called after renaming."""
    inside: dict[tuple[str, Path], dict[str, Entry]] = collections.defaultdict(dict)
    for entry in entries:
        for i in range(len(entry.path)):
            scope = entry.collection, entry.path[:i]
            inside[scope]["/".join(entry.path[i:])] = entry
    leaves: list[Leaf] = []
    for (collection, module), found in inside.items():
        for row, parts in _cell(found):
            pieces = tuple(part.piece for part in parts)
            new, count = renamed(rename, collection, module)
            path = (*new, *module[count:], *row.path)
            raw = (*module, *row.path)
            leaves.append(Leaf(collection, raw, path, pieces, row.codec))
    taken = {piece.place for leaf in leaves for piece in leaf.pieces}
    for entry in entries:
        if entry.piece.place not in taken:
            leaves.append(_flax_leaf(entry, inside, rename))
    return leaves


def _flax_leaf(
    entry: Entry, inside: Mapping[tuple[str, Path], Entries], rename: Rules[str]
) -> Leaf:
    collection, path = entry.collection, entry.path
    found = [
        "linear"
        if part == "out" and _is_attention(inside["params", path[:i]])
        else part
        for i, part in enumerate(path)
    ]
    new, count = renamed(rename, collection, path)
    has_kernel = "kernel" in inside[entry.module]
    pieces = (entry.piece,)
    return Leaf(collection, path, (*new, *found[count:]), pieces, has_kernel=has_kernel)


def _is_attention(inside: Iterable[str]) -> bool:
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


def _key(key: Any) -> Iterator[str]:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return
    inside = getattr(key, "key", getattr(key, "idx", key))
    texts = inside if isinstance(inside, tuple) else str(inside).split("/")
    yield from (str(text) for text in texts if str(text))


def _collections(variables: Any, paths: Iterable[Path]) -> list[str]:
    """Of an NNX state, in which types tell, or of parameters without a collection."""

    def is_variable(node: Any) -> bool:
        return hasattr(node, "get_value") and hasattr(node, "get_metadata")

    nodes = jax.tree.leaves(variables, is_leaf=is_variable)
    if any(map(is_variable, nodes)):
        are_params = [
            any(parent.__name__ == "Param" for parent in type(node).__mro__)
            for node in nodes
            for _ in jax.tree.leaves(node)
        ]
    else:
        are_params = [path[-1] not in ("mean", "var") for path in paths]
    return ["params" if is_param else "batch_stats" for is_param in are_params]


def _piece(name: str, place: int, leaf: Any) -> Piece:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(
            f"port: {name} is a {type(leaf).__name__}; expected an array or a "
            "jax.ShapeDtypeStruct."
        )
    return Piece(name, place, tuple(leaf.shape), leaf.dtype)


# Recurrent cells: their leaves in Haiku, the pieces in Flax, and how these go together.


class _Row(NamedTuple):
    path: Path
    pieces: list[str]
    codec: Codec = Codec()


def _pieces(sides: str, gates: Sequence[str], name: str) -> list[str]:
    return [f"{gate.format(side)}/{name}" for side in sides for gate in gates]


def _lstm(gates: Sequence[str]) -> list[_Row]:
    order = (0, 2, 1, 3)  # Haiku has i, g, f, o; and adds one to the forget gate.
    biases = Gates(order, 0, offsets=(0, 0, 1, 0))
    return [
        _Row(("linear", "w"), _pieces("ih", gates, "kernel"), Gates(order, 2)),
        _Row(("linear", "b"), _pieces("h", gates, "bias"), biases),
    ]


def _gru(gates: Sequence[str]) -> list[_Row]:
    return [
        _Row(("w_i",), _pieces("i", gates, "kernel"), Gates(range(3), 1)),
        _Row(("w_h",), _pieces("h", gates, "kernel"), Gates(range(3), 1)),
        _Row(("b_i",), _pieces("i", gates, "bias"), Gates(range(3), 0)),
        _Row(("b_h",), ["hn/bias"]),
    ]


_CELLS = [
    (_pieces("ih", gates, "kernel") + more, rows(gates), count // len(gates))
    for gates, more, rows, count in (
        (["{}i", "{}f", "{}g", "{}o"], [], _lstm, 4),
        (["{}r", "{}z", "{}n"], [], _gru, 3),
        (["dense_{}"], ["dense_h/bias"], _lstm, 4),
        (["dense_{}"], [], _gru, 3),
    )
]


def _cell(found: Entries) -> list[tuple[_Row, list[Entry]]]:
    """The leaves of a recurrent cell, if a module is one by what is inside of it."""
    # NNX writes `if_`, as `if` is a word of Python.
    found = {name.replace("if_/", "if/"): entry for name, entry in found.items()}
    for needed, rows, gates in _CELLS:
        if all(name in found for name in needed):
            kernels = [found[n].piece.shape for n in needed if n.endswith("kernel")]
            half = len(kernels) // 2
            sides = set(kernels[:half]), set(kernels[half:])
            is_even = all(len(s) > 1 and s[-1] % gates == 0 for s in kernels)
            # Gates of other widths are those of another cell.
            if not is_even or any(len(shapes) > 1 for shapes in sides):
                return []
            there = [row for row in rows if all(name in found for name in row.pieces)]
            return [(row, [found[name] for name in row.pieces]) for row in there]
    return []


# Haiku


def of_haiku(params: Any, state: Any) -> list[Leaf]:
    """The leaves of Haiku's parameters and state."""
    modules: dict[tuple[str, Path], dict[str, Piece]] = {}
    place = 0
    for kind, tree in (("params", params), ("state", state)):
        for path, leaf in _paths(tree):
            piece = _piece("/".join((kind, *path)), place, leaf)
            modules.setdefault((kind, path[:-1]), {})[path[-1]] = piece
            place += 1
    leaves: list[Leaf] = []
    for (kind, module), found in modules.items():
        if _is_average(module, found):
            pieces = tuple(found[name] for name in ("counter", "hidden", "average"))
            path = (*module[:-1], module[-1].removesuffix("_ema"))
            leaves.append(Leaf(kind, module, path, pieces, Average()))
            continue
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
