"""Configurations of models with images as they are published, and the numbers of parameters that their model cards give. Nothing is
allocated."""

from __future__ import annotations

import math

import pytest
from tiny_vision import CASES

from pe_rlhf_jax.checkpoint.weights import leaf_shapes
from pe_rlhf_jax.models.families import UnsupportedModelError, family_of


def _siglip(hidden, inner, layers, patch, **others):
    heads = {1152: 16, 1024: 16, 768: 12}[hidden]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
    }
    return sizes | others


_SO400M = {"model_type": "siglip_vision_model", "vision_use_head": False, **_siglip(1152, 4304, 27, 14)}
_SPECIAL = {"boi_token_index": 255999, "eoi_token_index": 256000}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# name: (configuration, parameters, tokens of a picture)
PUBLISHED = {
    "paligemma-3b-pt-224": (
        {
            "model_type": "paligemma",
            "image_token_index": 257152,
            "projection_dim": 2048,
            "text_config": {
                "model_type": "gemma",
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "num_attention_heads": 8,
                "num_hidden_layers": 18,
                "num_key_value_heads": 1,
                "num_image_tokens": 256,
                "vocab_size": 257216,
            },
            "vision_config": {**_SO400M, "projection_dim": 2048, "projector_hidden_act": "gelu_fast"},
        },
        2_923_466_480,
        256,
    ),
    "paligemma2-3b-pt-448": (
        {
            "model_type": "paligemma",
            "image_token_index": 257152,
            "projection_dim": 2304,
            "text_config": {
                "model_type": "gemma2",
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_key_value_heads": 4,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "vocab_size": 257216,
            },
            "vision_config": {**_SO400M, "image_size": 448},
        },
        3_032_242_416 + 768 * 1152,  # of the one for 224 pixels, and the positions of more patches
        1024,
    ),
    "gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            **_SPECIAL,
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {**_SO400M, "image_size": 896},
        },
        4_300_079_472,
        256,
    ),
    "SmolVLM-256M-Instruct": (
        {
            "model_type": "idefics3",
            "image_token_id": 49190,
            "scale_factor": 4,
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "llama",
                "hidden_size": 576,
                "intermediate_size": 1536,
                "head_dim": 64,
                "num_attention_heads": 9,
                "num_hidden_layers": 30,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "pixel_shuffle_factor": 4,
                "qk_layer_norms": False,
                "use_resampler": False,
                "rms_norm_eps": 1e-5,
                "rope_theta": 100000,
                "vocab_size": 49280,
            },
            "vision_config": {"model_type": "idefics3", **_siglip(768, 3072, 12, 16), "image_size": 512, "use_base_siglip": False},
        },
        256_484_928,
        64,
    ),
    "Idefics3-8B-Llama3": (
        {
            "model_type": "idefics3",
            "image_token_id": 128257,
            "scale_factor": 2,
            "text_config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rope_scaling": _LLAMA3,
                "rope_theta": 500000.0,
                "vocab_size": 128259,
            },
            "vision_config": {"model_type": "idefics3", **_siglip(1152, 4304, 27, 14), "image_size": 364},
        },
        8_462_086_384,
        169,
    ),
    "llava-1.5-7b-hf": (
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
            "vision_config": {"model_type": "clip_vision_model", **_siglip(1024, 4096, 24, 14), "image_size": 336},
        },
        7_063_427_072 - 2 * 1024,  # the norm after the tower's last layer, which is not computed
        576,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name):
    config, parameters, tokens = PUBLISHED[name]
    family = family_of(config)
    architecture = family.config_from_hf(config)
    leaves = leaf_shapes(architecture)
    assert sum(math.prod(shape) for shape in leaves.values()) == parameters
    assert {weight.leaf for weight in family.weights(architecture)} == set(leaves)
    assert architecture.vision is not None and architecture.vision.tokens_per_image == tokens
    assert family.image_prompt is not None and family.image_prompt(architecture).tokens == tokens


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("paligemma", {"vision_config": None}, "vision_config: expected a section of values, found None"),
        ("paligemma", {"projection_dim": 12}, "projection_dim: 12 must be the text model's hidden_size, 16"),
        ("paligemma", {"text_config": {"model_type": "llama"}}, r"text_config: model_type 'llama' is not supported \(only gemma, gemma2\)"),
        ("paligemma", {"vision_config": {"model_type": "clip_vision_model"}}, "model_type: 'clip_vision_model' is not supported"),
        ("paligemma", {"image_token_index": "no"}, "image_token_index: expected a token id, found 'no'"),
        ("gemma3", {"mm_tokens_per_image": 9}, "mm_tokens_per_image: 9 is no whole share of a picture's 4 x 4 patches"),
        (
            "gemma3",
            {"text_config": {**CASES["gemma3"]["text_config"], "hidden_size": "x"}},
            "text_config: hidden_size: expected a positive int",
        ),
        ("idefics3", {"scale_factor": 3}, "scale_factor: 3 does not divide the 4 patches"),
        (
            "idefics3",
            {"vision_config": {**CASES["idefics3"]["vision_config"], "image_size": 76}},
            "19 patches along a picture .* not supported",
        ),
        ("idefics3", {"vision_config": {**CASES["idefics3"]["vision_config"], "num_channels": 4}}, "num_channels: 4 is not supported"),
        ("llava", {"vision_config": {"model_type": "pixtral"}}, "vision_config: model_type 'pixtral' is not supported"),
        ("llava", {"vision_feature_layer": -4}, "vision_feature_layer: expected layers of the tower's 2, found -4"),
        ("llava", {"vision_feature_layer": []}, "vision_feature_layer: expected at least one layer, found none"),
        ("llava", {"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy: expected default or full, found 'cls'"),
        ("llava", {"vision_config": {**CASES["llava"]["vision_config"], "num_attention_heads": 5}}, "5 does not divide hidden_size 12"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, changes, message):
    config = {**CASES[name], **changes}
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(config).config_from_hf(config)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("model.vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.post_layernorm.bias"),
        ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
        ("vision_tower.encoder.layer.3.attention.attention.value.bias", "model.vision_tower.encoder.layer.3.attention.v_proj.bias"),
        ("vision_tower.encoder.layer.3.attention.output.dense.bias", "model.vision_tower.encoder.layer.3.attention.o_proj.bias"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
    ],
)
def test_old_names_of_tensors(old, name):
    assert family_of({"model_type": "llava"}).canonical(old) == name
