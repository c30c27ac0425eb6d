"""Initial values: those of `hk.layer_stack`, without running the layers."""

import functools
import os
import pathlib
import subprocess
import sys
import textwrap

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close, assert_equal
from interpreter import computed
from layer_cases import B, D, L, layer_loop, linear, normal, vectors

import hk_stack

METHODS = ("auto", "vmap", "map", "scan")
KEY = jax.random.key(3)

INITIALIZERS = {
    "constant": hk.initializers.Constant(0.5),
    "zeros": jnp.zeros,
    "normal": hk.initializers.RandomNormal(0.2, 1.0),
    "truncated": hk.initializers.TruncatedNormal(0.2),
    "uniform": hk.initializers.RandomUniform(-1.0, 2.0),
    "fan_in": hk.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal"),
    "fan_out": hk.initializers.VarianceScaling(2.0, "fan_out", "uniform"),
    "fan_avg": hk.initializers.VarianceScaling(2.0, "fan_avg", "normal"),
    "orthogonal": hk.initializers.Orthogonal(),
    "identity": hk.initializers.Identity(),
    "upper": hk.initializers.UniformScaling(),
}


def all_initializers(x):
    for name, init in INITIALIZERS.items():
        with jax.numpy_rank_promotion("allow"):  # Haiku's Orthogonal needs it.
            w = hk.get_parameter(name, [D, D], init=init)
        x = jnp.tanh(x @ w)
    return x


def cheap_initializers(x):
    """Random parameters and state of several kinds, whose programs compile fast."""
    uniform = hk.initializers.RandomUniform()
    w = hk.get_parameter("w", [D, D], init=uniform)
    half = hk.get_parameter("half", [3], jnp.bfloat16, init=uniform)
    bits = hk.get_parameter(
        "bits", [], jnp.uint32, lambda *args: jax.random.bits(hk.next_rng_key(), *args)
    )
    moving = hk.get_state("moving", [D], init=uniform)
    hk.set_state("moving", moving + half.sum().astype(x.dtype))
    return jnp.tanh(x @ w) + moving[None] * bits.astype(x.dtype) / 2.0**32


def per_layer_initial(x, first, unused):
    """An initial value that is made of a per-layer input."""
    w = hk.get_parameter("w", [D], init=lambda *_: first * 2)
    return x * w[None], unused


def data_dependent(x):
    """Weights that normalise what the layer is given, as of weight normalisation."""
    scale = hk.get_parameter("scale", [D], init=lambda *_: 1 / (1 + jnp.std(x, 0)))
    w = hk.get_parameter("w", [D, D], init=hk.initializers.RandomNormal())
    return (x @ w) * scale[None]


def data_dependent_state(x):
    mean = hk.get_state("mean", [D], init=lambda *_: jnp.mean(x, 0))
    return x - mean[None] + hk.get_parameter("b", [D], init=jnp.ones)[None]


def model(layer, layer_stack=hk_stack.layer_stack, layers=L, **options):
    with_per_layer = layer is per_layer_initial
    stack = layer_stack(layers, with_per_layer, name="stack", **options)
    return hk.transform_with_state(stack(layer))


def initial(layer, layer_stack=hk_stack.layer_stack, *, key=KEY, jit=True, **options):
    """Parameters and state, eagerly or traced."""
    init = model(layer, layer_stack, **options).init
    given = (key, *vectors())
    if layer is per_layer_initial:
        given = (*given, normal(5, L, D), jnp.arange(L))
    if not jit:
        return init(*given)
    if layer is all_initializers:  # Made in many steps: how they compile may matter.
        return jax.jit(init)(*given)
    return computed(init, *given)


@functools.cache
def in_loop(layer):
    return initial(layer, layer_loop)


class TestBitForBit:
    def test_all_initializers(self):
        params, _ = initial(all_initializers)
        assert_equal(params, initial(all_initializers, hk.layer_stack)[0])

    def test_all_initializers_outside_of_jit(self):
        """In a process of its own, compiled as users compile: it matters in the end."""
        program = """
            import haiku as hk, hk_stack, test_initialize as here
            stacks = hk_stack.layer_stack, hk.layer_stack
            of = here.all_initializers
            here.assert_equal(*(here.initial(of, s, jit=False)[0] for s in stacks))
        """
        environment = {**os.environ, "XLA_FLAGS": ""}
        command = [sys.executable, "-c", textwrap.dedent(program)]
        here = pathlib.Path(__file__).parent
        subprocess.run(command, cwd=here, env=environment, check=True)

    @pytest.mark.parametrize(
        ("impl", "kind", "jit"),
        [
            ("threefry2x32", "typed", False),
            ("threefry2x32", "raw", True),
            ("rbg", "typed", True),
            ("rbg", "raw", False),
            ("unsafe_rbg", "typed", True),
            ("unsafe_rbg", "raw", True),
        ],
    )
    def test_all_keys(self, impl, kind, jit):
        key = jax.random.key(7, impl=impl)
        if kind == "raw":
            key = jax.random.key_data(key)
        default = (
            jax.default_prng_impl(impl) if kind == "raw" else jax.debug_nans(False)
        )
        with default:
            params, state = initial(cheap_initializers, key=key, jit=jit)
            haiku, _ = initial(cheap_initializers, hk.layer_stack, key=key)
            loop = initial(cheap_initializers, layer_loop, key=key)
        assert_equal(params, haiku)
        assert_equal((params, state), loop)

    @pytest.mark.parametrize("method", METHODS)
    def test_all_methods(self, method):
        assert_equal(
            initial(cheap_initializers, init=method), in_loop(cheap_initializers)
        )

    def test_other_depths(self):
        for layers in (1, 2, 7):
            params, _ = initial(cheap_initializers, layers=layers)
            expected, _ = initial(cheap_initializers, hk.layer_stack, layers=layers)
            assert_equal(params, expected)

    def test_layers_too_large_for_one_batch(self):
        def large(x):
            init = hk.initializers.RandomUniform()
            return x + hk.get_parameter("w", [2**20], init=init)[:D][None]

        assert_equal(
            initial(large, layers=6)[0], initial(large, hk.layer_stack, layers=6)[0]
        )

    def test_vmapped_over_keys(self):
        def ensemble(layer_stack):
            init = model(cheap_initializers, layer_stack).init
            keys = jax.random.split(KEY, 2)
            return computed(jax.vmap(init, (0, None)), keys, *vectors())[0]

        assert_equal(ensemble(hk_stack.layer_stack), ensemble(hk.layer_stack))

    def test_types_and_weak_types(self):
        def weak(x):
            return x * hk.get_parameter("s", [], init=lambda *_: jnp.asarray(1.0))

        def types(layer, layer_stack):
            init = model(layer, layer_stack).init
            params, _ = jax.eval_shape(init, KEY, *vectors())
            return jax.tree.map(lambda s: (s.shape, s.dtype, s.weak_type), params)

        for layer in (all_initializers, cheap_initializers, weak):
            assert types(layer, hk_stack.layer_stack) == types(layer, hk.layer_stack)


class TestDataDependent:
    @pytest.mark.parametrize("layer", [data_dependent, data_dependent_state])
    @pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
    def test_falls_back(self, layer, jit):
        params, state = initial(layer, jit=jit)
        assert_close(params, initial(layer, hk.layer_stack)[0])
        assert_close((params, state), in_loop(layer))
        leaf = jax.tree.leaves((params, state))[0 if layer is data_dependent else -1]
        assert not np.allclose(leaf[0], leaf[1])  # or the test would show nothing

    @pytest.mark.parametrize("method", ["vmap", "map"])
    @pytest.mark.parametrize(
        ("layer", "name"),
        [(data_dependent, "parameter ~/scale"), (data_dependent_state, "state ~/mean")],
    )
    def test_cannot_be_forced(self, layer, name, method):
        with pytest.raises(ValueError) as error:
            initial(layer, init=method)
        message = str(error.value)
        for text in (
            "'stack'",
            layer.__name__,
            name,
            f'init="{method}"',
            'init="scan"',
        ):
            assert text in message
        assert "~/w" not in message and "~/b" not in message

    def test_scan_may_be_forced(self):
        assert_close(initial(data_dependent, init="scan"), in_loop(data_dependent))

    def test_shapes_are_no_data(self):
        def layer(x):
            w = hk.get_parameter("w", [D], init=lambda *_: jnp.zeros_like(x[0]))
            return x + w[None]

        assert_equal(initial(layer, init="vmap"), in_loop(layer))

    def test_other_results_of_a_call_do_not_matter(self):
        def layer(x):
            @jax.jit
            def statistics(x, y):
                return jnp.mean(x, 0), jnp.exp(y)

            mean, three = statistics(x, jnp.float32(1.0))
            w = hk.get_parameter("w", [], init=lambda *_: three)
            return (x - mean[None]) * w

        assert_close(initial(layer, init="vmap"), in_loop(layer))

    def test_through_a_branch_is_data_dependence_too(self):
        def layer(x):
            positive = jax.lax.cond(x.sum() > 0, lambda: 1.0, lambda: -1.0)
            sign = hk.get_parameter("sign", [], init=lambda *_: positive)
            return -x * sign

        assert_close(initial(layer), in_loop(layer))
        with pytest.raises(ValueError, match="sign"):
            initial(layer, init="vmap")


class TestWhatRuns:
    def programs(self, layer, layer_stack, **options):
        init = model(layer, layer_stack, **options).init
        jaxpr = jax.make_jaxpr(init)(KEY, *vectors()).jaxpr
        return [
            n
            for e in jaxprs.needed(jaxpr)
            for n in (
                e.primitive.name,
                *(m for b in jaxprs.bodies(e) for m in jaxprs.names(b)),
            )
        ]

    @pytest.mark.parametrize("init", ["auto", "vmap", "map"])
    def test_no_forward_passes(self, init):
        def layer(x):
            return jnp.sin(linear(x))

        found = self.programs(layer, hk_stack.layer_stack, init=init)
        assert "random_bits" in found
        assert "dot_general" not in found and "sin" not in found
        assert not {"checkpoint", "remat2"} & set(found)
        # Those of Haiku do: or this test would show nothing.
        assert "dot_general" in self.programs(layer, hk.layer_stack)

    def test_program_does_not_grow_with_depth(self):
        few, many = (
            self.programs(linear, hk_stack.layer_stack, layers=n) for n in (4, 64)
        )
        assert few == many

    def test_layers_are_traced_a_constant_number_of_times(self):
        calls = []

        def layer(x):
            calls.append(x)
            return linear(x)

        counts = []
        for layers in (2, 9):
            calls.clear()
            initial(layer, layers=layers)
            counts.append(len(calls))
        assert counts[0] == counts[1] <= 3


class TestContext:
    def test_values_of_per_layer_inputs(self):
        params, state = initial(per_layer_initial)
        assert_equal((params, state), initial(per_layer_initial, hk.layer_stack))
        assert_close(params["stack/~"]["w"], 2 * normal(5, L, D))

    def test_without_keys(self):
        def constants(x):
            return x * hk.get_parameter("w", [D], init=jnp.ones)[None]

        for jit in (True, False):
            ours = initial(constants, key=None, jit=jit)
            assert_equal(ours, initial(constants, hk.layer_stack, key=None, jit=jit))

        def model(x):
            hk.maybe_next_rng_key()
            return hk_stack.layer_stack(2)(constants)(x)

        params = hk.transform(model).init(None, *vectors())
        assert jax.tree.leaves(params)[0].shape == (2, D)

    def test_random_initializers_without_keys_are_an_error(self):
        with pytest.raises(ValueError, match="PRNGKey"):
            initial(linear, key=None)

    @pytest.mark.parametrize("init", METHODS)
    def test_creators_and_getters_around_the_stack(self, init):
        seen = []

        def create(next_creator, shape, dtype, init, context):
            seen.append((context.full_name, tuple(shape)))
            return next_creator(shape, dtype, init) * 2

        def get(next_getter, value, context):
            del context
            return next_getter(value) + 1

        def run(layer_stack, **options):
            def model(x):
                stack = layer_stack(L, name="stack", **options)
                with hk.custom_creator(create), hk.custom_getter(get):
                    return stack(cheap_initializers)(x)

            transformed = hk.transform_with_state(model)
            params, _ = computed(transformed.init, KEY, *vectors())
            state = in_loop(cheap_initializers)[1]
            out = computed(transformed.apply, params, state, KEY, *vectors())
            return params, out

        params, out = run(hk_stack.layer_stack, init=init)
        names = set(seen)
        seen.clear()
        expected_params, expected = run(hk.layer_stack)
        assert_equal(params, expected_params)
        assert_close(out, expected)
        assert names == set(seen)

    def test_keys_of_the_model_around_go_on_alike(self):
        def run(layer_stack):
            def model(x):
                before = hk.next_rng_key()
                x = layer_stack(2)(cheap_initializers)(x)
                x = layer_stack(2, name="second")(cheap_initializers)(x)
                keys = jnp.stack([before, hk.next_rng_key()])
                hk.get_parameter("b", [3], init=hk.initializers.RandomUniform())
                return x, jax.random.key_data(keys)

            transformed = hk.transform_with_state(model)
            params, _ = computed(transformed.init, KEY, *vectors())
            return params, transformed

        (params, ours), (expected, theirs) = map(
            run, (hk_stack.layer_stack, hk.layer_stack)
        )
        assert_equal(params, expected)
        state = computed(ours.init, KEY, *vectors())[1]
        keys, expected_keys = (
            computed(t.apply, params, state, KEY, *vectors())[0][1]
            for t in (ours, theirs)
        )
        assert_equal(keys, expected_keys)

    def test_of_a_nested_stack(self):
        def nested(layer_stack):
            def layer(x):
                return layer_stack(2, name="inner")(cheap_initializers)(x)

            return layer_stack(L, name="stack")(layer)

        ours, theirs, loop = (
            computed(hk.transform_with_state(nested(stack)).init, KEY, *vectors())
            for stack in (hk_stack.layer_stack, hk.layer_stack, layer_loop)
        )
        assert_equal(ours[0], theirs[0])
        assert_equal(ours, loop)
        leaf = ours[0]["stack/inner/~"]["w"]
        assert leaf.shape == (L, 2, D, D)
        assert len(np.unique(np.asarray(leaf))) > 0.99 * leaf.size

    def test_of_a_nested_data_dependent_stack(self):
        def nested(layer_stack):
            def layer(x):
                return layer_stack(2, name="inner")(data_dependent)(x)

            return layer_stack(L, name="stack")(layer)

        ours, loop = (
            computed(hk.transform_with_state(nested(stack)).init, KEY, *vectors())
            for stack in (hk_stack.layer_stack, layer_loop)
        )
        assert_close(ours, loop)

    def test_state_is_that_before_any_call(self):
        def layer(x):
            count = hk.get_state("count", [], jnp.int32, init=jnp.zeros)
            hk.set_state("count", count + 1)
            hk.set_state("last", x.sum())
            return x

        _, state = initial(layer)
        assert_equal(state["stack/~"]["count"], jnp.zeros([L], jnp.int32))
        _, after = model(layer).apply({}, state, None, *vectors())
        assert_equal(after["stack/~"]["count"], jnp.ones([L], jnp.int32))
        assert after["stack/~"]["last"].shape == (L,)

    def test_shapes_only(self):
        params, _ = jax.eval_shape(model(linear).init, KEY, *vectors())
        assert params["stack/linear"]["w"].shape == (L, D, D)
        summary = hk.experimental.tabulate(model(linear))(*vectors())
        assert "linear" in summary
        assert vectors()[0].shape[0] == B


def test_initialiser_that_calls_back_runs_layer_after_layer():
    """A callback does not say how to run batched."""

    def init(shape, dtype):
        drawn = jax.random.normal(hk.next_rng_key(), shape, dtype)
        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.pure_callback(lambda w: np.sort(w, axis=0), result, drawn)

    def layer(x):
        return x @ hk.get_parameter("w", [8, 8], init=init)

    def run(layer_stack):
        model = hk.transform(lambda x: layer_stack(3)(layer)(x))
        return model.init(jax.random.key(0), jnp.ones([2, 8]))

    found, expected = run(hk_stack.layer_stack), run(hk.layer_stack)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class TestCompiled:
    """Inside `jit`, where Haiku's forward passes are dropped, nothing is to be lost."""

    def layer(self, x):
        for i in range(6):
            init = hk.initializers.TruncatedNormal(0.1 + i)
            x = x + jnp.sum(hk.get_parameter(f"w{i}", [3 + i, 5 + i], init=init))
        return x + hk.get_parameter("b", [2], init=jnp.zeros)

    def compiled(self, layer_stack, num_layers):
        model = hk.transform(layer_stack(num_layers)(self.layer))
        return jax.jit(model.init).lower(KEY, jnp.ones(2)).compile()

    @pytest.mark.parametrize("num_layers", [3, 1000])
    def test_is_no_larger_than_that_of_haiku(self, num_layers):
        ours, theirs = (
            self.compiled(stack, num_layers)
            for stack in (hk_stack.layer_stack, hk.layer_stack)
        )
        sizes = [len(program.as_text()) for program in (ours, theirs)]
        assert sizes[0] <= 1.2 * sizes[1]
        temps = [p.memory_analysis().temp_size_in_bytes for p in (ours, theirs)]
        assert temps[0] <= 2 * temps[1]
        assert_equal(ours(KEY, jnp.ones(2)), theirs(KEY, jnp.ones(2)))
