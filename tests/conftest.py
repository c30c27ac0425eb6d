"""Settings under which every test runs: several devices, and nothing implicit."""

import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time is compiling, and much of it the same again: each worker remembers.
_compiled = tempfile.mkdtemp(prefix="hk_stack_")
if not jax.config.jax_compilation_cache_dir:  # From the environment, for many runs.
    jax.config.update("jax_compilation_cache_dir", _compiled)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure():
    shutil.rmtree(_compiled, ignore_errors=True)
