"""Trees with a value of its own in each element, and whether a port is right."""

import itertools
import math

import jax
import numpy as np

import hk_stack

_numbers = itertools.cycle(range(1, 2**24))  # All that float32 tells apart.


def new(*shape, dtype=np.float32):
    """An array of numbers that no other array has."""
    count = math.prod(shape)
    values = np.fromiter(itertools.islice(_numbers, count), np.int64, count)
    return values.reshape(shape).astype(dtype)


def types(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def is_right(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def right_or_refused(flax, haiku, **said):
    """Whether the port is right, both ways; False if it is refused.

    Then what fits nevertheless is right, too.
    """
    try:
        found = hk_stack.flax_to_haiku(flax, types(haiku), **said)
        back = hk_stack.haiku_to_flax(haiku, types(flax), **said)
    except ValueError:
        assert_right_as_far_as_it_goes(flax, haiku, **said)
        return False
    assert is_right(found, haiku) and is_right(back, flax)
    return True


def assert_right_as_far_as_it_goes(flax, haiku, **said):
    found, _ = hk_stack.flax_to_haiku(flax, types(haiku), strict=False, **said)
    back, _ = hk_stack.haiku_to_flax(haiku, types(flax), strict=False, **said)
    for tree, expected in ((found, haiku), (back, flax)):
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
        for leaf, right in pairs:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                np.testing.assert_array_equal(leaf, right)
