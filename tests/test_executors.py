"""What runs the layers: one parameter tree, the same results, true values in Python."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import FAST, assert_close, assert_equal
from interpreter import computed
from jax.extend import core as jex
from layer_cases import (
    D,
    L,
    attention,
    by_name,
    drop,
    sequences,
    slow,
    vectors,
    weight,
)
from test_layer_stack import KEY, WAYS, initial

import hk_stack

P = jax.checkpoint_policies
EXECUTORS = {name: WAYS[name] for name in ("python", "remat", "unrolled")}


@pytest.mark.parametrize("name", ["dropout", "counter", "nested_thrice", "per_layer"])
def test_python_loop_outside_of_jit(name):
    case = by_name[name]
    apply = case.model(hk_stack.layer_stack, loop="python").apply
    given = (*initial(name), KEY, *case.given())
    scanned = computed(case.model(hk_stack.layer_stack).apply, *given)
    assert_close(apply(*given), scanned)


def noise(x):
    """Draws keys in several ways."""
    with jax.numpy_dtype_promotion("standard"):
        mask = jax.random.bernoulli(hk.next_rng_key(), 0.5, x.shape)
        y = hk.dropout(hk.next_rng_key(), 0.3, x)
    return y + 1.0, (mask, jax.random.key_data(hk.next_rng_key()))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_random_draws_are_the_same_bits(executor):
    def outputs(**options):
        stack = hk_stack.layer_stack(5, True, name="s", **options)
        return computed(hk.transform(stack(noise)).apply, {}, KEY, *vectors())[1]

    assert_equal(outputs(**EXECUTORS[executor]), outputs())


def test_options_that_are_off_leave_the_program_alone():
    def layer(x):
        x = hk_stack.tap(hk.Linear(D)(x), "linear")
        hk_stack.tap(jnp.exp(x), "not used")
        return jnp.tanh(x @ slow(weight()))

    def bare(x):
        x = hk.Linear(D)(x)
        jnp.exp(x)
        return jnp.tanh(x @ slow(weight()))

    off = {"loop": "scan", "remat": False, "carry_dtype": None, "check_finite": False}

    def program(layer, **options):
        model = hk.transform(hk_stack.layer_stack(L, name="s", **options)(layer))
        params = jax.eval_shape(model.init, KEY, *vectors())
        return str(jax.make_jaxpr(model.apply)(params, None, *vectors()))

    assert program(layer, **off) == program(layer) == program(bare)
    assert "hk_stack.tap" not in program(layer)


def model_of(layer, **options):
    model = hk.transform(hk_stack.layer_stack(L, name="stack", **options)(layer))
    return model, computed(model.init, KEY, *vectors())


def plain(x):
    return x + jnp.tanh(hk.Linear(D)(x))


def test_a_layer_is_traced_once():
    seen = []
    traced = jex.Primitive("traced")
    traced.def_abstract_eval(lambda x: seen.append(x) or x)

    def layer(x):
        return traced.bind(x) @ slow(weight())

    model = hk.transform(hk_stack.layer_stack(L, name="s")(layer))
    jax.make_jaxpr(model.apply)({"s/~": {"w": jnp.ones([L, D, D])}}, None, *vectors())
    assert len(seen) == 1


def test_what_layers_pass_on_as_it_came_is_no_carry():
    def layers(x, mask, ys):
        def layer(carry, y):
            x, mask = carry
            return (jnp.where(mask, x + 1, x), mask), y

        return hk_stack.layer_stack(L, True)(layer)((x, mask), ys)

    x, ys = jnp.ones([D]), jnp.ones([L, 2])
    program = jax.make_jaxpr(hk.transform(layers).apply)({}, None, x, x > 0, ys)
    loop = jaxprs.loop(program.jaxpr, L)
    assert len(jaxprs.carried(loop)) == len(loop.outvars) == 1


def test_unrolled_has_no_loop():
    model, params = model_of(plain, loop="unrolled")
    jaxpr = jax.make_jaxpr(model.apply)(params, None, *vectors())
    names = jaxprs.names(jaxpr.jaxpr)
    assert "scan" not in names and names.count("dot_general") == L


@pytest.mark.parametrize("options", [{"loop": "unrolled"}, {"unroll": L}], ids=str)
def test_unrolling_all_layers_leaves_xla_no_loop(options):
    def program(**options):
        model, params = model_of(plain, **options)
        return jax.jit(model.apply).lower(params, None, *vectors()).compile().as_text()

    assert " while(" in program() and " while(" not in program(**options)


def test_unrolled_gradient_adds_up_no_whole_stacks():
    """Slices of `[L, ...]` by index would be summed up as L arrays `[L, ...]`."""
    model, params = model_of(plain, loop="unrolled")
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.apply(p, None, *vectors()).sum()))(
        params
    )
    sums = [e for e in jaxprs.equations(jaxpr.jaxpr) if e.primitive.name == "add_any"]
    assert all(e.outvars[0].aval.shape[:2] != (L, D) for e in sums)


def test_python_loop_sees_true_values():
    seen = []

    def layer(x):
        x = plain(x)
        index = hk_stack.layer_index()
        if index == 1:  # Both an `if` on the index and one on a value.
            assert float(x.sum()) != 0
        seen.append((index, float(x.sum())))
        return x

    _, params = model_of(plain)
    with hk_stack.use_loop("python"):
        twin = hk.transform(hk_stack.layer_stack(L, name="stack")(layer))
        y = twin.apply(params, None, *vectors())
    assert [i for i, _ in seen] == [0, 1, 2]
    np.testing.assert_allclose(seen[-1][1], y.sum(), rtol=1e-6)


def test_python_loop_runs_reversed():
    seen = []

    def layer(x, y):
        seen.append((hk_stack.layer_index(), float(y)))
        return x, y

    def run(x):
        stack = hk_stack.layer_stack(3, True, loop="python")
        return stack(layer)(x, jnp.arange(3.0), reverse=True)

    _, ys = hk.transform(run).apply({}, None, *vectors())
    assert seen == [(2, 2.0), (1, 1.0), (0, 0.0)]
    assert_equal(ys, jnp.arange(3.0))


def test_debug_print_in_order(capfd):
    def layer(x):
        jax.debug.print("mean {m:.3f}", m=x.mean())
        return x + 1.0

    model = hk.transform(hk_stack.layer_stack(3, loop="python")(layer))
    model.apply({}, None, jnp.zeros([2]))
    jax.effects_barrier()
    assert capfd.readouterr().out.split("\n")[:3] == [
        "mean 0.000",
        "mean 1.000",
        "mean 2.000",
    ]


def intercepted(model, *given):
    """Names, indices and sums that an interceptor of Linear modules sees."""
    seen = []

    def look(f, args, kwargs, context):
        y = f(*args, **kwargs)
        if isinstance(context.module, hk.Linear) and context.method_name == "__call__":
            index = hk_stack.layer_index()
            seen.append((context.module.module_name, index, float(y.sum())))
        return y

    with hk.intercept_methods(look), hk_stack.use_loop("python"):
        model.apply(*given)
    return seen


def test_interceptors_see_names_with_the_index():
    model, params = model_of(plain)
    seen = intercepted(model, params, None, *vectors())
    assert [name for name, _, _ in seen] == [f"stack_{i}/linear" for i in range(L)]
    assert [index for _, index, _ in seen] == [0, 1, 2]


def test_nested_names():
    def outer(x):
        return hk_stack.layer_stack(2, name="inner")(plain)(hk.Linear(D)(x))

    model, params = model_of(outer)
    names = [name for name, _, _ in intercepted(model, params, None, *vectors())]
    assert names[:4] == [
        "stack_0/linear",
        "stack_0/inner_0/linear",
        "stack_0/inner_1/linear",
        "stack_1/linear",
    ]


def test_tabulate_counts_each_parameter_once():
    model, params = model_of(plain)
    with hk_stack.use_loop("python"):
        rows = hk.experimental.eval_summary(model)(*vectors())
    counts = {
        row.module_details.module.module_name: sum(
            spec.size for spec in row.module_details.params.values()
        )
        for row in rows
        if isinstance(row.module_details.module, hk.Linear)
    }
    assert counts == {f"stack_{i}/linear": D * D + D for i in range(L)}
    assert sum(counts.values()) == sum(p.size for p in jax.tree.leaves(params))


class Counting(hk.Module):
    """A module with a parameter and state, to be made outside of the stack."""

    def __call__(self, x):
        calls = hk.get_state("calls", [], init=jnp.zeros)
        hk.set_state("calls", calls + 1.0)
        return x * hk.get_parameter("scale", [D], init=jnp.ones)[None] + calls


@pytest.mark.parametrize("inner", ["scan", "python"])
@pytest.mark.parametrize("outer", ["scan", "python"])
def test_modules_of_an_outer_layer_in_an_inner_stack(outer, inner):
    def layer(x):
        captured = Counting()

        def deep(x):
            return hk.Linear(D)(captured(x))

        def middle(x):
            stack = hk_stack.layer_stack(2, name="deep", loop=inner)
            return hk.Linear(D)(stack(deep)(x))

        return hk_stack.layer_stack(2, name="middle", loop=outer)(middle)(x)

    def model(loop):
        return hk.transform_with_state(
            hk_stack.layer_stack(L, name="stack", loop=loop)(layer)
        )

    given = (*computed(model("scan").init, KEY, *vectors()), None, *vectors())
    with hk_stack.use_loop("scan"):
        expected = computed(model("scan").apply, *given)
    assert_close(model(outer).apply(*given), expected)
    assert_close(computed(model(inner).apply, *given), expected)


def test_modules_with_names_of_a_layer():
    class Outside(hk.Module):
        def __call__(self, x):
            return hk.Linear(D, name="linear")(x)

    def run(x):
        first = Outside(name="layers_0")

        def layer(x):
            return first(x) + hk.Linear(D, name="linear")(x)

        return hk_stack.layer_stack(2, name="layers", loop="python")(layer)(x)

    as_in_the_compiled_loop(run)


def as_in_the_compiled_loop(run):
    """Checks that a program with Python loops gives what it gives without them."""
    model = hk.transform_with_state(run)
    with hk_stack.use_loop("scan"):
        params, state = computed(model.init, KEY, *vectors())
        expected = computed(model.apply, params, state, KEY, *vectors())
    assert jax.eval_shape(model.init, KEY, *vectors()) == jax.eval_shape(
        lambda: (params, state)
    )
    assert_close(computed(model.apply, params, state, KEY, *vectors()), expected)


def one_or_two_deep(layer, inner):
    """A stack of the layer in a Python loop, or of stacks of it that `inner` runs."""

    def outer(x):
        x = hk_stack.layer_stack(2, name="inner", loop=inner)(layer)(x)
        return hk.Linear(D, name="after")(x)

    return hk_stack.layer_stack(2, name="stack", loop="python")(
        outer if inner else layer
    )


def decayed(x):
    params = hk.experimental.get_params()
    decay = sum(jnp.sum(jnp.abs(p)) for p in jax.tree.leaves(params))
    x = x + 1e-3 * decay * jnp.float32(len(params))
    return hk.Linear(D)(x) * hk.get_parameter("scale", [D], init=jnp.ones)[None]


def forced(x):
    x = hk.Linear(D, name=hk.experimental.force_name("old/lin"))(x)
    return Counting(name=hk.experimental.force_name("older"))(x)


class Forced(hk.Module):
    """Has a submodule from its constructor, and one from its call."""

    def __init__(self):
        super().__init__(name=hk.experimental.force_name("very/old"))
        self.first = hk.Linear(D)

    def __call__(self, x):
        return hk.Linear(D)(self.first(x))


def tied(x):
    first = hk.Linear(D)
    again = hk.Linear(D, name=hk.experimental.force_name(first.module_name))
    return Forced()(first(again(x)))


def bare(x):
    return busy(x * hk.get_parameter("scale", [D], init=jnp.ones)[None])


def busy(x):
    calls = hk.get_state("calls", [], init=jnp.zeros)
    hk.set_state("calls", calls + 1.0)
    return Counting()(hk.Linear(D)(x)) + calls


def lifted(x):
    inner = hk.transform(decayed)
    params = hk.transparent_lift(inner.init)(hk.maybe_next_rng_key(), x)
    return inner.apply(params, None, x)


def lifted_with_state(x):
    inner = hk.transform_with_state(bare)
    lift, updater = hk.transparent_lift_with_state(inner.init)
    params, state = lift(hk.maybe_next_rng_key(), x)
    x, state = inner.apply(params, state, None, x)
    updater.update(state)
    return x


def lifted_below_a_name(x):
    inner = hk.transform(decayed)
    params = hk.lift(inner.init, name="below")(hk.maybe_next_rng_key(), x)
    return hk.Linear(D)(inner.apply(params, None, x))


def summed_by_name(x):
    linear = hk.Linear(D)
    x = linear(x)
    found = hk.experimental.get_params()[linear.module_name]
    return x + sum(p.sum() for p in linear.params_dict().values()) + found["w"].sum()


ODD = [
    decayed,
    forced,
    tied,
    bare,
    lifted,
    lifted_with_state,
    lifted_below_a_name,
    summed_by_name,
]


@pytest.mark.parametrize("inner", [None, "scan", "python"])
@pytest.mark.parametrize("layer", ODD, ids=lambda f: f.__name__)
def test_odd_names(layer, inner):
    as_in_the_compiled_loop(one_or_two_deep(layer, inner))


class Closed(hk.Module):
    """A module, and a lift, to be made outside of the layer."""

    def __init__(self, name=None):
        super().__init__(name)
        self.linear = hk.Linear(D)
        self.inner = hk.transform(bare_parameter)
        self.lift = hk.lift(self.inner.init, name="lifted")

    def __call__(self, x):
        params = self.lift(hk.maybe_next_rng_key(), x)
        return self.inner.apply(params, None, Counting()(self.linear(x)))


def bare_parameter(x):
    return x * hk.get_parameter("scale", [D], init=jnp.ones)[None]


@pytest.mark.parametrize("inner", ["scan", "python"])
def test_odd_modules_of_the_layer_around(inner):
    def outer(x):
        closed = [Closed(), Closed(name="deep_0")]

        def layer(x):
            return decayed(closed[0](closed[1](x)))

        x = hk_stack.layer_stack(2, name="deep", loop=inner)(layer)(x)
        return hk.Linear(D, name="after")(x)

    stack = hk_stack.layer_stack(2, name="outer", loop="python")
    as_in_the_compiled_loop(stack(outer))


def test_state_that_a_call_creates():
    def layer(x):
        if not hk.running_init():
            hk.set_state("last", x.sum())
        return x + 1.0

    def apply(loop):
        stack = hk_stack.layer_stack(3, name="s", loop=loop)(layer)
        return computed(hk.transform_with_state(stack).apply, {}, {}, None, *vectors())

    assert_close(apply("python"), apply("scan"))


@pytest.mark.parametrize("jit", [False, True])
def test_captured_modules(jit):
    def run(x):
        captured = Counting()

        def layer(x):
            return hk.Linear(D)(captured(captured(x)))

        return hk_stack.layer_stack(L, name="stack")(layer)(x)

    model = hk.transform_with_state(run)
    given = (*computed(model.init, KEY, *vectors()), None, *vectors())
    expected = computed(model.apply, *given)
    with hk_stack.use_loop("python"):
        found = computed(model.apply, *given) if jit else model.apply(*given)
    assert_close(found, expected)
    assert_equal(expected[1]["stack/counting"]["calls"], jnp.full([L], 2.0))


def test_which_executor_is_in_force(monkeypatch):
    def loops(asked_for):
        model, params = model_of(plain, loop=asked_for)
        jaxpr = jax.make_jaxpr(model.apply)(params, None, *vectors())
        return jaxprs.names(jaxpr.jaxpr).count("scan")

    assert (loops("scan"), loops("unrolled")) == (1, 0)
    monkeypatch.setenv("HK_STACK_LOOP", "unrolled")
    assert loops("scan") == 0
    with hk_stack.use_loop("scan"):
        assert (loops("scan"), loops("unrolled")) == (1, 1)
        with hk_stack.use_loop("python"):
            assert loops("scan") == 0
    monkeypatch.setenv("HK_STACK_LOOP", "")
    assert (loops("scan"), loops("unrolled")) == (1, 0)


def test_compiled_programs_follow_the_block():
    traced = []

    @jax.jit
    def run(params, x):
        traced.append(None)
        return model.apply(params, None, x)

    model, params = model_of(plain)
    expected = run(params, *vectors())
    with hk_stack.use_loop("python"):
        assert_close(run(params, *vectors()), expected)
    run(params, *vectors())
    assert len(traced) == 2


def test_mistakes_in_the_executor(monkeypatch):
    with pytest.raises(ValueError, match='"scan", "unrolled", "python", not \'for\''):
        hk_stack.layer_stack(2, loop="for")
    with pytest.raises(ValueError, match=r'^use_loop: loop must be one of "scan"'):
        hk_stack.use_loop(None)
    model, params = model_of(plain)
    monkeypatch.setenv("HK_STACK_LOOP", "fast")
    with pytest.raises(ValueError, match="variable HK_STACK_LOOP: its value must be"):
        model.apply(params, None, *vectors())


def test_outputs_that_differ_between_layers():
    def layer(x):
        return x, {"first": x} if hk_stack.layer_index() == 0 else None

    stack = hk_stack.layer_stack(2, True, loop="python", name="s")(layer)
    with pytest.raises(TypeError, match="must return the same pytree") as error:
        hk.transform(stack).apply({}, None, *vectors())
    assert "layer 1 of layer_stack 's'" in error.value.__notes__[0]


# Trained parameters under other executors and rematerialisation.

WAYS_TO_GO_ON = {
    **EXECUTORS,
    "sqrt": {"remat": True, "remat_every": "sqrt"},
    "names": {"remat": P.save_only_these_names("hk_stack.derived")},
    "inline": {"setup": "inline", "remat": True},
}


def transformer(x):
    x = attention(x)
    y = hk.nets.MLP([2 * D, D], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(x))
    return x + drop(0.1, y @ slow(weight(scale=0.1)))


@pytest.fixture(scope="module")
def trained():
    """A model, its parameters after a few steps of training, and its loss then."""
    (x,) = sequences()

    def model(**options):
        return hk.transform(
            hk_stack.layer_stack(4, name="layers", **options)(transformer)
        )

    def loss(params, **options):
        y = model(**options).apply(params, KEY, x)
        return jnp.mean((y - jnp.flip(x, 1)) ** 2)

    params = computed(model().init, KEY, x)
    step = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)
    losses = []
    for _ in range(10):
        value, grads = step(params)
        losses.append(value)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert losses[-1] < 0.8 * losses[0]
    return params, loss, step(params)


@pytest.mark.parametrize("way", WAYS_TO_GO_ON)
def test_a_trained_model_goes_on_in_any_way(trained, way, tmp_path):
    params, loss, (value, grads) = trained
    pytest.importorskip("safetensors")  # The extra "checkpoint" may not be installed.
    from hk_stack import checkpoint

    path = tmp_path / "trained.safetensors"
    checkpoint.save(path, params)
    restored = checkpoint.load(path, like=params)
    run = jax.value_and_grad(functools.partial(loss, **WAYS_TO_GO_ON[way]))
    found, gradients = computed(run, restored)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    assert_close(gradients, grads)
