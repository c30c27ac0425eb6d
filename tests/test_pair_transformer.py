"""The diffusion transformer trains, draws, and gives the same in all of its ways."""

import functools
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from agreement import assert_close

for module in ("absl", "matplotlib", "optax", "tqdm"):
    pytest.importorskip(module)  # The extra "examples" may not be installed.

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "pair_transformer.py")
SIZES = {"super_blocks": 2, "blocks": 3, "points": 5}
SIZES |= {"width": 8, "pair_width": 7, "heads": 2}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]
TINY += ["--steps=3", "--batch_size=2", "--rounds=2"]
# Each takes seconds to compile.
WAYS = [
    "bias hoisted",
    "bias by hand",
    "hk.remat, blocks",
    "remat=True, both",
    'one stack, remat_every="sqrt"',
]


def run(*arguments):
    """Runs the example in a process of its own, on the code of this repository."""
    command = [sys.executable, EXAMPLE, *TINY, *map(str, arguments)]
    # Compilation takes most of the time, and sizes are tiny.
    fast = "--xla_backend_optimization_level=0"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": fast}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(EXAMPLE)


def test_trains_draws_and_compares(example, tmp_path):
    out = tmp_path / "new" / "folder"
    done = run(*(f"--way={name}" for name in WAYS), f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"3/3 .*loss \d\.\d+, held out \d\.\d+", done.stderr)
    names = {"attention.png", "chain.png", "curves.png"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        assert_picture(out / name)
    for name in (next(iter(example["WAYS"])), *WAYS):
        row = re.search(rf"^{re.escape(name)}  .*$", done.stdout, re.M)[0]
        *ratios, differ_by = re.findall(r"\d[-+\d.e]*", row.removeprefix(name))
        assert len(ratios) in (4, 8)
        assert all(float(x) > 0 for x in ratios)
        assert float(differ_by) < 1e-5
    assert "remat=True, super-blocks" not in done.stdout  # It was not asked for.
    assert "Outputs and gradients of all ways are equal" in done.stdout
    assert "[2, 3, 2, 5, 5]" in done.stdout
    errors = re.findall(r"^    [a-z' ]+(\d+\.\d\d)$", done.stdout, re.M)
    assert len(errors) == 4
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"Held-out loss \d+\.\d{3}, .* in \d+ s of \d+ s", last)


def assert_picture(path):
    import matplotlib.image

    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) >= 400
    assert np.std(image[..., :3]) > 0.05


def arguments(example):
    """Of `apply`, for one chain: parameters as shapes, then arrays."""
    config = example["Config"](**SIZES)
    batch = example["random_batch"](jax.random.key(0), config.points, 1)
    inputs = [leaf[0] for leaf in batch[1:]]
    init = example["denoiser"](config).init
    return config, jax.eval_shape(init, jax.random.key(0), *inputs), inputs


def body(jaxpr, length):
    """What runs in the only loop of that length, inside others or not."""
    (found,) = (
        eqn.params["jaxpr"].jaxpr
        for eqn in jaxprs.equations(jaxpr)
        if eqn.primitive.name == "scan" and eqn.params["length"] == length
    )
    return found


def products(example, way):
    """How large the pair biases are that are computed outside, in each super-block,
    and in each block; with the number of axes of what they are made of."""
    config, params, inputs = arguments(example)
    apply = example["denoiser"](config, way).apply
    params = jax.eval_shape(functools.partial(example["move"], config, way), params)
    program = jax.make_jaxpr(apply)(params, *inputs).jaxpr
    middle = body(program, config.super_blocks)
    inner = body(middle, config.blocks)

    def biases(jaxpr, *loops):
        inside = {id(e) for loop in loops for e in jaxprs.equations(loop)}
        pairs = config.points, config.points, config.pair_width
        return [
            eqn.outvars[0].aval.size // config.points**2
            for eqn in jaxprs.equations(jaxpr)
            if id(eqn) not in inside
            and eqn.primitive.name == "dot_general"
            # Of the normed pair representation; the projection to it is not larger.
            and pairs in [atom.aval.shape for atom in eqn.invars]
            and eqn.outvars[0].aval.shape != pairs
        ]

    return biases(program, middle), biases(middle, inner), biases(inner)


@pytest.mark.parametrize("remat", ["nothing", "hk.remat", "both"])
def test_the_bias_leaves_the_loops(remat, example):
    """Numbers of logits for each pair of points: of one block, of three, of all six."""
    way = functools.partial(example["Way"], remat=remat)
    heads = SIZES["heads"]
    assert products(example, way("in the loop")) == ([], [], [heads])
    assert products(example, way()) == ([6 * heads], [], [])
    assert products(example, way(setup="inline")) == ([], [3 * heads], [])
    if remat != "hk.remat":
        assert products(example, way("by hand")) == ([], [3 * heads], [])


def test_modules_made_outside_or_inside_are_one_program(example):
    config, params, inputs = arguments(example)

    def program(way):
        own = jax.eval_shape(functools.partial(example["move"], config, way), params)
        apply = example["denoiser"](config, way).apply
        return own.keys(), str(jax.make_jaxpr(apply)(own, *inputs))

    outside = program(example["Way"]())
    inside = program(example["Way"](is_captured=False))
    assert outside[0] != inside[0]
    assert outside[1] == inside[1]


def test_chains(example):
    points = example["chain"](jax.random.key(1), 20)
    steps = jnp.linalg.norm(jnp.diff(points, axis=0), axis=-1)
    assert_close(steps, jnp.ones(19))
    assert_close(points.mean(axis=0), jnp.zeros(3))
    distances = example["between"](points)
    assert_close(distances, jnp.linalg.norm(points[:, None] - points[None], axis=-1))
    gradient = jax.grad(lambda x: example["between"](x).sum())(points)
    assert np.all(np.isfinite(gradient))
    given = example["measured"](jax.random.key(2), points)
    assert_close(given, given.T)
    assert np.all(given >= 0)


def test_scaling_finds_chains_again_up_to_turns(example):
    points = example["chain"](jax.random.key(1), 20)
    distances = example["between"](points)
    found = example["scaling"](distances)
    np.testing.assert_allclose(example["between"](found), distances, atol=1e-3)
    mirrored = found * jnp.array([[-1.0, 1.0, 1.0]])
    for each in (found, mirrored):
        turned = example["superposed"](each, points)
        np.testing.assert_allclose(turned, points, atol=1e-3)
    assert example["distance_error"](distances[None] + 0.5, points[None]) > 0.4


def test_noise_becomes_what_the_denoiser_says(example):
    """With a denoiser that knows the answer, and is asked for it at falling noise."""
    points = jnp.stack([example["chain"](jax.random.key(i), 6) for i in range(2)])
    found = example["from_noise"](
        lambda params, noisy, noise, distances: params,
        points,
        jax.random.key(0),
        example["between"](points),
    )
    assert np.abs(found - points).max() < 5 * example["SMALLEST"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads=3"], "--heads must be a divisor of --width"),
        (["--points=2"], "--points"),
        (["--way=by magic"], "--way"),
        (["haiku"], "Unknown arguments: haiku"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses_bad_flags(arguments, message, tmp_path):
    done = run(*arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_refuses_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    done = run(f"--out={tmp_path / 'file' / 'folder'}")
    assert done.returncode != 0
    assert re.fullmatch(r"Cannot write to --out=.*Not a directory.*\n", done.stderr)
