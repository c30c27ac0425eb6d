"""What gradients keep and what they compute again, read off their programs."""

import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import pytest
from agreement import FAST, assert_close
from interpreter import computed
from jax.ad_checkpoint import checkpoint_name
from layer_cases import D, slow, vectors, weight

import hk_stack

P = jax.checkpoint_policies
KEY = jax.random.key(0)
NUM = 6
CARRY, NARROW = f"float32[{NUM},2,{D}]", f"float32[{NUM},2,3]"


def layer(x):
    """A setup (`cumsum`), named values, and products of another shape."""
    h = checkpoint_name(jnp.tanh(x @ slow(weight())), "hidden")
    narrow = checkpoint_name(jnp.sin(hk.Linear(3, name="down")(h)), "narrow")
    return x + hk.Linear(D, name="up")(jnp.cos(narrow))


def model(**options):
    return hk.transform(hk_stack.layer_stack(NUM, name="s", **options)(layer))


@functools.cache
def params():
    return computed(model().init, KEY, *vectors())


def loss(**options):
    apply = model(**options).apply
    return lambda params, x: jnp.sum(apply(params, None, x) ** 2)


def gradient(**options):
    """The gradient's program."""
    return jax.make_jaxpr(jax.grad(loss(**options)))(params(), *vectors()).jaxpr


def kept(jaxpr):
    """What the forward loop keeps for the backward pass, by shape."""
    forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    stacked = forward.outvars[len(jaxprs.carried(forward)) :]
    return sorted(v.aval.str_short() for v in stacked)


# What each policy keeps, besides the carry, which is what a layer starts from.
KEPT = {
    "all": ({"remat": True}, []),
    "nothing": ({"remat": P.nothing_saveable}, []),
    "dots": ({"remat": P.dots_saveable}, [CARRY, NARROW]),
    "no_batch": ({"remat": P.dots_with_no_batch_dims_saveable}, [CARRY, NARROW]),
    "one_name": ({"remat": P.save_only_these_names("narrow")}, [NARROW]),
    "two_names": (
        {"remat": P.save_only_these_names("narrow", "hidden")},
        [CARRY, NARROW],
    ),
}


@pytest.mark.parametrize("policy", KEPT)
def test_saved_residuals(policy):
    options, expected = KEPT[policy]
    assert kept(gradient(**options)) == sorted([CARRY, *expected])


def test_without_remat_everything_is_kept():
    assert len(kept(gradient())) > 4
    assert "checkpoint" not in jaxprs.names(gradient())


def test_host_offload():
    policy = P.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["narrow"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    on_host = NARROW.replace("float32", "float32<host>")
    assert kept(gradient(remat=policy)) == sorted([CARRY, on_host])
    run = jax.jit(jax.grad(loss(remat=policy)))
    assert_close(run(params(), *vectors()), expected_gradient())


@functools.cache
def expected_gradient():
    return computed(jax.grad(loss(setup="inline")), params(), *vectors())


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 6, 100, "sqrt"])
@pytest.mark.parametrize("loop", ["scan", "unrolled"])
def test_gradients_of_groups(every, loop):
    run = jax.grad(loss(remat=True, remat_every=every, loop=loop))
    assert_close(computed(run, params(), *vectors()), expected_gradient())


@pytest.mark.parametrize(("every", "groups"), [(2, 3), (3, 2), ("sqrt", 3)])
def test_groups_keep_one_carry_each(every, groups):
    jaxpr = gradient(remat=True, remat_every=every)
    assert kept(jaxpr) == [f"float32[{groups},2,{D}]"]
    loops = [e for e in jaxprs.equations(jaxpr) if e.primitive.name == "scan"]
    assert {e.params["unroll"] for e in loops} == {1}


def test_a_rest_is_a_group_of_its_own():
    jaxpr = gradient(remat=True, remat_every=4)
    assert kept(jaxpr) == [f"float32[1,2,{D}]"]
    loops = [e for e in jaxprs.equations(jaxpr) if e.primitive.name == "scan"]
    assert {e.params["length"] for e in loops} >= {1, 4, 2}


def forward_calls(jaxpr):
    """How often the layer runs forward, in a gradient without loops."""
    return jaxprs.names(jaxpr).count("tanh")


def test_how_often_layers_run():
    unrolled = functools.partial(gradient, loop="unrolled", setup="inline")
    once = forward_calls(unrolled()) // NUM  # Setup has a tanh as well.
    assert forward_calls(unrolled(remat=True)) == 2 * once * NUM
    # For the carries in a group, its last layer need not run once more.
    groups = forward_calls(unrolled(remat=True, remat_every=2))
    assert groups == 3 * once * NUM - once * NUM // 2


@pytest.mark.parametrize("policy", [True, P.dots_saveable])
@pytest.mark.parametrize("every", [1, 4])
def test_derived_values_are_not_computed_again(policy, every):
    """`slow` is a sum (`cumsum`), and its gradient another one: both run once."""
    jaxpr = gradient(remat=policy, remat_every=every)
    assert jaxprs.names(jaxpr).count("cumsum") == 2
    assert "cumsum" not in jaxprs.names(jaxprs.body(gradient(remat=policy), NUM))


def test_name_of_derived_values_in_policies():
    """A `jax.checkpoint` around the stack computes setup again, unless told not to."""

    def sums(policy):
        around = jax.checkpoint(loss(), policy=policy)
        jaxpr = jax.make_jaxpr(jax.grad(around))(params(), *vectors())
        return jaxprs.names(jaxpr.jaxpr).count("cumsum")

    assert sums(None) == 3
    assert sums(P.save_only_these_names("hk_stack.derived")) == 2


def prevented(**options):
    """`prevent_cse` of each rematerialised equation."""
    jaxpr = jax.make_jaxpr(loss(**options))(params(), *vectors()).jaxpr
    return [
        eqn.params["prevent_cse"]
        for eqn in jaxprs.equations(jaxpr)
        if eqn.primitive.name in ("checkpoint", "remat2")
    ]


def test_prevent_cse():
    """Needed where XLA sees the forward and the backward pass in one piece."""
    assert prevented(remat=True) == [False]
    assert prevented(remat=True, unroll=NUM) == [True]
    assert prevented(remat=True, unroll=2) == [False]
    assert prevented(remat=True, loop="unrolled") == [True] * NUM
    assert prevented(remat=True, remat_every=3) == [False, False]
    # A loop of one group is none, nor is the last group in a loop.
    assert prevented(remat=True, remat_every=4) == [True, False, True, False]


def test_python_loop_ignores_remat():
    assert prevented(remat=True, loop="python") == []


def wide(x):
    """A layer that computes far more than it is given."""
    return x + hk.Linear(64)(jax.nn.gelu(hk.Linear(256)(x)))


def attention(x):
    x = x.reshape(16, 64, 64)
    y = hk.MultiHeadAttention(
        4, 16, w_init=hk.initializers.VarianceScaling(1.0), model_size=64
    )(x, x, x)
    return wide((x + y).reshape(1024, 64))


def test_memory():
    def temporary(layer_stack, **options):
        model = hk.transform(layer_stack(48, name="s", **options)(attention))
        x = jax.ShapeDtypeStruct([1024, 64], jnp.float32)
        params = jax.eval_shape(model.init, KEY, x)
        run = jax.grad(lambda p, x: model.apply(p, None, x).sum())
        compiled = jax.jit(run).lower(params, x).compile(FAST)
        return compiled.memory_analysis().temp_size_in_bytes

    none = temporary(hk.layer_stack)
    each = temporary(hk_stack.layer_stack, remat=True)
    groups = temporary(hk_stack.layer_stack, remat=True, remat_every="sqrt")
    assert groups < each < 0.1 * none


MISTAKES = [
    (ValueError, {"remat_every": 2}, "remat_every=2 says how remat groups"),
    (ValueError, {"remat": True, "remat_every": 0}, "remat_every must be a positive"),
    (TypeError, {"remat": True, "remat_every": 2.5}, "remat_every must be a positive"),
    (ValueError, {"remat": True, "remat_every": "all"}, "int or \"sqrt\", not 'all'"),
    (TypeError, {"remat": "dots_saveable"}, "remat=jax.checkpoint_policies.dots_"),
    (TypeError, {"remat": "everything"}, "Give the function of jax.checkpoint_pol"),
    (TypeError, {"remat": 3}, "remat must be True, False or a policy"),
    (
        TypeError,
        {"remat": P.save_only_these_names},
        "save_only_these_names is no policy, but makes one",
    ),
    (TypeError, {"carry_dtype": "half precision"}, "carry_dtype must be a floating"),
    (TypeError, {"carry_dtype": jnp.int32}, "carry_dtype must be a floating"),
    (TypeError, {"check_finite": "yes"}, "check_finite must be True or False"),
    (TypeError, {"setup_remat": 2}, 'setup_remat must be True, False or "auto", not 2'),
]


@pytest.mark.parametrize(("error", "options", "message"), MISTAKES)
def test_mistakes(error, options, message):
    with pytest.raises(error, match=re.escape(message)) as found:
        hk_stack.layer_stack(4, name="blocks", **options)
    assert str(found.value).startswith("layer_stack 'blocks': ")


def test_makers_of_policies_are_all_known():
    """Whatever returns a policy must be refused, in new versions of JAX too."""
    for value in vars(P).values():
        if callable(value) and not _is_policy(value):
            with pytest.raises(TypeError, match="is no policy"):
                hk_stack.layer_stack(4, remat=value)


def _is_policy(value):
    try:
        return isinstance(value(jax.lax.sin_p), bool)
    except TypeError:
        return False


def test_flags_for_each_input_of_what_a_layer_rematerialises():
    """What leaves such a region takes an input along, and brings another."""

    def layer(x):
        def again(w, x):
            return x + hk_stack.tap(jnp.tanh(x @ slow(w)), "after")

        scale = hk.get_parameter("scale", [], init=jnp.ones)
        again = jax.checkpoint(again, prevent_cse=(False, True))
        return again(weight(), x) * scale

    def model(layer_stack, **options):
        stack = layer_stack(3, name="layers", **options)(layer)
        return hk.without_apply_rng(hk.transform(stack))

    x, *_ = vectors()
    ours, theirs = model(hk_stack.layer_stack), model(hk.layer_stack)
    params = computed(ours.init, KEY, x)

    def results(run):
        total = jax.value_and_grad(lambda p: jnp.sum(jnp.sin(run(p))))
        return computed(total, params)

    expected = results(lambda p: theirs.apply(p, x))
    assert_close(results(lambda p: ours.apply(p, x)), expected)
    split = hk_stack.partition(ours.apply, params, x)
    assert_close(results(lambda p: split.call(split.setup(p), x)), expected)
    collected = hk_stack.collect(ours.apply)
    assert_close(results(lambda p: collected(p, x)[0]), expected)
    assert collected(params, x)[1]["layers/after"].shape == (3, *x.shape)
