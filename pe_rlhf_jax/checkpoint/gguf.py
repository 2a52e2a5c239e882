"""GGUF files (llama.cpp's format), presented as Hugging Face's layout would hold the same model.

The `gguf` package reads the structure and dequantizes. Added here: bounds, so that a damaged file is an error and never
a hang; the names in Hugging Face's terms; and the inverse of what llama.cpp's conversion does to the values: it reorders
the query and key rows of the llama architecture, from "rotate half" rotary positions to interleaved ones, and adds 1 to
the scales of Gemma's norms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from einops import rearrange
from jaxtyping import Float

from pe_rlhf_jax.checkpoint.gguf_config import Metadata, hf_config
from pe_rlhf_jax.checkpoint.weights import WeightsError

TENSOR_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"

# More values than any tokenizer's vocabulary, scores, types and merges together; bounds what a damaged count can cost.
_MAX_HEADER_VALUES = 4_000_000
_DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, RuntimeError, MemoryError, OSError)


class GGUFFile:
    """A `.gguf` file of one of the supported architectures as a `WeightReader`, with its metadata.

    Raises (opening, and `read`):
        WeightsError: the file is missing, truncated, damaged, or holds an architecture or tensor type not supported.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.files: tuple[Path, ...] = (self.path,)
        if not self.path.is_file():
            raise WeightsError(f"{self.path}: no such file")
        try:
            with np.errstate(over="raise", invalid="raise"):
                reader = _BoundedReader(self.path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
            tensors = reader.tensors
        except _DAMAGE as error:
            reason = f"{type(error).__name__}: {error}"
            raise WeightsError(f"{self.path} is not a whole GGUF file ({reason}); fetch it again") from error
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise WeightsError(f"{self.path}: big-endian GGUF files are not supported")
        for tensor in tensors:
            if tensor.tensor_type.name not in TENSOR_TYPES:
                raise WeightsError(
                    f"{self.path}: {tensor.name} is of type {tensor.tensor_type.name}, which is not supported; "
                    f"supported: {', '.join(TENSOR_TYPES)}"
                )
        meta = Metadata(self.path, self.metadata)
        self.architecture = meta.architecture
        self._tensors = {_hf_name(tensor.name, self.architecture): tensor for tensor in tensors}
        if len(self._tensors) != len(tensors):
            raise WeightsError(f"{self.path}: two tensors stand for the same weight; the file is damaged")
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise WeightsError(f"{self.path}: no token embedding; the file is not a whole model")
        tied = "lm_head.weight" not in self._tensors
        self.config: dict[str, Any] = {}  # read before it is known
        factors = self.read(_ROPE_FACTORS) if _ROPE_FACTORS in self._tensors else None
        self.config = hf_config(meta, int(embedding.shape[-1]), tied, factors)
        ends = [self.config.get("eos_token_id"), *(meta.optional(f"tokenizer.ggml.{key}_token_id", int) for key in ("eot", "eom"))]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))
        # The factors of rotary frequencies are in the configuration.
        self.names = tuple(name for name in self._tensors if name != _ROPE_FACTORS)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in Hugging Face's order, [out, in] for matrices."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Float[np.ndarray, "*shape"]:
        """The tensor dequantized to float32, in Hugging Face's layout and order of rows."""
        tensor = self._tensors[name]
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # damaged scales; `load_params` refuses what is not finite
                array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if np.may_share_memory(array, tensor.data):  # JAX may use the memory as it is, and this is the file's
                array = array.copy()
            if self.architecture == "llama" and name.endswith("q_proj.weight"):
                return _rotate_half_rows(array, self.config["num_attention_heads"])
            if self.architecture == "llama" and name.endswith("k_proj.weight"):
                return _rotate_half_rows(array, self.config["num_key_value_heads"])
            if self.architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
                return array - 1
            return array
        except _DAMAGE as error:
            raise WeightsError(f"{self.path}: cannot read {tensor.name}: {error}") from error


def _hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that is unknown stays, for the caller to refuse."""
    modules = _GEMMA_LAYER if architecture in ("gemma2", "gemma3") else _LAYER
    match name.split("."):
        case ["blk", layer, module, "weight" | "bias" as kind] if module in modules and layer.isdecimal():
            return f"model.layers.{int(layer)}.{modules[module]}.{kind}"
    return _TOP.get(name, name)


def _rotate_half_rows(rows: Float[np.ndarray, "out in"], heads: int) -> Float[np.ndarray, "out in"]:
    """Undoes llama.cpp's order of query and key rows: it interleaves the two halves of each head."""
    return np.ascontiguousarray(rearrange(rows, "(head pair half) d -> (head half pair) d", head=heads, half=2))


class _BoundedReader(gguf.GGUFReader):
    """The package's reader, which takes every count and length on trust, with each read checked against the file."""

    def __init__(self, path: Path):
        self._values_left = _MAX_HEADER_VALUES
        super().__init__(path)

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if isinstance(self.data, np.memmap):  # at the first call: slices of numpy's memmap class cost four times as much
            self.data = np.asarray(self.data)  # type: ignore[assignment]
        dtype = np.dtype(dtype)
        order = self.byte_order if override_order is None else override_order
        end = int(offset) + dtype.itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"{end} bytes are needed, the file has {len(self.data)}")
        self._values_left -= 1
        if self._values_left < 0:
            raise ValueError(f"the header declares more than {_MAX_HEADER_VALUES} values")
        return self.data[int(offset) : end].view(dtype if order == "I" else dtype.newbyteorder(order))
