"""Flax to Haiku and back: every kind of module, and what it costs."""

import tracemalloc

import jax
import numpy as np
import pytest
from agreement import FAST, assert_equal
from port_cases import CASES
from port_trees import new

import hk_stack


def relative_error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_of_module(case):
    """Outputs agree in double precision, and values come back bit for bit."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        variables, like = case.variables(np.float64), case.like(np.float64)
        ported = hk_stack.flax_to_haiku(variables, like, **case.rules)
        x, flax, haiku = case.inputs(np.float64), case.linen(), case.transformed()

        def run(variables, ported, x):
            y, _ = haiku.apply(*ported, jax.random.key(0), x)
            return y, flax.apply(variables, x)

        found, expected = jax.jit(run, compiler_options=FAST)(variables, ported, x)
    # Both frameworks add constants in float32.
    assert relative_error(found, expected) <= 1e-12
    if not case.exact:  # Haiku adds one to a forget gate; of eighths that is exact.
        variables = jax.tree.map(lambda leaf: np.round(8 * leaf) / 8, variables)
    variables = jax.tree.map(np.float32, variables)
    like = case.like()
    ported = hk_stack.flax_to_haiku(variables, like, **case.rules)
    back = hk_stack.haiku_to_flax(
        ported, jax.eval_shape(lambda: variables), **case.rules
    )
    assert_equal(back, variables)
    assert_equal(hk_stack.flax_to_haiku(back, like, **case.rules), ported)


@pytest.mark.parametrize("layout", ["stack", "axis 1", "loop"])
def test_a_port_needs_no_second_copy(layout):
    """At most one leaf more than the result, there and back."""
    w = new(8, 128, 256)
    block = {"kernel": w.swapaxes(0, 1) if layout == "axis 1" else w}
    params = {"block": block}
    if layout == "loop":
        params = {f"block_{i}": {"kernel": np.copy(x)} for i, x in enumerate(w)}
    flax, haiku = {"params": params}, ({"block": {"w": w}}, {})
    numpy = jax.tree.map(np.zeros_like, (flax, haiku))
    assert extra_bytes(lambda: hk_stack.flax_to_haiku(flax, numpy[1])) < w.nbytes
    assert extra_bytes(lambda: hk_stack.haiku_to_flax(haiku, numpy[0])) < w.nbytes
    assert_equal(hk_stack.flax_to_haiku(flax, numpy[1]), haiku)


def extra_bytes(run):
    tracemalloc.start()
    try:
        result = run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - sum(leaf.nbytes for leaf in jax.tree.leaves(result))


def test_results_share_no_memory_with_what_they_are_made_of():
    variables = {"params": {"Dense_0": {"kernel": np.ones([3, 4], np.float32)}}}
    like = {"linear": {"w": np.zeros([3, 4], np.float32)}}, {}
    params, _ = hk_stack.flax_to_haiku(variables, like)
    variables["params"]["Dense_0"]["kernel"][:] = 5
    like[0]["linear"]["w"][:] = 7
    assert np.all(params["linear"]["w"] == 1)
