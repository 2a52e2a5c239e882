"""What a decoder computes, as one configuration; the families translate theirs into it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pe_rlhf_jax.config import Quantization
from pe_rlhf_jax.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder. The fields without a default are Llama's; each of the others is one difference from it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    """Of whichever norm there is."""
    tie_word_embeddings: bool
    max_position_embeddings: int

    # Positions
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """Dimensions of a head that are rotated; None is all."""
    learned_positions: bool = False
    """A table of position embeddings in place of rotations (GPT-2)."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers without any positions (SmolLM3)."""

    # Attention
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """Each head's query and key are normed before they are rotated (Qwen 3, Gemma 3)."""
    sliding_window: int | None = None
    """Tokens that a token sees in windowed layers, itself included."""
    windowed_layers: tuple[int, ...] | None = None
    """Layers with the window; None is all, where there is a window."""
    local_rope_theta: float | None = None
    """Base of the windowed layers' rotations, which are never scaled (Gemma 3); None: the same as everywhere."""
    attention_scale: float | None = None
    """Factor of the scores; None is head_dim ** -0.5."""
    attention_softcap: float | None = None

    # MLP
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False

    # Block and ends
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    """Added to the stored scales of norms (1 in Gemma)."""
    post_norms: bool = False
    """Norms of attention's and MLP's outputs too (Gemma)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input (GPT-NeoX)."""
    embedding_scale: float | None = None
    final_softcap: float | None = None
    """Soft cap of the logits (Gemma 2)."""

    # Storage
    quantization: Quantization | None = None
    """How the matrices of linear layers are held in memory; None as floating point."""

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer sees the window only."""
        return self.sliding_window is not None and (self.windowed_layers is None or layer in self.windowed_layers)
