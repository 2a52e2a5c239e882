"""Gemma (Gemma Team 2024, arXiv 2403.08295): Llama with a gated tanh-approximate GELU, norms with an offset and a scaled embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family
from pe_rlhf_jax.models.families.llama import ignorable, weights
from pe_rlhf_jax.models.families.reading import activation, flag, only, rope, sizes


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    only(config, {"mlp_bias": False, "hidden_activation": "gelu_pytorch_tanh"})
    bias, fields = flag(config, "attention_bias", False), sizes(config, kv_heads=True, head_dim=True, tied=True)
    # The first files say `gelu`, and mean its approximation by tanh.
    known = {**config, "hidden_act": None if config.get("hidden_act") == "gelu" else config.get("hidden_act")}
    theta, scaling = rope(config, 10_000.0)
    return DecoderConfig(
        **fields,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        o_bias=bias,
        activation=activation(known, "hidden_act", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        embedding_scale=fields["hidden_size"] ** 0.5,
    )


GEMMA = Family("gemma", "Gemma", config_from_hf, weights, ignorable)
