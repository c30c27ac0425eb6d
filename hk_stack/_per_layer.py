"""`per_layer`: an optimiser to which each layer of a stack is its own parameter."""

import functools
import inspect
import itertools
import operator
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import _checks, _equations, _reach
from hk_stack._traceback import hidden
from hk_stack._types import Tree

if TYPE_CHECKING:
    import optax


@hidden
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
      optimizer: Of optax. It must treat each parameter by itself. That is checked by
        what flows from one to another; and from one layer to another, if it also takes
        a list of layers in the place of a stack, as most do.
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

    _check_optimizer(optimizer)
    depths = _by_path(layer_axes, _WHERE)

    @functools.cache
    def layout(types: "_Types", has_params: bool) -> _Layout:
        return _Layout.of(optimizer, types, has_params)

    @hidden
    def init(params: Tree) -> Tree:
        return layout(_Types.of(params, depths), True).init(optimizer, params)

    @hidden
    def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        given = updates if params is None else params
        found = layout(_Types.of(given, depths), params is not None)
        return found.update(optimizer, updates, state, params)

    return optax.GradientTransformation(init, update)


@hidden
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

    where = "hk_stack.scale_by_layer"
    _checks.function(fn, where, _FACTORS)
    _check_takes_layer(fn, where)
    depths = _by_path(layer_axes, where)

    def scaled(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not _depth(depths, path, leaf, where):
            return leaf
        factors = _factors(fn, leaf.shape[0], where)
        return leaf * factors.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)

    @hidden
    def update(updates: Tree, params: Tree = None) -> Tree:
        del params
        return jax.tree.map_with_path(scaled, updates)

    return optax.stateless(update)


_FACTORS = "Write scale_by_layer(lambda i, L: 0.9 ** (L - 1 - i), layer_axes)."


def _check_takes_layer(fn: Callable[[int, int], float], where: str) -> None:
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # Builtins have none.
        return
    try:
        signature.bind(0, 1)
    except TypeError:
        raise TypeError(
            f"{where}: expected a function of the layer and L, but "
            f"{_checks.name_of(fn)!r} takes {signature}. {_FACTORS}"
        ) from None


def _factors(fn: Callable[[int, int], float], count: int, where: str) -> jax.Array:
    """`[L]`: what `fn` says of each layer."""
    found = [fn(i, count) for i in range(count)]
    for i, factor in enumerate(found):
        is_number = isinstance(factor, (int, float))
        if not is_number and getattr(factor, "shape", None) != ():
            raise TypeError(
                f"{where}: the factor of layer {i} must be a number, not "
                f"{_checks.shown(factor)}. {_FACTORS}"
            )
    return jnp.asarray(found)


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

    def two(self) -> "_Types":
        """The same with a list of two layers in the place of each stack."""
        numbers = [[i, i] if axes else i for i, axes in enumerate(self.axes)]
        tree = jax.tree.unflatten(self.structure, numbers)
        leaves, structure = jax.tree.flatten_with_path(tree)
        return _Types(
            structure,
            tuple(self.types[i] for _, i in leaves),
            tuple(_names(path) for path, _ in leaves),
            tuple(self.axes[i] for _, i in leaves),
        )


_Sizes = list[tuple[int, ...]]


class _Layout(NamedTuple):
    """Which layer axes an optimiser's state begins with.

    Attributes:
      structure: Of the state.
      own: The layer axes of each parameter: its sizes.
      owners: Of each leaf of the state; -1 if it has none.
    """

    structure: Any
    own: _Sizes
    owners: list[int]

    @property
    def kept(self) -> _Sizes:
        """The layer axes of each leaf of the state."""
        return [self.own[i] if i >= 0 else () for i in self.owners]

    @classmethod
    def of(
        cls, optimizer: "optax.GradientTransformation", types: _Types, has_params: bool
    ) -> "_Layout":
        flow = _Flow.of(optimizer, types, has_params)
        _check_no_draws(flow.init, flow.update)
        owners = flow.owners()
        try:
            of_two = _Flow.of(optimizer, types.two(), has_params)
        except Exception:  # Not all take one: a mask may know where parameters are.
            pass
        else:
            of_two.owners()
        return cls(flow.structure, list(types.axes), owners)

    def init(self, optimizer: "optax.GradientTransformation", params: Tree) -> Tree:
        """The state for all layers."""
        run = self._for_layers(optimizer.init, [self.own], [self.kept])
        leaves = jax.tree.leaves(params)
        if not any(map(_is_spread, leaves)):
            return run(params)
        # What vmap makes of no value is on one device; optax puts it where params are.
        made = jax.tree.leaves(jax.eval_shape(run, params))
        where: list[Any] = [None] * len(made)
        for k, owner in enumerate(self.owners):
            leaf = leaves[owner] if owner >= 0 else None
            if leaf is not None and _is_spread(leaf) and leaf.shape == made[k].shape:
                where[k] = leaf.sharding
        places = jax.tree.unflatten(self.structure, where)
        return jax.jit(run, out_shardings=places)(params)

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
        names = jax.tree.unflatten(self.structure, range(len(self.kept)))
        again = "Make it by optimizer.init(params)."
        _check_leaves("the state", state, names, again)
        found: Any = jax.tree.structure(state)
        if found != self.structure:
            raise ValueError(
                f"{_WHERE}: the state is of another structure than the optimiser's for "
                f"these parameters: expected {self.structure}, found {found}. {again}"
            )
        leaves = jax.tree.leaves_with_path(state)
        for (path, leaf), axes in zip(leaves, self.kept, strict=True):
            if jnp.shape(leaf)[: len(axes)] != axes:
                raise ValueError(
                    f"{_WHERE}: {_checks.path_name(path)} of the state has shape "
                    f"{jnp.shape(leaf)}; expected layer axes {axes} in front, as "
                    f"parameters have. {again}"
                )
        if params is not None:
            _check_updates(updates, params)


def _check_updates(updates: Tree, params: Tree) -> None:
    gradients = "Give the gradients of these parameters."
    _check_leaves("updates", updates, params, gradients)
    leaves = jax.tree.leaves_with_path(params)
    for update, (path, leaf) in zip(jax.tree.leaves(updates), leaves, strict=True):
        if jnp.shape(update) != jnp.shape(leaf):
            raise ValueError(
                f"{_WHERE}: {_checks.path_name(path)} of updates has shape "
                f"{jnp.shape(update)}; expected that of the parameter, "
                f"{jnp.shape(leaf)}. {gradients}"
            )


def _check_leaves(what: str, found: Tree, expected: Tree, instead: str) -> None:
    """Checks that two trees have leaves in the same places."""
    names, others = _checks.leaf_names(found), _checks.leaf_names(expected)
    for these, those, wrong in ((names, others, "only"), (others, names, "no")):
        if more := [name for name in these if name not in set(those)]:
            raise ValueError(
                f"{_WHERE}: expected {what} with the leaves of the parameters; found "
                f"{wrong} {', '.join(more[:3])}. {instead}"
            )


def _is_spread(leaf: Any) -> bool:
    """Whether an array that is there is on several devices."""
    is_there = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return is_there and len(leaf.sharding.device_set) > 1


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
      init: Its program: of parameters; it makes the state.
      update: Its program: of gradients, state and parameters; it makes updates, state.
      structure: Of the state.
      names: Where the state's leaves are.
      has_params: Whether `update` is given parameters.
    """

    types: _Types
    init: jex.ClosedJaxpr
    update: jex.ClosedJaxpr
    structure: Any
    names: list[_Path]
    has_params: bool

    @classmethod
    def of(
        cls, optimizer: "optax.GradientTransformation", types: _Types, has_params: bool
    ) -> "_Flow":
        one = types.one()
        init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(one)
        given = (one, state, one) if has_params else (one, state)
        update = _traced_update(optimizer, given)
        leaves, structure = jax.tree.flatten_with_path(state)
        names = [_names(path) for path, _ in leaves]
        return cls(types, init, update, structure, names, has_params)

    def owners(self) -> list[int]:
        """The parameter that each leaf of the state is of; -1 for none."""
        count = len(self.types.paths)
        own = [1 << i for i in range(count)]
        state = _reach.results(self.init, own)
        while True:
            given = [*own, *state, *(own if self.has_params else ())]
            made = _reach.results(self.update, given)
            after = [*map(operator.or_, state, made[count:])]
            if after == state:
                break
            state = after
        for found in (*map(operator.or_, own, made), *state):
            self._check_apart(_members(found))
        return self._named([next(_members(found), -1) for found in state])

    def _named(self, owners: list[int]) -> list[int]:
        """The same, and by its name the owner of what no parameter flows into."""
        count = len(self.types.paths)
        ones = [1 << k for k in range(len(owners))]
        nothing = [0] * count
        given = [*nothing, *ones, *(nothing if self.has_params else ())]
        made = _reach.results(self.update, given)
        found = list(owners)
        for k in (k for k, owner in enumerate(owners) if owner < 0):
            owner = self._by_name(self.names[k])
            readers = {i for i in range(len(made)) if made[i] >> k & 1} - {count + k}
            # A counter that is called like a parameter is read for all of them.
            if {i if i < count else owners[i - count] for i in readers} <= {owner}:
                found[k] = owner
        return found

    def _by_name(self, name: _Path) -> int:
        """The parameter whose name is the end of this one, the longest such; or -1."""
        paths = self.types.paths
        ends = [i for i, end in enumerate(paths) if end and name[-len(end) :] == end]
        return max(ends, key=lambda i: len(paths[i]), default=-1)

    def _check_apart(self, members: Iterable[int]) -> None:
        """Checks that parameters that meet are one, or all in no stack."""
        members = list(members)
        layered = [i for i in members if self.types.axes[i]]
        if len(members) < 2 or not layered:
            return
        one, other = members[0], layered[0] if layered[0] > members[0] else members[1]
        names = ["/".join(self.types.paths[i]) for i in (one, other)]
        raise ValueError(
            f"{_WHERE}: the optimiser mixes parameters, {names[0]} with {names[1]}, "
            "and would mix those of one layer only. Put what does so outside: "
            "optax.chain(optax.clip_by_global_norm(1.0), "
            "hk_stack.per_layer(optax.lamb(1e-3), layer_axes))."
        )


def _members(found: int) -> Iterator[int]:
    """The numbers of the bits of a set, in order."""
    return (i for i in range(found.bit_length()) if found >> i & 1)


def _traced_update(
    optimizer: "optax.GradientTransformation", given: Sequence[Tree]
) -> jex.ClosedJaxpr:
    """The program of an update of one layer's parameters."""
    try:
        closed, made = jax.make_jaxpr(optimizer.update, return_shape=True)(*given)
    except (TypeError, ValueError) as error:
        # Optax's own words, or Python's of an argument that has no default.
        if len(given) == 2 and re.search("passing `params`|: 'params'$", str(error)):
            raise ValueError(
                f"{_WHERE}: the optimiser needs parameters. Write "
                "optimizer.update(gradients, state, params)."
            ) from error
        lacks_one = re.search("required.*argument|argument.*required", str(error))
        if isinstance(error, ValueError) or not lacks_one:
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


def _check_optimizer(optimizer: object) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{_WHERE}: expected an optax.GradientTransformation, not "
            f"{type(optimizer).__name__}. Write per_layer(optax.adafactor(1e-3), "
            "layer_axes)."
        )


def _by_path(layer_axes: Tree, where: str) -> dict[_Path, int]:
    depths = _checks.layer_axes(layer_axes, where)
    return {_names(path): depth for path, depth in depths}


def _depth(
    depths: Mapping[_Path, int], path: tuple[Any, ...], leaf: Any, where: str = _WHERE
) -> int:
    """How many layer axes a parameter begins with."""
    depth = depths.get(_names(path))
    if depth is None or depth > jnp.ndim(leaf):
        found = f"is {depth}" if depth is not None else "is not there"
        raise ValueError(
            f"{where}: layer_axes of {_checks.path_name(path) or 'the parameters'}, "
            f"of shape {jnp.shape(leaf)}, {found}. Write layer_axes="
            "hk_stack.layer_axes(model.apply, params, *args) for these parameters."
        )
    return depth


def _names(path: tuple[Any, ...]) -> _Path:
    return tuple(_checks.path_name((key,)) for key in path)
