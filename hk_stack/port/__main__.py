"""Inspects a checkpoint on disk: `python -m hk_stack.port CHECKPOINT`.

Prints its leaves, numbered ones together, and what Haiku calls them; nothing is loaded
but names, shapes and dtypes, where the format allows that. With `--like=CHECKPOINT`, a
checkpoint of the model in Haiku, it prints what would go where, and exits with 1 if
something does not fit. With `--skeleton`, it prints the source of a model in Haiku for
the checkpoint, whose forward pass is to be edited.

A checkpoint is a folder of orbax (Flax's, or one of `hk_stack.checkpoint`), a file of
safetensors, `.npz`, or of Flax's msgpack.
"""

import builtins
import importlib
import importlib.util
import math
import os
import pathlib
import re
import string
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from hk_stack import _table, checkpoint
from hk_stack.port import _codecs, _leaves, _names, _rules, plan, skeleton

Tree = dict[str, Any]
Leaves = Mapping[str, Any]  # By their paths; what has a shape and a dtype.
_of: Callable[[Any, Any], Any] = jax.ShapeDtypeStruct

_LIKE = flags.DEFINE_string("like", None, "A checkpoint of the model in Haiku.")
_SKELETON = flags.DEFINE_bool(
    "skeleton", False, "Whether to print source of a model in Haiku for it."
)
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
            print(skeleton(tree) if _SKELETON.value else inspected(tree))
            return
        like = read(_LIKE.value)  # All is parameters if nothing says so.
        has_params = isinstance(like.get("params"), Mapping)
        pair = (like["params"], like.get("state", {})) if has_params else (like, {})
        found = plan(tree, pair, **_options())
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    has_rich = sys.stdout.isatty() and importlib.util.find_spec("rich")
    (importlib.import_module("rich") if has_rich else builtins).print(found)
    sys.exit(0 if found.ok else 1)


def _options() -> dict[str, Any]:
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


def _collections(tree: Tree) -> Tree:
    wanted = _COLLECTIONS.value
    missing = [name for name in wanted if name not in tree]
    if missing:
        raise ValueError(f"there is no {missing[0]!r}; there are: {', '.join(tree)}.")
    return {name: tree[name] for name in wanted} if wanted else tree


def inspected(tree: Tree) -> str:
    """A table of the leaves of Flax variables, numbered ones together."""
    rows: dict[tuple[Any, ...], list[_leaves.Leaf]] = {}
    for leaf in _leaves.of_flax(tree, _rules.checked())[0]:
        alike = [re.sub("[0-9]+(?=/)", "0", str(piece)) for piece in leaf.pieces]
        rows.setdefault(tuple(alike), []).append(leaf)
    pieces = [piece for leaves in rows.values() for x in leaves for piece in x.pieces]
    numbers = sum(math.prod(piece.shape) for piece in pieces)
    head = f"{len(pieces)} leaves, {numbers:,} numbers, {_size(pieces)}"
    cells = [_cells(leaves) for leaves in rows.values()]
    table = _table.Table(["Flax", "in Haiku", "times", "bytes"], cells)
    return "\n".join([head, *_table.aligned(table)])


def _cells(leaves: list[_leaves.Leaf]) -> list[str]:
    *path, name = leaves[0].path
    module = _names.parts(path)
    if len(leaves) > 1:
        module = tuple(part._replace(number=0) for part in module)
    in_haiku = "/".join(filter(None, (_names.written(module), name)))
    size = _size([piece for leaf in leaves for piece in leaf.pieces])
    return [str(leaves[0]), in_haiku, str(len(leaves)), size]


def _size(pieces: list[_codecs.Piece]) -> str:
    return f"{_table.si(sum(piece.nbytes for piece in pieces))}B"


# Reading


def read(path: str) -> Tree:
    """The leaves of a checkpoint as nested dicts of `jax.ShapeDtypeStruct`s.

    Raises:
      FileNotFoundError: If there is no such path.
      ImportError: If the library of its format is not installed.
      ValueError: If it cannot be read.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    is_folder, suffix = os.path.isdir(path), pathlib.Path(path).suffix
    if suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path}: a pickle runs code when it is read. If you trust it, load it "
            "yourself, and call hk_stack.port.plan(variables, like)."
        )
    reader, kind = _READERS.get("folder" if is_folder else suffix, _READERS[".msgpack"])
    try:
        tree = _nested(reader(path))
    except (OSError, ImportError):
        raise
    except Exception as error:  # Of many libraries.
        text = f"{path}: it is no {kind}, or is damaged: {error}"
        raise ValueError(text) from error
    if not jax.tree.leaves(tree):
        steps = ", ".join(sorted(os.listdir(path))[:4]) if is_folder else ""
        inside = f" Name what is inside of it: {steps}." if steps else ""
        raise ValueError(f"{path}: there are no arrays in it.{inside}")
    return tree


def _nested(leaves: Leaves) -> Tree:
    """Nested dicts of types."""
    tree: Tree = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        node[last] = _of(array.shape, array.dtype)
    return tree


def _of_safetensors(path: str) -> Leaves:
    """Names have slashes, or dots instead."""
    library = _library("safetensors", "checkpoint")
    with library.safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name if "/" in name else name.replace(".", "/"): _of(
                part.get_shape(), _dtype(part.get_dtype())
            )
            for name, part in slices.items()
        }


def _dtype(name: str) -> str:
    """`BF16` is `bfloat16`."""
    kind, bits = name.rstrip("0123456789"), name.lstrip(string.ascii_uppercase)
    kinds = {"BF": "bfloat", "C": "complex", "F": "float", "I": "int", "U": "uint"}
    return kinds.get(kind, kind.lower()) + bits


def _of_npz(path: str) -> Leaves:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _of_msgpack(path: str) -> Leaves:
    flax = _library("flax.serialization", "flax")
    tree = flax.msgpack_restore(pathlib.Path(path).read_bytes())
    return _named(tree)


def _of_folder(path: str) -> Leaves:
    """What orbax says of a folder, a checkpoint manager's or our own ones, too."""
    orbax = _library("orbax.checkpoint", "checkpoint")
    if os.path.isdir(os.path.join(path, "about")):
        return dict(checkpoint.metadata(path).leaves)
    folder = os.path.abspath(path)
    inside = os.path.join(folder, "default")
    with orbax.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(inside if os.path.isdir(inside) else folder)
    found = getattr(found, "item_metadata", found)
    return _named(getattr(found, "tree", found))


def _named(tree: Any) -> Leaves:
    """By their paths; `value` is a box of NNX, no name."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name.removesuffix("/value")] = leaf
    return found


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"this needs {package}: pip install 'hk_stack[{extra}]'"
        ) from error


_READERS: dict[str, tuple[Callable[[str], Leaves], str]] = {
    ".msgpack": (_of_msgpack, "file of Flax's msgpack"),
    ".npz": (_of_npz, "file of NumPy"),
    ".safetensors": (_of_safetensors, "file of safetensors"),
    "folder": (_of_folder, "folder of orbax"),
}


if __name__ == "__main__":
    app.run(main)
