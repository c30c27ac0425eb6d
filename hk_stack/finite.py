"""`check_finite`: which layer was first to have a value that is not finite.

Each layer of a checked stack returns a code for each of its checks: 0 if the value is
bad, 1 if it is fine. A stack boils the codes of all layers down to one: the number of
the first check that failed, counted in the order in which checks run, or how many there
are. So nothing but integers leaves the loop, and under gradients, rematerialisation and
`vmap` they are values as any other. A stack in a layer is one check, with more codes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hk_stack import inside


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
    def sizes(self) -> list[int]:
        """How many checks each item stands for."""
        return [1 if c is None else c.num_layers * sum(c.sizes) for _, c in self.items]

    def encode(self, codes: Sequence[jax.Array]) -> jax.Array:
        """The number of the first check that failed, given codes `[L]` of each item."""
        total = sum(self.sizes)
        first = jnp.full([self.num_layers], total, jnp.int32)
        before = total
        for size, code in reversed(list(zip(self.sizes, codes, strict=True))):
            before -= size
            first = jnp.where(code < size, before + code, first)
        first = first[::-1] if self.reverse else first
        turn = jnp.argmin(first == total).astype(jnp.int32)
        return jnp.where(first[turn] < total, turn * total + first[turn], self.size)

    @property
    def size(self) -> int:
        """How many checks there are in all layers."""
        return self.num_layers * sum(self.sizes)

    def messages(
        self, code: jax.Array
    ) -> Iterator[tuple[str, jax.Array, dict[str, jax.Array]]]:
        """Decodes what `encode` returned.

        Yields:
          For each kind of check what a message calls it, whether it was the first that
          failed, and the indices that are to be formatted into the message.
        """
        yield from self._decode(code, code < self.size, "", {})

    def _decode(
        self, code: jax.Array, failed: jax.Array, around: str, indices: dict[str, Any]
    ) -> Iterator[tuple[str, jax.Array, dict[str, jax.Array]]]:
        total = sum(self.sizes)
        layer, code = jnp.divmod(code, total)
        if self.reverse:
            layer = self.num_layers - 1 - layer
        number = f"layer_{len(indices)}"
        indices = {**indices, number: layer}
        where = inside.escaped(f"{self.where}{self.around}")
        around = f", in layer {{{number}}} of {where}{around}"
        for (label, inner), size in zip(self.items, self.sizes, strict=True):
            here = failed & (code >= 0) & (code < size)
            if inner is None:
                yield f"{inside.escaped(label)}{around}", here, indices
            else:
                yield from inner._decode(code, here, around, indices)
            code = code - size
