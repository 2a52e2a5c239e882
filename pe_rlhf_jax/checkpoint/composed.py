"""A model of text and an image encoder, put together as a LLaVA: the encoder's features, a fresh projector, the text model.

What comes out is what a folder of a published LLaVA holds, with the same names, so everything that works for one works for it; its
projector knows nothing before it is trained (`lora.modules_to_save: [projector]`): whatever the picture, it says nearly the same, and
that something like a word. Random vectors of full size in the place of words move everything that the text model computes, each in
its own way, and what they say of the picture is then learned far later. The vocabulary has one token more, the picture's placeholder,
whose embedding is the mean of the others: a policy hardly ever samples it.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from jaxtyping import Shaped
from transformers import PreTrainedTokenizerFast

from pe_rlhf_jax.checkpoint.onnx import PREPROCESSOR, ONNXEncoder
from pe_rlhf_jax.checkpoint.weights import WeightReader, WeightsError
from pe_rlhf_jax.models.families.seeing import LLAVA_PROJECTOR, LLAVA_TEXT, LLAVA_TOWER
from pe_rlhf_jax.models.families.seeing import TEXT as TEXT_FAMILIES

PLACEHOLDER = "<image>"
SPREAD = {"linear_1": 0.02, "linear_2": 0.002}
"""Standard deviation of the fresh projector's matrices: transformers' `initializer_range`, and a tenth of it."""
_UNTOLD = 576  # LLaVA 1.5's `image_seq_length`, which is written whatever the tower and so says nothing
_VOCABULARY = (f"{LLAVA_TEXT}embed_tokens.weight", "lm_head.weight")


class ComposedModel:
    """A `WeightReader` of both. Tensors keep the types that their files have.

    Args:
        image_size: sides of a picture in pixels; positions of the encoder are interpolated to it.

    Raises:
        WeightsError: the text model's family cannot stand in a LLaVA; the encoder's patches do not fit into pictures of that size, or
            LLaVA's files cannot tell it.
    """

    def __init__(self, text: WeightReader, encoder: ONNXEncoder, image_size: int):
        if text.config.get("model_type") not in TEXT_FAMILIES:
            names = ", ".join(TEXT_FAMILIES)
            raise WeightsError(f"model.vision: expected a text model of type {names}, found {text.config.get('model_type')!r}")
        self.text, self.encoder = text, encoder
        self.path, self.files, self.eos_token_ids = text.path, (*text.files, *encoder.files), text.eos_token_ids
        patch, width = int(encoder.config["patch_size"]), int(encoder.config["hidden_size"])
        if image_size % patch:
            raise WeightsError(f"model.vision.image_size: expected a multiple of {patch}, the encoder's patches, found {image_size}")
        tokens = (image_size // patch) ** 2
        if tokens == _UNTOLD:
            raise WeightsError(f"model.vision.image_size: expected other than {image_size}, as files of every size say {_UNTOLD} tokens")
        hidden = int(text.config["hidden_size"])
        self._projector: dict[str, tuple[int, ...]] = {}
        for name, inputs in (("linear_1", width), ("linear_2", hidden)):
            self._projector |= {f"{LLAVA_PROJECTOR}{name}.weight": (hidden, inputs), f"{LLAVA_PROJECTOR}{name}.bias": (hidden,)}
        self._names = {self._renamed(name): (text, name) for name in text.names}
        self._names |= {LLAVA_TOWER + name: (encoder, name) for name in encoder.names}
        self.names = (*self._names, *self._projector)
        self.placeholder = int(text.config["vocab_size"])
        self.config: dict[str, Any] = {
            "model_type": "llava",
            "text_config": {**text.config, "vocab_size": self.placeholder + 1},
            "vision_config": encoder.config,
            "image_token_index": self.placeholder,
            "image_seq_length": tokens,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "tie_word_embeddings": bool(text.config.get("tie_word_embeddings", False)),
        }
        # The whole picture, whatever its shape: what a question is about may be at its edge.
        side = {"height": image_size, "width": image_size}
        self.preprocessor = {**PREPROCESSOR, "size": side, "do_center_crop": False}
        # How many placeholders a picture has, which transformers' processor does not take from the model: patches and a class token,
        # without the latter.
        self.processor = {
            "processor_class": "LlavaProcessor",
            "image_token": PLACEHOLDER,
            "patch_size": patch,
            "vision_feature_select_strategy": self.config["vision_feature_select_strategy"],
            "num_additional_image_tokens": 1,
        }

    @staticmethod
    def _renamed(name: str) -> str:
        return LLAVA_TEXT + name.removeprefix("model.") if name.startswith("model.") else name

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [out, in] for matrices."""
        if name in self._projector:
            return self._projector[name]
        reader, inside = self._names[name]
        shape = reader.shape(inside)
        return (shape[0] + 1, *shape[1:]) if name in _VOCABULARY else shape

    def read(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """The tensor; of the projector's matrices, what follows from their names alone."""
        if name in self._projector:
            shape, layer = self._projector[name], name.removeprefix(LLAVA_PROJECTOR).partition(".")[0]
            if len(shape) == 1:
                return self._word() if layer == "linear_2" else np.zeros(shape, np.float32)
            return (SPREAD[layer] * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)).astype(np.float32)
        reader, inside = self._names[name]
        tensor = reader.read(inside)
        if name not in _VOCABULARY:
            return tensor
        mean = np.mean(tensor, axis=0, keepdims=True, dtype=np.float32)
        return np.concatenate([tensor, mean.astype(tensor.dtype)])

    def _word(self) -> Shaped[np.ndarray, " D"]:
        """What all embeddings have in common, as large as one of them where the text model reads it."""
        scale = TEXT_FAMILIES[self.text.config["model_type"]].config_from_hf(self.text.config).embedding_scale or 1.0
        embeddings = np.asarray(self.text.read("model.embed_tokens.weight"), np.float32)
        mean = np.mean(embeddings, axis=0)
        return scale * mean * np.sqrt(np.mean(np.square(embeddings)) / np.mean(np.square(mean)))

    def extend(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        """The text model's tokenizer with the placeholder.

        Raises:
            WeightsError: it has tokens beyond the model's vocabulary, or fewer, so that the placeholder would have another id.
        """
        tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
        found = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        if found != self.placeholder:
            raise WeightsError(f"{self.path}: expected a tokenizer of {self.placeholder} tokens, as the model has, found {found}")
        return tokenizer
