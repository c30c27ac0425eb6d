"""Whether a port computes the same: outputs, gradients, and where it first differs.

Both models run on the same inputs. Where their results differ, what goes into and comes
out of each module of either is compared, in the order in which the Flax model runs: the
first that differs is where to look. Modules of the two are paired as their leaves are.
"""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from hk_stack import _checks, _taps
from hk_stack._table import Shown, Table
from hk_stack.port import _move, _names
from hk_stack.port._layers import Reading, Side
from hk_stack.port._plan import Plan
from hk_stack.port._regroup import Tie

Module = tuple[_names.Module, tuple[int, ...]]  # Its name, and the layer in scans.
Apply = Callable[..., Any]


# How far outputs and gradients may be apart, as parts of the largest number.
_TOLERANCES = {"double": (1e-7, 1e-6), "single": (1e-5, 1e-4)}


class Compared(NamedTuple):
    """Two arrays that should be the same.

    Attributes:
      name: What they are.
      shapes: Of both.
      error: The largest difference, as a part of the largest number; infinite for
        other shapes or values that are not finite.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    error: float


@dataclasses.dataclass(frozen=True)
class Report(Shown):
    """What `verify` found.

    Attributes:
      ok: Whether outputs and gradients agree.
      precision: In which precision: "double", or "single" if a model only has that.
      outputs: Each output.
      gradients: Those by each module's parameters, by Haiku's names; none where
        outputs differ.
      module: The module in Flax that is first to differ, "" for what is outside of all
        modules; None if none does, or nothing is known of modules.
      where: What of it differs, in words.
      first: The values that differ.
      causes: What may be the reason.
    """

    ok: bool
    precision: str
    outputs: tuple[Compared, ...]
    gradients: tuple[Compared, ...] = ()
    module: str | None = None
    where: str = ""
    first: Compared | None = None
    causes: tuple[str, ...] = ()

    def _parts(self) -> Iterator[str | Table]:
        what = "agree" if self.ok else "differ"
        yield f"The two models {what}, in {self.precision} precision."
        if self.where:
            yield self.where
        yield from (f"- {cause}" for cause in self.causes)
        several = [*self.outputs, *sorted(self.gradients, key=lambda row: -row.error)]
        rows = [
            [name, *(str(list(shape)) for shape in shapes), f"{error:.0e}"]
            for name, shapes, error in several[:_MOST]
        ]
        yield Table(["value", "in Flax", "in Haiku", "difference"], rows)
        if len(several) > _MOST:
            yield f"  and {len(several) - _MOST} more, which differ less"


_MOST = 16


def verified(
    flax_apply: Apply,
    haiku_apply: Apply,
    variables: Any,
    found: Plan,
    ported: tuple[Any, Any],
    inputs: Sequence[Any],
) -> Report:
    """Compares two models; in double precision, if both have it.

    Args:
      flax_apply: As in `hk_stack.port.verify`.
      haiku_apply: As there.
      variables: Of Flax.
      found: The plan of the port.
      ported: Parameters and state.
      inputs: Of both.

    Returns:
      What differs.
    """
    values = variables, ported, tuple(inputs)
    models = _Models(flax_apply, haiku_apply, found, values)
    with (
        # A model mixes precisions.
        contextlib.suppress(TypeError, ValueError, jax.errors.JAXTypeError),
        jax.enable_x64(True),
    ):
        return models._replace(values=_as_double(values)).compared("double")
    return models.compared("single")


_HAIKU = "haiku_apply(params, state, key, *inputs)"
_WITH_STATE = "; give the apply of hk.transform_with_state(model), and all its inputs"


@contextlib.contextmanager
def _calling(call: str, more: str = "") -> Iterator[None]:
    """Says which model failed, and how it is called."""
    try:
        yield
    except Exception as error:
        error.add_note(f"port.verify: this was in {call}{more}.")
        raise


def _fits(f: Apply, args: Sequence[Any]) -> bool:
    """Whether a function takes that many arguments, as far as it says."""
    try:
        signature = inspect.signature(f)
    except ValueError:
        return True
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return True


class _Models(NamedTuple):
    """Both models, and what they are run on: variables, what is ported, inputs."""

    flax: Apply
    haiku: Apply
    plan: Plan
    values: tuple[Any, tuple[Any, Any], tuple[Any, ...]]

    def run_flax(self, variables: Any) -> Any:
        with _calling("flax_apply(variables, *inputs)"):
            return self.flax(variables, *self.values[2])

    def run_haiku(self, params: Any, seed: Any = 0) -> Any:
        _, (_, state), inputs = self.values
        args = params, state, jax.random.key(seed), *inputs
        with _calling(_HAIKU, "" if _fits(self.haiku, args) else _WITH_STATE):
            found = self.haiku(*args)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(
                f"port.verify: {_HAIKU} returns no pair of outputs and state; give the "
                "apply of hk.transform_with_state(model)."
            )
        return found[0]

    def compared(self, precision: str) -> Report:
        of_outputs, of_gradients = _TOLERANCES[precision]
        variables, (params, _), _ = self.values
        right, of_flax = _heard_flax(self.run_flax, variables)
        # The path of a tap is that of the module that runs.
        hear = hk.intercept_methods(_hearing(lambda module: ""))
        y, of_haiku = _with_taps(hear, self.run_haiku, params)
        outputs = _outputs(right, y)
        if all(one.error <= of_outputs for one in outputs):
            gradients = self.gradients()
            report = Report(True, precision, outputs, gradients)
            if all(one.error <= of_gradients for one in gradients):
                return report
            worst = max(gradients, key=lambda one: one.error)
            where = f"Outputs agree, but not the {worst.name}: by {worst.error:.0e}."
            return dataclasses.replace(
                report, ok=False, where=where, first=worst, causes=_CAUSES["gradient"]
            )
        events = list(_events(self.plan, of_flax, of_haiku))
        first = next((x for x in events if x.values.error > of_outputs), None)
        found = _located(first) if first else _not_located(bool(events))
        module, where, causes = found
        if self._is_random(of_outputs):
            causes = ("haiku_apply draws at random: dropout is on", *causes)
        values = first.values if first else None
        return Report(False, precision, outputs, (), module, where, values, causes)

    def gradients(self) -> tuple[Compared, ...]:
        """Of each module's parameters: a leaf's own may be zero but for rounding."""
        variables, (params, state), _ = self.values
        of_flax = _gradient(self.run_flax, variables)
        of_haiku = _gradient(self.run_haiku, params)
        moves = _untied(self.plan.moves)
        plan = dataclasses.replace(self.plan, moves=moves)
        zeros = jax.tree.map(np.zeros_like, (of_flax, of_haiku, state))
        there = _move.ported(plan, 0, of_flax, zeros[1:])[0]
        # Some moves add a constant, which gradients do not have.
        start = _move.ported(plan, 0, zeros[0], zeros[1:])[0]
        right = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), there, start)
        # Parameters come first in Haiku's pair.
        moved = {piece.place for move in moves for piece in move.haiku.pieces}
        modules: dict[str, tuple[list[Any], list[Any]]] = {}
        leaves = zip(
            jax.tree.leaves(right), jax.tree.leaves_with_path(of_haiku), strict=True
        )
        for place, (x, (path, y)) in enumerate(leaves):
            if place in moved:
                xs, ys = modules.setdefault(_checks.path_name(path[:-1]), ([], []))
                xs.append(np.ravel(x))
                ys.append(np.ravel(y))
        return tuple(
            _compared(f"gradient of {name}", *map(np.concatenate, sides))
            for name, sides in modules.items()
        )

    def _is_random(self, most: float) -> bool:
        """Whether the model in Haiku draws: the same parameters, and another key."""
        run = jax.jit(self.run_haiku)
        pair = (run(self.values[1][0], seed) for seed in range(2))
        return any(one.error > most for one in _outputs(*pair))


def _as_double(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64) if _is_float(leaf) else leaf, tree
    )


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _gradient(run: Apply, tree: Any) -> Any:
    """Of a sum that depends on each output, by all leaves of real numbers."""
    leaves, structure = jax.tree.flatten(tree)
    floats = {i: jnp.asarray(leaf) for i, leaf in enumerate(leaves) if _is_float(leaf)}

    def loss(floats: dict[int, Any]) -> jax.Array:
        now = [floats.get(i, leaf) for i, leaf in enumerate(leaves)]
        outputs = jax.tree.leaves(run(jax.tree.unflatten(structure, now)))
        total = jnp.zeros([])
        for y in filter(_is_float, outputs):
            weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype))
            total = total + jnp.sum(jnp.ravel(y) * weights)
        return total

    found = jax.jit(jax.grad(loss))(floats)
    every = [np.asarray(found.get(i, leaf)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, every)


def _untied(moves: Sequence[Reading]) -> tuple[Reading, ...]:
    """Without leaves that are two in one tree only: their gradients add up there."""
    tied = [move for move in moves if isinstance(move.flax.leaves[0].codec, Tie)]
    pieces = {piece for move in tied for piece in move.flax.pieces}
    return tuple(move for move in moves if not pieces.intersection(move.flax.pieces))


def _outputs(flax: Any, haiku: Any) -> tuple[Compared, ...]:
    sides = jax.tree.leaves_with_path(flax), jax.tree.leaves_with_path(haiku)
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"port.verify: flax_apply returns {len(sides[0])} arrays, haiku_apply "
            f"{len(sides[1])}. Both must return the same outputs; haiku_apply with the "
            "state, as hk.transform_with_state does."
        )
    found = []
    for (path, x), (_, y) in zip(*sides, strict=True):
        one = _compared(f"output{jax.tree_util.keystr(path)}", x, y)
        is_alike = one.shapes[0] == one.shapes[1]
        found.append(one if is_alike else one._replace(error=np.inf))
    return tuple(found)


def _compared(name: str, flax: Any, haiku: Any) -> Compared:
    one, other = np.asarray(flax), np.asarray(haiku)
    shapes = one.shape, other.shape
    if one.size != other.size:
        return Compared(name, shapes, np.inf)
    one, other = one.ravel(), other.ravel()
    if not one.size or np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"):
        return Compared(name, shapes, 0.0)
    with np.errstate(all="ignore"):
        largest = float(np.max(np.abs(one)))
        error = float(np.max(np.abs(one - other))) / max(largest, 1e-30)
    return Compared(name, shapes, error if np.isfinite(error) else np.inf)


# What goes into modules, and comes out

_IN, _OUT = "what goes in", "what comes out"


class Heard(NamedTuple):
    """A value at a module, in all layers of the scans around it.

    Attributes:
      module: The name.
      what: Whether it goes in or comes out, and for which use of the module.
      value: The array, with the axes of scans in front.
      depth: How many axes of scans it has.
    """

    module: _names.Module
    what: str
    value: jax.Array
    depth: int


def _heard_flax(run: Apply, variables: Any) -> tuple[Any, list[Heard]]:
    if "flax" not in sys.modules:  # Then it is a function of plain arrays.
        return run(variables), []
    intercept: Any = importlib.import_module("flax.linen").intercept_methods
    hear = _hearing(lambda module: "/".join(module.path))
    return _with_taps(intercept(hear), run, variables)


def _hearing(path_of: Callable[[Any], str]) -> Apply:
    """Taps the first array that goes into a module, and that comes out of it."""

    def hear(use: Apply, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return use(*args, **kwargs)
        path = path_of(context.module)
        args = _tapped(args, f"{path}@{_IN}")
        return _tapped(use(*args, **kwargs), f"{path}@{_OUT}")

    return hear


def _tapped(tree: Any, name: str) -> Any:
    """Taps the first array of a tree, and keeps how many axes it has there."""
    leaves, structure = jax.tree.flatten(tree)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, (jax.Array, np.ndarray)):
            leaves[i] = _taps.tap(jnp.asarray(leaf), f"{name}@{leaf.ndim}")
            break
    return jax.tree.unflatten(structure, leaves)


def _with_taps(context: Any, run: Apply, tree: Any) -> tuple[Any, list[Heard]]:
    def within(tree: Any) -> Any:
        with context:
            return run(tree)

    with contextlib.suppress(ValueError):
        y, taps = _taps.collect(within)(tree)
        return y, [_at(name, value) for name, value in taps.items()]
    return jax.jit(run)(tree), []  # A tap is where no value can leave.


def _at(name: str, value: jax.Array) -> Heard:
    path, what, ndim = name.split("@")
    rank, _, use = ndim.partition("_")  # Paths that are there twice are numbered.
    module = _names.parts(part for part in path.split("/") if part)
    return Heard(module, f"{what}@{use}", value, value.ndim - int(rank))


class Event(NamedTuple):
    """A value of both models: of which module, and what it is."""

    module: Module
    what: str
    values: Compared


def _events(
    plan: Plan, flax: Sequence[Heard], haiku: Sequence[Heard]
) -> Iterator[Event]:
    """The values that both have, in the order of Flax."""
    partner = _partners(plan)
    there = {(heard.module, heard.what): heard for heard in haiku}
    for heard, index in _in_order(flax):
        names, layer = partner.get((heard.module, index), ((), ()))
        other = there.get((names, heard.what))
        is_known = names or not heard.module
        if is_known and other is not None and len(layer) >= other.depth:
            there_too = other.value[layer[: other.depth]]
            what = heard.what.split("@")[0]
            values = _compared(what, heard.value[index], there_too)
            yield Event((heard.module, index), heard.what, values)


def _in_order(heard: Sequence[Heard]) -> Iterator[tuple[Heard, tuple[int, ...]]]:
    """What is heard of each layer: in a scan, of one layer after the other."""
    keyed = []
    starts: list[int] = []
    for place, one in enumerate(heard):
        starts = starts[: one.depth]
        starts += [place] * (one.depth - len(starts))
        for index in np.ndindex(one.value.shape[: one.depth]):
            pairs = zip(starts, index, strict=True)
            keyed.append(((*itertools.chain.from_iterable(pairs), place), one, index))
    for _, one, index in sorted(keyed, key=lambda item: item[0]):
        yield one, index


def _partners(plan: Plan) -> Mapping[Module, Module]:
    """Which module of Haiku each of Flax is, as their leaves say."""
    found: dict[Module, Module] = {((), ()): ((), ())}
    for move in plan.moves:
        for layer in range(move.flax.num_layers):
            (old, index), (new, other) = (_module(side, layer) for side in move.sides)
            while old and new and (old, index) not in found:
                found[old, index] = new, other
                for depth in range(len(index)):  # What is around a scan.
                    found.setdefault((old, index[:depth]), (new, other))
                if old[-1].base != new[-1].base:
                    break
                old, new = old[:-1], new[:-1]
    return found


def _module(side: Side, layer: int) -> Module:
    leaf, at = side.at(layer)
    return _names.parts(leaf.raw[:-1]), tuple(at.values())


# What may be the reason


Located = tuple[str | None, str, tuple[str, ...]]  # A module, where in it, causes.


def _not_located(has_events: bool) -> Located:
    """What a report says where no value at a module differs."""
    where = (
        "First to differ is what the model returns: what goes into and comes out "
        "of its modules agrees."
        if has_events
        else "Nothing is known of modules: flax_apply runs none of Linen, or none "
        "that both have."
    )
    return "" if has_events else None, where, _CAUSES["elsewhere"]


def _located(event: Event) -> Located:
    """What a report says of the first value to differ."""
    (names, index), what, values = event
    own, around = _names.written(names), _names.written(names[:-1])
    is_in = what.startswith(_IN)
    layer = f" in layer {', '.join(map(str, index))}" if index else ""
    gives = f"{around or 'the model'} gives to {own}"
    returns = f"{own or 'the model'} returns"
    flax, haiku = map(list, values.shapes)
    where = (
        f"First to differ is what {gives if is_in else returns}{layer}: by "
        f"{values.error:.0e}, shapes {flax} in Flax and {haiku} in Haiku."
    )
    return around if is_in else own, where, _likely(names, is_in)


_CAUSES = {
    "norm": (
        "the norm's epsilon: 1e-6 in Flax, 1e-5 in Haiku, if nothing is said",
        "use_fast_variance, a scale or an offset that is left out, or 1 + scale",
        "statistics of the batch in one model, running ones in the other",
    ),
    "conv": (
        "strides, padding, dilation or groups",
        "a kernel that is stored transposed or flipped: leaf={...: port.TRANSPOSED}",
    ),
    "embed": (
        "a factor, such as the root of the width",
        "positions from another number",
    ),
    "linear": (
        "a kernel that is stored transposed: leaf={...: port.TRANSPOSED}",
        "another layer's parameters: leaves whose names do not say which is which",
        "a bias, or a factor, that one of the two has",
    ),
    "attention": (
        "query, key and value in another order, or heads laid out otherwise",
        "the mask, or the value of what is masked; what is added to scores",
        "the scale of scores",
        "dropout that is on",
    ),
    "elsewhere": (
        "the activation: exact or tanh GELU (approximate=)",
        "a residual, or the order of norms and residuals",
        "layers in another order, or counted from another number",
        "a factor that one of the two has; dropout that is on",
    ),
    "gradient": (
        "a jax.lax.stop_gradient in one of the two",
        "values that are tied in one model only",
    ),
}


def _likely(names: _names.Module, is_in: bool) -> tuple[str, ...]:
    """What usually is the reason, by the name of the module."""
    last = "".join(part.base for part in (names[:-1] if is_in else names)[-1:]).lower()
    is_attention = "attn" in last or "attention" in last
    if is_in:
        return _CAUSES["attention" if is_attention else "elsewhere"]
    kinds = {
        "norm": ("norm", "ln"),
        "conv": ("conv", "projection", "patch"),
        "embed": ("embed", "wte", "wpe"),
    }
    for kind, words in kinds.items():
        if any(word in last for word in words):
            return _CAUSES[kind]
    return _CAUSES["attention" if is_attention else "linear"]
