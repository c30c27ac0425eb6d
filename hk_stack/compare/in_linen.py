"""The models in Flax Linen, with three ways to stack blocks.

Shapes as in `in_haiku`. Parameters and initial distributions are the same, and
`hk_stack.flax_to_haiku` copies variables over. Blocks take optional dropout `keys`, one
for each of their two dropouts: Linen derives its own keys from module paths, so that
two frameworks can only draw the same masks if the keys are passed in.

S4 blocks can also decode, one step of time per call: see `S4` and `prime`.
"""

# A block's class says what its `__call__` does.
# ruff: noqa: D102
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

import hk_stack
from hk_stack.compare import models, s4
from hk_stack.compare.models import Part

try:
    import flax.linen as nn
except ImportError as error:
    raise ImportError(
        "hk_stack.compare.in_linen needs Flax: pip install 'hk_stack[flax]'"
    ) from error

Array = jax.Array
Keys = Array | None
Mode = Literal["convolution", "term by term", "step", "primed step"]


class S4(nn.Module):
    """One S4 layer, `[B, T, D] -> [B, T, D]`, its kernel as of one of `s4.KERNELS`.

    To decode, it runs one step of time, `[B, 1, D] -> [B, 1, D]`. The state `[B, D, N]`
    is a variable in collection `"cache"`. With `mode="step"` the system is discretised
    at each step. With `mode="primed step"` the discretised system is a variable in
    collection `"prime"`, made when that collection is mutable (see `prime`), then read.
    """

    features: int
    state_size: int
    length: int
    mode: Mode = "convolution"

    @nn.compact
    def __call__(self, u: Array) -> Array:
        table = s4.parameters(self.features, self.state_size)
        params = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (shape, init) in table.items()
        }
        if self.mode in s4.KERNELS:
            return s4.run(params, u, self.mode)
        return self._step(params, u[:, 0])[:, None]

    def _step(self, params: Mapping[str, Array], u: Array) -> Array:
        """One step of time, `[B, D] -> [B, D]`, which moves the state on."""

        def discretise() -> s4.Recurrence:
            return s4.discretise(s4.dplr(params), self.length)

        shape = (*u.shape, self.state_size)
        dtype = np.result_type(u.dtype, np.complex64)
        state = self.variable("cache", "state", jnp.zeros, shape, dtype)
        if self.mode == "step":
            system = discretise()
        else:
            system = self.variable("prime", "recurrence", discretise).value
        next_state, y = s4.step(system, state.value, u)
        if not self.is_mutable_collection("prime"):  # Neither at init, nor in `prime`.
            state.value = next_state
        return y + params["d"][None] * u


class S4Block(nn.Module):
    """`x + dropout(glu(dropout(gelu(S4(norm(x))))))`, `[B, T, D] -> [B, T, D]`."""

    state_size: int
    dropout_rate: float = 0.0
    norm: Literal["layer", "batch"] = "layer"
    mode: Mode = "convolution"
    length: int | None = None  # To decode: that of the sequences in training, `T`.

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
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
        gate = SimpleNamespace(gate=nn.Dense(2 * width, name="gate"))
        return x + models.gated(gate, h, dropout)


class TransformerBlock(nn.Module):
    """Pre-norm causal self-attention, then a pre-norm MLP of four times the width."""

    num_heads: int
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
        dropout = _dropouts(self.dropout_rate, is_training, keys)
        parts = models.transformer_parts(x.shape[-1], self.num_heads)
        return models.transformer_block(_made(self, parts), x, dropout)


class Block(nn.Module):
    """A block of a model without dropout."""

    model: models.Model

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
        return self.model.block(_made(self, self.model.parts), x)


def _made(module: nn.Module, parts: Mapping[str, Part]) -> Any:
    """The parts of a block as functions and parameters, made in its module."""
    made = {name: _MAKE[part.kind](module, name, part) for name, part in parts.items()}
    return SimpleNamespace(**made)


def _attention(module: nn.Module, name: str, part: Part) -> Callable[[Array], Array]:
    attention = nn.MultiHeadDotProductAttention(int(part.other), name=name)
    return lambda h: attention(h, mask=jnp.tri(h.shape[1], dtype=bool)[None, None])


def _vector(module: nn.Module, name: str, part: Part) -> Array:
    return module.param(name, nn.initializers.normal(part.other), (part.size,))


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


class SpectralDense(nn.Module):
    """A dense layer of which the kernel is divided by its largest singular value."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        init = nn.initializers
        kernel = self.param("kernel", init.lecun_normal(), shape, x.dtype)
        bias = self.param("bias", init.zeros, (self.features,), x.dtype)
        return x @ models.normalised(kernel) + bias[None, None]


_MAKE: dict[str, Callable[[nn.Module, str, Part], Any]] = {
    "norm": lambda module, name, part: _layer_norm(name),
    "linear": lambda module, name, part: nn.Dense(int(part.other), name=name),
    "spectral": lambda module, name, part: SpectralDense(int(part.other), name=name),
    "attention": _attention,
    "vector": _vector,
}


class Stack(nn.Module):
    """`L` blocks; `block` makes one: bind its fields by `functools.partial`.

    Stacks are called as blocks are, with dropout `keys` `[L, 2]` if any.
    """

    block: Callable[..., nn.Module]
    num_layers: int


class ScanStack(Stack):
    """`L` blocks by `nn.scan` with split parameters: setup runs inside the loop."""

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
        scan = nn.scan(
            lambda block, x, keys: (block(x, is_training, keys), None),
            variable_axes={"params": 0, "batch_stats": 0, "cache": 0, "prime": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
        )
        return scan(self.block(name="block"), x, keys)[0]


class HackStack(Stack):
    """`L` blocks whose vmapped initialisation is held as one parameter, `"stack"`.

    There is no place for running statistics, nor for the states of decoding: use it
    with `norm="layer"` and `mode="convolution"`.
    """

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
        block = self.block(parent=None)

        def init(key: Array) -> Mapping[str, Any]:
            keys = jax.random.split(key, self.num_layers)
            return jax.vmap(lambda key: block.init(key, x)["params"])(keys)

        def layer(x: Array, scanned: Any) -> tuple[Any, None]:
            params, keys, rngs = scanned
            y = block.apply({"params": params}, x, is_training, keys, rngs=rngs)
            return y, None

        rngs = {}
        if self.has_rng("dropout"):
            rng = self.make_rng("dropout")
            rngs["dropout"] = jax.random.split(rng, self.num_layers)
        return jax.lax.scan(layer, x, (self.param("stack", init), keys, rngs))[0]


class LoopStack(Stack):
    """`L` blocks by a Python loop, with `L` sets of parameters."""

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
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
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
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
    def __call__(self, tokens: Array, is_training: bool = False) -> Array:
        x = jax.nn.one_hot(tokens, self.num_tokens + 1)
        h = self.layers(nn.Dense(self.width, name="encoder")(x), is_training)
        return nn.Dense(self.num_tokens, name="decoder")(h)


def prime(model: nn.Module, params: Any, x: Array) -> Mapping[str, Any]:
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
    rate: float, is_training: bool, keys: Keys
) -> Callable[[int, Array], Array]:
    def dropout(index: int, x: Array) -> Array:
        key = None if keys is None else keys[index]
        return nn.Dropout(rate)(x, deterministic=not is_training, rng=key)

    return dropout


def _norm(kind: str, x: Array, is_training: bool, name: str) -> Array:
    if kind == "batch":
        norm = nn.BatchNorm(not is_training, momentum=0.9, epsilon=1e-5, name=name)
        return norm(x)
    return _layer_norm(name)(x)


# What `models` asks of a framework

WAYS = ("nn.scan", "nn.scan + nn.remat", "nn.scan, cache", "loop", "hack")
WAYS_OF = {"eager": ("loop",)}
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


def stack(way: str, given: models.Given) -> models.Stack | None:
    """The blocks in `nn.scan`, in a Python loop, or vmapped at init and scanned."""
    model, num_layers, params, x = given
    if way not in _STACKS:
        return None
    block, fields = _block(model)
    if way == "nn.scan + nn.remat":
        block = _remat(block)
    net = _STACKS[way](functools.partial(block, **fields), num_layers)
    single = models.types(x, jnp.float32)  # Of which parameters are initialised.
    like = jax.eval_shape(net.init, jax.random.key(0), single)
    haiku: Any = (models.types(params), {})
    rules: Any = _RULES[way]
    return models.Stack(
        hk_stack.haiku_to_flax((params, {}), models.types(like, x.dtype), **rules),
        cast(Any, net.apply),
        net.init,
        lambda variables: hk_stack.flax_to_haiku(variables, haiku, **rules)[0],
    )


def _block(model: models.Model) -> tuple[Any, dict[str, Any]]:
    """The class of a model's block, and its fields."""
    if not model.state_size:
        return Block, {"model": model}
    mode = "term by term" if model.name == "s4_terms" else "convolution"
    return S4Block, {"state_size": model.state_size, "mode": mode}


def decoder(way: str, given: models.Given) -> models.Decoder | None:
    """The S4 blocks, one step of time; "cache" has the systems in a collection."""
    model, num_layers, _, x = given
    modes: dict[str, Mode] = {"nn.scan": "step", "nn.scan, cache": "primed step"}
    if way not in modes:
        return None
    fields: dict[str, Any] = {"state_size": model.state_size, "length": x.shape[1]}
    block = functools.partial(S4Block, mode=modes[way], **fields)
    net = ScanStack(block, num_layers)
    made = stack("nn.scan", given)
    assert made is not None
    variables = {**made.params, **prime(net, made.params["params"], x[:, :1])}
    states = {"cache": variables.pop("cache")}

    def step(known: Any, x: Array, states: Any) -> tuple[Array, Any]:
        y, states = net.apply({**known, **states}, x[:, None], mutable=["cache"])
        return y[:, 0], states

    return models.Decoder(variables, step, states)
