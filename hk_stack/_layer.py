"""One use of a stack, its invocation, and its layer as pure functions."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax

from hk_stack import (
    _advice,
    _carry,
    _checks,
    _finite,
    _frames,
    _loop,
    _parameters,
    _scopes,
    _taps,
)
from hk_stack._options import Options
from hk_stack._parts import Input
from hk_stack._types import Carry, Tree


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


class Layer(NamedTuple):
    """One layer as pure functions.

    Attributes:
      init: Parameters and state, before the layer runs.
      apply: The layer.
    """

    init: Callable[[Given], tuple[hk.Params, hk.State]]
    apply: Callable[[Given], Result]


@dataclasses.dataclass(frozen=True)
class Invocation:
    """One use of a stack.

    Attributes:
      situation: The stack, its layer function, and what it was given.
      where: Names the stack in errors.
      path: Of the stack, from the outermost one.
      reverse: Whether the last layer runs first.
      loop: What runs the layers.
      is_init: Whether the model is being initialised.
      check_finite: Whether values are checked, in this stack or for one around it.
      module: Plain name of the module around a transparent stack, or "".
      outside: Parameters of the transform around, which no layer may share, by plain
        names.
      scopes: Of the layers, if a Python loop runs them.
    """

    situation: _advice.Situation
    where: str
    path: str
    reverse: bool
    loop: _loop.Loop
    is_init: bool
    check_finite: bool
    module: str
    outside: Mapping[str, Mapping[str, Any]]
    scopes: Sequence[_scopes.Scope]

    @property
    def options(self) -> Options:
        """Of the stack."""
        return self.situation.options

    @property
    def arguments(self) -> list[str]:
        """Names of the arguments of the layer function: the carry, then its inputs."""
        return list(self.situation.arguments)

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
        return _advice.in_layer(self.where, index, doing, self.situation)

    def frame(self, given: Given, *, is_init: bool) -> _frames.Frame:
        """What is around one layer."""
        is_python = isinstance(given.index, int)
        is_init = is_init or self.is_init
        return _frames.Frame(
            self.path,
            self.where,
            given.index,
            self.options.num_layers,
            self.scopes[given.index].name if is_python else "",
            self.check_finite and not is_init,
            is_init,
            given.added,
            is_heard=self.check_finite or _taps.are_heard(),
        )


def invoke(
    situation: _advice.Situation, where: str, path: str, reverse: bool
) -> Invocation:
    """What is known of a stack where it is used."""
    options = situation.options
    is_transparent = options.naming_map is not None
    loop, num_layers = _loop.in_force(options.loop), options.num_layers
    outside = {} if is_transparent else hk.experimental.get_params()
    return Invocation(
        situation,
        where,
        path,
        reverse,
        loop,
        is_init=hk.running_init() or _frames.is_init(),
        check_finite=options.check_finite or _frames.is_checked(),
        module=_scopes.plain(_scopes.around()) if is_transparent else "",
        outside=_scopes.plain_tree(outside),
        scopes=_scopes.of_layers(options.name, num_layers) if loop == "python" else (),
    )


def pure_layer(invocation: Invocation) -> Layer:
    """The layer function as pure functions."""
    # Whether modules have to be told their names. To watch for these slows a Python
    # loop down, and one of its layers tells enough.
    were_odd: bool | None = None
    transformed = hk.transform_with_state(
        lambda names, given: _run(invocation, names, given, were_odd is not False)
    )

    def init(given: Given) -> tuple[hk.Params, hk.State]:
        with _frames.layer(invocation.frame(given, is_init=True)):
            return transformed.init(given.keys, invocation.names(), given)

    def apply(given: Given) -> Result:
        nonlocal were_odd
        frame = invocation.frame(given, is_init=False)
        with _frames.layer(frame, (given.params, given.carry)):
            if frame.check_finite:
                given = given._replace(carry=_check_given(invocation, given))
            names = invocation.names()
            names.given = params = names.added(given.params)
            (carry, output), after = transformed.apply(
                params, names.added(given.state), given.keys, names, given
            )
            carry = _carry.kept(
                given.carry,
                carry,
                invocation.arguments,
                invocation.where,
                invocation.options.with_per_layer_inputs,
            )
            if frame.check_finite:
                carry, output = _check_result(invocation, carry, output)
        if were_odd is None:
            were_odd = names.were_odd
        return Result(carry, output, names.dropped(after, given.state))

    return Layer(init, apply)


def _run(
    invocation: Invocation, names: _scopes.Names, given: Given, is_watched: bool
) -> tuple[Any, Any]:
    """Runs the layer function in its transform; returns carry, a tuple, and output."""
    options, where = invocation.options, invocation.where
    f, kwargs = invocation.situation.f, invocation.situation.kwargs
    with _around(invocation, names, is_watched):
        result = f(*given.carry, *given.inputs, **kwargs)
    _carry.result(result, where)
    output = None
    if options.with_per_layer_inputs:
        _carry.pair(result, where)
        result, output = result
    if len(given.carry) == 1:
        result = (result,)
    return _carry.cast(result, options.carry_dtype), output


@contextlib.contextmanager
def _around(
    invocation: Invocation, names: _scopes.Names, is_watched: bool
) -> Iterator[None]:
    """What is around the layer function: its scope, and a watch on modules."""
    with contextlib.ExitStack() as stack:
        if names.own:
            index: Any = names.frame.index  # A number, as a Python loop runs it.
            stack.enter_context(invocation.scopes[index].context)
        if is_watched or not names.own:
            captured: set[str] = set()
            stack.enter_context(names.watched(captured))
            stack.enter_context(
                _parameters.not_shared(invocation.outside, captured, invocation.where)
            )
        yield


def _check_given(invocation: Invocation, given: Given) -> Any:
    """Checks what a layer is given; returns its carry, as `say_finite` does."""
    arguments = *given.carry, *given.inputs
    named = dict(zip(invocation.arguments, arguments, strict=True))
    checked = {"parameter ": given.params, "state ": given.state, "argument ": named}
    return _finite.say_finite(checked, given.carry)


def _check_result(
    invocation: Invocation, carry: Carry, output: Tree
) -> tuple[Any, Any]:
    named = dict(zip(invocation.arguments, carry, strict=False))
    checked = {"result ": named, "output per layer ": output}
    return _finite.say_finite(checked, (carry, output))


def run_one(invocation: Invocation, layer: Layer, given: Given) -> Result:
    """Runs one layer; if it fails, looks for parameters that do not fit."""
    try:
        return layer.apply(given)
    except ValueError as error:
        if hk.running_init():
            raise
        key = jax.random.key(0) if given.keys is None else given.keys
        stored = _scopes.plain_tree(hk.experimental.get_params())
        _parameters.fit(
            layer.init,
            given._replace(keys=key),
            given.params,
            stored,
            invocation.options.naming_map,
            invocation.where,
            error,
        )
        raise
