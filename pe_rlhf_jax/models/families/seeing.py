"""What the families that see pictures share: a text model of another family inside, its tensors behind a prefix, and old names of both."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pe_rlhf_jax.models.architecture import DecoderConfig, VisionConfig
from pe_rlhf_jax.models.families import towers
from pe_rlhf_jax.models.families.family import UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.gemma import GEMMA
from pe_rlhf_jax.models.families.gemma2 import GEMMA2
from pe_rlhf_jax.models.families.gemma3 import GEMMA3
from pe_rlhf_jax.models.families.llama import LLAMA, ignorable, weights
from pe_rlhf_jax.models.families.mistral import MISTRAL
from pe_rlhf_jax.models.families.qwen2 import QWEN2
from pe_rlhf_jax.models.families.qwen3 import QWEN3

TEXT = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3)}
"""Families that name their tensors like Llama, and so may stand inside."""

# Files leave out of `text_config` what equals transformers' defaults. (`None`: it follows from the others.)
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_QWEN = {**_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
_GEMMA2 = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma": {
        **_GEMMA2,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma2": _GEMMA2,
    "gemma3_text": {**_GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072},
}


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`text_config` or `vision_config`."""
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise UnsupportedModelError(f"{key}: expected a section of values, found {found!r}")
    return found


def text(config: Mapping[str, Any], default: str, allowed: Sequence[str], tied: Any) -> DecoderConfig:
    """The architecture of `text_config`, whose `model_type` is one of `allowed`; `tied` is what the whole model says of the head."""
    given = section(config, "text_config")
    kind = given.get("model_type") or default
    if kind not in allowed:
        raise UnsupportedModelError(f"text_config: model_type {kind!r} is not supported (only {', '.join(allowed)})")
    # How its tokens see each other, the whole model says.
    known = {**DEFAULTS[kind], **given, "tie_word_embeddings": tied, "use_bidirectional_attention": None}
    try:
        return TEXT[kind].config_from_hf(known)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"text_config: {error}") from error


def image_token(config: Mapping[str, Any], key: str, default: int) -> int:
    """Id of the placeholder."""
    found = config.get(key, config.get({"image_token_index": "image_token_id"}.get(key, key), default))
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**31:
        raise UnsupportedModelError(f"{key}: expected a token id, found {found!r}")
    return found


def join(text: DecoderConfig, vision: VisionConfig) -> DecoderConfig:
    """A decoder that sees."""
    return dataclasses.replace(text, vision=vision)


def all_weights(config: DecoderConfig, text_prefix: str, tower_prefix: str, projector: Sequence[Weight]) -> tuple[Weight, ...]:
    """The text model's tensors, of which `text_prefix` takes the place of `model.`; the tower's; the projector's."""
    assert config.vision is not None
    inside = [dataclasses.replace(w, name=re.sub(r"\Amodel\.", text_prefix, w.name)) for w in weights(config)]
    return (*inside, *towers.weights(config.vision.tower, tower_prefix), *projector)


def all_ignorable(config: DecoderConfig, text_prefix: str, tower_prefix: str) -> tuple[str, ...]:
    """As `ignorable` of a family."""
    assert config.vision is not None
    inside = [re.sub(r"\Amodel\\\.", lambda _: re.escape(text_prefix), pattern) for pattern in ignorable(config)]
    return (*inside, *towers.ignorable(config.vision.tower, re.escape(tower_prefix)))


def linear(theirs: str, ours: str, biased: bool) -> list[Weight]:
    """A linear layer of the projector."""
    found = [Weight(f"{theirs}.weight", ("projector", ours, "kernel"), transposed=True)]
    return found + ([Weight(f"{theirs}.bias", ("projector", ours, "bias"))] if biased else [])


LLAVA_TEXT, LLAVA_TOWER, LLAVA_PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."
"""How LLaVA names its parts, and after it PaliGemma and Gemma 3."""
LLAVA_RENAMED = (
    (r"language_model\.model\.", LLAVA_TEXT),
    (r"language_model\.lm_head", "lm_head"),
    (r"(?=(?:vision_tower|multi_modal_projector)\.)", "model."),
    (r"model\.vision_tower\.vision_model\.", LLAVA_TOWER),
    *((rf"(model\.vision_tower\.encoder\.layer\.\d+\.){old}", rf"\g<1>{new}") for old, new in towers.OLD_DINOV2),
)
"""Published files have the names from before transformers 4.52, some a mixture."""


LLAVA_PUBLISHED = (
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    *((rf"(model\.vision_tower\.encoder\.layer\.\d+\.){new}\.", rf"\g<1>{old}.") for old, new in towers.PUBLISHED_DINOV2),
    (rf"model\.vision_tower\.(?={towers.WITHIN_MODEL})", "vision_tower.vision_model."),
    (r"model\.(?=(?:vision_tower|multi_modal_projector)\.)", ""),
)


def llava_weights(config: DecoderConfig, projector: Sequence[Weight]) -> tuple[Weight, ...]:
    return all_weights(config, LLAVA_TEXT, LLAVA_TOWER, projector)


def llava_ignorable(config: DecoderConfig) -> tuple[str, ...]:
    return all_ignorable(config, LLAVA_TEXT, LLAVA_TOWER)


def tokens_per_image(config: DecoderConfig) -> int:
    assert config.vision is not None
    return config.vision.tokens_per_image
