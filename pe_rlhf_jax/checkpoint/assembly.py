"""Leaves put together on the host: every tensor of the file goes straight to its place in the part that a device will hold.

On a CPU, JAX takes these parts as they are, so nothing is copied again.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

_ROWS = 64
"""Rows that are transposed at once; they stay in the processor's cache."""


class Assembly:
    """One leaf on its way to the default device, or with `sharding` to those devices of it that are this host's."""

    def __init__(self, shape: Sequence[int], dtype: Any, sharding: jax.sharding.Sharding | None):
        self.shape, self.sharding = tuple(shape), sharding
        whole = tuple(slice(0, n) for n in self.shape)
        places: Mapping[Any, Any] = {None: whole} if sharding is None else sharding.addressable_devices_indices_map(self.shape)
        self._key = {device: tuple(s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)) for device, index in places.items()}
        # Devices with the same part share it.
        self._parts = {key: pages([stop - start for start, stop in key], dtype) for key in self._key.values()}

    def fill(self, tensor: Float[np.ndarray, "*shape"], layer: int | None = None) -> None:
        """Puts the whole leaf, or one layer of it, in its place, converted to the leaf's dtype; the axis of layers is not sharded.

        A whole tensor that is right as it is is not copied and must not be changed from now on, unless it is read-only: pages of a file.
        """
        for key, part in self._parts.items():
            mine = tensor[tuple(slice(*bounds) for bounds in (key if layer is None else key[1:]))]
            if layer is None and mine.dtype == part.dtype and mine.flags.c_contiguous and mine.flags.writeable:
                self._parts[key] = mine
            else:
                copy(mine, part if layer is None else part[layer])

    def placed(self) -> jax.Array:
        """The leaf on its devices. The parts are JAX's from now on."""
        if self.sharding is None:
            (part,) = self._parts.values()
            return jax.device_put(part)
        parts = [jax.device_put(self._parts[key], device) for device, key in self._key.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)


def send(tensor: Float[np.ndarray, "*shape"], dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A tensor on the default device or by `sharding`, converted to `dtype`; the parts for this host's devices are made one by one."""

    def part(of: Float[np.ndarray, "*part"], device: jax.Device | None) -> jax.Array:
        made = pages(of.shape, dtype)
        copy(of, made)
        return jax.block_until_ready(jax.device_put(made, device))

    if sharding is None:
        return part(tensor, None)
    places = sharding.addressable_devices_indices_map(tensor.shape)
    return jax.make_array_from_single_device_arrays(
        tensor.shape, sharding, [part(tensor[index], device) for device, index in places.items()]
    )


def copy(source: Float[np.ndarray, "*shape"], target: Float[np.ndarray, "*shape"]) -> None:
    """`target[...] = source` to the bit, for a source that may be a matrix's transposed view, at memory's speed."""
    if source.ndim != 2 or abs(source.strides[0]) >= abs(source.strides[1]):
        return _convert(source, target)
    rows, turned = source.T, _bits(target).T
    # A cache line more than a row: rows that are a power of two apart would push each other out of the cache.
    block = np.empty((_ROWS, rows.shape[1] + 64 // target.itemsize), target.dtype)[:, : rows.shape[1]]
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        _convert(some, block[: len(some)])
        turned[start : start + _ROWS] = _bits(block[: len(some)])


def _convert(source: Float[np.ndarray, "*shape"], target: Float[np.ndarray, "*shape"]) -> None:
    # NumPy is slow on 16-bit floats that are not its own, and fast on their bits.
    if source.dtype == target.dtype:
        _bits(target)[...] = _bits(source)
    elif source.dtype == jnp.bfloat16 and target.dtype == np.float32:
        np.left_shift(_bits(source), np.uint32(16), out=_bits(target), dtype=np.uint32)
    else:
        target[...] = source


def _bits(array: Float[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    return array.view(f"u{array.itemsize}")


def pages(shape: Sequence[int], dtype: Any) -> Float[np.ndarray, "*shape"]:
    """A new array that begins with a page of memory, so that JAX can use it on a CPU as it is.

    The system's ordinary pages: NumPy asks for huge ones, and where memory is in pieces, making these takes longer than all the rest.
    """
    size = int(np.prod(shape, dtype=np.int64)) * jnp.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).view(jnp.dtype(dtype)).reshape(shape)
