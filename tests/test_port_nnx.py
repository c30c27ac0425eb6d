"""Porting states of NNX, and back into them."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import FAST, assert_equal

import hk_stack
from hk_stack import port

nnx = pytest.importorskip("flax.nnx")
cases = pytest.importorskip("port_cases")

B, T, D, L = 2, 5, 6, 3


class Wrapped(nnx.Module):
    """A module with a name: that of its attribute."""

    def __init__(self, make, run, rngs):
        self.layer = make(rngs)
        self.run = run

    def __call__(self, x):
        return self.run(self.layer, x)


def called(layer, x):
    return layer(x)


def attended(layer, x):
    return layer(x, decode=False)


def unrolled(cell, x):
    return nnx.RNN(cell)(x)


def haiku_attention(x):
    init = hk.initializers.VarianceScaling()
    attention = hk.MultiHeadAttention(2, 3, w_init=init, model_size=D, name="layer")
    return attention(x, x, x)


def haiku_batch_norm(x):
    return cases.haiku_batch_norm(x, name="layer")


# By name: what makes the module and calls it, the same in Haiku, and the inputs.
MODULES = {
    "linear": (
        lambda rngs: nnx.Linear(D, 4, rngs=rngs),
        called,
        lambda x: hk.Linear(4, name="layer")(x),
    ),
    "linear general": (
        lambda rngs: nnx.LinearGeneral(D, (2, 3), rngs=rngs),
        lambda layer, x: layer(x).reshape(*x.shape[:-1], 6),
        lambda x: hk.Linear(6, name="layer")(x),
    ),
    "batch norm": (
        lambda rngs: nnx.BatchNorm(D, use_running_average=True, rngs=rngs),
        called,
        haiku_batch_norm,
    ),
    "attention": (
        lambda rngs: nnx.MultiHeadAttention(2, D, rngs=rngs),
        attended,
        haiku_attention,
    ),
    "lstm": (
        lambda rngs: nnx.LSTMCell(D, 4, rngs=rngs),
        unrolled,
        cases.haiku_rnn(lambda: hk.LSTM(4, name="layer")),
    ),
    "optimised lstm": (
        lambda rngs: nnx.OptimizedLSTMCell(D, 4, rngs=rngs),
        unrolled,
        cases.haiku_rnn(lambda: hk.LSTM(4, name="layer")),
    ),
    "gru": (
        lambda rngs: nnx.GRUCell(D, 4, rngs=rngs),
        unrolled,
        cases.haiku_rnn(
            lambda: port.GRU(4, with_hidden_bias=False, name="layer"),
        ),
    ),
    "transposed conv": (
        lambda rngs: nnx.ConvTranspose(D, D, (3,), (2,), rngs=rngs),
        called,
        lambda x: hk.Conv1DTranspose(D, 3, stride=2, name="layer")(x),
    ),
}
# The name of an attribute does not say that a convolution is transposed.
RULES = {"transposed conv": {"leaf": {"layer/kernel": port.TRANSPOSED}}}


def inputs(name="", shape=(B, T, D)):
    rng = np.random.default_rng(0)
    if name == "embed":
        return rng.integers(0, 4, shape[:-1]).astype(np.int32)
    return rng.normal(size=shape).astype(np.float32)


def types_of(make):
    """The parts of a module that is never made: its graph, and types."""
    return nnx.split(nnx.eval_shape(make))


def made(name):
    make, run, haiku_run = MODULES[name]
    graph, types = types_of(lambda: Wrapped(make, run, nnx.Rngs(0)))
    return graph, cases.randomised(types), haiku_run


def like_of(run, *args):
    return jax.eval_shape(hk.transform_with_state(run).init, jax.random.key(0), *args)


def compiled(run, *args):
    with jax.default_matmul_precision("highest"):
        return jax.jit(run, compiler_options=FAST)(*args)


def apply_nnx(graph, state, x):
    state = jax.tree.map(jnp.asarray, state)
    return compiled(lambda state, x: nnx.merge(graph, state)(x), state, x)


def apply_haiku(run, params, state, x):
    apply = hk.transform_with_state(run).apply
    found, _ = compiled(lambda *args: apply(*args[:2], None, args[2]), params, state, x)
    return found


def relative_error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("name", MODULES)
def test_every_kind_of_module(name):
    """Outputs agree, and each form of a state comes back bit for bit."""
    graph, state, run = made(name)
    x, rules = inputs(name), RULES.get(name, {})
    like = like_of(run, x)
    if "lstm" in name:  # Haiku adds one to a forget gate; of eighths that is exact.
        state = jax.tree.map(lambda leaf: np.round(8 * leaf) / 8, state)
    ported = hk_stack.flax_to_haiku(state, like, **rules)
    expected = apply_nnx(graph, state, x)
    assert relative_error(apply_haiku(run, *ported, x), expected) <= 1e-6
    for form in (state, nnx.to_pure_dict(state)):
        assert_equal(hk_stack.flax_to_haiku(form, like, **rules), ported)
        for given in (form, jax.eval_shape(lambda form=form: form)):
            back = hk_stack.haiku_to_flax(ported, given, **rules)
            assert type(back) is type(form)
            assert_equal(back, form)


def test_a_state_that_comes_back_is_one_that_nnx_takes():
    _, state, run = made("batch norm")
    make, call, _ = MODULES["batch norm"]
    ported = hk_stack.flax_to_haiku(state, like_of(run, inputs()))
    model = Wrapped(make, call, nnx.Rngs(1))
    back = hk_stack.haiku_to_flax(ported, nnx.state(model))
    nnx.update(model, back)
    assert_equal(nnx.state(model), back)
    kinds = [type(leaf) for leaf in variables(nnx.state(model))]
    assert [type(leaf) for leaf in variables(back)] == kinds


def variables(state):
    def is_variable(node):
        return isinstance(node, nnx.Variable)

    return jax.tree.leaves(state, is_leaf=is_variable)


def test_flax_gru_is_not_that_of_haiku():
    _, state, _ = made("gru")
    like = like_of(cases.haiku_rnn(lambda: hk.GRU(4, name="layer")), inputs())
    with pytest.raises(ValueError, match=r"hk_stack\.port\.GRU") as error:
        hk_stack.flax_to_haiku(state, like)
    assert "layer/dense_i" in str(error.value)


# Layers


class Block(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, D, rngs=rngs)
        self.linear = nnx.Linear(D, D, rngs=rngs)
        if dropout:
            self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        h = self.attention(self.norm(x), decode=False)
        x = x + self.linear(h)
        return self.dropout(x, deterministic=True) if hasattr(self, "dropout") else x


class Listed(nnx.Module):
    """Layers in a list."""

    def __init__(self, rngs, dropout=0.0):
        self.embed = nnx.Linear(D, D, rngs=rngs)
        self.layers = nnx.List([Block(rngs, dropout) for _ in range(L)])

    def __call__(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Stacked(nnx.Module):
    """Layers that `nnx.vmap` makes, on some axis, and `nnx.scan` runs."""

    def __init__(self, rngs, axis=0):
        self.embed = nnx.Linear(D, D, rngs=rngs)
        self.axis = axis
        on_axis = nnx.StateAxes({nnx.Param: axis, ...: None})

        @functools.partial(nnx.vmap, in_axes=0, out_axes=on_axis)
        def make(key):
            return Block(nnx.Rngs(params=key))

        self.layers = make(jax.random.split(rngs.params(), L))

    def __call__(self, x):
        on_axis = nnx.StateAxes({nnx.Param: self.axis, ...: None})

        @functools.partial(nnx.scan, in_axes=(nnx.Carry, on_axis), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(self.embed(x), self.layers)


def haiku_block(x):
    h = hk.LayerNorm(-1, True, True, name="norm")(x)
    init = hk.initializers.VarianceScaling()
    attention = hk.MultiHeadAttention(2, 3, w_init=init, model_size=D, name="attention")
    return x + hk.Linear(D, name="linear")(attention(h, h, h))


def haiku_stack(x):
    x = hk.Linear(D, name="embed")(x)
    return hk_stack.layer_stack(L, name="layers")(haiku_block)(x)


def haiku_wrapped(x):
    def block(x):
        return hk.to_module(haiku_block)(name="block")(x)

    def run(x):
        x = hk.Linear(D, name="embed")(x)
        return hk_stack.layer_stack(L, name="layers")(block)(x)

    return hk.to_module(run)(name="model")(x)


@pytest.mark.parametrize(
    ("make", "run", "rename"),
    [
        (Listed, haiku_stack, {}),
        (functools.partial(Stacked, axis=1), haiku_stack, {}),
        (Listed, haiku_wrapped, {"layers/*": "layers/block_*"}),
    ],
)
def test_layers(make, run, rename):
    graph, types = types_of(lambda: make(nnx.Rngs(0)))
    state, like = cases.randomised(types), like_of(run, inputs())
    if rename:
        with pytest.raises(
            ValueError, match=r'rename={"layers/\*": "layers/block_\*"}'
        ):
            hk_stack.flax_to_haiku(state, like)
    for form in (state, nnx.to_pure_dict(state)):
        ported = hk_stack.flax_to_haiku(form, like, rename=rename)
        assert_equal(hk_stack.haiku_to_flax(ported, form, rename=rename), form)
    expected = apply_nnx(graph, state, inputs())
    assert relative_error(apply_haiku(run, *ported, inputs()), expected) <= 1e-6


def test_more_than_ten_layers_stay_in_their_order():
    layers = nnx.eval_shape(
        lambda: nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(12)])
    )
    state = cases.randomised(nnx.state(layers))
    stacked = {"linear": {"w": np.zeros([12, 2, 2]), "b": np.zeros([12, 2])}}
    like = jax.tree.map(np.float32, stacked), {}
    for given in (state, nnx.to_pure_dict(state)):
        pair = {"linear": given} if isinstance(given, dict) else given
        rename = {} if isinstance(given, dict) else {"*": "linear_*"}
        params, _ = hk_stack.flax_to_haiku(pair, like, rename=rename)
        for i in range(12):
            np.testing.assert_array_equal(
                params["linear"]["w"][i], np.asarray(state[i]["kernel"][...])
            )


def test_activations_between_layers_leave_gaps():
    """A list may hold functions, too, which have no parameters but a number."""
    rngs = nnx.Rngs(0)
    mlp = nnx.Sequential(
        nnx.Linear(D, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 3, rngs=rngs)
    )
    state = cases.randomised(nnx.state(mlp))
    x = inputs()

    def run(x):
        return hk.nets.MLP([4, 3])(x)

    rename = {"layers/0": "mlp/linear_0", "layers/2": "mlp/linear_1"}
    ported = hk_stack.flax_to_haiku(state, like_of(run, x), rename=rename)
    assert_equal(hk_stack.haiku_to_flax(ported, state, rename=rename), state)
    expected = apply_nnx(nnx.graphdef(mlp), state, x)
    assert relative_error(apply_haiku(run, *ported, x), expected) <= 1e-6


# What is no parameter


@pytest.mark.parametrize("pattern", ["layers/*/dropout", "layers/*/dropout/rngs"])
def test_keys_of_dropout_are_ignored_by_name(pattern):
    model = Listed(nnx.Rngs(0), dropout=0.5)
    state = nnx.state(model)
    like = like_of(haiku_stack, inputs())
    with pytest.raises(ValueError, match="layers/0/dropout/rngs/count") as error:
        hk_stack.flax_to_haiku(state, like)
    assert "layers/2/dropout/rngs/key" in str(error.value)
    ported = hk_stack.flax_to_haiku(state, like, ignore=[pattern])
    assert_equal(ported, hk_stack.flax_to_haiku(nnx.state(model, nnx.Param), like))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, ported)
    back = hk_stack.haiku_to_flax(doubled, state, ignore=[pattern])
    keys = nnx.filter_state(back, nnx.RngState)
    assert_equal(keys, nnx.state(model, nnx.RngState))
    expected = 2 * np.asarray(model.layers[1].linear.kernel[...])
    nnx.update(model, back)
    np.testing.assert_array_equal(model.layers[1].linear.kernel[...], expected)


class Gain(nnx.Param):
    """A type of parameters of the user's own."""


class Scaled(nnx.Module):
    def __init__(self):
        self.gain = Gain(jnp.arange(3.0))
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def test_a_kind_of_parameter_of_the_users_own_is_a_parameter():
    state = nnx.state(Scaled())
    spec = jax.ShapeDtypeStruct
    linear = {"w": spec([3, 3], np.float32), "b": spec([3], np.float32)}
    like = {"~": {"gain": spec([3], np.float32)}, "linear": linear}, {}
    params, _ = hk_stack.flax_to_haiku(state, like)
    np.testing.assert_array_equal(params["~"]["gain"], np.arange(3.0))
    assert_equal(hk_stack.haiku_to_flax((params, {}), state), state)


def test_parameters_and_statistics_apart():
    """As `nnx.split(model, nnx.Param, nnx.BatchStat)` gives them."""
    _, state, run = made("batch norm")
    params, statistics = nnx.split_state(state, nnx.Param, nnx.BatchStat)
    like = like_of(run, inputs())
    expected = hk_stack.flax_to_haiku(state, like)
    with pytest.raises(ValueError, match="mean_ema"):
        hk_stack.flax_to_haiku(params, like)
    with pytest.raises(ValueError, match="layer/mean"):
        hk_stack.flax_to_haiku(state, (like[0], {}))
    assert_equal(hk_stack.flax_to_haiku(params, (like[0], {}))[0], expected[0])
    assert_equal(hk_stack.flax_to_haiku(statistics, ({}, like[1]))[1], expected[1])
