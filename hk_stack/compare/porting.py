"""What porting and stacking cost, against copying the arrays once.

The tree is that of a transformer with 24 layers and 101 million parameters: `D` 512, a
vocabulary of 50,000. All programs run in a process that keeps the memory which it has
once been given: to get new memory from a system can take many times as long as to copy
something into it, and how long depends on what else the machine does.
"""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hk_stack

LAYERS, WIDTH, HEADS, TOKENS = 24, 512, 8, 50_000
_NAMES = hk_stack.NumberedLayers("block_{}", "layers/block")

Tree = Any


def measured(repeat: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each program in alternating rounds, and its `extra_bytes`."""
    command = [sys.executable, "-m", "hk_stack.compare.porting", str(repeat)]
    done = subprocess.run(
        command, env={**os.environ, **_KEEP_MEMORY}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


# For the allocator of Linux; others do as they do.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def _measure(repeat: int) -> dict[str, dict[str, list[float]]]:
    runs = programs()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeat + 2):  # The first rounds get the memory.
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i > 1:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"run_s": seconds[name], "extra_bytes": [extra_bytes(run)]}
        for name, run in runs.items()
    }


def programs() -> dict[str, Callable[[], Any]]:
    """What to run, by name; the first is the baseline."""
    loop, scanned = _flax(loop=True), _flax(loop=False)
    of_stack = _like(scanned)
    of_loop = hk_stack.unstack_params(of_stack, _NAMES)
    in_jax = jax.tree.map(jnp.asarray, of_loop)
    stack_in_jax = jax.tree.map(jnp.asarray, of_stack)
    types = jax.tree.map(_type, of_stack)
    return {
        "copy, NumPy": lambda: jax.tree.map(np.copy, of_stack),
        "copy, JAX": lambda: jax.tree.map(jnp.copy, stack_in_jax),
        "port a scan": lambda: hk_stack.flax_to_haiku(scanned, (types, {})),
        "port a loop": lambda: hk_stack.flax_to_haiku(loop, (types, {})),
        "port back": lambda: hk_stack.haiku_to_flax((of_stack, {}), scanned),
        "stack, NumPy": lambda: hk_stack.stack_params(of_loop, _NAMES),
        "stack, JAX": lambda: hk_stack.stack_params(in_jax, _NAMES),
        "unstack, JAX": lambda: hk_stack.unstack_params(stack_in_jax, _NAMES),
    }


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
    made = sum(leaf.nbytes for leaf in jax.tree.leaves(result))
    return max(0, peak - made)


def largest_leaf() -> int:
    """Bytes of the largest array, in either layout."""
    return 4 * max(TOKENS * WIDTH, LAYERS * 4 * WIDTH * WIDTH)


def _type(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _flax(*, loop: bool) -> Tree:
    """Linen's variables, with `nn.scan` over layers or a Python loop of them."""
    params: Tree = {"embed": {"embedding": _full(TOKENS, WIDTH)}}
    if loop:
        params |= {f"block_{i}": _block() for i in range(LAYERS)}
    else:
        params["layers"] = {"block": _block(LAYERS)}
    return {"params": params}


def _block(*layers: int) -> Tree:
    inside = WIDTH // HEADS

    def dense(rows: tuple[int, ...], columns: tuple[int, ...]) -> Tree:
        kernel = _full(*layers, *rows, *columns)
        return {"kernel": kernel, "bias": _full(*layers, *columns)}

    def norm() -> Tree:
        return {"scale": _full(*layers, WIDTH), "bias": _full(*layers, WIDTH)}

    heads = {
        name: dense((WIDTH,), (HEADS, inside)) for name in ("query", "key", "value")
    }
    return {
        "attention": {**heads, "out": dense((HEADS, inside), (WIDTH,))},
        "attention_norm": norm(),
        "mlp_norm": norm(),
        "mlp_in": dense((WIDTH,), (4 * WIDTH,)),
        "mlp_out": dense((4 * WIDTH,), (WIDTH,)),
    }


def _full(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, np.float32)


def _like(variables: Tree) -> Tree:
    """Haiku's parameters of the same model, stacked."""
    params = variables["params"]
    block = params["layers"]["block"]
    found = {"embed": {"embeddings": params["embed"]["embedding"].copy()}}
    for name in ("attention_norm", "mlp_norm"):
        leaves = block[name]["scale"].copy(), block[name]["bias"].copy()
        found[f"layers/block/{name}"] = {"scale": leaves[0], "offset": leaves[1]}
    linears = {name: block[name] for name in ("mlp_in", "mlp_out")}
    for name in ("query", "key", "value", "out"):
        haiku = "linear" if name == "out" else name
        linears[f"attention/{haiku}"] = block["attention"][name]
    for name, leaves in linears.items():
        columns = WIDTH if "attention" in name else leaves["bias"].shape[-1]
        found[f"layers/block/{name}"] = {
            "w": leaves["kernel"].reshape(LAYERS, -1, columns).copy(),
            "b": leaves["bias"].reshape(LAYERS, columns).copy(),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
