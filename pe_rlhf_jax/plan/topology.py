"""The devices to compile for: a TPU slice that need not exist, or those of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.plan.chips import CHIPS, Chip

LOCAL = "local"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices, and what is known of one of them."""

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None
    """Published figures; None of a CPU or GPU."""
    usable: float | None
    """GiB that programs and their data may have on each; None where nobody says."""


def describe(name: str) -> Topology:
    """`v5e:4x4`, `v5p:8x8x16`, ... or `local`, this machine's devices. No slice is reached: the compiler is asked to describe it.

    Raises:
        ConfigError: no such generation or shape, or libtpu is not installed.
    """
    if name == LOCAL:
        devices = jax.devices()
        return Topology(name, devices, None, _memory(devices))
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if found is None or found[1] not in CHIPS:
        raise ConfigError(f"topology {name!r}: expected GENERATION:SHAPE such as v5e:4x4 or v5p:8x8x16, of {', '.join(CHIPS)}, or {LOCAL}")
    generation, shape = found[1], found[2]
    # libtpu would otherwise look for the TPU VM that it believes to be on, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nor wait for, or keep out, another plan or a run on this machine's TPU: no chip is opened here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    chips = int(np.prod([int(n) for n in shape.split("x")]))
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{generation}-{chips}")
    # On v4 JAX shows each chip as one device, with both of its cores.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu takes a host to have 2 x 2 chips
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (ImportError, RuntimeError, ValueError) as error:
        if "not installed" in str(error) or isinstance(error, ImportError):
            raise ConfigError(f"topology {name}: needs the TPU compiler; pip install 'pe_rlhf_jax[tpu-plan]'") from error
        raise ConfigError(f"topology {name}: the TPU compiler knows no such slice ({error})") from error
    chip = CHIPS[generation]
    return Topology(name, described.devices, chip, chip.usable)


def _memory(devices: Sequence[jax.Device]) -> float | None:
    """GiB of each: what JAX's allocator may take of a GPU, or an equal part of this machine's memory, or of this container's."""
    if devices[0].platform != "cpu":
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
        return None if limit is None else limit / GIB
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(file.read_text()))
    return min(limits) / GIB / len(devices)
