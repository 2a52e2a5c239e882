"""A tiny model that sees as a folder in Hugging Face's layout, with a tokenizer of words and colours."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.numpy import save_file
from tiny_vision import IMAGE, TinyVision
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COLOURS = {"red": (230, 30, 30), "green": (30, 230, 30), "blue": (30, 30, 230)}


def write_model(folder: Path, name: str = "llava") -> Path:
    """The tiny model `name` of tests/tiny_vision.py with a tokenizer of words."""
    folder.mkdir()
    tiny = TinyVision(name)
    save_file(tiny.tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny.config))
    edge = tiny.vision.tower.image_size
    size = {"height": edge, "width": edge}
    values = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": edge}, "crop_size": size, "resample": 3}
    values |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    words = ["<pad>", "<unk>", "</s>", *["Which", "colour", "is", "this", "?"], *COLOURS]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(IMAGE - len(words))), "<image>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", additional_special_tokens=["<image>"]
    )
    tokenizer.save_pretrained(folder)
    return folder
