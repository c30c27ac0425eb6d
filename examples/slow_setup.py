"""A layer with a slow function of its parameters, before and after `hk_stack`.

    python examples/slow_setup.py

In the Flax thread "Scan with split parameters" someone has layers whose `setup` is slow
and whose call is cheap, and would like the setup batched while the calls are scanned.
`layer` below is such a layer. Before:

    hk.layer_stack(LAYERS)(layer)(x)

computes `slow_kernel` inside the loop over layers: 32 times 1024 steps, one after the
other. After:

    hk_stack.layer_stack(LAYERS)(layer)(x)

it runs before the loop, for all layers at once: 1024 steps on arrays with a layer axis.
Nothing else changes, neither parameters nor results.

Which setups gain time: those made of many small steps that wait for one another, like
this one, since a step costs about as much for 32 layers as for one. Setups that keep
the processor busy already, such as large matrix products, gain little or nothing on a
CPU by being batched. Neither does a model whose time goes into its calls.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

import hk_stack

LAYERS, STATES, STEPS = 32, 32, 1024
# A rotation, so that no state grows or dies out.
A = np.linalg.qr(np.random.default_rng(0).normal(size=(STATES, STATES)))[0]


def slow_kernel(b: jax.Array) -> jax.Array:
    """Where a system goes from `b` `[STATES]` in `STEPS` steps: `[STEPS]`."""

    def step(h: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        h = jnp.asarray(A, h.dtype) @ h
        return h / jnp.linalg.norm(h), jnp.sum(h)

    return jax.lax.scan(step, b, length=STEPS)[1]


def layer(x: jax.Array) -> jax.Array:
    """A slow setup and a cheap call, `[STEPS] -> [STEPS]`."""
    b = hk.get_parameter("b", [STATES], init=hk.initializers.RandomNormal())
    kernel = slow_kernel(b)
    return x + jnp.tanh(kernel * x)


class Measured(NamedTuple):
    """What one stack does.

    Attributes:
      apply: The stack as a function of parameters and `x`.
      gradient: Its compiled gradient.
      inside: How many equations of `slow_kernel` are inside the loop over layers.
      compile_seconds: Time to trace and compile the gradient.
    """

    apply: Callable[..., jax.Array]
    gradient: Callable[..., Any]
    inside: int
    compile_seconds: float


def transform(layer_stack: Callable[..., Any]) -> hk.Transformed:
    """The stack of all layers: the only place where the two versions differ."""
    return hk.without_apply_rng(
        hk.transform(lambda x: layer_stack(LAYERS, name="layers")(layer)(x))
    )


def measure(layer_stack: Callable[..., Any], params: Any, x: jax.Array) -> Measured:
    """Traces the stack, and compiles its gradient."""
    apply = transform(layer_stack).apply

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(apply(params, x) ** 2)

    start = time.perf_counter()
    gradient = jax.jit(jax.grad(loss)).lower(params, x).compile()
    seconds = time.perf_counter() - start
    inside = slow_equations_inside(jax.make_jaxpr(apply)(params, x).jaxpr)
    return Measured(jax.jit(apply), gradient, inside, seconds)


def slow_equations_inside(jaxpr: jex.Jaxpr) -> int:
    """Counts the equations of `slow_kernel`'s steps inside the loop over layers."""
    return sum(
        len(list(equations(slow_loop)))
        for layer_loop in loops(jaxpr, LAYERS)
        for slow_loop in loops(layer_loop, STEPS)
    )


def loops(jaxpr: jex.Jaxpr, length: int) -> Iterator[jex.Jaxpr]:
    """The bodies of all `lax.scan`s of that length."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "scan" and eqn.params["length"] == length:
            yield eqn.params["jaxpr"].jaxpr


def equations(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """All equations, those inside of loops and of compiled functions included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            body = getattr(value, "jaxpr", value)
            if isinstance(body, jex.Jaxpr):
                yield from equations(body)


def run_times(functions: list[Callable[[], Any]], repeats: int = 20) -> list[float]:
    """The shortest run of each function in seconds, the functions taking turns."""
    seconds = np.zeros([repeats, len(functions)])
    for repeat in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[repeat, i] = time.perf_counter() - start
    return seconds.min(axis=0).tolist()


def difference(value: Any, reference: Any) -> float:
    """The largest difference between two pytrees, relative to the largest value."""
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(reference), strict=True)
    return max(float(jnp.max(abs(v - r)) / jnp.max(abs(r))) for v, r in pairs)


def main() -> None:
    """Prints both stacks side by side."""
    x = jnp.sin(jnp.arange(STEPS, dtype=jnp.float32))
    params = transform(hk_stack.layer_stack).init(jax.random.key(0), x)
    before = measure(hk.layer_stack, params, x)
    after = measure(hk_stack.layer_stack, params, x)
    seconds = run_times(
        [lambda: before.gradient(params, x), lambda: after.gradient(params, x)]
    )
    outputs = difference(after.apply(params, x), before.apply(params, x))
    gradients = difference(after.gradient(params, x), before.gradient(params, x))

    print(f"{'':38}{'hk.layer_stack':>16}{'hk_stack.layer_stack':>24}")
    row = "{:38}{:16.{digits}f}{:24.{digits}f}".format
    inside = before.inside, after.inside
    print(row("slow_kernel's equations in the loop", *inside, digits=0))
    compiling = before.compile_seconds, after.compile_seconds
    print(row("gradient: trace and compile, s", *compiling, digits=2))
    print(row("gradient: run, ms", *(1e3 * s for s in seconds), digits=1))
    # In float32, 1024 steps add up to rounding errors of this size.
    equal = "equal" if max(outputs, gradients) < 1e-3 else "DIFFERENT"
    print(
        f"Outputs and gradients are {equal}, up to rounding: the largest relative "
        f"differences are {outputs:.0e} and {gradients:.0e}."
    )


if __name__ == "__main__":
    main()
