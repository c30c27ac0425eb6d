"""Checkpoints: a tree of arrays on disk, as named leaves with a note about its layers.

A path that ends with `.safetensors` is one flat file, written and read by safetensors.
Any other path is a folder of orbax, which writes arrays as the shards that they are in,
and in the background. Both hold the same: each leaf under the name of where it is in
the tree (`params/layers/linear/w`), and metadata: shapes, dtypes, and whether the tree
is stacked or per-layer, and how deep (`L`). So a load into another depth or layout can
say so. Orbax finds out what was altered; files have checksums for that.

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

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, keystr

from hk_stack import _layout, _naming

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
      depth: `L`; all of them, if stacks have several; None if nothing was said.
      leaves: Shapes and dtypes, by name.
    """

    layout: str
    depth: int | tuple[int, ...] | None
    leaves: dict[str, jax.ShapeDtypeStruct]


def save(path: Path, tree: Any, *, layers: _naming.Maps | None = None) -> None:
    """Saves a tree of arrays, bit for bit.

    In words: each leaf is written under its name, next to what it was; then the whole
    is given its final name in one step. Who reads the path at any time, or after a
    crash at any time, finds all of it or none.

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
        Python numbers. Arrays that are spread over several processes need a folder; of
        others, the first process writes its own.
      layers: The naming map of the stack, or a sequence of maps: says which modules are
        layers, so that the layout and depth of the tree can be noted. Without it,
        nothing is said of them.

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
    arrays, content = _prepare(path, tree, layers, where)
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
        with _explained(f"{self._where}: orbax could not write it"):
            self._checkpointer.close()
        # Orbax tells of a failure once only.
        if not os.path.isdir(self._path):
            raise ValueError(f"{self._where}: orbax did not write it.")


def save_async(path: Path, tree: Any, *, layers: _naming.Maps | None = None) -> Saving:
    """Saves a tree of arrays as a folder of orbax, in the background.

    In words: `save(path, tree)` in two steps, `save_async(path, tree)` and `.wait()`.
    The arrays may be changed or donated once the first returns: by then they are copied
    to the host; what is left to do is the writing.

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
    arrays, content = _prepare(path, tree, layers, where)
    # Orbax writes no empty arrays. A stand-in keeps their name, metadata the rest.
    item = {name: x if x.size else np.zeros(1, bool) for name, x in arrays.items()}
    checkpointer = orbax.AsyncCheckpointer(orbax.CompositeCheckpointHandler())
    with _explained(f"{where}: orbax could not write it"):
        about = orbax.args.JsonSave(content)
        both = orbax.args.Composite(arrays=orbax.args.PyTreeSave(item), about=about)
        checkpointer.save(path, args=both)
    return Saving(checkpointer, path, where)


def load(
    path: Path,
    like: Any = None,
    *,
    layers: _naming.Maps | None = None,
    at: str = "",
) -> Any:
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
    >>> checkpoint.load(path, {"w": jax.ShapeDtypeStruct([3], "float32")}, at="linear")
    {'w': Array([0., 1., 2.], dtype=float32)}

    Args:
      path: A file or folder that `save` wrote.
      like: A tree of the same leaves, shapes and dtypes, of arrays or
        `jax.ShapeDtypeStruct`s. By default, nested dicts of numpy arrays are loaded.
      layers: The naming map of the stack, or a sequence of maps: if the checkpoint is
        stacked and `like` is per-layer, or the other way round, it is converted.
      at: The name of a part of the tree, such as "params": only that is loaded.

    Returns:
      A tree of the structure of `like`. Where it has numpy arrays or Python numbers,
      so has the result; elsewhere JAX arrays, on the sharding of `like` if it has one.

    Raises:
      TypeError: If a leaf of `like` is no array.
      ValueError: If `like` does not fit (another layout or depth, missing or unexpected
        leaves, other shapes or dtypes), `layers` does not fit it, there is no such
        part, the file is truncated or altered, or `save` did not write it.
      FileNotFoundError: If there is no such path.
      ImportError: If safetensors or orbax is not installed.
    """
    where, path = _existing(path, "load")
    content = _part(_content(path), at, where)
    if layers is None:
        return _load(path, content, like, where, at)
    names = _naming.naming_map(layers, "layers", where)
    asked = _layers_in(_leaves(like, f"{where}: like", at), names, f"{where}: like")
    if asked.layout == _layers_in(_saved(content), names, where).layout:
        return _load(path, content, like, where, at)
    back, forth = _layout.stack_params, _layout.unstack_params
    if asked.layout == "stacked":
        back, forth = forth, back
    # Of arrays of JAX, their types do: converted, the arrays would take memory.
    specs = jax.tree.map(lambda x: _spec(x) if isinstance(x, jax.Array) else x, like)
    loaded = forth(_load(path, content, back(specs, names), where, at), names)
    leaves, structure = jax.tree.flatten(like)
    placed = map(_placed, jax.tree.leaves(loaded), leaves)
    return jax.tree.unflatten(structure, placed)


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
    depth = content["depth"]
    leaves = {name: leaf.value for name, leaf in _saved(content).items()}
    depth = tuple(depth) if isinstance(depth, list) else depth
    return Metadata(content["layout"], depth, leaves)


class _Leaf(NamedTuple):
    """Where a leaf is in its tree, and what it is."""

    path: tuple[Any, ...]
    value: Any


_Leaves = Mapping[str, _Leaf]


def _leaves(tree: Any, where: str, at: str = "") -> dict[str, _Leaf]:
    """The leaves of a tree by name, after a check that each is an array."""
    leaves: dict[str, _Leaf] = {}
    for path, value in jax.tree.leaves_with_path(tree):
        below = keystr(path, simple=True, separator="/")
        name = "/".join(filter(None, [at, below])) or "leaf"
        if name in leaves:
            raise ValueError(
                f"{where}: {keystr(leaves[name].path)} and {keystr(path)} would both "
                f"be named {name!r}. Rename a module or a leaf."
            )
        _check_leaf(value, f"{where}: leaf {name!r}")
        leaves[name] = _Leaf(path, value)
    if not leaves or "__metadata__" in leaves:
        found = "a leaf named '__metadata__'" if leaves else "no leaves"
        raise ValueError(f"{where}: the tree has {found}; expected named arrays.")
    return leaves


def _check_leaf(value: Any, at: str) -> None:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{at} is traced. Save and load outside of jit and grad.")
    dtype = _spec(value).dtype if isinstance(value, _ARRAYS) else np.dtype(object)
    is_number = dtype.name == "bool" or jnp.issubdtype(dtype, np.number)
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


_OF_JAX = (jax.Array, jax.ShapeDtypeStruct)
_ARRAYS = (*_OF_JAX, np.ndarray, np.generic, bool, int, float, complex)


def _is_key(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _spec(value: Any) -> jax.ShapeDtypeStruct:
    array = value if hasattr(value, "dtype") else np.asarray(value)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=_sharding(value))


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    """Where `like` has to be; None for numpy, or if JAX may choose."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return getattr(like, "sharding", None)


def _type(spec: Any) -> str:
    return f"{spec.dtype.name}{list(spec.shape)}"


# Saving: from leaves to stored arrays and metadata.


def _prepare(
    path: str, tree: Any, layers: _naming.Maps | None, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays to write, by name, and the metadata to write beside them."""
    leaves = _leaves(tree, where)
    arrays, entries = {}, {}
    for name, leaf in leaves.items():
        array = arrays[name] = _stored(leaf.value, f"{where}: leaf {name!r}")
        if _is_file(path) and not getattr(array, "is_fully_addressable", True):
            raise ValueError(
                f"{where}: arrays are spread over several processes. Save them with "
                f"orbax: a path without {_SUFFIX}."
            )
        entries[name] = _entry(leaf, array, _is_file(path))
    noted: dict[str, Any] = {"layout": "none", "depth": None, "modules": {}}
    if layers is not None:
        noted = _note_layers(leaves, layers, where)
    content = {"format": _FORMAT, "version": _VERSION, **noted, "leaves": entries}
    return arrays, content | {"crc32": _checksum_of_content(content)}


def _entry(leaf: _Leaf, array: Any, with_checksum: bool) -> dict[str, Any]:
    """What the metadata says of a leaf."""
    entry = {
        "path": [keystr((key,), simple=True) for key in leaf.path],
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "crc32": _checksum(array) if with_checksum else None,
    }
    if _is_key(_spec(leaf.value).dtype):
        entry["key"] = str(jax.random.key_impl(leaf.value))
    return entry


def _stored(value: Any, at: str) -> Any:
    """The array that stands for a leaf: the data of a typed key, else the leaf."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{at} is a ShapeDtypeStruct; expected an array, to save it.")
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ValueError(f"{at} was donated or deleted. Save it before that.")
    if _is_key(_spec(value).dtype):
        value = jax.random.key_data(value)
    if not isinstance(value, jax.Array):
        return np.asarray(value)
    # Of several processes, orbax takes arrays of them all, or what is on the host.
    is_local = value.is_fully_addressable and jax.process_count() > 1
    return np.asarray(value) if is_local else value


def _checksum(array: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


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
        natives = {name: _native(array) for name, array in arrays.items()}
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


def _native(value: Any) -> np.ndarray:
    """The array in memory; bytes `[..., itemsize]` if safetensors lacks its dtype."""
    array: np.ndarray = np.asarray(value, order="C")
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
    content = _unchecked(path)
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


def _unchecked(path: str) -> Any:
    """The metadata, if there is any, as it is."""
    if not _is_file(path):
        if not os.path.isdir(os.path.join(path, "about")):
            return None
        return _restore(path, "about", _library("orbax.checkpoint").args.JsonRestore())
    with _open_file(path) as file:
        text = (file.metadata() or {}).get(_FORMAT, "null")
    try:
        return json.loads(text)
    except ValueError as error:
        raise _altered(path, "its metadata cannot be read") from error


def _part(content: dict[str, Any], at: str, where: str) -> dict[str, Any]:
    """The metadata of a part of the tree, in which paths of leaves begin."""
    entries = {}
    for name, entry in content["leaves"].items():
        path = entry["path"]
        for level in range(len(path) + 1):
            if "/".join(path[:level]) == at:
                entries[name] = {**entry, "path": path[level:]}
                break
    if not entries:
        paths = [entry["path"] for entry in content["leaves"].values()]
        parts = dict.fromkeys(key for path in paths for key in path[:1])
        raise ValueError(
            f"{where}: the checkpoint has no part {at!r}. Give one of its parts, such "
            f"as {', '.join(map(repr, list(parts)[:8]))}."
        )
    return {**content, "leaves": entries}


def _load(path: str, content: Mapping[str, Any], like: Any, where: str, at: str) -> Any:
    """What `load` gives, in the layout that it is in."""
    entries = content["leaves"]
    likes = dict.fromkeys(entries)
    if like is not None:
        likes = _match(_leaves(like, f"{where}: like", at), content, where)
    read = _read_file if _is_file(path) else _read_folder
    placed: dict[str, Any] = {}
    array: Any
    for name, array in read(path, entries, likes):
        _check_array(array, name, entries[name], path)
        if "key" in entries[name]:
            array = jax.random.wrap_key_data(array, impl=entries[name]["key"])
        placed[name] = _placed(array, likes[name])
    if like is not None:
        structure = jax.tree.structure(like)
        return jax.tree.unflatten(structure, [placed[name] for name in likes])
    root: dict[str, Any] = {}
    for name, leaf in placed.items():
        node, keys = root, ["", *entries[name]["path"]]
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = leaf
    return root[""]


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
        if not set(entries) <= set(file.keys()):
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
    items = dict.fromkeys(likes, 0)
    args = orbax.args.PyTreeRestore(items, restore_args, partial_restore=True)
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
    try:
        with orbax.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(path, args=both)[item]
    except Exception as error:  # Of many types.
        what = f"orbax cannot read it ({_first_line(error)})"
        raise _altered(path, what) from error


def _check_array(array: Any, name: str, entry: Mapping[str, Any], path: str) -> None:
    """Checks that the array is what was saved."""
    found = (list(array.shape), array.dtype.name)
    if found != (entry["shape"], entry["dtype"]):
        saved = f"{entry['dtype']}{entry['shape']}"
        raise _altered(path, f"leaf {name!r} is {_type(array)}, but was saved {saved}")
    if _is_file(path) and _checksum(array) != entry["crc32"]:
        raise _altered(path, f"the data of leaf {name!r} is not what was saved")


def _placed(value: Any, like: Any) -> Any:
    """The value as a leaf of the kind of `like`, and where that is."""
    if isinstance(like, _OF_JAX):
        return _put(value, _sharding(like))
    if isinstance(like, np.generic):
        return np.asarray(value)[()]
    is_number = isinstance(like, int | float | complex)
    return np.asarray(value).item() if is_number else value


def _put(array: Any, sharding: jax.sharding.Sharding | None) -> Any:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array  # Orbax has put it there.
    # On devices of other processes, `device_put` puts no typed keys.
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


# The comparison of what was saved with what it shall be loaded into.


def _saved(content: Mapping[str, Any]) -> dict[str, _Leaf]:
    """The leaves that were saved, as specs in nested dicts."""
    leaves = {}
    for name, entry in content["leaves"].items():
        spec = jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]))
        if "key" in entry:
            wrap = functools.partial(jax.random.wrap_key_data, impl=entry["key"])
            spec = jax.eval_shape(wrap, spec)
        leaves[name] = _Leaf(tuple(map(DictKey, entry["path"])), spec)
    return leaves


def _match(leaves: _Leaves, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The leaves of a like by name, after a check that they fit those saved."""
    saved = {name: leaf.value for name, leaf in _saved(content).items()}
    asked = {name: _spec(leaf.value) for name, leaf in leaves.items()}
    if {n: s.shape for n, s in saved.items()} != {n: s.shape for n, s in asked.items()}:
        _same_layers(asked, content, where)
    _same_names(asked, saved, content, where)
    for name in asked:
        _same_type(asked[name], saved[name], f"{where}: leaf {name!r}")
        if isinstance(leaves[name].value, _OF_JAX):
            _can_place(asked[name], f"{where}: leaf {name!r}")
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
        "saved, or load a part: checkpoint.load(path, params, at='params'). "
        "checkpoint.load(path) gives all as nested dicts, to take some of them."
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
    both = enumerate(zip(asked.shape, saved.shape, strict=False))
    axes = ", ".join(str(axis) for axis, (x, y) in both if x != y)
    what = f"axis {axes}" if asked.ndim == saved.ndim else "the number of axes"
    if asked.shape != saved.shape:
        raise ValueError(f"{found}: {what} differs. Change the model.")


def _can_place(like: jax.ShapeDtypeStruct, at: str) -> None:
    """Checks that JAX has arrays like `like`, and devices to put them on."""
    dtype = like.dtype
    if not _is_key(dtype) and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{at} is {dtype.name}, which JAX has only with jax_enable_x64. Set "
            "that, or give a numpy array in like."
        )
    if isinstance(getattr(like.sharding, "mesh", None), jax.sharding.AbstractMesh):
        raise ValueError(
            f"{at}: like has an abstract sharding, without devices: {like.sharding}. "
            "Give jax.sharding.NamedSharding(mesh, spec) with a mesh of devices."
        )
    if like.sharding is not None:
        with _explained(f"{at}: the sharding of like does not fit"):
            like.sharding.shard_shape(like.shape)


def _same_layers(
    asked: Mapping[str, jax.ShapeDtypeStruct], content: Mapping[str, Any], where: str
) -> None:
    """Says so if a like is of another layout or depth than what was saved."""
    layout, depth = content["layout"], content["depth"]
    found, like_depth = _layers_of(asked, content["modules"])
    if not found:  # Of no one layout or depth: leaves are compared one by one.
        return
    if found != layout:
        raise ValueError(
            f"{where}: the checkpoint is {layout} (L={depth}), like is {found}. "
            "With the naming map of the stack, it is converted: "
            "checkpoint.load(path, like, layers=naming_map)."
        )
    if isinstance(depth, int) and like_depth != depth:
        # Of a deeper per-layer tree, only the first layer too many has a known name.
        more = layout == "per-layer" and like_depth == depth + 1
        raise ValueError(
            f"{where}: the checkpoint holds L={depth} layers ({layout}), like has "
            f"{'more' if more else like_depth}. Change num_layers to {depth}, or take "
            "the layers you want from what checkpoint.load(path) gives: "
            f"{'x[:n] of leaves [L, ...]' if layout == 'stacked' else 'some modules'}."
        )


def _layers_of(
    asked: Mapping[str, jax.ShapeDtypeStruct], modules: Mapping[str, Sequence[str]]
) -> tuple[str, int]:
    """Layout and depth of a like, by the names that were saved; "" if unclear."""
    layers = [
        i
        for names in modules.values()
        for i, name in enumerate(names)
        if name not in modules and _inside(name, asked)
    ]
    sizes = {leaf.shape[:1] for name in modules for leaf in _inside(name, asked)}
    if layers:
        return "per-layer", 1 + max(layers)
    if len(sizes) == 1 and sizes != {()}:
        return "stacked", sizes.pop()[0]
    return "", 0


def _inside(
    module: str, asked: Mapping[str, jax.ShapeDtypeStruct]
) -> list[jax.ShapeDtypeStruct]:
    return [spec for name, spec in asked.items() if f"/{module}/" in f"/{name}"]


# Layers: whether a tree is stacked or per-layer, and how deep.


class _Layers(NamedTuple):
    """The layers of a tree: "stacked" or "per-layer", and `L` by stacked module."""

    layout: str
    depths: dict[str, int]

    @property
    def depth(self) -> int | list[int]:
        """`L`; all of them, if stacks have several."""
        depths = sorted(set(self.depths.values()))
        return depths[0] if len(depths) == 1 else depths


def _note_layers(leaves: _Leaves, layers: _naming.Maps, where: str) -> dict[str, Any]:
    """What the metadata says of the layers of a tree.

    For each stacked module, it has the per-layer ones of layers 0 to L; that of L tells
    a deeper tree when loading.
    """
    names = _naming.naming_map(layers, "layers", where)
    found = _layers_in(leaves, names, where)
    modules = {}
    for module, depth in sorted(found.depths.items()):
        modules[module] = [names.stacked_to_flat(module, i) for i in range(depth)]
        with contextlib.suppress(ValueError, LookupError):  # The map may end at L.
            modules[module].append(names.stacked_to_flat(module, depth))
    return {"layout": found.layout, "depth": found.depth, "modules": modules}


class _Member(NamedTuple):
    """A leaf of the stack, in a module that is `level` steps from the root."""

    name: str
    shape: tuple[int, ...]
    level: int
    module: str
    place: tuple[str, int] | None  # The stacked module and the layer, if it has one.
    is_stacked: bool


def _layers_in(leaves: _Leaves, names: _naming.Map, where: str) -> _Layers:
    """The layers of a tree."""
    found = (_member(name, leaf, names) for name, leaf in leaves.items())
    members = [member for member in found if member is not None]
    if not members:
        listed = ", ".join(list(leaves)[:8])
        raise ValueError(
            f"{where}: no module of the tree is a layer to {names}. The leaves "
            f"are: {listed}. Give the naming map of this stack, or leave `layers` out."
        )
    # The first layer may be named as a stack is: `linear`, `linear_1`.
    flat = [m for m in members if m.place and (m.place[1] > 0 or not m.is_stacked)]
    stacked = [member for member in members if member.place is None]
    if flat and stacked:
        raise ValueError(
            f"{where}: {flat[0].name} is of one layer, {stacked[0].name} of a stack. "
            "Convert one of them, or save the two trees on their own."
        )
    stacks: dict[Any, list[tuple[str, _Member]]] = {}
    for member in members:
        module = member.place[0] if flat and member.place else member.module
        stack = _naming.stack_of(names, module)
        stacks.setdefault(stack, []).append((module, member))
    depths = {}
    for pairs in stacks.values():
        depth = _depth([member for _, member in pairs], bool(flat), where)
        depths.update({module: depth for module, _ in pairs})
    return _Layers("per-layer" if flat else "stacked", depths)


def _member(name: str, leaf: _Leaf, names: _naming.Map) -> _Member | None:
    """The leaf as a part of the stack, if one of the dicts around it is a module."""
    for level, key in enumerate(leaf.path[:-1]):  # The last is the leaf's own.
        if not (isinstance(key, DictKey) and isinstance(key.key, str)):
            continue
        place = None
        with contextlib.suppress(Exception):  # The map may refuse foreign names.
            place = names.flat_to_stacked(key.key)
        is_stacked = _naming.is_stacked(names, key.key)
        if place is not None or is_stacked:
            shape = _spec(leaf.value).shape
            return _Member(name, shape, level, key.key, place, is_stacked)
    return None


def _depth(members: Sequence[_Member], is_flat: bool, where: str) -> int:
    """How many layers there are: of stacked leaves, their leading size.

    Those nearest to the root decide, parameters and state: an optimiser's state may
    hold some of other shapes.
    """
    if is_flat:
        return 1 + max(member.place[1] for member in members if member.place)
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
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
