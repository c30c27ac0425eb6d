"""What `layer_stack` is given besides the layer function, checked."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from hk_stack import _checks, _loop, _naming
from hk_stack._traceback import hidden_in_making

Setup = Literal["auto", "marked", "inline"]
SetupRemat = bool | Literal["auto"]
Init = Literal["auto", "vmap", "map", "scan"]


_PIPELINE = 'hk_stack.Pipeline(axis="stage", microbatches=8)'


@hidden_in_making
@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How `layer_stack` splits its layers into stages, for microbatches to go through.

    Attributes:
      axis: The axis of the mesh around (`jax.set_mesh`) whose devices are the stages.
      microbatches: `M`, into how many microbatches a batch is cut.
    """

    axis: str
    microbatches: int

    def __post_init__(self) -> None:
        """Checks both."""
        if not (isinstance(self.axis, str) and self.axis):
            raise TypeError(
                "hk_stack.Pipeline: axis must be the name of an axis of the mesh "
                f"around, not {_checks.shown(self.axis)}. Write {_PIPELINE}."
            )
        _checks.positive(self.microbatches, "microbatches", "hk_stack.Pipeline")


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `layer_stack`, which says what they mean.

    Attributes:
      naming_map: Of a transparent stack; else None.
    """

    num_layers: int
    with_per_layer_inputs: bool
    unroll: int
    pass_reverse_to_layer_fn: bool
    naming_map: _naming.Map | None
    name: str
    setup: str
    setup_batch_size: int | None
    setup_remat: bool | None
    setup_sharding: str | None
    init: str
    loop: _loop.Loop
    remat: _loop.Remat | None
    carry_dtype: Any
    check_finite: bool
    pipeline: Pipeline | None


def checked(**given: Any) -> Options:
    """The options, or an error that names the argument and says what to write."""
    name = given["name"]
    where = f"layer_stack {name!r}" if isinstance(name, str) and name else "layer_stack"
    found = {k: check(given[k], k, where) for k, check in _CHECKS.items()}
    naming_map, num_layers = given["transparency_map"], found["num_layers"]
    is_transparent = found.pop("transparent")
    _not_inline(found["setup"], "setup_sharding", found["setup_sharding"], where)
    pipeline = found["pipeline"]
    if pipeline and pipeline.axis == found["setup_sharding"]:
        raise ValueError(
            f"{where}: setup_sharding={pipeline.axis!r} is the axis of pipeline=, "
            "whose stages set up their own layers only as it is. Leave setup_sharding "
            "out, or give another axis."
        )
    if is_transparent and pipeline:
        raise ValueError(
            f"{where}: transparent=True stores parameters per layer, but with "
            "pipeline= each stage holds its share of one stacked tree. Leave one of "
            "them out: hk_stack.stack_params(params, naming_map) stacks parameters."
        )
    return Options(
        unroll=unrolled(given["unroll"], num_layers, where),
        naming_map=_naming_map(naming_map, where) if is_transparent else None,
        name=_name(name, found["with_per_layer_inputs"]),
        remat=rematerialised(given["remat"], given["remat_every"], num_layers, where),
        **found,
    )


def _naming_map(naming_map: object, where: str) -> _naming.Map:
    if naming_map is None:
        raise ValueError(
            f"{where}: transparent=True needs a transparency_map, which names the "
            "module of each layer (see hk.LayerStackTransparencyMapping)."
        )
    return _naming.naming_map(naming_map, "transparency_map", where)


def rematerialised(
    remat: object, every: object, num_layers: int, where: str
) -> _loop.Remat | None:
    """What the backward pass computes again, of so many layers."""
    policy = _policy(remat, where)
    if not remat:
        if every is not None:
            raise ValueError(
                f"{where}: remat_every={every!r} says how remat groups the layers, but "
                "remat is off. Write remat=True too, or a policy."
            )
        return None
    if every == "sqrt":
        every = _loop.square_root(num_layers)
    elif every is None:
        every = 1
    elif isinstance(every, str):
        raise ValueError(
            f'{where}: remat_every must be a positive int or "sqrt", not {every!r}.'
        )
    return _loop.Remat(policy, _checks.positive(every, "remat_every", where))


def _name(name: object, with_per_layer_inputs: bool) -> str:
    if not (name is None or isinstance(name, str)):
        raise TypeError(
            f"layer_stack: name must be a str or None, not {_checks.shown(name)} "
            f"({type(name).__name__})."
        )
    kind = "with_per_layer" if with_per_layer_inputs else "no_per_layer"
    return name or f"__layer_stack_{kind}"


def unrolled(value: object, num_layers: int, where: str) -> int:
    """How many layers one step of the loop holds; True is all of them."""
    if isinstance(value, (bool, np.bool_)):
        return num_layers if value else 1
    return _checks.positive(value, "unroll", where)


def _policy(remat: object, where: str) -> Callable[..., Any] | None:
    """What `remat` keeps, as a policy of `jax.checkpoint`."""
    if isinstance(remat, (bool, np.bool_)):
        return None
    known = jax.checkpoint_policies
    if isinstance(remat, str):
        hint = (
            f": remat=jax.checkpoint_policies.{remat}" if hasattr(known, remat) else ""
        )
        raise TypeError(
            f"{where}: remat must be True, False or a policy, not "
            f"{_checks.shown(remat)}. Give the function"
            f"{hint or ' of jax.checkpoint_policies'}."
        )
    if remat is jax.checkpoint or remat is hk.remat:
        raise TypeError(
            f"{where}: remat must be True, False or a policy; jax.checkpoint and "
            "hk.remat are none. Write remat=True, which does what they do."
        )
    if not callable(remat):
        raise TypeError(
            f"{where}: remat must be True, False or a policy such as "
            f"jax.checkpoint_policies.dots_saveable, not {_checks.shown(remat)}."
        )
    made = [n for n in _MAKERS_OF_POLICIES if remat is getattr(known, n, None)]
    if isinstance(remat, type):
        made = [remat.__name__]
    for name in made:
        raise TypeError(
            f"{where}: remat=jax.checkpoint_policies.{name} is no policy, but "
            f"makes one; as it is, it would keep everything. Call it with its "
            f"arguments: jax.checkpoint_policies.{name}(...)."
        )
    return remat


_MAKERS_OF_POLICIES = (
    "offload_dot_with_no_batch_dims",
    "save_and_offload_only_these_names",
    "save_any_names_but_these",
    "save_anything_except_these_names",
    "save_from_both_policies",
    "save_only_these_names",
)


def of_setup(
    setup: object, batch_size: object, remat: object, sharding: object, where: str
) -> tuple[str, int | None, bool | None, str | None]:
    """What leaves a loop, and how it runs; says so if there is nothing to run."""
    given = {
        "setup": setup,
        "setup_batch_size": batch_size,
        "setup_remat": remat,
        "setup_sharding": sharding,
    }
    found = [_CHECKS[name](value, name, where) for name, value in given.items()]
    for name in list(given)[1:]:
        _not_inline(setup, name, given[name], where)
    kind, size, again, axis = found
    return kind, size, again, axis


def _not_inline(setup: object, argument: str, value: object, where: str) -> None:
    """Checks that an option of setup is not given where there is none."""
    if setup == "inline" and value not in (None, "auto"):
        raise ValueError(
            f"{where}: {argument}={value!r} says how setup runs before a loop, but "
            'setup="inline" leaves it inside. Leave one of them out.'
        )


def axis_of_mesh(value: object, argument: str, where: str) -> str | None:
    """`value`, if it is the name of a mesh axis or None."""
    if value is None or (isinstance(value, str) and value):
        return value
    spec = getattr(value, "spec", value)
    names = [e for e in spec if e] if isinstance(spec, PartitionSpec) else []
    is_one = len(names) == 1 and isinstance(names[0], str)
    hint = f" Write {argument}={names[0]!r}." if is_one else ""
    kind = ValueError if value == "" else TypeError
    raise kind(
        f"{where}: {argument} must be the name of one axis of the mesh around, or None "
        f"(which leaves all setup on all devices), not {_checks.shown(value)}.{hint}"
    )


def _setup_remat(value: object, argument: str, where: str) -> bool | None:
    """Whether to compute setup again; None is for what the number of batches says."""
    if isinstance(value, str) and value == "auto":
        return None
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f'{where}: {argument} must be True, False or "auto", not '
            f"{_checks.shown(value)}."
        )
    return bool(value)


def _size(value: object, argument: str, where: str) -> int | None:
    return None if value is None else _checks.positive(value, argument, where)


def _floating(dtype: Any, argument: str, where: str) -> Any:
    """`dtype` as a floating-point type; None stays None."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = dtype
    if found is None or (
        isinstance(found, np.dtype) and jnp.issubdtype(found, jnp.floating)
    ):
        return found
    raise TypeError(
        f"{where}: {argument} must be a floating-point type such as jnp.bfloat16, "
        f"not {_checks.shown(dtype)}."
    )


def _pipeline(value: object, argument: str, where: str) -> Pipeline | None:
    if value is None or isinstance(value, Pipeline):
        return value
    raise TypeError(
        f"{where}: {argument} must be an hk_stack.Pipeline or None, not "
        f"{_checks.shown(value)}. Write {argument}={_PIPELINE}."
    )


def num_stages(pipeline: Pipeline, num_layers: int, where: str) -> int:
    """Over how many devices of the mesh around layers are split; one without its axis.

    Raises:
      ValueError: If the mesh cannot be used, or the layers cannot be split evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if pipeline.axis not in kinds:
        return 1
    if kinds[pipeline.axis] is AxisType.Manual:
        raise ValueError(
            f"{where}: pipeline= takes the mesh axis {pipeline.axis!r}, but a "
            "jax.shard_map around has taken it: inside of it each device runs a "
            "program of its own. Give shard_map the axis_names of the other axes only, "
            "and check_vma=False."
        )
    if explicit := [a for a, kind in kinds.items() if kind is AxisType.Explicit]:
        raise ValueError(
            f"{where}: pipeline= needs mesh axes of type Auto, and "
            f"{', '.join(map(repr, explicit))} of the mesh around are of type Explicit "
            "(the default of jax.make_mesh). Write jax.make_mesh(sizes, names, "
            "(jax.sharding.AxisType.Auto,) * len(names))."
        )
    size = int(mesh.shape[pipeline.axis])
    if num_layers % size:
        raise ValueError(
            f"{where}: {num_layers} layers cannot be split evenly over the {size} "
            f"stages of the mesh axis {pipeline.axis!r}. Make num_layers a multiple of "
            f"{size}, or the axis a divisor of {num_layers}."
        )
    return size


# Of those arguments that are checked by themselves.
_CHECKS: dict[str, Callable[[Any, str, str], Any]] = {
    "num_layers": _checks.positive,
    "with_per_layer_inputs": _checks.flag,
    "pass_reverse_to_layer_fn": _checks.flag,
    "transparent": _checks.flag,
    "setup": functools.partial(_checks.one_of, words=get_args(Setup)),
    "setup_batch_size": _size,
    "setup_remat": _setup_remat,
    "setup_sharding": axis_of_mesh,
    "init": functools.partial(_checks.one_of, words=get_args(Init)),
    "loop": functools.partial(_checks.one_of, words=_loop.LOOPS),
    "carry_dtype": _floating,
    "check_finite": _checks.flag,
    "pipeline": _pipeline,
}
