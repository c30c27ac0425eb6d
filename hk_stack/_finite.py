"""`check_finite`: which layer was first to have a value that is not finite.

Each layer of a checked stack returns a code for each of its checks. A stack boils the
codes of all layers down to one, which says what failed first: whose turn it was, which
of the layer's checks, and, if that is a stack in the layer, its own code. So nothing
but integers leaves the loop, and under gradients, rematerialisation and `vmap` they are
values as any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from hk_stack import _frames, _marks

T = TypeVar("T")


def say_finite(values: Mapping[str, Any], through: T) -> T:
    """Checks that values are finite, in a layer that is checked.

    Args:
      values: Pytrees, by what their leaves' names begin with.
      through: What the rest of the program is computed from.

    Returns:
      `through`, which must be used from here on: see `say_codes`.
    """
    codes: list[Code] = []
    for start, value in values.items():
        for path, leaf in jax.tree.leaves_with_path(value):
            if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
                end = jax.tree_util.keystr(path, simple=True, separator="/")
                fine = jnp.all(jnp.isfinite(leaf)).astype(jnp.int32)
                codes.append(Code(f"{start}{end}", fine[None], None))
    return say_codes(codes, through)


class Code(NamedTuple):
    """What a check has found.

    Attributes:
      label: What is checked.
      digits: `int32[D]`. Of two checks the one whose digits are less, the first that
        differ, failed before the other.
      checked: The checks of a stack (`Checked`); None for one value, whose digit
        is 0 if it is bad, and 1 if it is fine.
    """

    label: str
    digits: Any
    checked: "Checked | None"


def say_codes(codes: Sequence[Code], through: T) -> T:
    """Passes on what checks have found.

    Returns:
      `through`, which must be used from here on: what nobody reads, JAX drops from
      loops that are differentiated.
    """
    around = ""
    for frame in reversed(_frames.frames()):
        if not frame.is_python:
            return _marks.tied(
                through, [_mark_code(code, frame, around) for code in codes]
            )
        around += f", in layer {frame.index} of {frame.where}"
    return _check(codes, around, through)


def _mark_code(code: Code, frame: _frames.Frame, around: str) -> Any:
    """Marks a code for the stack of `frame` to take out."""
    # Of several with one label, each has a number of its own.
    label = f"{len(frame.checked)}:{code.label}{around}"
    frame.checked[label] = code.checked and code.checked._replace(around=around)
    return _marks.unbatched(code.digits, f"{_marks.FINITE}:{label}")


def _check(codes: Sequence[Code], around: str, through: T) -> T:
    """Raises an error for the first check that failed; inside `jit`, for `checkify`."""

    def run(all_digits: list[Any]) -> list[Any]:
        for (label, _, checked), digits in zip(codes, all_digits, strict=True):
            if checked is None:
                _fail(_escaped(f"{label}{around}"), digits[0] == 0, {})
                continue
            for failure in checked._replace(around=around).messages(digits):
                _fail(*failure)
        return jax.lax.optimization_barrier(all_digits)

    all_digits = [code.digits for code in codes]
    if any(isinstance(digits, jax.core.Tracer) for digits in all_digits):
        # The loop of a gradient keeps what its results are computed from, `remat` as a
        # whole. The gradient of a `custom_jvp` in that loop opens one.
        run = jax.checkpoint(jax.checkpoint(run))
        return _marks.tied(through, run(list(map(_marks.unbatched, all_digits))))
    run(all_digits)
    return through


def _fail(text: str, failed: Any, indices: dict[str, Any]) -> None:
    message = f"the first value that is not finite is {text}"
    checkify.check(~failed, message, **indices)


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
        where = _escaped(f"{self.where}{self.around}")
        around = f", in layer {{{number}}} of {where}{around}"
        for item, (label, inner) in enumerate(self.items):
            here = failed & (code[1] == item)
            if inner is None:
                yield f"{_escaped(label)}{around}", here, indices
            else:
                yield from inner._decode(code[2:], here, around, indices)


def _escaped(text: str) -> str:
    """`text` for a message that is formatted."""
    return text.replace("{", "{{").replace("}", "}}")
