"""Setup spread over the devices of a mesh: less work on each, and the same results."""

import functools

import haiku as hk
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import FAST, assert_close
from interpreter import computed
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hk_stack

D, L = 16, 8
DEVICES = len(jax.devices())


def normal(*shape):
    """Made by NumPy, as JAX would compile this for each shape and mesh."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


X = normal(DEVICES, D)


def product(w):
    power = w
    for _ in range(6):
        power = jnp.tanh(w @ power)
    return power


def spectral(w):
    u = jnp.ones(D)
    for _ in range(3):
        u = w @ (w.T @ u)
        u = u / jnp.linalg.norm(u)
    return jnp.tanh(w) / (1 + jnp.linalg.norm(w @ u))


def recurrence(w):
    def turn(s, row):
        s = jnp.tanh(0.5 * s + row)
        return s, s @ w

    return jax.lax.scan(turn, jnp.ones(D), w)[1]


def randomly(w):
    return w @ jax.random.normal(jax.random.key(0), [D, D])


def other_key(w):
    key = jax.random.fold_in(jax.random.key(0, impl="rbg"), jnp.argmax(w))
    return w @ jax.random.normal(key, [D, D])


def several_values(w):
    """Of one number, of a vector, and of one of two branches."""
    norm = jnp.linalg.norm(w)
    made = jax.lax.cond(norm > 3, lambda w: product(w) / norm, product, w)
    return (made + 0.1 * jnp.tanh(norm)) * jnp.linalg.norm(w, axis=0)[None]


def columns(w):
    return product(jax.lax.with_sharding_constraint(w, P(None, "b")))


def layers(of=product, num_layers=L, **options):
    """A stack whose setup is `of`, and its parameters."""

    def layer(x):
        w = hk.get_parameter("w", [D, D], init=hk.initializers.Identity())
        scale = hk.get_parameter("scale", [], init=jnp.ones)
        index = hk_stack.layer_index().astype(x.dtype)
        return x + jnp.tanh(x @ (of(w * scale) / (1 + index)))

    stack = hk_stack.layer_stack(num_layers, name="layers", **options)(layer)
    return hk.without_apply_rng(hk.transform(stack)).apply


def parameters(num_layers=L):
    w = np.float32(0.2) * normal(num_layers, D, D)
    return {"layers/~": {"w": w, "scale": np.ones(num_layers, np.float32)}}


def loss_of(apply):
    def loss(params, x):
        y = apply(params, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.grad(loss, has_aux=True)


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("b",), axis_types=(kind,))


def grid_of(*kinds):
    return jax.make_mesh((2, DEVICES // 2), ("a", "b"), axis_types=kinds)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SPECS = {"replicated": P(), "by layer": P("b"), "in shards": P(None, "b")}


def placed(params, mesh, spec):
    """Matrices as the spec says; numbers of layers on all devices, or by layer."""
    return jax.tree.map(
        lambda p: jax.device_put(p, NamedSharding(mesh, P(*spec[: p.ndim]))), params
    )


def collectives(compiled):
    """Names of the collectives of a program: outside of its loops, and inside."""
    found = hlo.collectives(compiled)
    return tuple([c.kind for c in found if bool(c.depth) == is_in] for is_in in (0, 1))


class TestWork:
    """What each device does, from XLA's own analysis."""

    @staticmethod
    @functools.cache
    def compiled(spec, kind, num_layers=L, grad=False, **options):
        apply = layers(num_layers=num_layers, **options)
        run = loss_of(apply) if grad else apply
        with jax.set_mesh(mesh := mesh_of(kind)):
            params = placed(parameters(num_layers), mesh, SPECS[spec])
            return jax.jit(run).lower(params, X).compile(FAST)

    @pytest.mark.parametrize(
        ("spec", "kind", "grad"),
        [
            ("replicated", AUTO, False),
            ("replicated", AUTO, True),
            ("by layer", AUTO, True),
            ("replicated", EXPLICIT, True),
        ],
    )
    def test_operations_are_a_share(self, spec, kind, grad):
        # XLA counts the body of a loop once. With one batch setup is in no loop; the
        # loop of calls, which is the same in both programs, counts as one small layer.
        options = {"grad": grad, "setup_batch_size": L, "setup_remat": False}
        plain = self.compiled("replicated", AUTO, **options)
        spread = self.compiled(spec, kind, setup_sharding="b", **options)
        flops = [c.cost_analysis()["flops"] for c in (spread, plain)]
        assert flops[0] <= 1.2 / DEVICES * flops[1]

    @pytest.mark.parametrize(
        ("spec", "kind", "num_layers", "grad", "expected"),
        [
            # Parameters are moved before setup, once.
            ("in shards", AUTO, L, False, ["all-to-all", "all-gather"]),
            ("by layer", AUTO, L, True, ["all-gather"]),
            # Gradients of both parameters, too, which have to be whole.
            ("replicated", AUTO, L - 1, True, ["all-gather"] * 3),
            ("replicated", EXPLICIT, L, True, ["all-gather"] * 3),
        ],
    )
    def test_values_are_gathered_once(self, spec, kind, num_layers, grad, expected):
        options = {"setup_batch_size": 1, "setup_sharding": "b"}
        program = self.compiled(spec, kind, num_layers, grad, **options)
        # Of setup and of calls, in both passes.
        assert program.as_text().count(" while(") == 2 * (1 + grad)
        assert collectives(program) == (expected, [])

    def test_values_are_gathered_in_the_loop_otherwise(self):
        program = self.compiled("in shards", AUTO, setup_batch_size=1)
        assert "all-gather" in collectives(program)[1]


def compiled(run, *args):
    return jax.jit(run, compiler_options=FAST)(*args)


class TestResults:
    """They are those of the stack that is not spread, and so are gradients."""

    @pytest.mark.parametrize(
        ("of", "spec", "kind", "num_layers", "options"),
        [
            (spectral, "by layer", AUTO, 8, {"setup_batch_size": 1}),
            (recurrence, "in shards", AUTO, 8, {"setup_remat": True, "remat": True}),
            (several_values, "replicated", AUTO, 6, {"setup_batch_size": 2}),
            (randomly, "replicated", AUTO, 9, {"setup_batch_size": 2}),
            (several_values, "replicated", EXPLICIT, 7, {}),  # JAX has no rule for it.
            (product, "in shards", EXPLICIT, 9, {"setup_batch_size": 2}),
            (recurrence, "replicated", EXPLICIT, 3, {"loop": "unrolled"}),
        ],
    )
    def test_of_a_stack(self, of, spec, kind, num_layers, options):
        params = parameters(num_layers)
        expected = computed(loss_of(layers(of, num_layers)), params, X)
        with jax.set_mesh(mesh := mesh_of(kind)):
            apply = layers(of, num_layers, setup_sharding="b", **options)
            # As in data parallelism; what is in shards leaves no room for it.
            batch = P() if spec == "in shards" else P("b")
            x = jax.device_put(X, NamedSharding(mesh, batch))
            found = compiled(loss_of(apply), placed(params, mesh, SPECS[spec]), x)
        assert_close(found, expected)

    @pytest.mark.parametrize("kinds", [(EXPLICIT, AUTO), (AUTO, EXPLICIT)])
    def test_on_one_of_two_axes(self, kinds):
        """The other one has the batch."""
        params, x = parameters(5), normal(4, D)
        expected = computed(loss_of(layers(spectral, 5)), params, x)
        with jax.set_mesh(mesh := grid_of(*kinds)):
            apply = layers(spectral, 5, setup_sharding="b")
            params = placed(params, mesh, P())
            batch = jax.device_put(x, NamedSharding(mesh, P("a")))
            assert_close(compiled(loss_of(apply), params, batch), expected)

    @pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
    def test_under_vmap(self, kind):
        many = jax.tree.map(lambda p: np.stack([p, p / 2]), parameters(6))
        run = loss_of(layers(num_layers=6))
        expected = computed(jax.vmap(run, (0, None)), many, X)
        run = loss_of(layers(num_layers=6, setup_sharding="b"))
        with jax.set_mesh(mesh_of(kind)):
            assert_close(compiled(jax.vmap(run, (0, None)), many, X), expected)

    def test_of_a_setup_that_gathers(self):
        """It then gathers the layers of each device there."""
        mesh = mesh_of(AUTO)

        def whole(w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return w / (1 + jnp.linalg.norm(product(w)))

        params = parameters()
        expected = computed(loss_of(layers(whole)), params, X)
        with jax.set_mesh(mesh):
            params = placed(params, mesh, P(None, "b"))
            apply = layers(whole, setup_sharding="b", setup_batch_size=2)
            assert_close(compiled(loss_of(apply), params, X), expected)

    @pytest.mark.parametrize(
        ("of", "axis", "why"),
        [
            (product, "one", "there is one device"),
            (columns, "b", "it places values on 'b' itself"),
            (other_key, "b", "it draws with keys other than threefry's"),
        ],
        ids=["one device", "on this axis itself", "no batches"],
    )
    def test_where_it_does_nothing(self, of, axis, why):
        mesh = jax.make_mesh((1, DEVICES), ("one", "b"), axis_types=(AUTO, AUTO))
        with jax.set_mesh(mesh):
            spread, plain = (
                jax.make_jaxpr(layers(of, setup_sharding=axis))(parameters(), X)
                for axis in (axis, None)
            )
            stack = layers(of, setup_sharding=axis)
            [found] = hk_stack.summary(stack, parameters(), X).stacks
        assert str(spread) == str(plain)
        assert f"setup_sharding does nothing, as {why}" in found.notes

    def test_in_a_summary(self):
        with jax.set_mesh(mesh := mesh_of(AUTO)):
            params = placed(parameters(), mesh, P(None, "b"))
            apply = layers(setup_sharding="b")
            [found] = hk_stack.summary(apply, params, X).stacks
        assert found.derived_per_device == found.derived == 4 * L * D**2
        assert found.batch == L // DEVICES
        assert not found.notes

    def test_without_jit_on_one_mesh_after_the_other(self):
        run = layers(setup_sharding="b")
        expected = computed(layers(), parameters(), X)
        for mesh in (grid_of(AUTO, AUTO), mesh_of(EXPLICIT)):
            with jax.set_mesh(mesh):
                assert_close(run(parameters(), X), expected)

    def test_initial_values_need_no_mesh(self):
        def layer(x):
            return x @ product(hk.get_parameter("w", [D, D], init=jnp.ones))

        stack = hk_stack.layer_stack(L, setup_sharding="b")(layer)
        params = jax.eval_shape(hk.transform(stack).init, jax.random.key(0), X)
        assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(L, D, D)]


def nest(of, outer, inner):
    """Stacks of 3 in stacks of 4, spread or not."""

    def layer(x):
        return x + jnp.tanh(x @ of(hk.get_parameter("w", [D, D], init=jnp.ones)))

    def block(x):
        return hk_stack.layer_stack(3, name="inner", setup_sharding=inner)(layer)(x)

    stack = hk_stack.layer_stack(4, name="outer", setup_sharding=outer)(block)
    return hk.without_apply_rng(hk.transform(stack)).apply


class TestNests:
    @pytest.mark.parametrize(
        ("outer", "inner", "kind"),
        [
            ("b", None, AUTO),
            (None, "b", EXPLICIT),
            ("b", "b", AUTO),
        ],
    )
    def test_of_stacks(self, outer, inner, kind):
        w = np.float32(0.2) * normal(4, 3, D, D)
        params = {"outer/inner/~": {"w": w}}
        expected = computed(loss_of(nest(product, None, None)), params, X)
        with jax.set_mesh(mesh := mesh_of(kind)):
            params = placed(params, mesh, P())
            run = jax.jit(loss_of(nest(product, outer, inner)))
            program = run.lower(params, X).compile(FAST)
            assert_close(program(params, X), expected)
        assert not collectives(program)[1]


def scan(params, x):
    """Layers that nobody wrote for this library."""

    return jax.lax.scan(turn, x, params["layers/~"])[0]


def turn(x, own):
    return x + jnp.tanh(x @ product(own["w"] * own["scale"])), None


def loop(params, x):
    for i in range(L):
        x, _ = turn(x, jax.tree.map(lambda leaf, i=i: leaf[i], params["layers/~"]))
    return x


def halves(params, x):
    """A scan in a scan."""
    split = jax.tree.map(lambda p: p.reshape(2, L // 2, *p.shape[1:]), params)

    def half(x, own):
        return scan({"layers/~": own}, x), None

    return jax.lax.scan(half, x, split["layers/~"])[0]


class TestWholeFunctions:
    @pytest.mark.parametrize(
        ("verb", "fn", "kind"),
        [
            (hk_stack.setup_first, scan, AUTO),
            (hk_stack.setup_first, layers(), AUTO),
            (hk_stack.setup_first, halves, EXPLICIT),
            (hk_stack.roll, loop, EXPLICIT),
        ],
        ids=["scan", "stack", "scan in a scan", "loop"],
    )
    def test_run_setup_on_their_devices(self, verb, fn, kind):
        expected = computed(loss_of(fn), parameters(), X)
        with jax.set_mesh(mesh := mesh_of(kind)):
            params = placed(parameters(), mesh, P())
            spread = verb(fn, setup_sharding="b")
            program = jax.jit(loss_of(spread)).lower(params, X).compile(FAST)
            assert_close(program(params, X), expected)
        outside, inside = collectives(program)
        assert "all-gather" in outside and not inside

    @pytest.mark.parametrize(("kind", "fn"), [(AUTO, scan), (EXPLICIT, layers())])
    def test_partition_hands_over_whole_values(self, fn, kind):
        expected = fn(parameters(), X)
        with jax.set_mesh(mesh := mesh_of(kind)):
            params = placed(parameters(), mesh, P())
            split = hk_stack.partition(fn, params, X, setup_sharding="b")
            derived = split.setup(params)
            assert_close(split.call(derived, X), expected)
            program = jax.jit(split.setup).lower(params).compile(FAST)
        outside, inside = collectives(program)
        assert outside.count("all-gather") == 1 and not inside
        [made] = derived["hoisted"].values()
        assert made.shape[0] == L and made.sharding.is_fully_replicated
        with pytest.raises(
            ValueError, match=r"setup: it is spread over the mesh .*, and the"
        ):
            split.setup(parameters())


class TestMistakes:
    """What is wrong with `setup_sharding`, who says so, and what to write instead."""

    @pytest.mark.parametrize(
        ("value", "kind", "text"),
        [
            ("", ValueError, "not ''"),
            (3, TypeError, "not 3"),
            (("a", "b"), TypeError, "not"),
            (P("b"), TypeError, r"Write setup_sharding='b'\.$"),
            (P("a", "b"), TypeError, r"\)\.$"),
            (NamedSharding(mesh_of(AUTO), P(None, "b")), TypeError, "ding='b'"),
        ],
        ids=str,
    )
    def test_no_name(self, value, kind, text):
        for verb, where in (
            (functools.partial(hk_stack.layer_stack, 3, name="s"), "layer_stack 's'"),
            (functools.partial(hk_stack.setup_first, scan), "setup_first of 'scan'"),
            (functools.partial(hk_stack.roll, scan), "roll of 'scan'"),
            (functools.partial(hk_stack.partition, scan, X), "partition of 'scan'"),
        ):
            match = f"{where}: setup_sharding must be the name of one axis .*{text}"
            with pytest.raises(kind, match=match):
                verb(setup_sharding=value)

    @pytest.mark.parametrize(
        "verb",
        [
            lambda **o: hk_stack.layer_stack(3, **o),
            functools.partial(hk_stack.roll, scan),
        ],
    )
    def test_nothing_to_spread(self, verb):
        with pytest.raises(ValueError, match=r"setup_sharding='b' says .* Leave one"):
            verb(setup="inline", setup_sharding="b")

    @pytest.mark.parametrize(
        ("run", "where"),
        [
            (layers(setup_sharding="z"), "layer_stack 'layers' of layer function 'la"),
            (hk_stack.setup_first(scan, setup_sharding="z"), "setup_first of 'scan'"),
            (hk_stack.roll(loop, setup_sharding="z"), "roll of 'loop'"),
            (
                functools.partial(hk_stack.partition, scan, setup_sharding="z"),
                "partition of 'scan'",
            ),
        ],
        ids=["layer_stack", "setup_first", "roll", "partition"],
    )
    def test_no_such_axis_or_mesh(self, run, where):
        start = f"{where}.*: setup_sharding='z' names an axis of the mesh around"
        with pytest.raises(
            ValueError, match=rf"{start}, but .* with jax\.set_mesh\(mes"
        ):
            run(parameters(), X)
        with (
            jax.set_mesh(grid_of(AUTO, AUTO)),
            pytest.raises(ValueError, match=f"{start}, which has 'a', 'b' only"),
        ):
            run(parameters(), X)

    def test_inside_of_a_shard_map(self):
        mesh = grid_of(AUTO, AUTO)

        def on(axis):
            apply = layers(setup_sharding="b")
            specs = {"in_specs": (P(), P(axis)), "out_specs": P(axis)}
            return jax.shard_map(apply, mesh=mesh, axis_names={axis}, **specs)

        with (
            jax.set_mesh(mesh),
            pytest.raises(ValueError, match=r"taken this axis.* axis_names"),
        ):
            jax.jit(on("b"))(parameters(), X)
        with jax.set_mesh(mesh):
            found = compiled(on("a"), parameters(), X)
        assert_close(found, computed(layers(), parameters(), X))
