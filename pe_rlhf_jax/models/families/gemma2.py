"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): soft caps, norms before and after, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family
from pe_rlhf_jax.models.families.llama import ignorable, weights
from pe_rlhf_jax.models.families.reading import activation, flag, only, optional, positive, rope, sizes, windows


def gemma(config: Mapping[str, Any], full_every: int, caps: tuple[float | None, float | None]) -> dict[str, Any]:
    """What Gemma 2 and 3 share. `full_every`: by default each so many-th layer has no window; `caps`: default soft caps."""
    only(config, {"mlp_bias": False})
    bias, fields = flag(config, "attention_bias", False), sizes(config, kv_heads=True, head_dim=True, tied=True)
    default = ["full_attention" if (i + 1) % full_every == 0 else "sliding_attention" for i in range(fields["num_layers"])]
    windowed = windows(config, default)
    return fields | {
        "qkv_bias": bias,
        "o_bias": bias,
        "sliding_window": positive(config, "sliding_window", 4096) if windowed else None,
        "windowed_layers": windowed if windowed else None,
        "attention_scale": positive(config, "query_pre_attn_scalar", 256.0, float) ** -0.5,
        "attention_softcap": optional(config, "attn_logit_softcapping", caps[0]),
        "final_softcap": optional(config, "final_logit_softcapping", caps[1]),
        "activation": activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": fields["hidden_size"] ** 0.5,
    }


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    theta, scaling = rope(config, 10_000.0)
    return DecoderConfig(**gemma(config, 2, (50.0, 30.0)), rope_theta=theta, rope_scaling=scaling)


GEMMA2 = Family("gemma2", "Gemma2", config_from_hf, weights, ignorable)
