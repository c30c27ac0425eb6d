"""Which layer was first to have a value that is not finite, and what that value was."""

import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from agreement import assert_close, assert_equal
from interpreter import computed
from jax.experimental import checkify
from layer_cases import D, by_name, vectors, weight
from test_layer_stack import KEY, initial

import hk_stack
from hk_stack import _finite, _marks

EXECUTORS = ("scan", "unrolled", "python")
LAST = "of layer_stack 'outer' of layer function 'outer'"


def inner(x):
    g = hk.get_parameter("g", [], init=jnp.ones)
    return hk_stack.tap(jnp.log(hk_stack.tap(x * g, "scaled") + 5.0), "log") / 3.0


def outer(x, y):
    x = jnp.tanh(hk.Linear(D)(x))
    x = hk.remat(lambda x: hk_stack.tap(jnp.sin(x) + y, "shifted{}"))(x)
    x = hk_stack.layer_stack(2, name="inner")(inner)(x)
    return x + x @ jnp.cumsum(jnp.exp(weight()), 0), x.mean()


def network(x, y, reverse=False):
    stack = hk_stack.layer_stack(3, True, name="outer", check_finite=True)
    return stack(outer)(x, y, reverse=reverse)


model = hk.transform(network)
NOTHING = jnp.zeros(3)


@functools.cache
def params():
    return computed(model.init, KEY, *vectors(), NOTHING)


def spoiled(module, leaf, index, value=jnp.nan):
    """The parameters, with one bad number."""
    changed = {**params()[module]}
    changed[leaf] = changed[leaf].at[index].set(value)
    return {**params(), module: changed}


def found(fn, *args):
    """What checkify says of `fn`."""
    return computed(checkify.checkify(fn), *args)[0].get()


def loss(params, x, y, reverse=False):
    out, means = model.apply(params, None, x, y, reverse)
    return out.sum() + means.sum()


# Parameters, what is wrong with the per-layer input, and what is found.
FAULTS = {
    "parameter": (
        lambda: spoiled("outer/linear", "w", (1, 0, 0)),
        NOTHING,
        f"parameter linear/w, in layer 1 {LAST}",
    ),
    "stacked parameter": (
        lambda: spoiled("outer/inner/~", "g", (2, 0), jnp.inf),
        NOTHING,
        f"parameter inner/~/g, in layer 2 {LAST}",
    ),
    "per-layer input": (
        params,
        NOTHING.at[2].set(jnp.inf),
        f"argument y, in layer 2 {LAST}",
    ),
    "tap in a stack inside": (
        lambda: spoiled("outer/inner/~", "g", (1, 1), -1e3),
        NOTHING,
        "tap outer/inner/log, in layer 1 of layer_stack 'outer/inner' of layer "
        f"function 'inner', in layer 1 {LAST}",
    ),
    "nothing": (params, NOTHING.at[1].set(3.0), None),
    "setup": (
        lambda: spoiled("outer/~", "w", (0, 0, 0), 1e3),
        NOTHING,
        f"result x, in layer 0 {LAST}",
    ),
}


@pytest.mark.parametrize("loop", EXECUTORS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, loop):
    make, y, message = FAULTS[fault]
    given = (make(), *vectors(), y)
    with hk_stack.use_loop(loop):
        for fn in (loss, jax.grad(loss)):
            said = found(fn, *given)
            if message is None:
                assert said is None
                continue
            assert said.startswith(f"the first value that is not finite is {message}")


@pytest.mark.parametrize("loop", EXECUTORS)
def test_outside_of_jit_it_raises(loop):
    make, y, message = FAULTS["parameter"]
    with (
        hk_stack.use_loop(loop),
        pytest.raises(checkify.JaxRuntimeError, match=re.escape(message)),
    ):
        model.apply(make(), None, *vectors(), y)


@pytest.mark.parametrize("loop", EXECUTORS)
def test_the_first_layer_is_the_first_that_runs(loop):
    bad = spoiled("outer/linear", "w", (slice(None), 0, 0))
    with hk_stack.use_loop(loop):
        for reverse, layer in ((False, 0), (True, 2)):
            said = found(
                functools.partial(loss, reverse=reverse), bad, *vectors(), NOTHING
            )
            assert f"parameter linear/w, in layer {layer} {LAST}" in said


@pytest.mark.parametrize("loop", EXECUTORS)
def test_what_the_stack_is_given(loop):
    with hk_stack.use_loop(loop):
        said = found(loss, params(), vectors()[0].at[0, 0].set(jnp.nan), NOTHING)
    assert f"argument x, in layer 0 {LAST}" in said


@pytest.mark.parametrize("remat", [{"remat": True}, {"remat": True, "remat_every": 2}])
def test_with_remat_and_vmap(remat):
    def layer(x, y):
        return hk_stack.tap(jnp.sqrt(x + y), "root"), None

    stack = hk_stack.layer_stack(5, True, name="s", check_finite=True, **remat)
    apply = hk.transform(stack(layer)).apply

    def run(x, y):
        return apply({}, None, x, y)[0].sum()

    ys = jnp.ones([5]).at[3].set(-9.0)
    place = "tap s/root, in layer 3 of layer_stack 's' of layer function 'layer'"
    assert place in found(jax.grad(run), jnp.ones([2]), ys)
    batch = jax.vmap(run, (0, None))
    assert place in found(batch, jnp.ones([4, 2]), ys)
    assert found(batch, jnp.ones([4, 2]), abs(ys)) is None


def test_checks_while_others_collect():
    make, y, message = FAULTS["parameter"]
    run = hk_stack.collect(loss)
    assert message in found(run, make(), *vectors(), y)
    with pytest.raises(checkify.JaxRuntimeError, match=re.escape(message)):
        run(make(), *vectors(), y)
    assert set(run(params(), *vectors(), y)[1]) == {
        "outer/shifted{}",
        "outer/inner/scaled",
        "outer/inner/log",
    }


def test_stacks_around_check_those_inside():
    """An inner stack that asks for it, in one that does not, checks too."""

    def layer(x):
        stack = hk_stack.layer_stack(2, name="in", check_finite=True)
        return stack(lambda x: jnp.log(x))(x)

    apply = hk.transform(hk_stack.layer_stack(3, name="out")(layer)).apply
    said = found(lambda x: apply({}, None, x), jnp.float32(3.0))
    assert "result x, in layer 1 of layer_stack 'out/in'" in said
    assert "in layer 1 of layer_stack 'out' of layer function 'layer'" in said


@pytest.mark.parametrize("loop", EXECUTORS)
def test_checks_of_one_label_are_kept_apart(loop):
    """Two stacks and two taps by one name, the first of which goes wrong."""

    def block(x, w):
        hk_stack.tap(jnp.log(w), "l")
        hk_stack.tap(x, "l")
        return x, None

    def outer(x, ws):
        stack = hk_stack.layer_stack(2, True)
        x, _ = stack(block)(x, ws)
        return stack(block)(x, jnp.ones(2))[0], None

    stack = hk_stack.layer_stack(3, True, name="o", check_finite=True, loop=loop)
    apply = hk.transform(stack(outer)).apply

    def run(ws):
        return apply({}, None, jnp.ones(2), ws)

    said = found(run, jnp.ones([3, 2]).at[1, 1].set(-1.0))
    assert "tap o/__layer_stack_with_per_layer/l, in layer 1 of" in said
    assert "in layer 1 of layer_stack 'o'" in said
    assert found(run, jnp.ones([3, 2])) is None


@pytest.mark.parametrize("loop", EXECUTORS)
def test_checks_in_helpers_and_inner_gradients(loop):
    """In functions that JAX has traced before, silently, and differentiates."""
    helper = jax.jit(lambda x: hk_stack.tap(jnp.log(x), "log"))

    def layer(x):
        w = hk.get_parameter("w", [], init=jnp.ones)
        y = helper(x * w)
        slope = jax.grad(lambda x: jax.jit(jnp.sum)(helper(x * w)))(x)
        return x + 0.0 * jnp.where(jnp.isnan(y), 1.0, slope)

    stack = hk_stack.layer_stack(3, name="s", check_finite=True, loop=loop)
    model = hk.transform(stack(layer))
    params = jax.eval_shape(model.init, KEY, jnp.ones(2))
    assert params["s/~"]["w"].shape == (3,)
    params = {"s/~": {"w": jnp.array([1.0, -1.0, 1.0])}}
    said = found(lambda p: model.apply(p, None, jnp.ones(2)), params)
    assert "tap s/log, in layer 1 of layer_stack 's'" in said


@pytest.mark.parametrize("loop", EXECUTORS)
def test_checks_under_vmap_in_a_layer(loop):
    def layer(x, w):
        def one(v):
            stack = hk_stack.layer_stack(2, name="in")
            return stack(lambda v: v + 1.0)(hk_stack.tap(v * w, "v"))

        return jax.vmap(one)(x), None

    stack = hk_stack.layer_stack(3, True, name="s", check_finite=True, loop=loop)
    apply = hk.transform(stack(layer)).apply
    ws = jnp.ones(3).at[2].set(jnp.inf)
    said = found(lambda x: apply({}, None, x, jnp.ones(3)), jnp.ones([3, 2]))
    assert said is None
    said = found(lambda x: apply({}, None, x, ws), jnp.ones([3, 2]))
    assert "argument w, in layer 2 of layer_stack 's'" in said


def test_integers_are_finite():
    def layer(x, count):
        return x + 1.0, count + 1

    stack = hk_stack.layer_stack(2, check_finite=True)(layer)
    given = jnp.zeros([2]), jnp.int32(0)
    assert (
        found(lambda *given: hk.transform(stack).apply({}, None, *given), *given)
        is None
    )


CHECKED = [
    "counter",
    "dropout",
    "haiku_remat",
    "integers",
    "nested_thrice",
    "one_layer",
    "per_layer_reverse",
    "pytree_carry",
]


@pytest.mark.parametrize("name", CHECKED)
def test_checked_stacks_compute_the_same(name):
    case = by_name[name]
    given = (*initial(name), KEY, *case.given())
    checked = case.model(hk_stack.layer_stack, check_finite=True).apply
    error, out = computed(checkify.checkify(checked), *given)
    assert error.get() is None
    plain = case.model(hk_stack.layer_stack).apply
    assert_close(out, computed(plain, *given))


# Loops around a stack: JAX drops from their gradients what nothing reads.


def stack_in(loop):
    """A function of an array and of what makes the second of three turns fail."""

    def layer(x, w):
        x = hk_stack.tap(x * hk_stack.tap(jnp.log(w), "log"), "product")
        return x, x.mean()

    stack = hk_stack.layer_stack(2, True, name="s", check_finite=True, loop=loop)
    return stack(layer)


def turn(apply, x, w):
    return apply(x, jnp.stack([w + 10.0, w]))


def in_scan(apply, x, ws):
    x, means = jax.lax.scan(lambda x, w: turn(apply, x, w), x, ws)
    return x.sum() + means.sum()


def in_map(apply, x, ws):
    """Reads what layers return besides the carry, and nothing else."""
    return jax.lax.map(lambda w: turn(apply, x, w)[1], ws).sum()


def in_two_scans(apply, x, ws):
    def outer(x, _):
        return jax.lax.scan(lambda x, w: (turn(apply, x, w)[0], None), x, ws)

    return jax.lax.scan(outer, x, None, length=1)[0].sum()


def in_remat(apply, x, ws):
    run = jax.checkpoint(lambda x, w: turn(apply, x, w))
    return jax.lax.scan(run, x, ws)[0].sum()


def in_own_derivative(apply, x, ws):
    @jax.custom_jvp
    def run(x, w):
        return turn(apply, x, w)[0]

    @run.defjvp
    def derivative(primals, tangents):
        return run(*primals), 2.0 * tangents[0]

    return jax.lax.scan(lambda x, w: (run(x, w), None), x, ws)[0].sum()


def in_cond(apply, x, ws):
    def step(x, w):
        x = jax.lax.cond(w > -9.0, lambda: turn(apply, x, w)[0], lambda: x)
        return x, None

    return jax.lax.scan(step, x, ws)[0].sum()


AROUND = [
    in_scan,
    in_map,
    in_two_scans,
    in_remat,
    in_own_derivative,
    in_cond,
]
DERIVATIVES = {
    "none": lambda f: f,
    "grad": jax.grad,
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "grad of remat": lambda f: jax.grad(jax.checkpoint(f)),
    "grad of grad": lambda f: jax.grad(lambda *given: jax.grad(f)(*given).sum()),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f), (0, None)),
}


@pytest.mark.parametrize("loop", ["scan", "python"])
@pytest.mark.parametrize("around", AROUND)
def test_loops_around_a_stack(around, loop):
    apply = functools.partial(hk.transform(stack_in(loop)).apply, {}, None)
    run = functools.partial(around, apply)
    fine = jnp.array([1.0, 1.5, 2.0])
    place = "tap s/log, in layer 1 of layer_stack 's' of layer function 'layer'"
    for name, derive in DERIVATIVES.items():
        derived = checkify.checkify(derive(run))
        for ws, expected in ((fine, None), (fine.at[1].set(-1.0), place)):
            said = computed(derived, jnp.ones([2, 1]), ws)[0].get()
            assert (said is None) == (expected is None), name
            assert expected is None or expected in said, name


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_loops_of_haiku_and_batches_around_a_stack(loop):
    def scanned(x, ws):
        return hk.scan(functools.partial(turn, stack_in(loop)), x, ws)[0].sum()

    def counted(x, ws):
        run = stack_in(loop)
        step = lambda i, x: turn(run, x, ws[i])[0]  # noqa: E731
        return hk.fori_loop(0, 3, step, x).sum()

    def in_batches(x, ws):
        apply = functools.partial(hk.transform(stack_in(loop)).apply, {}, None)
        step = lambda w: turn(apply, x, w)[0]  # noqa: E731
        return jax.lax.map(step, ws, batch_size=2).sum()

    for model in (scanned, counted, in_batches):
        apply = functools.partial(hk.transform(model).apply, {}, None)
        said = found(jax.grad(apply), jnp.ones([2]), jnp.array([1.0, -1.0, 2.0]))
        assert "tap s/log, in layer 1 of layer_stack 's'" in said


def test_a_tap_in_an_inner_gradient_of_a_loop():
    def inner(x, w):
        turns = jax.lax.scan(lambda x, _: (hk_stack.tap(x * w, "x"), None), x, None, 2)
        return turns[0].sum()

    def layer(x, w):
        jax.grad(inner)(x, w)
        return x, None

    stack = hk_stack.layer_stack(3, True, name="s", check_finite=True)
    apply = hk.transform(stack(layer)).apply
    ws = jnp.ones(3).at[1].set(3e38)
    said = found(lambda x: apply({}, None, x, ws), jnp.full([2], 2.0))
    assert "tap s/x, in layer 1 of layer_stack 's'" in said


@pytest.mark.parametrize("loop", EXECUTORS)
def test_outside_of_jit_in_remat_and_vmap(loop):
    apply = functools.partial(hk.transform(stack_in(loop)).apply, {}, None)

    def run(x, w):
        return jax.checkpoint(lambda x: turn(apply, x, w)[0])(x).sum()

    for call in (run, jax.grad(run), jax.vmap(jax.grad(run), (0, None))):
        call(jnp.ones([2, 1]), jnp.float32(2.0))
        with pytest.raises(checkify.JaxRuntimeError, match="tap s/log, in layer 1"):
            call(jnp.ones([2, 1]), jnp.float32(-1.0))


# More layers than an int32 can count.


def test_a_program_of_many_layers():
    def stack(name, layer):
        return hk_stack.layer_stack(1000, name=name, check_finite=True)(layer)

    def layer(x):
        return hk_stack.tap(jnp.sin(x), "sine")

    def network(x):
        return stack("a", lambda x: stack("b", lambda x: stack("c", layer)(x))(x))(x)

    apply = functools.partial(hk.transform(network).apply, {}, None)
    jax.make_jaxpr(checkify.checkify(apply))(jnp.ones([2]))


def checked(*names, reverse=()):
    """The checks of stacks of 1000 layers in each other."""
    name, *inner = names
    more = (checked(*inner, reverse=reverse),) if inner else ()
    return _finite.Check(name, 1000, name in reverse, (_finite.Check("x"), *more))


def code_of(stack, layers=()):
    """Its code, if value x of the layer of these indices is bad; or nothing is."""
    of_value = jnp.ones([1000, 1], jnp.int32)
    of_stacks = [jnp.tile(code_of(s), (1000, 1)) for s in stack.items[1:]]
    if len(layers) == 1:
        of_value = of_value.at[layers].set(0)
    elif layers:
        inner = code_of(stack.items[1], layers[1:])
        of_stacks = [codes.at[layers[0]].set(inner) for codes in of_stacks]
    return stack.encode([of_value, *of_stacks])


@pytest.mark.parametrize("reverse", [(), ("a", "c")])
def test_codes_of_many_layers(reverse):
    stack = checked("a", "b", "c", reverse=reverse)

    def failed(code):
        found = [
            (text, {k: int(v) for k, v in indices.items()})
            for text, is_first, indices in stack.messages(code)
            if is_first
        ]
        return found[0] if found else None

    places = [(0, 999, 5), (997, 3, 999), (997, 4, 0), (998, 0, 0)]
    codes = jnp.stack([code_of(stack, place) for place in places])
    for place, code in zip(places, codes, strict=True):
        text, indices = failed(code)
        assert text == (
            "x, in layer {layer_2} of c, in layer {layer_1} of b, in layer {layer_0} "
            "of a"
        )
        assert tuple(indices.values()) == place
    first = 3 if reverse else 0
    assert (_marks.first_code(codes[::-1]) == codes[first]).all()
    fine = code_of(stack)
    assert failed(fine) is None
    assert (_marks.first_code(jnp.stack([fine, codes[1]])) == codes[1]).all()


# The type of the carry.


def test_carry_dtype():
    def layer(x, count, z):
        assert x.dtype == jnp.bfloat16 and count.dtype == jnp.int32
        y = hk.Linear(D)(x.astype(jnp.float32))
        return y, count + 1, z * 1j

    for loop in EXECUTORS:
        stack = hk_stack.layer_stack(3, carry_dtype=jnp.bfloat16, loop=loop, name="s")
        model = hk.transform(stack(layer))
        given = (*vectors(), jnp.int32(0), jnp.complex64(1.0))
        params = computed(model.init, KEY, *given)
        x, count, z = computed(model.apply, params, None, *given)
        expected = vectors()[0].astype(jnp.bfloat16)
        for i in range(3):
            w, b = params["s/linear"]["w"][i], params["s/linear"]["b"][i]
            expected = (expected.astype(jnp.float32) @ w + b[None]).astype(jnp.bfloat16)
        assert_equal(count, jnp.int32(3))
        assert z.dtype == jnp.complex64
        assert_close(x, expected)


# Errors in a layer function.


def wrong_shape(x):
    x = hk.Linear(D)(x)
    if isinstance(hk_stack.layer_index(), int) and hk_stack.layer_index() == 2:
        return x @ jnp.ones([D + 1, D])
    return x


def narrows(x):
    is_second = isinstance(hk_stack.layer_index(), int) and hk_stack.layer_index() == 1
    return x[:, :-1] if is_second else x


def raised(layer, *, loop, name="blocks"):
    model = hk.transform(hk_stack.layer_stack(4, name=name, loop=loop)(layer))
    trained = hk.transform(hk_stack.layer_stack(4, name=name)(layer)).init(
        KEY, *vectors()
    )
    with pytest.raises(TypeError) as error:
        model.apply(trained, None, *vectors())
    return error.value


def test_a_python_loop_names_the_layer_that_fails():
    error = raised(wrong_shape, loop="python")
    assert "dot_general requires contracting dimensions" in str(error)
    place = "layer 2 of layer_stack 'blocks' of layer function 'wrong_shape'"
    assert [place in note for note in error.__notes__].count(True) == 1


def test_a_python_loop_names_the_layer_that_changes_the_carry():
    error = raised(narrows, loop="python")
    assert "`x` goes from float32[2, 8] to float32[2, 7]" in str(error)
    assert any("layer 1 of layer_stack" in note for note in error.__notes__)


def test_a_traced_layer_names_its_stack():
    def layer(x):
        return x @ jnp.ones([D + 1, D])

    def outside(x):
        return hk_stack.layer_stack(2, name="out")(
            lambda x: hk_stack.layer_stack(3, name="in")(layer)(x)
        )(x)

    with pytest.raises(TypeError, match="dot_general") as error:
        hk.transform(outside).apply({}, None, *vectors())
    notes = [n for n in error.value.__notes__ if n.startswith("This was in")]
    assert "layer_stack 'out/in' of layer function 'layer', tracing all 3" in notes[0]
    assert "layer_stack 'out' of layer function '<lambda>'" in notes[1]
    assert len(notes) == 2


def test_a_carry_that_changes_its_type_says_how_to_keep_it():
    def layer(x):
        return hk.Linear(D)(x).astype(jnp.bfloat16)

    with pytest.raises(TypeError, match=r"carry_dtype=jnp\.float32"):
        hk.transform(hk_stack.layer_stack(2)(layer)).init(KEY, *vectors())


def test_nothing_stays_behind_after_an_error():
    def layer(x):
        raise RuntimeError("stop")

    for loop in EXECUTORS:
        with hk_stack.use_loop(loop), pytest.raises(RuntimeError, match="stop"):
            hk.transform(hk_stack.layer_stack(2)(layer)).apply({}, None, *vectors())
        with pytest.raises(ValueError, match="outside of a layer function"):
            hk_stack.layer_index()
