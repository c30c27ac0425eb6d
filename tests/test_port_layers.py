"""Porting stacks: every way to lay out layers in Flax, and every way in Haiku.

Random models (`test_port_random.py`) go from each into each.
"""

import ast
import functools
import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import FAST, assert_equal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from port_trees import new, right_or_refused

import hk_stack

nn = pytest.importorskip("flax.linen")
flax_core = pytest.importorskip("flax.core")
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


# By name, with the scope of a layer: `*` for its number.
FLAX = {
    "scan": (flax_scan(), "layers"),
    "scan at axis 1": (flax_scan(axis=1), "layers"),
    "unnamed scan with remat": (
        flax_scan(nn.remat(Block), name=None),
        "ScanCheckpointBlock_0",
    ),
    "loop": (flax_loop("block_{}"), "block_*"),
    "loop of unnamed blocks with remat": (
        flax_loop(block=nn.remat(Block)),
        "CheckpointBlock_*",
    ),
    "loop of layer0": (flax_loop("layer{}"), "layer*"),
    "loop in a scope": (lambda x: Encoder(name="encoder")(x), "encoder/layer_*"),
    "scan over blocks at axis 1": (flax_scan(Two, L // 2, 1), "layers/Block_*"),
    "nested scans at axis 1": (
        flax_scan(functools.partial(Inner, axis=1), L // 2, axis=1),
        "layers/inner",
    ),
    "loop over scans": (flax_stages, "stage_*"),
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
    "stack of functions": (haiku_stack(haiku_block), "layers"),
    "stack of modules": (haiku_stack(), "layers/block"),
    "hk.layer_stack": (
        haiku_stack(name=None, stack=hk.layer_stack),
        "__layer_stack_no_per_layer/block",
    ),
    "transparent stack": (
        haiku_stack(
            transparent=True, transparency_map=hk_stack.NumberedLayers("block_{}")
        ),
        "block_*",
    ),
    "loop": (haiku_loop, "block_*"),
    "nested stacks": (haiku_stack(haiku_inner, L // 2), "layers/inner/block"),
    "stack over blocks": (haiku_stack(haiku_two, L // 2), "layers/block_*"),
    "loop over stacks": (haiku_stages, "layers_*/block"),
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
    model, x = Linen(FLAX[name][0]), inputs(B, T, D)
    variables = init(model, x)
    return variables, compiled(model.apply, variables, x)


@functools.cache
def haiku_side(name, wrapped=False):
    run, x = haiku_model(HAIKU[name][0]), inputs(B, T, D)
    whole = (lambda x: HaikuModel(run, name="lm")(x)) if wrapped else run
    apply = jax.jit(
        lambda params: hk.transform(whole).apply(params, None, x),
        compiler_options=FAST,
    )
    return like_of(whole, x), apply


def rules(flax_name, haiku_name):
    """What users have to say where numbers or axes have more than one meaning."""
    said = {}
    if ("over blocks" in flax_name) != ("over blocks" in haiku_name):
        said["interleave"] = True
    if ("loop over" in flax_name) != ("loop over" in haiku_name):
        said["interleave"] = False
    if "nested" in flax_name:  # Which scan is around the other?
        said["layer_axis"] = {"layers": (1, 2)}
    return said


def proposed(variables, like):
    """The renamings that the error proposes."""
    text = str(hk_stack.port.plan(variables, like))
    found = re.search(r"like, rename=(\{.*?\})\)", text)
    return {"rename": ast.literal_eval(found[1])} if found else {}


PAIRS = [
    *((name, "stack of modules") for name in FLAX if name != "loop of layer0"),
    *(("scan at axis 1", name) for name in HAIKU),
    ("loop", "loop"),
    ("loop", "nested stacks"),
    ("loop of unnamed blocks with remat", "transparent stack"),
    ("loop over scans", "nested stacks"),
    ("nested scans at axis 1", "nested stacks"),
    ("nested scans at axis 1", "loop"),
    ("scan over blocks at axis 1", "stack over blocks"),
    ("scan over blocks at axis 1", "loop"),
]


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
    return ported


def assert_ports(variables, expected, haiku_name, wrapped=False, **said):
    like, apply = haiku_side(haiku_name, wrapped)
    params, _ = assert_round_trips(variables, like, **said)
    with jax.default_matmul_precision("highest"):
        assert relative_error(apply(params), expected) <= 1e-6


@pytest.mark.parametrize(("flax_name", "haiku_name"), dict.fromkeys(PAIRS))
def test_layers_go_from_layout_to_layout(flax_name, haiku_name):
    """With the names that the error proposes, if these are not the same."""
    variables, expected = flax_side(flax_name)
    said = proposed(variables, haiku_side(haiku_name)[0])
    assert_ports(
        variables, expected, haiku_name, **said, **rules(flax_name, haiku_name)
    )


@pytest.mark.parametrize(
    ("flax_name", "haiku_name", "rename"),
    [
        ("loop of layer0", "loop", {"layer*": "block_*"}),
        ("loop in a scope", "loop", {"encoder/layer_*": "block_*"}),
        ("loop", "loop over stacks", {"block_*": "layers_*/block"}),
        ("loop over scans", "loop over stacks", {"stage_*": "layers_*/block"}),
    ],
)
def test_numbers_that_users_rename(flax_name, haiku_name, rename):
    said = rules(flax_name, haiku_name)
    assert_ports(*flax_side(flax_name), haiku_name, rename=rename, **said)


@pytest.mark.parametrize(
    ("flax_name", "haiku_name", "rename"),
    [
        ("scan over blocks at axis 1", "loop over stacks", "layers_*/block"),
        ("loop over scans", "stack over blocks", "layers/block_*"),
    ],
)
def test_a_scan_over_blocks_is_no_loop_over_scans(flax_name, haiku_name, rename):
    variables, _ = flax_side(flax_name)
    like, _ = haiku_side(haiku_name)
    for said in ({}, {"interleave": True}, {"interleave": False}):
        with pytest.raises(ValueError, match="Dense_0/kernel"):
            hk_stack.flax_to_haiku(variables, like, **said)
    assert not proposed(variables, like)


def test_modules_around_everything_may_be_missing_in_one_tree():
    variables, expected = flax_side("scan at axis 1")
    name = "stack of functions"
    assert_ports(variables, expected, name, wrapped=True)
    like, _ = haiku_side("loop", wrapped=True)
    said = proposed(variables, like)
    assert_ports(variables, expected, "loop", wrapped=True, **said)
    inside = {"params": {"lm": {"decoder": variables["params"]}}}
    assert_ports(inside, expected, name)
    with pytest.raises(ValueError, match=r'rename={"lm/decoder": "lm/~forward"}'):
        assert_ports(inside, expected, name, wrapped=True)


# Statistics, ensembles, boxes


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
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = functools.partial(Normed, train=train)
            scan = nn.scan(block, axes, split_rngs={"params": True}, length=L)
            return scan(name="layers")(x, None)[0]

    return Model()


@pytest.mark.parametrize("width", [D, L])
@pytest.mark.parametrize("axes", [(1, 0), (0, 1)])
def test_training_goes_on_with_the_same_statistics(axes, width):
    """These may be on another axis than parameters."""
    axes = dict(zip(("params", "batch_stats"), axes, strict=True))
    x = inputs(B * T, width)
    run = haiku_stack(functools.partial(haiku_normed, is_training=True))
    variables, like = init(flax_normed(axes), x), like_of(run, x)
    said = {"layer_axis": axes} if width == L else {}
    if said:
        with pytest.raises(ValueError, match="layer_axis="):
            hk_stack.flax_to_haiku(variables, like)
    params, state = assert_round_trips(variables, like, **said)
    apply = jax.jit(hk.transform_with_state(run).apply, compiler_options=FAST)
    model = flax_normed(axes, train=True)
    step = functools.partial(model.apply, mutable=["batch_stats"])
    step = jax.jit(step, compiler_options=FAST)
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
        with jax.default_matmul_precision("highest"):
            expected, changed = step(variables, x)
            found, state = apply(params, state, jax.random.key(0), x)
        variables = {**variables, **changed}
        assert relative_error(found, expected) <= 1e-6
        back = hk_stack.haiku_to_flax((params, state), variables, **said)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(variables), strict=True):
            assert relative_error(a, b) <= 1e-6


class Members(nn.Module):
    """Independent models side by side, as `nn.vmap` makes them, of scanned layers."""

    @nn.compact
    def __call__(self, x):
        linen = functools.partial(Linen, flax_scan())
        members = nn.vmap(
            linen,
            {"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return members(name="members")(x)


@pytest.mark.parametrize("haiku_name", ["stack of functions", "loop"])
def test_ensembles(haiku_name):
    """Members are on the first axis in Haiku, where `init` runs under `jax.vmap`."""
    x = inputs(B, T, D)
    model = Members()
    transformed = hk.transform(haiku_model(HAIKU[haiku_name][0]))
    keys = jax.random.split(jax.random.key(0), 3)
    like = jax.eval_shape(jax.vmap(lambda key: transformed.init(key, x)), keys), {}
    variables = init(model, x)
    # Each member has all the numbered blocks.
    said = {"interleave": True} if haiku_name == "loop" else {}
    said |= proposed(variables, like)
    params, _ = assert_round_trips(variables, like, **said)

    def apply(params):
        return transformed.apply(params, None, x)

    expected = compiled(model.apply, variables, x)
    assert relative_error(compiled(jax.vmap(apply), params), expected) <= 1e-6


def test_an_ensemble_of_stacks_is_no_stack_of_ensembles():
    """`[members, L]` and `[L, members]` are the same number of layers."""
    flax = {"members": {"layers": {"Dense_0": {"kernel": new(3, L, 5, 5)}}}}
    like = {"layers/linear": {"w": new(L, 3, 5, 5)}}, {}
    with pytest.raises(ValueError, match=r"layers/linear/w.*nested as \(3, 4\)"):
        hk_stack.flax_to_haiku({"params": flax}, like)


def test_two_stacks():
    """One loop of layers, and a scan of as many on another axis."""
    loop = {f"encoder_{i}": {"Dense_0": {"kernel": new(4, 5)}} for i in range(3)}
    scan = new(4, 3, 5)
    flax = {**loop, "decoder": {"layers": {"Dense_0": {"kernel": scan}}}}
    w = np.stack([layer["Dense_0"]["kernel"] for layer in loop.values()])
    haiku = {"encoder/linear": {"w": w}}
    haiku |= {"decoder/layers/linear": {"w": np.moveaxis(scan, 1, 0)}}
    assert right_or_refused({"params": flax}, (haiku, {}))


class Boxed(nn.Module):
    """A layer whose parameters say how they are partitioned."""

    @nn.compact
    def __call__(self, x, _=None):
        for boxed in (nn.with_partitioning, nn.with_logical_partitioning):
            kernel = boxed(nn.initializers.lecun_normal(), ("in", "out"))
            x = nn.Dense(D, kernel_init=kernel)(x)
        return x, None


def test_boxed_parameters():
    x = inputs(B, D)
    metadata = {nn.PARTITION_NAME: "layers"}
    scan = nn.scan(
        Boxed,
        {"params": 1},
        split_rngs={"params": True},
        length=L,
        metadata_params=metadata,
    )
    types = jax.eval_shape(scan().init, jax.random.key(0), x, None)
    assert "Partitioned" in str(types)
    variables = cases.randomised(types)
    like = like_of(lambda x: haiku_stack(lambda x: hk.Linear(D)(hk.Linear(D)(x)))(x), x)
    like = {name.removeprefix("layers/"): leaves for name, leaves in like[0].items()}
    params, _ = assert_round_trips(variables, (like, {}))
    unboxed = nn.meta.unbox(variables)
    assert_equal(hk_stack.haiku_to_flax((params, {}), unboxed), unboxed)
    kernel = unboxed["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(params["linear"]["w"], np.moveaxis(kernel, 1, 0))


def test_frozen_dicts():
    variables, _ = flax_side("scan at axis 1")
    like, _ = haiku_side("stack of functions")
    expected = hk_stack.flax_to_haiku(variables, like)
    frozen = flax_core.freeze(variables)
    assert_equal(assert_round_trips(frozen, like), expected)
    back = hk_stack.haiku_to_flax(expected, frozen)
    assert isinstance(back, flax_core.FrozenDict)
    mixed = {"params": flax_core.freeze(variables["params"])}
    assert_equal(hk_stack.flax_to_haiku(mixed, like), expected)


# Arrays: NumPy's and JAX's, on several devices


def test_numpy_goes_to_numpy_and_jax_to_jax():
    variables, _ = flax_side("scan")
    types, _ = haiku_side("stack of functions")
    expected = hk_stack.flax_to_haiku(variables, types)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(expected))
    for source in (variables, jax.tree.map(jnp.asarray, variables)):
        for make, kind in ((np.zeros, np.ndarray), (jnp.zeros, jax.Array)):
            like = jax.tree.map(lambda t, make=make: make(t.shape, t.dtype), types)
            found = hk_stack.flax_to_haiku(source, like)
            assert all(isinstance(leaf, kind) for leaf in jax.tree.leaves(found))
            assert_equal(found, expected)
            assert all(not np.any(leaf) for leaf in jax.tree.leaves(like))


def test_results_are_sharded_as_like_says():
    variables, _ = flax_side("scan at axis 1")
    types, _ = haiku_side("stack of functions")
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


def test_patterns_of_blocks_and_remainders():
    """Into a loop, and then into a stack: every third block is wide, two are over."""
    kernels = [new(5, 3 if i % 3 == 2 else 2) for i in range(11)]
    variables = {f"block_{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}
    like = {f"layers/{name}": {"w": new(3, 5, 2)} for name in "ab"}
    like |= {"layers/wide": {"w": new(3, 5, 3)}}
    like |= {f"block_{i}": {"w": new(5, 2)} for i in (9, 10)}
    stacks = ("layers/a", "layers/b", "layers/wide")
    names = hk_stack.NumberedLayers("block_{}", stacks, num_layers=3)
    of_loop = hk_stack.unstack_params((like, {}), names)
    ported = assert_round_trips({"params": variables}, of_loop)
    params, _ = hk_stack.stack_params(ported, names)
    np.testing.assert_array_equal(params["layers/b"]["w"], np.stack(kernels[1:9:3]))
    np.testing.assert_array_equal(params["block_9"]["w"], kernels[9])
