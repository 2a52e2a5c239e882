"""A backbone whose matrices outweigh the activations of a few short texts: for tests of what the compiler reserves."""

from __future__ import annotations

from pe_rlhf_jax.models.architecture import DecoderConfig

BACKBONE = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)
