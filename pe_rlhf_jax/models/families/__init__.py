"""Families of models, picked by `model_type` of a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.families.family import Family, UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.llama import LLAMA

FAMILIES = {family.model_type: family for family in (LLAMA,)}

__all__ = ["FAMILIES", "Family", "UnsupportedModelError", "Weight", "family_of"]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a configuration. Raises UnsupportedModelError with the families that there are."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
