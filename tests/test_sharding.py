"""Stacks on several devices: the same results, wherever Haiku's stack gives any."""

import functools
from typing import ClassVar

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import pytest
from agreement import FAST, assert_close
from interpreter import computed
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_cases import D, attention, mlp, normal, shared_setup, slow, weight

import hk_stack

LAYERS = 4
KEY = jax.random.key(2)
DEVICES = len(jax.devices())


def short(x):
    return jnp.tanh(x @ slow(weight()))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((DEVICES,), ("b",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def explicit_mesh():
    return jax.make_mesh((DEVICES,), ("b",), axis_types=(AxisType.Explicit,))


def make(layer_stack, layer):
    return hk.without_apply_rng(hk.transform(layer_stack(LAYERS, name="stack")(layer)))


def models(layer):
    return make(hk_stack.layer_stack, layer), make(hk.layer_stack, layer)


def compiled(run, *args):
    return jax.jit(run, compiler_options=FAST)(*args)


def both(model, params, x, evaluate=compiled):
    """Output and gradients."""

    def run(params, x):
        def total(params, x):
            y = model.apply(params, x)
            return jnp.sum(jnp.cos(y)), y

        return jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)

    return evaluate(run, params, x)


def inputs():
    return normal(0, 8, D)


@pytest.mark.parametrize("spec", [P(), P("b"), P(None, None, "b")], ids=str)
def test_shardings_of_parameters_and_batch(mesh, spec):
    ours, theirs = models(short)
    x = inputs()
    params = computed(ours.init, KEY, x)
    expected = both(theirs, params, x, computed)
    sharded = jax.device_put(params, NamedSharding(mesh, spec))
    batch = jax.device_put(x, NamedSharding(mesh, P("b")))
    assert_close(both(ours, sharded, batch), expected)
    assert_close(ours.apply(sharded, batch), expected[1])  # compiled by the stack


@pytest.mark.parametrize("spec", [P(None, None, "b"), P("b")], ids=str)
def test_initial_parameters_in_shards(mesh, spec):
    ours, theirs = models(short)
    sharding = NamedSharding(mesh, spec)
    params = jax.jit(ours.init, out_shardings=sharding)(KEY, inputs())
    assert params["stack/~"]["w"].sharding == sharding
    assert_close(params, computed(theirs.init, KEY, inputs()))


def test_initialisation_takes_little_beside_a_share_of_the_parameters(mesh):
    def layer(x):
        return jnp.tanh(hk.Linear(256)(x))

    model = hk.transform(hk_stack.layer_stack(32)(layer))
    init = jax.jit(
        model.init,
        out_shardings=NamedSharding(mesh, P(None, "b")),
        compiler_options=FAST,
    )
    x = jax.ShapeDtypeStruct([1, 256], jnp.float32)
    memory = init.lower(KEY, x).compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.01 / DEVICES * 4 * 32 * (256 + 1) * 256
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 4


def test_constraints_inside_the_layer(mesh):
    def layer(x):
        w = jax.lax.with_sharding_constraint(
            weight(), NamedSharding(mesh, P(None, "b"))
        )
        y = jnp.tanh(x @ slow(w))
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("b")))

    ours, theirs = models(layer)
    params = jax.jit(ours.init)(KEY, inputs())
    assert_close(both(ours, params, inputs()), both(theirs, params, inputs()))
    assert_close(ours.apply(params, inputs()), theirs.apply(params, inputs()))


def test_constraints_in_the_mesh_around(mesh):
    def layer(x):
        return jax.lax.with_sharding_constraint(short(x), P("b"))

    ours, theirs = models(layer)
    with jax.set_mesh(mesh):
        params = jax.jit(ours.init)(KEY, inputs())
        assert_close(both(ours, params, inputs()), both(theirs, params, inputs()))
        assert_close(ours.apply(params, inputs()), theirs.apply(params, inputs()))


def mean(x):
    return jax.lax.pmean(x, "b")


def centered(x):
    y = short(x)
    return y - mean(y)


def numbered(x):
    return short(x) * (1 + jax.lax.axis_index("b").astype(x.dtype))


@pytest.mark.parametrize(
    ("layer", "check_vma"),
    [
        (short, True),
        (shared_setup, False),
        (centered, True),
        (centered, False),
        (numbered, True),
    ],
)
def test_in_shard_map_over_the_batch(mesh, layer, check_vma):
    params = computed(make(hk_stack.layer_stack, short).init, KEY, inputs())

    def mapped(model):
        apply = jax.shard_map(
            model.apply,
            mesh=mesh,
            in_specs=(P(), P("b")),
            out_specs=P("b"),
            check_vma=check_vma,
        )
        return model._replace(apply=apply)

    ours, theirs = map(mapped, models(layer))
    assert_close(both(ours, params, inputs()), both(theirs, params, inputs()))


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_with_setup_across_devices(mesh, check_vma):
    """Tensor parallelism: each device has some columns, and setup adds them up."""

    def layer(x):
        init = hk.initializers.RandomNormal(0.3)
        w = hk.get_parameter("w", [D, D // DEVICES], init=init)
        norm = jnp.sqrt(jax.lax.psum(jnp.sum(w**2), "b"))
        y = jnp.sum(x @ (w / norm), axis=1, keepdims=True)
        return jnp.tanh(x + jax.lax.psum(y, "b"))

    params = {"stack/~": {"w": normal(3, LAYERS, D, D)}}

    def mapped(model):
        apply = jax.shard_map(
            model.apply,
            mesh=mesh,
            in_specs=(P(None, None, "b"), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
        return model._replace(apply=apply)

    ours, theirs = map(mapped, models(layer))
    assert_close(both(ours, params, inputs()), both(theirs, params, inputs()))


def test_init_in_shard_map(mesh):
    def run(model):
        init = jax.shard_map(
            lambda x: model.init(KEY, x), mesh=mesh, in_specs=P("b"), out_specs=P()
        )
        return jax.jit(init)(inputs())

    ours, theirs = models(short)
    assert_close(run(ours), computed(theirs.init, KEY, inputs()))


def test_shard_map_inside_the_layer(mesh):
    def layer(x):
        run = jax.shard_map(
            lambda w, x: jnp.tanh(x @ slow(w)),
            mesh=mesh,
            in_specs=(P(), P("b")),
            out_specs=P("b"),
        )
        return run(weight(), x)

    ours, theirs = models(layer)
    params = jax.jit(ours.init)(KEY, inputs())
    assert_close(both(ours, params, inputs()), both(theirs, params, inputs()))


@pytest.mark.parametrize("layer", [short, mlp, shared_setup])
def test_in_an_explicit_mesh(explicit_mesh, layer):
    ours, theirs = models(layer)
    params = theirs.init(KEY, inputs())
    with jax.set_mesh(explicit_mesh):
        x = jax.device_put(inputs(), NamedSharding(explicit_mesh, P("b", None)))
        try:
            expected = both(theirs, params, x)
        except Exception as error:
            if type(error).__name__ != "ShardingTypeError":
                raise
            pytest.skip("this JAX cannot take this gradient of hk.layer_stack either")
        found = both(ours, params, x)
        assert jax.typeof(found[1]) == jax.typeof(expected[1])
        assert_close(found, expected)
        assert_close(jax.jit(ours.init)(KEY, x), params)


def test_layer_sees_its_explicit_sharding(explicit_mesh):
    seen = set()

    def layer(x):
        if not hk.running_init():
            seen.add(jax.typeof(x).sharding.spec)
        return jnp.tanh(x @ slow(weight()))

    ours, _ = models(layer)
    params = ours.init(KEY, inputs())
    seen.clear()
    with jax.set_mesh(explicit_mesh):
        x = jax.device_put(inputs(), NamedSharding(explicit_mesh, P("b", None)))
        jax.jit(ours.apply)(params, x)
    assert seen == {P("b", None)}


def test_explicitly_sharded_parameters(explicit_mesh):
    def layer(x):
        y = jnp.tanh(x @ slow(weight()))
        return jax.sharding.reshard(y, P(None, None))

    ours, theirs = models(layer)
    with jax.set_mesh(explicit_mesh):
        params = theirs.init(KEY, inputs())
        sharding = NamedSharding(explicit_mesh, P(None, None, "b"))
        params = jax.device_put(params, sharding)
        assert_close(both(ours, params, inputs()), both(theirs, params, inputs()))


def test_collectives_over_a_vmapped_axis():
    def layer(x):
        w = weight()
        return jnp.tanh(x @ (w / mean(jnp.linalg.norm(w)))) - mean(x)

    params = jax.vmap(make(hk_stack.layer_stack, short).init, (0, None))(
        jax.random.split(KEY, 2), inputs()
    )
    found, expected = (
        jax.jit(jax.vmap(model.apply, (0, None), axis_name="b"))(params, inputs())
        for model in models(layer)
    )
    assert_close(found, expected)


def test_spmd_axis_name(mesh):
    ours, theirs = models(attention)
    x = normal(0, DEVICES, 1, 6, D)
    params = theirs.init(KEY, x[0])
    with jax.set_mesh(mesh):
        found, expected = (
            jax.jit(jax.vmap(model.apply, (None, 0), spmd_axis_name="b"))(params, x)
            for model in (ours, theirs)
        )
    assert_close(found, expected)


class TestReuse:
    """`partition` and `accumulate`, with the batch on several devices."""

    def setup_method(self):
        self.model, _ = models(short)
        self.params = computed(self.model.init, KEY, inputs())
        self.batches = normal(1, 3, 8, D)
        loss = jax.value_and_grad(self.loss)
        results = [computed(loss, self.params, x) for x in self.batches]
        self.expected = jax.tree.map(lambda *leaves: sum(leaves) / 3, *results)

    def loss(self, params, x):
        return jnp.mean(self.model.apply(params, x) ** 2)

    def test_accumulate_in_shard_map(self, mesh):
        def loss(params, x):
            return jax.lax.pmean(self.loss(params, x), "b")

        specs = {"in_specs": (P(), P(None, "b")), "out_specs": P()}
        run = functools.partial(hk_stack.accumulate, loss)
        found = jax.jit(jax.shard_map(run, mesh=mesh, **specs))
        assert_close(found(self.params, self.batches), self.expected)

    @pytest.mark.parametrize("kind", ["mesh", "explicit_mesh"])
    def test_sharded_batches(self, kind, request):
        mesh = request.getfixturevalue(kind)
        with jax.set_mesh(mesh):
            params = jax.device_put(self.params, NamedSharding(mesh, P()))
            batches = jax.device_put(self.batches, NamedSharding(mesh, P(None, "b")))
            run = jax.jit(functools.partial(hk_stack.accumulate, self.loss))
            assert_close(run(params, batches), self.expected)
            split = hk_stack.partition(self.model.apply, params, batches[0])
            y = split.call(split.setup(params), batches[0])
        assert y.sharding.spec[0] == "b"
        assert_close(y, self.model.apply(self.params, self.batches[0]))


@pytest.fixture(scope="module")
def grid():
    """A mesh of which a `shard_map` may take one axis."""
    return jax.make_mesh((2, DEVICES // 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def with_a_scan(x):
    w = weight()

    def turn(x, _):
        return jnp.tanh(x @ slow(w)), None

    return jax.lax.scan(turn, x, None, length=2)[0]


def with_a_cond(x):
    """Branches of the layer's index, each with values of its own to hoist."""
    w = weight()
    branches = [
        lambda x: x @ hk_stack.hoist(jnp.tanh(w)),
        lambda x: x @ hk_stack.hoist(slow(w)) * jnp.sum(hk_stack.hoist(jnp.sin(w))),
    ]
    return jax.lax.switch(hk_stack.layer_index() % 2, branches, x)


class TestShardMap:
    """Values that differ over a manual axis of a mesh whose other axes are not."""

    ways: ClassVar[dict] = {
        "scan": {},
        "unrolled": {"loop": "unrolled"},
        "python": {"loop": "python"},
        "remat": {"loop": "unrolled", "remat": True, "remat_every": 3},
    }
    layers: ClassVar[dict] = {
        "short": short,
        "a scan": with_a_scan,
        "a cond": with_a_cond,
    }

    def params(self, layer):
        model = make(hk_stack.layer_stack, layer)
        keys = map(jax.random.key, range(2))
        both = [computed(model.init, key, inputs()) for key in keys]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)

    def sharded(self, run, mesh, x):
        def on_one(params, x):
            return run(jax.tree.map(lambda leaf: leaf[0], params), x)

        specs = {"in_specs": (P("a"), x), "out_specs": P("a"), "axis_names": {"a"}}
        return jax.jit(jax.shard_map(on_one, mesh=mesh, **specs))

    def on_each(self, run, params, batches):
        """The same on one device: each half of the parameters with its batch."""
        results = [
            computed(run, jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
            for i, x in enumerate(batches)
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)

    @pytest.mark.parametrize(
        ("way", "layer", "spec"),
        [
            ("scan", "short", P()),
            ("scan", "a scan", P("a")),  # Whose own carry may not begin to differ.
            ("scan", "a cond", P()),
            ("unrolled", "short", P("a")),
            ("python", "a scan", P("a")),
            ("python", "a cond", P()),
            ("remat", "short", P()),
            ("remat", "a scan", P("a")),
        ],
        ids=str,
    )
    def test_layers(self, layer, spec, way, grid):
        layer = self.layers[layer]
        apply = make(
            functools.partial(hk_stack.layer_stack, **self.ways[way]), layer
        ).apply
        plain = make(
            functools.partial(hk_stack.layer_stack, setup="inline"), layer
        ).apply
        params, x = self.params(layer), inputs()
        batches = [x, x] if spec == P() else [x[:4], x[4:]]
        run = self.sharded(apply, grid, spec)
        assert_close(run(params, x), self.on_each(plain, params, batches))

        def loss(run):
            return lambda params, x: jnp.sum(jnp.sin(run(params, x)))

        found = jax.grad(loss(run))(params, x)
        each = self.on_each(jax.grad(loss(plain)), params, batches)
        expected = jax.tree.map(lambda p, leaf: leaf.reshape(p.shape), params, each)
        assert_close(found, expected)

    def test_initial_values(self, grid):
        model = make(hk_stack.layer_stack, short)
        keys = jax.random.split(KEY, 2)
        found = self.sharded(model.init, grid, P("a"))(keys, inputs())
        assert_close(found, self.on_each(model.init, keys, [inputs()] * 2))

    @pytest.mark.parametrize("layer", layers)
    def test_reuse_and_taps(self, layer, grid):
        apply = make(hk_stack.layer_stack, self.layers[layer]).apply

        def tapped(params, x):
            return hk_stack.tap(apply(params, x), "end")

        def run(params, x):
            split = hk_stack.partition(apply, params, x)
            _, taps = hk_stack.collect(tapped)(params, x)
            return split.call(split.setup(params), x) + taps["end"]

        def plain(params, x):
            return 2 * apply(params, x)

        params, x = self.params(self.layers[layer]), inputs()
        found = self.sharded(run, grid, P("a"))(params, x)
        assert_close(found, self.on_each(plain, params, [x[:4], x[4:]]))


class TestExplicitMesh:
    def test_a_cond_on_the_index(self, explicit_mesh):
        """Values of one shape that are sharded on different axes share no room."""

        def layer(x):
            w = weight()
            branches = [
                lambda x: x * jnp.sum(hk_stack.hoist(jnp.tanh(w))),
                lambda x: x - jnp.sum(hk_stack.hoist(jnp.sin(w).T)),
            ]
            return jax.lax.switch(hk_stack.layer_index() % 2, branches, x)

        model = make(hk_stack.layer_stack, layer)
        params, x = model.init(KEY, inputs()), inputs()
        expected = both(model, params, x)
        with jax.set_mesh(explicit_mesh):
            batch = jax.device_put(x, NamedSharding(explicit_mesh, P("b")))
            spec = NamedSharding(explicit_mesh, P(None, None, "b"))
            params = jax.device_put(params, spec)
            assert_close(both(model, params, batch), expected)

    def test_parameters_sharded_by_layer(self, explicit_mesh):
        model = make(hk_stack.layer_stack, short)
        params, x = model.init(KEY, inputs()), inputs()
        expected = model.apply(params, x)
        with jax.set_mesh(explicit_mesh):
            x = jax.device_put(x, NamedSharding(explicit_mesh, P()))
            params = jax.device_put(params, NamedSharding(explicit_mesh, P("b")))
            advice = r"jax\.sharding\.reshard\(leaf, jax\.P\(None, None, None\)\)"
            with pytest.raises(ValueError, match=f"parameter ~/w .*{advice}"):
                model.apply(params, x)

            def whole(leaf):
                return jax.sharding.reshard(leaf, P(None, None, None))

            found = model.apply(jax.tree.map(whole, params), x)
        assert_close(found, expected)


class TestGathers:
    """Layers that gather their parameters, one at a time, on all devices."""

    width = 32

    def layers(self, mesh):
        def whole():
            shape = [self.width, self.width]
            w = hk.get_parameter("w", shape, init=hk.initializers.RandomNormal(0.1))
            return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

        def norm(w):
            u = jnp.ones(self.width)
            for _ in range(3):
                u = w @ (w.T @ u)
                u = u / jnp.linalg.norm(u)
            return u @ w @ u

        def unit(w):
            return w / norm(w)

        changes = {
            "bare": lambda w: w,
            "cheap": jnp.tanh,
            "as large": lambda w: jnp.linalg.inv(w + 3 * jnp.eye(self.width)),
            "small": unit,
        }
        return {
            name: lambda x, change=change: x + jnp.tanh(x @ change(whole()))
            for name, change in changes.items()
        }

    def sharded(self, mesh, name, **options):
        stack = functools.partial(hk_stack.layer_stack, **options)
        model = make(stack, self.layers(mesh)[name])
        params = model.init(KEY, self.inputs())
        return model, jax.device_put(params, NamedSharding(mesh, P(None, "b")))

    def inputs(self):
        return normal(0, 8, self.width)

    @pytest.mark.parametrize("name", ["bare", "cheap", "as large", "small"])
    def test_are_not_the_last_step_of_setup(self, mesh, name):
        model, params = self.sharded(mesh, name)
        split = hk_stack.partition(model.apply, params, self.inputs())
        derived = split.setup(params)
        assert_close(
            split.call(derived, self.inputs()), model.apply(params, self.inputs())
        )
        here = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(derived)
        )
        share = 4 * LAYERS * self.width**2 // DEVICES
        assert here <= share + 4 * LAYERS * self.width

    def test_from_two_devices_stay_in_the_loop(self):
        devices = jax.devices()[:2]
        mesh = jax.make_mesh((2,), ("b",), (AxisType.Auto,), devices=devices)
        model = make(hk_stack.layer_stack, self.layers(mesh)["as large"])
        params = jax.eval_shape(model.init, KEY, self.inputs())
        jaxpr = jax.make_jaxpr(model.apply)(params, self.inputs()).jaxpr
        assert "lu" in jaxprs.names(jaxprs.body(jaxpr, LAYERS))

    @pytest.mark.parametrize("name", ["bare", "cheap", "as large", "small"])
    def test_take_no_more_memory_than_in_the_loop(self, mesh, name):
        def memory(**options):
            model, params = self.sharded(mesh, name, **options)
            compiled = jax.jit(model.apply).lower(params, self.inputs()).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert memory() <= 1.3 * memory(setup="inline")

    def test_a_marked_value_is_warned_of(self, mesh):
        def layer(x):
            sharding = NamedSharding(mesh, P())
            whole = jax.lax.with_sharding_constraint(weight(), sharding)
            return x @ hk_stack.hoist(jnp.tanh(whole))

        model = make(hk_stack.layer_stack, layer)
        params = model.init(KEY, inputs())
        assert not hk_stack.summary(model.apply, params, inputs()).warnings
        params = jax.device_put(params, NamedSharding(mesh, P(None, "b")))
        [warning] = hk_stack.summary(model.apply, params, inputs()).warnings
        expected = "derived values take 1.02 kB on each device, the parameters 256 B"
        assert f"stack: {expected}" in warning
