"""A folder in Hugging Face's layout: `config.json` and `model.safetensors`, or its shards with their index."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Float

from pe_rlhf_jax.checkpoint.weights import WeightsError

_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_ALIGNED = 64  # bytes
_HALVES = re.compile(r"(?<=\.mlp\.)weights_in(?=\.(?:weight|bias)\Z)")
"""Gate above up projection in one tensor, which transformers takes apart when it reads DINOv2 giant; so does the folder."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """A local model folder as a `WeightReader`; tensors are read when asked for.

    Raises (opening, and `read`):
        WeightsError: configuration, index or a shard is missing, truncated, damaged, or of a tensor type not supported.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = _json(self.path / "config.json")
        self.eos_token_ids: tuple[int, ...] = self._eos_token_ids()
        shards = self._shards()
        self.files = tuple(self.path / shard for shard in sorted(set(shards.values())))
        self._entries = {file.name: _entries(file) for file in self.files}
        if not shards.keys() <= {_SINGLE}:
            self._file_of = shards
            for name, shard in shards.items():
                if name not in self._entries[shard]:
                    raise WeightsError(f"{self.path / shard} lacks {name}, which {_INDEX} promises; fetch it again")
        else:
            self._file_of = dict.fromkeys(self._entries[_SINGLE], _SINGLE)
        for name in [name for name in self._file_of if _HALVES.search(name) and self.shape(name)[:1] and self.shape(name)[0] % 2 == 0]:
            file = self._file_of.pop(name)
            for half, entry in zip(("gate_proj", "up_proj"), self._entries[file].pop(name).halves(), strict=True):
                self._entries[file][_HALVES.sub(half, name)] = entry
                self._file_of[_HALVES.sub(half, name)] = file
        self.names = tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [out, in] for matrices."""
        return self._entries[self._file_of[name]][name].shape

    def read(self, name: str) -> Float[np.ndarray, "*shape"]:
        """The tensor as it is stored."""
        file = self.path / self._file_of[name]
        entry = self._entries[file.name][name]
        if entry.kind not in _TYPES:
            raise WeightsError(f"{file}: {name} is of type {entry.kind}, which is not supported; supported: {', '.join(_TYPES)}")
        try:
            # Not by the library's memory map: its pages would stay in memory beside what is made of them.
            # Aligned, so that JAX can use it on a CPU as it is.
            room = np.empty(entry.size + _ALIGNED, np.uint8)
            start = -room.ctypes.data % _ALIGNED
            found = room[start : start + entry.size]
            with open(file, "rb", buffering=0) as source:
                source.seek(entry.start)
                read = source.readinto(found.data)
                while read < entry.size and (more := source.readinto(found[read:].data)):
                    read += more  # the system reads at most 2 GiB at once
            if read != entry.size:
                raise ValueError(f"{entry.size} bytes are needed, the file has {read}")
            return found.view(_TYPES[entry.kind]).reshape(entry.shape)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{file}: cannot read {name}: {error}") from error

    def _eos_token_ids(self) -> tuple[int, ...]:
        """End tokens of `config.json` and `generation_config.json`, each of which holds one, several or none."""
        generation = self.path / "generation_config.json"
        declared = [config.get("eos_token_id") for config in (self.config, _json(generation) if generation.is_file() else {})]
        ids = [i for value in declared for i in (value if isinstance(value, list) else [value]) if i is not None]
        if not all(isinstance(i, int) for i in ids):
            raise WeightsError(f"{self.path}: eos_token_id should be a token id or a list of them, found {declared}")
        return tuple(dict.fromkeys(ids))

    def _shards(self) -> dict[str, str]:
        """Tensor -> file name by the index, or {_SINGLE: _SINGLE} where one file holds everything."""
        if (self.path / _SINGLE).is_file():
            return {_SINGLE: _SINGLE}
        if not (self.path / _INDEX).is_file():
            there = sorted(p.name for p in self.path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
            raise WeightsError(
                f"{self.path}: expected {_SINGLE}, or {_INDEX} and its shards; found {', '.join(there) or 'no weights'}. "
                "Pickled weights are not read: save the model once with `save_pretrained(..., safe_serialization=True)`"
            )
        shards = _json(self.path / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise WeightsError(f"{self.path / _INDEX}: expected a `weight_map` of tensor to file name")
        for shard in set(shards.values()):
            if Path(shard).name != shard or shard in (".", ".."):
                raise WeightsError(f"{self.path / _INDEX}: refusing {shard!r}, which is not a file name of this folder")
            if not (self.path / shard).is_file():
                raise WeightsError(f"{self.path}: the shard {shard} is missing; fetch the folder again")
        return shards


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in its file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    def halves(self) -> tuple[_Entry, _Entry]:
        """The upper and the lower half of the rows, of which there is an even number."""
        half, shape = self.size // 2, (self.shape[0] // 2, *self.shape[1:])
        return _Entry(self.kind, shape, self.start, half), _Entry(self.kind, shape, self.start + half, half)


def _entries(file: Path) -> dict[str, _Entry]:
    """The tensors of a file, whose header and length the library checks."""
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
        with open(file, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(length))
        found = {}
        for name in names:
            entry = header[name]
            begin, end = entry["data_offsets"]
            found[name] = _Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        return found
    except (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError, struct.error, RecursionError) as error:
        raise WeightsError(f"{file} is not a whole safetensors file ({error}); fetch it again") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing; expected a folder in Hugging Face's layout") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values
