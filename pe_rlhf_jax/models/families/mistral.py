"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with a sliding window in every layer, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family
from pe_rlhf_jax.models.families.llama import ignorable, weights
from pe_rlhf_jax.models.families.reading import activation, only, optional, rope, sizes


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    only(config, {"attention_bias": False, "mlp_bias": False, "layer_types": None})
    theta, scaling = rope(config, 10_000.0)
    return DecoderConfig(
        **sizes(config, kv_heads=True),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=activation(config, "hidden_act", "silu"),
        sliding_window=optional(config, "sliding_window", 4096, int),
    )


MISTRAL = Family("mistral", "Mistral", config_from_hf, weights, ignorable)
