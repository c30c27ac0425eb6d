"""What leaves the loop, what stays in it, and that results do not depend on it."""

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close
from interpreter import computed
from jax.experimental import io_callback
from layer_cases import B, D, L, drop, layer_loop, normal, slow, vectors, weight

import hk_stack

KEY = jax.random.key(1)


def trace(layer, *args, layers=L, with_per_layer=False, **options):
    """The jaxpr of a stack's apply; its loop is the only one of length `layers`."""
    stack = hk_stack.layer_stack(layers, with_per_layer, **options)
    model = hk.transform_with_state(stack(layer))
    args = args or vectors()
    params, state = jax.eval_shape(model.init, KEY, *args)
    return jax.make_jaxpr(model.apply)(params, state, KEY, *args).jaxpr


def cut(layer, *args, **options):
    """The primitives outside and inside of the loop."""
    jaxpr = trace(layer, *args, **options)
    return jaxprs.outside(jaxpr, L), jaxprs.names(jaxprs.body(jaxpr, L))


def per_layer_shapes(jaxpr):
    """Shapes of what the loop reads for each layer, without the layer axis."""
    shapes = [v.aval.shape for v in jaxprs.loop(jaxpr, L).invars]
    return [shape[1:] for shape in shapes if shape[:1] == (L,)]


def assert_same_results(layer, *args, run=computed):
    """Between all policies and the loop."""
    args = args or vectors()
    loop = hk.transform_with_state(layer_loop(L)(layer))
    given = (*run(loop.init, KEY, *args), KEY, *args)
    expected = run(loop.apply, *given)
    for setup in ("auto", "marked", "inline"):
        stack = hk_stack.layer_stack(L, setup=setup, name="__layer_stack_no_per_layer")
        apply = hk.transform_with_state(stack(layer)).apply
        assert_close(run(apply, *given), expected)


class TestHoist:
    def test_is_the_identity_outside_of_a_stack(self):
        tree = {"a": normal(0, 2), "b": (jnp.arange(3), jnp.bool_(True))}
        assert_close(hk_stack.hoist(tree), tree)
        assert_close(jax.jit(hk_stack.hoist)(tree), tree)
        gradient = jax.grad(lambda x: jnp.sum(hk_stack.hoist(x) ** 2))(tree["a"])
        assert_close(gradient, 2 * tree["a"])
        assert_close(jax.vmap(hk_stack.hoist)(tree["a"]), tree["a"])
        model = hk.transform(lambda x: x @ hk_stack.hoist(weight()))
        params = model.init(KEY, *vectors())
        assert model.apply(params, None, *vectors()).shape == (B, D)

    def test_on_a_value_that_depends_on_nothing(self):
        def layer(x):
            return x + hk_stack.hoist(jnp.cumsum(jnp.full([D], 2.0)))[None]

        outside, inside = cut(layer)
        assert "cumsum" in outside and "cumsum" not in inside

    def test_takes_python_numbers_and_numpy_arrays(self):
        def layer(x):
            return x * hk_stack.hoist(2.0) + hk_stack.hoist(np.ones([B, D], np.float32))

        assert_same_results(layer)

    def test_marked_policy_hoists_only_what_is_marked(self):
        def layer(x):
            w = weight()
            return jnp.tanh(x @ hk_stack.hoist(jnp.fft.fft(w).real)) + slow(w)[0][None]

        outside, inside = cut(layer, setup="marked")
        assert "fft" in outside and "fft" not in inside
        assert "cumsum" in inside and "cumsum" not in outside

    def test_auto_hoists_marked_values_too(self):
        def layer(x):
            return x @ hk_stack.hoist(jnp.exp(weight()))

        outside, inside = cut(layer)
        assert "exp" in outside and "exp" not in inside

    def test_inline_policy_hoists_nothing(self):
        def layer(x):
            return x @ hk_stack.hoist(slow(weight()))

        outside, inside = cut(layer, setup="inline")
        assert "cumsum" in inside and "cumsum" not in outside
        assert "exp" not in outside

    def test_inline_policy_does_not_mind_a_wrong_mark(self):
        cut(lambda x: hk_stack.hoist(x), setup="inline")

    def test_reaches_into_jit_and_remat(self):
        def layer(x):
            w = weight()

            @jax.checkpoint
            def inner(w, x):
                return jax.jit(lambda w, x: x @ hk_stack.hoist(jnp.exp(w)))(w, x)

            return inner(w, x)

        for setup in ("auto", "marked"):
            outside, inside = cut(layer, setup=setup)
            assert "exp" in outside and "exp" not in inside

    def test_works_within_vmap_and_grad_inside_the_layer(self):
        def layer(x):
            w = weight()

            def energy(x):
                return jnp.sum(jnp.sin(x @ hk_stack.hoist(slow(w))))

            return x - jax.vmap(jax.grad(energy))(x)

        assert_same_results(layer)
        outside, inside = cut(layer, setup="marked")
        assert "cumsum" in outside and "cumsum" not in inside

    def test_reaches_into_what_a_solver_runs(self):
        def layer(x):
            w = hk.get_parameter("w", [D, D], init=hk.initializers.RandomNormal(0.3))

            def matvec(v):
                return hk_stack.hoist(w @ w.T + jnp.eye(D)) @ v

            solved, _ = jax.scipy.sparse.linalg.cg(matvec, w[0], maxiter=3)
            return x + jnp.broadcast_to(solved, x.shape)

        assert_same_results(layer, normal(0, D))
        assert "custom_linear_solve" not in jaxprs.names(
            jaxprs.body(trace(layer, normal(0, D)), L)
        )

    def test_may_depend_on_arrays_closed_over(self):
        def model(x, table):
            def layer(x):
                return x @ hk_stack.hoist(slow(weight() + table))

            return hk_stack.layer_stack(L)(layer)(x)

        transformed = hk.transform(model)
        args = (*vectors(), normal(3, D, D))
        params = transformed.init(KEY, *args)
        jaxpr = jax.make_jaxpr(transformed.apply)(params, None, *args).jaxpr
        assert "cumsum" not in jaxprs.names(jaxprs.body(jaxpr, L))

    def test_in_an_inner_stack_may_depend_on_what_the_outer_layer_was_given(self):
        def layer(x):
            def inner(y):
                return jnp.tanh(y @ (weight() * hk_stack.hoist(jnp.exp(x.mean()))))

            return hk_stack.layer_stack(2)(inner)(x)

        assert_same_results(layer)

    def test_on_a_random_constant(self):
        def layer(x):
            return x * hk_stack.hoist(jax.random.normal(jax.random.key(0), x.shape))

        assert_same_results(layer)
        _, inside = cut(layer)
        assert "random_bits" not in inside


class TestWrongHoist:
    def message(self, layer, *args, **options):
        with pytest.raises(ValueError, match=r"hk_stack\.hoist") as error:
            trace(layer, *args, **options)
        assert "'layer'" in str(error.value)
        assert "layer_stack" in str(error.value)
        return str(error.value)

    def test_names_the_argument(self):
        def layer(x, pair):
            return x, (pair[0], hk_stack.hoist(pair[1] + weight()[0]))

        args = (*vectors(), (jnp.ones([D]), jnp.ones([D])))
        message = self.message(layer, *args)
        assert "argument `pair" in message
        assert "argument `x" not in message
        assert "float32[8]" in message or "f32[8]" in message

    def test_names_the_random_key(self):
        def layer(x):
            return x * hk_stack.hoist(jax.random.normal(hk.next_rng_key(), x.shape))

        assert "a random key" in self.message(layer)

    def test_names_the_state(self):
        def layer(x):
            count = hk.get_state("count", [], init=jnp.zeros)
            hk.set_state("count", count + 1)
            return x * hk_stack.hoist(count)

        assert "state ~/count" in self.message(layer)

    def test_names_the_per_layer_input(self):
        def layer(x, scales):
            return x * hk_stack.hoist(scales["a"]), None

        scales = {"a": jnp.ones([L]), "b": jnp.ones([L])}
        message = self.message(layer, *vectors(), scales, with_per_layer=True)
        assert "per-layer input `scales" in message
        assert "a" in message

    def test_names_all_at_once(self):
        def layer(x, scale):
            noise = jax.random.normal(hk.next_rng_key(), [])
            return hk_stack.hoist(x * scale * noise), None

        args = (*vectors(), jnp.ones([L]))
        message = self.message(layer, *args, with_per_layer=True)
        for word in ("argument `x", "per-layer input `scale", "a random key"):
            assert word in message

    def test_names_a_callback(self):
        def layer(x):
            shape = jax.ShapeDtypeStruct([], jnp.float32)
            found = jax.pure_callback(lambda: np.float32(1), shape)
            return x * hk_stack.hoist(found)

        assert "callback" in self.message(layer)

    @pytest.mark.parametrize("setup", ["auto", "marked"])
    def test_is_an_error_inside_jit_and_remat(self, setup):
        def layer(x):
            return jax.checkpoint(jax.jit(lambda x: hk_stack.hoist(jnp.sin(x))))(x)

        assert "argument `x" in self.message(layer, setup=setup)

    @pytest.mark.parametrize(
        "where", ["scan", "cond", "known cond", "while", "custom_jvp", "vmap"]
    )
    def test_is_an_error_inside_other_calls(self, where):
        @jax.custom_jvp
        def custom(x):
            return hk_stack.hoist(jnp.sin(x))

        custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0]))

        def layer(x):
            def step(x):
                return hk_stack.hoist(jnp.sin(x))

            if where == "scan":
                return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=2)[0]
            if where == "cond":
                return jax.lax.cond(x.sum() > 0, step, lambda x: x, x)
            if where == "known cond":
                return jax.lax.cond(weight().sum() > 0, step, lambda x: x, x)
            if where == "while":
                return jax.lax.while_loop(lambda x: x.sum() > 0, step, x)
            return custom(x) if where == "custom_jvp" else jax.vmap(step)(x)

        message = self.message(layer)
        expected = {
            "scan": ("inside a scan", "the carry of a scan"),
            "while": ("inside a while", "the carry of a while"),
            "cond": ("inside a cond", "argument `x"),
            "known cond": ("inside a cond", "argument `x"),
            "custom_jvp": ("called inside a custom_jvp_call", "argument `x"),
            "vmap": ("argument `x",),
        }
        assert all(text in message for text in expected[where]), message
        assert "random key" not in message

    def test_outside_the_inner_stack_is_found_by_the_outer_one(self):
        def layer(x):
            def inner(y):
                return jnp.tanh(y)

            return hk_stack.layer_stack(2)(inner)(hk_stack.hoist(x))

        assert "argument `x" in self.message(layer)


class TestWhatLeaves:
    def test_norm_leaves_and_division_stays(self):
        def layer(x):
            w = weight()
            return x @ (w / jnp.linalg.norm(w))

        jaxpr = trace(layer)
        outside, inside = (
            jaxprs.outside(jaxpr, L),
            jaxprs.names(jaxprs.body(jaxpr, L)),
        )
        assert "sqrt" in outside and "sqrt" not in inside
        assert "reduce_sum" in outside and "reduce_sum" not in inside
        assert "div" in inside and "div" not in outside
        assert sorted(per_layer_shapes(jaxpr)) in ([(), (D, D)], [(1, 1), (D, D)])

    def test_fourier_transform_of_a_kernel_leaves_that_of_the_input_stays(self):
        def layer(x):
            kernel = weight()[0]
            y = jnp.fft.rfft(x) * jnp.fft.rfft(kernel)[None]
            return jnp.fft.irfft(y, n=D)

        outside, inside = cut(layer)
        assert outside.count("fft") == 1
        assert inside.count("fft") == 2

    def test_layout_and_casts_stay(self):
        def layer(x):
            w = weight().T.reshape(D, D).astype(jnp.bfloat16)
            w = jnp.broadcast_to(w[None], [B, D, D])
            return jnp.einsum("bd,bde->be", x.astype(jnp.bfloat16), w).astype(x.dtype)

        outside, inside = cut(layer)
        assert not {"transpose", "convert_element_type"} & set(outside)
        assert "transpose" in inside

    def test_transcendental_work_leaves_only_if_it_is_on_more_than_the_parameters(self):
        def small(x):
            return x @ jnp.exp(weight())

        def large(x):
            w = hk.get_parameter("w", [D], init=hk.initializers.RandomNormal())
            return x @ jnp.exp(w[:, None] * jnp.arange(8.0)[None])

        outside, inside = cut(small)
        assert "exp" in inside and "exp" not in outside
        outside, inside = cut(large)
        assert "exp" in outside and "exp" not in inside

    def test_work_is_measured_against_the_parameters_that_it_is_of(self):
        """Not against all that the layer has."""

        def layer(x):
            small = hk.get_parameter("small", [D], init=jnp.ones)
            large = hk.get_parameter("large", [D, 9 * D], init=jnp.ones)
            x = x @ jnp.exp(small[:, None] * small[None])
            return x + jnp.sum(x @ large)

        outside, inside = cut(layer)
        assert "exp" in outside
        assert "exp" not in inside

    def test_small_derived_values_are_handed_over_rather_than_large_ones(self):
        def layer(x):
            u = hk.get_parameter("u", [D], init=hk.initializers.RandomNormal())
            u = jnp.cumsum(u)
            return x @ jnp.broadcast_to(u[:, None] + 1.0, [D, D])

        (shape,) = per_layer_shapes(trace(layer))
        assert np.prod(shape) == D
        assert_same_results(layer)

    def test_what_several_small_values_come_from_is_handed_over_instead(self):
        def layer(x):
            angle = jnp.linalg.norm(weight(), axis=0)
            return x * jnp.sin(angle)[None] + jnp.cos(angle)[None]

        jaxpr = trace(layer)
        assert per_layer_shapes(jaxpr) == [(D,)]
        assert {"sin", "cos"} <= set(jaxprs.names(jaxprs.body(jaxpr, L)))

    def test_layout_of_derived_values_stays(self):
        _, inside = cut(lambda x: x @ slow(weight()).T)
        assert "transpose" in inside

    def test_setup_of_one_layer_is_in_no_loop(self):
        jaxpr = trace(lambda x: x @ jnp.sort(weight()), layers=1)
        loops = [e for e in jaxprs.equations(jaxpr) if e.primitive.name == "scan"]
        assert len(loops) == 1

    @pytest.mark.parametrize("setup", ["auto", "inline"])
    def test_the_loop_is_given_only_what_the_layer_reads(self, setup):
        def layer(x):
            hk.get_parameter("unread", [3], init=jnp.ones)
            return jnp.tanh(x @ weight())

        assert per_layer_shapes(trace(layer, setup=setup)) == [(D, D)]

    def test_marks_in_branches_that_parameters_choose(self):
        def layer(x):
            w = weight()
            chosen = jax.lax.cond(
                w[0, 0] > 0, lambda w: hk_stack.hoist(jnp.sort(w)), lambda w: w, w
            )
            return x @ chosen

        outside, inside = cut(layer, setup="marked")
        assert "sort" in outside
        assert "sort" not in inside

    def test_parameters_that_only_setup_reads_are_not_handed_over(self):
        def layer(x):
            w = hk.get_parameter("w", [D, 50], init=hk.initializers.RandomNormal())
            return x @ (w @ w.T)

        assert per_layer_shapes(trace(layer)) == [(D, D)]

    def test_setup_of_constants_only_runs_once_not_for_each_layer(self):
        table = np.eye(D, dtype=np.float32)

        def layer(x):
            return x @ slow(table) + weight()[0][None]

        jaxpr = trace(layer)
        assert "cumsum" not in jaxprs.names(jaxprs.body(jaxpr, L))
        shapes = [
            eqn.outvars[0].aval.shape
            for eqn in jaxprs.equations(jaxpr)
            if eqn.primitive.name == "cumsum"
        ]
        assert shapes == [(D, D)]

    def test_a_known_part_of_a_jit_leaves(self):
        table, other = np.eye(D, dtype=np.float32), jnp.ones([D])

        def layer(x):
            return jax.jit(
                lambda w, x: jnp.sin(x * other[None]) @ hk_stack.hoist(slow(w) @ table)
            )(weight(), x)

        assert_same_results(layer)
        outside, inside = cut(layer)
        assert "cumsum" in outside and "cumsum" not in inside
        assert "sin" in inside

    def test_a_known_part_of_a_remat_leaves_the_rest_stays_rematerialised(self):
        def policy(*_, **__):
            return False

        def layer(x):
            def inner(w, x):
                return jnp.sin(jnp.sin(x) @ slow(w))

            return jax.checkpoint(inner, policy=policy)(weight(), x)

        jaxpr = trace(layer)
        assert "cumsum" in jaxprs.outside(jaxpr, L)
        (remat,) = (
            eqn
            for eqn in jaxprs.body(jaxpr, L).eqns
            if eqn.primitive.name in ("checkpoint", "remat", "remat2")
        )
        assert remat.params["policy"] is policy
        inside = jaxprs.names(remat.params["jaxpr"])
        assert inside.count("sin") == 2 and "cumsum" not in inside
        whole = jaxprs.names(jaxprs.body(jaxpr, L))
        assert whole.count("sin") == 2

    def test_haiku_remat_too(self):
        def layer(x):
            return hk.remat(lambda x: jnp.sin(x @ slow(weight())))(x)

        jaxpr = trace(layer)
        assert "cumsum" in jaxprs.outside(jaxpr, L)
        assert "cumsum" not in jaxprs.names(jaxprs.body(jaxpr, L))
        assert "sin" in jaxprs.names(jaxprs.body(jaxpr, L))

    def test_the_parameter_of_the_model_around_leaves(self):
        def model(x):
            outer = weight("outer")

            def layer(x):
                return jnp.tanh(x @ slow(outer) @ slow(outer @ weight()))

            return hk_stack.layer_stack(L)(layer)(x)

        transformed = hk.transform(model)
        params = transformed.init(KEY, *vectors())
        jaxpr = jax.make_jaxpr(transformed.apply)(params, None, *vectors()).jaxpr
        assert "cumsum" not in jaxprs.names(jaxprs.body(jaxpr, L))

    def test_setup_is_in_one_place_for_several_consumers(self):
        def layer(x):
            setup = slow(weight())
            return jnp.tanh(x @ setup) @ setup.T + setup[0][None]

        jaxpr = trace(layer)
        assert jaxprs.outside(jaxpr, L).count("cumsum") == 1
        assert "cumsum" not in jaxprs.names(jaxprs.body(jaxpr, L))
        assert per_layer_shapes(jaxpr).count((D, D)) == 1


class TestLargeSetup:
    """Setup that is too large for one batch of all layers runs in several."""

    def test_results_and_gradients(self):
        def layer(x):
            w = hk.get_parameter("w", [64], init=hk.initializers.RandomNormal())
            large = jnp.cumsum(jnp.sin(w[:, None, None] * jnp.ones([64, 128, 128])), 0)
            return jnp.tanh(x + jnp.mean(large[-1]))

        def run(setup):
            model = hk.transform(hk_stack.layer_stack(6, setup=setup)(layer))
            params = computed(model.init, KEY, *vectors())

            def total(params, x):
                y = model.apply(params, None, x)
                return jnp.sum(jnp.cos(y)), y

            gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
            return computed(gradient, params, *vectors())

        assert_close(run("auto"), run("inline"), 1e-4)

    def test_branches_run_layer_after_layer(self):
        def layer(x):
            w = weight()
            inverse = jax.lax.cond(w.sum() > 0, slow, jnp.linalg.inv, w)
            return jnp.tanh(x @ inverse)

        assert_same_results(layer)


class TestWhatStays:
    def test_random_masks(self):
        outside, inside = cut(lambda x: drop(0.5, x) @ slow(weight()))
        assert "cumsum" in outside
        assert "random_bits" in inside

    def test_activations_state_and_per_layer_inputs(self):
        def layer(x, kernel):
            count = hk.get_state("count", [D], init=jnp.zeros)
            hk.set_state("count", count + 1)
            return x + jnp.cumsum(count)[None] + jnp.cumsum(kernel)[None], None

        args = (*vectors(), jnp.ones([L, D]))
        outside, inside = cut(layer, *args, with_per_layer=True)
        assert inside.count("cumsum") == 2 and "cumsum" not in outside

    def test_side_effects(self):
        def layer(x):
            setup = slow(weight())
            jax.debug.print("{}", setup[0, 0])
            return x @ setup

        outside, inside = cut(layer)
        assert "cumsum" in outside
        assert any("callback" in name or "print" in name for name in inside)
        assert not any("callback" in name or "print" in name for name in outside)

    def test_callbacks_run_as_often_as_in_a_loop_and_in_its_order(self):
        seen = []

        def layer(x):
            w = slow(weight())
            io_callback(lambda v: seen.append(float(v)), None, w.sum(), ordered=True)
            return jnp.tanh(x @ w)

        params = hk.transform(hk_stack.layer_stack(L)(layer)).init(KEY, *vectors())
        jax.effects_barrier()

        def run(stack, transform):
            seen.clear()
            model = hk.transform(stack(L, name="__layer_stack_no_per_layer")(layer))
            transform(model.apply)(params, None, *vectors())
            jax.effects_barrier()
            return np.array(seen)

        expected = run(hk.layer_stack, jax.jit)
        assert len(expected) == L
        for transform in (jax.jit, lambda f: f):
            np.testing.assert_allclose(run(hk_stack.layer_stack, transform), expected)

    def test_pure_callbacks_on_parameters(self):
        def layer(x):
            w = weight()
            shape = jax.ShapeDtypeStruct([], jnp.float32)
            return x * jax.pure_callback(lambda w: np.float32(w.sum()), shape, w)

        outside, inside = cut(layer)
        assert "pure_callback" in inside and "pure_callback" not in outside

    def test_traced_arrays_closed_over(self):
        def model(x, table):
            def layer(x):
                return x @ slow(table) + weight()[0][None]

            return hk_stack.layer_stack(L)(layer)(x)

        transformed = hk.transform(model)
        args = (*vectors(), normal(3, D, D))
        params = transformed.init(KEY, *args)
        jaxpr = jax.make_jaxpr(transformed.apply)(params, None, *args).jaxpr
        assert "cumsum" in jaxprs.names(jaxprs.body(jaxpr, L))

    def test_mutable_references(self):
        def layer(x):
            total = jax.new_ref(jnp.linalg.norm(weight()))
            total[...] += x.sum()
            return jnp.tanh(x * total[...])

        assert_same_results(layer, run=lambda fn, *args: jax.jit(fn)(*args))

    @pytest.mark.parametrize("setup", ["auto", "inline"])
    def test_a_reference_closed_over(self, setup):
        def model(x, w):
            total = jax.new_ref(jnp.zeros([]))

            def layer(x):
                weight()  # The reference is not the first input, once this is gone.
                total[...] += x.sum()
                return jnp.tanh(x * jnp.linalg.norm(w))

            stack = hk_stack.layer_stack(L, setup=setup, name="layers")
            return stack(layer)(x), total[...]

        x, w = *vectors(), normal(0, D)
        model = hk.transform(model)
        found, read = jax.jit(model.apply)(model.init(KEY, x, w), None, x, w)
        expected = []
        for _ in range(L):
            expected.append(x.sum())
            x = jnp.tanh(x * jnp.linalg.norm(w))
        assert_close((found, read), (x, sum(expected)))

    def test_a_branch_that_only_some_layers_take(self):
        """In a batch both branches would run, and this one might not end."""

        def layer(x):
            s = hk.get_parameter("s", [], init=hk.initializers.RandomNormal())
            grown = jax.lax.cond(
                s > 0,
                lambda s: jax.lax.while_loop(lambda c: c < 9.0, lambda c: c + s, s),
                lambda s: s,
                s,
            )
            return x * jnp.tanh(grown)

        outside, inside = cut(layer)
        assert "cond" in outside and "cond" not in inside
        assert_same_results(layer)

    @pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
    def test_random_numbers_that_would_be_others_in_a_batch(self, impl):
        def layer(x):
            seed = hk.get_parameter("seed", [], init=hk.initializers.RandomUniform())
            key = jax.random.key((seed * 1000).astype(jnp.uint32), impl=impl)
            return jnp.tanh(x @ jax.random.normal(key, [D, D]))

        assert_same_results(layer)

    def test_reductions_that_keep_the_size(self):
        def layer(x):
            return x + weight()[None, :1].sum(1)[0][None]

        assert_same_results(layer)


class TestOutputs:
    def test_setup_may_be_all_that_a_layer_returns(self):
        def only_setup(x):
            del x
            return slow(weight())[:B]

        def only_a_parameter(x):
            del x
            return weight()[:B]

        def only_a_constant(x):
            return jnp.ones_like(x)

        for layer in (only_setup, only_a_parameter, only_a_constant):
            assert_same_results(layer)

    def test_setup_as_output_of_each_layer(self):
        def layer(x, scale):
            setup = slow(weight())
            return x * scale, {"setup": setup, "row": setup[0], "one": jnp.float32(1)}

        def run(stack):
            stacked = stack(L, True, name="stack")(layer)
            return hk.transform(lambda x: stacked(x, jnp.ones([L])))

        params = computed(run(hk_stack.layer_stack).init, KEY, *vectors())
        found, expected = (
            computed(run(stack).apply, params, None, *vectors())
            for stack in (hk_stack.layer_stack, layer_loop)
        )
        assert_close(found, expected)

    def test_setup_as_new_state(self):
        def layer(x):
            w = slow(weight())
            hk.get_state("largest", [], init=jnp.zeros)
            hk.set_state("largest", jnp.max(w))
            return x @ w

        assert_same_results(layer)


def test_long_cheap_work_after_setup_is_cut_fast():
    """Two values that are combined again and again have exponentially many paths."""

    def layer(x):
        w = weight()
        a, b = jnp.sum(w, 0), jnp.max(w, 0)
        for _ in range(200):
            a, b = a + b * 0.5, a * 0.3 - b * 0.5
        return x + jnp.tanh(a + b)[None]

    outside, inside = cut(layer)
    assert "reduce_max" in outside and "reduce_max" not in inside


@pytest.mark.parametrize("keyword", [False, True])
def test_eager_gradients_leave_activations_closed_over_in_the_loop(keyword):
    """Under `grad` alone the memory is not traced, though the carry is."""
    memory = normal(4, 5, D)

    def product(x, memory):
        return x + jnp.sum(memory @ weight(), 0, keepdims=True)

    def model(x):
        stack = hk_stack.layer_stack(L)
        if keyword:
            return stack(product)(x, memory=memory)
        return stack(lambda x: product(x, memory))(x)

    model = hk.transform(model)
    x = normal(3, B, D)
    params = model.init(KEY, x)
    jaxpr = jax.make_jaxpr(lambda params, x: model.apply(params, None, x))(params, x)
    assert "dot_general" in jaxprs.names(jaxprs.body(jaxpr.jaxpr, L))


@pytest.mark.parametrize("policy", ["auto", "marked"])
@pytest.mark.parametrize("kind", ["scan", "custom_jvp"])
def test_mark_inside_a_call_on_parameters_takes_the_call_along(policy, kind):
    def marked(w):
        return hk_stack.hoist(jnp.tanh(w))

    def layer(x):
        w = weight()
        if kind == "scan":
            w = jax.lax.scan(lambda c, _: (marked(c), None), w, length=2)[0]
        else:
            rule = jax.custom_jvp(marked)
            rule.defjvp(lambda w, t: (marked(w[0]), t[0]))
            w = rule(w)
        return x @ w

    outside, inside = cut(layer, setup=policy)
    assert "tanh" in outside and "tanh" not in inside
