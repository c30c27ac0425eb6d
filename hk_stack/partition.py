"""`partition`: a function cut into setup and call, to set up once and call often."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from hk_stack import checks, cut
from hk_stack.report import Report, origin, report

Derived = dict[str, dict[str, jax.Array]]


class Partition(NamedTuple):
    """A function in two parts; made by `partition`.

    Its `str` is a report of what `setup` computes, and of what stays in `call` and why;
    `rich.print` and notebooks show the same as a table.

    Attributes:
      setup: `known -> derived`. The derived values are a dict of two dicts of arrays:
        `"hoisted"` holds what is computed from `known`, `"kept"` the leaves of `known`
        that the call reads as they are.
      call: `(derived, *rest) -> result`.
      report: What `str` shows, as data.
    """

    setup: Callable[[Any], Derived]
    call: Callable[..., Any]
    report: Report

    def __str__(self) -> str:
        return str(self.report)

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

    up to the order of floating-point operations. `setup` computes all that is worth
    keeping, and nothing that would be larger than what it is made of, unless it is
    expensive. `call` needs the derived values and `rest` only. Both are pure, compiled
    on their own, and may be used inside `jit`, `grad`, `vmap`, `scan` and another
    `partition`; the gradient of `fn` is that of `call` pulled back through `setup`.

    Loops, conditionals, `jit` and `jax.checkpoint` are looked into: a decoding loop
    around a stack keeps nothing of the stack's setup, and the setup of all layers
    leaves a scan over layers (of Haiku, Flax or plain JAX).

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
      TypeError: If `fn` is not callable, or an argument is no array; by the parts, if
        they are given a pytree of another structure.
      ValueError: If a value marked with `hoist` depends on another argument; by the
        parts, if a leaf has another shape or dtype than in `example_args`.
    """
    where = checks.partitioned(fn, example_args)
    known, *rest = example_args
    name, *names = checks.argument_names(fn, len(example_args))
    with checks.static_arguments(where):
        trace = jax.make_jaxpr(fn, return_shape=True)
        closed, result = trace(known, *rest)
    leaves = checks.leaf_names(known)
    inputs = [
        *(cut.Input("a constant", True, True, False) for _ in closed.consts),
        *(cut.Input(leaf, True, True, False) for leaf in leaves),
        *(
            cut.Input(f"argument `{name}`", False, False, False)
            for name, tree in zip(names, rest, strict=True)
            for _ in jax.tree.leaves(tree)
        ),
    ]
    parts = cut.cut(closed, inputs, "auto", where, reuse=True)
    pure = _Parts(parts, len(closed.consts), leaves, jax.tree.structure(result))
    setup = functools.partial(jax.jit(pure.setup), closed.consts)
    call = functools.partial(jax.jit(pure.call), closed.consts)
    expected = jax.eval_shape(setup, known)

    def checked_setup(given: Any) -> Derived:
        checks.same_leaves(given, known, f"{where}, setup: argument `{name}`")
        return setup(given)

    def checked_call(derived: Derived, *others: Any) -> Any:
        checks.derived_values(derived, expected, where)
        checks.same_count(others, names, where)
        for argument, given, example in zip(names, others, rest, strict=True):
            checks.same_leaves(given, example, f"{where}, call: argument `{argument}`")
        return call(derived, *others)

    flags = [i.known for i in inputs]
    kept = list(expected["kept"].values())
    return Partition(checked_setup, checked_call, report(parts, flags, kept, where))


class _Parts(NamedTuple):
    """Setup and call as functions of pytrees.

    Attributes:
      parts: The cut function, whose inputs are constants, known leaves, then the rest.
      num_constants: How many constants there are.
      leaves: Names of the known leaves.
      result: The structure of what the function returns.
    """

    parts: cut.Cut
    num_constants: int
    leaves: list[str]
    result: Any

    def setup(self, constants: list[Any], known: Any) -> Derived:
        inputs = [*constants, *jax.tree.leaves(known)]
        run = jex.jaxpr_as_fun(self.parts.shared)
        made = run(*(inputs[i] for i in self.parts.shared_inputs))
        kept = {self._name(i): jnp.asarray(inputs[i]) for i in self._kept()}
        return {"hoisted": dict(zip(self._hoisted(), made, strict=True)), "kept": kept}

    def call(self, constants: list[Any], derived: Derived, *rest: Any) -> Any:
        kept = {i: derived["kept"][self._name(i)] for i in self._kept()}
        start = self.num_constants + len(self.leaves)
        inputs = dict(enumerate(constants)) | kept
        inputs |= dict(enumerate(jax.tree.leaves(rest), start))
        made = [derived["hoisted"][name] for name in self._hoisted()]
        run = jex.jaxpr_as_fun(self.parts.call)
        outputs = run(*made, *(inputs[i] for i in self.parts.call_inputs))
        return jax.tree.unflatten(self.result, outputs)

    def _hoisted(self) -> list[str]:
        """Names of the values that setup computes, unique by their numbers."""
        jaxpr = self.parts.shared.jaxpr
        made = (origin(jaxpr, v)[1] for v in jaxpr.outvars)
        digits = len(str(len(jaxpr.outvars)))  # In order, also when sorted as text.
        return [f"{i:0{digits}}_{primitive}" for i, primitive in enumerate(made)]

    def _kept(self) -> list[int]:
        """The known inputs that the call reads."""
        known = range(self.num_constants, self.num_constants + len(self.leaves))
        return [i for i in self.parts.call_inputs if i in known]

    def _name(self, i: int) -> str:
        return self.leaves[i - self.num_constants]
