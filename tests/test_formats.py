"""`checkpoint.read` reads what is on people's disks, or says why not."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
from test_checkpoint import assert_error, assert_same, random_bits

from hk_stack import checkpoint

checkpoints = pytest.importorskip("flax.training.checkpoints")
serialization = pytest.importorskip("flax.serialization")
nnx = pytest.importorskip("flax.nnx")
msgpack = pytest.importorskip("msgpack")
orbax = pytest.importorskip("orbax.checkpoint")
safetensors = pytest.importorskip("safetensors.numpy")

BF16 = np.asarray([1, 2], "bfloat16")
TREE = {
    "params": {
        "Block_0": {
            "Dense_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
        },
        "Block_1": {"Dense_0": {"kernel": np.ones([2, 3], np.float32).T}},
        "scale": np.asarray(2.5, np.float32),
    },
    "counts": {"n": np.arange(3)},
}


def as_msgpack(path, tree):
    path.write_bytes(serialization.to_bytes(tree))
    return path


def as_flax(path, tree):
    """The way of Flax today, which is a folder of orbax."""
    return checkpoints.save_checkpoint(path, tree, 5)


def as_orbax(path, tree):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def as_plain_zarr(path, tree):
    handler = orbax.PyTreeCheckpointHandler(use_ocdbt=False)
    with orbax.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=orbax.args.PyTreeSave(tree))
    return path


def as_managed(path, tree):
    with orbax.CheckpointManager(path) as manager:
        for step, tree_of_step in ((7, {"a": np.ones(1)}), (10, tree)):
            manager.save(step, args=orbax.args.StandardSave(tree_of_step))
    return path / "10"


def as_items(path, tree):
    items = {name: orbax.args.StandardSave(item) for name, item in tree.items()}
    items["settings"] = orbax.args.JsonSave({"width": 3})
    with orbax.CheckpointManager(path, item_names=tuple(items)) as manager:
        manager.save(7, args=orbax.args.Composite(**items))
    return path / "7"


def named(tree, separator):
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def as_safetensors(path, tree):
    path = path.with_suffix(".safetensors")
    leaves = named(tree, ".")
    safetensors.save_file({name: leaves[name].copy() for name in leaves}, path)
    return path


def as_several_files(path, tree):
    files = {}
    for i, (name, leaf) in enumerate(named(tree, ".").items()):
        files[name] = f"model-{i}.safetensors"
        safetensors.save_file({name: leaf.copy()}, path.with_name(files[name]))
    path = path.with_suffix(".safetensors.index.json")
    path.write_text(json.dumps({"weight_map": files}))
    return path


def as_npz(path, tree, save=np.savez):
    path = path.with_suffix(".npz")
    save(path, **named(tree, "/"))
    return path


def as_packed_npz(path, tree):
    return as_npz(path, tree, np.savez_compressed)


def as_own_file(path, tree):
    checkpoint.save(path.with_suffix(".safetensors"), tree)
    return path.with_suffix(".safetensors")


def as_own_folder(path, tree):
    checkpoint.save(path, tree)
    return path


WRITERS = [
    as_msgpack, as_flax, as_orbax, as_plain_zarr, as_managed, as_items,
    as_safetensors, as_several_files, as_npz, as_packed_npz, as_own_file, as_own_folder,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of orbax's own formats.
def test_every_format_is_read(write, tmp_path):
    path = write(tmp_path / "checkpoint_5", TREE)
    assert_same(checkpoint.read(path), TREE)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    assert checkpoint.read(path, types=True) == types


@pytest.mark.parametrize("write", [as_msgpack, as_plain_zarr, as_orbax])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_numbers_are_arrays_and_texts_are_left_out(write, tmp_path):
    tree = {"step": 3, "a.b": BF16, "list": [np.ones(2), 0.5], "none": None}
    if write is not as_orbax:
        tree["name"] = "adam"
    path = write(tmp_path / "a", tree)
    found = checkpoint.read(path)
    expected = {"step": np.asarray(3), "a.b": BF16}
    assert_same(found, expected | {"list": {"0": np.ones(2), "1": np.asarray(0.5)}})
    types = checkpoint.read(path, types=True)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda x: x.shape, types)


def test_a_name_may_begin_with_another(tmp_path):
    names = ["a", "a.b", "c.d", "c.d.e.f", "c.g", "h/i", "h/i/j.k", "l.m/n"]
    leaves = {name: np.full([1], i) for i, name in enumerate(names)}
    safetensors.save_file(leaves, tmp_path / "a.safetensors")
    leaf = dict(enumerate(leaves.values()))
    assert checkpoint.read(tmp_path / "a.safetensors") == {
        "a": leaf[0],
        "a.b": leaf[1],
        "c": {"d": leaf[2], "d.e.f": leaf[3], "g": leaf[4]},
        "h": {"i": leaf[5], "i/j.k": leaf[6]},
        "l.m": {"n": leaf[7]},
    }


def raw_safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


NEW_TYPES = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16",
}


@pytest.mark.parametrize("name", NEW_TYPES)
def test_small_floats(name, tmp_path):
    expected = random_bits(NEW_TYPES[name])
    entry = {"dtype": name, "shape": [4, 3], "data_offsets": [0, expected.nbytes]}
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors({"a": entry}, expected.tobytes()))
    assert_same(checkpoint.read(path), {"a": expected})


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.layers = nnx.List([nnx.BatchNorm(2, rngs=rngs)])


@pytest.mark.parametrize("part", ["all", "a part"])
@pytest.mark.parametrize("write", [as_own_file, as_own_folder, as_orbax])
def test_states_of_nnx_are_dicts_of_arrays(write, part, tmp_path):
    """As a port takes them; `load` also knows the state itself."""
    state = tree = nnx.state(Model(nnx.Rngs(0)))
    expected = nnx.to_pure_dict(state)
    expected["layers"] = {"0": expected["layers"][0]}
    if part == "a part":
        tree, expected = {"model": state, "step": 3}, {"model": expected, "step": 3}
    path = write(tmp_path / "a", tree)
    assert_same(checkpoint.read(path), jax.tree.map(np.asarray, expected))
    if write is not as_orbax:
        assert_same(checkpoint.load(path, tree), tree)


def test_a_field_of_a_tuple_is_no_box(tmp_path):
    optax = pytest.importorskip("optax")
    state = optax.scale_by_zoom_linesearch(3).init({"w": np.ones(2, np.float32)})
    checkpoint.save(tmp_path / "a.safetensors", {"state": state})
    found = checkpoint.load(tmp_path / "a.safetensors")
    assert found["state"]["value"].shape == ()


# Weights of Hugging Face: names and shapes in PyTorch, and in Flax.

D = 4
BERT = {
    "bert.embeddings.position_ids": ([1, 7], None, None),
    "bert.embeddings.word_embeddings.weight": ([9, D], "embedding", [9, D]),
    "bert.embeddings.LayerNorm.gamma": ([D], "scale", [D]),
    "bert.embeddings.LayerNorm.beta": ([D], "bias", [D]),
    "bert.encoder.layer.0.attention.self.query.weight": ([D, D], "kernel", [D, D]),
    "bert.encoder.layer.0.attention.self.query.bias": ([D], "bias", [D]),
    "bert.encoder.layer.0.output.LayerNorm.weight": ([D], "scale", [D]),
    "bert.encoder.layer.0.output.LayerNorm.bias": ([D], "bias", [D]),
    "bert.encoder.layer.0.output.dense.weight": ([D, 8], "kernel", [8, D]),
    "bert.encoder.layer.0.output.dense.bias": ([D], "bias", [D]),
    "cls.predictions.bias": ([9], "bias", [9]),
    "cls.predictions.decoder.weight": ([9, D], "kernel", [D, 9]),
}
GPT2 = {
    "transformer.wte.weight": ([9, D], "embedding", [9, D]),
    "transformer.wpe.weight": ([7, D], "embedding", [7, D]),
    "transformer.h.0.ln_1.weight": ([D], "scale", [D]),
    "transformer.h.0.ln_1.bias": ([D], "bias", [D]),
    "transformer.h.0.attn.bias": ([1, 1, 7, 7], None, None),
    "transformer.h.0.attn.masked_bias": ([], None, None),
    "transformer.h.0.attn.c_attn.weight": ([D, 12], "kernel", [12, D]),
    "transformer.h.0.attn.c_attn.bias": ([12], "bias", [12]),
    "transformer.h.0.mlp.c_fc.weight": ([D, 16], "kernel", [16, D]),
    "transformer.h.0.mlp.c_fc.bias": ([16], "bias", [16]),
    "lm_head.weight": ([9, D], "kernel", [D, 9]),
}
_BLOCK = "encoder.block.0.layer"
T5 = {
    "shared.weight": ([9, D], "embedding", [9, D]),
    f"{_BLOCK}.0.SelfAttention.q.weight": ([8, D], "kernel", [D, 8]),
    f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight": (
        [32, 2],
        "embedding",
        [32, 2],
    ),
    f"{_BLOCK}.0.layer_norm.weight": ([D], "weight", [D]),
    f"{_BLOCK}.1.DenseReluDense.wi_0.weight": ([16, D], "kernel", [D, 16]),
    "decoder.block.0.layer.1.EncDecAttention.k.weight": ([8, D], "kernel", [D, 8]),
    "decoder.final_layer_norm.weight": ([D], "weight", [D]),
}
VIT = {
    "vit.embeddings.cls_token": ([1, 1, D], "cls_token", [1, 1, D]),
    "vit.embeddings.position_embeddings": (
        [1, 5, D],
        "position_embeddings",
        [1, 5, D],
    ),
    "vit.embeddings.patch_embeddings.projection.weight": (
        [D, 3, 2, 5],
        "kernel",
        [2, 5, 3, D],
    ),
    "vit.embeddings.patch_embeddings.projection.bias": ([D], "bias", [D]),
    "vit.encoder.layer.0.attention.attention.key.weight": ([D, D], "kernel", [D, D]),
    "vit.encoder.layer.0.layernorm_before.weight": ([D], "scale", [D]),
    "vit.encoder.layer.0.layernorm_before.bias": ([D], "bias", [D]),
    "classifier.weight": ([2, D], "kernel", [D, 2]),
    "classifier.bias": ([2], "bias", [2]),
}
FAMILIES = {"bert": BERT, "gpt2": GPT2, "t5": T5, "vit": VIT}


def weights(family, tmp_path):
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, (shape, _, _) in FAMILIES[family].items()
    }
    path = tmp_path / f"{family}.safetensors"
    safetensors.save_file(leaves, path, {"format": "pt"})
    return path, leaves


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_pytorch(family, tmp_path):
    path, leaves = weights(family, tmp_path)
    expected = {}
    for name, (_, leaf, shape) in FAMILIES[family].items():
        if leaf:
            array = leaves[name]
            if leaf == "kernel":
                array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
            expected[f"{name.rpartition('.')[0]}.{leaf}"] = array
            assert list(array.shape) == shape
    found = checkpoint.read(path, family=family)
    assert_same(dict(sorted(named(found, ".").items())), dict(sorted(expected.items())))
    types = checkpoint.read(path, family=family, types=True)
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda x: x.shape, types)
    for other in set(FAMILIES) - {family}:
        with pytest.raises(ValueError, match=f"is not one of '{other}' that is known"):
            checkpoint.read(path, family=other)


def test_weights_that_do_not_fit_are_not_guessed(tmp_path):
    path = tmp_path / "a.safetensors"
    linear = {"pooler.dense.weight": np.ones([2, 3]), "pooler.dense.bias": np.ones(3)}
    twice = {"LayerNorm.weight": np.ones(2), "LayerNorm.gamma": np.ones(2)}
    square = {"a.weight": np.ones([2, 2])}
    for leaves in (linear, twice, square, {"a.kernel": np.ones([2])}):
        safetensors.save_file(leaves, path)
        parts = [path, next(iter(leaves)), "Without family="]
        assert_error(ValueError, parts, checkpoint.read, path, family="bert")
        assert checkpoint.read(path)
    parts = ['family must be one of "bert", "gpt2"', "not 'llama'"]
    assert_error(ValueError, parts, checkpoint.read, path, family="llama")


# What is refused, or damaged.


def npy(shape, dtype="<f4", data=b"1234", version=b"\1\0"):
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}}}"
    text = head.ljust(117).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def archive(*members, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as written:
        for name, data in members:
            written.writestr(name, data)
    return file.getvalue()


def lying_archive():
    """Says that its one member is of two gigabytes."""
    data = bytearray(archive(("a.npy", npy((2**31 - 128,), "|u1"))))
    at = data.rindex(b"PK\1\2") + 24
    data[at : at + 4] = struct.pack("<I", 2**31)
    return bytes(data)


def numpy_objects(save, **kwargs):
    file = io.BytesIO()
    save(file, **kwargs)
    return file.getvalue()


def packed(shape, dtype="float32", data=b"1234"):
    array = msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))
    return msgpack.packb({"a": array})


def entry(shape, dtype="F32", end=4):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


OBJECT = np.asarray([{"w": 1}])
RUNS = "runs code when it is read"
# Its name, its bytes, and what the error says.
BAD_FILES = {
    "pickle": ("a", pickle.dumps(TREE), RUNS),
    "old pickle": ("a.pt", pickle.dumps(TREE, protocol=0), RUNS),
    "other pickle": ("a.pkl", b"no", "checkpoint.save(path, tree)"),
    "torch": ("a.bin", archive(("a/data.pkl", b""), ("a/data/0", b"")), "torch.save"),
    "npy objects": ("a.npy", numpy_objects(np.save, arr=OBJECT), RUNS),
    "npz objects": ("a.npz", numpy_objects(np.savez, a=OBJECT), "'a' holds Python"),
    "hdf5": ("a.h5", b"\x89HDF\r\n\x1a\n", "h5py"),
    "bfloat16": ("a.npz", archive(("a.npy", npy((2,), "|V2"))), "view('bfloat16')"),
    "mislabelled": ("a.npz", raw_safetensors(entry([1]), b"1234"), "Rename it"),
    "mislabelled npz": ("a.msgpack", archive(("a.npy", npy((1,)))), "Rename it"),
    "4 bits": ("a.safetensors", raw_safetensors(entry([8], "F4"), b"1234"), "type F4"),
    "later": ("a.safetensors", raw_safetensors(entry([4], "Z8"), b"1234"), "type Z8"),
    "no file": ("a.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "beside"),
    "other folder": ("a.index.json", b'{"weight_map": {"a": "../b"}}', "beside it"),
    "no arrays": ("a.npz", archive(), "no arrays in it"),
    "texts": ("a.npy", npy((1,), "<U1"), "no arrays in it"),
    **{
        f"damaged {i}": (*damaged, "or is damaged")
        for i, damaged in enumerate([
            ("a.safetensors", b"no"),
            ("a.npz", b"no"),
            ("a.msgpack", b"\xc1"),
            ("a.msgpack", b""),
            ("a.msgpack", b"\3"),
            ("a.safetensors", raw_safetensors({}, length=2**63)),
            ("a.safetensors", raw_safetensors({}, length=99_999_999)),
            ("a.safetensors", raw_safetensors(b'{"a":' + b"[" * 10**5)),
            ("a.safetensors", raw_safetensors(entry([2**60]), b"1234")),
            ("a.safetensors", raw_safetensors(entry([0, 2**62, 2**62], end=0))),
            ("a.safetensors", raw_safetensors({"a": {"shape": [1]}}, b"1234")),
            ("a.safetensors", raw_safetensors([1, 2])),
            ("a.safetensors", raw_safetensors({"a/" * 999: entry([1])["a"]}, b"1234")),
            ("a.npz", archive(("a.npy", npy((2**50,))))),
            ("a.npz", archive(("a.npy", npy((1,))), ("b.txt", b""))),
            ("a.npz", archive(("a.npy", npy((9**6,), "|u1", bytes(9**6))), method=14)),
            ("a.npz", lying_archive()),
            ("a.npy", npy((2**50,))),
            ("a.npy", npy((-1,))),
            ("a.npy", npy((2**70, 0), data=b"")),
            ("a.npy", npy((1,), version=b"\2\0")),
            ("a.npy", npy((1,)).replace(b"(1,)", b"f(1)")),
            ("a.msgpack", packed((2**50,))),
            ("a.msgpack", packed((1,), "O", b"12345678")),
            ("a.msgpack", b"\x91" * 10**5),
            ("a.msgpack", b"\x81\xa1a" * 300 + b"\1"),
            ("a.msgpack", b"\xdf\xff\xff\xff\xff"),
            ("a.index.json", b"[" * 10**5),
        ])
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_not_read(case, tmp_path):
    """In little memory: a megabyte more than what is there."""
    name, data, said = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(data)
    tracemalloc.start()
    try:
        assert_error(ValueError, [path, said], checkpoint.read, path)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 20 * len(data)
    finally:
        tracemalloc.stop()


def test_folders_that_are_not_read(tmp_path):
    as_managed(tmp_path / "run", TREE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.orbax-checkpoint-tmp").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name, said in {
        "run": "no arrays in it. Name what is inside of it: 7, 10.",
        "empty": "no arrays in it.",
        "a.orbax-checkpoint-tmp": "has not finished",
        "pipe.npz": "neither a file nor a folder",
    }.items():
        path = tmp_path / name
        assert_error(ValueError, [path, said], checkpoint.read, path)


@pytest.mark.parametrize("key", ["shape", "chunks"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_orbax_makes_no_room_for_more_than_there_is(key, tmp_path):
    path = as_plain_zarr(tmp_path / "a", {"w": np.ones([2, 3])})
    about = path / "w" / ".zarray"
    about.write_text(json.dumps({**json.loads(about.read_text()), key: [2**40, 3]}))
    for types in (True, False):
        parts = [path, "bytes of arrays cannot be in"]
        assert_error(ValueError, parts, checkpoint.read, path, types=types)


@pytest.mark.parametrize(
    "write",
    [as_safetensors, as_packed_npz, as_msgpack],
    ids=lambda write: write.__name__,
)
def test_damaged_files_are_read_or_refused(write, tmp_path):
    """Of what has a checksum, no altered array is taken."""
    tree = {"a": {"w": np.arange(3, dtype=np.float32)}, "b": np.ones([], np.float16)}
    path = write(tmp_path / "a", tree)
    data = path.read_bytes()
    flips = [
        data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        for at in range(len(data))
    ]
    for altered in [*flips, *(data[:length] for length in range(len(data)))]:
        path.write_bytes(altered)
        try:
            found = checkpoint.read(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        assert len(altered) == len(data)
        if write is as_packed_npz:
            assert [x.tobytes() for x in jax.tree.leaves(found)] == [
                x.tobytes() for x in jax.tree.leaves(tree)
            ]
