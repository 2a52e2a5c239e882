"""What a decoder computes, and with what it sees, as one configuration; the families translate theirs into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from pe_rlhf_jax.config import Quantization
from pe_rlhf_jax.models.rope import RopeScaling

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick"]


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Architecture of a vision transformer. The fields without a default are SigLIP's; each of the others is one difference from it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    """Sides of a picture in pixels. What is left of it beyond whole patches is not seen."""
    patch_size: int
    rms_norm_eps: float
    """Of the layer norms; named as in `DecoderConfig`, whose layers these share."""
    activation: Activation

    # Patches and positions
    patch_bias: bool = True
    class_token: bool = False
    position_side: int | None = None
    """Sides of the table of positions in patches, where pictures have another number: it is interpolated (DINOv2)."""

    # Block and ends
    qkv_bias: bool = True
    gated_mlp: bool = False
    layer_scale: bool = False
    pre_norm: bool = False
    """A norm before the first layer (CLIP)."""
    feature_layers: tuple[int, ...] | None = None
    """After how many layers features are taken, one after the other along the feature; None: after all and a last norm."""

    o_bias: ClassVar[bool] = True
    mlp_bias: ClassVar[bool] = True
    norm: ClassVar[Literal["rms", "layer"]] = "layer"
    norm_offset: ClassVar[float] = 0.0
    qk_norm: ClassVar[bool] = False
    attention_scale: ClassVar[float | None] = None
    attention_softcap: ClassVar[float | None] = None
    quantization: ClassVar[Quantization | None] = None

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def side(self) -> int:
        """Patches along a side of a picture."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What a decoder sees with: a tower, what becomes of its features, and how text and pictures attend to each other."""

    tower: TowerConfig
    image_token: int
    """Id of the placeholder that stands for one feature of a picture."""
    projector: Literal["linear", "mlp", "norm-linear"]
    projector_bias: bool
    attention: Literal["causal", "prefix", "images"] = "causal"
    """`prefix`: the whole prompt in both directions (PaliGemma); `images`: each picture in both directions (Gemma 3)."""
    blocks_beyond_windows: bool = False
    """A window hides nothing of what is read in both directions (PaliGemma 2); else it hides what lies too far back (Gemma 3)."""
    drop_first: bool = False
    """The tower's first output, usually the class token, is left out (LLaVA's select strategy `default`)."""
    pool: int = 1
    """Each pool x pool patches are averaged to one (Gemma 3)."""
    shuffle: int = 1
    """Each shuffle x shuffle patches are put side by side into one feature (pixel shuffle of Idefics 3)."""
    projector_activation: Activation = "gelu"

    @property
    def tokens_per_image(self) -> int:
        """Features, and so placeholders, of a picture."""
        return (self.tower.side // self.pool // self.shuffle) ** 2 + self.tower.class_token - self.drop_first

    @property
    def feature_size(self) -> int:
        """Length of a feature as the projector takes it."""
        return self.tower.hidden_size * len(self.tower.feature_layers or (0,)) * self.shuffle**2


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
    activation: Activation = "silu"
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

    vision: VisionConfig | None = None
    """None where it reads text only."""

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer sees the window only."""
        return self.sliding_window is not None and (self.windowed_layers is None or layer in self.windowed_layers)


def matrices(c: DecoderConfig) -> Mapping[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer of one layer."""
    heads, kv, d, f = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size, c.intermediate_size
    found = {"attention.q_proj": (d, heads), "attention.k_proj": (d, kv), "attention.v_proj": (d, kv), "attention.o_proj": (heads, d)}
    found |= {"mlp.up_proj": (d, f), "mlp.down_proj": (f, d)}
    return found | ({"mlp.gate_proj": (d, f)} if c.gated_mlp else {})
