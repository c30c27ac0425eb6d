"""Runs examples in this process, which has what they import, and compiles fast."""

import contextlib
import importlib
import pathlib
import sys

import jax
import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "examples"


def load(name):
    """An example, or a file that they share, as a module."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # As for a script.
    return importlib.import_module(name)


def run(name, *flags):
    """What `python examples/NAME.py` does with these flags."""
    example = load(name)
    with as_script():
        load("common").run(example.main, example.DEFAULT, [*map(str, flags)])


@contextlib.contextmanager
def as_script():
    """Without the strict settings of the tests."""
    with (
        compiling_fast(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@contextlib.contextmanager
def compiling_fast():
    """For programs that run once or twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def assert_picture(path):
    """Something is drawn, large enough to be read."""
    import matplotlib.image  # The extra "examples" may not be installed.

    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) >= 400
    assert np.std(image[..., :3]) > 0.05
