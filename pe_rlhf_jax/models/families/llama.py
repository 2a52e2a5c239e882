"""Llama 2, 3 and 3.x (Touvron et al. 2023, Grattafiori et al. 2024); SmolLM and SmolLM2 are of this family.

The table of weights serves every family that names its tensors like Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family, Weight
from pe_rlhf_jax.models.families.reading import activation, flag, only, rope, sizes

_LAYER = "model.layers.{layer}."


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`, by Hugging Face's names and defaults.

    Raises:
        UnsupportedModelError: a key is missing or malformed, or has a value that the decoder does not compute.
    """
    only(config, {"sliding_window": None})
    bias = flag(config, "attention_bias", False)
    theta, scaling = rope(config, 10_000.0)
    return DecoderConfig(
        **sizes(config),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        o_bias=bias,
        activation=activation(config, "hidden_act", "silu"),
        mlp_bias=flag(config, "mlp_bias", False),
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Llama's names. With post norms they are Gemma's, where `post_attention_layernorm` is not what it is in Llama."""
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norms:
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    table = [Weight("model.embed_tokens.weight", ("embed",))]
    table += [Weight(f"{_LAYER}{theirs}.weight", ("layers", ours, "scale")) for theirs, ours in norms.items()]
    biases = dict.fromkeys("qkv", config.qkv_bias) | {"o": config.o_bias}
    for letter, biased in biases.items():
        table += _linear(f"self_attn.{letter}_proj", "attention", f"{letter}_proj", biased)
    if config.qk_norm:
        table += [Weight(f"{_LAYER}self_attn.{x}_norm.weight", ("layers", "attention", f"{x}_norm", "scale")) for x in "qk"]
    for word in ("gate", "up", "down"):
        table += _linear(f"mlp.{word}_proj", "mlp", f"{word}_proj", config.mlp_bias)
    table += [Weight("model.norm.weight", ("final_norm", "scale"))]
    return (*table, *(() if config.tie_word_embeddings else (Weight("lm_head.weight", ("lm_head",)),)))


def _linear(theirs: str, part: str, ours: str, biased: bool) -> list[Weight]:
    found = [Weight(f"{_LAYER}{theirs}.weight", ("layers", part, ours, "kernel"), transposed=True)]
    return found + ([Weight(f"{_LAYER}{theirs}.bias", ("layers", part, ours, "bias"))] if biased else [])


LINEAR_LAYERS = tuple(
    _linear(f"{theirs}.{name}", ours, name, False)[0]
    for theirs, ours, names in (("self_attn", "attention", "qkvo"), ("mlp", "mlp", ("gate", "up", "down")))
    for name in (f"{letter}_proj" for letter in names)
)
"""The matrices of a layer, whatever else a model has; all that an adapter needs to know."""


def ignorable(config: DecoderConfig) -> tuple[str, ...]:
    """Rotary frequencies follow from rope_theta; a tied head that is stored once more is the embedding."""
    rotary = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    return (rotary, *((r"lm_head\.weight",) if config.tie_word_embeddings else ()))


LLAMA = Family("llama", "Llama", config_from_hf, weights, ignorable)
