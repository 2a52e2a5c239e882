"""Tiny decoders with weights that leave no part of the architecture idle."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import numpy as np

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder, DecoderConfig
from pe_rlhf_jax.types import PyTree

TINY = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=100.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with weights and an adapter that is far from zero."""

    decoder: Decoder
    params: PyTree
    lora: PyTree

    @property
    def variables(self) -> PyTree:
        return {"params": self.params, "lora": self.lora}

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config


def make_model(config: DecoderConfig, lora: LoRAConfig, **decoder_fields) -> Model:
    """Random weights of a size at which norms, rotations, adapters and both halves of the MLP all move the logits."""
    decoder = Decoder(config, lora, **decoder_fields)
    shapes = jax.eval_shape(decoder._init, jax.random.key(0))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
        if name.endswith("scale"):
            return np.asarray(1 + 0.2 * noise, np.float32)
        if name.endswith(("embed", "lm_head")):
            return np.asarray(0.4 * noise, np.float32)  # small beside the layers' outputs, or every token would predict itself
        return np.asarray(noise * (0.2 if name.endswith("/b") else leaf.shape[-2] ** -0.5), np.float32)

    drawn = jax.tree.map(jax.numpy.asarray, jax.tree_util.tree_map_with_path(draw, dict(shapes)))
    return Model(decoder, drawn["params"], drawn["lora"])
