"""Which devices JAX looks for when it starts, and what they are."""

from __future__ import annotations

import jax
from jax._src import cloud_tpu_init  # JAX's own answer to whether there is a TPU, which starts no device
from jax.extend import backend


def skip_missing_tpu() -> None:
    """Keeps JAX from loading libtpu where it is installed, for `plan`, and no TPU is there; call it before any device is used.

    libtpu looks for its chips, prints what it does not find, and can be loaded by one process at a time. A choice by `JAX_PLATFORMS`
    stands, and so does everything where a TPU is.
    """
    if getattr(jax.config, "jax_platforms", None) or getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True):
        return
    backend.register_backend_factory("tpu", _no_tpu)


def is_nvidia(capability: float = 0.0) -> bool:
    """Whether programs are compiled for NVIDIA GPUs, where nothing else is asked for; of this compute capability or a later one."""
    if jax.default_backend() != "gpu" or "cuda" not in backend.get_backend().platform_version.lower():
        return False
    return all(float(device.compute_capability) >= capability for device in jax.local_devices())


def _no_tpu() -> None:
    raise RuntimeError("this machine has no TPU chip")  # JAX goes on with its other backends
