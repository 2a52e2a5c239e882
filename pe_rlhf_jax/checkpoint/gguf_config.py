"""A GGUF file's metadata in the terms of Hugging Face's `config.json`, with what llama.cpp knows and the file does not say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pe_rlhf_jax.checkpoint.weights import WeightsError

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""Hugging Face's `model_type` by GGUF's architecture."""

# Layers of the models whose queries are scaled by the hidden size per head, which the file does not say.
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Metadata:
    """Values of a GGUF file, each of which must be of its kind.

    Raises:
        WeightsError: a value is missing or of another kind.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values = path, values
        self.architecture: str = self.get("general.architecture", str)
        if self.architecture not in MODEL_TYPES:
            raise WeightsError(f"{path}: architecture {self.architecture!r} is not supported; supported: {', '.join(MODEL_TYPES)}")

    def get(self, key: str, kind: type, default: Any = None, missing: Any = ...) -> Any:
        """A value of a kind; `*.` is the architecture. With a default it may be absent: the answer is that, or `missing`."""
        key = key.replace("*", self.architecture) if key.startswith("*.") else key
        found = self.values.get(key)
        if found is None and default is not None:
            return default if missing is ... else missing
        if not isinstance(found, kind) or isinstance(found, bool):
            raise WeightsError(f"{self.path}: {key} should be one {kind.__name__}, but is {str(found)[:60]!r}")
        return found

    def optional(self, key: str, kind: type) -> Any:
        """A value of a kind, or None where there is none."""
        return self.get(key, kind, kind(), missing=None)

    def decimal(self, key: str, default: float | None = None) -> float:
        """A number that is stored in float32, as the shortest decimal that means it, which is what `config.json` had."""
        return float(str(np.float32(self.get(key, float, default))))


def hf_config(meta: Metadata, vocab_size: int, tied: bool, rope_factors: Float[np.ndarray, " half"] | None) -> dict[str, Any]:
    """The configuration, without keys of which the file says nothing. `rope_factors` divide the rotary frequencies (Llama 3 stores its
    scaling so).

    Raises:
        WeightsError: a value is missing, malformed, or of a model that is not supported.
    """
    hidden, heads = meta.get("*.embedding_length", int), meta.get("*.attention.head_count", int)
    if hidden < 1 or heads < 1:
        raise WeightsError(f"{meta.path}: {hidden} hidden units in {heads} heads; the file is damaged")
    head_dim = meta.get("*.attention.key_length", int, hidden // heads)
    if (value_dim := meta.get("*.attention.value_length", int, head_dim)) != head_dim:
        raise WeightsError(f"{meta.path}: heads of {head_dim} for keys and {value_dim} for values are not supported")
    rotated = meta.get("*.rope.dimension_count", int, head_dim)
    theta = meta.get("*.rope.freq_base", float, 10_000.0)
    config = {
        "model_type": MODEL_TYPES[meta.architecture],
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": meta.get("*.feed_forward_length", int),
        "num_hidden_layers": _layers(meta),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("*.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(meta, head_dim, theta, rope_factors),
        "partial_rotary_factor": 1.0 if rotated == head_dim else rotated / max(head_dim, 1),
        "rms_norm_eps": meta.decimal("*.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.get("*.context_length", int),
        "tie_word_embeddings": tied,
        "num_local_experts": meta.get("*.expert_count", int, 0) or None,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id", int, -1, missing=None),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id", int, -1, missing=None),
    }
    if meta.architecture in ("gemma2", "gemma3"):
        config |= _gemma(meta, hidden, heads, head_dim)
    else:
        config |= {"sliding_window": meta.get("*.attention.sliding_window", int, 0) or None}
    return {key: value for key, value in config.items() if value is not None}


def _layers(meta: Metadata) -> int:
    """The number of layers, which no published model has thousands of."""
    layers: int = meta.get("*.block_count", int)
    if not 0 < layers < 10_000:
        raise WeightsError(f"{meta.path}: {layers} layers; the file is damaged")
    return layers


def _gemma(meta: Metadata, hidden: int, heads: int, head_dim: int) -> dict[str, Any]:
    layers = _layers(meta)
    by_hidden = (meta.architecture, layers) in _SCALED_BY_HIDDEN
    found: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",  # the same again, which some programs compare
        "query_pre_attn_scalar": hidden // heads if by_hidden else head_dim,
        "sliding_window": meta.get("*.attention.sliding_window", int),
    }
    pattern = meta.values.get(f"{meta.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        found["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    elif isinstance(pattern, int):
        found["layer_types"] = ["full_attention" if (i + 1) % max(pattern, 1) == 0 else "sliding_attention" for i in range(layers)]
    for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        if meta.architecture == "gemma2" or f"gemma3.{key}" in meta.values:
            found[key] = meta.decimal(f"*.{key}", default)
    if meta.architecture == "gemma3":
        found["rope_local_base_freq"] = meta.get("*.rope.freq_base_swa", float, 10_000.0)
    return found


def _rope_scaling(meta: Metadata, size: int, theta: float, factors: Float[np.ndarray, " half"] | None) -> dict[str, Any] | None:
    kind = meta.get("*.rope.scaling.type", str, "none")
    if kind != "none":
        found: dict[str, Any] = {"rope_type": kind, "factor": meta.get("*.rope.scaling.factor", float, 1.0)}
        if length := meta.optional("*.rope.scaling.original_context_length", int):
            found["original_max_position_embeddings"] = length
        if factors is not None:
            raise WeightsError(f"{meta.path}: {kind} scaling of rotary positions together with factors is not supported")
        return found
    if factors is None or (factors == 1).all():  # 1 changes nothing
        return None
    # Llama 3's scaling, of which the file has the result only: the published values, if they give this result.
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    if factors.shape != (size // 2,) or not np.allclose(factors, _llama3_factors(size, theta, scaling), rtol=1e-4):
        raise WeightsError(f"{meta.path}: rope_freqs.weight is not Llama 3's scaling of rotary positions, and no other is supported")
    return scaling


def _llama3_factors(size: int, theta: float, scaling: Mapping[str, Any]) -> Float[np.ndarray, " half"]:
    """What llama.cpp's conversion writes into `rope_freqs.weight`."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    theta = max(theta, 1e-9)  # of a damaged file
    turns = scaling["original_max_position_embeddings"] * theta ** (-np.arange(0, size, 2) / size) / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / scaling["factor"] + share)
