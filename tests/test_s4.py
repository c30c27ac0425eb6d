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
from hk_stack.compare import in_haiku, in_plain, s4


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


def make_stack(layer_stack, **options):
    def run(x):
        return in_haiku.s4_stack(
            x, layer_stack=layer_stack, num_layers=3, state_size=8, **options
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
        recurred = s4.recur(u, s4.discretise(system, length))
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


def test_modes_of_the_stack_agree(value_and_grad, params, x, expected):
    recurrence = make_stack(hk_stack.layer_stack, mode="recurrence")
    assert_same(value_and_grad(recurrence.apply)(params, x), expected, 1e-3)


def test_plain_twin_equals_the_haiku_stack(value_and_grad, params, x, expected):
    assert_same(value_and_grad(in_plain.scan_inside)(params, x), expected, 1e-4)


def test_plain_derived_values_can_be_reused(params, x):
    derived = jax.jit(in_plain.setup, static_argnums=1)(params, 32)
    assert derived.shape == (3, 4, 33)
    call, setup_first = jax.jit(in_plain.call), jax.jit(in_plain.setup_first)
    for u in (x, 2 * x):
        y = call(derived, params, u)
        np.testing.assert_allclose(y, setup_first(params, u), atol=1e-5)


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
        lambda x: in_haiku.s4_stack(
            x,
            layer_stack=hk_stack.layer_stack,
            num_layers=layers,
            state_size=STATES,
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
    def run(x, states):
        return in_haiku.s4_stack_step(
            x,
            states,
            layer_stack=layer_stack,
            num_layers=3,
            state_size=8,
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
    return in_haiku.s4_states(3, 2, 4, 8)


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


TOKENS, KINDS = (2, 16), 5


def linen_next_token(in_linen, **decoding):
    block = functools.partial(in_linen.S4Block, state_size=8, **decoding)
    return in_linen.NextToken(in_linen.ScanStack(block, 3), 4, KINDS)


def haiku_next_token(tokens, states=None):
    """Logits; with `states`, of one step."""
    options = dict(layer_stack=hk_stack.layer_stack, num_layers=3, state_size=8)
    sizes = dict(width=4, num_tokens=KINDS)
    if states is None:
        layers = functools.partial(in_haiku.s4_stack, **options)
        return in_haiku.next_token(tokens, layers, **sizes)
    layers = functools.partial(in_haiku.s4_stack_step, length=TOKENS[1], **options)
    return in_haiku.next_token_step(tokens, states, layers, **sizes)


def linen_step(model):
    def step(variables, tokens, cache):
        variables = {**variables, **cache}
        logits, cache = model.apply(variables, tokens[:, None], mutable=["cache"])
        return logits[:, 0], cache

    return step


def test_linen_decodes_as_haiku_does(states):
    in_linen = pytest.importorskip("hk_stack.compare.in_linen")
    tokens = jax.random.randint(jax.random.key(0), TOKENS, 0, KINDS)
    tokens = tokens.at[:, 0].set(KINDS)  # the start
    init = jax.jit(linen_next_token(in_linen).init)
    variables = init(jax.random.key(1), tokens)
    haiku = hk.without_apply_rng(hk.transform(haiku_next_token))
    like = jax.eval_shape(haiku.init, jax.random.key(0), tokens)
    params, _ = hk_stack.flax_to_haiku(variables, (like, {}))
    steps = jax.jit(over_time(haiku.apply))(params, tokens, states)
    assert relative_error(steps, jax.jit(haiku.apply)(params, tokens)) < 1e-3
    for mode, expected in (("step", SOLVES), ("primed step", set())):
        model = linen_next_token(in_linen, mode=mode, length=TOKENS[1])
        cache = dict(in_linen.prime(model, variables["params"], tokens[:, :1]))
        assert not np.any(jax.tree.leaves(cache["cache"])[0])
        primed = {**variables, "prime": cache.pop("prime", {})}
        run = over_time(linen_step(model))
        assert inside_time_loop(run, primed, tokens, cache) & SOLVES == expected
        logits = jax.jit(run)(primed, tokens, cache)
        assert logits.shape == (*TOKENS, KINDS)
        assert relative_error(logits, steps) < 1e-4


@pytest.mark.parametrize("decoding", [{"length": None}, {"length": 16}])
def test_linen_decodes_one_step_of_a_known_length(decoding):
    in_linen = pytest.importorskip("hk_stack.compare.in_linen")
    steps = 1 if decoding["length"] is None else 2
    model = linen_next_token(in_linen, mode="step", **decoding)
    with pytest.raises(ValueError, match=r"needs field length and input \[B, 1, D\]"):
        model.init(jax.random.key(0), jnp.zeros((2, steps), jnp.int32))
