"""The models in Flax Linen, with three ways to stack blocks.

Shapes as in `in_haiku`. Parameters and initial distributions are the same, and
`hk_stack.flax_to_haiku` copies variables over. Blocks take optional dropout `keys`, one
for each of their two dropouts: Linen derives its own keys from module paths, so that
two frameworks can only draw the same masks if the keys are passed in.

S4 blocks can also decode, one step of time per call: see `S4` and `prime`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import hk_stack
from hk_stack.compare import models, s4

try:
    import flax.linen as nn
except ImportError as error:
    raise ImportError(
        "hk_stack.compare.in_linen needs Flax: pip install 'hk_stack[flax]'"
    ) from error

Mode = Literal["convolution", "term by term", "step", "primed step"]


class S4(nn.Module):
    """One S4 layer, `[B, T, D] -> [B, T, D]`, its kernel made in `setup`.

    With `mode="term by term"` the kernel is that of `s4.kernel_term_by_term`.

    To decode, it runs one step of time, `[B, 1, D] -> [B, 1, D]`. The state `[B, D, N]`
    is a variable in collection `"cache"`. With `mode="step"` the system is discretised
    at each step. With `mode="primed step"` the discretised system is a variable in
    collection `"prime"`, made when that collection is mutable (see `prime`), then read.
    """

    features: int
    state_size: int
    length: int
    mode: Mode = "convolution"

    def setup(self) -> None:
        """Computes the kernel `[D, T]`, or the recurrence, from the parameters."""
        params = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (shape, init) in s4.parameters(
                self.features, self.state_size
            ).items()
        }
        system = s4.dplr(params)
        if self.mode in s4.KERNELS:
            self.kernel = s4.KERNELS[self.mode](system, self.length)
        elif self.mode == "step":
            self.recurrence = s4.discretise(system, self.length)
        else:
            self.recurrence = self._primed(system)
        self.d = params["d"]

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        """Filters each feature of `u` `[B, T, D]` by its own linear system."""
        if self.mode in s4.KERNELS:
            y = s4.convolve(u, self.kernel)
        else:
            y = self._step(u[:, 0])[:, None]
        return y + self.d[None, None] * u

    def _primed(self, system: s4.Dplr) -> s4.Recurrence:
        """The recurrence, computed only if collection `"prime"` does not hold it."""

        def discretise() -> s4.Recurrence:
            return s4.discretise(system, self.length)

        return self.variable("prime", "recurrence", discretise).value

    def _step(self, u: jax.Array) -> jax.Array:
        """One step of time, `[B, D] -> [B, D]`, which moves the state on."""
        shape = (*u.shape, self.state_size)
        dtype = np.result_type(u.dtype, np.complex64)
        state = self.variable("cache", "state", jnp.zeros, shape, dtype)
        next_state, y = s4.step(self.recurrence, state.value, u)
        if not self.is_mutable_collection("prime"):  # Neither at init, nor in `prime`.
            state.value = next_state
        return y


class S4Block(nn.Module):
    """`x + dropout(glu(dropout(gelu(S4(norm(x))))))`, `[B, T, D] -> [B, T, D]`."""

    state_size: int
    dropout_rate: float = 0.0
    norm: Literal["layer", "batch"] = "layer"
    mode: Mode = "convolution"
    length: int | None = None  # To decode: that of the sequences in training, `T`.

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`, with dropout `keys` `[2]` if given."""
        _, length, width = x.shape
        if self.mode not in s4.KERNELS:
            if self.length is None or length != 1:
                raise ValueError(
                    f"S4Block: mode={self.mode!r} needs field length and input "
                    f"[B, 1, D], found length={self.length} and {x.shape}."
                )
            length = self.length
        dropout = _dropouts(self.dropout_rate, is_training, keys)
        h = _norm(self.norm, x, is_training, "norm")
        h = S4(width, self.state_size, length, self.mode, name="s4")(h)
        h = dropout(0, jax.nn.gelu(h))
        h = jax.nn.glu(nn.Dense(2 * width, name="gate")(h))
        return x + dropout(1, h)


class TransformerBlock(nn.Module):
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""

    num_heads: int
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`, with dropout `keys` `[2]` if given."""
        _, length, width = x.shape
        dropout = _dropouts(self.dropout_rate, is_training, keys)
        mask = jnp.tri(length, dtype=bool)[None, None]
        attention = nn.MultiHeadDotProductAttention(self.num_heads, name="attention")
        h = attention(_norm("layer", x, is_training, "attention_norm"), mask=mask)
        x = x + dropout(0, h)
        h = _norm("layer", x, is_training, "mlp_norm")
        h = jax.nn.gelu(nn.Dense(4 * width, name="mlp_in")(h))
        return x + dropout(1, nn.Dense(width, name="mlp_out")(h))


class RecurrenceBlock(nn.Module):
    """As `in_haiku.RecurrenceBlock`."""

    state_size: int

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        normal, shape = nn.initializers.normal, (self.state_size,)
        decay = self.param("decay", normal(1.0), shape, x.dtype)
        b = self.param("b", normal(0.01), shape, x.dtype)
        kernel = models.recurrence_kernel(decay, b, x.shape[1])
        return x + jnp.tanh(models.convolve(x, kernel))


class SpectralDense(nn.Module):
    """A dense layer of which the kernel is divided by its largest singular value."""

    features: int
    iterations: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to `x` `[B, T, D]`."""
        shape = (x.shape[-1], self.features)
        init = nn.initializers
        kernel = self.param("kernel", init.lecun_normal(), shape, x.dtype)
        bias = self.param("bias", init.zeros, (self.features,), x.dtype)
        return x @ models.normalised(kernel, self.iterations) + bias[None, None]


class SpectralBlock(nn.Module):
    """As `in_haiku.SpectralBlock`."""

    iterations: int

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        width = x.shape[-1]
        h = jax.nn.gelu(SpectralDense(4 * width, self.iterations, name="up")(x))
        return x + SpectralDense(width, self.iterations, name="down")(h)


class MlpBlock(nn.Module):
    """As `in_haiku.MlpBlock`."""

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        width = x.shape[-1]
        h = _norm("layer", x, is_training, "norm")
        h = jax.nn.gelu(nn.Dense(4 * width, name="up")(h))
        return x + nn.Dense(width, name="down")(h)


class ScanStack(nn.Module):
    """`L` blocks by `nn.scan` with split parameters: setup runs inside the loop.

    `block` makes one block; bind its fields by `functools.partial`.
    """

    block: Callable[..., nn.Module]
    num_layers: int

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the stack to `x` `[B, T, D]`, with dropout `keys` `[L, 2]` if any."""
        scan = nn.scan(
            lambda block, x, keys: (block(x, is_training, keys), None),
            variable_axes={"params": 0, "batch_stats": 0, "cache": 0, "prime": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
        )
        return scan(self.block(name="block"), x, keys)[0]


class HackStack(nn.Module):
    """`L` blocks whose vmapped initialisation is held as one parameter, `"stack"`.

    There is no place for running statistics, nor for the states of decoding: use it
    with `norm="layer"` and `mode="convolution"`.
    """

    block: Callable[..., nn.Module]
    num_layers: int

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the stack to `x` `[B, T, D]`, with dropout `keys` `[L, 2]` if any."""
        block = self.block(parent=None)

        def init(key: jax.Array) -> Mapping[str, Any]:
            keys = jax.random.split(key, self.num_layers)
            return jax.vmap(lambda key: block.init(key, x)["params"])(keys)

        def layer(x: jax.Array, scanned: Any) -> tuple[Any, None]:
            params, keys, rngs = scanned
            y = block.apply({"params": params}, x, is_training, keys, rngs=rngs)
            return y, None

        rngs = {}
        if self.has_rng("dropout"):
            rng = self.make_rng("dropout")
            rngs["dropout"] = jax.random.split(rng, self.num_layers)
        return jax.lax.scan(layer, x, (self.param("stack", init), keys, rngs))[0]


class LoopStack(nn.Module):
    """`L` blocks by a Python loop, with `L` sets of parameters."""

    block: Callable[..., nn.Module]
    num_layers: int

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Applies the stack to `x` `[B, T, D]`, with dropout `keys` `[L, 2]` if any."""
        for i in range(self.num_layers):
            own_keys = None if keys is None else keys[i]
            x = self.block(name=f"block_{i}")(x, is_training, own_keys)
        return x


STACKS = {"scan": ScanStack, "hack": HackStack, "loop": LoopStack}


class Classifier(nn.Module):
    """Sequences `[B, T, features]` -> logits `[B, num_classes]`; `layers`: a stack."""

    layers: nn.Module
    width: int
    num_classes: int

    @nn.compact
    def __call__(
        self, x: jax.Array, is_training: bool = False, keys: jax.Array | None = None
    ) -> jax.Array:
        """Encodes, runs the stack, pools over time and classifies."""
        h = nn.Dense(self.width, name="encoder")(x)
        h = self.layers(h, is_training, keys)
        return nn.Dense(self.num_classes, name="decoder")(jnp.mean(h, axis=1))


class NextToken(nn.Module):
    """Tokens `[B, T]` -> logits `[B, T, num_tokens]` of the tokens after them.

    As `in_haiku.next_token`; with `layers` that decode, `T` is one.
    """

    layers: nn.Module
    width: int
    num_tokens: int

    @nn.compact
    def __call__(self, tokens: jax.Array, is_training: bool = False) -> jax.Array:
        """Encodes, runs the stack and decodes."""
        x = jax.nn.one_hot(tokens, self.num_tokens + 1)
        h = self.layers(nn.Dense(self.width, name="encoder")(x), is_training)
        return nn.Dense(self.num_tokens, name="decoder")(h)


def prime(model: nn.Module, params: Any, x: jax.Array) -> Mapping[str, Any]:
    """What a model that decodes needs beside its parameters.

    ```
    variables = prime(model, params, x)
    for x in sequence:
        y, cache = model.apply({"params": params, **variables}, x, mutable=["cache"])
        variables = {**variables, **cache}
    ```

    Args:
      model: a model or a stack of blocks, which decodes.
      params: its parameters.
      x: an input of one step; only its shape matters.

    Returns:
      States at zero in collection `"cache"`; with `mode="primed step"`, discretised
      systems in collection `"prime"`.
    """
    return model.apply({"params": params}, x, mutable=["cache", "prime"])[1]


def _dropouts(
    rate: float, is_training: bool, keys: jax.Array | None
) -> Callable[[int, jax.Array], jax.Array]:
    def dropout(index: int, x: jax.Array) -> jax.Array:
        key = None if keys is None else keys[index]
        return nn.Dropout(rate)(x, deterministic=not is_training, rng=key)

    return dropout


def _norm(kind: str, x: jax.Array, is_training: bool, name: str) -> jax.Array:
    if kind == "batch":
        norm = nn.BatchNorm(not is_training, momentum=0.9, epsilon=1e-5, name=name)
        return norm(x)
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)


# What `models` asks of a framework

WAYS = ("nn.scan", "nn.scan + nn.remat", "nn.scan, cache", "loop", "hack")

_BLOCKS: dict[str, type[nn.Module]] = {
    "s4": S4Block,
    "recurrence": RecurrenceBlock,
    "transformer": TransformerBlock,
    "spectral": SpectralBlock,
    "mlp": MlpBlock,
}
_STACKS: dict[str, Callable[..., nn.Module]] = {
    "nn.scan": ScanStack,
    "nn.scan + nn.remat": ScanStack,
    "loop": LoopStack,
    "hack": HackStack,
}
# In a scan, the loop does what is asked of `prevent_cse`.
_remat = functools.partial(nn.remat, static_argnums=(2,), prevent_cse=False)
_RULES: dict[str, Any] = {
    "nn.scan": {"layer_axis": {"block": 0}},
    "nn.scan + nn.remat": {"layer_axis": {"block": 0}},
    "loop": {"rename": {"block_*": "layers/*/block"}, "layer_axis": {"block_*": ()}},
    "hack": {"rename": {"stack": "layers/block"}, "layer_axis": {"stack": 0}},
}


def stack(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Stack | None:
    """The blocks in `nn.scan`, in a Python loop, or vmapped at init and scanned."""
    if way not in _STACKS:
        return None
    block: Any = _BLOCKS[model.name]
    if way == "nn.scan + nn.remat":
        block = _remat(block)
    net = _STACKS[way](functools.partial(block, **model.options), num_layers)
    single = models.types(x, jnp.float32)  # Of which parameters are initialised.
    like = jax.eval_shape(net.init, jax.random.key(0), single)
    haiku: Any = (models.types(params), {})
    rules: Any = _RULES[way]

    def apply(variables: Any, x: jax.Array) -> Any:
        return net.apply(variables, x)

    return models.Stack(
        hk_stack.haiku_to_flax((params, {}), models.types(like, x.dtype), **rules),
        apply,
        net.init,
        lambda variables: hk_stack.flax_to_haiku(variables, haiku, **rules)[0],
    )


def decoder(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Decoder | None:
    """The S4 blocks, one step of time; "cache" has the systems in a collection."""
    modes: dict[str, Mode] = {"nn.scan": "step", "nn.scan, cache": "primed step"}
    if way not in modes:
        return None
    block = functools.partial(
        S4Block, mode=modes[way], length=x.shape[1], **model.options
    )
    net = ScanStack(block, num_layers)
    made = stack("nn.scan", model, num_layers, params, x)
    assert made is not None
    known = made.params
    variables = dict(prime(net, known["params"], x[:, :1]))
    states = {"cache": variables.pop("cache")}

    def step(known: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        y, states = net.apply({**known, **states}, x[:, None], mutable=["cache"])
        return y[:, 0], states

    return models.Decoder({**known, **variables}, step, states)
