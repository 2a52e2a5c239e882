"""Families of models, picked by `model_type` of a Hugging Face configuration. README.md says how to add one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.families.family import Family, Part, UnsupportedModelError, Weight, join
from pe_rlhf_jax.models.families.gemma import GEMMA
from pe_rlhf_jax.models.families.gemma2 import GEMMA2
from pe_rlhf_jax.models.families.gemma3 import GEMMA3
from pe_rlhf_jax.models.families.gemma3_vision import GEMMA3_VISION
from pe_rlhf_jax.models.families.gpt2 import GPT2
from pe_rlhf_jax.models.families.gpt_neox import GPT_NEOX
from pe_rlhf_jax.models.families.idefics3 import IDEFICS3, SMOLVLM
from pe_rlhf_jax.models.families.llama import LLAMA
from pe_rlhf_jax.models.families.llava import LLAVA
from pe_rlhf_jax.models.families.mistral import MISTRAL
from pe_rlhf_jax.models.families.paligemma import PALIGEMMA
from pe_rlhf_jax.models.families.qwen2 import QWEN2
from pe_rlhf_jax.models.families.qwen3 import QWEN3
from pe_rlhf_jax.models.families.smollm3 import SMOLLM3

_TEXT = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, SMOLLM3, GPT_NEOX, GPT2)
_SEEING = (PALIGEMMA, GEMMA3_VISION, IDEFICS3, SMOLVLM, LLAVA)
FAMILIES = {family.model_type: family for family in (*_TEXT, *_SEEING)}

__all__ = ["FAMILIES", "Family", "Part", "UnsupportedModelError", "Weight", "family_of", "join"]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a configuration. Raises UnsupportedModelError with the families that there are."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
