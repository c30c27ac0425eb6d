"""Checkpoints of others, as nested dicts: read only.

A reader turns what is in one format into leaves by their paths: arrays, or their types
alone. What a file says of itself is believed only as far as its size allows, so that no
damaged or crafted one takes more memory than a sound one of its size would. Pickles
are refused: they run code.
"""

import importlib
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Path = tuple[str, ...]
Leaf = np.ndarray | jax.ShapeDtypeStruct
Leaves = dict[Path, Leaf]


def read(path: str, types: bool) -> Any:
    """Nested dicts of what is in a file or folder: arrays, or `jax.ShapeDtypeStruct`s.

    Raises:
      ImportError: If the library of its format is not installed.
      OSError: If it cannot be opened.
      ValueError: If it is damaged, or is refused.
    """
    reader, kind = _READERS[_format(path)]
    try:
        tree = nested(_without_boxes(reader(path, types)).items())
    except (ImportError, MemoryError):
        raise
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # Of many libraries.
        raise ValueError(
            f"{path}: it is no {kind}, or is damaged ({line(error)}). Load another "
            "copy of it."
        ) from error
    if not jax.tree.leaves(tree):
        inside = sorted(os.listdir(path), key=_by_number) if os.path.isdir(path) else []
        hint = f" Name what is inside of it: {listed(inside)}." if inside else ""
        raise ValueError(f"{path}: there are no arrays in it.{hint}")
    return tree


class _Refused(ValueError):
    """What is wrong has been found out, and is said."""


def nested(leaves: Iterable[tuple[Path, Any]]) -> Any:
    """Nested dicts of leaves at their paths.

    Raises:
      ValueError: If a path goes through a leaf, or is deeper than JAX can go.
    """
    root: dict[str, Any] = {}
    for path, leaf in leaves:
        node, keys = root, ("", *path)
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"there is a leaf on the way to {'/'.join(path)!r}")
        if keys[-1] in node or len(path) > 200:
            raise ValueError(f"{'/'.join(path)[:100]!r} is there twice, or is too deep")
        node[keys[-1]] = leaf
    return root.get("", {})


def _without_boxes(leaves: Leaves) -> Leaves:
    """The same without the boxes of NNX, which orbax stores as dicts.

    If all arrays of a tree, or of one part of it, are named `value`, these are boxes.
    """
    parts: dict[Path, list[Path]] = {}
    for path in leaves:
        parts.setdefault(path[:1], []).append(path)

    def are_boxed(paths: Iterable[Path], least: int) -> bool:
        return all(len(path) > least and path[-1] == "value" for path in paths)

    boxed = {part for part, paths in parts.items() if are_boxed(paths, 2)}
    if are_boxed(leaves, 1):
        boxed = set(parts)
    return {
        path[:-1] if path[:1] in boxed else path: leaf for path, leaf in leaves.items()
    }


def _by_number(name: str) -> tuple[int, str]:
    number = re.search(r"(\d+)\D*$", name)
    return int(number[1]) if number else -1, name


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first names."""
    first = list(names)
    return ", ".join(first[:most]) + (", ..." if len(first) > most else "")


def line(error: Exception) -> str:
    """What an error says first, and, if that is long, last: there is the cause."""
    text = str(error).partition("\n")[0]
    short = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
    return f"{type(error).__name__}: {short}"


# Which format it is.


def _format(path: str) -> str:
    """By its first bytes; where these say nothing, by its name."""
    if os.path.isdir(path):
        return "folder"
    size, suffix = os.path.getsize(path), pathlib.Path(path).suffix
    with open(path, "rb") as file:
        head = file.read(16)
    length = int.from_bytes(head[:8], "little")
    found = next((kind for kind, start in _STARTS if re.match(start, head)), None)
    if found is None and head[8:9] == b"{" and 8 + length <= size:
        found = "safetensors"
    named = "index" if path.endswith(".index.json") else suffix[1:]
    if found is None and named in _PICKLES:
        found = "pickle"
    if found in _REFUSED:
        raise ValueError(f"{path}: {_REFUSED[found]}")
    if named in _READERS and found not in (None, named):
        raise ValueError(
            f"{path}: it is a {_READERS[found or ''][1]}, though its name says "
            f"{suffix}. Rename it."
        )
    return found or (named if named in _READERS else "msgpack")


_STARTS = [
    ("npz", rb"PK\x03\x04|PK\x05\x06"),
    ("npy", rb"\x93NUMPY"),
    ("pickle", rb"\x80[\x01-\x05]"),
    ("hdf5", rb"\x89HDF"),
    ("gguf", rb"GGUF"),
]
_PICKLES = ("pkl", "pickle", "joblib", "pt", "pth", "bin")
_REFUSED = {
    "pickle": "a pickle runs code when it is read. If you trust who wrote it, load it "
    "yourself (pickle.load, joblib.load, torch.load), and write the arrays that are in "
    "it with checkpoint.save(path, tree) or np.savez(path, **arrays).",
    "torch": "this is a file of torch.save: a pickle in an archive, which runs code "
    "when it is read. Take the model.safetensors that most models have beside it, or "
    "write one with PyTorch: safetensors.torch.save_file(torch.load(path, "
    "weights_only=True), 'model.safetensors').",
    "objects": "holds Python objects: a pickle, which runs code when it is read. If "
    "you trust who wrote it, load it with np.load(path, allow_pickle=True), and write "
    "it with checkpoint.save(path, tree).",
    "hdf5": "this is a file of HDF5. Read it with h5py, and give the nested dicts of "
    "arrays that are in it.",
    "gguf": "this is a file of GGUF. Take the safetensors of the model.",
}


# Readers


def _of_safetensors(path: str, types: bool) -> Leaves:
    safetensors = _library("safetensors", "checkpoint")
    size = os.path.getsize(path)
    leaves: Leaves = {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 8 + length <= min(size, 100_000_008):  # As much as the library takes.
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        _check_types(header)
        with safetensors.safe_open(path, "numpy"):
            pass  # The header fits the data.
        for name, at in _paths(header).items():
            entry = header[name]
            dtype = np.dtype(_OF_SAFETENSORS[entry["dtype"]])
            spec = leaves[at] = jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype)
            if not types:
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                data = np.fromfile(file, np.uint8, end - start)
                leaves[at] = data.view(dtype).reshape(spec.shape)
    return leaves


def _check_types(header: Mapping[str, Any]) -> None:
    for name, entry in header.items():
        if entry["dtype"] not in _OF_SAFETENSORS:
            raise _Refused(
                f"leaf {name!r} is of type {entry['dtype']}, for which NumPy has no "
                f"type. There are: {', '.join(_OF_SAFETENSORS)}. Read it with "
                "safetensors itself."
            )


_OF_SAFETENSORS = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def _paths(names: Iterable[str]) -> dict[str, Path]:
    """Names have slashes, or dots instead. What follows a leaf's own name stays whole.

    So `a` and `a.b` are two leaves, `a` and `a.b`.
    """
    split = {name: name.split("/" if "/" in name else ".") for name in names}
    taken = {tuple(parts) for parts in split.values()}
    if len(taken) < len(split):
        raise ValueError("it has two leaves of one name")
    paths = {}
    for name, parts in split.items():
        inside = (i for i in range(1, len(parts)) if tuple(parts[:i]) in taken)
        level = next(inside, len(parts)) - 1
        rest = ("/" if "/" in name else ".").join(parts[level:])
        paths[name] = (*parts[:level], rest)
    return paths


def _of_index(path: str, types: bool) -> Leaves:
    """A model in several files of safetensors."""
    if os.path.getsize(path) > 100_000_000:
        raise ValueError("an index of over 100 MB")
    named = json.loads(pathlib.Path(path).read_bytes())["weight_map"]
    leaves: Leaves = {}
    for name in sorted(set(named.values())):
        file = os.path.join(os.path.dirname(path), name)
        if os.path.basename(name) != name or not os.path.isfile(file):
            raise _Refused(f"it names the file {name!r}, which is not beside it.")
        leaves |= _of_safetensors(file, types)
    missing = [name for name, at in _paths(named).items() if at not in leaves]
    if missing:
        raise _Refused(f"the files that it names lack {listed(missing)}.")
    return leaves


def _of_npz(path: str, types: bool) -> Leaves:
    leaves: dict[str, Leaf] = {}
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("data.pkl") for entry in entries):
            raise _Refused(_REFUSED["torch"])
        if sum(entry.compress_size for entry in entries) > os.path.getsize(path):
            raise ValueError("its members overlap")
        if any(entry.comment for entry in entries):
            raise ValueError("it has comments, which may hide members")
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            is_plain = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            # Deflate makes things smaller by a thousand times at most.
            if not is_plain or entry.file_size > 1100 * entry.compress_size + 1000:
                raise ValueError(f"member {entry.filename!r} is packed too densely")
            if name in leaves or name == entry.filename:
                raise ValueError(f"{name!r} is there twice, or is no array")
            leaf: Leaf | None
            with archive.open(entry) as file:
                leaf = _spec_of_npy(file, entry.file_size, name)
            if not types:  # All is read, and its checksum compared: text may be none.
                with archive.open(entry) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
                leaf = array if leaf is not None else None
            if leaf is not None:
                leaves[name] = leaf
    return {at: leaves[name] for name, at in _paths(leaves).items()}


def _of_npy(path: str, types: bool) -> Leaves:
    with open(path, "rb") as file:
        leaf: Leaf | None = _spec_of_npy(file, os.path.getsize(path), "array")
    if leaf is None:
        return {}
    return {(): leaf if types else np.load(path, allow_pickle=False)}


def _spec_of_npy(file: Any, size: int, name: str) -> jax.ShapeDtypeStruct | None:
    """What the header says, if that is as much as there is; None if it is text."""
    head = file.read(12)
    is_first, length = head[6:8] == b"\1\0", int.from_bytes(head[8:], "little")
    if not is_first and length > size:  # NumPy would make room for it.
        raise ValueError(f"a header of {length} bytes in {size}")
    file.seek(0)
    np.lib.format.read_magic(file)
    if is_first:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    is_numbers = _is_numbers(dtype, name)
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"the header of {name!r} does not fit its data")
    return jax.ShapeDtypeStruct(shape, dtype) if is_numbers else None


def _is_numbers(dtype: np.dtype, name: str) -> bool:
    """Whether these are numbers, not text; raises if they are in disguise."""
    if dtype.hasobject:
        raise _Refused(f"{name!r} {_REFUSED['objects']}")
    if dtype.name.startswith("void"):
        raise _Refused(
            f"{name!r} is {dtype}, bytes of a type that NumPy does not know, such as "
            "bfloat16, or several types in one. Load it with np.load(path), and view "
            "it as what it is: x.view('bfloat16')."
        )
    return any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_))


def _of_msgpack(path: str, types: bool) -> Leaves:
    flax = _library("flax.serialization", "flax")
    tree = flax.msgpack_restore(pathlib.Path(path).read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__} instead of a dict")
    return _numbers(tree, types)


def _numbers(tree: Any, types: bool) -> Leaves:
    """The arrays and numbers of a tree, without texts."""
    leaves: Leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_number = isinstance(leaf, int | float | complex)
        array = np.asarray(leaf) if is_number else leaf
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if hasattr(array, "dtype") and _is_numbers(array.dtype, "/".join(names)):
            spec = jax.ShapeDtypeStruct(array.shape, array.dtype)
            leaves[tuple(names)] = spec if types else np.asarray(array)
    return leaves


def _of_folder(path: str, types: bool) -> Leaves:
    """One tree of orbax, or the items of a step of a checkpoint manager."""
    if ".orbax-checkpoint-tmp" in os.path.basename(path):
        raise _Refused("orbax has not finished writing it. Read an earlier step.")
    tree = _of_orbax(path, types)
    if tree is not None:
        return tree
    folders = [entry for entry in os.scandir(path) if entry.is_dir()]
    is_step = os.path.exists(os.path.join(path, "_CHECKPOINT_METADATA"))
    if not is_step and all(entry.name[-1].isdigit() for entry in folders):
        return {}  # Of steps, one is to be named.
    items = {entry.name: _of_orbax(entry.path, types) or {} for entry in folders}
    found = {name: leaves for name, leaves in items.items() if leaves}
    if list(found) == ["default"]:
        return found["default"]
    return {
        (name, *at): x for name, leaves in found.items() for at, x in leaves.items()
    }


def _of_orbax(path: str, types: bool) -> Leaves | None:
    """One tree; None if there is none."""
    orbax = _library("orbax.checkpoint", "checkpoint")

    def how(leaf: Any) -> Any:
        kind = np.ndarray if hasattr(leaf, "dtype") else None
        return orbax.RestoreArgs(restore_type=kind)

    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(path)
        found = getattr(found, "item_metadata", found)
        tree = getattr(found, "tree", found)
        if tree is None:
            return None
        _check_size(path, tree)
        if not types:
            args = orbax.args.PyTreeRestore(restore_args=jax.tree.map(how, tree))
            tree = checkpointer.restore(path, args=args)
        return _numbers(tree, types)


def _check_size(path: str, tree: Any) -> None:
    """Checks that a folder can hold what orbax says of its arrays."""
    claimed = 0
    for leaf in jax.tree.leaves(tree):
        chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None) or ()
        shape = getattr(leaf, "shape", ())
        numbers = max(math.prod(shape), math.prod(chunk))
        claimed += numbers * getattr(getattr(leaf, "dtype", None), "itemsize", 1)
    there = sum(
        os.path.getsize(os.path.join(folder, file))
        for folder, _, files in os.walk(path)
        for file in files
    )
    # Zeros are packed that densely, nothing else is.
    if claimed > 2**16 * there:
        raise ValueError(f"{claimed} bytes of arrays cannot be in {there} bytes")


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"this needs {package}: pip install 'hk_stack[{extra}]'"
        ) from error


_READERS: dict[str, tuple[Callable[[str, bool], Leaves], str]] = {
    "folder": (_of_folder, "folder of orbax"),
    "index": (_of_index, "index of files of safetensors"),
    "msgpack": (_of_msgpack, "file of Flax's msgpack"),
    "npy": (_of_npy, "array of NumPy"),
    "npz": (_of_npz, "file of NumPy"),
    "safetensors": (_of_safetensors, "file of safetensors"),
}
