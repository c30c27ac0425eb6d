"""One use of a stack, its invocation, with its layer as pure functions."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import haiku as hk
import jax

from hk_stack import (
    _advice,
    _carry,
    _checks,
    _finite,
    _frames,
    _loop,
    _options,
    _parameters,
    _scopes,
    _taps,
)
from hk_stack._parts import Input
from hk_stack._types import Carry, Tree

T = TypeVar("T")


class Given(NamedTuple):
    """What layers are given: one layer, or all, with leading axes `[L, ...]`.

    The carry has no such axis: it is what the first layer is given.

    Attributes:
      params: Parameters; None while they are being made.
      state: State, likewise.
      keys: A random key for each layer, or None.
      carry: What goes from layer to layer, a tuple.
      index: Of the layer.
      added: What to add at its taps, by path.
      inputs: The per-layer inputs.
    """

    params: Any
    state: Any
    keys: Any
    carry: Any
    index: Any
    added: Any
    inputs: Any


def describe(given: Given, names: Sequence[str]) -> list[Input]:
    """What the cut must know of each leaf of `given`.

    Args:
      given: What a layer is given.
      names: Of the arguments of the layer function: the carry, then per-layer inputs.
    """
    start = {"carry": 0, "inputs": len(given.carry)}

    def one(path: tuple[Any, ...]) -> Input:
        kind, rest = _KINDS[path[0].name], path[1:]
        if path[0].name in start:  # These are named, not numbered.
            name = names[start[path[0].name] + rest[0].idx]
            rest = (jax.tree_util.DictKey(name), *rest[1:])
        return kind._replace(label=kind.label.format(_checks.path_name(rest)))

    return [one(path) for path, _ in jax.tree.leaves_with_path(given)]


_KINDS = {
    "params": Input("parameter {}", known=True, fixed=True, layered=True),
    "state": Input("state {}", layered=True),
    "keys": Input("a random key", layered=True),
    "carry": Input("argument `{}`", carried=True),
    "index": Input("the layer's index", known=True, fixed=True, layered=True),
    "added": Input("what is added to the tap {}", layered=True),
    "inputs": Input("per-layer input `{}`", layered=True),
}


class Result(NamedTuple):
    """What a layer returns, or a stack, of all layers; leaves in this order.

    Attributes:
      carry: What the next layer is given, a tuple.
      output: The layer's own output, or None.
      state: State after the layer.
    """

    carry: Any
    output: Any
    state: Any


class Invocation:
    """One use of a stack, and its layer as pure functions.

    Attributes:
      situation: The stack, its layer function, and what it was given.
      options: Of the stack.
      arguments: Names of the arguments of the layer function: the carry, then its
        inputs.
      where: Names the stack in errors.
      path: Of the stack, from the outermost one.
      reverse: Whether the last layer runs first.
      loop: What runs the layers.
      num_stages: Over how many devices a pipeline splits them.
      all_layers: What is traced, in words.
    """

    def __init__(self, situation: _advice.Situation, path: str, reverse: bool) -> None:
        """Finds out what is known of a stack where it is used.

        Args:
          situation: The stack, its layer function, and what it was given.
          path: Of the stack, in the transform around it.
          reverse: Whether the last layer runs first.
        """
        self._made_of = situation, path, reverse
        self.situation = situation
        self.options = options = situation.options
        self.arguments = list(situation.arguments)
        self.path = _frames.path_below(path)
        self.where = _checks.describe(self.path, situation.f)
        self.reverse = reverse
        self.loop = _loop.in_force(options.loop)
        self.num_stages = self._num_stages()
        self.all_layers = f"all {options.num_layers} layers at once"
        self._is_init = hk.running_init() or _frames.is_init()
        self._check_finite = options.check_finite or _frames.is_checked()
        # The module around a transparent stack; and parameters of the transform around,
        # which no layer may share. Both by plain names.
        self._module, outside = "", hk.experimental.get_params()
        if options.naming_map is not None:
            self._module, outside = _scopes.plain(_scopes.around()), {}
        self._outside = _scopes.plain_tree(outside)
        self._scopes: list[_scopes.Scope] = []
        if self.loop == "python":
            self._scopes = _scopes.of_layers(options.name, options.num_layers)
        self._transformed = hk.transform_with_state(self._in_transform)
        # Whether modules have to be told their names. To watch for these slows a Python
        # loop down, and one of its layers tells enough.
        self._were_odd: bool | None = None

    def _num_stages(self) -> int:
        options = self.options
        is_eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        is_whole = is_eager or hk.running_init() or self.loop != "scan"
        if is_whole or not options.pipeline:
            return 1
        return _options.num_stages(options.pipeline, options.num_layers, self.where)

    def again(self) -> "Invocation":
        """The same: layers in Python run once, as their name scopes may."""
        return Invocation(*self._made_of)

    def explained(
        self, doing: str = "", index: int | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """What says of errors where they came up, and what to write."""
        return _advice.in_layer(self.where, index, doing, self.situation)

    def by_name(self, run: Callable[[Given], T]) -> Callable[[Given], T]:
        """`run`, which errors of JAX know as the layer function, not as a method."""

        def layer(given: Given) -> T:
            return run(given)

        vars(layer).update(
            __wrapped__=self.situation.f, __signature__=inspect.signature(run)
        )
        return layer

    def init(self, given: Given) -> tuple[hk.Params, hk.State]:
        """Parameters and state of a layer, before it runs."""
        with _frames.layer(self._frame(given, is_init=True)):
            return self._transformed.init(given.keys, self._names(), given)

    def apply(self, given: Given) -> Result:
        """Runs a layer."""
        frame = self._frame(given, is_init=self._is_init)
        with _frames.layer(frame, (given.params, given.carry)):
            if frame.check_finite:
                given = given._replace(carry=self._check_given(given))
            names = self._names()
            names.given = params = names.added(given.params)
            (carry, output), after = self._transformed.apply(
                params, names.added(given.state), given.keys, names, given
            )
            is_pair = self.options.with_per_layer_inputs
            carry = _carry.kept(given.carry, carry, self.arguments, self.where, is_pair)
            if frame.check_finite:
                carry, output = self._check_result(carry, output)
        if names.own and self._were_odd is None:
            self._were_odd = names.were_odd
        return Result(carry, output, names.dropped(after, given.state))

    def run(self, given: Given) -> Result:
        """Runs a layer; if it fails, looks for parameters that do not fit."""
        try:
            return self.apply(given)
        except ValueError as error:
            if hk.running_init():
                raise
            key = jax.random.key(0) if given.keys is None else given.keys
            _parameters.fit(
                self.init,
                given._replace(keys=key),
                given.params,
                _scopes.plain_tree(hk.experimental.get_params()),
                self.options.naming_map,
                self.where,
                error,
            )
            raise

    def _frame(self, given: Given, *, is_init: bool) -> _frames.Frame:
        is_python = isinstance(given.index, int)
        return _frames.Frame(
            self.path,
            self.where,
            given.index,
            self.options.num_layers,
            self._scopes[given.index].name if is_python else "",
            self._check_finite and not is_init,
            is_init,
            given.added,
            is_heard=self._check_finite or _taps.are_heard(),
        )

    def _names(self) -> _scopes.Names:
        return _scopes.Names(self._module, self.options.naming_map)

    def _in_transform(self, names: _scopes.Names, given: Given) -> tuple[Any, Any]:
        """Runs the layer function; returns the carry, as a tuple, and the output."""
        options, situation = self.options, self.situation
        with self._around(names):
            result = situation.f(*given.carry, *given.inputs, **situation.kwargs)
        _carry.result(result, self.where)
        output = None
        if options.with_per_layer_inputs:
            _carry.pair(result, self.where)
            result, output = result
        if len(given.carry) == 1:
            result = (result,)
        return _carry.cast(result, options.carry_dtype), output

    @contextlib.contextmanager
    def _around(self, names: _scopes.Names) -> Iterator[None]:
        """What is around the layer function: its scope, and a watch on modules."""
        with contextlib.ExitStack() as stack:
            if names.own:
                index: Any = names.frame.index  # A number, as a Python loop runs it.
                stack.enter_context(self._scopes[index].context)
            if self._were_odd is not False or not names.own:
                guard = functools.partial(
                    _parameters.not_shared, self._outside, self.where
                )
                stack.enter_context(names.watched(guard))
            yield

    def _check_given(self, given: Given) -> Any:
        """Checks what a layer is given; returns its carry, as `say_finite` does."""
        arguments = *given.carry, *given.inputs
        named = dict(zip(self.arguments, arguments, strict=True))
        params, state = given.params, given.state
        checked = {"parameter ": params, "state ": state, "argument ": named}
        return _finite.say_finite(checked, given.carry)

    def _check_result(self, carry: Carry, output: Tree) -> tuple[Any, Any]:
        named = dict(zip(self.arguments, carry, strict=False))
        checked = {"result ": named, "output per layer ": output}
        return _finite.say_finite(checked, (carry, output))
