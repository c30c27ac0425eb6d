"""The layer's index, and what it is for."""

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close, assert_equal
from interpreter import computed
from layer_cases import D, slow, vectors, weight

import hk_stack

KEY = jax.random.key(0)
EXECUTORS = ("scan", "unrolled", "python")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("loop", EXECUTORS)
def test_index(loop, reverse):
    def layer(order, y):
        index = hk_stack.layer_index()
        assert isinstance(index, int) == (loop == "python")
        return order * 10 + index, y * index

    def run(ys):
        stack = hk_stack.layer_stack(4, True, loop=loop)(layer)
        return stack(jnp.int32(0), ys, reverse=reverse)

    order, products = hk.transform(run).apply({}, None, jnp.array([1, 1, 1, 2]))
    assert order == (3210 if reverse else 123)
    assert_equal(products, jnp.array([0, 1, 2, 6]))


def test_nested_stacks_have_their_own():
    def outer(x):
        i = hk_stack.layer_index()

        def inner(x):
            j = hk_stack.layer_index()
            return jnp.append(x[1:], jnp.int32(10 * i + j))

        x = hk_stack.layer_stack(2)(inner)(x)
        return jnp.append(x[1:], jnp.int32(hk_stack.layer_index()))

    for loop in EXECUTORS:
        with hk_stack.use_loop(loop):
            model = hk.transform(hk_stack.layer_stack(2)(outer))
            found = model.apply({}, None, jnp.zeros([6], jnp.int32))
        assert found.tolist() == [0, 1, 0, 10, 11, 1]


@pytest.mark.parametrize("init", ["vmap", "map", "scan", "auto"])
def test_initial_values_may_depend_on_depth(init):
    def layer(x):
        deviation = 1.0 / (1.0 + jnp.float32(hk_stack.layer_index()))
        w = hk.get_parameter(
            "w", [100, 100], init=hk.initializers.RandomNormal(deviation)
        )
        depth = hk.get_parameter(
            "depth", [], init=lambda *_: jnp.float32(hk_stack.layer_index())
        )
        return x @ w * depth

    model = hk.transform(hk_stack.layer_stack(4, name="s", init=init)(layer))
    found = computed(model.init, KEY, jnp.ones([1, 100]))["s/~"]
    np.testing.assert_allclose(
        found["w"].std((1, 2)), [1, 1 / 2, 1 / 3, 1 / 4], rtol=0.05
    )
    assert_equal(found["depth"], jnp.arange(4.0))


def test_initialisers_stay_batched():
    def layer(x):
        scale = 1.0 + jnp.float32(hk_stack.layer_index())
        return x @ hk.get_parameter(
            "w", [D, D], init=hk.initializers.RandomNormal(scale)
        )

    model = hk.transform(hk_stack.layer_stack(5, name="s", init="vmap")(layer))
    jaxpr = jax.make_jaxpr(model.init)(KEY, *vectors()).jaxpr
    names = [eqn.primitive.name for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    # The chain of keys, and the layers; but no loop over initialisers.
    assert "erf_inv" in jaxprs.names(jaxpr)
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    for eqn in loops:
        assert "erf_inv" not in jaxprs.names(eqn.params["jaxpr"].jaxpr), names


def test_setup_may_depend_on_the_index():
    def layer(x):
        return x @ slow(weight() * (1.0 + jnp.float32(hk_stack.layer_index())))

    model = hk.transform(hk_stack.layer_stack(3, name="s")(layer))
    params = computed(model.init, KEY, *vectors())
    jaxpr = jax.make_jaxpr(model.apply)(params, None, *vectors())
    assert "cumsum" not in jaxprs.names(jaxprs.body(jaxpr.jaxpr, 3))
    (x,) = vectors()
    for i in range(3):
        x = x @ slow(params["s/~"]["w"][i] * (1.0 + i))
    assert_close(computed(model.apply, params, None, *vectors()), x)


def test_index_under_remat_scan_and_vmap():
    def layer(x):
        def add(x, _=None):
            return x + jnp.float32(hk_stack.layer_index())

        x = hk.remat(add)(x)
        x, _ = hk.scan(lambda x, _: (add(x), None), x, None, 2)
        return jax.vmap(add)(x)

    for loop in EXECUTORS:
        stack = hk_stack.layer_stack(4, loop=loop, remat=True)(layer)
        run = jax.grad(lambda x, s=stack: hk.transform(s).apply({}, None, x).sum())
        value = computed(hk.transform(stack).apply, {}, None, jnp.zeros([2]))
        assert_equal(value, jnp.full([2], 4.0 * 6))
        assert_equal(computed(run, jnp.zeros([2])), jnp.ones([2]))


def test_outside_of_a_layer_function():
    with pytest.raises(ValueError, match="called outside of a layer function"):
        hk_stack.layer_index()


# Recipes, as docs/depth.md has them.

RATE, DEPTH = 0.5, 6


def stochastic_depth(x):
    """Skips a block with a probability that grows with depth."""
    skip = RATE * jnp.float32(hk_stack.layer_index()) / (DEPTH - 1)
    keep = jax.random.bernoulli(hk.next_rng_key(), 1.0 - skip)
    block = jnp.tanh(hk.Linear(D)(x))
    return x + jnp.where(keep, block / (1.0 - skip), 0.0)


def test_stochastic_depth():
    model = hk.transform(hk_stack.layer_stack(DEPTH, name="s")(stochastic_depth))
    params = computed(model.init, KEY, *vectors())
    collected = []
    with hk_stack.use_loop("python"):
        for seed in range(3):
            collected.append(model.apply(params, jax.random.key(seed), *vectors()))
    for seed, expected in enumerate(collected):
        found = computed(model.apply, params, jax.random.key(seed), *vectors())
        assert_close(found, expected)

    def kept(key):
        """How often each block is kept: the mask is what changes the carry."""

        def layer(x):
            y = stochastic_depth(x)
            hk_stack.tap(jnp.any(y != x), "kept")
            return y

        twin = hk.transform(hk_stack.layer_stack(DEPTH, name="s")(layer))
        return hk_stack.collect(twin.apply)(params, key, *vectors())[1]["s/kept"]

    rates = jax.jit(jax.vmap(kept))(jax.random.split(KEY, 2000)).mean(0)
    expected = 1 - RATE * np.arange(DEPTH) / (DEPTH - 1)
    np.testing.assert_allclose(rates, expected, atol=0.04)


def early_exit(x, num_layers):
    """Runs the first `num_layers` layers, a number that may be traced."""
    block = hk.Linear(D)
    if hk.running_init():
        return block(x)
    is_on = hk_stack.layer_index() < num_layers
    return hk.cond(is_on, lambda x: jnp.tanh(block(x)), lambda x: x, x)


def test_early_exit():
    def run(x, num_layers):
        stack = hk_stack.layer_stack(DEPTH, name="s")(early_exit)
        return stack(x, num_layers=num_layers)

    model = hk.transform(run)
    params = computed(model.init, KEY, *vectors(), DEPTH)
    (x,) = vectors()
    for depth in range(DEPTH + 1):
        assert_close(computed(model.apply, params, None, *vectors(), depth), x)
        if depth < DEPTH:
            leaves = jax.tree.map(lambda leaf, i=depth: leaf[i], params["s/linear"])
            x = jnp.tanh(x @ leaves["w"] + leaves["b"][None])
