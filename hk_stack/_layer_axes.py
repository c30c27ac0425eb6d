"""`layer_axes`: how many layer axes each leaf of a model's parameters begins with."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax

from hk_stack import _checks, _frames, _naming, _scopes, _taps
from hk_stack._types import Params, Tree


class _Place(NamedTuple):
    """Where a parameter is in the tree of a transform."""

    module: str
    name: str


class _Stack(NamedTuple):
    """A stack of the model.

    Attributes:
      axes: How many layer axes its parameters begin with.
      owned: Where the parameters of its layers are in the outermost transform, by where
        they are in a layer's; those of a transparent stack in a place for each layer.
    """

    axes: int
    owned: dict[_Place, list[_Place]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorder:
    """The stacks that ran, by path, the outer ones first."""

    stacks: dict[str, _Stack] = dataclasses.field(default_factory=dict)


_recording: Any = jax.make_user_context(None)


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
      params: Its first argument, which holds Haiku's parameters: arrays or
        `jax.ShapeDtypeStruct`s.
      *args: What else `fn` takes; what is no array stays as it is.
      **kwargs: The same.

    Returns:
      A tree like `params`, of ints. A transparent stack keeps its parameters layer by
      layer, so it adds no axis.

    Raises:
      TypeError: If `fn` is no function.
      ValueError: If it is an `init`; if it calls no stack; if parameters of a stack are
        not in `params`, or in several places of it.
    """
    _checks.function(fn, _WHERE)
    recorder = _Recorder()
    with _recording(recorder):
        jax.eval_shape(*_taps.on_arrays(fn, (params, *args), kwargs))
    if not recorder.stacks:
        raise ValueError(
            f"{_WHERE}: {_checks.name_of(fn)!r} calls no stack, or not with these "
            "arguments. Those of hk.layer_stack are not seen: write "
            "hk_stack.layer_stack, which takes the same arguments."
        )
    axes = {
        place: stack.axes
        for stack in recorder.stacks.values()
        for places in stack.owned.values()
        for place in places
    }
    return _in_tree(params, axes)


_WHERE = "hk_stack.layer_axes"


def record(path: str, tree: Params, names: _naming.Map | None) -> None:
    """Tells `layer_axes`, if it listens, which parameters a stack reads.

    Args:
      path: Of the stack.
      tree: The parameters, as the transform around the stack stores them.
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
    stored = _scopes.plain_tree(hk.experimental.get_params())
    # Leaves are the stored ones themselves, so they say where they are.
    places = {id(leaf): place for place, leaf in _leaves(stored)}
    owned: dict[_Place, list[_Place]] = {}
    for (module, name), leaf in _leaves(tree):
        place = places[id(leaf)]
        if names is not None:
            module, _ = _naming.place_of(names, module) or (module, 0)
        outermost = around.owned[place] if around else [place]
        owned.setdefault(_Place(module, name), []).extend(outermost)
    axes = (around.axes if around else 0) + (names is None)
    recorder.stacks[path] = _Stack(axes, owned)


def _leaves(tree: Params) -> Iterator[tuple[_Place, jax.Array]]:
    for module, leaves in tree.items():
        for name, leaf in leaves.items():
            yield _Place(module, name), leaf


def _in_tree(params: Tree, axes: Mapping[_Place, int]) -> Any:
    """A tree like `params` of what is known of the leaves, 0 for the others."""
    found: dict[_Place, str] = {}

    def known(path: tuple[Any, ...], leaf: object) -> int:
        del leaf
        last = tuple(str(getattr(key, "key", key)) for key in path[-2:])
        if last not in axes:
            return 0
        place = _Place(*last)
        name = _checks.path_name(path)
        if place in found:
            raise ValueError(
                f"{_WHERE}: a stack reads {'/'.join(place)}, and `params` has it "
                f"twice, at {found[place]} and {name}. Give the parameters of one "
                "transform, and a function that takes these."
            )
        found[place] = name
        return axes[place]

    made = jax.tree.map_with_path(known, params)
    some = ", ".join(_checks.leaf_names(params)[:8])
    if missing := [place for place in axes if place not in found]:
        raise ValueError(
            f"{_WHERE}: a stack reads {'/'.join(missing[0])}, which is not in "
            f"`params`. It holds: {some or 'nothing'}. Give the "
            "model's parameters as the first argument, and what else it takes after."
        )
    return made
