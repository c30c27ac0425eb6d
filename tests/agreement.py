"""When two results count as the same."""

import jax
import jax.numpy as jnp
import numpy as np

# For the many programs that run once: compile fast rather than well.
FAST = {"xla_backend_optimization_level": 0}


def assert_equal(found, expected):
    """Bit for bit."""
    for x, y in _pairs(found, expected):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(found, expected, tolerance=1e-5):
    """Up to the order of additions."""
    for x, y in _pairs(found, expected):
        loose = tolerance
        if x.dtype == jnp.bfloat16:
            x, y, loose = x.astype(float), y.astype(float), 5e-2
        scale = float(np.max(np.abs(np.asarray(y)), initial=1.0))
        np.testing.assert_allclose(x, y, rtol=loose, atol=loose * scale)


def _pairs(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = map(_numbers, (x, y))
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if x.dtype != jax.dtypes.float0:
            yield x, y


def _numbers(leaf):
    if not hasattr(leaf, "dtype"):
        leaf = jnp.asarray(leaf)
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
