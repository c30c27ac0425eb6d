"""Inspects a checkpoint on disk: `python -m hk_stack.port CHECKPOINT`.

Prints its leaves, numbered ones together, and what Haiku calls them; nothing is loaded
but names, shapes and dtypes, where the format allows that. Of a whole state of training
it takes the parameters and what goes with them; `--collections` takes others. With
`--like=CHECKPOINT`, a checkpoint of the model in Haiku, or `--like=module:function`,
which returns its parameters and state or their shapes, it prints what would go where,
and exits with 1 if something does not fit. With `--skeleton`, it prints the source of a
model in Haiku for the checkpoint, whose forward pass is to be edited.

A checkpoint is what `hk_stack.checkpoint.read` reads.
"""

import builtins
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags, logging

from hk_stack import _table, checkpoint
from hk_stack.port import _codecs, _leaves, _names, _rules, plan, skeleton

Tree = dict[str, Any]

_LIKE = flags.DEFINE_string(
    "like",
    None,
    "A checkpoint of the model in Haiku; or module:function, which returns (params, "
    "state), as arrays or shapes.",
)
_SKELETON = flags.DEFINE_bool(
    "skeleton", False, "Whether to print source of a model in Haiku for it."
)
_COLLECTIONS = flags.DEFINE_list(
    "collections",
    [],
    "Collections of Flax to take; by default all but an optimiser's.",
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
_FAMILY = flags.DEFINE_enum(
    "family",
    None,
    ["bert", "gpt2", "t5", "vit"],
    "What has the names of PyTorch, of Hugging Face.",
)
_INTERLEAVE = flags.DEFINE_bool(
    "interleave", None, "Whether a scan is over blocks of numbered layers."
)


def main(argv: list[str]) -> None:
    """Prints the checkpoint, or what goes where."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells of each step.
    if len(argv) != 2:
        raise app.UsageError("expected one checkpoint: python -m hk_stack.port PATH")
    try:
        _check_flags()
        read = checkpoint.read(argv[1], family=_FAMILY.value, types=True)
        tree, left = _collections(read)
        if _LIKE.value is None:
            print(skeleton(tree) if _SKELETON.value else inspected(tree, left))
            return
        found = plan(tree, _like(_LIKE.value), **_options())
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    has_rich = sys.stdout.isatty() and importlib.util.find_spec("rich")
    (importlib.import_module("rich") if has_rich else builtins).print(found)
    sys.exit(0 if found.ok else 1)


def _check_flags() -> None:
    """Refuses flags that would do nothing."""
    rules = (_RENAME, _IGNORE, _LAYER_AXIS, _CAST, _INTERLEAVE)
    lost = [flag.name for flag in rules if flag.present and _LIKE.value is None]
    if lost:
        raise ValueError(f"--{lost[0]} says what goes where. Give --like=..., too.")
    if _SKELETON.value and _LIKE.value is not None:
        raise ValueError("--skeleton makes a model, --like has one. Leave one out.")


def _options() -> dict[str, Any]:
    wrong = [rule for rule in _RENAME.value if rule.count("=") != 1]
    if wrong:
        raise ValueError(f"--rename={wrong[0]}: write --rename=FLAX=HAIKU.")
    return {
        "rename": dict(rule.split("=") for rule in _RENAME.value),
        "ignore": _IGNORE.value,
        "layer_axis": _LAYER_AXIS.value,
        "interleave": _INTERLEAVE.value,
        "cast": _CAST.value,
    }


def _like(value: str) -> Any:
    """Parameters and state of the model in Haiku, from a file or a function."""
    module, _, name = value.rpartition(":")
    if module and not os.path.exists(value):
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            make = getattr(importlib.import_module(module), name)
            inspect.signature(make).bind()
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(
                f"--like={value}: {error}; expected a checkpoint, or module:function, "
                "which takes nothing and returns (params, state)."
            ) from error
        return make()
    like = checkpoint.read(value, types=True)  # All is parameters if nothing says so.
    has_params = isinstance(like.get("params"), Mapping)
    return (like["params"], like.get("state", {})) if has_params else (like, {})


def _collections(tree: Tree) -> tuple[Tree, Tree]:
    """What to take of a checkpoint, and what is left out."""
    wanted = _COLLECTIONS.value
    missing = [name for name in wanted if name not in tree]
    if missing:
        raise ValueError(
            f"--collections: there is no {missing[0]!r}; there are: {', '.join(tree)}."
        )
    if not wanted and "params" in tree:  # Beside it may be what an optimiser keeps.
        dicts = [name for name in tree if isinstance(tree[name], Mapping)]
        wanted = [name for name in dicts if not name.startswith("opt")]
    taken = {name: tree[name] for name in wanted or tree}
    return taken, {name: tree[name] for name in tree if name not in taken}


def inspected(tree: Tree, left: Tree) -> str:
    """A table of the leaves of Flax variables, numbered ones together.

    Args:
      tree: The variables.
      left: What else there is, of which a line tells.
    """
    rows: dict[tuple[Any, ...], list[_codecs.Leaf]] = {}
    for leaf in _leaves.of_flax(tree, _rules.checked())[0]:
        alike = [re.sub("[0-9]+(?=/)", "0", str(piece)) for piece in leaf.pieces]
        rows.setdefault(tuple(alike), []).append(leaf)
    pieces = [piece for leaves in rows.values() for x in leaves for piece in x.pieces]
    numbers = sum(math.prod(piece.shape) for piece in pieces)
    head = f"{len(pieces)} leaves, {numbers:,} numbers, {_size(pieces)}"
    cells = [_cells(leaves) for leaves in rows.values()]
    table = _table.Table(["Flax", "in Haiku", "times", "bytes"], cells)
    lines = [head, *_table.aligned(table)]
    for name, rest in left.items():
        leaves = jax.tree.leaves(rest)
        size = _table.si(sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves))
        count = f"{len(leaves)} leaves" if isinstance(rest, Mapping) else "one leaf"
        lines.append(f"left out: {name}, {count}, {size}B; --collections takes it")
    return "\n".join(lines)


def _cells(leaves: list[_codecs.Leaf]) -> list[str]:
    *path, name = leaves[0].path
    module = _names.parts(path)
    if len(leaves) > 1:
        module = tuple(part._replace(number=0) for part in module)
    in_haiku = "/".join(filter(None, (_names.written(module), name)))
    size = _size([piece for leaf in leaves for piece in leaf.pieces])
    return [str(leaves[0]), in_haiku, str(len(leaves)), size]


def _size(pieces: list[_codecs.Piece]) -> str:
    return f"{_table.si(sum(piece.nbytes for piece in pieces))}B"


def run() -> None:
    """The command `hk-stack-port`."""
    if "--help" in sys.argv[1:]:  # That of absl is of the script's own flags.
        print(__doc__, flags.FLAGS.module_help(sys.modules[__name__]), sep="\n")
    else:
        app.run(main)


if __name__ == "__main__":
    run()
