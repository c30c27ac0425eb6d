"""`roll` on models of each framework as their authors write them: `roll_cases`."""

import collections
import functools

import interpreter
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import FAST, assert_close
from jax.extend.core import primitives
from roll_cases import by_name
from run_example import as_script

import hk_stack

# What moves values and makes none: parameters are stacked, outputs are handed back.
LAYOUT = {"slice", "squeeze", "reshape", "broadcast_in_dim", "concatenate", "stack"}

each_case = pytest.mark.parametrize("name", by_name)


@pytest.fixture(autouse=True)
def as_users_run_them():
    """With the settings of JAX as they are where nobody changes them."""
    with as_script():
        yield


def with_gradients(fn):
    """All that `fn` returns, and gradients of all of it."""

    def loss(params, *rest):
        results = fn(params, *rest)
        kept = [
            y for y in jax.tree.leaves(results) if jnp.issubdtype(y.dtype, jnp.floating)
        ]
        return sum(jnp.sum(jnp.sin(y + i)) for i, y in enumerate(kept)), results

    return jax.value_and_grad(loss, has_aux=True)


@pytest.fixture
def computed(monkeypatch):
    """Results, and the random bits that were drawn for them, sorted."""

    def of(fn, args):
        drawn = [np.zeros([0], np.uint32)]

        def random_bits(values, **params):
            bits = primitives.random_bits_p.bind(*values, **params)
            drawn.append(np.ravel(bits))
            return [np.asarray(bits)]

        monkeypatch.setitem(interpreter.RULES, "random_bits", random_bits)
        results = interpreter.computed(fn, *args)
        return results, np.sort(np.concatenate(drawn))

    return of


@functools.cache
def made(name, more=0):
    """A model with so many more layers, and its arguments."""
    case = by_name[name]
    return case.make(case.num_layers + more)


def traced(fn, args):
    return jax.make_jaxpr(fn)(*args).jaxpr


def lengths(jaxpr):
    """Of all loops, with how many have them."""
    loops = (e for e in jaxprs.equations(jaxpr) if e.primitive.name == "scan")
    return collections.Counter(eqn.params["length"] for eqn in loops)


def work(jaxpr):
    """How often each primitive stands in a program, where it makes more than a number.

    What a model adds up of its layers, such as losses, may be one number for each.
    """
    return collections.Counter(
        eqn.primitive.name
        for eqn in jaxprs.equations(jaxpr)
        if eqn.primitive.name not in LAYOUT and not all(map(is_number, eqn.outvars))
    )


def is_number(v):
    return v.aval.shape == () and jnp.issubdtype(v.aval.dtype, np.number)


@each_case
def test_is_the_same_function(name, computed):
    fn, args = made(name)
    found, drawn = computed(with_gradients(hk_stack.roll(fn)), args)
    expected, drawn_before = computed(with_gradients(fn), args)
    assert_close(found, expected)
    np.testing.assert_array_equal(drawn, drawn_before)
    assert by_name[name].draws == bool(drawn.size)
    leaves = jax.tree.leaves(expected)
    assert all(
        np.isfinite(y).all() for y in leaves if jnp.issubdtype(y.dtype, jnp.floating)
    )


@each_case
def test_its_loops_are_found(name):
    fn, args = made(name)
    expected = by_name[name].loops
    assert not lengths(traced(fn, args))
    assert lengths(traced(hk_stack.roll(fn), args)) >= collections.Counter(expected)
    loops = hk_stack.roll(fn).report(*args).loops
    assert tuple(loop.blocks for loop in loops) == expected


@each_case
def test_depth_adds_nothing_to_the_program(name):
    rolled, deeper = (
        work(traced(hk_stack.roll(fn), args))
        for fn, args in (made(name), made(name, by_name[name].step))
    )
    assert rolled == deeper
    assert rolled.total() < 0.6 * work(traced(*made(name))).total()


def test_setup_of_a_list_leaves_its_loop():
    fn, args = made("linen_list")
    before, rolled = traced(fn, args), traced(hk_stack.roll(fn), args)
    [in_block] = {jaxprs.names(before).count("fft") / by_name["linen_list"].num_layers}
    assert in_block == 4  # Two of activations, two for the kernel.
    assert jaxprs.names(jaxprs.body(rolled, 4)).count("fft") == 2


@pytest.mark.parametrize("name", ["haiku_language_model", "linen_cache"])
def test_compiled(name):
    fn, args = made(name)
    found, expected = (
        jax.jit(f).lower(*args).compile(FAST)(*args) for f in (hk_stack.roll(fn), fn)
    )
    assert_close(found, expected)
