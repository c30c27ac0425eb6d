"""One call of a stack: what is known of it, and its layer as pure functions."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from hk_stack import (
    _advice,
    _checks,
    _equations,
    _finite,
    _frames,
    _initialize,
    _loop,
    _scopes,
    _taps,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What `layer_stack` was given, checked."""

    num_layers: int
    with_per_layer_inputs: bool
    unroll: int
    pass_reverse: bool
    naming_map: hk.LayerStackTransparencyMapping | None
    name: str
    setup: str
    setup_batch_size: int | None
    setup_remat: bool | None
    init: str
    loop: str
    remat: _loop.Remat | None
    carry_dtype: Any
    check_finite: bool


class Own(NamedTuple):
    """What each layer gets of its own, besides parameters, state and key.

    Attributes:
      index: Its index, `[L]`.
      added: What to add at its taps, by path.
      inputs: The per-layer inputs.
    """

    index: Any
    added: dict[str, Any]
    inputs: tuple[Any, ...]


class Given(NamedTuple):
    """What a stack is given, in the order in which a layer's `apply` takes it."""

    params: Any
    state: Any
    keys: Any
    carry: Any
    own: Own


class Call:
    """One call of a stack.

    Attributes:
      options: Of the stack.
      f: The layer function.
      args: What the stack was given by position.
      kwargs: The keyword arguments of the layer function.
      where: Names the stack in errors.
      path: Of the stack, from the outermost one.
      arguments: Names of the arguments of the layer function.
      reverse: Whether the last layer runs first.
      module: Plain name of the module around a transparent stack, or "".
      loop: What runs the layers.
      is_init: Whether the model is being initialised.
      check_finite: Whether values are checked, in this stack or for one around it.
      outside: Parameters of the transform around, which no layer may share, by plain
        names.
      scopes: Of the layers, if a Python loop runs them.
      are_odd: Whether the layers of a Python loop use modules that have to be told
        their names; True until one has run.
    """

    def __init__(
        self,
        options: Options,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        where: str,
        path: str,
        arguments: list[str],
        reverse: bool,
    ):
        self.options = options
        self.f = f
        self.args = args
        self.kwargs = kwargs
        self.where = where
        self.path = path
        self.arguments = arguments
        self.reverse = reverse
        self.module = _scopes.plain(_scopes.around()) if options.naming_map else ""
        self.loop = _loop.in_force(options.loop)
        self.is_init = hk.running_init() or _frames.is_init()
        self.check_finite = options.check_finite or _frames.is_checked()
        outside = {} if options.naming_map else hk.experimental.get_params()
        self.outside = _scopes.plain_tree(outside)
        self.scopes: list[_scopes.Scope] = []
        self.are_odd = True

    @property
    def is_python(self) -> bool:
        """Whether a Python loop runs the layers."""
        return self.loop == "python"

    @property
    def all_layers(self) -> str:
        """What is traced, in words."""
        return f"all {self.options.num_layers} layers at once"

    def names(self) -> _scopes.Names:
        """The names of the layer that runs."""
        return _scopes.Names(self.module, self.options.naming_map)

    def explained(
        self, doing: str = "", index: int | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """What says of errors where they came up, and what to write."""
        return _checks.in_layer(self.where, index, doing, self._advice)

    def _advice(self, error: Exception) -> Iterator[str]:
        options = self.options
        arguments = dict(zip(self.arguments, self.args, strict=True))
        return _advice.on(
            error,
            _advice.Situation(
                self.f,
                arguments,
                self.kwargs,
                options.num_layers,
                options.with_per_layer_inputs,
                options.pass_reverse,
            ),
        )

    def keeps_carry(self, before: Any, after: Any) -> Any:
        """Checks that a layer returns the carry that it is given; `after`, as arrays.

        What is weakly typed may take on another type.
        """
        if _are_alike(before, after):
            return after
        names, where = self.arguments, self.where
        with_outputs = self.options.with_per_layer_inputs
        _checks.same_structure(before, after, names, where, with_outputs)
        after = jax.tree.map(as_array, after)
        promoted = jax.tree.map(promote, before, after)
        _checks.same_carry(promoted, after, names, where)
        return after

    @contextlib.contextmanager
    def around(self, names: _scopes.Names) -> Iterator[None]:
        """What is around the layer function: its scope, and a watch on modules."""
        captured: set[str] = set()
        with self.scopes[names.frame.index].context if names.own else _NOTHING:
            # Watching slows a Python loop down, and one of its layers tells enough.
            if names.own and not self.are_odd:
                yield
                return
            shared = _checks.nothing_shared(
                self.outside, captured, _scopes.plain, self.where
            )
            with names.watched(captured), shared:
                yield
            if names.own:
                self.are_odd = names.were_odd

    def frame(self, own: Own, *, is_init: bool) -> _frames.Frame:
        """What is around one layer."""
        is_python = isinstance(own.index, int)
        is_init = is_init or self.is_init
        return _frames.Frame(
            self.path,
            self.where,
            own.index,
            self.options.num_layers,
            self.scopes[own.index].name if is_python else "",
            self.check_finite and not is_init,
            is_init,
            own.added,
            self.check_finite or _taps.are_heard(),
        )


_NOTHING = contextlib.nullcontext()


def pure_layer(call: Call) -> _initialize.Layer:
    """The layer function as pure functions of its parameters, state and key."""
    options, where = call.options, call.where

    def run(names: _scopes.Names, carry: Any, own: Own) -> tuple[Any, Any]:
        with call.around(names):
            result = call.f(*carry, *own.inputs, **call.kwargs)
        _checks.result(result, where)
        output = None
        if options.with_per_layer_inputs:
            _checks.is_pair(result, where)
            result, output = result
        if len(carry) == 1:
            result = (result,)
        return cast(result, options.carry_dtype), output

    transformed = hk.transform_with_state(run)

    def init(key: Any, carry: Any, own: Own) -> tuple[hk.Params, hk.State]:
        with _frames.layer(call.frame(own, is_init=True)):
            return transformed.init(key, call.names(), carry, own)

    def apply(params: Any, state: Any, key: Any, carry: Any, own: Own) -> Any:
        frame = call.frame(own, is_init=False)
        with _frames.layer(frame, (params, carry)):
            if frame.check_finite:
                carry = _check_inputs(call, params, state, carry, own)
            names = call.names()
            names.given = given = names.added(params)
            (result, output), after = transformed.apply(
                given, names.added(state), key, names, carry, own
            )
            carry = call.keeps_carry(carry, result)
            if frame.check_finite:
                named = dict(zip(call.arguments, carry, strict=False))
                checked = {"result ": named, "output per layer ": output}
                carry, output = _finite.say_finite(checked, (carry, output))
        return (carry, output), names.dropped(after, state)

    return _initialize.Layer(init, apply)


def _check_inputs(call: Call, params: Any, state: Any, carry: Any, own: Own) -> Any:
    """Checks what a layer is given; returns its carry, as `say_finite` does."""
    named = dict(zip(call.arguments, (*carry, *own.inputs), strict=True))
    checked = {"parameter ": params, "state ": state, "argument ": named}
    return _finite.say_finite(checked, carry)


def run_one(
    call: Call, layer: _initialize.Layer, params: Any, state: Any, key: Any, *rest: Any
) -> Any:
    """Runs one layer; if it fails, looks for parameters that do not fit."""
    try:
        return layer.apply(params, state, key, *rest)
    except ValueError as error:
        if not hk.running_init():
            stored = _scopes.plain_tree(hk.experimental.get_params())
            spec = (jax.random.key(0) if key is None else key, *rest)
            naming_map, where = call.options.naming_map, call.where
            _checks.has_params(
                layer.init, spec, params, stored, naming_map, where, error
            )
        raise


def as_array(leaf: Any) -> jax.Array:
    """`leaf`, or an array of it."""
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def cast(carry: Any, dtype: Any) -> Any:
    """`carry` with its real floating-point leaves in `dtype`, unless that is None."""

    def cast(leaf: Any) -> Any:
        leaf = as_array(leaf)
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_real else leaf

    return carry if dtype is None else jax.tree.map(cast, carry)


def _are_alike(before: Any, after: Any) -> bool:
    """Whether two pytrees hold arrays of the same types: the usual case, in no time."""
    old, tree = jax.tree.flatten(before)
    new, new_tree = jax.tree.flatten(after)
    return bool(tree == new_tree) and all(  # type: ignore[operator]
        isinstance(y, jax.Array) and x.shape == y.shape and x.dtype == y.dtype
        for x, y in zip(old, new, strict=True)
    )


def promote(leaf: jax.Array, after: Any) -> jax.Array:
    """A carry takes on what the first layer makes of its type, where it may.

    So does a weakly typed one, and one that is the same on all devices of a manual mesh
    axis, if the layer makes it differ.
    """
    leaf = _equations.vary_as(leaf, after)
    if not getattr(leaf, "weak_type", False) or after.shape != leaf.shape:
        return leaf
    if after.weak_type and after.dtype == leaf.dtype:
        return leaf
    return jax.lax.convert_element_type(leaf, after.dtype)
