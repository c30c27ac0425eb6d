"""Weights that PyTorch's models of Hugging Face have saved, as the same model in Flax.

There, `weight` is `kernel`, with its axes the other way round, or `embedding`, or
`scale`. Which it is has to follow from its name and its shape; else it is refused.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from hk_stack import _formats
from hk_stack._checks import one_of

_NONE = "$."  # Matches nothing.


class _Family(NamedTuple):
    """What names of modules and leaves say, as patterns of the ends of paths.

    Attributes:
      embeddings: Modules whose weight is a table.
      unbiased: Modules of a kernel that have no bias.
      plain: Leaves that have the same name in Flax.
      dropped: Masks and positions, which are no parameters.
      scale: What norms in Flax call their weight.
      inputs_first: Modules whose kernel is `[inputs, outputs]` in PyTorch.
    """

    embeddings: str
    unbiased: str
    plain: str = _NONE
    dropped: str = _NONE
    scale: str = "scale"
    inputs_first: str = _NONE


_FAMILIES = {
    "bert": _Family(
        "(word|position|token_type)_embeddings",
        "predictions/decoder|seq_relationship",
        plain="predictions/bias",
        dropped="embeddings/(position_ids|token_type_ids)",
    ),
    "gpt2": _Family(
        "wte|wpe",
        "lm_head|score",
        dropped="(attn|crossattention)/(masked_)?bias",
        inputs_first="c_attn|c_proj|c_fc|q_attn",
    ),
    "t5": _Family(
        "shared|embed_tokens|relative_attention_bias",
        "(Self|EncDec)Attention/[qkvo]|DenseReluDense/w[io](_[01])?|lm_head",
        scale="weight",
    ),
    "vit": _Family(
        _NONE,
        "attention/(query|key|value)",
        plain="embeddings/(cls_token|mask_token|position_embeddings)",
    ),
}


def in_flax(tree: Any, family: str, where: str) -> Any:
    """Nested dicts with the names and axes that they have in Flax.

    Raises:
      ValueError: If there is no such family, or a leaf is not of it.
    """
    rules = _FAMILIES[one_of(family, "family", where, list(_FAMILIES))]
    leaves = {
        tuple(str(key.key) for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    found: dict[_formats.Path, _formats.Leaf] = {}
    for path, leaf in leaves.items():
        if _ends(rules.dropped, path):
            continue
        name, axes = _known(path, leaf, leaves, rules) or ("", ())
        at = (*path[:-1], name)
        if not name or at in found:
            raise ValueError(
                f"{where}: {'.'.join(path)} {leaf.dtype}{list(leaf.shape)} is not one "
                f"of {family!r} that is known. Without family=, leaves are read as "
                "they are: the weight of a Linear is then Flax's kernel, transposed."
            )
        found[at] = _transposed(leaf, axes)
    return _formats.nested(found.items())


def _known(
    path: _formats.Path,
    leaf: _formats.Leaf,
    leaves: Mapping[_formats.Path, _formats.Leaf],
    rules: _Family,
) -> tuple[str, tuple[int, ...]] | None:
    """Its name in Flax, and the order of its axes there, if they are certain."""
    if not path:
        return None
    *module, name = path
    name = {"gamma": "weight", "beta": "bias"}.get(name, name)
    same = tuple(range(leaf.ndim))
    if _ends(rules.plain, path):
        return path[-1], same
    if name == "bias" and leaf.ndim == 1:
        return "bias", same
    if name != "weight":
        return None
    bias = leaves.get((*module, "bias"), leaves.get((*module, "beta")))
    outputs = leaf.shape[-1 if _ends(rules.inputs_first, module) else 0]
    if bias is not None and bias.shape != (outputs,):
        return None
    if leaf.ndim == 1:
        return rules.scale, same
    if leaf.ndim == 2 and _ends(rules.embeddings, module) and bias is None:
        return "embedding", same
    if bias is None and not _ends(rules.unbiased, module):
        return None
    return {2: ("kernel", (1, 0)), 4: ("kernel", (2, 3, 1, 0))}.get(leaf.ndim)


def _ends(pattern: str, path: _formats.Path | list[str]) -> bool:
    return re.search(rf"(^|/)({pattern})$", "/".join(path)) is not None


def _transposed(leaf: _formats.Leaf, axes: tuple[int, ...]) -> _formats.Leaf:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct([leaf.shape[axis] for axis in axes], leaf.dtype)
    return np.transpose(leaf, axes)
