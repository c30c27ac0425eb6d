"""`per_layer`: an optimiser to which each layer of a stack is its own parameter."""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import _checks, _equations
from hk_stack._types import Tree

if TYPE_CHECKING:
    import optax


def per_layer(
    optimizer: "optax.GradientTransformation", layer_axes: Tree
) -> "optax.GradientTransformation":
    """The same optimiser, to which each layer of a stack is a parameter of its own.

    To optax, a stack `[L, ...]` is one parameter with one axis more, which changes what
    an optimiser does by the axes or the norm of a parameter: muon, adafactor, lamb,
    masks by `ndim`. Here each layer is treated as in a Python loop of layers:

    ```
    for i in range(L):
        updates[i], state[i] = optimizer.update(gradients[i], state[i], params[i])
    ```

    by one `jax.vmap` for each layer axis. What an optimiser keeps for a parameter has
    the parameter's layer axes in front; counters and hyperparameters are as ever. So
    its state is what `stack_params(state, names, per_layer=True)` makes of that of a
    loop of layers.

    >>> import jax, jax.numpy as jnp, optax, hk_stack
    >>> params = {"embed": jnp.ones([8, 4]), "layers": jnp.ones([6, 4, 4])}
    >>> optimizer = hk_stack.per_layer(optax.adafactor(1e-3), {"embed": 0, "layers": 1})
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update(params, state, params)
    >>> jax.tree.map(jnp.shape, updates)
    {'embed': (8, 4), 'layers': (6, 4, 4)}

    Args:
      optimizer: Of optax. It must treat each parameter by itself.
      layer_axes: How many layer axes parameters begin with: what `hk_stack.layer_axes`
        returns for them.

    Returns:
      The optimiser, for `optax.chain`, `optax.masked` and the like.

    Raises:
      TypeError: If `optimizer` is none, or `layer_axes` is no tree of ints; once it is
        used, if the optimiser needs more than gradients and parameters.
      ValueError: Once it is used, if the optimiser mixes parameters or draws random
        numbers; if parameters are not those of `layer_axes`.
    """
    import optax

    _check(optimizer, layer_axes)
    depths = _by_path(layer_axes)

    @functools.cache
    def layout(types: "_Types", has_params: bool) -> _Layout:
        return _Layout.of(optimizer, types, has_params)

    def init(params: Tree) -> Tree:
        return layout(_Types.of(params, depths), True).init(optimizer, params)

    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        given = updates if params is None else params
        found = layout(_Types.of(given, depths), params is not None)
        return found.update(optimizer, updates, state, params)

    return optax.GradientTransformation(init, update)


def scale_by_layer(
    fn: Callable[[int, int], float], layer_axes: Tree
) -> "optax.GradientTransformation":
    """Scales the updates of each layer by a factor of its own.

    `fn(i, L)` is the factor for layer `i` of `L`, as in layer-wise decay of the
    learning rate. In nested stacks the layer is that of the outermost one; what is in
    no stack stays as it is.

    >>> import jax.numpy as jnp, optax, hk_stack
    >>> decay = hk_stack.scale_by_layer(lambda i, L: 0.5 ** (L - 1 - i), {"w": 1})
    >>> optimizer = optax.chain(optax.sgd(1.0), decay)
    >>> params = {"w": jnp.ones([3, 1])}
    >>> updates, _ = optimizer.update(params, optimizer.init(params))
    >>> updates["w"].ravel()
    Array([-0.25, -0.5 , -1.  ], dtype=float32)

    Args:
      fn: From the number of a layer, from 0, and `L` to a factor.
      layer_axes: How many layer axes parameters begin with: see `per_layer`.

    Returns:
      A transformation without state.

    Raises:
      TypeError: If `fn` is no function, or `layer_axes` no tree of ints.
    """
    import optax

    _checks.function(fn, "hk_stack.scale_by_layer")
    depths = _by_path(layer_axes)

    def scaled(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not _depth(depths, path, leaf):
            return leaf
        count = leaf.shape[0]
        factors = jnp.asarray([fn(i, count) for i in range(count)], leaf.dtype)
        return leaf * factors.reshape(count, *[1] * (leaf.ndim - 1))

    def update(updates: Tree, params: Tree = None) -> Tree:
        del params
        return jax.tree.map_with_path(scaled, updates)

    return optax.stateless(update)


_Path = tuple[str, ...]


class _Types(NamedTuple):
    """What parameters are.

    Attributes:
      structure: Of their tree.
      types: Of the leaves: shape without layer axes, dtype.
      paths: Where they are.
      axes: The layer axes of each: its sizes.
    """

    structure: Hashable
    types: tuple[tuple[tuple[int, ...], Any], ...]
    paths: tuple[_Path, ...]
    axes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, params: Tree, depths: Mapping[_Path, int]) -> "_Types":
        leaves, structure = jax.tree.flatten_with_path(params)
        count = [_depth(depths, path, leaf) for path, leaf in leaves]
        kinds = [jax.typeof(leaf) for _, leaf in leaves]
        both = list(zip(kinds, count, strict=True))
        return cls(
            structure,
            tuple((kind.shape[n:], kind.dtype) for kind, n in both),
            tuple(_names(path) for path, _ in leaves),
            tuple(kind.shape[:n] for kind, n in both),
        )

    def one(self) -> Tree:
        """The types of the parameters of one layer."""
        leaves = [jax.ShapeDtypeStruct(*kind) for kind in self.types]
        return jax.tree.unflatten(self.structure, leaves)


_Sizes = list[tuple[int, ...]]


class _Layout(NamedTuple):
    """Which layer axes an optimiser's state begins with.

    Attributes:
      structure: Of the state.
      own: The layer axes of each parameter: its sizes.
      kept: The layer axes of each leaf of the state.
    """

    structure: Any
    own: _Sizes
    kept: _Sizes

    @classmethod
    def of(
        cls, optimizer: "optax.GradientTransformation", types: _Types, has_params: bool
    ) -> "_Layout":
        one = types.one()
        init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(one)
        given = (one, state, one) if has_params else (one, state)
        update = _traced_update(optimizer, given)
        _check_no_draws(init, update)
        owners = _Flow.of(types, init, update, state, has_params).owners()
        kept = [types.axes[i] if i >= 0 else () for i in owners]
        return cls(jax.tree.structure(state), list(types.axes), kept)

    def init(self, optimizer: "optax.GradientTransformation", params: Tree) -> Tree:
        """The state for all layers."""
        return self._for_layers(optimizer.init, [self.own], [self.kept])(params)

    def update(
        self,
        optimizer: "optax.GradientTransformation",
        updates: Tree,
        state: Tree,
        params: Tree,
    ) -> tuple[Tree, Tree]:
        """Updates and state for all layers."""
        self._check(updates, state, params)
        given, sizes = [updates, state], [self.own, self.kept]
        if params is not None:
            given, sizes = [*given, params], [*sizes, self.own]
        run = self._for_layers(optimizer.update, sizes, [self.own, self.kept])
        made: tuple[Tree, Tree] = run(*given)
        return made

    def _for_layers(
        self, run: Callable[..., Any], given: list[_Sizes], made: list[_Sizes]
    ) -> Callable[..., Any]:
        """A function of one layer's trees for all, by the axes of their leaves."""
        into, out = (list(itertools.chain(*sizes)) for sizes in (given, made))

        def on_trees(*trees: Tree) -> Any:
            leaves, structure = jax.tree.flatten(trees)
            result: Any = None

            def on_leaves(*leaves: Any) -> list[Any]:
                nonlocal result
                made = run(*jax.tree.unflatten(structure, leaves))
                result = jax.tree.structure(made)
                return jax.tree.leaves(made)

            found = _mapped(on_leaves, into, out)(*leaves)
            return jax.tree.unflatten(result, found)

        return on_trees

    def _check(self, updates: Tree, state: Tree, params: Tree) -> None:
        found: Any = jax.tree.structure(state)
        if found != self.structure:
            raise ValueError(
                f"{_WHERE}: the state is of another structure than the optimiser's for "
                f"these parameters: expected {self.structure}, found {found}. Make it "
                "by optimizer.init(params)."
            )
        if params is None:
            return
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (updates, params)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{_WHERE}: expected updates of the structure and shapes of the "
                f"parameters, {shapes[1]}, found {shapes[0]}."
            )


def _mapped(run: Callable[..., Any], into: _Sizes, out: _Sizes) -> Callable[..., Any]:
    """`run` for all layers: a `jax.vmap` for each layer axis, the first outermost."""
    for level in reversed(range(max(map(len, into), default=0))):
        for size in dict.fromkeys(axes[level] for axes in into if axes[level:]):
            run = jax.vmap(
                run,
                tuple(_at(axes, level, size) for axes in into),
                [_at(axes, level, size) for axes in out],
                axis_size=size,
            )
    return run


_WHERE = "hk_stack.per_layer"


def _at(axes: tuple[int, ...], level: int, size: int) -> int | None:
    """Whether the layer axis of this level, which is in front by then, is mapped."""
    return 0 if axes[level : level + 1] == (size,) else None


class _Flow(NamedTuple):
    """What flows into an optimiser's results, and from which parameters.

    Attributes:
      types: Of the parameters.
      update: Its program: of gradients, state and parameters; it makes updates, state.
      names: Where the state's leaves are.
      starts: For each parameter, the leaves of the state that `init` makes of it.
      has_params: Whether `update` is given parameters.
    """

    types: _Types
    update: jex.ClosedJaxpr
    names: list[_Path]
    starts: list[set[int]]
    has_params: bool

    @classmethod
    def of(
        cls,
        types: _Types,
        init: jex.ClosedJaxpr,
        update: jex.ClosedJaxpr,
        state: Tree,
        has_params: bool,
    ) -> "_Flow":
        starts = [_reached(init, {i}) for i in range(len(types.paths))]
        names = [_names(path) for path, _ in jax.tree.leaves_with_path(state)]
        return cls(types, update, names, starts, has_params)

    def owners(self) -> tuple[int, ...]:
        """The parameter that each leaf of the state is of; -1 for none."""
        owners = [self._by_name(name) for name in self.names]
        reached: dict[int, int] = {}
        for i in range(len(self.types.paths)):
            updates, state = self._from(i)
            for k in updates - {i}:
                self._check_apart(i, k)
            for k in state:
                self._check_apart(i, reached.setdefault(k, i))
                self._check_apart(i, owners[k] if owners[k] >= 0 else i)
        return tuple(
            self._layered(owner if owner >= 0 else reached.get(k, -1))
            for k, owner in enumerate(owners)
        )

    def _layered(self, owner: int) -> int:
        return owner if owner >= 0 and self.types.axes[owner] else -1

    def _by_name(self, name: _Path) -> int:
        """The parameter whose name is a part of this one."""
        for i, path in enumerate(self.types.paths):
            parts = (name[k : k + len(path)] for k in range(len(name)))
            if path and path in parts:
                return i
        return -1

    def _from(self, parameter: int) -> tuple[set[int], set[int]]:
        """The updates and leaves of the state that depend on a parameter."""
        count, kept = len(self.types.paths), len(self.names)
        given = {parameter}
        if self.has_params:
            given.add(count + kept + parameter)
        state = set(self.starts[parameter])
        while True:
            found = _reached(self.update, given | {count + k for k in state})
            after = state | {k - count for k in found if k >= count}
            if after == state:
                return {k for k in found if k < count}, state
            state = after

    def _check_apart(self, one: int, other: int) -> None:
        """Checks that two parameters do not mix, or are both in no stack."""
        if one == other or not (self.types.axes[one] or self.types.axes[other]):
            return
        names = ["/".join(self.types.paths[i]) for i in (one, other)]
        raise ValueError(
            f"{_WHERE}: the optimiser mixes parameters, {names[0]} with {names[1]}, "
            "and would mix those of one layer only. Put what does so outside: "
            "optax.chain(optax.clip_by_global_norm(1.0), "
            "hk_stack.per_layer(optax.lamb(1e-3), layer_axes))."
        )


def _reached(program: jex.ClosedJaxpr, given: set[int]) -> set[int]:
    """Which outputs depend on the inputs `given`, as `jax.vmap` finds out."""
    found: set[int] = set()

    @jax.custom_batching.custom_vmap
    def spied(*outputs: Any) -> Any:
        return outputs

    @spied.def_vmap
    def rule(size: int, are_mapped: Any, *outputs: Any) -> Any:
        del size
        found.update(i for i, flag in enumerate(are_mapped) if flag)
        return outputs, tuple(are_mapped)

    types = program.in_avals
    axes = [0 if i in given else None for i in range(len(types))]
    shapes = [
        jax.ShapeDtypeStruct((2, *t.shape) if i in given else t.shape, t.dtype)
        for i, t in enumerate(types)
    ]
    run = jax.vmap(lambda *values: spied(*_equations.run(program, *values)), axes)
    jax.eval_shape(run, *shapes)
    return found


def _traced_update(
    optimizer: "optax.GradientTransformation", given: Sequence[Tree]
) -> jex.ClosedJaxpr:
    """The program of an update of one layer's parameters."""
    try:
        closed, made = jax.make_jaxpr(optimizer.update, return_shape=True)(*given)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(
            f"{_WHERE}: the optimiser needs more than gradients and parameters "
            f"({error}), such as the loss of all. Put it outside: optax.chain("
            "hk_stack.per_layer(optax.lamb(1e-3), layer_axes), "
            "optax.contrib.reduce_on_plateau())."
        ) from error
    before, after = (jax.tree.structure(state) for state in (given[1], made[1]))
    if str(before) != str(after):
        raise ValueError(
            f"{_WHERE}: the optimiser's state has another structure after an update, "
            f"{after}, than before, {before}."
        )
    return closed


_DRAWS = frozenset("random_bits random_gamma rng_bit_generator threefry2x32".split())


def _check_no_draws(*programs: jex.ClosedJaxpr) -> None:
    for program in programs:
        for eqn in _equations.with_inner(program.eqns):
            if eqn.primitive.name in _DRAWS:
                raise ValueError(
                    f"{_WHERE}: the optimiser draws random numbers, which would be the "
                    "same in all layers. Put what does so outside: optax.chain("
                    "hk_stack.per_layer(optax.lamb(1e-3), layer_axes), "
                    "optax.add_noise(0.01, 0.55, seed))."
                )


def _check(optimizer: object, layer_axes: Tree) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{_WHERE}: expected an optax.GradientTransformation, not "
            f"{type(optimizer).__name__}. Write per_layer(optax.adafactor(1e-3), "
            "layer_axes)."
        )
    _by_path(layer_axes)


def _by_path(layer_axes: Tree) -> dict[_Path, int]:
    leaves = jax.tree.leaves_with_path(layer_axes)
    for path, depth in leaves:
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(
                f"{_WHERE}: layer_axes must be a tree of ints, found "
                f"{type(depth).__name__} at {_checks.path_name(path)}. Write "
                "layer_axes=hk_stack.layer_axes(model.apply, params, *args)."
            )
    return {_names(path): depth for path, depth in leaves}


def _depth(depths: Mapping[_Path, int], path: tuple[Any, ...], leaf: Any) -> int:
    """How many layer axes a parameter begins with."""
    depth = depths.get(_names(path))
    if depth is None or depth > jnp.ndim(leaf):
        found = f"is {depth}" if depth is not None else "is not there"
        raise ValueError(
            f"{_WHERE}: layer_axes of {_checks.path_name(path) or 'the parameters'}, "
            f"of shape {jnp.shape(leaf)}, {found}. Write layer_axes="
            "hk_stack.layer_axes(model.apply, params, *args) for these parameters."
        )
    return depth


def _names(path: tuple[Any, ...]) -> _Path:
    return tuple(_checks.path_name((key,)) for key in path)
