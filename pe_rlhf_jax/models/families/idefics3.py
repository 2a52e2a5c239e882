"""Idefics 3 (Laurençon et al. 2024, arXiv 2408.12637) and SmolVLM (Marafioti et al. 2025, arXiv 2504.05299): SigLIP on tiles, pixel
shuffle, Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.image_prompt import ImagePrompt
from pe_rlhf_jax.models.architecture import DecoderConfig, VisionConfig
from pe_rlhf_jax.models.families.family import Family, UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.reading import only, positive
from pe_rlhf_jax.models.families.seeing import all_ignorable, all_weights, image_token, join, linear, section, text, tokens_per_image
from pe_rlhf_jax.models.families.towers import tower

_TEXT, _TOWER = "model.text_model.", "model.vision_model."
# transformers looks positions up by i / side in float32; with these sides, rounding gives some patches their neighbour's position.
ROUNDED_SIDES = frozenset((19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62))
LARGEST_SIDE = 64


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Architecture out of `config.json`; see `llama.config_from_hf`."""
    only(section(config, "text_config"), {"qk_layer_norms": False, "use_resampler": False})
    language = text(config, "llama", ("llama", "mistral", "qwen2"), config.get("tie_word_embeddings", False))
    sees = tower(section(config, "vision_config"), "idefics3_vision")
    if sees.side in ROUNDED_SIDES or sees.side > LARGEST_SIDE:
        raise UnsupportedModelError(
            f"vision_config: {sees.side} patches along a picture (image_size / patch_size) are not supported: transformers rounds their "
            f"positions, or may (it does not for sides up to {LARGEST_SIDE} but {', '.join(map(str, sorted(ROUNDED_SIDES)))})"
        )
    shuffle = positive(config, "scale_factor", 2)
    if sees.side % shuffle:
        raise UnsupportedModelError(f"scale_factor: {shuffle} does not divide the {sees.side} patches along a picture")
    token = image_token(config, "image_token_id", 128257)
    return join(language, VisionConfig(sees, token, "linear", projector_bias=False, shuffle=shuffle))


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """Names of its own for the parts."""
    return all_weights(config, _TEXT, _TOWER, linear("model.connector.modality_projection.proj", "linear", False))


def ignorable(config: DecoderConfig) -> tuple[str, ...]:
    """See `seeing.all_ignorable`."""
    return all_ignorable(config, _TEXT, _TOWER)


def image_prompt(config: DecoderConfig) -> ImagePrompt:
    """Tiles with their row and column, then the whole picture."""
    fake = "<fake_token_around_image>"
    tokens = tokens_per_image(config)
    return ImagePrompt("<image>", "<image>", tokens, f"{fake}<global-img>", fake, fake + "<row_{row}_col_{column}>")


IDEFICS3 = Family("idefics3", "Idefics3", config_from_hf, weights, ignorable, (), image_prompt, has_classifier=False)
SMOLVLM = Family("smolvlm", "SmolVLM", config_from_hf, weights, ignorable, (), image_prompt, has_classifier=False)
