"""`partition` of whole models, and `accumulate`."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import FAST, assert_close, assert_equal
from interpreter import computed

import hk_stack

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 4))


def slow(w):
    """Something that is worth hoisting, and easy to find: a sort."""
    return jnp.sort(jnp.sin(w), axis=0)


def layer(x):
    w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal(0.3))
    return jnp.tanh(hk.Linear(4)(x) @ slow(w))


def stacked(x):
    return hk_stack.layer_stack(3, name="layers")(layer)(x)


def through(split):
    return lambda known, *rest: split.call(split.setup(known), *rest)


def names_in_call(split, known, *rest):
    derived = jax.eval_shape(split.setup, known)
    return jaxprs.names(jax.make_jaxpr(split.call)(derived, *rest).jaxpr)


class TestModels:
    def test_transform(self):
        model = hk.transform(stacked)
        params = computed(model.init, KEY, X)
        split = hk_stack.partition(model.apply, params, KEY, X)
        assert_close(
            computed(through(split), params, KEY, X),
            computed(model.apply, params, KEY, X),
        )
        assert "sort" not in names_in_call(split, params, KEY, X)

    def test_transform_with_state_and_dropout(self):
        def model(x):
            count = hk.get_state("count", [], init=jnp.zeros)
            hk.set_state("count", count + 1)
            with jax.numpy_dtype_promotion("standard"):
                return hk.dropout(hk.next_rng_key(), 0.5, stacked(x)) + count

        model = hk.transform_with_state(model)
        params, state = computed(model.init, KEY, X)
        split = hk_stack.partition(model.apply, params, state, KEY, X)
        derived = split.setup(params)
        for key in jax.random.split(KEY, 3):
            found = split.call(derived, state, key, X)
            assert_close(found, model.apply(params, state, key, X))
            _, state = found
        assert "sort" not in names_in_call(split, params, state, KEY, X)

    def test_multi_transform(self):
        def both():
            encoder, decoder = hk.Linear(4), hk.Linear(4)

            def init(x):
                return decoder(stacked(encoder(x)))

            return init, (lambda x: stacked(encoder(x)), lambda x: decoder(x))

        model = hk.multi_transform(both)
        params = computed(model.init, KEY, X)
        split = hk_stack.partition(model.apply[0], params, None, X)
        assert_close(through(split)(params, None, X), model.apply[0](params, None, X))
        assert "sort" not in names_in_call(split, params, None, X)

    @pytest.mark.parametrize("stack", ["scan", "loop", "hack"])
    def test_flax(self, stack):
        pytest.importorskip("flax")
        from hk_stack.compare import in_linen, models

        block = functools.partial(in_linen.Block, models.s4_model(2))
        model = in_linen.STACKS[stack](block, 2)
        x = jax.random.normal(KEY, (1, 8, 4))
        variables = computed(model.init, KEY, x)
        split = hk_stack.partition(model.apply, variables, x)
        assert_close(
            computed(through(split), variables, x), computed(model.apply, variables, x)
        )
        # The rest of the model divides nothing; the kernel does.
        assert "div" in jaxprs.names(jax.make_jaxpr(model.apply)(variables, x).jaxpr)
        call = names_in_call(split, variables, x)
        assert call.count("fft") < 3 * (2 if stack == "loop" else 1)

    def test_plain_function_and_closures(self):
        table = jnp.arange(16.0).reshape(4, 4)

        def fn(w, x, scale=2.0):
            return x @ slow(w @ table) * scale

        split = hk_stack.partition(fn, table / 16, X)
        assert_close(through(split)(table / 16, X), fn(table / 16, X))
        split = hk_stack.partition(fn, table / 16, X, 3.0)
        assert_close(
            split.call(split.setup(table / 16), X, 5.0), fn(table / 16, X, 5.0)
        )

    def test_all_known_and_nothing_known(self):
        split = hk_stack.partition(lambda w: (slow(w), w), jnp.eye(4))
        assert_close(
            split.call(split.setup(jnp.eye(4))), (slow(jnp.eye(4)), jnp.eye(4))
        )
        split = hk_stack.partition(lambda _, x: {"y": x + 1}, {}, X)
        assert split.setup({}) == {"hoisted": {}, "kept": {}}
        assert_close(split.call(split.setup({}), X), {"y": X + 1})


class TestDerivedValues:
    def test_hold_all_that_the_call_needs_and_no_more(self):
        params = {"used": jnp.eye(4), "unused": jnp.ones([99]), "slow": jnp.eye(4)}
        split = hk_stack.partition(
            lambda p, x: x @ p["used"] @ slow(p["slow"]) + 0 * x, params, X
        )
        derived = split.setup(params)
        assert list(derived["kept"]) == ["used"]
        assert [v.shape for v in derived["hoisted"].values()] == [(4, 4)]

    def test_are_not_larger_than_what_they_are_made_of(self):
        def fn(params, x):
            half = params["w"].astype(jnp.bfloat16)  # Smaller: leaves.
            wide = jnp.broadcast_to(params["b"][None], (100, 4))  # Larger: stays.
            same = jnp.exp(params["b"])[None]  # As large: leaves.
            return x.astype(jnp.bfloat16) @ half, x.sum() * wide, same + x

        params = {"w": jnp.eye(4), "b": jnp.ones([4])}
        split = hk_stack.partition(fn, params, X)
        derived = split.setup(params)
        assert jnp.bfloat16 in [v.dtype for v in derived["hoisted"].values()]
        assert "w" not in derived["kept"]
        before = sum(v.nbytes for v in params.values())
        assert sum(v.nbytes for v in jax.tree.leaves(derived)) <= before

    def test_can_be_sharded_donated_and_saved(self, tmp_path):
        model = hk.transform(stacked)
        params = computed(model.init, KEY, X)
        split = hk_stack.partition(model.apply, params, None, X)
        expected = model.apply(params, None, X)
        derived = split.setup(params)
        flat = {f"{k}:{n}": v for k, d in derived.items() for n, v in d.items()}
        np.savez(tmp_path / "derived.npz", **flat)
        mesh = jax.make_mesh((3,), ("layers",), (jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec("layers")
        placed = jax.device_put(derived, jax.sharding.NamedSharding(mesh, spec))
        assert_close(jax.jit(split.call)(placed, None, X), expected)
        with np.load(tmp_path / "derived.npz") as file:
            loaded = {"hoisted": {}, "kept": {}}
            for name, value in file.items():
                kind, _, leaf = name.partition(":")
                loaded[kind][leaf] = value
        assert_close(split.call(loaded, None, X), expected)
        calls = jax.jit(lambda d, x: (split.call(d, None, x), d), donate_argnums=0)
        y, again = calls(derived, X)
        assert_close(y, expected)
        assert_close(calls(again, X)[0], expected)

    def test_leaves_whose_names_collide(self):
        params = {"a/b": {"c": jnp.eye(4)}, "a": {"b/c": 3 * jnp.eye(4)}}

        def fn(params, x):
            return x @ params["a/b"]["c"] @ params["a"]["b/c"]

        split = hk_stack.partition(fn, params, X)
        assert_close(through(split)(params, X), fn(params, X))
        assert len(split.setup(params)["kept"]) == 2

    @pytest.mark.filterwarnings("ignore:Explicitly requested dtype")  # It says so.
    def test_types_that_jax_narrows(self):
        spec = jax.ShapeDtypeStruct((4, 4), np.float64)
        split = hk_stack.partition(lambda w, x: x @ slow(w), spec, X)
        assert_close(split.call(split.setup(np.eye(4)), X), X @ slow(jnp.eye(4)))

    def test_check_finds_values_of_other_parameters(self):
        def fn(params, x):
            noise = jax.random.normal(params["key"], [4])
            return x @ slow(params["w"]) + params["b"] + noise

        key = jax.random.key(3)
        params = {"w": jnp.eye(4), "b": jnp.ones(4), "key": key}
        split = hk_stack.partition(fn, params, X[0])
        derived = split.setup(params)
        split.check(params, derived)
        split.check(params, jax.jit(split.setup)(params))
        others = {"w": 1.001 * jnp.eye(4), "b": jnp.full(4, jnp.nan), "key": KEY}
        names = {"w": "hoisted/", "b": "kept/b", "key": "hoisted/"}
        for name, other in others.items():
            with pytest.raises(ValueError, match=f"differ in {names[name]}"):
                split.check(params | {name: other}, derived)
        with pytest.raises(TypeError, match="lacks"):
            split.check(params, {"hoisted": {}, "kept": {}})

    def test_one_setup_serves_new_parameters_and_specs(self):
        model = hk.transform(stacked)
        spec = jax.eval_shape(model.init, KEY, X)
        like = jax.ShapeDtypeStruct(X.shape, X.dtype)
        split = hk_stack.partition(model.apply, spec, None, like)
        for seed in range(2):
            params = computed(model.init, jax.random.key(seed), X)
            assert_close(
                computed(through(split), params, None, X),
                computed(model.apply, params, None, X),
            )


class TestTransformations:
    def test_gradient_is_that_of_the_whole(self):
        model = hk.transform(stacked)
        params = computed(model.init, KEY, X)
        split = hk_stack.partition(model.apply, params, None, X)

        def loss(apply, params, x):
            return jnp.sum(jnp.sin(apply(params, None, x)))

        derived, pull_back = jax.vjp(split.setup, params)
        value = functools.partial(loss, lambda d, _, x: split.call(d, None, x))
        found = pull_back(jax.grad(value)(derived, X))[0]
        assert_close(found, jax.grad(functools.partial(loss, model.apply))(params, X))
        tangent = jax.jvp(lambda p: through(split)(p, None, X), (params,), (params,))
        expected = jax.jvp(lambda p: model.apply(p, None, X), (params,), (params,))
        assert_close(tangent, expected)

    def test_jit_vmap_scan(self):
        model = hk.transform(stacked)
        params = computed(model.init, KEY, X)
        split = hk_stack.partition(model.apply, params, None, X[0])
        derived = jax.jit(split.setup)(params)
        expected = model.apply(params, None, X)
        batched = jax.vmap(split.call, (None, None, 0))(derived, None, X)
        assert_close(batched, expected)
        ensemble = jax.tree.map(lambda p: jnp.stack([p, -p]), params)
        both = jax.vmap(lambda p: through(split)(p, None, X[0]))(ensemble)
        one = model.apply(jax.tree.map(jnp.negative, params), None, X[0])
        assert_close(both[1], one)
        steps = jax.lax.map(lambda x: split.call(derived, None, x), X)
        assert_close(steps, expected)

    def test_partition_inside_jit_and_of_a_partition(self):
        model = hk.transform(stacked)
        params = computed(model.init, KEY, X)

        @jax.jit
        def generate(params, x):
            split = hk_stack.partition(model.apply, params, None, x)
            derived = split.setup(params)
            turn = functools.partial(split.call, derived, None)
            return jax.lax.fori_loop(0, 3, lambda _, x: turn(x), x)

        expected = X
        for _ in range(3):
            expected = model.apply(params, None, expected)
        assert_close(generate(params, X), expected)
        assert_close(
            through(hk_stack.partition(generate, params, X))(params, X), expected
        )

    def test_bodies_that_share_their_variables(self):
        @jax.jit
        def mixed(x, w):
            return jnp.tanh(x @ hk_stack.hoist(slow(w)))

        def layer(x):
            w = hk.get_parameter("w", [4, 4], init=hk.initializers.RandomNormal(0.3))
            return mixed(mixed(x, w), 2.0 * w)

        model = hk.transform(
            lambda x: hk_stack.layer_stack(2, setup="inline")(layer)(x)
        )
        params = computed(model.init, KEY, X)
        split = hk_stack.partition(model.apply, params, None, X)
        assert_close(
            computed(through(split), params, None, X),
            computed(model.apply, params, None, X),
        )


class TestReport:
    def test_derived_values_that_are_constants(self):
        def fn(flag, x):
            branches = [lambda x: x * 2.0, lambda x: x * slow(jnp.ones([4]))]
            return jax.lax.switch(flag, branches, x)

        split = hk_stack.partition(fn, jnp.int32(1), X[0])
        assert "hoisted" in str(split)
        assert_close(through(split)(jnp.int32(1), X[0]), fn(jnp.int32(1), X[0]))

    def test_says_what_was_hoisted_from_where_and_what_stayed(self):
        def fn(params, x):
            kernel = slow(params["w"])
            wide = jnp.broadcast_to(jnp.sin(params["b"]), (3, 4)) + 1
            inside = jax.lax.cond(
                x[0, 0] > 0, lambda: jnp.sort(params["b"]), lambda: params["b"]
            )
            return x @ kernel, x.sum() * wide, inside

        params = {"w": jnp.eye(4), "b": jnp.ones([1, 4])}
        split = hk_stack.partition(fn, params, X)
        report = split.report
        (sort,) = (g for g in report.hoisted if g.primitive == "sort")
        assert sort.shapes == ("float32[4, 4]",) and sort.nbytes == 64
        assert sort.flops >= 16
        assert sort.source.startswith("test_partition.py:")
        assert sort.source.endswith("in slow")
        why = {s.primitive: s.why for s in report.stayed}
        assert why["sort"] == "it is in a conditional that depends on argument `x`"
        assert why["add"] == "it is larger than what it is made of"
        assert sort.source in str(split) and "float32[4,4]" in str(split)
        assert "kept" in str(split) and str(split) == str(report)

    def test_nothing_to_hoist(self):
        split = hk_stack.partition(lambda w, x: x @ w, jnp.eye(4), X)
        assert "nothing to hoist" in str(split)

    def test_in_rich_and_in_notebooks(self):
        console = pytest.importorskip("rich.console").Console(width=120)
        split = hk_stack.partition(lambda w, x: x @ slow(w), jnp.eye(4), X)
        with console.capture() as capture:
            console.print(split)
        assert "float32[4,4]" in capture.get() and "sort" in capture.get()
        html = split._repr_html_()
        assert html.count("<tr>") == html.count("</tr>") == 2
        assert "&lt;lambda&gt;" in html and "<lambda>" not in html


def mistake(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return str(caught.value)


class TestMistakes:
    def setup_method(self):
        self.params = {"w": jnp.eye(4), "v": jnp.eye(4)}
        self.fn = lambda p, x, scale: x @ slow(p["w"]) @ p["v"] * scale
        self.split = hk_stack.partition(self.fn, self.params, X, jnp.float32(1))
        self.derived = self.split.setup(self.params)

    def test_no_function(self):
        model = hk.transform(stacked)
        message = mistake(lambda: hk_stack.partition(model, {}, X))
        assert "Transformed" in message and "apply" in message
        assert "example arguments" in mistake(lambda: hk_stack.partition(stacked))

    def test_static_arguments(self):
        def fn(w, x, is_training, name=""):
            return x @ w if is_training else x

        with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
            hk_stack.partition(fn, jnp.eye(4), X, True)
        assert "functools.partial" in caught.value.__notes__[-1]
        message = mistake(lambda: hk_stack.partition(fn, jnp.eye(4), X, True, "a"))
        assert "`name`" in message and "functools.partial" in message

    def test_derived_values_that_do_not_fit(self):
        call = self.split.call
        assert "what setup returns" in mistake(lambda: call(self.params, X, 1.0))
        stale = {**self.derived, "kept": {}}
        assert "lacks kept/v" in mistake(lambda: call(stale, X, 1.0))
        narrow = jax.tree.map(lambda v: v[:2], self.derived)
        message = mistake(lambda: call(narrow, X, 1.0))
        assert "float32[2,4]" in message and "float32[4,4]" in message
        half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), self.derived)
        assert "bfloat16[4,4]" in mistake(lambda: call(half, X, 1.0))

    def test_other_arguments(self):
        call, setup = self.split.call, self.split.setup
        message = mistake(lambda: call(self.derived, X[:1], 1.0))
        assert "argument `x`" in message and "float32[1,4]" in message
        assert "scale" in mistake(lambda: call(self.derived, X))
        assert "argument `p`" in mistake(lambda: setup({"w": jnp.eye(4)}))
        assert "(at w)" in mistake(lambda: setup({**self.params, "w": jnp.eye(3)}))

    def test_what_is_no_array(self):
        fn = self.fn
        for wrong in ("a", object(), np.array(["a"])):
            message = mistake(
                lambda wrong=wrong: hk_stack.partition(fn, {}, wrong, 1.0)
            )
            assert "`x`" in message and "functools.partial" in message
        if hasattr(jax, "Ref"):
            ref = jax.new_ref(jnp.eye(4))
            message = mistake(lambda: hk_stack.partition(lambda r: r[...], ref))
            assert "jax.Ref" in message
        assert "hoist" in mistake(lambda: hk_stack.hoist("a"))

    def test_names_of_a_call(self):
        for call in (
            lambda: self.split.call(self.derived, x=X),
            lambda: self.split.setup(self.params, X),
        ):
            assert "Partition." in mistake(call)
        message = mistake(lambda: hk_stack.partition(lambda w, x: w, jnp.eye(2)))
        assert "argument" in message

    def test_mark_on_what_is_not_known(self):
        message = mistake(
            lambda: hk_stack.partition(
                lambda w, x: hk_stack.hoist(x) @ w, jnp.eye(4), X
            )
        )
        assert "argument `x`" in message and "<lambda>" in message


def loss(params, x, y):
    model = hk.transform(stacked)
    return jnp.mean((model.apply(params, None, x) - y) ** 2)


class TestAccumulate:
    def setup_method(self):
        self.params = computed(hk.transform(stacked).init, KEY, X)
        self.xs, self.ys = (
            jax.random.normal(k, (5, 2, 4)) for k in jax.random.split(KEY)
        )

    def slowly(self, fn, *microbatches, has_aux=False):
        results = [
            computed(
                jax.value_and_grad(fn, has_aux=has_aux),
                self.params,
                *(jax.tree.map(lambda leaf, m=m: leaf[m], microbatches)),
            )
            for m in range(5)
        ]
        return jax.tree.map(lambda *leaves: sum(leaves) / 5, *results)

    def test_mean_of_gradients(self):
        expected = self.slowly(loss, self.xs, self.ys)
        for run in (
            hk_stack.accumulate,
            jax.jit(hk_stack.accumulate, static_argnums=0),
        ):
            assert_close(run(loss, self.params, self.xs, self.ys), expected)

    def test_one_setup_and_one_pull_back(self):
        def names(run):
            return jaxprs.names(
                jax.make_jaxpr(functools.partial(run, loss))(
                    self.params, self.xs, self.ys
                ).jaxpr
            )

        jaxpr = jax.make_jaxpr(functools.partial(hk_stack.accumulate, loss))(
            self.params, self.xs, self.ys
        ).jaxpr
        body = jaxprs.names(jaxprs.body(jaxpr, 5))
        assert "sort" not in body and "cos" not in body  # cos: gradient of sin
        assert "sort" in names(hk_stack.accumulate)

    def test_memory_is_that_of_one_microbatch(self):
        def temp(num):
            xs, ys = (jnp.ones([num, 64, 4]) for _ in range(2))
            run = jax.jit(functools.partial(hk_stack.accumulate, loss))
            compiled = run.lower(self.params, xs, ys).compile(FAST)
            return compiled.memory_analysis().temp_size_in_bytes

        assert temp(16) < temp(2) + 16 * 64 * 4  # and not 14 times more

    def test_aux_keys_and_trees(self):
        def noisy(params, batch, key):
            noise = jax.random.normal(key, batch["x"].shape)
            value = loss(params, batch["x"] + noise, batch["y"])
            return value, {"noise": noise, "count": jnp.int32(1)}

        batch, keys = {"x": self.xs, "y": self.ys}, jax.random.split(KEY, 5)
        (value, aux), grads = hk_stack.accumulate(
            noisy, self.params, batch, keys, has_aux=True
        )
        (mean, _), expected = self.slowly(noisy, batch, keys, has_aux=True)
        assert_close((value, grads), (mean, expected))
        assert_equal(
            aux["noise"], jax.vmap(lambda k: jax.random.normal(k, (2, 4)))(keys)
        )
        assert aux["count"].shape == (5,)

    def test_low_precision_adds_up_in_float32(self):
        params, xs = {"w": jnp.bfloat16(1)}, jnp.full([999], 1.01, jnp.bfloat16)
        value, grads = hk_stack.accumulate(lambda p, x: p["w"] * x, params, xs)
        assert value.dtype == grads["w"].dtype == jnp.bfloat16
        assert_equal((value, grads["w"]), (xs[0], xs[0]))

    def test_integers_among_parameters(self):
        params = {"w": jnp.eye(4), "order": jnp.array([3, 1, 2, 0])}

        def fn(params, x):
            return jnp.mean(x @ slow(params["w"])[jnp.sort(params["order"])])

        _, grads = hk_stack.accumulate(fn, params, self.xs)
        expected = jax.grad(fn, allow_int=True)(params, self.xs.reshape(10, 4))
        assert_close(grads["w"], expected["w"])
        assert grads["order"].dtype == jax.dtypes.float0

    def test_goes_into_optax(self):
        optax = pytest.importorskip("optax")
        optimiser = optax.adam(1e-2)
        state = optimiser.init(self.params)
        _, grads = hk_stack.accumulate(loss, self.params, self.xs, self.ys)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimiser.update(grads, state, self.params)
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (updates, self.params)]
        assert shapes[0] == shapes[1]

    def test_mistakes(self):
        run = functools.partial(hk_stack.accumulate, loss, self.params)
        message = mistake(lambda: run(self.xs, self.ys[:2]))
        assert "5 in `x`" in message and "2 in `y`" in message and "loss" in message
        assert "no microbatches" in mistake(run)
        assert "`y`" in mistake(lambda: run(self.xs, 1.0))
        assert "0 in" in mistake(lambda: run(self.xs[:0], self.ys[:0]))
        assert "one floating-point number" in mistake(
            lambda: hk_stack.accumulate(lambda p, x: x, {}, self.xs)
        )
        assert "has_aux=True" in mistake(
            lambda: hk_stack.accumulate(lambda p, x: (x.sum(), x), {}, self.xs)
        )
        assert "function" in mistake(lambda: hk_stack.accumulate(3, {}, self.xs))
        assert "pair (loss, aux)" in mistake(
            lambda: hk_stack.accumulate(lambda p, x: x, {}, self.xs, has_aux=True)
        )
        wrong = {"f": jnp.tanh}
        assert "(at f)" in mistake(lambda: hk_stack.accumulate(loss, wrong, self.xs))
        spec = jax.ShapeDtypeStruct((5, 2, 4), jnp.float32)
        assert "ShapeDtypeStruct" in mistake(lambda: run(self.xs, spec))


class TestMemoryOfSetup:
    """`setup_batch_size` and `setup_remat` change the program, not its results."""

    @pytest.mark.parametrize("remat", ["auto", True, False])
    @pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 9])
    def test_results(self, size, remat):
        def run(**options):
            stack = hk_stack.layer_stack(5, name="layers", **options)
            model = hk.transform(lambda x: stack(layer)(x))
            params = computed(model.init, KEY, X)

            def total(params, x):
                return jnp.sum(jnp.sin(model.apply(params, None, x)))

            return computed(jax.value_and_grad(total, (0, 1)), params, X)

        found = run(setup_batch_size=size, setup_remat=remat)
        assert_close(found, run(setup="inline"))

    def jaxpr(self, layers=6, **options):
        model = hk.transform(
            lambda x: hk_stack.layer_stack(layers, name="layers", **options)(layer)(x)
        )
        params = computed(model.init, KEY, X)
        grad = jax.grad(lambda p: model.apply(p, None, X).sum())
        return jax.make_jaxpr(grad)(params).jaxpr

    def sorts(self, **options):
        """How many layers each sort of the gradient's forward pass handles."""
        eqns = jaxprs.equations(self.jaxpr(**options))
        return [e.invars[0].aval.shape for e in eqns if e.primitive.name == "sort"]

    def test_batches(self):
        assert self.sorts(setup_batch_size=6)[0] == (6, 4, 4)
        assert self.sorts(setup_batch_size=99)[0] == (6, 4, 4)
        assert self.sorts(setup_batch_size=2)[0] == (2, 4, 4)
        assert self.sorts(setup_batch_size=1)[0] == (4, 4)
        assert {(4, 4, 4), (2, 4, 4)} <= set(self.sorts(setup_batch_size=4))

    def test_a_batch_of_what_is_left_over_only_if_something_is(self):
        assert {shape[0] for shape in self.sorts(setup_batch_size=3)} == {3}

    @pytest.mark.parametrize(("size", "prevents"), [(2, False), (6, True), (9, True)])
    def test_outside_of_a_loop_xla_may_not_undo_remat(self, size, prevents):
        eqns = jaxprs.equations(self.jaxpr(setup_batch_size=size, setup_remat=True))
        remats = [e.params["prevent_cse"] for e in eqns if "prevent_cse" in e.params]
        assert remats and set(remats) == {prevents}

    @pytest.mark.parametrize("size", [1, 2, 6])
    def test_remat_runs_setup_again(self, size):
        kept = self.sorts(setup_batch_size=size, setup_remat=False)
        again = self.sorts(setup_batch_size=size, setup_remat=True)
        assert len(again) == 2 * len(kept)
        by_default = self.sorts(setup_batch_size=size)
        assert by_default == (kept if size == 6 else again)

    def test_nested_stacks(self):
        def inner(x):
            return hk_stack.layer_stack(
                2, name="inner", setup_batch_size=1, setup_remat=True
            )(layer)(x)

        def run(outer, **options):
            model = hk.transform(lambda x: outer(3, name="outer", **options)(inner)(x))
            params = computed(model.init, KEY, X)
            value = jax.value_and_grad(lambda p: model.apply(p, None, X).sum())
            return computed(value, params)

        expected = run(hk.layer_stack)
        for size in (None, 1, 2):
            found = run(hk_stack.layer_stack, setup_batch_size=size, setup_remat=True)
            assert_close(found, expected)

    def test_mistakes(self):
        message = mistake(lambda: hk_stack.layer_stack(3, setup_batch_size=0, name="s"))
        assert "setup_batch_size" in message and "'s'" in message
        for wrong in ("no", 1, None, np.array([1, 2])):
            stack = functools.partial(hk_stack.layer_stack, 3, setup_remat=wrong)
            message = mistake(functools.partial(stack, name="s"))
            assert "setup_remat" in message and repr(wrong) in message
