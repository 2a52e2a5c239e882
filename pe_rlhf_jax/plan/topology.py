"""The devices to compile for: a TPU slice that need not exist, or those of this machine."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.plan.chips import CHIPS, Chip

LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices, and the published figures of one of them; None where there are none (CPU and GPU)."""

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None


def describe(name: str) -> Topology:
    """`v5e:4x4`, `v5p:8x8x16`, ... or `local`. Nothing is reached: the compiler is asked for a description of the slice.

    Raises:
        ConfigError: no such generation or shape, or libtpu is not installed.
    """
    if name == LOCAL:
        return Topology(name, jax.devices(), None)
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if found is None or found[1] not in CHIPS:
        raise ConfigError(f"topology {name!r}: expected GENERATION:SHAPE such as v5e:4x4 or v5p:8x8x16, of {', '.join(CHIPS)}, or {LOCAL}")
    generation, shape = found[1], found[2]
    # libtpu would otherwise look for the TPU VM that it believes to be on, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nor wait for, or keep out, another plan or a run on this machine's TPU: no chip is opened here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{generation}-{int(np.prod([int(n) for n in shape.split('x')]))}")
    # On v4 JAX shows each chip as one device, with both of its cores.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (ImportError, RuntimeError, ValueError) as error:
        if "not installed" in str(error) or isinstance(error, ImportError):
            raise ConfigError(f"topology {name}: needs the TPU compiler; pip install 'pe_rlhf_jax[tpu-plan]'") from error
        raise ConfigError(f"topology {name}: the TPU compiler knows no such slice ({error})") from error
    return Topology(name, described.devices, CHIPS[generation])
