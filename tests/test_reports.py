"""What tables and errors show: the stack's row, setup without constants, near names."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hk_stack


def layer(x):
    return x + hk.Linear(8)(jnp.tanh(hk.Linear(8, name="pre")(x)))


X = jnp.ones([2, 8])


class TestTabulate:
    def test_a_stack_has_a_row_with_its_parameters(self):
        def model(x):
            return hk_stack.layer_stack(4, name="layers")(layer)(hk.Linear(8)(x))

        [row] = [
            entry
            for entry in hk.experimental.eval_summary(hk.transform(model))(X)
            if isinstance(entry.module_details.module, hk_stack._stack.LayerStack)
        ]
        params = row.module_details.params
        assert sum(spec.size for spec in params.values()) == 4 * 2 * (8 * 8 + 8)
        assert params["layers/linear/w"].shape == (4, 8, 8)
        assert (row.args_spec[0].shape, row.output_spec.shape) == ((2, 8), (2, 8))
        table = hk.experimental.tabulate(hk.transform(model))(X)
        assert "layers (LayerStack.ran)" in table
        assert "LayerStack(num_layers=4, layer='layer')" in table

    @pytest.mark.parametrize("name", ["f", "key", "options", "self", "reverse_"])
    def test_all_names_are_free_for_keyword_arguments(self, name):
        def layer(x, **kwargs):
            return x * kwargs[name]

        model = hk.transform(lambda x: hk_stack.layer_stack(2)(layer)(x, **{name: 3}))
        np.testing.assert_array_equal(model.apply({}, None, X), 9 * X)


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_interceptors_of_methods_change_what_they_change_in_haikus_stack(loop):
    def doubled(next_f, args, kwargs, context):
        result = next_f(*args, **kwargs)
        is_call = context.method_name == "__call__" and isinstance(result, jax.Array)
        return 2 * result if is_call else result

    def run(layer_stack):
        def inner(x):
            return layer_stack(2, name="inner")(layer)(x)

        def model(x):
            with hk.intercept_methods(doubled):
                return layer_stack(3, name="outer")(inner)(x)

        return hk.transform(model)

    params = run(hk.layer_stack).init(jax.random.key(0), X)
    with hk_stack.use_loop(loop):
        found = run(hk_stack.layer_stack).apply(params, None, X)
    expected = run(hk.layer_stack).apply(params, None, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class TestSharing:
    """README: calling a stack again makes new parameters, unless a module calls it."""

    def test_a_second_call_makes_new_parameters(self):
        def model(x):
            stack = hk_stack.layer_stack(3, name="layers")(layer)
            return stack(stack(x))

        params = hk.transform(model).init(jax.random.key(0), X)
        assert set(params) == {
            f"{stack}/{module}"
            for stack in ("layers", "layers_1")
            for module in ("linear", "pre")
        }

    def test_a_module_shares_them(self):
        class Tower(hk.Module):
            def __call__(self, x):
                return hk_stack.layer_stack(3, name="layers")(layer)(x)

        model = hk.transform(lambda x: (tower := Tower())(tower(x)))
        params = model.init(jax.random.key(0), X)
        assert set(params) == {"tower/layers/linear", "tower/layers/pre"}
        once = hk.transform(lambda x: Tower()(x)).apply
        twice = once(params, None, once(params, None, X))
        np.testing.assert_allclose(model.apply(params, None, X), twice, rtol=1e-6)


@pytest.mark.parametrize(
    ("remat", "said"),
    [
        (False, "no"),
        (True, "all"),
        (jax.checkpoint_policies.dots_saveable, "dots_saveable"),
        (lambda prim, *_, **__: False, "<lambda>"),
    ],
)
def test_a_summary_names_policies(remat, said):
    model = hk.transform(hk_stack.layer_stack(2, remat=remat)(layer))
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    [stack] = hk_stack.summary(model.apply, params, None, X).stacks
    assert stack.remat == said


def test_a_report_names_lines_of_the_users_own_functions_under_jit():
    @jax.jit
    def kernel(w):
        return jax.scipy.linalg.expm(w)

    def model(params, x):
        return x @ kernel(params)

    split = hk_stack.partition(model, jnp.eye(16), jnp.eye(16))
    (group,) = split.report.hoisted
    assert group.source.split(" in ")[1] == "kernel"


class TestConstants:
    """What depends on no parameter is no setup: the compiler computes it."""

    def test_they_are_not_derived_values(self):
        table = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)

        def f(params, x):
            mask = jnp.tri(16) * jnp.fft.fft(jnp.asarray(table)).real

            def step(x, row):
                return jnp.tanh(x @ (jnp.sort(row)[None] + params @ params)), None

            return jax.lax.scan(step, x * mask, jnp.asarray(table))[0]

        params = jnp.eye(16)
        split = hk_stack.partition(f, params, params)
        derived = jax.tree.leaves(split.setup(params))
        assert len(derived) == 1
        assert "fft" not in str(split)
        assert "sort" not in str(split)
        np.testing.assert_allclose(
            split.call(split.setup(params), params), f(params, params), rtol=1e-6
        )

    def test_what_they_make_with_parameters_is(self):
        table = np.ones([16, 16], np.float32)

        def f(params, x):
            return x @ (jnp.asarray(table) @ params)

        split = hk_stack.partition(f, jnp.eye(16), jnp.eye(16))
        assert [group.primitive for group in split.report.hoisted] == ["dot_general"]

    def test_a_mark_hoists_them(self):
        def f(params, x):
            return x @ hk_stack.hoist(jnp.tri(16)) * params

        split = hk_stack.partition(f, jnp.eye(16), jnp.eye(16))
        assert len(split.report.hoisted) == 1


def test_the_names_most_like_the_missing_one_come_first():
    def model(name):
        def layer(x):
            for i in range(12):
                x = hk.Linear(8, name=f"mlp_{i}" if i else name)(x)
            return x

        return hk.transform(lambda x: hk_stack.layer_stack(2, name="layers")(layer)(x))

    params = model("queries").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"lack query/b.* They hold: layers/queries/"):
        model("query").apply(params, None, X)
