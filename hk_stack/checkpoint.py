"""Checkpoints: a tree of arrays on disk, as named leaves with a note about its layers.

A path that ends with `.safetensors` is one flat file, written and read by safetensors.
Any other path is a folder of orbax, which writes arrays as the shards that they are in,
and in the background. Both hold the same: each leaf under the name of where it is in
the tree (`params/layers/linear/w`), and metadata: shapes, dtypes, and whether the tree
is stacked or per-layer, and how deep (`L`). So a load into another depth or layout can
say so. Orbax finds out what was altered; files have checksums for that.

Neither format is ever half there: it is written under another name first.

What others wrote, in these formats and in more, is read by `read`.
"""

import collections
import concurrent.futures
import contextlib
import functools
import importlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import GetAttrKey

from hk_stack import _entries, _formats, _hugging_face, _layout, _naming, _whole
from hk_stack._traceback import hidden

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


@hidden
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
        folder exists or is named as a file (`.npz`, `.pkl`), or the library cannot
        write the path.
      OSError: If nothing can be written there.
      ImportError: If safetensors or orbax is not installed.
    """
    path = _absolute(path)
    if not _is_file(path):
        save_async(path, tree, layers=layers).wait()
        return
    where = f"checkpoint.save to {path}"
    if os.path.isdir(path):
        raise ValueError(f"{where}: this is a folder; expected the path of a file.")
    arrays, content = _prepare(path, tree, layers, where)
    _write_file(path, arrays, content, where)


class Saving:
    """A folder that is being written; made by `save_async`."""

    def __init__(self, finish: Callable[[], None], where: str):
        thread = concurrent.futures.ThreadPoolExecutor(1)
        self._done = thread.submit(finish)
        thread.shutdown(wait=False)
        self._where = where

    @hidden
    def wait(self) -> None:
        """Returns once the folder is complete, under its final name.

        Raises:
          ValueError: If orbax could not write it, or another process wrote one of that
            name meanwhile, which stays as it is.
        """
        error = self._done.exception()
        failed = _of_first_process("failed" if error else "")
        if error is not None:
            raise error
        if failed:
            raise ValueError(f"{self._where}: the first process could not write it.")


@hidden
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
    path = _absolute(path)
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
    _check_no_file(path, where)
    orbax = _library("orbax.checkpoint")
    arrays, content = _prepare(path, tree, layers, where)
    # Orbax writes no empty arrays. A stand-in keeps their name, metadata the rest.
    item = {name: x if x.size else np.zeros(1, bool) for name, x in arrays.items()}
    # Folders are made at once: an orbax that cannot make them waits for minutes.
    checkpointer = orbax.AsyncCheckpointer(
        orbax.CompositeCheckpointHandler(),
        async_options=orbax.AsyncOptions(create_directories_asynchronously=False),
    )
    with contextlib.ExitStack() as undo:
        # Orbax writes at the same place whoever writes: a mixture, if there are two.
        draft, name = None, ""
        try:
            if jax.process_index() == 0:
                with _writing(where):
                    draft = _whole.Draft(path)
                undo.callback(draft.close)
        finally:  # The others wait to be told.
            name = _of_first_process(draft.name if draft else "")
        if not name:
            raise ValueError(f"{where}: the first process cannot write there.")
        inside = os.path.join(os.path.dirname(path), name, os.path.basename(path))
        with _explained(f"{where}: orbax could not write it"):
            about = orbax.args.JsonSave(content)
            both = orbax.args.Composite(arrays=orbax.args.PyTreeSave(item), about=about)
            checkpointer.save(inside, args=both)
        undo.pop_all()
    return Saving(functools.partial(_finish, checkpointer, draft, path, where), where)


@hidden
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
    with _opened(path) as file:
        content = _part(_content(path, file), at, where)
        load_into = functools.partial(_load, path, file, content, where, at)
        if layers is None:
            return load_into(like)
        names = _naming.naming_map(layers, "layers", where)
        if like is None:
            raise ValueError(
                f"{where}: layers= is for the layout of like, and there is no like. "
                f"Write checkpoint.load(path, like, layers=...), or leave layers out."
            )
        asked = _entries.leaves_of(like, f"{where}: like", at)
        layout = _entries.layers_in(asked, names, f"{where}: like").layout
        saved = _entries.saved_leaves(content)
        if layout == _entries.layers_in(saved, names, where).layout:
            return load_into(like)
        back, forth = _layout.stack_params, _layout.unstack_params
        if layout == "stacked":
            back, forth = forth, back
        # Of arrays of JAX, their types do: converted, the arrays would take memory.
        structure = jax.tree.structure(like)
        light = (
            x.spec if isinstance(x.value, jax.Array) else x.value
            for x in asked.values()
        )
        other = back(jax.tree.unflatten(structure, light), names)
        loaded = forth(load_into(other), names)
    placed = map(_placed, jax.tree.leaves(loaded), asked.values())
    return jax.tree.unflatten(structure, placed)


@hidden
def read(path: Path, *, family: str | None = None, types: bool = False) -> Any:
    """Reads a checkpoint, whoever wrote it, as nested dicts.

    In words: what is in the file or folder, under the names that it has there, for
    `hk_stack.flax_to_haiku` and its like. In formats with checksums (`.npz`, folders of
    orbax but old ones, what `save` wrote), what was altered is found; in others, only
    what cannot be.

    >>> import tempfile
    >>> import numpy as np
    >>> from hk_stack import checkpoint
    >>> path = tempfile.mkdtemp() + "/params.npz"
    >>> np.savez(path, **{"params/Dense_0/kernel": np.ones([2, 3], np.float32)})
    >>> checkpoint.read(path, types=True)
    {'params': {'Dense_0': {'kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}}}

    - Folders of orbax: a tree, or a step of a `CheckpointManager` (`run/700`). Several
      items are dicts by their names. Items of JSON are left out.
    - Files of `flax.training.checkpoints` and of `flax.serialization.to_bytes`.
    - `.npz`, `.npy`, `.safetensors` and `.safetensors.index.json`: names with slashes,
      or with dots instead, are nested dicts.
    - What `save` wrote: as `load(path)`.

    Texts are left out. Pickles (`.pkl`, `torch.save`, NumPy arrays of objects) run code
    when they are read, and are refused.

    Args:
      path: A file or folder.
      family: For weights that a model of Hugging Face has saved in PyTorch: "bert",
        "gpt2", "t5" or "vit". They get the names and axes that this model has in Flax:
        `kernel` for `weight`, transposed. By default, nothing is renamed.
      types: Whether to give `jax.ShapeDtypeStruct`s; arrays are not even read then,
        unless the format is that of Flax.

    Returns:
      Nested dicts of numpy arrays. NNX's variables are the arrays in them.

    Raises:
      ValueError: If the file is truncated or altered, of a format or type that is not
        known, a pickle, or not of that `family`.
      OSError: If there is no such path, or it cannot be opened.
      ImportError: If safetensors, orbax or Flax is needed and not installed.
    """
    where, path = _found(path, "read")
    if not _is_own(path):
        tree = _formats.read(path, types)
    elif types:
        with _opened(path) as file:
            leaves = _entries.saved_leaves(_content(path, file)).values()
        tree = _formats.nested((leaf.keys, leaf.spec) for leaf in leaves)
    else:
        tree = load(path)
    return _hugging_face.in_flax(tree, family, where) if family else tree


def _is_own(path: str) -> bool:
    """Whether `save` wrote this, as far as can be seen."""
    if os.path.isdir(path):
        items = (os.path.join(path, item) for item in ("about", "arrays"))
        return all(map(os.path.isdir, items))
    with contextlib.suppress(ValueError, ImportError), _opened(path) as file:
        return file is not None and _FORMAT in (file.metadata() or {})
    return False


@hidden
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
    with _opened(path) as file:
        content = _content(path, file)
    depth = content["depth"]
    leaves = {name: leaf.spec for name, leaf in _entries.saved_leaves(content).items()}
    depth = tuple(depth) if isinstance(depth, list) else depth
    return Metadata(content["layout"], depth, leaves)


@hidden
def latest(folder: Path) -> str | None:
    """The checkpoint in a folder whose name ends with the largest number.

    In words: of `step_90.safetensors`, `step_100.safetensors` and what is half written
    under another name, the second: where a run that was killed goes on.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from hk_stack import checkpoint
    >>> folder = tempfile.mkdtemp()
    >>> checkpoint.latest(folder)
    >>> for step in (90, 100):
    ...     checkpoint.save(f"{folder}/step_{step}.safetensors", {"w": np.ones(step)})
    >>> os.path.basename(checkpoint.latest(folder))
    'step_100.safetensors'

    Args:
      folder: Where checkpoints are saved; need not exist.

    Returns:
      A path for `load`; None if there is none.

    Raises:
      ValueError: If this is a checkpoint itself, or two have the same number.
    """
    folder = _absolute(folder)
    if _is_checkpoint(folder) or os.path.isfile(folder):
        raise ValueError(
            f"checkpoint.latest of {folder}: this is a checkpoint; expected the folder "
            "that it is in."
        )
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return None
    found: dict[int, str] = {}
    for name in names:
        match = re.fullmatch(rf"(?!\.).*?(\d+)({re.escape(_SUFFIX)})?", name)
        path = os.path.join(folder, name)
        if match is None or not _is_checkpoint(path):
            continue
        step = int(match[1])
        if step in found:
            raise ValueError(
                f"checkpoint.latest of {folder}: {os.path.basename(found[step])} and "
                f"{name} have the same number. Keep one run in a folder."
            )
        found[step] = path
    return found[max(found)] if found else None


def _is_checkpoint(path: str) -> bool:
    """Whether this looks like what `save` wrote, whole."""
    if _is_file(path):
        return os.path.isfile(path)
    is_partial = _PARTIAL in os.path.basename(path)
    return not is_partial and os.path.isdir(os.path.join(path, "about"))


_PARTIAL = ".orbax-checkpoint-tmp"  # How orbax names what it has not finished.


# Saving


def _prepare(
    path: str, tree: Any, layers: _naming.Maps | None, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays to write, by name, and the metadata to write beside them."""
    leaves = _entries.leaves_of(tree, where)
    arrays, entries = {}, {}
    insides = collections.Counter(name.rpartition("/")[0] for name in leaves)
    for name, leaf in leaves.items():
        array = arrays[name] = _stored(leaf, f"{where}: leaf {name!r}")
        if _is_file(path) and not getattr(array, "is_fully_addressable", True):
            raise ValueError(
                f"{where}: arrays are spread over several processes. Save them with "
                f"orbax: a path without {_SUFFIX}."
            )
        # NNX's box around an array is no dict to load it into.
        is_value = leaf.path[-1:] == (GetAttrKey("value"),)
        is_boxed = is_value and insides[name.rpartition("/")[0]] == 1
        entries[name] = {
            "path": leaf.keys[:-1] if is_boxed else leaf.keys,
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "crc32": _checksum(array) if _is_file(path) else None,
        }
        if leaf.is_key:
            entries[name]["key"] = str(jax.random.key_impl(leaf.value))
    noted: dict[str, Any] = {"layout": "none", "depth": None, "modules": {}}
    if layers is not None:
        names = _naming.naming_map(layers, "layers", where)
        noted = _entries.layers_in(leaves, names, where).noted(names)
    content = {"format": _FORMAT, "version": _VERSION, **noted, "leaves": entries}
    return arrays, content | {"crc32": _checksum_of_content(content)}


def _stored(leaf: _entries.Leaf, at: str) -> Any:
    """The array that stands for a leaf: the data of a typed key, else the leaf."""
    value = leaf.value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{at} is a ShapeDtypeStruct; expected an array, to save it.")
    if isinstance(value, jax.Array) and value.is_deleted():
        raise ValueError(f"{at} was donated or deleted. Save it before that.")
    array = jax.random.key_data(value) if leaf.is_key else value
    # Of several processes, orbax takes arrays of them all, or what is on the host.
    is_local = getattr(array, "is_fully_addressable", True) and jax.process_count() > 1
    return np.asarray(array) if is_local or not isinstance(array, jax.Array) else array


def _finish(
    checkpointer: Any, draft: _whole.Draft | None, path: str, where: str
) -> None:
    """Waits until orbax has written a folder, and gives it its name."""
    with contextlib.ExitStack() as afterwards:
        if draft is not None:
            afterwards.callback(draft.close)
        with _explained(f"{where}: orbax could not write it"):
            checkpointer.close()
        if draft is None:
            return
        try:
            draft.publish()
        except OSError as error:
            found = _formats.line(error)
            if os.path.lexists(path):
                found = "something else was saved there meanwhile, and stays"
            raise ValueError(
                f"{where}: not saved: {found}. Save under another name."
            ) from error


def _of_first_process(text: str) -> str:
    """What the first process says, to all."""
    if jax.process_count() == 1:
        return text
    said = np.frombuffer(text.encode().ljust(64, b"\0"), np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(said)).astype(np.uint8)
    return heard.tobytes().rstrip(b"\0").decode()


def _write_file(
    path: str, arrays: Mapping[str, Any], content: Mapping[str, Any], where: str
) -> None:
    numpy = _library("safetensors.numpy")
    natives = {name: _native(array) for name, array in arrays.items()}
    with _writing(where), contextlib.closing(_whole.Draft(path)) as draft:
        with open(draft.inside, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        with _explained(f"{where}: safetensors could not write it"):
            numpy.save_file(natives, draft.inside, {_FORMAT: json.dumps(content)})
        # Safetensors makes files that only their owner reads.
        os.chmod(draft.inside, mode)
        with open(draft.inside, "r+b") as file:
            os.fsync(file.fileno())
        draft.publish()


def _native(value: Any) -> np.ndarray:
    """The array in memory; bytes `[..., itemsize]` if safetensors lacks its dtype."""
    array: np.ndarray = np.asarray(value, order="C")
    return array if array.dtype.name in _NATIVE else array[..., None].view(np.uint8)


def _checksum(array: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _checksum_of_content(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# Loading


def _found(path: Path, verb: str) -> tuple[str, str]:
    """How errors name the path, and the path, if there is something to read."""
    path = _absolute(path)
    where = f"checkpoint.{verb} of {path}"
    if not os.path.exists(path):
        other = path.removesuffix(_SUFFIX) if _is_file(path) else f"{path}{_SUFFIX}"
        hint = f" There is {other}, though." if os.path.exists(other) else _beside(path)
        raise FileNotFoundError(f"{where}: there is no such file or folder.{hint}")
    if not os.path.isdir(path) and not os.path.isfile(path):  # A pipe may never end.
        raise ValueError(f"{where}: this is neither a file nor a folder.")
    return where, path


def _beside(path: str) -> str:
    """What an error says of the folder in which something was looked for."""
    folder = os.path.dirname(path)
    try:
        names = sorted(n for n in os.listdir(folder) if not n.startswith("."))
    except FileNotFoundError:
        return f" There is no folder {folder}."
    except OSError as error:
        return f" {folder} cannot be listed: {error.strerror}."
    return f" In {folder} there is {_formats.listed(names, 8) or 'nothing'}."


def _existing(path: Path, verb: str) -> tuple[str, str]:
    """The same, if it may be what `save` wrote."""
    where, path = _found(path, verb)
    if os.path.isdir(path) == _is_file(path):
        found = "folder" if os.path.isdir(path) else "file"
        raise ValueError(
            f"{where}: this is a {found}. A file of safetensors is named "
            f"*{_SUFFIX}; a folder of orbax has another name."
        )
    return where, path


def _content(path: str, file: Any) -> dict[str, Any]:
    """The metadata that `save` wrote."""
    content = None
    if file is not None:
        with _reading(path, "safetensors"):
            content = json.loads((file.metadata() or {}).get(_FORMAT, "null"))
    elif os.path.isdir(os.path.join(path, "about")):
        args = _library("orbax.checkpoint").args.JsonRestore()
        content = _restore(path, "about", args)
    if not (isinstance(content, dict) and content.get("format") == _FORMAT):
        raise ValueError(
            f"{path} has no metadata of hk_stack.checkpoint: something else wrote it, "
            "or it was altered. If it is of use, read it as it is: "
            "checkpoint.read(path)."
        )
    with _explained(f"{path} {_ALTERED}: its metadata cannot be read", _INSTEAD):
        noted = content.pop("crc32", None)
        is_whole = noted == _checksum_of_content(content)
    version = content.get("version")
    if type(version) is int and version > _VERSION:  # May have checksums of its own.
        altered = "" if is_whole else f", or {_ALTERED}"
        raise ValueError(
            f"{path} is of version {version} of its format{altered}; this hk_stack "
            f"knows version {_VERSION}. Update hk_stack{'' if is_whole else _OR_ELSE}."
        )
    if not is_whole:
        raise _altered(path, "its metadata is not what was saved")
    with _explained(f"{path} {_ALTERED}: its metadata is not of its format", _INSTEAD):
        _entries.check(content)
    return content


def _part(content: dict[str, Any], at: str, where: str) -> dict[str, Any]:
    """The metadata of a part of the tree, in which paths of leaves begin."""
    entries = {}
    for name, entry in content["leaves"].items():
        path = entry["path"]
        parts = ["/".join(path[:level]) for level in range(len(path) + 1)]
        if at in parts:
            entries[name] = {**entry, "path": path[parts.index(at) :]}
    if not entries:
        known = dict.fromkeys(
            repr(key)
            for entry in content["leaves"].values()
            for key in entry["path"][:1]
        )
        raise ValueError(
            f"{where}: the checkpoint has no part {at!r}. Give one of its parts, such "
            f"as {_formats.listed(known, 8)}."
        )
    return {**content, "leaves": entries}


def _load(
    path: str, file: Any, content: Mapping[str, Any], where: str, at: str, like: Any
) -> Any:
    """What `load` gives, in the layout that it is in."""
    entries, saved = content["leaves"], _entries.saved_leaves(content)
    leaves = saved
    if like is not None:
        leaves = _entries.leaves_of(like, f"{where}: like", at)
        misfit = next(_entries.misfits(leaves, saved, content), None)
        if misfit:
            raise ValueError(f"{where}: {misfit}")
    read = _read_folder if file is None else functools.partial(_read_file, file)
    placed: dict[str, Any] = {}
    array: Any
    for name, array in read(path, entries, leaves):
        _check_array(array, name, entries[name], path)
        if saved[name].is_key:
            array = jax.random.wrap_key_data(array, impl=entries[name]["key"])
        placed[name] = _placed(array, leaves[name])
    if like is not None:
        structure = jax.tree.structure(like)
        return jax.tree.unflatten(structure, [placed[name] for name in leaves])
    return _formats.nested((saved[name].keys, leaf) for name, leaf in placed.items())


def _opened(path: str) -> contextlib.AbstractContextManager[Any]:
    """A file, to be read from though another one may replace it; None for a folder."""
    if not _is_file(path):
        return contextlib.nullcontext()
    library = _library("safetensors")
    with _reading(path, "safetensors"):
        file: contextlib.AbstractContextManager[Any] = library.safe_open(path, "numpy")
    return file


def _read_file(
    file: Any, path: str, entries: Mapping[str, Any], likes: _entries.Leaves
) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays by name, one after the other."""
    for name in likes:
        with _reading(path, "safetensors"):
            array = file.get_tensor(name)
        dtype = np.dtype(entries[name]["dtype"])
        is_bytes = dtype.name not in _NATIVE and array.dtype == np.uint8
        if is_bytes and array.shape[-1:] == (dtype.itemsize,):
            array = array.view(dtype).reshape(array.shape[:-1])
        yield name, array


def _read_folder(
    path: str, entries: Mapping[str, Any], likes: _entries.Leaves
) -> Iterator[tuple[str, Any]]:
    """Arrays by name, on the shardings of `likes`."""
    orbax = _library("orbax.checkpoint")
    restore_args = {}
    for name, like in likes.items():
        sharding, entry = like.spec.sharding, entries[name]
        restore_args[name] = orbax.RestoreArgs(restore_type=np.ndarray)
        # The data of typed keys has other axes than the keys, and is placed later.
        if sharding and "key" not in entry and 0 not in entry["shape"]:
            restore_args[name] = orbax.ArrayRestoreArgs(sharding=sharding)
    with _reading(path, "orbax"):  # Checks that sizes are not larger than can be.
        _formats.read(os.path.join(path, "arrays"), types=True)
    items = dict.fromkeys(likes, 0)
    args = orbax.args.PyTreeRestore(items, restore_args, partial_restore=True)
    for name, array in _restore(path, "arrays", args).items():
        entry = entries[name]
        is_empty = 0 in entry["shape"]
        yield name, np.zeros(entry["shape"], entry["dtype"]) if is_empty else array


def _restore(path: str, item: str, args: Any) -> Any:
    """One of the two items in a folder of orbax."""
    orbax = _library("orbax.checkpoint")
    handler = orbax.CompositeCheckpointHandler()
    both = orbax.args.Composite(**{item: args})
    with _reading(path, "orbax"), orbax.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=both)[item]


def _check_array(array: Any, name: str, entry: Mapping[str, Any], path: str) -> None:
    """Checks that the array is what was saved."""
    found = f"{array.dtype.name}{list(array.shape)}"
    expected = f"{entry['dtype']}{entry['shape']}"
    if found != expected:
        raise _altered(path, f"leaf {name!r} is {found}, but was saved {expected}")
    if _is_file(path) and _checksum(array) != entry.get("crc32"):
        raise _altered(path, f"the data of leaf {name!r} is not what was saved")


def _placed(value: Any, like: _entries.Leaf) -> Any:
    """The value as a leaf of the kind of `like`, and where that is."""
    if isinstance(like.value, _entries.OF_JAX):
        return _put(value, like.spec.sharding)
    if isinstance(like.value, np.generic):
        return np.asarray(value)[()]
    is_number = isinstance(like.value, int | float | complex)
    return np.asarray(value).item() if is_number else value


def _put(array: Any, sharding: jax.sharding.Sharding | None) -> Any:
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array  # Orbax has put it there.
    # On devices of other processes, `device_put` puts no typed keys.
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


# Libraries, and what their errors become.


def _is_file(path: Path) -> bool:
    return os.fspath(path).endswith(_SUFFIX)


def _check_no_file(path: str, where: str) -> None:
    """Refuses a folder that is named as a file in a format of others."""
    name, ending = os.path.splitext(os.path.basename(path))
    if ending in _OF_OTHERS:
        raise ValueError(
            f"{where}: this would be a folder of orbax, no file in the format "
            f"{ending!r}. Write {name}{_SUFFIX} for a file, or {name} for a folder."
        )


_OF_OTHERS = (".msgpack", ".npy", ".npz", ".pickle", ".pkl")


def _absolute(path: Path) -> str:
    if path is None:
        raise TypeError(
            "checkpoint: the path is None, which checkpoint.latest(folder) returns "
            "where nothing is saved yet. Start from new parameters then."
        )
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            "checkpoint: the path must be a str or an os.PathLike, not a "
            f"{type(path).__name__}. It comes first: checkpoint.save(path, tree)."
        )
    return os.path.abspath(os.path.expanduser(path))


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"hk_stack.checkpoint needs {name.partition('.')[0]} for this path: "
            "pip install 'hk_stack[checkpoint]'"
        ) from error


_ALTERED = "is truncated or was altered"
_INSTEAD = "Load another copy of it."
_OR_ELSE = ", or load another copy of it"


def _altered(path: str, what: str) -> ValueError:
    return ValueError(f"{path} {_ALTERED}: {what}. {_INSTEAD}")


def _reading(path: str, library: str) -> contextlib.AbstractContextManager[None]:
    return _explained(f"{path} {_ALTERED}: {library} cannot read it", _INSTEAD)


@contextlib.contextmanager
def _writing(where: str) -> Iterator[None]:
    """Says what was to be written where the system has an error."""
    try:
        yield
    except OSError as error:
        error.add_note(
            f"{where}: nothing was written. Give a path in a folder that can be "
            "written to."
        )
        raise


@contextlib.contextmanager
def _explained(what: str, instead: str = "") -> Iterator[None]:
    """What an error of a library means."""
    try:
        yield
    except Exception as error:  # Of many types.
        text = f"{what} ({_formats.line(error)}). {instead}"
        raise ValueError(text.strip()) from error
