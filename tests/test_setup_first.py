"""`setup_first`: the setup of a scan over layers, in any framework, runs before it."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close
from interpreter import computed

import hk_stack
from hk_stack.compare import s4

L, T, D, N = 4, 8, 4, 4
X = jax.random.normal(jax.random.key(0), [2, T, D])


class SeqInternal(nn.Module):
    """A layer whose setup is slow and whose call is cheap."""

    def setup(self):
        params = {
            name: self.param(name, init, shape, jnp.float32)
            for name, (shape, init) in s4.parameters(D, N).items()
        }
        self.kernel = s4.kernel(s4.dplr(params), T)

    def __call__(self, c, ignore):
        return jnp.tanh(s4.convolve(c, self.kernel)), None


class OfFlax(nn.Module):
    """`nn.scan` with split parameters."""

    def setup(self):
        stacked = nn.scan(
            SeqInternal,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=L,
        )
        self.layers = stacked()

    def __call__(self, x):
        return self.layers(x, None)[0]


def of_haiku(layer_stack):
    """The same in Haiku."""

    def layer(x):
        params = {
            name: hk.get_parameter(
                name, shape, init=lambda s, d, init=init: init(hk.next_rng_key(), s, d)
            )
            for name, (shape, init) in s4.parameters(D, N).items()
        }
        return jnp.tanh(s4.convolve(x, s4.kernel(s4.dplr(params), T)))

    return hk.transform(layer_stack(L, name="layers")(layer))


@pytest.fixture(scope="module")
def flax():
    model = OfFlax()
    return model.apply, model.init(jax.random.key(1), X)


def loss(fn):
    return lambda params, x: jnp.sum(jnp.sin(fn(params, x)))


def in_loop(fn, *args):
    """The primitives in the loop over layers that compute, in order of their names."""
    names = jaxprs.names(jaxprs.body(jax.make_jaxpr(fn)(*args).jaxpr, L))
    return sorted(name for name in names if name not in LAYOUT)


LAYOUT = {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "transpose"}


def test_no_kernel_is_made_in_the_loop_as_in_a_stack(flax):
    apply, variables = flax
    stack = of_haiku(hk_stack.layer_stack).apply
    params = {"layers/~": variables["params"]["layers"]}
    first = in_loop(hk_stack.setup_first(apply), variables, X)
    assert first == in_loop(lambda params, x: stack(params, None, x), params, X)
    assert len(first) < len(in_loop(apply, variables, X)) // 3
    assert first.count("fft") == 2  # Of the activations, there and back.


def test_is_the_same_function(flax):
    apply, variables = flax
    first = hk_stack.setup_first(apply)
    assert_close(computed(first, variables, X), computed(apply, variables, X))
    grads = [computed(jax.grad(loss(f)), variables, X) for f in (first, apply)]
    assert_close(*grads, 1e-4)
    assert_close(jax.jit(first)(variables, X), computed(apply, variables, X), 1e-4)


def test_stacks_of_haiku(flax):
    _, variables = flax
    params = {"layers/~": variables["params"]["layers"]}
    apply = of_haiku(hk.layer_stack).apply
    first = hk_stack.setup_first(apply)
    assert "fft" in in_loop(lambda p, x: apply(p, None, x), params, X)
    names = in_loop(lambda p, x: first(p, None, x), params, X)
    assert names.count("fft") == 2


def model(params, x, *, scale=None, is_training=True):
    def layer(x, w):
        x = jnp.tanh(x @ jax.scipy.linalg.expm(w))
        return x if scale is None else x * scale, None

    return jax.lax.scan(layer, x, params)[0] if is_training else x


PARAMS = jnp.asarray(np.random.default_rng(0).normal(size=[L, D, D]), jnp.float32)


def test_nothing_to_compute_first_nothing_changed():
    def scan(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]

    programs = [
        jax.make_jaxpr(f)(PARAMS, X) for f in (scan, hk_stack.setup_first(scan))
    ]
    assert str(programs[0]) == str(programs[1])


def test_what_is_closed_over_is_not_known():
    """It may be the batch: then all would depend on what is known."""
    first = hk_stack.setup_first(lambda params: model(params, X))
    names = jaxprs.names(jaxprs.body(jax.make_jaxpr(first)(PARAMS).jaxpr, L))
    assert names.count("dot_general") == 1
    assert_close(computed(first, PARAMS), computed(model, PARAMS, X))


def test_keywords_and_eager_runs(count_of_compilations):
    first = hk_stack.setup_first(model)
    for options in ({"scale": X}, {"is_training": False}):
        assert_close(first(PARAMS, X, **options), model(PARAMS, X, **options))
    first(PARAMS, X)
    count_of_compilations.clear()
    first(PARAMS, X)
    assert not count_of_compilations
    assert first.__name__ == "model"


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint, jax.vmap])
def test_inside_of(around):
    args = [jnp.stack([a, a]) if around is jax.vmap else a for a in (PARAMS, X)]
    found, expected = (
        computed(around(f), *args) for f in (hk_stack.setup_first(model), model)
    )
    assert_close(found, expected)


def test_a_mark_on_more_than_parameters():
    def model(params, x):
        return hk_stack.hoist(x @ params[0])

    message = "setup_first of 'model': hk_stack.hoist was given .*argument `x`"
    with pytest.raises(ValueError, match=message):
        hk_stack.setup_first(model)(PARAMS, X)
