"""Recurrent cells: their gates are apart in Flax, and side by side in Haiku."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hk_stack.port._codecs import Array, Codec, Shape
from hk_stack.port._names import Path


class Gates(Codec):
    """The gates of a recurrent cell, side by side on the last axis.

    Args:
      order: Which of Flax's gates each of Haiku's is.
      inputs: How many inputs the pieces read, one after the other on the last axis but
        one; 0 for biases.
      offsets: What Haiku adds to each gate by itself, and its bias has less.
    """

    label = "fused gates"
    is_plain = False

    def __init__(self, order: Sequence[int], inputs: int, offsets: Sequence[int] = ()):
        self.order = tuple(order)
        self.rank: int = min(2, inputs + 1)
        self.inputs = max(1, inputs)
        self.offsets = (tuple(offsets) or (0,) * len(self.order)) * self.inputs

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        each = len(shapes) // self.inputs
        width = sum(shape[-1] for shape in shapes[:each])
        height = [sum(shape[-2] for shape in shapes[::each])] if self.rank == 2 else []
        return (*shapes[0][: -self.rank], *height, width)

    def read(self, pieces: Sequence[Array]) -> Array:
        pairs = zip(self._gates(pieces), self.offsets, strict=True)
        gates = [gate - gate.dtype.type(n) if n else gate for gate, n in pairs]
        each = len(self.order)
        rows = [gates[i : i + each] for i in range(0, len(gates), each)]
        return np.concatenate([np.concatenate(row, axis=-1) for row in rows])

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
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


class Row(NamedTuple):
    """A leaf in Haiku, its pieces in Flax, and how these go together."""

    path: Path
    pieces: list[str]
    codec: Codec


def _named(sides: str, gates: Sequence[str], name: str) -> list[str]:
    return [f"{gate.format(side)}/{name}" for side in sides for gate in gates]


def _lstm(gates: Sequence[str]) -> list[Row]:
    order = (0, 2, 1, 3)  # Haiku has i, g, f, o; and adds one to the forget gate.
    biases = Gates(order, 0, offsets=(0, 0, 1, 0))
    return [
        Row(("linear", "w"), _named("ih", gates, "kernel"), Gates(order, 2)),
        Row(("linear", "b"), _named("h", gates, "bias"), biases),
    ]


def _gru(gates: Sequence[str]) -> list[Row]:
    return [
        Row(("w_i",), _named("i", gates, "kernel"), Gates(range(3), 1)),
        Row(("w_h",), _named("h", gates, "kernel"), Gates(range(3), 1)),
        Row(("b_i",), _named("i", gates, "bias"), Gates(range(3), 0)),
        Row(("b_h",), ["hn/bias"], Codec()),
    ]


# What has to be there, the leaves, and how many gates a piece holds.
_CELLS = [
    (_named("ih", gates, "kernel") + more, rows(gates), in_piece)
    for gates, more, rows, in_piece in (
        (["{}i", "{}f", "{}g", "{}o"], [], _lstm, 1),
        (["{}r", "{}z", "{}n"], [], _gru, 1),
        (["dense_{}"], ["dense_h/bias"], _lstm, 4),
        (["dense_{}"], [], _gru, 3),
    )
]


def leaves_of(found: Mapping[str, Shape]) -> list[Row]:
    """The leaves of a recurrent cell, if a module is one by what is inside of it."""
    for needed, rows, in_piece in _CELLS:
        if all(name in found for name in needed):
            kernels = [found[n] for n in needed if n.endswith("kernel")]
            half = len(kernels) // 2
            sides = set(kernels[:half]), set(kernels[half:])
            is_even = all(len(s) > 1 and s[-1] % in_piece == 0 for s in kernels)
            # Gates of other widths are those of another cell.
            if not is_even or any(len(shapes) > 1 for shapes in sides):
                return []
            return [row for row in rows if all(name in found for name in row.pieces)]
    return []
