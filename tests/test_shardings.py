"""Where the leaves of stacks go on a mesh, and how many layer axes they begin with."""

import re

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

    def test_trees_of_the_same_leaves_have_the_same(self):
        model, params = made(nested)
        state = jax.eval_shape(optax.adam(1.0).init, params)

        def loss(trees, x):
            return model.apply(trees["params"], x)

        axes = hk_stack.layer_axes(loss, {"params": params, "state": state}, X)
        assert axes["state"][0].mu == axes["state"][0].nu == axes["params"]

    def test_two_models_with_stacks_of_one_name(self):
        def one(name):
            def layer(x):
                return hk.Linear(8, name=name)(x)

            return made(lambda x: hk_stack.layer_stack(2, name="layers")(layer)(x))

        (first, first_params), (second, second_params) = one("first"), one("second")

        def both(trees, x):
            return second.apply(trees[1], first.apply(trees[0], x))

        axes = hk_stack.layer_axes(both, (first_params, second_params), X)
        assert set(jax.tree.leaves(axes)) == {1}

    def test_state_beside_parameters_of_the_same_name(self):
        def count(name):
            hk.set_state(name, hk.get_state(name, [], init=jnp.zeros) + 1)

        def layer(x):
            count("w")
            x = x * hk.get_parameter("w", [], init=jnp.ones)

            def inside(x):
                count("inside")
                return x

            return hk_stack.layer_stack(2, name="inner")(inside)(x)

        def run(x):
            return hk_stack.layer_stack(3, name="layers")(layer)(x)

        model = hk.without_apply_rng(hk.transform_with_state(run))
        trees = jax.eval_shape(model.init, jax.random.key(0), X)
        axes = hk_stack.layer_axes(lambda both: model.apply(*both, X), trees)
        assert axes[0] == {"layers/~": {"w": 1}}
        assert axes[1] == {"layers/~": {"w": 1}, "layers/inner/~": {"inside": 2}}

    @pytest.mark.parametrize("name", ["lifted", "other"])
    def test_a_stack_in_a_transform_that_is_lifted(self, name):
        def run(x):
            return hk_stack.layer_stack(2, name="inner")(inner)(x)

        lifted = hk.without_apply_rng(hk.transform(run))

        def layer(x):
            key = hk.next_rng_key() if hk.running_init() else None
            return lifted.apply(hk.lift(lifted.init, name=name)(key, x), x)

        def whole(x):
            return hk_stack.layer_stack(3, name="layers")(layer)(layer(x))

        model, params = made(whole)
        assert hk_stack.layer_axes(model.apply, params, X) == {
            f"{name}/inner/linear": {"b": 1, "w": 1},
            f"layers/{name}/inner/linear": {"b": 2, "w": 2},
        }

    def test_under_transformations(self):
        def run(x):
            stack = hk_stack.layer_stack(2, name="layers")(inner)
            return hk.remat(hk.vmap(stack, split_rng=False))(x)

        model, params = made(run)
        apply = jax.jit(model.apply)
        apply(zeros(params), X)  # It must be traced again.
        for fn in (apply, jax.grad(lambda *args: jnp.sum(apply(*args)))):
            axes = hk_stack.layer_axes(fn, params, X)
            assert axes == {"layers/linear": {"b": 1, "w": 1}}

    def test_mistakes(self):
        model, params = made(nested)
        axes = hk_stack.layer_axes
        mistake("no function", lambda: axes(3, params), "expected a function, not int")
        mistake("init", lambda: axes(model.init, jax.random.key(0), X), "not its init")
        others = {"params": params}
        others["state"] = jax.tree.map(lambda leaf: leaf[..., 0], zeros(params))
        mistake(
            "other axes",
            lambda: axes(lambda t, x: model.apply(t["params"], x), others, X),
            "has shape .4, 2., and in the stack that reads it 3 axes",
        )
        ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), zeros(params))
        mistake(
            "vmap",
            lambda: axes(lambda p: jax.vmap(model.apply, (0, None))(p, X), ensemble),
            "with no axes of a jax.vmap",
        )
        mistake(
            "elsewhere",
            lambda: axes(lambda x, params: model.apply(params, x), X, params),
            "is not in `params`",
        )
        mistake("no stack", lambda: axes(lambda p: p, params), "calls no stack")


def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


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
            ({"": P()}, {}, "expected a text and a"),
            ({"w": P(P.UNCONSTRAINED)}, {}, "leaves an axis UNCONSTRAINED"),
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
        mistake(
            "",
            lambda: run({"w": X}, {}, mesh, layer_axes={"w": -1}),
            "found -1 at w",
        )
        mistake("", lambda: run({"w": X}, {}, mesh, layers="data"), "where layers are")
        three = {"w": jnp.ones([3, 4])}
        mistake(
            "",
            lambda: run(three, {"w": P()}, mesh, layer_axes={"w": 1}, layers="data"),
            "layers='data' asks for it. .* or leave `layers` out",
        )
        mistake(
            "",
            lambda: run({"w": X}, {"w": P("data")}, mesh, layer_axes={"a": {"w": 1}}),
            "layer_axes knows none of the leaves: it has a/w, the tree has w",
        )
        mistake(
            "",
            lambda: run({"w": X}, {}, mesh, layer_axes={"a": 1}, layers="data"),
            "layer_axes knows none of the leaves",
        )

    def test_what_an_optimiser_keeps_in_another_shape_or_not_at_all(self, mesh):
        params = {"w": jnp.ones([2, 4, 4])}
        rules, axes = {"w": P("data")}, {"w": 1}
        factored = optax.adafactor(1e-3, min_dim_size_to_factor=2)
        state = hk_stack.per_layer(factored, axes).init(params)

        def placed(tree, rules):
            return hk_stack.shardings(tree, rules, mesh, layer_axes=axes).tree

        own = "give this leaf a rule of its own, before that: {'0/v/w': None, ...}"
        mistake("", lambda: placed(state, rules), re.escape(own))
        tree = placed(state, {"v/*": None, **rules})
        assert tree[0].v_row["w"].spec == P(None, "data")
        nothing = optax.sgd(1.0).init(params)
        together = r"The leaves are: none. .* give both: shardings\(\(params, state\)"
        mistake("", lambda: placed(nothing, rules), together)
        assert placed((params, nothing), rules)[0]["w"].spec == P(None, "data")

    def test_leaves_and_meshes_of_all_kinds(self, mesh):
        keys = jax.random.split(jax.random.key(0), 4)
        tree = {"keys": keys, "none": jnp.ones([0, 4]), "number": 1.0, "w": X}
        both = P(("data", "stage"))
        rules = {"keys": both, "none": both, "w": P("data", None)}
        placed = hk_stack.shardings(tree, rules, mesh)
        for leaf in placed.leaves:
            found = jax.device_put(tree[leaf.path], placed.tree[leaf.path])
            bytes_there = found.addressable_shards[0].data.nbytes
            assert leaf.bytes_per_device == bytes_there
        abstract = jax.sharding.AbstractMesh((2, 2), ("data", "stage"))
        assert str(hk_stack.shardings(tree, rules, abstract)) == str(placed)
