"""Published weights into the decoder's parameter tree, one leaf at a time."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from pe_rlhf_jax.checkpoint.assembly import Assembly, send
from pe_rlhf_jax.models.architecture import DecoderConfig, TowerConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.families import Family, Weight, towers
from pe_rlhf_jax.models.vision import VisionTower
from pe_rlhf_jax.types import PyTree

_READERS = min(4, os.cpu_count() or 1)
"""Layers that are read at the same time."""
_HEAD = r"(lm_head|embed_out)\.weight"


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
        """The tensor in float32, float16 or bfloat16, as stored; matrices of linear layers are [out, in]. Called by several threads."""
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

    Every tensor of the file and every leaf of the tree is accounted for before the first one is read. Where devices have memory of
    their own, the host holds one tensor of the file at a time, and the part of it that is on its way to one of them; on a CPU, whose
    devices' memory is the host's, tensors are read straight into that, a few at the same time.
    `store(path, leaf)` may keep something else in a leaf's place, such as its quantized form, before the next one is read.

    Raises:
        WeightsError: tensors are missing, unknown, of another shape, unreadable, or not finite; a head that should be the embedding is not.
    """
    leaves = leaf_shapes(config)
    table = family.weights(config)
    _check_table(table, leaves, family.model_type)
    file_names = account(reader, family, config, [(weight, leaves[weight.leaf]) for weight in table])
    embedding = next(file_names[weight.name] for weight in table if weight.leaf == ("embed",))
    for name in reader.names:
        if re.fullmatch(_HEAD, family.canonical(name)) and name not in file_names.values():
            _check_tied(reader, name, embedding)
    return _read(reader, table, leaves, file_names, config.num_layers, dtype, shardings, store)


def _check_tied(reader: WeightReader, head: str, embedding: str) -> None:
    """Trainers may untie a head and leave the configuration as it was; transformers then uses the head that it finds."""
    if reader.shape(head) != reader.shape(embedding) or not np.array_equal(reader.read(head), reader.read(embedding)):
        raise WeightsError(
            f"{reader.path}: {head} is not {embedding}, to which the configuration ties it; if it was trained, set tie_word_embeddings to "
            "false in config.json"
        )


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
    tower: PyTree = _read(reader, table, leaves, file_names, config.num_layers, dtype, shardings)["vision"]
    return tower


def _check_table(table: Sequence[Weight], leaves: Mapping[tuple[str, ...], Any], what: str) -> None:
    if sorted(weight.leaf for weight in table) != sorted(leaves):
        raise AssertionError(f"{what}'s weights do not fit: {set(leaves) ^ {w.leaf for w in table}}")


def _read(
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
    with ThreadPoolExecutor(_READERS) as pool:
        for weights in grouped(table):
            shapes = [leaves[weight.leaf] for weight in weights]
            places = [None if shardings is None else _at(shardings, weight.leaf) for weight in weights]
            names = [file_names[name] for name in weights[0].names(num_layers)]
            if _host_is_device():
                assemblies = [Assembly(shape, dtype, place) for shape, place in zip(shapes, places, strict=True)]
                for _ in pool.map(functools.partial(_fill, reader, weights, assemblies), names, itertools.count()):
                    pass  # an error comes out here, and what has not begun is left out
                filled = [assembly.placed() for assembly in assemblies]
                del assemblies
            else:
                filled = _sent(reader, weights, shapes, dtype, places, names)
            for weight in weights:
                *parents, last = weight.leaf
                node = params
                for parent in parents:
                    node = node.setdefault(parent, {})
                leaf = jax.block_until_ready(filled.pop(0))
                node[last] = leaf if store is None else store(weight.leaf, leaf)
                del leaf
    return params


def _host_is_device() -> bool:
    """Whether the devices' memory is the host's."""
    return jax.default_backend() == "cpu"


def _sent(
    reader: WeightReader,
    weights: Sequence[Weight],
    shapes: Sequence[tuple[int, ...]],
    dtype: Any,
    places: Sequence[jax.sharding.NamedSharding | None],
    names: Sequence[str],
) -> list[jax.Array]:
    """The leaves out of one tensor of each layer, which are sent to their devices one after the other and put in their place there."""
    per_layer = weights[0].per_layer
    leaves = [jnp.zeros(shape, dtype, device=place) for shape, place in zip(shapes, places, strict=True)] if per_layer else []
    for layer, name in enumerate(names):
        tensor = _finite(reader, name)
        sent = [send(w.take(tensor), dtype, _of_layer(p) if per_layer else p) for w, p in zip(weights, places, strict=True)]
        del tensor
        leaves = [_put(leaf, part, layer) for leaf, part in zip(leaves, sent, strict=True)] if per_layer else sent
    return leaves


def _of_layer(place: jax.sharding.NamedSharding | None) -> jax.sharding.NamedSharding | None:
    return place and jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*place.spec[1:]))


@functools.partial(jax.jit, donate_argnums=0)
def _put(leaf: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    """The stacked leaf with one layer filled."""
    return jax.lax.dynamic_update_index_in_dim(leaf, part, layer, 0)


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


def _fill(reader: WeightReader, weights: Sequence[Weight], assemblies: Sequence[Assembly], name: str, layer: int) -> None:
    """Reads a tensor of the file into its place in each of the leaves."""
    tensor = _finite(reader, name)
    for weight, assembly in zip(weights, assemblies, strict=True):
        assembly.fill(weight.take(tensor), layer if weight.per_layer else None)


def _finite(reader: WeightReader, name: str) -> Float[np.ndarray, "*shape"]:
    """A tensor of the file. Raises WeightsError if it holds a value that is not finite."""
    tensor = reader.read(name)
    if not _is_finite(tensor):
        raise WeightsError(f"{reader.path}: {name} holds values that are not finite; the file is damaged")
    return tensor


def _is_finite(tensor: Shaped[np.ndarray, "*shape"]) -> bool:
    """Whether all exponents are below the one of infinities and NaNs; by bits, in pieces, as NumPy is slow on 16-bit floats."""
    kind = {2: np.uint16, 4: np.uint32}[tensor.dtype.itemsize]
    infinity = np.array(np.inf, tensor.dtype).view(kind)
    flat = np.ascontiguousarray(tensor).reshape(-1).view(kind)
    largest = kind(2 ** (8 * tensor.dtype.itemsize - 1) - 1)  # all bits but the sign
    return all((flat[i : i + 2**18] & largest).max() < infinity for i in range(0, flat.size, 2**18))


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
