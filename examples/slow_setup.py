"""A layer with a slow function of its parameters, before and after `hk_stack`.

    python examples/slow_setup.py

In the Flax thread "Scan with split parameters" someone has layers whose `setup` is slow
and whose call is cheap, and would like the setup batched while the calls are scanned.
`layer` below is such a layer. Before:

    hk.layer_stack(32)(layer)(x)

computes `slow_kernel` inside the loop over layers: 32 times 1024 steps, one after the
other. After:

    hk_stack.layer_stack(32)(layer)(x)

it runs before the loop, for all layers at once: 1024 steps on arrays with a layer axis.
Nothing else changes, neither parameters nor results.

Which setups gain time: those made of many small steps that wait for one another, like
this one, since a step costs about as much for 32 layers as for one. Setups that keep
the processor busy already, such as large matrix products, gain little or nothing on a
CPU by being batched. Neither does a model whose time goes into its calls.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import common
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from common import flag

import hk_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes."""

    layers: int = flag("Number of layers.", default=32)
    states: int = flag("States of a layer's system.", default=32)
    steps: int = flag("Small steps of a setup, one after the other.", default=1024)


DEFAULT = Config()


def slow_kernel(b: jax.Array, steps: int) -> jax.Array:
    """Where a system goes from `b` `[STATES]` in as many steps: `[steps]`."""
    # A rotation, so that no state grows or dies out.
    a, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(b), len(b))))

    def step(h: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        h = jnp.asarray(a, h.dtype) @ h
        return h / jnp.linalg.norm(h), jnp.sum(h)

    return jax.lax.scan(step, b, length=steps)[1]


def transform(config: Config, layer_stack: Callable[..., Any]) -> hk.Transformed:
    """The stack of all layers: the two versions differ in `layer_stack` only."""

    def layer(x: jax.Array) -> jax.Array:
        """A slow setup and a cheap call, `[steps] -> [steps]`."""
        init = hk.initializers.RandomNormal()
        b = hk.get_parameter("b", [config.states], init=init)
        kernel = slow_kernel(b, config.steps)
        return x + jnp.tanh(kernel * x)

    stack = layer_stack(config.layers, name="layers")
    return hk.without_apply_rng(hk.transform(lambda x: stack(layer)(x)))


def gradient(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """That of the mean square of a stack's outputs, by its parameters."""
    return jax.grad(lambda *args: jnp.mean(apply(*args) ** 2))


def main(config: Config) -> None:
    """Prints both stacks side by side."""
    before, after = (transform(config, x.layer_stack) for x in (hk, hk_stack))
    x = jnp.sin(jnp.arange(config.steps, dtype=jnp.float32))
    params = after.init(jax.random.key(0), x)
    built = [common.build(gradient(s.apply), params, x) for s in (before, after)]
    seconds = [each.seconds for each in built]
    runs = 1e3 * common.run_times([each.run for each in built], rounds=20).min(axis=1)
    outputs = common.difference(after.apply(params, x), before.apply(params, x))
    gradients = common.difference(built[1].run(), built[0].run())

    print(f"{'':34}{'hk.layer_stack':>16}{'hk_stack.layer_stack':>24}")
    print("{:34}{:16.2f}{:24.2f}".format("gradient: build, CPU s", *seconds))
    print("{:34}{:16.1f}{:24.1f}".format("gradient: run, ms", *runs))
    # In float32, 1024 steps add up to rounding errors of this size.
    equal = "equal" if max(outputs, gradients) < 1e-3 else "DIFFERENT"
    print(
        f"Outputs and gradients are {equal}, up to rounding: the largest relative "
        f"differences are {outputs:.0e} and {gradients:.0e}."
    )


if __name__ == "__main__":
    common.run(main, DEFAULT)
