"""The models in Flax Linen, with three ways to stack blocks.

Shapes as in `in_haiku`. Parameters and initial distributions are the same, and
`hk_stack.flax_to_haiku` copies variables over. Blocks take optional dropout `keys`, one
for each of their two dropouts: Linen derives its own keys from module paths, so that
two frameworks can only draw the same masks if the keys are passed in.
"""

# A block's class says what its `__call__` does.
# ruff: noqa: D102
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

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


class S4(nn.Module):
    """One S4 layer, `[B, T, D] -> [B, T, D]`; see `Block` for what the fields mean."""

    part: Part
    length: int | None
    is_primed: bool

    @nn.compact
    def __call__(self, u: Array) -> Array:
        table = s4.parameters(self.part.size, int(self.part.other))
        params = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (shape, init) in table.items()
        }
        if self.length is None:
            y: Array = s4.run(params, u, self.part.mode)
            return y
        discretise = functools.partial(s4.discretise, s4.dplr(params), self.length)
        shape = (*u.shape, int(self.part.other))
        dtype = np.result_type(u.dtype, np.complex64)
        state = self.variable("cache", "state", jnp.zeros, shape, dtype)
        if self.is_primed:
            system = self.variable("prime", "recurrence", discretise).value
        else:
            system = discretise()
        next_state, y = s4.step(system, state.value, u)
        if not self.is_mutable_collection("prime"):  # Neither at init, nor in `prime`.
            state.value = next_state
        return y + params["d"][None] * u


class SpectralDense(nn.Module):
    """A dense layer of which the kernel is divided by its largest singular value."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        init = nn.initializers
        kernel = self.param("kernel", init.lecun_normal(), shape, x.dtype)
        bias = self.param("bias", init.zeros, (self.features,), x.dtype)
        return models.spectral(kernel, bias, x)


class Block(nn.Module):
    """A block of a model, `[B, T, D] -> [B, T, D]`.

    With a `length`, that of sequences in training, a block of S4 decodes: it runs one
    step of time, `[B, D] -> [B, D]`. The state `[B, D, N]` is a variable in collection
    `"cache"`, and the system is discretised at each step. If it `is_primed`, the
    discretised system is a variable in collection `"prime"`, made when that collection
    is mutable (see `prime`), then read.
    """

    model: models.Model
    dropout_rate: float = 0.0
    length: int | None = None
    is_primed: bool = False

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
        def dropout(index: int, x: Array) -> Any:
            drop: Any = nn.Dropout(self.dropout_rate, deterministic=not is_training)
            return drop(x, rng=None if keys is None else keys[index])

        parts = self.model.make_parts(x.shape[-1])
        made = {name: self._made(name, part) for name, part in parts.items()}
        return self.model.block(models.bound(parts, made, _RUN, dropout), x)

    def _made(self, name: str, part: Part) -> Any:
        other = int(part.other)
        match part.kind:
            case "norm":
                return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)
            case "attention":
                return nn.MultiHeadDotProductAttention(other, name=name)
            case "s4":
                return S4(part, self.length, self.is_primed, name=name)
            case "vector":
                init = nn.initializers.normal(part.other)
                return self.param(name, init, (part.size,))
            case "spectral":
                return SpectralDense(other, name=name)
        return nn.Dense(other, name=name)


def _attend(part: Part, attention: Callable[..., Array], h: Array) -> Array:
    return attention(h, mask=jnp.tri(h.shape[1], dtype=bool)[None, None])


_RUN: dict[str, Any] = {"attention": _attend, "s4": lambda part, module, u: module(u)}


class Stack(nn.Module):
    """`L` blocks; `block` makes one: bind its fields by `functools.partial`.

    Stacks are called as blocks are, with dropout `keys` `[L, 2]` if any.
    """

    block: Callable[..., nn.Module]
    num_layers: int


class ScanStack(Stack):
    """`L` blocks by `nn.scan` with split parameters: setup runs inside the loop."""

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Any:
        scan: Any = nn.scan(
            lambda block, x, keys: (block(x, is_training, keys), None),
            variable_axes={"params": 0, "cache": 0, "prime": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
        )
        return scan(self.block(name="block"), x, keys)[0]


class HackStack(Stack):
    """`L` blocks whose vmapped initialisation is held as one parameter, `"stack"`.

    There is no place for the states of decoding.
    """

    @nn.compact
    def __call__(self, x: Array, is_training: bool = False, keys: Keys = None) -> Array:
        block = self.block(parent=None)

        def init(key: Array) -> Any:
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


def prime(model: nn.Module, params: Any, x: Array) -> Any:
    """What a model that decodes, or a stack of blocks, needs beside its parameters.

    These are states at zero in collection `"cache"`, and of blocks that are primed
    discretised systems in `"prime"`. `model.apply({"params": params, **variables}, x,
    mutable=["cache"])` then also returns the next states. Of `x`, an input of one step,
    only the shape matters.
    """
    _, variables = model.apply({"params": params}, x, mutable=["cache", "prime"])
    return variables


# What `models` asks of a framework

WAYS = (
    *("nn.scan", "nn.scan + setup_first", "nn.scan + nn.remat", "nn.scan, cache"),
    *("loop", "loop + roll", "hack"),
)
WAYS_OF = {"eager": ("loop",)}
# In a scan, the loop does what is asked of `prevent_cse`.
_remat = functools.partial(nn.remat, static_argnums=(2,), prevent_cse=False)
_RULES: dict[str, Any] = {
    "scan": {"layer_axis": {"block": 0}},
    "loop": {"rename": {"block_*": "layers/*/block"}, "layer_axis": {"block_*": ()}},
    "hack": {"rename": {"stack": "layers/block"}, "layer_axis": {"stack": 0}},
}


def stack(way: str, given: models.Given) -> models.Stack | None:
    """The blocks in `nn.scan`, in a Python loop, or vmapped at init and scanned.

    To decode, "cache" has the discretised systems in a collection.
    """
    is_primed = way == "nn.scan, cache"
    if way != "nn.scan" and is_primed != given.decodes:
        return None
    kind = way if way in STACKS else "scan"
    block: Any = _remat(Block) if way == "nn.scan + nn.remat" else Block
    block = functools.partial(block, given.model)
    net = STACKS[kind](block, given.num_layers)
    single = models.types(given.x, jnp.float32)  # Of which parameters are initialised.
    like = jax.eval_shape(net.init, jax.random.key(0), single)
    apply = cast(Any, net.apply)
    made = models.flax_stack(given, apply, net.init, like, **_RULES[kind])
    if not given.decodes:
        return made
    block = functools.partial(block, length=given.length, is_primed=is_primed)
    decoder = ScanStack(block, given.num_layers)
    variables = {**made.params, **prime(decoder, made.params["params"], given.args[0])}
    structure = jax.tree.structure({"cache": variables.pop("cache")})

    def step(known: Any, x: Array, state: Array) -> Any:
        cache = jax.tree.unflatten(structure, [state])
        y, cache = decoder.apply({**known, **cache}, x, mutable=["cache"])
        return y, jax.tree.leaves(cache)[0]

    return models.Stack(variables, step)
