"""Devices that are not there, for meshes on which nothing is computed."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What a mesh asks of a device."""

    id: int
    device_kind: str = "stand-in"
    platform: str = "cpu"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class TPUStandIn(StandIn):
    device_kind: str = "TPU v5"
    platform: str = "tpu"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    slice_index: int = 0
