"""The S4 mathematics against slow and exact twins, and the hand-written stacks."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from run_example import compiling_fast

import hk_stack
from hk_stack.compare import in_haiku, in_plain, models, s4


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """Each program runs once or twice."""
    with compiling_fast():
        yield


def make_system(features, state_size):
    keys = jax.random.split(jax.random.key(features), 7)
    table = s4.parameters(features, state_size)
    return s4.dplr(
        {
            name: init(key, shape, jnp.float32)
            for key, (name, (shape, init)) in zip(keys, table.items(), strict=True)
        }
    )


def exact_kernel(system, length):
    """Re(C Abar^t Bbar) for t < T, `[H, T]`, by matrix powers in double precision."""
    kernels = []
    for h in range(len(system.step)):
        eigenvalues, p, b, c, step = (np.asarray(x[h], np.complex128) for x in system)
        identity = np.eye(len(b))
        a = np.diag(eigenvalues) - np.outer(p, p.conj())
        backward = np.linalg.inv(identity - step / 2 * a)
        a_bar = backward @ (identity + step / 2 * a)
        c_bar = c @ np.linalg.inv(identity - np.linalg.matrix_power(a_bar, length))
        x, samples = backward @ (step * b), []
        for _ in range(length):
            samples.append((c_bar @ x).real)
            x = a_bar @ x
        kernels.append(samples)
    return np.asarray(kernels)


def relative_error(value, reference):
    return np.max(np.abs(value - reference)) / np.max(np.abs(reference))


MODEL = models.s4_model(8)


def make_stack(layer_stack, model=MODEL):
    run = functools.partial(
        in_haiku.layers, model=model, layer_stack=layer_stack, num_layers=3
    )
    return hk.without_apply_rng(hk.transform(run))


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, 32, 4))


@pytest.fixture(scope="module")
def params(x):
    return jax.jit(make_stack(hk_stack.layer_stack).init)(jax.random.key(0), x)


@pytest.fixture(scope="module")
def value_and_grad():
    """Jitted (params, x) -> (loss, output), gradients of a stack's apply."""

    def make(apply):
        def loss(params, x):
            y = apply(params, x)
            return jnp.mean(y**2), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return make


@pytest.fixture(scope="module")
def expected(value_and_grad, params, x):
    return value_and_grad(make_stack(hk_stack.layer_stack).apply)(params, x)


def assert_same(value, reference, tolerance):
    (_, y), gradients = value
    (_, y_reference), gradients_reference = reference
    assert relative_error(y, y_reference) < tolerance
    errors = jax.tree.map(relative_error, gradients, gradients_reference)
    assert max(jax.tree.leaves(errors)) < tolerance


def test_hippo_is_legs_in_another_basis():
    eigenvalues, p, b = s4.hippo(8)
    n = np.arange(8)
    legs = -np.tril(np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1) - np.diag(n + 1)
    dplr = np.diag(eigenvalues) - np.outer(p, p.conj())
    np.testing.assert_allclose(
        np.sort(np.linalg.eigvals(dplr).real), np.sort(np.diag(legs)), rtol=1e-4
    )
    # c^T A^k b is the same in every basis; here with c = b.
    b_legs = np.sqrt(2 * n + 1)
    for k in range(4):
        np.testing.assert_allclose(
            b.conj() @ np.linalg.matrix_power(dplr, k) @ b,
            b_legs @ np.linalg.matrix_power(legs, k) @ b_legs,
            rtol=1e-10,
        )


@pytest.mark.parametrize(
    ("features", "state_size", "length"), [(3, 8, 33), (2, 32, 512)]
)
def test_kernel_is_the_impulse_response(features, state_size, length):
    """And convolution with it is the recurrence."""
    system = make_system(features, state_size)
    u = jax.random.normal(jax.random.key(1), (2, length, features))

    @jax.jit
    def run(system, u):
        kernel = s4.kernel(system, length)
        convolved = s4.convolve(u, kernel)
        recurrence = s4.discretise(system, length)
        state = jnp.zeros((2, features, state_size), jnp.complex64)
        step = functools.partial(s4.step, recurrence)
        recurred = jax.lax.scan(step, state, jnp.swapaxes(u, 0, 1))[1]
        recurred = jnp.swapaxes(recurred, 0, 1)
        return kernel, s4.kernel_term_by_term(system, length), convolved, recurred

    kernel, published, convolved, recurred = run(system, u)
    assert kernel.shape == (features, length)
    assert kernel.dtype == jnp.float32
    assert relative_error(kernel, exact_kernel(system, length)) < 1e-4
    assert relative_error(published, exact_kernel(system, length)) < 1e-4
    assert convolved.shape == recurred.shape == u.shape
    assert relative_error(convolved, recurred) < 1e-3


def test_convolution_is_causal():
    convolve = jax.jit(s4.convolve)
    kernel = jax.random.normal(jax.random.key(0), (3, 16))
    u = jax.random.normal(jax.random.key(1), (2, 16, 3))
    now, later = convolve(u, kernel), convolve(u.at[:, 9:].set(7.0), kernel)
    np.testing.assert_allclose(later[:, :9], now[:, :9], atol=1e-5)
    expected = [np.convolve(u[0, :, h], kernel[h])[:16] for h in range(3)]
    np.testing.assert_allclose(now[0].T, expected, atol=1e-5)


def test_gradients_are_finite_and_reach_every_parameter(expected):
    for leaf in jax.tree.leaves(expected):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf)


PLAIN = MODEL._replace(width=4)


def test_plain_twin_equals_the_haiku_stack(value_and_grad, params, x, expected):
    scan = functools.partial(in_plain.scan, PLAIN)
    assert_same(value_and_grad(scan)(params, x), expected, 1e-4)


def test_plain_derived_values_can_be_reused(params, x):
    setup, call, split = (
        jax.jit(functools.partial(fn, PLAIN), **static)
        for fn, static in (
            (in_plain.setup, {"static_argnums": 1}),
            (in_plain.call, {}),
            (in_plain.split, {}),
        )
    )
    derived = setup(params, 32)
    assert derived["s4"]["spectrum"].shape == (3, 4, 33)
    for u in (x, 2 * x):
        y = call((derived, params), u)
        np.testing.assert_allclose(y, split(params, u), atol=1e-5)


def test_loop_equals_stack(params, x, expected):
    loop = make_stack(in_haiku.layer_loop)
    unstacked = {
        name.replace("layers", f"layers_{i}"): {k: v[i] for k, v in leaves.items()}
        for i in range(3)
        for name, leaves in params.items()
    }
    shapes = jax.eval_shape(loop.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, unstacked) == jax.tree.map(jnp.shape, shapes)
    y = jax.jit(loop.apply)(unstacked, x)
    np.testing.assert_allclose(y, expected[0][1], atol=1e-5)


STATES = 13  # No other dimension: what has it is the kernel's computation.


def layer_loop_of(setup, shape, layers):
    """The body of the loop over layers in the apply of an S4 stack."""
    model = hk.transform(
        lambda x: in_haiku.layers(
            x,
            model=models.s4_model(STATES),
            layer_stack=hk_stack.layer_stack,
            num_layers=layers,
            setup=setup,
        )
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key, x)
    jaxpr = jax.make_jaxpr(model.apply)(params, key, x).jaxpr
    return list(jaxprs.equations(jaxprs.body(jaxpr, layers)))


@pytest.mark.parametrize("shape", [(2, 16, 8), (4, 512, 64)])
@pytest.mark.parametrize("setup", ["auto", "inline"])
def test_kernel_is_computed_outside_of_the_loop_only_if_hoisted(setup, shape):
    body = layer_loop_of(setup, shape, layers=3)
    ffts = [e for e in body if e.primitive.name == "fft"]
    of_states = [e for e in body if any(STATES in v.aval.shape for v in e.outvars)]
    if setup == "auto":
        assert not of_states
        assert all(e.invars[0].aval.shape[0] == shape[0] for e in ffts)  # of batches
        assert len(ffts) == 2
    else:
        assert {"dot_general", "div", "exp"} <= {e.primitive.name for e in body}
        assert of_states
        assert len(ffts) == 4


# Decoding: one step of time after another, on the parameters of the convolution


SOLVES = {"lu", "triangular_solve"}  # What discretising is recognised by.
LAYER_STACKS = {"hk_stack": hk_stack.layer_stack, "haiku": hk.layer_stack}


def make_step(layer_stack=hk_stack.layer_stack, length=32):
    run = functools.partial(
        in_haiku.layers,
        model=MODEL,
        layer_stack=layer_stack,
        num_layers=3,
        length=length,
    )
    return hk.without_apply_rng(hk.transform(run))


def over_time(step):
    """`step` run over a sequence: (params, x, states) -> y, sequences `[B, T, ...]`."""

    def run(params, x, states):
        def now(states, x):
            y, states = step(params, x, states)
            return states, y

        _, y = jax.lax.scan(now, states, jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(y, 0, 1)

    return run


def inside_time_loop(run, *args):
    """The names of the primitives in the loop over time."""
    (loop,) = (
        eqn
        for eqn in jaxprs.equations(jax.make_jaxpr(run)(*args).jaxpr)
        if eqn.primitive.name == "scan" and eqn.params["length"] == args[1].shape[1]
    )
    return set(jaxprs.names(loop.params["jaxpr"].jaxpr))


@pytest.fixture(scope="module")
def states():
    return jnp.zeros((3, 2, 4, 8), jnp.complex64)


@pytest.mark.parametrize("layer_stack", LAYER_STACKS)
def test_steps_equal_the_convolution(layer_stack, params, x, states, expected):
    step = make_step(LAYER_STACKS[layer_stack])
    shapes = jax.eval_shape(step.init, jax.random.key(0), x[:, 0], states)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    y = jax.jit(over_time(step.apply))(params, x, states)
    assert relative_error(y, expected[0][1]) < 1e-3


def test_states_go_on_where_they_stopped(params, x, states, expected):
    step = jax.jit(make_step().apply)
    for t in range(3):
        assert states.shape == (3, 2, 4, 8)
        y, states = step(params, x[:, t], states)
    assert relative_error(y, expected[0][1][:, 2]) < 1e-3


@pytest.mark.parametrize("cut", ["step", "loop over time"])
def test_partition_takes_the_setup_out_of_the_loop_over_time(
    cut, params, x, states, expected
):
    step = make_step().apply
    if cut == "step":
        split = hk_stack.partition(step, params, x[:, 0], states)
        run = over_time(split.call)
    else:
        split = hk_stack.partition(over_time(step), params, x, states)
        run = split.call
    derived = jax.jit(split.setup)(params)
    assert relative_error(jax.jit(run)(derived, x, states), expected[0][1]) < 1e-3
    assert not inside_time_loop(run, derived, x, states) & SOLVES
    assert inside_time_loop(over_time(step), params, x, states) >= SOLVES


# Decoding in Flax Linen


def test_linen_decodes_as_haiku_does(params, x, states, expected):
    in_linen = pytest.importorskip("hk_stack.compare.in_linen")
    stack = functools.partial(in_linen.Block, MODEL)
    like = jax.eval_shape(in_linen.ScanStack(stack, 3).init, jax.random.key(0), x)
    variables = hk_stack.haiku_to_flax((params, {}), like)
    for is_primed, solves in ((False, SOLVES), (True, set())):
        block = functools.partial(stack, length=32, is_primed=is_primed)
        model = in_linen.ScanStack(block, 3)
        cache = dict(in_linen.prime(model, variables["params"], x[:, 0]))
        assert not np.any(jax.tree.leaves(cache["cache"])[0])
        primed = {**variables, "prime": cache.pop("prime", {})}
        assert bool(primed["prime"]) == is_primed

        def step(variables, x, cache, model=model):
            return model.apply({**variables, **cache}, x, mutable=["cache"])

        run = over_time(step)
        assert inside_time_loop(run, primed, x, cache) & SOLVES == solves
        y = jax.jit(run)(primed, x, cache)
        assert relative_error(y, expected[0][1]) < 1e-3
