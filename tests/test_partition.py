"""What leaves the loop, what stays, and what `hoist` does."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import layer_body, layer_loop, names

import hk_stack

KEY = jax.random.key(0)
D = 6
X = jnp.ones((2, D))


def weight(name="w", shape=(D, D)):
    return hk.get_parameter(name, shape, init=hk.initializers.RandomNormal(0.3))


def norm(w):
    return jnp.sqrt(jnp.sum(w * w))[None, None]


def body_names(layer, *args, **options):
    return names(layer_body(layer, *(args or [X]), **options))


# Layer function -> (equations that must leave the loop, equations that must stay).
LEAVES = {
    "product": (lambda x: x * (weight() @ weight())[:1], ["dot_general"], ["mul"]),
    "norm but not division": (
        lambda x: x @ (weight() / norm(weight())),
        ["reduce_sum", "sqrt"],
        ["div", "dot_general"],
    ),
    "fft": (
        lambda x: x * jnp.fft.rfft(weight("w", (D,)), n=2 * D - 2).real[None],
        ["fft"],
        ["mul"],
    ),
    "factorisation": (
        lambda x: x @ jnp.linalg.cholesky(weight() + 9 * jnp.eye(D)),
        ["cholesky"],
        ["dot_general"],
    ),
    "sort": (lambda x: x + jnp.sort(weight("w", (D,)))[None], ["sort"], ["add"]),
    "exp of more than the parameters": (
        lambda x: x * jnp.exp(weight("w", (D, 1)) * jnp.arange(8.0)[None]).sum(),
        ["exp", "reduce_sum"],
        ["mul"],
    ),
    "recurrence": (
        lambda x: (
            x
            + jax.lax.scan(
                lambda c, _: (jnp.tanh(c), None), weight("w", (D,)), length=9
            )[0][None]
        ),
        ["scan", "tanh"],
        ["add"],
    ),
    "inside jit": (
        lambda x: jax.jit(lambda w, x: x @ (w @ w @ w))(weight(), x),
        [],
        ["dot_general"],
    ),
    "inside remat": (
        lambda x: jax.checkpoint(lambda w, x: jnp.sin(x) / norm(w))(weight(), x),
        ["reduce_sum"],
        ["sin", "div"],
    ),
    "constants": (
        lambda x: x + jnp.sum(jnp.sin(jnp.arange(99.0))) * weight("w", (1, D)),
        ["sin", "reduce_sum"],
        ["add"],
    ),
}


@pytest.mark.parametrize("case", LEAVES)
def test_setup_leaves_the_loop(case):
    layer, leaves, stays = LEAVES[case]
    inline = body_names(layer, setup="inline")
    auto = body_names(layer)
    assert set(leaves) <= set(inline)
    assert not set(leaves) & set(auto)
    assert set(stays) <= set(auto)


def test_only_the_product_with_the_input_stays_in_a_jit():
    layer = LEAVES["inside jit"][0]
    assert body_names(layer, setup="inline").count("dot_general") == 3
    assert body_names(layer).count("dot_general") == 1


def test_the_rest_of_a_remat_stays_in_it():
    body = layer_body(LEAVES["inside remat"][0], X)
    (remat,) = [e for e in body.eqns if "jaxpr" in e.params and "policy" in e.params]
    assert "sin" in names(remat.params["jaxpr"])


# Layers of which nothing may leave.
STAYS = {
    "cast": lambda x: x @ weight().astype(jnp.bfloat16).astype(jnp.float32),
    "transpose": lambda x: x @ weight().T,
    "broadcast": lambda x: x + jnp.broadcast_to(weight("b", (1, D)), x.shape),
    "exp of as much as the parameters": lambda x: x @ jnp.exp(weight()),
    "linear": lambda x: hk.Linear(D)(x),
    "dropout": lambda x: x * jax.random.bernoulli(hk.next_rng_key(), 0.5, x.shape),
    "callback": lambda x: (
        x
        + jax.pure_callback(
            np.linalg.inv, weight(), weight() + 9, vmap_method="sequential"
        )[:1]
    ),
    "state": lambda x: x + jnp.sum(hk.get_state("s", [D], init=jnp.ones)),
}


@pytest.mark.parametrize("case", STAYS)
@jax.numpy_dtype_promotion("standard")
def test_nothing_leaves_that_is_not_worth_it(case):
    layer = STAYS[case]
    assert body_names(layer) == body_names(layer, setup="inline")


def test_printing_stays_and_prints_for_each_layer(capfd):
    def layer(x):
        total = jnp.sum(weight())
        jax.debug.print("layer {}", total)
        return x * total

    assert "reduce_sum" not in body_names(layer)
    model = hk.transform(lambda x: hk_stack.layer_stack(3)(layer)(x))
    params = model.init(KEY, X)
    jax.effects_barrier()
    capfd.readouterr()
    jax.block_until_ready(jax.jit(model.apply)(params, None, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("layer ") == 3


def closing_over(mark):
    """A stack whose layers multiply by a product with an array closed over."""

    def model(x):
        outside = jnp.cos(x)

        def layer(x):
            return x + mark(outside @ weight())

        return hk_stack.layer_stack(3)(layer)(x)

    return hk.transform(model)


def test_closed_over_activations_stay_unless_marked():
    def products(model):
        params = jax.eval_shape(model.init, KEY, X)
        loop = layer_loop(model.apply, params, None, X)
        return names(loop).count("dot_general")

    assert products(closing_over(lambda v: v)) == 1
    assert products(closing_over(hk_stack.hoist)) == 0


def test_closed_over_constants_and_parameters_leave():
    constant = np.eye(D, dtype=np.float32) + 1

    def model(x):
        shared = weight("shared")

        def layer(x):
            return x @ (constant @ shared @ weight())

        return hk_stack.layer_stack(3)(layer)(x)

    model = hk.transform(model)
    params = model.init(KEY, X)
    loop = layer_loop(model.apply, params, None, X)
    assert names(loop).count("dot_general") == 1


def marked_layer(x):
    w = hk_stack.hoist(weight() @ weight())
    return x @ w + jnp.sum(weight("v"))


def test_marked_hoists_what_is_marked_and_no_more():
    marked = body_names(marked_layer, setup="marked")
    assert marked.count("dot_general") == 1
    assert "reduce_sum" in marked
    assert "reduce_sum" not in body_names(marked_layer)


def test_cheap_work_leaves_if_it_is_marked():
    def layer(x):
        return x @ hk_stack.hoist(jnp.exp(weight()))

    assert "exp" not in body_names(layer)
    assert "exp" not in body_names(layer, setup="marked")
    assert "exp" in body_names(layer, setup="inline")


def test_hoist_is_the_identity_elsewhere():
    tree = {"a": jnp.arange(3.0), "b": (jnp.ones(2),)}
    same = hk_stack.hoist(tree)
    assert jax.tree.structure(same) == jax.tree.structure(tree)
    assert all(map(jnp.array_equal, jax.tree.leaves(same), jax.tree.leaves(tree)))
    assert jax.grad(lambda x: hk_stack.hoist(x) ** 2)(3.0) == 6.0
    assert jax.vmap(hk_stack.hoist)(jnp.arange(3)).tolist() == [0, 1, 2]


def test_hoist_inside_jit_is_found():
    def layer(x):
        return jax.jit(lambda w, x: x @ hk_stack.hoist(jnp.exp(w)))(weight(), x)

    assert "exp" not in body_names(layer)

    def wrong(x):
        return jax.jit(lambda x: hk_stack.hoist(2 * x))(x)

    with pytest.raises(ValueError, match="argument `x`"):
        body_names(wrong)


def test_inner_setup_leaves_the_outer_loop():
    def inner(x):
        return x @ (weight() / norm(weight()))

    def outer(x):
        return hk_stack.layer_stack(2)(inner)(jnp.sin(x))

    body = body_names(outer)
    assert "scan" in body and "sin" in body
    assert "reduce_sum" not in body
    assert "reduce_sum" in body_names(outer, setup="inline")


def test_mark_in_an_inner_stack_leaves_the_outer_loop():
    def inner(x):
        return x @ hk_stack.hoist(jnp.exp(weight()))

    def outer(x):
        return hk_stack.layer_stack(2)(inner)(x)

    assert "exp" not in body_names(outer, setup="marked")


def test_mark_of_an_outer_activation_in_an_inner_stack_stays_in_the_outer_loop():
    def outer(x):
        pair = jnp.cos(x)
        return hk_stack.layer_stack(2)(lambda x: x + hk_stack.hoist(pair @ weight()))(x)

    model = hk.transform(lambda x: hk_stack.layer_stack(3)(outer)(x))
    params = model.init(KEY, X)
    loop = layer_loop(model.apply, params, None, X)
    (inner,) = [e for e in loop.eqns if e.primitive.name == "scan"]
    assert "dot_general" not in names(inner.params["jaxpr"].jaxpr)


def test_one_function_called_twice_keeps_its_values_apart():
    product = jax.jit(lambda w, x: x @ (w @ w))

    def layer(x):
        return product(weight("a"), x) + product(weight("b"), x)

    def apply(**options):
        model = hk.transform(lambda x: hk_stack.layer_stack(3, **options)(layer)(x))
        return model.apply(model.init(KEY, X), None, X)

    assert body_names(layer).count("dot_general") == 2
    np.testing.assert_allclose(apply(), apply(setup="inline"), rtol=1e-5)


def test_large_setup_runs_in_batches_and_is_recomputed_for_gradients():
    def layer(x):
        w = weight("w", (1024, 1))
        return x * jnp.mean(jnp.cos(w * jnp.arange(1024.0)[None]))

    model = hk.transform(lambda x: hk_stack.layer_stack(4)(layer)(x))
    params = jax.eval_shape(model.init, KEY, X)
    jaxpr = jax.make_jaxpr(model.apply)(params, None, X).jaxpr
    batches, loop = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert batches.params["length"] == 2 and batches.params["num_carry"] == 0
    assert "cos" in names(batches.params["jaxpr"].jaxpr)
    assert "cos" not in names(loop.params["jaxpr"].jaxpr)

    def loss(setup):
        model = hk.transform(
            lambda x: hk_stack.layer_stack(4, setup=setup)(layer)(x).sum()
        )
        return model.apply

    params = model.init(KEY, X)
    ours, theirs = (
        jax.jit(jax.grad(loss(setup)))(params, None, X) for setup in ("auto", "inline")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        ours,
        theirs,
    )
