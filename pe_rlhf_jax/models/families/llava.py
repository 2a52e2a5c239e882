"""LLaVA 1.5 (Liu et al. 2023, arXiv 2310.03744) and what is built like it: CLIP, SigLIP or DINOv2, an MLP, any Llama-like model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.image_prompt import ImagePrompt
from pe_rlhf_jax.models.architecture import DecoderConfig, VisionConfig
from pe_rlhf_jax.models.families.family import Family, UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.reading import activation, flag, layer_count, positive
from pe_rlhf_jax.models.families.seeing import (
    LLAVA_PROJECTOR,
    LLAVA_PUBLISHED,
    LLAVA_RENAMED,
    TEXT,
    image_token,
    join,
    linear,
    llava_ignorable,
    llava_weights,
    section,
    text,
    tokens_per_image,
)
from pe_rlhf_jax.models.families.towers import DEFAULTS, tower

_TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2")


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    # transformers ties the head if either section says so, and the text model's own default is another.
    inside = section(config, "text_config")
    tied = flag(config, "tie_word_embeddings", False) or inside.get(
        "tie_word_embeddings", str(inside.get("model_type")).startswith("gemma")
    )
    language = text(config, "llama", tuple(TEXT), tied)
    given = section(config, "vision_config")
    kind = given.get("model_type") or "clip_vision_model"
    if kind not in _TOWERS:
        raise UnsupportedModelError(f"vision_config: model_type {kind!r} is not supported (only {', '.join(_TOWERS)})")
    strategy = config.get("vision_feature_select_strategy") or "default"
    if strategy not in ("default", "full"):
        raise UnsupportedModelError(f"vision_feature_select_strategy: expected default or full, found {strategy!r}")
    sees = tower(given, kind, _layers(config, layer_count({**DEFAULTS[kind], **given})))
    if kind == "dinov2" and config.get("image_seq_length") not in (None, 576):
        # Pictures need not have the size that positions were made for. 576, the default, is written for towers of every size.
        side = math.isqrt(positive(config, "image_seq_length"))
        if side != sees.side:
            sees = dataclasses.replace(sees, image_size=side * sees.patch_size, position_side=sees.side)
    vision = VisionConfig(
        sees,
        image_token(config, "image_token_index", 32000),
        "mlp",
        projector_bias=flag(config, "multimodal_projector_bias", True),
        projector_activation=activation(config, "projector_hidden_act", "gelu"),
        drop_first=strategy == "default",
    )
    return join(language, vision)


def _layers(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """After how many layers features are taken; negative numbers count from the end."""
    found = config.get("vision_feature_layer", -2)
    listed = found if isinstance(found, (list, tuple)) else [found]
    for layer in listed:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count - 1 <= layer <= count:
            raise UnsupportedModelError(f"vision_feature_layer: expected layers of the tower's {count}, found {found!r}")
    if not listed:
        raise UnsupportedModelError("vision_feature_layer: expected at least one layer, found none")
    return tuple(layer % (count + 1) for layer in listed)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """The names from transformers 4.52 on."""
    assert config.vision is not None
    bias = config.vision.projector_bias
    projector = [w for i in (1, 2) for w in linear(f"{LLAVA_PROJECTOR}linear_{i}", f"linear_{i}", bias)]
    return llava_weights(config, projector)


def image_prompt(config: DecoderConfig) -> ImagePrompt:
    """Nothing around the placeholders."""
    return ImagePrompt("<image>", "<image>", tokens_per_image(config))


LLAVA = Family(
    "llava", "Llava", config_from_hf, weights, llava_ignorable, LLAVA_RENAMED, image_prompt, has_classifier=False, published=LLAVA_PUBLISHED
)
