"""`layer_stack`: a stack of layers inside a Haiku transform.

At init the stack makes the parameters of all layers (`initialize`). Each call traces
the layer function once, cuts it into setup and call (`cut`), runs the setup of
all layers in batches, and loops over the calls (`loop`).
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import checks, cut, eager, initialize, layout, loop


def layer_stack(
    num_layers: int,
    with_per_layer_inputs: bool = False,
    unroll: int = 1,
    pass_reverse_to_layer_fn: bool = False,
    transparent: bool = False,
    transparency_map: hk.LayerStackTransparencyMapping | None = None,
    name: str | None = None,
    *,
    setup: str = "auto",
    setup_batch_size: int | None = None,
    setup_remat: bool | None = None,
    init: str = "auto",
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
      transparency_map: Names of the layers' modules; used if `transparent`.
      name: Name of the stack in the parameter tree.
      setup: What leaves the loop. "auto": values marked with `hoist`, and whatever else
        depends on parameters and constants only and is worth it. "marked": only marked
        values. "inline": nothing, as in `hk.layer_stack`.
      setup_batch_size: How many layers' setup runs at once, as `batch_size` of
        `jax.lax.map`: larger batches take more memory. By default as many as keep the
        largest array of a batch under 8 MiB. A setup that a batch would change (one
        that holds a `cond`, for instance) runs layer after layer in any case.
      setup_remat: Whether gradients run setup again instead of keeping what it computed
        on the way; the derived values are kept. By default, if there is more than one
        batch.
      init: How initial values are made. "auto": in batches of layers, unless an
        initial value depends on the activations or a batch would draw other random
        numbers. "vmap", "map" (one layer after another) and "scan" (the same, with the
        layers run in between) force one.

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
    name = name or f"__layer_stack_{_KINDS[bool(with_per_layer_inputs)]}"
    options = _Options(
        num_layers=checks.positive(num_layers, "num_layers", name),
        with_per_layer_inputs=with_per_layer_inputs,
        unroll=unroll,
        pass_reverse=pass_reverse_to_layer_fn,
        naming_map=transparency_map if transparent else None,
        name=name,
        setup=checks.one_of(setup, cut.POLICIES, "setup", name),
        setup_batch_size=(
            None
            if setup_batch_size is None
            else checks.positive(setup_batch_size, "setup_batch_size", name)
        ),
        setup_remat=checks.true_or_false(setup_remat, "setup_remat", name),
        init=checks.one_of(init, initialize.METHODS, "init", name),
    )
    if transparent and transparency_map is None:
        raise ValueError(
            f"layer_stack {name!r}: transparent=True needs a transparency_map, which "
            "names the module of each layer (see hk.LayerStackTransparencyMapping)."
        )

    def stack(f: Callable[..., Any]) -> Callable[..., Any]:
        checks.layer_function(f, options.name, with_per_layer_inputs)

        @functools.wraps(f)
        def stacked(*args: Any, reverse: bool = False, **kwargs: Any) -> Any:
            return _call(options, f, args, kwargs, reverse)

        return stacked

    return stack


_KINDS = {False: "no_per_layer", True: "with_per_layer"}


@dataclasses.dataclass(frozen=True)
class _Options:
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


def _call(
    options: _Options,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reverse: bool,
) -> Any:
    """Runs the stack, inside a Haiku transform."""
    num_layers = options.num_layers
    where = checks.inside_transform(options.name, f)
    names = checks.argument_names(f, len(args))
    if options.pass_reverse:
        kwargs = {**kwargs, "reverse": reverse}
    carry, per_layer = args, ()
    if options.with_per_layer_inputs:
        carry, per_layer = args[:1], args[1:]
        checks.per_layer_inputs(per_layer, num_layers, names[1:], where)
    carry, per_layer = jax.tree.map(_as_array, (carry, per_layer))
    layer = _pure_layer(options, f, kwargs, where)

    def init(key: jax.Array | None) -> tuple[Any, Any]:
        params, state = initialize.initialize(
            layer, num_layers, key, carry, per_layer, method=options.init, where=where
        )
        return _stored(options, params), _stored(options, state)

    params, state, updater = _lift(options, init)
    checks.depth(params, state, num_layers, where)
    key = hk.maybe_next_rng_key()
    keys = None if key is None else jax.random.split(key, num_layers)

    given = _Given(params, state, keys, carry, per_layer)
    carry, outputs, state = _run(options, layer, given, names, reverse, where)
    updater.update(_stored(options, state))
    if options.with_per_layer_inputs:
        return carry[0], outputs
    return carry[0] if len(args) == 1 else carry


def _lift(
    options: _Options, init: Callable[..., Any]
) -> tuple[Any, Any, hk.LiftWithStateUpdater]:
    """The stack's parameters and state, from the transform or, at init, from `init`."""
    key = hk.maybe_next_rng_key()
    # A stack that is not transparent stores its layers in a scope of its own.
    scope = hk.name_scope(options.name)
    with contextlib.nullcontext() if options.naming_map else scope:
        lifted, updater = hk.transparent_lift_with_state(init, allow_reuse=True)
        params, state = lifted(key)
    return _stacked(options, params), _stacked(options, state), updater


def _stacked(options: _Options, tree: layout.Modules) -> Any:
    """The stack's own tree `[L, ...]`, from the tree that the transform stores."""
    if options.naming_map is None:
        return tree
    return layout.stack_modules(tree, options.naming_map)


def _stored(options: _Options, tree: layout.Modules) -> Any:
    """The inverse of `_stacked`."""
    if options.naming_map is None:
        return tree
    return layout.unstack_modules(tree, options.naming_map, options.num_layers)


def _as_array(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _pure_layer(
    options: _Options, f: Callable[..., Any], kwargs: dict[str, Any], where: str
) -> initialize.Layer:
    """The layer function as pure functions of its parameters, state and key."""
    outside = {} if options.naming_map else hk.experimental.get_params()

    def call(carry: tuple[Any, ...], per_layer: tuple[Any, ...]) -> tuple[Any, Any]:
        with checks.nothing_shared(outside, where):
            result = f(*carry, *per_layer, **kwargs)
        if options.with_per_layer_inputs:
            checks.is_pair(result, where)
            return (result[0],), result[1]
        return (result,) if len(carry) == 1 else result, None

    transformed = hk.transform_with_state(call)

    def init(key: Any, carry: Any, per_layer: Any) -> tuple[hk.Params, hk.State]:
        return transformed.init(key, carry, per_layer)

    def apply(params: Any, state: Any, key: Any, carry: Any, per_layer: Any) -> Any:
        return transformed.apply(params, state, key, carry, per_layer)

    return initialize.Layer(init, apply)


class _Given(NamedTuple):
    """What a stack is given, in the order in which a layer's `apply` takes it."""

    params: Any
    state: Any
    keys: Any
    carry: Any
    per_layer: Any


def _run(
    options: _Options,
    layer: initialize.Layer,
    given: _Given,
    names: list[str],
    reverse: bool,
    where: str,
) -> tuple[Any, Any, Any]:
    """Runs setup for all layers, then the loop; returns carry, outputs and state."""
    closed, given, shapes = _trace(layer, given, names, where)
    inputs = _inputs(closed.consts, given, names)
    parts = cut.cut(closed, inputs, options.setup, where)
    num_carry = len(jax.tree.leaves(given.carry))
    start = len(closed.consts) + len(jax.tree.leaves(given[:3]))
    plan = _Plan(
        parts,
        tuple(i.layered for i in inputs),
        range(start, start + num_carry),
        options.num_layers,
        options.unroll,
        reverse,
        options.setup_batch_size,
        options.setup_remat,
    )
    values = [*closed.consts, *jax.tree.leaves(given)]
    leaves = eager.call(plan.run, values, plan.key)
    (carry, outputs), state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return carry, outputs, state


class _Plan(NamedTuple):
    """How a stack runs, once its layer is cut.

    Attributes:
      parts: Setup and call of one layer.
      layered: For each input of the layer, whether it has a layer axis.
      carry: Which inputs are the carry. The outputs begin with the next carry.
      num_layers: `L`.
      unroll: See `loop.scan`.
      reverse: See `loop.scan`.
      setup_batch_size: See `layer_stack`.
      setup_remat: See `layer_stack`.
    """

    parts: cut.Cut
    layered: tuple[bool, ...]
    carry: range
    num_layers: int
    unroll: int
    reverse: bool
    setup_batch_size: int | None
    setup_remat: bool | None

    def key(self) -> Hashable:
        """All that `run` depends on."""
        shared, setup, call, *positions = self.parts
        programs = tuple(map(eager.structure, (shared, setup, call)))
        return programs, tuple(positions), self[1:]

    def run(self, values: list[Any]) -> list[Any]:
        """Runs setup for all layers, then the loop over calls."""
        parts = self.parts
        shared, own = cut.derive(
            parts,
            values,
            self.layered,
            self.num_layers,
            batch_size=self.setup_batch_size,
            remat=self.setup_remat,
        )
        inputs = {i: values[i] for i in parts.call_inputs}
        layered = [i for i in inputs if self.layered[i]]
        carried = [i for i in inputs if i in self.carry]

        def step(carry: list[Any], mapped: Any) -> tuple[list[Any], list[Any]]:
            own, given = mapped
            now = {i: carry[self.carry.index(i)] for i in carried}
            read = inputs | now | dict(zip(layered, given, strict=True))
            results = jex.jaxpr_as_fun(parts.call)(*shared, *own, *read.values())
            return results[: len(carry)], results[len(carry) :]

        carry, rest = loop.scan(
            step,
            [values[i] for i in self.carry],
            (own, [inputs[i] for i in layered]),
            num_layers=self.num_layers,
            unroll=self.unroll,
            reverse=self.reverse,
        )
        return [*carry, *rest]


def _trace(
    layer: initialize.Layer, given: _Given, names: list[str], where: str
) -> tuple[jex.ClosedJaxpr, _Given, Any]:
    """Traces one layer; returns `given` with the carry in the types it will keep."""
    params, state, key, _, per_layer = layout.drop_layers(given._replace(carry=None))
    trace = jax.make_jaxpr(layer.apply, return_shape=True)
    while True:
        carry = given.carry
        try:
            closed, shapes = trace(params, state, key, carry, per_layer)
        except ValueError:
            if not hk.running_init():
                init_key = jax.random.key(0) if key is None else key
                spec = (init_key, carry, per_layer)
                stored = hk.experimental.get_params()
                checks.has_params(layer.init, spec, given.params, stored, where)
            raise
        (after, _), _ = shapes
        checks.same_structure(carry, after, names, where)
        outs = jax.tree.unflatten(
            jax.tree.structure(carry), closed.out_avals[: len(jax.tree.leaves(carry))]
        )
        promoted = jax.tree.map(_promote, carry, outs)
        if all(map(operator.is_, jax.tree.leaves(carry), jax.tree.leaves(promoted))):
            checks.same_carry(carry, after, names, where)
            return closed, given, shapes
        given = given._replace(carry=promoted)


def _promote(leaf: jax.Array, after: Any) -> jax.Array:
    """A weakly typed carry takes on the type that the first layer gives it."""
    if not getattr(leaf, "weak_type", False) or after.shape != leaf.shape:
        return leaf
    if after.weak_type and after.dtype == leaf.dtype:
        return leaf
    return jax.lax.convert_element_type(leaf, after.dtype)


def _inputs(constants: list[Any], given: _Given, names: list[str]) -> list[cut.Input]:
    """Describes the inputs of a traced layer for the cut."""

    def own(tree: Any, label: str, known: bool = False) -> list[cut.Input]:
        return [
            cut.Input(f"{label}{name}", known=known, fixed=known, layered=True)
            for name in checks.leaf_names(tree)
        ]

    num_carry = len(given.carry)
    carry = [
        cut.Input(f"argument `{name}{leaf}`", False, False, False)
        for name, tree in zip(names[:num_carry], given.carry, strict=True)
        for leaf in checks.leaf_names(tree)
    ]
    per_layer = [
        entry
        for name, tree in zip(names[num_carry:], given.per_layer, strict=True)
        for entry in own(tree, f"per-layer input `{name}`")
    ]
    return [
        *_closed_over(constants),
        *own(given.params, "parameter ", known=True),
        *own(given.state, "state "),
        *own(given.keys, "a random key"),
        *carry,
        *per_layer,
    ]


def _closed_over(constants: list[Any]) -> list[cut.Input]:
    """Describes what a layer closes over: it may be an activation, or be known."""
    parameters = {id(leaf) for leaf in jax.tree.leaves(hk.experimental.get_params())}

    def is_known(value: Any) -> bool:
        if not isinstance(value, jax.Array) or value.ndim == 0:
            return True
        return id(value) in parameters

    return [
        cut.Input("an array closed over", is_known(value), True, False)
        for value in constants
    ]
