"""Published weights into the decoder's parameter tree, one leaf at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pe_rlhf_jax.models.decoder import Decoder, DecoderConfig
from pe_rlhf_jax.models.families import Family, Weight
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
        """The tensor in float32; matrices of linear layers are [out, in]."""
        ...


def load_params(reader: WeightReader, family: Family, config: DecoderConfig, dtype: Any, shardings: PyTree | None = None) -> PyTree:
    """The decoder's parameters in `dtype`, on the default device or with `shardings` (a tree like the parameters).

    Every tensor of the file and every leaf of the tree is accounted for before the first one is read. The host holds
    one leaf at a time.

    Raises:
        WeightsError: tensors are missing, unknown, of another shape, unreadable, or not finite.
    """
    tree = jax.eval_shape(Decoder(config).init_params, jax.random.key(0))
    leaves = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    table = {weight.leaf: weight for weight in family.weights(config)}
    if table.keys() != leaves.keys():
        raise AssertionError(f"{family.model_type}'s weights do not fit the decoder: {table.keys() ^ leaves.keys()}")
    _account(reader, family, config, [(table[leaf], shape) for leaf, shape in leaves.items()])
    params: dict[str, Any] = {}
    for leaf, shape in leaves.items():
        sharding = None if shardings is None else _at(shardings, leaf)
        *parents, last = leaf
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = _place(_leaf(reader, table[leaf], config, shape, dtype), sharding)
    return params


def _leaf(reader: WeightReader, weight: Weight, config: DecoderConfig, shape: Sequence[int], dtype: Any) -> Float[np.ndarray, "*shape"]:
    leaf = np.empty(shape, jnp.dtype(dtype))
    for i, name in enumerate(weight.names(config.num_layers)):
        tensor = reader.read(name)
        if not np.isfinite(tensor).all():
            raise WeightsError(f"{reader.path}: {name} holds values that are not finite; the file is damaged")
        leaf[i if weight.per_layer else ...] = tensor.T if weight.transposed else tensor
    return leaf


def _place(leaf: Float[np.ndarray, "*shape"], sharding: jax.sharding.Sharding | None) -> jax.Array:
    # Waits, or the host would hold this leaf while it reads the next.
    if sharding is None:
        return jax.device_put(leaf).block_until_ready()
    # Each device, and on several hosts each host, is sent its own part only.
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]).block_until_ready()


def _account(reader: WeightReader, family: Family, config: DecoderConfig, expected: Sequence[tuple[Weight, tuple[int, ...]]]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, leaf_shape in expected:
        shape = leaf_shape[1:] if weight.per_layer else leaf_shape
        for name in weight.names(config.num_layers):
            shapes[name] = shape[::-1] if weight.transposed else shape
    present = set(reader.names)
    if missing := [name for name in shapes if name not in present]:
        raise WeightsError(f"{reader.path}: the file lacks {_some(missing)}; is the download complete?")
    for name, shape in shapes.items():
        if (found := reader.shape(name)) != shape:
            raise WeightsError(f"{reader.path}: {name} should be {shape} by the configuration, but is {found}")
    patterns = family.ignorable(config)
    extra = [name for name in reader.names if name not in shapes]
    if unknown := [name for name in extra if not any(re.fullmatch(pattern, name) for pattern in patterns)]:
        raise WeightsError(f"{reader.path}: {_some(unknown)} would be ignored, so this is not a plain {family.model_type} model")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more tensors" if len(names) > 4 else "")


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
