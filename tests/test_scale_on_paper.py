"""What `examples/scale_on_paper.py` says of a mesh is what XLA makes of its program."""

import math
import os
import subprocess
import sys

import hlo
import jax
import jax.numpy as jnp
import pytest
from run_example import FOLDER, as_script, load, run

import hk_stack

for module in ("matplotlib", "optax", "tqdm"):
    pytest.importorskip(module)

SIZES = {"layers": 6, "width": 32, "heads": 8, "length": 16, "batch": 8}
FLAGS = {"devices": 8, "host": 2, "stages": 2, "microbatches": 2}
MESHES = {
    4: [{"data": 2, "layers": 2}, {"fsdp": 2, "tensor": 2}, {"tensor": 2, "stages": 2}],
    8: [
        {"data": 8},
        {"fsdp": 8},
        {"tensor": 8},
        {"data": 4, "layers": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"stages": 2},
        {"fsdp": 4, "stages": 2},
        {"data": 2, "tensor": 2, "stages": 2},
    ],
}


@pytest.mark.parametrize("sizes", MESHES[len(jax.devices())], ids=str)
def test_bytes_and_collectives_are_those_of_the_compiled_step(sizes):
    example = load("scale_on_paper")
    config, mesh = example.Config(**SIZES, **FLAGS), example.Mesh(**sizes)
    with as_script():
        compiled = example.train_step(config, mesh).compile()
    held = example.held(config, mesh)

    batch, count = example.carry(config, mesh), example.NUMBER
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments == held.parameters + held.moments + batch + count

    # Derived values are in the place of as many parameters.
    turns = {config.layers, config.layers // mesh.layers}
    *others, backward = hlo.carried(compiled)
    if mesh.stages > 1:  # The loop of ticks has one of layers in it.
        layers = config.layers // mesh.stages
        rows = config.batch // (mesh.data * mesh.fsdp * config.microbatches)
        carries = layers, rows, config.length, config.width
        assert any(carries in loop for loop in others)
        turns, backward = {layers, example.ticks(config, mesh)}, [*backward, carries]
    arrays = [shape for shape in backward if shape[1:] and shape[0] in turns]
    given = held.gathered if mesh.layers > 1 else held.parameters
    in_loop = example.NUMBER * sum(map(math.prod, arrays))
    assert in_loop == given + held.gradients + held.activations

    found = [
        (c.kind, c.times * c.count, c.times * c.nbytes)
        for c in hlo.collectives(compiled)
    ]
    loss = ("all-reduce", 1, example.NUMBER)
    expected = [(c.kind, c.times, c.nbytes) for c in example.collectives(config, mesh)]
    assert by_kind(one for one in found if one != loss) == by_kind(expected)


def by_kind(collectives):
    """How often each kind runs, and with how many bytes."""
    sums = {}
    for kind, times, nbytes in collectives:
        before = sums.get(kind, (0, 0))
        sums[kind] = before[0] + times, before[1] + nbytes
    return sums


def test_derived_values_are_made_before_the_loop():
    example = load("scale_on_paper")
    config, mesh = example.Config(**SIZES, **FLAGS), example.Mesh()
    model = example.make_model(config, mesh)
    with as_script(), jax.set_mesh(example.make_mesh(mesh)):
        x = jnp.zeros([1, config.length, config.width])
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        (stack,) = hk_stack.summary(model.apply, params, x).stacks
    held = example.held(config, mesh)
    assert (stack.derived, stack.nbytes) == (held.derived, held.parameters)


def test_the_page_shows_what_it_prints(capsys):
    run("scale_on_paper")
    page = (FOLDER.parent / "docs" / "scale.md").read_text()
    assert f"```\n{capsys.readouterr().out}```" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stages=5", "--stages must be a divisor of --layers"),
        ("--host=128", "--devices must be a multiple of --host times --stages"),
        ("--microbatches=3", "--microbatches must divide the 128 sequences"),
    ],
)
def test_refuses_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run("scale_on_paper", flags)
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_on_eight_devices():
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "compiled"]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)
