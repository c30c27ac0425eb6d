"""What leaves are made of: arrays of a tree, and how these are put together."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from hk_stack.port._names import Path

Shape = tuple[int, ...]
Array = np.ndarray


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


class Codec:
    """How a leaf is stored: here, as it is.

    Attributes:
      label: What a plan calls it.
      rank: How many axes the pieces of one layer have, if that is known.
      is_plain: Whether axes of the leaf are those of its piece.
      share: How much of its pieces the leaf holds.
    """

    label = ""
    rank: int | None = None
    is_plain = True
    share: Fraction | int = 1

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The leaf's shape, from those of its pieces."""
        return shapes[-1]

    def read(self, pieces: Sequence[Array]) -> Array:
        """The leaf."""
        return pieces[-1]

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        """Fills the pieces."""
        pieces[-1][...] = leaf


class Stored(NamedTuple):
    """A leaf of Flax: its collection and path, what it is made of, and how."""

    collection: str
    path: Path
    pieces: tuple[Piece, ...]
    codec: Codec = Codec()


Leaves = dict[tuple[str, Path], Stored]
