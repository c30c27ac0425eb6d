"""The cut through loops and conditionals: what is known leaves them, and no more."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close
from interpreter import computed

import hk_stack

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (4, 4)) / 4
X = jax.random.normal(jax.random.key(1), (4,))


def slow(w):
    """Something that is worth hoisting, and easy to find: a sort."""
    return jnp.sort(jnp.sin(w), axis=0)


def call_of(fn, *args, run=computed):
    """What is left of `fn` without its setup, if all results agree."""
    split = hk_stack.partition(fn, *args)
    known, *rest = args

    def through(known, *rest):
        return split.call(split.setup(known), *rest)

    assert_close(run(through, *args), run(fn, *args))

    def total(run):
        return lambda *args: sum(
            jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(run(*args))
        )

    if not any("while" in e for e in names_in(fn, *args)):
        found, expected = (
            run(jax.grad(total(function), (0, 1)), *args) for function in (through, fn)
        )
        assert_close(found, expected)
    derived = jax.eval_shape(split.setup, known)
    return jax.make_jaxpr(split.call)(derived, *rest).jaxpr


def names_in(fn, *args):
    return jaxprs.names(jax.make_jaxpr(fn)(*args).jaxpr)


def assert_hoisted(fn, *args):
    assert "sort" in names_in(fn, *args)
    assert "sort" not in jaxprs.names(call_of(fn, *args))


def assert_stays(fn, *args, **options):
    assert "sort" in jaxprs.names(call_of(fn, *args, **options))


class TestScan:
    def test_what_does_not_change(self):
        def fn(w, x):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ slow(w)), x), x, length=3)

        assert_hoisted(fn, W, X)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_what_is_known_of_each_turn(self, reverse):
        def fn(ws, x):
            def turn(x, w):
                return jnp.tanh(x @ slow(w)), x.sum()

            return jax.lax.scan(turn, x, ws, reverse=reverse)

        ws = jnp.stack([W, 2 * W, W.T])
        assert_hoisted(fn, ws, X)

    def test_both_at_once_and_unknown_inputs(self):
        def fn(params, x, ys):
            def turn(carry, own):
                (w, y), x = own, carry
                return jnp.tanh(x @ slow(w) @ slow(params["v"]) + y), x * y

            return jax.lax.scan(turn, x, (params["ws"], ys), unroll=2)

        params = {"ws": jnp.stack([W, 2 * W, W.T]), "v": W}
        assert_hoisted(fn, params, X, jnp.ones([3, 4]))

    def test_carry_that_is_handed_on_as_it_came(self):
        def fn(w, x):
            def turn(carry, _):
                w, x = carry
                return (w, jnp.tanh(x @ slow(w))), None

            return jax.lax.scan(turn, (w, x), length=3)[0]

        assert_hoisted(fn, W, X)

    def test_carry_that_changes_stays(self):
        def fn(w, x):
            def turn(carry, _):
                w, x = carry
                return (w * 0.5, jnp.tanh(x @ slow(w))), None

            return jax.lax.scan(turn, (w, x), length=3)[0]

        assert_stays(fn, W, X)

    def test_nested(self):
        def fn(params, x):
            def inner(x, w):
                return jnp.tanh(x @ slow(w) @ slow(params["v"])), None

            def outer(x, ws):
                return jax.lax.scan(inner, x, ws)[0], None

            return jax.lax.scan(outer, x, params["ws"])[0]

        params = {
            "ws": jnp.stack([jnp.stack([W, 2 * W]), jnp.stack([W.T, -W])]),
            "v": W,
        }
        assert_hoisted(fn, params, X)

    def test_time_loop_around_a_stack(self):
        def layer(x):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal(0.3))
            return jnp.tanh(x @ slow(w))

        for stack in (hk_stack.layer_stack, hk.layer_stack):
            model = hk.transform(lambda x, stack=stack: stack(3)(layer)(x))
            params = computed(model.init, KEY, X)

            def decode(params, x, model=model):
                return jax.lax.scan(
                    lambda x, _: (model.apply(params, None, x), x), x, length=5
                )

            assert_hoisted(decode, params, X)

    def test_inside_jit_and_remat(self):
        @jax.jit
        def fn(w, x):
            @jax.checkpoint
            def turn(x, _):
                return jnp.tanh(x @ slow(w)), None

            return jax.lax.scan(turn, x, length=3)[0]

        assert_hoisted(fn, W, X)

    def test_no_turn_at_all(self):
        def fn(w, x):
            return jax.lax.scan(lambda x, _: (x @ slow(w), None), x, length=0)[0]

        assert_stays(fn, W, X)

    def test_map_over_known_and_over_unknown(self):
        def fn(w, xs):
            return jax.lax.map(lambda x: jnp.tanh(x @ slow(w)), xs)

        assert_hoisted(fn, W, jnp.stack([X, 2 * X]))

        def over_known(ws, x):
            return jax.lax.map(lambda w: jnp.tanh(x @ slow(w)), ws)

        assert_hoisted(over_known, jnp.stack([W, 2 * W]), X)

    def test_fori_loop(self):
        def fn(w, x):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ slow(w)), x)

        assert_hoisted(fn, W, X)

    def test_what_all_turns_share_is_computed_once(self):
        def fn(w, x):
            def turn(x, i):
                return jnp.tanh(jnp.roll(slow(w), i, axis=0) @ x), None

            return jax.lax.scan(turn, x, jnp.arange(50))[0]

        split = hk_stack.partition(fn, W, X)
        setup = jax.make_jaxpr(split.setup)(W).jaxpr
        (sort,) = (e for e in jaxprs.equations(setup) if e.primitive.name == "sort")
        assert sort.outvars[0].aval.shape == (4, 4)
        loops = [e for e in jaxprs.equations(setup) if e.primitive.name == "scan"]
        assert not any("sort" in jaxprs.names(e.params["jaxpr"].jaxpr) for e in loops)
        assert_hoisted(fn, W, X)


class TestWhile:
    def test_what_does_not_change(self):
        def fn(w, x):
            def above(x):
                return jnp.sum(x**2) > jnp.sort(jnp.abs(w), axis=None)[3]

            return jax.lax.while_loop(above, lambda x: 0.5 * jnp.tanh(x @ slow(w)), x)

        assert_hoisted(fn, W, 9 * X)  # Three turns.

    def test_what_the_call_reads_too(self):
        def fn(w, x, v):
            def turn(carry):
                n, x = carry
                return n + 1, jnp.tanh(x @ slow(w) + w[0] + v)

            return jax.lax.while_loop(lambda carry: carry[0] < 3, turn, (0, x))[1]

        assert_hoisted(fn, W, X, X[::-1])

    def test_number_of_turns_is_not_known(self):
        def fn(w, x, n):
            return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ slow(w)), x)

        split = hk_stack.partition(fn, W, X, 3)
        for n in (0, 1, 4):
            found = computed(split.call, split.setup(W), X, jnp.int32(n))
            assert_close(found, computed(fn, W, X, n))
        call = jax.make_jaxpr(split.call)(split.setup(W), X, 3).jaxpr
        assert "sort" not in jaxprs.names(call)

    def test_a_loop_that_may_not_end_stays_in_one_that_may_not_run(self):
        def endless(w):
            return jax.lax.while_loop(lambda w: w[0] < 1.0, lambda w: w * 1.0, w)

        def fn(w, x):
            return jax.lax.while_loop(
                lambda x: jnp.all(x > 0), lambda x: x - endless(w), x
            )

        w, x = jnp.zeros([4]), -jnp.ones([4])
        split = hk_stack.partition(fn, w, x)
        assert_close(split.call(split.setup(w), x), x)


class TestCond:
    def test_known_branches(self):
        def fn(params, x):
            return jax.lax.switch(
                params["which"],
                [
                    lambda x: jnp.tanh(x @ slow(params["w"])),
                    lambda x: x,
                    lambda x: x * slow(params["w"])[0] + jnp.sort(params["v"]),
                ],
                x,
            )

        for which in range(3):
            params = {"which": jnp.int32(which), "w": W, "v": W[0]}
            split = hk_stack.partition(fn, params, X)
            derived = computed(split.setup, params)
            assert_close(computed(split.call, derived, X), computed(fn, params, X))
            call = jax.make_jaxpr(split.call)(derived, X).jaxpr
            assert "sort" not in jaxprs.names(call)

    def test_branches_share_room(self):
        def fn(params, x):
            branches = [lambda x, s=s: x @ slow(params["w"] * s) for s in (1.0, 2.0)]
            return jax.lax.switch(params["which"], branches, x)

        params = {"which": jnp.int32(1), "w": W}
        derived = hk_stack.partition(fn, params, X).setup(params)
        shapes = [v.shape for v in derived["hoisted"].values()]
        assert shapes.count((4, 4)) == 1

    def test_no_branch_runs_before_it_is_known(self):
        def fn(w, x):
            return jax.lax.cond(x[0] > 0, lambda x: x @ slow(w), lambda x: x, x)

        assert_stays(fn, W, X)

    @pytest.mark.parametrize("kind", ["known", "of both"])
    def test_branches_by_platform(self, kind):
        def fn(w, x):
            if kind == "known":
                return x @ jax.lax.platform_dependent(w, cpu=schur, default=slow)
            ways = [lambda w, x, f=f: x @ f(w) for f in (schur, slow)]
            return jax.lax.platform_dependent(w, x, cpu=ways[0], default=ways[1])

        def schur(w):
            return jax.lax.linalg.schur(w)[0]

        split = hk_stack.partition(fn, W, X)
        both = jax.jit(lambda w, x: split.call(split.setup(w), x))
        assert_close(both(W, X), fn(W, X))
        both.trace(W, X).lower(lowering_platforms=("tpu",))  # No schur there.

    def test_gradient_of_a_branch_that_is_not_taken(self):
        def fn(params, x):
            def slow_root(x):
                return x * jnp.sort(jnp.sqrt(params["w"]))

            return jax.lax.cond(params["root"], slow_root, lambda x: x, x)

        params = {"root": jnp.bool(False), "w": -jnp.ones([4])}  # No root there.
        split = hk_stack.partition(fn, params, X)

        def total(w):
            return split.call(split.setup({**params, "w": w}), X).sum()

        assert_close(jax.grad(total)(params["w"]), jnp.zeros([4]))


class TestLeftWhole:
    def test_custom_derivatives(self):
        @jax.custom_vjp
        def vjp(w, x):
            return x @ slow(w)

        vjp.defvjp(
            lambda w, x: (vjp(w, x), (w, x)),
            lambda kept, ct: (2 * jnp.outer(kept[1], ct), 3 * ct),
        )

        @jax.custom_jvp
        def jvp(w, x):
            return x @ slow(w)

        @jvp.defjvp
        def _(primals, tangents):
            return jvp(*primals), 2 * tangents[1] + tangents[0].sum()

        assert_stays(vjp, W, X)
        assert_stays(jvp, W, X)

    def test_custom_derivatives_of_known_values_leave(self):
        rule = jax.custom_jvp(slow)
        rule.defjvp(lambda primals, tangents: (rule(*primals), 2 * tangents[0]))
        assert_hoisted(lambda w, x: x @ rule(w), W, X)

    def test_shard_map(self):
        mesh = jax.make_mesh((2,), ("i",), (jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec

        @jax.shard_map(mesh=mesh, in_specs=(spec(), spec("i")), out_specs=spec("i"))
        def fn(w, x):
            return jnp.tanh(x @ slow(w))

        x = jnp.stack([X, 2 * X, -X, X + 1])
        assert_stays(fn, W, x, run=lambda fn, *args: jax.jit(fn)(*args))


class TestMarks:
    def test_in_a_scan(self):
        def layer(x):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal(0.3))

            def turn(x, v):
                return jnp.tanh(
                    x @ hk_stack.hoist(jnp.sin(w)) * hk_stack.hoist(v)
                ), None

            return jax.lax.scan(turn, x, w * 2)[0]

        def body(setup):
            stack = hk_stack.layer_stack(3, setup=setup)
            model = hk.transform(lambda x: stack(layer)(x))
            params = computed(model.init, KEY, X)
            expected = hk.transform(lambda x: hk.layer_stack(3)(layer)(x))
            found = computed(model.apply, params, None, X)
            assert_close(found, computed(expected.apply, params, None, X))
            return jaxprs.body(jax.make_jaxpr(model.apply)(params, None, X).jaxpr, 3)

        assert "sin" in jaxprs.names(body("inline"))
        assert "sin" not in jaxprs.names(body("marked"))
        assert "sin" not in jaxprs.names(body("auto"))

    @pytest.mark.parametrize("marked", [True, False])
    @pytest.mark.parametrize("plain", [1, 4, 8])
    def test_in_scans_of_one_function_used_often(self, plain, marked):
        """What leaves must not depend on which objects have come and gone."""
        mark = hk_stack.hoist if marked else lambda v: v

        def layer(x, jitted):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal(0.3))

            def scan(x):
                def turn(x, _):
                    return jnp.tanh(x + mark(jnp.cumsum(w, axis=1))[0]), None

                return jax.lax.scan(turn, x, None, length=2)[0]

            for _ in range(plain):
                x = scan(x)
            for _ in range(jitted):
                x = jax.jit(scan)(x)
            return x

        for jitted in (1, 3, 8):
            stack = hk_stack.layer_stack(3)(layer)
            model = hk.transform(functools.partial(stack, jitted=jitted))
            params = jax.eval_shape(model.init, KEY, X)
            traced = jax.make_jaxpr(model.apply)(params, None, X).jaxpr
            assert "cumsum" not in jaxprs.names(jaxprs.body(traced, 3))

    def test_on_the_carry_of_a_scan(self):
        def layer(x):
            return jax.lax.scan(lambda x, _: (hk_stack.hoist(x), None), x, length=2)[0]

        model = hk.transform(lambda x: hk_stack.layer_stack(3, name="s")(layer)(x))
        with pytest.raises(ValueError, match=r"'s'.*inside a scan.*carry of a scan"):
            model.init(KEY, X)

    @pytest.mark.parametrize("kind", ["scan", "cond", "batches", "one turn"])
    def test_on_parameters_and_arrays_closed_over(self, kind):
        size = (4, 900, 900) if kind == "batches" else (3, 4, 4)
        closed = jax.random.normal(KEY, size)[: 1 if kind == "one turn" else None]

        def mark(a, w):
            if kind == "cond":
                return hk_stack.hoist(jax.lax.cond(w[0, 0] > 0, slow, jnp.sin, a + w))
            if kind == "batches":
                return hk_stack.hoist(jnp.sin(a + w[0, 0])[:4, :4])
            return hk_stack.hoist(slow(a) if kind == "one turn" else slow(a + w))

        def layer(x):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal())
            return jax.lax.scan(
                lambda x, a: (jnp.tanh(x @ mark(a, w)), None), x, closed
            )[0]

        model, plain = (
            hk.transform(lambda x, stack=stack: stack(2, name="s")(layer)(x))
            for stack in (hk_stack.layer_stack, hk.layer_stack)
        )
        params = computed(plain.init, KEY, X)
        found = computed(model.apply, params, None, X)
        assert_close(found, computed(plain.apply, params, None, X))

    @pytest.mark.parametrize("setup", ["auto", "marked"])
    def test_in_a_cond_on_an_array_closed_over(self, setup):
        flag = jnp.bool(True)

        def layer(x):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal())
            return jax.lax.cond(
                flag, lambda x: x @ hk_stack.hoist(slow(w)), lambda x: x, x
            )

        stack = hk_stack.layer_stack(3, setup=setup)
        model = hk.transform(lambda x: stack(layer)(x))
        params = computed(model.init, KEY, X)
        jaxpr = jax.make_jaxpr(model.apply)(params, None, X).jaxpr
        assert "sort" not in jaxprs.names(jaxprs.body(jaxpr, 3))
        plain = hk.transform(lambda x: hk.layer_stack(3)(layer)(x))
        found = computed(model.apply, params, None, X)
        assert_close(found, computed(plain.apply, params, None, X))

    def test_in_a_loop_that_never_runs(self):
        def fn(ws, x):
            return jax.lax.scan(lambda x, w: (hk_stack.hoist(w) @ x, None), x, ws)[0]

        split = hk_stack.partition(fn, jnp.zeros([0, 4, 4]), X)
        assert_close(split.call(split.setup(jnp.zeros([0, 4, 4])), X), X)


class TestStack:
    def test_inner_loop_over_time(self):
        def layer(x):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal(0.3))
            return jax.lax.scan(
                lambda h, x: 2 * (jnp.tanh(h @ slow(w) + x),), jnp.zeros(4), x
            )[1]

        model = hk.transform(lambda x: hk_stack.layer_stack(3)(layer)(x))
        plain = hk.transform(lambda x: hk.layer_stack(3)(layer)(x))
        x = jnp.stack([X, 2 * X])
        params = computed(model.init, KEY, x)
        found = computed(model.apply, params, None, x)
        assert_close(found, computed(plain.apply, params, None, x))
        jaxpr = jax.make_jaxpr(model.apply)(params, None, x).jaxpr
        assert "sort" in jaxprs.outside(jaxpr, 3)
        assert "sort" not in jaxprs.names(jaxprs.body(jaxpr, 3))

    def test_a_loop_without_setup_is_not_touched(self):
        def layer(x):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal(0.3))
            return jax.lax.scan(lambda h, x: 2 * (jnp.tanh(h @ w + x),), X, x)[1]

        x = jnp.stack([X, 2 * X])
        found, plain = (
            hk.transform(lambda x, stack=stack: stack(3)(layer)(x))
            for stack in (hk_stack.layer_stack, hk.layer_stack)
        )
        params = plain.init(KEY, x)
        names = [names_in(m.apply, params, None, x) for m in (found, plain)]
        assert np.unique(names[0]).tolist() == np.unique(names[1]).tolist()
        bodies = [
            jaxprs.names(jaxprs.body(jax.make_jaxpr(m.apply)(params, None, x).jaxpr, 3))
            for m in (found, plain)
        ]
        assert bodies[0] == bodies[1]
