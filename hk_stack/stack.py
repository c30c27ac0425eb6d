"""`layer_stack`: a stack of layers inside a Haiku transform.

At init the stack makes the parameters of all layers (`initialize`). Each call traces
the layer function once, cuts it into setup and call (`cut`), runs the setup of
all layers in batches, and loops over the calls (`loop`).
"""

import contextlib
import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from hk_stack import checks, cut, eager, finite, initialize, inside, layout, taps
from hk_stack import loop as loops


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
    name = name or f"__layer_stack_{_KINDS[bool(with_per_layer_inputs)]}"
    where = f"layer_stack {name!r}"
    num_layers = checks.positive(num_layers, "num_layers", where)
    options = _Options(
        num_layers=num_layers,
        with_per_layer_inputs=with_per_layer_inputs,
        unroll=checks.unroll(unroll, num_layers, where),
        pass_reverse=pass_reverse_to_layer_fn,
        naming_map=transparency_map if transparent else None,
        name=name,
        setup=checks.one_of(setup, cut.POLICIES, "setup", where),
        setup_batch_size=(
            None
            if setup_batch_size is None
            else checks.positive(setup_batch_size, "setup_batch_size", where)
        ),
        setup_remat=checks.true_or_false(setup_remat, "setup_remat", where),
        init=checks.one_of(init, initialize.METHODS, "init", where),
        loop=checks.one_of(loop, loops.LOOPS, "loop", where),
        remat=_remat(remat, remat_every, num_layers, where),
        carry_dtype=checks.floating(carry_dtype, where),
        check_finite=bool(checks.true_or_false(check_finite, "check_finite", where)),
    )
    if transparent and transparency_map is None:
        raise ValueError(
            f"{where}: transparent=True needs a transparency_map, which names the "
            "module of each layer (see hk.LayerStackTransparencyMapping)."
        )

    def stack(f: Callable[..., Any]) -> Callable[..., Any]:
        checks.layer_function(f, options.name, with_per_layer_inputs)

        @functools.wraps(f)
        def stacked(*args: Any, reverse: bool = False, **kwargs: Any) -> Any:
            return _call(options, f, args, kwargs, reverse)

        return stacked

    return stack


def _remat(remat: Any, every: Any, num_layers: int, where: str) -> loops.Remat | None:
    policy = checks.policy(remat, where)
    if not remat:
        if every is not None:
            raise ValueError(
                f"{where}: remat_every={every!r} says how remat groups the layers, but "
                "remat is off. Write remat=True too, or a policy."
            )
        return None
    if every == "sqrt":
        every = loops.square_root(num_layers)
    elif every is None:
        every = 1
    elif isinstance(every, str):
        raise ValueError(
            f'{where}: remat_every must be a positive int or "sqrt", not {every!r}.'
        )
    return loops.Remat(policy, checks.positive(every, "remat_every", where))


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
    loop: str
    remat: loops.Remat | None
    carry_dtype: Any
    check_finite: bool


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
    carry, inputs = args, ()
    if options.with_per_layer_inputs:
        carry, inputs = args[:1], args[1:]
        checks.per_layer_inputs(inputs, num_layers, names[1:], where)
    carry, inputs = jax.tree.map(_as_array, (carry, inputs))
    carry = _cast(carry, options.carry_dtype)

    key = hk.maybe_next_rng_key()
    # A stack that is not transparent stores its layers in a scope of its own.
    scope = hk.name_scope(options.name)
    with contextlib.nullcontext() if options.naming_map else scope:
        path = inside.path_below(_path(options))
        added = inside.added_below(path, num_layers, where)
        own = _Own(np.arange(num_layers, dtype=np.int32), added, inputs)
        call = _Call(options, f, kwargs, where, path, names, reverse)
        layer = _pure_layer(call)

        def init(key: jax.Array | None) -> tuple[Any, Any]:
            params, state = initialize.initialize(
                layer, num_layers, key, carry, own, method=options.init, where=where
            )
            return _stored(options, params), _stored(options, state)

        lifted, updater = hk.transparent_lift_with_state(init, allow_reuse=True)
        params, state = (_stacked(options, tree) for tree in lifted(key))
    checks.depth(params, state, num_layers, where)
    key = hk.maybe_next_rng_key()
    keys = None if key is None else jax.random.split(key, num_layers)

    given = _Given(params, state, keys, carry, own)
    run = _run_python if call.is_python else _run
    carry, outputs, state = run(call, layer, given)
    updater.update(_stored(options, state))
    if options.with_per_layer_inputs:
        return carry[0], outputs
    return carry[0] if len(args) == 1 else carry


def _path(options: _Options) -> str:
    """Of the stack, in the transform around it."""
    scope = hk.experimental.current_name()
    if options.naming_map is None:
        return scope
    return options.name if scope == "~" else f"{scope}/{options.name}"


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


def _cast(carry: Any, dtype: Any) -> Any:
    """`carry` with its real floating-point leaves in `dtype`, unless that is None."""

    def cast(leaf: Any) -> Any:
        leaf = _as_array(leaf)
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_real else leaf

    return carry if dtype is None else jax.tree.map(cast, carry)


class _Own(NamedTuple):
    """What each layer gets of its own, besides parameters, state and key.

    Attributes:
      index: Its index, `[L]`.
      added: What to add at its taps, by path.
      inputs: The per-layer inputs.
    """

    index: Any
    added: dict[str, Any]
    inputs: tuple[Any, ...]


class _Given(NamedTuple):
    """What a stack is given, in the order in which a layer's `apply` takes it."""

    params: Any
    state: Any
    keys: Any
    carry: Any
    own: _Own


class _Call:
    """One call of a stack.

    Attributes:
      options: Of the stack.
      f: The layer function.
      kwargs: Its keyword arguments.
      where: Names the stack in errors.
      path: Of the stack, from the outermost one.
      names: Of the arguments of the layer function.
      reverse: Whether the last layer runs first.
      scope_name: What the name scopes of a Python loop begin with.
      loop: What runs the layers.
      is_init: Whether the model is being initialised.
      check_finite: Whether values are checked, in this stack or for one around it.
      checked: The stacks inside that check values, by label.
      captured: Modules made outside of the layer that are used in it, by name; None
        until a layer has run.
    """

    def __init__(
        self,
        options: _Options,
        f: Callable[..., Any],
        kwargs: dict[str, Any],
        where: str,
        path: str,
        names: list[str],
        reverse: bool,
    ):
        self.options = options
        self.f = f
        self.kwargs = kwargs
        self.where = where
        self.path = path
        self.names = names
        self.reverse = reverse
        self.scope_name = re.sub(r"\W", "_", options.name)
        self.loop = loops.in_force(options.loop)
        self.is_init = hk.running_init() or inside.is_init()
        self.check_finite = options.check_finite or inside.is_checked()
        self.checked: dict[str, finite.Checked | None] = {}
        self.captured: dict[str, hk.Module] | None = None

    @property
    def is_python(self) -> bool:
        """Whether a Python loop runs the layers."""
        return self.loop == "python"

    def record(self, params: Any, parts: cut.Cut | None) -> None:
        """Tells `summary`, if it listens."""
        recorder = inside.recording.value
        if recorder is None:
            return
        if hk.running_init():
            raise ValueError(
                "hk_stack.summary: expected the apply of a transform, not its init, "
                "as a summary is of parameters that are there. Shapes are enough: "
                "params = jax.eval_shape(model.init, rng, x), then "
                "summary(model.apply, params, rng, x)."
            )
        remat = None if self.is_python else self.options.remat
        record = inside.Record(
            self.path,
            checks.name_of(self.f),
            self.options.num_layers,
            params,
            hk.experimental.get_params(),
            parts,
            self.loop,
            loops.describe(remat),
            bool(inside.frames()),
        )
        types = tuple((v.shape, v.dtype) for v in jax.tree.leaves(params))
        recorder.records[self.path, record.function, types] = record

    def in_layer(
        self, index: int | None, doing: str = ""
    ) -> contextlib.AbstractContextManager[None]:
        """Says in which layer an error came up; None for one that is traced."""
        doing = f"{doing} all {self.options.num_layers} layers at once"
        if doing.startswith("tracing"):
            doing += '; loop="python" runs them one by one'
        return checks.in_layer(self.where, index, doing)

    def frame(self, own: _Own, *, is_init: bool) -> inside.Frame:
        """What is around one layer."""
        scope = ""
        if isinstance(own.index, int):
            scope = inside.scope_below(f"{self.scope_name}_{own.index}")
        is_init = is_init or self.is_init
        return inside.Frame(
            self.path,
            self.where,
            own.index,
            self.options.num_layers,
            scope,
            self.check_finite and not is_init,
            is_init,
            own.added,
            self.checked,
        )


def _pure_layer(call: _Call) -> initialize.Layer:
    """The layer function as pure functions of its parameters, state and key."""
    options, where = call.options, call.where
    outside = {} if options.naming_map else hk.experimental.get_params()

    def run(carry: tuple[Any, ...], own: _Own) -> tuple[Any, Any]:
        scope = inside.frames()[-1].scope
        # Watching slows a loop in Python down, and one of its layers tells enough.
        is_watched = not scope or call.captured is None
        watch = checks.nothing_shared(outside, where)
        with (
            _named(scope) if scope else contextlib.nullcontext(),
            watch if is_watched else contextlib.nullcontext(call.captured) as captured,
        ):
            call.captured = captured
            result = call.f(*carry, *own.inputs, **call.kwargs)
        output = None
        if options.with_per_layer_inputs:
            checks.is_pair(result, where)
            result, output = result
        if len(carry) == 1:
            result = (result,)
        return _cast(result, options.carry_dtype), output

    transformed = hk.transform_with_state(run)

    def init(key: Any, carry: Any, own: _Own) -> tuple[hk.Params, hk.State]:
        with (
            call.in_layer(None, "initialising"),
            inside.layer(call.frame(own, is_init=True)),
        ):
            return transformed.init(key, carry, own)

    def apply(params: Any, state: Any, key: Any, carry: Any, own: _Own) -> Any:
        frame = call.frame(own, is_init=False)
        with inside.layer(frame, (params, carry)):
            if frame.check_finite:
                _check_inputs(call, params, state, carry, own)
            run = _renamed(transformed.apply, call, frame)
            (carry, output), state = run(params, state, key, carry, own)
            if frame.check_finite:
                inside.say_finite(dict(zip(call.names, carry, strict=False)), "result ")
                inside.say_finite(output, "output per layer ")
        return (carry, output), state

    return initialize.Layer(init, apply)


def _named(scope: str) -> contextlib.AbstractContextManager[None]:
    """A name scope, for one layer of a Python loop."""
    before = hk.experimental.module_auto_repr(False)  # It takes half of the time.
    try:
        return hk.name_scope(scope)
    finally:
        hk.experimental.module_auto_repr(before)


def _renamed(
    apply: Callable[..., Any], call: _Call, frame: inside.Frame
) -> Callable[..., Any]:
    """`apply` of a layer in a Python loop, by names without the loop's name scopes.

    Modules that the layer makes have its scope in their names; modules of the layers
    around have theirs, and others have none. So that each finds its own, the layer is
    given parameters and state by all the names that it may ask for.
    """
    scopes = [f.scope for f in inside.frames() if f.scope]
    if not scopes:
        return apply
    if scopes[-1] != frame.scope or call.captured != {}:
        scopes.append("")

    def named(tree: Any, scope: str) -> dict[str, Any]:
        if not scope:
            return dict(tree)
        return {scope if m == "~" else f"{scope}/{m}": tree[m] for m in tree}

    def all_names(tree: Any) -> dict[str, Any]:
        trees = [named(tree, scope) for scope in scopes]
        names = dict(itertools.chain(*(made.items() for made in trees)))
        checks.no_clash(len(names), sum(map(len, trees)), scopes, call.where)
        return names

    def run(params: Any, state: Any, *rest: Any) -> tuple[Any, Any]:
        result, after = apply(all_names(params), all_names(state), *rest)
        return result, _plain_names(after, state, scopes)

    return run


def _plain_names(after: Any, before: Any, scopes: Sequence[str]) -> dict[str, Any]:
    """State by names without scopes; of several by one name, the one that changed."""
    plain: dict[str, dict[str, Any]] = {}
    for module, leaves in after.items():
        inside_of = (s for s in scopes if s and f"{module}/".startswith(f"{s}/"))
        scope = max(inside_of, key=len, default="")
        own = module[len(scope) + 1 :] if scope and module != scope else module
        own = "~" if scope and module == scope else own
        for name, value in leaves.items():
            is_old = value is before.get(own, {}).get(name)
            if not is_old or name not in plain.get(own, {}):
                plain.setdefault(own, {})[name] = value
    return plain


def _check_inputs(call: _Call, params: Any, state: Any, carry: Any, own: _Own) -> None:
    """Checks what a layer is given."""
    named = dict(zip(call.names, (*carry, *own.inputs), strict=True))
    inside.say_finite(params, "parameter ")
    inside.say_finite(state, "state ")
    inside.say_finite(named, "argument ")


def _run(call: _Call, layer: initialize.Layer, given: _Given) -> tuple[Any, Any, Any]:
    """Runs setup for all layers, then the loop; returns carry, outputs and state."""
    options, where = call.options, call.where
    closed, given, shapes = _trace(call, layer, given)
    constants = closed.consts
    marks: list[inside.Mark] = []
    if call.checked or inside.collecting.value is not None:
        closed, constants, marks = taps.expose(closed)
    inputs = _inputs(constants, given, call.names)
    parts = cut.cut(closed, inputs, options.setup, where)
    call.record(given.params, parts)
    num_carry = len(jax.tree.leaves(given.carry))
    start = len(constants) + len(jax.tree.leaves(given[:3]))
    plan = _Plan(
        parts,
        tuple(i.layered for i in inputs),
        range(start, start + num_carry),
        options.num_layers,
        call.loop == "unrolled",
        options.unroll,
        call.reverse,
        options.remat,
        options.setup_batch_size,
        options.setup_remat,
    )
    values = [*constants, *jax.tree.leaves(given)]
    leaves = eager.call(plan.run, values, plan.key)
    count = len(leaves) - len(marks)
    kept = _pass_on(call, marks, leaves[count:])
    results = jax.tree.unflatten(jax.tree.structure(shapes), leaves[:count])
    (carry, outputs), state = results
    return _tied(carry, kept), outputs, state


def _pass_on(call: _Call, marks: list[inside.Mark], values: list[Any]) -> list[Any]:
    """Tells whatever is around the stack what is at the marks, `[L, ...]`.

    Returns:
      What must not be lost on the way there.
    """
    kept, items, codes = [], [], []
    for mark, value in zip(marks, values, strict=True):
        if mark.is_tap:
            kept.append(inside.mark_tap(value, mark.label))
        else:
            label = mark.label.partition(":")[2]
            items.append((label, call.checked[mark.label]))
            codes.append(value)
    if codes:
        num_layers = call.options.num_layers
        checked = finite.Checked(call.where, num_layers, call.reverse, tuple(items))
        kept.append(inside.say_code(checked.encode(codes), call.where, checked))
    return [value for value in kept if value is not None]


def _tied(carry: Any, kept: list[Any]) -> Any:
    """`carry`, computed only together with what is `kept`.

    Where a gradient is taken of a function under `jit`, JAX drops what nobody reads.
    """
    leaves, tree = jax.tree.flatten(carry)
    if not kept or not leaves:
        return carry
    tied = jax.lax.optimization_barrier((leaves, kept))[0]
    return jax.tree.unflatten(tree, tied)


def _run_python(
    call: _Call, layer: initialize.Layer, given: _Given
) -> tuple[Any, Any, Any]:
    """Runs the layer function itself, layer by layer."""
    structure: Any = None

    def step(carry: Any, own: Any) -> tuple[Any, Any]:
        nonlocal structure
        with call.in_layer(own[3].index):
            (after, output), state = _apply(call, layer, *own[:3], carry, own[3])
            checks.same_structure(carry, after, call.names, call.where)
            after, output = jax.tree.map(_as_array, (after, output))
            promoted = jax.tree.map(_promote, carry, after)
            checks.same_carry(promoted, after, call.names, call.where)
            found = jax.tree.structure(output)
            checks.same_outputs(structure, found, call.where)
            structure = found
        return after, (output, state)

    call.record(given.params, None)
    num_layers = call.options.num_layers
    own = given.own._replace(index=range(num_layers))
    carry, (outputs, state) = loops.run(
        step,
        given.carry,
        (given.params, given.state, given.keys, own),
        num_layers=num_layers,
        unrolled=True,
        reverse=call.reverse,
    )
    return carry, outputs, state


class _Plan(NamedTuple):
    """How a stack runs, once its layer is cut.

    Attributes:
      parts: Setup and call of one layer.
      layered: For each input of the layer, whether it has a layer axis.
      carry: Which inputs are the carry. The outputs begin with the next carry.
      num_layers: `L`.
      unrolled: See `loop.run`, as the next three.
      unroll: How many layers one step holds.
      reverse: Whether the last layer runs first.
      remat: What the backward pass computes again.
      setup_batch_size: See `layer_stack`.
      setup_remat: See `layer_stack`.
    """

    parts: cut.Cut
    layered: tuple[bool, ...]
    carry: range
    num_layers: int
    unrolled: bool
    unroll: int
    reverse: bool
    remat: loops.Remat | None
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
        shared, own = (list(map(_derived, made)) for made in (shared, own))
        inputs = {i: values[i] for i in parts.call_inputs}
        layered = [i for i in inputs if self.layered[i]]
        carried = [i for i in inputs if i in self.carry]

        def step(carry: list[Any], mapped: Any) -> tuple[list[Any], list[Any]]:
            own, given = mapped
            now = {i: carry[self.carry.index(i)] for i in carried}
            read = inputs | now | dict(zip(layered, given, strict=True))
            results = jex.jaxpr_as_fun(parts.call)(*shared, *own, *read.values())
            return results[: len(carry)], results[len(carry) :]

        carry, rest = loops.run(
            step,
            [values[i] for i in self.carry],
            (own, [inputs[i] for i in layered]),
            num_layers=self.num_layers,
            unrolled=self.unrolled,
            unroll=self.unroll,
            reverse=self.reverse,
            remat=self.remat,
        )
        return [*carry, *rest]


def _derived(value: Any) -> Any:
    """Names a derived value for policies of `jax.checkpoint` around the stack."""
    return checkpoint_name(value, "hk_stack.derived")


def _trace(
    call: _Call, layer: initialize.Layer, given: _Given
) -> tuple[jex.ClosedJaxpr, _Given, Any]:
    """Traces one layer; returns `given` with the carry in the types it will keep."""
    params, state, key, _, own = layout.drop_layers(given._replace(carry=None))
    names, where = call.names, call.where
    trace = jax.make_jaxpr(functools.partial(_apply, call, layer), return_shape=True)
    while True:
        carry = given.carry
        with call.in_layer(None, "tracing"):
            closed, shapes = trace(params, state, key, carry, own)
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


def _apply(
    call: _Call, layer: initialize.Layer, params: Any, state: Any, key: Any, *rest: Any
) -> Any:
    """Runs one layer; if it fails, looks for parameters that do not fit."""
    try:
        return layer.apply(params, state, key, *rest)
    except ValueError:
        if not hk.running_init():
            stored = hk.experimental.get_params()
            spec = (jax.random.key(0) if key is None else key, *rest)
            checks.has_params(layer.init, spec, params, stored, call.where)
        raise


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
    index = cut.Input("the layer's index", known=True, fixed=True, layered=True)
    carry = [
        cut.Input(f"argument `{name}{leaf}`", False, False, False)
        for name, tree in zip(names[:num_carry], given.carry, strict=True)
        for leaf in checks.leaf_names(tree)
    ]
    per_layer = [
        entry
        for name, tree in zip(names[num_carry:], given.own.inputs, strict=True)
        for entry in own(tree, f"per-layer input `{name}`")
    ]
    return [
        *_closed_over(constants),
        *own(given.params, "parameter ", known=True),
        *own(given.state, "state "),
        *own(given.keys, "a random key"),
        *carry,
        index,
        *own(given.own.added, "what is added to the tap "),
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
