"""Qwen3, dense (Yang et al. 2025, arXiv 2505.09388): Qwen2 with norms of queries and keys in place of the biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family
from pe_rlhf_jax.models.families.llama import ignorable, weights
from pe_rlhf_jax.models.families.qwen2 import window
from pe_rlhf_jax.models.families.reading import activation, flag, only, rope, sizes


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    only(config, {"mlp_bias": False})
    bias = flag(config, "attention_bias", False)
    theta, scaling = rope(config, 10_000.0)
    return DecoderConfig(
        **sizes(config, kv_heads=True, head_dim=True),
        **window(config),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


QWEN3 = Family("qwen3", "Qwen3", config_from_hf, weights, ignorable)
