"""Random models are ported right or refused, never wrong.

Sizes are 2 or 3, and so are numbers of layers: most leaves fit in several ways. There
are HK_STACK_MODELS models in each test, some hundred if the environment does not say:
`HK_STACK_MODELS=5000 pytest -s tests/test_port_random.py` also prints what became of
them.
"""

import ast
import collections
import os
import re
from typing import NamedTuple

import hypothesis
import jax
import numpy as np
from drawn import over
from hypothesis import strategies as st
from port_trees import new, proposals, right_or_refused, types, with_proposal

from hk_stack import port
from hk_stack.port import _plan

MODELS = int(os.environ.get("HK_STACK_MODELS", "250"))


class Module(NamedTuple):
    """A module of a kind in `KINDS`, and its sizes."""

    kind: str
    sizes: tuple[int, ...]


class Layout(NamedTuple):
    """Where the layers of a stack are.

    Attributes:
      kind: "stack", "block" (with a module around each layer), "loop", "nested" (a
        stack in a stack), "blocks" (a stack over blocks of layers) or "stages" (a loop
        over stacks).
      parts: How many blocks or stages there are, or layers in an inner stack.
      axis: The axis of the layers.
      inner: That of the inner scan of two.
    """

    kind: str
    parts: int = 1
    axis: int = 0
    inner: int = 0

    @property
    def axes(self):
        """Where the layer axes are in the end: one after the other is inserted."""
        if self.kind == "nested":
            return self.axis, self.inner + (self.inner >= self.axis)
        return () if self.kind == "loop" else (self.axis,)

    @property
    def scope(self):
        """What users call it."""
        return "layers_*" if self.kind == "stages" else "layers"

    @property
    def template(self):
        """The path of a layer."""
        inside = {"block": "/block", "nested": "/inner", "blocks": "/block_*"}
        return (
            "block_*" if self.kind == "loop" else self.scope + inside.get(self.kind, "")
        )

    def place(self, layer, depth):
        """A layer's modules, its index on the layer axes, and these axes' sizes."""
        each = depth // self.parts
        if self.kind == "loop":
            return (("block", layer),), (), ()
        if self.kind == "stack":
            return (("layers", None),), (layer,), (depth,)
        if self.kind == "block":
            return (("layers", None), ("block", 0)), (layer,), (depth,)
        if self.kind == "nested":
            index = divmod(layer, self.parts)
            return (("layers", None), ("inner", None)), index, (each, self.parts)
        if self.kind == "blocks":
            step, block = divmod(layer, self.parts)
            return (("layers", None), ("block", block)), (step,), (each,)
        stage, step = divmod(layer, each)
        return (("layers", stage),), (step,), (each,)


class Stack(NamedTuple):
    depth: int
    layer: tuple[Module, ...]
    flax: Layout
    haiku: Layout
    is_bare: bool = False  # The stack is one module, such as nn.scan(Dense).


class Model(NamedTuple):
    """Modules, one stack or two, modules.

    Attributes:
      before: Modules.
      stacks: Stacks.
      after: Modules.
      is_inside: Whether all is inside of a module.
      says_axis: Whether the user names the layer axes: "", "all" or "path".
      says_order: Whether the user says how blocks and steps take turns.
    """

    before: tuple[Module, ...]
    stacks: tuple[Stack, ...]
    after: tuple[Module, ...]
    is_inside: bool
    says_axis: str
    says_order: bool


def keep(array):
    return array


def of_kernel(*sizes):
    return [("kernel", "w", sizes, keep)]


def of_dense(i, o):
    return [*of_kernel(i, o), ("bias", "b", (o,), keep)]


def of_heads(i, h, d):
    return [
        ("kernel", "w", (i, h, d), lambda x: x.reshape(i, h * d)),
        ("bias", "b", (h, d), np.ravel),
    ]


def of_norm(*sizes):
    return [("scale", "scale", sizes, keep), ("bias", "offset", sizes, keep)]


def of_batch_norm(n):
    leaves = [("scale", "scale"), ("bias", "offset"), ("mean", "mean"), ("var", "var")]
    return [(*names, (n,), lambda x: x[None]) for names in leaves]


def of_transposed(*sizes):
    return [("kernel", "w", sizes, lambda x: x.swapaxes(-1, -2))]


# What a module is called in each tree, how many sizes it has, and its leaves: their
# names in both trees, their shape in Flax, and what becomes of them in Haiku.
KINDS = {
    "dense": ("Dense", "linear", 2, of_dense),
    "dense without bias": ("Dense", "linear", 2, of_kernel),
    "heads": ("heads", "heads", 3, of_heads),
    "heads without bias": ("heads", "heads", 3, lambda *s: of_heads(*s)[:1]),
    "conv": ("Conv", "conv1_d", 3, of_kernel),
    "conv of another name": ("taps", "taps", 3, of_kernel),
    "transposed conv": ("ConvTranspose", "conv1_d_transpose", 3, of_transposed),
    "transposed conv of another name": ("up", "up", 3, of_transposed),
    "norm": ("LayerNorm", "layer_norm", 1, of_norm),
    "norm over two axes": ("LayerNorm", "layer_norm", 2, of_norm),
    "norm of another name": ("ln", "ln", 1, lambda *s: of_norm(*s)[:1]),
    "batch norm": ("BatchNorm", "batch_norm", 1, of_batch_norm),
    "custom": ("mixer", "mixer", 2, lambda *s: [("alpha", "alpha", s, keep)]),
}
BARE = ["dense", "dense without bias", "heads", "conv of another name", "custom"]


def modules(kinds):
    return st.sampled_from(list(kinds)).flatmap(
        lambda kind: st.builds(
            Module,
            st.just(kind),
            st.tuples(*[st.sampled_from([2, 3])] * KINDS[kind][2]),
        )
    )


@st.composite
def layouts(draw, depth, axes, is_bare):
    parts = [n for n in range(2, depth) if depth % n == 0]
    kinds = ["stack", *["block", "loop"] * (not is_bare)]
    kinds += ["nested", "blocks", "stages"] * bool(parts and not is_bare)
    kind = draw(st.sampled_from(kinds))
    has_parts = kind in ("nested", "blocks", "stages")
    axis = 0 if kind == "loop" else draw(st.sampled_from(axes))
    inner = draw(st.sampled_from(axes)) if kind == "nested" else 0
    return Layout(kind, draw(st.sampled_from(parts)) if has_parts else 1, axis, inner)


@st.composite
def stacks(draw):
    depth = draw(st.sampled_from([1, 2, 2, 3, 3, 4, 4, 6, 9]))
    is_bare = draw(st.sampled_from([True, False, False]))
    kinds, most = (BARE, 1) if is_bare else (KINDS, 4)
    layer = draw(st.lists(modules(kinds), min_size=1, max_size=most))
    flax, haiku = (draw(layouts(depth, axes, is_bare)) for axes in ([0, 1, 2], [0]))
    # Who nests otherwise does not also turn the axes.
    is_turned = sorted(flax.axes) != list(flax.axes)
    hypothesis.assume(not is_turned or haiku[:2] in (flax[:2], ("stack", 1)))
    return Stack(depth, tuple(layer), flax, haiku, is_bare)


some_modules = st.lists(modules(KINDS), max_size=2).map(tuple)
models = st.builds(
    Model,
    some_modules,
    st.lists(stacks(), min_size=1, max_size=2).map(tuple),
    some_modules,
    st.booleans(),
    st.sampled_from(["", "all", "path"]),
    st.sampled_from([True, True, False]),
)


class Trees:
    """A model's variables, and its parameters and state, leaf by leaf."""

    def __init__(self, model):
        self._flax = collections.defaultdict(dict)
        self._haiku = collections.defaultdict(dict)
        counts = collections.Counter()
        inside = (("model", None),) * model.is_inside
        nowhere = (), inside, (), ()
        self._add(model.before, counts, nowhere, nowhere)
        scopes = ["encoder", "decoder"] if len(model.stacks) > 1 else [None]
        for scope, stack in zip(scopes, model.stacks, strict=True):
            around = inside if scope is None else (*inside, (scope, None))
            for i in range(stack.depth):
                places = [
                    (layout, around + place[0], *place[1:])
                    for layout in (stack.flax, stack.haiku)
                    for place in [layout.place(i, stack.depth)]
                ]
                self._add(stack.layer, collections.Counter(), *places, stack.is_bare)
        self._add(model.after, counts, nowhere, nowhere)

    def _add(self, modules, counts, flax, haiku, is_bare=False):
        """One layer of some modules, at a place in each tree."""
        for kind, sizes in modules:
            flax_name, haiku_name, _, leaves = KINDS[kind]
            number = counts[flax_name]
            counts[flax_name] += 1
            own = [((flax_name, number),), ((haiku_name, number),)]
            own = [(), ()] if is_bare else own
            flax_path = tuple(map(flax_part, flax[1] + own[0]))
            haiku_path = tuple(map(haiku_part, haiku[1] + own[1]))
            for old, new_name, shape, change in leaves(*sizes):
                value = new(*shape)
                key = (*flax_path, old)
                axes = flax[0].axes if flax[0] else ()
                self._flax[key][flax[2]] = value, flax[3], axes
                key = ("/".join(haiku_path), new_name)
                self._haiku[key][haiku[2]] = change(value), haiku[3], None

    def variables(self):
        """None if a leaf has no such axes as its layers should be on."""
        tree = {"params": {}, "batch_stats": {}}
        for path, layers in self._flax.items():
            array = on_axes(layers)
            if array is None:
                return None
            kind = "batch_stats" if path[-1] in ("mean", "var") else "params"
            node = tree[kind]
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = array
        return tree

    def params_and_state(self):
        params, state = {}, {}
        for (module, name), layers in self._haiku.items():
            array = on_axes(layers)
            if name not in ("mean", "var"):
                params.setdefault(module, {})[name] = array
                continue
            ((_, sizes, _), *_) = layers.values()
            counter = np.full(sizes, 2**30, np.int32)
            average = {"counter": counter, "hidden": array, "average": array}
            state[f"{module}/~/{name}_ema"] = average
        return params, state


def flax_part(part):
    name, number = part
    return name if number is None else f"{name}_{number}"


def haiku_part(part):
    name, number = part
    return f"{name}_{number}" if number else name


def on_axes(layers):
    """Layers by their indices, as one array; in front if no axes are named."""
    ((value, sizes, axes), *_) = layers.values()
    array = np.empty((*sizes, *value.shape), value.dtype)
    for index, (layer, _, _) in layers.items():
        array[index] = layer
    axes = range(len(sizes)) if axes is None else axes
    is_there = all(axis < array.ndim for axis in axes)
    return np.moveaxis(array, range(len(sizes)), axes) if is_there else None


def said_of(model):
    """What a user says of a model, if that can be said."""
    said = {"rename": rename_of(model)}
    order = {"blocks": True, "stages": False}
    interleave = {
        order[layout.kind]
        for stack in model.stacks
        for layout in (stack.flax, stack.haiku)
        if layout.kind in order and stack.flax[:2] != stack.haiku[:2]
    }
    if model.says_order and len(interleave) == 1:
        said["interleave"] = interleave.pop()
    axes = axes_of(model)
    if model.says_axis == "path" and axes:
        said["layer_axis"] = axes
    if model.says_axis == "all" and len(set(axes.values())) == 1:
        said["layer_axis"] = next(iter(axes.values()))
    return said


def axes_of(model):
    """The layer axes of each stack."""
    found = {}
    for around, stack in scopes_of(model):
        axis, *others = stack.flax.axes or (None,)
        if axis is not None:
            found[around + stack.flax.scope] = (axis, *others) if others else axis
    return found


def scopes_of(model):
    """Each stack, and the path around it."""
    scopes = ["encoder/", "decoder/"] if len(model.stacks) > 1 else [""]
    inside = "model/" * model.is_inside
    return [(inside + x, stack) for x, stack in zip(scopes, model.stacks, strict=True)]


def rename_of(model):
    """What the scopes of layers in Flax are in Haiku."""
    found = {}
    for around, stack in scopes_of(model):
        old, new = stack.flax.template, stack.haiku.template
        old += "_0" * (stack.flax.kind == "block")
        if {stack.flax.kind, stack.haiku.kind} == {"blocks", "stages"}:
            continue
        if "*" in old:
            new = new if "*" in new else f"{new}_*"
        else:
            new = new.replace("_*", "")
        if stack.flax.template != new:
            found[around + old] = around + new
    return found


def trees_of(model):
    """Variables, and parameters and state; None if there is no such model."""
    trees = Trees(model)
    variables = trees.variables()
    return None if variables is None else (variables, trees.params_and_state())


def test_random_models_are_right_or_refused():
    outcomes = collections.Counter()

    @over(models, MODELS)
    def check(model):
        if trees := trees_of(model):
            said = said_of(model)
            is_ported = right_or_refused(*trees, **said)
            outcomes[" and ".join(said) or "nothing", is_ported] += 1

    check()
    print_outcomes(outcomes)
    right = sum(outcomes[key] for key in outcomes if key[1])
    assert right > sum(outcomes.values()) / 3


def print_outcomes(outcomes):
    for (said, is_ported), count in sorted(outcomes.items()):
        print(f"{'right' if is_ported else 'refused'} {count} ({said} said)")


def test_what_a_refusal_proposes_is_ported():
    """Each rule that an error names, with what it names next if that is not enough."""
    outcomes = collections.Counter()

    @over(models, MODELS // 2)
    def check(model):
        if trees := trees_of(model):
            said = said_of(model)
            for row in port.plan(*types(trees), **said).rows:
                if row.status == "differs":
                    outcomes[bool(follow(trees, said, row, 0))] += 1

    check()
    assert outcomes[True] > outcomes[False]


def follow(trees, said, row, count):
    """Follows the proposals of a row, and those of what then is refused, if any."""
    proposed_rules = proposals(row.why)
    assert count < 3, row
    for proposed in proposed_rules:
        rules = with_proposal(said, proposed)
        rows = port.plan(*types(trees), **rules).rows
        again = next(other for other in rows if other.flax == row.flax)
        if again.status != "ok":
            assert follow(trees, rules, again, count + 1), (row, proposed, again)
    return proposed_rules


def test_random_models_that_differ_are_refused(monkeypatch):
    """Each tree lacks a leaf that the other has, of the same size if there is one."""
    outcomes = collections.Counter()
    monkeypatch.setattr(_plan, "_MOST_NAMED", 0)  # Nobody reads what is nearest.

    @over(st.tuples(models, st.randoms(use_true_random=False)), MODELS)
    def check(given):
        model, random = given
        said = said_of(model._replace(says_axis=""))  # Of what may be gone.
        trees = trees_of(model)
        if trees is None or not all(map(is_told_by_names, model.stacks)):
            return
        variables, pair = trees
        first, size = random.choice(leaves_of(variables))
        alike = [path for path, other in leaves_of(pair) if other == size]
        second = random.choice(alike or [path for path, _ in leaves_of(pair)])
        smaller = without(variables, first), without(pair, second)
        if port.plan(*types(smaller), **said).unused_rules:
            return  # A stack is gone, and rules speak of it.
        # It may have been the same leaf.
        outcomes[right_or_refused(*smaller, **said)] += 1
        assert not port.plan(variables, types(smaller[1]), **said).ok
        assert not port.plan(smaller[0], types(pair), **said).ok
        # What an error says to ignore is what is left over.
        found = re.search(r"ignore=(\[.*?\])", str(port.plan(*smaller, **said)))
        if found:
            rows = port.plan(*smaller, ignore=ast.literal_eval(found[1]), **said).rows
            assert not {row.status for row in rows} & {"unused", "missing"}

    check()
    assert outcomes[False] > outcomes[True]


def is_told_by_names(stack):
    """Not so if a leaf may be a layer, or all layers of it, when others are gone."""
    kinds = {stack.flax.kind, stack.haiku.kind}
    return stack.depth > 1 and kinds != {"blocks", "stages"}


def leaves_of(tree):
    return [
        (path, int(np.size(leaf))) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def without(tree, path):
    """`tree` without one leaf; and without modules that are empty then."""
    if isinstance(tree, tuple):
        return tuple(
            without(node, path[1:]) if i == path[0].idx else node
            for i, node in enumerate(tree)
        )
    key = path[0].key
    inside = {} if len(path) == 1 else without(tree[key], path[1:])
    rest = {k: v for k, v in tree.items() if k != key}
    return {**rest, key: inside} if inside or key == "params" else rest
