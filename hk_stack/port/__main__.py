"""Inspects a checkpoint on disk: `python -m hk_stack.port CHECKPOINT`.

Prints its leaves, numbered ones together, and what Haiku calls them; nothing is loaded
but names, shapes and dtypes, where the format allows that. With `--like=CHECKPOINT`, a
checkpoint of the model in Haiku, it prints what would go where, and exits with 1 if
something does not fit.

A checkpoint is a folder of orbax (Flax's, or one of `hk_stack.checkpoint`), a file of
safetensors, `.npz`, or of Flax's msgpack.
"""

import builtins
import importlib
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from hk_stack import _table, checkpoint
from hk_stack.port import leaves, names, plan

_LIKE = flags.DEFINE_string("like", None, "A checkpoint of the model in Haiku.")
_COLLECTIONS = flags.DEFINE_list(
    "collections", [], "Collections of Flax to take; all, if none is named."
)
_RENAME = flags.DEFINE_multi_string(
    "rename", [], "FLAX=HAIKU: the beginning of a path in Flax, and in Haiku."
)
_IGNORE = flags.DEFINE_multi_string(
    "ignore", [], "The beginning of a path that may be left over."
)
_LAYER_AXIS = flags.DEFINE_integer(
    "layer_axis", None, "The axis on which nn.scan put the layers."
)
_CAST = flags.DEFINE_bool("cast", False, "Whether dtypes may differ.")
_INTERLEAVE = flags.DEFINE_bool(
    "interleave", None, "Whether a scan is over blocks of numbered layers."
)


def main(argv: list[str]) -> None:
    """Prints the checkpoint, or what goes where."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells of each step.
    if len(argv) != 2:
        raise app.UsageError("expected one checkpoint: python -m hk_stack.port PATH")
    try:
        tree = _collections(read(argv[1]))
        if _LIKE.value is None:
            print(inspected(tree))
            return
        found = plan(tree, _params_and_state(read(_LIKE.value)), **_rules())
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    _show(found)
    sys.exit(0 if found.ok else 1)


def _show(found: Any) -> None:
    """In colour where that is possible."""
    try:
        rich = importlib.import_module("rich") if sys.stdout.isatty() else None
    except ImportError:
        rich = None
    (rich or builtins).print(found)


def _rules() -> dict[str, Any]:
    wrong = [rule for rule in _RENAME.value if rule.count("=") != 1]
    if wrong:
        raise ValueError(f"--rename={wrong[0]} must be FLAX=HAIKU.")
    return {
        "rename": dict(rule.split("=") for rule in _RENAME.value),
        "ignore": _IGNORE.value,
        "layer_axis": _LAYER_AXIS.value,
        "interleave": _INTERLEAVE.value,
        "cast": _CAST.value,
    }


def _collections(tree: Any) -> Any:
    wanted = _COLLECTIONS.value
    missing = [name for name in wanted if name not in tree]
    if missing:
        raise ValueError(f"there is no {missing[0]!r}; there are: {', '.join(tree)}.")
    return {name: tree[name] for name in wanted} if wanted else tree


def _params_and_state(tree: Any) -> tuple[Any, Any]:
    """The parts of a checkpoint of Haiku; all is parameters if nothing says so."""
    if isinstance(tree.get("params"), Mapping):
        return tree["params"], tree.get("state", {})
    return tree, {}


def inspected(tree: Any) -> str:
    """A table of the leaves of Flax variables, numbered ones together.

    Args:
      tree: Linen's variables, or a plain dict of an NNX state.
    """
    rows: dict[tuple[Any, ...], list[leaves.Leaf]] = {}
    for leaf in leaves.of_flax(tree, names.Renames({})):
        numbers = [re.sub("[0-9]+", "0", piece.name) for piece in leaf.pieces]
        shapes = [(piece.shape, str(piece.dtype)) for piece in leaf.pieces]
        rows.setdefault((*numbers, *shapes), []).append(leaf)
    titles = ["Flax", "in Haiku", "times", "bytes"]
    cells = [_cells(group) for group in rows.values()]
    pieces = [
        piece for group in rows.values() for leaf in group for piece in leaf.pieces
    ]
    params = sum(math.prod(piece.shape) for piece in pieces)
    head = f"{len(pieces)} leaves, {params:,} numbers, {_table.si(_nbytes(pieces))}B"
    return "\n".join([head, *_table.aligned(_table.Table(titles, cells))])


def _cells(group: list[leaves.Leaf]) -> list[str]:
    pieces = [piece for leaf in group for piece in leaf.pieces]
    *module, name = group[0].path
    scopes = [
        f"{part.base}_{part.number}" if part.number and len(group) == 1 else part.base
        for part in names.parts(module)
    ]
    path = "/".join((*scopes, name))
    return [str(group[0]), path, str(len(group)), f"{_table.si(_nbytes(pieces))}B"]


def _nbytes(pieces: list[leaves.Piece]) -> int:
    return sum(piece.nbytes for piece in pieces)


# Reading


def read(path: str) -> Any:
    """The leaves of a checkpoint as nested dicts of `jax.ShapeDtypeStruct`s.

    Raises:
      FileNotFoundError: If there is no such path.
      ImportError: If the library of its format is not installed.
      ValueError: If it cannot be read.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    suffix = pathlib.Path(path).suffix
    if suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path}: a pickle runs code when it is read. If you trust it, load it "
            "yourself, and call hk_stack.port.plan(variables, like)."
        )
    reader = _folder if os.path.isdir(path) else _READERS.get(suffix, _msgpack)
    try:
        tree = _own(path) if _is_own(path) else reader(path)
    except (OSError, ImportError):
        raise
    except Exception as error:  # Of many libraries.
        kind = _KINDS[reader.__name__]
        text = f"{path}: it is no {kind}, or is damaged: {error}"
        raise ValueError(text) from error
    if not jax.tree.leaves(tree):
        steps = ", ".join(sorted(os.listdir(path))[:4]) if os.path.isdir(path) else ""
        inside = f" Name what is inside of it: {steps}." if steps else ""
        raise ValueError(f"{path}: there are no arrays in it.{inside}")
    return jax.tree.map(_type, tree)


def _type(leaf: Any) -> jax.ShapeDtypeStruct:
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _is_own(path: str) -> bool:
    """Whether `hk_stack.checkpoint` wrote it."""
    if os.path.isdir(path):
        return os.path.isdir(os.path.join(path, "about"))
    if not path.endswith(".safetensors"):
        return False
    with _library("safetensors", "checkpoint").safe_open(path, "numpy") as file:
        return "hk_stack.checkpoint" in (file.metadata() or {})


def _own(path: str) -> Any:
    """What `hk_stack.checkpoint` says of a checkpoint that it wrote."""
    tree: dict[str, Any] = {}
    for name, leaf in checkpoint.metadata(path).leaves.items():
        _put(tree, name.split("/"), leaf)
    return tree


def _safetensors(path: str) -> Any:
    """Flat names, with slashes or with dots."""
    tree: dict[str, Any] = {}
    with _library("safetensors", "checkpoint").safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            dtype = _DTYPES[part.get_dtype()]
            leaf = jax.ShapeDtypeStruct(part.get_shape(), dtype)
            _put(tree, re.split("/" if "/" in name else r"\.", name), leaf)
    return tree


_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
}


def _npz(path: str) -> Any:
    tree: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            _put(tree, name.split("/"), file[name])
    return tree


def _msgpack(path: str) -> Any:
    flax = _library("flax.serialization", "flax")
    return flax.msgpack_restore(pathlib.Path(path).read_bytes())


def _folder(path: str) -> Any:
    """What orbax says of a folder; `value` is a box of NNX, no name."""
    orbax = _library("orbax.checkpoint", "checkpoint")
    folder = os.path.abspath(path)
    if os.path.isdir(os.path.join(folder, "default")):  # Of a checkpoint manager.
        folder = os.path.join(folder, "default")
    with orbax.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(folder)
    found = getattr(found, "item_metadata", found)
    tree: dict[str, Any] = {}
    for keys, leaf in jax.tree.leaves_with_path(getattr(found, "tree", found)):
        parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in keys]
        parts = [part for name in parts for part in name.split("/")]
        parts = parts[:-1] if parts[-1] == "value" else parts
        _put(tree, parts, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return tree


def _put(tree: dict[str, Any], path: list[str], leaf: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"this needs {package}: pip install 'hk_stack[{extra}]'"
        ) from error


_READERS: dict[str, Callable[[str], Any]] = {".safetensors": _safetensors, ".npz": _npz}
_KINDS = {
    "_folder": "folder of orbax",
    "_msgpack": "file of Flax's msgpack",
    "_npz": "file of NumPy",
    "_safetensors": "file of safetensors",
}


if __name__ == "__main__":
    app.run(main)
