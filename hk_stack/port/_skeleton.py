"""Source of a Haiku model for a Flax tree: all modules, and a forward pass to edit.

What a module is, its leaves tell: a `kernel` and a `bias`, a `scale`. How modules are
connected no tree tells, so the source runs them one after the other, and says where a
human has to look.
"""

import collections
import dataclasses
import keyword
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hk_stack.port import _cells, _leaves, _names
from hk_stack.port._codecs import Shape

_HEAD = '''"""{title}

Made from the tree of a Flax checkpoint: names and shapes are its own. Parameters are
ported with {rules}.
The order in which modules run, activations, residuals and masks are not in a tree: look
at each TODO, then at hk_stack.port.verify.
"""

import haiku as hk
import jax
import jax.numpy as jnp

import hk_stack

init = hk.initializers.VarianceScaling()


def fit(x: jax.Array, width: int, ndim: int = 0) -> jax.Array:
    """TODO: leave out. Another width, or number of axes, for all to run as it is."""
    x = jnp.asarray(x, jnp.float32)
    if ndim and x.ndim != ndim:
        x = x.reshape(x.shape[0], -1, *[1] * (ndim - 3), x.shape[-1])
    return x if x.shape[-1] == width else jnp.resize(x, (*x.shape[:-1], width))


'''
_TURNED = '''class Transposed(hk.Module):
    """A linear layer whose weights are stored `[out, in]`."""

    def __init__(self, size: int, with_bias: bool = True, name: str | None = None):
        super().__init__(name=name)
        self.size = size
        self.with_bias = with_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ hk.get_parameter("w", [self.size, x.shape[-1]], x.dtype, init).T
        if not self.with_bias:
            return y
        bias = hk.get_parameter("b", [self.size], x.dtype, jnp.zeros)
        return y + jnp.broadcast_to(bias, y.shape)


'''


_MODEL = '''def model(inputs: jax.Array, is_training: bool = False) -> jax.Array:
    """TODO: what goes in, and what comes out."""
'''


@dataclasses.dataclass
class Node:
    """A module: its leaves' shapes in one layer, and the modules inside of it.

    Attributes:
      leaves: By name; `mean` and `var` are of the statistics.
      inside: By name.
      depth: How many layers it holds, if `nn.scan` has put these on an axis.
      axis: That axis.
    """

    leaves: dict[str, Shape] = dataclasses.field(default_factory=dict)
    inside: dict[str, "Node"] = dataclasses.field(default_factory=dict)
    depth: int = 0
    axis: int = 0

    @property
    def shapes(self) -> list[tuple[str, Shape]]:
        """Of all leaves, those inside as well."""
        return [pair for node in _every(self) for pair in node.leaves.items()]


def source(variables: Any) -> str:
    """See `hk_stack.port.skeleton`."""
    root = _tree(variables)
    writer = _Writer(_is_turned(root))
    lines = ["x = inputs", *writer.scope(root), "return x"]
    if any(name == "embedding" for name, _ in root.shapes):
        lines[:0] = ["ids = jnp.asarray(inputs, jnp.int32)  # TODO: tokens [B, T]"]
    count = sum(math.prod(shape) for _, shape in root.shapes)
    axes = max((node.axis for node in _every(root) if node.depth), default="()")
    rules = f"no rule, or layer_axis={axes} if sizes are equal"
    head = _HEAD.format(title=f"A model of {count:,} numbers in Haiku.", rules=rules)
    turned = _TURNED if writer.is_turned else ""
    return head + turned + _MODEL + "".join(f"    {line}\n" for line in lines)


def _tree(variables: Any) -> Node:
    root = Node()
    order = {path: i for i, path in enumerate(_walked(variables))}
    stored = _leaves.stored(variables)
    names = {key: tuple(one.pieces[0].name.split("/")) for key, one in stored.items()}
    for key in sorted(stored, key=lambda key: order.get(names[key], len(order))):
        collection, path = key
        if collection not in ("params", "batch_stats"):
            continue
        node = root
        for part in path[:-1]:
            node = node.inside.setdefault(part, Node())
        node.leaves[path[-1]] = stored[key].pieces[0].shape
    return _unscanned(root)


def _walked(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths in the order in which they were made, which JAX forgets."""
    if isinstance(tree, Mapping):
        for key, inside in tree.items():
            yield from _walked(inside, (*path, str(key)))
    else:
        yield path


def _unscanned(node: Node) -> Node:
    """A tree in which stacks of `nn.scan` are one layer."""
    shapes = node.shapes
    ranks = [len(shape) for name, shape in shapes if name == "scale"]
    for axis in (0, 1):
        sizes = {shape[axis] if len(shape) > axis else 0 for _, shape in shapes}
        is_stack = len(sizes) == 1 and ranks and min(ranks) > 1
        if is_stack and not any("mean" in x.leaves for x in _every(node)):
            return dataclasses.replace(
                _without(node, axis), depth=sizes.pop(), axis=axis
            )
    inside = {name: _unscanned(one) for name, one in node.inside.items()}
    return dataclasses.replace(node, inside=inside)


def _every(node: Node) -> Iterator[Node]:
    yield node
    for inside in node.inside.values():
        yield from _every(inside)


def _without(node: Node, axis: int) -> Node:
    leaves = {n: (*x[:axis], *x[axis + 1 :]) for n, x in node.leaves.items()}
    return Node(leaves, {n: _without(x, axis) for n, x in node.inside.items()})


def _is_turned(root: Node) -> bool:
    """Whether kernels are stored `[out, in]`, as the size of a bias beside one says."""
    pairs = (
        (node.leaves["kernel"], node.leaves["bias"])
        for node in _every(root)
        if node.leaves.keys() == {"kernel", "bias"}
    )
    return any(
        len(kernel) == 2 and kernel[0] == bias[-1] != kernel[1]
        for kernel, bias in pairs
    )


class _Writer:
    """Writes the lines of modules, and knows how wide `x` is."""

    def __init__(self, is_turned: bool):
        self.is_turned = is_turned
        self.width = self.ndim = 0  # Not known.
        self.has_embed = False

    def scope(self, node: Node) -> list[str]:
        """The lines for what is inside of a module."""
        lines = self._own(node)
        for name, first, count in _groups(node):
            if first.depth or count > 1:
                lines += self._stack(name, first, first.depth or count)
            else:
                lines += self._module(name, first)
        return lines

    def _own(self, node: Node) -> list[str]:
        """Parameters of a module of the user's own."""
        lines = []
        for name, shape in node.leaves.items():
            new = {"kernel": "w", "bias": "b"}.get(name, name)
            get = f'hk.get_parameter("{new}", {list(shape)}, init=jnp.zeros)'
            lines.append(f"{_variable(new)} = {get}  # TODO: use it")
        return lines

    def _stack(self, name: str, layer: Node, depth: int) -> list[str]:
        before = [] if self.width else self._fitted(_width_of(layer))
        width, function = self.width, _variable(f"{name}_layer")
        lines = ["h = x", *(_of_h(line) for line in self.scope(layer))]
        back = f"fit(h, {width})" if self.width != width else "h"
        self.width = width
        return [
            *before,
            f"def {function}(x: jax.Array) -> jax.Array:",
            *(f"    {line}" for line in lines),
            f"    return x + {back}  # TODO: residuals",
            f'x = hk_stack.layer_stack({depth}, name="{name}")({function})(x)',
        ]

    def _fitted(self, width: int, ndim: int = 0, after: int = 0) -> list[str]:
        """What makes `x` so wide, for a module that makes another width of it."""
        is_fit = self.width == width and ndim in (0, self.ndim)
        self.width, self.ndim = after or width, ndim or self.ndim
        return [] if is_fit else [f"x = fit(x, {width}{f', {ndim}' if ndim else ''})"]

    def _module(self, name: str, node: Node) -> list[str]:
        names = node.leaves.keys()
        if node.inside:
            own = self._attention(name, node) or self._cell(name, node)
            return own or self._named_scope(name, node)
        if names in ({"kernel"}, {"kernel", "bias"}):
            return self._kernel(name, node)
        if names == {"embedding"}:
            return self._embed(name, *node.leaves["embedding"])
        if {"mean", "var"} <= names <= {"mean", "var", "scale", "bias"}:
            return self._batch_norm(name, node)
        if names in ({"scale"}, {"scale", "bias"}) and len(node.leaves["scale"]) == 1:
            kind = "hk.LayerNorm(-1, True, True" if "bias" in names else "hk.RMSNorm(-1"
            lines = self._fitted(node.leaves["scale"][-1])
            return [*lines, f'x = {kind}, eps=1e-6, name="{name}")(x)  # TODO: eps']
        return self._named_scope(name, node)

    def _named_scope(self, name: str, node: Node) -> list[str]:
        inside = self.scope(node)
        return [f'with hk.name_scope("{name}"):', *(f"    {line}" for line in inside)]

    def _attention(self, name: str, node: Node) -> list[str]:
        """Flax's own, in which heads are an axis."""
        if node.inside.keys() != {"query", "key", "value", "out"} or node.leaves:
            return []
        kernels = [x.leaves.get("kernel", ()) for x in node.inside.values()]
        if {len(kernel) for kernel in kernels} != {3}:
            return []
        width, heads, size = node.inside["query"].leaves["kernel"]
        out = node.inside["out"].leaves["kernel"][-1]
        bias = "" if "bias" in node.inside["out"].leaves else ", with_bias=False"
        options = f'w_init=init{bias}, model_size={out}, name="{name}"'
        return [
            *self._fitted(width, after=out),
            f"attention = hk.MultiHeadAttention({heads}, {size}, {options})",
            "x = attention(x, x, x)  # TODO: mask",
        ]

    def _cell(self, name: str, node: Node) -> list[str]:
        """A recurrent cell."""
        rows = _cells.leaves_of(
            {
                f"{part}/{leaf}": shape
                for part, inside in node.inside.items()
                for leaf, shape in inside.leaves.items()
            }
        )
        if not rows:
            return []
        is_lstm = rows[0].path == ("linear", "w")
        first = node.inside[rows[0].pieces[0].partition("/")[0]].leaves["kernel"]
        size = first[1] // (1 if len(rows[0].pieces) > 2 else 4 if is_lstm else 3)
        kind = "hk.LSTM" if is_lstm else "hk_stack.port.GRU"
        return [
            *self._fitted(first[0], 3, size),
            f'core = {kind}({size}, name="{name}")',
            "start = core.initial_state(x.shape[0])",
            "x, _ = hk.dynamic_unroll(core, x, start, time_major=False)",
        ]

    def _kernel(self, name: str, node: Node) -> list[str]:
        kernel, bias = node.leaves["kernel"], node.leaves.get("bias")
        end = f'{", with_bias=False" if bias is None else ""}, name="{name}"'
        if len(kernel) == 2 or (bias is not None and len(bias) > 1):
            rest = len(bias) if bias is not None else 1
            before, after = math.prod(kernel[:-rest]), math.prod(kernel[-rest:])
            kind = "hk.Linear"
            if self.is_turned and len(kernel) == 2:
                before, after, kind = after, before, "Transposed"
            lines = self._fitted(before, after=after)
            return [*lines, f"x = {kind}({after}{end})(x)  # TODO: activation"]
        *window, width, out = kernel
        rank = len(window)
        end = re.sub(r'name="conv(_\d+)?"', rf'name="conv{rank}_d\1"', end)
        lines = self._fitted(width, rank + 2, out)
        what = "TODO: stride, padding, groups; transposed?"
        return [*lines, f"x = hk.Conv{rank}D({out}, {window}{end})(x)  # {what}"]

    def _embed(self, name: str, rows: int, width: int) -> list[str]:
        table = f'hk.Embed({rows}, {width}, w_init=init, name="{name}")'
        if self.has_embed:
            positions = f"jnp.arange(ids.shape[-1]) % {rows}"
            line = f"x = x + {table}({positions})  # TODO: of what?"
            return [*self._fitted(width), line]
        self.has_embed, self.width = True, width
        return [f"x = {table}(ids % {rows})  # TODO: tied to the output?"]

    def _batch_norm(self, name: str, node: Node) -> list[str]:
        has = ", ".join(str(leaf in node.leaves) for leaf in ("scale", "bias"))
        return [
            *self._fitted(node.leaves["mean"][-1]),
            f'norm = hk.BatchNorm({has}, 0.9, name="{name}")  # TODO: decay, eps',
            "x = norm(x, is_training or hk.running_init())",
        ]


def _written(name: str) -> str:
    """As it is, or as Haiku writes a default name of Flax."""
    is_default = re.fullmatch(r"[A-Z]\w*_\d+", name)
    return _names.written(_names.parts([name])) if is_default else name


def _groups(node: Node) -> Iterator[tuple[str, Node, int]]:
    """Modules by what Haiku calls them; of equal blocks the first, and how many."""
    parts = {name: _names.parts([name]) for name in node.inside}
    count = collections.Counter(parts.values())
    numbered: dict[str, list[str]] = collections.defaultdict(list)
    for name, inside in node.inside.items():
        match = re.fullmatch(r"(.+)_(\d+)", name)
        numbered[match[1] if match and inside.inside else name].append(name)
    for base, names in numbered.items():
        if _are_equal(blocks := [node.inside[name] for name in names]):
            yield _written(f"{base}_0").removesuffix("_0"), blocks[0], len(blocks)
            continue
        for name in names:  # Two of one name are as they are.
            new = _written(name) if count[parts[name]] == 1 else name
            yield from _listed(new, node.inside[name])


def _listed(name: str, node: Node) -> Iterator[tuple[str, Node, int]]:
    """A module; or several, if it is a list of NNX or Hugging Face."""
    if not node.inside or not all(map(str.isdecimal, node.inside)) or node.leaves:
        yield name, node, 1
        return
    layers = dict(sorted(node.inside.items(), key=lambda item: int(item[0])))
    if _are_equal(blocks := list(layers.values())):
        yield name, blocks[0], len(blocks)
        return
    for number, layer in layers.items():
        yield f"{name}_{number}" if int(number) else name, layer, 1


def _are_equal(blocks: Sequence[Node]) -> bool:
    return len(blocks) > 1 and all(one == blocks[0] for one in blocks)


_TAKEN = {"x", "h", "hk", "jax", "jnp", "ids", "init", "fit", "inputs", "norm", "core"}


def _variable(name: str) -> str:
    """A name that Python takes, and the source has not."""
    text = re.sub(r"\W", "_", name).lower()
    text = f"_{text}" if text[:1].isdecimal() else text
    return f"{text}_" if keyword.iskeyword(text) or text in _TAKEN else text


def _of_h(line: str) -> str:
    """A line of a layer, in which `x` stays what went in."""
    return re.sub(r"(?<!\")\bx\b(?![:\"])", "h", line)


def _width_of(node: Node) -> int:
    """The width of what goes into a layer, as one of its norms or kernels says."""
    for inside in _every(node):
        for name in ("scale", "kernel"):
            if name in inside.leaves:
                shape = inside.leaves[name]
                return shape[0] if name == "kernel" and len(shape) < 4 else shape[-1]
    return 1
