"""What is compared: the models, and what a framework's file must provide.

Each model is `L` blocks, `[B, T, D] -> [B, T, D]`. Mathematics that no framework has is
here and in `s4`, modules are in the file of each framework, `in_*.py`:

| model | setup | call |
|---|---|---|
| `s4` | a convolution kernel; to decode, a discretised system | FFTs, a linear layer |
| `recurrence` | a kernel made by `T` small steps in sequence | FFTs |
| `transformer` | none | causal attention, MLP |
| `spectral` | the largest singular value of two matrices, by iteration | an MLP |
| `mlp` | none | layer norm, MLP |

To add a framework, add a file `in_NAME.py` with

- `WAYS`, the names of its ways to stack layers;
- `stack(way, model, num_layers, params, x) -> Stack`;
- `decoder(way, model, num_layers, params, x) -> Decoder`, for models that decode.

They are given the parameters of Haiku's stack,
`{"layers/block/...": {name: [L, ...]}}`, and take them over. Both return None for what
does not make sense in that way. If the framework is not installed, the import of the
file fails with an `ImportError` that says how to install it.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any
States = Any


class Model(NamedTuple):
    """A model that all frameworks have.

    Attributes:
      name: Its key in `MODELS`.
      width: Number of features, `D`.
      options: Arguments of its block.
      dtypes: Those that it can be run in.
      decodes: Whether it can run one step of time.
    """

    name: str
    width: int
    options: Mapping[str, Any]
    dtypes: tuple[str, ...]
    decodes: bool = False


_WITHOUT_FFT = ("bfloat16", "float32", "float64")
_WITH_FFT = ("float32", "float64")  # There is no FFT of half precision.

MODELS = {
    model.name: model
    for model in (
        Model("s4", 64, {"state_size": 32}, _WITH_FFT, decodes=True),
        Model("recurrence", 16, {"state_size": 64}, _WITH_FFT),
        Model("transformer", 64, {"num_heads": 4}, _WITHOUT_FFT),
        Model("spectral", 64, {"iterations": 10}, _WITHOUT_FFT),
        Model("mlp", 64, {}, _WITHOUT_FFT),
    )
}


class Stack(NamedTuple):
    """A model stacked in one way, as pure functions of its parameters.

    Attributes:
      params: In the framework's own tree, or derived values.
      apply: `(params, x [B, T, D]) -> y [B, T, D]`.
      init: `(key, x) -> params`; None if there is nothing to initialise.
      to_haiku: A tree like `params` as the parameters of Haiku's stack; None if
        `params` are derived values, of which no gradient is compared.
    """

    params: Params
    apply: Callable[[Params, jax.Array], jax.Array]
    init: Callable[[jax.Array, jax.Array], Params] | None
    to_haiku: Callable[[Params], Params] | None


class Decoder(NamedTuple):
    """One step of time of a model.

    Attributes:
      known: Parameters, or derived values.
      step: `(known, x [B, D], states) -> (y [B, D], states)`.
      states: The states before the first step.
    """

    known: Params
    step: Callable[[Params, jax.Array, States], tuple[jax.Array, States]]
    states: States


def framework_names() -> list[str]:
    """The names of all frameworks, installed or not."""
    import hk_stack.compare as package

    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(name[3:] for name in found if name.startswith("in_"))


def framework(name: str) -> ModuleType:
    """The file of a framework.

    Raises:
      ImportError: If the framework is not installed; says how to.
    """
    return importlib.import_module(f"hk_stack.compare.in_{name}")


def types(tree: Any, dtype: Any = None) -> Any:
    """Shapes and dtypes of the leaves of a tree; with `dtype`, all of that one."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), tree
    )


def recurrence_kernel(decay: jax.Array, b: jax.Array, length: int) -> jax.Array:
    """`K[t] = sum_n sigmoid(decay_n)^t b_n` `[T]`, term after term, from `[N]`."""
    rate = jax.nn.sigmoid(decay)
    _, kernel = jax.lax.scan(
        lambda state, _: (state * rate, jnp.sum(state)), b, length=length
    )
    return kernel


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Causal convolution of each feature of `x` `[B, T, D]` with `kernel` `[T]`."""
    length = x.shape[1]
    spectrum = jnp.fft.rfft(kernel, n=2 * length)[None, :, None]
    y = jnp.fft.irfft(jnp.fft.rfft(x, n=2 * length, axis=1) * spectrum, axis=1)
    return y[:, :length]


def normalised(w: jax.Array, iterations: int) -> jax.Array:
    """`w` `[n, m]` over its largest singular value, found by power iteration.

    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018,
    https://arxiv.org/abs/1802.05957; from a fixed vector, hence without state.
    """
    v = jnp.full((w.shape[1],), w.shape[1] ** -0.5, w.dtype)
    for _ in range(iterations):
        u = _unit(w @ v)
        v = _unit(u @ w)
    return w / (u @ (w @ v))


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x) + jnp.asarray(1e-12, x.dtype))
