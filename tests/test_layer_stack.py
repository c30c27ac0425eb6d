"""The stack against `hk.layer_stack` and a Python loop, on every layer case."""

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
from layer_cases import (
    CASES,
    POLICIES,
    B,
    D,
    L,
    by_name,
    counter,
    drop,
    layer_loop,
    pile,
    slow,
    vectors,
    weight,
)

import hk_stack

KEY = jax.random.key(1)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def is_float(leaf):
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)


def loss(tree):
    """A number on which every float leaf has a say of its own."""
    total = jnp.float32(0)
    for leaf in map(jnp.asarray, jax.tree.leaves(tree)):
        if is_float(leaf):
            weights = jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype))
            total += jnp.sum(weights * leaf.ravel()).astype(jnp.float32)
    return total


def everything(model):
    """Outputs, new state and all gradients of a model, in one function."""

    def run(params, state, key, given):
        leaves, tree = jax.tree.flatten((params, given))
        floats = [leaf if is_float(leaf) else None for leaf in leaves]

        def forward(floats):
            merged = [
                leaf if new is None else new
                for new, leaf in zip(floats, leaves, strict=True)
            ]
            params, given = jax.tree.unflatten(tree, merged)
            results = model.apply(params, state, key, *given)
            return loss(results), results

        gradients, (outputs, state_after) = jax.grad(forward, has_aux=True)(floats)
        return outputs, state_after, gradients

    return run


@functools.cache
def initial(name):
    """Parameters and state of a case."""
    case = by_name[name]
    return computed(case.model(hk_stack.layer_stack).init, KEY, *case.given())


def results(case, layer_stack, run=computed, **options):
    """Outputs, new state and gradients of a case."""
    model = case.model(layer_stack, **options)
    return run(everything(model), *initial(case.name), KEY, case.given())


def traced(function):
    """What `jax.jit` would make of `function`."""
    return functools.partial(computed, function)


def compiled(function, *args):
    return jax.jit(function, compiler_options=FAST)(*args)


@functools.cache
def looped(name):
    return results(by_name[name], layer_loop)


WAYS = {
    **{setup: {"setup": setup} for setup in POLICIES},
    # Between them, each executor and each kind of rematerialisation.
    "python": {"loop": "python"},
    "remat": {"remat": True, "remat_every": 2},
    "unrolled": {
        "loop": "unrolled",
        "remat": jax.checkpoint_policies.dots_saveable,
        "remat_every": 2,
    },
}


@every_case
@pytest.mark.parametrize("way", WAYS)
def test_results_are_those_of_a_loop(case, way):
    found = results(case, hk_stack.layer_stack, **WAYS[way])
    assert_close(found, looped(case.name))


@every_case
def test_compiled(case):
    """Each case in one of the ways, and in Haiku's."""
    way = list(WAYS)[CASES.index(case) % len(WAYS)]
    found = results(case, hk_stack.layer_stack, compiled, **WAYS[way])
    assert_close(found, looped(case.name))


@every_case
def test_agrees_with_haiku(case):
    found = results(case, hk.layer_stack)
    assert_close(found, looped(case.name))
    params, _ = computed(case.model(hk.layer_stack).init, KEY, *case.given())
    assert_equal(initial(case.name)[0], params)


@every_case
def test_one_parameter_tree(case):
    def init(**options):
        model = case.model(hk_stack.layer_stack, **options)
        return jax.eval_shape(model.init, KEY, *case.given())

    assert init(loop="python") == init(loop="unrolled", remat=True) == init()


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.state], ids=lambda case: case.name
)
def test_initial_state_is_that_before_any_call(case):
    expected = computed(case.model(layer_loop).init, KEY, *case.given())
    assert_close(initial(case.name), expected)


PLAIN = [c for c in CASES if not (c.hoists or c.kwargs or c.nested)]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_nothing_to_hoist_nothing_changed(case):
    def body(layer_stack):
        apply = case.model(layer_stack).apply
        jaxpr = jax.make_jaxpr(apply)(*initial(case.name), KEY, *case.given())
        return jaxprs.names(jaxprs.body(jaxpr, case.num_layers))

    assert body(hk_stack.layer_stack) == body(hk.layer_stack)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.hoists and c.num_layers > 1],
    ids=lambda case: case.name,
)
def test_setup_leaves_the_loop(case):
    def body(setup):
        apply = case.model(hk_stack.layer_stack, setup=setup).apply
        jaxpr = jax.make_jaxpr(apply)(*initial(case.name), KEY, *case.given())
        return jaxprs.names(jaxprs.body(jaxpr, case.num_layers))

    assert len(body("auto")) < len(body("inline"))


def mixed(x):
    """Setup, state, random numbers, and the call around it all."""
    x = counter(drop(0.3, x))
    return x + jnp.tanh(hk.Linear(D)(x) @ slow(weight()))


def mixed_model(layer_stack, **options):
    layers = layer_stack(L, name="stack", **options)(mixed)
    return hk.transform_with_state(layers)


@pytest.fixture(scope="module")
def mixed_values():
    return computed(mixed_model(hk_stack.layer_stack).init, KEY, *vectors())


def jvp(apply, params, state, x):
    return jax.jvp(lambda p, x: apply(p, state, KEY, x), (params, x), (params, x))


def hessian_product(apply, params, state, x):
    def gradient(params):
        return jax.grad(lambda p: apply(p, state, KEY, x)[0].sum())(params)

    return jax.jvp(gradient, (params,), (params,))


def vmap_inputs(apply, params, state, x):
    keys, xs = jax.random.split(KEY, 2), jnp.stack([x, 2 * x])
    return jax.vmap(apply, (None, None, 0, 0))(params, state, keys, xs)


def vmap_parameters(apply, params, state, x):
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), params)
    return jax.vmap(apply, (0, None, None, None))(params, state, KEY, x)


def checkpoint(apply, params, state, x):
    policy = jax.checkpoint_policies.dots_saveable
    remat = jax.checkpoint(apply, policy=policy)
    return jax.grad(lambda p: remat(p, state, KEY, x)[0].sum())(params)


def jacobian(apply, params, state, x):
    return jax.jacfwd(lambda x: apply(params, state, KEY, x)[0])(x)


@pytest.mark.parametrize(
    "transformation",
    [jvp, hessian_product, vmap_inputs, vmap_parameters, checkpoint, jacobian],
    ids=lambda f: f.__name__,
)
def test_under_transformations(transformation, mixed_values):
    x = vectors()

    def run(layer_stack):
        apply = mixed_model(layer_stack).apply
        return computed(functools.partial(transformation, apply), *mixed_values, *x)

    assert_close(run(hk_stack.layer_stack), run(layer_loop), 1e-4)


def test_without_jit(mixed_values):
    loop = mixed_model(layer_loop).apply
    expected = computed(loop, *mixed_values, KEY, *vectors())
    ours = mixed_model(hk_stack.layer_stack)
    for _ in range(2):  # The second time nothing is compiled.
        assert_close(ours.apply(*mixed_values, KEY, *vectors()), expected)
    small = hk.transform_with_state(hk_stack.layer_stack(L)(counter))
    with jax.disable_jit():
        params, state = small.init(KEY, *vectors())
        found = small.apply(params, state, KEY, *vectors())
    assert_close(found, jax.jit(small.apply)(params, state, KEY, *vectors()))


def test_eager_calls_compile_once(mixed_values, count_of_compilations):
    compiled = count_of_compilations

    def run():
        model = mixed_model(hk_stack.layer_stack)
        model.init(KEY, *vectors())
        return model.apply(*mixed_values, KEY, *vectors())

    run()
    compiled.clear()
    run()
    assert not compiled


def activation(slope):
    """A function whose derivative is made anew, and is another for another slope."""

    @jax.custom_jvp
    def rectified(x):
        return jnp.maximum(x, 0)

    @rectified.defjvp
    def _(primals, tangents):
        return rectified(*primals), slope * tangents[0] * jnp.sign(primals[0])

    return rectified


def rectified_layer(slope):
    def layer(x):
        w = hk.get_parameter("w", [D, D], init=hk.initializers.RandomNormal(0.3))
        return x + activation(slope)(x @ slow(w))

    return hk.transform(lambda x: hk_stack.layer_stack(3, name="layers")(layer)(x))


TRANSFORMATIONS = {
    "grad": lambda f: jax.grad(lambda p: jnp.sum(jnp.sin(f(p)))),
    "jvp": lambda f: lambda p: jax.jvp(f, [p], [p])[1],
    "vmap": lambda f: lambda p: jax.vmap(f)(jax.tree.map(lambda w: w[None], p))[0],
    "second derivative": lambda f: jax.grad(
        lambda p: sum(map(jnp.sum, jax.tree.leaves(TRANSFORMATIONS["grad"](f)(p))))
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_eager_transformations_compile_once(name, count_of_compilations):
    x = vectors()[0]
    params = rectified_layer(1.0).init(KEY, x)

    def run(slope, jit=lambda f: f):
        model = rectified_layer(slope)
        return jit(TRANSFORMATIONS[name](lambda p: model.apply(p, None, x)))(params)

    run(1.0)
    count = len(count_of_compilations)
    found = run(1.0)
    assert len(count_of_compilations) == count
    assert_close(found, run(1.0, traced))
    assert_close(run(2.0), run(2.0, traced))  # Not the first one's derivative.


def pulled_back(slope):
    @jax.custom_vjp
    def rectified(x):
        return jnp.maximum(x, 0)

    def backward(x, bar):
        return (slope * bar * jnp.sign(x),)

    rectified.defvjp(lambda x: (rectified(x), x), backward)
    return rectified


def only_if_needed(slope):
    @jax.custom_jvp
    def product(x, y):
        return x * y

    def rule(primals, tangents):
        (x, y), (of_x, of_y) = primals, tangents
        if type(of_y) is jax.custom_derivatives.SymbolicZero:
            return x * y, slope * of_x * y
        return x * y, of_x * y + of_y * x

    product.defjvp(rule, symbolic_zeros=True)
    return lambda x: product(x, jnp.ones_like(x))


def eager_gradient(make, slope, jit=lambda f: f):
    def layer(x):
        return make(slope)(x * hk.get_parameter("w", [], init=jnp.ones))

    model = hk.transform(hk_stack.layer_stack(2, name="layers")(layer))

    def total(w):
        return jnp.sum(model.apply({"layers/~": {"w": w}}, None, vectors()[0]))

    return jit(jax.grad(total))(jnp.ones(2))


@pytest.mark.parametrize("make", [activation, pulled_back, only_if_needed])
@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_eager_gradients_do_not_mix_up_rules(make, kind):
    """A rule may close over arrays, which are others in the next call."""
    for slope in map(kind, (1, 2)):
        expected = eager_gradient(make, slope, traced)
        assert_close(eager_gradient(make, slope), expected)


def test_eager_gradients_of_rules_that_close_over_traced_values():
    def total(slope):
        return jnp.sum(eager_gradient(activation, slope))

    slopes = jnp.asarray([1.0, 2.0])
    assert_close(jax.vmap(total)(slopes), jnp.stack(list(map(total, slopes))))
    assert_close(jax.grad(total)(1.5), computed(jax.grad(total), 1.5))


def test_eager_calls_do_not_mix_up_constants():
    def negative_zero(constant):
        def layer(x):
            return jnp.where(x > 0, constant, x)

        model = hk.transform(lambda x: 1.0 / hk_stack.layer_stack(2)(layer)(x))
        return model.apply({}, None, jnp.ones([3]))

    assert (negative_zero(0.0) > 0).all()
    assert (negative_zero(-0.0) < 0).all()


def test_eager_calls_do_not_mix_up_contexts():
    def draw(flag, transform):
        def layer(x):
            with jax.threefry_partitionable(flag):
                return x + jax.random.uniform(hk.next_rng_key(), x.shape)

        model = hk.transform(hk_stack.layer_stack(2)(layer))
        return transform(model.apply)({}, KEY, jnp.zeros([8]))

    for flag in (False, True):
        assert_close(draw(flag, lambda f: f), draw(flag, jax.jit))


def test_eager_calls_do_not_mix_up_functions():
    def run(value, layer):
        model = hk.transform(hk_stack.layer_stack(2)(lambda x: layer(value, x)))
        return float(model.apply({}, None, jnp.float32(1)))

    def called_back(value, x):
        shape = jax.ShapeDtypeStruct([], jnp.float32)
        return x * jax.pure_callback(lambda: np.float32(value), shape)

    def closed_over(value, x):
        return x * jnp.full([], value) * np.float32(1)

    def differentiated(value, x):
        double = jax.custom_jvp(jnp.sin)
        double.defjvp(lambda primals, tangents: (primals[0], value * tangents[0]))
        return x * jax.grad(double)(x)

    for layer in (called_back, closed_over, differentiated):
        assert [run(value, layer) for value in (2.0, 3.0)] == [4.0, 9.0]


def test_eager_calls_stay_on_their_device(mixed_values):
    model = mixed_model(hk_stack.layer_stack)
    for device in jax.devices()[:2]:
        given = jax.device_put((*mixed_values, KEY, *vectors()), device)
        y, _ = model.apply(*given)
        assert y.devices() == {device}


def test_keyword_arguments():
    seen = []

    def layer(x, *, mask, is_training, config, activation):
        seen.append((is_training, config, activation))
        return jnp.where(mask, activation(x @ weight()), x)

    options = {"is_training": True, "config": {"a": 1}, "activation": jnp.tanh}
    model = hk.transform(
        lambda x, mask: hk_stack.layer_stack(L)(layer)(x, mask=mask, **options)
    )
    loop = hk.transform(lambda x, mask: layer_loop(L)(layer)(x, mask=mask, **options))
    x = vectors()[0]
    params = model.init(KEY, x, x > 0)
    found = computed(model.apply, params, None, x, x > 0)
    assert_close(found, computed(loop.apply, params, None, x, x > 0))
    assert all(call == (True, {"a": 1}, jnp.tanh) and call[0] is True for call in seen)


def test_positional_defaults_and_partial_layer_functions():
    def layer(x, scale=0.5, *, power=2):
        return jnp.tanh(x @ weight() * scale) ** power

    for f in (layer, functools.partial(layer, scale=2.0, power=3)):
        model, twin = (
            hk.transform(stack(L)(f)) for stack in (hk_stack.layer_stack, layer_loop)
        )
        params = computed(model.init, KEY, *vectors())
        found = computed(model.apply, params, None, *vectors())
        assert_close(found, computed(twin.apply, params, None, *vectors()))


class Names:
    """`block` of layer i is `block_{i}` of a Python loop."""

    def stacked_to_flat(self, stacked_module_name, scan_idx):
        return stacked_module_name.replace("block", f"block_{scan_idx}", 1)

    def flat_to_stacked(self, unstacked_module_name):
        found = re.match(r"(.*?)block_(\d+)(.*)", unstacked_module_name)
        return found and (f"{found[1]}block{found[3]}", int(found[2]))


class Block(hk.Module):
    def __call__(self, x):
        return counter(jnp.tanh(hk.Linear(D)(x) @ slow(weight())))


class Model(hk.Module):
    """A layer of its own, and blocks stacked transparently or in a loop."""

    def __init__(self, layer_stack=None, **options):
        super().__init__()
        self.layer_stack = layer_stack
        self.options = options

    def __call__(self, x):
        x = hk.Linear(D, name="before")(x)
        if self.layer_stack is None:
            for i in range(L):
                x = Block(name=f"block_{i}")(x)
            return x
        stack = self.layer_stack(L, transparency_map=Names(), **self.options)
        return stack(lambda x: Block(name="block")(x))(x)


def test_transparent_is_a_loop_with_the_names_of_the_map():
    def transform(layer_stack, **options):
        return hk.transform_with_state(lambda x: Model(layer_stack, **options)(x))

    stack = transform(hk_stack.layer_stack, transparent=True)
    haiku = transform(hk.layer_stack, transparent=True)
    loop = transform(None)
    params, state = computed(stack.init, KEY, *vectors())
    assert_equal(params, computed(haiku.init, KEY, *vectors())[0])
    in_loop = computed(loop.init, KEY, *vectors())
    assert_equal(state, in_loop[1])
    assert jax.tree.structure(params) == jax.tree.structure(in_loop[0])

    def run(model):
        def total(params):
            y, after = model.apply(params, state, None, *vectors())
            return jnp.cos(y).sum(), (y, after)

        return computed(jax.grad(total, has_aux=True), params)

    assert_close(run(stack), run(loop))


def test_map_without_transparent_is_not_transparent():
    model = hk.transform_with_state(
        lambda x: Model(hk_stack.layer_stack, transparent=False)(x)
    )
    params, state = jax.eval_shape(model.init, KEY, *vectors())
    assert "model/__layer_stack_no_per_layer/block/linear" in params
    assert params["model/__layer_stack_no_per_layer/block/linear"]["w"].shape[0] == L
    y, _ = jax.eval_shape(model.apply, params, state, None, *vectors())
    assert y.shape == (B, D)


def test_each_of_two_stateful_stacks_keeps_its_own_state():
    """`hk.layer_stack` gives the second unnamed one the state of the first."""

    def run(x):
        for scale in (1.0, 10.0):
            x = scale * hk_stack.layer_stack(2)(counter)(x)
        return x

    def loop(x):
        for scale in (1.0, 10.0):
            for _ in range(2):
                with hk.name_scope("layer"):
                    x = counter(x)
            x = scale * x
        return x

    (x,) = vectors()
    stacks, layers = hk.transform_with_state(run), hk.transform_with_state(loop)
    _, state = computed(stacks.init, KEY, x)
    _, expected = computed(layers.init, KEY, x)
    for _ in range(3):
        y, state = computed(stacks.apply, {}, state, None, x)
        expected_y, expected = computed(layers.apply, {}, expected, None, x)
        assert_close(y, expected_y)
    in_loop = {"": ["layer", "layer_1"], "_1": ["layer_2", "layer_3"]}
    for suffix, names in in_loop.items():
        found = state[f"__layer_stack_no_per_layer{suffix}/~"]
        assert_close(found, pile([expected[name] for name in names]))


def test_inner_setup_leaves_the_outer_loop():
    case = by_name["nested_thrice"]
    apply = case.model(hk_stack.layer_stack).apply
    jaxpr = jax.make_jaxpr(apply)(*initial(case.name), KEY, *case.given())
    inside = jaxprs.names(jaxprs.body(jaxpr, L))
    assert "scan" in inside  # the two loops within
    # Of w / norm(w), the norm leaves all three loops; the division does not.
    assert "sqrt" not in inside
    assert "div" in inside
    assert "sqrt" in jaxprs.outside(jaxpr, L)

    case = by_name["nested"]
    apply = case.model(hk_stack.layer_stack).apply
    jaxpr = jax.make_jaxpr(apply)(*initial(case.name), KEY, *case.given())
    assert "cumsum" not in jaxprs.names(jaxprs.body(jaxpr, L))
    assert "cumsum" in jaxprs.outside(jaxpr, L)


def test_gradients_do_not_go_through_setup_in_the_loop():
    case = by_name["short"]
    model = case.model(hk_stack.layer_stack)
    params, state = initial(case.name)

    def total(params):
        return model.apply(params, state, None, *case.given())[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(params)
    loops = [eqn for eqn in jaxpr.eqns if eqn.params.get("length") == L]
    assert len(loops) == 2  # forward and backward
    for eqn in loops:
        assert "cumsum" not in jaxprs.names(eqn.params["jaxpr"].jaxpr)


def test_layer_may_have_no_key():
    def layer(x):
        assert hk.maybe_next_rng_key() is None
        return x

    model = hk.transform(hk_stack.layer_stack(2)(layer))
    assert_equal(model.apply({}, None, *vectors()), vectors()[0])
