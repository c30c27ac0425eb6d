"""`layer_stack`: a stack of layers inside a Haiku transform.

At init the stack makes the parameters of all layers (`initialize`). Each call traces
the layer function once, cuts it into setup and call (`cut`), runs the setup of
all layers in batches, and loops over the calls (`loop`).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import numpy as np

from hk_stack import (
    _checks,
    _cut,
    _executors,
    _frames,
    _initialize,
    _layout,
    _loop,
    _naming,
    _scopes,
)
from hk_stack._layer import Call, Given, Options, Own, as_array, cast, pure_layer


def layer_stack(
    num_layers: int,
    with_per_layer_inputs: bool = False,
    unroll: int = 1,
    pass_reverse_to_layer_fn: bool = False,
    transparent: bool = False,
    transparency_map: _naming.Maps | None = None,
    name: str | None = None,
    *,
    setup: str = "auto",
    setup_batch_size: int | None = None,
    setup_remat: bool | None = None,
    init: str = "auto",
    loop: str = "scan",
    remat: bool | Callable[..., Any] = False,
    remat_every: int | str | None = None,
    carry_dtype: Any = None,
    check_finite: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
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
        largest array of a batch under 8 MiB, or one if setup gathers sharded values.
        A setup that a batch would change (one that holds a `cond`, for instance), or of
        which there is none, runs layer after layer in any case.
      setup_remat: Whether gradients run setup again instead of keeping what it computed
        on the way; the derived values are kept. By default, if there is more than one
        batch.
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
        depth; if a module is shared with the outside; if a `hoist` cannot be done.
    """
    _checks.stack_name(name)
    where = f"layer_stack {name!r}" if name else "layer_stack"
    num_layers = _checks.positive(num_layers, "num_layers", where)
    with_per_layer_inputs = _checks.flag(
        with_per_layer_inputs, "with_per_layer_inputs", where
    )
    transparent = _checks.flag(transparent, "transparent", where)
    options = Options(
        num_layers=num_layers,
        with_per_layer_inputs=with_per_layer_inputs,
        unroll=_checks.unroll(unroll, num_layers, where),
        pass_reverse=_checks.flag(
            pass_reverse_to_layer_fn, "pass_reverse_to_layer_fn", where
        ),
        naming_map=_naming_map(transparency_map, where) if transparent else None,
        name=name or f"__layer_stack_{_KINDS[with_per_layer_inputs]}",
        setup=_checks.one_of(setup, _cut.POLICIES, "setup", where),
        setup_batch_size=(
            None
            if setup_batch_size is None
            else _checks.positive(setup_batch_size, "setup_batch_size", where)
        ),
        setup_remat=_checks.true_or_false(setup_remat, "setup_remat", where),
        init=_checks.one_of(init, _initialize.METHODS, "init", where),
        loop=_checks.one_of(loop, _loop.LOOPS, "loop", where),
        remat=_remat(remat, remat_every, num_layers, where),
        carry_dtype=_checks.floating(carry_dtype, where),
        check_finite=bool(_checks.true_or_false(check_finite, "check_finite", where)),
    )

    def stack(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        _checks.only_function(args, kwargs, options.name)
        _checks.layer_function(f, options.name, with_per_layer_inputs)

        @functools.wraps(f)
        def stacked(*args: Any, reverse: bool = False, **kwargs: Any) -> Any:
            is_reverse = _checks.flag(reverse, "reverse", where)
            return _call(options, f, args, kwargs, is_reverse)

        return stacked

    return stack


def _naming_map(naming_map: Any, where: str) -> hk.LayerStackTransparencyMapping:
    if naming_map is None:
        raise ValueError(
            f"{where}: transparent=True needs a transparency_map, which names the "
            "module of each layer (see hk.LayerStackTransparencyMapping)."
        )
    return _naming.naming_map(naming_map, "transparency_map", where)


def _remat(remat: Any, every: Any, num_layers: int, where: str) -> _loop.Remat | None:
    policy = _checks.policy(remat, where)
    if not remat:
        if every is not None:
            raise ValueError(
                f"{where}: remat_every={every!r} says how remat groups the layers, but "
                "remat is off. Write remat=True too, or a policy."
            )
        return None
    if every == "sqrt":
        every = _loop.square_root(num_layers)
    elif every is None:
        every = 1
    elif isinstance(every, str):
        raise ValueError(
            f'{where}: remat_every must be a positive int or "sqrt", not {every!r}.'
        )
    return _loop.Remat(policy, _checks.positive(every, "remat_every", where))


_KINDS = {False: "no_per_layer", True: "with_per_layer"}


def _call(
    options: Options,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reverse: bool,
) -> Any:
    """Runs the stack, inside a Haiku transform."""
    num_layers = options.num_layers
    _checks.inside_transform(options.name, f)
    names = _checks.argument_names(f, len(args))
    if options.pass_reverse:
        kwargs = {**kwargs, "reverse": reverse}
    carry, inputs = args, ()
    if options.with_per_layer_inputs:
        carry, inputs = args[:1], args[1:]
    key = hk.maybe_next_rng_key()
    # A stack that is not transparent stores its layers in a scope of its own. Haiku
    # numbers scopes of one name, so only inside is it known what this one is called.
    is_transparent = options.naming_map is not None
    with contextlib.nullcontext() if is_transparent else hk.name_scope(options.name):
        path = _path(options)
        where = _checks.describe(path, f)
        _checks.carried(args, names, where)
        _checks.per_layer_inputs(inputs, num_layers, names[len(carry) :], where)
        carry, inputs = jax.tree.map(as_array, (carry, inputs))
        carry = cast(carry, options.carry_dtype)
        path = _frames.path_below(path)
        added = _frames.added_below(path, num_layers, where)
        own = Own(np.arange(num_layers, dtype=np.int32), added, inputs)
        call = Call(options, f, args, kwargs, where, path, names, reverse)
        layer = pure_layer(call)

        def init(key: jax.Array | None) -> tuple[Any, Any]:
            with call.explained(f"initialising {call.all_layers}"):
                params, state = _initialize.initialize(
                    layer, num_layers, key, carry, own, method=options.init, where=where
                )
            return _stored(options, params), _stored(options, state)

        lifted, updater = hk.transparent_lift_with_state(init, allow_reuse=True)
        params, state = (_stacked(options, tree) for tree in lifted(key))
    _checks.depth(params, state, num_layers, where)
    layered = {"parameter": params, "state": state, "per-layer input": inputs}
    _checks.not_sharded_by_layer(layered, where)
    key = hk.maybe_next_rng_key()
    keys = None if key is None else jax.random.split(key, num_layers)

    given = Given(params, state, keys, carry, own)
    run = _executors.python if call.is_python else _executors.compiled
    carry, outputs, state = run(call, layer, given)
    updater.update(_with_method(options, _stored(options, state)))
    if options.with_per_layer_inputs:
        return carry[0], outputs
    return carry[0] if len(args) == 1 else carry


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
