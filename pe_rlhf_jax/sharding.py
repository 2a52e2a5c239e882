"""Device mesh, the parameter rule and the batch rule.

Mesh axes: `data` holds copies of the model, `fsdp` shards parameters and batch, `tensor` shards heads, hidden units and vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pe_rlhf_jax.config import ConfigError, MeshConfig
from pe_rlhf_jax.types import PyTree

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))
"""Batches are split by row over both data axes."""

_COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROW_PARALLEL = ("o_proj", "down_proj")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices. Raises ConfigError if the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        rest = -int(np.prod(sizes))
        if len(devices) % rest:
            raise ConfigError(f"mesh: {len(devices)} devices cannot be divided by the given axes' {rest}")
        sizes[sizes.index(-1)] = len(devices) // rest
    if int(np.prod(sizes)) != len(devices):
        axes = ", ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"mesh: {axes} makes {int(np.prod(sizes))} devices, but {len(devices)} are present; set one axis to -1")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a leaf lives, by the last names of its path; adapters and optimizer moments follow the matrix they belong to.

    A bias lies with the outputs of its matrix where these are sharded over heads or hidden units, and norms are whole everywhere. A
    dimension that its axis does not divide stays whole.
    """
    leaf, module = path[-1], path[-2] if len(path) > 1 else ""
    columns = {"kernel": ("fsdp", "tensor"), "bias": ("tensor",), "a": ("fsdp", None), "b": (None, "tensor")}
    rows = {"kernel": ("tensor", "fsdp"), "a": ("tensor", None), "b": (None, "fsdp")}
    axes: tuple[str | None, ...] = ()
    if leaf in ("embed", "lm_head"):
        axes = ("tensor", "fsdp")
    elif leaf == "position_embed":
        axes = (None, "fsdp")
    elif module in _COLUMN_PARALLEL:
        axes = columns.get(leaf, ())
    elif module in _ROW_PARALLEL:
        axes = rows.get(leaf, ())
    if len(shape) < len(axes):
        return PartitionSpec()
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)))


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for every leaf of parameters, roles, optimizer or training state (arrays or shapes)."""

    def of(path: tuple, leaf: jax.Array) -> NamedSharding:
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
        return NamedSharding(mesh, parameter_spec(names, np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a tree on the devices by the parameter rule."""
    return jax.device_put(tree, shardings(tree, mesh))


def place_rows(batch: PyTree, mesh: Mesh) -> PyTree:
    """Puts a batch on the devices, split by row. The number of rows must be a multiple of `row_multiple(mesh)`."""
    return jax.device_put(batch, NamedSharding(mesh, ROWS))


def row_multiple(mesh: Mesh) -> int:
    """Rows of every batch must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
