"""SmolLM3 (Bakouch et al. 2025): Llama without rotary positions in every fourth layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family
from pe_rlhf_jax.models.families.llama import ignorable, weights
from pe_rlhf_jax.models.families.reading import activation, flag, layers, positive, rope, sizes, windows


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    bias, fields = flag(config, "attention_bias", False), sizes(config, kv_heads=True, tied=True)
    theta, scaling = rope(config, 2_000_000.0)
    interval = positive(config, "no_rope_layer_interval", 4)
    unrotated = layers(config, "no_rope_layers", 0, (0, 1), [int((i + 1) % interval != 0) for i in range(fields["num_layers"])])
    windowed: tuple[int, ...] = ()
    if flag(config, "use_sliding_window", False) and config.get("sliding_window") is not None:
        default = ["sliding_attention" if i in unrotated else "full_attention" for i in range(fields["num_layers"])]
        windowed = windows(config, default)
    return DecoderConfig(
        **fields,
        rope_theta=theta,
        rope_scaling=scaling,
        unrotated_layers=unrotated,
        sliding_window=positive(config, "sliding_window") if windowed else None,
        windowed_layers=windowed or None,
        qkv_bias=bias,
        o_bias=bias,
        activation=activation(config, "hidden_act", "silu"),
        mlp_bias=flag(config, "mlp_bias", False),
    )


SMOLLM3 = Family("smollm3", "SmolLM3", config_from_hf, weights, ignorable)
