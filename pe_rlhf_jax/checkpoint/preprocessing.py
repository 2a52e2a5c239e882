"""What a model that sees asks of its data, out of its folder: how pictures are written in a prompt, and how pixels are prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pe_rlhf_jax.checkpoint.source import Backbone
from pe_rlhf_jax.checkpoint.weights import WeightsError
from pe_rlhf_jax.data import Vision
from pe_rlhf_jax.data.image_processing import ImageProcessing, from_hf

FILES = ("preprocessor_config.json", "processor_config.json")
"""Where a published model says it; the second, from transformers 5 on, has it under `image_processor`."""


def vision_of(backbone: Backbone) -> Vision | None:
    """None for a model of text.

    Raises:
        WeightsError: the folder does not say how pixels are prepared, or says what does not fit its tower or tokenizer.
    """
    vision, prompt_of = backbone.config.vision, backbone.family.image_prompt
    if vision is None or prompt_of is None:
        return None
    prompt = prompt_of(backbone.config)
    token = backbone.tokenizer.convert_tokens_to_ids(prompt.token)
    if token != vision.image_token:
        raise WeightsError(f"{backbone.source}: expected {prompt.token} to be the model's token {vision.image_token}, found {token}")
    if backbone.preprocessor is not None:
        return Vision(prompt, from_hf(backbone.preprocessor))
    processing, path = _processing(Path(backbone.reader.path))
    sides = {tile.shape[:2] for tile in processing.tiles(np.zeros((9, 9, 3), np.uint8))[0]}
    size = vision.tower.image_size
    if sides != {(size, size)}:
        found = " and ".join(f"{height} x {width}" for height, width in sorted(sides))
        raise WeightsError(f"{path}: expected a preprocessing to {size} x {size} pixels, which the model's tower takes, found {found}")
    return Vision(prompt, processing)


def _processing(folder: Path) -> tuple[ImageProcessing, Path]:
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            values = values.get("image_processor", values if name == FILES[0] else None)
            if isinstance(values, dict):
                return from_hf(values), path
        except (OSError, ValueError, AttributeError) as error:  # ProcessingError is a ValueError
            raise WeightsError(f"{path}: expected Hugging Face's preprocessing of pictures: {error}") from error
    raise WeightsError(f"{folder}: expected {' or '.join(FILES)}, which says how pictures are prepared; put the model's there")
