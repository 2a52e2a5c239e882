"""Gemma 3 with images (Gemma Team 2025, arXiv 2503.19786): SigLIP's patches averaged to 256 tokens that see each other."""

from __future__ import annotations

import math
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
    llava_ignorable,
    llava_weights,
    section,
    text,
    tokens_per_image,
)
from pe_rlhf_jax.models.families.towers import tower


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    language = text(config, "gemma3_text", ("gemma3_text",), config.get("tie_word_embeddings", True))
    only(section(config, "vision_config"), {"model_type": "siglip_vision_model"})
    sees = tower(section(config, "vision_config"), "siglip_vision_model")
    tokens = positive(config, "mm_tokens_per_image", 256)
    pool = sees.side // math.isqrt(tokens)
    if not pool or (sees.side // pool) ** 2 != tokens:
        raise UnsupportedModelError(f"mm_tokens_per_image: {tokens} is no whole share of a picture's {sees.side} x {sees.side} patches")
    token = image_token(config, "image_token_index", 262144)
    return join(language, VisionConfig(sees, token, "norm-linear", projector_bias=False, attention="images", pool=pool))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """LLaVA's names; the projector's matrix is stored as [in, out]."""
    projector = [
        Weight(f"{LLAVA_PROJECTOR}mm_input_projection_weight", ("projector", "linear", "kernel")),
        Weight(f"{LLAVA_PROJECTOR}mm_soft_emb_norm.weight", ("projector", "norm", "scale")),
    ]
    return llava_weights(config, projector)


def image_prompt(config: DecoderConfig) -> ImagePrompt:
    """A begin and an end token around each picture."""
    around = ("\n\n<start_of_image>", "<end_of_image>\n\n")
    return ImagePrompt("<start_of_image>", "<image_soft_token>", tokens_per_image(config), *around)


GEMMA3_VISION = Family("gemma3", "Gemma3", config_from_hf, weights, llava_ignorable, LLAVA_RENAMED, image_prompt, published=LLAVA_PUBLISHED)
