"""Well-known families are ported by their recipes: right, there and back."""

import functools
import pathlib
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_equal
from interpreter import computed
from port_families import FAMILIES, expected, inputs_of, variables_of
from port_trees import assert_proposals_lead_on, types

import hk_stack
from hk_stack import port
from hk_stack.port import recipes

every_family = pytest.mark.parametrize("name", FAMILIES)
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "porting.md"


@pytest.fixture(autouse=True)
def promotion():
    """Published models promote."""
    promotion = jax.numpy_dtype_promotion("standard")
    with jax.numpy_rank_promotion("allow"), promotion:
        yield


def drawn(family):
    rng = np.random.default_rng(0)
    variables = variables_of(family, lambda shape: rng.normal(size=shape).astype("f"))
    positive = jax.tree.map(lambda x: np.abs(x) + 0.5, variables)
    return {"params": variables["params"]} | {
        name: positive[name] for name in variables if name != "params"
    }


@functools.cache
def like_of(name):
    family = FAMILIES[name]
    init = hk.transform_with_state(family.haiku).init
    return jax.eval_shape(init, jax.random.key(0), *inputs_of(family))


def gradient(run, params):
    return computed(jax.value_and_grad(run, has_aux=True), params)


def weighted(y):
    return jnp.sum(y * jnp.cos(jnp.arange(float(y.size))).reshape(y.shape))


def error(found, right):
    found, right = np.asarray(found), np.asarray(right)
    return np.max(np.abs(found - right)) / max(1e-3, np.max(np.abs(right)))


@every_family
def test_a_family(name):
    """Outputs, gradients, values leaf by leaf, and bit for bit on the way back."""
    family = FAMILIES[name]
    variables, inputs = drawn(family), inputs_of(family)
    ported = hk_stack.flax_to_haiku(variables, like_of(name), **family.recipe)
    assert_equal(ported, expected(family, variables))
    back = hk_stack.haiku_to_flax(ported, variables, **family.recipe)
    assert_equal(back, variables)

    def of_flax(params):
        y = family.flax({**variables, "params": params}, *inputs)
        return weighted(y), y

    def of_haiku(params):
        apply = hk.transform_with_state(family.haiku).apply
        y, _ = apply(params, ported[1], None, *inputs)
        return weighted(y), y

    (_, right), right_grads = gradient(of_flax, variables["params"])
    (_, found), found_grads = gradient(of_haiku, ported[0])
    assert error(found, right) < 1e-5
    like = jax.tree.map(np.asarray, (found_grads, ported[1]))
    moved, _ = hk_stack.flax_to_haiku(
        {**variables, "params": right_grads}, like, **family.recipe
    )
    # By module, not by leaf: softmax does not see a bias of keys.
    for module, right in moved.items():
        assert error(together(found_grads[module]), together(right)) < 1e-4


def together(leaves):
    return np.concatenate([np.ravel(leaf) for _, leaf in sorted(leaves.items())])


@pytest.mark.long
@every_family
def test_a_family_is_verified(name):
    family = FAMILIES[name]
    apply = hk.transform_with_state(family.haiku).apply
    given = drawn(family), like_of(name), tuple(inputs_of(family))
    report = port.verify(family.flax, apply, *given, **family.recipe)
    assert report.ok and report.precision == "double", str(report)


@every_family
def test_what_errors_propose_without_the_recipe_leads_on(name):
    family = FAMILIES[name]
    said = {"ignore": family.recipe.get("ignore", [])}
    variables, like = types(drawn(family)), like_of(name)
    assert_proposals_lead_on(variables, like, said, depth=12)


def test_the_table_of_recipes():
    """It has each, and its number of rules."""
    public = {name for name in vars(recipes) if name.isupper()} - {"SAME", "TRANSPOSED"}
    assert public == FAMILIES.keys()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", DOCS.read_text(), re.M))
    counts = {
        name: sum(len(rules) for rules in getattr(recipes, name).values())
        for name in public
    }
    assert {name: int(count) for name, count in rows.items()} == counts
    assert port.recipes is recipes
