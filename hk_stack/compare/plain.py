"""The stack of S4 blocks in plain JAX: what one writes by hand without a framework.

Works on the parameters of `in_haiku.s4_stack` (LayerNorm, no dropout), a tree with
leading layer axis `[L, ...]`. `scan_inside` runs every layer's setup inside the loop;
`setup_first` runs all setups at once before it, `setup_layer_by_layer` one after the
other: what an automatic cut is to be measured against. To reuse the derived values,
call `setup` once and `call` often.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from hk_stack.compare import s4

Params = Mapping[str, Mapping[str, jax.Array]]


def scan_inside(params: Params, x: jax.Array) -> jax.Array:
    """The stack with setup inside the loop, `[B, T, D] -> [B, T, D]`."""

    def layer(x: jax.Array, params: Params) -> tuple[jax.Array, None]:
        return _layer_call(_layer_setup(params, x.shape[1]), params, x), None

    return jax.lax.scan(layer, x, params)[0]


def setup_first(params: Params, x: jax.Array) -> jax.Array:
    """The stack with setup before the loop, `[B, T, D] -> [B, T, D]`."""
    return call(setup(params, x.shape[1]), params, x)


def setup_layer_by_layer(params: Params, x: jax.Array) -> jax.Array:
    """As `setup_first`, but one layer's setup at a time, recomputed for gradients."""
    one = jax.checkpoint(lambda params: _layer_setup(params, x.shape[1]))
    return call(jax.lax.map(one, params), params, x)


def setup(params: Params, length: int, mode: str = "convolution") -> jax.Array:
    """All kernels' spectra `[L, D, T + 1]`, from parameters `[L, ...]`.

    Args:
      params: of an `in_haiku.s4_stack`.
      length: number of samples, `T`.
      mode: which of `s4.KERNELS` to compute.
    """
    return jax.vmap(lambda params: _layer_setup(params, length, mode))(params)


def call(derived: jax.Array, params: Params, x: jax.Array) -> jax.Array:
    """The rest of the stack: `x` `[B, T, D]`, `derived` as made by `setup`."""

    def layer(
        x: jax.Array, scanned: tuple[jax.Array, Params]
    ) -> tuple[jax.Array, None]:
        return _layer_call(*scanned, x), None

    return jax.lax.scan(layer, x, (derived, params))[0]


def _layer_setup(params: Params, length: int, mode: str = "convolution") -> jax.Array:
    system = s4.dplr(params["layers/block/s4"])
    return s4.spectrum(s4.KERNELS[mode](system, length))


def _layer_call(spectrum: jax.Array, params: Params, x: jax.Array) -> jax.Array:
    d, gate = params["layers/block/s4"]["d"], params["layers/block/gate"]
    u = _layer_norm(params["layers/block/norm"], x)
    h = jax.nn.gelu(s4.convolve_spectrum(u, spectrum) + d[None, None] * u)
    return x + jax.nn.glu(h @ gate["w"] + gate["b"][None, None])


def _layer_norm(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.var(x, -1, keepdims=True)
    scale, offset = params["scale"][None, None], params["offset"][None, None]
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale + offset
