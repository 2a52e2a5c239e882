"""A folder in Hugging Face's layout: `config.json` and `model.safetensors`, or its shards with their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (teaches NumPy the name bfloat16, by which safetensors asks for it)
import numpy as np
import safetensors
from jaxtyping import Float

from pe_rlhf_jax.checkpoint.weights import WeightsError

TENSOR_TYPES = ("F32", "F16", "BF16")

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
        self._opened = {file.name: _open(file) for file in self.files}
        if not shards.keys() <= {_SINGLE}:
            self._file_of = shards
            for name, shard in shards.items():
                if name not in self._opened[shard].keys():  # noqa: SIM118 (not a dict)
                    raise WeightsError(f"{self.path / shard} lacks {name}, which {_INDEX} promises; fetch it again")
        else:
            self._file_of = dict.fromkeys(self._opened[_SINGLE].keys(), _SINGLE)
        self.names = tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [out, in] for matrices."""
        return tuple(self._opened[self._file_of[name]].get_slice(name).get_shape())

    def read(self, name: str) -> Float[np.ndarray, "*shape"]:
        """The tensor as it is stored."""
        shard = self._file_of[name]
        kind = self._opened[shard].get_slice(name).get_dtype()
        if kind not in TENSOR_TYPES:
            raise WeightsError(
                f"{self.path / shard}: {name} is of type {kind}, which is not supported; supported: {', '.join(TENSOR_TYPES)}"
            )
        try:
            return self._opened[shard].get_tensor(name)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise WeightsError(f"{self.path / shard}: cannot read {name}: {error}") from error

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


def _open(file: Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
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
