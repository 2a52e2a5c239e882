"""Device mesh, the parameter rule and the batch rule.

Mesh axes: `data` holds copies of the model, `fsdp` shards parameters and batch, `tensor` shards heads, hidden units and vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pe_rlhf_jax.config import Config, ConfigError, MeshConfig
from pe_rlhf_jax.types import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
ROWS = PartitionSpec(BATCH)
"""Batches are split by row over both data axes."""

_COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROW_PARALLEL = ("o_proj", "down_proj")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, of one slice. Raises ConfigError if the axes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise ConfigError(f"the devices belong to {len(slices)} TPU slices, between which nothing is planned: expected one slice")
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        rest = -int(np.prod(sizes))
        if len(devices) % rest:
            raise ConfigError(
                f"mesh: the given axes take {rest} devices, which does not divide the {len(devices)} that are present; "
                f"let them take one of {_divisors(len(devices))}"
            )
        sizes[sizes.index(-1)] = len(devices) // rest
    if int(np.prod(sizes)) != len(devices):
        axes = ", ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise ConfigError(
            f"mesh: {axes} makes {int(np.prod(sizes))} devices, but {len(devices)} are present; set one axis to -1 and "
            f"let the others together take one of {_divisors(len(devices))}"
        )
    # Where the sizes of the axes do not suit the dimensions of the torus, one of these is split.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def parameter_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Where a leaf lives, by the last names of its path; adapters and optimizer moments follow the matrix they belong to.

    A bias lies with the outputs of its matrix where these are sharded over heads or hidden units, and norms are whole everywhere. A
    dimension that its axis does not divide stays whole.
    """
    if path[-2:-1] == ("kernel",):  # values and scales of a quantized matrix
        path = path[:-1]
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
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(tree, mesh), is_leaf=lambda x: isinstance(x, PartitionSpec))


def _specs(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    def of(path: tuple, leaf: jax.Array) -> PartitionSpec:
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
        return parameter_spec(names, np.shape(leaf), mesh)

    return jax.tree_util.tree_map_with_path(of, tree)


def placed_shapes(shapes: PyTree, mesh: Mesh) -> PyTree:
    """Shapes together with their places by the parameter rule: what a restored or a compiled tree is to look like."""
    return with_places(shapes, shardings(shapes, mesh))


def with_places(shapes: PyTree, places: PyTree) -> PyTree:
    """Shapes with the given places."""
    return jax.tree.map(lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Says where an activation lives on the mesh in use (`jax.set_mesh`); unchanged without one.

    Without this the compiler goes by the parameters alone and may put every row on every chip, with sums over all of them in place
    of the gathered matrix. `axes` name a mesh axis, several, or none for each dimension; one that does not divide its dimension is
    left out.
    """
    mesh = _mesh_in_use()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _spec(mesh, axes, x.shape))


def _spec(mesh: AbstractMesh, axes: Sequence[str | tuple[str, ...] | None], shape: tuple[int, ...]) -> PartitionSpec:
    def divides(axis: str | tuple[str, ...] | None, n: int) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return n % int(np.prod([mesh.shape[name] for name in names])) == 0

    return PartitionSpec(*(axis if divides(axis, n) else None for axis, n in zip(axes, shape, strict=True)))


def keep_placed(tree: PyTree) -> PyTree:
    """Inside a compiled program: leaves by the parameter rule of the mesh in use (`jax.set_mesh`); unchanged without one.

    What a program returns and is given again must lie where it lay, or the second call would compile it anew.
    """
    return _constrained(tree, lambda spec: spec)


def gathered(tree: PyTree) -> PyTree:
    """Inside a compiled program: leaves whole over `fsdp`, and for the rest by the parameter rule; unchanged without a mesh."""
    return _constrained(tree, lambda spec: PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec)))


def one_device() -> bool:
    """Whether the mesh in use, if any, is of a single device."""
    return _mesh_in_use() is None


def holds_whole(is_gathered: bool) -> bool:
    """Inside a compiled program: whether each device of the mesh in use has all of every parameter, or will, if it is `gathered`."""
    mesh = _mesh_in_use()
    return mesh is None or (mesh.shape["tensor"] == 1 and (is_gathered or mesh.shape["fsdp"] == 1))


def _constrained(tree: PyTree, change: Callable[[PartitionSpec], PartitionSpec]) -> PyTree:
    mesh = _mesh_in_use()
    if mesh is None:
        return tree
    return jax.tree.map(lambda x, spec: jax.lax.with_sharding_constraint(x, change(spec)), tree, _specs(tree, mesh))


def _mesh_in_use() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, if it is one of ours with several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names) else mesh


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a tree on the devices by the parameter rule."""
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def place_rows(batch: PyTree, mesh: Mesh) -> PyTree:
    """Puts a batch on the devices, split by row. The number of rows must be a multiple of `row_multiple(mesh)`.

    With several hosts every one is given the whole batch, and sends its devices their rows: each row is somewhere, none is there twice
    (but for the devices along `tensor`, which share them), however many hosts there are.
    """
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, ROWS)), batch)


def _put(x: jax.Array, place: NamedSharding) -> jax.Array:
    here = not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
    if place.is_fully_addressable or not here:
        return jax.device_put(x, place)
    host = np.asarray(x)  # device_put would first compare it with every other process's
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def row_multiple(mesh: Mesh | AbstractMesh) -> int:
    """Rows of every batch must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_groups(*counts: int) -> int:
    """Into how many parts the mesh in use (`jax.set_mesh`) splits batches of so many rows; 1 without one, and where it cannot."""
    mesh = _mesh_in_use()
    groups = 1 if mesh is None else row_multiple(mesh)
    return 1 if any(count % groups for count in counts) else groups


Axes = tuple[str | tuple[str, ...] | None, ...]


def apart(f: Callable[..., jax.Array], groups: int, arguments: Sequence[Axes], result: Axes) -> Callable[..., jax.Array]:
    """A function that every device computes of its own part alone, where the mesh in use splits rows into so many groups.

    Args:
        arguments: the mesh axes along the dimensions of each argument, as `constrain` takes them.
        result: the same of what the function returns.
    """
    mesh = _mesh_in_use()
    if mesh is None or groups == 1:
        return f

    def parted(*given: jax.Array) -> jax.Array:
        specs = [_spec(mesh, axes, x.shape) for axes, x in zip(arguments, given, strict=True)]
        return jax.shard_map(f, mesh=mesh, in_specs=tuple(specs), out_specs=_spec(mesh, result, given[0].shape), check_vma=False)(*given)

    return parted


def micro_batch_multiple(config: Config, stage: str, devices: int) -> int:
    """What a stage's micro-batches are a multiple of, for so many devices along data and fsdp. A pair is two rows, if not packed."""
    two = stage == "reward" and config.reward.kind != "labels" and not config.data.packing
    return devices // math.gcd(devices, 2) if two else devices


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError if a batch of the run's stages, or what of it is computed at once, cannot be split evenly over the mesh."""
    devices = row_multiple(mesh)
    stages = [name for name in ("sft", "reward", "rl", "evaluate") if name in config.run.stages]
    sizes = {f"{name}.batch_size": getattr(config, name).batch_size for name in stages}
    sizes |= {f"{name}.micro_batch_size": getattr(config, name).micro_batch_size for name in stages if name != "evaluate"}
    if "rl" in stages and config.rl.algorithm != "reinforce":
        sizes["rl.batch_size / rl.num_mini_batches"] = config.rl.batch_size // config.rl.num_mini_batches
    if "rl" in stages or "evaluate" in stages:
        sizes["rl.sampling.max_num_seqs"] = config.rl.sampling.max_num_seqs
    for field, size in sizes.items():
        multiple = micro_batch_multiple(config, "reward", devices) if field == "reward.micro_batch_size" else devices
        if size is not None and size % multiple:
            raise ConfigError(
                f"{field} {size} must be a multiple of {multiple}, for the {devices} devices along mesh axes data and fsdp: "
                f"{-(-size // multiple) * multiple} is one; or let mesh.tensor take some of the devices"
            )
