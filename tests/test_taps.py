"""Values out of the middle: what is tapped, and how it is called."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close, assert_equal
from interpreter import computed
from layer_cases import B, D, L, slow, vectors, weight

import hk_stack
from hk_stack import collect, tap

KEY = jax.random.key(0)
EXECUTORS = ("scan", "unrolled", "python")


class Block(hk.Module):
    """A submodule that taps in its own name, and a value that nobody uses."""

    def __call__(self, x):
        h = tap(jnp.tanh(hk.Linear(D)(x)), "hidden")
        tap({"mean": h.mean(), "largest": h.max()}, "stats")
        return x + h


def outer(x):
    x = tap(Block()(x), "after")
    x = hk_stack.layer_stack(2, name="inner")(inner)(x)
    return x + x @ slow(weight(scale=0.1))


def inner(x):
    return hk.remat(lambda x: tap(jnp.sin(hk.Linear(D)(x)), "sine"))(x)


def network(**options):
    def run(x):
        x = tap(hk.Linear(D, name="embed")(x), "embedded")
        x = hk_stack.layer_stack(L, name="outer", **options)(outer)(x)
        return hk.Linear(1, name="head")(x)

    return hk.transform(run)


@functools.cache
def params():
    return computed(network().init, KEY, *vectors())


SHAPES = {
    "embedded": (B, D),
    "outer/block/hidden": (L, B, D),
    "outer/block/stats/mean": (L,),
    "outer/block/stats/largest": (L,),
    "outer/after": (L, B, D),
    "outer/inner/sine": (L, 2, B, D),
}


@functools.cache
def by_hand():
    """The same values from a Python loop that keeps them in lists."""
    kept = {path: [] for path in SHAPES}
    p = params()

    def linear(name, x, *i):
        return x @ p[name]["w"][i] + p[name]["b"][i][None]

    (x,) = vectors()
    x = linear("embed", x)
    kept["embedded"] = x
    for i in range(L):
        h = jnp.tanh(linear("outer/block/linear", x, i))
        kept["outer/block/hidden"].append(h)
        kept["outer/block/stats/mean"].append(h.mean())
        kept["outer/block/stats/largest"].append(h.max())
        x = x + h
        kept["outer/after"].append(x)
        sines = []
        for j in range(2):
            x = jnp.sin(linear("outer/inner/linear", x, i, j))
            sines.append(x)
        kept["outer/inner/sine"].append(jnp.stack(sines))
        x = x + x @ slow(p["outer/~"]["w"][i])
    return linear("head", x), jax.tree.map(jnp.stack, kept, is_leaf=is_list)


def is_list(value):
    return isinstance(value, list)


WAYS = {
    **{loop: {"loop": loop} for loop in EXECUTORS},
    "remat": {"remat": True},
    "groups": {"remat": True, "remat_every": 2},
    "inline": {"setup": "inline"},
    "checked": {"check_finite": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_taps(way):
    apply = collect(network(**WAYS[way]).apply)
    assert_close(computed(apply, params(), None, *vectors()), by_hand())


@pytest.mark.parametrize("loop", EXECUTORS)
def test_taps_of_all_stacks_in_one_executor(loop):
    with hk_stack.use_loop(loop):
        found = collect(network().apply)(params(), None, *vectors())
    assert_close(found, by_hand())


def test_names_and_parameters_do_not_change(monkeypatch):
    specs = jax.eval_shape(network().init, KEY, *vectors())
    monkeypatch.setitem(globals(), "tap", lambda value, name: value)
    assert jax.eval_shape(network().init, KEY, *vectors()) == specs


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("*", set(SHAPES)),
        ("outer/block/*", {path for path in SHAPES if "block" in path}),
        ("*/sine", {"outer/inner/sine"}),
        (["embedded", "*/mean"], {"embedded", "outer/block/stats/mean"}),
        ("outer/[ai]*", {"outer/after", "outer/inner/sine"}),
    ],
    ids=["all", "folder", "one", "several", "letters"],
)
def test_selection(select, expected):
    run = collect(network().apply, select)
    _, taps = jax.eval_shape(run, params(), None, *vectors())
    assert set(taps) == expected


def program(select=None):
    apply = network(setup="inline").apply
    if select is not None:
        apply = collect(apply, select)
    return jax.make_jaxpr(apply)(params(), None, *vectors())


def test_what_is_not_selected_is_not_kept():
    def kept(select):
        loop = jaxprs.loop(program(select).jaxpr, L)
        return len(loop.outvars) - len(jaxprs.carried(loop))

    assert kept("embedded") == 0
    assert kept("outer/after") == 1
    assert kept("*") == 5


def test_nobody_collects_nothing_happens(monkeypatch):
    bare = str(program())
    assert "reduce_max" in bare  # Traced as it is written, and left to XLA to drop.
    monkeypatch.setitem(globals(), "tap", lambda value, name: value)
    assert str(program()) == bare

    def flops(fn):
        compiled = jax.jit(fn).lower(params(), None, *vectors()).compile()
        return compiled.cost_analysis()["flops"]

    monkeypatch.undo()
    with_taps = flops(network().apply)
    assert with_taps < flops(collect(network().apply))


def test_under_jit_vmap_and_scan():
    (x,) = vectors()
    apply = network().apply
    expected = by_hand()
    assert_close(jax.jit(collect(apply))(params(), None, x), expected)
    assert_close(collect(jax.jit(apply))(params(), None, x), expected)

    xs = jnp.stack([x, 2 * x])
    mapped = computed(jax.vmap(lambda x: collect(apply)(params(), None, x)), xs)
    assert_close(jax.tree.map(lambda leaf: leaf[0], mapped), expected)

    def turn(total, x):
        out, taps = collect(apply)(params(), None, x)
        return total + out.sum(), taps

    _, taps = computed(functools.partial(jax.lax.scan, turn, 0.0), xs)
    assert_close(jax.tree.map(lambda leaf: leaf[0], taps), expected[1])


def test_caches_of_jit_know_who_collects():
    """One jitted function, collected in other ways, and not at all."""
    apply = jax.jit(network().apply)
    expected = apply(params(), None, *vectors())
    for select in ("*", "embedded", "*"):
        out, taps = collect(apply, select)(params(), None, *vectors())
        assert_close(out, expected)
        assert len(taps) == (1 if select == "embedded" else len(SHAPES))
    assert_equal(apply(params(), None, *vectors()), expected)


def test_collecting_while_training():
    """Taps of the forward pass come once, whatever the backward pass computes again."""

    def loss(params, x, **options):
        return jnp.mean(network(**options).apply(params, None, x) ** 2)

    expected = computed(jax.value_and_grad(loss), params(), *vectors())
    for options in ({}, {"remat": True}, {"loop": "python"}):
        run = jax.value_and_grad(functools.partial(loss, **options))
        found, taps = computed(collect(run), params(), *vectors())
        assert_close(found, expected)
        assert_close(taps, by_hand()[1])


def test_gradients_of_taps():
    start = params()

    def total(x):
        return collect(network().apply)(start, None, x)[1]["outer/after"].sum()

    def expected(x):
        return _afters(x).sum()

    found = computed(jax.grad(total), *vectors())
    assert_close(found, computed(jax.grad(expected), *vectors()))


def _afters(x, shift=None):
    """What `outer/after` taps, by hand, and shifted by hand."""
    p = params()

    def linear(name, x, *i):
        return x @ p[name]["w"][i] + p[name]["b"][i][None]

    x, afters = linear("embed", x), []
    for i in range(L):
        x = x + jnp.tanh(linear("outer/block/linear", x, i))
        x = x if shift is None else x + shift[i]
        afters.append(x)
        for j in range(2):
            x = jnp.sin(linear("outer/inner/linear", x, i, j))
        x = x + x @ slow(p["outer/~"]["w"][i])
    return jnp.stack(afters) if shift is None else linear("head", x)


@pytest.mark.parametrize("way", WAYS)
def test_saliency(way):
    """Gradients by a tapped value are those by what is added to it."""
    (x,) = vectors()
    apply, given = network(**WAYS[way]).apply, params()

    def score(shift):
        add = {"outer/after": shift}
        return collect(apply, "embedded", add=add)(given, None, x)[0].sum()

    def expected(shift):
        return _afters(x, shift).sum()

    shift = 0.1 * jax.random.normal(KEY, [L, B, D])
    found = computed(jax.value_and_grad(score), shift)
    assert_close(found, computed(jax.value_and_grad(expected), shift))


def test_adding_inside_of_nested_stacks_and_outside():
    def run(**options):
        apply = collect(network().apply, **options)
        return computed(apply, params(), None, *vectors())

    out, taps = run()
    nothing = {path: jnp.zeros_like(value) for path, value in taps.items()}
    again, _ = run(add=nothing)
    assert_equal(again, out)
    for path in ("outer/inner/sine", "embedded", "outer/block/hidden"):
        some = {path: jnp.ones_like(taps[path])}
        other, _ = run(add=some)
        assert not jnp.allclose(other, out), path


def test_adding_what_the_value_cannot_hold():
    def f(x):
        return tap(x, "count") + 1

    with pytest.raises(ValueError, match="count is float32, the tapped value is int32"):
        collect(f, add={"count": jnp.ones([3])})(jnp.arange(3))
    out, _ = collect(f, add={"count": jnp.arange(3)})(jnp.zeros([3]))
    assert_equal(out, jnp.arange(1.0, 4.0))


def test_reverse_puts_layers_in_their_places():
    def layer(x, y):
        return tap(x + y, "x"), None

    def run(x):
        stack = hk_stack.layer_stack(3, True, name="s")(layer)
        return stack(x, jnp.arange(3.0), reverse=True)[0]

    for loop in EXECUTORS:
        with hk_stack.use_loop(loop):
            _, taps = collect(hk.transform(run).apply)({}, None, jnp.zeros([]))
        assert_equal(taps["s/x"], jnp.array([3.0, 3.0, 2.0]))


def test_a_name_used_twice_is_numbered():
    def layer(x):
        return tap(tap(x + 1.0, "x") + 1.0, "x")

    model = hk.transform(hk_stack.layer_stack(2, name="s")(layer))
    _, taps = collect(model.apply)({}, None, jnp.zeros([]))
    assert_equal(taps, {"s/x": jnp.array([1.0, 3.0]), "s/x_1": jnp.array([2.0, 4.0])})


def test_taps_of_some_layers_only():
    def layer(x):
        if hk_stack.layer_index() > 0:
            tap(x, "late")
        return x + 1.0

    model = hk.transform(hk_stack.layer_stack(3, name="s", loop="python")(layer))
    _, taps = collect(model.apply)({}, None, jnp.zeros([]))
    assert_equal(taps, {"s/late[1]": jnp.float32(1.0), "s/late[2]": jnp.float32(2.0)})


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_taps_of_some_layers_in_each_of_a_stack(loop):
    def inner(x):
        return tap(x, "late") if hk_stack.layer_index() > 0 else x + 1.0

    def outer(x):
        return hk_stack.layer_stack(2, name="in", loop="python")(inner)(x)

    model = hk.transform(hk_stack.layer_stack(3, name="out", loop=loop)(outer))
    _, taps = collect(model.apply)({}, None, jnp.zeros([]))
    assert_equal(taps, {"out/in/late[1]": jnp.array([1.0, 2.0, 3.0])})


def test_a_loop_of_one_layer_in_a_scan():
    def turn(x, _):
        stack = hk_stack.layer_stack(1, name="s", loop="python")
        return stack(lambda x: tap(x + 1.0, "t"))(x), None

    model = hk.transform(lambda x: hk.scan(turn, x, None, length=4)[0])
    _, taps = collect(model.apply)({}, None, jnp.zeros([]))
    assert_equal(taps, {"s/t": jnp.arange(1.0, 5.0)[:, None]})


def test_two_stacks_and_a_transparent_one():
    def layer(x):
        return tap(hk.Linear(D, name="in")(x), "y")

    def run(x):
        for _ in range(2):
            x = hk_stack.layer_stack(2, name="s")(layer)(x)
        names = hk_stack.NumberedLayers("t_{}/in", "in")
        stack = hk_stack.layer_stack(
            2, transparent=True, transparency_map=names, name="t"
        )
        return stack(layer)(x)

    model = hk.transform(run)
    params = jax.eval_shape(model.init, KEY, *vectors())
    assert "t_0/in" in params and "s_1/in" in params
    _, taps = jax.eval_shape(collect(model.apply), params, None, *vectors())
    assert set(taps) == {"s/y", "s_1/y", "t/y"}


def test_scans_of_the_users_own():
    def layer(x):
        def turn(x, step):
            return tap(jnp.cos(x) + step, "turn"), None

        return hk.scan(turn, x, jnp.arange(4.0))[0]

    model = hk.transform(hk_stack.layer_stack(3, name="s")(layer))
    y, taps = collect(model.apply)({}, None, jnp.zeros([2]))
    assert taps["s/turn"].shape == (3, 4, 2)
    assert_equal(taps["s/turn"][-1, -1], y)


def test_static_arguments_stay_static():
    def run(x, is_training, *, scale=1.0):
        assert is_training is True and scale == 3.0
        return tap(x * scale, "x")

    out, taps = collect(hk.transform(run).apply)(
        {}, None, jnp.ones([2]), True, scale=3.0
    )
    assert_equal(taps, {"x": out})


def test_plain_functions_and_integer_values():
    def f(x):
        return tap(x, "count") + 1

    out, taps = collect(f)(np.arange(3))
    assert_equal((out, taps["count"]), (jnp.arange(1, 4), jnp.arange(3)))


def scale():
    return hk.get_parameter("scale", [], init=jnp.ones)


def simple(**options):
    """A stack of three sines; its parameters; what is tapped."""

    def layer(x):
        tap(x * 2.0, "twice")  # Nobody uses the result.
        return jnp.sin(tap(x * scale(), "x"))

    model = hk.transform(hk_stack.layer_stack(3, name="s", **options)(layer))
    params = computed(model.init, KEY, *vectors())
    xs = [*vectors()]
    for _ in range(3):
        xs.append(jnp.sin(xs[-1]))
    xs = jnp.stack(xs[:3])
    return model, params, {"s/twice": 2.0 * xs, "s/x": xs}


@pytest.mark.parametrize("loop", EXECUTORS)
@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_gradients_through_jit_and_remat_lose_no_tap(around, loop):
    model, params, expected = simple(loop=loop, remat=True)

    def loss(params, x):
        return around(lambda p, x: model.apply(p, None, x))(params, x).sum()

    _, taps = computed(collect(jax.grad(loss)), params, *vectors())
    if loop == "python":  # What nobody uses is dropped by JAX before it can be seen.
        taps, expected = {"s/x": taps["s/x"]}, {"s/x": expected["s/x"]}
    assert_close(taps, expected)


def test_partition_and_accumulate_lose_no_tap():
    model, params, expected = simple()

    def loss(params, x):
        return model.apply(params, None, x).sum()

    (x,) = vectors()

    def both(params, x):
        parts = hk_stack.partition(loss, params, x)
        return parts.call(parts.setup(params), x)

    assert_close(computed(collect(both), params, x)[1], expected)

    def mean(params, xs):
        return hk_stack.accumulate(loss, params, xs)

    _, taps = computed(collect(mean), params, jnp.stack([x, x]))
    assert_close(jax.tree.map(lambda leaf: leaf[1], taps), expected)


@pytest.mark.parametrize("loop", EXECUTORS)
def test_helpers_that_jax_has_traced_before(loop):
    """A jitted helper in two stacks, and before in none that is collected."""
    helper = jax.jit(lambda x: jnp.sin(tap(x, "h")))

    def run(x):
        x = hk_stack.layer_stack(3, name="a")(lambda x: helper(x * scale()))(x)
        return hk_stack.layer_stack(2, name="b")(lambda x: helper(x + scale()))(x)

    model = hk.transform(run)
    with hk_stack.use_loop(loop):
        params = model.init(KEY, *vectors())
        model.apply(params, None, *vectors())
        _, taps = collect(model.apply)(params, None, *vectors())
    assert jax.tree.map(jnp.shape, taps) == {"a/h": (3, B, D), "b/h": (2, B, D)}


@pytest.mark.parametrize("loop", EXECUTORS)
def test_shared_stacks_keep_all_taps(loop):
    class Model(hk.Module):
        def __call__(self, x):
            def layer(x):
                tap(x, "a")
                tap(x + 100.0, "a")
                return x + scale()

            return hk_stack.layer_stack(3, name="s", loop=loop)(layer)(x)

    def run(x):
        shared = Model(name="m")
        return shared(shared(x))

    model = hk.transform(run)
    params = model.init(KEY, jnp.zeros([]))
    _, taps = collect(model.apply)(params, None, jnp.zeros([]))
    expected = [[0, 1, 2], [100, 101, 102], [3, 4, 5], [103, 104, 105]]
    assert sorted(v.astype(int).tolist() for v in taps.values()) == sorted(expected)
    assert set(taps) == {"m/s/a", "m/s/a_1", "m/s/a_2", "m/s/a_3"}


@pytest.mark.parametrize("loop", EXECUTORS)
def test_a_scan_in_any_loop(loop):
    def layer(x):
        def turn(x, _):
            inner = hk_stack.layer_stack(2, name="in")(lambda x: tap(x + 1.0, "t"))
            return inner(tap(x, "u")), None

        return hk.scan(turn, x, None, length=4)[0]

    with hk_stack.use_loop(loop):
        model = hk.transform(hk_stack.layer_stack(3, name="s")(layer))
        _, taps = collect(model.apply)({}, None, jnp.zeros([]))
    assert_equal(taps["s/u"], jnp.arange(0.0, 24.0, 2.0).reshape(3, 4))
    assert_equal(taps["s/in/t"], jnp.arange(1.0, 25.0).reshape(3, 4, 2))


def test_jitted_functions_that_close_over_arrays():
    model, params, expected = simple()
    table = np.ones(D, np.float32)

    @jax.jit
    def run(params, x):
        return model.apply(params, None, x) * table[None]

    assert_close(collect(run)(params, *vectors())[1], expected)
    add = {"s/x": jnp.ones([3, B, D])}
    shifted, _ = collect(run, add=add)(params, *vectors())
    assert not jnp.allclose(shifted, run(params, *vectors()))


def test_eager_calls_compile_once():
    compiled = []
    apply = collect(network().apply)
    apply(params(), None, *vectors())

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        apply(params(), None, *vectors())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_outside_of_everything_a_tap_is_the_identity():
    value = {"a": np.ones(3), "b": "text"}
    assert tap(value, "x") is value


def failing(layer):
    model = hk.transform(hk_stack.layer_stack(2, name="s")(layer))
    return lambda **options: collect(model.apply, **options)({}, None, jnp.zeros([2]))


def in_cond(x):
    return jax.lax.cond(x.sum() > 0, lambda x: tap(x, "x"), lambda x: -x, x)


def in_while(x):
    return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: tap(x + 1, "x"), x)


@pytest.mark.parametrize(("layer", "what"), [(in_cond, "cond"), (in_while, "while")])
def test_taps_that_cannot_leave(layer, what):
    run = failing(layer)
    with pytest.raises(ValueError, match=f"the tap s/x is inside a {what}, which no"):
        run()
    with pytest.raises(ValueError, match="no tap matches 'other'"):
        run(select="other")


def tapped(x):
    return tap(x + 1.0, "x")


MISTAKES = [
    (ValueError, {"select": "s/y"}, "no tap matches 's/y'"),
    (TypeError, {"select": [3]}, "select must be a glob or several, not 3"),
    (TypeError, {"select": 3}, "select must be a glob or several, not 3"),
    (ValueError, {"add": {"x": 0.0}}, "nothing was added at x, as there is no such"),
    (ValueError, {"add": {"s/x": jnp.zeros([3, 2])}}, "leading axis of 2, one entry"),
    (ValueError, {"add": {"s/x": jnp.zeros([2, 3])}}, r"shape \(3,\) for each layer"),
]


@pytest.mark.parametrize(("error", "options", "message"), MISTAKES)
def test_mistakes(error, options, message):
    with pytest.raises(error, match=message):
        failing(tapped)(**options)


def test_more_mistakes():
    with pytest.raises(TypeError, match=r"expected a function, not Transformed\. Give"):
        collect(hk.transform(tapped))
    with pytest.raises(TypeError, match="the name must be a str, not 3"):
        tap(jnp.ones(2), 3)
    with pytest.raises(ValueError, match="the name is empty"):
        tap(jnp.ones(2), "")


def test_a_bound_module_of_flax_is_a_function():
    nn = pytest.importorskip("flax.linen")
    x = jnp.ones([2, 3])
    bound = nn.Dense(3).bind(nn.Dense(3).init(jax.random.key(0), x))
    assert_equal(collect(bound)(x)[0], bound(x))
