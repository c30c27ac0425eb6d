"""What users get wrong: each error says where, what was found and what to write."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest

import hk_stack

KEY = jax.random.key(0)
X = jnp.ones((2, 8))


def block(x):
    return jnp.tanh(hk.Linear(8)(x))


def stateful(x):
    count = hk.get_state("count", [], init=jnp.zeros)
    hk.set_state("count", count + 1)
    return x + hk_stack.hoist(count)


def random(x):
    return x + hk_stack.hoist(jax.random.normal(hk.next_rng_key(), x.shape))


def data_dependent(x):
    w = hk.get_parameter("w", [8], init=lambda *_: jnp.mean(x, 0))
    return x * w[None]


def init(f, *args, **options):
    """Initialises a stack `layers` of three `f`."""

    def model(*args):
        return hk_stack.layer_stack(3, name="layers", **options)(f)(*args)

    return hk.transform_with_state(model).init(KEY, *args)


def make(*args, **options):
    return hk_stack.layer_stack(*args, name="layers", **options)


def per_layer(f, *args):
    return init(f, *args, with_per_layer_inputs=True)


def pair(x, y):
    return x, y


# fmt: off
CASES = {
    "no layers": (lambda: make(0), ValueError, ["num_layers", "positive int", "0"]),
    "half a layer": (lambda: make(2.5), TypeError, ["num_layers", "2.5 (float)"]),
    "True layers": (lambda: make(True), TypeError, ["num_layers", "bool"]),
    "layer function first": (lambda: make(block), TypeError,
        ["num_layers", "layer_stack(num_layers)(layer_function)"]),
    "no function": (lambda: make(3)(7), TypeError, ["must be callable", "int"]),
    "unknown setup": (lambda: make(3, setup="atuo"), ValueError,
        ["setup", '"auto", "marked", "inline"', "'atuo'"]),
    "unknown init": (lambda: make(3, init="loop"), ValueError,
        ["init", '"auto", "vmap", "map", "scan"', "'loop'"]),
    "transparent without map": (lambda: make(3, transparent=True), ValueError,
        ["transparency_map"]),
    "varargs": (lambda: init(lambda *xs: xs, X), ValueError, ["<lambda>", "*xs"]),
    "outside of a transform": (lambda: make(3)(block)(X), ValueError,
        ["block", "outside of a Haiku transform", "hk.transform"]),
    "other dtype": (lambda: init(lambda x: x.astype(jnp.bfloat16), X), TypeError,
        ["<lambda>", "`x`", "float32[2, 8] to bfloat16[2, 8]", ".astype"]),
    "other shape": (lambda: init(lambda x: x[:, :4], X), TypeError,
        ["`x`", "float32[2, 8] to float32[2, 4]"]),
    "other shape of a leaf": (
        lambda: init(lambda d: {"u": d["u"], "v": d["v"][None]}, {"u": X, "v": X}),
        TypeError, ["`d` (at v)", "float32[2, 8] to float32[1, 2, 8]"]),
    "other structure": (lambda: init(lambda x: {"a": x}, X), TypeError,
        ["must return what it takes (x)", "{'a': *}"]),
    "one of two returned": (lambda: init(lambda x, y: x, X, X), TypeError,
        ["must return what it takes (x, y)"]),
    "per-layer input of other depth": (lambda: per_layer(pair, X, jnp.ones(4)),
        ValueError, ["pair", "`y`", "shape (4,)", "leading axis of 3"]),
    "per-layer scalar array": (lambda: per_layer(pair, X, jnp.ones([])), ValueError,
        ["`y`", "shape ()", "leading axis of 3"]),
    "per-layer scalar": (lambda: per_layer(pair, X, 1.0), TypeError,
        ["`y`", "Python float", "jnp.asarray"]),
    "per-layer list": (lambda: per_layer(pair, X, [1.0, 2.0, 3.0]), TypeError,
        ["`y` (at 0)", "Python float", "jnp.asarray"]),
    "no pair": (lambda: per_layer(lambda x, y: x, X, jnp.ones(3)), TypeError,
        ["<lambda>", "pair (x, y)", "an array", "(x, None)"]),
    "hoist of the input": (lambda: init(lambda x: hk_stack.hoist(2 * x), X), ValueError,
        ["<lambda>", "hoist", "float32[2,8]", "argument `x`"]),
    "hoist of a random value": (lambda: init(random, X), ValueError,
        ["random", "hoist", "a random key"]),
    "hoist of state": (lambda: init(stateful, X), ValueError,
        ["stateful", "hoist", "state ~/count"]),
    "hoist of a per-layer input": (
        lambda: per_layer(lambda x, y: (x, hk_stack.hoist(y)), X, jnp.ones(3)),
        ValueError, ["hoist", "per-layer input `y`"]),
    "vmap of a data-dependent value": (lambda: init(data_dependent, X, init="vmap"),
        ValueError, ["data_dependent", 'init="vmap"', "parameter ~/w", 'init="scan"']),
    "map of a data-dependent value": (lambda: init(data_dependent, X, init="map"),
        ValueError, ["data_dependent", 'init="map"', "parameter ~/w"]),
}
# fmt: on


@pytest.mark.parametrize("case", CASES)
def test_error_says_where_what_and_what_next(case):
    call, kind, texts = CASES[case]
    with pytest.raises(kind) as error:
        call()
    for text in ["layer_stack 'layers'", *texts]:
        assert text in str(error.value)


def stack_of(num_layers):
    return hk.transform(lambda x: make(num_layers)(block)(x))


def loop(x):
    for _ in range(3):
        x = block(x)
    return x


LOOP = hk.transform(loop)


@pytest.mark.parametrize(
    ("params", "texts"),
    [
        (
            stack_of(5).init(KEY, X),
            ["linear/b", "(5, 8)", "num_layers=3", "of 5 layers"],
        ),
        (
            LOOP.init(KEY, X),
            ["lack linear/b", "linear_2/w", "hk_stack.stack_params", "transparent"],
        ),
        (
            {"layers/linear": LOOP.init(KEY, X)["linear"]},
            ["linear/b", "(8,)", "num_layers=3", "hk_stack.stack_params"],
        ),
        (
            {"layers/linear": {"w": jnp.ones((3, 7, 8)), "b": jnp.ones((3, 8))}},
            ["linear/w", "(7, 8)", "(8, 8)"],
        ),
        (
            {"blocks/linear": stack_of(3).init(KEY, X)["layers/linear"]},
            ["lack linear/b", "blocks/linear/w", "layer_stack(3, name='blocks')"],
        ),
        (
            {"blocks/linear": stack_of(5).init(KEY, X)["layers/linear"]},
            ["lack linear/b", "for 5 layers", "layer_stack(5, name='blocks')"],
        ),
        (
            {"blocks/linear": {"w": jnp.ones((3, 8, 8)), "b": jnp.ones((2, 8))}},
            ["lack linear/b", "hk_stack.stack_params"],
        ),
    ],
    ids=[
        "other depth",
        "loop",
        "one layer",
        "other shape",
        "other name",
        "other name and depth",
        "other name, no stack",
    ],
)
def test_foreign_parameters(params, texts):
    with pytest.raises(ValueError) as error:
        stack_of(3).apply(params, None, X)
    for text in ["layer_stack 'layers' of layer function 'block'", *texts]:
        assert text in str(error.value)


@pytest.mark.parametrize("loop", ["scan", "python"])
@pytest.mark.parametrize(
    ("old", "new"),
    [("outer/", "other/"), ("/inner/", "/other/")],
    ids=["outer", "inner"],
)
def test_nested_stacks_saved_under_another_name(old, new, loop):
    def outer(x):
        return block(hk_stack.layer_stack(2, name="inner")(block)(x))

    model = hk.transform(hk_stack.layer_stack(3, name="outer")(outer))
    params = model.init(KEY, X)
    saved = {module.replace(old, new): params[module] for module in params}
    with hk_stack.use_loop(loop), pytest.raises(ValueError) as error:
        model.apply(saved, None, X)
    assert old.strip("/") in str(error.value).partition("' of layer function")[0]
    assert f"layer_stack({3 if old == 'outer/' else 2}, name='other')" in str(
        error.value
    )


def test_transparent_stack_saved_under_other_names():
    names = hk_stack.NumberedLayers("block_{}", "linear")
    model = hk.transform(make(2, transparent=True, transparency_map=names)(block))
    params = {f"layer_{i}": {"w": X.T @ X, "b": X[0]} for i in range(2)}
    with pytest.raises(ValueError, match="layer 0 has it as block_0; give the map the"):
        model.apply(params, None, X)


def test_missing_parameters_of_a_layer_that_cannot_be_initialised():
    def layer(x):
        if hk.running_init():
            raise ValueError("made elsewhere")
        return block(x)

    params = {"blocks/linear": stack_of(3).init(KEY, X)["layers/linear"]}
    with pytest.raises(ValueError, match="parameter 'w' for module 'linear'") as error:
        hk.transform(make(3)(layer)).apply(params, None, X)
    (note,) = (note for note in error.value.__notes__ if "made elsewhere" in note)
    assert "They hold: blocks/linear/b" in note


def test_error_inside_a_module_names_the_whole_scope():
    class Net(hk.Module):
        def __call__(self, x):
            return make(3)(lambda x: x[:, :4])(x)

    with pytest.raises(TypeError, match="layer_stack 'net/layers'"):
        hk.transform(lambda x: Net()(x)).init(KEY, X)


def test_error_of_the_layer_function_itself_is_shown():
    def broken(x):
        raise ValueError("mine")

    model = hk.transform(lambda x: make(3)(broken)(x))
    with pytest.raises(ValueError, match="mine"):
        model.init(KEY, X)
    with pytest.raises(ValueError, match="mine"):
        model.apply({}, None, X)


def before_and_inside(x):
    linear = hk.Linear(8)
    return make(3)(lambda x: linear(x))(linear(x))


def inside_and_after(x):
    linear = hk.Linear(8)
    return linear(make(3)(lambda x: linear(x))(x))


def submodule_before_and_inside(x):
    class Outer(hk.Module):
        def __call__(self, x):
            return hk.Linear(8)(x)

    outer = Outer()
    return make(3)(lambda x: outer(x))(outer(x))


@pytest.mark.parametrize("model", [before_and_inside, submodule_before_and_inside])
def test_module_used_before_and_inside(model):
    with pytest.raises(ValueError) as error:
        hk.transform(model).init(KEY, X)
    for text in ["layer_stack 'layers'", "linear/", "made outside", "close over it"]:
        assert text in str(error.value)


def test_module_used_inside_and_after():
    model = hk.transform(inside_and_after)
    params = model.init(KEY, X)
    with pytest.raises(ValueError, match="'linear' was made outside of the stack"):
        model.apply(params, None, X)


class Net(hk.Module):
    """Several stacks in a module."""

    def __init__(self, *stacks):
        super().__init__()
        self.stacks = stacks

    def __call__(self, x):
        for stack in self.stacks:
            x = stack(x)
        return x

    def other(self, x):
        return self.stacks[-1](x)


def widened(x):
    return jnp.concatenate([x, x])


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda good, bad: bad(good(X)), "__layer_stack_no_per_layer_1"),
        (lambda good, bad: Net(good, good, bad)(X), "net/__layer_stack_no_per_layer_2"),
        (lambda good, bad: Net(bad).other(X), "net/~other/__layer_stack_no_per_layer"),
    ],
    ids=["second", "third in a module", "in a method"],
)
def test_errors_name_the_stack_as_the_tree_does(run, name):
    good, bad = (hk_stack.layer_stack(2)(f) for f in (block, widened))
    with pytest.raises(TypeError, match=f"^layer_stack '{name}' of layer function"):
        hk.transform(lambda: run(good, bad)).init(KEY)


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_parameters_of_a_module_made_outside_that_are_not_stacked(loop):
    def run(x):
        up = hk.Linear(8, name="up")
        return make(3)(lambda x: up(x))(x)

    params = {"up": hk.transform(block).init(KEY, X)["linear"]}
    with hk_stack.use_loop(loop), pytest.raises(ValueError) as error:
        hk.transform(run).apply(params, None, X)
    for text in ["layer_stack 'layers'", "'up'", "up/w", "made outside", "close over"]:
        assert text in str(error.value)


def test_module_made_outside_and_used_inside_only():
    def model(stack):
        def run(x):
            linear = hk.Linear(8)
            return stack(3, name="layers")(lambda x: linear(x))(x)

        return hk.transform(run)

    ours, theirs = model(hk_stack.layer_stack), model(hk.layer_stack)
    params = theirs.init(KEY, X)
    assert jax.tree.map(jnp.shape, ours.init(KEY, X)) == jax.tree.map(jnp.shape, params)
    assert jnp.allclose(ours.apply(params, None, X), theirs.apply(params, None, X))
