"""Porting: Flax variables to Haiku parameters and state, and back.

Both trees are read in one vocabulary (`_leaves`), paired by name (`_match`) and layer
(`_layers`), and what goes where is written down (`_plan`) before any array moves. Flax
itself is not needed: Linen's variables and NNX's states are the trees that they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hk_stack import _checks
from hk_stack._traceback import hidden
from hk_stack.port import (
    _layers,
    _leaves,
    _match,
    _move,
    _plan,
    _rules,
    _skeleton,
    _verify,
    recipes,
)
from hk_stack.port._gru import GRU
from hk_stack.port._plan import Plan, Row
from hk_stack.port._regroup import (
    SAME,
    TRANSPOSED,
    fuse,
    pad_vocab,
    split,
    tie,
    transpose,
)
from hk_stack.port._rules import Axis, Rule
from hk_stack.port._verify import Report

__all__ = (
    "GRU",
    "SAME",
    "TRANSPOSED",
    "Plan",
    "Report",
    "Row",
    "flax_to_haiku",
    "fuse",
    "haiku_to_flax",
    "pad_vocab",
    "plan",
    "recipes",
    "skeleton",
    "split",
    "tie",
    "transpose",
    "verify",
)


@hidden
def flax_to_haiku(
    variables: Any,
    like: tuple[Any, Any],
    *,
    rename: Mapping[str, str] | None = None,
    leaf: Mapping[str, Rule] | None = None,
    ignore: Sequence[str] = (),
    layer_axis: Axis | Mapping[str, Axis] | None = None,
    interleave: bool | None = None,
    cast: bool = False,
    strict: bool = True,
) -> Any:
    """Flax variables as the parameters and state of the same model in Haiku.

    Equal to this loop over the rows of the plan, in which a leaf may be several arrays
    of either tree:

    ```
    for flax_leaf, haiku_leaf, change in plan(variables, like).rows:
        haiku[haiku_leaf] = change(variables[flax_leaf])
    ```

    >>> import jax, numpy as np
    >>> variables = {"params": {"Dense_0": {"kernel": np.ones([3, 4])}}}
    >>> like = {"linear": {"w": jax.ShapeDtypeStruct([3, 4], np.float32)}}, {}
    >>> params, state = flax_to_haiku(variables, like, cast=True)
    >>> params["linear"]["w"].shape
    (3, 4)

    Args:
      variables: Linen's variables (`{"params": ..., "batch_stats": ...}`), an NNX
        state, or a plain dict of either. Gradients and moments of an optimiser, which
        are shaped like parameters, are ported as `{"params": gradients}`.
      like: The model's parameters and state, `(params, state)`: what its `init` gives,
        or what `jax.eval_shape` gives for it. `state` is `{}` for a model without.
      rename: Beginnings of paths in Flax (without the collection, or with it), and what
        they are in Haiku. `*` stands for any text in one part of a path, and is copied:
        `{"encoder/layers_*": "encoder/block_*"}`. `{i}` stands for a number, with
        which can be counted: `{"block_{i+1}": "rest_{i}"}`. The closest rule stands:
        `{"block_0": "first", "block_*": "rest_*"}`, after which a stack `rest` holds
        the layers from `block_1` on.
      leaf: Beginnings of paths in Flax, and two functions: from Flax's array of one
        layer to Haiku's, and back, such as `SAME`, `TRANSPOSED`, `transpose` and
        `pad_vocab`; or what `split`, `fuse` and `tie` say of several leaves.
      ignore: Beginnings of paths in Flax or Haiku that may be left over; `like` then
        has arrays there, which stay as they are.
      layer_axis: The axis that `nn.scan` or `nn.vmap` put the layers on
        (`variable_axes={"params": 1}`): one for all stacks, or by the beginning of a
        path in Flax, which then is that of a stack; a tuple for scans in a scan, ()
        for none. By default it is found out, if just one reading of the shapes fits.
      interleave: Where layers are both numbered and on an axis (`layers/block_0` and
        `layers/block_1`, `[L/2, ...]`): True if the scan is over blocks of layers,
        False if each numbered module is a stack of its own.
      cast: Whether to convert dtypes to those of `like`.
      strict: Whether every leaf of both trees has to be used exactly once.

    Returns:
      `(params, state)`, with new arrays: NumPy arrays where `like` has these, JAX
      arrays elsewhere, sharded as `like` says. With `strict=False`, the pair of that
      and of the plan's rows that say what was left over; those leaves are as in `like`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a leaf is left over, does not fit, or could fit in two ways; if a
        rule is not used.
    """
    said = rename, leaf, ignore, layer_axis, interleave, cast
    found = _planned(variables, like, *said)
    return _port(found, 0, variables, like, strict)


@hidden
def haiku_to_flax(
    params_and_state: tuple[Any, Any],
    like: Any,
    *,
    rename: Mapping[str, str] | None = None,
    leaf: Mapping[str, Rule] | None = None,
    ignore: Sequence[str] = (),
    layer_axis: Axis | Mapping[str, Axis] | None = None,
    interleave: bool | None = None,
    cast: bool = False,
    strict: bool = True,
) -> Any:
    """The inverse of `flax_to_haiku`: parameters and state as Flax variables.

    `params_and_state` is Haiku's `(params, state)`, where `state` is `{}` for a model
    without. `like` are variables, an NNX state or a plain dict of either, as the
    model's `init` gives them, or as `jax.eval_shape` gives them for it. All else is as
    in `flax_to_haiku`, such as `rename`, which is from Flax to Haiku.

    Returns:
      A tree as `like`, with new arrays; as in `flax_to_haiku`.

    Raises:
      TypeError: As in `flax_to_haiku`.
      ValueError: As in `flax_to_haiku`.
    """
    said = rename, leaf, ignore, layer_axis, interleave, cast
    found = _planned(like, params_and_state, *said)
    return _port(found, 1, params_and_state, like, strict)


@hidden
def plan(
    variables: Any,
    like: tuple[Any, Any],
    *,
    rename: Mapping[str, str] | None = None,
    leaf: Mapping[str, Rule] | None = None,
    ignore: Sequence[str] = (),
    layer_axis: Axis | Mapping[str, Axis] | None = None,
    interleave: bool | None = None,
    cast: bool = False,
) -> Plan:
    """What `flax_to_haiku` and `haiku_to_flax` would do, to print and to look at.

    >>> import jax, numpy as np
    >>> of = jax.ShapeDtypeStruct
    >>> kernel = of([8, 2, 4], np.float32)
    >>> variables = {"params": {"query": {"kernel": kernel}}}
    >>> like = {"query": {"w": of([8, 8], np.float32)}}, {}
    >>> print(plan(variables, like))
    1 leaves of Flax -> 1 leaves of Haiku, 256 B
      Flax                                Haiku                        change ...
      params/query/kernel float32[8,2,4]  params/query/w float32[8,8]  reshape ...

    Arguments are those of `flax_to_haiku`; leaves may be `jax.ShapeDtypeStruct`s.

    Returns:
      A plan: a table as text, and in colour with `rich.print`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a rule has another number of `*` than its path.
    """
    said = rename, leaf, ignore, layer_axis, interleave, cast
    return _planned(variables, like, *said)


@hidden
def verify(
    flax_apply: Callable[..., Any],
    haiku_apply: Callable[..., Any],
    variables: Any,
    like: tuple[Any, Any],
    inputs: Any,
    **rules: Any,
) -> Report:
    """Ports a model, runs it in both frameworks, and says where they first differ.

    ```
    report = port.verify(model.apply, transformed.apply, variables, like, tokens)
    assert report.ok, report
    ```

    Outputs are compared, then gradients by parameters; where outputs differ, so is what
    goes into and comes out of each module of Linen that has its like in Haiku, in the
    order in which they run. In double precision, unless a model has none.

    Args:
      flax_apply: `flax_apply(variables, *inputs)` returns the outputs.
      haiku_apply: `haiku_apply(params, state, key, *inputs)` returns outputs and state,
        as the `apply` of `hk.transform_with_state`.
      variables: As in `flax_to_haiku`, with values.
      like: As in `flax_to_haiku`.
      inputs: An array, or a tuple of arguments.
      **rules: As in `flax_to_haiku`: `rename`, `leaf`, `ignore`, `layer_axis`,
        `interleave`, `cast`.

    Returns:
      A report: `ok`, and as text what differs, where, and what may be the reason.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If the port is refused, or outputs are not of the same structure.
    """
    for apply in (flax_apply, haiku_apply):
        _checks.function(apply, "hk_stack.port.verify", _VERIFY)
    ported = flax_to_haiku(variables, like, **rules)
    found = plan(variables, like, **rules)
    several = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return _verify.verified(flax_apply, haiku_apply, variables, found, ported, several)


_VERIFY = (
    "Write port.verify(model.apply, transformed.apply, variables, like, inputs), with "
    "the apply of hk.transform_with_state."
)


@hidden
def skeleton(variables: Any) -> str:
    r"""The source of a Haiku model for a Flax tree, whose forward pass is to be edited.

    It has all modules with their sizes and names, and `hk_stack.layer_stack` where
    equal blocks are numbered or scanned. It runs as it is, and its parameters are
    ported without a rule; how modules are connected no tree tells, so they run one
    after the other, with a TODO wherever a human has to look.

    >>> import numpy as np
    >>> variables = {"params": {"Dense_0": {"kernel": np.ones([3, 4])}}}
    >>> print("\n".join(skeleton(variables).splitlines()[-2:]))
        x = hk.Linear(4, with_bias=False, name="linear")(x)  # TODO: activation
        return x

    Args:
      variables: As in `flax_to_haiku`; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Python source, with a function `model(inputs, is_training=False)`.

    Raises:
      TypeError: If it is no dict of modules.
    """
    return _skeleton.source(variables)


def _planned(variables: Any, like: Any, *options: Any) -> Plan:
    said = _rules.checked(*options)
    is_pair = isinstance(like, (tuple, list)) and len(like) == 2
    if not is_pair or any(map(callable, like)):
        are_swapped = isinstance(variables, (tuple, list))
        more = (
            "Flax's side is a pair: swap the two."
            if are_swapped
            else "Write (params, {}) for a model without state."
        )
        raise TypeError(
            "port: Haiku's side must be a pair (params, state), not "
            f"{type(like).__name__}. {more}"
        )
    haiku = _leaves.of_haiku(*like)
    flax, unused = _leaves.of_flax(variables, said, haiku)
    found = _match.match(flax, haiku, said)
    unused += said.unused([leaf.paths for leaf in (*flax, *haiku)])
    if not (found.unfit or found.flax or found.haiku):
        unused += _layers.unused(found.moves, said)
    return _plan.made(found, (flax, haiku), said, unused)


def _port(found: Plan, source: int, tree: Any, like: Any, strict: bool) -> Any:
    """Carries out a plan from one side, if nothing is wrong."""
    _checks.flag(strict, "strict", "port")
    bad = [row for row in found.rows if not row.ok]
    if found.unused_rules or (strict and bad):
        what = ("flax_to_haiku", "haiku_to_flax")[source]
        lines = [f"{what}: {found.headline()}", *found.problems(what)]
        raise ValueError("\n".join(lines))
    result = _move.ported(found, source, tree, like)
    if not strict:
        return result, bad
    named = result if source else dict(zip(("params", "state"), result, strict=True))
    for path, leaf in jax.tree.leaves_with_path(named):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"port: {_checks.path_name(path)} is ignored, and `like` has no value "
                "for it, but a jax.ShapeDtypeStruct. Give `like` with an array there, "
                "as the model's init returns it."
            )
    return result
