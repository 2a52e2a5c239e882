"""Safetensors files written tensor by tensor, in shards with an index; the library's own writer holds a whole shard in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterable[tuple[str, Callable[[], Shaped[np.ndarray, "*shape"]]]],
    shard_bytes: int,
) -> list[Path]:
    """Write `model.safetensors`, or shards of about `shard_bytes` and `model.safetensors.index.json`, into a folder.

    Args:
        shapes: of every tensor, in the order in which they are written.
        dtype: `float32`, `float16` or `bfloat16`, of all of them.
        tensors: (name, a function that makes the tensor), in the order of `shapes`; each is asked for when it is written.

    Raises:
        ValueError: another tensor than was announced.
    """
    width = 4 if dtype == "float32" else 2
    sizes = {name: width * int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    files = [folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [folder / "model.safetensors"]
    source = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        with open(file, "wb") as sink:
            sink.write(_header({name: shapes[name] for name in names}, sizes, dtype))
            for name in names:
                found, make = next(source)
                tensor = make()
                if (found, tensor.shape, tensor.dtype.name) != (name, tuple(shapes[name]), dtype):
                    raise ValueError(f"expected {name} {shapes[name]} in {dtype}, found {found} {tensor.shape} in {tensor.dtype.name}")
                sink.write(np.ascontiguousarray(tensor).data.cast("B") if dtype != "bfloat16" else _bytes(tensor))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _bytes(tensor: Shaped[np.ndarray, "*shape"]) -> memoryview:
    # Python's buffers know no bfloat16.
    return np.ascontiguousarray(tensor).view(np.uint16).data.cast("B")


def _header(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str) -> bytes:
    """Eight bytes of length and a JSON object, padded to a multiple of eight; offsets count from its end."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        entries[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
