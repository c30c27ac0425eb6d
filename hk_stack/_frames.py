"""What is around the code that runs: the stacks, their paths, the layer's index."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax

from hk_stack._traceback import hidden
from hk_stack._types import Tree


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
      is_heard: Whether values at marks are taken out of it.
    """

    path: str
    where: str
    index: jax.Array | int
    num_layers: int
    scope: str = ""
    check_finite: bool = False
    is_init: bool = False
    added: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    is_heard: bool = False

    @property
    def is_python(self) -> bool:
        """Whether a Python loop runs the layers, so that nobody traces this one."""
        return isinstance(self.index, int)


_frames: contextvars.ContextVar[tuple[Frame, ...]] = contextvars.ContextVar(
    "hk_stack.frames", default=()
)
# JAX's caches know the value, so what was traced in one layer is not used in another.
_place: Any = jax.make_user_context(None)


def frames() -> tuple[Frame, ...]:
    """The stacks around the code that runs, outermost first."""
    return _frames.get()


@contextlib.contextmanager
def layer(frame: Frame, given: Tree = None) -> Iterator[None]:
    """Runs a layer function inside `frame`.

    Args:
      frame: What is around the layer function.
      given: What the layer function is given.
    """
    token = _frames.set((*_frames.get(), frame))
    try:
        if not frame.is_heard:
            yield
            return
        with _place(_key(frame, given)):
            yield
    finally:
        _frames.reset(token)


def _key(frame: Frame, given: Tree) -> Hashable:
    """What JAX's caches must know: functions under `jit` keep the paths of their taps.

    Outside of `jit` the layers of a Python loop share what JAX has compiled.
    """
    is_traced = any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(given))
    index = frame.index if is_traced and frame.is_python else None
    return _place.value, frame.path, index, frame.check_finite, frame.is_init


@hidden
def layer_index() -> jax.Array | int:
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


def path() -> str:
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


def is_init() -> bool:
    """Whether a stack around the code that runs is being initialised."""
    return bool(frames()) and frames()[-1].is_init


def is_checked() -> bool:
    """Whether a stack around the code that runs checks values."""
    return bool(frames()) and frames()[-1].check_finite
