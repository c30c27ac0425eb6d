"""Pipelines: layers in stages on devices of their own, against a loop in Python."""

import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import FAST, assert_close, assert_equal
from interpreter import computed
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_cases import CASES, D, by_name, drop, layer_loop, normal, slow, weight
from test_layer_stack import KEY, everything

import hk_stack

ROWS = 6
UNFIT = {
    "weak": "leading batch axis",
    "weak_integer": "leading batch axis",
    "reverse": "reverse=True",
    "per_layer_no_output": "reverse=True",
    "per_layer_reverse": "reverse=True",
}
FIT = [case for case in CASES if case.name not in UNFIT]


def mesh_of(**sizes):
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds)


def pipeline(microbatches=2):
    return hk_stack.Pipeline("stage", microbatches)


def wide(case):
    """`case` with a batch of ROWS."""

    def rows(leaf):
        leaf = jnp.concatenate([leaf] * (ROWS // 2))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        scale = jnp.linspace(0.5, 1.5, len(leaf)).astype(leaf.dtype)
        return leaf * scale.reshape(-1, *[1] * (leaf.ndim - 1))

    return case._replace(inputs=lambda: jax.tree.map(rows, case.inputs()))


@functools.cache
def looped(name, microbatches):
    """What a Python loop finds: parameters and state, results and gradients."""
    case = wide(by_name[name])
    model = case.model(layer_loop, microbatches=microbatches)
    start = computed(model.init, KEY, *case.given())
    return start, computed(everything(model), *start, KEY, case.given())


def found(case, microbatches, run, **options):
    start, _ = looped(case.name, microbatches)
    case = wide(case)
    model = case.model(
        hk_stack.layer_stack, pipeline=pipeline(microbatches), **options
    )
    return run(everything(model), *start, KEY, case.given())


def compiled(function, *args):
    return jax.jit(function, compiler_options=FAST)(*args)


@pytest.mark.parametrize("case", FIT, ids=lambda case: case.name)
def test_without_a_mesh_microbatches_run_in_turn(case):
    microbatches = [1, 3, 6][CASES.index(case) % 3]
    way = [{}, {"loop": "python"}, {"loop": "unrolled"}][CASES.index(case) % 2]
    start, expected = looped(case.name, microbatches)
    model = wide(case).model(hk_stack.layer_stack, pipeline=pipeline(microbatches))
    assert_equal(computed(model.init, KEY, *wide(case).given()), start)
    assert_close(found(case, microbatches, computed, **way), expected)


def in_stages(case, microbatches):
    with jax.set_mesh(mesh_of(stage=case.num_layers)):
        piped = found(case, microbatches, compiled)
    assert_close(piped, looped(case.name, microbatches)[1])


DIAGONAL = {
    "nested_thrice": 6,
    "per_layer": 3,
    "mixed_precision": 3,
    "integers": 6,
    "pytree_carry": 2,
    "batch_norm_train": 1,
    "closed_over_parameter": 3,
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_stages(name):
    in_stages(by_name[name], DIAGONAL[name])


@pytest.mark.long
@pytest.mark.parametrize("microbatches", [1, 3, 6])
@pytest.mark.parametrize("case", FIT, ids=lambda case: case.name)
def test_all_cases_in_stages(case, microbatches):
    in_stages(case, microbatches)


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_piped(name):
    case = wide(by_name[name]) if "weak" not in name else by_name[name]
    model = case.model(hk_stack.layer_stack, pipeline=pipeline())
    with pytest.raises(ValueError, match=UNFIT[name]):
        jax.eval_shape(model.init, KEY, *case.given())
