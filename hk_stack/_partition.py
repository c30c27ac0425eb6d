"""`partition`: a function cut into setup and call, to set up once and call often."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hk_stack import _checks, _cut, _parts
from hk_stack._report import Report, hoisted_names, report

Derived = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """Setup and call as functions of pytrees.

    Attributes:
      parts: The cut function, whose inputs are constants, known leaves, then the rest.
      hoisted: Names of the values that setup computes.
      num_constants: How many constants there are.
      leaves: Names of the known leaves.
      names: Names of the arguments.
      avals: The types of the arguments.
      result: The structure of what the function returns.
      where: Names the function in errors.
    """

    parts: _parts.Parts
    hoisted: list[str]
    num_constants: int
    leaves: list[str]
    names: list[str]
    avals: tuple[Any, ...]
    result: Any
    where: str

    def setup(self, constants: list[Any], known: Any) -> Derived:
        what = f"{self.where}, setup: argument `{self.names[0]}`"
        _same_leaves(known, self.avals[0], what)
        inputs = [*constants, *jax.tree.leaves(known)]
        run = jex.jaxpr_as_fun(self.parts.shared)
        made = run(*(inputs[i] for i in self.parts.shared_inputs))
        kept = {self._name(i): inputs[i] for i in self.kept()}
        return {"hoisted": dict(zip(self.hoisted, made, strict=True)), "kept": kept}

    def call(self, constants: list[Any], derived: Derived, *rest: Any) -> Any:
        self.check(derived)
        _same_count(rest, self.names[1:], self.where)
        for name, tree, aval in zip(self.names[1:], rest, self.avals[1:], strict=True):
            _same_leaves(tree, aval, f"{self.where}, call: argument `{name}`")
        inputs = dict(enumerate(constants))
        inputs |= {i: derived["kept"][self._name(i)] for i in self.kept()}
        start = self.num_constants + len(self.leaves)
        inputs |= dict(enumerate(jax.tree.leaves(rest), start))
        made = [derived["hoisted"][name] for name in self.hoisted]
        run = jex.jaxpr_as_fun(self.parts.call)
        outputs = run(*made, *(inputs[i] for i in self.parts.call_inputs))
        return jax.tree.unflatten(self.result, outputs)

    def check(self, derived: Any) -> None:
        """Checks that derived values are of the right types."""
        made = zip(self.hoisted, self.parts.shared.out_avals, strict=True)
        known = jax.tree.leaves(self.avals[0])
        kept = {self._name(i): known[i - self.num_constants] for i in self.kept()}
        expected = {"hoisted": dict(made), "kept": kept}
        _derived_values(derived, expected, self.where)

    def kept(self) -> list[int]:
        """The known inputs that the call reads."""
        known = range(self.num_constants, self.num_constants + len(self.leaves))
        return [i for i in self.parts.call_inputs if i in known]

    def _name(self, i: int) -> str:
        return self.leaves[i - self.num_constants]


class Partition:
    """A function in two parts; made by `partition`.

    Its `str` is a report of what `setup` computes, and of what stays in `call` and why;
    `rich.print` and notebooks show the same as a table.

    Attributes:
      report: What `str` shows, as data.
    """

    def __init__(self, parts: _Parts, constants: list[Any], report: Report):
        self.report = report
        self._parts = parts
        # Compiled functions take constants as arguments, or they would hold copies.
        self._setup = functools.partial(jax.jit(parts.setup), constants)
        self._call = functools.partial(jax.jit(parts.call), constants)

    def setup(self, known: Any, /) -> Derived:
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
        return self._setup(known)

    def call(self, derived: Derived, /, *rest: Any) -> Any:
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
        return self._call(derived, *rest)

    def check(self, known: Any, derived: Derived, /) -> None:
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
        self._parts.check(derived)
        _not_stale(self.setup(known), derived, self.report.where)

    def __str__(self) -> str:
        return str(self.report)

    __repr__ = __str__

    def __rich__(self) -> Any:
        return self.report.__rich__()

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def partition(fn: Callable[..., Any], *example_args: Any) -> Partition:
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
    ...     w = hk.get_parameter("w", [8, 8], init=hk.initializers.RandomNormal(0.1))
    ...     return jnp.tanh(x @ jax.scipy.linalg.expm(w))
    >>> model = hk.transform(lambda x: hk_stack.layer_stack(6, name="layers")(layer)(x))
    >>> x = jnp.ones([2, 8])
    >>> params = model.init(jax.random.key(0), x)
    >>> split = hk_stack.partition(model.apply, params, None, x)
    >>> derived = split.setup(params)  # six matrix exponentials
    >>> jax.tree.map(jnp.shape, derived)
    {'hoisted': {'0_dot_general': (6, 8, 8)}, 'kept': {}}
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

    Returns:
      The two parts.

    Raises:
      TypeError: If `fn` is not callable, or an argument is no array.
      ValueError: If a value marked with `hoist` depends on another argument.
    """
    where = _partitioned(fn, example_args)
    names = _checks.argument_names(fn, len(example_args))
    with _checks.while_tracing(where):
        trace = jax.make_jaxpr(fn, return_shape=True)
        closed, result = trace(*example_args)
    known = _checks.leaf_names(example_args[0])
    leaves = _unique([name or names[0] for name in known])  # It may be one array.
    inputs = [
        *(
            _parts.Input("a constant", known=True, fixed=True, constant=True)
            for _ in closed.consts
        ),
        *(_parts.Input(leaf, True, True, False) for leaf in leaves),
        *(
            _parts.Input(f"argument `{name}`", False, False, False)
            for name, tree in zip(names[1:], example_args[1:], strict=True)
            for _ in jax.tree.leaves(tree)
        ),
    ]
    separate = _cut.cut(closed, inputs, "auto", where, reuse=True)
    avals = jax.tree.unflatten(jax.tree.structure(example_args), closed.in_avals)
    parts = _Parts(
        separate,
        hoisted_names(separate.shared.jaxpr),
        len(closed.consts),
        leaves,
        names,
        avals,
        jax.tree.structure(result),
        where,
    )
    kept = [closed.in_avals[i - len(closed.consts)] for i in parts.kept()]
    described = report(separate, [i.known for i in inputs], kept, where)
    return Partition(parts, closed.consts, described)


def _unique(names: list[str]) -> list[str]:
    """`names`, with a number after those that were there before."""
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[i] = f"{name}#{seen[name]}"
    return names


def _partitioned(fn: Any, example_args: tuple[Any, ...]) -> str:
    """Checks what `partition` is given; returns how errors name it."""
    if not callable(fn):
        hint = " Give its apply." if hasattr(fn, "apply") else ""
        raise TypeError(
            f"partition: expected a function, not {type(fn).__name__}.{hint}"
        )
    where = f"partition of {_checks.name_of(fn)!r}"
    if not example_args:
        raise TypeError(
            f"{where}: no example arguments. Write partition(fn, params, *rest), with "
            "arrays or jax.ShapeDtypeStructs of what fn takes."
        )
    names = _checks.argument_names(fn, len(example_args))
    for name, tree in zip(names, example_args, strict=True):
        _checks.arrays(tree, f"{where}: example argument `{name}`")
    return where


def _same_leaves(given: Any, example: Any, what: str) -> None:
    """Checks that `given` has the structure and types of `example`, a tree of avals."""
    old: Any = jax.tree.structure(example)
    new: Any = jax.tree.structure(given)
    if old != new:
        lost = sorted(
            set(_checks.leaf_names(example)) - set(_checks.leaf_names(given)) - {""}
        )
        more = sorted(
            set(_checks.leaf_names(given)) - set(_checks.leaf_names(example)) - {""}
        )
        raise TypeError(
            f"{what} is of another structure than the example it was partitioned for:"
            f"{_some(' lacks', lost)}{_some(' has also', more)} expected {old}, found "
            f"{new}. Partition again for other arguments."
        )
    for (path, leaf), aval in zip(
        jax.tree.leaves_with_path(given), jax.tree.leaves(example), strict=True
    ):
        found = jax.typeof(leaf)
        if (found.shape, found.dtype) != (aval.shape, aval.dtype):
            at = f" (at {_checks.path_name(path)})" if path else ""
            raise ValueError(
                f"{what}{at} is {found.str_short()}; it was partitioned for "
                f"{aval.str_short()}. Partition again for other shapes or dtypes."
            )


def _some(what: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{what} {listed};" if names else ""


def _derived_values(derived: Any, expected: Any, where: str) -> None:
    """Checks that `derived` is what the setup of the same partition returns."""
    try:
        _same_leaves(derived, expected, f"{where}, call: `derived`")
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error} The first argument of call is what setup returns: "
            "split.call(split.setup(params), ...); values that were made before fn or "
            "its shapes changed do not fit."
        ) from None


def _not_stale(expected: Any, derived: Any, where: str) -> None:
    """Checks that derived values are those of the parameters at hand."""
    found = []
    for (path, new), old in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(derived), strict=True
    ):
        new, old = map(_numbers, (new, old))
        with np.errstate(invalid="ignore"):  # An infinity equals itself.
            apart = np.where((new == old) | (new != new) & (old != old), 0, new - old)
        most = np.max(np.abs(apart), initial=0)
        largest = np.max(np.abs(new), initial=0, where=np.isfinite(new))
        if not most <= _ROUNDING * largest:
            found.append(f"{_checks.path_name(path)} by up to {most:.3g}")
    if found:
        raise ValueError(
            f"{where}: derived values are not those of these parameters; they differ "
            f"in {', '.join(found[:4])}. Run setup again whenever the parameters "
            "change: derived = split.setup(params)."
        )


# Of values of one setup, compiled alone or as part of a larger program.
_ROUNDING = 1e-5


def _numbers(leaf: Any) -> np.ndarray:
    """`leaf` as numbers that can be subtracted."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    kind = np.complex128 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else float
    return np.asarray(leaf).astype(kind)


def _same_count(given: Sequence[Any], names: Sequence[str], where: str) -> None:
    """Checks the number of the arguments after `derived`."""
    if len(given) != len(names):
        raise TypeError(
            f"{where}, call: takes derived, {', '.join(names)}; was given "
            f"{len(given)} arguments after `derived`."
        )
