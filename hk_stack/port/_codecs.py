"""Leaves, and what they are made of.

A *leaf* here is one array of a Haiku module, such as an LSTM's `linear/w`. On either
side it may be stored in several *pieces*: Flax keeps an LSTM's weights gate by gate,
Haiku keeps a moving average with its counter. A *codec* puts pieces together and takes
them apart, one layer at a time.
"""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from hk_stack.port import _names
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
      rank: How many axes the pieces of one layer have, if that is known.
      is_plain: Whether axes of the leaf are those of its piece.
    """

    rank: int | None = None
    is_plain = True

    @property
    def label(self) -> str:
        """What a plan calls it."""
        return ""

    @property
    def share(self) -> Fraction:
        """How much of its pieces the leaf holds."""
        return Fraction(1)

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

    def write(self, leaf: Array, pieces: Sequence[Array]) -> None:
        counter, hidden, average = pieces
        counter[...] = 2**30
        hidden[...] = average[...] = leaf


class Leaf(NamedTuple):
    """One array in Haiku's vocabulary, and where it is stored.

    Attributes:
      collection: Flax's collection, or Haiku's "params" or "state".
      raw: Its path without the collection, as the tree has it.
      pieces: What it is made of.
      codec: How.
      path: Its module in Haiku's words, and its name.
      has_kernel: Whether it is in a module of Flax with a kernel.
    """

    collection: str
    raw: Path
    pieces: tuple[Piece, ...]
    codec: Codec = Codec()
    path: Path = ()
    has_kernel: bool = False

    @property
    def kind(self) -> str:
        return "params" if self.collection == "params" else "state"

    @property
    def name(self) -> tuple[str, _names.Module, str]:
        """What it is matched by."""
        return self.kind, _names.parts(self.path[:-1]), _names.leaf(self.path[-1])

    @property
    def paths(self) -> tuple[str, str]:
        """What rules for it may say."""
        raw = "/".join(self.raw)
        return raw, f"{self.collection}/{raw}"

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
            label = f" ({self.codec.label})" if self.codec.label else ""
            return f"{self.pieces[0]}{label}"
        scope = os.path.commonpath([piece.name for piece in self.pieces])
        inside = ",".join(piece.name[len(scope) + 1 :] for piece in self.pieces)
        return f"{scope}/{{{inside}}} {str(self.pieces[-1]).rpartition(' ')[2]}"


Leaves = dict[tuple[str, Path], Leaf]  # By collection and path, of Flax.
