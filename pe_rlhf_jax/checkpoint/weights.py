"""Published weights into the decoder's parameter tree, one leaf at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from pe_rlhf_jax.models.architecture import DecoderConfig, TowerConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.families import Family, Weight, towers
from pe_rlhf_jax.models.vision import VisionTower
from pe_rlhf_jax.types import PyTree


class WeightsError(ValueError):
    """Weights that cannot be read: damaged, incomplete or not the ones expected. The message names the file."""


class WeightReader(Protocol):
    """A model file or folder, presented in Hugging Face's terms whatever its format."""

    path: Path
    files: tuple[Path, ...]
    """The files that hold the weights."""
    config: dict[str, Any]
    """As `config.json`."""
    eos_token_ids: tuple[int, ...]
    """Every end token that the file declares; may be empty."""
    names: tuple[str, ...]
    """Tensor names, such as `model.layers.0.self_attn.q_proj.weight`."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Float[np.ndarray, "*shape"]:
        """The tensor in float32, float16 or bfloat16, as stored; matrices of linear layers are [out, in]."""
        ...


def load_params(
    reader: WeightReader,
    family: Family,
    config: DecoderConfig,
    dtype: Any,
    shardings: PyTree | None = None,
    store: Callable[[tuple[str, ...], jax.Array], PyTree] | None = None,
) -> PyTree:
    """The decoder's parameters in `dtype`, on the default device or with `shardings` (a tree like the parameters, `NamedSharding`s).

    Every tensor of the file and every leaf of the tree is accounted for before the first one is read. The host holds one tensor of
    the file at a time; layers are stacked, transposed and converted where the leaf lives. `store(path, leaf)` may
    keep something else in a leaf's place, such as its quantized form, before the next one is read.

    Raises:
        WeightsError: tensors are missing, unknown, of another shape, unreadable, or not finite.
    """
    leaves = leaf_shapes(config)
    table = family.weights(config)
    _check_table(table, leaves, family.model_type)
    file_names = account(reader, family, config, [(weight, leaves[weight.leaf]) for weight in table])
    return _fill(reader, table, leaves, file_names, config.num_layers, dtype, shardings, store)


def load_tower(reader: WeightReader, config: TowerConfig, dtype: Any, shardings: PyTree | None = None) -> PyTree:
    """A vision tower's parameters, the decoder's `vision`, out of a file that holds a tower alone. As `load_params` else.

    `shardings`: a tree like the decoder's parameters, of which `vision` is read.

    Raises:
        WeightsError: see `load_params`.
    """
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    leaves = _shapes({"vision": jax.eval_shape(VisionTower(config).init, jax.random.key(0), image)["params"]})
    table = towers.weights(config, "")
    _check_table(table, leaves, "the tower")
    expected = [(weight, leaves[weight.leaf]) for weight in table]
    file_names = _account(reader, towers.canonical, towers.ignorable(config, ""), "vision tower", config.num_layers, expected)
    tower: PyTree = _fill(reader, table, leaves, file_names, config.num_layers, dtype, shardings)["vision"]
    return tower


def _check_table(table: Sequence[Weight], leaves: Mapping[tuple[str, ...], Any], what: str) -> None:
    if sorted(weight.leaf for weight in table) != sorted(leaves):
        raise AssertionError(f"{what}'s weights do not fit: {set(leaves) ^ {w.leaf for w in table}}")


def _fill(
    reader: WeightReader,
    table: Sequence[Weight],
    leaves: Mapping[tuple[str, ...], tuple[int, ...]],
    file_names: Mapping[str, str],
    num_layers: int,
    dtype: Any,
    shardings: PyTree | None,
    store: Callable[[tuple[str, ...], jax.Array], PyTree] | None = None,
) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for weights in grouped(table):
        shards = [None if shardings is None else _at(shardings, weight.leaf) for weight in weights]
        filled = [
            jnp.zeros(leaves[weight.leaf], dtype, device=shard) if weight.per_layer else None
            for weight, shard in zip(weights, shards, strict=True)
        ]
        for layer, name in enumerate(weights[0].names(num_layers)):
            tensor = reader.read(file_names[name])
            if not _is_finite(tensor):
                raise WeightsError(f"{reader.path}: {file_names[name]} holds values that are not finite; the file is damaged")
            for i, weight in enumerate(weights):
                part = tensor.reshape(tensor.shape[weight.ones :]) if weight.part is None else weight.take(tensor)
                turned = weight.transposed and weight.part is None
                placed = _turn(_place(part, shards[i], weight.per_layer, turned), turned, dtype)
                filled[i] = _put(filled[i], placed, layer) if weight.per_layer else placed
                jax.block_until_ready(filled[i])  # or the host would hold this tensor while it reads the next
        for weight, leaf in zip(weights, filled, strict=True):
            assert leaf is not None
            *parents, last = weight.leaf
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf if store is None else store(weight.leaf, leaf)
    return params


def leaf_shapes(config: DecoderConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every leaf of the decoder's parameters, by its path."""
    return _shapes(jax.eval_shape(Decoder(config).init_params, jax.random.key(0)))


def _shapes(tree: PyTree) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def grouped(table: Sequence[Weight]) -> list[list[Weight]]:
    """The weights by the tensor that they come from, in the order of the table."""
    groups: dict[str, list[Weight]] = {}
    for weight in table:
        groups.setdefault(weight.name, []).append(weight)
    return list(groups.values())


# Two programs: in one, XLA's CPU compiler makes a slow loop of the two.
@functools.partial(jax.jit, static_argnames=("turned", "dtype"))
def _turn(tensor: jax.Array, turned: bool, dtype: Any) -> jax.Array:
    return (tensor.T if turned else tensor).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf: jax.Array, tensor: jax.Array, layer: int) -> jax.Array:
    """The stacked leaf with one layer filled."""
    # As integers: on the CPU, XLA copies 16-bit floats one by one, twenty times slower.
    bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    whole, part = (jax.lax.bitcast_convert_type(x, bits) for x in (leaf, tensor))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), leaf.dtype)


def _is_finite(tensor: Shaped[np.ndarray, "*shape"]) -> bool:
    """Whether all exponents are below the one of infinities and NaNs; by bits, in pieces, as NumPy is slow on 16-bit floats."""
    kind = {2: np.uint16, 4: np.uint32}[tensor.dtype.itemsize]
    infinity = np.array(np.inf, tensor.dtype).view(kind)
    flat = np.ascontiguousarray(tensor).reshape(-1).view(kind)
    largest = kind(2 ** (8 * tensor.dtype.itemsize - 1) - 1)  # all bits but the sign
    return all((flat[i : i + 2**18] & largest).max() < infinity for i in range(0, flat.size, 2**18))


def _place(tensor: Shaped[np.ndarray, "*shape"], sharding: jax.sharding.NamedSharding | None, per_layer: bool, turned: bool) -> jax.Array:
    """The tensor on the devices, each of which (and on several hosts each host) is sent its own part only."""
    if sharding is None:
        return jax.device_put(tensor)
    axes = (*sharding.spec, *[None] * (tensor.ndim + per_layer - len(sharding.spec)))[per_layer:]
    spec = jax.sharding.PartitionSpec(*(reversed(axes) if turned else axes))
    placed = jax.sharding.NamedSharding(sharding.mesh, spec)
    return jax.make_array_from_callback(tensor.shape, placed, lambda index: tensor[index])


def account(
    reader: WeightReader, family: Family, config: DecoderConfig, expected: Sequence[tuple[Weight, tuple[int, ...]]]
) -> dict[str, str]:
    """The file's name of every expected tensor. Raises WeightsError for what is missing, has another shape or would be ignored."""
    return _account(reader, family.canonical, family.ignorable(config), f"{family.model_type} model", config.num_layers, expected)


def _account(
    reader: WeightReader,
    canonical: Callable[[str], str],
    patterns: Sequence[str],
    kind: str,
    num_layers: int,
    expected: Sequence[tuple[Weight, tuple[int, ...]]],
) -> dict[str, str]:
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, leaf_shape in expected:
        shape = weight.file_shape(leaf_shape[1:] if weight.per_layer else leaf_shape)
        shapes |= dict.fromkeys(weight.names(num_layers), shape)
    present: dict[str, str] = {}
    for name in reader.names:
        if (other := present.setdefault(canonical(name), name)) != name:
            raise WeightsError(f"{reader.path}: {other} and {name} are the same weight; the file is damaged")
    if missing := [name for name in shapes if name not in present]:
        raise WeightsError(f"{reader.path}: the file lacks {_some(missing)}; is the download complete?")
    for name, shape in shapes.items():
        if (found := reader.shape(present[name])) != shape:
            raise WeightsError(f"{reader.path}: {present[name]} should be {shape} by the configuration, but is {found}")
    extra = [name for name in present if name not in shapes]
    if unknown := [present[name] for name in extra if not any(re.fullmatch(pattern, name) for pattern in patterns)]:
        raise WeightsError(f"{reader.path}: {_some(unknown)} would be ignored, so this is not a plain {kind}")
    return {name: present[name] for name in shapes}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more tensors" if len(names) > 4 else "")


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
