"""Skeletons run, and their parameters are ported without a rule."""

import re

import haiku as hk
import jax
import numpy as np
import pytest
from port_families import FAMILIES, inputs_of, variables_of
from port_trees import types

from hk_stack import port

nn = pytest.importorskip("flax.linen")

# Where sizes are equal, the skeleton says how the layers lie.
RULES = {"T5X": {"layer_axis": 1}, "RESNET": {"layer_axis": ()}}


def model_of(source):
    names = {}
    exec(compile(source, "skeleton", "exec"), names)
    return hk.transform_with_state(names["model"])


def plan_of(variables, inputs, **rules):
    """What goes where from a tree to its skeleton, which runs."""
    model = model_of(port.skeleton(variables))

    def run(key):
        params, state = model.init(key, inputs)
        return params, state, model.apply(params, state, key, inputs)

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params, state, _ = jax.eval_shape(run, jax.random.key(0))
    return port.plan(variables, (params, state), **rules)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name):
    family = FAMILIES[name]
    variables = variables_of(family, lambda shape: np.zeros(shape, np.float32))
    variables.pop("cache", None)
    found = plan_of(variables, inputs_of(family)[0], **RULES.get(name, {}))
    assert found.ok, str(found)
    source = port.skeleton(variables)
    assert "TODO" in source
    assert ("layer_stack(3" in source) == (name not in ("T5", "RESNET"))


class Cells(nn.Module):
    """What is no transformer."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.LSTMCell(4))(x)
        x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
        x = nn.RNN(nn.GRUCell(3))(x)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=6)(x, x)
        x = nn.Conv(4, (3,))(x)
        x = nn.DenseGeneral((2, 3))(x).reshape(*x.shape[:-1], 6)
        return nn.RMSNorm()(nn.Dense(7, use_bias=False)(x))


class Mixer(nn.Module):
    """A block of an MLP mixer, for a scan."""

    @nn.compact
    def __call__(self, x, _=None):
        self.param("lambda", nn.initializers.zeros, (4, 2))
        self.param("x", nn.initializers.zeros, (2, 3))
        h = nn.Dense(5)(nn.LayerNorm()(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + nn.Dense(4)(nn.LayerNorm()(x + h)), None


class Mixers(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Mixer, {"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(scan(name="mixers")(nn.Dense(4)(x), None)[0])


@pytest.mark.parametrize("make", [Cells, Mixers])
def test_a_model_of_linen(make):
    x = np.zeros([2, 5, 6], np.float32)
    variables = jax.eval_shape(make().init, jax.random.key(0), x)
    found = plan_of(variables, x)
    assert found.ok, str(found)


def test_a_skeleton_reads_well():
    """Layers of a list, in the order in which they were made."""
    layer = {
        "up": dense(4, 6),
        "act": {"gain": np.zeros([6], "f")},
        "down": dense(6, 4),
    }
    params = {"wte": {"embedding": np.zeros([7, 4], "f")}, "h": {}}
    params["h"] = {str(i): layer for i in range(12)}
    source = port.skeleton({"params": params})
    body = source[source.index("    ids = ") :]
    lines = [line.partition("  #")[0].strip() for line in body.splitlines()]
    assert lines == [
        "ids = jnp.asarray(inputs, jnp.int32)",
        "x = inputs",
        'x = hk.Embed(7, 4, w_init=init, name="wte")(ids % 7)',
        "def h_layer(x: jax.Array) -> jax.Array:",
        "h = x",
        'h = hk.Linear(6, name="up")(h)',
        'with hk.name_scope("act"):',
        'gain = hk.get_parameter("gain", [6], init=jnp.zeros)',
        'h = hk.Linear(4, name="down")(h)',
        "return x + h",
        'x = hk_stack.layer_stack(12, name="h")(h_layer)(x)',
        "return x",
    ]
    assert re.search("A model of .* numbers", source)


def dense(*shape):
    return {"kernel": np.zeros(shape, "f"), "bias": np.zeros(shape[-1:], "f")}


def test_types_are_enough():
    variables = {"params": {"a": dense(3, 4), "b": dense(4, 4)}}
    assert port.skeleton(types(variables)) == port.skeleton(variables)
    with pytest.raises(TypeError, match="expected a dict"):
        port.skeleton(None)
