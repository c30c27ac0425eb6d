"""What a result belongs to: the device and the versions."""

import importlib.metadata
import os
import platform
import time
from typing import Any

import jax

import hk_stack

_PACKAGES = ("dm-haiku", "jax", "jaxlib", "flax", "equinox", "optax")


def environment() -> dict[str, Any]:
    """The device and the versions that a result belongs to."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {
            "hk_stack": hk_stack.__version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
