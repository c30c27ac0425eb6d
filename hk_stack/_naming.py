"""Names of layers in trees: `block_3/linear` is layer 3 of the stack `block/linear`.

A naming map (Haiku's `hk.LayerStackTransparencyMapping`) says which module of layer i
goes with which stacked module. `NumberedLayers` is the one for numbered names; several
maps are one, in which the first that knows a module names it.
"""

import dataclasses
import itertools
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import haiku as hk

from hk_stack import _checks
from hk_stack._traceback import hidden, hidden_in_making

Map = hk.LayerStackTransparencyMapping
Maps = Map | Sequence[Map]


@hidden_in_making
@dataclasses.dataclass(frozen=True)
class NumberedLayers(hk.LayerStackTransparencyMapping):
    """A naming map for numbered layers: `block_0/linear`, `block_1/linear`, ...

    >>> names = NumberedLayers("blocks/block_{}", "blocks/block")
    >>> names.stacked_to_flat("blocks/block/linear", 3)
    'blocks/block_3/linear'
    >>> names.flat_to_stacked("blocks/block_3/linear")
    ('blocks/block/linear', 3)
    >>> names.flat_to_stacked("embed")  # no part of the stack
    >>> NumberedLayers("block_{:02}/norm_{:02}").stacked_to_flat("block/norm", 3)
    'block_03/norm_03'

    It serves `stack_params`, `unstack_params`, and transparent stacks of both
    `hk.layer_stack` and `hk_stack.layer_stack`. For these, names begin inside of the
    module around the stack: `block_{}`, which the whole tree has as `model/block_{}`.
    Nested stacks take one map for each level:
    `NumberedLayers("outer_*/inner_{}", "outer_*/inner")`, then
    `NumberedLayers("outer_{}", "outer")`.

    Attributes:
      per_layer: Name of the layers' modules in a per-layer tree; modules inside of them
        follow. `{}` stands for the layer's number, from 0; `{:02}` fills it with zeros.
        It may be there several times. Without it, the last part is
        numbered as Haiku numbers modules of one name: `linear`, `linear_1`, `linear_2`.
        `*` stands for any text without a slash, which is the same in `stacked`.
      stacked: Their name in the stacked tree; by default `per_layer` without `_{}`. A
        sequence of k names is a pattern of blocks that a layer of the stack holds:
        numbers `k i` to `k i + k - 1` belong to layer i.
      num_layers: `L`; larger numbers are no part of the stack. Needed only where some
        are left over, as in 26 blocks in a pattern of three: 8 layers, and 2 blocks.
    """

    per_layer: str
    stacked: str | Sequence[str] = ()
    num_layers: int | None = None

    def __post_init__(self) -> None:
        _check_per_layer(self.per_layer)
        names = (self.stacked,) if isinstance(self.stacked, str) else self.stacked
        if names == ():
            names = (re.sub(f"[_/.]?{_NUMBER}", "", self.per_layer),)
        _check_stacked(names, self.per_layer)
        object.__setattr__(self, "stacked", tuple(names))
        if self.num_layers is not None:
            _checks.positive(self.num_layers, "num_layers", "NumberedLayers")

    @hidden
    def stacked_to_flat(self, stacked_module_name: str, scan_idx: int) -> str:
        """The name of a stacked module in layer `scan_idx`.

        Raises:
          ValueError: If the module is no part of the stack.
        """
        part = self._part(stacked_module_name)
        if part:
            position, texts, inside = part
            number = scan_idx * len(self.stacked) + position
            return _with_texts(self._numbered(number), texts) + inside
        raise ValueError(
            f"{self}: {stacked_module_name!r} is no part of the stack; expected "
            f"{' or '.join(map(repr, self.stacked))}, or a module in it. Give the "
            "stacked name as second argument: NumberedLayers(per_layer, stacked)."
        )

    @hidden
    def flat_to_stacked(self, unstacked_module_name: str) -> tuple[str, int] | None:
        """The stacked module and the layer of a per-layer one; None if it has none.

        Raises:
          ValueError: If a number that the map repeats is not the same everywhere.
        """
        habit = "" if re.search(_NUMBER, self.per_layer) else r"(?:_(?P<number0>\d+))?"
        match = re.fullmatch(pattern(self.per_layer, habit), unstacked_module_name)
        if match is None:
            return None
        found = match.groupdict()
        numbers = {int(found[key] or 0) for key in found if key.startswith("number")}
        texts = [found[key] for key in found if key.startswith("text")]
        if len(numbers) > 1:
            raise ValueError(
                f"{self}: {unstacked_module_name!r} has several numbers; expected that "
                "of the layer everywhere. Nested stacks take one map for each level, "
                "with '*' for the other numbers: 'outer_*/inner_{}', then 'outer_{}'."
            )
        layer, position = divmod(numbers.pop(), len(self.stacked))
        stacked = _with_texts(self.stacked[position], texts) + (found["inside"] or "")
        is_part = self.num_layers is None or layer < self.num_layers
        # Of block_2 and block_02, only one is as the map writes it.
        if is_part and self.stacked_to_flat(stacked, layer) == unstacked_module_name:
            return stacked, layer
        return None

    def _part(self, module: str) -> tuple[int, tuple[str, ...], str] | None:
        """Of a stacked module, its block in the pattern, texts of `*`, and the rest."""
        for position, name in enumerate(self.stacked):
            match = re.fullmatch(pattern(name), module)
            if match:
                return position, match.groups()[:-1], match["inside"] or ""
        return None

    def _numbered(self, number: int) -> str:
        """`per_layer` with a number in it: its own way, or Haiku's."""
        if re.search(_NUMBER, self.per_layer):
            return re.sub(_NUMBER, lambda spec: spec[0].format(number), self.per_layer)
        return f"{self.per_layer}_{number}" if number else self.per_layer

    def __str__(self) -> str:
        names = self.stacked[0] if len(self.stacked) == 1 else self.stacked
        more = f", num_layers={self.num_layers}" if self.num_layers is not None else ""
        return f"NumberedLayers({self.per_layer!r}, {names!r}{more})"


_NUMBER = r"\{(?::0[1-9]\d*)?\}"  # {}, {:02}


def _check_per_layer(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"NumberedLayers: found {_checks.shown(name)}; expected a name such as "
            "'block_{}'."
        )
    if "%" in name:
        raise ValueError(
            f"NumberedLayers: {name!r} has a '%'. The layer's number is written "
            f"'{{}}': {re.sub('%[0-9]*[a-z]?', '{}', name)!r}."
        )
    if re.search(r"[{}]", re.sub(_NUMBER, "", name)):
        raise ValueError(
            f"NumberedLayers: {name!r} has a brace that is not part of '{{}}'. The "
            "layer's number is written '{}', or '{:02}' with zeros before it: "
            "'block_{}', 'block_{:02}'."
        )
    numbered = name if re.search(_NUMBER, name) else f"{name}{{}}"
    if re.search(r"[*}][*{]", numbered):
        raise ValueError(
            f"NumberedLayers: in {name!r} nothing tells where the text of '*', or the "
            "number, ends. Write '{}' for the layer's number, and something between it "
            "and '*': '*_{}' or '*/block_{}'."
        )


def _check_stacked(names: Any, per_layer: str) -> None:
    is_list = isinstance(names, Sequence) and len(names) > 0
    wrong = [n for n in names if not isinstance(n, str)] if is_list else [names]
    if wrong:
        raise TypeError(
            f"NumberedLayers: the stacked name must be a name such as 'block', or a "
            f"sequence of names for a pattern of blocks; found {wrong[0]!r}."
        )
    for name in names:
        if not name:
            raise ValueError(
                f"NumberedLayers: {per_layer!r} leaves no name for the stack. Give "
                f"one: NumberedLayers({per_layer!r}, 'layers')."
            )
        if name.count("*") != per_layer.count("*") or re.search(r"[{}]", name):
            raise ValueError(
                f"NumberedLayers: the stacked name {name!r} must have no '{{}}', "
                f"and as many '*' as {per_layer!r}."
            )
    for one, other in itertools.permutations(names, 2):
        if f"{other}/".startswith(f"{one}/"):
            raise ValueError(
                f"NumberedLayers: two blocks of the pattern {tuple(names)} have one "
                f"name, or one is inside of the other: {one!r} and {other!r}. Give "
                "each a name of its own."
            )


def pattern(template: str, end: str = "") -> str:
    """A regular expression for a module of `template`, or one inside of it."""
    count = itertools.count()
    escaped = []
    for part in re.split(rf"({_NUMBER}|\*)", template):
        if part == "*":
            escaped.append(f"(?P<text{next(count)}>[^/]*)")
        elif re.fullmatch(_NUMBER, part):
            escaped.append(rf"(?P<number{next(count)}>\d+)")
        else:
            escaped.append(re.escape(part))
    return "".join(escaped) + end + "(?P<inside>/.*)?"


def _with_texts(template: str, texts: Sequence[str]) -> str:
    return template.replace("*", "{}").format(*texts)


@dataclasses.dataclass(frozen=True)
class _Several(hk.LayerStackTransparencyMapping):
    """Several maps as one: of each module, the first that knows it."""

    maps: tuple[Map, ...]

    def stacked_to_flat(self, stacked_module_name: str, scan_idx: int) -> str:
        one = map_of(self, stacked_module_name)
        return one.stacked_to_flat(stacked_module_name, scan_idx)

    def flat_to_stacked(self, unstacked_module_name: str) -> tuple[str, int] | None:
        place = self._first(unstacked_module_name)
        around = place and self._first(place[0])
        if place and around and around[0] != place[0]:
            raise ValueError(
                f"{self}: {unstacked_module_name!r} is a layer of {place[0]!r}, and "
                f"that of {around[0]!r}. Nested stacks are converted level by level: "
                "call stack_params with one map, then with the other."
            )
        return place

    def _first(self, module: str) -> tuple[str, int] | None:
        found = (one.flat_to_stacked(module) for one in self.maps)
        return next((place for place in found if place is not None), None)

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.maps))}]"


@dataclasses.dataclass(frozen=True)
class Table(hk.LayerStackTransparencyMapping):
    """A naming map by a table: of each stacked module, its names in the layers."""

    modules: Mapping[str, Sequence[str]]

    def stacked_to_flat(self, stacked_module_name: str, scan_idx: int) -> str:
        return self.modules[stacked_module_name][scan_idx]

    def flat_to_stacked(self, unstacked_module_name: str) -> tuple[str, int] | None:
        for module, names in self.modules.items():
            if unstacked_module_name in names:
                return module, names.index(unstacked_module_name)
        return None


def naming_map(value: Any, argument: str, where: str) -> Map:
    """`value`, if it is a naming map; a sequence of them as one."""
    if isinstance(value, (list, tuple)) and value:
        return _Several(tuple(naming_map(one, argument, where) for one in value))
    methods = ("flat_to_stacked", "stacked_to_flat")
    has_all = all(callable(getattr(value, name, None)) for name in methods)
    if has_all and not isinstance(value, type):
        found: Map = value
        return found
    hint = f"hk_stack.NumberedLayers({value!r})" if isinstance(value, str) else ""
    if isinstance(value, type):
        hint = f"{value.__name__}(...), an instance"
    raise TypeError(
        f"{where}: {argument} must be a naming map, not {_checks.shown(value)}. Write "
        f"{hint or 'hk_stack.NumberedLayers(...)'}."
    )


def as_haiku_counts(naming_map: Map) -> str:
    """The same map for `linear`, `linear_1`, if it has numbers like `linear_0`."""
    one = maps_of(naming_map)[0]
    name = getattr(one, "per_layer", "")
    is_at_end = name.endswith("_{}") and name.count("{") == 1
    return f"NumberedLayers({name[:-3]!r})" if is_at_end else ""


def is_stacked(naming_map: Map, module: str) -> bool:
    """Whether a module is one of a stack, to a naming map."""
    try:
        flat = naming_map.stacked_to_flat(module, 0)
        return naming_map.flat_to_stacked(flat) == (module, 0)
    except Exception:  # Maps other than ours may raise what they like.
        return False


def is_layer(naming_map: Map, module: str) -> bool:
    """Whether a module is one of a layer, to a naming map."""
    return naming_map.flat_to_stacked(module) is not None


def place_of(naming_map: Map, module: str) -> tuple[str, int] | None:
    """The stacked module and the layer of a per-layer one, if it is known to be one."""
    try:
        return naming_map.flat_to_stacked(module)
    except Exception:  # As above, of names that they do not know.
        return None


def maps_of(naming_map: Map) -> tuple[Map, ...]:
    """The maps that were given."""
    return naming_map.maps if isinstance(naming_map, _Several) else (naming_map,)


def map_of(naming_map: Map, module: str) -> Map:
    """Of several maps, the one that names a stacked module."""
    first, *others = maps_of(naming_map)
    return next((one for one in (first, *others) if is_stacked(one, module)), first)


def stack_of(naming_map: Map, module: str) -> Hashable:
    """Tells apart the stacks that a map serves, and those of what `*` stands for."""
    one = map_of(naming_map, module)
    part = one._part(module) if isinstance(one, NumberedLayers) else None
    return id(one), part and part[1]


def unique(names: Sequence[str]) -> list[str]:
    """Names, of which those that are there more than once are numbered."""
    taken: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{i}" if i else name for i in itertools.count())
        taken[next(name for name in numbered if name not in taken)] = None
    return list(taken)
