"""What summaries and reports say of work: why it stays, its name, its line."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_cases import D

import hk_stack

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, D), jnp.float32)
W = jax.ShapeDtypeStruct((D, D), jnp.float32)
TABLE = jnp.eye(D)
expm = jax.scipy.linalg.expm
eigh = jax.scipy.linalg.eigh


def weight(name="w", shape=(D, D)):
    return hk.get_parameter(name, shape, init=hk.initializers.RandomNormal(0.1))


def summary_of(layer, *inputs, **options):
    """That of a stack of three layers, whose types are enough."""
    stack = hk_stack.layer_stack(3, name="s", **options)(layer)
    model = hk.transform_with_state(stack)
    given = (X, *inputs)
    params, state = jax.eval_shape(model.init, KEY, *given)
    found = hk_stack.summary(model.apply, params, state, KEY, *given)
    (stack,) = found.stacks
    return stack, str(found)


def outer_product(w, x):
    return (w[:, None] * w[None]).reshape(D, -1)[:, :D]


class TestWhatStays:
    """By kind of work: what does it, why it stays, and what to write."""

    def test_dense_layers_are_not_worth_a_word(self):
        def layer(x):
            h = jax.nn.gelu(hk.Linear(64)(hk.LayerNorm(-1, True, True)(x)))
            init = hk.initializers.VarianceScaling()
            h = hk.MultiHeadAttention(2, 4, w_init=init, model_size=D)(h, h, h)
            mask = jax.random.uniform(hk.next_rng_key(), h.shape)
            return x + h * mask * (1 + weight("scale", (1, D)))

        stack, text = summary_of(layer)
        assert stack.stayed == () and stack.hoisted == () and stack.batch == 0
        assert "made of parameters alone" in text

    @pytest.mark.parametrize(
        ("make", "function", "why", "write"),
        [
            (lambda w, x: jnp.tanh(w), "tanh", "is cheap", "hoist(value) moves it"),
            (outer_product, "mul", "is larger", "hoist(value)"),
            (
                lambda w, x: expm(w * jax.random.uniform(hk.next_rng_key(), w.shape)),
                "expm",
                "depends on a random key",
                "draw after it",
            ),
            (
                lambda w, x: eigh(w * hk.get_state("c", [], init=jnp.ones))[1],
                "eigh",
                "depends on state ",
                "split off",
            ),
            (
                lambda w, x: eigh(w + TABLE)[1],
                "eigh",
                "depends on an array closed over",
                "hoist(value) moves it",
            ),
            (
                lambda w, x: eigh(w * x.mean())[1],
                "eigh",
                "depends on argument `x`",
                "split off",
            ),
            (
                lambda w, x: jax.lax.cond(x[0, 0] > 0, expm, lambda w: w, w),
                "expm",
                "it is in a conditional that depends on argument `x`",
                "compute it before",
            ),
            (
                lambda w, x: jax.lax.while_loop(
                    lambda y: y.mean() > 1, lambda y: y @ repeated(w), x.T @ x
                ),
                "while",
                "in a while loop",
                "compute it before",
            ),
            (
                lambda w, x: with_derivative(w, x),
                "sort",
                "own derivative, which leaves as a whole",
                "compute it before",
            ),
            (
                lambda w, x: jax.pure_callback(np.sort, w, w),
                "pure_callback",
                "foreign code",
                "outside",
            ),
        ],
    )
    def test_says_why_and_what_to_write(self, make, function, why, write):
        stack, text = summary_of(lambda x: x @ make(weight(), x))
        (stayed,) = stack.stayed
        assert stayed.primitive == function
        assert why in stayed.why and write in stayed.write
        assert stayed.source.startswith("test_stays.py:")
        assert "stays in" in text

    def test_per_layer_inputs(self):
        def layer(x, y):
            return x @ eigh(weight() * y)[1], x @ (weight("v") * y)

        stack, _ = summary_of(layer, jnp.ones([3]), with_per_layer_inputs=True)
        (stayed,) = stack.stayed
        assert "per-layer input `y`" in stayed.why

    @pytest.mark.parametrize("setup", ["inline", "marked"])
    def test_what_was_asked_to_stay(self, setup):
        stack, _ = summary_of(lambda x: x @ expm(weight()), setup=setup)
        (stayed,) = stack.stayed
        assert (stayed.primitive, stack.hoisted) == ("expm", ())
        assert f'setup="{setup}"' in stayed.why and 'setup="auto"' in stayed.write

    def test_gathered_values(self):
        mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def layer(x):
            w = jax.lax.with_sharding_constraint(weight(), whole)
            return x @ jnp.sort(w) / jnp.linalg.norm(w)

        stack, text = summary_of(layer)
        (stayed,) = stack.stayed
        assert stayed.primitive == "sort" and "gathered" in stayed.why
        assert [group.primitive for group in stack.hoisted] == ["norm"]
        assert "as it gathers sharded values: setup_batch_size=k" in flat(text)

    def test_what_an_inner_stack_says_is_said_once(self):
        def layer(x):
            run = jax.lax.cond(x[0, 0] > 0, expm, lambda w: w, weight("v"))
            return x * jnp.tanh(weight()) + run

        def outer(x):
            return hk_stack.layer_stack(2, name="inner")(layer)(x)

        model = hk.transform(hk_stack.layer_stack(3, name="outer")(outer))
        params = jax.eval_shape(model.init, KEY, jnp.ones([D, D]))
        found = hk_stack.summary(model.apply, params, None, jnp.ones([D, D]))
        text = flat(str(found))
        assert text.count("it is cheap") == text.count("it is in a conditional") == 1


def repeated(w):
    """A loop in a loop, which the cut leaves alone."""
    return jax.lax.while_loop(lambda v: v[0, 0] > 1, lambda v: v @ v, w)


@jax.custom_jvp
def with_derivative(w, x):
    return jnp.sort(w) * x[0, 0]


with_derivative.defjvp(lambda values, tangents: (with_derivative(*values), tangents[0]))


def flat(text):
    """Text without the ends of its lines."""
    return " ".join(text.split())


class TestBatches:
    """How many layers' setup runs at once, and why it is one."""

    @pytest.mark.parametrize(
        ("options", "batch", "shown"),
        [
            ({}, 3, "3"),
            ({"setup_batch_size": 2}, 2, "2, remat"),
            ({"setup_batch_size": 8, "setup_remat": True}, 3, "3, remat"),
            ({"setup_batch_size": 1, "setup_remat": False}, 1, "1"),
        ],
    )
    def test_are_shown(self, options, batch, shown):
        stack, text = summary_of(lambda x: x @ jnp.sort(weight()), **options)
        assert (stack.batch, stack.setup_remat) == (batch, "remat" in shown)
        assert f"48 B  {shown}  " in text or f" {shown}  " in text.splitlines()[1]
        assert stack.notes == ()

    @pytest.mark.parametrize(
        ("make", "why", "write"),
        [
            (lambda w: expm(jnp.tile(w, [9, 9]))[:D, :D], "conditionals", "=k runs k"),
            (
                lambda w: jnp.tile(jnp.sort(w)[None], [10**6, 1, 1]).sum(0),
                "memory",
                "=k",
            ),
            (
                lambda w: jax.random.normal(
                    jax.random.fold_in(
                        jax.random.key(0, impl="rbg"), hk_stack.layer_index()
                    ),
                    w.shape,
                ),
                "keys other than threefry's",
                "",
            ),
        ],
    )
    def test_one_by_one_says_why(self, make, why, write):
        stack, _ = summary_of(lambda x: x @ hk_stack.hoist(make(weight())))
        (note,) = stack.notes
        assert stack.batch == 1 and note.startswith("runs layer after layer, as")
        assert why in note and write in note
        assert write or ":" not in note

    def test_a_loop_in_python_hoists_nothing(self):
        def layer(x):
            return x @ expm(weight())

        stack, _ = summary_of(layer, loop="python")
        assert stack.notes[0].startswith('loop="python" runs the layer function')
        with hk_stack.use_loop("python"):
            stack, _ = summary_of(layer)
        assert stack.notes[0].startswith("use_loop or HK_STACK_LOOP runs")


class TestNames:
    """Values are called as the function that the user called."""

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (expm, "expm"),
            (lambda w: jnp.linalg.norm(w, axis=0), "norm"),
            (jax.nn.softplus, "softplus"),
            (hk_stack.hoist, "hoist"),
            (jax.nn.relu, "relu"),
            (lambda w: jnp.linalg.eigh(w)[1].T, "eigh"),
            (lambda w: jnp.linalg.inv(w)[None], "inv"),
            (lambda w: jnp.where(w > 0, w, 1.0), "where"),
            (lambda w: jnp.clip(w, 0, 1), "clip"),
            (lambda w: jnp.exp(w), "exp"),
            (lambda w: jax.jit(lambda w: jnp.sin(2 * w))(w), "sin"),
            (lambda w: jax.jit(expm)(w), "expm"),
            (lambda w: jax.checkpoint(expm)(w), "expm"),
            (lambda w: jax.vmap(expm)(w[None])[0], "expm"),
            (lambda w: jax.lax.map(expm, w[None])[0], "scan"),
            (lambda w: jax.grad(lambda w: jax.nn.softplus(w).sum())(w), "softplus"),
        ],
    )
    def test_of_derived_values(self, make, name):
        def fn(w, x):
            return x[0, 0] * make(w)

        split = hk_stack.partition(fn, W, X)
        derived = jax.eval_shape(split.setup, W)
        assert list(derived["hoisted"]) == [f"0_{name}"]
        assert [group.primitive for group in split.report.hoisted] == [name]


def sorted_rows(w):
    return jnp.sort(w)


@jax.custom_jvp
def own_derivative(w):
    return sorted_rows(w)


own_derivative.defjvp(lambda values, tangents: (own_derivative(*values), tangents[0]))


class TestLines:
    """Values are shown with the line that the user wrote, whatever is around it."""

    @pytest.mark.parametrize(
        "around",
        [
            hk.remat,
            jax.checkpoint,
            jax.jit,
            jax.vmap,
            lambda f: hk.remat(jax.jit(f)),
            lambda f: lambda w: own_derivative(w),
            lambda f: lambda w: hk.remat(own_derivative)(w),
            lambda f: lambda w: jax.vmap(own_derivative)(w[None])[0],
        ],
    )
    def test_of_a_layer(self, around):
        stack, _ = summary_of(lambda x: x @ around(sorted_rows)(weight()))
        (group,) = stack.hoisted
        assert group.source.startswith("test_stays.py:")
        assert group.source.endswith("in sorted_rows")

    @pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint])
    def test_of_the_body_of_a_scan(self, around):
        def model(w, x):
            def turn(x, w):
                return jnp.tanh(x @ around(sorted_rows)(w)), None

            return jax.lax.scan(jax.checkpoint(turn), x, w)[0]

        w = jax.ShapeDtypeStruct([5, D, D], jnp.float32)
        (group,) = hk_stack.partition(model, w, X).report.hoisted
        assert group.source.endswith("in sorted_rows") and group.primitive == "sort"

    def test_of_setup_in_batches(self):
        def layer(x):
            return x @ expm(jnp.tile(weight(), [2, 2]))[:D, :D]

        def model(x):
            return hk_stack.layer_stack(5, setup_batch_size=2)(layer)(x)

        model = hk.transform(model)
        params = jax.eval_shape(model.init, KEY, X)
        (group,) = hk_stack.partition(model.apply, params, None, X).report.hoisted
        assert group.primitive == "expm" and group.source.endswith("in layer")

    def test_of_flax(self):
        nn = pytest.importorskip("flax.linen")

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                w = self.param("w", nn.initializers.ones, (D, D))
                return x @ sorted_rows(w), None

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                scan = nn.scan(
                    nn.remat(Block),
                    {"params": 0},
                    split_rngs={"params": True},
                    length=3,
                )
                return scan()(x, None)[0]

        params = jax.eval_shape(Model().init, KEY, X)
        split = hk_stack.partition(jax.jit(Model().apply), params, X)
        (group,) = split.report.hoisted
        assert (group.primitive, group.source.split(" in ")[1]) == (
            "sort",
            "sorted_rows",
        )
