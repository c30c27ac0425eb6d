"""Setup and initialisers in batches: only where that is what layer after layer is."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_close, assert_equal
from interpreter import computed
from jax.experimental import sparse

import hk_stack

# As users have it: as an error, it would keep a batch from being made.
pytestmark = pytest.mark.filterwarnings("ignore:Explicitly requested dtype")

D, L = 4, 3
KEY = jax.random.key(0)
X = jax.random.normal(KEY, [2, D])


def weight():
    return hk.get_parameter("w", [D, D], init=hk.initializers.RandomNormal(0.3))


def model(layer, layer_stack=hk_stack.layer_stack, **options):
    return hk.transform(lambda x: layer_stack(L, name="layers", **options)(layer)(x))


def difference(w):
    """What is left of it in single precision is noise."""
    with jax.enable_x64(True):
        a = w.astype(jnp.float64)
        b = a + 1e-7
        return ((b @ b - a @ a) * 1e7).astype(jnp.float32)


def doubles(x):
    return x + x @ difference(weight())


def many_doubles(x):
    w = weight()
    with jax.enable_x64(True):
        a = w.astype(jnp.float64) + 3 * jnp.eye(D, dtype=jnp.float64)
        made = jnp.linalg.inv(a) + jnp.linalg.cholesky(a @ a.T)
        made = made + jnp.fft.fft(a).real + jnp.einsum("ij,jk->ik", a, a)
        return x + x @ made.astype(jnp.float32)


def doubles_in_a_scan(x):
    w = weight()

    def turn(total, row):
        with jax.enable_x64(True):
            return total + jnp.cumsum(row.astype(jnp.float64)), None

    with jax.enable_x64(True):
        total, _ = jax.lax.scan(turn, jnp.zeros(D, jnp.float64), w)
        return x + total.astype(jnp.float32)[None]


def linear(x):
    def times(scale, v):
        return scale * v

    w = weight()
    sums = jnp.cumsum(w[0])
    made = jax.custom_derivatives.linear_call(times, times, w.sum(0), sums)
    return x + jnp.tanh(made.sum())


def compressed(x):
    return x + (sparse.CSR.fromdense(weight(), nse=D * D) @ jnp.ones(D))[None]


def coordinates(x):
    return x + (sparse.COO.fromdense(weight(), nse=D * D) @ jnp.ones(D))[None]


def ragged(x):
    w = weight()
    sizes = jnp.array([1, D - 1], jnp.int32)
    return x + jnp.tanh(x @ jax.lax.ragged_dot(w, jnp.stack([w, w]), sizes))


@jax.custom_jvp
def guarded(x):
    return jnp.cumsum(x, 0)


@guarded.defjvp
def _(primals, tangents):
    total = primals[0].sum()
    change = jax.lax.cond(
        total == 0,
        lambda total, tangent: jnp.zeros_like(tangent),
        lambda total, tangent: tangent / total,
        total,
        tangents[0],
    )
    return guarded(*primals), change


@jax.custom_jvp
def endless(x):
    return jnp.cumsum(x, 0)


@endless.defjvp
def _(primals, tangents):
    total = jnp.abs(primals[0].sum())

    def grow(total):
        return jax.lax.while_loop(lambda t: t < 9, lambda t: t * (1 + total), total)

    slope = jax.lax.cond(total > 0.1, grow, lambda t: t, total)
    return endless(*primals), slope * tangents[0]


@jax.custom_vjp
def foreign(x):
    return jnp.cumsum(x, 0)


def pull_back(shape, bar):
    kind = jax.ShapeDtypeStruct(bar.shape, bar.dtype)
    return (jax.pure_callback(lambda bar: 2 * np.asarray(bar), kind, bar),)


foreign.defvjp(lambda x: (foreign(x), None), pull_back)


def of_weight(function):
    return lambda x: x + jnp.tanh(x @ function(weight()))


FORWARD = {
    "doubles": doubles,
    "many doubles": many_doubles,
    "doubles in a scan": doubles_in_a_scan,
    "linear_call": linear,
    "CSR": compressed,
    "COO": coordinates,
}
DIFFERENTIABLE = {
    "ragged_dot": ragged,
    "a cond in a rule": of_weight(guarded),
    "a callback in a rule": of_weight(foreign),
}


@pytest.mark.parametrize("layer", FORWARD.values(), ids=FORWARD)
def test_forward(layer):
    params = computed(model(layer).init, KEY, X)
    expected = computed(model(layer, hk.layer_stack).apply, params, None, X)
    ours = model(layer).apply
    assert_close(computed(ours, params, None, X), expected)
    split = hk_stack.partition(ours, params, None, X)
    found = computed(lambda p, x: split.call(split.setup(p), None, x), params, X)
    assert_close(found, expected)


@pytest.mark.parametrize("layer", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients(layer):
    params = computed(model(layer).init, KEY, X)

    def loss(layer_stack):
        apply = model(layer, layer_stack).apply
        return lambda params, x: jnp.sum(jnp.sin(apply(params, None, x)))

    expected = computed(jax.value_and_grad(loss(hk.layer_stack)), params, X)
    ours = loss(hk_stack.layer_stack)
    assert_close(computed(jax.value_and_grad(ours), params, X), expected)
    accumulate = functools.partial(hk_stack.accumulate, ours)
    assert_close(computed(accumulate, params, X[None]), expected)


def test_a_rule_that_would_not_end_for_another_layer():
    apply = model(of_weight(endless)).apply
    params = computed(model(of_weight(endless)).init, KEY, X)
    params = jax.tree.map(lambda w: w.at[1].set(0), params)  # Layer 1 does not grow.

    def tangent(params):
        return jax.jvp(lambda p: apply(p, None, X), [params], [params])[1]

    assert np.all(np.isfinite(computed(tangent, params)))


def scaled(w):
    def times(scale, v):
        return scale * v

    return jax.custom_derivatives.linear_call(times, times, w + 1, w)


@pytest.mark.parametrize("method", ["auto", "vmap", "map"])
@pytest.mark.parametrize("make", [difference, scaled])
def test_initial_values(make, method):
    def layer(x):
        def init(shape, dtype):
            return make(jax.random.normal(hk.next_rng_key(), shape, dtype))

        return x @ hk.get_parameter("w", [D, D], init=init)

    expected = computed(model(layer, hk.layer_stack).init, KEY, X)
    assert_equal(computed(model(layer, init=method).init, KEY, X), expected)
