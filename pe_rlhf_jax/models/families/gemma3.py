"""Gemma 3, text only (Gemma Team 2025, arXiv 2503.19786): Gemma 2 with norms of queries and keys in place of the soft caps, a window in
five of six layers, and a rotary base of their own for these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family, UnsupportedModelError
from pe_rlhf_jax.models.families.gemma2 import gemma
from pe_rlhf_jax.models.families.llama import ignorable, weights
from pe_rlhf_jax.models.families.reading import only, positive, rope


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    only(config, {"attn_logit_softcapping": None})  # no published model has it, and transformers leaves it out
    fields = gemma(config, positive(config, "sliding_window_pattern", 6), (None, None))
    theta, scaling = rope(config, 1_000_000.0, "full_attention")
    local = positive(config, "rope_local_base_freq", 10_000.0, float)
    nested = (config.get("rope_parameters") or {}).get("sliding_attention")
    if nested:
        local, stretched = rope({"rope_parameters": nested}, local)
        if stretched is not None:
            raise UnsupportedModelError(f"rope_parameters: sliding_attention is scaled ({stretched.kind}), which is not supported")
    return DecoderConfig(**fields, rope_theta=theta, rope_scaling=scaling, local_rope_theta=local, qk_norm=True)


GEMMA3 = Family("gemma3_text", "Gemma3", config_from_hf, weights, ignorable, classifier_prefix="Gemma3Text")
