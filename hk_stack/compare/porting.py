"""What porting and stacking cost, against copying the arrays once: mode `port`.

The tree is that of a transformer with 24 layers and 101 million parameters: `D` 512, a
vocabulary of 50,000.
"""

import ctypes
import functools
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hk_stack
from hk_stack.compare import in_haiku, models
from hk_stack.compare.results import Case

LAYERS, WIDTH, HEADS, TOKENS = 24, 512, 8, 50_000
_MODEL = models.transformer_model(HEADS)
_NAMES = hk_stack.NumberedLayers("block_{}", "layers/block")
_RENAME = {"block_*": "layers/block_*"}

Tree = dict[str, Any]

PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "plain copy, NumPy": lambda t: jax.tree.map(np.copy, t.stack),
    "plain copy, JAX": lambda t: jax.tree.map(jnp.copy, t.stack_in_jax),
    "hk_stack port a scan": lambda t: hk_stack.flax_to_haiku(t.scanned, t.types),
    "hk_stack port a loop": lambda t: hk_stack.flax_to_haiku(
        t.loop, t.types, rename=_RENAME
    ),
    "hk_stack port back": lambda t: hk_stack.haiku_to_flax((t.stack, {}), t.scanned),
    "hk_stack stack, NumPy": lambda t: hk_stack.stack_params(t.numbered, _NAMES),
    "hk_stack stack, JAX": lambda t: hk_stack.stack_params(t.numbered_in_jax, _NAMES),
    "hk_stack unstack, JAX": lambda t: hk_stack.unstack_params(t.stack_in_jax, _NAMES),
}


def reason(case: Case) -> str:
    """Why a case cannot be measured; "" if it can."""
    if (case.model, case.layers, case.width) == ("transformer", LAYERS, WIDTH):
        return ""
    return f"port moves one tree: --model=transformer --layers={LAYERS} --width={WIDTH}"


@functools.lru_cache
def trees() -> SimpleNamespace:
    """What `PROGRAMS` take."""
    _keep_memory()
    stack = _haiku()
    numbered = hk_stack.unstack_params(stack, _NAMES)
    in_jax, stack_in_jax = jax.tree.map(jnp.asarray, (numbered, stack))
    return SimpleNamespace(
        loop=_flax("loop"),
        scanned=_flax("scan"),
        stack=stack,
        stack_in_jax=stack_in_jax,
        types=(models.types(stack), {}),
        numbered=numbered,
        numbered_in_jax=in_jax,
    )


def _keep_memory() -> None:
    """Makes this process keep what memory it has once been given.

    To get new memory from a system can take many times as long as to copy something
    into it, and how long depends on what else the machine does.
    """
    own = ctypes.CDLL(None)
    if hasattr(own, "mallopt"):  # Linux's; other systems do as they do.
        trim_threshold, mmap_max = -1, -4
        own.mallopt(mmap_max, 0)
        own.mallopt(trim_threshold, 2**31 - 1)


def extra_bytes(run: Callable[[], Any]) -> int:
    """Memory that a program needs beside its arguments and its result.

    Of what NumPy allocates; that is all for a result that JAX takes over from NumPy,
    and nothing for one that XLA computes.
    """
    tracemalloc.start()
    try:
        result = jax.block_until_ready(run())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    made: int = sum(leaf.nbytes for leaf in jax.tree.leaves(result))
    return max(0, peak - made)


_VALUE = np.float32(0.5)


def _full(init: Callable[..., Any]) -> Any:
    """What a model of layers is initialised with, of one value."""
    types = jax.eval_shape(init, jax.random.key(0), jnp.ones([1, 1, WIDTH]))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, _VALUE), types)


def _flax(way: str) -> Tree:
    """Linen's variables, with `nn.scan` over layers or a Python loop of them."""
    from hk_stack.compare import in_linen  # Other modes do without Flax.

    block = functools.partial(in_linen.Block, _MODEL)
    layers = _full(in_linen.STACKS[way](block, LAYERS).init)["params"]
    embed: Tree = {"embed": {"embedding": np.full((TOKENS, WIDTH), _VALUE)}}
    return {"params": embed | (layers if way == "loop" else {"layers": layers})}


def _haiku() -> Tree:
    """Haiku's parameters of the same model, stacked."""
    given = models.Given(_MODEL, LAYERS, None, jnp.ones([1, 1, WIDTH]))
    init, _ = in_haiku.transformed(given, hk_stack.layer_stack)
    embed: Tree = {"embed": {"embeddings": np.full((TOKENS, WIDTH), _VALUE)}}
    return {**embed, **_full(init)}
