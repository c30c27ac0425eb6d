"""What is compared: the models, and what a framework's file must provide.

Each model is `L` blocks, `[B, T, D] -> [B, T, D]`. Mathematics that no framework has is
here and in `s4`, modules are in the file of each framework, `in_*.py`.

A framework makes the *parts* of a block and stacks blocks. To add one, add a file
`in_NAME.py` with

- `WAYS`, the names of its ways to stack layers, and `WAYS_OF`, those of modes that have
  others; "loop + roll" is made of the framework's "loop" by `hk_stack.roll`, and so is
  "... + setup_first";
- `stack(way, given) -> Stack`, which is given the parameters of Haiku's stack,
  `{"layers/block/...": {name: [L, ...]}}`, and takes them over. It returns None for
  what does not make sense in that way.

If the framework is not installed, the import of the file fails with an `ImportError`
that says how to install it.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hk_stack
from hk_stack.compare import s4

Params = Any
Dropout = Callable[[int, jax.Array], jax.Array]


class Part(NamedTuple):
    """A part of a block. Its kind is one of these.

    - "norm": a layer norm of `size` features;
    - "linear", "spectral": from `size` features to `other`, the latter with weights
      `normalised`;
    - "attention": causal self-attention of `size` features, with `other` heads;
    - "s4": S4 for `size` features with `other` states; `mode` as of `s4.run`;
    - "vector": a parameter `[size]`, normal at first, `other` its deviation.
    """

    kind: str
    size: int
    other: float = 0
    mode: str = ""


def keep(index: int, x: jax.Array) -> jax.Array:
    """Dropout that drops nothing."""
    del index
    return x


def bound(
    parts: Mapping[str, Part],
    made: Mapping[str, Any],
    run: Mapping[str, Callable[..., Any]],
    dropout: Dropout = keep,
    length: int | None = None,
) -> Any:
    """What a block takes as `parts`: an attribute for each, and `dropout`.

    Args:
      parts: Of a block.
      made: The modules or parameters of each.
      run: By kinds, functions `(part, made, x) -> y`; others stay as they are made, but
        for S4, of which the parameters are made.
      dropout: Called with 0 or 1, as there are two in a block, and activations.
      length: To run one step of time, that of sequences in training. S4 is then
        called with its state, too, and returns the next one.
    """

    def run_s4(part: Part, params: Any, u: jax.Array, *state: jax.Array) -> Any:
        return s4.run(params, u, part.mode, *state, length=length)

    run = {"s4": run_s4, **run}
    found = {
        name: functools.partial(run[part.kind], part, made[name])
        if part.kind in run
        else made[name]
        for name, part in parts.items()
    }
    return SimpleNamespace(dropout=dropout, **found)


# Parts and blocks; `x` is `[B, T, D]`.


def _s4_block(parts: Any, x: jax.Array) -> jax.Array:
    """Setup: a convolution kernel; to decode, a discretised system."""
    return x + _gated(parts, parts.s4(parts.norm(x)))


def _s4_step(parts: Any, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of time of a block of S4, from `x` `[B, D]` and a state `[B, D, N]`."""
    h, state = parts.s4(parts.norm(x), state)
    return x + _gated(parts, h), state


def _gated(parts: Any, h: jax.Array) -> jax.Array:
    h = parts.dropout(0, jax.nn.gelu(h))
    gated: jax.Array = parts.dropout(1, jax.nn.glu(parts.gate(h)))
    return gated


def _transformer_block(parts: Any, x: jax.Array) -> jax.Array:
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""
    x = x + parts.dropout(0, parts.attention(parts.attention_norm(x)))
    h: jax.Array = parts.dropout(1, _up_then_down(parts, parts.norm(x)))
    return x + h


def _up_and_down(kind: str, width: int) -> dict[str, Part]:
    up, down = Part(kind, width, 4 * width), Part(kind, 4 * width, width)
    return {"up": up, "down": down}


def _up_then_down(parts: Any, h: jax.Array) -> jax.Array:
    y: jax.Array = parts.down(jax.nn.gelu(parts.up(h)))
    return y


def _mlp_parts(width: int) -> dict[str, Part]:
    return {"norm": Part("norm", width), **_up_and_down("linear", width)}


def _mlp_block(parts: Any, x: jax.Array) -> jax.Array:
    """A residual MLP of four times the width; nothing to hoist."""
    return x + _up_then_down(parts, parts.norm(x))


def spectral_block(parts: Any, x: jax.Array) -> jax.Array:
    """A residual MLP. Setup: the largest singular values of two matrices."""
    return x + _up_then_down(parts, x)


_DECAYS = {"decay": Part("vector", 64, 1.0), "b": Part("vector", 64, 0.01)}


def _recurrence_block(parts: Any, x: jax.Array) -> jax.Array:
    """Setup: a kernel, by `T` small steps in sequence."""
    return recurrence_call(recurrence_kernel(parts.decay, parts.b, x.shape[1]), x)


def recurrence_kernel(decay: jax.Array, b: jax.Array, length: int) -> jax.Array:
    """`K[t] = sum_n sigmoid(decay_n)^t b_n` `[T]`, term after term, from `[N]`."""
    rate = jax.nn.sigmoid(decay)
    _, kernel = jax.lax.scan(
        lambda state, _: (state * rate, jnp.sum(state)), b, length=length
    )
    return kernel


def recurrence_call(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """The rest of the block: all features of `x` are convolved with one kernel."""
    return x + jnp.tanh(s4.convolve(x, kernel[None]))


_SHAPES = {f"w{i}": Part("vector", (8 + i) * (16 + 2 * i), 0.1) for i in range(24)}


def _shapes_block(parts: Any, x: jax.Array) -> jax.Array:
    """Setup: sums of 24 parameters, each of another shape; for `init`."""
    return x + sum(jnp.sum(getattr(parts, name)) for name in _SHAPES)


class Model(NamedTuple):
    """A model that all frameworks have.

    Attributes:
      name: Its key in `MODELS`.
      make_parts: From `D` to the parts of a block.
      block: From parts and `x` `[B, T, D]` to `[B, T, D]`.
      dtypes: Those that it can be run in.
      state_size: Of a model that can run one step of time.
      width: Number of features, `D`.
      has_setup: Whether a block has work that depends on its parameters alone.
    """

    name: str
    make_parts: Callable[[int], dict[str, Part]]
    block: Callable[[Any, jax.Array], jax.Array]
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float64")
    state_size: int = 0
    width: int = 64
    has_setup: bool = True

    @property
    def parts(self) -> dict[str, Part]:
        """What a block is made of."""
        return self.make_parts(self.width)

    def run(self, parts: Any, x: jax.Array, state: jax.Array | None = None) -> Any:
        """A block; with a state, one step of time of it."""
        return self.block(parts, x) if state is None else _s4_step(parts, x, state)


_WITH_FFT = ("float32", "float64")  # There is no FFT of half precision.


def s4_model(
    state_size: int = 32, mode: str = "convolution", name: str = "s4"
) -> Model:
    """S4 blocks with `state_size` states of each feature; `mode` as of `s4.run`."""

    def parts(width: int) -> dict[str, Part]:
        return {
            "norm": Part("norm", width),
            "s4": Part("s4", width, state_size, mode),
            "gate": Part("linear", width, 2 * width),
        }

    return Model(name, parts, _s4_block, _WITH_FFT, state_size)


def transformer_model(num_heads: int = 4) -> Model:
    """Transformer blocks with a causal attention of `num_heads` heads."""

    def parts(width: int) -> dict[str, Part]:
        attention = Part("attention", width, num_heads)
        before = {"attention_norm": Part("norm", width), "attention": attention}
        return before | _mlp_parts(width)

    return Model("transformer", parts, _transformer_block, has_setup=False)


MODELS = {
    model.name: model
    for model in (
        s4_model(),
        Model("recurrence", lambda _: _DECAYS, _recurrence_block, _WITH_FFT, width=16),
        transformer_model(),
        Model("spectral", functools.partial(_up_and_down, "spectral"), spectral_block),
        Model("mlp", _mlp_parts, _mlp_block, has_setup=False),
        Model("shapes", lambda _: _SHAPES, _shapes_block),
        s4_model(mode="term by term", name="s4_terms"),
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
      decodes: Whether to run one step of time, as in sequences of `T`.
    """

    model: Model
    num_layers: int
    params: Params
    x: jax.Array
    decodes: bool = False

    @property
    def length(self) -> int | None:
        """To decode, the length of sequences in training."""
        return self.x.shape[1] if self.decodes else None

    @property
    def args(self) -> tuple[jax.Array, ...]:
        """`x`; to decode, one step of it, and states of zeros `[L, B, D, N]`."""
        if not self.decodes:
            return (self.x,)
        sizes = self.num_layers, len(self.x), self.model.width, self.model.state_size
        dtype = jnp.result_type(self.x.dtype, jnp.complex64)
        return self.x[:, 0], jnp.zeros(sizes, dtype)


class Stack(NamedTuple):
    """A model stacked in one way, as pure functions of its parameters.

    Attributes:
      params: In the framework's own tree, or derived values.
      apply: `(params, x [B, T, D]) -> y [B, T, D]`; to decode, one step of time
        `(params, x [B, D], states) -> (y [B, D], states)`.
      init: `(key, x) -> params`; None if there is nothing to initialise.
      to_haiku: A tree like `params` as the parameters of Haiku's stack.
      mean_gradient: Of microbatches, `(loss, params, xs) -> (loss, gradient)`; None for
        the gradients of one after the other.
    """

    params: Params
    apply: Callable[..., Any]
    init: Callable[[jax.Array, jax.Array], Params] | None = None
    to_haiku: Callable[[Params], Params] = lambda params: params
    mean_gradient: Callable[..., tuple[jax.Array, Params]] | None = None


def flax_stack(
    given: Given, apply: Callable[..., Any], init: Any, like: Any, **rules: Any
) -> Stack:
    """A stack in Flax, of variables `like` these, ported by `rules`."""
    typed = types(like, given.x.dtype)
    params = hk_stack.haiku_to_flax((given.params, {}), typed, **rules)
    like = types(given.params), {}
    return Stack(
        params, apply, init, lambda t: hk_stack.flax_to_haiku(t, like, **rules)[0]
    )


def scan(
    layer: Callable[..., Any], x: jax.Array, params: Params, *states: jax.Array
) -> Any:
    """`L` layers `(params, x, *state)` by `jax.lax.scan`, with or without states."""

    def step(x: jax.Array, scanned: Any) -> Any:
        params, *state = scanned
        found = layer(params, x, *state)
        return found if state else (found, None)

    found = jax.lax.scan(step, x, (params, *states))
    return found if states else found[0]


def framework_names() -> list[str]:
    """The names of all frameworks, installed or not."""
    import hk_stack.compare as package

    found = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(name[3:] for name in found if name.startswith("in_"))


def framework(name: str) -> ModuleType:
    """The file of a framework; if that is not installed, an `ImportError` says how."""
    return importlib.import_module(f"hk_stack.compare.in_{name}")


def types(tree: Any, dtype: Any = None) -> Any:
    """Shapes and dtypes of the leaves of a tree; with `dtype`, all of that one."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), tree
    )


def spectral(w: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    """A linear layer of `x` `[B, T, n]` with `normalised` weights."""
    return x @ normalised(w) + b[None, None]


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
