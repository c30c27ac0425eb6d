"""The models in plain JAX: what one writes by hand, without a framework.

Works on the parameters of `in_haiku`'s stacks (without dropout), a tree with leading
layer axis `[L, ...]`. `scan_inside` runs every layer's setup inside the loop;
`setup_first` runs all setups at once before it, `setup_layer_by_layer` one after the
other: what an automatic cut is to be measured against. To reuse the derived values,
call `setup` once and `call` often.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hk_stack.compare import models, s4

Leaves = Mapping[str, jax.Array]
Params = Mapping[str, Leaves]


class Block(NamedTuple):
    """One layer, cut by hand.

    Attributes:
      setup: From the parameters of one layer and `T` to its derived values.
      call: From derived values, parameters and `x` `[B, T, D]` to `[B, T, D]`.
    """

    setup: Callable[[Params, int], Any]
    call: Callable[[Any, Params, jax.Array], jax.Array]


def s4_block(mode: str = "convolution") -> Block:
    """A layer of S4 by one of `s4.KERNELS`."""

    def setup(params: Params, length: int) -> jax.Array:
        system = s4.dplr(params["layers/block/s4"])
        return s4.spectrum(s4.KERNELS[mode](system, length))

    def call(spectrum: jax.Array, params: Params, x: jax.Array) -> jax.Array:
        parts = _parts(models.s4_parts(0, 0), params)
        u = parts.norm(x)
        y = s4.convolve_spectrum(u, spectrum) + _row(parts.s4["d"], u) * u
        return x + models.gated(parts, y)

    return Block(setup, call)


S4 = s4_block()


def scan_inside(params: Params, x: jax.Array, block: Block = S4) -> jax.Array:
    """The stack with setup inside the loop, `[B, T, D] -> [B, T, D]`.

    Args:
      params: of a stack of `in_haiku`.
      x: activations.
      block: one layer; that of S4 by default.
    """

    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return block.call(block.setup(params, x.shape[1]), params, x), None

    return jax.lax.scan(layer, x, params)[0]


def setup_first(params: Params, x: jax.Array, block: Block = S4) -> jax.Array:
    """The stack with setup before the loop; arguments as of `scan_inside`."""
    return call(setup(params, x.shape[1], block), params, x, block)


def setup_layer_by_layer(params: Params, x: jax.Array, block: Block = S4) -> jax.Array:
    """As `setup_first`, but one layer's setup at a time, recomputed for gradients."""
    one = jax.checkpoint(lambda params: block.setup(params, x.shape[1]))
    return call(jax.lax.map(one, params), params, x, block)


def checkpointed(
    params: Params, x: jax.Array, block: Block = S4, group: int = 1
) -> jax.Array:
    """As `scan_inside`; gradients compute each layer again, and groups before.

    Args:
      params: of a stack of `in_haiku`.
      x: activations.
      block: one layer; that of S4 by default.
      group: layers in a group, a divisor of their number.
    """
    again = functools.partial(jax.checkpoint, prevent_cse=False)

    @again
    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return block.call(block.setup(params, x.shape[1]), params, x), None

    def layers(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return jax.lax.scan(layer, x, params)

    if group == 1:
        return layers(x, params)[0]
    folded = jax.tree.map(lambda leaf: leaf.reshape(-1, group, *leaf.shape[1:]), params)
    return jax.lax.scan(again(layers), x, folded)[0]


def setup(params: Params, length: int, block: Block = S4) -> Any:
    """All layers' derived values `[L, ...]`; for S4, spectra `[L, D, T + 1]`.

    Args:
      params: of a stack of `in_haiku`.
      length: number of samples, `T`.
      block: one layer; that of S4 by default.
    """
    return jax.vmap(lambda params: block.setup(params, length))(params)


def call(derived: Any, params: Params, x: jax.Array, block: Block = S4) -> jax.Array:
    """The rest of the stack: `x` `[B, T, D]`, `derived` as made by `setup`."""

    def layer(x: jax.Array, scanned: tuple[Any, Params]) -> tuple[jax.Array, None]:
        return block.call(*scanned, x), None

    return jax.lax.scan(layer, x, (derived, params))[0]


def _recurrence(model: models.Model) -> Block:
    def setup(params: Params, length: int) -> jax.Array:
        return models.recurrence_kernel(**params["layers/block"], length=length)

    def call(kernel: jax.Array, params: Params, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(models.convolve(x, kernel))

    return Block(setup, call)


def _spectral(model: models.Model) -> Block:
    def setup(params: Params, length: int) -> Params:
        return {
            f"layers/block/{name}": {
                "w": models.normalised(params[f"layers/block/{name}"]["w"])
            }
            for name in model.parts
        }

    def call(derived: Params, params: Params, x: jax.Array) -> jax.Array:
        known = {name: {**params[name], **derived[name]} for name in params}
        return model.block(_parts(model.parts, known), x)

    return Block(setup, call)


def _without_setup(model: models.Model) -> Block:
    def call(derived: Any, params: Params, x: jax.Array) -> jax.Array:
        return model.block(_parts(model.parts, params), x)

    return Block(_no_setup, call)


def _no_setup(params: Params, length: int) -> tuple[()]:
    del params, length
    return ()


def _parts(parts: Mapping[str, models.Part], params: Params) -> Any:
    """Parts of a block as functions, from its parameters; weights as they are."""
    prefix = "layers/block/"
    made: dict[str, Any] = dict(params.get("layers/block", {}))
    for name, part in parts.items():
        if part.kind == "attention":
            made[name] = {key: params[f"{prefix}{name}/{key}"] for key in _HEADS}
        elif part.kind != "vector":
            made[name] = params[f"{prefix}{name}"]
    return models.bound(parts, made, _RUN)


_HEADS = ("query", "key", "value", "linear")


def _attention(part: models.Part, params: Params, h: jax.Array) -> jax.Array:
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


def _linear(part: models.Part, params: Leaves, x: jax.Array) -> jax.Array:
    return x @ params["w"] + _row(params["b"], x)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, range(like.ndim - 1))


def _layer_norm(part: models.Part, params: Leaves, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.var(x, -1, keepdims=True)
    scale, offset = _row(params["scale"], x), _row(params["offset"], x)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale + offset


_RUN: dict[str, Callable[..., jax.Array]] = {
    "norm": _layer_norm,
    "linear": _linear,
    "attention": _attention,
    "spectral": _linear,
}


# What `models` asks of a framework

WAYS = ("scan", "split", "reused")
WAYS_OF: dict[str, tuple[str, ...]] = {
    "eager": (),
    "grad": ("scan", "split", "layer by layer"),
    "setup": ("scan", "split", "layer by layer"),
    "remat": ("scan", "checkpoint", "checkpoint, groups"),
}
_BLOCKS: dict[str, Callable[[models.Model], Block]] = {
    "s4": lambda model: S4,
    "s4_terms": lambda model: s4_block("term by term"),
    "recurrence": _recurrence,
    "spectral": _spectral,
}
_RUNS: dict[str, Callable[..., jax.Array]] = {
    "scan": scan_inside,
    "split": setup_first,
    "layer by layer": setup_layer_by_layer,
    "checkpoint": checkpointed,
    "checkpoint, groups": checkpointed,
}
_NEED_SETUP = ("split", "layer by layer", "reused")


def stack(way: str, given: models.Given) -> models.Stack | None:
    """The blocks in `jax.lax.scan`, with setup inside, before, or done already."""
    model, num_layers, params, x = given
    block = _BLOCKS.get(model.name, _without_setup)(model)
    if way in _NEED_SETUP and block.setup is _no_setup:
        return None
    if way == "reused":
        known = setup(params, x.shape[1], block), params
        return models.Stack(
            known, lambda known, x: call(known[0], known[1], x, block), None, None
        )
    apply = functools.partial(_RUNS[way], block=block)
    if way == "checkpoint, groups":
        sizes = range(1, math.isqrt(num_layers) + 1)
        group = max(size for size in sizes if num_layers % size == 0)
        apply = functools.partial(apply, group=group)
    return models.Stack(params, apply, None, lambda params: params)


def decoder(way: str, given: models.Given) -> models.Decoder:
    """The S4 blocks, one step of time."""
    model, _, params, x = given
    length = x.shape[1]
    states = given.states

    def setup(params: Params) -> s4.Recurrence:
        return s4.discretise(s4.dplr(params["layers/block/s4"]), length)

    def layer(x: jax.Array, scanned: Any) -> tuple[jax.Array, jax.Array]:
        known, params, state = scanned
        parts = _parts(model.parts, params)
        u = parts.norm(x)
        state, y = s4.step(setup(params) if known is None else known, state, u)
        return x + models.gated(parts, y + _row(parts.s4["d"], u) * u), state

    def step(known: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return jax.lax.scan(layer, x, (*known, states))

    def split(known: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return step((jax.vmap(setup)(known[1]), known[1]), x, states)

    if way == "reused":
        return models.Decoder((jax.vmap(setup)(params), params), step, states)
    return models.Decoder((None, params), split if way == "split" else step, states)
