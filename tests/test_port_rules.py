"""Rules for several leaves, rules that count, and names that both trees have."""

import ast
import re

import jax
import numpy as np
import pytest
from agreement import assert_equal
from port_trees import assert_proposals_lead_on, new, right_or_refused, types

import hk_stack
from hk_stack import checkpoint, port


def ports(flax, haiku, **said):
    """Whether it is right both ways; `params` are given as a dict of them."""
    return right_or_refused({"params": flax}, (haiku, {}), **said)


def refused(flax, haiku, **said):
    """The error's text."""
    with pytest.raises(ValueError) as error:
        hk_stack.flax_to_haiku({"params": flax}, types((haiku, {})), **said)
    return str(error.value)


def kernels(*shape, names):
    """Modules of one kernel each, in either tree."""
    values = {name: new(*shape) for name in names}
    flax = {name: {"kernel": value} for name, value in values.items()}
    return flax, {name: {"w": value} for name, value in values.items()}


# Names that both trees have match first


def test_an_output_of_attention_may_be_called_the_same_in_both():
    names = ("query", "key", "value", "out")
    flax, haiku = kernels(4, 4, names=names)
    assert ports(flax, haiku)
    of_haiku = {"linear" if name == "out" else name: haiku[name] for name in haiku}
    assert ports(flax, of_haiku)
    head = new(4, 4)
    flax = {"attention": flax, "out": {"kernel": head}}
    inside = {f"attention/{name}": x for name, x in of_haiku.items()}
    assert ports(flax, {**inside, "out": {"w": head}})


def test_names_that_are_spelt_alike_in_both_trees_are_not_translated():
    leaves = {"b": new(3), "offset": new(3)}
    assert ports({"mixer": leaves}, {"mixer": leaves})
    flax, haiku = kernels(3, 3, names=("Dense_0", "linear", "DenseGeneral_0"))
    assert ports(flax, haiku)
    text = refused(flax, {**haiku, "linear_1": haiku["linear"]})
    assert "params/linear_1/w" in text


def test_a_state_of_nnx_that_was_saved_is_loaded(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    like = {"linear": {"w": np.zeros([3, 4], "f"), "b": np.zeros([4], "f")}}, {}
    expected = hk_stack.flax_to_haiku({"linear": nnx.state(model)}, like)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, {"linear": nnx.state(model)})
    loaded = checkpoint.load(path)
    assert_equal(hk_stack.flax_to_haiku(loaded, like), expected)
    boxed = jax.tree.map(lambda x: {"value": x}, nnx.to_pure_dict(nnx.state(model)))
    boxed = {"linear": boxed}
    assert_equal(hk_stack.flax_to_haiku(boxed, like), expected)
    assert_equal(hk_stack.haiku_to_flax(expected, boxed), boxed)
    value = {"gain": {"value": new(3)}}
    assert ports(value, value)  # A parameter of this name.


# Rules that count


def test_layers_that_are_counted_from_one():
    flax, haiku = kernels(3, 4, names=[f"block_{i}" for i in range(4)])
    renamed = {"first": haiku["block_0"]}
    for i in range(3):
        renamed[f"rest_{i}" if i else "rest"] = haiku[f"block_{i + 1}"]
    rename = {"block_0": "first", "block_{i+1}": "rest_{i}"}
    assert ports(flax, renamed, rename=rename)
    assert ports(flax, renamed, rename={**rename, "block_*": "first"})
    back = {"block_{i}": "rest_{i-1}", "block_0": "first"}
    assert ports(flax, renamed, rename=back)
    text = refused(flax, renamed, rename={"block_0": "first", "block_*": "rest_*"})
    assert 'Say rename={"block_{i+1}": "rest_{i}"}' in text


@pytest.mark.parametrize("names", [["h/{}"], ["h_{}", "g_{}"]])
def test_loops_that_begin_elsewhere_are_counted_anew(names):
    """By the rule that the error proposes."""
    flax, haiku = {}, {}
    for name in names:
        for i in range(3):
            value = new(3, 4)
            node = flax
            for part in name.format(i + 5).split("/"):
                node = node.setdefault(part, {})
            node["Dense_0"] = {"kernel": value}
            module = name.format(i).replace("h/", "h_").replace("_0", "")
            haiku[f"{module}/linear"] = {"w": value}
    text = refused(flax, haiku)
    rename = {}
    for found in re.findall(r"Say rename=(.*)$", text, re.M):
        rename |= ast.literal_eval(found)
    assert ports(flax, haiku, rename=rename)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"block_{i}": "rest_{j}"}, "has {j}, the path in Flax"),
        ({"block_{i}": "rest_{i-1}"}, "gives the number -1"),
        ({"block_{i+9}": "rest_{i}"}, "beginning of no leaf's path"),
    ],
)
def test_mistakes_in_counting(rename, message):
    flax, haiku = kernels(3, 4, names=["block_0", "block_1"])
    assert message in refused(flax, haiku, rename=rename)


# Transposed kernels


def test_one_transposed_kernel_makes_every_square_one_doubtful():
    turned, square, wide = new(4, 6), new(4, 4), new(4, 6)
    flax = {"a": {"kernel": turned}, "b": {"kernel": square}, "c": {"kernel": wide}}
    haiku = {"a": {"w": turned.T}, "b": {"w": square}, "c": {"w": wide}}
    text = refused(flax, haiku)
    assert 'Say leaf={"a/kernel": hk_stack.port.TRANSPOSED}' in text
    assert 'Say leaf={"b/kernel": hk_stack.port.SAME}; or ' in text
    assert "All that is to be said" in text
    rules = {"a": port.TRANSPOSED}
    text = refused(flax, haiku, leaf=rules)
    assert "it is square" in text and "params/c" not in text
    assert ports(flax, haiku, leaf={**rules, "b": port.SAME})
    of_both = {**haiku, "b": {"w": square.T}}
    assert ports(flax, of_both, leaf={**rules, "b": port.TRANSPOSED})
    assert_proposals_lead_on({"params": flax}, types((haiku, {})), {})
    assert ports({"b": flax["b"]}, {"b": haiku["b"]})


# What is ignored keeps its value


def test_what_is_ignored_needs_a_value():
    flax, haiku = kernels(3, 4, names=["a", "b"])
    del flax["b"]
    said = {"ignore": ["b"]}
    ported, _ = hk_stack.flax_to_haiku({"params": flax}, (haiku, {}), **said)
    assert ported["b"]["w"] is haiku["b"]["w"]
    assert "params/b/w is ignored, and `like` has no value" in refused(
        flax, haiku, **said
    )


# Several leaves


def fused(axis, sizes=(4, 4, 4), around="", depth=None):
    """Queries, keys and values as one array in one tree, and as three."""
    front = () if depth is None else (depth,)
    parts = {
        name: {
            "kernel": new(*front, *((size, 4) if axis == 0 else (4, size))),
            "bias": new(*front, size),
        }
        for name, size in zip(("query", "key", "value"), sizes, strict=True)
    }
    axes = {"kernel": axis - 2 if axis == 0 else -1, "bias": -1}
    whole = {
        leaf: np.concatenate([part[leaf] for part in parts.values()], at)
        for leaf, at in axes.items()
    }
    return whole, parts


def in_haiku(modules, around=""):
    return {
        around + name: {"w": leaves["kernel"], "b": leaves["bias"]}
        for name, leaves in modules.items()
    }


@pytest.mark.parametrize("sizes", [(4, 4, 4), (8, 2, 2)])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("depth", [None, 3])
def test_one_leaf_is_several_and_several_are_one(axis, sizes, depth):
    whole, parts = fused(axis, sizes, depth=depth)
    names = ("query", "key", "value")
    split = port.split(*names, axis=axis, sizes=() if sizes[0] == 4 else (4, 1, 1))
    rules = {"leaf": {"h/attn/c_attn": split}}
    if depth:
        rules["layer_axis"] = 0
    flax = {"h": {"attn": {"c_attn": whole}}}
    assert ports(flax, in_haiku(parts, "h/attn/"), **rules)
    rules["leaf"] = {"h/attn/c_attn": port.fuse(*names, axis=axis)}
    one = in_haiku({"c_attn": whole}, "h/attn/")
    assert ports({"h": {"attn": parts}}, one, **rules)


def test_layers_are_split_by_name():
    """In numbered layers, with names and transposes beside; a stack in Haiku."""
    flax, haiku = {}, {}
    for i in range(3):
        whole, parts = fused(0)
        flax[str(i)] = {"c_attn": whole}
        for name, leaves in parts.items():
            haiku.setdefault(f"h/{name[0]}", []).append(
                {"w": leaves["kernel"].T, "b": leaves["bias"]}
            )
    haiku = {n: jax.tree.map(lambda *x: np.stack(x), *v) for n, v in haiku.items()}
    leaf = {
        "h/*/c_attn": port.split("q", "k", "v", axis=0),
        "h/*/*/kernel": port.TRANSPOSED,
    }
    assert ports({"h": flax}, haiku, leaf=leaf)
    assert (
        "h/0/q" in str(port.plan({"params": {"h": flax}}, (haiku, {}), leaf=leaf)) or 1
    )
    assert "does not fit: part 1 of 5" in refused(
        {"h": flax},
        {**haiku, "h/x": haiku["h/q"], "h/y": haiku["h/q"]},
        leaf={"h/*/c_attn": port.split("q", "k", "v", "x", "y", axis=0)},
    )


def test_a_part_that_is_ignored_stays_as_it_is():
    whole, parts = fused(-1)
    flax, haiku = {"c_attn": whole}, in_haiku(parts)
    del haiku["value"]
    said = {"leaf": {"c_attn": port.split("query", "key", "value", axis=-1)}}
    assert "params/c_attn/kernel float32[4,12] (part 3 of 3" in refused(
        flax, haiku, **said
    )
    said["ignore"] = ["value"]
    like = {"params": {"c_attn": jax.tree.map(np.zeros_like, whole)}}
    back = hk_stack.haiku_to_flax((haiku, {}), like, **said)
    assert np.array_equal(back["params"]["c_attn"]["bias"][:8], whole["bias"][:8])
    assert not back["params"]["c_attn"]["bias"][8:].any()
    with pytest.raises(ValueError, match="c_attn/bias is ignored, and `like`"):
        hk_stack.haiku_to_flax((haiku, {}), types(like), **said)


def test_tied_leaves():
    table = new(5, 3)
    flax = {"wte": {"embedding": table}}
    haiku = {"wte": {"embeddings": table}, "head": {"w": table.T}}
    said = {"leaf": {"wte/embedding": port.tie("head/kernel", transposed=True)}}
    assert ports(flax, haiku, **said)
    changed = {**haiku, "head": {"w": table.T + 1}}
    with pytest.raises(ValueError, match="they are tied, but"):
        hk_stack.haiku_to_flax((changed, {}), {"params": flax}, **said)
    both = {**flax, "head": {"kernel": table.T}}
    one = {"wte": haiku["wte"]}
    assert ports(both, one, **said)
    both["head"]["kernel"] = table.T + 1
    with pytest.raises(ValueError, match="they are tied, but"):
        hk_stack.flax_to_haiku({"params": both}, (one, {}), **said)


def test_axes_in_another_order_and_fewer():
    heads = new(2, 3, 4)  # [heads, D, K]
    flax = {"q": {"w": heads}}
    turned = heads.transpose(1, 0, 2)
    said = {"leaf": {"q": port.transpose(1, 0, 2)}}
    for haiku in (turned, turned.reshape(3, 8)):
        assert ports(flax, {"q": {"w": haiku}}, **said)
    for shape in ((6, 4, 1), (24, 1)):
        assert "makes [3, 2, 4]" in refused(flax, {"q": {"w": new(*shape)}}, **said)
    assert port.transpose(1, 0) == port.TRANSPOSED


def test_rules_are_values():
    def rules():
        yield port.split("a", "b", axis=0)
        yield port.fuse("a", "b", axis=0)
        yield port.tie("a")

    assert len({*rules(), *rules()}) == 3


def test_vocabularies_of_other_lengths():
    table = new(5, 3)
    padded = np.concatenate([table, np.zeros([2, 3], "f")])
    flax, haiku = {"wte": {"embedding": table}}, {"wte": {"embeddings": padded}}
    assert ports(flax, haiku, leaf={"wte": port.pad_vocab(5, 7)})
    flax, haiku = {"wte": {"embedding": padded}}, {"wte": {"embeddings": table}}
    said = {"leaf": {"wte": port.pad_vocab(7, 5)}}
    assert ports(flax, haiku, **said)
    flax["wte"]["embedding"] = padded + 1
    with pytest.raises(ValueError, match="tokens from 5 on are not zero"):
        hk_stack.flax_to_haiku({"params": flax}, (haiku, {}), **said)
    rules = {"": port.pad_vocab(6, 5)}
    assert "has not the 6 tokens" in refused(flax, haiku, leaf=rules)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: port.split("a", axis=0), "expected several names"),
        (lambda: port.split("a", "a", axis=0), "expected several names"),
        (lambda: port.split("a", 1, axis=0), "expected names of modules"),
        (lambda: port.split("a", "b", axis=0.5), "axis must be an integer"),
        (lambda: port.split("a", "b", axis=0, sizes=(1,)), "sizes must be 2"),
        (lambda: port.fuse("a", axis=0), "expected several names"),
        (lambda: port.tie(1), "expected the path of a leaf"),
        (lambda: port.transpose(0, 2), "expected 0 to 1"),
        (lambda: port.pad_vocab(0, 2), "expected sizes"),
    ],
)
def test_mistakes_in_rules(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ({"c": port.split("a", "x", axis=0)}, "which Flax has already"),
        ({"x": port.split("y", "z", axis=0)}, "beginning of no leaf's path"),
        ({"x": port.fuse("a", "z", axis=0)}, "no module has all of a, z"),
        ({"x": port.fuse("*", "y", "z", axis=0)}, "has all of *, y, z"),
        ({"*": port.tie("x")}, "there are 0 of this path"),
    ],
)
def test_rules_for_several_leaves_that_fit_none(leaf, message):
    flax, haiku = kernels(3, 4, names=["a", "b", "c"])
    assert message in refused(flax, haiku, leaf=leaf)
