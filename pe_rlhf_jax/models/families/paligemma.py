"""PaliGemma and PaliGemma 2 (Beyer et al. 2024, arXiv 2407.07726): SigLIP before Gemma or Gemma 2, prompts read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.image_prompt import ImagePrompt
from pe_rlhf_jax.models.architecture import DecoderConfig, VisionConfig
from pe_rlhf_jax.models.families.family import Family, UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.reading import only, positive
from pe_rlhf_jax.models.families.seeing import (
    LLAVA_PROJECTOR,
    LLAVA_PUBLISHED,
    LLAVA_RENAMED,
    image_token,
    join,
    linear,
    llava_ignorable,
    llava_weights,
    section,
    text,
    tokens_per_image,
)
from pe_rlhf_jax.models.families.towers import tower


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    language = text(config, "gemma", ("gemma", "gemma2"), config.get("tie_word_embeddings", True))
    only(section(config, "vision_config"), {"model_type": "siglip_vision_model"})
    if (size := positive(config, "projection_dim", 2048)) != language.hidden_size:
        raise UnsupportedModelError(f"projection_dim: {size} must be the text model's hidden_size, {language.hidden_size}")
    vision = VisionConfig(
        tower(section(config, "vision_config"), "siglip_vision_model"),
        image_token(config, "image_token_index", 256000),
        "linear",
        projector_bias=True,
        attention="prefix",
        blocks_beyond_windows=True,
    )
    return join(language, vision)


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """LLaVA's names."""
    return llava_weights(config, linear(f"{LLAVA_PROJECTOR}linear", "linear", True))


def image_prompt(config: DecoderConfig) -> ImagePrompt:
    """Pictures first, then the text between a begin token and a line break."""
    return ImagePrompt("<image>", "<image>", tokens_per_image(config), begin_after_pictures=True)


PALIGEMMA = Family(
    "paligemma",
    "PaliGemma",
    config_from_hf,
    weights,
    llava_ignorable,
    LLAVA_RENAMED,
    image_prompt,
    has_classifier=False,
    published=LLAVA_PUBLISHED,
)
