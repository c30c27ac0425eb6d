"""Settings under which every test runs: several devices, and nothing implicit."""

import gc
import os
import shutil
import tempfile

# Of two flags the last counts, that of the environment.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=4",
        # jaxlib 0.10 runs collectives of one program at once: with few cores they may
        # wait for one another forever.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        # Most programs run once: they are compiled fast rather than well.
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time is compiling, and much of it the same again: each worker remembers.
_compiled = tempfile.mkdtemp(prefix="hk_stack_")
if not jax.config.jax_compilation_cache_dir:  # From the environment, for many runs.
    jax.config.update("jax_compilation_cache_dir", _compiled)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Traced programs are many small objects: to look through them takes long.
gc.set_threshold(200_000, 20, 20)


def pytest_unconfigure():
    shutil.rmtree(_compiled, ignore_errors=True)


@pytest.fixture
def count_of_compilations():
    """A list that grows with each program that XLA compiles."""
    compiled = []

    def listen(event, seconds, **_):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled
