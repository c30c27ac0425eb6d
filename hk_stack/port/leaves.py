"""The leaves of both trees in one vocabulary, which is Haiku's.

A *leaf* here is one array of a Haiku module, such as an LSTM's `linear/w`. On either
side it may be stored in several *pieces*: Flax keeps an LSTM's weights gate by gate,
Haiku keeps a moving average with its counter. A *codec* puts pieces together and takes
them apart, one layer at a time, on the last axes of the arrays.
"""

import collections
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from hk_stack.port import names

Shape = tuple[int, ...]


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


class Codec(Protocol):
    """Puts the pieces of a leaf together, and takes a leaf apart."""

    label: str
    rank: int  # How many axes the pieces have at the least.

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The leaf's shape, from those of its pieces."""

    def read(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The leaf."""

    def write(self, leaf: np.ndarray, pieces: Sequence[np.ndarray]) -> None:
        """Fills the pieces."""


class Leaf(NamedTuple):
    """One array in Haiku's vocabulary, and where it is stored.

    Attributes:
      kind: "params" or "state".
      path: Its module and its name.
      pieces: What it is made of.
      codec: How.
      raw: Its path without the collection, as the tree has it; for users' rules.
      collection: Flax's collection, or Haiku's "params" or "state".
      spoken: Its path if nothing is translated, for modules of the user's own.
      rank: How many axes longer than one it has in one layer of Haiku, if known.
      standard: Whether it is a kernel or bias, which Haiku stores with merged axes.
    """

    kind: str
    path: names.Path
    pieces: tuple[Piece, ...]
    codec: Codec
    raw: str
    collection: str
    spoken: names.Path
    rank: int | None = None
    standard: bool = False

    @property
    def paths(self) -> tuple[str, str]:
        """What rules for a leaf may say: its path, with the collection or without."""
        return self.raw, f"{self.collection}/{self.raw}"

    @property
    def is_kernel(self) -> bool:
        """Whether it is one of Flax's `kernel`s."""
        return self.standard and self.raw.endswith("kernel")

    @property
    def least_rank(self) -> int:
        """How many axes it has in one layer at the least."""
        return 2 if self.is_kernel else self.rank or 0

    @property
    def dtype(self) -> np.dtype:
        """That of its values, which a counter among its pieces is not."""
        return self.pieces[-1].dtype

    @property
    def dtypes(self) -> set[np.dtype]:
        """Those of all pieces that are put together."""
        pieces = self.pieces if isinstance(self.codec, Gates) else self.pieces[-1:]
        return {piece.dtype for piece in pieces}

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.codec.shape([piece.shape for piece in self.pieces]))

    def __str__(self) -> str:
        if len(self.pieces) == 1:
            return str(self.pieces[0])
        paths = [tuple(piece.name.split("/")) for piece in self.pieces]
        scope = "/".join(functools.reduce(names.beginning, paths))
        inside = [piece.name[len(scope) :].lstrip("/") for piece in self.pieces]
        last = str(self.pieces[-1]).rpartition(" ")[2]
        return f"{scope}/{{{','.join(inside)}}} {last}"


class Plain:
    """A leaf that is stored as it is."""

    label = ""
    rank = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """That of the only piece."""
        return shapes[0]

    def read(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The only piece."""
        return pieces[0]

    def write(self, leaf: np.ndarray, pieces: Sequence[np.ndarray]) -> None:
        """Fills the only piece."""
        pieces[0][...] = leaf


class Average:
    """A moving average of Haiku: its counter, its hidden value and the average.

    Haiku's average is `hidden / (1 - decay ** counter)`, Flax's has no such division.
    A large counter makes the two one, now and in all steps to come.
    """

    label = "moving average"
    rank = 0
    counter = 2**30

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """That of the average."""
        return shapes[-1]

    def read(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """The average, which evaluation uses."""
        return pieces[-1]

    def write(self, leaf: np.ndarray, pieces: Sequence[np.ndarray]) -> None:
        """Fills all three, as after infinitely many steps."""
        counter, hidden, average = pieces
        counter[...] = self.counter
        hidden[...] = average[...] = leaf


class Gates:
    """The gates of a recurrent cell, side by side on the last axis.

    ```
    leaf = [[kernel of gate g from input x for g in gates] for x in inputs]
    ```

    Args:
      order: Which of Flax's gates each of Haiku's is.
      inputs: How many inputs the pieces read, one after the other on the last axis but
        one; 0 for biases.
      offsets: What Haiku adds to each gate by itself, and its bias has less.
    """

    label = "fused gates"

    def __init__(
        self, order: Sequence[int], inputs: int, offsets: Sequence[float] = ()
    ):
        self.order = tuple(order)
        self.inputs = inputs
        self.rank = 2 if inputs else 1
        self.offsets = tuple(offsets) or (0.0,) * len(self.order)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """All gates and inputs together."""
        rows = self._rows(shapes)
        width = sum(shape[-1] for shape in rows[0])
        if not self.inputs:
            return (*shapes[0][:-1], width)
        return (*shapes[0][:-2], sum(row[0][-2] for row in rows), width)

    def read(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """All gates, side by side."""
        rows = [
            np.concatenate(
                [
                    gates[flax] - np.asarray(offset, gates[flax].dtype)
                    if offset
                    else gates[flax]
                    for flax, offset in zip(self.order, self.offsets, strict=True)
                ],
                axis=-1,
            )
            for gates in map(self._gates, self._rows(pieces))
        ]
        return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=-2)

    def write(self, leaf: np.ndarray, pieces: Sequence[np.ndarray]) -> None:
        """Fills the pieces, gate by gate."""
        start = 0
        for row in self._rows(pieces):
            size = row[0].shape[-2] if self.inputs else None
            part = leaf[..., start : start + size, :] if size else leaf
            start += size or 0
            gates = self._gates(row)
            blocks = np.split(part, len(self.order), axis=-1)
            for flax, offset, block in zip(
                self.order, self.offsets, blocks, strict=True
            ):
                gates[flax][...] = block + np.asarray(offset, block.dtype)

    def _rows(self, pieces: Sequence[Any]) -> list[Sequence[Any]]:
        """The pieces of each input."""
        size = len(pieces) // max(1, self.inputs)
        return [pieces[i : i + size] for i in range(0, len(pieces), size)]

    def _gates(self, row: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Views of each gate, in Flax's order; a piece may hold several."""
        each = len(self.order) // len(row)
        return [gate for piece in row for gate in np.split(piece, each, axis=-1)]


# Flax


def of_flax(variables: Any, rename: names.Renames) -> list[Leaf]:
    """The leaves of Linen's variables, an NNX state, or a plain dict of either."""
    entries = _flax_entries(variables)
    inside: dict[tuple[str, names.Path], set[str]] = collections.defaultdict(set)
    for entry in entries:
        for i in range(len(entry.path)):
            inside[entry.kind, entry.path[:i]].add(entry.path[i])
    near: dict[Any, dict[names.Path, _Entry]] = collections.defaultdict(dict)
    for entry in entries:
        near[entry.kind, entry.path[:-2]][entry.path[-2:]] = entry
    leaves: list[Leaf] = []
    for (kind, module), by_name in near.items():
        if cell := _cell(inside[kind, module], by_name):
            leaves += _cell_leaves(module, by_name, cell, rename)
    taken = {piece.place for leaf in leaves for piece in leaf.pieces}
    rest = [entry for entry in entries if entry.piece.place not in taken]
    return leaves + [_flax_leaf(entry, inside, rename) for entry in rest]


def paths_of_flax(variables: Any) -> list[tuple[str, str]]:
    """What rules may say for each array of Flax."""
    entries = _flax_entries(variables)
    raws = [("/".join(entry.path), entry.collection) for entry in entries]
    return [(raw, f"{collection}/{raw}") for raw, collection in raws]


class _Entry(NamedTuple):
    kind: str
    collection: str
    path: names.Path
    piece: Piece


def _flax_entries(variables: Any) -> list[_Entry]:
    paths = _paths(variables)
    has_collections = isinstance(variables, Mapping) and isinstance(
        variables.get("params"), Mapping
    )
    types = [] if has_collections else _variable_types(variables)
    entries = []
    for index, (path, leaf) in enumerate(paths):
        if has_collections:
            collection, rest = path[0], list(path[1:] or path)
        else:
            rest = list(path)
            named = path[-1] in ("mean", "var")
            is_state = types[index] != "Param" if types else named
            collection = "batch_stats" if is_state else "params"
        kind = "params" if collection == "params" else "state"
        piece = _piece("/".join(path), index, leaf)
        entries.append(_Entry(kind, collection, tuple(rest), piece))
    return entries


def _paths(tree: Any) -> list[tuple[names.Path, Any]]:
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


def _key(key: Any) -> list[str]:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return []
    inside = getattr(key, "key", getattr(key, "idx", key))
    texts = inside if isinstance(inside, tuple) else str(inside).split("/")
    return [str(text) for text in texts if str(text)]


def _variable_types(variables: Any) -> list[str]:
    """For each leaf of an NNX state its type of variable; nothing for plain dicts."""

    def is_variable(node: Any) -> bool:
        return hasattr(node, "get_value") and hasattr(node, "get_metadata")

    nodes = jax.tree.leaves(variables, is_leaf=is_variable)
    if not any(map(is_variable, nodes)):
        return []
    return [
        "Param" if "Param" in (c.__name__ for c in type(node).__mro__) else "state"
        for node in nodes
        for _ in jax.tree.leaves(node)
    ]


def _piece(name: str, index: int, leaf: Any) -> Piece:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(
            f"port: {name} is a {type(leaf).__name__}; expected an array or a "
            "jax.ShapeDtypeStruct."
        )
    return Piece(name, index, tuple(leaf.shape), leaf.dtype)


_LSTM = ("i", "f", "g", "o")
_GRU = ("r", "z", "n")


class _Cell(NamedTuple):
    """A recurrent cell.

    Attributes:
      gates: Its gates, in Flax's order.
      is_fused: Whether one kernel holds all of them.
    """

    gates: tuple[str, ...]
    is_fused: bool

    def entries(
        self, side: str, name: str, by_name: Mapping[names.Path, _Entry]
    ) -> list[_Entry]:
        """The kernels or biases of one side ("i" or "h"), if all gates have one."""
        if self.is_fused:
            paths: list[names.Path] = [(f"dense_{side}", name)]
        else:
            paths = [(f"{side}{gate}", name) for gate in self.gates]
        # NNX writes `if_`, as `if` is a word of Python.
        paths = [p if p in by_name else (f"{p[0]}_", name) for p in paths]
        return [by_name[p] for p in paths] if all(p in by_name for p in paths) else []


def _cell(found: set[str], by_name: Mapping[names.Path, _Entry]) -> _Cell | None:
    """Which recurrent cell a module is, by what is inside of it."""
    if found >= {"dense_i", "dense_h"}:
        is_lstm = ("dense_h", "bias") in by_name
        cell = _Cell(_LSTM if is_lstm else _GRU, is_fused=True)
    else:
        is_lstm = "hf" in found
        cell = _Cell(_LSTM if is_lstm else _GRU, is_fused=False)
    for side in "ih":
        kernels = cell.entries(side, "kernel", by_name)
        shapes = {entry.piece.shape for entry in kernels}
        # Gates of other widths are those of another cell.
        if len(shapes) != 1 or len(min(shapes)) < 2:
            return None
        if cell.is_fused and min(shapes)[-1] % len(cell.gates):
            return None
    return cell


def _cell_leaves(
    module: names.Path,
    by_name: Mapping[names.Path, _Entry],
    cell: _Cell,
    rename: names.Renames,
) -> Iterable[Leaf]:
    """The leaves of a recurrent cell in Haiku."""

    def leaf(path: names.Path, parts: list[_Entry], codec: Codec, rank: int) -> Leaf:
        entry = parts[0]
        found = names.renamed(rename, entry.collection, module)
        new, count = found or (module, len(module))
        path = (*new, *module[count:], *path)
        pieces = tuple(part.piece for part in parts)
        raw = "/".join((*module, path[-1]))
        kind, collection = entry.kind, entry.collection
        return Leaf(kind, path, pieces, codec, raw, collection, path, rank)

    of_inputs, of_state = (cell.entries(side, "kernel", by_name) for side in "ih")
    if cell.gates == _LSTM:
        # Haiku orders the gates i, g, f, o, and adds one to the forget gate.
        order = (0, 2, 1, 3)
        yield leaf(("linear", "w"), of_inputs + of_state, Gates(order, 2), 2)
        if biases := cell.entries("h", "bias", by_name):
            codec = Gates(order, 0, offsets=(0.0, 0.0, 1.0, 0.0))
            yield leaf(("linear", "b"), biases, codec, 1)
        return
    same = range(len(cell.gates))
    yield leaf(("w_i",), of_inputs, Gates(same, 1), 2)
    yield leaf(("w_h",), of_state, Gates(same, 1), 2)
    if biases := cell.entries("i", "bias", by_name):
        yield leaf(("b_i",), biases, Gates(same, 0), 1)
    if bias := by_name.get(("hn", "bias")):
        yield leaf(("b_h",), [bias], Plain(), 1)


_NORMS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")


def _flax_leaf(
    entry: _Entry, inside: Mapping[Any, set[str]], rename: names.Renames
) -> Leaf:
    *module, name = entry.path
    siblings = inside["params", tuple(module)]
    translated = [
        "linear" if _is_output(inside, entry, i) else part
        for i, part in enumerate(module)
    ]
    translated.append(_leaf_name(entry, siblings))
    if module and module[-1] == "kernel":  # The name of a vector of SpectralNorm.
        translated[-2] = "w"
    found = names.renamed(rename, entry.collection, entry.path)
    new, count = found if found else ((), 0)
    path = (*new, *translated[count:])
    spoken = (*new, *entry.path[count:])
    return Leaf(
        kind=entry.kind,
        path=path,
        pieces=(entry.piece,),
        codec=Plain(),
        raw="/".join(entry.path),
        collection=entry.collection,
        spoken=spoken,
        rank=_rank(entry, siblings),
        standard="kernel" in siblings and name in ("kernel", "bias"),
    )


def _is_output(inside: Mapping[Any, set[str]], entry: _Entry, i: int) -> bool:
    """Whether part `i` of a path is the output projection of an attention."""
    around = inside["params", entry.path[:i]]
    return entry.path[i] == "out" and around >= {"query", "key", "value"}


def _leaf_name(entry: _Entry, siblings: set[str]) -> str:
    name = entry.path[-1]
    if name == "bias":
        return "b" if "kernel" in siblings else "offset"
    if entry.kind == "state":
        return "u0" if name == "u" else name
    return {"kernel": "w", "embedding": "embeddings"}.get(name, name)


def _rank(entry: _Entry, siblings: set[str]) -> int | None:
    *module, name = entry.path
    if entry.kind == "state":
        return 1 if name in ("mean", "var") else None
    if name == "embedding":
        return 2
    is_norm = bool(module) and names.parts(module)[-1].base in _NORMS
    is_vector = name == "bias" and siblings & {"kernel", "scale"}
    is_scale = name == "scale" and (is_norm or siblings <= {"scale", "bias"})
    return 1 if is_vector or is_scale else None


# Haiku


def of_haiku(params: Any, state: Any) -> list[Leaf]:
    """The leaves of Haiku's parameters and state."""
    leaves: list[Leaf] = []
    modules: dict[tuple[str, names.Path], list[tuple[str, Piece]]] = {}
    index = 0
    for kind, tree in (("params", params), ("state", state)):
        for path, leaf in _paths(tree):
            piece = _piece("/".join((kind, *path)), index, leaf)
            modules.setdefault((kind, path[:-1]), []).append((path[-1], piece))
            index += 1
    for (kind, module), found in modules.items():
        by_name = dict(found)
        if _is_average(module, by_name):
            pieces = tuple(by_name[n] for n in ("counter", "hidden", "average"))
            scope = _without_methods(module[:-1])
            path = (*scope, module[-1].removesuffix("_ema"))
            raw = "/".join(module)
            leaves.append(Leaf(kind, path, pieces, Average(), raw, kind, path))
            continue
        for name, piece in found:
            path = (*_spectral(_without_methods(module)), name)
            raw = "/".join((*module, name))
            leaves.append(Leaf(kind, path, (piece,), Plain(), raw, kind, path))
    return leaves


def _is_average(module: names.Path, pieces: Mapping[str, Piece]) -> bool:
    """Whether a module is one of the moving averages of a BatchNorm."""
    if module[-1:] not in (("mean_ema",), ("var_ema",)):
        return False
    if pieces.keys() != {"average", "counter", "hidden"}:
        return False
    hidden, average = pieces["hidden"], pieces["average"]
    is_alike = (hidden.shape, hidden.dtype) == (average.shape, average.dtype)
    return is_alike and pieces["counter"].dtype == np.int32


def _without_methods(module: names.Path) -> names.Path:
    return tuple(part for part in module if part != "~")


def _spectral(module: names.Path) -> names.Path:
    """`SNParamsTree` writes the path of a parameter as one name."""
    if len(module) < 2 or not module[-2].startswith("sn_params_tree"):
        return module
    inside = module[-1].split("__")
    return (*module[:-1], *(part for part in inside if part not in ("_tilde", "~")))
