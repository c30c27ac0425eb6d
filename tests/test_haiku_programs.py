"""Legal Haiku programs, odd ones too: each gives what `hk.layer_stack` gives.

A program is made from a `layer_stack`; where Haiku's own is wrong about state, the
Python loop is the reference.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from agreement import assert_close, assert_equal
from interpreter import computed
from jax import export
from layer_cases import D, counter, drop, layer_loop, normal, slow, vectors

import hk_stack

KEY = jax.random.key(4)


class Dense(hk.Module):
    """A small layer with setup, which compiles fast."""

    def __call__(self, x):
        init = hk.initializers.RandomUniform(-0.5, 0.5)
        return jnp.tanh(x @ slow(hk.get_parameter("w", [D, D], init=init)))


def dense(x):
    return Dense()(x)


def plain(x):
    init = hk.initializers.RandomUniform(-0.5, 0.5)
    return jnp.tanh(x @ hk.get_parameter("w", [D, D], init=init))


def noisy(x):
    return plain(drop(0.3, x))


def busy(x):
    return counter(noisy(dense(x)))


PROGRAMS = {}
WITH_STATE = {}


def program(make):
    PROGRAMS[make.__name__] = make
    return make


def stateful(make):
    WITH_STATE[make.__name__] = make
    return make


def run(make, layer_stack, *args, state=None):
    """Initial parameters and state, and the results of a call."""
    model = hk.transform_with_state(make(layer_stack))
    args = args or vectors()

    def everything(*args):
        params, initial = model.init(KEY, *args)
        return params, initial, model.apply(params, state or initial, KEY, *args)

    return computed(everything, *args)


# Several stacks, and several calls of one.


@program
def unnamed_stacks(stack):
    def model(x):
        y, _ = stack(2, True)(lambda x, s: (plain(x) * s, s))(x, jnp.ones([2]))
        return stack(3)(dense)(stack(2)(plain)(y))

    return model


@program
def stacks_of_one_name(stack):
    return lambda x: stack(3, name="a")(dense)(stack(2, name="a")(plain)(x))


@program
def names_that_begin_alike(stack):
    return lambda x: stack(3, name="ab")(dense)(stack(2, name="a")(plain)(x))


@program
def one_stack_called_twice(stack):
    def model(x):
        layers = stack(2)(dense)
        return layers(layers(x))

    return model


def stacks_in_methods(first, second):
    def make(stack):
        class Net(hk.Module):
            def __call__(self, x):
                return stack(2, name="s")(second)(stack(2)(first)(x))

            def other(self, x):
                return stack(2, name="s")(second)(stack(2)(first)(x))

        def model(x):
            net = Net()
            return net(net(x)) + net.other(x)

        return model

    return make


PROGRAMS["stacks_in_methods"] = stacks_in_methods(plain, dense)
WITH_STATE["stacks_in_methods"] = stacks_in_methods(counter, counter)


@program
def shared_across_methods(stack):
    class Net(hk.Module):
        def __init__(self):
            super().__init__()
            self.inner = Dense()

        def __call__(self, x):
            return stack(2)(lambda x: self.inner(x))(x)

    def model(x):
        net = Net()
        return net(net(x))

    return model


# Names.


@program
def name_scopes(stack):
    class Net(hk.Module):
        def __call__(self, x):
            with hk.name_scope("scope"):
                return stack(2)(dense)(stack(2, name="q")(dense)(x))

    def model(x):
        with hk.name_scope("outer"), jax.named_scope("compiled"):
            return jax.named_call(Net(), name="call")(x)

    return model


@program
def forced_names(stack):
    class Net(hk.Module):
        def __init__(self, inner):
            super().__init__(name=hk.experimental.force_name("forced"))
            self.inner = inner

        def __call__(self, x):
            return self.inner(x)

    def model(x):
        y = stack(2, name="a")(lambda x: Net(dense)(x))(x)
        return y + Net(stack(2, name="b")(plain))(x)

    return model


@program
def empty_name(stack):
    return lambda x: stack(2, name="")(dense)(x)


# Layer functions that are not plain functions.


@program
def a_module(stack):
    class Net(hk.Module):
        def __init__(self):
            super().__init__()
            self.made_at_init = Dense()

        def __call__(self, x):
            return self.made_at_init(Dense()(x))

    return lambda x: stack(2)(Net())(x)


@program
def a_bound_method(stack):
    class Net(hk.Module):
        def layer(self, x):
            return dense(x)

        def __call__(self, x):
            return stack(2)(self.layer)(x)

    return lambda x: Net()(x)


@program
def a_bound_method_with_parameters(stack):
    class Net(hk.Module):
        def layer(self, x):
            return plain(x)

        def __call__(self, x):
            own = hk.get_parameter("own", [D], init=jnp.ones)
            return stack(2)(self.layer)(x) * own[None]

    return lambda x: Net()(x)


@program
def a_partial(stack):
    def layer(scale, x):
        return scale * dense(x)

    return lambda x: stack(2)(functools.partial(layer, 0.5))(x)


@program
def an_object(stack):
    class Layer:
        def __call__(self, x):
            return dense(x)

    return lambda x: stack(2)(Layer())(x)


@program
def a_jax_function(stack):
    return lambda x: stack(2)(jnp.sin)(x)


@program
def modules_made_outside_and_used_inside_only(stack):
    def model(x):
        outer = [Dense(name="a"), Dense(name="b")]
        return stack(2)(lambda x: outer[0](outer[1](x)))(x)

    return model


# Haiku's transformations around and inside.


def around(transformed):
    """Inits the layers plainly, then calls them under a transformation."""

    def make(stack):
        def model(x):
            layers = stack(2)(busy)
            return layers(x) if hk.running_init() else transformed(layers, x)

        return model

    return make


WITH_STATE["in_remat"] = around(lambda layers, x: hk.remat(layers)(x))
WITH_STATE["in_scan"] = around(
    lambda layers, x: hk.scan(lambda x, _: (layers(x), None), x, None, length=2)[0]
)
WITH_STATE["in_while_loop"] = around(
    lambda layers, x: hk.while_loop(
        lambda c: c[1] < 2, lambda c: (layers(c[0]), c[1] + 1), (x, 0)
    )[0]
)
WITH_STATE["in_fori_loop"] = around(
    lambda layers, x: hk.fori_loop(0, 2, lambda _, x: layers(x), x)
)
WITH_STATE["in_cond"] = around(
    lambda layers, x: hk.cond(x.sum() > 0, layers, lambda x: x, x)
)
WITH_STATE["in_grad"] = around(lambda layers, x: hk.grad(lambda x: layers(x).sum())(x))


@program
def in_vmap_without_split_keys(stack):
    return lambda x: hk.vmap(stack(2)(noisy), split_rng=False)(x)


@program
def in_vmap_with_split_keys(stack):
    def model(x):
        split = not hk.running_init()
        return hk.vmap(stack(2)(noisy), split_rng=split)(x)

    return model


@program
def in_vmap_with_an_axis_name(stack):
    def layer(x):
        return x - jax.lax.pmean(dense(x), "batch")

    return lambda x: hk.vmap(stack(2)(layer), axis_name="batch", split_rng=False)(x)


@program
def lifted(stack):
    def model(x):
        inner = hk.transform(stack(2, name="s")(dense))
        params = hk.lift(inner.init, name="lifted")(hk.next_rng_key(), x)
        return inner.apply(params, None, x)

    return model


@program
def transformations_inside(stack):
    def layer(x):
        layer = Dense()
        if hk.running_init():
            return layer(x)
        x, _ = hk.scan(lambda x, _: (layer(x), None), x, None, length=2)
        x = hk.cond(x.sum() > 0, lambda x: x, lambda x: 2 * x, x)
        x = hk.switch(1, [lambda x: x, layer], x)
        return hk.vmap(layer, split_rng=False)(x)

    return lambda x: stack(2)(layer)(x)


@program
def recurrent_network_inside(stack):
    def layer(x):
        core = hk.VanillaRNN(D)
        return hk.dynamic_unroll(core, x, core.initial_state(None))[0]

    return lambda x: stack(2)(layer)(x)


# Interceptors.


@program
def intercepted_methods(stack):
    def intercept(next_f, args, kwargs, context):
        y = next_f(*args, **kwargs)
        is_call = context.method_name == "__call__"
        return 2 * y if is_call and isinstance(context.module, Dense) else y

    def model(x):
        with hk.intercept_methods(intercept):
            return stack(2)(dense)(x)

    return model


@stateful
def state_creators_getters_and_setters(stack):
    def create(next_creator, shape, dtype, init, context):
        del context
        return next_creator(shape, dtype, init) + jnp.ones([], dtype)

    def change(next_one, value, context):
        del context
        return next_one(2 * value)

    def model(x):
        with (
            hk.custom_creator(create, params=False, state=True),
            hk.custom_getter(change, params=False, state=True),
            hk.custom_setter(change),
        ):
            return stack(2)(counter)(x)

    return model


# Keys.


@program
def keys_in_the_carry(stack):
    def layer(x, key):
        key, own = jax.random.split(key)
        return plain(x) + jax.random.normal(own, x.shape), key

    def model(x):
        x, typed = stack(2)(layer)(x, jax.random.key(3))
        x, raw = stack(2)(layer)(x, jax.random.PRNGKey(3))
        return x, jax.random.key_data(typed), raw

    return model


@program
def keys_as_per_layer_inputs(stack):
    def layer(x, key):
        return plain(x) + jax.random.normal(key, x.shape), key

    return lambda x: stack(2, True)(layer)(x, jax.random.split(jax.random.key(5)))[0]


@program
def key_closed_over(stack):
    def model(x):
        key = hk.next_rng_key()
        return stack(2)(lambda x: plain(x) + jax.random.normal(key, x.shape))(x)

    return model


@program
def keys_around(stack):
    def model(x):
        hk.reserve_rng_keys(3)
        before = hk.next_rng_key()
        x = stack(2, name="t")(noisy)(stack(2)(plain)(x))
        return x, jax.random.key_data(jnp.stack([before, hk.next_rng_key()]))

    return model


@program
def key_sequences_inside(stack):
    def layer(x):
        first, second = hk.next_rng_keys(2)
        sequence = hk.PRNGSequence(hk.next_rng_key())
        with hk.with_rng(first):
            x = noisy(x)
        noise = jax.random.normal(second, x.shape)
        return x + noise + jax.random.normal(next(sequence), x.shape)

    return lambda x: stack(2)(layer)(x)


@stateful
def key_as_state(stack):
    def layer(x):
        key = hk.get_state("key", [], init=lambda *_: hk.next_rng_key())
        key, own = jax.random.split(key)
        hk.set_state("key", key)
        return x + jax.random.normal(own, x.shape)

    return lambda x: stack(2)(layer)(x)


# Parameters and state of unusual kinds.


@program
def complex_parameters(stack):
    def layer(x):
        init = hk.initializers.RandomNormal(0.3)
        w = hk.get_parameter("w", [D, D], jnp.complex64, init)
        return jnp.tanh((x.astype(w.dtype) @ slow(w)).real)

    return lambda x: stack(2)(layer)(x)


@program
def integer_and_boolean_parameters(stack):
    def layer(x):
        order = hk.get_parameter(
            "order", [D], jnp.int32, lambda *_: jnp.arange(D)[::-1].astype(jnp.int32)
        )
        on = hk.get_parameter("on", [], bool, lambda *_: jnp.bool_(True))
        return jnp.where(on, x[:, jnp.argsort(order)], x)

    return lambda x: stack(2)(layer)(x)


@stateful
def state_that_is_a_tree(stack):
    def layer(x):
        tree = {"a": jnp.zeros([3]), "b": (jnp.ones([]),)}
        state = hk.get_state("tree", [], init=lambda *_: tree)
        hk.set_state("tree", jax.tree.map(lambda leaf: leaf + 1, state))
        return x + state["b"][0]

    return lambda x: stack(2)(layer)(x)


@stateful
def state_that_is_only_set(stack):
    def layer(x):
        hk.set_state("last", x.mean())
        return 1.5 * jnp.tanh(x)

    return lambda x: stack(2)(layer)(x)


@program
def no_carry(stack):
    return lambda x: stack(2, True)(lambda _, y: (None, plain(y)))(
        None, jnp.stack([x, x])
    )


@program
def per_layer_inputs_are_optional(stack):
    return lambda x: stack(2, True)(lambda x, *ys: (plain(x), ys))(x)


@program
def per_layer_stack_in_a_stack(stack):
    def inner(x, scale, shift):
        return plain(x) * scale + shift, x.mean()

    def layer(x, scales):
        x, means = stack(2, True)(inner)(x, scales, jnp.arange(2.0))
        return x * means.sum(), means

    return lambda x: stack(3, True)(layer)(x, normal(3, 3, 2))


@stateful
def three_deep(stack):
    def layer(depth, x):
        if depth == 0:
            return busy(x)
        return plain(stack(2, name=f"s{depth}")(functools.partial(layer, depth - 1))(x))

    return lambda x: layer(3, x)


@pytest.mark.parametrize("name", PROGRAMS)
def test_agrees_with_haiku(name):
    make = PROGRAMS[name]
    params, state, results = run(make, hk_stack.layer_stack)
    expected_params, _, expected = run(make, hk.layer_stack, state=state)
    assert_equal(params, expected_params)
    assert_close(results, expected)


@pytest.mark.parametrize("name", WITH_STATE)
def test_agrees_with_the_loop(name):
    make = WITH_STATE[name]
    assert_close(run(make, hk_stack.layer_stack), run(make, layer_loop))


def test_multi_transform():
    def make(stack):
        def functions():
            encode, decode = stack(2, name="a")(dense), stack(2)(plain)
            return lambda x: decode(encode(x)), (encode, decode)

        return hk.multi_transform(functions)

    ours, theirs = make(hk_stack.layer_stack), make(hk.layer_stack)
    (x,) = vectors()
    params = computed(ours.init, KEY, x)
    assert_equal(params, computed(theirs.init, KEY, x))
    for one, other in zip(ours.apply, theirs.apply, strict=True):
        expected = computed(other, params, None, x)
        assert_close(computed(one, params, None, x), expected)


def small(layer=dense, **options):
    model = hk.transform_with_state(hk_stack.layer_stack(2, name="s", **options)(layer))
    return model, computed(model.init, KEY, *vectors())


@pytest.fixture
def double_precision():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("double_precision")
def test_double_precision():
    def layer(x):
        init = hk.initializers.RandomUniform()
        return jnp.tanh(x @ slow(hk.get_parameter("w", [D, D], x.dtype, init)))

    def make(stack):
        return stack(2)(layer)

    x = vectors()[0].astype(jnp.float64)
    found = run(make, hk_stack.layer_stack, x)
    assert found[2][0].dtype == jnp.float64
    assert_close(found, run(make, hk.layer_stack, x), 1e-12)


def test_debug_nans_finds_the_layer():
    model, (params, state) = small()
    with jax.debug_nans(True):
        model.apply(params, state, None, *vectors())
        with pytest.raises(FloatingPointError):
            model.apply(params, state, None, vectors()[0] * jnp.nan)


def test_no_tracer_leaks():
    with jax.checking_leaks():
        model, (params, state) = small(busy)
        jax.eval_shape(model.apply, params, state, KEY, *vectors())


@pytest.mark.long
def test_no_tracer_leaks_from_nested_stacks():
    depth = 2

    def nested(depth, x):
        if depth == 0:
            return hk_stack.tap(busy(x), "busy")
        inner = functools.partial(nested, depth - 1)
        return hk_stack.layer_stack(2, name=f"s{depth}")(inner)(x)

    model = hk.transform_with_state(functools.partial(nested, depth))
    with jax.checking_leaks():
        params, state = jax.eval_shape(model.init, KEY, *vectors())
        given = (params, state, KEY, *vectors())
        jax.eval_shape(hk_stack.collect(model.apply), *given)
        split = hk_stack.partition(model.apply, *given)
        derived = jax.eval_shape(split.setup, params)
        jax.eval_shape(split.call, derived, *given[1:])
        assert len(hk_stack.summary(model.apply, *given).stacks) == depth


def test_donated_arguments():
    model, (params, state) = small(busy)
    step = jax.jit(model.apply, donate_argnums=(1, 3))
    y, state = step(params, state, KEY, vectors()[0])
    step(params, state, KEY, y)


def test_numpy_parameters_and_inputs():
    model, (params, state) = small()
    expected = model.apply(params, state, None, *vectors())
    found = model.apply(
        *jax.device_get((params, state)), None, jax.device_get(vectors()[0])
    )
    assert_close(found, expected)


def test_exported_with_a_symbolic_batch():
    model, (params, state) = small()
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct([batch, D], jnp.float32)
    exported = export.export(jax.jit(model.apply))(params, state, None, shape)
    x = normal(1, 5, D)
    assert_close(
        exported.call(params, state, None, x), model.apply(params, state, None, x)
    )


def test_other_parameters_in_the_tree_do_not_matter():
    model, (params, state) = small()
    more = {**params, "elsewhere": {"w": jnp.ones([7])}}
    (x,) = vectors()
    assert_close(model.apply(more, state, None, x), model.apply(params, state, None, x))


@pytest.mark.parametrize("name", ["~", "1", "a b"])
def test_name_that_is_no_identifier(name):
    model = hk.transform(hk_stack.layer_stack(2, name=name)(dense))
    with pytest.raises(ValueError, match=f"'{name}'"):
        model.init(KEY, *vectors())
