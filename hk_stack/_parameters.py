"""Whether parameters and state are those of the layers, and what to say if not."""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax
import numpy as np

from hk_stack import _checks, _equations, _naming, _scopes
from hk_stack._types import Params, Tree


def of_layers(trees: Mapping[str, Tree], num_layers: int, where: str) -> None:
    """Checks that arrays are of so many layers, each of them on all devices."""
    for kind, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            if leaf.shape[:1] != (num_layers,):
                deep = f"of {leaf.shape[0]} layers" if leaf.ndim else "of no stack"
                raise ValueError(
                    f"{where}: {kind} {_checks.path_name(path)} has shape "
                    f"{leaf.shape}; expected a leading axis of num_layers={num_layers}."
                    f" If these are parameters {deep}, change num_layers. If they come "
                    "from a Python loop of layers, stack them with "
                    "hk_stack.stack_params(params, naming_map)."
                )
            sharding = _equations.explicit(jax.typeof(leaf))
            if sharding and sharding.spec[0] is not None:
                whole = jax.sharding.PartitionSpec(None, *sharding.spec[1:])
                raise ValueError(
                    f"{where}: {kind} {_checks.path_name(path)} is sharded over its "
                    f"layers, {jax.typeof(leaf).str_short()}, on a mesh axis of type "
                    "Explicit; a loop needs each layer on all devices. Write "
                    f"jax.sharding.reshard(leaf, jax.P{tuple(whole)}) before the "
                    "stack, or shard another axis, or make the mesh axis one of type "
                    "Auto."
                )


def fit(
    init: Callable[..., Any],
    spec: Tree,
    params: Params,
    stored: Params,
    naming_map: _naming.Map | None,
    where: str,
    error: Exception,
) -> None:
    """Checks that `params` holds all that a layer asks for.

    Called once a layer has failed, as Haiku's own error for a parameter that is missing
    or of another shape knows nothing of the stack.

    Args:
      init: The layer's `init`.
      spec: What `init` takes.
      params: The layer's parameters.
      stored: All parameters of the transform, to show what there is instead.
      naming_map: Of a transparent stack.
      where: Names the stack.
      error: Why the layer failed. It is shown unless there is a better reason.
    """
    try:
        expected, _ = jax.eval_shape(init, spec)
    except Exception as other:
        if where in str(other):
            raise other from None
        if str(other) != str(error):  # Else the layer fails for a reason of its own.
            error.add_note(
                f"{where}: whether the parameters are those of the layers could not be "
                f"checked, as it cannot be initialised ({other}). They hold: "
                f"{_leaves(stored)}."
            )
        return
    if params and _LACK in str(error):
        return  # A stack inside knows better.
    for module, leaves in expected.items():
        for name, leaf in leaves.items():
            found = params.get(module, {}).get(name)
            if found is None:
                there = _leaves(stored, f"{module}/{name}")
                raise ValueError(
                    f"{where}: {_LACK} {module}/{name}, of shape "
                    f"{leaf.shape} in each layer. They hold: {there}. "
                    f"{_advice(expected, stored, module, naming_map)}"
                ) from None
            if found.shape != leaf.shape:
                raise ValueError(
                    f"{where}: parameter {module}/{name} has shape {found.shape} "
                    f"in each layer; the layer function expects {leaf.shape}. Give an "
                    "input of the shape that parameters were made for, or make new "
                    "ones: params = model.init(rng, x)."
                ) from None


_LACK = "the parameters lack"


def _leaves(stored: Params, wanted: str = "") -> str:
    """Names of what is there, those most like the one that is wanted first."""
    names = _checks.leaf_names(stored)
    likeness = difflib.SequenceMatcher(b=wanted)

    def unlikeness(name: str) -> float:
        likeness.set_seq1(name)
        return -likeness.ratio()

    names = sorted(names, key=unlikeness)
    return ", ".join(names[:8]) + (", ..." if names[8:] else "") or "nothing"


def _advice(
    expected: Params,
    stored: Params,
    module: str,
    naming_map: _naming.Map | None,
) -> str:
    """What to do about a module of the layers that is missing."""
    if not stored:
        return "Give what init returned: model.apply(model.init(rng, x), rng, x)."
    if naming_map is not None:
        return (
            f"By the transparency_map, layer 0 has it as "
            f"{naming_map.stacked_to_flat(module, 0)}; give the map the names that the "
            "parameters have, or, if they are stacked, leave transparent=True out."
        )
    for path, num_layers in _stacks_of(expected, stored):
        return (
            f"All that the layers ask for is there for {num_layers} layers, in {path}: "
            f"if that is this stack, saved under another name, write "
            f"layer_stack({num_layers}, name={path.rpartition('/')[-1]!r})."
        )
    return (
        "If they come from a Python loop of layers, stack them with "
        "hk_stack.stack_params(params, naming_map), or store them per layer: "
        "transparent=True with a transparency_map."
    )


def _stacks_of(expected: Params, stored: Params) -> Iterator[tuple[str, int]]:
    """Modules that hold all `expected` parameters, stacked, and how many layers."""
    leaves = [(m, name, leaf) for m in expected for name, leaf in expected[m].items()]
    first = f"/{leaves[0][0]}"
    for path in (m.removesuffix(first) for m in stored if m.endswith(first)):
        found = [stored.get(f"{path}/{m}", {}).get(name) for m, name, _ in leaves]
        shapes = [np.shape(leaf) if leaf is not None else () for leaf in found]
        depth = shapes[0][:1]
        if depth and shapes == [(*depth, *leaf.shape) for *_, leaf in leaves]:
            yield path, depth[0]


def not_shared(
    outside: Mapping[str, Mapping[str, Any]], where: str, captured: str
) -> contextlib.AbstractContextManager[Any]:
    """Refuses parameters of a module that also has them outside of the stack.

    A module that was made outside has parameters of its own in each layer, so what
    looks shared would not be.

    Args:
      outside: Parameters of the transform around the stack.
      where: Names the stack.
      captured: Name of a module that was made outside, of which a method runs.
    """

    def on_get(next_getter: Any, value: Any, context: Any) -> Any:
        owner = _scopes.plain(context.module_name)
        is_captured = f"{owner}/".startswith(f"{captured}/")
        if is_captured and context.name in outside.get(owner, {}):
            raise ValueError(
                f"{where}: module {captured!r} was made outside of the stack and "
                f"has the parameter {owner}/{context.name} there; inside, each layer "
                "would silently get one of its own. To share it, read the value "
                "outside and close over it; to have one per layer, make the module "
                "inside the layer function."
            )
        return next_getter(value)

    return hk.custom_getter(on_get)
