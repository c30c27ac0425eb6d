"""What a summary says of a model, and how it shows it."""

import functools
import os

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import computed
from layer_cases import D, slow, vectors, weight

import hk_stack
from hk_stack import summary

KEY = jax.random.key(0)
P = jax.checkpoint_policies


def block(x):
    return x + hk.Linear(D)(jnp.tanh(x @ slow(weight())))


def outer(x):
    return hk_stack.layer_stack(2, name="inner")(block)(hk.Linear(D, name="first")(x))


def network(x, is_training=True):
    assert isinstance(is_training, bool)
    x = hk.Linear(D, name="embed")(x)
    x = hk_stack.layer_stack(3, name="outer", remat=P.dots_saveable)(outer)(x)
    stack = hk_stack.layer_stack(6, name="last", remat=True, remat_every="sqrt")
    x = stack(block)(x)
    return hk.Linear(2, name="head")(x)


model = hk.transform(network)
LINEAR = D * D + D
BLOCK = LINEAR + D * D


@functools.cache
def params():
    return computed(model.init, KEY, *vectors())


@functools.cache
def found():
    return summary(model.apply, params(), None, *vectors(), is_training=False)


def test_stacks_in_the_order_in_which_they_run():
    assert [s.path for s in found().stacks] == ["outer", "outer/inner", "last"]
    assert [s.function for s in found().stacks] == ["outer", "block", "block"]
    assert [s.num_layers for s in found().stacks] == [3, 2, 6]


def test_each_parameter_is_counted_once():
    leaves = jax.tree.leaves(params())
    assert found().parameters == sum(p.size for p in leaves)
    assert found().nbytes == sum(p.nbytes for p in leaves)
    outer, inner, last = found().stacks
    assert outer.parameters == 3 * (LINEAR + 2 * BLOCK)
    assert inner.parameters == 3 * 2 * BLOCK
    assert last.parameters == 6 * BLOCK and last.nbytes == 24 * BLOCK


def test_what_is_hoisted():
    _, inner, last = found().stacks
    assert last.derived == 6 * D * D * 4 and inner.derived == 2 * D * D * 4
    (group,) = last.hoisted
    assert (group.primitive, group.shapes) == ("mul", (f"float32[{D}, {D}]",))
    assert "layer_cases.py" in group.source and "in slow" in group.source


def test_executor_and_remat_in_force():
    assert [s.loop for s in found().stacks] == ["scan"] * 3
    assert [s.remat for s in found().stacks] == ["dots_saveable", "no", "all, every 2"]
    with hk_stack.use_loop("python"):
        stacks = summary(model.apply, params(), None, *vectors()).stacks
    assert {(s.loop, s.remat, s.derived) for s in stacks} == {("python", "no", 0)}


def test_as_text():
    lines = str(found()).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0][:5] == ["stack", "layer", "function", "layers", "parameters"]
    total = str(found().parameters)
    assert lines[1].startswith("  outer ") and lines[2].startswith("    inner ")
    assert cells[4] == ["outside", "of", "stacks", f"{LINEAR + 2 * D + 2}", "360", "B"]
    assert cells[5][:2] == ["total", f"{int(total):,}"]
    assert cells[7][:2] == ["hoisted", "from"] and cells[-1][0] == "last"
    assert not any(line.endswith(" ") for line in lines)


def test_with_rich():
    rich = pytest.importorskip("rich.console")
    with open(os.devnull, "w") as nowhere:
        console = rich.Console(width=120, record=True, file=nowhere)
        console.print(found())
    text = console.export_text()
    assert "outer" in text and "all, every 2" in text and "in slow" in text


def test_in_notebooks():
    assert found()._repr_html_().count("<tr>") == (1 + 3 + 2) + (1 + 3)


def test_nothing_is_computed():
    shapes = jax.eval_shape(model.init, KEY, *vectors())
    x = jax.ShapeDtypeStruct([2, D], jnp.float32)
    assert summary(model.apply, shapes, None, x) == found()


def test_functions_around_the_model():
    @jax.jit
    def loss(params, x):
        return model.apply(params, None, x).sum()

    loss(params(), *vectors())  # A program that JAX has in its cache is looked at too.
    assert summary(jax.grad(loss), params(), *vectors()) == found()
    assert summary(loss, params(), np.asarray(*vectors())) == found()


def test_shared_parameters():
    class Twice(hk.Module):
        def __call__(self, x):
            return hk_stack.layer_stack(2, name="s")(block)(x)

    def run(x):
        twice = Twice()
        return twice(twice(x))

    shared = hk.transform(run)
    params = computed(shared.init, KEY, *vectors())
    found = summary(shared.apply, params, None, *vectors())
    assert [s.path for s in found.stacks] == ["twice/s"]
    assert found.parameters == 2 * BLOCK


def test_two_models_with_stacks_of_one_name():
    def model(num_layers):
        return hk.transform(hk_stack.layer_stack(num_layers, name="s")(block))

    two, three = model(2), model(3)

    def both(p, q, x):
        return two.apply(p, None, x), three.apply(q, None, x)

    p, q = (computed(m.init, KEY, *vectors()) for m in (two, three))
    found = summary(both, p, q, *vectors())
    assert [s.num_layers for s in found.stacks] == [2, 3]
    assert found.parameters == 5 * BLOCK
    again = summary(jax.jit(both), p, q, *vectors())
    assert again.parameters == 5 * BLOCK


def test_mistakes():
    with pytest.raises(TypeError, match=r"not Transformed\. Give its apply"):
        summary(model)
    with pytest.raises(ValueError, match="expected the apply of a transform, not its"):
        summary(model.init, KEY, *vectors())
    typo = hk.transform(lambda x: hk.Linear(8, bias=False)(x))
    with pytest.raises(TypeError, match="keyword argument 'bias'") as error:
        summary(typo.init, KEY, *vectors())
    assert "summary" not in str([error.value, *getattr(error.value, "__notes__", ())])
    plain = hk.transform(hk.layer_stack(2)(block))
    with pytest.raises(
        ValueError, match=r"calls no stack.*write hk_stack\.layer_stack"
    ):
        params = computed(plain.init, KEY, *vectors())
        summary(plain.apply, params, None, *vectors())
