"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671): Llama with biases of query, key and value, and windows in late layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family, UnsupportedModelError
from pe_rlhf_jax.models.families.llama import ignorable, weights
from pe_rlhf_jax.models.families.reading import activation, flag, layer_count, only, positive, rope, sizes, windows


def window(config: Mapping[str, Any]) -> dict[str, Any]:
    """The window and its layers: from `max_window_layers` on, unless `layer_types` says otherwise."""
    count, first = layer_count(config), config.get("max_window_layers", 28)
    if not flag(config, "use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        if windows(config, ["full_attention"] * count):
            raise UnsupportedModelError("layer_types has sliding_attention, but use_sliding_window is off or there is no sliding_window")
        return {}
    if not isinstance(first, int):
        raise UnsupportedModelError(f"max_window_layers: expected a number of layers, found {first!r}")
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return {"sliding_window": positive(config, "sliding_window", 4096), "windowed_layers": windows(config, default)}


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    only(config, {"attention_bias": True, "mlp_bias": False})
    theta, scaling = rope(config, 10_000.0)
    return DecoderConfig(
        **sizes(config, kv_heads=True),
        **window(config),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=activation(config, "hidden_act", "silu"),
        qkv_bias=True,
    )


QWEN2 = Family("qwen2", "Qwen2", config_from_hf, weights, ignorable)
