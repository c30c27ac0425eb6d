"""`layer_axes`: how many layer axes each leaf of a model's parameters begins with."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import numpy as np

from hk_stack import _checks, _frames, _function, _naming, _scopes, _taps
from hk_stack._traceback import hidden
from hk_stack._types import Params, State, Tree


class _Place(NamedTuple):
    """Where a leaf is in the tree of a transform."""

    module: str
    name: str


class _Stack(NamedTuple):
    """A stack of the model.

    Attributes:
      axes: How many layer axes its leaves begin with.
      owned: Where the leaves of its layers are in the outermost transform, by where
        they are in a layer's; those of a transparent stack in a place for each layer.
    """

    axes: int
    owned: dict[_Place, list[_Place]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorder:
    """What was heard.

    Attributes:
      stacks: Those that ran, by path; of several with one path, the last.
      axes: How many layer axes leaves begin with, by place and number of all axes,
        which tells what else is of this name.
      parameters: Which of the places are of parameters; the others are of state.
    """

    stacks: dict[str, _Stack] = dataclasses.field(default_factory=dict)
    axes: dict[_Place, dict[int, int]] = dataclasses.field(default_factory=dict)
    parameters: dict[_Place, None] = dataclasses.field(default_factory=dict)


_recording: Any = jax.make_user_context(None)


@hidden
def layer_axes(
    fn: Callable[..., Tree], params: Tree, *args: Tree, **kwargs: Any
) -> Any:
    """How many layer axes each leaf of `params` begins with.

    It is 0 outside of stacks, 1 in a stack, 2 in a stack inside of a stack. `shardings`
    and `per_layer` use it. Nothing is computed: `fn` is traced, as by `jax.eval_shape`.

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def model(x):
    ...     x = hk.Linear(8, name="embed")(x)
    ...     return hk_stack.layer_stack(6, name="layers")(hk.Linear(8))(x)
    >>> model, x = hk.transform(model), jnp.ones([2, 4])
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> hk_stack.layer_axes(model.apply, params, None, x)
    {'embed': {'b': 0, 'w': 0}, 'layers/linear': {'b': 1, 'w': 1}}

    Args:
      fn: What runs the model: the `apply` of a transform, or a function that calls it.
      params: Its first argument, which holds Haiku's parameters, and maybe state, or
        trees of the same leaves: of arrays or `jax.ShapeDtypeStruct`s. State alone is
        not enough: `layer_axes(lambda both: model.apply(*both, None, x), (params,
        state))`.
      *args: What else `fn` takes; what is no array stays as it is.
      **kwargs: The same.

    Returns:
      A tree like `params`, of ints. A transparent stack keeps its parameters layer by
      layer, so it adds no axis.

    Raises:
      TypeError: If `fn` is no function.
      ValueError: If it is an `init`; if it calls no stack; if parameters of a stack are
        not in `params`, or there with other axes in front.
    """
    _checks.function(fn, _WHERE)
    _function.check_call(fn, _WHERE, (params, *args), kwargs)
    recorder = _Recorder()
    with _recording(recorder):
        jax.eval_shape(*_taps.on_arrays(fn, (params, *args), kwargs))
    if not recorder.stacks:
        raise ValueError(
            f"{_WHERE}: {_checks.name_of(fn)!r} calls no stack, or not with these "
            "arguments. Those of hk.layer_stack are not seen: write "
            "hk_stack.layer_stack, which takes the same arguments."
        )
    return _in_tree(params, recorder)


_WHERE = "hk_stack.layer_axes"


def record(path: str, params: Params, state: State, names: _naming.Map | None) -> None:
    """Tells `layer_axes`, if it listens, what a stack reads.

    Args:
      path: Of the stack.
      params: Its parameters, as the transform around it stores them.
      state: Its state.
      names: Of a transparent stack.
    """
    recorder: _Recorder | None = _recording.value
    if recorder is None:
        return
    if hk.running_init():
        raise ValueError(
            f"{_WHERE}: expected the apply of a transform, not its init. Shapes are "
            "enough: params = jax.eval_shape(model.init, rng, x), then "
            "layer_axes(model.apply, params, rng, x)."
        )
    around = recorder.stacks[_frames.frames()[-1].path] if _frames.frames() else None
    outer = around.axes if around else 0
    stack = _Stack(outer + (names is None), {})
    for place, leaf in (*_leaves(params), *_leaves(state)):
        outermost = _outermost(place, around)
        stack.owned.setdefault(_of_layer(place, names), []).extend(outermost)
        for stored in outermost:
            axes = recorder.axes.setdefault(stored, {})
            axes[outer + np.ndim(leaf)] = stack.axes
    for place, _ in _leaves(params):
        recorder.parameters.update(dict.fromkeys(_outermost(place, around)))
    recorder.stacks[path] = stack


def _leaves(tree: Params | State) -> Iterator[tuple[_Place, jax.Array]]:
    for module, leaves in tree.items():
        for name, leaf in leaves.items():
            yield _Place(module, name), leaf


def _of_layer(place: _Place, names: _naming.Map | None) -> _Place:
    """Where a leaf of a stack is in the tree of a layer."""
    known = _naming.place_of(names, place.module) if names is not None else None
    return _Place(known[0], place.name) if known else place


def _outermost(place: _Place, around: _Stack | None) -> list[_Place]:
    """Where a leaf of a stack is in the outermost transform."""
    module = "/".join(filter(None, [_scopes.around(), place.module]))
    read = _Place(_scopes.plain(module), place.name)
    if around is None:
        return [read]
    exact = around.owned.get(read)
    lifted = (around.owned[at] for at in around.owned if _may_be(at, read))
    return exact or [*itertools.chain(*lifted)]


def _may_be(stored: _Place, read: _Place) -> bool:
    """Whether a leaf may be called so in a transform that was lifted into another."""
    is_inside = stored.module.endswith(f"/{read.module}")
    return is_inside and stored.name == read.name


def _in_tree(params: Tree, recorder: _Recorder) -> Any:
    """A tree like `params` of what is known of the leaves, 0 for the others."""
    leaves, structure = jax.tree.flatten_with_path(params)
    places = [_place(path) for path, _ in leaves]
    lifted = [read for read in recorder.axes if read not in set(places)]
    found, axes = set(), []
    for place, (path, leaf) in zip(places, leaves, strict=True):
        count = np.ndim(leaf)
        reads = (read for read in lifted if _may_be(place, read))
        read = next((r for r in reads if count in recorder.axes[r]), place)
        known = recorder.axes.get(read, {count: 0})
        if count not in known:
            raise ValueError(_other_axes(path, np.shape(leaf), known))
        found.add(read)
        axes.append(known[count])
    for missing in (read for read in recorder.parameters if read not in found):
        raise ValueError(_not_there(missing, params))
    return jax.tree.unflatten(structure, axes)


def _place(path: tuple[Any, ...]) -> _Place:
    names = ["", "", *(str(getattr(key, "key", key)) for key in path)]
    return _Place(*names[-2:])


def _other_axes(path: tuple[Any, ...], shape: Any, known: Iterable[int]) -> str:
    return (
        f"{_WHERE}: {_checks.path_name(path)} has shape {shape}, and in the stack that "
        f"reads it {' or '.join(map(str, known))} axes. Expected parameters as the "
        "model reads them, with no axes of a jax.vmap or an hk.layer_stack around the "
        "stack, and no other trees of the same names, such as an optimiser's state."
    )


def _not_there(place: _Place, params: Tree) -> str:
    some = ", ".join(_checks.leaf_names(params)[:8])
    return (
        f"{_WHERE}: a stack reads {'/'.join(place)}, which is not in `params`. It "
        f"holds: {some or 'nothing'}. Give the model's parameters as the first "
        "argument, and what else it takes after; those of several models as one: "
        "layer_axes(lambda both: loss(*both, x), (params, others))."
    )
