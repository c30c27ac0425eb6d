"""What the results of a program depend on, beside what `jax.vmap` says of it."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core as jex

from hk_stack import _reach


def reached_by(program, given):
    """The results that have a batch axis if the input `given` has one."""
    found = set()

    @jax.custom_batching.custom_vmap
    def spied(*outputs):
        return outputs

    @spied.def_vmap
    def rule(size, are_mapped, *outputs):
        del size
        found.update(i for i, flag in enumerate(are_mapped) if flag)
        return outputs, tuple(are_mapped)

    def run(*values):
        return spied(*jex.jaxpr_as_fun(program)(*values))

    count = len(program.in_avals)
    axes = [0 if i == given else None for i in range(count)]
    values = [jnp.ones([2] if i == given else []) for i in range(count)]
    jax.eval_shape(jax.vmap(run, axes), *values)
    return found


@jax.custom_jvp
def own_rule(x, y):
    return x, x * y


own_rule.defjvp(lambda primals, tangents: (own_rule(*primals), tangents))


def conditional(a, b, c, d):
    swapped = jax.lax.cond(a > 0, lambda b, c: (c, b), lambda b, c: (c, 1.0), b, c)
    return *swapped, d


def loop(a, b, c, d):
    def turn(carry, row):
        a, b, c = carry
        return (a, a + b, c * row), c

    return jax.lax.scan(turn, (a, b, c), jnp.stack([d, d]))


def while_loop(a, b, c, d):
    def body(carry):
        n, _, b = carry
        return n + 1, b * d, b

    n, *rest = jax.lax.while_loop(lambda carry: carry[0] < c, body, (a * 0, a, b))
    return n, *rest, jax.lax.fori_loop(0, 3, lambda _, x: x + a, d)


def calls(a, b, c, d):
    inner = jax.jit(lambda a, b: (b, 2.0 * a))
    return jax.checkpoint(inner)(a, b), own_rule(c, d), jnp.zeros_like(a), 3.0


@pytest.mark.parametrize("fn", [conditional, loop, while_loop, calls])
def test_results_are_reached_as_vmap_says(fn):
    program = jax.make_jaxpr(fn)(*map(jnp.float32, range(4)))
    found = _reach.results(program, [1 << i for i in range(4)])
    for i in range(4):
        expected = reached_by(program, i)
        assert {k for k, mask in enumerate(found) if mask >> i & 1} == expected
