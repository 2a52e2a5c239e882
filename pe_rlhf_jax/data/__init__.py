"""Data: rows out of files, catalogs or the embedded data set, examples, batches."""

from pe_rlhf_jax.data.batches import (
    BatchOrder,
    FamilyOrder,
    fill,
    pack_labels,
    pack_preferences,
    pad_labels,
    pad_preferences,
    pad_prompts,
    pad_sft,
)
from pe_rlhf_jax.data.formats import LabelExample, PreferenceExample, PromptExample, SFTExample
from pe_rlhf_jax.data.image_batches import PixelReader, as_read
from pe_rlhf_jax.data.loading import Data, Split, load
from pe_rlhf_jax.data.prefixes import families
from pe_rlhf_jax.data.rows import Packing
from pe_rlhf_jax.data.sources import DataError
from pe_rlhf_jax.data.turns import Vision

__all__ = [
    "BatchOrder",
    "Data",
    "DataError",
    "FamilyOrder",
    "LabelExample",
    "Packing",
    "PixelReader",
    "PreferenceExample",
    "PromptExample",
    "SFTExample",
    "Split",
    "Vision",
    "as_read",
    "families",
    "fill",
    "load",
    "pack_labels",
    "pack_preferences",
    "pad_labels",
    "pad_preferences",
    "pad_prompts",
    "pad_sft",
]
