"""The models in plain JAX: what one writes by hand, without a framework.

Works on the parameters of `in_haiku`'s stacks (without dropout), a tree with leading
layer axis `[L, ...]`. `scan_inside` runs every layer's setup inside the loop;
`setup_first` runs all setups at once before it, `setup_layer_by_layer` one after the
other: what an automatic cut is to be measured against. To reuse the derived values,
call `setup` once and `call` often.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hk_stack.compare import in_haiku, models, s4

Params = Mapping[str, Mapping[str, jax.Array]]


class Block(NamedTuple):
    """One layer, cut by hand.

    Attributes:
      setup: From the parameters of one layer and `T` to its derived values.
      call: From derived values, parameters and `x` `[B, T, D]` to `[B, T, D]`.
    """

    setup: Callable[[Params, int], Any]
    call: Callable[[Any, Params, jax.Array], jax.Array]


def scan_inside(params: Params, x: jax.Array, block: Block | None = None) -> jax.Array:
    """The stack with setup inside the loop, `[B, T, D] -> [B, T, D]`.

    Args:
      params: of a stack of `in_haiku`.
      x: activations.
      block: one layer; that of S4 by default.
    """
    block = block or S4

    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return block.call(block.setup(params, x.shape[1]), params, x), None

    return jax.lax.scan(layer, x, params)[0]


def setup_first(params: Params, x: jax.Array, block: Block | None = None) -> jax.Array:
    """The stack with setup before the loop; arguments as of `scan_inside`."""
    return call(setup(params, x.shape[1], block), params, x, block)


def setup_layer_by_layer(params: Params, x: jax.Array) -> jax.Array:
    """As `setup_first`, but one layer's setup at a time, recomputed for gradients."""
    one = jax.checkpoint(lambda params: S4.setup(params, x.shape[1]))
    return call(jax.lax.map(one, params), params, x)


def setup(params: Params, length: int, block: Block | None = None) -> Any:
    """All layers' derived values `[L, ...]`; for S4, spectra `[L, D, T + 1]`.

    Args:
      params: of a stack of `in_haiku`.
      length: number of samples, `T`.
      block: one layer; that of S4 by default.
    """
    block = block or S4
    return jax.vmap(lambda params: block.setup(params, length))(params)


def call(
    derived: Any, params: Params, x: jax.Array, block: Block | None = None
) -> jax.Array:
    """The rest of the stack: `x` `[B, T, D]`, `derived` as made by `setup`."""
    block = block or S4

    def layer(x: jax.Array, scanned: tuple[Any, Params]) -> tuple[jax.Array, None]:
        return block.call(*scanned, x), None

    return jax.lax.scan(layer, x, (derived, params))[0]


def s4_block(mode: str = "convolution") -> Block:
    """A layer of S4 by one of `s4.KERNELS`."""

    def setup(params: Params, length: int) -> jax.Array:
        system = s4.dplr(params["layers/block/s4"])
        return s4.spectrum(s4.KERNELS[mode](system, length))

    def call(spectrum: jax.Array, params: Params, x: jax.Array) -> jax.Array:
        u = _layer_norm(params["layers/block/norm"], x)
        return x + _gated(s4.convolve_spectrum(u, spectrum), u, params)

    return Block(setup, call)


S4 = s4_block()


def _gated(y: jax.Array, u: jax.Array, params: Params) -> jax.Array:
    h = jax.nn.gelu(y + _row(params["layers/block/s4"]["d"], u) * u)
    return jax.nn.glu(_linear(params["layers/block/gate"], h))


def _recurrence() -> Block:
    def setup(params: Params, length: int) -> jax.Array:
        return models.recurrence_kernel(**params["layers/block"], length=length)

    def call(kernel: jax.Array, params: Params, x: jax.Array) -> jax.Array:
        del params
        return x + jnp.tanh(models.convolve(x, kernel))

    return Block(setup, call)


def _transformer(num_heads: int) -> Block:
    def heads(params: Mapping[str, jax.Array], h: jax.Array) -> jax.Array:
        y = _linear(params, h)
        return y.reshape(*y.shape[:-1], num_heads, -1)

    def call(_: Any, params: Params, x: jax.Array) -> jax.Array:
        h = _layer_norm(params["layers/block/attention_norm"], x)
        q, k, v = (
            heads(params[f"layers/block/attention/{name}"], h)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bthd,bThd->bhtT", q, k) / q.shape[-1] ** 0.5
        mask = jnp.tri(x.shape[1], dtype=bool)[None, None]
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
        h = jnp.einsum("bhtT,bThd->bthd", weights, v).reshape(x.shape)
        x = x + _linear(params["layers/block/attention/linear"], h)
        h = _layer_norm(params["layers/block/mlp_norm"], x)
        h = jax.nn.gelu(_linear(params["layers/block/mlp_in"], h))
        return x + _linear(params["layers/block/mlp_out"], h)

    return Block(_no_setup, call)


def _spectral(iterations: int) -> Block:
    names = ("layers/block/up", "layers/block/down")

    def setup(params: Params, length: int) -> list[jax.Array]:
        del length
        return [models.normalised(params[name]["w"], iterations) for name in names]

    def call(derived: list[jax.Array], params: Params, x: jax.Array) -> jax.Array:
        up, down = (
            {"w": w, "b": params[name]["b"]}
            for name, w in zip(names, derived, strict=True)
        )
        return x + _linear(down, jax.nn.gelu(_linear(up, x)))

    return Block(setup, call)


def _mlp() -> Block:
    def call(_: Any, params: Params, x: jax.Array) -> jax.Array:
        h = _layer_norm(params["layers/block/norm"], x)
        h = jax.nn.gelu(_linear(params["layers/block/up"], h))
        return x + _linear(params["layers/block/down"], h)

    return Block(_no_setup, call)


def _no_setup(params: Params, length: int) -> tuple[()]:
    del params, length
    return ()


def _linear(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["w"] + _row(params["b"], x)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, range(like.ndim - 1))


def _layer_norm(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.var(x, -1, keepdims=True)
    scale, offset = _row(params["scale"], x), _row(params["offset"], x)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale + offset


# What `models` asks of a framework

WAYS = ("scan", "split", "reused")

_BLOCKS: dict[str, Callable[..., Block]] = {
    "s4": lambda state_size: S4,
    "recurrence": lambda state_size: _recurrence(),
    "transformer": _transformer,
    "spectral": _spectral,
    "mlp": _mlp,
}


def stack(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Stack | None:
    """The blocks in `jax.lax.scan`, with setup inside, before, or done already."""
    del num_layers
    block = _BLOCKS[model.name](**model.options)
    if way != "scan" and block.setup is _no_setup:
        return None
    if way == "reused":
        derived = setup(params, x.shape[1], block)
        return models.Stack(
            (derived, params),
            lambda known, x: call(known[0], known[1], x, block),
            None,
            None,
        )
    run = scan_inside if way == "scan" else setup_first
    apply = functools.partial(run, block=block)
    return models.Stack(params, apply, None, lambda params: params)


def decoder(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Decoder:
    """The S4 blocks, one step of time."""
    length = x.shape[1]
    states = in_haiku.states(model, num_layers, x)

    def setup(params: Params) -> s4.Recurrence:
        return s4.discretise(s4.dplr(params["layers/block/s4"]), length)

    def layer(x: jax.Array, scanned: Any) -> tuple[jax.Array, jax.Array]:
        known, params, state = scanned
        system = setup(params) if known is None else known
        u = _layer_norm(params["layers/block/norm"], x)
        state, y = s4.step(system, state, u)
        return x + _gated(y, u, params), state

    def step(known: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return jax.lax.scan(layer, x, (*known, states))

    def split(known: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return step((jax.vmap(setup)(known[1]), known[1]), x, states)

    if way == "reused":
        return models.Decoder((jax.vmap(setup)(params), params), step, states)
    return models.Decoder((None, params), split if way == "split" else step, states)
