"""`check_finite`: which layer was first to have a value that is not finite.

Each layer of a checked stack returns a code for each of its checks. A stack boils the
codes of all layers down to one, which says what failed first: whose turn it was, which
of the layer's checks, and, if that is a stack in the layer, its own code. So nothing
but integers leaves the loop, and under gradients, rematerialisation and `vmap` they are
values as any other.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hk_stack import _frames


class Checked(NamedTuple):
    """What a stack checks.

    Attributes:
      where: Names the stack.
      num_layers: `L`.
      reverse: Whether the last layer runs first.
      items: What a layer checks, in order: labels, and for a stack its own checks.
      around: What a message says of the Python loops around the stack.
    """

    where: str
    num_layers: int
    reverse: bool
    items: tuple[tuple[str, "Checked | None"], ...]
    around: str = ""

    @property
    def width(self) -> int:
        """How many digits a code has."""
        return 2 + max((c.width for _, c in self.items if c), default=0)

    def encode(self, codes: Sequence[jax.Array]) -> jax.Array:
        """The code of the check that failed first, given those of each item `[L, D]`.

        Its digits are the turn (that of no layer, if all is fine), the item, and the
        item's own digits.
        """
        limits = [c.num_layers if c else 1 for _, c in self.items]
        pairs = list(zip(codes, limits, strict=True))
        failed = jnp.stack([code[:, 0] < limit for code, limit in pairs], 1)
        by_turn = failed[::-1] if self.reverse else failed
        turn = jnp.argmax(by_turn.any(1)).astype(jnp.int32)
        item = jnp.argmax(by_turn[turn]).astype(jnp.int32)
        inner = [
            self._inner(code, c) for code, (_, c) in zip(codes, self.items, strict=True)
        ]
        digits = jnp.stack(inner)[item, self._layer(turn)]
        first = jnp.concatenate([jnp.stack([turn, item]), digits])
        fine = jnp.zeros_like(first).at[0].set(self.num_layers)
        return jnp.where(failed.any(), first, fine)

    def _inner(self, code: jax.Array, checked: "Checked | None") -> jax.Array:
        """The digits of an item, as many as all items have."""
        used = code if checked else code[:, :0]
        return jnp.pad(used, ((0, 0), (0, self.width - 2 - used.shape[1])))

    def _layer(self, turn: jax.Array) -> jax.Array:
        return self.num_layers - 1 - turn if self.reverse else turn

    def messages(
        self, code: jax.Array
    ) -> Iterator[tuple[str, jax.Array, dict[str, jax.Array]]]:
        """Decodes what `encode` returned.

        Yields:
          For each kind of check what a message calls it, whether it was the first that
          failed, and the indices that are to be formatted into the message.
        """
        yield from self._decode(code, code[0] < self.num_layers, "", {})

    def _decode(
        self, code: jax.Array, failed: jax.Array, around: str, indices: dict[str, Any]
    ) -> Iterator[tuple[str, jax.Array, dict[str, jax.Array]]]:
        number = f"layer_{len(indices)}"
        indices = {**indices, number: self._layer(code[0])}
        where = _frames.escaped(f"{self.where}{self.around}")
        around = f", in layer {{{number}}} of {where}{around}"
        for item, (label, inner) in enumerate(self.items):
            here = failed & (code[1] == item)
            if inner is None:
                yield f"{_frames.escaped(label)}{around}", here, indices
            else:
                yield from inner._decode(code[2:], here, around, indices)
