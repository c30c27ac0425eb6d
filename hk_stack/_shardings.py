"""`shardings`: where the leaves of a tree go on a mesh, by rules for one layer."""

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hk_stack import _checks
from hk_stack._table import Shown, Table, si
from hk_stack._traceback import hidden
from hk_stack._types import Tree


class Placed(NamedTuple):
    """A leaf of a tree, on a mesh.

    Attributes:
      path: Where it is in the tree: `layers/linear/w`.
      type: Its dtype and shape.
      rule: What said so, or "" if nothing did.
      spec: Its axes on the mesh, those of layers included.
      bytes_per_device: Its size on each device.
    """

    path: str
    type: str
    rule: str
    spec: PartitionSpec
    bytes_per_device: int


@dataclasses.dataclass(frozen=True, eq=False)
class Shardings(Shown):
    """Where leaves go; `str`, `rich.print` and notebooks show it as a table.

    Attributes:
      tree: A tree of `jax.sharding.NamedSharding`, for `jax.device_put(params, tree)`
        and `jax.jit(init, out_shardings=tree)`.
      leaves: What the table shows, as data.
    """

    tree: Any
    leaves: tuple[Placed, ...]

    def _parts(self) -> Iterable[str | Table]:
        rows = [
            [leaf.path, leaf.type, leaf.rule or "-", _text(leaf.spec), _size(leaf)]
            for leaf in self.leaves
        ]
        total = sum(leaf.bytes_per_device for leaf in self.leaves)
        yield Table(_TITLES, [*rows, ["total", "", "", "", f"{si(total)}B"]])


_TITLES = ["leaf", "type", "rule", "spec", "bytes per device"]


def _size(leaf: Placed) -> str:
    return f"{si(leaf.bytes_per_device)}B"


def _text(spec: PartitionSpec) -> str:
    return f"P({', '.join(map(repr, spec))})"


Rules = Mapping[str, PartitionSpec | None]


@hidden
def shardings(
    tree: Tree,
    rules: Rules,
    mesh: Mesh,
    *,
    layer_axes: Tree = None,
    layers: str | None = None,
) -> Shardings:
    """Where the leaves of parameters, state or an optimiser's state go on a mesh.

    Rules are for the leaf of *one* layer. Of several that match a leaf, the first
    stands. What no rule matches is whole on each device.

    ```
    spec = P(*[None] * axes, *rules[first that matches])  # axes: from layer_axes
    ```

    >>> import haiku as hk, jax, jax.numpy as jnp, hk_stack
    >>> from jax.sharding import PartitionSpec as P
    >>> def model(x):
    ...     return hk_stack.layer_stack(6, name="layers")(hk.Linear(8))(x)
    >>> model, x = hk.transform(model), jnp.ones([2, 8])
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> axes = hk_stack.layer_axes(model.apply, shapes, None, x)
    >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    >>> placed = hk_stack.shardings(
    ...     shapes, {"layers/*/w": P("data", None)}, mesh, layer_axes=axes)
    >>> print(placed)
      leaf             type            rule        spec                  bytes per ...
      layers/linear/b  float32[6,8]    -           P()                   192 B
      layers/linear/w  float32[6,8,8]  layers/*/w  P(None, 'data', None)  1.54 kB
      total                                                              1.73 kB
    >>> params = jax.jit(model.init, out_shardings=placed.tree)(jax.random.key(0), x)

    Args:
      tree: Arrays or `jax.ShapeDtypeStruct`s: parameters, state, or an optimiser's
        state (`jax.eval_shape(optimizer.init, params)`), of which a leaf that is named
        as a parameter (`0/mu/layers/linear/w`) is of as many layer axes. Or of several,
        as in `shardings((params, opt_state), ...)`, for rules of which an optimiser has
        no use.
      rules: The axes of one layer's leaf on the mesh, by glob: `*` stands for any text,
        slashes included. A glob may begin at any part of a path, and ends with it. None
        and `P()` leave a leaf whole.
      mesh: The devices.
      layer_axes: What `layer_axes` returns for the parameters; by default there are no
        stacks.
      layers: The mesh axis for the layers of each outermost stack; None leaves all
        layers on each device, as a loop over layers needs them.

    Returns:
      A `NamedSharding` for each leaf.

    Raises:
      TypeError: If a rule is no `PartitionSpec`, or the mesh is none.
      ValueError: If a rule stands for no leaf, is longer than a leaf has axes, names an
        axis that the mesh has not, or twice, or one that does not divide the leaf's; if
        `layer_axes` is of other parameters.
    """
    checked = _checked(rules, mesh, layers, layer_axes)
    axes = _depths(layer_axes)
    used: set[str] = set()
    placed, found = [], []
    instead = "expected arrays or their types: jax.eval_shape(model.init, rng, x)."
    _checks.arrays(tree, f"{_WHERE}: argument `tree`", instead)
    types = jax.eval_shape(lambda tree: tree, tree)
    leaves, structure = jax.tree.flatten_with_path(types)
    if layers or any(checked.values()):
        _check_known(axes, [_checks.path_name(at) for at, leaf in leaves if leaf.ndim])
    for path, leaf in leaves:
        name = _checks.path_name(path)
        rule = next((glob for glob in checked if _matches(glob, name)), "")
        used.add(rule)
        depth = _depth(axes, name)
        spec = _spec(leaf, name, rule, checked.get(rule), depth or 0, layers)
        sharding = NamedSharding(mesh, spec)
        _check_divides(leaf, sharding, name, rule, depth)
        found.append(sharding)
        placed.append(_placed(leaf, sharding, name, rule))
    _all_used(checked, used, [leaf.path for leaf in placed])
    return Shardings(jax.tree.unflatten(structure, found), tuple(placed))


_WHERE = "hk_stack.shardings"
_AXES = "layer_axes=hk_stack.layer_axes(model.apply, params, *args)"


def _checked(
    rules: Rules, mesh: Mesh, layers: str | None, layer_axes: Tree
) -> dict[str, PartitionSpec]:
    if not isinstance(mesh, (Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(
            f"{_WHERE}: expected a jax.sharding.Mesh, not {type(mesh).__name__}. Write "
            'jax.make_mesh((8,), ("data",)).'
        )
    if layers is not None and layer_axes is None:
        raise ValueError(
            f"{_WHERE}: layers={layers!r} needs to know where layers are. Write "
            f"{_AXES}."
        )
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"{_WHERE}: rules must be a dict from globs to PartitionSpecs, not "
            f"{type(rules).__name__}. Write {{'layers/*/w': "
            "jax.sharding.PartitionSpec('data', None)}."
        )
    for glob, spec in rules.items():
        is_spec = isinstance(spec, (PartitionSpec, type(None)))
        if not (isinstance(glob, str) and glob and is_spec):
            raise TypeError(
                f"{_WHERE}: rule {glob!r}: {_checks.shown(spec)}; expected a text and "
                "a jax.sharding.PartitionSpec, or None for what is whole on each "
                f"device. {_as_spec(spec)}"
            )
    found = {glob: spec or PartitionSpec() for glob, spec in rules.items()}
    named = {f"rule {glob!r}": _names(spec) for glob, spec in found.items()}
    for what, names in (named | {"layers": [layers] if layers else []}).items():
        _check_names(what, names, mesh)
    return found


def _check_names(what: str, names: Sequence[Any], mesh: Mesh) -> None:
    """Checks that axes are those of the mesh."""
    if PartitionSpec.UNCONSTRAINED in names:
        raise ValueError(
            f"{_WHERE}: {what} leaves an axis UNCONSTRAINED, which does not say where "
            "a leaf goes. Write None, or an axis of the mesh."
        )
    if unknown := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(
            f"{_WHERE}: {what} names the axis {unknown[0]!r}; the mesh has "
            f"{', '.join(map(repr, mesh.axis_names))}. Write one of these, or None."
        )


def _as_spec(spec: object) -> str:
    """What to write for what is no `PartitionSpec`."""
    if isinstance(spec, NamedSharding):
        return "Give its spec, rule.spec."
    if isinstance(spec, (tuple, list, str)):
        axes = (spec,) if isinstance(spec, str) else spec
        return f"Write jax.sharding.PartitionSpec({', '.join(map(repr, axes))})."
    return "Write jax.sharding.PartitionSpec('data', None)."


def _names(spec: PartitionSpec) -> list[Any]:
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    named = itertools.chain.from_iterable(entries)
    return [name for name in named if name is not None]


def _depths(layer_axes: Tree) -> dict[str, int]:
    """How many layer axes parameters begin with, by path."""
    depths = _checks.layer_axes(layer_axes, _WHERE)
    return {_checks.path_name(path): depth for path, depth in depths}


def _check_known(axes: Mapping[str, int], paths: Sequence[str]) -> None:
    """Checks that `layer_axes` is of the parameters that leaves are named as."""
    if axes and paths and all(_depth(axes, path) is None for path in paths):
        raise ValueError(
            f"{_WHERE}: layer_axes knows none of the leaves: it has "
            f"{next(iter(axes)) or 'its root'}, the tree has {paths[0]}. Give what "
            "layer_axes says of the parameters alone, as in layer_axes=axes['params'] "
            "or axes[0]."
        )


def _depth(axes: Mapping[str, int], name: str) -> int | None:
    """How many layer axes a leaf begins with: that of the parameter it is named as."""
    parts = name.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((axes[end] for end in ends if end in axes), None)


def _matches(glob: str, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (glob, f"*/{glob}"))


def _spec(
    leaf: Any,
    name: str,
    rule: str,
    spec: PartitionSpec | None,
    depth: int,
    layers: str | None,
) -> PartitionSpec:
    """The axes of a leaf on the mesh, those of layers first."""
    own = spec or PartitionSpec()
    if len(own) > max(0, leaf.ndim - depth):
        of_layers = f", of which {depth} of layers" if depth else ""
        raise ValueError(
            f"{_WHERE}: rule {rule!r} has {len(own)} axes, {own}, and {name} has "
            f"{leaf.ndim}{of_layers}. Rules are for the leaf of one layer; "
            f"{_shorter(own, depth) or _own_rule(name)}."
        )
    depth = min(depth, leaf.ndim)
    around = ([layers, *[None] * (depth - 1)] if layers else [None] * depth)[:depth]
    if not any(around) and not own:
        return PartitionSpec()
    whole = PartitionSpec(*around, *own)
    names = _names(whole)
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(
            f"{_WHERE}: {name} would be sharded twice over the axis {twice[0]!r}, "
            f"{whole}, by rule {rule!r} and layers={layers!r}. Leave `layers` out, or "
            "name another axis in the rule."
        )
    return whole


def _check_divides(
    leaf: Any, sharding: NamedSharding, name: str, rule: str, depth: int | None
) -> None:
    for axis, entry in enumerate(sharding.spec):
        names = _names(PartitionSpec(entry))
        shards = math.prod(sharding.mesh.shape[n] for n in names)
        if leaf.shape[axis] % shards:
            by, instead = f"rule {rule!r}", _own_rule(name)
            if depth is None and not axis:
                instead += f". If that axis is of layers, give {_AXES}, which says so"
            if axis < (depth or 0):
                by, instead = f"layers={names[0]!r}", "leave `layers` out"
            raise ValueError(
                f"{_WHERE}: axis {axis} of {name}, of shape {leaf.shape}, is "
                f"{leaf.shape[axis]} long, which {shards} devices "
                f"({', '.join(names)}) do not divide; {by} asks for it. Shard another "
                f"axis, or {instead}."
            )


def _shorter(spec: PartitionSpec, depth: int) -> str:
    """What to write for a rule that begins with the axes of layers, if it does."""
    if depth and not any(spec[:depth]):
        return f"leave those of layers out: {PartitionSpec(*spec[depth:])}"
    return ""


def _own_rule(name: str) -> str:
    return f"give this leaf a rule of its own, before that: {{{name!r}: None, ...}}"


def _placed(leaf: Any, sharding: NamedSharding, name: str, rule: str) -> Placed:
    kind = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    count = math.prod(sharding.shard_shape(leaf.shape))
    return Placed(name, kind, rule, sharding.spec, count * leaf.dtype.itemsize)


def _all_used(rules: Iterable[str], used: set[str], paths: Sequence[str]) -> None:
    for rule in rules:
        if rule in used:
            continue
        together = (
            "If it is for parameters, of which an optimiser keeps nothing here, give "
            "both: shardings((params, state), ...)."
        )
        if matched := [path for path in paths if _matches(rule, path)]:
            raise ValueError(
                f"{_WHERE}: rule {rule!r} stands for nothing: what it matches, such as "
                f"{matched[0]}, has a rule before it. Put it first. {together}"
            )
        some = ", ".join(paths[:8]) + (", ..." if paths[8:] else "")
        raise ValueError(
            f"{_WHERE}: rule {rule!r} matches nothing. The leaves are: "
            f"{some or 'none'}. {together}"
        )
