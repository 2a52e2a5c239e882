"""GGUF files (llama.cpp's format), presented as Hugging Face's layout would hold the same model.

The `gguf` package reads the structure and dequantizes. Added here: bounds, so that a damaged file is an error and never
a hang; the names and the configuration in Hugging Face's terms; and the inverse of llama.cpp's reordering of query and
key rows, which turned "rotate half" rotary positions into interleaved ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from einops import rearrange
from jaxtyping import Float

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
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# More values than any tokenizer's vocabulary, scores, types and merges together; bounds what a damaged count can cost.
_MAX_HEADER_VALUES = 4_000_000
_DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, RuntimeError, MemoryError, OSError)


class GGUFFile:
    """A `.gguf` file of the llama architecture as a `WeightReader`, with its metadata.

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
        self._tensors = {_hf_name(tensor.name): tensor for tensor in tensors}
        if len(self._tensors) != len(tensors):
            raise WeightsError(f"{self.path}: two tensors stand for the same weight; the file is damaged")
        self.config = self._config()
        eos = self.config["eos_token_id"]
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)
        # Factors of 1 change nothing; others are a scaling, which `config` declares.
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
            if name.endswith("q_proj.weight"):
                return _rotate_half_rows(array, self.config["num_attention_heads"])
            if name.endswith("k_proj.weight"):
                return _rotate_half_rows(array, self.config["num_key_value_heads"])
            return array
        except _DAMAGE as error:
            raise WeightsError(f"{self.path}: cannot read {tensor.name}: {error}") from error

    def _config(self) -> dict[str, Any]:
        architecture = self._get("general.architecture", str)
        if architecture != "llama":
            raise WeightsError(f"{self.path}: architecture {architecture!r} is not supported; supported: llama")
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise WeightsError(f"{self.path}: no token embedding; the file is not a whole model")
        hidden, heads = self._get("llama.embedding_length", int), self._get("llama.attention.head_count", int)
        if hidden < 1 or heads < 1:
            raise WeightsError(f"{self.path}: {hidden} hidden units in {heads} heads; the file is damaged")
        head_dim = self._get("llama.attention.key_length", int, hidden // heads)
        if (value_dim := self._get("llama.attention.value_length", int, head_dim)) != head_dim:
            raise WeightsError(f"{self.path}: heads of {head_dim} for keys and {value_dim} for values are not supported")
        rotated = self._get("llama.rope.dimension_count", int, head_dim)
        return {
            "model_type": "llama",
            "vocab_size": int(embedding.shape[-1]),
            "hidden_size": hidden,
            "intermediate_size": self._get("llama.feed_forward_length", int),
            "num_hidden_layers": self._get("llama.block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("llama.attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rope_theta": self._get("llama.rope.freq_base", float, 10_000.0),
            "rope_scaling": self._rope_scaling(),
            "partial_rotary_factor": 1.0 if rotated == head_dim else rotated / max(head_dim, 1),
            # Stored in float32; read as the shortest decimal that means it, which is what config.json had.
            "rms_norm_eps": float(str(np.float32(self._get("llama.attention.layer_norm_rms_epsilon", float)))),
            "max_position_embeddings": self._get("llama.context_length", int),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "num_local_experts": self._get("llama.expert_count", int, 0) or None,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", int, -1, missing=None),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id", int, -1, missing=None),
        }

    def _rope_scaling(self) -> dict[str, str] | None:
        kind = self._get("llama.rope.scaling.type", str, "none")
        if kind != "none":
            return {"rope_type": kind}
        if _ROPE_FACTORS in self._tensors and not (self.read(_ROPE_FACTORS) == 1).all():
            return {"rope_type": "llama3"}  # the conversion stores Llama 3's scaling only as these factors
        return None

    def _get(self, key: str, kind: type, default: Any = None, missing: Any = ...) -> Any:
        """A metadata value of a kind. With a default it may be absent; the answer is then the default, or `missing`."""
        found = self.metadata.get(key)
        if found is None and default is not None:
            return default if missing is ... else missing
        if not isinstance(found, kind) or isinstance(found, bool):
            raise WeightsError(f"{self.path}: {key} should be one {kind.__name__}, but is {str(found)[:60]!r}")
        return found


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that is unknown stays, for the caller to refuse."""
    match name.split("."):
        case ["blk", layer, module, "weight"] if module in _LAYER and layer.isdecimal():
            return f"model.layers.{int(layer)}.{_LAYER[module]}.weight"
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
