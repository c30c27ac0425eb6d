"""Checkpoints: a tree of arrays on disk, as named leaves with a note about its layers.

A path that ends with `.safetensors` is one flat file, written and read by safetensors.
Any other path is a folder of orbax, which writes arrays as the shards that they are in,
and in the background. Both hold the same: each leaf under the name of where it is in
the tree (`params/layers/linear/w`), and metadata: shapes, dtypes, checksums, and
whether the tree is stacked or per-layer, and how deep (`L`). So what was altered is
found out, and a load into another depth or layout can say so.

Neither format is ever half there: it is written under another name first.
"""

import contextlib
import functools
import importlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import numpy as np
from jax.tree_util import DictKey, keystr

from hk_stack import _naming

Path = str | os.PathLike[str]

_FORMAT = "hk_stack.checkpoint"
_VERSION = 1
_SUFFIX = ".safetensors"
# What safetensors reads back as the same numpy dtype. Others are stored as bytes.
_NATIVE = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "bfloat16 complex64".split()
)


class Metadata(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      layout: "stacked" if leaves of the stack are `[L, ...]`, "per-layer" if each layer
        has modules of its own, "none" if nothing was said about layers.
      depth: `L`; None if nothing was said about layers.
      leaves: Shapes and dtypes, by name.
    """

    layout: str
    depth: int | None
    leaves: dict[str, jax.ShapeDtypeStruct]


def save(
    path: Path, tree: Any, *, layers: hk.LayerStackTransparencyMapping | None = None
) -> None:
    """Saves a tree of arrays, bit for bit.

    In words: each leaf is written under its name, next to what it was and what its
    bytes add up to; then the whole is given its final name in one step. Who reads the
    path at any time, or after a crash at any time, finds all of it or none.

    >>> import tempfile
    >>> import numpy as np
    >>> from hk_stack import NumberedLayers, checkpoint
    >>> params = {"layers/linear": {"w": np.ones([6, 8, 8])}, "head": {"b": np.ones(8)}}
    >>> path = tempfile.mkdtemp() + "/step_100.safetensors"
    >>> names = NumberedLayers("layers_{}", "layers")
    >>> checkpoint.save(path, {"params": params, "step": 100}, layers=names)
    >>> layout, depth, leaves = checkpoint.metadata(path)
    >>> layout, depth, list(leaves)
    ('stacked', 6, ['params/head/b', 'params/layers/linear/w', 'step'])
    >>> restored = checkpoint.load(path, like={"params": params, "step": 0})
    >>> restored["step"], restored["params"]["layers/linear"]["w"].shape
    (100, (6, 8, 8))

    Args:
      path: A file, if it ends with `.safetensors`: it may exist, and is replaced. Else
        a folder of orbax, which must not exist, as a folder cannot be replaced in one
        step.
      tree: Any pytree of arrays, such as `{"params": params, "state": state,
        "opt_state": opt_state}`: of numpy, JAX (also sharded, and typed random keys) or
        Python numbers. Arrays that are spread over several processes need a folder, and
        are written without checksums; of others, the first process writes its own.
      layers: The naming map of the stack: says which modules are layers, so that the
        layout and depth of the tree can be noted. Without it, nothing is said of them.

    Raises:
      TypeError: If a leaf is no array.
      ValueError: If two leaves would get one name, `layers` does not fit the tree, the
        folder exists, or the library cannot write the path.
      ImportError: If safetensors or orbax is not installed.
    """
    if not _is_file(path):
        save_async(path, tree, layers=layers).wait()
        return
    path = os.path.abspath(path)
    where = f"checkpoint.save to {path}"
    if os.path.isdir(path):
        raise ValueError(f"{where}: this is a folder; expected the path of a file.")
    arrays, content = _prepare(tree, layers, where)
    _write_file(path, arrays, content, where)


class Saving:
    """A folder that is being written; made by `save_async`."""

    def __init__(self, checkpointer: Any, path: str, where: str):
        self._checkpointer = checkpointer
        self._path = path
        self._where = where

    def wait(self) -> None:
        """Returns once the folder is complete, under its final name.

        Raises:
          ValueError: If orbax could not write it.
        """
        with _as_value_error(f"{self._where}: orbax could not write it"):
            self._checkpointer.close()
        # Orbax tells of a failure once only.
        if not os.path.isdir(self._path):
            raise ValueError(f"{self._where}: orbax did not write it.")


def save_async(
    path: Path, tree: Any, *, layers: hk.LayerStackTransparencyMapping | None = None
) -> Saving:
    """Saves a tree of arrays as a folder of orbax, in the background.

    In words: `save(path, tree)` in two steps, `save_async(path, tree)` and `.wait()`.
    The arrays may be changed or donated once the first returns: by then they are copied
    to the host, and added up; what is left to do is the writing.

    Args:
      path: A folder that does not exist.
      tree: As in `save`.
      layers: As in `save`.

    Returns:
      Something to wait for: only after `wait()` is it sure that all was written.

    Raises:
      TypeError: As `save`.
      ValueError: As `save`, or if the path ends with `.safetensors`.
      ImportError: If orbax is not installed.
    """
    path = os.path.abspath(path)
    where = f"checkpoint.save to {path}"
    if _is_file(path):
        raise ValueError(
            f"{where}: a {_SUFFIX} file is not written in the background. Write "
            f"checkpoint.save(path, tree), or a path without {_SUFFIX} for orbax."
        )
    if os.path.exists(path):
        raise ValueError(
            f"{where}: there is such a folder or file, and it cannot be replaced in "
            "one step. Save under another name (step_100, step_200), or remove it."
        )
    orbax = _library("orbax.checkpoint")
    arrays, content = _prepare(tree, layers, where)
    # Orbax writes no empty arrays. A stand-in keeps their name, metadata the rest.
    item = {name: x if x.size else np.zeros(1, bool) for name, x in arrays.items()}
    checkpointer = orbax.AsyncCheckpointer(orbax.CompositeCheckpointHandler())
    with _as_value_error(f"{where}: orbax could not write it"):
        about = orbax.args.JsonSave(content)
        both = orbax.args.Composite(arrays=orbax.args.PyTreeSave(item), about=about)
        checkpointer.save(path, args=both)
    return Saving(checkpointer, path, where)


def load(path: Path, like: Any = None) -> Any:
    """Loads what `save` wrote, bit for bit.

    In words: for each leaf of `like`, reads the leaf of that name, checks that it is
    what was saved and what `like` says, and puts it where `like` is.

    >>> import tempfile
    >>> import jax, numpy as np
    >>> from hk_stack import checkpoint
    >>> path = tempfile.mkdtemp() + "/params.safetensors"
    >>> checkpoint.save(path, {"linear": {"w": np.arange(3.0, dtype=np.float32)}})
    >>> checkpoint.load(path)
    {'linear': {'w': array([0., 1., 2.], dtype=float32)}}
    >>> checkpoint.load(path, {"linear": {"w": jax.ShapeDtypeStruct([3], "float32")}})
    {'linear': {'w': Array([0., 1., 2.], dtype=float32)}}

    Args:
      path: A file or folder that `save` wrote.
      like: A tree of the same leaves, shapes and dtypes, of arrays or
        `jax.ShapeDtypeStruct`s. By default, nested dicts of numpy arrays are loaded.

    Returns:
      A tree of the structure of `like`. Where it has numpy arrays or Python numbers,
      so has the result; elsewhere JAX arrays, on the sharding of `like` if it has one.

    Raises:
      TypeError: If a leaf of `like` is no array.
      ValueError: If `like` does not fit (another layout or depth, missing or unexpected
        leaves, other shapes or dtypes), the file is truncated or altered, or `save`
        did not write it.
      FileNotFoundError: If there is no such path.
      ImportError: If safetensors or orbax is not installed.
    """
    where, path = _existing(path, "load")
    content = _content(path)
    entries = content["leaves"]
    likes = dict.fromkeys(entries) if like is None else _match(like, content, where)
    read = _read_file if _is_file(path) else _read_folder
    placed = {}
    for name, array in read(path, entries, likes):
        _check_array(array, name, entries[name], path)
        placed[name] = _place(array, entries[name], likes[name])
    if like is None:
        return _nested({name: entries[name]["path"] for name in entries}, placed)
    leaves = [placed[name] for name in likes]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def metadata(path: Path) -> Metadata:
    """What a checkpoint holds, without reading arrays.

    In words: the shapes and dtypes that `load(path)` would give, and what `layers` told
    `save` about the tree.

    Args:
      path: A file or folder that `save` wrote.

    Returns:
      Layout, depth, and the leaves by name.

    Raises:
      ValueError: If the metadata is altered, or `save` did not write the path.
      FileNotFoundError: If there is no such path.
      ImportError: If safetensors or orbax is not installed.
    """
    _, path = _existing(path, "metadata")
    content = _content(path)
    leaves = {name: _spec_of(entry) for name, entry in content["leaves"].items()}
    return Metadata(content["layout"], content["depth"], leaves)


class _Leaf(NamedTuple):
    """Where a leaf is in its tree, and what it is."""

    path: tuple[Any, ...]
    value: Any


def _leaves(tree: Any, where: str, *, specs: bool = False) -> dict[str, _Leaf]:
    """The leaves of a tree by name, after a check that each is an array."""
    leaves: dict[str, _Leaf] = {}
    for path, value in jax.tree.leaves_with_path(tree):
        name = keystr(path, simple=True, separator="/") or "leaf"
        if name in leaves:
            raise ValueError(
                f"{where}: {keystr(leaves[name].path)} and {keystr(path)} would both "
                f"be named {name!r}. Rename a module or a leaf."
            )
        if not (specs and isinstance(value, jax.ShapeDtypeStruct)):
            _check_leaf(value, f"{where}: leaf {name!r}")
        leaves[name] = _Leaf(path, value)
    if not leaves or "__metadata__" in leaves:
        found = "a leaf named '__metadata__'" if leaves else "no leaves"
        raise ValueError(f"{where}: the tree has {found}; expected named arrays.")
    return leaves


def _check_leaf(value: Any, at: str) -> None:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{at} is traced. Save and load outside of jit and grad.")
    kinds = (np.ndarray, np.generic, jax.Array, bool, int, float, complex)
    dtype = _spec(value).dtype if isinstance(value, kinds) else np.dtype(object)
    is_number = dtype.name == "bool" or jax.dtypes.issubdtype(dtype, np.number)
    if not (is_number or _is_key(dtype)):
        raise TypeError(
            f"{at} is a {type(value).__name__} ({value!r}); expected an array. Keep "
            "what is no number beside the checkpoint."
        )
    if isinstance(value, np.ndarray) and not dtype.isnative:
        raise ValueError(
            f"{at} is {dtype!r}, of foreign byte order. Write "
            "x.astype(x.dtype.newbyteorder('='))."
        )


def _is_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _spec(value: Any) -> jax.ShapeDtypeStruct:
    array = value if hasattr(value, "dtype") else np.asarray(value)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _type(spec: Any) -> str:
    return f"{spec.dtype.name}{list(spec.shape)}"


# Saving: from leaves to stored arrays and metadata.


def _prepare(
    tree: Any, layers: hk.LayerStackTransparencyMapping | None, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays to write, by name, and the metadata to write beside them."""
    leaves = _leaves(tree, where)
    arrays = {
        name: _stored(leaf.value, f"{where}: leaf {name!r}")
        for name, leaf in leaves.items()
    }
    found = _Layers("none", None, {})
    if layers is not None:
        found = _note_layers(leaves, layers, where)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        **found._asdict(),
        "leaves": {name: _entry(leaf, arrays[name]) for name, leaf in leaves.items()},
    }
    return arrays, content | {"crc32": _checksum_of_content(content)}


def _stored(value: Any, at: str) -> Any:
    """The array that stands for a leaf: the data of a typed key, else the leaf."""
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ValueError(f"{at} was donated or deleted. Save it before that.")
    if _is_key(_spec(value).dtype):
        value = jax.random.key_data(value)
    if not isinstance(value, jax.Array):
        return np.asarray(value)
    # Of several processes, orbax takes arrays of them all, or what is on the host.
    is_local = value.is_fully_addressable and jax.process_count() > 1
    return np.asarray(value) if is_local else value


def _entry(leaf: _Leaf, array: Any) -> dict[str, Any]:
    """What the metadata says of a leaf."""
    entry = {
        "path": [keystr((key,), simple=True) for key in leaf.path],
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "crc32": _checksum(array),
    }
    if _is_key(_spec(leaf.value).dtype):
        entry["key"] = str(jax.random.key_impl(leaf.value))
    return entry


def _checksum(array: Any) -> int | None:
    """The CRC-32 of the bytes; None if some are on devices of other processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    flat = np.ascontiguousarray(array).reshape(-1)
    return zlib.crc32(flat.view(np.uint8).data)


def _checksum_of_content(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _write_file(
    path: str, arrays: Mapping[str, Any], content: Mapping[str, Any], where: str
) -> None:
    safetensors = _safetensors()
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)  # As orbax does.
    partial = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        natives = {name: _native(array, where) for name, array in arrays.items()}
        safetensors.numpy.save_file(natives, partial, {_FORMAT: json.dumps(content)})
        os.chmod(partial, mode)  # Safetensors makes files that only their owner reads.
        _flush(partial)
        os.replace(partial, path)
        _flush(folder)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{where}: safetensors could not write it: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def _native(array: Any, where: str) -> np.ndarray:
    """The array in memory; bytes `[..., itemsize]` if safetensors lacks its dtype."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{where}: arrays are spread over several processes. Save them with orbax: "
            f"a path without {_SUFFIX}."
        )
    array = np.asarray(array, order="C")
    if array.dtype.name in _NATIVE:
        return array
    return array.reshape(-1).view(np.uint8).reshape(*array.shape, array.dtype.itemsize)


def _flush(path: str) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    if os.name != "posix":  # Elsewhere, folders cannot be opened.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Loading: from metadata and stored arrays to leaves.


def _existing(path: Path, verb: str) -> tuple[str, str]:
    """How errors name the path, and the path, after a check of what is there."""
    path = os.path.abspath(path)
    where = f"checkpoint.{verb} of {path}"
    if not os.path.exists(path):
        other = path.removesuffix(_SUFFIX) if _is_file(path) else f"{path}{_SUFFIX}"
        hint = f" There is {other}, though." if os.path.exists(other) else ""
        raise FileNotFoundError(f"{where}: there is no such path.{hint}")
    if os.path.isdir(path) == _is_file(path):
        found = "folder" if os.path.isdir(path) else "file"
        raise ValueError(
            f"{where}: this is a {found}. A file of safetensors is named "
            f"*{_SUFFIX}; a folder of orbax has another name."
        )
    return where, path


def _content(path: str) -> dict[str, Any]:
    """The metadata that `save` wrote."""
    content = _content_of_file(path) if _is_file(path) else _content_of_folder(path)
    if not (isinstance(content, dict) and content.get("format") == _FORMAT):
        library = "safetensors" if _is_file(path) else "orbax"
        raise ValueError(
            f"{path} has no metadata of hk_stack.checkpoint: something else wrote it, "
            f"or it was altered. If it is of use, read it with {library} itself."
        )
    if content.pop("crc32", None) != _checksum_of_content(content):
        raise _altered(path, "its metadata is not what was saved")
    if content["version"] > _VERSION:
        raise ValueError(
            f"{path} is of version {content['version']} of its format; this hk_stack "
            f"knows version {_VERSION}. Update hk_stack."
        )
    return content


def _content_of_file(path: str) -> Any:
    with _open_file(path) as file:
        text = (file.metadata() or {}).get(_FORMAT, "null")
    try:
        return json.loads(text)
    except ValueError as error:
        raise _altered(path, "its metadata cannot be read") from error


def _content_of_folder(path: str) -> Any:
    if not os.path.isdir(os.path.join(path, "about")):
        return None
    return _restore(path, "about", _library("orbax.checkpoint").args.JsonRestore())


@contextlib.contextmanager
def _open_file(path: str) -> Iterator[Any]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise _altered(path, f"it is no whole file of safetensors: {error}") from error


def _read_file(
    path: str, entries: Mapping[str, Any], likes: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays by name, one after the other."""
    with _open_file(path) as file:
        if set(file.keys()) != set(entries):
            raise _altered(path, "its names are not those that were saved")
        for name in likes:
            array = file.get_tensor(name)
            dtype = np.dtype(entries[name]["dtype"])
            is_bytes = dtype.name not in _NATIVE and array.dtype == np.uint8
            if is_bytes and array.shape[-1:] == (dtype.itemsize,):
                array = array.reshape(-1).view(dtype).reshape(array.shape[:-1])
            yield name, array


def _read_folder(
    path: str, entries: Mapping[str, Any], likes: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Arrays by name, on the shardings of `likes`."""
    orbax = _library("orbax.checkpoint")
    restore_args = {}
    for name, like in likes.items():
        sharding, entry = _sharding(like), entries[name]
        restore_args[name] = orbax.RestoreArgs(restore_type=np.ndarray)
        # The data of typed keys has other axes than the keys, and is placed later.
        if sharding and "key" not in entry and 0 not in entry["shape"]:
            restore_args[name] = orbax.ArrayRestoreArgs(sharding=sharding)
    args = orbax.args.PyTreeRestore(dict.fromkeys(likes, 0), restore_args)
    arrays = _restore(path, "arrays", args)
    for name in likes:
        array, entry = arrays.pop(name), entries[name]
        if 0 in entry["shape"]:
            array = np.zeros(entry["shape"], entry["dtype"])
        yield name, array


def _restore(path: str, item: str, args: Any) -> Any:
    """One of the two items in a folder of orbax."""
    orbax = _library("orbax.checkpoint")
    handler = orbax.CompositeCheckpointHandler()
    both = orbax.args.Composite(**{item: args})
    with _as_altered(path), orbax.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=both)[item]


def _check_array(array: Any, name: str, entry: Mapping[str, Any], path: str) -> None:
    """Checks that the array is what was saved."""
    found = (list(array.shape), array.dtype.name)
    if found != (entry["shape"], entry["dtype"]):
        saved = f"{entry['dtype']}{entry['shape']}"
        raise _altered(path, f"leaf {name!r} is {_type(array)}, but was saved {saved}")
    if entry["crc32"] is not None and _checksum(array) not in (None, entry["crc32"]):
        raise _altered(path, f"the data of leaf {name!r} is not what was saved")


def _place(array: Any, entry: Mapping[str, Any], like: Any) -> Any:
    """The array as a leaf of the kind of `like`, and where that is."""
    if "key" in entry:
        array = jax.random.wrap_key_data(array, impl=entry["key"])
    if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return _put(array, _sharding(like))
    if isinstance(like, np.generic):
        return array[()]
    return array.item() if isinstance(like, int | float | complex) else array


def _put(array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array  # Orbax has put it there.
    # On devices of other processes, `device_put` puts no typed keys.
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    """Where `like` has to be; None for numpy, or if JAX may choose."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return getattr(like, "sharding", None)


def _nested(paths: Mapping[str, Sequence[str]], leaves: Mapping[str, Any]) -> Any:
    """Leaves in nested dicts: keys of dicts, fields and positions as they are."""
    root: dict[str, Any] = {}
    for name, path in paths.items():
        node = root
        for key in ["", *path][:-1]:
            node = node.setdefault(key, {})
        node[["", *path][-1]] = leaves[name]
    return root[""]


def _spec_of(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """The leaf that a stored array stands for."""
    spec = jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]))
    if "key" not in entry:
        return spec
    wrap = functools.partial(jax.random.wrap_key_data, impl=entry["key"])
    return jax.eval_shape(wrap, spec)


# The comparison of what was saved with what it shall be loaded into.


def _match(like: Any, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The leaves of `like` by name, after a check that they fit those saved."""
    leaves = _leaves(like, f"{where}: like", specs=True)
    saved = {name: _spec_of(entry) for name, entry in content["leaves"].items()}
    asked = {name: _spec(leaf.value) for name, leaf in leaves.items()}
    if {n: s.shape for n, s in saved.items()} != {n: s.shape for n, s in asked.items()}:
        _same_layers(leaves, content, where)
    _same_names(asked, saved, content, where)
    for name in asked:
        _same_type(asked[name], saved[name], f"{where}: leaf {name!r}")
        if isinstance(leaves[name].value, jax.Array | jax.ShapeDtypeStruct):
            _can_place(leaves[name].value, f"{where}: leaf {name!r}")
    return {name: leaf.value for name, leaf in leaves.items()}


def _same_names(
    asked: Mapping[str, Any],
    saved: Mapping[str, Any],
    content: Mapping[str, Any],
    where: str,
) -> None:
    missing = [f"{n} {_type(asked[n])}" for n in asked if n not in saved]
    unexpected = [f"{n} {_type(saved[n])}" for n in saved if n not in asked]
    if not (missing or unexpected):
        return
    depth = f" It is {content['layout']}, with L={content['depth']} layers."
    raise ValueError(
        f"{where}: like and the checkpoint have other leaves."
        f"{_some('The checkpoint lacks', missing)}{_some('Like lacks', unexpected)}"
        f"{depth if content['depth'] else ''} Give a like of all leaves that were "
        "saved; checkpoint.load(path) gives them as nested dicts, to take some of them."
    )


def _some(what: str, names: Sequence[str]) -> str:
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f" {what} {len(names)}: {listed}." if names else ""


def _same_type(asked: Any, saved: Any, at: str) -> None:
    found = f"{at} is {_type(saved)} in the checkpoint, {_type(asked)} in like"
    if asked.dtype != saved.dtype:
        convert = f"x.astype({asked.dtype.name!r})"
        if _is_key(asked.dtype) or _is_key(saved.dtype):
            convert = "jax.random.key_data or wrap_key_data"
        raise ValueError(
            f"{found}. Nothing is cast on the way: load into a like of "
            f"{saved.dtype.name}, and convert it yourself, with {convert}."
        )
    if len(asked.shape) != len(saved.shape):
        raise ValueError(f"{found}: the number of axes differs. Change the model.")
    both = zip(asked.shape, saved.shape, strict=True)
    axes = [str(axis) for axis, sizes in enumerate(both) if len(set(sizes)) > 1]
    if axes:
        raise ValueError(f"{found}: axis {', '.join(axes)} differs. Change the model.")


def _can_place(like: Any, at: str) -> None:
    """Checks that JAX has arrays like `like`, and devices to put them on."""
    is_narrowed = False
    if not _is_key(like.dtype):
        is_narrowed = jax.dtypes.canonicalize_dtype(like.dtype) != like.dtype
    if is_narrowed:
        raise ValueError(
            f"{at} is {like.dtype.name}, which JAX has only with jax_enable_x64. Set "
            "that, or give a numpy array in like."
        )
    sharding = _sharding(like)
    if isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        raise ValueError(
            f"{at}: like has an abstract sharding, without devices: {sharding}. Give "
            "jax.sharding.NamedSharding(mesh, spec) with a mesh of devices."
        )
    if sharding is not None:
        with _as_value_error(f"{at}: the sharding of like does not fit"):
            sharding.shard_shape(like.shape)


def _same_layers(
    leaves: Mapping[str, _Leaf], content: Mapping[str, Any], where: str
) -> None:
    """Says so if `like` is of another layout or depth than what was saved."""
    try:
        found = _find_layers(leaves, _SavedNames(content["modules"]), where)
    except ValueError:  # Of no one layout or depth: leaves are compared one by one.
        return
    layout, depth = content["layout"], content["depth"]
    if found is not None and found.layout != layout:
        back, there = "unstack_params", "stack_params"
        if layout == "stacked":
            back, there = there, back
        raise ValueError(
            f"{where}: the checkpoint is {layout} (L={depth}), like is {found.layout}. "
            "Load it in its own layout, and convert it: tree = checkpoint.load(path, "
            f"hk_stack.{back}(like, naming_map)), then hk_stack.{there}(tree, "
            "naming_map)."
        )
    if found is not None and found.depth != depth:
        # Of a deeper per-layer tree, only the first layer too many has a known name.
        more = layout == "per-layer" and found.depth == depth + 1
        raise ValueError(
            f"{where}: the checkpoint holds L={depth} layers ({layout}), like has "
            f"{'more' if more else found.depth}. Change num_layers to {depth}, or take "
            "the layers you want from what checkpoint.load(path) gives: "
            f"{'x[:n] of leaves [L, ...]' if layout == 'stacked' else 'some modules'}."
        )


# Layers: whether a tree is stacked or per-layer, and how deep.


class _Layers(NamedTuple):
    """The layers of a tree.

    Attributes:
      layout: "stacked" or "per-layer".
      depth: `L`.
      modules: The naming map as far as the tree needs it: for each stacked module, the
        per-layer ones of layers 0 to L; that of L tells a deeper tree when loading.
    """

    layout: str
    depth: Any
    modules: dict[str, list[str]]


class _Member(NamedTuple):
    """A leaf of the stack.

    Attributes:
      name: Of the leaf.
      shape: Of the leaf.
      level: How far its module is from the root.
      module: Its module.
      place: The stacked module and the layer, if the module is that of one layer.
      is_stacked: Whether the module may be a stacked one.
    """

    name: str
    shape: tuple[int, ...]
    level: int
    module: str
    place: tuple[str, int] | None
    is_stacked: bool


class _SavedNames:
    """A naming map read back from the metadata."""

    def __init__(self, modules: Mapping[str, Sequence[str]]):
        self._flat = modules
        self._places = {
            name: (module, i)
            for module, names in modules.items()
            for i, name in enumerate(names)
        }

    def stacked_to_flat(self, stacked_module_name: str, scan_idx: int) -> str:
        if stacked_module_name not in self._flat:
            raise ValueError(f"{stacked_module_name} is no part of the stack.")
        return self._flat[stacked_module_name][scan_idx]

    def flat_to_stacked(self, unstacked_module_name: str) -> tuple[str, int] | None:
        return self._places.get(unstacked_module_name)


def _note_layers(
    leaves: Mapping[str, _Leaf],
    naming_map: hk.LayerStackTransparencyMapping,
    where: str,
) -> _Layers:
    """The layers of a tree that is saved."""
    naming_map = _naming.naming_map(naming_map, "layers", where)
    found = _find_layers(leaves, naming_map, where)
    if found is None:
        names = ", ".join(list(leaves)[:8])
        raise ValueError(
            f"{where}: no module of the tree is a layer to {naming_map}. The leaves "
            f"are: {names}. Give the naming map of this stack, or leave `layers` out."
        )
    return found


def _find_layers(
    leaves: Mapping[str, _Leaf], naming_map: Any, where: str
) -> _Layers | None:
    """The layers of a tree, if the map knows any."""
    found = (_member(name, leaf, naming_map) for name, leaf in leaves.items())
    members = [member for member in found if member is not None]
    flat = [member for member in members if not member.is_stacked]
    if not members:
        return None
    if not flat:
        depth = _depth(members, where)
        stacked = {member.module for member in members}
        return _Layers("stacked", depth, _modules(stacked, depth, naming_map))
    places = [member.place for member in members if member.place is not None]
    if len(places) < len(members):
        other = next(member for member in members if member.place is None)
        raise ValueError(
            f"{where}: {flat[0].name} is of one layer, {other.name} of a stack. "
            "Convert one of them, or save the two trees on their own."
        )
    depth = 1 + max(layer for _, layer in places)
    stacked = {module for module, _ in places}
    return _Layers("per-layer", depth, _modules(stacked, depth, naming_map))


def _member(name: str, leaf: _Leaf, naming_map: Any) -> _Member | None:
    """The leaf as a part of the stack, if one of the dicts around it is a module."""
    for level, key in enumerate(leaf.path[:-1]):  # The last is the leaf's own.
        if not (isinstance(key, DictKey) and isinstance(key.key, str)):
            continue
        place = None
        with contextlib.suppress(Exception):  # The map may refuse foreign names.
            place = naming_map.flat_to_stacked(key.key)
        is_stacked = _naming.is_stacked(naming_map, key.key)
        if place is not None or is_stacked:
            shape = _spec(leaf.value).shape
            return _Member(name, shape, level, key.key, place, is_stacked)
    return None


def _depth(members: Sequence[_Member], where: str) -> int:
    """The leading size of the stacked leaves.

    Those nearest to the root decide, parameters and state: an optimiser's state may
    hold some of other shapes.
    """
    nearest = min(member.level for member in members)
    first, *others = (member for member in members if member.level == nearest)
    for member in (first, *others):
        if not member.shape or member.shape[0] != first.shape[0]:
            raise ValueError(
                f"{where}: {first.name} has shape {first.shape}, {member.name} has "
                f"shape {member.shape}; expected one leading axis L in all leaves of "
                "the stack. Give the naming map of one stack, or leave `layers` out."
            )
    return first.shape[0]


def _modules(stacked: set[str], depth: int, naming_map: Any) -> dict[str, list[str]]:
    modules = {}
    for module in sorted(stacked):
        modules[module] = [naming_map.stacked_to_flat(module, i) for i in range(depth)]
        with contextlib.suppress(ValueError, LookupError):  # The map may end at L.
            modules[module].append(naming_map.stacked_to_flat(module, depth))
    return modules


# Libraries, and what their errors become.


def _is_file(path: Path) -> bool:
    return os.fspath(path).endswith(_SUFFIX)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"hk_stack.checkpoint needs {name.partition('.')[0]} for this path: "
            "pip install 'hk_stack[checkpoint]'"
        ) from error


def _safetensors() -> Any:
    _library("safetensors.numpy")
    return _library("safetensors")


def _altered(path: str, what: str) -> ValueError:
    return ValueError(
        f"{path} is truncated or was altered: {what}. Load another copy of it."
    )


@contextlib.contextmanager
def _as_altered(path: str) -> Iterator[None]:
    """Names the path where orbax fails, which it does in many types of errors."""
    try:
        yield
    except Exception as error:
        raise _altered(path, f"orbax cannot read it ({_first_line(error)})") from error


@contextlib.contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
