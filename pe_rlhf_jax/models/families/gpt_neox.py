"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745); Pythia is of this family: layer norms, biases, one matrix for query, key and value,
rotation of a part of each head, and attention and MLP side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family, Part, UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.reading import activation, flag, positive, rope, sizes

_LAYER = "gpt_neox.layers.{layer}."


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    bias = flag(config, "attention_bias", True)
    section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta, scaling = rope({**config, "rope_theta": positive(config, "rotary_emb_base", 10_000.0, float)}, 10_000.0, partial=True)
    share = positive({"rotary_pct": section.get("partial_rotary_factor", config.get("rotary_pct"))}, "rotary_pct", 0.25, float)
    fields = sizes(config)
    if fields["num_kv_heads"] != fields["num_heads"] or share > 1:
        raise UnsupportedModelError(
            f"num_key_value_heads {fields['num_kv_heads']} and rotary_pct {share}: expected all heads and at most 1"
        )
    rotated = int(fields["head_dim"] * share)
    if rotated % 2:
        raise UnsupportedModelError(f"rotary_pct {share}: {rotated} rotated dimensions of a head are odd; rotary positions turn pairs")
    return DecoderConfig(
        **fields | {"rms_norm_eps": positive(config, "layer_norm_eps", 1e-5, float)},
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=rotated,
        qkv_bias=bias,
        o_bias=bias,
        activation=activation(config, "hidden_act", "gelu"),
        gated_mlp=False,
        mlp_bias=True,
        norm="layer",
        parallel_residual=flag(config, "use_parallel_residual", True),
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Query, key and value of a head lie next to each other in `query_key_value`."""
    table = [Weight("gpt_neox.embed_in.weight", ("embed",))]
    for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
        table += [Weight(f"{_LAYER}{theirs}.weight", ("layers", ours, "scale")), Weight(f"{_LAYER}{theirs}.bias", ("layers", ours, "bias"))]
    for i, letter in enumerate("qkv"):
        table += _linear("attention.query_key_value", ("attention", f"{letter}_proj"), config.qkv_bias, Part(i, heads=config.num_heads))
    table += _linear("attention.dense", ("attention", "o_proj"), config.o_bias)
    table += _linear("mlp.dense_h_to_4h", ("mlp", "up_proj"), True) + _linear("mlp.dense_4h_to_h", ("mlp", "down_proj"), True)
    table += [
        Weight(f"gpt_neox.final_layer_norm.{theirs}", ("final_norm", ours)) for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ]
    return (*table, *(() if config.tie_word_embeddings else (Weight("embed_out.weight", ("lm_head",)),)))


def _linear(theirs: str, ours: tuple[str, str], biased: bool, part: Part | None = None) -> list[Weight]:
    found = [Weight(f"{_LAYER}{theirs}.weight", ("layers", *ours, "kernel"), transposed=True, part=part)]
    return found + ([Weight(f"{_LAYER}{theirs}.bias", ("layers", *ours, "bias"), part=part)] if biased else [])


def ignorable(config: DecoderConfig) -> tuple[str, ...]:
    """Old files carry the causal mask and rotary frequencies; a tied head that is stored once more is the embedding."""
    buffers = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    return (buffers, *((r"embed_out\.weight",) if config.tie_word_embeddings else ()))


# transformers 5 names the head in memory as Llama does; files keep the old name.
GPT_NEOX = Family("gpt_neox", "GPTNeoX", config_from_hf, weights, ignorable, renamed=((r"lm_head\.", "embed_out."),))
