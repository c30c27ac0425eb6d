"""`roll`: which blocks become a loop, which do not and why, and what is around it."""

import collections
import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import FAST, assert_close, assert_equal
from interpreter import computed
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hk_stack

L, D = 5, 4
KEY = jax.random.key(0)
X = jax.random.normal(KEY, [4, D])
PARAMS = [
    {"w": 0.5 * jax.random.normal(key, [D, D]), "b": 0.1 * jax.random.normal(key, [D])}
    for key in jax.random.split(jax.random.key(1), L)
]

# The last equation of what stacks, whose name versions of JAX have changed.
STACK = jax.make_jaxpr(lambda *xs: jnp.stack(xs))(X, X).eqns[-1].primitive.name


def layer(p, x):
    return x + jnp.tanh(x @ p["w"] + p["b"][None])


def model(params, x):
    for p in params:
        x = layer(p, x)
    return x


def with_setup(params, x):
    """A layer's setup inside of the loop."""
    for p in params:
        x = jnp.tanh(x @ jax.scipy.linalg.expm(p["w"]))
    return x


def loss(fn):
    """The mean of the squares of a function's first result."""

    def of(params, *rest):
        return jnp.mean(jnp.square(jax.tree.leaves(fn(params, *rest))[0]))

    return of


def traced(fn, *args):
    return jax.make_jaxpr(fn)(*args).jaxpr


def blocks(fn, *args, **options):
    """How many blocks each loop has."""
    report = hk_stack.roll(fn, **options).report(*args)
    return [loop.blocks for loop in report.loops]


def why(fn, *args, **options):
    """Why the nearest blocks are no loop."""
    return hk_stack.roll(fn, **options).report(*args).misses[0].why


def assert_same(fn, *args, **options):
    """Rolled, a function has the same results and gradients."""
    rolled = hk_stack.roll(fn, **options)
    assert_close(computed(rolled, *args), computed(fn, *args))
    kinds = [jax.tree.leaves(jax.eval_shape(f, *args)) for f in (rolled, fn)]
    assert [y.weak_type for y in kinds[0]] == [y.weak_type for y in kinds[1]]
    grads = [computed(jax.grad(loss(f)), *args) for f in (rolled, fn)]
    assert_close(*grads)


# What becomes a loop.


def test_program_is_that_of_a_loop_by_hand():
    def by_hand(params, x):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        return jax.lax.scan(lambda x, p: (layer(p, x), None), x, stacked)[0]

    names = [
        collections.Counter(jaxprs.names(traced(f, PARAMS, X)))
        for f in (hk_stack.roll(model), by_hand)
    ]
    assert names[0]["scan"] == names[1]["scan"] == 1
    for name in ("dot_general", "tanh", "add", STACK):
        assert names[0][name] == names[1][name]


def test_rows_of_one_array_are_the_array():
    """Whoever has stacked parameters and takes them apart pays nothing."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *PARAMS)

    def of_rows(stacked, x, order):
        for i in order:
            x = layer({name: leaf[i] for name, leaf in stacked.items()}, x)
        return x

    forward = functools.partial(of_rows, order=range(L))
    some = functools.partial(of_rows, order=range(3, 0, -1))
    found = jaxprs.names(traced(hk_stack.roll(forward), stacked, X))
    assert not {STACK, "slice"} & set(found)
    assert STACK not in jaxprs.names(traced(hk_stack.roll(some), stacked, X))
    assert_same(forward, stacked, X)
    assert_same(some, stacked, X)
    assert_same(functools.partial(of_rows, order=[0, 2, 1, 4]), stacked, X)


@pytest.mark.parametrize("way", ["unstack", "index"])
def test_columns_of_one_array_are_not_its_rows(way):
    def of_columns(w, x):
        columns = jnp.unstack(w, axis=1) if way == "unstack" else []
        for i in range(L):
            x = x + jnp.tanh(x @ (columns[i] if columns else w[:, i]))
        return x

    w = jax.random.normal(KEY, [D, L, D])
    assert blocks(of_columns, w, X) == [L]
    assert_same(of_columns, w, X)


def test_a_loop_of_stacked_parameters_is_the_program_of_a_stack():
    def layer(x):
        return x + hk.Linear(D)(jnp.tanh(hk.Linear(2 * D)(x)))

    def loop(x):
        for i in range(L):
            with hk.name_scope(f"layer_{i}"):
                x = layer(x)
        return x

    def rolled(stacked, x):
        params = hk_stack.unstack_params(stacked, names)
        return hk.transform(loop).apply(params, None, x)

    names = hk_stack.NumberedLayers("layer_{}", "layers")
    init = hk.transform(loop).init
    stacked = hk_stack.stack_params(init(KEY, X), names)
    stack = hk.transform(hk_stack.layer_stack(L, name="layers")(layer))
    programs = [
        traced(jax.grad(loss(f)), stacked, X)
        for f in (hk_stack.roll(rolled), lambda p, x: stack.apply(p, None, x))
    ]
    found, expected = (sorted(jaxprs.names(jaxpr)) for jaxpr in programs)
    assert found == expected


def numbers(params, x):
    """Numbers of each layer, in operands and inside of functions."""

    @jax.jit
    def scaled(x):
        return x / i

    for i, p in enumerate(params, 1):
        x = scaled(layer(p, x)) * (0.9 + 0.01 * i)
        x = jax.checkpoint(lambda x, i=i: jax.jit(jnp.tanh)(x * i) + i)(x)
    return x


def outputs(params, x):
    """Values of single layers that are read later, and of the last one only."""
    seen = []
    for p in params:
        y = jnp.cos(x)
        x = layer(p, x) + y
        seen.append((jnp.sum(x), y))
    return x + seen[1][0] * seen[-1][1] + sum(s for s, _ in seen[::2])


def last_only(params, x):
    for p in params:
        y = jnp.cos(x)
        x = layer(p, x) + y
    return x * y


def weights_tied(params, x):
    for _ in range(L):
        x = layer(params[0], x)
    return x


def constants(params, x):
    for p in params:
        x = layer(p, x * np.arange(D, dtype=np.float32)[None])
    return x


def first_is_a_number(params, x):
    total = 0.0
    for p in params:
        x = layer(p, x)
        total = total + jnp.mean(x)
    return x * total


def two_inputs_of_one_result(params, x):
    y = 2 * x
    for p in params:
        x, y = layer(p, x + y), x
    return x + y


def jitted(params, x):
    block = jax.jit(layer)
    for p in params:
        x = block(p, x)
    return x


def weak(params, x):
    """Python numbers as carry, as rows and inside of functions."""
    total, seen = jnp.asarray(1.0), []
    for i, p in enumerate(params):
        x = layer(p, x)
        total = total * jnp.asarray(0.5 + i)
        seen.append(jnp.asarray(0.5 * i) * 2.0 + total)
    return x, total, seen


def custom(params, x):
    """Blocks with derivatives of their own."""

    @jax.custom_jvp
    def f(x):
        return jnp.tanh(x)

    f.defjvp(lambda primals, tangents: (f(*primals), 3 * tangents[0]))
    for p in params:
        x = f(layer(p, x))
    return x


def custom_blocks(params, x):
    """Blocks that are one equation with a derivative of its own."""

    @jax.custom_vjp
    def block(p, x):
        return layer(p, x)

    def backward(given, ct):
        return jax.vjp(layer, *given)[1](2 * ct)

    block.defvjp(lambda *given: (layer(*given), given), backward)
    for p in params:
        x = block(p, x)
    return x


def in_scan(params, x):
    return jax.lax.scan(lambda x, _: (model(params, x), None), x, None, length=2)[0]


def in_functions(params, x):
    inner = jax.jit(lambda params, x: jax.checkpoint(model)(params, x))
    return jax.lax.cond(
        jnp.sum(x) > 9, lambda x: x, functools.partial(inner, params), x
    )


ROLLED = {
    model: [L],
    numbers: [L],
    outputs: [L],
    last_only: [L],
    weights_tied: [L],
    constants: [L],
    first_is_a_number: [L],
    two_inputs_of_one_result: [L],
    jitted: [L],
    weak: [L],
    custom: [L],
    custom_blocks: [L],
    in_scan: [L],
    in_functions: [L],
}


@pytest.mark.parametrize("fn", ROLLED, ids=lambda fn: fn.__name__)
def test_rolls(fn):
    assert blocks(fn, PARAMS, X) == ROLLED[fn]
    eqns = jaxprs.equations(traced(hk_stack.roll(fn), PARAMS, X))
    assert L in [e.params["length"] for e in eqns if e.primitive.name == "scan"]
    assert_same(fn, PARAMS, X)


def test_equal_constants_of_layers_are_one():
    jaxpr = traced(hk_stack.roll(constants), PARAMS, X)
    assert all(eqn.invars[0] not in jaxpr.constvars for eqn in jaxpr.eqns[:-1])
    assert sum(e.primitive.name == STACK for e in jaxpr.eqns) == 2


def test_what_only_the_last_layer_is_asked_for_is_not_stacked():
    loop = jaxprs.loop(traced(hk_stack.roll(last_only), PARAMS, X), L)
    assert all(v.aval.shape == X.shape for v in loop.outvars)


def test_random_draws():
    def folded(params, key, x):
        for i, p in enumerate(params):
            x = layer(p, x) + jax.random.normal(jax.random.fold_in(key, i), x.shape)
        return x

    def chained(params, key, x):
        for p in params:
            key, own = jax.random.split(key)
            x = layer(p, x) + jax.random.normal(own, x.shape)
        return x, key

    def rows(params, key, x):
        for p, own in zip(params, jax.random.split(key, L), strict=True):
            x = layer(p, x) + jax.random.normal(own, x.shape)
        return x

    keys = KEY, jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")
    for fn, key in zip((folded, chained, rows), keys, strict=True):
        assert blocks(fn, PARAMS, key, X) == [L]
        found, expected = (
            jax.jit(f, compiler_options=FAST)(PARAMS, key, X)
            for f in (hk_stack.roll(fn), fn)
        )
        assert_close(found, expected)
        if fn is chained:
            assert_equal(found[1], expected[1])


def test_several_loops_and_periods():
    def alternating(params, x):
        for i, p in enumerate([*params, *params]):
            x = layer(p, x) if i % 2 else jnp.cumsum(x @ p["w"], axis=0)
        return x

    def stages(params, x):
        for i, p in enumerate([*params, *params]):
            x = layer(p, x)
            if i == L:
                x = jnp.sin(x @ p["w"])
        return x

    def nested(params, x):
        for _ in range(3):
            x = jnp.sort(model(params, x))
        return x

    for fn, expected in ((alternating, [L]), (stages, [6, 4]), (nested, [3, L])):
        assert blocks(fn, PARAMS, X) == expected
        assert_same(fn, PARAMS, X)


def test_blocks_that_return_derivatives_are_a_loop_too():
    gradient = jax.grad(loss(model))
    assert blocks(gradient, PARAMS, X)[0] == L
    assert_close(
        computed(hk_stack.roll(gradient), PARAMS, X), computed(gradient, PARAMS, X)
    )


# Setup.


def test_setup_leaves_the_loop_in_batches():
    jaxpr = traced(hk_stack.roll(with_setup), PARAMS, X)
    assert jaxprs.names(jaxprs.body(jaxpr, L)).count("dot_general") == 1
    inline = traced(hk_stack.roll(with_setup, setup="inline"), PARAMS, X)
    assert jaxprs.names(jaxprs.body(inline, L)).count("dot_general") > 1
    assert_same(with_setup, PARAMS, X)
    assert_same(with_setup, PARAMS, X, setup_batch_size=2, setup_remat=True)


def test_setups_made_first_run_in_batches():
    def model(params, x):
        kernels = [jax.scipy.linalg.expm(p["w"]) for p in params]
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return x

    report = hk_stack.roll(model).report(PARAMS, X)
    assert [(loop.blocks, bool(loop.carry)) for loop in report.loops] == [
        (L, False),
        (L, True),
    ]
    jaxpr = traced(hk_stack.roll(model), PARAMS, X)
    stacked = [e for e in jaxpr.eqns if e.primitive.name == STACK]
    assert len(stacked) == 1  # The kernels are stacked as they are made.
    assert_same(model, PARAMS, X)
    inline = hk_stack.roll(model, setup="inline").report(PARAMS, X)
    assert [bool(loop.carry) for loop in inline.loops] == [True]


def test_marks():
    def marked(params, x):
        for p in params:
            x = x @ hk_stack.hoist(jnp.tanh(p["w"]))
        return x

    def of_activations(params, x):
        for p in params:
            x = hk_stack.hoist(layer(p, x))
        return x

    for setup in ("auto", "marked"):
        jaxpr = traced(hk_stack.roll(marked, setup=setup), PARAMS, X)
        assert "tanh" not in jaxprs.names(jaxprs.body(jaxpr, L))
    message = "roll of 'of_activations': hk_stack.hoist was given .* what the layer be"
    with pytest.raises(ValueError, match=message):
        hk_stack.roll(of_activations)(PARAMS, X)


# Options.


@pytest.mark.parametrize(
    "options",
    [
        {"remat": True},
        {"remat": True, "remat_every": 2},
        {"remat": jax.checkpoint_policies.dots_saveable, "remat_every": "sqrt"},
        {"unroll": 2},
        {"unroll": True},
    ],
    ids=["remat", "groups", "policy", "unroll", "whole"],
)
def test_options(options):
    assert_same(model, PARAMS, X, **options)
    names = jaxprs.names(traced(hk_stack.roll(model, **options), PARAMS, X))
    remat = {"checkpoint", "remat2", "remat"} & set(names)
    assert bool(remat) == ("remat" in options)


def test_min_layers():
    few = PARAMS[:2]
    assert blocks(model, few, X) == []
    assert blocks(model, few, X, min_layers=2) == [2]
    assert why(model, few, X).startswith("2 in a row, fewer than min_layers=3")
    assert_same(model, few, X, min_layers=2)


# What stays, and why.


def branches(params, x):
    return sum(jnp.tanh(x @ p["w"]) for p in params)


def no_layers(params, x):
    return jnp.sin(x) * params[0]["b"][None]


@pytest.mark.parametrize("fn", [branches, no_layers])
def test_nothing_to_roll_nothing_changed(fn):
    before = jax.make_jaxpr(fn)(PARAMS, X)
    assert str(jax.make_jaxpr(hk_stack.roll(fn))(PARAMS, X)) == str(before)
    report = hk_stack.roll(fn).report(PARAMS, X)
    assert not report.loops
    assert str(report).startswith(f"roll of '{fn.__name__}': no loop found")


def widths(params, x):
    wide = jnp.concatenate([params[2]["w"]] * 2, axis=1)
    for w in [params[0]["w"], params[1]["w"], wide, wide.T, params[4]["w"]]:
        x = jnp.tanh(x @ w)
    return x


def skips(params, x):
    seen = [x]
    for i, p in enumerate(params):
        seen.append(layer(p, seen[-1]) + (seen[-3] if i == 3 else seen[-1]))
    return seen[-1]


def named(params, x):
    for i, p in enumerate(params):
        x = checkpoint_name(layer(p, x), f"layer_{i}")
    return x


def broken(params, x):
    for i, p in enumerate([*params, *params]):
        x = layer(p, x)
        if i == 3:
            x = jnp.sin(x)
    return x


def shifted(params, x):
    for i, p in enumerate(params):
        x = jnp.roll(layer(p, x), i, axis=0)
    return x


def in_order(params, x):
    for p in params:
        x = layer(p, x)
        jax.debug.print("{}", jnp.sum(x), ordered=True)
    return x


def experts(params, x):
    total = 0.0
    for i, p in enumerate(params):
        total = total + layer(p, x) * i
    return total


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (widths, r"layer 2 is not like layer 1: `dot_general` of float32\[4,4\], "),
        (skips, r"layer 3 reads what layer 0 made: `add` at test_roll.py:\d+ in skips"),
        (
            named,
            r"layer 1 .*`name` .* has name=layer_1, where layer 0 has name=layer_0",
        ),
        (broken, r"layer 4 is not like layer 3: `sin` of float32\[4,4\] at "),
        (
            shifted,
            r"layer \d is not like layer \d: inside of `jit` at test_roll.py:\d+ in ",
        ),
        (in_order, r"side effects in order, which no loop keeps: `debug_print`"),
        (experts, r"nothing expensive in them depends on the block before"),
    ],
)
def test_reasons(fn, reason):
    found = why(fn, PARAMS, X)
    assert re.match(reason, found), found
    rolled = hk_stack.roll(fn, strict=True)
    if not blocks(fn, PARAMS, X):
        with pytest.raises(ValueError, match=r"no loop found(.|\n)*test_roll.py"):
            rolled(PARAMS, X)


def test_effects_without_an_order_are_all_there(capsys):
    def model(params, x):
        for p in params:
            x = layer(p, x)
            jax.debug.print("sum {}", jnp.sum(x))
        return x

    assert blocks(model, PARAMS, X) == [L]
    jax.block_until_ready(jax.jit(hk_stack.roll(model))(PARAMS, X))
    jax.effects_barrier()
    assert capsys.readouterr().out.count("sum") == L


def test_report_as_data_and_to_look_at():
    pytest.importorskip("rich")
    report = hk_stack.roll(skips).report(PARAMS, X)
    [loop] = report.loops
    assert loop.blocks == 3
    assert loop.carry == (f"float32[4, {D}]",)
    assert loop.own_nbytes == 4 * (D * D + D)
    assert loop.first.startswith("test_roll.py")
    assert "3 blocks as 1 loop" in str(report)
    assert "<table>" in report._repr_html_()
    assert report.__rich__()


# What is around it.


def around(fn):
    """Functions of a function."""
    microbatches = jnp.stack([X, 2 * X])
    split = hk_stack.partition(fn, PARAMS, X)
    return {
        "partition": lambda: split.call(split.setup(PARAMS), X),
        "accumulate": lambda: hk_stack.accumulate(loss(fn), PARAMS, microbatches),
        "checkpoint": lambda: jax.grad(loss(jax.checkpoint(fn)))(PARAMS, X),
        "vmap": lambda: jax.vmap(fn, (None, 0))(PARAMS, microbatches),
        "jvp": lambda: jax.jvp(functools.partial(fn, PARAMS), [X], [X]),
        "hessian": lambda: jax.jvp(jax.grad(loss(fn)), (PARAMS, X), (PARAMS, X)),
        "twice": lambda: hk_stack.setup_first(hk_stack.roll(fn))(PARAMS, X),
    }


@pytest.mark.parametrize("how", around(model))
def test_inside_of(how):
    found, expected = (
        computed(around(f)[how]) for f in (hk_stack.roll(with_setup), with_setup)
    )
    assert_close(found, expected, 1e-4)


def test_partition_keeps_the_setup_of_rolled_layers():
    split = hk_stack.partition(hk_stack.roll(with_setup), PARAMS, X)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(split.setup, PARAMS))
    assert list(shapes["hoisted"].values()) == [(L, D, D)]


def test_outside_of_jit_it_compiles_once(count_of_compilations):
    rolled = hk_stack.roll(model)
    assert_close(rolled(PARAMS, X), model(PARAMS, X))
    count_of_compilations.clear()
    rolled(PARAMS, X)
    assert not count_of_compilations


def test_keywords_stay_as_they_are():
    def model(params, x, *, is_training, scale):
        for p in params:
            x = layer(p, x) * scale if is_training else x
        return x

    rolled = hk_stack.roll(model)
    found = rolled(PARAMS, X, is_training=True, scale=X)
    assert_close(found, model(PARAMS, X, is_training=True, scale=X))
    assert rolled.__name__ == "model"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("d")))
        spec = P("d") if kind == AxisType.Auto else P()
        params = jax.device_put(PARAMS, NamedSharding(mesh, spec))
        found = jax.jit(jax.grad(loss(hk_stack.roll(model))))(params, x)
    assert_close(found, jax.grad(loss(model))(PARAMS, X))


def test_in_shard_map():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        lambda params, x: hk_stack.roll(model)(params, x),
        mesh=mesh,
        in_specs=(P(), P("d")),
        out_specs=P("d"),
    )
    assert_close(jax.jit(spread)(PARAMS, X), model(PARAMS, X))


def test_shapes_that_stay_unknown():
    size = jax.export.symbolic_shape("b")[0]
    x = jax.ShapeDtypeStruct([size, D], jnp.float32)
    rolled = jax.jit(hk_stack.roll(with_setup))
    exported = jax.export.export(rolled)(jax.tree.map(jax.typeof, PARAMS), x)
    assert_close(exported.call(PARAMS, X), with_setup(PARAMS, X))


def test_values_of_64_bits_stay_where_jax_has_32():
    def model(params, x):
        with jax.enable_x64(True):
            y, small = x.astype(jnp.float64), np.float64(1e-12)
            for i, p in enumerate(params):
                y = jnp.tanh(y @ p["w"].astype(jnp.float64)) * np.float64(i + 1)
                small = small + jnp.sum(y)
            return y.astype(jnp.float32) + small.astype(jnp.float32)

    assert blocks(model, PARAMS, X) == []
    assert_close(jax.jit(hk_stack.roll(model))(PARAMS, X), jax.jit(model)(PARAMS, X))


def test_shardings_named_in_layers_make_no_difference():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def model(params, x):
        for p in params:
            x = jax.lax.with_sharding_constraint(
                layer(p, x), NamedSharding(mesh, P("d", None))
            )
        return x

    assert blocks(model, PARAMS, X) == [L]
    assert_close(jax.jit(hk_stack.roll(model))(PARAMS, X), jax.jit(model)(PARAMS, X))


def test_as_a_method():
    class Model:
        @hk_stack.roll
        def apply(self, x):
            return x

    with pytest.raises(TypeError, match=r"`self` is a Model .*expected an array"):
        Model().apply(X)
    assert repr(Model.apply) == "<roll of 'apply'>"


def test_mutable_references_stay():
    def model(params, x):
        ref = jax.new_ref(x)
        for p in params:
            ref[...] = layer(p, ref[...])
        return ref[...]

    assert_close(jax.jit(hk_stack.roll(model))(PARAMS, X), jax.jit(model)(PARAMS, X))


# Bad input.


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hk_stack.roll(3), TypeError, "roll: expected a function, not int"),
        (lambda: hk_stack.roll(model, min_layers=1), ValueError, "at least 2, not 1"),
        (lambda: hk_stack.roll(model, min_layers="3"), TypeError, "min_layers must be"),
        (lambda: hk_stack.roll(model, setup="all"), ValueError, 'one of "auto", "mark'),
        (lambda: hk_stack.roll(model, remat="all"), TypeError, "remat must be True"),
        (lambda: hk_stack.roll(model, remat_every=2), ValueError, "but remat is off"),
        (lambda: hk_stack.roll(model, unroll=0), ValueError, "unroll must be"),
        (lambda: hk_stack.roll(model, strict="yes"), TypeError, "strict must be True"),
        (
            lambda: hk_stack.roll(model, setup="inline", setup_batch_size=2),
            ValueError,
            'setup_batch_size=2 .* setup="inline" leaves it inside',
        ),
        (
            lambda: hk_stack.roll(model)(),
            TypeError,
            "no arguments by position",
        ),
        (
            lambda: hk_stack.roll(model)(PARAMS, "x"),
            TypeError,
            "argument `x` is a str .*keyword",
        ),
        (
            lambda: hk_stack.roll(model).report([jnp.tanh], X),
            TypeError,
            r"argument `params` \(at 0\) is a .*; expected an array",
        ),
        (
            lambda: hk_stack.setup_first(None),
            TypeError,
            "setup_first: expected a funct",
        ),
        (
            lambda: hk_stack.setup_first(model)(PARAMS, "x"),
            TypeError,
            "argument `x` is",
        ),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_static_arguments_by_position_get_a_note():
    def model(params, x, is_training):
        return x if is_training else params[0]["w"]

    with pytest.raises(jax.errors.ConcretizationTypeError) as caught:
        hk_stack.roll(model)(PARAMS, X, True)
    assert "functools.partial" in "".join(caught.value.__notes__)
