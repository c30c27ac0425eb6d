"""The same models in Haiku and in Flax Linen, at the same parameters.

Linen's parameters are copied to Haiku, so that every number must agree: outputs,
gradients, dropout masks, running statistics and whole loss curves.
"""

import functools
import importlib
import operator
import sys

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interpreter import computed

import hk_stack
from hk_stack.compare import in_haiku, models

flax = pytest.importorskip("flax")
in_linen = importlib.import_module("hk_stack.compare.in_linen")

LAYERS, BATCH, LENGTH, WIDTH, CLASSES = 3, 2, 32, 8, 4

MODELS = {"s4": models.s4_model(8), "transformer": models.transformer_model(2)}
LAYER_STACKS = {"hk_stack": hk_stack.layer_stack, "haiku": hk.layer_stack}

every_model = pytest.mark.parametrize("model", MODELS)
every_way = pytest.mark.parametrize("way", in_linen.STACKS)
every_layer_stack = pytest.mark.parametrize("layer_stack", LAYER_STACKS)


def inputs(seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, WIDTH))


def haiku_layers(model, layer_stack="hk_stack", **options):
    return functools.partial(
        in_haiku.layers,
        model=MODELS[model],
        layer_stack=LAYER_STACKS[layer_stack],
        num_layers=LAYERS,
        **options,
    )


def linen_layers(model, way, **options):
    block = functools.partial(in_linen.Block, MODELS[model], **options)
    return in_linen.STACKS[way](block, LAYERS)


@functools.cache
def scan_variables(model):
    """A stack's, moved a little so that no scale is one and no bias is zero."""
    init = linen_layers(model, "scan").init
    variables = computed(init, jax.random.key(0), inputs())
    rng = np.random.default_rng(0)

    def move(leaf):
        return leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype)

    return {**variables, "params": jax.tree.map(move, variables["params"])}


def layers_variables(model, way):
    """The same values, as the layers of each way hold them."""
    variables = scan_variables(model)
    return {name: in_way(way, values) for name, values in variables.items()}


# The scopes of layers in Haiku, by the first module in Flax.
RENAMES = {
    "block_0": {"block_*": "layers/block_*"},
    "stack": {"stack": "layers/block"},
}


def to_haiku(variables, model):
    """Parameters and state of the layers in Haiku."""
    rename = RENAMES.get(min(variables["params"]))
    return hk_stack.flax_to_haiku(variables, haiku_types(model), rename=rename)


@functools.cache
def haiku_types(model):
    init = hk.transform_with_state(haiku_layers(model)).init
    return jax.eval_shape(init, jax.random.key(0), inputs())


def in_way(way, layers):
    if way == "hack":
        return {"stack": layers["block"]}
    if way == "loop":
        return {
            f"block_{i}": jax.tree.map(operator.itemgetter(i), layers["block"])
            for i in range(LAYERS)
        }
    return layers


def assert_close(value, reference, tolerance=1e-4):
    """Leaf by leaf, relative to the leaf's norm."""
    assert jax.tree.structure(value) == jax.tree.structure(reference)
    # An attention's key bias has no influence: its gradient is rounding error.
    floor = 1e-6 * max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(reference))

    def check(path, value, reference):
        assert value.shape == reference.shape, path
        error = np.linalg.norm(value - reference)
        limit = tolerance * np.linalg.norm(reference) + floor
        assert error <= limit, (jax.tree_util.keystr(path), error, limit)

    jax.tree_util.tree_map_with_path(check, value, reference)


# Parameters, outputs and gradients


@every_model
@every_way
def test_parameters_are_those_of_an_initialisation(model, way):
    init = linen_layers(model, way).init
    variables = jax.eval_shape(init, jax.random.key(0), inputs())
    given = layers_variables(model, way)
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, variables)
    params, _ = to_haiku(given, model)
    own, _ = haiku_types(model)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own)


@every_model
@every_way
@every_layer_stack
def test_outputs_and_gradients(model, way, layer_stack):
    variables = layers_variables(model, way)
    params, _ = to_haiku(variables, model)
    value, (grads, x_grad) = haiku_value_and_grads(model, layer_stack)(params, inputs())
    expected, (expected_grads, expected_x_grad) = linen_value_and_grads(model, way)
    assert_close(value, expected)
    assert_close(grads, to_haiku({"params": expected_grads}, model)[0])
    assert_close(x_grad, expected_x_grad)


@functools.cache
def haiku_value_and_grads(model, layer_stack):
    apply = hk.without_apply_rng(hk.transform(haiku_layers(model, layer_stack))).apply
    return value_and_grads(apply)


@functools.cache
def linen_value_and_grads(model, way):
    def apply(params, x):
        return linen_layers(model, way).apply({"params": params}, x)

    params = layers_variables(model, way)["params"]
    return value_and_grads(apply)(params, inputs())


def value_and_grads(apply):
    """(params, x) -> (loss, output), (gradient of params, gradient of x)."""

    def loss(params, x):
        y = apply(params, x)
        return jnp.mean(jnp.sin(y)), y

    return functools.partial(computed, jax.value_and_grad(loss, (0, 1), has_aux=True))


# Dropout


@pytest.mark.parametrize(
    ("model", "way"), [("s4", "scan"), ("transformer", "hack"), ("s4", "loop")]
)
@every_layer_stack
def test_dropout_masks(model, way, layer_stack):
    variables = layers_variables(model, way)
    params, _ = to_haiku(variables, model)
    y = haiku_training_output(model, layer_stack)(params, jax.random.key(7), inputs())
    keys = dropout_keys(layer_stack, jax.random.key(7))
    expected = linen_training_output(model, way)(variables, inputs(), keys)
    assert_close(y, expected)
    other_keys = dropout_keys(layer_stack, jax.random.key(8))
    other = linen_training_output(model, way)(variables, inputs(), other_keys)
    assert np.max(np.abs(y - other)) > 0.1


@functools.cache
def haiku_training_output(model, layer_stack):
    layers = haiku_layers(model, layer_stack, dropout_rate=0.3, is_training=True)
    return functools.partial(computed, hk.transform(layers).apply)


@functools.cache
def linen_training_output(model, way):
    layers = linen_layers(model, way, dropout_rate=0.3)
    return lambda variables, x, keys: computed(
        lambda *given: layers.apply(*given, True, keys), variables, x
    )


def dropout_keys(layer_stack, key):
    """The keys `[L, 2]` that the layers of a Haiku stack draw for their dropouts."""

    def layer(x):
        return x, jnp.stack([hk.next_rng_key(), hk.next_rng_key()])

    def run(x):
        stack = LAYER_STACKS[layer_stack](LAYERS, with_per_layer_inputs=True)
        return stack(layer)(x)[1]

    return computed(hk.transform(run).apply, {}, key, inputs())


@every_way
def test_linen_draws_its_own_keys_unless_given_some(way):
    layers = linen_layers("transformer", way, dropout_rate=0.3)
    variables = layers_variables("transformer", way)
    run = functools.partial(layers.apply, variables, inputs(), True)
    jax.eval_shape(lambda key: run(rngs={"dropout": key}), jax.random.key(0))
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(run)


# Running statistics


class Normed(flax.linen.Module):
    """A block that normalises over the batch."""

    @flax.linen.compact
    def __call__(self, x, is_training=False, keys=None):
        nn = flax.linen
        norm = nn.BatchNorm(not is_training, momentum=0.9, epsilon=1e-5, name="norm")
        return x + nn.Dense(WIDTH, name="gate")(norm(x))


def normed(x, is_training=False):
    def layer(x):
        with hk.name_scope("block"):
            norm = hk.BatchNorm(True, True, decay_rate=0.9, eps=1e-5, name="norm")
            # hk.BatchNorm raises a float to an integer, which strict promotion refuses.
            with jax.numpy_dtype_promotion("standard"):
                h = norm(x, is_training)
            return x + hk.Linear(WIDTH, name="gate")(h)

    return hk_stack.layer_stack(LAYERS, name="layers")(layer)(x)


class NormedStack(flax.linen.Module):
    """Blocks by `nn.scan`, as one does with running statistics."""

    @flax.linen.compact
    def __call__(self, x, is_training=False):
        scan = flax.linen.scan(
            lambda block, x, _: (block(x, is_training), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return scan(Normed(name="block"), x, None)[0]


NORMED = {"scan": NormedStack(), "loop": in_linen.LoopStack(Normed, LAYERS)}


@pytest.mark.parametrize("way", NORMED)
def test_running_statistics(way):
    model, layers = hk.transform_with_state(normed), NORMED[way]
    init = functools.partial(model.init, is_training=True)
    types = jax.eval_shape(init, jax.random.key(0), inputs())
    variables = computed(layers.init, jax.random.key(0), inputs())
    params, state = hk_stack.flax_to_haiku(variables, types)

    def haiku(state, x, is_training):
        run = functools.partial(model.apply, is_training=is_training)
        return computed(run, params, state, None, x)

    def linen(variables, x, is_training):
        run = functools.partial(layers.apply, mutable="batch_stats")
        return computed(lambda *given: run(*given, is_training), variables, x)

    for step in range(3):
        y, state = haiku(state, inputs(step), True)
        expected, statistics = linen(variables, inputs(step), True)
        variables = {**variables, **statistics}
        assert_close(y, expected)
    expected = hk_stack.flax_to_haiku(variables, types)[1]
    assert_close(averages(state), averages(expected))
    y, after = haiku(state, inputs(3), False)
    assert_close(y, linen(variables, inputs(3), False)[0])
    jax.tree.map(np.testing.assert_array_equal, after, state)


def averages(state):
    return {name: values["average"] for name, values in state.items()}


# Training


@every_model
def test_loss_curves(model):
    variables = scan_variables(model)
    haiku = hk.without_apply_rng(hk.transform(haiku_layers(model)))
    params, _ = to_haiku(variables, model)
    curve = train(haiku.apply, params)
    linen = linen_layers(model, "scan")
    expected = train(
        lambda params, x: linen.apply({"params": params}, x), variables["params"]
    )
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(curve, expected, rtol=1e-4)


def train(apply, params):
    """The losses of 30 steps of Adam."""
    optimiser = optax.adam(3e-3)
    labels = jnp.arange(BATCH)

    def loss(params):
        logits = jnp.mean(apply(params, inputs()), axis=1)[:, :CLASSES]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        # Adam's bias correction raises a float to an integer.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    carry = params, optimiser.init(params)
    return computed(lambda carry: jax.lax.scan(step, carry, length=30)[1], carry)


def test_absent_flax_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "hk_stack.compare.in_linen")
    monkeypatch.setitem(sys.modules, "flax.linen", None)
    with pytest.raises(ImportError, match=r"pip install 'hk_stack\[flax\]'"):
        importlib.import_module("hk_stack.compare.in_linen")
