"""What users get wrong: each error says where, what was found and what to write."""

import contextlib
import functools
import pathlib
import traceback

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hk_stack
from hk_stack import checkpoint

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


# What messages and notes advise, and that it works: what goes wrong, the error, what it
# says, and what is written instead.


def run(f, *args, kwargs=None, **options):
    """Initialises a stack `layers` of three `f`, and calls it."""

    def model(*args):
        return make(3, **options)(f)(*args, **(kwargs or {}))

    model = hk.transform(model)
    return model.apply(model.init(KEY, *args), KEY, *args)


class Tanh(hk.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def __call__(self, x):
        return jnp.tanh(self.scale * x)


class Asynchronous:
    async def __call__(self, x):
        return x


async def coroutine(x):
    return x


def generator(x):
    yield x


def flagged(x, is_training):
    return x + 1.0 if is_training else x


def flag_of_jit(**options):
    def model(x, is_training):
        return make(3)(flagged)(x, is_training=is_training)

    apply = hk.transform(model).apply
    return jax.jit(lambda **given: apply({}, None, X, **given), **options)(
        is_training=True
    )


def half(x):
    return x.astype(jnp.float32) * 0.5


def index():
    return hk_stack.layer_index()


def entry(x):
    return x * [1.0, 2.0, 3.0][index()]


def numbered(x):
    return hk.Linear(8, name=f"linear_{index()}")(x)


def takes_reverse(x, reverse):
    return -x if reverse else x


COUNT = jnp.int32(1)
PER_LAYER = {"with_per_layer_inputs": True}
TABLE = np.arange(3.0, dtype=np.float32)
NAMES = hk_stack.NumberedLayers("tanh_{}")
OF_LOOP = {"tanh_0": {"w": X}, "tanh_1": {"w": X}}
OF_STACK = {"tanh": {"w": jnp.ones([2, 2, 8])}}
REVERSED = {"pass_reverse_to_layer_fn": True}
ADVICE = {
    "int becomes float": (
        lambda: run(half, COUNT),
        TypeError,
        ["int32[] to float32[]. Cast the input with .astype(jnp.float32)"],
        lambda: run(half, COUNT.astype(jnp.float32)),
    ),
    "int becomes float, back": (
        lambda: run(half, COUNT),
        TypeError,
        ["or the result back"],
        lambda: run(lambda n: half(n).astype(jnp.int32), COUNT),
    ),
    "int becomes float, in a float carry": (
        lambda: run(half, COUNT, carry_dtype=jnp.float32),
        TypeError,
        ["Cast the input"],
        lambda: run(half, COUNT.astype(jnp.float32)),
    ),
    "bool becomes float": (
        lambda: run(half, jnp.array(True)),
        TypeError,
        ["Cast the input with .astype(jnp.float32)"],
        lambda: run(half, jnp.float32(1)),
    ),
    "float becomes int": (
        lambda: run(lambda x: jnp.round(x).astype(int), X),
        TypeError,
        ["Cast the result with .astype(jnp.float32)"],
        lambda: run(lambda x: jnp.round(x).astype(int).astype(jnp.float32), X),
    ),
    "float becomes complex": (
        lambda: run(lambda x: x.astype(jnp.complex64), X),
        TypeError,
        ["Cast the input with .astype(jnp.complex64), or return a part"],
        lambda: run(lambda x: x.astype(jnp.complex64), X.astype(jnp.complex64)),
    ),
    "float becomes smaller": (
        lambda: run(lambda x: x.astype(jnp.bfloat16), X),
        TypeError,
        ["carry_dtype=jnp.float32"],
        lambda: run(lambda x: x.astype(jnp.bfloat16), X, carry_dtype=jnp.float32),
    ),
    "key becomes its data": (
        lambda: run(jax.random.key_data, KEY),
        TypeError,
        ["Return a key for a key"],
        lambda: run(lambda k: jax.random.fold_in(k, 1), KEY),
    ),
    "nothing returned": (
        lambda: run(lambda x: None, X),
        TypeError,
        ["Is a `return` missing?"],
        None,
    ),
    "nothing returned, of two": (
        lambda: run(lambda x, y: None, X, X),
        TypeError,
        ["Is a `return` missing?"],
        None,
    ),
    "nothing returned, per layer": (
        lambda: run(lambda x: None, X, **PER_LAYER),
        TypeError,
        ["Is a `return` missing?"],
        None,
    ),
    "pair without per-layer inputs": (
        lambda: run(lambda x: (x, x.mean()), X),
        TypeError,
        ["with_per_layer_inputs=True"],
        lambda: run(lambda x: (x, x.mean()), X, with_per_layer_inputs=True),
    ),
    "three with per-layer inputs": (
        lambda: run(lambda x: (x, x, x), X, **PER_LAYER),
        TypeError,
        ["Return (x, (y, z))"],
        lambda: run(lambda x: (x, (x, x)), X, **PER_LAYER),
    ),
    "one for two": (
        lambda: run(lambda x, y: x * y, X, X),
        TypeError,
        ["one value for each argument: (x, y)", "stack(f)(x, y=...)"],
        lambda: run(lambda x, y: x * y, X, kwargs={"y": X}),
    ),
    "list for a tuple": (
        lambda: run(lambda x, y: [x, y], X, X),
        TypeError,
        ["Return a tuple"],
        lambda: run(lambda x, y: (x, y), X, X),
    ),
    "by keyword only": (
        lambda: run(lambda x: x, kwargs={"x": X}),
        TypeError,
        ["by position: stack(f)(x)"],
        lambda: run(lambda x: x, X),
    ),
    "class": (
        lambda: run(Tanh, X),
        TypeError,
        ["'Tanh'", "class", "lambda x: Tanh(...)(x)"],
        lambda: run(lambda x: Tanh(2.0)(x), X),
    ),
    "partial class": (
        lambda: run(functools.partial(Tanh, 2.0), X),
        TypeError,
        ["class", "lambda x: Tanh(...)(x)"],
        lambda: run(lambda x: Tanh(2.0)(x), X),
    ),
    "module returned": (
        lambda: run(lambda x: Tanh(2.0), X),
        TypeError,
        ["a Tanh", "Call it"],
        lambda: run(lambda x: Tanh(2.0)(x), X),
    ),
    "text returned": (
        lambda: run(lambda x: {"a": "b"}, {"a": X}),
        TypeError,
        ["a str (at a)"],
        None,
    ),
    "coroutine function": (
        lambda: run(coroutine, X),
        TypeError,
        ["'coroutine'", "def for async def"],
        None,
    ),
    "asynchronous object": (
        lambda: run(Asynchronous(), X),
        TypeError,
        ["def for async def"],
        None,
    ),
    "generator function": (
        lambda: run(generator, X),
        TypeError,
        ["return for yield"],
        None,
    ),
    "list of numbers": (
        lambda: run(lambda x: jnp.tanh(x), [1.0, 2.0]),
        TypeError,
        ["a list as `x`", "jnp.asarray(x)"],
        lambda: run(lambda x: jnp.tanh(x), jnp.asarray([1.0, 2.0])),
    ),
    "list of arrays": (
        lambda: run(block, [X, X]),
        AttributeError,
        ["a list as `x`", "jnp.stack(x)"],
        lambda: run(block, jnp.stack([X, X])),
    ),
    "list, scaled": (  # Python calls it a sequence.
        lambda: run(lambda x: x * 2.0, [1.0, 2.0]),
        TypeError,
        ["a list as `x`", "jnp.asarray(x)"],
        lambda: run(lambda x: x * 2.0, jnp.asarray([1.0, 2.0])),
    ),
    "list, doubled": (
        lambda: run(lambda x: x * 2, [X, X]),
        TypeError,
        ["`x` is a list", "jnp.stack(x)"],
        lambda: run(lambda x: x * 2, jnp.stack([X, X])),
    ),
    "None": (lambda: run(lambda x: x + 1, None), TypeError, ["NoneType as `x`"], None),
    "flag by position": (
        lambda: run(flagged, X, True),
        jax.errors.TracerBoolConversionError,
        ["`is_training` was given by position", "stack(f)(x, is_training=True)"],
        lambda: run(flagged, X, kwargs={"is_training": True}),
    ),
    "text by position": (
        lambda: run(flagged, X, "train"),
        TypeError,
        ["`is_training` is a str", "stack(f)(x, is_training=...)"],
        lambda: run(flagged, X, kwargs={"is_training": "train"}),
    ),
    "flag that jit traces": (
        flag_of_jit,
        jax.errors.TracerBoolConversionError,
        ["`is_training` is traced already", "static_argnames='is_training'"],
        lambda: flag_of_jit(static_argnames="is_training"),
    ),
    "if on the index": (
        lambda: run(lambda x: x if index() == 0 else -x, X),
        jax.errors.TracerBoolConversionError,
        ["jnp.where", "layer_index()"],
        lambda: run(lambda x: jnp.where(index() == 0, x, -x), X),
    ),
    "range of the index": (
        lambda: run(lambda x: sum(range(index()), x), X),
        jax.errors.TracerIntegerConversionError,
        ["jax.lax.fori_loop", "layer_index()"],
        lambda: run(lambda x: jax.lax.fori_loop(0, index(), lambda _, x: x + 1, x), X),
    ),
    "entry of a list": (
        lambda: run(entry, X),
        jax.errors.TracerIntegerConversionError,
        ["jnp.stack(entries)[i]"],
        lambda: run(lambda x: x * jnp.stack([1.0, 2.0, 3.0])[index()], X),
    ),
    "entry of a table": (
        lambda: run(lambda x: x * TABLE[index()], X),
        jax.errors.TracerArrayConversionError,
        ["jnp.asarray(table)[i]"],
        lambda: run(lambda x: x * jnp.asarray(TABLE)[index()], X),
    ),
    "float of the index": (
        lambda: run(lambda x: x * float(index()), X),
        jax.errors.ConcretizationTypeError,
        ["x.astype(float)"],
        lambda: run(lambda x: x * index().astype(float), X),
    ),
    "shape by the index": (
        lambda: run(lambda x: x + jnp.ones([index()]).sum(), X),
        TypeError,
        ["shapes take no traced value"],
        None,
    ),
    "name with the index": (
        lambda: run(numbered, X),
        ValueError,
        ["need no layer_index()"],
        lambda: run(lambda x: hk.Linear(8)(x), X),
    ),
    "numpy": (
        lambda: run(lambda x: np.tanh(x), X),
        jax.errors.TracerArrayConversionError,
        ["write jnp for np"],
        lambda: run(lambda x: jnp.tanh(x), X),
    ),
    "mask": (
        lambda: run(lambda x: x + x[x > 0].sum(), X),
        jax.errors.NonConcreteBooleanIndexError,
        ["jnp.where(mask, x, 0)"],
        lambda: run(lambda x: x + jnp.where(x > 0, x, 0).sum(), X),
    ),
    "per-layer input not asked for": (
        lambda: run(lambda x, y: (x * y, None), X, jnp.ones(3)),
        ValueError,
        ["`y` goes from layer to layer", "layer_stack(3, with_per_layer"],
        lambda: run(lambda x, y: (x * y, None), X, jnp.ones(3), **PER_LAYER),
    ),
    "per-layer input not given": (
        lambda: run(lambda x, y: (x * y, None), X, **PER_LAYER),
        TypeError,
        ["takes (x, y)", "given (x)", "stack(f)(x, y)"],
        lambda: run(lambda x, y: (x * y, None), X, jnp.ones(3), **PER_LAYER),
    ),
    "too many arguments": (
        lambda: run(lambda x: x, X, X),
        TypeError,
        ["takes (x)", "given (x, argument 1)"],
        None,
    ),
    "unknown keyword": (
        lambda: run(lambda x: x, X, kwargs={"mask": X}),
        TypeError,
        ["takes (x)", "given (x, mask=)"],
        None,
    ),
    "reverse not passed": (
        lambda: run(takes_reverse, X, kwargs={"reverse": True}),
        TypeError,
        ["pass_reverse_to_layer_fn=True"],
        lambda: run(takes_reverse, X, kwargs={"reverse": True}, **REVERSED),
    ),
    "reverse not taken": (
        lambda: run(lambda x: x, X, **REVERSED),
        TypeError,
        ["leave pass_reverse_to_layer_fn out"],
        lambda: run(lambda x: x, X),
    ),
    "reverse of another kind": (
        lambda: run(block, X, kwargs={"reverse": "yes"}),
        TypeError,
        ["reverse must be True or False"],
        lambda: run(block, X, kwargs={"reverse": True}),
    ),
    "all in one call": (
        lambda: make(3)(block, X),
        TypeError,
        ["layer_stack(num_layers)(layer_function)(x)"],
        lambda: run(block, X),
    ),
    "layer function second": (
        lambda: hk_stack.layer_stack(3, block),
        TypeError,
        ["with_per_layer_inputs", "layer_stack(num_layers)(layer_function)(x)"],
        None,
    ),
    "name second": (
        lambda: hk_stack.layer_stack(3, "layers"),
        TypeError,
        ["with_per_layer_inputs must be True or False"],
        None,
    ),
    "3.0 layers": (lambda: make(3.0), TypeError, ["3.0 (float)", "Write 3."], None),
    "no number of layers": (lambda: make(float("nan")), TypeError, ["nan"], None),
    "name is no text": (
        lambda: hk_stack.layer_stack(3, name=3),
        TypeError,
        ["name must be a str", "3 (int)"],
        None,
    ),
    "text as a map": (
        lambda: run(block, X, transparent=True, transparency_map="tanh_{}"),
        TypeError,
        ["transparency_map", "hk_stack.NumberedLayers('tanh_{}')"],
        lambda: run(lambda x: Tanh()(x), X, transparent=True, transparency_map=NAMES),
    ),
    "class as a map": (
        lambda: hk_stack.stack_params(OF_LOOP, hk_stack.NumberedLayers),
        TypeError,
        ["NumberedLayers(...), an instance"],
        None,
    ),
    "text as a map to save": (
        lambda: checkpoint.save("not_written.safetensors", OF_LOOP, layers="tanh_{}"),
        TypeError,
        ["layers must be a naming map", "hk_stack.NumberedLayers('tanh_{}')"],
        None,
    ),
    "text as a map to stack": (
        lambda: hk_stack.stack_params(OF_LOOP, "tanh_{}"),
        TypeError,
        ["hk_stack.NumberedLayers('tanh_{}')"],
        lambda: hk_stack.stack_params(OF_LOOP, NAMES),
    ),
    "text as a map to unstack": (
        lambda: hk_stack.unstack_params(OF_STACK, "tanh_{}"),
        TypeError,
        ["hk_stack.NumberedLayers('tanh_{}')"],
        lambda: hk_stack.unstack_params(OF_STACK, NAMES),
    ),
}


def said_by(error):
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("case", ADVICE)
def test_advice(case):
    wrong, kind, texts, right = ADVICE[case]
    with pytest.raises(kind) as error:
        wrong()
    said = said_by(error.value)
    for text in texts:
        assert text in said
    if right is not None:
        right()


@pytest.mark.parametrize("loop", ["scan", "unrolled", "python"])
@pytest.mark.parametrize("case", ["flag by position", "nothing returned", "numpy"])
def test_advice_is_the_same_in_each_loop(case, loop):
    wrong, kind, texts, _ = ADVICE[case]
    with hk_stack.use_loop(loop), pytest.raises(kind) as error:
        wrong()
    said = said_by(error.value)
    for text in [*texts, "layer_stack 'layers' of layer function"]:
        assert text in said


def test_advice_at_apply_names_the_loop_that_helps():
    model = hk.transform(lambda x: make(3)(lambda x: x if index() == 0 else -x)(x))
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        model.apply({}, None, X)
    assert 'loop="python" runs them one by one' in said_by(error.value)
    with hk_stack.use_loop("python"):
        model.apply({}, None, X)


def test_advice_is_given_once_in_nested_stacks():
    def outer(x):
        return hk_stack.layer_stack(2, name="inner")(lambda x: np.tanh(x))(x)

    with pytest.raises(jax.errors.TracerArrayConversionError) as error:
        run(outer, X)
    assert said_by(error.value).count("write jnp for np") == 1


# A layer that does not keep its carry, where initial values depend on it.


def changed(change):
    def layer(x):
        return change(data_dependent(x))

    return layer


CHANGES = {
    "dtype": (
        lambda x: x.astype(jnp.bfloat16),
        "`x` goes from float32[2, 8] to bfloat16",
    ),
    "shape": (lambda x: x[:, :4], "`x` goes from float32[2, 8] to float32[2, 4]"),
    "rank": (lambda x: x[None], "`x` goes from float32[2, 8] to float32[1, 2, 8]"),
    "structure": (lambda x: {"a": x}, "must return what it takes (x)"),
    "nothing": (lambda x: None, "Is a `return` missing?"),
}


@pytest.mark.parametrize("loop", ["scan", "unrolled", "python"])
@pytest.mark.parametrize("method", ["auto", "scan"])
@pytest.mark.parametrize("change", CHANGES)
def test_carry_at_init(change, method, loop):
    f, text = CHANGES[change]
    with pytest.raises(TypeError) as error:
        init(changed(f), X, init=method, loop=loop)
    assert text in str(error.value)
    assert "layer_stack 'layers' of layer function 'layer'" in str(error.value)


@pytest.mark.parametrize("start", [2.0, 2])
def test_a_weak_carry_may_change_its_type_at_init(start):
    def layer(x):
        return x * hk.get_parameter("w", [], init=lambda *_: jnp.float32(x) + 1.0)

    params, _ = init(layer, start)
    assert (params["layers/~"]["w"] == jnp.array([3.0, 7.0, 43.0])).all()


# Taps.


def tapped(**options):
    def layer(x):
        return hk_stack.tap(jnp.tanh(x), "hidden")

    apply = hk.transform(make(3)(layer)).apply
    return hk_stack.collect(apply, **options)({}, None, X)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"select": "layers/hiden"}, ["'layers/hiden'", "There are layers/hidden."]),
        ({"add": {"hidden": X}}, ["at hidden", "There are layers/hidden."]),
    ],
)
def test_collect_says_which_taps_there_are(options, texts):
    with pytest.raises(ValueError) as error:
        tapped(**options)
    for text in texts:
        assert text in str(error.value)
    tapped(select="layers/hidden")
    with pytest.raises(ValueError, match="There are no taps in it"):
        hk_stack.collect(jnp.tanh, "x")(X)


def files_of(error):
    return [frame.filename for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize(
    "fails",
    [
        lambda: init(lambda x: x @ jnp.ones([3, 3]), X),
        lambda: hk_stack.roll(lambda x: x @ jnp.ones([3, 3]))(X),
        lambda: make(0),
        lambda: hk_stack.collect(jnp.sin, "none")(X),
        lambda: hk_stack.partition(jnp.sin, X).call({}, X),
    ],
)
def test_tracebacks_are_of_the_user(fails):
    with pytest.raises((TypeError, ValueError)) as found:
        fails()
    ours = str(pathlib.Path(hk_stack.__file__).parent)
    files = files_of(found.value)
    assert __file__ in files and not [file for file in files if file.startswith(ours)]
    with filtering("off"), pytest.raises((TypeError, ValueError)) as found:
        fails()
    assert [file for file in files_of(found.value) if file.startswith(ours)]


@contextlib.contextmanager
def filtering(mode):
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", mode)
    yield
    jax.config.update("jax_traceback_filtering", before)
