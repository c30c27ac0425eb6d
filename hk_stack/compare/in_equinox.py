"""The models in Equinox: blocks made by `eqx.filter_vmap`, run by `jax.lax.scan`.

Shapes and parameters as in `in_haiku`; Equinox's own initial distributions, but for S4.
Its linear layers hold their weights transposed, and its modules see one vector at a
time, so they are vmapped over batch and time.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hk_stack.compare import in_haiku, models, s4

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "hk_stack.compare.in_equinox needs Equinox: pip install equinox"
    ) from error


class S4(eqx.Module):
    """One S4 layer, `[B, T, D] -> [B, T, D]`."""

    params: dict[str, jax.Array]

    def __init__(self, width: int, state_size: int, key: jax.Array):
        """Makes the parameters of `s4.parameters`."""
        table = s4.parameters(width, state_size)
        keys = jax.random.split(key, len(table))
        self.params = {
            name: init(key, shape, jnp.float32)
            for key, (name, (shape, init)) in zip(keys, table.items(), strict=True)
        }

    def __call__(self, u: jax.Array) -> jax.Array:
        """Filters each feature of `u` `[B, T, D]` by its own linear system."""
        y = s4.convolve(u, s4.kernel(s4.dplr(self.params), u.shape[1]))
        return y + self.params["d"][None, None] * u

    def step(
        self, u: jax.Array, state: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """One step of time, from `u` `[B, D]` and a state `[B, D, N]`."""
        system = s4.discretise(s4.dplr(self.params), length)
        state, y = s4.step(system, state, u)
        return y + self.params["d"][None] * u, state


class S4Block(eqx.Module):
    """As `in_haiku.S4Block`, without dropout."""

    norm: eqx.nn.LayerNorm
    s4: S4
    gate: eqx.nn.Linear

    def __init__(self, width: int, state_size: int, key: jax.Array):
        """Makes the block's modules."""
        keys = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(width)
        self.s4 = S4(width, state_size, keys[0])
        self.gate = eqx.nn.Linear(width, 2 * width, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        h = self.s4(_each(self.norm, x))
        return x + jax.nn.glu(_each(self.gate, jax.nn.gelu(h)))

    def step(
        self, x: jax.Array, state: jax.Array, length: int
    ) -> tuple[jax.Array, jax.Array]:
        """One step of time, from `x` `[B, D]` and a state `[B, D, N]`."""
        h, state = self.s4.step(jax.vmap(self.norm)(x), state, length)
        return x + jax.nn.glu(jax.vmap(self.gate)(jax.nn.gelu(h))), state


class RecurrenceBlock(eqx.Module):
    """As `in_haiku.RecurrenceBlock`."""

    decay: jax.Array
    b: jax.Array

    def __init__(self, width: int, state_size: int, key: jax.Array):
        """Makes the block's parameters."""
        del width
        keys = jax.random.split(key)
        self.decay = jax.random.normal(keys[0], (state_size,))
        self.b = 0.01 * jax.random.normal(keys[1], (state_size,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        kernel = models.recurrence_kernel(self.decay, self.b, x.shape[1])
        return x + jnp.tanh(models.convolve(x, kernel))


class TransformerBlock(eqx.Module):
    """As `in_haiku.TransformerBlock`, without dropout."""

    attention_norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp_norm: eqx.nn.LayerNorm
    mlp_in: eqx.nn.Linear
    mlp_out: eqx.nn.Linear

    def __init__(self, width: int, num_heads: int, key: jax.Array):
        """Makes the block's modules."""
        keys = jax.random.split(key, 3)
        self.attention_norm = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(
            num_heads,
            width,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=keys[0],
        )
        self.mlp_norm = eqx.nn.LayerNorm(width)
        self.mlp_in = eqx.nn.Linear(width, 4 * width, key=keys[1])
        self.mlp_out = eqx.nn.Linear(4 * width, width, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        mask = jnp.tri(x.shape[1], dtype=bool)
        h = _each(self.attention_norm, x)
        x = x + jax.vmap(lambda h: self.attention(h, h, h, mask))(h)
        h = jax.nn.gelu(_each(self.mlp_in, _each(self.mlp_norm, x)))
        return x + _each(self.mlp_out, h)


class SpectralBlock(eqx.Module):
    """As `in_haiku.SpectralBlock`."""

    up: eqx.nn.Linear
    down: eqx.nn.Linear
    iterations: int = eqx.field(static=True)

    def __init__(self, width: int, iterations: int, key: jax.Array):
        """Makes the block's modules."""
        keys = jax.random.split(key)
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[0])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[1])
        self.iterations = iterations

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        return x + self._linear(self.down, jax.nn.gelu(self._linear(self.up, x)))

    def _linear(self, linear: Any, x: jax.Array) -> jax.Array:
        weight = models.normalised(linear.weight.T, self.iterations)
        return x @ weight + linear.bias[None, None]


class MlpBlock(eqx.Module):
    """As `in_haiku.MlpBlock`."""

    norm: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, key: jax.Array):
        """Makes the block's modules."""
        keys = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[0])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to `x` `[B, T, D]`."""
        h = jax.nn.gelu(_each(self.up, _each(self.norm, x)))
        return x + _each(self.down, h)


def _each(module: Any, x: jax.Array) -> jax.Array:
    """A module of vectors, for each of `x` `[B, T, D]`."""
    return jax.vmap(jax.vmap(module))(x)


# What `models` asks of a framework

WAYS = ("filter_vmap + scan",)

_BLOCKS: dict[str, Any] = {
    "s4": S4Block,
    "recurrence": RecurrenceBlock,
    "transformer": TransformerBlock,
    "spectral": SpectralBlock,
    "mlp": MlpBlock,
}


def stack(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Stack:
    """The blocks, as pure functions of the arrays of a stacked block."""
    del way, x

    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, num_layers)
        block = _BLOCKS[model.name]
        return eqx.filter_vmap(lambda k: block(model.width, **model.options, key=k))(
            keys
        )

    arrays, static = _parts(make)

    def apply(arrays: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
            return eqx.combine(arrays, static)(x), None

        return jax.lax.scan(layer, x, arrays)[0]

    return models.Stack(
        _from_haiku(params, arrays),
        apply,
        lambda key, x: eqx.filter(make(key), eqx.is_array),
        _to_haiku,
    )


def decoder(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Decoder:
    """The S4 blocks, one step of time."""
    known = stack(way, model, num_layers, params, x).params
    length = x.shape[1]

    def step(blocks: Any, x: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        return jax.lax.scan(
            lambda x, scanned: scanned[0].step(x, scanned[1], length),
            x,
            (blocks, states),
        )

    return models.Decoder(known, step, in_haiku.states(model, num_layers, x))


def _parts(make: Any) -> tuple[Any, Any]:
    """The shapes of the arrays of a module, and the rest of it."""
    module = eqx.filter_eval_shape(make, jax.random.key(0))
    return eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


_MODULES = {
    "query_proj": "query",
    "key_proj": "key",
    "value_proj": "value",
    "output_proj": "linear",
}


def _haiku_names(path: Any) -> tuple[str, str, bool]:
    """Module and name of a leaf in Haiku, and whether it is transposed there."""
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
    *modules, name = [_MODULES.get(name, name) for name in names if name != "params"]
    is_norm = bool(modules) and modules[-1].endswith("norm")
    found = {"weight": "scale" if is_norm else "w", "bias": "b"}.get(name, name)
    if is_norm and name == "bias":
        found = "offset"
    return "/".join(["layers/block", *modules]), found, found == "w"


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, str, bool], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _haiku_names(path), leaf


def _from_haiku(params: models.Params, like: Any) -> Any:
    leaves = []
    for (module, name, is_transposed), _ in _leaves(like):
        leaf = params[module][name]
        leaves.append(jnp.swapaxes(leaf, -1, -2) if is_transposed else leaf)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _to_haiku(tree: Any) -> models.Params:
    params: dict[str, dict[str, jax.Array]] = {}
    for (module, name, is_transposed), leaf in _leaves(tree):
        found = jnp.swapaxes(leaf, -1, -2) if is_transposed else leaf
        params.setdefault(module, {})[name] = found
    return params
