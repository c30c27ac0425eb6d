"""What is saved comes back bit for bit, or an error says what is wrong."""

import base64
import copy
import functools
import itertools
import json
import os
import pathlib
import socket
import stat
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from test_layout import REAL

import hk_stack
from hk_stack import NumberedLayers, _whole, checkpoint

optax = pytest.importorskip("optax")
pytest.importorskip("safetensors")
pytest.importorskip("orbax.checkpoint")

L = 3
LAYERS = NumberedLayers("layer_{}", "layers")


@pytest.fixture(params=["file", "folder"])
def path(request, tmp_path):
    """Where to save, in either format."""
    return tmp_path / ("step.safetensors" if request.param == "file" else "step")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))


def bits(leaf):
    if has_key(leaf):
        return str(leaf.dtype), bits(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()


def has_key(leaf):
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", bool), jax.dtypes.prng_key)


def assert_same(found, expected):
    """Structure, types, bits and, of JAX arrays, where they are."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        assert type(x) is type(y)
        assert bits(x) == bits(y)
        if isinstance(x, jax.Array):
            assert (x.sharding, x.committed) == (y.sharding, y.committed)


def random_bits(dtype, shape=(4, 3)):
    """An array of any bits that `dtype` may have: also NaNs with payload."""
    dtype = np.dtype(dtype)
    some = np.random.default_rng(0).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    if dtype.name in ("bool", "int4"):
        some %= 2
    return some.view(dtype).reshape(shape)


NUMPY_DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "bfloat16 complex64 complex128 int4 float8_e4m3fn"
).split()
JAX_DTYPES = (
    "bool int8 int32 uint8 uint32 float16 float32 bfloat16 complex64 int4 float8_e5m2"
).split()

LEAVES = {
    **{f"numpy {dtype}": random_bits(dtype) for dtype in NUMPY_DTYPES},
    **{f"jax {dtype}": jnp.asarray(random_bits(dtype)) for dtype in JAX_DTYPES},
    "numpy []": np.asarray(1.5),
    "numpy [0]": np.zeros([0]),
    "numpy [2, 0, 3]": np.zeros([2, 0, 3], "bfloat16"),
    "numpy scalar": np.float32(2.5),
    "numpy transposed": np.arange(6.0).reshape(2, 3).T,
    "numpy every second": np.arange(10)[::2],
    "numpy broadcast": np.broadcast_to(np.float32(7), (2, 3)),
    "jax []": jnp.asarray(3),
    "jax [0]": jnp.zeros([0]),
    "python int": 2**40,
    "python float": 0.1,
    "python bool": True,
    "python complex": 1j,
    "key": jax.random.key(7),
    "keys": jax.random.split(jax.random.key(7, impl="rbg"), 6).reshape(2, 3),
    "legacy key": jax.random.PRNGKey(7),
    "committed": jax.device_put(jnp.ones(3), jax.devices()[2]),
}


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_leaf_comes_back_as_it_was(path, leaf):
    tree = {"a": {"leaf": leaf}, "rest": np.arange(3)}
    checkpoint.save(path, tree)
    assert_same(checkpoint.load(path, tree), tree)
    without_like = checkpoint.load(path)
    assert bits(without_like["a"]["leaf"]) == bits(leaf)
    for found in (without_like, checkpoint.load(path, tree)):
        found["rest"][:] = -1  # They can be written to.
    noted = checkpoint.metadata(path).leaves["a/leaf"]
    assert noted.shape == np.shape(leaf)
    assert noted.dtype == (leaf if has_key(leaf) else np.asarray(leaf)).dtype


@pytest.mark.parametrize("spec", [P("b"), P(), P(None, "b")], ids=str)
def test_shards_come_back_as_they_were(path, mesh, spec):
    sharding = NamedSharding(mesh, spec)
    keys = jax.random.split(jax.random.key(0), 16).reshape(4, 4)
    tree = jax.device_put(
        {"w": jnp.arange(32.0).reshape(4, 8), "k": keys, "empty": jnp.ones([4, 4, 0])},
        sharding,
    )
    checkpoint.save(path, tree)
    assert_same(checkpoint.load(path, tree), tree)


def test_shards_come_back_in_other_shards(path, mesh):
    x = jnp.arange(32.0).reshape(4, 8)
    checkpoint.save(path, {"x": jax.device_put(x, NamedSharding(mesh, P("b")))})
    for sharding in (
        NamedSharding(mesh, P(None, "b")),
        NamedSharding(jax.make_mesh((2, 2), ("a", "b")), P("b", "a")),
        SingleDeviceSharding(jax.devices()[3]),
    ):
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
        assert_same(checkpoint.load(path, like), {"x": jax.device_put(x, sharding)})
    assert_same(checkpoint.load(path, {"x": x}), {"x": x})
    assert_same(checkpoint.load(path, {"x": np.asarray(x)}), {"x": np.asarray(x)})


def stacked_tree():
    """Parameters and state of all ranks, in the stack and outside; optimiser state."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "layers/parts/linear": {"w": draw(L, 4, 4), "b": draw(L, 4)},
        "layers/norm": {"scale": draw(L)},
        "head": {"w": draw(4, 1)},
    }
    ema = {"average": draw(L, 1, 4), "counter": jnp.arange(L)}
    return {
        "params": params,
        "state": {"layers/norm/~/mean_ema": ema, "count": {"n": jnp.asarray(2)}},
        "opt_state": optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.masked(optax.adamw(0.1), {m: m != "head" for m in params}),
        ).init(params),
        "step": 7,
    }


@pytest.fixture(scope="module")
def trees():
    """A whole tree, stacked and per-layer."""
    tree = stacked_tree()
    return {"stacked": tree, "per-layer": hk_stack.unstack_params(tree, LAYERS)}


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_tree_comes_back_as_it_was(path, trees, layout):
    tree = trees[layout]
    checkpoint.save(path, tree, layers=LAYERS)
    assert_same(checkpoint.load(path, tree), tree)
    specs = {**jax.eval_shape(lambda tree: tree, tree), "step": 0}
    assert_same(checkpoint.load(path, specs), tree)
    on_host = jax.tree.map(np.asarray, tree)
    assert_same(checkpoint.load(path, on_host), on_host)
    part = checkpoint.load(path, specs["params"], at="params")
    assert_same(part, tree["params"])
    dicts = checkpoint.load(path)
    assert_same(dicts["params"], on_host["params"])
    assert_same(dicts["state"], on_host["state"])
    found = checkpoint.metadata(path)
    assert (found.layout, found.depth) == (layout, L)
    assert len(found.leaves) == len(jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["arrays", "specs", "numpy"])
@pytest.mark.parametrize("there", ["stacked", "per-layer"])
def test_a_checkpoint_goes_into_the_other_layout(path, trees, there, kind):
    here = {"stacked": "per-layer", "per-layer": "stacked"}[there]
    checkpoint.save(path, trees[there], layers=LAYERS)
    like = expected = trees[here]
    if kind == "specs":
        like = {**jax.eval_shape(lambda tree: tree, like), "step": 0}
    elif kind == "numpy":
        like = expected = jax.tree.map(np.asarray, like)
    assert_same(checkpoint.load(path, like, layers=LAYERS), expected)
    assert_same(checkpoint.load(path, trees[there], layers=LAYERS), trees[there])
    params = checkpoint.load(path, like["params"], layers=[LAYERS], at="params")
    assert_same(params, expected["params"])


def test_a_converted_checkpoint_is_where_like_is(path, mesh):
    keys = jax.random.split(jax.random.key(0), L)
    stacked = {"layers/linear": {"w": jnp.arange(L * 8.0).reshape(L, 8), "k": keys}}
    checkpoint.save(path, stacked)
    flat = hk_stack.unstack_params(stacked, LAYERS)
    like = jax.device_put(flat, NamedSharding(mesh, P()))
    like["layer_1/linear"]["w"] = jax.device_put(
        flat["layer_1/linear"]["w"], NamedSharding(mesh, P("b"))
    )
    assert_same(checkpoint.load(path, like, layers=LAYERS), like)


def test_a_converted_checkpoint_has_the_depth_of_like(path):
    checkpoint.save(path, per_layer(12), layers=LAYERS)
    like = {**STACKED["params"], "layers/linear": {"w": np.ones([6, 4, 4], np.float32)}}
    parts = ["the checkpoint holds L=12 layers (per-layer), like has 6."]
    load = functools.partial(checkpoint.load, path, layers=LAYERS, at="params")
    assert_error(ValueError, parts, load, like)
    parts = [f"checkpoint.load of {path}: like: no module of the tree is a layer"]
    assert_error(ValueError, parts, load, {"head": like["head"]})
    parts = ["layers must be a naming map, not ()"]
    load = functools.partial(checkpoint.load, path, like, layers=())
    assert_error(TypeError, parts, load)


def test_parts(path):
    tree = {"params": {"a/b": {"c": np.ones(2)}, "a/d": {"c": np.zeros(1)}}, "step": 5}
    checkpoint.save(path, tree)
    assert checkpoint.load(path, at="step") == 5
    assert checkpoint.load(path, 0, at="step") == 5
    assert_same(checkpoint.load(path, at="params"), tree["params"])
    inner = tree["params"]["a/b"]
    assert_same(checkpoint.load(path, inner, at="params/a/b"), inner)
    for at in ("params/a", "par", "params/a/b/c/d", "steps"):
        parts = [f"no part {at!r}", "such as 'params', 'step'."]
        load = functools.partial(checkpoint.load, path, at=at)
        assert_error(ValueError, parts, load)
    parts = ["Like lacks 1: params/a/d/c float64[1].", "at='params'"]
    like = {"a/b": tree["params"]["a/b"]}
    assert_error(
        ValueError, parts, functools.partial(checkpoint.load, path, at="params"), like
    )


@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_go_into_the_other_layout(tmp_path, name):
    maps, trees = REAL[name].maps, REAL[name].trees()
    depths = sorted({depth for depth, _, _ in REAL[name].modules})
    path = tmp_path / "params.safetensors"
    for layout, tree in trees.items():
        checkpoint.save(path, tree, layers=maps)
        depth = tuple(depths) if len(depths) > 1 else depths[0]
        assert checkpoint.metadata(path)[:2] == (layout, depth)
        for like in trees.values():
            assert_same(checkpoint.load(path, like, layers=maps), like)


# Names and formats


NAMES = [
    "opt_state/0/count",
    "opt_state/0/mu/layers/linear/w",
    "opt_state/0/nu/layers/linear/w",
    "params/layers/linear/w",
    "state/norm/~/mean_ema/average",
    "steps/0",
    "steps/1",
]


def test_names_are_where_leaves_are(path):
    params = {"layers/linear": {"w": np.ones([2])}}
    tree = {
        "params": params,
        "state": {"norm/~/mean_ema": {"average": np.ones([2])}, "empty": {}},
        "opt_state": jax.tree.map(np.asarray, optax.adam(0.1).init(params)),
        "steps": [1, None, optax.MaskedNode(), 2][::3],
    }
    checkpoint.save(path, tree)
    assert list(checkpoint.metadata(path).leaves) == NAMES


def test_a_tree_may_be_one_array(path):
    checkpoint.save(path, np.arange(3))
    assert list(checkpoint.metadata(path).leaves) == ["leaf"]
    assert_same(checkpoint.load(path, np.arange(3)), np.arange(3))
    assert_same(checkpoint.load(path), np.arange(3))


def test_file_is_one_of_safetensors(tmp_path):
    from safetensors.numpy import load_file

    path = tmp_path / "step.safetensors"
    tree = {"linear": {"w": np.ones([2]), "b": random_bits("bfloat16")}}
    checkpoint.save(path, tree)
    checkpoint.save(tmp_path / "again.safetensors", tree)
    plain = load_file(path)
    assert_same(
        plain, {"linear/" + name: leaf for name, leaf in tree["linear"].items()}
    )
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_folder_is_one_of_orbax(tmp_path):
    import orbax.checkpoint as orbax

    checkpoint.save(tmp_path / "step", {"linear": {"w": np.ones([2])}})
    with orbax.Checkpointer(orbax.CompositeCheckpointHandler()) as checkpointer:
        args = orbax.args.Composite(arrays=orbax.args.PyTreeRestore())
        plain = checkpointer.restore(tmp_path / "step", args=args)
    assert_same(plain["arrays"], {"linear/w": np.ones([2])})


# Written by `save(path, OLD, layers=LAYERS)` of the first version of the format, to
# be kept as it is: print(base64.b64encode(path.read_bytes())).
OLD = {
    "params": {"layers/linear": {"w": np.arange(4, dtype=np.float32).reshape(2, 2)}},
    "key": jax.random.key(3),
    "step": 5,
}
OLD_FILE = """
MAMAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJoa19zdGFjay5jaGVja3BvaW50Ijoie1wiZm9ybWF0XCI6IFwiaGtf
c3RhY2suY2hlY2twb2ludFwiLCBcInZlcnNpb25cIjogMSwgXCJsYXlvdXRcIjogXCJzdGFja2VkXCIsIFwiZGVw
dGhcIjogMiwgXCJtb2R1bGVzXCI6IHtcImxheWVycy9saW5lYXJcIjogW1wibGF5ZXJfMC9saW5lYXJcIiwgXCJs
YXllcl8xL2xpbmVhclwiLCBcImxheWVyXzIvbGluZWFyXCJdfSwgXCJsZWF2ZXNcIjoge1wia2V5XCI6IHtcInBh
dGhcIjogW1wia2V5XCJdLCBcInNoYXBlXCI6IFsyXSwgXCJkdHlwZVwiOiBcInVpbnQzMlwiLCBcImNyYzMyXCI6
IDIwMDY0MTM0NDcsIFwia2V5XCI6IFwidGhyZWVmcnkyeDMyXCJ9LCBcInBhcmFtcy9sYXllcnMvbGluZWFyL3dc
Ijoge1wicGF0aFwiOiBbXCJwYXJhbXNcIiwgXCJsYXllcnMvbGluZWFyXCIsIFwid1wiXSwgXCJzaGFwZVwiOiBb
MiwgMl0sIFwiZHR5cGVcIjogXCJmbG9hdDMyXCIsIFwiY3JjMzJcIjogNjI3MDU1NDk5fSwgXCJzdGVwXCI6IHtc
InBhdGhcIjogW1wic3RlcFwiXSwgXCJzaGFwZVwiOiBbXSwgXCJkdHlwZVwiOiBcImludDY0XCIsIFwiY3JjMzJc
IjogNzY3NzQyMjIxfX0sIFwiY3JjMzJcIjogMTc5MjI0Njk5MH0ifSwic3RlcCI6eyJkdHlwZSI6Ikk2NCIsInNo
YXBlIjpbXSwiZGF0YV9vZmZzZXRzIjpbMCw4XX0sInBhcmFtcy9sYXllcnMvbGluZWFyL3ciOnsiZHR5cGUiOiJG
MzIiLCJzaGFwZSI6WzIsMl0sImRhdGFfb2Zmc2V0cyI6WzgsMjRdfSwia2V5Ijp7ImR0eXBlIjoiVTMyIiwic2hh
cGUiOlsyXSwiZGF0YV9vZmZzZXRzIjpbMjQsMzJdfX0FAAAAAAAAAAAAAAAAAIA/AAAAQAAAQEAAAAAAAwAAAA==
"""


def test_old_file_can_still_be_read(tmp_path):
    path = tmp_path / "old.safetensors"
    path.write_bytes(base64.b64decode(OLD_FILE))
    assert_same(checkpoint.load(path, OLD), OLD)
    assert checkpoint.metadata(path)[:2] == ("stacked", 2)


# Errors.


def assert_error(kind, parts, f, *args, **kwargs):
    """`f` fails with an error that says all `parts`."""
    with pytest.raises(kind) as caught:
        f(*args, **kwargs)
    for part in parts:
        assert str(part) in str(caught.value)
    return caught.value


STACKED = {
    "params": {
        "layers/linear": {"w": np.ones([12, 4, 4], np.float32)},
        "head": {"b": np.ones([4], np.float32)},
    }
}


def per_layer(depth):
    w = np.ones([4, 4], np.float32)
    layers = {f"layer_{i}/linear": {"w": w} for i in range(depth)}
    return {"params": {**layers, "head": {"b": np.ones([4], np.float32)}}}


W, FITS = np.ones([2, 2], np.float32), np.ones([4], np.float32)
HABIT = NumberedLayers("linear")


def stacked(depth, **others):
    """`STACKED` of another depth, and with other modules."""
    layers = {"layers/linear": {"w": np.ones([depth, 4, 4], np.float32)}}
    return {"params": {**STACKED["params"], **layers, **others}}


def spec(dtype, sharding=None):
    return {"x": jax.ShapeDtypeStruct([6], dtype, sharding=sharding)}


# What is saved, with which map, what it is loaded into, and what the error says.
# fmt: off
MISFITS = {
    "shallower": (STACKED, LAYERS, stacked(6), [
        "the checkpoint holds L=12 layers (stacked), like has 6. Change num_layers to "
        "12, or take the layers you want from what checkpoint.load(path) gives: x[:n] "
        "of leaves [L, ...]."]),
    "deeper": (STACKED, LAYERS, stacked(20), ["L=12 layers (stacked), like has 20."]),
    **{f"per-layer {depth}": (per_layer(12), LAYERS, per_layer(depth), [
        f"the checkpoint holds L=12 layers (per-layer), like has {said}. Change "
        "num_layers to 12", "gives: some modules."])
       for depth, said in [(1, 1), (11, 11), (13, "more"), (17, "more")]},
    "stacked": (STACKED, LAYERS, per_layer(12), [
        "the checkpoint is stacked (L=12), like is per-layer. With the naming map of "
        "the stack, it is converted: checkpoint.load(path, like, layers=naming_map)."]),
    "per-layer": (per_layer(12), LAYERS, STACKED, [
        "the checkpoint is per-layer (L=12), like is stacked."]),
    "habit": ({"linear": {"w": W[0]}, "linear_1": {"w": W[1]}}, HABIT,
        {"linear": {"w": W}}, ["the checkpoint is per-layer (L=2), like is stacked."]),
    "nothing noted": (STACKED, None, per_layer(2), [
        "The checkpoint lacks 2: params/layer_0/linear/w float32[4, 4], params/layer_1",
        "Like lacks 1: params/layers/linear/w float32[12, 4, 4]. Give a like of all",
        "load(path, params, at='params')", "checkpoint.load(path) gives all"]),
    "many names": (per_layer(12), None, STACKED, [
        "Like lacks 12: params/layer_0/linear/w float32[4, 4], ", ", ...."]),
    "another model": (STACKED, LAYERS, {"params": {"embed": {"w": np.ones(3)}}}, [
        "lacks 1: params/embed/w float64[3]", "It is stacked, with L=12 layers."]),
    "several depths": (STACKED, LAYERS, stacked(12, **{"layers/n": {"b": W}}), [
        "The checkpoint lacks 1: params/layers/n/b float32[2, 2]."]),
    "axis": (STACKED, LAYERS, stacked(12, head={"b": np.ones([5], np.float32)}), [
        "leaf 'params/head/b' is float32[4] in the checkpoint, float32[5] in like: "
        "axis 0 differs."]),
    "rank": (STACKED, LAYERS, stacked(12, head={"b": W}), [
        "float32[2, 2] in like: the number of axes differs."]),
    "dtype": (STACKED, LAYERS, stacked(12, head={"b": FITS.astype("bfloat16")}), [
        "bfloat16[4] in like", "into a like of float32, and convert it yourself, with "
        "x.astype('bfloat16')"]),
    "key": (STACKED, LAYERS,
        stacked(12, head={"b": jax.random.split(jax.random.key(0), 4)}),
        ["jax.random.key_data or wrap_key"]),
    "narrow": ({"x": np.ones(6)}, None, spec(np.float64), [
        "leaf 'x' is float64", "jax_enable_x64", "numpy"]),
}
# fmt: on


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit(path, case):
    tree, layers, like, parts = MISFITS[case]
    checkpoint.save(path, tree, layers=layers)
    error = assert_error(ValueError, [path, *parts], checkpoint.load, path, like)
    assert len(str(error)) < 700
    if layers is None:
        assert "L=" not in str(error)


class TestLatest:
    def test_only_what_is_whole_counts(self, tmp_path):
        """Names may have dots; logs, hidden and unfinished files have numbers, too."""
        assert checkpoint.latest(tmp_path / "missing") is None
        for name in ("logs_900", "run0.1_800", "step_7.orbax-checkpoint-tmp-700/about"):
            (tmp_path / name).mkdir(parents=True)
        for name in ("events_600", ".step_500.safetensors", "step_9.safetensors.400"):
            (tmp_path / name).touch()
        (tmp_path / "step_300.safetensors").symlink_to(tmp_path / "gone")
        (tmp_path / "step_300").symlink_to(tmp_path / "gone")
        assert checkpoint.latest(tmp_path) is None
        w = np.ones(3)
        checkpoint.save(tmp_path / "lr0.1_9.safetensors", w)
        assert checkpoint.latest(tmp_path).endswith("/lr0.1_9.safetensors")
        checkpoint.save(tmp_path / "lr0.1_10", w)
        assert checkpoint.latest(str(tmp_path)) == str(tmp_path / "lr0.1_10")
        (tmp_path / "11").symlink_to(tmp_path / "lr0.1_10")
        found = checkpoint.load(checkpoint.latest(tmp_path))
        np.testing.assert_array_equal(found, w)

    def test_mistakes(self, path, tmp_path):
        checkpoint.save(path, np.ones(3))
        with pytest.raises(ValueError, match="this is a checkpoint; expected the"):
            checkpoint.latest(path)
        for name in ("step_5.safetensors", "step_05.safetensors"):
            checkpoint.save(tmp_path / name, np.ones(3))
        with pytest.raises(ValueError, match="have the same number"):
            checkpoint.latest(tmp_path)


def test_narrow_types_can_be_had(path):
    checkpoint.save(path, {"x": np.ones(6)})
    with jax.enable_x64(True):
        assert checkpoint.load(path, spec(np.float64))["x"].dtype == np.float64


def test_shardings_that_do_not_fit(path, mesh):
    checkpoint.save(path, {"x": np.ones(6, np.float32)})
    for on, parts in (
        (mesh, ["of like does not fit its sharding", "6"]),
        (mesh.abstract_mesh, ["without devices", "NamedSharding(mesh, spec)"]),
    ):
        like = spec(np.float32, NamedSharding(on, P("b")))
        parts = [path, "leaf 'x'", *parts]
        assert_error(ValueError, parts, checkpoint.load, path, like)


def deleted():
    x = jnp.ones(2)
    x.delete()
    return x


# What is saved, with which map, and what the error says.
# fmt: off
BAD_TREES = {
    "text": ({"b": {"c": "adam"}}, TypeError,
        ["leaf 'b/c' is a str ('adam'); expected an array"]),
    "object": ({"b": np.asarray([None])}, TypeError, ["leaf 'b'", "expected an array"]),
    "function": ({"b": len}, TypeError, ["expected an array"]),
    "spec": (spec(float), TypeError, ["'x' is a ShapeDtypeStruct"]),
    "big int": ({"b": 2**70}, TypeError, ["is a int"]),
    "byte order": ({"b": np.ones(2, ">f4")}, ValueError, ["newbyteorder('=')"]),
    "deleted": ({"x": deleted()}, ValueError, ["leaf 'x' was donated"]),
    "one name": ({"a/b": {"c": W}, "a": {"b/c": W}}, ValueError,
        ["['a']['b/c'] and ['a/b']['c'] would both be named 'a/b/c'"]),
    "no leaves": ({"a": {}}, ValueError, ["the tree has no leaves"]),
    "metadata": ({"__metadata__": W}, ValueError, ["a leaf named '__metadata__'"]),
    "no layer": ({"head": {"b": W}}, ValueError,
        ["no module of the tree is a layer to NumberedLayers('layer_{}', 'layers')",
         "head/b", "leave `layers` out"]),
    "both": ({"layers/linear": {"w": W}, "layer_0/linear": {"w": W}}, ValueError,
        ["layer_0/linear/w is of one layer, layers/linear/w of a stack"]),
    "depths": ({"layers/a": {"w": W}, "layers/b": {"w": 1.0}}, ValueError,
        ["layers/a/w has shape (2, 2), layers/b/w has shape ()", "one leading axis"]),
}
# fmt: on


@pytest.mark.parametrize("case", BAD_TREES)
def test_trees_that_cannot_be_saved(path, case):
    tree, kind, parts = BAD_TREES[case]
    layers = LAYERS if case in ("no layer", "both", "depths") else None
    parts = [f"checkpoint.save to {path}", *parts]
    assert_error(kind, parts, checkpoint.save, path, tree, layers=layers)
    assert not path.exists()


def test_leaves_that_cannot_be_compared(path):
    save = jax.jit(lambda x: checkpoint.save(path, {"x": x}))
    assert_error(TypeError, ["leaf 'x' is traced"], save, jnp.ones(2))
    checkpoint.save(path, {"a": 1})
    parts = [f"checkpoint.load of {path}: like: leaf 'a' is a str"]
    assert_error(TypeError, parts, checkpoint.load, path, {"a": "one"})


class Refusing(NumberedLayers):
    """A map that raises for names it does not know."""

    def flat_to_stacked(self, name):
        place = super().flat_to_stacked(name)
        if place is None:
            raise KeyError(name)
        return place


def test_maps_may_refuse_names(path, trees):
    for layout, tree in trees.items():
        there = path.with_name(f"{layout}_{path.name}")
        checkpoint.save(there, tree, layers=Refusing("layer_{}", "layers"))
        assert checkpoint.metadata(there)[:2] == (layout, L)


def test_parameters_say_how_deep_a_stack_is(path):
    """Not what an optimiser keeps of another shape, nor a leaf of the stack's name."""
    opt_state = optax.adafactor(0.1).init(STACKED["params"])
    tree = {**STACKED, "opt_state": opt_state, "sizes": {"layers": np.ones([4])}}
    checkpoint.save(path, tree, layers=LAYERS)
    assert checkpoint.metadata(path)[:2] == ("stacked", 12)


def test_paths_that_are_not_there(path, tmp_path):
    for f in (checkpoint.load, checkpoint.metadata):
        assert_error(FileNotFoundError, [path, "no such file or folder"], f, path)
    checkpoint.save(path, {"a": 1})
    is_file = path.suffix == ".safetensors"
    other = tmp_path / ("step" if is_file else "step.safetensors")
    assert_error(FileNotFoundError, [f"There is {path}"], checkpoint.load, other)
    path.rename(other)
    found = "this is a file" if is_file else "this is a folder"
    assert_error(ValueError, [other, found, "*.safetensors"], checkpoint.load, other)


def test_paths_may_be_relative_with_new_folders(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    checkpoint.save(f"run/7/{path.name}", {"a": 1})
    assert checkpoint.load(f"run/7/{path.name}", {"a": 0}) == {"a": 1}
    monkeypatch.setenv("HOME", str(path.parent))
    assert checkpoint.load(f"~/run/7/{path.name}") == {"a": 1}


def test_a_file_is_replaced_a_folder_is_not(path):
    is_file = path.suffix == ".safetensors"
    checkpoint.save(path, {"a": 1})
    parts = [path, "not written in the background", "checkpoint.save(path, tree)"]
    if is_file:
        checkpoint.save(path, {"a": 2})
    else:
        parts = [path, "cannot be replaced in one step", "remove it"]
        assert_error(ValueError, parts, checkpoint.save, path, {"a": 2})
    assert_error(ValueError, parts, checkpoint.save_async, path, {"a": 2})
    assert checkpoint.load(path, {"a": 0}) == {"a": 1 + is_file}
    folder = path.with_name("folder.safetensors")
    folder.mkdir()
    parts = [folder, "this is a folder"]
    assert_error(ValueError, parts, checkpoint.save, folder, {"a": 1})


def test_checkpoints_of_others(tmp_path):
    import orbax.checkpoint as orbax
    from safetensors.numpy import save_file

    save_file({"a": np.ones(2)}, tmp_path / "a.safetensors")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"a": np.ones(2)})
    for name in ("a.safetensors", "a"):
        path = tmp_path / name
        parts = [path, "no metadata of hk_stack.checkpoint", "checkpoint.read(path)"]
        assert_error(ValueError, parts, checkpoint.load, path)
        assert_same(checkpoint.read(path), {"a": np.ones(2)})


def test_a_later_version(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", 2)
    checkpoint.save(path, {"a": 1})
    monkeypatch.undo()
    parts = [path, "of version 2", "knows version 1", "Update hk_stack"]
    assert_error(ValueError, parts, checkpoint.load, path)


def test_a_later_version_may_have_other_checksums(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", 2)
    monkeypatch.setattr(checkpoint, "_checksum_of_content", lambda content: "sha")
    checkpoint.save(path, {"a": 1})
    monkeypatch.undo()
    parts = [
        path,
        "of version 2",
        "or is truncated",
        "Update hk_stack, or load another",
    ]
    assert_error(ValueError, parts, checkpoint.load, path)


@pytest.mark.parametrize("library", ["safetensors", "orbax"])
def test_libraries_are_extras(tmp_path, monkeypatch, library):
    path = tmp_path / ("step.safetensors" if library == "safetensors" else "step")
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    parts = [f"needs {library}", "pip install 'hk_stack[checkpoint]'"]
    assert_error(ImportError, parts, checkpoint.save, path, {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_libraries_are_imported_when_used():
    code = (
        "import sys, hk_stack.checkpoint\n"
        "assert not {'safetensors', 'orbax'} & {name.partition('.')[0] for name in "
        "sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# What was altered.


def small_tree():
    w = np.random.default_rng(0).normal(size=[2, 8])
    return {"layers/linear": {"w": w}, "key": jax.random.key(0), "none": np.ones([0])}


def fate(path, tree, like=None):
    """What loading gives: the tree as it was, or a clear error."""
    try:
        leaves = jax.tree.leaves(checkpoint.load(path, like))
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error)
        return str(error)
    expected = jax.tree.leaves(tree)
    assert list(map(bits, leaves)) == list(map(bits, expected))
    return "as it was"


def test_what_was_altered_in_a_file_is_found(tmp_path):
    path = tmp_path / "step.safetensors"
    tree = small_tree()
    checkpoint.save(path, tree, layers=LAYERS)
    data = path.read_bytes()
    in_w = data.index(tree["layers/linear"]["w"].tobytes())
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 1 << (at % 8)
        path.write_bytes(altered)
        said = fate(path, tree, like=(tree, None)[at % 2])
        assert "altered" in said
        assert "another copy" in said or "no metadata" in said
        assert ("the data of leaf 'layers/linear/w' is not" in said) == (
            in_w <= at < in_w + tree["layers/linear"]["w"].nbytes
        )
    cuts = [data[:length] for length in [*range(0, len(data), 37), len(data) - 1]]
    for altered in [*cuts, data + b"more"]:
        path.write_bytes(altered)
        assert "altered: safetensors cannot read it" in fate(path, tree)
    path.write_bytes(data)
    assert fate(path, tree) == "as it was"


def sites(node, path=()):
    """Where something is in what JSON holds."""
    yield path
    keys = {dict: node, list: range(len(node))} if isinstance(node, dict | list) else {}
    for key in keys.get(type(node), ()):
        yield from sites(node[key], (*path, key))


def nested_lists(depth):
    return functools.reduce(lambda inside, _: [inside], range(depth), "x")


def test_metadata_of_another_form_is_found(tmp_path):
    """Though its checksum is right: anybody can write one."""
    import safetensors
    import safetensors.numpy

    path = tmp_path / "step.safetensors"
    tree = small_tree()
    checkpoint.save(path, tree, layers=LAYERS)
    with safetensors.safe_open(path, "numpy") as file:
        good = json.loads(file.metadata()[checkpoint._FORMAT])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    values = [None, -1, 1.5, 2**70, "x", "O", "V1000000000", [], {}, ["x"], [2**40] * 2]
    outcomes = set()
    for site in sites(good):
        for value in [*values, nested_lists(900), KeyError]:
            content = copy.deepcopy({"": good})
            *way, last = ("", *site)
            node = functools.reduce(lambda node, key: node[key], way, content)
            node[last] = value
            if value is KeyError:
                del node[last]
            content = content.get("")
            if isinstance(content, dict) and site != ("crc32",):
                content.pop("crc32", None)
                content["crc32"] = checkpoint._checksum_of_content(content)
            noted = {checkpoint._FORMAT: json.dumps(content)}
            safetensors.numpy.save_file(arrays, path, noted)
            try:
                checkpoint.load(path, (None, tree)[len(site) % 2])
                checkpoint.metadata(path)
                outcomes.add("loaded")
            except ValueError as error:
                assert str(path) in str(error)
                outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def alter_folder(path):
    """Alters each file of a folder in several ways; prints what loading gives."""
    tree = small_tree()
    checkpoint.save(path, tree, layers=LAYERS)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        data = file.read_bytes()
        bad = [data[: len(data) // 2], b"", None]
        for at in range(0, len(data), 1 + len(data) // 4):
            bad.append(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        for i, altered in enumerate(bad):
            file.unlink(missing_ok=True)
            if altered is not None:
                file.write_bytes(altered)
            said = fate(path, tree, (tree, None)[i % 2])
            print(json.dumps([str(file.relative_to(path)), said]))
        file.write_bytes(data)
    assert fate(path, tree) == "as it was"


def test_alterations_of_a_folder_are_found_or_do_no_harm(tmp_path):
    # In another process: where orbax gives up reading, it leaves threads and coroutines
    # that complain later.
    code = "import pathlib, sys, test_checkpoint\n"
    code += "test_checkpoint.alter_folder(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "step"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    fates = [json.loads(line) for line in done.stdout.splitlines()]
    found = {file for file, said in fates if said != "as it was"}
    assert {"about/metadata", "arrays/_METADATA", "arrays/manifest.ocdbt"} <= found
    data = [said for file, said in fates if file.startswith("arrays/d/")]
    assert data
    assert all("altered: orbax cannot read it" in said for said in data)


# What was interrupted.


def test_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    import safetensors.numpy

    path = tmp_path / "step.safetensors"
    checkpoint.save(path, {"a": 1})
    write = safetensors.numpy.save_file

    def half(arrays, partial, metadata):
        write(arrays, partial, metadata)
        os.truncate(partial, 40)
        raise safetensors.SafetensorError("I/O error: No space left on device")

    def refuse(*args):
        raise PermissionError("not here")

    monkeypatch.setattr(safetensors.numpy, "save_file", half)
    parts = [path, "No space left on device"]
    assert_error(ValueError, parts, checkpoint.save, path, {"a": 2})
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", refuse)
    assert_error(PermissionError, [], checkpoint.save, path, {"a": 2})
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoint.load(path, {"a": 0}) == {"a": 1}


def test_a_full_disk_leaves_what_was_there(path, tmp_path):
    resource = pytest.importorskip("resource")
    before = tmp_path / f"old_{path.name}"
    for there in {before, path if path.suffix else before}:
        checkpoint.save(there, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        tree = {"a": np.random.default_rng(0).normal(size=10**5)}
        parts = [f"checkpoint.save to {path}", "could not write it", "arge"]
        assert_error(ValueError, parts, checkpoint.save, path, tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(tmp_path.iterdir()) == {before, path if path.suffix else before}
    assert checkpoint.load(before) == {"a": 1}


# Forks processes that save without end, kills each at some moment, and looks at what
# is there in another one: this one must not have threads.
KILLS = """
    import os, random, signal, sys, time, traceback
    import numpy as np
    from hk_stack import checkpoint

    folder, suffix, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if not suffix:
        import orbax.checkpoint
    random.seed(0)

    def forked(f, *args):
        child = os.fork()
        if child:
            return child
        try:
            f(*args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def save_without_end(first, tell):
        for i in range(first, first + 1000):
            name = "step" if suffix else f"step_{i}"
            checkpoint.save(f"{folder}/{name}{suffix}", {"x": np.full(30_000, i)})
            os.write(tell, b".")

    def look():
        names = os.listdir(folder)
        assert sum(name.startswith(".") for name in names) <= 1, names
        whole = [name for name in names if not name.startswith(".")]
        assert whole
        for name in random.sample(whole, min(3, len(whole))):
            x = checkpoint.load(f"{folder}/{name}")["x"]
            assert x.shape == (30_000,) and len(set(x)) == 1

    for i in range(count):
        told, tell = os.pipe()
        child = forked(save_without_end, 1000 * i, tell)
        os.close(tell)
        assert os.read(told, 1)
        os.close(told)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert os.waitpid(forked(look), 0)[1] == 0
    print("whole")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("suffix", "count"),
    [
        (".safetensors", 5),
        pytest.param(".safetensors", 100, marks=pytest.mark.long),
        pytest.param("", 100, marks=pytest.mark.long),
    ],
)
def test_saves_that_are_killed_leave_what_was_there(suffix, count, tmp_path):
    """And no more than one hidden folder, which the next save takes away."""
    command = [sys.executable, "-c", textwrap.dedent(KILLS)]
    command += [tmp_path, suffix, str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "whole" in done.stdout, done.stderr
    checkpoint.save(tmp_path / f"last{suffix}", {"x": np.zeros(9)})
    assert not list(tmp_path.glob(".*"))


def test_what_others_are_writing_stays(tmp_path):
    draft = _whole.Draft(str(tmp_path / "a"))
    uuid, other = "0" * 32, f".{'0' * 32}.of_other.hk_stack.tmp"
    (tmp_path / f".{uuid}{draft.name[33:]}").mkdir()
    (tmp_path / other).mkdir()
    checkpoint.save(tmp_path / "b.safetensors", {"a": 1})
    stay = {path.name for path in tmp_path.iterdir()}
    assert stay == {draft.name, other, "b.safetensors"}
    os.utime(tmp_path / other, (0, 0))
    os.utime(tmp_path / draft.name, (0, 0))
    checkpoint.save(tmp_path / "b.safetensors", {"a": 1})
    stay = {path.name for path in tmp_path.iterdir()}
    assert stay == {draft.name, "b.safetensors"}
    draft.close()


def test_places_without_locks_do(path, monkeypatch):
    def refuse(*args):
        raise OSError("no locks here")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse)
    for without in (False, True):
        if without:  # As on Windows.
            monkeypatch.setattr(_whole, "fcntl", None)
        there = path.with_name(f"{without}_{path.name}")
        checkpoint.save(there, {"a": 1})
        assert checkpoint.load(there) == {"a": 1}
    assert len(list(path.parent.iterdir())) == 2


def test_of_two_saves_of_a_folder_one_wins(tmp_path):
    path = tmp_path / "step"
    trees = [{"x": np.full(1000, i), f"y_{i}": np.full(1000, i)} for i in range(2)]
    savings = [checkpoint.save_async(path, tree) for tree in trees]
    won = []
    for saving, tree in zip(savings, trees, strict=True):
        try:
            saving.wait()
            won.append(tree)
        except ValueError as error:
            assert "something else was saved there meanwhile" in str(error)
    (tree,) = won
    assert_same(checkpoint.load(path), tree)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_be_replaced_while_it_is_read(tmp_path):
    path = tmp_path / "step.safetensors"
    is_read = threading.Event()

    def save_without_end():
        for i in itertools.cycle(range(1, 4)):
            checkpoint.save(path, {name: np.full(10_000, i) for name in "ab"})
            if is_read.is_set():
                return

    checkpoint.save(path, {name: np.zeros(10_000, int) for name in "ab"})
    thread = threading.Thread(target=save_without_end)
    thread.start()
    try:
        for read in [checkpoint.load, checkpoint.read] * 30:
            found = read(path)
            assert len({*found["a"], *found["b"]}) == 1
    finally:
        is_read.set()
        thread.join()


RACE = """
    import sys
    import numpy as np
    from hk_stack import checkpoint

    number, path = int(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        tree = {f"m{i}": np.full(10_000, number) for i in range(20)}
        checkpoint.save(path, tree)
        print("saved")
    except ValueError as error:
        assert path in str(error)
        print("not")
"""


@pytest.mark.long
@pytest.mark.parametrize("race", range(5))
def test_of_two_processes_one_wins(path, race):
    command = [sys.executable, "-c", textwrap.dedent(RACE)]
    children = [
        subprocess.Popen(
            [*command, str(number), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    said = [child.communicate()[0].strip() for child in children]
    found = {value for x in checkpoint.load(path).values() for value in x}
    assert len(found) == 1
    if not path.suffix:
        assert sorted(said) == ["not", "saved"] and said[found.pop()] == "saved"


DEVICES = """
    import sys
    import jax
    import numpy as np
    from hk_stack import checkpoint

    path, old = sys.argv[1:]
    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    sharding = jax.NamedSharding(mesh, jax.P("d"))
    x, key = np.arange(48.0, dtype="float32").reshape(16, 3), jax.random.key(7)
    tree = {"x": jax.device_put(x, sharding), "whole": jax.numpy.ones(3), "key": key}
    if old:
        specs = jax.eval_shape(lambda tree: tree, tree)
        specs["x"] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        tree = checkpoint.load(old, specs)
        assert tree["x"].sharding == sharding
        assert len(tree["x"].addressable_shards) == jax.device_count()
        assert np.array_equal(tree["x"], x) and tree["key"] == key
        assert np.array_equal(checkpoint.load(old)["x"], x)
    checkpoint.save(path, tree)
"""


@pytest.mark.long
def test_a_checkpoint_goes_to_other_numbers_of_devices(path):
    old = ""
    for count in (1, 8, 2):
        new = path.with_name(f"{count}_{path.name}")
        flags = f"--xla_force_host_platform_device_count={count}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, "-c", textwrap.dedent(DEVICES), new, old]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        old = new


PROCESS = """
    import sys
    import haiku as hk
    import jax
    import jax.numpy as jnp
    import numpy as np
    import hk_stack
    from hk_stack import checkpoint

    number, address, path = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(number))
    devices = np.asarray(jax.devices())
    assert len(jax.local_devices()) < len(devices)
    mesh, P = jax.sharding.Mesh(devices, ("d",)), jax.sharding.PartitionSpec

    def spread(array, *spec):
        sharding = jax.sharding.NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    tree = {"here": jnp.arange(3), "here_key": jax.random.key(7), "step": 1}
    tree["numpy"], tree["none"] = np.arange(3), spread(np.zeros([0, 4]), None)
    for dtype in ("float32", "bfloat16", "bool", "int4", "complex64"):
        numbers = np.arange(2 * len(devices)).astype(dtype).reshape(-1, 2)
        tree[dtype] = [spread(numbers, "d"), spread(numbers), spread(numbers[0])]
    for kind in ("threefry2x32", "rbg", "unsafe_rbg"):
        keys = jax.random.split(jax.random.key(1, impl=kind), len(devices))
        tree[kind] = [spread(keys, "d"), spread(keys), spread(keys[0])]

    def data(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        shards = [shard.data for shard in leaf.addressable_shards]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shards = [jax.random.key_data(shard) for shard in shards]
        return leaf.sharding, leaf.dtype, [np.asarray(shard) for shard in shards]

    def spec(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    try:
        checkpoint.save(path + ".safetensors", tree)
    except ValueError as error:
        assert "spread over several processes" in str(error)
    checkpoint.save(path, tree)
    for like in (tree, jax.tree.map(spec, tree)):
        both = map(jax.tree.leaves, (checkpoint.load(path, like), tree))
        for one, other in zip(*both, strict=True):
            jax.tree.map(np.testing.assert_array_equal, data(one), data(other))

    stack = hk_stack.layer_stack(2)(lambda x: jnp.tanh(hk.Linear(4)(x)))
    init = hk.transform(stack).init
    x, key = np.ones([4 * len(devices), 4], np.float32), jax.random.key(0)
    for leaf, here in zip(
        *map(jax.tree.leaves, (init(key, spread(x, "d")), init(key, x))), strict=True
    ):
        assert leaf.is_fully_replicated and not leaf.is_fully_addressable
        np.testing.assert_array_equal(leaf.addressable_data(0), here)
    print("as it was")
"""


def test_folder_and_stack_of_several_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    flags = "--xla_force_host_platform_device_count=2"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    children = [
        subprocess.Popen(
            [*command, str(number), address, tmp_path / "step"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for child in children:
            out, errors = child.communicate(timeout=60)
            assert "as it was" in out, errors
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.skipif(os.name != "posix", reason="has no such modes")
def test_file_may_be_read_by_whoever_may_read_others(tmp_path):
    path = tmp_path / "step.safetensors"
    checkpoint.save(path, {"a": 1})
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# In the background.


def test_arrays_may_change_while_they_are_written(tmp_path):
    """Several on their way, too."""
    paths = [tmp_path / "step_1", tmp_path / "step_2"]
    x, y = np.arange(1e6), jnp.arange(1e6)
    savings = [checkpoint.save_async(path, {"x": x, "y": y}) for path in paths]
    expected = np.arange(1e6)
    x[:] = -1
    jax.block_until_ready(jax.jit(lambda y: y * 0, donate_argnums=0)(y))
    for saving, path in zip([*savings, savings[0]], [*paths, paths[0]], strict=True):
        saving.wait()
        found = checkpoint.load(path)
        np.testing.assert_array_equal(found["x"], expected)
        np.testing.assert_array_equal(found["y"], expected.astype(np.float32))


def test_failure_in_the_background_is_told(tmp_path):
    path = tmp_path / "step"
    tree = {"x": np.ones(3, "uint4")}  # Orbax finds out late.
    saving = checkpoint.save_async(path, tree)
    parts = [f"checkpoint.save to {path}: orbax could not write it", "uint4"]
    for _ in range(2):
        assert_error(ValueError, parts, saving.wait)
    assert list(tmp_path.iterdir()) == []
    checkpoint.save(path, {"x": np.ones(3)})
    checkpoint.save(tmp_path / "step.safetensors", tree)
    assert_same(checkpoint.load(tmp_path / "step.safetensors", tree), tree)
