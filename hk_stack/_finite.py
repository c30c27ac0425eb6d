"""`check_finite`: which layer was first to have a value that is not finite.

Each layer of a checked stack returns a code for each of its checks. A stack boils the
codes of all layers down to one, which says what failed first: whose turn it was, which
of the layer's checks, and, if that is a stack in the layer, its own code. So nothing
but integers leaves the loop, and under gradients, rematerialisation and `vmap` they are
values as any other.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from hk_stack import _checks, _frames, _marks
from hk_stack._types import Tree

T = TypeVar("T")


class Check(NamedTuple):
    """What is checked: one value, or all that the layers of a stack check.

    Of two codes of a check the one whose digits are less, the first that differ, failed
    before the other. A value's is 0 if it is bad, and 1 if it is fine.

    Attributes:
      label: Names the value or the stack.
      num_layers: `L`; of a value 1.
      reverse: Whether the last layer runs first.
      items: What a layer checks, in order; of a value nothing.
    """

    label: str
    num_layers: int = 1
    reverse: bool = False
    items: tuple["Check", ...] = ()

    @property
    def width(self) -> int:
        """How many digits a code has."""
        return 2 + max(item.width for item in self.items) if self.items else 1

    def encode(self, codes: Sequence[jax.Array]) -> jax.Array:
        """The code of the check that failed first, given those of each item `[L, D]`.

        Its digits are the turn (that of no layer, if all is fine), the item, and the
        item's own digits.
        """
        turns = self._layer(jnp.arange(self.num_layers, dtype=jnp.int32))
        rows = []
        for i, (item, code) in enumerate(zip(self.items, codes, strict=True)):
            turn = jnp.where(code[:, 0] < item.num_layers, turns, self.num_layers)
            own = jnp.stack([turn, jnp.full_like(turn, i)], 1)
            wide = ((0, 0), (0, self.width - 2 - item.width))
            rows.append(jnp.concatenate([own, jnp.pad(code, wide)], 1))
        return _marks.first_code(jnp.concatenate(rows))

    def _layer(self, turn: jax.Array) -> jax.Array:
        return self.num_layers - 1 - turn if self.reverse else turn

    def messages(
        self,
        code: jax.Array,
        here: jax.Array | bool = True,
        around: str = "",
        indices: Mapping[str, jax.Array] | None = None,
    ) -> Iterator[tuple[str, jax.Array, Mapping[str, jax.Array]]]:
        """Decodes what `encode` returned.

        Args:
          code: The digits.
          here: Whether this was the first to fail of what the stack around it checks.
          around: What a message says of the stacks around.
          indices: Those that are to be formatted into it.

        Yields:
          For each value what a message calls it, whether it was the first that failed,
          and the indices that are to be formatted into the message.
        """
        here, indices = here & (code[0] < self.num_layers), indices or {}
        label = self.label.replace("{", "{{").replace("}", "}}")
        if not self.items:
            yield f"{label}{around}", here, indices
            return
        number = f"layer_{len(indices)}"
        indices = {**indices, number: self._layer(code[0])}
        around = f", in layer {{{number}}} of {label}{around}"
        for i, item in enumerate(self.items):
            yield from item.messages(code[2:], here & (code[1] == i), around, indices)


def _read(fields: list[Any]) -> Check:
    """A check, from what JSON makes of it."""
    label, num_layers, reverse, items = fields
    return Check(label, num_layers, reverse, tuple(map(_read, items)))


def say_finite(values: Mapping[str, Tree], through: T) -> T:
    """Checks that values are finite, in a layer that is checked.

    Args:
      values: Pytrees, by what their leaves' names begin with.
      through: What the rest of the program is computed from.

    Returns:
      `through`, which must be used from here on: what nobody reads, JAX drops from
      loops that are differentiated.
    """
    found = []
    for start, value in values.items():
        for path, leaf in jax.tree.leaves_with_path(value):
            if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
                fine = jnp.all(jnp.isfinite(leaf)).astype(jnp.int32)
                check = Check(f"{start}{_checks.path_name(path)}")
                found.append((check, fine[None]))
    return _say(found, through)


def say_layers(
    stack: Check, found: Sequence[tuple[_marks.Mark, jax.Array]], through: T
) -> T:
    """Passes on what the layers of a stack have found.

    Args:
      stack: The check of the stack, without items.
      found: What each layer has checked, and the codes `[L, D]`.
      through: What the rest of the program is computed from.

    Returns:
      `through`, as `say_finite` does.
    """
    if not found:
        return through
    items = tuple(_read(json.loads(mark.label)) for mark, _ in found)
    stack = stack._replace(items=items)
    return _say([(stack, stack.encode([code for _, code in found]))], through)


def _say(found: Sequence[tuple[Check, jax.Array]], through: T) -> T:
    """Marks codes for the traced stack around; or raises, if there is none."""
    around, frame = "", None
    for frame in reversed(_frames.frames()):
        if not frame.is_python:
            break
        around += f", in layer {frame.index} of {frame.where}"
    checks = [check._replace(label=f"{check.label}{around}") for check, _ in found]
    codes = [code for _, code in found]
    if frame is None or frame.is_python:
        return _raise(checks, codes, through)
    marks = [_marks.Mark(_marks.FINITE, json.dumps(check)) for check in checks]
    return _marks.tied(through, list(map(_marks.unbatched, codes, marks)))


def _raise(checks: Sequence[Check], codes: list[jax.Array], through: T) -> T:
    """Raises an error for the first check that failed; inside `jit`, for `checkify`."""

    def run(codes: list[jax.Array]) -> Any:
        for check, code in zip(checks, codes, strict=True):
            for text, is_first, indices in check.messages(code):
                message = f"the first value that is not finite is {text}"
                checkify.check(~is_first, message, **dict[str, Any](indices))
        return jax.lax.optimization_barrier(codes)

    if any(isinstance(code, jax.core.Tracer) for code in codes):
        # The loop of a gradient keeps what its results are computed from, `remat` as a
        # whole. The gradient of a `custom_jvp` in that loop opens one.
        run = jax.checkpoint(jax.checkpoint(run))
        return _marks.tied(through, run(list(map(_marks.unbatched, codes))))
    run(codes)
    return through
