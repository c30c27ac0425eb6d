"""Setup with conditionals in batches: each branch runs only where it was chosen."""

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close
from interpreter import computed

import hk_stack

L, D = 4, 3
X = jax.random.normal(jax.random.key(0), [2, D])
# Weights of layers, of which each chooses another way below.
W = jnp.stack([scale * jnp.eye(D) for scale in (0.5, -1.0, 2.0, 3.0)])
W = W + 0.1 * jax.random.normal(jax.random.key(1), W.shape)


def product(a):
    """Something that is worth a place in setup."""
    return jnp.tanh(a @ a)


def cond(w):
    return jax.lax.cond(w[0, 0] > 0, product, lambda a: 3 * a, w)


def switch(w):
    index = jnp.sum(w[0, 0] > jnp.array([0.0, 1.0])).astype(jnp.int32)
    branches = [product, jnp.linalg.inv, lambda a: a - product(2 * a)]
    return jax.lax.switch(index, branches, w)


def nested(w):
    return jax.lax.cond(w[0, 0] > 1, cond, lambda a: cond(-a), w)


def in_functions(w):
    return jax.checkpoint(jax.jit(cond))(w) + cond(product(w))


def in_scan(w):
    def turn(a, row):
        a = jax.lax.cond(row[0] > 0, product, lambda a: a + row[None], a)
        return a, jnp.sum(a)

    a, sums = jax.lax.scan(turn, w, w)
    return a + sums[None]


def in_while(w):
    """As many turns as the weights say; it has no gradient."""

    def turn(state):
        i, a = state
        return i + 1, jax.lax.cond(a[0, 0] > 0, product, lambda a: a + 1, a)

    w = jax.lax.stop_gradient(w)
    count = jnp.abs(w[0, 0]).astype(jnp.int32)
    return jax.lax.while_loop(lambda state: state[0] < count, turn, (0, w))[1]


def would_not_end(w):
    """A loop that ends only for those who choose it."""

    def grown(a):
        return jax.lax.while_loop(lambda a: a[0, 0] < 10, lambda a: 2 * a, a)

    w = jax.lax.stop_gradient(w)
    return jax.lax.cond(w[0, 0] > 0, grown, product, w)


def makes_nan(w):
    """What one branch makes of the values of another is no number."""
    return jax.lax.cond(
        w[0, 0] > 0, lambda a: product(a) / jnp.sqrt(a[0, 0]), lambda a: a, w
    )


def of_a_constant(w):
    """A conditional that no layer changes."""
    return jax.lax.cond(jnp.sum(jnp.arange(3)) > 2, product, lambda a: a, w)


@jax.custom_jvp
def tangents_of_its_own(w):
    return jax.lax.cond(w[0, 0] > 0, product, lambda a: 3 * a, w)


@tangents_of_its_own.defjvp
def _(primals, tangents):
    [w], [t] = primals, tangents
    change = jax.lax.cond(w[0, 0] > 0, lambda: t / jnp.sqrt(w[0, 0]), lambda: 2 * t)
    return tangents_of_its_own(w), change


def with_a_rule(w):
    return in_functions(tangents_of_its_own(w))


@jax.custom_jvp
def true_rule(w):
    return cond(w)


@true_rule.defjvp
def _(primals, tangents):
    # Of rules that are no derivatives, old versions of JAX lose some in a scan.
    return true_rule(*primals), jax.jvp(cond, primals, tangents)[1]


# Of NumPy: an array of JAX that is closed over may be an activation, and stays.
TABLE = np.arange(9, dtype=np.float32).reshape(3, 3)


@jax.custom_vjp
def cotangents_of_its_own(w, count, scale):
    return scale * cond(w) + TABLE * count.astype(w.dtype)


def _forward(w, count, scale):
    return cotangents_of_its_own(w, count, scale), (w, count, scale)


def _backward(kept, given):
    w, _, scale = kept
    change = jax.lax.cond(
        w[0, 0] > 0, lambda: given * scale / jnp.sqrt(w[0, 0]), lambda: 2 * given
    )
    return change * TABLE, None, jnp.sum(given) * jnp.sin(scale)


cotangents_of_its_own.defvjp(_forward, _backward)


def with_a_rule_backward(w):
    scale = jnp.float32(2)
    one = cotangents_of_its_own(w, (w[1, 1] > 0).astype(jnp.int32), scale)
    return jax.checkpoint(cotangents_of_its_own)(one, jnp.int32(3), jnp.sum(w))


def with_a_rule_inside(w):
    """A rule in a loop in a branch."""

    def turn(a, row):
        return tangents_of_its_own(a) + row[None], None

    return jax.lax.cond(
        w[0, 0] > 0, lambda a: jax.lax.scan(turn, a, a)[0], with_a_rule_backward, w
    )


SETUPS = [
    with_a_rule,
    with_a_rule_backward,
    with_a_rule_inside,
    cond,
    switch,
    nested,
    in_functions,
    in_scan,
    in_while,
    would_not_end,
    makes_nan,
    of_a_constant,
    jax.scipy.linalg.expm,
]


def model(of, **options):
    def layer(x):
        w = hk.get_parameter("w", [D, D], init=hk.initializers.Identity())
        return jnp.tanh(x @ of(w))

    stack = hk_stack.layer_stack(L, name="layers", **options)(layer)
    return lambda w, x: hk.transform(stack).apply({"layers/~": {"w": w}}, None, x)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda f: f.__name__)
def test_is_what_one_by_one_is(setup):
    results = []
    for size in (L, 1):
        apply = model(setup, setup_batch_size=size)

        def loss(w, x, apply=apply):
            return jnp.sum(jnp.sin(apply(w, x)))

        results.append(computed(jax.value_and_grad(loss), W, X))
    assert_close(*results)
    assert np.isfinite(results[0][1]).all()


@pytest.mark.parametrize("setup", [cond, true_rule], ids=["cond", "true_rule"])
def test_second_derivatives(setup):
    results = []
    for size in (L, 1):
        apply = model(setup, setup_batch_size=size)
        loss = jax.grad(lambda w, apply=apply: jnp.sum(jnp.sin(apply(w, X))))
        results.append(computed(lambda w, loss=loss: jax.jvp(loss, [w], [w]), W))
    assert_close(*results)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda f: f.__name__)
def test_compiled(setup):
    apply = model(setup)
    assert_close(jax.jit(apply)(W, X), computed(model(setup, setup="inline"), W, X))


@pytest.mark.parametrize("setup", SETUPS, ids=lambda f: f.__name__)
def test_gradients_are_one_batch(setup):
    apply = model(setup, setup_batch_size=L)
    grad = jax.grad(lambda w, x: jnp.sum(jnp.sin(apply(w, x))))
    eqns = jaxprs.equations(jax.make_jaxpr(grad)(W, X).jaxpr)
    loops = [e.params["length"] for e in eqns if e.primitive.name == "scan"]
    # Those of the calls, forward and, where gradients reach parameters, backward.
    assert loops.count(L) == (1 if setup in (in_while, would_not_end) else 2)


@pytest.mark.parametrize("setup", [jax.scipy.linalg.expm, with_a_rule])
def test_setup_is_one_batch(setup):
    jaxpr = jax.make_jaxpr(model(setup))(W, X).jaxpr
    loops = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert loops.count(L) == 1  # That of the calls: setup is in none over layers.
    assert "cond" in jaxprs.outside(jaxpr, L)


def test_a_branch_that_nobody_chose_does_not_run(capfd):
    def setup(w):
        def printed(a):
            jax.debug.print("other branch")
            return product(a)

        return jax.lax.cond(w[0, 0] > 100, printed, product, w)

    batched = jax.jit(model(setup, setup_batch_size=L))
    jax.block_until_ready(batched(W, X))
    jax.effects_barrier()
    assert "other branch" not in capfd.readouterr().out
