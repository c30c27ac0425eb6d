"""What a layer function may ask or say while it runs in a stack: its index, taps.

Each stack puts a `Frame` around its layer function. A tap that somebody wants becomes a
mark in the traced program, an identity with a name that says what it is; the stack, and
`collect` around all, take the values at the marks out (`taps`).
"""

import contextlib
import contextvars
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental import checkify

T = TypeVar("T")


@dataclasses.dataclass(eq=False, slots=True)  # Frozen takes five times as long.
class Frame:
    """A stack around the code that runs.

    Attributes:
      path: Of the stack, as in the parameter tree.
      where: Names the stack in errors.
      index: Of the layer: traced, or an int in a Python loop.
      num_layers: `L`.
      scope: The name scope that a Python loop puts around the layer, or "".
      check_finite: Whether taps are checked.
      is_init: Whether the model is being initialised: then taps are silent.
      added: What to add to tapped values, by path.
      checked: The stacks inside that check values, by label; filled while tracing.
    """

    path: str
    where: str
    index: Any
    num_layers: int
    scope: str = ""
    check_finite: bool = False
    is_init: bool = False
    added: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    checked: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_python(self) -> bool:
        """Whether a Python loop runs the layers, so that nobody traces this one."""
        return isinstance(self.index, int)


@dataclasses.dataclass(frozen=True)
class Collector:
    """What `collect` wants; part of the key of JAX's caches.

    Attributes:
      patterns: Globs of the paths to collect.
      adding: Values to add, and the paths that were found; equal by identity.
    """

    patterns: tuple[str, ...]
    adding: "Adding | None"

    def wants(self, path: str) -> bool:
        """Whether a tap is to be collected."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.patterns)


@dataclasses.dataclass(frozen=True, eq=False)
class Adding:
    """Values to add to taps, by path; the paths at which some were added; all paths."""

    values: Mapping[str, jax.Array]
    used: set[str] = dataclasses.field(default_factory=set)
    seen: set[str] = dataclasses.field(default_factory=set)


class Record(NamedTuple):
    """One call of a stack, for `summary`.

    Attributes:
      path: Of the stack.
      function: Name of the layer function.
      num_layers: `L`.
      params: Types of the parameters of all layers, `[L, ...]`.
      stored: Types of all parameters of the transform around it.
      parts: How its layer was cut (`cut.Cut`); None if it was not.
      loop: What runs the layers.
      remat: What the backward pass computes again, in words.
      is_nested: Whether the stack is inside another.
    """

    path: str
    function: str
    num_layers: int
    params: Any
    stored: Any
    parts: Any
    loop: str
    remat: str
    is_nested: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """What `summary` has heard of."""

    records: dict[Any, Record] = dataclasses.field(default_factory=dict)


_frames: contextvars.ContextVar[tuple[Frame, ...]] = contextvars.ContextVar(
    "hk_stack.frames", default=()
)
# JAX's caches know these values, so a program that was traced under one is not used
# under another.
collecting: Any = jax.make_user_context(None)
recording: Any = jax.make_user_context(None)
_place: Any = jax.make_user_context(None)


def frames() -> tuple[Frame, ...]:
    """The stacks around the code that runs, outermost first."""
    return _frames.get()


@contextlib.contextmanager
def layer(frame: Frame, given: Any = None) -> Iterator[None]:
    """Runs a layer function inside `frame`.

    Args:
      frame: What is around the layer function.
      given: What the layer function is given.
    """
    token = _frames.set((*_frames.get(), frame))
    try:
        if collecting.value is None and not frame.check_finite:
            yield
            return
        with _place(_key(frame, given)):
            yield
    finally:
        _frames.reset(token)


def _key(frame: Frame, given: Any) -> Any:
    """What JAX's caches must know: functions under `jit` keep the paths of their taps.

    Outside of `jit` the layers of a Python loop share what JAX has compiled.
    """
    is_traced = any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(given))
    index = frame.index if is_traced and frame.is_python else None
    return _place.value, frame.path, index, frame.check_finite, frame.is_init


def layer_index() -> Any:
    """The index of the layer that runs, from 0, inside a layer function.

    In a compiled loop, and at init, all layers are one program, and the index is a
    traced `int32`; in a loop with `loop="python"` it is an int. It is known before the
    loop, as parameters are: what is made of both alone leaves the loop. In nested
    stacks it is that of the innermost; read the others before.

    Initial values may depend on it, and are still made for all layers at once:

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     shrink = jax.lax.rsqrt(jnp.float32(hk_stack.layer_index() + 1))
    ...     init = hk.initializers.Constant(shrink)
    ...     return x * hk.get_parameter("scale", [], init=init)
    >>> model = hk.transform(hk_stack.layer_stack(4, name="layers")(layer))
    >>> params = model.init(jax.random.key(0), jnp.ones([2]))
    >>> print(params["layers/~"]["scale"].round(2))
    [1.   0.71 0.58 0.5 ]

    A function under `jax.jit` inside the layer function should take the index as an
    argument: JAX traces it once, and would reuse the first layer's int in a Python
    loop.

    Returns:
      A traced `int32` scalar, or an int.

    Raises:
      ValueError: Outside of a layer function.
    """
    if not frames():
        raise ValueError(
            "hk_stack.layer_index() was called outside of a layer function; there is "
            "an index only inside hk_stack.layer_stack(num_layers)(layer_function)."
        )
    return frames()[-1].index


def tap(value: T, name: str) -> T:
    """Lets `collect` read `value` under a name, from the middle of a model.

    The result is `value` itself, and unless somebody collects, the traced program is
    the same as without the tap. Parameters and names do not change.

    A stack with `check_finite=True` checks the values at its taps.

    Args:
      value: Any pytree of arrays. Each leaf is tapped, with its path after the name.
      name: Of the tap. Its path is that of the module that calls it, as in the
        parameter tree: `layers/attention/scores`.

    Returns:
      The same pytree. Use it instead of `value` where something is to be added to it or
      differentiated by it (`collect(..., add=...)`).

    Raises:
      TypeError: If the name is no text.
      ValueError: If the name is empty.
    """
    if not isinstance(name, str):
        raise TypeError(f"hk_stack.tap: the name must be a str, not {name!r}.")
    if not name:
        raise ValueError("hk_stack.tap: the name is empty; name what is tapped.")
    around, collector = frames(), collecting.value
    if is_init():
        return value
    if collector is None and not (around and around[-1].check_finite):
        return value
    path = "/".join(filter(None, [_path(), name]))

    def one(at: tuple[Any, ...], leaf: Any) -> Any:
        end = jax.tree_util.keystr(at, simple=True, separator="/")
        return _tap_leaf(leaf, f"{path}/{end}" if end else path, collector)

    return jax.tree.map_with_path(one, value)


def _path() -> str:
    """The path of the module that runs, from the outermost stack, or ""."""
    try:
        name = hk.experimental.current_name()
    except ValueError:  # Outside of a transform.
        return ""
    return path_below("" if name == "~" else name)


def path_below(name: str) -> str:
    """A path from the outermost stack, given the name in the innermost."""
    if not frames():
        return name
    frame = frames()[-1]
    if frame.scope and (name == frame.scope or name.startswith(f"{frame.scope}/")):
        name = name[len(frame.scope) + 1 :]
    return f"{frame.path}/{name}" if name else frame.path


def _tap_leaf(leaf: Any, path: str, collector: Collector | None) -> Any:
    around = frames()
    if collector and collector.adding:
        collector.adding.seen.add(path)
        if path in (added := _adding(around)):
            leaf = _add(leaf, added[path], path)
            collector.adding.used.add(path)
    if around and around[-1].check_finite:
        leaf = say_finite({f"tap {path}": leaf}, leaf)
    if collector and collector.wants(path):
        leaf = mark_tap(leaf, path)
    return leaf


def _add(leaf: Any, added: Any, path: str) -> Any:
    found, expected = jnp.shape(added), jnp.shape(leaf)
    if found != expected:
        raise ValueError(
            f"hk_stack.collect: what is to be added at {path} has shape {found} for "
            f"each layer; the tapped value has {expected}."
        )
    kind, of_added = jnp.asarray(leaf).dtype, jnp.asarray(added).dtype
    if not jnp.can_cast(of_added, kind, "same_kind"):
        raise ValueError(
            f"hk_stack.collect: what is to be added at {path} is {of_added}, the "
            f"tapped value is {kind}, which cannot hold it. Cast one of them."
        )
    return leaf + jnp.asarray(added).astype(kind)


def _adding(around: Sequence[Frame]) -> Mapping[str, jax.Array]:
    if around:
        return around[-1].added
    collector = collecting.value
    return collector.adding.values if collector and collector.adding else {}


def added_below(path: str, num_layers: int, where: str) -> dict[str, jax.Array]:
    """What is to be added at the taps of a stack: arrays `[L, ...]`, by path."""
    here = _adding(frames())
    below = {at: value for at, value in here.items() if at.startswith(f"{path}/")}
    for at, value in below.items():
        shape = jnp.shape(value)
        if not shape or shape[0] != num_layers:
            raise ValueError(
                f"{where}: what is to be added at {at} has shape {shape}; expected "
                f"a leading axis of {num_layers}, one entry for each layer."
            )
    return below


def is_init() -> bool:
    """Whether a stack around the code that runs is being initialised."""
    return bool(frames()) and frames()[-1].is_init


def is_checked() -> bool:
    """Whether a stack around the code that runs checks values."""
    return bool(frames()) and frames()[-1].check_finite


_TAP, _FINITE = "hk_stack.tap", "hk_stack.finite"


def mark_tap(value: Any, path: str) -> Any:
    """Marks `value` for whoever traces this program to take out."""
    return checkpoint_name(value, ":".join([_TAP, _python_indices(), path]))


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
      checked: The checks of a stack (`finite.Checked`); None for one value, whose digit
        is 0 if it is bad, and 1 if it is fine.
    """

    label: str
    digits: Any
    checked: Any


def say_codes(codes: Sequence[Code], through: T) -> T:
    """Passes on what checks have found.

    Returns:
      `through`, which must be used from here on: what nobody reads, JAX drops from
      loops that are differentiated.
    """
    around = ""
    for frame in reversed(frames()):
        if not frame.is_python:
            return tied(through, [_mark_code(code, frame, around) for code in codes])
        around += f", in layer {frame.index} of {frame.where}"
    return _check(codes, around, through)


def _mark_code(code: Code, frame: Frame, around: str) -> Any:
    """Marks a code for the stack of `frame` to take out."""
    # Of several with one label, each has a number of its own.
    label = f"{len(frame.checked)}:{code.label}{around}"
    frame.checked[label] = code.checked and code.checked._replace(around=around)
    return _unbatched(code.digits, f"{_FINITE}:{label}")


def tied(value: T, kept: Sequence[Any]) -> T:
    """`value`, computed only together with what is `kept`."""
    leaves, tree = jax.tree.flatten(value)
    if not kept or not leaves:
        return value
    return jax.tree.unflatten(
        tree, jax.lax.optimization_barrier((leaves, list(kept)))[0]
    )


def _check(codes: Sequence[Code], around: str, through: T) -> T:
    """Raises an error for the first check that failed; inside `jit`, for `checkify`."""

    def run(all_digits: list[Any]) -> list[Any]:
        for (label, _, checked), digits in zip(codes, all_digits, strict=True):
            if checked is None:
                _fail(escaped(f"{label}{around}"), digits[0] == 0, {})
                continue
            for failure in checked._replace(around=around).messages(digits):
                _fail(*failure)
        return jax.lax.optimization_barrier(all_digits)

    all_digits = [code.digits for code in codes]
    if any(isinstance(digits, jax.core.Tracer) for digits in all_digits):
        # The loop of a gradient keeps what its results are computed from, `remat` as a
        # whole. The gradient of a `custom_jvp` in that loop opens one.
        run = jax.checkpoint(jax.checkpoint(run))
        return tied(through, run(list(map(_unbatched, all_digits))))
    run(all_digits)
    return through


def _fail(text: str, failed: Any, indices: dict[str, Any]) -> None:
    message = f"the first value that is not finite is {text}"
    checkify.check(~failed, message, **indices)


def _unbatched(digits: Any, name: str = "") -> Any:
    """The digits of a check, marked if there is a name.

    Under `vmap` they are those of the example that failed first.
    """

    @custom_vmap
    def of_one(digits: Any) -> Any:
        return checkpoint_name(digits, name) if name else digits

    @of_one.def_vmap
    def of_batch(size: int, is_batched: Any, digits: Any) -> tuple[Any, bool]:
        del size, is_batched  # Nothing calls this on what is not batched.
        return of_one(first_code(digits)), False

    return of_one(digits)


def first_code(codes: jax.Array) -> jax.Array:
    """Of codes `[N, D]`, the digits `[D]` of the check that failed first."""
    is_first = jnp.ones(len(codes), bool)
    for column in codes.T:
        least = jnp.min(jnp.where(is_first, column, jnp.iinfo(jnp.int32).max))
        is_first &= column == least
    return codes[jnp.argmax(is_first)]


def escaped(text: str) -> str:
    """`text` for a message that is formatted."""
    return text.replace("{", "{{").replace("}", "}}")


def _python_indices() -> str:
    """The indices of the Python loops around, up to what is traced: `3/12,0/2`."""
    indices: list[str] = []
    for frame in reversed(frames()):
        if not frame.is_python:
            break
        indices.append(f"{frame.index}/{frame.num_layers}")
    return ",".join(reversed(indices))


class Mark(NamedTuple):
    """What the name of a mark says.

    Attributes:
      is_tap: Whether it is a tap, not a check.
      label: The path of the tap, or what is checked, after a number.
      indices: Of the layers in Python loops around the tap, and how many there are.
    """

    is_tap: bool
    label: str
    indices: tuple[tuple[int, int], ...] = ()


def read_mark(name: str) -> Mark | None:
    """The inverse of `mark_tap` and `_mark_code`; None if `name` is no mark."""
    kind, _, rest = name.partition(":")
    if kind == _FINITE:
        return Mark(False, rest)
    if kind != _TAP:
        return None
    indices, _, path = rest.partition(":")
    pairs = (entry.split("/") for entry in indices.split(",") if entry)
    return Mark(True, path, tuple((int(i), int(n)) for i, n in pairs))
