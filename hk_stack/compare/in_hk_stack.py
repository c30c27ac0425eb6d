"""The models of `in_haiku` in `hk_stack.layer_stack`, with setup in different places.

"inline" runs setup in the loop, "auto" before it. "prepared" has derived values for an
argument, that `hk_stack.partition` made before: what is measured is the rest.
"""

import functools

import jax

import hk_stack
from hk_stack.compare import in_haiku, models

WAYS = ("inline", "auto", "prepared")


def stack(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Stack:
    """The blocks in `hk_stack.layer_stack`."""
    setup = "inline" if way == "inline" else "auto"
    layers = hk_stack.layer_stack(num_layers, name="layers", setup=setup)
    net = in_haiku.network(model, layers)
    apply = in_haiku.applied(net)
    if way != "prepared":
        return models.Stack(params, apply, net.init, lambda params: params)
    split = hk_stack.partition(apply, params, x)
    return models.Stack(split.setup(params), split.call, None, None)


def decoder(
    way: str, model: models.Model, num_layers: int, params: models.Params, x: jax.Array
) -> models.Decoder:
    """The S4 blocks, one step of time."""
    layer_stack = hk_stack.layer_stack
    if way == "inline":
        layer_stack = functools.partial(layer_stack, setup="inline")
    step = in_haiku.stepper(layer_stack, model, num_layers, x.shape[1])
    states = in_haiku.states(model, num_layers, x)
    if way != "prepared":
        return models.Decoder(params, step, states)
    split = hk_stack.partition(step, params, x[:, 0], states)
    return models.Decoder(split.setup(params), split.call, states)
