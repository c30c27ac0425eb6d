"""Where the leaves of stacks go on a mesh, and how many layer axes they begin with."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layer_cases import normal

import hk_stack

X = normal(0, 2, 8)


def inner(x):
    return jnp.tanh(hk.Linear(8)(x))


def outer(x):
    x = hk_stack.layer_stack(2, name="inner")(inner)(x)
    return hk.LayerNorm(-1, True, True)(x)


def nested(x):
    x = hk.Linear(8, name="embed")(x)
    x = hk_stack.layer_stack(4, name="outer")(outer)(x)
    with hk.name_scope("top"):
        return hk_stack.layer_stack(4, name="layers")(inner)(x)


def transparent(x):
    names = hk_stack.NumberedLayers("block_{}", "block")
    stack = hk_stack.layer_stack(3, transparent=True, transparency_map=names)
    return stack(lambda x: hk.Linear(8, name="block")(x))(x)


def made(model):
    model = hk.without_apply_rng(hk.transform(model))
    return model, jax.eval_shape(model.init, jax.random.key(0), X)


class TestLayerAxes:
    @pytest.mark.parametrize("loop", ["scan", "python"])
    def test_nested_stacks(self, loop):
        model, params = made(nested)
        with hk_stack.use_loop(loop):
            axes = hk_stack.layer_axes(model.apply, params, X)
        assert axes == {
            "embed": {"b": 0, "w": 0},
            "outer/inner/linear": {"b": 2, "w": 2},
            "outer/layer_norm": {"offset": 1, "scale": 1},
            "top/layers/linear": {"b": 1, "w": 1},
        }

    def test_a_transparent_stack_has_no_axis(self):
        model, params = made(transparent)
        axes = hk_stack.layer_axes(model.apply, params, X)
        assert set(jax.tree.leaves(axes)) == {0}

    def test_a_stack_in_a_transparent_one(self):
        def layer(x):
            with hk.name_scope("block"):
                return hk_stack.layer_stack(2, name="inner")(inner)(x)

        def run(x):
            names = hk_stack.NumberedLayers("block_{}", "block")
            return hk_stack.layer_stack(3, transparent=True, transparency_map=names)(
                layer
            )(x)

        model, params = made(run)
        axes = hk_stack.layer_axes(model.apply, params, X)
        assert axes == {f"block_{i}/inner/linear": {"b": 1, "w": 1} for i in range(3)}

    def test_a_function_that_calls_the_model(self):
        model, params = made(nested)

        def loss(trees, x, scale):
            half = jax.tree.map(lambda w: w.astype(jnp.float16), trees["model"])
            return scale * jnp.mean(model.apply(half, x.astype(jnp.float16)))

        trees = {"model": params, "other": jax.ShapeDtypeStruct((3,), jnp.float32)}
        axes = hk_stack.layer_axes(loss, trees, X, scale=2)
        assert axes["model"] == hk_stack.layer_axes(model.apply, params, X)
        assert axes["other"] == 0

    def test_mistakes(self):
        model, params = made(nested)
        axes = hk_stack.layer_axes
        mistake("no function", lambda: axes(3, params), "expected a function, not int")
        mistake("init", lambda: axes(model.init, jax.random.key(0), X), "not its init")
        twice = {"a": params, "b": params}
        mistake("twice", lambda: axes(lambda t, x: model.apply(t["a"], x), twice, X))
        mistake(
            "elsewhere",
            lambda: axes(lambda x, params: model.apply(params, x), X, params),
            "is not in `params`",
        )
        mistake("no stack", lambda: axes(lambda p: p, params), "calls no stack")


def mistake(name, run, text=""):
    with pytest.raises((ValueError, TypeError), match=text or name):
        run()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2), ("data", "stage"), (AxisType.Auto,) * 2)


class TestShardings:
    def setup_method(self):
        self.model, self.shapes = made(nested)
        self.axes = hk_stack.layer_axes(self.model.apply, self.shapes, X)

    def placed(self, rules, mesh, tree=None, **options):
        tree = self.shapes if tree is None else tree
        return hk_stack.shardings(tree, rules, mesh, layer_axes=self.axes, **options)

    def test_rules_are_for_one_layer(self, mesh):
        rules = {"embed/w": P(None, "stage"), "layer_norm/*": None, "w": P("data")}
        tree = self.placed(rules, mesh).tree
        specs = jax.tree.map(lambda sharding: sharding.spec, tree)
        assert specs == {
            "embed": {"b": P(), "w": P(None, "stage")},
            "outer/inner/linear": {"b": P(), "w": P(None, None, "data")},
            "outer/layer_norm": {"offset": P(), "scale": P()},
            "top/layers/linear": {"b": P(), "w": P(None, "data")},
        }

    def test_layers_over_an_axis(self, mesh):
        tree = self.placed({"linear/w": P("data")}, mesh, layers="stage").tree
        assert tree["outer/inner/linear"]["w"].spec == P("stage", None, "data")
        assert tree["outer/inner/linear"]["b"].spec == P("stage", None)
        assert tree["top/layers/linear"]["w"].spec == P("stage", "data")
        assert tree["embed"]["w"].spec == P()

    def test_initial_parameters_and_optimiser_state_arrive_there(self, mesh):
        rules = {"outer/*/w": P("data"), "layers/*/w": P(None, "data")}
        placed = self.placed(rules, mesh)
        init = jax.jit(self.model.init, out_shardings=placed.tree)
        params = init(jax.random.key(0), X)
        optimizer = optax.adamw(1e-3)
        of_state = self.placed(rules, mesh, jax.eval_shape(optimizer.init, params))
        state = jax.jit(optimizer.init, out_shardings=of_state.tree)(params)
        for moments in (params, state[0].mu, state[0].nu):
            assert moments["outer/inner/linear"]["w"].sharding.spec[2] == "data"
            assert moments["top/layers/linear"]["w"].sharding.spec[2] == "data"
        sizes = {leaf.path: leaf.bytes_per_device for leaf in placed.leaves}
        shard = params["outer/inner/linear"]["w"].addressable_shards[0].data
        assert sizes["outer/inner/linear/w"] == shard.nbytes

    def test_shows_what_was_decided(self, mesh):
        text = str(self.placed({"outer/*/w": P("data")}, mesh))
        assert "rule" in text and "P(None, None, 'data')" in text
        assert text.splitlines()[-1].split()[0] == "total"

    @pytest.mark.parametrize(
        ("rules", "options", "text"),
        [
            ({"nothing": P()}, {}, "matches nothing. The leaves are: embed/b"),
            ({"w": P(), "embed/w": P()}, {}, "rule 'embed/w' stands for nothing"),
            ({"w": P("a")}, {}, "names the axis 'a'; the mesh has 'data', 'stage'"),
            ({"b": P("data", "stage")}, {}, "has 2 axes"),
            ({"linear/w": P("stage")}, {"layers": "stage"}, "twice over the axis"),
            ({"w": "data"}, {}, "expected a text and a"),
            ([P()], {}, "rules must be a dict"),
            ({"w": P()}, {"layers": "b"}, "layers names the axis 'b'"),
        ],
    )
    def test_mistakes(self, mesh, rules, options, text):
        mistake("", lambda: self.placed(rules, mesh, **options), text)

    def test_mistakes_of_trees_and_meshes(self, mesh):
        run = hk_stack.shardings
        mistake("", lambda: run({"w": X}, {}, None), "expected a jax.sharding.Mesh")
        mistake("", lambda: run({"w": "text"}, {}, mesh), "is a str")
        mistake(
            "",
            lambda: run({"w": jnp.ones([3, 4])}, {"w": P("data")}, mesh),
            "axis 0 of w, of shape .3, 4., is 3 long",
        )
        mistake(
            "",
            lambda: run({"w": X}, {}, mesh, layer_axes={"w": X}),
            "layer_axes must be a tree of ints",
        )
