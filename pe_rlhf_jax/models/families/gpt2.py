"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases, and matrices stored as [in, out] (`Conv1D`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.families.family import Family, Part, UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.reading import activation, only, positive, sizes

_LAYER = "transformer.h.{layer}."
_NAMES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    # reorder_and_upcast_attn changes the order of operations, not the result.
    only(config, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False})
    known = {"max_position_embeddings": 1024} | {_NAMES.get(key, key): value for key, value in config.items()}
    inner = positive(config, "n_inner", 4 * positive(known, "hidden_size"))
    fields = sizes({**known, "intermediate_size": inner}, tied=True)
    if fields["num_kv_heads"] != fields["num_heads"] or fields["hidden_size"] % fields["num_heads"]:
        raise UnsupportedModelError(f"n_embd {fields['hidden_size']} in n_head {fields['num_heads']} heads of their own is not possible")
    return DecoderConfig(
        **fields | {"rms_norm_eps": positive(config, "layer_norm_epsilon", 1e-5, float)},
        rope_theta=1.0,
        learned_positions=True,
        qkv_bias=True,
        o_bias=True,
        activation=activation(config, "activation_function", "gelu_new"),
        gated_mlp=False,
        mlp_bias=True,
        norm="layer",
    )


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """`c_attn` is query, key and value side by side."""
    table = [Weight("transformer.wte.weight", ("embed",)), Weight("transformer.wpe.weight", ("position_embed",))]
    norms = {f"{_LAYER}ln_1": ("layers", "attention_norm"), f"{_LAYER}ln_2": ("layers", "mlp_norm"), "transformer.ln_f": ("final_norm",)}
    for theirs, ours in norms.items():
        table += [Weight(f"{theirs}.weight", (*ours, "scale")), Weight(f"{theirs}.bias", (*ours, "bias"))]
    for i, letter in enumerate("qkv"):
        table += _linear("attn.c_attn", ("attention", f"{letter}_proj"), Part(i))
    for theirs, linear in (
        ("attn.c_proj", ("attention", "o_proj")),
        ("mlp.c_fc", ("mlp", "up_proj")),
        ("mlp.c_proj", ("mlp", "down_proj")),
    ):
        table += _linear(theirs, linear)
    return (*table, *(() if config.tie_word_embeddings else (Weight("lm_head.weight", ("lm_head",)),)))


def _linear(theirs: str, ours: tuple[str, str], part: Part | None = None) -> list[Weight]:
    return [
        Weight(f"{_LAYER}{theirs}.weight", ("layers", *ours, "kernel"), part=part),
        Weight(f"{_LAYER}{theirs}.bias", ("layers", *ours, "bias"), part=part),
    ]


def ignorable(config: DecoderConfig) -> tuple[str, ...]:
    """Old files carry the causal mask; a tied head that is stored once more is the embedding."""
    return (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", *((r"lm_head\.weight",) if config.tie_word_embeddings else ()))


# The first files were of the model without its head, whose names lack the prefix.
GPT2 = Family(
    "gpt2", "GPT2", config_from_hf, weights, ignorable, renamed=((r"(?=(?:wte|wpe|h|ln_f)\.)", "transformer."),), causal="GPT2LMHeadModel"
)
