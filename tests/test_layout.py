"""Trees of a stack and of a Python loop: of every model, optimiser and kind of array.

`L` is the number of layers, `B` the batch, `D` the features.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agreement import FAST, assert_close, assert_equal

import hk_stack
from hk_stack import NumberedLayers, stack_params, unstack_params

L, B, D = 3, 8, 4
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (B, D))
P = jax.sharding.PartitionSpec
BLOCKS = NumberedLayers("block_{}", "layers/block")

jit = functools.partial(jax.jit, compiler_options=FAST)


def stacked_by(maps, tree):
    for naming_map in maps:
        tree = stack_params(tree, naming_map)
    return tree


def unstacked_by(maps, tree):
    for naming_map in reversed(maps):
        tree = unstack_params(tree, naming_map)
    return tree


def assert_same(found, expected):
    """The same trees bit for bit, and the same kinds of leaves."""
    assert_equal(found, expected)
    assert jax.tree.map(type, found) == jax.tree.map(type, expected)


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# Models


class Block(hk.Module):
    """Parameters of several modules, and state."""

    def __call__(self, x):
        x = x + jnp.tanh(hk.Linear(D)(hk.LayerNorm(-1, True, True)(x)))
        with jax.numpy_dtype_promotion("standard"):  # Haiku's BatchNorm promotes.
            return x + 0.2 * jnp.sin(hk.BatchNorm(True, True, 0.9)(x, True))


class Global(hk.Module):
    """A block of other modules and shapes than `Block`."""

    def __call__(self, x):
        mean = jnp.mean(x, axis=0, keepdims=True)
        return x + hk.Linear(D, name="out")(jnp.sin(hk.Linear(2 * D)(x - mean)))


def plain(x):
    """A layer that is no module."""
    y = jax.nn.relu(hk.Linear(2 * D)(hk.LayerNorm(-1, True, True)(x)))
    return x + hk.Linear(D)(y)


class Row(NamedTuple):
    """A model, `layers` of it in a loop or in a stack, and the maps between them.

    Attributes:
      maps: For `stack_params`, in turn.
      model: From `layers`, a function of a name, a depth, a layer function in a stack,
        and how the loop calls layer i, to the model.
    """

    maps: tuple[NumberedLayers, ...]
    model: Callable[[Callable[..., Any]], Callable[[jax.Array], jax.Array]]

    def transformed(self, layers):
        return hk.transform_with_state(lambda x: self.model(layers)(x))


def in_loop(depth, in_stack, of_loop, name="layers"):
    del in_stack, name

    def run(x):
        for i in range(depth):
            x = of_loop(i)(x)
        return x

    return run


def in_stack(depth, in_stack, of_loop, name="layers", layer_stack=None):
    del of_loop
    return (layer_stack or hk_stack.layer_stack)(depth, name=name)(in_stack)


def block(name=None):
    return lambda x: Block(name=name)(x)


def scopes(layers):
    def model(x):
        x = hk.Linear(D, name="embed")(x)
        x = layers(L, block("block"), lambda i: block(f"block_{i}"))(x)
        return hk.Linear(2, name="head")(x)

    return model


def suffixes_of_functions(layers):
    return layers(L, plain, lambda i: plain)


def nested(layers):
    class Outer(hk.Module):
        def __call__(self, x):
            x = layers(2, block("inner"), lambda j: block(f"inner_{j}"), "inners")(x)
            return hk.Linear(D)(x)

    def outer(name):
        return lambda x: Outer(name=name)(x)

    return layers(L, outer("outer"), lambda i: outer(f"outer_{i}"), "outers")


def pattern(layers):
    """Two local blocks, then a global one, and so on for 8 blocks."""
    kinds = (Block, Block, Global)

    def of_stack(x):
        for kind, name in zip(kinds, ("first", "second", "third"), strict=True):
            x = kind(name=name)(x)
        return x

    def of_loop(i):
        def three(x):
            for k, kind in enumerate(kinds):
                x = kind(name=f"block_{3 * i + k}")(x)
            return x

        return three

    def model(x):
        x = layers(2, of_stack, of_loop)(x)
        return Block(name="block_7")(Block(name="block_6")(x))

    return model


# fmt: off
ROWS = {
    "scopes": Row((BLOCKS,), scopes),
    "suffixes_of_functions": Row(
        (NumberedLayers("linear", ["layers/linear", "layers/linear_1"]),
         NumberedLayers("layer_norm", "layers/layer_norm")),
        suffixes_of_functions),
    "nested": Row(
        (NumberedLayers("outer_*/inner_{}", "outer_*/inners/inner"),
         NumberedLayers("outer_{}", "outers/outer")),
        nested),
    "pattern": Row(
        (NumberedLayers(
            "block_{}", ["layers/first", "layers/second", "layers/third"], 2),),
        pattern),
}
# fmt: on


def initial(model):
    """Parameters and state, no two leaves of them equal."""
    shapes = jax.eval_shape(model.init, KEY, X)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [rng.uniform(0.1, 0.9, s.shape).astype(s.dtype) for s in leaves]
    return jax.tree.unflatten(tree, map(jnp.asarray, drawn))


def run(model):
    """Output and new state."""
    return jit(lambda params, state: model.apply(params, state, None, X))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_tree_of_a_loop_is_that_of_a_stack_and_back(row):
    tree = initial(row.transformed(in_loop))
    stacked = stacked_by(row.maps, tree)
    for layer_stack in (hk_stack.layer_stack, hk.layer_stack):
        layers = functools.partial(in_stack, layer_stack=layer_stack)
        shapes = jax.eval_shape(row.transformed(layers).init, KEY, X)
        assert types(stacked) == types(shapes)
    assert_same(unstacked_by(row.maps, stacked), tree)


# Transparent stacks


class Normed(hk.Module):
    """A block that repeats its number in the name of a module."""

    def __init__(self, name, norm):
        super().__init__(name)
        self.norm = norm

    def __call__(self, x):
        return x + hk.Linear(D)(hk.LayerNorm(-1, True, True, name=self.norm)(x))


def local_and_global(*names):
    def layer(x):
        return Global(name=names[1])(Block(name=names[0])(x))

    return layer


TRANSPARENT = {
    "scopes": (
        NumberedLayers("block_{}"),
        block("block"),
        lambda i: block(f"block_{i}"),
    ),
    "suffixes": (NumberedLayers("block"), block("block"), lambda i: block()),
    "pattern": (
        NumberedLayers("block_{}", ["local", "global"], L),
        local_and_global("local", "global"),
        lambda i: local_and_global(f"block_{2 * i}", f"block_{2 * i + 1}"),
    ),
    "several": (
        [NumberedLayers("h_{:02}/h_{:02}_norm"), NumberedLayers("h_{:02}", "h")],
        lambda x: Normed("h", "h_norm")(x),
        lambda i: lambda x: Normed(f"h_{i:02}", f"h_{i:02}_norm")(x),
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_stacks_have_the_tree_of_the_loop(name):
    naming_map, layer, of_loop = TRANSPARENT[name]

    class Net(hk.Module):
        """A layer before and after, and between them blocks in a loop or in a stack."""

        def __call__(self, x, layer_stack):
            layers = in_loop(L, layer, of_loop)
            if layer_stack:
                layers = layer_stack(L, transparent=True, transparency_map=naming_map)(
                    layer
                )
            x = layers(hk.Linear(D, name="before")(x))
            return hk.Linear(D, name="after")(x)

    def model(layer_stack):
        return hk.transform_with_state(lambda x: Net()(x, layer_stack))

    loop, stack, haiku = map(model, (None, hk_stack.layer_stack, hk.layer_stack))
    tree = initial(loop)
    assert types(jax.eval_shape(stack.init, KEY, X)) == types(tree)
    if name != "several":
        # Haiku's stores the new state under the names of the stack, so not that.
        assert types(jax.eval_shape(haiku.init, KEY, X)[0]) == types(tree[0])
    if name in ("pattern", "several"):
        assert_close(run(stack)(*tree), run(loop)(*tree), 1e-4)


def made_blocks():
    names = ["block", *(f"block_{i}" for i in range(L))]
    return {name: Block(name=name) for name in names}


class Outside(hk.Module):
    """Blocks made outside of the layer; `run` takes one, and a function of all."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.blocks = made_blocks()

    def init(self, x):
        return self(x, self.blocks)

    def __call__(self, x, blocks=None):
        blocks = blocks or made_blocks()
        return self.run(blocks["block"], lambda i: blocks[f"block_{i}"])(x)

    def method(self, x):
        blocks = made_blocks()
        return self.run(blocks["block"], lambda i: blocks[f"block_{i}"])(x)


OUTSIDE = {"__call__": "block_{}", "init": "~/block_{}", "method": "block_{}"}


@pytest.mark.parametrize(
    ("where", "loop"), [("__call__", "scan"), ("init", "python"), ("method", "scan")]
)
def test_transparent_stacks_of_modules_made_outside(where, loop):
    def model(blocks):
        def net(x):
            return hk.Linear(D, name="after")(getattr(Outside(blocks), where)(x))

        # In another Python loop, names have a scope before that of the module.
        return hk.transform_with_state(hk_stack.layer_stack(2, name="around")(net))

    def stack(layer, _):
        names = NumberedLayers(OUTSIDE[where])
        return hk_stack.layer_stack(L, transparent=True, transparency_map=names)(layer)

    loop_of_blocks = model(functools.partial(in_loop, L))
    tree = initial(loop_of_blocks)
    in_stacks = model(stack)
    assert types(jax.eval_shape(in_stacks.init, KEY, X)) == types(tree)
    with hk_stack.use_loop(loop):
        assert_close(run(in_stacks)(*tree), run(loop_of_blocks)(*tree), 1e-4)


def test_transparent_stacks_have_haikus_names_of_modules_made_outside():
    """The map knows the module's whole name, so that is kept, as Haiku keeps it."""

    def init(stack):
        def run(layer, _):
            names = NumberedLayers("outside/block_{}", "outside/block")
            return stack(L, transparent=True, transparency_map=names)(layer)

        model = hk.transform_with_state(lambda x: Outside(run)(x))
        return jax.eval_shape(model.init, KEY, X)[0]

    params = init(hk_stack.layer_stack)
    assert "outside/outside/block_0/linear" in params
    assert params == init(hk.layer_stack)


def test_transparent_stacks_leave_the_names_after_them_alone():
    def init(stack):
        def run(x):
            names = NumberedLayers("block_{}")
            x = stack(L, transparent=True, transparency_map=names)(block("block"))(x)
            return stack(L)(plain)(x)

        return jax.eval_shape(hk.transform_with_state(run).init, KEY, X)[0]

    assert init(hk_stack.layer_stack) == init(hk.layer_stack)


# Optimisers


def of_weights(tree):
    """Which parameters decay."""
    return {m: {name: name == "w" for name in leaves} for m, leaves in tree.items()}


def of_modules(tree):
    """A prefix of the parameters' tree, as optax allows it."""
    return {m: "norm" not in m for m in tree}


def by_module(tree):
    return {m: "stack" if "block" in m else "outside" for m in tree}


def by_leaf(tree):
    return {m: {name: name for name in leaves} for m, leaves in tree.items()}


ADAM = optax.adam(1e-2)
EACH = {name: ADAM for name in ("w", "b", "scale", "offset")}
OPTIMISERS = {
    "adamw": optax.adamw(1e-2, mask=of_weights),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "chain": optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1e-2, 8)),
        optax.scale(-1.0),
    ),
    "masked_modules": optax.chain(optax.masked(ADAM, of_modules), optax.scale(-1e-2)),
    "partition": optax.partition({**EACH, "b": optax.lion(1e-3)}, by_leaf),
    "frozen": optax.partition(
        {"stack": optax.set_to_zero(), "outside": ADAM}, by_module
    ),
    "inject": optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(1e-2, 1e-3, 8), weight_decay=1e-3
    ),
    "multi_steps": optax.MultiSteps(ADAM, 2),
    "schedule_free": optax.contrib.schedule_free_sgd(1e-2),
}


@pytest.fixture(scope="module")
def untrained():
    return initial(ROWS["scopes"].transformed(in_loop))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_states_are_those_of_the_other_layout(name, untrained):
    init = OPTIMISERS[name].init
    params = jax.eval_shape(lambda tree: tree, untrained[0])
    state = jax.eval_shape(init, params)
    stacked = stack_params((params, state), BLOCKS)
    expected = jax.eval_shape(init, stacked[0])
    assert jax.tree.structure(stacked[1]) == jax.tree.structure(expected)
    assert types(stacked[1]) == types(expected)
    assert unstack_params(stacked, BLOCKS) == (params, state)
    if name == "momentum" or any(leaf.ndim for leaf in jax.tree.leaves(state)):
        alone = stack_params(state, BLOCKS)
        assert alone == stacked[1]
        assert unstack_params(alone, BLOCKS, L) == state


def test_training_goes_on_in_the_other_layout():
    """One step in a loop, then one in either, with the same losses and results.

    Of a pattern of blocks, where their order tells.
    """
    optimiser, row = OPTIMISERS["adamw"], ROWS["pattern"]

    def step(layers):
        model = row.transformed(layers)

        def loss(params, state):
            y, state = model.apply(params, state, None, X)
            return jnp.mean(jnp.square(y - 1.0)), state

        @jit
        def update(params, state, opt_state):
            (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(
                params, state
            )
            with jax.numpy_dtype_promotion("standard"):  # As optax does.
                updates, opt_state = optimiser.update(gradient, opt_state, params)
                params = optax.apply_updates(params, updates)
            return value, (params, state, opt_state)

        return update

    of_loop, untrained = step(in_loop), initial(row.transformed(in_loop))
    _, checkpoint = of_loop(*untrained, optimiser.init(untrained[0]))
    stacked = stacked_by(row.maps, checkpoint)
    assert_same(unstacked_by(row.maps, stacked), checkpoint)
    loss, stacked = step(in_stack)(*stacked)
    expected = of_loop(*checkpoint)
    assert_close((loss, unstacked_by(row.maps, stacked)), expected, 1e-3)


OTHER_SHAPES = {
    "novograd": (optax.novograd(1e-2), [".mu['", ".nu['"]),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=2), [".v_row['"]),
    "adafactor_unfactored": (optax.adafactor(1e-2), [".v_row['"]),
    "lbfgs": (optax.scale_by_lbfgs(2), [".diff_params_memory['"]),
    "sm3": (optax.sm3(1e-2), [".mu['", "[("]),
}


@pytest.mark.parametrize("name", OTHER_SHAPES)
@pytest.mark.parametrize("convert", [stack_params, unstack_params])
def test_states_of_other_shapes_are_refused(name, convert, untrained):
    optimiser, texts = OTHER_SHAPES[name]
    params = jax.eval_shape(lambda tree: tree, untrained[0])
    if convert is unstack_params:
        params = stack_params(params, BLOCKS)
    state = jax.eval_shape(optimiser.init, params)
    for tree in (state, {"params": params, "optimiser": state}):
        with pytest.raises(ValueError) as error:
            convert(tree, BLOCKS)
        for text in [convert.__name__, *texts, "optimiser.init(params)", "has shape"]:
            assert text in str(error.value)


# Leaves


def per_layer(make, num_layers=L):
    return {f"block_{i}/linear": {"w": make(i)} for i in range(num_layers)}


def weight(stacked):
    return stacked["layers/block/linear"]["w"]


def mesh(kind):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))


def numbers(shape, dtype, i=0):
    return np.asarray(np.random.default_rng(i).integers(0, 2, shape)).astype(dtype)


@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3)])
@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "bfloat16", "float8_e4m3fn", "int8", "int64", "bool"],
)
def test_numpy_stays_numpy(dtype, shape):
    dtype = jnp.dtype(dtype)
    tree = per_layer(functools.partial(numbers, shape, dtype))
    stacked = stack_params(tree, BLOCKS)
    assert type(weight(stacked)) is np.ndarray
    assert weight(stacked).dtype == dtype
    expected = np.stack([leaves["w"] for leaves in tree.values()])
    assert_equal(weight(stacked), expected)
    found = unstack_params(stacked, BLOCKS)
    assert_same(found, tree)
    for leaves in found.values():
        assert np.shares_memory(leaves["w"], weight(stacked)) or not leaves["w"].size


def keys(shape, i):
    return jax.random.split(jax.random.key(i), shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: jnp.asarray(numbers((), jnp.float32, i)),
        lambda i: jnp.asarray(numbers((0, 2), jnp.bfloat16, i)),
        lambda i: jnp.asarray(numbers((2, 3), jnp.int8, i)),
        functools.partial(keys, ()),
        functools.partial(keys, (2,)),
    ],
)
def test_jax_stays_jax(make):
    tree = per_layer(make)
    stacked = stack_params(tree, BLOCKS)
    assert isinstance(weight(stacked), jax.Array)
    assert (weight(stacked).dtype, weight(stacked).shape[0]) == (make(0).dtype, L)
    assert_same(unstack_params(stacked, BLOCKS), tree)
    assert_same(jit(lambda tree: stack_params(tree, BLOCKS))(tree), stacked)
    assert_same(jit(lambda tree: unstack_params(tree, BLOCKS))(stacked), tree)


def test_float64_of_jax_stays_float64():
    with jax.enable_x64(True):
        tree = per_layer(lambda i: jnp.full([2], 1 / 3 + i, jnp.float64))
    stacked = stack_params(tree, BLOCKS)
    assert weight(stacked).dtype == np.float64
    assert_same(unstack_params(stacked, BLOCKS), tree)
    numbers = stack_params(per_layer(float), BLOCKS)
    assert_same(numbers, stack_params(per_layer(lambda i: np.array(1.0 * i)), BLOCKS))
    mixed = {**tree, "block_1/linear": jax.tree.map(np.asarray, tree["block_1/linear"])}
    assert_same(stack_params(mixed, BLOCKS), jax.tree.map(np.asarray, stacked))


def test_arrays_stay_on_their_device():
    """Or are bound to none: programs on a sharded batch take them then."""
    tree = per_layer(lambda i: jax.device_put(jnp.ones([D]) * i, jax.devices()[1]))
    stacked = stack_params(tree, BLOCKS)
    for leaf in jax.tree.leaves((stacked, unstack_params(stacked, BLOCKS))):
        assert (leaf.devices(), leaf.committed) == ({jax.devices()[1]}, True)
    stacked = stack_params(per_layer(lambda i: jnp.ones([D]) * i), BLOCKS)
    for leaf in jax.tree.leaves((stacked, unstack_params(stacked, BLOCKS))):
        assert not leaf.committed


@pytest.mark.parametrize("kind", [*jax.sharding.AxisType][:2], ids=str)
@pytest.mark.parametrize("spec", [(), (None, "y"), (("x", "y"),)])
def test_sharding_is_kept(kind, spec):
    def on(*spec):
        return jax.NamedSharding(mesh(kind), P(*spec))

    def make(i):
        return jax.device_put(jnp.arange(32.0).reshape(4, 8) + i, on(*spec))

    tree = per_layer(make)
    stacked = stack_params(tree, BLOCKS)
    assert weight(stacked).sharding.is_equivalent_to(on(None, *spec), 3)
    found = unstack_params(stacked, BLOCKS)
    assert_same(found, tree)
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_equivalent_to(on(*spec), 2)


@pytest.mark.parametrize("kind", [*jax.sharding.AxisType][:2], ids=str)
@pytest.mark.parametrize("spec", [("x",), ("x", None, "y")])
def test_stacks_sharded_by_layer(kind, spec):
    sharding = jax.NamedSharding(mesh(kind), P(*spec))
    values = np.arange(4 * 4 * 8.0).reshape(4, 4, 8).astype(np.float32)
    stacked = {"layers/block/linear": {"w": jax.device_put(values, sharding)}}
    expected = unstack_params({"layers/block/linear": {"w": values}}, BLOCKS)
    for convert in (unstack_params, jit(unstack_params, static_argnums=1)):
        found = convert(stacked, BLOCKS)
        assert_equal(found, expected)
        for leaf in jax.tree.leaves(found):
            on = jax.NamedSharding(mesh(kind), P(*spec[1:]))
            assert leaf.sharding.is_equivalent_to(on, 2)


def test_shapes_keep_their_sharding():
    on = mesh(jax.sharding.AxisType.Auto)
    kind = jax.devices()[0].addressable_memories()[-1].kind
    device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    for of_layer, of_stack in (
        (None, None),
        (jax.NamedSharding(on, P("x")), jax.NamedSharding(on, P(None, "x"))),
        (
            jax.NamedSharding(on, P("x"), memory_kind=kind),
            jax.NamedSharding(on, P(None, "x"), memory_kind=kind),
        ),
        (device, device),
    ):
        spec = jax.ShapeDtypeStruct((D, 2), jnp.bfloat16, sharding=of_layer)
        tree = per_layer(lambda i, spec=spec: spec)
        stacked = stack_params(tree, BLOCKS)
        expected = jax.ShapeDtypeStruct((L, D, 2), jnp.bfloat16, sharding=of_stack)
        assert weight(stacked) == expected
        assert unstack_params(stacked, BLOCKS) == tree


@pytest.mark.parametrize("order", ["C", "F"])
def test_writing_to_numpy_arrays_changes_no_others(order):
    tree = per_layer(lambda i: np.array(numbers((4, 6), np.float32, i), order=order))
    expected = jax.tree.map(np.copy, tree)
    stacked = stack_params(tree, BLOCKS)
    for leaf in jax.tree.leaves(tree):
        leaf[...] = -1
    assert_same(unstack_params(stacked, BLOCKS), expected)
    weight(stacked)[...] = -2
    for leaf in jax.tree.leaves(tree):
        assert (leaf == -1).all()


@pytest.mark.parametrize(("num_layers", "size"), [(1, 1), (1, 1024), (L, 2)])
def test_donated_arrays_share_nothing_with_converted_ones(num_layers, size):
    donate = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0
    )
    tree = per_layer(lambda i: jnp.full([size], float(i)), num_layers)
    values = jax.tree.map(np.array, tree)
    stacked_values = stack_params(values, BLOCKS)

    stacked = stack_params(tree, BLOCKS)
    donate(tree)
    assert_equal(stacked, stacked_values)
    tree = unstack_params(stacked, BLOCKS)
    donate(stacked)
    assert_equal(tree, values)
    stacked = stack_params(tree, BLOCKS)
    assert_equal(donate(stacked), jax.tree.map(lambda w: w + 1, stacked_values))
    assert_equal(tree, values)


# Names


class Real(NamedTuple):
    """The names of a model's checkpoint, re-made: all shapes are small.

    Attributes:
      maps: From its layers to stacks.
      modules: How many layers have a module, its name in layer `{0}` (which `{1}` is as
        Haiku writes it), and its name in the stack.
      outside: Modules of no layer.
    """

    maps: list[NumberedLayers]
    modules: list[tuple[int, str, str]]
    outside: list[str]

    def trees(self):
        """Of random numbers, by layout."""
        rng = np.random.default_rng(0)
        outside = {module: {"w": rng.normal(size=[2])} for module in self.outside}
        of_loop, of_stack = {**outside}, {**outside}
        for depth, per_layer, stacked in self.modules:
            w, b = rng.normal(size=[depth, 2, 3]), rng.normal(size=[depth])
            of_stack[stacked] = {"w": w, "b": b}
            for i in range(depth):
                module = per_layer.format(i, f"_{i}" if i else "")
                of_loop[module] = {"w": w[i], "b": b[i, ...]}
        return {"per-layer": of_loop, "stacked": of_stack}


AF2 = "alphafold/alphafold_iteration/evoformer"
GNN = "mesh_gnn/~_networks_builder/processor"
GENCAST = "denoiser/~/block"
TOWER = "alphagenome/transformer_tower"
DOWNRES = "alphagenome/sequence_encoder/downres_block"
# fmt: off
REAL = {
    # Stored as Haiku's own layer_stack does it, two depths.
    "AlphaFold 2": Real(
        [NumberedLayers(f"{AF2}/evoformer_iteration_{{}}"),
         NumberedLayers(f"{AF2}/extra_msa_stack_{{}}")],
        [(depth, f"{AF2}/{stack}_{{0}}/{module}", f"{AF2}/{stack}/{module}")
         for depth, stack in [(48, "evoformer_iteration"), (4, "extra_msa_stack")]
         for module in ["msa_row_attention_with_pair_bias/attention",
                        "outer_product_mean/layer_norm_input"]],
        [f"{AF2}/preprocess_1d", "alphafold/alphafold_iteration/distogram_head"]),
    # Numbers of steps inside of names; an encoder's are no part of the stack.
    "GraphCast": Real(
        [NumberedLayers(f"{GNN}_*_{{}}_mesh_*")],
        [(16, f"{GNN}_{kind}_{{0}}_mesh_{module}", f"{GNN}_{kind}_mesh_{module}")
         for kind, of in [("edges", ""), ("nodes", "nodes_")]
         for module in [f"{of}mlp/~/linear_0", f"{of}mlp/~/linear_1",
                        f"{of}layer_norm"]],
        ["grid2mesh_gnn/~_networks_builder/processor_edges_0_grid2mesh_mlp/~/linear_0"]),
    # Blocks of a transformer with zeros in their numbers, which are repeated inside.
    "GenCast": Real(
        [NumberedLayers(f"{GENCAST}_{{:02}}/block_{{:02}}_*"),
         NumberedLayers(f"{GENCAST}_{{:02}}")],
        [(16, f"{GENCAST}_{{0:02}}/block_{{0:02}}_norm", f"{GENCAST}/block_norm"),
         (16, f"{GENCAST}_{{0:02}}/block_{{0:02}}_mha/~/k", f"{GENCAST}/block_mha/~/k"),
         (16, f"{GENCAST}_{{0:02}}/ffw/linear_1", f"{GENCAST}/ffw/linear_1")],
        [f"{GENCAST}_norm", f"{GNN}_edges_0_mesh_mlp/~/linear_0"]),
    # Numbers as Haiku makes them, of two kinds of blocks; and some with zeros.
    "AlphaGenome": Real(
        [NumberedLayers(f"{TOWER}/*_block", f"{TOWER}/layers/*_block"),
         NumberedLayers(f"{DOWNRES}_{{:02}}")],
        [(9, f"{TOWER}/mha_block{{1}}/linear", f"{TOWER}/layers/mha_block/linear"),
         (9, f"{TOWER}/mlp_block{{1}}", f"{TOWER}/layers/mlp_block"),
         (6, f"{DOWNRES}_{{0:02}}/conv_block/conv", f"{DOWNRES}/conv_block/conv")],
        ["alphagenome/sequence_encoder/dna_embedder", f"{TOWER}/pair_update"]),
    # Two stacks of one map.
    "encoder and decoder": Real(
        [NumberedLayers("net/*/h_{:03}/of_{}_{}", "net/*/layers")],
        [(depth, f"net/{half}/h_{{0:03}}/of_{{0}}_{{0}}{inside}",
          f"net/{half}/layers{inside}")
         for half, depth in [("encoder", 3), ("decoder_1", 12)]
         for inside in ["", "/linear", "/~/mlp/linear_0"]],
        ["net/encoder/embed", "net/encoder/h_0/of_0_0"]),
}
# fmt: on


@pytest.mark.parametrize("name", REAL)
def test_real_trees_go_into_stacks_and_back(name):
    of_loop, of_stack = REAL[name].trees().values()
    assert_same(stack_params(of_loop, REAL[name].maps), of_stack)
    assert_same(unstack_params(of_stack, REAL[name].maps), of_loop)


@pytest.mark.parametrize(
    ("naming_map", "module", "place"),
    [
        (NumberedLayers("block_{}", num_layers=2), "block_1", ("block", 1)),
        (NumberedLayers("*/b_1{}", ["*/s/b", "*/s/c"]), "a_b/b_17/d", ("a_b/s/c/d", 3)),
        (NumberedLayers("block_{}"), "block_10/linear", ("block/linear", 10)),
        (NumberedLayers("{}", "h"), "9/a/b", ("h/a/b", 9)),
        (NumberedLayers("layers/{}"), "layers/1", ("layers", 1)),
        (NumberedLayers("block.{}"), "block.1", ("block", 1)),
        (NumberedLayers("*_{}_mesh_*"), "edges_12_mesh_mlp", ("edges_mesh_mlp", 12)),
        (NumberedLayers("block_{:02}"), "block_07", ("block", 7)),
        (NumberedLayers("block_{:02}"), "block_100", ("block", 100)),
        (NumberedLayers("a_{:03}/b_{}"), "a_012/b_12/c", ("a/b/c", 12)),
        (NumberedLayers("linear"), "linear", ("linear", 0)),
        (NumberedLayers("linear", ["a", "b"]), "linear_1", ("b", 0)),
        (NumberedLayers("linear", ["a", "b"], 6), "linear_11", ("b", 5)),
    ],
    ids=str,
)
def test_numbers_in_names(naming_map, module, place):
    assert naming_map.flat_to_stacked(module) == place
    assert naming_map.stacked_to_flat(*place) == module


@pytest.mark.parametrize(
    ("naming_map", "module"),
    [
        (NumberedLayers("block_{}", num_layers=2), "block_2"),
        (NumberedLayers("block_{}", ["a", "b"], 2), "block_4"),
        (NumberedLayers("a_{:03}/b_{}"), "a_012/b_012"),
        (NumberedLayers("block_{}"), "block"),
        (NumberedLayers("block_{}"), "block_"),
        (NumberedLayers("block_{}"), "block_01"),
        (NumberedLayers("block_{}"), "block_-1"),
        (NumberedLayers("block_{}"), "block_1a/linear"),
        (NumberedLayers("block_{}"), "block_1_1"),
        (NumberedLayers("block_{}"), "net/block_1"),
        (NumberedLayers("block_{}"), "my_block_1"),
        (NumberedLayers("block_{}/linear"), "block_1/linear_1"),
        (NumberedLayers("a.b_{}"), "acb_1"),
        (NumberedLayers("block_{:02}"), "block_1"),
        (NumberedLayers("block_{:02}"), "block_001"),
        (NumberedLayers("block_{:02}/norm_{}"), "block_01/norm_01"),
        (NumberedLayers("linear"), "linear_0"),
        (NumberedLayers("linear"), "linear_01"),
        (NumberedLayers("linear"), "linear_a"),
        (NumberedLayers("linear"), "linear2"),
        (NumberedLayers("*/block_{}"), "block_1"),
        (NumberedLayers("*/block_{}"), "net/encoder/block_1"),
    ],
    ids=str,
)
def test_other_modules_are_no_part_of_the_stack(naming_map, module):
    assert naming_map.flat_to_stacked(module) is None


# Errors


class Foreign:
    """A naming map of a user's, which takes all modules for one."""

    def stacked_to_flat(self, stacked_module_name, scan_idx):
        return "block"

    def flat_to_stacked(self, unstacked_module_name):
        return "block", 0


W = np.ones([2, D], np.float32)


def leaves(*names):
    """Modules of one array each."""
    return {name: {"w": W} for name in names}


def frozen():
    return {"layers/block": {"w": optax.MaskedNode()}, "embed": {"w": W}}


def habit(tree):
    return unstack_params(tree, NumberedLayers("linear"))


PATTERN = ["layers/local", "layers/global"]
OF_PATTERN = NumberedLayers("block_{}", PATTERN)

# fmt: off
ERRORS = {
    "no modules": (lambda: stack_params({}, BLOCKS), ValueError,
        ["stack_params with NumberedLayers('block_{}', 'layers/block')", "no modules"]),
    "other names": (lambda: stack_params(leaves("embed", "net/block_0"), BLOCKS),
        ValueError, ["no module of the tree", "embed, net/block_0", "outermost"]),
    "a tree in a tree": (
        lambda: stack_params({"old": {"net": leaves("embed")}}, BLOCKS),
        ValueError, ["It holds: embed. Write names"]),
    "per_layer is no flag": (
        lambda: unstack_params(leaves("layers/block"), BLOCKS, per_layer="no"),
        TypeError, ["unstack_params", "per_layer", "'no'"]),
    "many modules": (
        lambda: stack_params(leaves(*(f"h_{i}" for i in range(99))), BLOCKS),
        ValueError, ["h_0, h_1, h_10", " and 91 more."]),
    "a loop unstacked": (lambda: unstack_params(leaves("block_0", "block_1"), BLOCKS),
        ValueError, ["unstack_params with", "block_0, block_1", "converted already"]),
    "missing layer": (
        lambda: stack_params(leaves("block_0", "block_2", "block_3"), BLOCKS),
        ValueError, ["layers/block/w has 3 of 4 layers", "missing: block_1/w"]),
    "missing leaf": (
        lambda: stack_params(
            {"block_0": {"w": W, "b": W}, "block_1": {"w": W}}, BLOCKS),
        ValueError, ["layers/block/b has 1 of 2 layers", "missing: block_1/b"]),
    "missing module": (
        lambda: stack_params(
            leaves("block_0", "block_0/a", "block_1", "block_1/a", "block_2"), BLOCKS),
        ValueError, ["layers/block/a/w has 2 of 3", "missing: block_2/a/w",
                     "num_layers=2"]),
    "numbers from one": (lambda: stack_params(leaves("block_1", "block_2"), BLOCKS),
        ValueError, ["missing: block_0/w", "numbered from 0"]),
    "blocks take turns": (
        lambda: stack_params(
            leaves("block_0/a", "block_1/b", "block_2/a", "block_3/b"), BLOCKS),
        ValueError, ["layers/block/a/w has 2 of 4", "block_1/a/w", "pattern"]),
    "a number that is none of a layer": (
        lambda: stack_params(leaves("block_0", "block_20260101"), BLOCKS),
        ValueError, ["has 2 of 20260102 layers", "block_1/w, ", "and 20260092 more"]),
    "remainder": (
        lambda: stack_params(leaves(*(f"block_{i}" for i in range(5))), OF_PATTERN),
        ValueError, ["layers/global/w has 2 of 3 layers", "missing: block_5/w",
                     "remainder", "num_layers=2"]),
    "remainder of the first": (
        lambda: stack_params(leaves("block_0", "block_1", "block_2"), OF_PATTERN),
        ValueError, ["missing: block_3/w.", "remainder", "num_layers=1."]),
    "inside of a pattern": (
        lambda: stack_params(
            leaves("block_0", "block_1", "block_3", "block_4", "block_5"), OF_PATTERN),
        ValueError, ["layers/local/w has 2 of 3 layers; missing: block_2/w."]),
    "maps in another order": (
        lambda: stack_params(
            leaves("b_00/b_00_n", "b_01/b_01_n"),
            [NumberedLayers("b_{:02}"), NumberedLayers("b_{:02}/b_{:02}_n")]),
        ValueError, ["b/b_00_n/w has 1 of 2", "give first the one for fewer modules"]),
    "maps of nested stacks": (
        lambda: stack_params(
            leaves("a_0/b_0", "a_0/b_1"),
            [NumberedLayers("a_*/b_{}"), NumberedLayers("a_{}")]),
        ValueError, ["'a_0/b_0' is a layer of 'a_0/b', and that of 'a/b'",
                     "level by level", "one map, then with the other"]),
    "a map of several knows none": (
        lambda: unstack_params(
            leaves("a", "c"), [NumberedLayers("a_{}"), NumberedLayers("b_{}")]),
        ValueError, ["unstack_params with NumberedLayers('b_{}', 'b'): no module"]),
    "no map": (lambda: stack_params(leaves("a_0"), [BLOCKS, "a_{}"]), TypeError,
        ["naming_map must be a naming map, not 'a_{}'", "NumberedLayers('a_{}')"]),
    "no maps": (lambda: stack_params(leaves("a_0"), []), TypeError,
        ["naming_map must be a naming map, not []", "NumberedLayers(...)"]),
    "a class": (lambda: stack_params(leaves("a_0"), NumberedLayers), TypeError,
        ["Write NumberedLayers(...), an instance"]),
    "masked in some layers": (
        lambda: stack_params(
            {"block_0": {"w": optax.MaskedNode()}, "block_1": {"w": W}}, BLOCKS),
        ValueError, ["block_1/w is float32[2, 4]", "block_0/w is MaskedNode()",
                     "masks", "alike"]),
    "modules masked in some layers": (
        lambda: stack_params(
            {"block_0": optax.MaskedNode(), "block_1": {"w": W}}, BLOCKS),
        ValueError, ["layers/block", "has 1 of 2 layers", "block_"]),
    "other shape": (
        lambda: stack_params({"block_0": {"w": W}, "block_1": {"w": W[0]}}, BLOCKS),
        ValueError, ["block_1/w is float32[4]", "block_0/w is float32[2, 4]",
                     "same shapes and dtypes"]),
    "two modules in one layer": (
        lambda: stack_params(leaves("block_0", "block_1"), Foreign()), ValueError,
        ["block_1 maps to layer 0 of block", "another module", "name of its own"]),
    "two layers in one module": (lambda: unstack_params(leaves("block"), Foreign()),
        ValueError, ["layer 1 of block maps to block", "another layer",
                     "name of its own"]),
    "stacked name taken": (
        lambda: stack_params(leaves("block_0", "block"), NumberedLayers("block_{}")),
        ValueError, ["stack_params", "the name block is taken",
                     "NumberedLayers(per_layer, stacked)"]),
    "stacked name taken by an outer module": (
        lambda: stack_params(leaves("block_0", "block/b"), NumberedLayers("block_{}")),
        ValueError, ["the name block/b is taken"]),
    "layer's name taken": (
        lambda: unstack_params(leaves("layers/block", "block_1"), BLOCKS),
        ValueError, ["unstack_params", "the name block_1 is taken"]),
    "unstacked twice": (lambda: habit(habit(leaves("linear"))), ValueError,
        ["the name linear_1 is taken", "converted already"]),
    "other depth": (
        lambda: unstack_params(
            {"layers/block": {"w": W}, "layers/block/a": {"w": W.T}}, BLOCKS),
        ValueError, ["layers/block/a/w has shape (4, 2)", "axis of layers of 2",
                     "layers/block/w of shape (2, 4) says"]),
    "other depth than said": (
        lambda: unstack_params(leaves("layers/block"), BLOCKS, 3),
        ValueError, ["has shape (2, 4)", "of 3, as num_layers says"]),
    "deeper than the map": (
        lambda: unstack_params(
            leaves("layers/local"), NumberedLayers("block_{}", PATTERN, 1)),
        ValueError,
        ["holds 2 layers, more than NumberedLayers('block_{}', ('layers/local', "
         "'layers/global'), num_layers=1)", "Give the map num_layers=2"]),
    "scalar": (lambda: unstack_params({"layers/block": {"w": W[0, 0]}}, BLOCKS),
        ValueError, ["layers/block/w has shape ()", "a leading axis of layers."]),
    "no array left": (lambda: unstack_params(frozen(), BLOCKS), ValueError,
        ["how many layers layers/block has", "num_layers", "parameters together"]),
    "two models": (
        lambda: stack_params(
            [{"block_0": {"w": W}}, {"block_0": {"w": W[0]}}], BLOCKS),
        ValueError, ["[0]['block_0']['w'] has shape (2, 4)",
                     "[1]['block_0']['w'] has shape (4,)", "two models"]),
    "one number for each array": (
        lambda: stack_params(
            {"params": {"block_0": {"w": W, "b": W}},
             "norms": {"block_0": {"b": W[0, 0], "w": W[0, 0]}}}, BLOCKS),
        ValueError, ["['norms']['block_0']['b'] has shape ()",
                     "['params']['block_0']['b'] has shape (2, 4)",
                     "optimiser.init(params)"]),
    "no name": (lambda: NumberedLayers(""), TypeError, ["'block_{}'", "''"]),
    "no string": (lambda: NumberedLayers(3), TypeError, ["'block_{}'", "found 3"]),
    "two numbers": (
        lambda: stack_params(leaves("a_0/b_0", "a_0/b_1"), NumberedLayers("a_{}/b_{}")),
        ValueError,
        ["NumberedLayers('a_{}/b_{}', 'a/b'): 'a_0/b_1' has several numbers",
         "that of the layer", "one map for each level", "'outer_{}'"]),
    "named number": (lambda: NumberedLayers("block_{i}"), ValueError,
        ["'block_{i}'", "written '{}'"]),
    **{f"number as {spec}": (lambda spec=spec: NumberedLayers(spec), ValueError,
        [repr(spec), "written '{}', or '{:02}' with zeros"])
       for spec in ["b_{:02d}", "b_{:2}", "b_{:00}", "b_{:x}", "b_{0}", "b_{", "b_}{"]},
    "star for the number": (lambda: NumberedLayers("block_*"), ValueError,
        ["'block_*'", "Write '{}' for the layer's number"]),
    "star beside the number": (lambda: NumberedLayers("block*{}"), ValueError,
        ["'block*{}'", "'*_{}'"]),
    "too few stars": (lambda: NumberedLayers("*/block_{}", "block"), ValueError,
        ["'block'", "as many '*' as '*/block_{}'"]),
    "number in the stacked name": (lambda: NumberedLayers("b_{}", "b_{}"), ValueError,
        ["the stacked name 'b_{}' must have no '{}'"]),
    "two blocks of one name": (lambda: NumberedLayers("b_{}", ["a", "a"]), ValueError,
        ["('a', 'a')", "name of its own"]),
    "a block in another": (lambda: NumberedLayers("b_{}", ["a/c", "a"]), ValueError,
        ["('a/c', 'a')", "inside of the other", "name of its own"]),
    "stacked name left out": (lambda: NumberedLayers("{}"), ValueError,
        ["'{}' leaves no name", "NumberedLayers('{}', 'layers')"]),
    "stacked names left out": (lambda: NumberedLayers("b_{}", []), TypeError,
        ["a name such as 'block'", "found []"]),
    "stacked name of another type": (lambda: NumberedLayers("b_{}", 3), TypeError,
        ["a name such as 'block'", "found 3"]),
    "one of them of another type": (lambda: NumberedLayers("b_{}", ["a", None]),
        TypeError, ["a name such as 'block'", "found None"]),
    "no layers": (lambda: NumberedLayers("b_{}", num_layers=0), ValueError,
        ["NumberedLayers: num_layers must be a positive int, not 0"]),
    "layers of another type": (lambda: NumberedLayers("b_{}", num_layers=2.0),
        TypeError, ["num_layers must be a positive int, not 2.0"]),
    "no part of the stack": (lambda: BLOCKS.stacked_to_flat("embed", 0), ValueError,
        ["NumberedLayers('block_{}', 'layers/block')", "'embed' is no part",
         "NumberedLayers(per_layer, stacked)"]),
}
# fmt: on


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_found_and_what_to_write(case):
    call, kind, texts = ERRORS[case]
    with pytest.raises(kind) as error:
        call()
    for text in texts:
        assert text in str(error.value)
    assert len(str(error.value)) < 600
    assert str(error.value)[-1] in ".?"


def test_the_advice_for_a_remainder_works():
    tree = leaves(*(f"block_{i}" for i in range(5)))
    naming_map = NumberedLayers("block_{}", PATTERN, num_layers=2)
    stacked = stack_params(tree, naming_map)
    assert stacked.keys() == {*PATTERN, "block_4"}
    for back in (naming_map, OF_PATTERN):
        assert_same(unstack_params(stacked, back), tree)


def test_masked_modules_have_the_depth_of_the_parameters_or_of_num_layers():
    masked = {name: {"w": optax.MaskedNode()} for name in ("block_0", "block_1")}
    expected = {"embed": {"w": W}, **masked}
    assert_same(unstack_params(frozen(), BLOCKS, 2), expected)
    for names in (["embed", "layers/block"], ["layers/block"]):
        together = [frozen(), leaves(*names)]
        assert_same(unstack_params(together, BLOCKS)[0], expected)


def test_models_of_several_depths_in_one_tree():
    teacher = leaves(*(f"block_{i}" for i in range(4)), "embed")
    student = leaves("block_0", "block_1")
    tree = {"teacher": teacher, "student": [student, 3], "step": W, "none": None}
    stacked = stack_params(tree, BLOCKS)
    assert stacked["teacher"]["layers/block"]["w"].shape == (4, *W.shape)
    assert stacked["student"][0]["layers/block"]["w"].shape == (2, *W.shape)
    assert stacked["step"] is W
    assert stacked["teacher"]["embed"]["w"] is W
    assert unstack_params(stacked, BLOCKS)["teacher"]["embed"]["w"] is W


def test_old_checkpoints_of_haiku_become_dictionaries():
    tree = leaves("embed", "block_0", "block_1")
    old = hk.data_structures.to_immutable_dict(tree)
    stacked = stack_params([old, ADAM.init(old)], BLOCKS)
    expected = stack_params([tree, ADAM.init(tree)], BLOCKS)
    assert_same(stacked, expected)
    assert_same(unstack_params(stacked, BLOCKS), [tree, ADAM.init(tree)])


def test_trees_of_flax_keep_their_modules_inside():
    tree = {"params": {f"block_{i}": {"dense": {"kernel": W * i}} for i in range(L)}}
    stacked = stack_params(tree, NumberedLayers("block_{}", "blocks"))
    assert stacked["params"]["blocks"]["dense"]["kernel"].shape == (L, *W.shape)
    assert_same(unstack_params(stacked, NumberedLayers("block_{}", "blocks")), tree)


def test_layers_may_be_traced_in_part():
    w = np.arange(2, dtype=np.float32)

    def run(first):
        of_loop = {"l_0/a": {"w": first}, "l_1/a": {"w": w}}
        return stack_params(of_loop, NumberedLayers("l_{}", "l"))

    found = jax.jit(run)(w + 1)["l/a"]["w"]
    np.testing.assert_array_equal(found, [w + 1, w])
