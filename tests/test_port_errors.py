"""What cannot be ported for certain is refused, and the error says what to write.

All trees here are made by hand, with another value in every element of every leaf: so
whatever is ported can be compared with what is right.
"""

import ast
import io
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_equal
from port_trees import (
    assert_proposals_lead_on,
    new,
    proposals,
    right_or_refused,
    types,
)

import hk_stack
from hk_stack import port


def dense(*shape, bias=True, **options):
    leaves = {"kernel": new(*shape, **options)}
    return leaves | ({"bias": new(*shape[:-2], shape[-1], **options)} if bias else {})


def linear(*shape, bias=True, **options):
    leaves = {"w": new(*shape, **options)}
    return leaves | ({"b": new(*shape[:-2], shape[-1], **options)} if bias else {})


def layers(make, *shape, names="block_{}", numbers=range(4), **options):
    return {names.format(i): make(*shape, **options) for i in numbers}


# Mistakes: two trees that are not the same, what the user says, and what errors say.
# A tree is written as paths and shapes; a module alone is a kernel and a bias.

_LEAF = "kernel bias scale offset alpha mean var index peephole w b"


def tree(text, dtype=np.float32):
    """Leaves by their paths: `"a/{0,1} 3,4; norm/scale 4"`."""
    found = {}
    for entry in filter(None, text.split("; ")):
        path, _, sizes = entry.partition(" ")
        shape = tuple(map(int, sizes.split(",")))
        before, _, rest = path.partition("{")
        numbers, _, after = rest.partition("}")
        for number in numbers.split(","):
            name = before + number + after
            if name.split("/")[-1] in _LEAF.split():
                found[name] = new(*shape, dtype=dtype)
            else:
                found[f"{name}/kernel"] = new(*shape, dtype=dtype)
                found[f"{name}/bias"] = new(*shape[:-2], shape[-1], dtype=dtype)
    return found


def flax(text, **options):
    """`params` as nested dicts."""
    nested = {}
    for path, leaf in tree(text, **options).items():
        *modules, name = path.split("/")
        node = nested
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf
    return nested


def haiku(text, **options):
    """Parameters by module, in Haiku's names of leaves; number 0 is left out."""
    modules = {}
    for path, leaf in tree(text, **options).items():
        module, _, name = path.rpartition("/")
        module = "/".join(part.removesuffix("_0") for part in module.split("/"))
        name = {"kernel": "w", "bias": "b"}.get(name, name)
        modules.setdefault(module, {})[name] = leaf
    return modules


class Mistake(NamedTuple):
    """Parameters, or all variables; parameters, or a pair; parts of messages; rules."""

    flax: Any
    haiku: Any
    texts: tuple[str, ...]
    rules: dict[str, Any] = {}  # noqa: RUF012, never changed

    def trees(self):
        given = flax(self.flax) if isinstance(self.flax, str) else self.flax
        other = haiku(self.haiku) if isinstance(self.haiku, str) else self.haiku
        given = given if "params" in given else {"params": given}
        return given, other if isinstance(other, tuple) else (other, {})


LSTM = "LSTMCell_0/i{i,f,g,o}/kernel 3,4; LSTMCell_0/h{i,f,g,o} 4,4"
HALF = {"kernel": new(4, 4, dtype=np.float16), "bias": new(4, dtype=np.float16)}
HAIKU_LSTM = "lstm/linear 7,16"
GRU = "GRUCell_0/i{r,z,n} 3,4; GRUCell_0/h{r,z}/kernel 4,4; GRUCell_0/hn 4,4"
HAIKU_GRU = {"gru": {"w_i": new(3, 12), "w_h": new(4, 12), "b": new(12)}}
NORM = flax("BatchNorm_0/{scale,bias} 4")
HAIKU_NORM = haiku("batch_norm/{scale,offset} 1,4")
MEAN_AND_VAR = flax("BatchNorm_0/{mean,var} 4")
STATISTICS = {"params": NORM, "batch_stats": MEAN_AND_VAR}


def statistics(shape=(4,), **more):
    average = {"average": new(1, *shape), "hidden": new(1, *shape)}
    average |= {"counter": np.int32(1)}
    return {f"batch_norm/~/{m}_ema": {**average, **more} for m in ("mean", "var")}


MISTAKES = {
    # Names
    "other names": Mistake(
        "Dense_0 3,4; head 5,6",
        "linear 3,4; logits 5,6",
        (
            "in Flax only (2)",
            "params/head/kernel float32[5,6]: nearest are params/logits/w float32[5,6]",
            "in Haiku only (2)",
            "params/logits/b float32[6]: nearest are params/head/bias float32[6]",
            'rename={"head": "logits"}',
        ),
    ),
    "more in Flax": Mistake(
        "Dense_{0,1} 3,4", "linear 3,4", ("in Flax only (2)", "params/Dense_1/kernel")
    ),
    "more leaves in a module": Mistake(
        "Dense_0 3,4", "linear/w 3,4", ("in Flax only (1)", "params/Dense_0/bias")
    ),
    "nothing in Haiku": Mistake("Dense_0 3,4", "", ("params/Dense_0/kernel",)),
    "nothing in Flax": Mistake("", "linear 3,4", ("params/linear/w float32[3,4]",)),
    "none where a leaf is wanted": Mistake(
        {"Dense_0": {"kernel": None}}, "linear/w 3,4", ("in Haiku only (1)",)
    ),
    "two of one name": Mistake(
        "Dense_0 3,3; DenseGeneral_0 3,3",
        "linear_{0,1} 3,3",
        (
            "params/Dense_0/kernel float32[3,3]: params/DenseGeneral_0/kernel",
            "would have its name in Haiku too, linear/w; rename one of them",
            "params/linear_1/w float32[3,3]",
        ),
    ),
    "two of one name by renaming": Mistake(
        "Dense_{0,1} 3,3",
        "linear_{0,1} 3,3",
        ("params/Dense_0/kernel", "params/Dense_1/kernel", "rename one of them"),
        {"rename": {"Dense_0": "linear_1"}},
    ),
    "statistics twice": Mistake(
        {**STATISTICS, "averages": MEAN_AND_VAR},
        (HAIKU_NORM, statistics()),
        ("batch_stats/BatchNorm_0/mean float32[4]: averages/BatchNorm_0/mean",),
    ),
    "no statistics": Mistake(
        NORM,
        (HAIKU_NORM, statistics()),
        ("in Haiku only (2)", "state/batch_norm/~/mean_ema/{", "parameters only"),
    ),
    "no place for statistics": Mistake(
        STATISTICS,
        HAIKU_NORM,
        ("in Flax only (2)", "batch_stats/BatchNorm_0/var", "give (params, state)"),
    ),
    "statistics among parameters": Mistake(
        "BatchNorm_0/{scale,bias,mean} 4",
        (HAIKU_NORM, statistics()),
        ("params/BatchNorm_0/mean float32[4]", "state/batch_norm/~/mean_ema/{"),
    ),
    "another collection": Mistake(
        {"params": flax("Dense_0 3,4"), "cache": flax("Dense_0/index 2")},
        "linear 3,4",
        ("in Flax only (1)", "cache/Dense_0/index float32[2]"),
    ),
    # The same names, with something else in them
    "bias of another norm": Mistake(
        "LayerNorm_{0,1}/scale 4; LayerNorm_0/bias 4",
        "layer_norm_{0,1}/scale 4; layer_norm_1/offset 4",
        ("params/LayerNorm_0/bias float32[4]", "params/layer_norm_1/offset float32[4]"),
    ),
    "bias of another layer": Mistake(
        "Dense_{0,1,2}/kernel 4,4; Dense_{0,1}/bias 4",
        "linear_{0,1,2}/w 4,4; linear_{0,2}/b 4",
        ("in Flax only", "params/Dense_1/bias", "in Haiku only", "params/linear_2/b"),
    ),
    "layers in another alternation": Mistake(
        "block_{0,1,2,3}/attention 4,4; block_{0,2}/mlp 4,5; block_{1,3}/moe 4,5",
        "block_{0,1,2,3}/attention 4,4; block_{0,1}/mlp 4,5; block_{2,3}/moe 4,5",
        (
            "params/block_2/mlp/kernel float32[4,5]",
            "params/block_1/moe/bias float32[5]",
            "params/block_1/mlp/w float32[4,5]",
            "params/block_2/moe/b float32[5]",
        ),
    ),
    "another model beside the same": Mistake(
        "{generator,critic}/layers/Dense_0 3,4,5",
        "{generator,ema_generator}/layers/linear 3,4,5",
        ("params/critic/layers/Dense_0/kernel", "params/ema_generator/layers/linear/w"),
    ),
    "query and key": Mistake("query 4,4", "key 4,4", ("params/query/kernel",)),
    # Shapes
    "other size": Mistake(
        "Dense_0 3,4",
        "linear 3,5",
        (
            "params/Dense_0/kernel float32[3,4] -> params/linear/w float32[3,5]",
            "shape [3, 4] in Flax, [3, 5] in Haiku; axis 1 is 4, not 5",
            "params/Dense_0/bias float32[4] -> params/linear/b float32[5]",
        ),
    ),
    "transposed": Mistake(
        "Dense_0/kernel 3,4",
        "linear/w 4,3",
        ("axis 0 is 3, not 4; axis 1 is 4, not 3",),
    ),
    "other heads": Mistake(
        "query/kernel 6,2,4", "query/w 6,9", ("float32[6,2,4] -> params/query/w",)
    ),
    "other rank": Mistake(
        "mixer/alpha 3,4", "mixer/alpha 12", ("shape [3, 4] in Flax, [12] in Haiku",)
    ),
    "heads and an axis of size one": Mistake(
        "query/kernel 4,4,2",
        "query/w 32,1",
        ("shape [4, 4, 2] in Flax, [32, 1] in Haiku",),
    ),
    "numbered leaves of other ranks": Mistake(
        "block_0/kernel 4,2,3; block_1/kernel 6,4",
        "block/w 2,6,4",
        ("shape [4, 2, 3] in Flax, [2, 6, 4] in Haiku, with 2 numbered leaves",),
    ),
    "convolution of another direction": Mistake(
        "Conv_0 3,4,5", "conv1_d/w 3,5,4; conv1_d/b 5", ("axis 1 is 4, not 5",)
    ),
    "transposed convolution of another name": Mistake(
        "up/kernel 3,3,4,5",
        "up/w 3,3,5,4",
        ("params/up/kernel", 'leaf={"up/kernel": hk_stack.port.TRANSPOSED}'),
    ),
    **{
        f"convolution or not, {name} {shape}": Mistake(
            f"{name}/kernel {shape}; {name}/bias 4",
            f"{name}/w {shape}; {name}/b 4",
            (
                f"params/{name}/kernel",
                f'leaf={{"{name}/kernel": hk_stack.port.SAME}}',
                "hk_stack.port.TRANSPOSED",
            ),
        )
        for name, shape in (
            ("up", "3,4,4"),
            ("conv_up", "3,3,4,4"),
            ("upconv", "3,4,4"),
        )
    },
    # Dtypes
    "other dtype": Mistake(
        flax("Dense_0 3,4", dtype=np.float64),
        "linear 3,4",
        (
            "params/Dense_0/kernel float64[3,4] -> params/linear/w float32[3,4]",
            "float64 in Flax, float32 in Haiku",
            "cast=True",
        ),
    ),
    "other dtype in one layer": Mistake(
        {**flax("block_{0,2,3} 3,4"), **flax("block_1 3,4", dtype=np.float64)},
        "block 4,3,4",
        ("params/block_0/kernel", "params/block/w float32[4,3,4]", "float64"),
    ),
    "other dtype in one gate": Mistake(
        {"LSTMCell_0": {**flax(LSTM)["LSTMCell_0"], "hg": HALF}},
        HAIKU_LSTM,
        ("LSTMCell_0", "float16"),
    ),
    "no integer in one layer": Mistake(
        {**flax("block_{0,2,3} 3,4"), **flax("block_1 3,4", dtype=np.int32)},
        "block 4,3,4",
        ("params/block_0/kernel", "int32"),
        {"cast": True},
    ),
    "no integers": Mistake(
        "Dense_0 3,4",
        haiku("linear 3,4", dtype=np.int32),
        ("params/linear/w int32[3,4]", "float32 in Flax, int32 in Haiku"),
        {"cast": True},
    ),
    # Layers
    "a layer is missing": Mistake(
        "block_{0,1,3} 3,4",
        "block 4,3,4",
        ("params/block_0/kernel float32[3,4]", "has the numbers 0, 1, 3, not 2"),
    ),
    "a layer is missing in a loop": Mistake(
        "block_{0,1,3} 3,4", "block_{0,1,2,3} 3,4", ("params/block_2/w float32[3,4]",)
    ),
    "a module of a layer is missing": Mistake(
        "block_{0,1,2,3}/Dense_0 3,4; block_{0,1,3}/Dense_1 4,3",
        "block/linear 4,3,4; block/linear_1 4,4,3",
        ("params/block_0/Dense_1/kernel", "block_*/Dense_1/kernel has the numbers"),
    ),
    "fewer layers": Mistake(
        "layers/Dense_0 4,3,5", "layers/linear 6,3,5", ("axis 0 is 4, not 6",)
    ),
    "fewer layers in a loop": Mistake(
        "block_{0,1,2,3} 3,5", "block 6,3,5", ("4 numbered leaves in Flax",)
    ),
    "more layers in a loop": Mistake(
        "block_{0,1,2,3,4} 3,5",
        "block_{0,1,2,3} 3,5",
        ("in Flax only (2)", "params/block_4/kernel float32[3,5]"),
    ),
    "one layer is larger": Mistake(
        "block_{0,1,3} 3,4; block_2 3,5",
        "block 4,3,4",
        ("params/block_0/kernel float32[3,4]", "params/block/w float32[4,3,4]"),
    ),
    "layers on which axis": Mistake(
        "layers/Dense_0 4,4,4",
        "layers/linear 4,4,4",
        (
            'layer_axis={"layers/Dense_0": (0,)}; or layer_axis={"layers/Dense_0": (1',
            'variable_axes={"params": ',
        ),
    ),
    "layers on an axis that there is not": Mistake(
        "layers/Dense_0/kernel 4,3,5",
        "layers/linear/w 3,4,5",
        ("params/layers/Dense_0/kernel float32[4,3,5]", "params/layers/linear/w"),
        {"layer_axis": {"layers": 2}},
    ),
    "layers both numbered and on an axis": Mistake(
        "layers/Block_{0,1} 2,3,4",
        "layers/block 4,3,4",
        ("params/layers/Block_0/kernel float32[2,3,4]", "interleave=True", "False"),
    ),
    **{
        f"scan over blocks, loop over stacks, {said}": Mistake(
            "layers/Block_{0,1} 2,3,4",
            "layers_{0,1}/block 2,3,4",
            ("params/layers/Block_0/kernel", "params/layers/block/w"),
            said,
        )
        for said in ({}, {"interleave": True}, {"interleave": False})
    },
    **{
        f"scan in a scan, scan over blocks, {said}": Mistake(
            "layers/inner/Dense_0 3,2,4,5",
            "layers/block_{0,1,2}/linear 2,4,5",
            ("params/layers/inner/Dense_0/kernel", "params/layers/block/linear/w"),
            said,
        )
        for said in ({}, {"interleave": True, "layer_axis": 0})
    },
    "stacks nested otherwise": Mistake(
        "layers/inner/Dense_0 3,2,4,5",
        "layers/inner/linear 2,3,4,5",
        ("params/layers/inner/Dense_0/kernel", "params/layers/inner/linear/w"),
    ),
    "blocks nested otherwise": Mistake(
        "layers/block_{0,1}/kernel 3,3,3",
        "layers/inner/w 2,3,3,3",
        ("params/layers/block_0/kernel", "params/layers/inner/w"),
        {
            "interleave": True,
            "layer_axis": {"layers": 1},
            "rename": {"layers/block_*": "layers/inner_*"},
        },
    ),
    # Recurrent cells
    "a norm in an LSTM": Mistake(
        f"{LSTM}; LSTMCell_0/ln/scale 4", HAIKU_LSTM, ("LSTMCell_0/ln/scale",)
    ),
    "input biases of an LSTM": Mistake(
        f"{LSTM}; LSTMCell_0/i{{i,f,g,o}}/bias 4", HAIKU_LSTM, ("LSTMCell_0/ii/bias",)
    ),
    "a fused GRU to one of Haiku": Mistake(
        "gru/dense_i 3,12; gru/dense_h/kernel 4,12",
        HAIKU_GRU,
        ("params/gru/dense_i/bias float32[12]", "hk_stack.port.GRU"),
    ),
    "an LSTM without a bias": Mistake(
        "LSTMCell_0/i{i,f,g,o}/kernel 3,4; LSTMCell_0/h{i,g,o} 4,4; "
        "LSTMCell_0/hf/kernel 4,4",
        HAIKU_LSTM,
        ("LSTMCell_0", "hi/bias float32[4]", "params/lstm/linear/b float32[16]"),
    ),
    "an LSTM without a gate": Mistake(
        "LSTMCell_0/i{i,f,o}/kernel 3,4; LSTMCell_0/h{i,f,g,o} 4,4",
        HAIKU_LSTM,
        ("LSTMCell_0/hg/kernel float32[4,4]", "params/lstm/linear/w float32[7,16]"),
    ),
    "an LSTM with gates of other widths": Mistake(
        "LSTMCell_0/i{i,f}/kernel 3,4; LSTMCell_0/ig/kernel 3,5; "
        "LSTMCell_0/io/kernel 3,3; LSTMCell_0/h{i,f} 4,4; LSTMCell_0/hg 4,5; "
        "LSTMCell_0/ho 4,3",
        HAIKU_LSTM,
        ("LSTMCell_0", "float32[3,5]"),
    ),
    "an LSTM of another width": Mistake(
        LSTM, "lstm/linear 8,20", ("LSTMCell_0", "axis 0 is 7, not 8")
    ),
    "a GRU of Haiku": Mistake(
        GRU, HAIKU_GRU, ("GRUCell_0", "params/gru/b float32[12]", "hk_stack.port.GRU")
    ),
    # Moving averages
    "a moving average of two shapes": Mistake(
        STATISTICS,
        (HAIKU_NORM, statistics(hidden=new(1, 5))),
        ("state/batch_norm/~/mean_ema", "float32[1,5]"),
    ),
    "a moving average of two dtypes": Mistake(
        STATISTICS,
        (HAIKU_NORM, statistics(hidden=new(1, 4, dtype=np.float16))),
        ("state/batch_norm/~/mean_ema", "float16"),
    ),
    "a moving average with more in it": Mistake(
        STATISTICS,
        (HAIKU_NORM, statistics(median=new(1, 4))),
        ("state/batch_norm/~/mean_ema/median float32[1,4]",),
    ),
    # Rules
    **{
        f"{argument} for nothing": Mistake(
            "encoder 3,4",
            "encoder 3,4",
            (argument, f"'{typo}'", "no leaf", "encoder/"),
            {argument: {typo: value} if value is not None else [typo]},
        )
        for argument, typo, value in [
            ("rename", "encodr", "encoder"),
            ("leaf", "encoder/kernell", port.SAME),
            ("ignore", "encoderr", None),
            ("layer_axis", "encodder", 1),
        ]
    },
    **{
        f"stars in {old} only": Mistake(
            "block_0 3,4",
            "layer 3,4",
            (f"'{new_}'", "'*'", "0", "1"),
            {"rename": {old: new_}},
        )
        for old, new_ in (("block_*", "layer"), ("block_0", "layer_*"))
    },
    "a leaf rule with a wrong shape": Mistake(
        "up/kernel 3,4",
        "up/w 3,4",
        ("params/up/kernel float32[3,4] -> params/up/w", "leaf=", "[2, 4]"),
        {"leaf": {"up": (lambda x: x[:2], lambda x: x)}},
    ),
    "a leaf rule that raises": Mistake(
        "up/kernel 3,4",
        "up/w 3,4",
        ("params/up/kernel float32[3,4]", "leaf=", "no such thing"),
        {"leaf": {"up": (lambda x: {}["no such thing"], lambda x: x)}},
    ),
    "rules for some layers only": Mistake(
        "block_{0,1,2} 3,3",
        "block 3,3,3",
        ("layer_axis= are not the same for all layers", '"block_*"'),
        {"layer_axis": {"block_0": ()}},
    ),
}

every_mistake = pytest.mark.parametrize("name", MISTAKES)


@every_mistake
def test_a_mistake(name):
    """Errors both ways and a plan say so; with `strict=False` the rest is ported."""
    theirs, ours = MISTAKES[name].trees()
    texts, rules = MISTAKES[name].texts, MISTAKES[name].rules
    calls = [
        lambda **more: hk_stack.flax_to_haiku(theirs, types(ours), **rules, **more),
        lambda **more: hk_stack.haiku_to_flax(ours, types(theirs), **rules, **more),
    ]
    said = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
        if " for nothing" in name or "stars" in name:
            with pytest.raises(ValueError):
                call(strict=False)
    if "stars" not in name:
        found = port.plan(theirs, types(ours), **rules)
        said.append(str(found))
        assert not found.ok
    for text in texts:
        assert all(text in message for message in said)
    if not (" for nothing" in name or "stars" in name):
        assert_rest_is_ported(theirs, ours, rules)


def all_that_errors_say():
    """Trees that are refused in this file, and rules with which they are."""
    for name, mistake in MISTAKES.items():
        if not (" for nothing" in name or "stars" in name):
            yield name, *mistake.trees(), mistake.rules
    for name, riddle in RIDDLES.items():
        for said in ({}, riddle.said):
            trees = {"params": riddle.flax}, (riddle.haiku, {})
            yield f"{name}, {said}", *trees, {**riddle.given, **said}


def test_what_an_error_proposes_leads_on():
    """Every proposal of every error, and of what is refused then."""
    count = 0
    for _, theirs, ours, said in all_that_errors_say():
        count += len(proposals(str(port.plan(types(theirs), types(ours), **said))))
        assert_proposals_lead_on(types(theirs), types(ours), said)
    assert count > 150


def assert_rest_is_ported(flax, haiku, rules):
    """Each leaf is new or as it was, and the rest is listed."""
    flax = {**flax, "params": {**flax["params"], "good": dense(2, 3)}}
    haiku = {**haiku[0], "good": linear(2, 3)}, haiku[1]
    ported, rows = hk_stack.flax_to_haiku(flax, haiku, strict=False, **rules)
    back, same = hk_stack.haiku_to_flax(haiku, flax, strict=False, **rules)
    good = flax["params"]["good"]
    np.testing.assert_array_equal(ported[0]["good"]["w"], good["kernel"])
    np.testing.assert_array_equal(back["params"]["good"]["bias"], haiku[0]["good"]["b"])
    assert rows and same == rows
    assert all(row.status not in ("ok", "ignored") for row in rows)
    assert_untouched_or_listed(ported, haiku, [row.haiku for row in rows])
    assert_untouched_or_listed(back, flax, [row.flax for row in rows])


def assert_untouched_or_listed(found, like, listed):
    """Leaves are either new arrays, or the very ones of `like` and in the list."""
    without_numbers = re.sub(r"_\d+", "", " ".join(listed))
    for (path, leaf), old in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(like), strict=True
    ):
        module = str(path[-2].key).split("/")[-1]
        is_listed = re.sub(r"_\d+", "", module) in without_numbers
        assert leaf is not old or is_listed


# Types


def test_the_source_has_values():
    flax, haiku = {"params": {"Dense_0": dense(3, 4)}}, ({"linear": linear(3, 4)}, {})
    with pytest.raises(TypeError, match=r"params/Dense_0/bias is a jax\.Shape"):
        hk_stack.flax_to_haiku(types(flax), haiku)
    with pytest.raises(TypeError, match=r"params/linear/b is a jax\.Shape"):
        hk_stack.haiku_to_flax(types(haiku), flax)


GOOD = {"params": flax("Dense_0 3,4")}, (haiku("linear 3,4"), {})
WRONG_RULES = [
    ("rename", ["Dense_0"]),
    ("rename", {"Dense_0": 1}),
    ("rename", {1: "linear"}),
    ("leaf", {"Dense_0": lambda x: x}),
    ("leaf", {"Dense_0": ("a", "b")}),
    ("ignore", "Dense_0"),
    ("ignore", [1]),
    ("layer_axis", "1"),
    ("layer_axis", {"Dense_0": "1"}),
    ("layer_axis", True),
    ("layer_axis", 1.0),
    ("interleave", "yes"),
    ("interleave", np.ones(9)),
]


def wrong_types():
    for pair in (GOOD[1][0], 1, None, ({},), ({}, {}, {})):
        yield GOOD[0], pair, {}, r"pair \(params, state\).*\(params, {}\)"
    for tree in (1, "text", None, np.ones(3), [np.ones(3)]):
        yield tree, GOOD[1], {}, "expected a dict"
        yield GOOD[0], (tree, {}), {}, "expected a dict"
    for leaf in ("text", 1.0, object()):
        kind = type(leaf).__name__
        variables = {"params": {"Dense_0": {"kernel": leaf}}}
        yield variables, GOOD[1], {}, f"params/Dense_0/kernel is a {kind}"
        like = {"linear": {"w": leaf}}, {}
        yield GOOD[0], like, {}, f"params/linear/w is a {kind}"
    for argument, value in WRONG_RULES:
        yield *GOOD, {argument: value}, argument


@pytest.mark.parametrize(
    ("variables", "like", "rules", "message"),
    [pytest.param(*given, id=f"{i}") for i, given in enumerate(wrong_types())],
)
def test_wrong_types(variables, like, rules, message):
    for call, *trees in (
        (hk_stack.flax_to_haiku, variables, like),
        (hk_stack.haiku_to_flax, like, variables),
        (port.plan, variables, like),
    ):
        with pytest.raises(TypeError, match=message):
            call(*trees, **rules)


def test_a_rule_that_gives_a_wrong_shape_on_the_way_back():
    flax, haiku = {"params": {"up": dense(3, 4)}}, ({"up": linear(3, 4)}, {})
    for back in (lambda x: x[:1], lambda x: x.sum(), lambda x: x.T):
        rules = {"leaf": {"up/kernel": (lambda x: x, back)}}
        with pytest.raises(ValueError, match=r"params/up/kernel.*\n?.*leaf="):
            hk_stack.haiku_to_flax(haiku, flax, **rules)


# What may be left over


def test_strict_false_lists_what_is_left_over():
    flax = {"params": {"Dense_0": dense(3, 4), "head": dense(5, 6, bias=False)}}
    haiku = {"linear": linear(3, 4), "logits": linear(7, 6, bias=False)}, {}
    (params, state), rows = hk_stack.flax_to_haiku(flax, haiku, strict=False)
    theirs = flax["params"]["Dense_0"]
    assert_equal(params["linear"], {"w": theirs["kernel"], "b": theirs["bias"]})
    said = {"ignore": ["head", "logits"], "strict": False}
    assert hk_stack.flax_to_haiku(flax, haiku, **said)[1] == []
    assert params["logits"]["w"] is haiku[0]["logits"]["w"] and state == {}
    assert [(row.flax, row.haiku, row.status) for row in rows] == [
        ("params/head/kernel float32[5,6]", "", "unused"),
        ("", "params/logits/w float32[7,6]", "missing"),
    ]
    back, same = hk_stack.haiku_to_flax(haiku, flax, strict=False)
    assert same == rows
    assert back["params"]["head"]["kernel"] is flax["params"]["head"]["kernel"]
    empty = types(flax)
    left = hk_stack.haiku_to_flax(haiku, empty, strict=False)[0]["params"]["head"]
    assert left["kernel"] == empty["params"]["head"]["kernel"]


@pytest.mark.parametrize(
    "patterns", [["head", "logits"], ["params/head", "params/logits"], ["*ea*", "lo*"]]
)
def test_what_is_ignored_may_be_left_over(patterns):
    flax = {"params": {"Dense_0": dense(3, 4), "head": dense(5, 6)}}
    haiku = {"linear": linear(3, 4), "logits": linear(7, 6)}, {}
    params, _ = hk_stack.flax_to_haiku(flax, haiku, ignore=patterns)
    np.testing.assert_array_equal(
        params["linear"]["w"], flax["params"]["Dense_0"]["kernel"]
    )
    assert params["logits"]["w"] is haiku[0]["logits"]["w"]
    rows = port.plan(flax, haiku, ignore=patterns).rows
    assert [row.status for row in rows] == ["ok"] * 2 + ["ignored"] * 4


def test_dtypes_change_on_request():
    flax = {"params": {"Dense_0": dense(3, 4, dtype=np.float64)}}
    haiku = {"linear": linear(3, 4, dtype=jnp.bfloat16)}, {}
    params, _ = hk_stack.flax_to_haiku(flax, haiku, cast=True)
    assert_equal(
        params["linear"]["w"], flax["params"]["Dense_0"]["kernel"].astype(jnp.bfloat16)
    )
    back = hk_stack.haiku_to_flax((params, {}), flax, cast=True)
    assert back["params"]["Dense_0"]["kernel"].dtype == np.float64


def test_empty_trees():
    for flax in ({}, {"params": {}}, {"params": {}, "batch_stats": {}}):
        assert hk_stack.flax_to_haiku(flax, ({}, {})) == ({}, {})
        assert hk_stack.haiku_to_flax(({}, {}), flax) == flax


def test_parameters_without_the_collection_are_parameters():
    """`model.params` rather than `{"params": model.params}` is as good."""
    params = {"Dense_0": dense(3, 4), "LayerNorm_0": {"scale": new(4), "bias": new(4)}}
    like = {"linear": linear(3, 4), "layer_norm": {"scale": new(4), "offset": new(4)}}
    expected = hk_stack.flax_to_haiku({"params": params}, (like, {}))
    assert_equal(hk_stack.flax_to_haiku(params, (like, {})), expected)
    assert_equal(hk_stack.haiku_to_flax(expected, params), params)


# Plans


def test_a_plan_is_a_table():
    flax = {
        "Dense_0": dense(3, 4),
        "head": dense(5, 6, bias=False),
        **layers(dense, 4, 2, 3, bias=False),
    }
    haiku = {"linear": linear(3, 5), "block": linear(4, 4, 6, bias=False)}
    found = port.plan({"params": flax}, (types(haiku), {}))
    lines = str(found).splitlines()
    assert lines[0].startswith("4 leaves of Flax -> 1 leaves of Haiku, 384 B")
    assert lines[0].endswith("3 rows need a look")
    assert lines[1].split() == ["Flax", "Haiku", "change", "shape", "status"]
    row = next(line for line in lines if "block_0" in line)
    assert "params/block_0/kernel float32[4,2,3] (and 3 more)" in row
    assert "params/block/w float32[4,4,6]" in row
    assert "reshape, 4 layers by name -> on axis 0" in row
    assert "[4, 2, 3] -> [4, 6]" in row and row.rstrip().endswith("ok")
    assert not found.ok and [row.status for row in found.rows].count("ok") == 1


def test_a_plan_prints_in_colour():
    rich_console = pytest.importorskip("rich.console")
    flax = {"params": {"Dense_0": dense(3, 4), "head": dense(5, 6, bias=False)}}
    haiku = types(({"linear": linear(3, 4)}, {}))
    file = io.StringIO()
    console = rich_console.Console(
        file=file, width=200, force_terminal=True, color_system="standard"
    )
    console.print(port.plan(flax, haiku))
    text = file.getvalue()
    for part in (
        "params/Dense_0/kernel float32[3,4]",
        "params/linear/w",
        "in Flax only",
    ):
        assert part in text
    red = "\x1b[1;31m"
    assert f"{red}unused" in text and f"{red}ok" not in text


# Right or refused: what could be read in another way


class Riddle(NamedTuple):
    """Parameters with one right answer, that shapes do not tell from others.

    Attributes:
      flax: Parameters.
      haiku: What they are in Haiku.
      said: Rules with which the port is right; without some it may be refused.
      given: Rules that are part of the question.
    """

    flax: Any
    haiku: Any
    said: dict[str, Any]
    given: dict[str, Any] = {}  # noqa: RUF012, never changed

    def ported(self, **said):
        params = {"params": self.flax}
        return right_or_refused(params, (self.haiku, {}), **self.given, **said)


def on_axis(axis, **modules):
    """Layers of Dense in Flax that are on an axis, and in Haiku in front."""
    flax = {"layers": {}}
    haiku = {}
    for name, shape in modules.items():
        kernel = new(*shape)
        front = np.moveaxis(kernel, axis, 0)
        flax["layers"][name] = {"kernel": kernel}
        haiku[f"layers/{name}"] = {"w": front}
        if len(shape) == 2:
            flax["layers"][name] = {"scale": kernel}
            haiku[f"layers/{name}"] = {"scale": front}
    return flax, haiku


def beside(riddle, flax, haiku):
    return {**riddle[0], **flax}, {**riddle[1], **haiku}


def cells(axis, width=3):
    """Two LSTMs on an axis: of kernels and biases, where these have it."""
    gates = {f"{side}{gate}": new(2, width, 4) for side in "ih" for gate in "ifgo"}
    biases = {f"h{gate}": new(2, 4) for gate in "igfo"}
    gates |= {name: new(2, 4, 4) for name in biases}
    flax = {n: {"kernel": np.moveaxis(x, 0, axis)} for n, x in gates.items()}
    for name, bias in biases.items():
        flax[name]["bias"] = np.moveaxis(bias, 0, axis)
    rows = [np.concatenate([gates[s + g] for g in "igfo"], -1) for s in "ih"]
    b = np.concatenate([bias - (name == "hf") for name, bias in biases.items()], -1)
    w = np.concatenate(rows, 1)
    return {"layers": {"LSTMCell_0": flax}}, {"layers/lstm/linear": {"w": w, "b": b}}


def same(name, **leaves):
    """A module that is the same in both trees, outside of all stacks."""
    translated = (
        {"kernel": "w", "bias": "b"} if "kernel" in leaves else {"bias": "offset"}
    )
    haiku = {translated.get(leaf, leaf): value for leaf, value in leaves.items()}
    return {name: leaves}, {name: haiku}


def attention(axis):
    """Everything of one size: layers, features, heads, and features of heads."""
    flax, haiku = {}, {}
    for name in ("query", "key", "value", "out"):
        kernel, is_out = new(4, 4, 4, 4), name == "out"
        bias = new(4, 4) if is_out else new(4, 4, 4)
        flax[name] = {"kernel": kernel, "bias": bias}
        shape = (4, 16, 4) if is_out else (4, 4, 16)
        module = f"layers/attention/{'linear' if is_out else name}"
        haiku[module] = {
            "w": np.moveaxis(kernel, axis, 0).reshape(shape),
            "b": np.moveaxis(bias, axis, 0).reshape(4, -1),
        }
    return {"layers": {"attention": flax}}, haiku


def stacked(flax, name="block_{}"):
    """What a loop of layers in Flax is as a stack in Haiku."""
    numbers = range(len(flax))
    return np.stack([flax[name.format(i)]["kernel"] for i in numbers])


def members_in_layers(axis, interleave):
    """`nn.vmap` on an axis, in as many numbered layers as there are members."""
    layers = {f"layer_{i}": {"kernel": new(3, 3, 3)} for i in range(3)}
    members = np.stack([x["kernel"] for x in layers.values()])
    members = np.moveaxis(members, axis + 1, 1)
    members = members.swapaxes(0, 1) if interleave else members
    head, logits = same("head", kernel=new(8, 3))
    return (
        {"model": {**layers, **head}},
        {"model/layer": {"w": members}, "model/head": logits["head"]},
    )


def riddles():
    for axis, width in itertools.product(range(2), (2, 3)):
        yield (
            f"cells on axis {axis}, of width {width}",
            *cells(axis, width),
            {"layer_axis": {"layers": axis}},
        )
    for axis, interleave in itertools.product(range(2), (True, False)):
        yield (
            f"members on axis {axis} of layers, interleave={interleave}",
            *members_in_layers(axis, interleave),
            {"layer_axis": {"model/layer_*": (axis,)}, "leaf": {"": port.SAME}},
            {"interleave": interleave},
        )
    for axis in range(2):
        said = {"layer_axis": {"layers": axis}}
        yield f"attention on axis {axis}", *attention(axis), said
        for width in (4, 5):
            module = same("logits", kernel=new(4, width))
            yield (
                f"beside layers on axis {axis}, a kernel [4, {width}]",
                *beside(on_axis(axis, a=(4, 4, 5), norm=(4, 4)), *module),
                said,
            )
            module = same("norm", scale=new(4, width), bias=new(4, width))
            yield (
                f"beside layers on axis {axis}, a norm over [4, {width}]",
                *beside(on_axis(axis, a=(4, 4, 5), norm=(4, 4)), *module),
                {"layer_axis": {"layers": axis, "norm": ()}},
            )
    one, kernel, bias = new(1, 3, 3), new(2, 4, 4, 4), new(2, 4, 4)
    bias_of_one = new(3, 3)
    yield (
        "one feature, on axis 1",
        {"layers": {"a": {"kernel": one, "bias": bias_of_one}}},
        {"layers/a": {"w": np.moveaxis(one, 1, 0), "b": bias_of_one.T}},
        {"layer_axis": {"layers": 1}},
    )
    yield (
        "a scan on axis 0 around one on axis 1",
        {"layers": {"inner": {"a": {"kernel": kernel, "bias": bias}}}},
        {
            "layers/inner/a": {
                "w": np.moveaxis(kernel, 2, 1),
                "b": np.moveaxis(bias, 2, 1),
            }
        },
        {"layer_axis": {"layers": (0, 2)}},
    )
    for shape in ((3, 4, 4), (4, 4, 4), (3, 3, 4, 4)):
        kernel = new(*shape)
        module = f"conv{len(shape) - 2}_d_transpose"
        yield (
            f"beside layers on axis 0, a transposed convolution {shape}",
            *beside(
                on_axis(0, a=(4, 4, 5), norm=(4, 5)),
                {"ConvTranspose_0": {"kernel": kernel}},
                {module: {"w": kernel.swapaxes(-1, -2)}},
            ),
            {"layer_axis": {"": 0}},
        )
    kernel, scale, bias = new(2, 2, 4, 4, 4), new(2, 2, 2, 3), new(2, 2, 2, 3)
    inner = {"taps": {"kernel": kernel}, "norm": {"scale": scale, "bias": bias}}
    yield (
        "convolutions of another name in nested scans",
        {"layers": {"inner": inner}},
        {
            "layers/inner/taps": {"w": kernel.reshape(4, 4, 4, 4)},
            "layers/inner/norm": {
                "scale": scale.reshape(4, 2, 3),
                "offset": bias.reshape(4, 2, 3),
            },
        },
        {
            "layer_axis": {"layers/inner": (0, 1)},
            "leaf": {"layers/inner/taps": port.SAME},
        },
    )
    yield (
        "beside layers on axis 1, a convolution of another name",
        *beside(on_axis(1, a=(4, 2, 5)), *same("taps", kernel=new(2, 2, 2))),
        {"layer_axis": {"layers": 1, "taps": 0}, "leaf": {"taps": port.SAME}},
    )
    alpha = new(4, 5)
    yield (
        "a rule for one layer",
        {"layers": {"mixer": {"alpha": alpha}}},
        {"layers/mixer": {"alpha": alpha[:, ::-1]}},
        {"layer_axis": {"layers": 0}},
        {"leaf": {"layers/mixer": (lambda x: x[::-1], lambda x: x[::-1])}},
    )
    loop = layers(dense, 3, 3, numbers=range(12), bias=False)
    yield "twelve layers", loop, {"block": {"w": stacked(loop)}}, {}
    stages = {
        f"stage_{i}": layers(dense, 2, 2, numbers=range(2), bias=False)
        for i in range(2)
    }
    of_stages = np.stack([stacked(stage) for stage in stages.values()])
    yield "stages of blocks, nested", stages, {"stage/block": {"w": of_stages}}, {}
    yield (
        "stages of blocks, a loop over stacks",
        stages,
        {"stage/block": {"w": of_stages[0]}, "stage_1/block": {"w": of_stages[1]}},
        {},
    )
    yield (
        "stages of blocks, a stack over blocks",
        stages,
        {
            "stage/block": {"w": of_stages[:, 0]},
            "stage/block_1": {"w": of_stages[:, 1]},
        },
        {},
    )
    blocks = {"layers": layers(dense, 2, 2, 2, numbers=range(2), bias=False)}
    of_blocks = stacked(blocks["layers"])
    for interleave, layout in ((True, of_blocks.swapaxes(0, 1)), (False, of_blocks)):
        yield (
            f"blocks of layers, interleave={interleave}",
            blocks,
            {"layers/block": {"w": layout.reshape(4, 2, 2)}},
            {"interleave": interleave, "layer_axis": {"layers": 0}},
        )


RIDDLES = {name: Riddle(*riddle) for name, *riddle in riddles()}


@pytest.mark.parametrize("name", RIDDLES)
def test_a_port_is_right_or_refused(name):
    riddle = RIDDLES[name]
    assert riddle.ported(**riddle.said)
    axes = riddle.said.get("layer_axis", {})
    of_all = [{"layer_axis": axis} for axis in set(dict(axes).values()) - {()}]
    for said in ({}, riddle.said, *({**riddle.said, **axis} for axis in of_all)):
        for count in range(len(said) + 1):
            for some in itertools.combinations(said, count):
                riddle.ported(**{argument: said[argument] for argument in some})


# A rule that is given is used, or an error


@pytest.mark.parametrize("axis", [1, 2, -1, (1,), (1, 0)])
@pytest.mark.parametrize("scope", ["layers", "params/layers"])
def test_a_rule_for_a_stack_that_does_not_fit_is_an_error(axis, scope):
    flax = {"params": {"layers": {"alpha": new(4, 3, 5)}, "head": dense(3, 4)}}
    haiku = {"layers": {"alpha": flax["params"]["layers"]["alpha"]}}
    haiku = {**haiku, "head": linear(3, 4)}, {}
    assert port.plan(flax, haiku, layer_axis={scope: 0}).ok
    with pytest.raises(ValueError) as error:
        hk_stack.flax_to_haiku(flax, haiku, layer_axis={scope: axis})
    text = f"params/layers/alpha float32[4,3,5]: its layers are not on axis {axis}"
    assert text in str(error.value).replace(
        " -> params/layers/alpha float32[4,3,5]", ""
    )
    assert 'this fits: layer_axis={"layers": ()}' in str(error.value)
    assert port.plan(flax, haiku, layer_axis={"layers": ()}).ok
    both = port.plan(flax, haiku, layer_axis={scope: axis, "layers": ()})
    assert {row.status for row in both.rows} == {"ok"}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"layer_axis": 1}, "layer_axis: no layers are on axis 1"),
        ({"interleave": False}, "interleave=False: no layers are both numbered"),
    ],
)
def test_a_rule_for_the_whole_tree_that_nothing_needs_is_an_error(rule, text):
    flax = {"params": {"Dense_0": dense(3, 4)}}
    haiku = {"linear": linear(3, 4)}, {}
    with pytest.raises(ValueError, match=text):
        hk_stack.flax_to_haiku(flax, haiku, **rule)
    assert port.plan(flax, haiku, layer_axis=0).ok


def test_the_closest_rule_stands_in_whatever_order():
    flax, haiku = on_axis(1, a=(4, 4, 4))
    more, others = on_axis(0, b=(4, 4, 4))
    params = {"layers": {**flax["layers"], **more["layers"]}}
    rules = {"": 0, "layers": 1, "layers/b": 0}
    for said in (rules, dict(reversed(rules.items()))):
        trees = {"params": params}, ({**haiku, **others}, {})
        assert right_or_refused(*trees, layer_axis=said)


# The first layer apart, and what is left over


def rest_of_layers(numbers, apart, name):
    """Four blocks in Flax; some of them apart in Haiku, the others as is said."""
    flax = layers(dense, 3, 4, bias=False)
    kernels = [flax[f"block_{i}"]["kernel"] for i in range(4)]
    haiku = {scope: {"w": kernels[i]} for scope, i in apart.items()}
    if name.count("*"):
        for i, number in enumerate(numbers):
            haiku[name.replace("_*", f"_{i}" * (i > 0))] = {"w": kernels[number]}
    else:
        haiku[name] = {"w": np.stack([kernels[i] for i in numbers])}
    return {"params": flax}, (haiku, {})


@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_first_layer_apart(is_reversed):
    """The closest rule stands, and a stack begins where the numbers do."""
    rename = {"block_0": "first", "block_*": "rest_*"}
    rename = dict(reversed(rename.items())) if is_reversed else rename
    trees = rest_of_layers([1, 2, 3], {"first": 0}, "rest")
    assert right_or_refused(*trees, rename=rename)


def test_a_loop_that_counts_from_another_number():
    trees = rest_of_layers([1, 2, 3], {"first": 0}, "rest_*")
    rename = {"block_0": "first", "block_*": "rest_*"}
    with pytest.raises(ValueError, match="give both the same numbers"):
        hk_stack.flax_to_haiku(*trees, rename=rename)
    rename = {"block_0": "first", "block_1": "rest", "block_2": "rest_1"}
    assert right_or_refused(*trees, rename={**rename, "block_3": "rest_2"})


def test_the_first_and_the_last_layer_apart():
    rename = {"block_0": "first", "block_3": "last", "block_*": "layers/block_*"}
    trees = rest_of_layers([1, 2], {"first": 0, "last": 3}, "layers/block")
    assert right_or_refused(*trees, rename=rename)


def test_numbers_that_both_trees_have_are_not_counted_anew():
    flax, (haiku, _) = rest_of_layers([1, 2, 3], {"first": 0}, "rest")
    kernels = haiku.pop("rest")["w"]
    haiku |= {f"rest_{i + 1}": {"w": kernel} for i, kernel in enumerate(kernels)}
    rename = {"block_0": "first", "block_*": "rest_*"}
    assert right_or_refused(flax, (haiku, {}), rename=rename)


def test_a_layer_from_the_middle_leaves_a_hole():
    rename = {"block_1": "first", "block_*": "rest_*"}
    flax, haiku = rest_of_layers([0, 2, 3], {"first": 1}, "rest")
    with pytest.raises(
        ValueError, match=r"block_\*/kernel has the numbers 0, 2, 3, not 1"
    ):
        hk_stack.flax_to_haiku(flax, haiku, rename=rename)


# What is left over, and the call to write


def test_leaves_left_over_show_the_calls_to_write():
    params = {"Dense_0": dense(3, 4), "old": dense(2, 2), "head": dense(5, 6)}
    flax = {"params": params}
    haiku = {"linear": linear(3, 4), "logits": linear(5, 6)}, {}
    said = {"rename": {"Dense_0": "linear"}, "ignore": ["params/old"]}
    for call, tree, other in (
        (hk_stack.flax_to_haiku, flax, haiku),
        (hk_stack.haiku_to_flax, haiku, flax),
    ):
        with pytest.raises(ValueError) as error:
            call(tree, other, **said)
        source = "variables" if call is hk_stack.flax_to_haiku else "params_and_state"
        ignore = 'ignore=["params/old", "params/head", "params/logits"]'
        rename = 'rename={"Dense_0": "linear", "head": "logits"}'
        for rule in (ignore, rename):
            assert f"{call.__name__}({source}, like, {rule})" in str(error.value)
            argument, value = rule.split("=", 1)
            call(tree, other, **{**said, argument: ast.literal_eval(value)})


def test_leaves_left_over_in_one_tree_only():
    flax = {"params": {"Dense_0": dense(3, 4), "Dense_1": dense(4, 4)}}
    haiku = {"linear": linear(3, 4)}, {}
    with pytest.raises(ValueError) as error:
        hk_stack.flax_to_haiku(flax, haiku)
    call = 'flax_to_haiku(variables, like, ignore=["params/Dense_1"])'
    assert call in str(error.value) and "No rename=" in str(error.value)
    hk_stack.flax_to_haiku(flax, haiku, ignore=["params/Dense_1"])
