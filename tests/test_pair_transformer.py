"""The transformer with pair bias learns, and gives the same in all of its ways."""

import re

import jax
import jaxprs
import pytest
from run_example import as_script, assert_picture, load, run

for module in ("matplotlib", "optax", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(module)  # The extra "examples" may not be installed.

SIZES = {"super_blocks": 2, "blocks": 3, "points": 5}
SIZES |= {"width": 8, "pair_width": 7, "heads": 2}


@pytest.fixture(scope="module")
def example():
    return load("pair_transformer")


def test_ways_give_the_same(example, capsys, monkeypatch):
    """Two of them, as each takes seconds to compile."""
    names = "bias hoisted", "bias by hand"
    monkeypatch.setattr(example, "WAYS", {name: example.WAYS[name] for name in names})
    config = example.Config(**SIZES, rounds=2, out="none")
    batch = example.random_batch(jax.random.key(0), config.points, 2)
    with as_script():
        init = example.denoiser(config, example.WAYS["bias hoisted"]).init
        params = jax.jit(init)(jax.random.key(1), batch.x[0])
        example.compare(config, params, batch, "loss")
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{name}  .*\d\.\d\d$", shown, re.M) for name in names)


@pytest.mark.long
def test_learns_and_compares(example, tmp_path, capsys):
    names = list(example.WAYS)
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    training = "--steps=60", "--batch_size=16", "--rounds=2"
    run("pair_transformer", *sizes, *training, f"--out={tmp_path}")
    shown = capsys.readouterr()
    assert re.search(r"60/60 .*loss \d\.\d+, held out \d\.\d+", shown.err)
    for name in ("chain.png", "curves.png"):
        assert_picture(tmp_path / name)
    for name in names:
        rows = re.findall(rf"^{name}  .*$", shown.out, re.M)
        assert [len(re.findall(r"\d+\.\d\d", row)) for row in rows] == [4, 4]
    assert "Results of all ways are equal" in shown.out
    last = shown.out.splitlines()[-1]
    pattern = r"Held-out loss (\d\.\d+), without a model (\d\.\d+); .* s in all"
    found, given = map(float, re.fullmatch(pattern, last).groups())
    assert found < given


def program(example, way):
    """A way's program for one chain, and the sizes that it is of."""
    config = example.Config(**SIZES, batch_size=1, learning_rate=0, out="")
    distances = jax.ShapeDtypeStruct([config.points, config.points], "float32")
    apply = example.denoiser(config, way).apply
    params = jax.eval_shape(
        example.denoiser(config, way).init, jax.random.key(0), distances
    )
    return config, jax.make_jaxpr(apply)(params, distances).jaxpr


def loop(jaxpr, length):
    """What runs in the only loop of that length, inside others or not."""
    (found,) = (
        eqn.params["jaxpr"].jaxpr
        for eqn in jaxprs.equations(jaxpr)
        if eqn.primitive.name == "scan" and eqn.params["length"] == length
    )
    return found


def products(example, way):
    """How many pair biases are computed outside, in each super-block, in each block."""
    config, outer = program(example, way)
    middle = loop(outer, config.super_blocks)
    inner = loop(middle, config.blocks)
    pairs = config.points, config.points, config.pair_width

    def biases(jaxpr, inside=None):
        inside = {id(e) for e in jaxprs.equations(inside)} if inside else ()
        return [
            eqn.outvars[0].aval.size // config.points**2
            for eqn in jaxprs.equations(jaxpr)
            if id(eqn) not in inside
            and eqn.primitive.name == "dot_general"
            # Of the normed pair representation; the projection to it is not larger.
            and pairs in [atom.aval.shape for atom in eqn.invars]
            and eqn.outvars[0].aval.shape != pairs
        ]

    return biases(outer, middle), biases(middle, inner), biases(inner)


@pytest.mark.parametrize("remat", [False, True])
def test_the_bias_leaves_the_loops(remat, example):
    """Numbers of logits for each pair of points: of one block, of three, of all six."""
    heads = SIZES["heads"]
    for way, expected in (
        (example.Way("in the loop"), ([], [], [heads])),
        (example.Way("hoisted"), ([6 * heads], [], [])),
        (example.Way("hoisted", setup="inline"), ([], [3 * heads], [])),
        (example.Way("by hand"), ([], [3 * heads], [])),
    ):
        assert products(example, way._replace(remat=remat)) == expected, way
