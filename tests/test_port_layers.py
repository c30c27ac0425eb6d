"""Porting stacks: every way to lay out layers in Flax, into every way in Haiku."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import FAST, assert_equal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hk_stack

nn = pytest.importorskip("flax.linen")
flax_core = pytest.importorskip("flax.core")
optax = pytest.importorskip("optax")
cases = pytest.importorskip("port_cases")

L, B, T, D = 4, 2, 3, 8

# Every layout of one model: a transformer of L blocks


class Block(nn.Module):
    """Of all modules that leave their mark on names: in scans, too."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, h)
        h = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)(x)
        h = nn.gelu(nn.Dense(12)(h))
        return x + nn.Dense(D)(h), None


class Two(nn.Module):
    """A block of layers for a scan."""

    @nn.compact
    def __call__(self, x, _=None):
        x, _ = Block()(x)
        return Block()(x)


class Inner(nn.Module):
    """A scan for a scan."""

    axis: int = 0

    @nn.compact
    def __call__(self, x, _=None):
        return scanned(Block, 2, self.axis)(name="inner")(x, None)


class Encoder(nn.Module):
    """A loop of layers in a scope of its own."""

    @nn.compact
    def __call__(self, x):
        return flax_loop("layer_{:02}")(x)


def scanned(block, length, axis=0, **axes):
    axes = {"params": axis, **axes}
    return nn.scan(block, axes, split_rngs={"params": True}, length=length)


def flax_scan(block=Block, length=L, axis=0, name="layers"):
    return lambda x: scanned(block, length, axis)(name=name)(x, None)[0]


def flax_loop(names=None, block=Block):
    def run(x):
        for i in range(L):
            x, _ = block(name=names and names.format(i))(x)
        return x

    return run


def flax_stages(x):
    for i in range(2):
        x, _ = scanned(Block, L // 2)(name=f"stage_{i}")(x, None)
    return x


FLAX = {
    "scan": flax_scan(),
    "scan at axis 1": flax_scan(axis=1),
    "unnamed scan": flax_scan(name=None),
    "unnamed scan at axis 1": flax_scan(axis=1, name=None),
    "scan with remat": flax_scan(nn.remat(Block)),
    "unnamed scan with remat": flax_scan(nn.remat(Block), name=None),
    "loop": flax_loop("block_{}"),
    "loop of unnamed blocks": flax_loop(),
    "loop with remat": flax_loop(block=nn.remat(Block)),
    "loop of h_0": flax_loop("h_{}"),
    "loop of encoderblock_0": flax_loop("encoderblock_{}"),
    "loop of layer0": flax_loop("layer{}"),
    "loop in a scope": lambda x: Encoder(name="encoder")(x),
    "scan over blocks": flax_scan(Two, L // 2),
    "scan over blocks at axis 1": flax_scan(Two, L // 2, 1),
    "unnamed scan over blocks": flax_scan(Two, L // 2, name=None),
    "nested scans": flax_scan(Inner, L // 2),
    "nested scans at axis 1": flax_scan(
        functools.partial(Inner, axis=1), L // 2, axis=1
    ),
    "loop over scans": flax_stages,
}


def haiku_block(x):
    def norm(x):
        return hk.LayerNorm(-1, True, True)(x)

    h = norm(x)
    init = hk.initializers.VarianceScaling()
    x = x + hk.MultiHeadAttention(2, D // 2, w_init=init, model_size=D)(h, h, h)
    h = jax.nn.gelu(hk.Linear(12)(norm(x)))
    return x + hk.Linear(D)(h)


class HaikuBlock(hk.Module):
    def __call__(self, x):
        return haiku_block(x)


def haiku_module(x):
    return HaikuBlock(name="block")(x)


def haiku_stack(
    block=haiku_module, length=L, name="layers", stack=hk_stack.layer_stack, **options
):
    return lambda x: stack(length, name=name, **options)(block)(x)


def haiku_loop(x):
    for _ in range(L):
        x = haiku_module(x)
    return x


def haiku_stages(x):
    for _ in range(2):
        x = haiku_stack(length=L // 2)(x)
    return x


def haiku_two(x):
    return haiku_module(haiku_module(x))


def haiku_inner(x):
    return hk_stack.layer_stack(2, name="inner")(haiku_module)(x)


class HaikuModel(hk.Module):
    """Layers in a method of a module, which Haiku writes with a `~`."""

    def __init__(self, run, name):
        super().__init__(name=name)
        self.run = run

    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        return self.run(x)


HAIKU = {
    "stack of functions": haiku_stack(haiku_block),
    "stack of modules": haiku_stack(),
    "hk.layer_stack": haiku_stack(stack=hk.layer_stack),
    "unnamed stack": haiku_stack(name=None),
    "transparent stack": haiku_stack(
        transparent=True, transparency_map=hk_stack.NumberedLayers("block_{}")
    ),
    "loop": haiku_loop,
    "nested stacks": haiku_stack(haiku_inner, L // 2),
    "stack over blocks": haiku_stack(haiku_two, L // 2),
    "loop over stacks": haiku_stages,
}


class Linen(nn.Module):
    """Layers with something before and after them."""

    layers: object

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, name="inputs")(x)
        return nn.Dense(3, name="outputs")(self.layers(x))


def haiku_model(layers):
    def run(x):
        x = hk.Linear(D, name="inputs")(x)
        return hk.Linear(3, name="outputs")(layers(x))

    return run


def inputs(*shape, dtype=np.float32):
    return np.random.default_rng(1).normal(size=shape).astype(dtype)


def compiled(run, *args):
    with jax.default_matmul_precision("highest"):
        return jax.jit(run, compiler_options=FAST)(*args)


def init(linen, *args, seed=0):
    """Variables with random values everywhere."""
    types = jax.eval_shape(linen.init, jax.random.key(0), *args)
    return cases.randomised(types, seed=seed)


def like_of(run, *args):
    """What Haiku's `init` gives for a function, as types."""
    return jax.eval_shape(hk.transform_with_state(run).init, jax.random.key(0), *args)


@functools.cache
def flax_side(name):
    model, x = Linen(FLAX[name]), inputs(B, T, D)
    variables = init(model, x)
    return variables, compiled(model.apply, variables, x)


@functools.cache
def haiku_side(name, wrapped=False):
    run, x = haiku_model(HAIKU[name]), inputs(B, T, D)
    whole = (lambda x: HaikuModel(run, name="lm")(x)) if wrapped else run
    apply = jax.jit(
        lambda params: hk.transform(whole).apply(params, None, x),
        compiler_options=FAST,
    )
    return like_of(whole, x), apply


def rules(flax_name, haiku_name):
    """What users have to say: nothing, but for numbers with more than one meaning."""
    said = {}
    if ("over blocks" in flax_name) != ("over blocks" in haiku_name):
        said["interleave"] = True
    if ("loop over" in flax_name) != ("loop over" in haiku_name):
        said["interleave"] = False
    if "nested" in flax_name:  # Which scan is around the other?
        axes = (1, 2) if "axis 1" in flax_name else (0, 1)
        said["layer_axis"] = {"layers": axes}
    if "scan over blocks" in flax_name and haiku_name == "nested stacks":
        scope = "ScanTwo_0" if "unnamed" in flax_name else "layers"
        said["layer_axis"] = {scope: 1 if "axis 1" in flax_name else 0}
    if flax_name == "loop over scans" and haiku_name == "loop over stacks":
        said["rename"] = {"stage_*": "layers_*"}
    if flax_name == "loop of layer0":
        said["rename"] = {"layer*": "block_*"}
    if haiku_name in ("loop", "transparent stack"):  # Numbered in both trees.
        names = {
            "loop of h_0": {"h_*": "block_*"},
            "loop of encoderblock_0": {"encoderblock_*": "block_*"},
            "loop in a scope": {"encoder/layer_*": "block_*"},
            "loop with remat": {"CheckpointBlock_*": "block_*"},
        }
        said |= {"rename": names[flax_name]} if flax_name in names else {}
    return said


CONTRARY = {
    ("scan over blocks", "loop over stacks"),
    ("scan over blocks at axis 1", "loop over stacks"),
    ("unnamed scan over blocks", "loop over stacks"),
    ("loop over scans", "stack over blocks"),
}
every_pair = pytest.mark.parametrize(
    ("flax_name", "haiku_name"),
    [(f, h) for f in FLAX for h in HAIKU if (f, h) not in CONTRARY],
)


def relative_error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


def assert_round_trips(variables, like, **said):
    """Both ways round, bit for bit; returns what was ported."""
    ported = hk_stack.flax_to_haiku(variables, like, **said)
    assert jax.tree.structure(ported) == jax.tree.structure(like)
    types = jax.eval_shape(lambda: variables)
    assert_equal(hk_stack.haiku_to_flax(ported, types, **said), variables)
    again = jax.tree.map(lambda leaf: leaf + 1, ported)
    back = hk_stack.haiku_to_flax(again, types, **said)
    assert_equal(hk_stack.flax_to_haiku(back, like, **said)[0], again[0])
    return ported


@every_pair
def test_layers_go_from_every_layout_into_every_other(flax_name, haiku_name):
    variables, expected = flax_side(flax_name)
    like, apply = haiku_side(haiku_name)
    said = rules(flax_name, haiku_name)
    params, _ = assert_round_trips(variables, like, **said)
    with jax.default_matmul_precision("highest"):
        assert relative_error(apply(params), expected) <= 1e-6


@pytest.mark.parametrize(("flax_name", "haiku_name"), sorted(CONTRARY))
def test_no_rule_makes_a_scan_over_blocks_of_a_loop_over_scans(flax_name, haiku_name):
    variables, _ = flax_side(flax_name)
    like, _ = haiku_side(haiku_name)
    for said in ({}, {"interleave": True}, {"interleave": False}):
        with pytest.raises(ValueError, match="Dense_0/kernel"):
            hk_stack.flax_to_haiku(variables, like, **said)


@pytest.mark.parametrize("flax_name", FLAX)
def test_modules_around_everything_may_be_missing_in_flax(flax_name):
    variables, expected = flax_side(flax_name)
    like, apply = haiku_side("stack of modules", wrapped=True)
    said = rules(flax_name, "stack of modules")
    params, _ = assert_round_trips(variables, like, **said)
    with jax.default_matmul_precision("highest"):
        assert relative_error(apply(params), expected) <= 1e-6


@pytest.mark.parametrize("haiku_name", HAIKU)
def test_modules_around_everything_may_be_missing_in_haiku(haiku_name):
    variables, expected = flax_side("scan")
    like, apply = haiku_side(haiku_name)
    inside = {"params": {"lm": {"decoder": variables["params"]}}}
    params, _ = assert_round_trips(inside, like, **rules("scan", haiku_name))
    with jax.default_matmul_precision("highest"):
        assert relative_error(apply(params), expected) <= 1e-6


# Any axis


class Kernels(nn.Module):
    """Nothing but matrices, so that the layers may be on axis 2."""

    width: int = 12

    @nn.compact
    def __call__(self, x, _=None):
        h = jnp.tanh(nn.Dense(self.width, use_bias=False)(x))
        return x + nn.Dense(D, use_bias=False)(h), None


def haiku_kernels(x, width=12):
    h = jnp.tanh(hk.Linear(width, with_bias=False)(x))
    return x + hk.Linear(D, with_bias=False)(h)


def stacked_kernels(layout, length, axis, width=12):
    """Variables, what they are to become, and how the scopes are called."""
    x = inputs(B, D)
    block = functools.partial(haiku_kernels, width=width)
    blocks = {
        "function": block,
        "module": lambda x: hk.to_module(block)(name="block")(x),
        "nested": lambda x: hk_stack.layer_stack(length // 2, name="inner")(block)(x),
    }
    stack = haiku_stack(blocks[layout], 2 if layout == "nested" else length)
    linen = functools.partial(Kernels, width=width)
    variables = init(Linen(flax_scan(linen, length, axis)), x)
    scope = {"function": "layers", "module": "layers/block", "nested": "layers/inner"}
    said = {} if layout == "function" else {"rename": {"layers": scope[layout]}}
    return variables, like_of(haiku_model(stack), x), said


every_axis = pytest.mark.parametrize("axis", [0, 1, 2])
every_layout = pytest.mark.parametrize("layout", ["function", "module", "nested"])


@every_layout
@every_axis
def test_the_axis_of_layers_is_found_out(layout, axis):
    variables, like, said = stacked_kernels(layout, 6, axis)
    params, _ = assert_round_trips(variables, like, **said)
    assert_layers_are_those_of(variables, params, axis)


@every_layout
@every_axis
def test_the_axis_of_layers_is_said_where_sizes_are_equal(layout, axis):
    variables, like, named = stacked_kernels(layout, D, axis, width=D)
    with pytest.raises(ValueError, match="layers/Dense_0/kernel") as error:
        hk_stack.flax_to_haiku(variables, like, **named)
    assert 'layer_axis={"layers/Dense_0": ' in str(error.value)
    for said in ({"layers": axis}, {"params/layers": axis}):
        params, _ = assert_round_trips(variables, like, layer_axis=said, **named)
        assert_layers_are_those_of(variables, params, axis)


@every_layout
@every_axis
@pytest.mark.parametrize("length", [8, 12])
def test_one_axis_for_the_whole_tree(layout, axis, length):
    """It is for the stacks in it, not for what is square without a stack."""
    variables, like, named = stacked_kernels(layout, length, axis)
    for said in (axis, {"": axis}, {"params": axis}):
        found = hk_stack.port.plan(variables, like, layer_axis=said, **named)
        if found.ok:
            params, _ = assert_round_trips(variables, like, layer_axis=said, **named)
            assert_layers_are_those_of(variables, params, axis)
    assert found.ok or "may be on axis" in str(found)


def assert_layers_are_those_of(variables, params, axis):
    theirs = variables["params"]["layers"]
    modules = [name for name in sorted(params) if name.startswith("layers/")]
    for module, flax_module in zip(modules, ["Dense_0", "Dense_1"], strict=True):
        layers = np.moveaxis(theirs[flax_module]["kernel"], axis, 0)
        found = np.reshape(params[module]["w"], layers.shape)
        np.testing.assert_array_equal(found, layers)


class Normed(nn.Module):
    """A layer with statistics, which `nn.scan` may put on an axis of their own."""

    train: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(x.shape[-1])(x)
        return nn.BatchNorm(not self.train, momentum=0.9)(x), None


def haiku_normed(x, is_training=False):
    x = hk.Linear(x.shape[-1])(x)
    with jax.numpy_dtype_promotion("standard"):
        return hk.BatchNorm(True, True, 0.9)(x, is_training or hk.running_init())


def flax_normed(axes, train=False):
    block = functools.partial(Normed, train=train)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            if axes is None:
                for i in range(L):
                    x, _ = block(name=f"layers_{i}")(x)
                return x
            scan = nn.scan(block, axes, split_rngs={"params": True}, length=L)
            return scan(name="layers")(x, None)[0]

    return Model()


NORMED_AXES = {
    "axis 0": {"params": 0, "batch_stats": 0},
    "axis 1": {"params": 1, "batch_stats": 1},
    "axes 1 and 0": {"params": 1, "batch_stats": 0},
    "axes 0 and 1": {"params": 0, "batch_stats": 1},
    "loop": None,
}
every_normed = pytest.mark.parametrize("axes", NORMED_AXES.values(), ids=NORMED_AXES)
NORMED_LAYOUTS = {
    "stack": lambda block: haiku_stack(block),
    "loop": lambda block: (
        lambda x: functools.reduce(
            lambda x, _: hk.to_module(block)(name="layers")(x), range(L), x
        )
    ),
}
every_normed_layout = pytest.mark.parametrize("layout", NORMED_LAYOUTS)


@every_normed_layout
@every_normed
@pytest.mark.parametrize("width", [D, L])
def test_statistics_may_be_on_another_axis_than_parameters(axes, layout, width):
    x = inputs(B * T, width)
    model, run = flax_normed(axes), NORMED_LAYOUTS[layout](haiku_normed)
    variables, like = init(model, x), like_of(run, x)
    said = {} if axes is None or width == D else {"layer_axis": axes}
    if said:
        with pytest.raises(ValueError, match="layer_axis="):
            hk_stack.flax_to_haiku(variables, like)
    params, state = assert_round_trips(variables, like, **said)
    expected = compiled(model.apply, variables, x)
    found, _ = compiled(
        hk.transform_with_state(run).apply, params, state, jax.random.key(0), x
    )
    assert relative_error(found, expected) <= 1e-6


@every_normed_layout
@every_normed
def test_training_goes_on_with_the_same_statistics(axes, layout):
    x = inputs(B * T, D)
    model = flax_normed(axes, train=True)
    run = NORMED_LAYOUTS[layout](functools.partial(haiku_normed, is_training=True))
    variables, like = init(flax_normed(axes), x), like_of(run, x)
    params, state = hk_stack.flax_to_haiku(variables, like)
    apply = jax.jit(hk.transform_with_state(run).apply, compiler_options=FAST)
    step = jax.jit(
        functools.partial(model.apply, mutable=["batch_stats"]), compiler_options=FAST
    )
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(B * T, D)).astype(np.float32)
        with jax.default_matmul_precision("highest"):
            expected, changed = step(variables, x)
            found, state = apply(params, state, jax.random.key(0), x)
        variables = {**variables, **changed}
        assert relative_error(found, expected) <= 1e-6
        back = hk_stack.haiku_to_flax((params, state), variables)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
            assert relative_error(a, b) <= 1e-6


# Ensembles, several stacks, tied and boxed parameters


def ensemble(block, length=3):
    """Independent models side by side, as `nn.vmap` makes them."""
    return nn.vmap(
        block,
        {"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=length,
    )


class Scanned(nn.Module):
    """A model for an ensemble."""

    layers: object = flax_scan()

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="outputs")(self.layers(x))


ENSEMBLES = {
    "dense": (
        lambda x: ensemble(nn.Dense)(3, name="outputs")(x),
        lambda x: hk.Linear(3, name="outputs")(x),
    ),
    "scan": (
        lambda x: ensemble(Scanned)(name="members")(x),
        lambda x: hk.Linear(3, name="outputs")(haiku_stack()(x)),
    ),
    "scan into loop": (
        lambda x: ensemble(Scanned)(flax_scan(name="block"), name="members")(x),
        lambda x: hk.Linear(3, name="outputs")(haiku_loop(x)),
    ),
    "loop": (
        lambda x: ensemble(Scanned)(flax_loop("block_{}"), name="members")(x),
        lambda x: hk.Linear(3, name="outputs")(haiku_loop(x)),
    ),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_ensembles(name):
    """Members are on the first axis in Haiku, where `init` runs under `jax.vmap`."""
    flax_run, haiku_run = ENSEMBLES[name]
    x = inputs(B, T, D)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return flax_run(x)

    model, transformed = Model(), hk.transform_with_state(haiku_run)
    keys = jax.random.split(jax.random.key(0), 3)
    like = jax.eval_shape(jax.vmap(lambda key: transformed.init(key, x)), keys)
    variables = init(model, x)
    # Each member has all the numbered blocks.
    interleave = True if name == "scan into loop" else None
    params, _ = assert_round_trips(variables, like, interleave=interleave)

    def apply(params):
        return transformed.apply(params, {}, None, x)[0]

    expected = compiled(model.apply, variables, x)
    assert relative_error(compiled(jax.vmap(apply), params), expected) <= 1e-6


def test_an_ensemble_of_stacks_is_no_stack_of_ensembles():
    """`[members, L]` and `[L, members]` are the same number of layers."""
    x = inputs(B, T, D)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ensemble(Scanned)(name="members")(x)

    like = like_of(lambda x: hk.Linear(3, name="outputs")(haiku_stack()(x)), x)
    shapes = {"layers": (L, 3), "outputs": (3,)}
    like = {
        module: {
            name: jax.ShapeDtypeStruct(
                shapes[module.split("/")[0]] + leaf.shape[module[0] == "l" :],
                leaf.dtype,
            )
            for name, leaf in leaves.items()
        }
        for module, leaves in like[0].items()
    }
    with pytest.raises(ValueError, match="layers/block/linear/w"):
        hk_stack.flax_to_haiku(init(Model(), x), (like, {}))


@pytest.mark.parametrize("depths", [(3, 5), (2, 2)])
@pytest.mark.parametrize("haiku_name", ["stack of functions", "stack of modules"])
def test_two_stacks(depths, haiku_name):
    x = inputs(B, T, D)
    first, second = depths

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return flax_scan(length=second, axis=1)(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(first):
                x, _ = Block(name=f"encoder_{i}")(x)
            return Decoder(name="decoder")(x)

    block = {"stack of functions": haiku_block, "stack of modules": haiku_module}
    block = block[haiku_name]

    def run(x):
        x = hk_stack.layer_stack(first, name="encoder")(block)(x)
        module = hk.to_module(haiku_stack(block, second))
        return module(name="decoder")(x)

    model = Model()
    variables = init(model, x)
    params, _ = assert_round_trips(variables, like_of(run, x))
    expected = compiled(model.apply, variables, x)
    found = compiled(hk.transform(run).apply, params, None, x)
    assert relative_error(found, expected) <= 1e-6


def test_tied_embeddings():
    ids = np.arange(B * T).reshape(B, T) % 7

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, D, name="embed")
            return embed.attend(flax_scan(axis=1)(embed(ids)))

    def run(ids):
        embed = hk.Embed(7, D, name="embed")
        return haiku_stack()(embed(ids)) @ embed.embeddings.T

    model = Model()
    variables = init(model, ids)
    params, _ = assert_round_trips(variables, like_of(run, ids))
    expected = compiled(model.apply, variables, ids)
    found = compiled(hk.transform(run).apply, params, None, ids)
    assert relative_error(found, expected) <= 1e-6


class Boxed(nn.Module):
    """A layer whose parameters say how they are partitioned."""

    @nn.compact
    def __call__(self, x, _=None):
        boxed = functools.partial(
            nn.with_partitioning, nn.initializers.lecun_normal(), ("in", "out")
        )
        x = nn.Dense(12, kernel_init=boxed())(x)
        kernel = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), ("in", "out")
        )
        return nn.Dense(D, kernel_init=kernel)(x), None


def haiku_boxed(x):
    x = hk.Linear(12)(x)
    return hk.Linear(D)(x)


@pytest.mark.parametrize("axis", [0, 1])
def test_boxed_parameters(axis):
    x = inputs(B, D)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Boxed,
                {"params": axis},
                split_rngs={"params": True},
                length=L,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(name="layers")(x, None)[0]

    types = jax.eval_shape(Model().init, jax.random.key(0), x)
    assert "Partitioned" in str(types)
    variables = cases.randomised(types)
    params, _ = assert_round_trips(variables, like_of(haiku_stack(haiku_boxed), x))
    unboxed = nn.meta.unbox(variables)
    assert_equal(
        hk_stack.haiku_to_flax((params, {}), unboxed)["params"], unboxed["params"]
    )
    np.testing.assert_array_equal(
        params["layers/linear"]["w"],
        np.moveaxis(unboxed["params"]["layers"]["Dense_0"]["kernel"], axis, 0),
    )


def test_frozen_dicts():
    variables, _ = flax_side("scan at axis 1")
    like, _ = haiku_side("stack of modules")
    expected = hk_stack.flax_to_haiku(variables, like)
    frozen = flax_core.freeze(variables)
    params, _ = assert_round_trips(frozen, like)
    assert_equal(params, expected[0])
    back = hk_stack.haiku_to_flax(expected, frozen)
    assert isinstance(back, flax_core.FrozenDict)
    mixed = {"params": flax_core.freeze(variables["params"])}
    assert_equal(hk_stack.flax_to_haiku(mixed, like), expected)


# Arrays: NumPy's and JAX's, on several devices


def test_numpy_goes_to_numpy_and_jax_to_jax():
    variables, _ = flax_side("scan")
    types, _ = haiku_side("stack of modules")
    expected = hk_stack.flax_to_haiku(variables, types)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(expected))
    for source in (variables, jax.tree.map(jnp.asarray, variables)):
        for make, kind in ((np.zeros, np.ndarray), (jnp.zeros, jax.Array)):
            like = jax.tree.map(lambda t, make=make: make(t.shape, t.dtype), types)
            found = hk_stack.flax_to_haiku(source, like)
            assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(found))
            assert_equal(found, expected)
            assert all(not np.any(leaf) for leaf in jax.tree.leaves(like))


def test_results_are_new_arrays():
    variables, _ = flax_side("scan")
    types, _ = haiku_side("stack of modules")
    like = jax.tree.map(lambda t: np.zeros(t.shape, t.dtype), types)
    found = hk_stack.flax_to_haiku(variables, like)
    before = jax.tree.map(np.copy, variables)
    for leaf in jax.tree.leaves(found):
        leaf[...] = 0
    assert_equal(variables, before)


def test_results_are_sharded_as_like_says():
    variables, _ = flax_side("scan at axis 1")
    types, _ = haiku_side("stack of modules")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))

    def sharding(leaf):
        """On one axis of the mesh for each even axis of the leaf, while they last."""
        names = iter("ab")
        spec = [None if size % 2 else next(names, None) for size in leaf.shape]
        return NamedSharding(mesh, P(*spec))

    def typed(leaf):
        kind = jax.ShapeDtypeStruct
        return kind(leaf.shape, leaf.dtype, sharding=sharding(leaf))

    def filled(leaf):
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), sharding(leaf))

    source = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), variables)
    expected = hk_stack.flax_to_haiku(variables, types)
    for make in (typed, filled):
        like = jax.tree.map(make, types)
        found = hk_stack.flax_to_haiku(source, like)
        assert_equal(found, expected)
        assert shardings(found) == shardings(like)
    back = hk_stack.haiku_to_flax(found, source)
    assert_equal(back, variables)
    assert shardings(back) == shardings(source)


def shardings(tree):
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


# In two steps: into a loop, and then into a stack


class Local(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, x, _=None):
        h = jnp.tanh(nn.Dense(self.width)(x))
        return x + nn.Dense(D)(h), None


def haiku_local(x, width=5):
    h = jnp.tanh(hk.Linear(width)(x))
    return x + hk.Linear(D)(h)


def haiku_pattern(x):
    """Five narrow blocks and a wide one take turns, and two are left over."""

    def block(x, name, width=5):
        return hk.to_module(haiku_local)(name=name)(x, width)

    def layer(x):
        return block(block(block(x, "a"), "b"), "wide", 11)

    x = hk_stack.layer_stack(3, name="layers")(layer)(x)
    return block(block(x, "block_9"), "block_10")


def test_patterns_of_blocks_and_remainders():
    x = inputs(B, D)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(11):
                x, _ = Local(11 if i % 3 == 2 else 5, name=f"block_{i}")(x)
            return x

    model = Model()
    variables, like = init(model, x), like_of(haiku_pattern, x)
    names = hk_stack.NumberedLayers(
        "block_{}", ("layers/a", "layers/b", "layers/wide"), num_layers=3
    )
    of_loop = hk_stack.unstack_params(like, names)
    ported = assert_round_trips(variables, of_loop)
    params, _ = hk_stack.stack_params(ported, names)
    expected = compiled(model.apply, variables, x)
    found = compiled(hk.transform(haiku_pattern).apply, params, None, x)
    assert relative_error(found, expected) <= 1e-6
    assert_equal(hk_stack.unstack_params((params, {}), names), ported)


def test_two_steps_are_one():
    variables, _ = flax_side("scan at axis 1")
    like, _ = haiku_side("stack of modules")
    names = hk_stack.NumberedLayers("block_{}", "layers/block")
    of_loop = hk_stack.flax_to_haiku(variables, hk_stack.unstack_params(like, names))
    assert_equal(
        hk_stack.stack_params(of_loop, names), hk_stack.flax_to_haiku(variables, like)
    )


def test_an_optimiser_goes_on_where_it_was():
    """Moments are shaped like parameters, and go the same way."""
    variables, _ = flax_side("scan at axis 1")
    like, _ = haiku_side("nested stacks")
    optimiser = optax.adam(1e-2)
    first, second = (cases.randomised(variables, seed=seed) for seed in (1, 2))
    theirs = variables["params"]

    def port(params):
        return hk_stack.flax_to_haiku({"params": params}, like)[0]

    def step(params, gradients, state):
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        begun = optimiser.init(theirs)
        _, state = compiled(step, theirs, first["params"], begun)
        expected, _ = compiled(step, theirs, second["params"], state)
        adam, *rest = state
        moments = adam._replace(mu=port(adam.mu), nu=port(adam.nu))
        ours, gradients = port(theirs), port(second["params"])
        found, _ = compiled(step, ours, gradients, (moments, *rest))
    assert_equal(found, port(expected))
    gradients = hk_stack.haiku_to_flax((port(first["params"]), {}), variables)
    assert_equal(gradients, first)
