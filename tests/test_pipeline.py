"""Pipelines: layers in stages on devices of their own, against a loop in Python."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import FAST, assert_close, assert_equal
from hlo import collectives
from interpreter import computed
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_cases import CASES, D, by_name, layer_loop, normal, slow, weight
from test_layer_stack import KEY, everything

import hk_stack

ROWS = 6
UNFIT = {
    "weak": "leading batch axis",
    "weak_integer": "leading batch axis",
    "reverse": "reverse=True",
    "per_layer_no_output": "reverse=True",
    "per_layer_reverse": "reverse=True",
}
FIT = [case for case in CASES if case.name not in UNFIT]


def mesh_of(**sizes):
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds)


def pipeline(microbatches=2):
    return hk_stack.Pipeline("stage", microbatches)


def wide(case):
    """`case` with a batch of ROWS."""

    def rows(leaf):
        leaf = jnp.concatenate([leaf] * (ROWS // 2))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        scale = jnp.linspace(0.5, 1.5, len(leaf)).astype(leaf.dtype)
        return leaf * scale.reshape(-1, *[1] * (leaf.ndim - 1))

    return case._replace(inputs=lambda: jax.tree.map(rows, case.inputs()))


@functools.cache
def looped(name, microbatches):
    """What a Python loop finds: parameters and state, results and gradients."""
    case = wide(by_name[name])
    model = case.model(layer_loop, microbatches=microbatches)
    start = computed(model.init, KEY, *case.given())
    return start, computed(everything(model), *start, KEY, case.given())


def found(case, microbatches, run, **options):
    start, _ = looped(case.name, microbatches)
    case = wide(case)
    split = pipeline(microbatches)
    model = case.model(hk_stack.layer_stack, pipeline=split, **options)
    return run(everything(model), *start, KEY, case.given())


def compiled(function, *args):
    return jax.jit(function, compiler_options=FAST)(*args)


def in_turn(case, microbatches):
    way = [{}, {"loop": "python"}, {"loop": "unrolled"}][CASES.index(case) % 3]
    expected = looped(case.name, microbatches)[1]
    assert_close(found(case, microbatches, computed, **way), expected, 1e-4)


def in_stages(case, microbatches, expected):
    with jax.set_mesh(mesh_of(stage=case.num_layers)):
        assert_close(found(case, microbatches, compiled), expected, 1e-4)


DIAGONAL = {
    "nested_thrice": 6,
    "per_layer": 3,
    "mixed_precision": 3,
    "integers": 6,
    "pytree_carry": 2,
    "batch_norm_train": 1,
    "empty_features": 3,
}


@pytest.mark.parametrize("name", [*DIAGONAL, "dropout", "counter", "one_layer_setup"])
def test_without_a_mesh_microbatches_run_in_turn(name):
    in_turn(by_name[name], DIAGONAL.get(name, 3))


@pytest.mark.parametrize("name", DIAGONAL)
def test_stages(name):
    in_stages(by_name[name], DIAGONAL[name], looped(name, DIAGONAL[name])[1])


@pytest.mark.long
@pytest.mark.parametrize("microbatches", [1, 3, 6])
@pytest.mark.parametrize("case", FIT, ids=lambda case: case.name)
def test_all_cases(case, microbatches):
    in_turn(case, microbatches)
    # Some are so steep that one compiler and another differ more.
    in_stages(case, microbatches, found(case, microbatches, compiled))


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_piped(name):
    case = wide(by_name[name]) if "weak" not in name else by_name[name]
    model = case.model(hk_stack.layer_stack, pipeline=pipeline())
    with pytest.raises(ValueError, match=UNFIT[name]):
        jax.eval_shape(model.init, KEY, *case.given())


LAYERS, BATCH = 4, 8


def layer(x):
    return jnp.tanh(x @ slow(weight()))


def model(layer=layer, microbatches=4, num_layers=LAYERS, **options):
    split = None if microbatches is None else pipeline(microbatches)
    stack = hk_stack.layer_stack(num_layers, pipeline=split, name="s", **options)
    return hk.without_apply_rng(hk.transform(lambda *args: stack(layer)(*args)))


X = normal(3, BATCH, D)
PARAMS = {"s/~": {"w": 0.3 * normal(4, LAYERS, D, D)}}


def loss(params, x, **options):
    return jnp.mean(model(**options).apply(params, x) ** 2)


@functools.cache
def program(layers, batch, **sizes):
    """A gradient, compiled for a mesh, and its shardings."""
    mesh = mesh_of(**sizes)
    put = functools.partial(jax.device_put)
    params = jax.tree.map(lambda p: put(p, NamedSharding(mesh, layers)), PARAMS)
    with jax.set_mesh(mesh):
        x = put(X, NamedSharding(mesh, batch))
        run = jax.jit(jax.grad(loss)).lower(params, x).compile(FAST)
    return run, run(params, x)


class TestPrograms:
    @pytest.mark.parametrize(
        ("layers", "batch", "sizes"),
        [
            (P("stage"), P(), {"stage": 4}),
            (P("stage"), P("data"), {"data": 2, "stage": 2}),
            (P("stage", None, "data"), P("data"), {"stage": 2, "data": 2}),
        ],
        ids=["stages", "and data", "and shards"],
    )
    def test_gradients_are_where_the_layers_are(self, layers, batch, sizes):
        run, gradients = program(layers, batch, **sizes)
        assert_close(gradients, jax.grad(loss)(PARAMS, X, microbatches=None))
        found = collectives(run)
        permutes = [c for c in found if c.kind == "collective-permute"]
        ticks = 4 + sizes["stage"] - 1
        assert [c.times for c in permutes] == [ticks, ticks]  # One in each pass.
        if "data" not in str(layers):
            assert not [c for c in found if c.kind == "all-gather"]
        assert gradients["s/~"]["w"].sharding.spec == layers

    def test_work_is_that_of_the_ticks(self):
        def operations(eqns):
            for eqn in eqns:
                times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
                if eqn.primitive.name == "dot_general":
                    yield eqn.outvars[0].aval.size
                # Of a conditional, what it does if there is work.
                for inner in jaxprs.bodies(eqn):
                    yield from (times * n for n in operations(inner.eqns))

        def work(**options):
            options = {"layer": lambda x: jnp.tanh(x @ weight()), **options}
            traced = jax.make_jaxpr(functools.partial(loss, **options))(PARAMS, X)
            return sum(operations(traced.jaxpr.eqns))

        whole = work(microbatches=None)
        for stages, microbatches in [(2, 2), (4, 4), (4, 8)]:
            with jax.set_mesh(mesh_of(stage=stages)):
                share = stages * work(microbatches=microbatches) / whole
            expected = (microbatches + stages - 1) / microbatches
            assert share == pytest.approx(expected, rel=0.1)

    def test_setup_runs_once_for_all_microbatches(self):
        with jax.set_mesh(mesh_of(stage=2)):
            traced = jax.make_jaxpr(loss)(PARAMS, X)
        [stage] = [
            e for e in jaxprs.equations(traced.jaxpr) if "shard_map" in str(e.primitive)
        ]
        [body] = jaxprs.bodies(stage)
        assert "cumsum" in jaxprs.outside(body, 5)
        assert "cumsum" not in jaxprs.names(jaxprs.body(body, 5))

    def test_outside_of_jit_it_is_compiled_once(self, count_of_compilations):
        with jax.set_mesh(mesh_of(stage=4)):
            first = jax.grad(loss)(PARAMS, X)
            count_of_compilations.clear()
            again = jax.grad(loss)(PARAMS, X)
        assert not count_of_compilations
        assert_equal(first, again)


def test_stages_that_wait_make_no_nan():
    def deep(x):
        # Only what went through the layers before is no less than the index.
        return (
            jnp.sqrt(x - jnp.float32(hk_stack.layer_index())) + 5.0 + jnp.sum(weight())
        )

    def total(params, x):
        return jnp.sum(model(deep).apply(params, x))

    params = {"s/~": {"w": jnp.zeros([LAYERS, D, D])}}
    with jax.set_mesh(mesh_of(stage=4)):
        gradients = jax.jit(jax.grad(total))(params, jnp.full([BATCH, D], 0.5))
    assert np.isfinite(gradients["s/~"]["w"]).all()


def test_what_stages_do_together_they_do_at_once():
    """XLA has all of them pass something on, to split what is spread elsewhere."""

    def gated(x):
        init = hk.initializers.RandomNormal(0.3)
        w = hk.get_parameter("w", [D, 2 * D], init=init)
        a, b = jnp.split(x @ w, 2, -1)
        return x + jax.nn.silu(a) * b

    params = {"s/~": {"w": 0.3 * normal(4, LAYERS, D, 2 * D)}}
    of = functools.partial(loss, layer=gated)
    mesh = mesh_of(stage=2, data=2)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("stage", None, "data"))
        put = jax.tree.map(lambda p: jax.device_put(p, place), params)
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        run = jax.jit(jax.grad(of)).lower(put, x).compile(FAST)
        permutes = [c for c in collectives(run) if c.kind == "collective-permute"]
        assert len(permutes) > 2
        found = run(put, x)
    assert_close(found, jax.grad(of)(params, X, microbatches=None))


def test_setup_that_is_spread_over_the_same_axis_around():
    with jax.set_mesh(mesh_of(stage=2)):
        apply = hk_stack.setup_first(model().apply, setup_sharding="stage")
        assert_close(jax.jit(apply)(PARAMS, X), jax.jit(model().apply)(PARAMS, X))


def test_taps_and_what_is_added_to_them_have_microbatches():
    def tapped(x):
        return jnp.tanh(hk_stack.tap(x @ weight(), "h"))

    shift = {"s/h": 0.1 * normal(7, LAYERS, 4, BATCH // 4, D)}
    collect = hk_stack.collect(model(tapped).apply, add=shift)
    with hk_stack.use_loop("python"):
        expected = collect(PARAMS, X)
    with jax.set_mesh(mesh_of(stage=4)):
        out, taps = jax.jit(collect)(PARAMS, X)
    assert_close((out, taps), expected)
    assert jax.tree.map(jnp.shape, taps) == {"s/h": (LAYERS, 4, BATCH // 4, D)}


def test_a_check_names_the_layer():
    params = jax.tree.map(lambda p: p.at[2].set(jnp.nan), PARAMS)
    with (
        jax.set_mesh(mesh_of(stage=4)),
        pytest.raises(Exception, match=r"parameter ~/w, in layer 2 of layer_stack 's'"),
    ):
        model(check_finite=True).apply(params, X)


def test_summary_tells_of_stages():
    with jax.set_mesh(mesh_of(stage=2)):
        summary = hk_stack.summary(model().apply, PARAMS, X)
    assert "4 microbatches, 2 stages of 2 layers each" in str(summary)
    assert summary.stacks[0].batch == 2
    summary = hk_stack.summary(model().apply, PARAMS, X)
    assert "4 microbatches, no mesh axis for stages" in str(summary)


class TestErrors:
    @staticmethod
    def refused(match, mesh=None, x=X, layer=layer, **options):
        mesh = mesh or mesh_of(stage=2)
        with jax.set_mesh(mesh), pytest.raises((TypeError, ValueError), match=match):
            jax.eval_shape(model(layer, **options).apply, PARAMS, x)

    def test_no_number_of_layers_that_fits(self):
        self.refused("4 layers cannot be split evenly over the 3", mesh_of(stage=3))

    def test_no_batch_that_fits(self):
        self.refused("batch of 8 cannot be cut into microbatches=3", microbatches=3)

    def test_an_array_of_the_batch_closed_over(self):
        mask = jnp.ones([BATCH, 1], bool)
        rows = r"shape \(8, 1\), with a row"
        self.refused(rows, layer=lambda x: jnp.where(mask[:2], x, 0))
        with pytest.raises(ValueError, match="broadcasting") as found:
            jax.eval_shape(model(lambda x: jnp.where(mask, x, 0)).apply, PARAMS, X)
        assert "a layer is given a microbatch" in " ".join(found.value.__notes__)

    def test_an_array_of_the_batch_by_keyword(self):
        stack = hk_stack.layer_stack(LAYERS, pipeline=pipeline(), name="s")
        apply = hk.transform(lambda x, m: stack(lambda x, m: x * m)(x, m=m)).apply
        with pytest.raises(ValueError, match=r"`m` has shape \(8, 1\), with a row"):
            jax.eval_shape(apply, {}, None, X, jnp.ones([BATCH, 1], bool))

    def test_state_of_another_type_afterwards(self):
        def counting(x):
            count = hk.get_state("count", [], jnp.int32, init=jnp.zeros)
            hk.set_state("count", count.astype(jnp.float32) + 1.5)
            return x

        stack = hk_stack.layer_stack(LAYERS, pipeline=pipeline(), name="s")
        both = hk.transform_with_state(lambda x: stack(counting)(x))
        with pytest.raises(ValueError, match=r"count as int32\[\] and leaves float32"):
            jax.eval_shape(both.init, None, X)

    def test_types_of_a_map_around_would_be_lost(self):
        @jax.shard_map(in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
        def manual(x):
            return model().apply(PARAMS, x)

        with (
            jax.set_mesh(mesh_of(stage=2, data=2)),
            pytest.raises(ValueError, match="shard_map check_vma=False"),
        ):
            jax.eval_shape(manual, X)

    def test_one_in_another(self):
        def outer(x):
            return hk_stack.layer_stack(2, pipeline=pipeline(), name="in")(layer)(x)

        self.refused("runs in a layer of layer_stack 's'", layer=outer)

    def test_axes_of_other_kinds(self):
        mesh = jax.make_mesh((2,), ("stage",))
        self.refused(r"of type Explicit.*AxisType\.Auto", mesh)

        @jax.shard_map(in_specs=P(), out_specs=P(), mesh=mesh_of(stage=2))
        def manual(x):
            return model().apply(PARAMS, x)

        with pytest.raises(ValueError, match="shard_map around has taken it"):
            jax.eval_shape(manual, X)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"pipeline": ("stage", 2)}, r"Write pipeline=hk_stack\.Pipeline\("),
            ({"pipeline": pipeline(), "setup_sharding": "stage"}, "set up their own"),
            (
                {
                    "pipeline": pipeline(),
                    "transparent": True,
                    "transparency_map": hk_stack.NumberedLayers("layer"),
                },
                "one stacked tree",
            ),
        ],
    )
    def test_options_that_do_not_fit(self, options, match):
        with pytest.raises((TypeError, ValueError), match=match):
            hk_stack.layer_stack(4, **options)

    def test_no_pipeline(self):
        with pytest.raises(TypeError, match="axis must be the name"):
            hk_stack.Pipeline(None, 2)
        with pytest.raises(ValueError, match="microbatches"):
            hk_stack.Pipeline("stage", 0)
