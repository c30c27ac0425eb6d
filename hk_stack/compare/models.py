"""What is compared: the models, and what a framework's file must provide.

Each model is `L` blocks, `[B, T, D] -> [B, T, D]`. Mathematics that no framework has is
here and in `s4`, modules are in the file of each framework, `in_*.py`:

| model | setup | call |
|---|---|---|
| `s4` | a convolution kernel; to decode, a discretised system | FFTs, a linear layer |
| `s4_terms` | the same, computed as most published code does, at more cost | as `s4` |
| `recurrence` | a kernel made by `T` small steps in sequence | FFTs |
| `transformer` | none | causal attention, MLP |
| `spectral` | the largest singular value of two matrices, by iteration | an MLP |
| `mlp` | none | layer norm, MLP |
| `shapes` | sums of 24 parameters, each of another shape, for `init` | an addition |

A framework makes the *parts* of a block and stacks blocks. To add one, add a file
`in_NAME.py` with

- `WAYS`, the names of its ways to stack layers, and `WAYS_OF`, those of modes that have
  others;
- `stack(way, given) -> Stack`;
- `decoder(way, given) -> Decoder`, for models that decode.

They are given the parameters of Haiku's stack,
`{"layers/block/...": {name: [L, ...]}}`, and take them over. Both return None for what
does not make sense in that way. If the framework is not installed, the import of the
file fails with an `ImportError` that says how to install it.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hk_stack.compare import s4

Params = Any
States = Any
Dropout = Callable[[int, jax.Array], jax.Array]


class Part(NamedTuple):
    """A part of a block. Its kind is one of these.

    - "norm": a layer norm of `size` features;
    - "linear", "spectral": from `size` features to `other`, the latter with weights
      `normalised`;
    - "attention": causal self-attention of `size` features, with `other` heads;
    - "s4": the parameters of S4 by name, for `size` features with `other` states;
    - "vector": a parameter `[size]`, normal at first, `other` its deviation.
    """

    kind: str
    size: int
    other: float = 0


def s4_parts(width: int, state_size: int) -> dict[str, Part]:
    """The parts of `s4_block`."""
    return {
        "norm": Part("norm", width),
        "s4": Part("s4", width, state_size),
        "gate": Part("linear", width, 2 * width),
    }


def transformer_parts(width: int, num_heads: int) -> dict[str, Part]:
    """The parts of `transformer_block`."""
    return {
        "attention_norm": Part("norm", width),
        "attention": Part("attention", width, num_heads),
        "mlp_norm": Part("norm", width),
        "mlp_in": Part("linear", width, 4 * width),
        "mlp_out": Part("linear", 4 * width, width),
    }


def _recurrence_parts(width: int) -> dict[str, Part]:
    del width
    return {"decay": Part("vector", 64, 1.0), "b": Part("vector", 64, 0.01)}


def _spectral_parts(width: int) -> dict[str, Part]:
    up, down = Part("spectral", width, 4 * width), Part("spectral", 4 * width, width)
    return {"up": up, "down": down}


def _mlp_parts(width: int) -> dict[str, Part]:
    up, down = Part("linear", width, 4 * width), Part("linear", 4 * width, width)
    return {"norm": Part("norm", width), "up": up, "down": down}


def _shapes_parts(width: int) -> dict[str, Part]:
    del width
    sizes = ((8 + i) * (16 + 2 * i) for i in range(24))
    return {f"w{i}": Part("vector", size, 0.1) for i, size in enumerate(sizes)}


# Blocks: `parts` has an attribute for each part, `x` is `[B, T, D]`.


def bound(
    parts: Mapping[str, Part],
    made: Mapping[str, Any],
    run: Mapping[str, Callable[..., Any]],
) -> Any:
    """What a block takes as `parts`.

    Args:
      parts: Of a block.
      made: The modules or parameters of each.
      run: By kinds, functions `(part, made, x) -> y`; others stay as they are made.
    """
    found = {
        name: functools.partial(run[part.kind], part, made[name])
        if part.kind in run
        else made[name]
        for name, part in parts.items()
    }
    return SimpleNamespace(**found)


def _keep(index: int, x: jax.Array) -> jax.Array:
    del index
    return x


def s4_block(
    parts: Any, x: jax.Array, dropout: Dropout = _keep, mode: str = "convolution"
) -> jax.Array:
    """`x + dropout(glu(dropout(gelu(S4(norm(x))))))`; `mode` as of `s4.run`."""
    return x + gated(parts, s4.run(parts.s4, parts.norm(x), mode), dropout)


def s4_step(
    parts: Any, x: jax.Array, state: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """One step of time of `s4_block`, from `x` `[B, D]` and a state `[B, D, N]`."""
    h, state = s4.run_step(parts.s4, parts.norm(x), state, length)
    return x + gated(parts, h), state


def gated(parts: Any, h: jax.Array, dropout: Dropout = _keep) -> jax.Array:
    """What an S4 block does after S4."""
    h = dropout(0, jax.nn.gelu(h))
    return dropout(1, jax.nn.glu(parts.gate(h)))


def transformer_block(parts: Any, x: jax.Array, dropout: Dropout = _keep) -> jax.Array:
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""
    x = x + dropout(0, parts.attention(parts.attention_norm(x)))
    h = jax.nn.gelu(parts.mlp_in(parts.mlp_norm(x)))
    return x + dropout(1, parts.mlp_out(h))


def _recurrence_block(parts: Any, x: jax.Array) -> jax.Array:
    kernel = recurrence_kernel(parts.decay, parts.b, x.shape[1])
    return x + jnp.tanh(convolve(x, kernel))


def spectral_block(parts: Any, x: jax.Array) -> jax.Array:
    """A residual MLP without a norm."""
    return x + parts.down(jax.nn.gelu(parts.up(x)))


def mlp_block(parts: Any, x: jax.Array) -> jax.Array:
    """A residual MLP of four times the width; nothing to hoist."""
    return x + parts.down(jax.nn.gelu(parts.up(parts.norm(x))))


def _shapes_block(parts: Any, x: jax.Array) -> jax.Array:
    return x + sum(jnp.sum(w) for w in vars(parts).values())


class Model(NamedTuple):
    """A model that all frameworks have.

    Attributes:
      name: Its key in `MODELS`.
      width: Number of features, `D`.
      make_parts: From `D` to the parts of a block.
      block: From parts and `x` `[B, T, D]` to `[B, T, D]`.
      dtypes: Those that it can be run in.
      state_size: Of a model that can run one step of time.
    """

    name: str
    width: int
    make_parts: Callable[[int], dict[str, Part]]
    block: Callable[[Any, jax.Array], jax.Array]
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float64")
    state_size: int = 0

    @property
    def parts(self) -> dict[str, Part]:
        """What a block is made of."""
        return self.make_parts(self.width)


_WITH_FFT = ("float32", "float64")  # There is no FFT of half precision.
_s4_parts = functools.partial(s4_parts, state_size=32)
_term_by_term = functools.partial(s4_block, mode="term by term")
_transformer_parts = functools.partial(transformer_parts, num_heads=4)

MODELS = {
    model.name: model
    for model in (
        Model("s4", 64, _s4_parts, s4_block, _WITH_FFT, state_size=32),
        Model("recurrence", 16, _recurrence_parts, _recurrence_block, _WITH_FFT),
        Model("transformer", 64, _transformer_parts, transformer_block),
        Model("spectral", 64, _spectral_parts, spectral_block),
        Model("mlp", 64, _mlp_parts, mlp_block),
        Model("shapes", 64, _shapes_parts, _shapes_block),
        Model("s4_terms", 64, _s4_parts, _term_by_term, _WITH_FFT, state_size=32),
    )
}
# Those that are measured if nobody asks for others.
DEFAULT = ("s4", "recurrence", "transformer", "spectral", "mlp")


class Given(NamedTuple):
    """What a framework is given.

    Attributes:
      model: What to make.
      num_layers: The number of blocks, `L`.
      params: The parameters of Haiku's stack, `[L, ...]` each.
      x: Activations `[B, T, D]`.
    """

    model: Model
    num_layers: int
    params: Params
    x: jax.Array

    @property
    def states(self) -> jax.Array:
        """The states before the first step of S4: zeros `[L, B, D, N]`."""
        sizes = self.num_layers, len(self.x), self.model.width, self.model.state_size
        return jnp.zeros(sizes, jnp.result_type(self.x.dtype, jnp.complex64))


class Stack(NamedTuple):
    """A model stacked in one way, as pure functions of its parameters.

    Attributes:
      params: In the framework's own tree, or derived values.
      apply: `(params, x [B, T, D]) -> y [B, T, D]`.
      init: `(key, x) -> params`; None if there is nothing to initialise.
      to_haiku: A tree like `params` as the parameters of Haiku's stack; None if
        `params` are derived values, of which no gradient is compared.
      mean_gradient: Of microbatches, `(loss, params, xs) -> (loss, gradient)`; None for
        the gradients of one after the other.
    """

    params: Params
    apply: Callable[[Params, jax.Array], jax.Array]
    init: Callable[[jax.Array, jax.Array], Params] | None
    to_haiku: Callable[[Params], Params] | None
    mean_gradient: Callable[..., tuple[jax.Array, Params]] | None = None


class Decoder(NamedTuple):
    """One step of time of a model.

    Attributes:
      params: Parameters, or derived values.
      step: `(params, x [B, D], states) -> (y [B, D], states)`.
      states: The states before the first step.
    """

    params: Params
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


def ways(name: str, mode: str) -> tuple[str, ...]:
    """The ways of a framework in a mode."""
    module = framework(name)
    return module.WAYS_OF.get(mode, module.WAYS)


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


def normalised(w: jax.Array, iterations: int = 10) -> jax.Array:
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
