"""Tiny models of every family that sees, with each feature on in one of them and off in another, and rows of text and pictures.

`record_vision.py` keeps what transformers and torch compute for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny_families import Tiny

from pe_rlhf_jax.models.decoder import Decoder

RECORDED = Path(__file__).parent / "models" / "recorded_vision.safetensors"
RECORDED_LEAVES = ("embed", "projector/{linear}/kernel", "vision/layers/attention/q_proj/kernel", "vision/position_embed")
IMAGE, BEGIN, END = 36, 35, 34
"""Ids of the placeholder and of what stands around a picture."""
ANSWER = 4
"""Tokens of an answer."""

_TEXT = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {**_TEXT, "head_dim": 6}
_TOWER = {
    "hidden_size": 12,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER, "vision_use_head": False}
_CLIP = {"model_type": "clip_vision_model", **_TOWER}
_DINOV2 = {"model_type": "dinov2", **{k: v for k, v in _TOWER.items() if k != "intermediate_size"}, "mlp_ratio": 2}
_GEMMA3 = {
    "model_type": "gemma3_text",
    **_GEMMA,
    "query_pre_attn_scalar": 3,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
    },
}
_GEMMA3_TOKENS = {"image_token_index": IMAGE, "boi_token_index": BEGIN, "eoi_token_index": END}

CASES: dict[str, dict[str, Any]] = {
    "paligemma": {
        "model_type": "paligemma",
        "text_config": {"model_type": "gemma", **_GEMMA},
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "projection_dim": 16,
        "hidden_size": 16,
    },
    "paligemma2": {  # pictures and prompts that are longer than the window
        "model_type": "paligemma",
        "text_config": {
            "model_type": "gemma2",
            **_GEMMA,
            "query_pre_attn_scalar": 3,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        "vision_config": {**_SIGLIP, "image_size": 13},
        "image_token_index": IMAGE,
        "projection_dim": 16,
        "hidden_size": 16,
    },
    "gemma3": {  # pictures of 4 tokens under a window of 3
        "model_type": "gemma3",
        "text_config": _GEMMA3,
        "vision_config": {**_SIGLIP, "image_size": 16},
        "mm_tokens_per_image": 4,
        **_GEMMA3_TOKENS,
    },
    "gemma3-cut": {  # the last row and column of patches is in no average
        "model_type": "gemma3",
        "text_config": {**_GEMMA3, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
        "vision_config": {**_SIGLIP, "image_size": 20},
        "mm_tokens_per_image": 4,
        **_GEMMA3_TOKENS,
    },
    "idefics3": {
        "model_type": "idefics3",
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "idefics3_vision", **_TOWER, "image_size": 16},
        "scale_factor": 2,
        "image_token_id": IMAGE,
    },
    "smolvlm": {
        "model_type": "smolvlm",
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "smolvlm_vision", **_TOWER, "image_size": 27, "patch_size": 3},
        "scale_factor": 3,
        "image_token_id": IMAGE,
        "tie_word_embeddings": True,
    },
    "llava": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {**_CLIP, "hidden_act": "quick_gelu"},
        "image_token_index": IMAGE,
    },
    "llava-siglip": {
        "model_type": "llava",
        "text_config": {"model_type": "qwen2", **_TEXT, "tie_word_embeddings": True},
        "vision_config": {**_SIGLIP, "vision_use_head": True},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
    "llava-dinov2": {  # pictures of 3 x 3 patches, positions for 4 x 4
        "model_type": "llava",
        "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": 6},
        "vision_config": {**_DINOV2, "image_size": 16},
        "image_token_index": IMAGE,
        "image_seq_length": 9,
        "vision_feature_layer": [0, -1],
    },
    "llava-dinov2-gated": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {**_DINOV2, "use_swiglu_ffn": True, "qkv_bias": False},
        "image_token_index": IMAGE,
        "vision_feature_layer": 1,
        "vision_feature_select_strategy": "full",
    },
}


class TinyVision(Tiny):
    """A case with rows of tokens and pictures."""

    def __init__(self, name: str):
        super().__init__(name, CASES[name])
        vision = self.architecture.vision
        assert vision is not None
        self.vision = vision

    @property
    def leaves(self) -> tuple[str, ...]:
        """Those whose gradients are recorded."""
        linear = "linear_1" if self.vision.projector == "mlp" else "linear"
        return tuple(leaf.format(linear=linear) for leaf in RECORDED_LEAVES)

    def pictures(self) -> np.ndarray:
        """Two pixel arrays [2, H, W, 3]."""
        size = self.vision.tower.image_size
        return np.random.default_rng(5).standard_normal((2, size, size, 3)).astype(np.float32)

    def row(self, pictures: int) -> np.ndarray:
        """A prompt with so many pictures and an answer, with text before, between and after."""
        text = np.random.default_rng(7 + pictures).integers(3, END, (20,))
        one = [BEGIN, *[IMAGE] * self.vision.tokens_per_image, END]
        prompt = [1, *text[:2], *(token for i in range(pictures) for token in [*one, text[3 + i]]), *text[6:9]]
        return np.array([*prompt, *text[10 : 10 + ANSWER]])

    def batch(self, pads: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows with two, one and no pictures, padded so much on the left: tokens, mask, prompt [3, T] and pictures [3, 2, H, W, 3].

        The row of one picture has the second; its place for another is filled with noise.
        """
        rows = [self.row(count) for count in (2, 1, 0)]
        length = max(len(row) + pad for row, pad in zip(rows, pads, strict=True)) + 2
        tokens, mask, prompt = np.full((3, length), IMAGE), np.zeros((3, length), bool), np.zeros((3, length), bool)
        for i, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            tokens[i, pad : pad + len(row)], mask[i, pad : pad + len(row)] = row, True
            prompt[i, pad : pad + len(row) - ANSWER] = True
        first, second = self.pictures()
        noise = np.random.default_rng(9).standard_normal(first.shape).astype(np.float32)
        return tokens, mask, prompt, np.stack([np.stack([first, second]), np.stack([second, noise]), np.stack([noise, noise])])


def forward(decoder: Decoder, variables, batch):
    """Logits of a batch of `TinyVision.batch`."""
    tokens, mask, prompt, pictures = batch
    hidden, _ = decoder.apply(variables, tokens, mask, features=decoder.encode_images(variables, pictures), prompt=prompt)
    return decoder.unembed(variables["params"], hidden)


def decode(tiny: TinyVision, params) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The rows' logits and paddings, with a cache: prompts and pictures at once, padded on the left to one length, then token by token.

    The cache has room to spare.
    """
    decoder = Decoder(tiny.architecture, remat="none")
    two, one, none = (len(tiny.row(count)) for count in (2, 1, 0))
    pads = (0, two - one, two - none)
    tokens, mask, prompt, pictures = tiny.batch(pads)
    length = two - ANSWER
    slots = np.arange(mask.shape[1])
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    variables = {"params": params}

    @jax.jit
    def prefill(cache):
        features = decoder.encode_images(variables, pictures)
        known = mask & (slots < length)
        hidden, cache = decoder.apply(variables, tokens[:, :length], known, cache=cache, features=features, prompt=prompt[:, :length])
        return decoder.unembed(params, hidden), cache

    @jax.jit
    def step(token, known, position, cache, slot):
        hidden, cache = decoder.apply(variables, token, known, position, cache, slot)
        return decoder.unembed(params, hidden), cache

    logits, cache = prefill(decoder.new_cache(3, len(slots)))
    parts = [logits]
    for slot in range(length, length + ANSWER):
        logits, cache = step(tokens[:, slot : slot + 1], mask & (slots <= slot), places[:, slot : slot + 1], cache, slot)
        parts.append(logits)
    return np.concatenate(parts, axis=1), pads
