"""`layer_stack`: a stack of layers inside a Haiku transform.

At init the stack makes the parameters of all layers (`_initialize`). Each use traces
the layer function once, cuts it into setup and call (`_cut`), runs the setup of all
layers in batches (`_parts`), and loops over the calls (`_loop`).
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

import haiku as hk
import jax
import numpy as np

from hk_stack import (
    _carry,
    _checks,
    _executors,
    _initialize,
    _layer_axes,
    _layout,
    _loop,
    _naming,
    _options,
    _parameters,
    _pipeline,
    _scopes,
    _taps,
)
from hk_stack._advice import Situation
from hk_stack._layer import Given, Invocation, Result
from hk_stack._options import Init, Options, Pipeline, Setup, SetupRemat
from hk_stack._traceback import hidden
from hk_stack._types import Key, Params, State

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Stack(Protocol[P, R_co]):
    """A stacked layer function: takes what it takes, and `reverse` by keyword."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @overload
    def __call__(self, *args: Any, reverse: bool, **kwargs: Any) -> R_co: ...


@hidden
def layer_stack(
    num_layers: int,
    with_per_layer_inputs: bool = False,
    unroll: int = 1,
    pass_reverse_to_layer_fn: bool = False,
    transparent: bool = False,
    transparency_map: _naming.Maps | None = None,
    name: str | None = None,
    *,
    setup: Setup = "auto",
    setup_batch_size: int | None = None,
    setup_remat: SetupRemat = "auto",
    setup_sharding: str | None = None,
    init: Init = "auto",
    loop: _loop.Loop = "scan",
    remat: bool | Callable[..., Any] = False,
    remat_every: int | Literal["sqrt"] | None = None,
    carry_dtype: Any = None,
    check_finite: bool = False,
    pipeline: Pipeline | None = None,
) -> Callable[[Callable[P, R]], Stack[P, R]]:
    """Stacks a layer function; a drop-in for `hk.layer_stack`.

    `layer_stack(L)(f)(x)` is equal to this loop, in which each `f` has parameters and
    random keys of its own:

    ```
    for _ in range(L):
        x = f(x)
    ```

    and, with per-layer inputs, to this one, which returns `x` and the stacked `zs`:

    ```
    for i in range(L):
        x, zs[i] = f(x, ys[i])
    ```

    What `f` computes from its parameters alone runs before the loop, in batches of as
    many layers as are small enough:

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     w = hk.get_parameter("w", [8, 8], init=hk.initializers.RandomNormal(0.1))
    ...     return jnp.tanh(x @ jax.scipy.linalg.expm(w))  # expm(w) leaves the loop
    >>> model = hk.transform(lambda x: hk_stack.layer_stack(6, name="layers")(layer)(x))
    >>> x = jnp.ones([2, 8])
    >>> params = model.init(jax.random.key(0), x)
    >>> params["layers/~"]["w"].shape
    (6, 8, 8)
    >>> model.apply(params, None, x).shape
    (2, 8)

    Args:
      num_layers: `L`, at least 1.
      with_per_layer_inputs: Whether `f` takes per-layer inputs after `x` and returns a
        pair. The stack then takes arrays `[L, ...]` (or pytrees of them) after `x`, and
        returns `x` and the second results, `[L, ...]`.
      unroll: How many layers one step of the compiled loop holds.
      pass_reverse_to_layer_fn: Whether `f` is given the keyword `reverse` with which
        the stack is called (`stack(f)(x, reverse=True)` runs the last layer first).
      transparent: Whether the parameters are stored per layer, under the names that
        `transparency_map` gives.
      transparency_map: Names of the layers' modules, of one naming map or a sequence of
        them; used if `transparent`.
      name: Name of the stack in the parameter tree.
      setup: What leaves the loop. "auto": values marked with `hoist`, and whatever else
        depends on parameters and constants only and is worth it. "marked": only marked
        values. "inline": nothing, as in `hk.layer_stack`.
      setup_batch_size: How many layers' setup runs at once, as `batch_size` of
        `jax.lax.map`: larger batches take more memory. By default as many as keep the
        largest array of a batch under 8 MiB (on accelerators: under 256 MiB, or a 64th
        of the memory), or one if setup gathers sharded values.
        A setup that a batch would change (of random bits other than threefry's, for
        instance), or of which there is none, runs layer after layer in any case.
      setup_remat: Whether gradients run setup again instead of keeping what it computed
        on the way; the derived values are kept. "auto": if there is more than one
        batch, which takes the least memory. Where there is room for all that a dear
        setup computes on the way, `setup_remat=False, setup_batch_size=num_layers` is
        faster.
      setup_sharding: The name of an axis of the mesh around (`jax.set_mesh`), over
        whose devices the setup of the layers is spread: each device runs that of its
        share of the layers, `setup_batch_size` at once, and all get the derived values.
        By default each device runs all setup. Worth it where setup is expensive and
        parameters are replicated; with those that are sharded already it may cost.
      init: How initial values are made. "auto": in batches of layers, unless an
        initial value depends on the activations, a batch would draw other random
        numbers, or this is inside `jit`, where it takes longer to compile. "vmap",
        "map" (one layer after another) and "scan" (the same, with the layers run in
        between) force one.
      loop: What runs the layers. "scan": a compiled loop. "unrolled": the same program
        once for each layer, without a loop, whatever `unroll` is. "python": the layer
        function itself, layer by layer, on true values outside of `jit`: for
        breakpoints, prints, interceptors of Haiku's methods. Modules then have the
        layer in their names (`layers_3/linear`), nothing is hoisted, and `remat` does
        nothing. `use_loop` and the variable `HK_STACK_LOOP` go before it.
      remat: Whether gradients compute each layer again, from what it was given, instead
        of keeping what it computed on the way; or what to keep nevertheless, as a
        policy of `jax.checkpoint_policies`. Derived values are kept in any case; their
        name in policies is "hk_stack.derived", should `jax.checkpoint` around the stack
        make them again.
      remat_every: How many layers are one group: between groups the carry is kept, in
        one it is computed again, so each layer runs forward three times. L need not be
        a multiple. "sqrt" takes about as many as there are groups. Needs `remat`.
      carry_dtype: A floating-point type that the real floating-point leaves of the
        carry are cast to, before the first layer and after each.
      pipeline: Over which stages of a mesh the layers are split, and into how many
        microbatches `M` a batch (the first axis of all that goes from layer to layer)
        is cut; see docs/scale.md. For each microbatch in turn, `x[m::M]`, the stack
        runs with keys `jax.random.fold_in(key, m)`, on the state that the last one
        left; outputs of each layer and taps are `[L, M, ...]`. Without a mesh of this
        axis, or by `use_loop`, the same runs one microbatch after the other. Gradients
        run each stage again, and keep what goes between stages.
      check_finite: Whether to check parameters, state, arguments, taps and results of
        each layer. The first that is not finite raises an error with its name and
        layer; inside `jit` through `jax.experimental.checkify.checkify`, which must be
        around the program.

    Returns:
      A function that takes a layer function and returns its stack. Keyword arguments
      of the stack (`stack(f)(x, is_training=True, mask=mask)`) go through to the layer
      function: Python values stay static, arrays are shared by all layers.

    Raises:
      TypeError: If an argument, an input of the stack or a result of the layer function
        is of the wrong type.
      ValueError: If one has a wrong value, shape or dtype; if parameters are of another
        depth; if a module is shared with the outside; if a `hoist` cannot be done; if
        there is no mesh with the axis `setup_sharding`.
    """
    options = _options.checked(
        num_layers=num_layers,
        with_per_layer_inputs=with_per_layer_inputs,
        unroll=unroll,
        pass_reverse_to_layer_fn=pass_reverse_to_layer_fn,
        transparent=transparent,
        transparency_map=transparency_map,
        name=name,
        setup=setup,
        setup_batch_size=setup_batch_size,
        setup_remat=setup_remat,
        setup_sharding=setup_sharding,
        init=init,
        loop=loop,
        remat=remat,
        remat_every=remat_every,
        carry_dtype=carry_dtype,
        check_finite=check_finite,
        pipeline=pipeline,
    )

    @hidden
    def stack(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        _check_alone(args, kwargs, options.name)
        _check_function(f, options.name, options.with_per_layer_inputs)

        @functools.wraps(f)
        @hidden
        def stacked(*args: Any, reverse: bool = False, **kwargs: Any) -> Any:
            where = _checks.describe(options.name, f)
            is_reverse = _checks.flag(reverse, "reverse", where)
            return _run(options, f, args, kwargs, is_reverse)

        return stacked

    return stack


def _run(
    options: Options,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reverse: bool,
) -> Any:
    _check_transform(options.name, f)
    if options.pass_reverse_to_layer_fn:
        kwargs = {**kwargs, "reverse": reverse}
    key = hk.maybe_next_rng_key()
    if options.naming_map is not None:
        return _invoke(options, f, key, reverse, args, kwargs)
    # Haiku numbers scopes of one name, so only inside is it known what this is called.
    with _scope(options.name, f):
        result = _invoke(options, f, key, reverse, args, kwargs)
        own = hk.force_name(hk.experimental.current_name())
        with _scopes.without_texts():
            row = LayerStack(options.num_layers, _checks.name_of(f), result, own)
        row.ran(*args)
    return result


def _scope(name: str, f: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    try:
        return hk.name_scope(name)
    except ValueError as error:
        raise ValueError(
            f"{_checks.describe(name, f)}: {error}. Name it as a module of Haiku, as "
            f"in name={re.sub(r'(?<![^/])(?=[0-9])|[^a-zA-Z0-9_/]', '_', name)!r}."
        ) from None


class LayerStack(hk.Module):
    """The row of a stack in `hk.experimental.tabulate`.

    The stack has run already: who intercepts methods can change nothing here.
    """

    def __init__(self, num_layers: int, layer: str, result: Any, name: str) -> None:
        super().__init__(name=name)
        self.num_layers = num_layers
        self.layer = layer
        self._result = result

    def ran(self, *args: Any) -> Any:
        """What the stack has made of its arguments."""
        del args
        return self._result

    def __repr__(self) -> str:
        return f"LayerStack(num_layers={self.num_layers}, layer={self.layer!r})"


def _invoke(
    options: Options,
    f: Callable[..., Any],
    key: Key,
    reverse: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    names = _checks.argument_names(f, len(args))
    situation = Situation(options, f, dict(zip(names, args, strict=True)), kwargs)
    invocation = Invocation(situation, _path(options), reverse)
    given = _given(invocation, key)
    params, state, updater = _lifted(invocation, given)
    carry, outputs, state = _run_layers(invocation, given, params, state)
    updater.update(_with_method(options, _stored(options, state)))
    result = carry[0] if len(carry) == 1 else carry
    return (result, outputs) if options.with_per_layer_inputs else result


def _given(invocation: Invocation, key: Key) -> Given:
    """What the layers are given, but for parameters and state."""
    options, where = invocation.options, invocation.where
    arguments, num_layers = invocation.situation.arguments, options.num_layers
    _check_carry(arguments, where)
    num_carry = 1 if options.with_per_layer_inputs else len(arguments)
    values = tuple(arguments.values())
    names = list(arguments)[num_carry:]
    _check_per_layer_inputs(values[num_carry:], num_layers, names, where)
    values = jax.tree.map(_carry.as_array, values)
    carry = _carry.cast(values[:num_carry], options.carry_dtype)
    added = _taps.added_below(invocation.path, num_layers, where)
    index = np.arange(num_layers, dtype=np.int32)
    return Given(None, None, key, carry, index, added, values[num_carry:])


def _run_layers(
    invocation: Invocation, given: Given, params: Params, state: State
) -> Result:
    num_layers = invocation.options.num_layers
    layered = {"parameter": params, "state": state, "per-layer input": given.inputs}
    _parameters.of_layers(layered, num_layers, invocation.where)
    key = hk.maybe_next_rng_key()
    keys = None if key is None else jax.random.split(key, num_layers)
    given = given._replace(params=params, state=state, keys=keys)
    if pipeline := invocation.options.pipeline:
        return _pipeline.run(invocation, given, pipeline)
    return _executors.RUN[invocation.loop](invocation, given)


def _lifted(invocation: Invocation, given: Given) -> tuple[Any, Any, Any]:
    """Parameters and state of the stack, made at init, and what updates the state."""
    options = invocation.options

    if options.pipeline:  # State may have the shape of a microbatch.
        given = _pipeline.first(invocation, given, options.pipeline)

    def init(key: Key) -> tuple[Any, Any]:
        with invocation.explained(f"initialising {invocation.all_layers}"):
            params, state = _initialize.initialize(invocation, given._replace(keys=key))
        return _stored(options, params), _stored(options, state)

    lifted, updater = hk.transparent_lift_with_state(init, allow_reuse=True)
    found = lifted(given.keys)
    _layer_axes.record(invocation.path, *found, options.naming_map)
    params, state = (_stacked(options, tree) for tree in found)
    return params, state, updater


def _path(options: Options) -> str:
    """Of the stack, in the transform around it."""
    if options.naming_map is None:
        return hk.experimental.current_name()
    return "/".join(filter(None, [_scopes.around(), options.name]))


def _with_method(options: Options, state: _layout.Modules) -> _layout.Modules:
    """State by names from the module on that runs: what lifts it forgets the method."""
    if options.naming_map is None:
        return state
    method = _scopes.around()[len(hk.experimental.current_name()) + 1 :]
    return {f"{method}/{m}": state[m] for m in state} if method else state


def _stacked(options: Options, tree: _layout.Modules) -> Any:
    """The stack's own tree `[L, ...]`, from the tree that the transform stores."""
    if options.naming_map is None:
        return tree
    return _layout.stack_modules(tree, options.naming_map)


def _stored(options: Options, tree: _layout.Modules) -> Any:
    """The inverse of `_stacked`."""
    if options.naming_map is None:
        return tree
    return _layout.unstack_modules(tree, options.naming_map, options.num_layers)


def _check_function(f: object, name: str, with_per_layer_inputs: bool) -> None:
    """Checks that `f` can be stacked."""
    if not callable(f):
        raise TypeError(
            f"layer_stack {name!r}: the layer function must be callable, not "
            f"{type(f).__name__}. Write layer_stack(num_layers)(layer_function)(x)."
        )
    _makes_values(f, name)
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except ValueError:  # Builtins have no signature.
        return
    starred = [p.name for p in parameters[:1] if p.kind is p.VAR_POSITIONAL]
    if starred and not with_per_layer_inputs:
        where = _checks.describe(name, f)
        raise ValueError(
            f"{where}: the layer function takes *{starred[0]}, so it "
            "cannot be known what it carries from layer to layer. Name its arguments, "
            f"as in def {_checks.name_of(f)}(x, y), or pass one tuple."
        )


def _makes_values(f: Callable[..., Any], name: str) -> None:
    """Refuses what makes, once called, something else than arrays."""
    where, code = _checks.describe(name, f), _innermost(f)
    if isinstance(code, type):
        made = f"{code.__name__}(...)"
        raise TypeError(
            f"{where}: expected a function, found a class. Make an object of it, in "
            f"each layer: layer_stack(num_layers)(lambda x: {made}(x))(x)."
        )
    for is_kind, kind, instead in (
        (inspect.iscoroutinefunction, "coroutine function", "def for async def"),
        (inspect.isasyncgenfunction, "asynchronous generator", "def for async def"),
        (inspect.isgeneratorfunction, "generator function", "return for yield"),
    ):
        if is_kind(code) or is_kind(type(code).__call__):
            raise TypeError(
                f"{where}: a {kind} returns no arrays when it is called. Write "
                f"{instead}."
            )


def _innermost(f: object) -> Any:
    return _innermost(f.func) if isinstance(f, functools.partial) else f


def _check_alone(args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> None:
    """Checks that the second call of `layer_stack` takes the layer function alone."""
    if args or kwargs:
        more = [type(a).__name__ for a in args] + [f"{key}=..." for key in kwargs]
        raise TypeError(
            f"layer_stack {name!r}: the second call takes the layer function alone, "
            f"and was given {', '.join(more)} too. Write "
            "layer_stack(num_layers)(layer_function)(x)."
        )


def _check_transform(name: str, f: Callable[..., Any]) -> None:
    try:
        hk.experimental.current_name()
    except ValueError:
        raise ValueError(
            f"{_checks.describe(name, f)} was called outside of a Haiku transform. "
            "Call it inside the function that you give to hk.transform or "
            "hk.transform_with_state."
        ) from None


def _check_per_layer_inputs(
    per_layer: tuple[Any, ...], num_layers: int, names: Sequence[str], where: str
) -> None:
    for name, tree in zip(names, per_layer, strict=True):
        for at, leaf in _checks.leaves_at(tree):
            found = f"{where}: per-layer input `{name}`{at}"
            if not hasattr(leaf, "shape"):
                raise TypeError(
                    f"{found} is a Python {type(leaf).__name__} "
                    f"({_checks.shown(leaf)}); expected an array with "
                    f"leading axis {num_layers}. Write "
                    "jnp.asarray([...]) for a list of numbers; pass what all layers "
                    "share by keyword."
                )
            if leaf.ndim == 0 or leaf.shape[0] != num_layers:
                raise ValueError(
                    f"{found} has shape {leaf.shape}; expected a leading axis of "
                    f"{num_layers}, one entry for each layer. Pass what all layers "
                    "share by keyword."
                )


def _check_carry(arguments: Mapping[str, Any], where: str) -> None:
    """Checks that what a stack is given by position are arrays."""
    for i, (name, tree) in enumerate(arguments.items()):
        instead = (
            "expected an array. By keyword it stays as it is, and all layers share it: "
            f"stack(f)(x, {name}=...)."
        )
        if not i:
            instead = (
                "expected an array, or a pytree of arrays, to go from layer to layer: "
                f"stack(f)({name}), of {name}=jnp.asarray(...)."
            )
        _checks.arrays(tree, f"{where}: argument `{name}`", instead)
