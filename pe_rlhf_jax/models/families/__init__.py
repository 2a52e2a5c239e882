"""Families of models, picked by `model_type` of a Hugging Face configuration. README.md says how to add one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.families.family import Family, Part, UnsupportedModelError, Weight, join
from pe_rlhf_jax.models.families.gemma2 import GEMMA2
from pe_rlhf_jax.models.families.gemma3 import GEMMA3
from pe_rlhf_jax.models.families.gpt2 import GPT2
from pe_rlhf_jax.models.families.gpt_neox import GPT_NEOX
from pe_rlhf_jax.models.families.llama import LLAMA
from pe_rlhf_jax.models.families.mistral import MISTRAL
from pe_rlhf_jax.models.families.qwen2 import QWEN2
from pe_rlhf_jax.models.families.qwen3 import QWEN3
from pe_rlhf_jax.models.families.smollm3 import SMOLLM3

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, SMOLLM3, GPT_NEOX, GPT2)}

__all__ = ["FAMILIES", "Family", "Part", "UnsupportedModelError", "Weight", "family_of", "join"]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a configuration. Raises UnsupportedModelError with the families that there are."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = "; of Gemma 3, the text models are (those of 1B and less)" if model_type == "gemma3" else ""
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}{hint}")
    return FAMILIES[model_type]
