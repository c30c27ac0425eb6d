"""Flax to Haiku and back: every module, every layout of layers, every mistake."""

import functools

import jax
import numpy as np
import pytest
from agreement import assert_equal
from port_cases import CASES

import hk_stack
from hk_stack.compare import porting

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def relative_error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


def outputs(case, variables, params, state, dtype):
    x = case.inputs(dtype)
    expected = case.linen().apply(variables, x)
    found, _ = case.transformed().apply(params, state, jax.random.key(0), x)
    return found, expected


@every_case
def test_outputs_agree(case):
    variables = case.variables()
    params, state = hk_stack.flax_to_haiku(variables, case.like(), **case.rules)
    with jax.default_matmul_precision("highest"):
        found, expected = outputs(case, variables, params, state, np.float32)
    assert relative_error(found, expected) <= 1e-6


@every_case
def test_outputs_agree_in_double_precision(case):
    # Both frameworks add constants in float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        variables = case.variables(np.float64)
        like = case.like(np.float64)
        params, state = hk_stack.flax_to_haiku(variables, like, **case.rules)
        found, expected = outputs(case, variables, params, state, np.float64)
        assert relative_error(found, expected) <= 1e-12


@every_case
def test_round_trips_are_bit_identical(case):
    variables = case.variables()
    ported = hk_stack.flax_to_haiku(variables, case.like(), **case.rules)
    back = hk_stack.haiku_to_flax(ported, variables, **case.rules)
    if case.exact:
        assert_equal(back, variables)
    again = hk_stack.flax_to_haiku(back, case.like(), **case.rules)
    if case.exact:
        assert_equal(again, ported)


def test_porting_and_stacking_need_no_second_copy(monkeypatch):
    """At most one leaf more than the result, whatever way the layers are kept."""
    for name, size in {"LAYERS": 4, "WIDTH": 128, "TOKENS": 20_000}.items():
        monkeypatch.setattr(porting, name, size)
    trees = porting.trees.__wrapped__()
    assert len(porting.PROGRAMS) == 8
    for name, run in porting.PROGRAMS.items():
        extra = porting.extra_bytes(functools.partial(run, trees))
        assert extra <= porting.largest_leaf(), name


def test_results_share_no_memory_with_what_they_are_made_of():
    variables = {"params": {"Dense_0": {"kernel": np.ones([3, 4], np.float32)}}}
    like = {"linear": {"w": np.zeros([3, 4], np.float32)}}, {}
    params, _ = hk_stack.flax_to_haiku(variables, like)
    variables["params"]["Dense_0"]["kernel"][:] = 5
    like[0]["linear"]["w"][:] = 7
    assert np.all(params["linear"]["w"] == 1)
