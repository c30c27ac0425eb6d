"""What an editor or mypy says of programs that use the library."""

import pathlib
import re
import subprocess
import sys

PROGRAM = """
import jax
import jax.numpy as jnp

import hk_stack


def layer(x: jax.Array, *, is_training: bool = False) -> jax.Array:
    return jnp.tanh(x)


def pair(x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
    return x + y, None


x = jnp.ones([2])
stacked = hk_stack.layer_stack(3, setup="marked", loop="python", remat_every="sqrt")
stack = stacked(layer)
good: jax.Array = stack(x, is_training=True)
back: jax.Array = stack(x, reverse=True)
several: tuple[jax.Array, None] = hk_stack.layer_stack(3, True)(pair)(x, x)
marked: jax.Array = hk_stack.hoist(x)

hk_stack.layer_stack(3, setup="hoistt")  # error: Literal['auto', 'marked', 'inline']
hk_stack.layer_stack(3, init="batch")  # error: Literal['auto', 'vmap', 'map', 'scan']
hk_stack.use_loop("while")  # error: Literal['scan', 'unrolled', 'python']
hk_stack.layer_stack(3, remat_every="all")  # error: Literal['sqrt']
stack(x, is_trainin=True)  # error: No overload variant of "__call__"
stack("x")  # error: No overload variant of "__call__"
wrong: int = stack(x)  # error: Incompatible types in assignment
"""


def test_mypy_knows_the_layers_signature(tmp_path: pathlib.Path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    errors = re.findall(r"program.py:(\d+): error: (.*)", run.stdout)
    expected = {
        str(number): line.partition("# error: ")[2]
        for number, line in enumerate(PROGRAM.split("\n"), 1)
        if "# error: " in line
    }
    assert dict(errors).keys() == expected.keys(), run.stdout
    for number, text in errors:
        assert expected[number] in text
