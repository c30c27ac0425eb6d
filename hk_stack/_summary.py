"""`summary`: what the stacks of a model hold, hoist and keep, as a table."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax

from hk_stack import _checks, _cost, _frames, _loop, _taps
from hk_stack._layer import Invocation
from hk_stack._parts import Parts
from hk_stack._report import Group, groups
from hk_stack._table import Shown, Table, si


class Record(NamedTuple):
    """One use of a stack, for `summary`.

    Attributes:
      path: Of the stack.
      function: Name of the layer function.
      num_layers: `L`.
      params: Types of the parameters of all layers, `[L, ...]`.
      stored: Types of all parameters of the transform around it.
      parts: How its layer was cut (`Parts`); None if it was not.
      loop: What runs the layers.
      remat: What the backward pass computes again, in words.
      is_nested: Whether the stack is inside another.
    """

    path: str
    function: str
    num_layers: int
    params: Any
    stored: Any
    parts: Parts | None
    loop: str
    remat: str
    is_nested: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """What `summary` has heard of."""

    records: dict[Any, Record] = dataclasses.field(default_factory=dict)


recording: Any = jax.make_user_context(None)


def record(invocation: Invocation, params: Any, parts: Parts | None) -> None:
    """Tells `summary` of one use of a stack, if it listens.

    Args:
      invocation: The use.
      params: The parameters of all layers, `[L, ...]`.
      parts: How its layer was cut; None if it was not.
    """
    recorder = recording.value
    if recorder is None:
        return
    if hk.running_init():
        raise ValueError(
            "hk_stack.summary: expected the apply of a transform, not its init, "
            "as a summary is of parameters that are there. Shapes are enough: "
            "params = jax.eval_shape(model.init, rng, x), then "
            "summary(model.apply, params, rng, x)."
        )
    stored = hk.experimental.get_params()
    # Only types, as traced values must not outlive what is traced.
    params, stored = jax.tree.map(jax.typeof, (params, stored))
    record = Record(
        invocation.path,
        _checks.name_of(invocation.situation.f),
        invocation.options.num_layers,
        params,
        stored,
        parts,
        invocation.loop,
        _loop.describe(invocation.options.remat if parts else None),
        bool(_frames.frames()),
    )
    types = tuple((v.shape, v.dtype) for v in jax.tree.leaves(params))
    recorder.records[record.path, record.function, types] = record


class Stack(NamedTuple):
    """One stack of a model.

    Attributes:
      path: As in the parameter tree; a stack in another begins with the other's.
      function: Name of the layer function.
      num_layers: `L`.
      parameters: Number of parameters of all layers, those of stacks inside included.
      nbytes: Their size in bytes.
      derived: Size in bytes of the values that setup hands to the loop, of all layers.
      nbytes_per_device: Size of the parameters on each device, as far as the arguments
        of the model say how they are sharded.
      derived_per_device: The same of what setup hands to the loop: whole on each device
        if made of gathered values, else spread as the parameters are.
      hoisted: What setup computes for one layer, by source line.
      loop: What runs the layers: "scan", "unrolled" or "python".
      remat: What gradients compute again: "no", "all", or what policy keeps some; and
        how many layers are a group.
    """

    path: str
    function: str
    num_layers: int
    parameters: int
    nbytes: int
    derived: int
    nbytes_per_device: int
    derived_per_device: int
    hoisted: tuple[Group, ...]
    loop: str
    remat: str


@dataclasses.dataclass(frozen=True)
class Summary(Shown):
    """What `summary` found; `str`, `rich.print` and notebooks show it as a table.

    Attributes:
      stacks: In the order in which they run, those inside of others after these.
      parameters: Number of parameters of the model, in stacks or not.
      nbytes: Their size in bytes.
    """

    stacks: tuple[Stack, ...]
    parameters: int
    nbytes: int

    def _parts(self) -> Iterator[str | Table]:
        yield Table(_TITLES, self._rows(), _NUMBERS)
        if hoisted := self._hoisted():
            yield from ("", Table(_HOISTED, hoisted))
        for warning in self.warnings:
            yield from ("", warning)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Stacks whose derived values take more memory than their parameters."""
        return tuple(
            f"{s.path}: derived values take {si(s.derived_per_device)}B on each "
            f"device, the parameters {si(s.nbytes_per_device)}B. If memory is short, "
            f'hoist less: setup="marked" with hk_stack.hoist, or setup="inline".'
            for s in self.stacks
            if s.derived_per_device > s.nbytes_per_device
        )

    def _rows(self) -> list[list[str]]:
        in_stacks = [s for s in self.stacks if not _around(s.path, self.stacks)]
        count = self.parameters - sum(s.parameters for s in in_stacks)
        nbytes = self.nbytes - sum(s.nbytes for s in in_stacks)
        return [
            *map(self._row, self.stacks),
            _padded("outside of stacks", count, nbytes),
            _padded("total", self.parameters, self.nbytes),
        ]

    def _row(self, stack: Stack) -> list[str]:
        around = _around(stack.path, self.stacks)
        name = stack.path
        if around:
            name = "  " * len(around) + name.removeprefix(f"{around[-1].path}/")
        return [
            name,
            stack.function,
            str(stack.num_layers),
            f"{stack.parameters:,}",
            f"{si(stack.nbytes)}B",
            f"{si(stack.derived)}B" if stack.derived else "-",
            stack.loop,
            stack.remat,
        ]

    def _hoisted(self) -> list[list[str]]:
        return [
            [
                stack.path,
                group.source,
                group.primitive,
                ", ".join(group.shapes).replace(" ", ""),
                f"{si(group.nbytes)}B",
            ]
            for stack in self.stacks
            for group in stack.hoisted
        ]


_TITLES = "stack|layer function|layers|parameters|bytes|derived|loop|remat".split("|")
_HOISTED = "hoisted from|line|primitive|derived values of a layer|bytes".split("|")
_NUMBERS = ("layers", "parameters", "bytes", "derived")


def summary(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Summary:
    """What the stacks of a model hold, hoist and keep.

    Nothing is computed: `fn` is traced, as by `jax.eval_shape`.

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> def layer(x):
    ...     w = hk.get_parameter("w", [8, 8], init=hk.initializers.RandomNormal(0.1))
    ...     return jnp.tanh(x @ jax.scipy.linalg.expm(w))
    >>> def model(x):
    ...     x = hk_stack.layer_stack(6, name="layers", remat=True)(layer)(x)
    ...     return hk.Linear(2)(x)
    >>> model, x = hk.transform(model), jnp.ones([2, 8])
    >>> params = model.init(jax.random.key(0), x)
    >>> print(hk_stack.summary(model.apply, params, None, x))
      stack  layer function  layers  parameters  bytes  derived  loop  remat
      layers  layer           6       384         1.54 kB  1.54 kB  scan  all
      outside of stacks                          18          72 B
      total                                      402         1.61 kB
    <BLANKLINE>
      hoisted from  line           primitive    derived values of a layer  bytes
      layers        ...3 in layer  dot_general  float32[8,8]               256 B

    Args:
      fn: What runs the model: the `apply` of a transform, or a function that calls it.
      *args: What `fn` takes: arrays or `jax.ShapeDtypeStruct`s; all else stays as
        it is.
      **kwargs: The same.

    Returns:
      The stacks in the order in which they are called, and the number of parameters of
      the transforms that have stacks. What has the same name and shape is counted once.

    Raises:
      TypeError: If `fn` is no function.
      ValueError: If it is an `init`, which has no parameters yet; if it calls no stack.
    """
    _summarised(fn)
    recorder = Recorder()
    with recording(recorder):
        jax.eval_shape(*_taps.on_arrays(fn, args, kwargs))
    found = list(recorder.records.values())
    _some_stack(found, fn)
    records = sorted(found, key=_order([record.path for record in found]))
    stored = {key: leaf for record in records for key, leaf in _outer(record)}
    return Summary(
        tuple(_stack(record, records, (args, kwargs)) for record in records),
        sum(p.size for p in stored.values()),
        sum(_nbytes(p) for p in stored.values()),
    )


def _order(paths: Sequence[str]) -> Callable[[Record], list[int]]:
    """Sorts stacks by when they began: those inside of one are recorded before it."""

    def key(record: Record) -> list[int]:
        parts = record.path.split("/")
        begins = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        return [paths.index(path) for path in begins if path in paths]

    return key


def _outer(record: Record) -> list[tuple[Any, Any]]:
    """The parameters of the transform around a stack, by name and type."""
    if record.is_nested:
        return []
    leaves = jax.tree.leaves_with_path(record.stored)
    return [((str(path), leaf.shape, leaf.dtype), leaf) for path, leaf in leaves]


def _share(given: Any, stack: str) -> float:
    """Which part of the parameters of a stack, by its path, is on each device."""
    leaves = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(given)
        if any(str(getattr(k, "key", "")).startswith(f"{stack}/") for k in path)
    ]
    whole = sum(map(_nbytes, leaves))
    return sum(_nbytes(leaf) * _part(leaf) for leaf in leaves) / whole if whole else 1.0


def _part(leaf: Any) -> float:
    """Which part of an array is on each device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not leaf.size:
        return 1.0
    return math.prod(sharding.shard_shape(leaf.shape)) / leaf.size


def _stack(record: Record, records: Sequence[Record], given: Any) -> Stack:
    around = _around(record.path, records)
    copies = math.prod(r.num_layers for r in around)
    leaves = jax.tree.leaves(record.params)
    nbytes = copies * sum(map(_nbytes, leaves))
    share = _share(given, around[0].path if around else record.path)
    return Stack(
        record.path,
        record.function,
        record.num_layers,
        copies * sum(leaf.size for leaf in leaves),
        nbytes,
        round(_derived(record, 1.0)),
        round(share * nbytes),
        round(_derived(record, share)),
        tuple(_hoisted(record.parts)) if record.parts else (),
        record.loop,
        record.remat,
    )


def _around(path: str, stacks: Sequence[Any]) -> list[Any]:
    """The stacks around one."""
    return [other for other in stacks if path.startswith(f"{other.path}/")]


def _hoisted(parts: Any) -> Iterator[Group]:
    yield from groups(parts.shared.jaxpr)
    yield from groups(parts.setup.jaxpr)


def _derived(record: Record, share: float) -> float:
    """Bytes of what the call is handed, if devices have this share of parameters."""
    if not record.parts:
        return 0.0
    shared, setup = record.parts.shared.jaxpr, record.parts.setup.jaxpr
    common = sum(_sizes(shared, share)[: record.parts.num_shared])
    return common + record.num_layers * sum(_sizes(setup, share))


def _sizes(jaxpr: Any, share: float) -> list[float]:
    """Bytes of each output: whole if made of gathered values, else a share of it."""
    made = zip(jaxpr.outvars, _cost.gathered(jaxpr), strict=True)
    return [_nbytes(v.aval) * (1.0 if whole else share) for v, whole in made]


def _nbytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _padded(name: str, count: int, nbytes: int) -> list[str]:
    row = [name, "", "", f"{count:,}", f"{si(nbytes)}B"]
    return row + [""] * (len(_TITLES) - len(row))


def _summarised(fn: Any) -> None:
    """Checks what `summary` is given."""
    if not callable(fn):
        hint = " Give its apply." if hasattr(fn, "apply") else ""
        raise TypeError(
            f"hk_stack.summary: expected a function, not {type(fn).__name__}.{hint}"
        )


def _some_stack(found: Sequence[Any], fn: Any) -> None:
    """Checks that there is something to summarise."""
    if not found:
        raise ValueError(
            f"hk_stack.summary: {_checks.name_of(fn)!r} calls no stack, or not in this "
            "call. Those of hk.layer_stack are not seen: write hk_stack.layer_stack, "
            "which takes the same arguments."
        )
