"""Llama (Touvron et al. 2023) as published in Hugging Face's layout; SmolLM and SmolLM2 are of this family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.decoder import DecoderConfig
from pe_rlhf_jax.models.families.family import Family, UnsupportedModelError, Weight

_EMBEDDING = Weight("model.embed_tokens.weight", ("embed",))
_HEAD = Weight("lm_head.weight", ("lm_head",))
_LAYERS = (
    Weight("model.layers.{layer}.input_layernorm.weight", ("layers", "attention_norm", "scale")),
    *(
        Weight(f"model.layers.{{layer}}.self_attn.{m}.weight", ("layers", "attention", m, "kernel"), transposed=True)
        for m in ("q_proj", "k_proj", "v_proj", "o_proj")
    ),
    Weight("model.layers.{layer}.post_attention_layernorm.weight", ("layers", "mlp_norm", "scale")),
    *(
        Weight(f"model.layers.{{layer}}.mlp.{m}.weight", ("layers", "mlp", m, "kernel"), transposed=True)
        for m in ("gate_proj", "up_proj", "down_proj")
    ),
)
_FINAL_NORM = Weight("model.norm.weight", ("final_norm", "scale"))

# Keys of config.json whose other values would change what is computed: the value that the decoder has, by key.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "num_local_experts": None,
    "quantization_config": None,
}


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`, by Hugging Face's names and defaults.

    Raises:
        UnsupportedModelError: a key is missing or malformed, or has a value that the decoder does not compute.
    """
    for key, expected in _FIXED.items():
        if (found := config.get(key)) not in (None, expected):
            raise UnsupportedModelError(f"{key}: {found!r} is not supported (only {expected!r} is)")
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads", default=heads)
    head_dim = _positive(config, "head_dim", default=max(hidden // heads, 1))
    if heads % kv_heads:
        raise UnsupportedModelError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim {head_dim} is odd; rotary positions turn pairs")
    return DecoderConfig(
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(config),
        rms_norm_eps=_positive(config, "rms_norm_eps", default=1e-6, kind=float),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=_positive(config, "max_position_embeddings", default=2048),
    )


def _rope_theta(config: Mapping[str, Any]) -> float:
    # transformers before version 5 wrote rope_theta and rope_scaling, later ones rope_parameters with both.
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key) or {}
        kind = found.get("rope_type", found.get("type", "default")) if isinstance(found, Mapping) else found
        if kind != "default":
            raise UnsupportedModelError(f"{key}: rope type {kind!r} is not supported (only 'default' is)")
    parameters = config.get("rope_parameters") or {}
    source = parameters if "rope_theta" in parameters else config
    return _positive(source, "rope_theta", default=10_000.0, kind=float)


def _positive(config: Mapping[str, Any], key: str, default: Any = None, kind: type = int) -> Any:
    found = config.get(key)
    if found is None and default is not None:
        return default
    allowed = (int, float) if kind is float else (int,)
    if isinstance(found, bool) or not isinstance(found, allowed) or not 0 < found < float("inf"):
        raise UnsupportedModelError(f"{key}: expected a positive {kind.__name__}, found {found!r}")
    return kind(found)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    return (_EMBEDDING, *_LAYERS, _FINAL_NORM, *(() if config.tie_word_embeddings else (_HEAD,)))


def ignorable(config: DecoderConfig) -> tuple[str, ...]:
    # Rotary frequencies follow from rope_theta; a tied head that is stored once more is the embedding.
    rotary = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    return (rotary, *((r"lm_head\.weight",) if config.tie_word_embeddings else ()))


LLAMA = Family("llama", config_from_hf, weights, ignorable)
