"""Tiny models of every family, with each feature on in one of them and off in another; weights follow from their names.

`record_families.py` keeps what transformers and torch compute for them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.families import Family, family_of

LENGTH = 12
RECORDED = Path(__file__).parent / "models" / "recorded_families.safetensors"
RECORDED_LEAVES = ("embed", "layers/attention/q_proj/kernel", "layers/mlp_norm/scale", "final_norm/scale")
_SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE = {**_SIZES, "head_dim": 6}  # heads that together are wider than the hidden state
_NEOX = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GPT2 = {
    "vocab_size": 37,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 50.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 9}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 1.0, "beta_slow": 0.1}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES, "rope_parameters": _ROPE},
    "llama-biased": {"model_type": "llama", **_WIDE, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "llama-llama3": {"model_type": "llama", **_WIDE, "rope_parameters": {**_ROPE, **_LLAMA3}, "tie_word_embeddings": True},
    "llama-linear": {"model_type": "llama", **_SIZES, "rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 3.0}},
    "llama-yarn": {"model_type": "llama", **_WIDE, "rope_parameters": {**_ROPE, **_YARN}},
    "mistral": {"model_type": "mistral", **_WIDE, "rope_parameters": _ROPE, "sliding_window": 4},
    "mistral-unwindowed": {"model_type": "mistral", **_SIZES, "sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **_SIZES, "rope_parameters": _ROPE, "tie_word_embeddings": True},
    "qwen2-windowed": {"model_type": "qwen2", **_SIZES, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", **_WIDE, "rope_parameters": _ROPE, "tie_word_embeddings": True},
    "qwen3-windowed": {
        "model_type": "qwen3",
        **_WIDE,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "gemma": {"model_type": "gemma", **_WIDE, "rope_parameters": _ROPE},
    "gemma-untied": {"model_type": "gemma", **_WIDE, "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False},
    "gemma2": {
        "model_type": "gemma2",
        **_WIDE,
        "rope_parameters": _ROPE,
        "query_pre_attn_scalar": 3,
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma2-uncapped": {
        "model_type": "gemma2",
        **_WIDE,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention"] * 3,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_WIDE,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 3,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": {**_ROPE, "rope_theta": 7.0}, "full_attention": _ROPE},
    },
    "gemma3-scaled": {
        "model_type": "gemma3_text",
        **_WIDE,
        "query_pre_attn_scalar": 6,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {**_ROPE, "rope_theta": 7.0},
            "full_attention": {**_ROPE, "rope_type": "linear", "factor": 4.0},
        },
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": False,
    },
    "smollm3": {"model_type": "smollm3", **_SIZES, "rope_parameters": _ROPE, "no_rope_layers": [1, 0, 1]},
    "smollm3-windowed": {
        "model_type": "smollm3",
        **_SIZES,
        "rope_parameters": {**_ROPE, **_YARN},
        "no_rope_layer_interval": 3,
        "use_sliding_window": True,
        "sliding_window": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_NEOX, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "gpt_neox-sequential": {
        "model_type": "gpt_neox",
        **_NEOX,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0},
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2-untied": {"model_type": "gpt2", **_GPT2, "n_inner": 20, "tie_word_embeddings": False},
}


def tokens() -> np.ndarray:
    """Two rows of LENGTH tokens, longer than every window."""
    return np.random.default_rng(3).integers(0, 37, (2, LENGTH))


class Tiny:
    """A case: its configuration in both terms, and its tensors as a file holds them (a `WeightReader`)."""

    def __init__(self, name: str, hf_config: Mapping[str, Any] | None = None):
        self.name = name
        self.config: dict[str, Any] = dict(CASES[name] if hf_config is None else hf_config)
        self.family: Family = family_of(self.config)
        self.architecture: DecoderConfig = self.family.config_from_hf(self.config)
        self.path, self.files, self.eos_token_ids = Path(name), (), (2,)
        tree = jax.eval_shape(Decoder(self.architecture).init_params, jax.random.key(0))
        leaves = {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        self.tensors: dict[str, np.ndarray] = {}
        for weight in self.family.weights(self.architecture):
            shape = weight.file_shape(leaves[weight.leaf][1:] if weight.per_layer else leaves[weight.leaf])
            fan_in = int(np.prod(shape[1:])) if weight.transposed else shape[0]
            self.tensors |= {n: self._draw(n, shape, weight.leaf, fan_in) for n in weight.names(self.architecture.num_layers)}
        self.names = tuple(self.tensors)

    def _draw(self, name: str, shape: tuple[int, ...], leaf: tuple[str, ...], fan_in: int) -> np.ndarray:
        """Sizes at which every part moves the logits."""
        noise = np.random.default_rng(zlib.crc32(f"{self.name}/{name}".encode())).standard_normal(shape)
        if leaf[-1].endswith("scale"):
            offset = {"vision": 0.0, "projector": 1.0}.get(leaf[0], self.architecture.norm_offset)
            noise = 0.3 * noise + (1 - offset)
        elif leaf[-1].endswith("kernel"):
            noise = 1.5 * noise * fan_in**-0.5
        else:  # embeddings and biases
            noise = 0.4 * noise
        return noise.astype(np.float32)

    def checksum(self) -> int:
        """Of all tensors: they follow from NumPy's random numbers, whose stream has never changed but might."""
        return zlib.crc32(b"".join(tensor.tobytes() for _, tensor in sorted(self.tensors.items())))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def loss(decoder: Decoder, params, tokens, mask):
    """Mean negative log-likelihood of all but the first token, and the logits."""
    hidden, _ = decoder.apply({"params": params}, tokens, mask)
    logits = decoder.unembed(params, hidden)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)), logits


def flat(tree) -> dict[str, np.ndarray]:
    """Leaves by their path."""
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}
