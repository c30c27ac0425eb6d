"""The models in plain JAX: what one writes by hand, without a framework.

Works on the parameters of `in_haiku`'s stacks (without dropout), a tree with leading
layer axis `[L, ...]`. The cut into setup and call is made by hand as well, which is
what an automatic cut is to be measured against.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hk_stack.compare import models, s4
from hk_stack.compare.models import Model, Part

Leaves = Mapping[str, jax.Array]
Params = Mapping[str, Leaves]
# By the names of parts; of one layer, or stacked.
Derived = dict[str, Any]


def scan(
    model: Model, params: Params, x: jax.Array, *states: jax.Array, length: int = 0
) -> Any:
    """The stack with setup inside the loop, `[B, T, D] -> [B, T, D]`.

    With states, one step of time, `[B, D] -> [B, D]`, as of sequences of that `length`.
    """

    def layer(params: Params, x: jax.Array, *state: jax.Array) -> Any:
        derived = _derived(model, params, length or x.shape[1], bool(state))
        return _call(model, derived, params, x, *state)

    return models.scan(layer, x, params, *states)


def split(
    model: Model, params: Params, x: jax.Array, *states: jax.Array, length: int = 0
) -> Any:
    """`scan` with the setup of all layers at once, before the loop."""
    derived = setup(model, params, length or x.shape[1], bool(states))
    return call(model, (derived, params), x, *states)


def setup(model: Model, params: Params, length: int, decodes: bool = False) -> Derived:
    """All layers' derived values; for S4, its spectra `[L, D, T + 1]` and `d`."""
    return jax.vmap(lambda params: _derived(model, params, length, decodes))(params)


def call(
    model: Model, known: tuple[Derived, Params], x: jax.Array, *states: jax.Array
) -> Any:
    """The rest of the stack, from what `setup` made and parameters."""

    def layer(known: tuple[Derived, Params], *args: jax.Array) -> Any:
        return _call(model, *known, *args)

    return models.scan(layer, x, known, *states)


def _layer_by_layer(model: Model, params: Params, x: jax.Array) -> Any:
    """As `split`, but one layer's setup at a time, computed again for gradients."""
    one = jax.checkpoint(lambda params: _derived(model, params, x.shape[1]))
    return call(model, (jax.lax.map(one, params), params), x)


def _checkpointed(
    model: Model, params: Params, x: jax.Array, in_groups: bool = False
) -> jax.Array:
    """As `scan`; gradients compute each layer again, and groups of layers before."""
    again = functools.partial(jax.checkpoint, prevent_cse=False)

    @again
    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return _call(model, _derived(model, params, x.shape[1]), params, x), None

    def layers(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return jax.lax.scan(layer, x, params)

    if not in_groups:
        return layers(x, params)[0]
    num_layers = len(jax.tree.leaves(params)[0])
    sizes = range(1, math.isqrt(num_layers) + 1)
    group = max(size for size in sizes if num_layers % size == 0)
    folded = jax.tree.map(lambda leaf: leaf.reshape(-1, group, *leaf.shape[1:]), params)
    return jax.lax.scan(again(layers), x, folded)[0]


# One layer


def _derived(
    model: Model, params: Params, length: int, decodes: bool = False
) -> Derived:
    """Setup: what is known of parts besides, or instead of, their parameters."""
    made = _named(model, params)
    if model.name == "recurrence":
        return {"kernel": models.recurrence_kernel(**made, length=length)}
    run = _SETUP_TO_DECODE if decodes else _SETUP
    return {
        name: run[part.kind](part, made[name], length)
        for name, part in model.parts.items()
        if part.kind in run
    }


def _call(
    model: Model, derived: Derived, params: Params, x: jax.Array, *state: jax.Array
) -> Any:
    if "kernel" in derived:
        return models.recurrence_call(derived["kernel"], x)
    made = _named(model, params)
    made |= {name: {**made[name], **known} for name, known in derived.items()}
    return model.run(models.bound(model.parts, made, _RUN), x, *state)


def _named(model: Model, params: Params) -> dict[str, Any]:
    """The parameters of a layer by the names of parts."""
    block = "layers/block"
    made: dict[str, Any] = dict(params.get(block, {}))
    for name, part in model.parts.items():
        if part.kind == "attention":
            made[name] = {head: params[f"{block}/{name}/{head}"] for head in _HEADS}
        elif part.kind != "vector":
            made[name] = params[f"{block}/{name}"]
    return made


_HEADS = ("query", "key", "value", "linear")


def _attention(part: Part, params: Params, h: jax.Array) -> jax.Array:
    heads = int(part.other)
    q, k, v = (
        _linear(part, params[name], h).reshape(*h.shape[:-1], heads, -1)
        for name in _HEADS[:3]
    )
    logits = jnp.einsum("bthd,bThd->bhtT", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tri(h.shape[1], dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
    y = jnp.einsum("bhtT,bThd->bthd", weights, v).reshape(h.shape)
    return _linear(part, params["linear"], y)


def _linear(part: Part, params: Leaves, x: jax.Array) -> jax.Array:
    return x @ params["w"] + _row(params["b"], x)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, range(like.ndim - 1))


def _layer_norm(part: Part, params: Leaves, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.var(x, -1, keepdims=True)
    scale, offset = _row(params["scale"], x), _row(params["offset"], x)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale + offset


def _spectral_setup(part: Part, params: Leaves, length: int) -> Leaves:
    return {"w": models.normalised(params["w"]), "b": params["b"]}


def _s4_setup(part: Part, params: Leaves, length: int) -> Leaves:
    kernel = s4.KERNELS[part.mode](s4.dplr(params), length)
    return {"spectrum": s4.spectrum(kernel), "d": params["d"]}


def _s4_setup_to_decode(part: Part, params: Leaves, length: int) -> Derived:
    return {"system": s4.discretise(s4.dplr(params), length)}


def _s4(part: Part, known: Derived, u: jax.Array, state: Any = None) -> Any:
    if state is None:
        y = s4.convolve_spectrum(u, known["spectrum"])
        return y + _row(known["d"], u) * u
    state, y = s4.step(known["system"], state, u)
    return y + _row(known["d"], u) * u, state


_SETUP: dict[str, Callable[[Part, Leaves, int], Leaves]] = {
    "s4": _s4_setup,
    "spectral": _spectral_setup,
}
_SETUP_TO_DECODE = {"s4": _s4_setup_to_decode}
_RUN: dict[str, Callable[..., Any]] = {
    "norm": _layer_norm,
    "linear": _linear,
    "attention": _attention,
    "spectral": _linear,
    "s4": _s4,
}


# What `models` asks of a framework

WAYS = ("scan", "split", "reused")
WAYS_OF: dict[str, tuple[str, ...]] = {
    "eager": (),
    "grad": ("scan", "split", "layer by layer"),
    "setup": ("scan", "split", "layer by layer"),
    "remat": ("scan", "checkpoint", "checkpoint, groups"),
}
_RUNS: dict[str, Callable[..., Any]] = {
    "scan": scan,
    "split": split,
    "layer by layer": _layer_by_layer,
    "checkpoint": _checkpointed,
    "checkpoint, groups": functools.partial(_checkpointed, in_groups=True),
}


def stack(way: str, given: models.Given) -> models.Stack:
    """The blocks in `jax.lax.scan`, with setup inside, before, or done already."""
    model, params = given.model, given.params
    if way == "reused":
        known = setup(model, params, given.x.shape[1], given.decodes), params
        return models.Stack(known, functools.partial(call, model))
    options = {"length": given.length} if given.decodes else {}
    return models.Stack(params, functools.partial(_RUNS[way], model, **options))
