"""Tables about depth: rematerialisation, and loops that run in Python.

The same blocks in `hk.layer_stack`, in this library, and nested by hand: the pure
function of one block in `jax.lax.scan` and `jax.checkpoint`, as one would write it.
"""

import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax

import hk_stack
from hk_stack.compare import in_haiku, models
from hk_stack.compare.measure import Program

LAYERS, GROUP = 48, 6  # the group that remat_every="sqrt" takes of as many layers
SHAPE = (4, 256, 64)  # of the activations `[B, T, D]`


def rematerialised(name: str) -> list[Program]:
    """Gradients of a model's blocks, with more and more computed again.

    Args:
      name: Of the model in `models.MODELS`, one without setup.
    """
    block = in_haiku.layer(models.MODELS[name])

    def again(x: jax.Array) -> jax.Array:
        return hk.remat(block)(x)

    stacks = {
        "hk.layer_stack": hk.layer_stack(LAYERS, name="layers")(block),
        "hk.layer_stack, hk.remat": hk.layer_stack(LAYERS, name="layers")(again),
        "hk_stack remat": _stack(block, remat=True),
        "hk_stack remat, dots kept": _stack(
            block, remat=jax.checkpoint_policies.dots_saveable
        ),
        "hk_stack remat, sqrt": _stack(block, remat=True, remat_every="sqrt"),
    }
    x = jax.random.normal(jax.random.key(0), SHAPE)
    params = hk.transform(stacks["hk.layer_stack"]).init(jax.random.key(1), x)
    by_hand = {
        "by hand, each layer": functools.partial(_by_hand, block, 1),
        "by hand, groups of 6": functools.partial(_by_hand, block, GROUP),
    }
    programs = {n: in_haiku.applied(hk.transform(s)) for n, s in stacks.items()}
    return [Program(n, f, (params, x)) for n, f in (programs | by_hand).items()]


def _stack(block: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return hk_stack.layer_stack(LAYERS, name="layers", **options)(block)


def _by_hand(
    block: Callable[..., Any], every: int, params: models.Params, x: jax.Array
) -> jax.Array:
    """The blocks in nested scans, of which each turn is computed again."""
    apply = in_haiku.applied(hk.transform(block))
    again = functools.partial(jax.checkpoint, prevent_cse=False)
    own = {name.removeprefix("layers/"): leaves for name, leaves in params.items()}

    @again
    def layer(x: jax.Array, own: models.Params) -> tuple[jax.Array, None]:
        return apply(own, x), None

    @again
    def group(x: jax.Array, own: models.Params) -> tuple[jax.Array, None]:
        return jax.lax.scan(layer, x, own)

    if every == 1:
        return jax.lax.scan(layer, x, own)[0]
    fold = functools.partial(_fold, every=every)
    return jax.lax.scan(group, x, jax.tree.map(fold, own))[0]


def _fold(leaf: jax.Array, every: int) -> jax.Array:
    return leaf.reshape(-1, every, *leaf.shape[1:])


def eager(name: str) -> list[tuple[str, Callable[[], Any]]]:
    """A model's blocks outside of `jit`: a loop in Python, and a stack in Python."""
    block = in_haiku.layer(models.MODELS[name])

    def loop(x: jax.Array) -> jax.Array:
        for _ in range(LAYERS):
            x = block(x)
        return x

    stack = hk.transform(_stack(block, loop="python"))
    by_hand = hk.transform(loop)
    x = jax.random.normal(jax.random.key(0), SHAPE)
    stacked = jax.jit(stack.init)(jax.random.key(0), x)
    names = hk_stack.NumberedLayers("block", "layers/block")
    params = hk_stack.unstack_params(stacked, names)
    return [
        ("a loop by hand", lambda: by_hand.apply(params, None, x)),
        ("hk_stack python", lambda: stack.apply(stacked, None, x)),
    ]
