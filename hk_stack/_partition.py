"""`partition`: a function cut into setup and call, to set up once and call often."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hk_stack import _checks, _cut, _equations, _function, _options, _spread
from hk_stack._parts import Parts
from hk_stack._report import Report, hoisted_names, report
from hk_stack._table import Shown, Table
from hk_stack._traceback import hidden
from hk_stack._types import Derived, Tree


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """Setup and call as functions of pytrees.

    Attributes:
      parts: The cut function, whose inputs are constants, known leaves, then the rest.
      kept: Where the known inputs are that the call reads, sorted by name.
      derived: The types of the derived values.
      names: Names of the arguments.
      arguments: Their types.
      result: The structure of what the function returns.
      where: Names the function in errors.
      mesh: That setup is spread over, if it is.
    """

    parts: Parts
    kept: list[int]
    derived: Derived
    names: list[str]
    arguments: tuple[Tree, ...]
    result: Any
    where: str
    mesh: Any

    def setup(self, constants: list[jax.Array], known: Tree) -> Derived:
        around = jax.sharding.get_abstract_mesh()
        if self.mesh not in (None, around):
            raise ValueError(
                f"{self.where}, setup: it is spread over the mesh {self.mesh}, and the "
                f"one around is {around}. Write with jax.set_mesh(mesh): around setup, "
                "too, or partition again."
            )
        what = f"{self.where}, setup: argument `{self.names[0]}`"
        _same_leaves(known, self.arguments[0], what)
        inputs = [*constants, *jax.tree.leaves(known)]
        read = (inputs[i] for i in self.parts.shared_inputs)
        made = _equations.run(self.parts.shared, *read)
        leaves = [*made, *(inputs[i] for i in self.kept)]
        derived: Derived = jax.tree.unflatten(jax.tree.structure(self.derived), leaves)
        return derived

    def call(self, constants: list[jax.Array], derived: Derived, *rest: Tree) -> Tree:
        self.check(derived, "call")
        names = self.names[1:]
        if len(rest) != len(names):
            takes = ", ".join(["derived", *names])
            raise TypeError(
                f"{self.where}, call: takes {takes}; was given {len(rest)} arguments "
                f"after `derived`. Write split.call({takes}), with None for what was "
                "None in the example."
            )
        for name, tree, types in zip(names, rest, self.arguments[1:], strict=True):
            _same_leaves(tree, types, f"{self.where}, call: argument `{name}`")
        start = len(constants) + len(jax.tree.leaves(self.arguments[0]))
        made, kept = map(jax.tree.leaves, (derived["hoisted"], derived["kept"]))
        inputs = dict(enumerate(constants))
        inputs |= zip(self.kept, kept, strict=True)
        inputs |= enumerate(jax.tree.leaves(rest), start)
        read = (inputs[i] for i in self.parts.call_inputs)
        outputs = _equations.run(self.parts.call, *made, *read)
        return jax.tree.unflatten(self.result, outputs)

    def check(self, derived: Derived, method: str) -> None:
        """Checks that derived values are of the right types."""
        try:
            _same_leaves(derived, self.derived, f"{self.where}, {method}: `derived`")
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{error} Values that were made before fn or its shapes changed do not "
                f"fit. `derived` is what setup returns: {_USES[method]}."
            ) from None


class Partition(Shown):
    """A function in two parts; made by `partition`.

    Its `str` is a report of what `setup` computes, and of what stays in `call` and why;
    `rich.print` and notebooks show the same as a table.
    """

    def __init__(
        self,
        program: _Program,
        constants: list[jax.Array],
        describe: Callable[[], Report],
    ) -> None:
        self._program = program
        self._describe = describe
        # Compiled functions take constants as arguments, or they would hold copies.
        self._setup = functools.partial(jax.jit(program.setup), constants)
        self._call = functools.partial(jax.jit(program.call), constants)

    @functools.cached_property
    def report(self) -> Report:
        """What `str` shows, as data."""
        return self._describe()

    @hidden
    def setup(self, known: Tree, /) -> Derived:
        """Computes the derived values.

        Args:
          known: The first argument of the function.

        Returns:
          A dict of two dicts of arrays: `"hoisted"` holds what is computed from
          `known`; `"kept"` the leaves of `known` that the call reads as they are, which
          are not copied: who donates the derived values donates them.

        Raises:
          TypeError: If `known` has another structure than the example.
          ValueError: If a leaf has another shape or dtype.
        """
        derived: Derived = self._run(self._setup, "setup", known)
        return derived

    @hidden
    def call(self, derived: Derived, /, *rest: Tree) -> Any:
        """Computes the result from derived values and the other arguments.

        Args:
          derived: What `setup` returned. Values of other parameters, such as those
            before an update, have the same shapes and are taken as they are: see
            `check`.
          *rest: The arguments of the function after the first.

        Raises:
          TypeError: If an argument has another structure than the example's.
          ValueError: If a leaf has another shape or dtype.
        """
        return self._run(self._call, "call", derived, *rest)

    @hidden
    def check(self, known: Tree, derived: Derived, /) -> None:
        """Checks that `derived` is the setup of `known`, for tests and debugging.

        It runs setup again and compares, up to rounding: outside of `jit` only, and at
        the cost that reuse saves.

        Args:
          known: The first argument of the function.
          derived: What `call` is to be given.

        Raises:
          TypeError: If either has another structure than the example.
          ValueError: If a value is not what `setup(known)` returns; it names which.
        """
        self._program.check(derived, "check")
        if _is_traced((known, derived)):
            raise TypeError(
                f"{self._program.where}, check: inside of jit, grad or vmap there are "
                "no values to compare. Call it outside."
            )
        _not_stale(self.setup(known), derived, self._program.where)

    def _run(self, compiled: Callable[..., Any], method: str, *args: Tree) -> Any:
        try:
            return compiled(*args)
        except TypeError as error:
            failed = error
        # What is no array JAX refuses first, with the whole program in its error.
        names = self._program.names
        first = names[0] if method == "setup" else "derived"
        for name, tree in zip([first, *names[1:]], args, strict=False):
            _checks.values(tree, f"{self._program.where}, {method}: argument `{name}`")
        raise failed

    def _parts(self) -> Iterable[str | Table]:
        return self.report._parts()

    __repr__ = Shown.__str__


@hidden
def partition(
    fn: Callable[..., Tree], *example_args: Tree, setup_sharding: str | None = None
) -> Partition:
    """Cuts `fn` into what depends on its first argument alone, and the rest.

    For all arguments of the shapes and dtypes of `example_args`,

    ```
    split = partition(fn, *example_args)
    split.call(split.setup(known), *rest) == fn(known, *rest)
    ```

    up to the order of floating-point operations. Derived values are of the parameters
    that `setup` was given: after an update, run it again; `call` takes old ones as they
    are (`Partition.check` finds them, in tests). `setup` computes all that is worth
    keeping, and nothing that would be larger than what it is made of, unless it is
    expensive. `call` needs the derived values and `rest` only. Both are pure, compiled
    on their own, and may be used inside `jit`, `grad`, `vmap`, `scan` and another
    `partition`; the gradient of `fn` is that of `call` pulled back through `setup`.

    Loops, conditionals, `jit` and `jax.checkpoint` are looked into: a decoding loop
    around a stack keeps nothing of the stack's setup, and the setup of all layers
    leaves a scan over layers (of Haiku, Flax or plain JAX). What a loop computes from
    a counter that it carries along stays in it.

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     w = hk.get_parameter("w", [32, 32], init=hk.initializers.RandomNormal(0.1))
    ...     return jnp.tanh(x @ jax.scipy.linalg.expm(w))
    >>> model = hk.transform(lambda x: hk_stack.layer_stack(6, name="layers")(layer)(x))
    >>> x = jnp.ones([2, 32])
    >>> params = model.init(jax.random.key(0), x)
    >>> split = hk_stack.partition(model.apply, params, None, x)
    >>> derived = split.setup(params)  # six matrix exponentials
    >>> jax.tree.map(jnp.shape, derived)
    {'hoisted': {'0_expm': (6, 32, 32)}, 'kept': {}}
    >>> y = split.call(derived, None, x)  # none
    >>> bool(jnp.allclose(y, model.apply(params, None, x), atol=1e-6))
    True

    Args:
      fn: A pure function whose first argument is known before the others: the `apply`
        of `hk.transform`, `hk.transform_with_state` (state is not known) or one of
        `hk.multi_transform`, of Flax, or any JAX function.
      *example_args: What `fn` takes: pytrees of arrays, `jax.ShapeDtypeStruct`s, or
        Python numbers, all of which are traced. Bind static arguments before, as in
        `functools.partial(model.apply, is_training=False)`.
      setup_sharding: The name of an axis of the mesh around, over whose devices the
        setup of scans over layers, and of stacks, is spread: see `layer_stack`. `setup`
        then needs the same mesh around.

    Returns:
      The two parts.

    Raises:
      TypeError: If `fn` is not callable, an argument is no array, or `setup_sharding`
        no name.
      ValueError: If a value marked with `hoist` depends on another argument, or there
        is no mesh with the axis `setup_sharding`.
    """
    where, names = _named(fn, example_args)
    axis = _options.axis_of_mesh(setup_sharding, "setup_sharding", where)
    devices = _spread.devices(axis, where)
    with _spread.over(axis):
        closed, inputs, structure = _function.trace(fn, example_args, where)
    first = len(closed.consts)
    inputs[:first] = [i._replace(known=True) for i in inputs[:first]]
    parts = _cut.cut(closed, inputs, "auto", where, reuse=True, devices=devices)
    known = [i for i in parts.call_inputs if inputs[i].known and i >= first]
    kept = sorted(known, key=lambda i: inputs[i].label)
    made = hoisted_names(parts.shared.jaxpr)
    derived = {
        "hoisted": dict(zip(made, parts.shared.out_avals, strict=True)),
        "kept": {inputs[i].label: closed.in_avals[i - first] for i in kept},
    }
    arguments = jax.tree.unflatten(jax.tree.structure(example_args), closed.in_avals)
    mesh = jax.sharding.get_abstract_mesh() if devices else None
    program = _Program(parts, kept, derived, names, arguments, structure, where, mesh)
    leaves = list(derived["kept"].values())
    describe = functools.partial(report, parts, inputs, leaves, where)
    return Partition(program, closed.consts, describe)


def _named(
    fn: Callable[..., Any], example_args: tuple[Tree, ...]
) -> tuple[str, list[str]]:
    """Checks what `partition` is given; returns its name and those of arguments."""
    _checks.function(fn, "partition")
    where = f"partition of {_checks.name_of(fn)!r}"
    if not example_args:
        raise TypeError(
            f"{where}: no example arguments. Write partition(fn, params, *rest), with "
            "arrays or jax.ShapeDtypeStructs of what fn takes."
        )
    return where, _checks.arguments(fn, example_args, f"{where}: example argument")


_USES = {
    "call": "split.call(split.setup(params), ...)",
    "check": "split.check(params, split.setup(params))",
}


def _is_traced(tree: Tree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _same_leaves(given: Tree, example: Tree, what: str) -> None:
    """Checks that `given` has the structure and types of `example`, a tree of avals."""
    old: Any = jax.tree.structure(example)
    new: Any = jax.tree.structure(given)
    if old != new:
        expected, found = (
            {*_checks.leaf_names(tree)} - {""} for tree in (example, given)
        )
        raise TypeError(
            f"{what} is of another structure than the example it was partitioned for:"
            f"{_some(' lacks', expected - found)}"
            f"{_some(' has also', found - expected)} expected {old}, found "
            f"{new}. Partition again for other arguments."
        )
    leaves = _checks.leaves_at(given)
    for (at, leaf), aval in zip(leaves, jax.tree.leaves(example), strict=True):
        kind = jax.typeof(leaf)
        if (kind.shape, kind.dtype) != (aval.shape, aval.dtype):
            raise ValueError(
                f"{what}{at} is {kind.str_short()}; it was partitioned for "
                f"{aval.str_short()}. Partition again for other shapes or dtypes."
            )


def _some(what: str, names: set[str]) -> str:
    first = sorted(names)[:4]
    listed = ", ".join(first) + (", ..." if len(names) > 4 else "")
    return f"{what} {listed};" if names else ""


# Of values of one setup, compiled alone or as part of a larger program.
_ROUNDING = 1e-5


def _not_stale(expected: Derived, derived: Derived, where: str) -> None:
    """Checks that derived values are those of the parameters at hand."""
    found = []
    pairs = zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(derived), strict=True
    )
    for (path, new), old in pairs:
        new, old = map(_numbers, (new, old))
        largest = np.max(np.abs(new), initial=0, where=np.isfinite(new))
        tolerance = _ROUNDING * largest
        apart = ~np.isclose(new, old, rtol=0, atol=tolerance, equal_nan=True)
        if apart.any():
            most = np.max(np.abs(new[apart] - old[apart]))
            found.append(f"{_checks.path_name(path)} by up to {most:.3g}")
    if found:
        raise ValueError(
            f"{where}: derived values are not those of these parameters; they differ "
            f"in {', '.join(found[:4])}. Run setup again whenever the parameters "
            "change: derived = split.setup(params)."
        )


def _numbers(leaf: jax.Array) -> np.ndarray:
    """`leaf` as numbers that can be subtracted."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    kind = np.complex128 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else float
    return np.asarray(leaf).astype(kind)
