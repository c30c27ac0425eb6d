"""`summary`: what the stacks of a model hold, hoist and keep, as a table."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
from jax.extend import core as jex

from hk_stack import (
    _checks,
    _cost,
    _frames,
    _function,
    _loop,
    _parts,
    _report,
    _spread,
    _taps,
)
from hk_stack._layer import Invocation
from hk_stack._parts import Input, Parts
from hk_stack._report import Group
from hk_stack._stays import Stayed
from hk_stack._table import Shown, Table, si
from hk_stack._traceback import hidden
from hk_stack._types import Params, Tree


class Cut(NamedTuple):
    """How the layer of a stack was cut.

    Attributes:
      parts: Setup and call.
      inputs: What the inputs of the layer are.
    """

    parts: Parts
    inputs: tuple[Input, ...]


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
        if made of gathered values, or by `setup_sharding`, else as the parameters are.
      hoisted: What setup computes for one layer, by source line.
      loop: What runs the layers: "scan", "unrolled" or "python".
      remat: What gradients compute again: "no", "all", or what policy keeps some; and
        how many layers are a group.
      stayed: What a layer computes in the loop that might have been setup, and why.
      batch: How many layers' setup runs at once, on one device if it is spread; 0 if
        there is none.
      setup_remat: Whether gradients run setup again.
      notes: What else there is to say of setup.
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
    stayed: tuple[Stayed, ...]
    batch: int
    setup_remat: bool
    notes: tuple[str, ...]


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
        yield Table(_TITLES, self._rows(), _TITLES[2:6])
        if hoisted := [
            [stack.path, *_report.cells(group)[:-1]]
            for stack in self.stacks
            for group in stack.hoisted
        ]:
            yield from ("", Table(_HOISTED, hoisted))
        if stayed := [
            [stack.path, *_report.reason_cells(stayed)]
            for stack in self.stacks
            for stayed in stack.stayed
            if stayed[:2] not in self._said_inside(stack)
        ]:
            yield from ("", Table(_STAYED, stayed, is_prose=True))
        if notes := [
            [stack.path, note]
            for stack in self.stacks
            for note in (*stack.notes, *_memory(stack))
        ]:
            yield from ("", Table(_NOTES, notes, is_prose=True))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Stacks whose derived values take more memory than their parameters."""
        return tuple(f"{s.path}: {text}" for s in self.stacks for text in _memory(s))

    def _rows(self) -> list[list[str]]:
        in_stacks = [s for s in self.stacks if not self._around(s)]
        count = self.parameters - sum(s.parameters for s in in_stacks)
        nbytes = self.nbytes - sum(s.nbytes for s in in_stacks)
        return [
            *map(self._row, self.stacks),
            ["outside of stacks", "", "", *_numbers(count, nbytes), *[""] * 4],
            ["total", "", "", *_numbers(self.parameters, self.nbytes), *[""] * 4],
        ]

    def _row(self, stack: Stack) -> list[str]:
        name, around = stack.path, self._around(stack)
        if around:
            name = "  " * len(around) + name.removeprefix(f"{around[-1].path}/")
        derived = f"{si(stack.derived)}B" if stack.derived else "-"
        batch = f"{stack.batch}{', remat' if stack.setup_remat else ''}"
        start = [name, stack.function, str(stack.num_layers)]
        numbers = _numbers(stack.parameters, stack.nbytes)
        how = [derived, batch if stack.batch else "-", stack.loop, stack.remat]
        return [*start, *numbers, *how]

    def _around(self, stack: Stack) -> list[Stack]:
        """The stacks around one."""
        return [s for s in self.stacks if stack.path.startswith(f"{s.path}/")]

    def _said_inside(self, stack: Stack) -> set[tuple[str, ...]]:
        """Lines and functions that stay in the stacks inside of one."""
        inside = (s for s in self.stacks if stack in self._around(s))
        return {stayed[:2] for inner in inside for stayed in inner.stayed}


def _memory(stack: Stack) -> Iterator[str]:
    """Says so, if derived values take more memory than parameters."""
    derived, parameters = stack.derived_per_device, stack.nbytes_per_device
    if derived > parameters:
        yield (
            f"derived values take {si(derived)}B on each device, the parameters "
            f"{si(parameters)}B. If memory is short, hoist less: "
            'setup="marked" with hk_stack.hoist, or setup="inline".'
        )


def _numbers(count: int, nbytes: int) -> list[str]:
    return [f"{count:,}", f"{si(nbytes)}B"]


_TITLES = [
    *("stack", "layer function", "layers", "parameters", "bytes"),
    *("derived", "batch", "loop", "remat"),
]
_HOISTED = "hoisted from|line|function|of each layer|bytes".split("|")
_STAYED = ["stays in", "line", "function", _report.REASON]
_NOTES = ["stack", "its setup"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorder:
    """What `summary` has heard of; of what has one name and shape, once.

    Attributes:
      given: What the model is given.
      stacks: Those that ran, the inner ones before the outer.
      stored: The parameters of the transforms around them.
    """

    given: Tree
    stacks: dict[Hashable, Stack] = dataclasses.field(default_factory=dict)
    stored: dict[Hashable, jax.Array] = dataclasses.field(default_factory=dict)


_recording: Any = jax.make_user_context(None)


@hidden
def summary(fn: Callable[..., Tree], *args: Tree, **kwargs: Tree) -> Summary:
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
      stack  layer function  layers  parameters  bytes  derived  batch  loop  remat
      layers  layer           6       384         1.54 kB  1.54 kB  6   scan  all
      outside of stacks                          18          72 B
      total                                      402         1.61 kB
    <BLANKLINE>
      hoisted from  line           function  of each layer  bytes
      layers        ...3 in layer  expm      float32[8,8]   256 B

    A table of what stays in the loop although it might leave says why, and what to
    write; another says so of setup that runs layer after layer.

    Args:
      fn: What runs the model: the `apply` of a transform, or a function that calls it.
      *args: What `fn` takes: arrays or `jax.ShapeDtypeStruct`s; all else stays as
        it is.
      **kwargs: The same.

    Returns:
      The stacks in the order in which they run, and the number of parameters of the
      transforms that have stacks. What has the same name and shape is counted once.

    Raises:
      TypeError: If `fn` is no function.
      ValueError: If it is an `init`, which has no parameters yet; if it calls no stack.
    """
    _checks.function(fn, "hk_stack.summary")
    _function.check_call(fn, "hk_stack.summary", args, kwargs)
    recorder = _Recorder((args, kwargs))
    with _recording(recorder):
        jax.eval_shape(*_taps.on_arrays(fn, args, kwargs))
    found = list(recorder.stacks.values())
    if not found:
        raise ValueError(
            f"hk_stack.summary: {_checks.name_of(fn)!r} calls no stack, or not with "
            "these arguments. Those of hk.layer_stack are not seen: write "
            "hk_stack.layer_stack, which takes the same arguments."
        )
    paths = [stack.path for stack in found]

    def begun(stack: Stack) -> list[int]:
        """Where a stack and those around it are, which are recorded after it."""
        around = itertools.accumulate(stack.path.split("/"), "{}/{}".format)
        return [paths.index(path) for path in around if path in paths]

    stacks = tuple(sorted(found, key=begun))
    return Summary(stacks, *_size(recorder.stored.values()))


def record(invocation: Invocation, params: Params, cut: Cut | None) -> None:
    """Tells `summary`, if it listens, how a stack runs.

    Args:
      invocation: Of the stack.
      params: The parameters of all layers.
      cut: How its layer was cut; None if it was not.
    """
    recorder: _Recorder | None = _recording.value
    if recorder is None:
        return
    if hk.running_init():
        raise ValueError(
            "hk_stack.summary: expected the apply of a transform, not its init, "
            "as a summary is of parameters that are there. Shapes are enough: "
            "params = jax.eval_shape(model.init, rng, x), then "
            "summary(model.apply, params, rng, x)."
        )
    # Only types, as traced values must not outlive what is traced.
    types = jax.tree.map(jax.typeof, params)
    stack = _stack(invocation, types, cut, recorder.given)
    key = tuple((v.shape, v.dtype) for v in jax.tree.leaves(types))
    recorder.stacks[stack.path, stack.function, key] = stack
    if not _frames.frames():
        stored = jax.tree.map(jax.typeof, hk.experimental.get_params())
        for path, leaf in jax.tree.leaves_with_path(stored):
            recorder.stored[str(path), leaf.shape, leaf.dtype] = leaf


def _stack(
    invocation: Invocation, params: Params, cut: Cut | None, given: Tree
) -> Stack:
    options, around = invocation.options, _frames.frames()
    num_layers, parts = options.num_layers, cut.parts if cut else None
    setups = (parts.shared.jaxpr, parts.setup.jaxpr) if parts else ()
    parameters, nbytes = _size(jax.tree.leaves(params))
    copies = math.prod(frame.num_layers for frame in around)
    share = _share(given, around[0].path if around else invocation.path)
    hoisted = tuple(_report.groups(*setups))
    stayed = _report.stayed(cut.parts, cut.inputs, options.setup) if cut else ()
    own = here = num_layers // invocation.num_stages
    batches, whole = _parts.Batches(0), min(1.0, share * invocation.num_stages)
    unspread = ""
    if parts and parts.setup.jaxpr.outvars:
        devices = _spread.in_force(options.setup_sharding, invocation.where)
        unspread = devices.why_not(parts.setup.jaxpr, own) if devices else ""
        if devices and not unspread:  # All devices are handed the whole of it.
            whole, own = 1.0, devices.share(own)
        asked = options.setup_batch_size
        batches = _parts.batches(parts.setup.jaxpr, own, asked)
    size, remat = min(batches.size, own), options.setup_remat
    return Stack(
        invocation.path,
        _checks.name_of(invocation.situation.f),
        num_layers,
        copies * parameters,
        copies * nbytes,
        round(_derived(parts, num_layers, 1.0)),
        round(share * copies * nbytes),
        round(_derived(parts, here, whole)),
        hoisted,
        invocation.loop,
        _loop.describe(options.remat if parts else None),
        stayed,
        size,
        bool(size) and (size < own if remat is None else remat),
        tuple(_notes(invocation, batches, unspread, bool(hoisted or stayed))),
    )


def _notes(
    invocation: Invocation, batches: _parts.Batches, unspread: str, has_setup: bool
) -> Iterator[str]:
    """What to know of how setup runs, or why there is none."""
    options = invocation.options
    if invocation.loop == "python":
        is_own = options.loop == "python"
        what = 'loop="python"' if is_own else "use_loop or HK_STACK_LOOP"
        yield f"{what} runs the layer function as it is, and hoists nothing"
    elif not has_setup:
        yield "none: nothing dear in the layer is made of parameters alone"
    elif batches.why and options.num_layers > invocation.num_stages:
        why = f"runs layer after layer, as {batches.why}"
        yield f"{why}: {batches.write}" if batches.write else why
    if pipeline := options.pipeline:
        count, stages = pipeline.microbatches, invocation.num_stages
        own = options.num_layers // stages
        share = f"{stages} stages of {own} layer{'s' if own > 1 else ''} each"
        how = share if stages > 1 else "no mesh axis for stages, so in turn"
        yield f"pipeline={pipeline.axis!r}: {count} microbatches, {how}"
    if unspread:
        yield f"setup_sharding does nothing, as {unspread}"


def _share(given: Tree, stack: str) -> float:
    """Which part of the parameters of a stack, by its path, is on each device."""
    leaves = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(given)
        if any(str(getattr(k, "key", "")).startswith(f"{stack}/") for k in path)
    ]
    own = sum(map(_bytes_per_device, leaves))
    return own / _size(leaves)[1] if own else 1.0


def _bytes_per_device(leaf: jax.Array) -> int:
    sharding: Any = getattr(leaf, "sharding", None)
    shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def _derived(parts: Parts | None, num_layers: int, share: float) -> float:
    """Bytes of what the call is handed, if devices have this share of parameters.

    What is made of gathered values is whole on each device.
    """
    if not parts:
        return 0.0

    def sizes(jaxpr: jex.Jaxpr) -> list[float]:
        made = zip(jaxpr.outvars, _cost.gathered(jaxpr), strict=True)
        return [_cost.nbytes([v]) * (1.0 if whole else share) for v, whole in made]

    shared, own = sizes(parts.shared.jaxpr), sizes(parts.setup.jaxpr)
    return sum(shared[: parts.num_shared]) + num_layers * sum(own)


def _size(leaves: Iterable[jax.Array]) -> tuple[int, int]:
    """How many numbers arrays hold, and bytes."""
    leaves = list(leaves)
    return sum(leaf.size for leaf in leaves), sum(map(_cost.bytes_of, leaves))
