"""Layers of decoders and vision towers.

Letters: B batch, T query tokens, S key slots, D hidden, H query heads, K key-value heads, h head size, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.architecture import DecoderConfig, TowerConfig
from pe_rlhf_jax.models.attention import attend
from pe_rlhf_jax.models.lora import Linear, is_target, parameter
from pe_rlhf_jax.models.rope import rotate
from pe_rlhf_jax.models.visibility import Visible
from pe_rlhf_jax.sharding import BATCH, constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu_quick": lambda x: x * nn.sigmoid(1.702 * x),
}


QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
"""What reads the same input, as `QKV` does."""

HEADS = "heads"
"""What queries, keys and values are called where a backward pass chooses what to keep."""


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers. Slot s of a row holds the token at position s of the padded sequence, or S further on: a ring."""

    k_LBKSh: Float[Array, "L B K S h"]
    v_LBKSh: Float[Array, "L B K S h"]

    @property
    def slots(self) -> int:
        return self.k_LBKSh.shape[3]


class Rotation(flax.struct.PyTreeNode):
    """How queries and keys are turned: `rotate`'s arguments. With several kinds of layers, the leaves have a leading axis of kinds."""

    angles: Float[Array, "*kinds B T half"]
    length: Float[Array, "*kinds"] | None
    """None where every kind's is 1."""


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale, computed in float32. Gemma's scale is stored as its difference from 1, `offset`."""

    eps: float
    dtype: Any
    param_dtype: Any
    offset: float = 0.0
    whole: bool = False
    """See `lora.parameter`."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = parameter(self, "scale", start, (x.shape[-1],), self.param_dtype, whole=self.whole).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * (scale + self.offset if self.offset else scale)).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016) with scale and bias, computed in float32."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def make_norm(config: DecoderConfig | TowerConfig, dtype: Any, param_dtype: Any, name: str) -> RMSNorm | LayerNorm:
    """The architecture's norm."""
    if config.norm == "layer":
        return LayerNorm(config.rms_norm_eps, dtype, param_dtype, name=name)
    return RMSNorm(config.rms_norm_eps, dtype, param_dtype, config.norm_offset, name=name)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and an optional key-value cache."""

    config: DecoderConfig | TowerConfig
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any
    prefix: str = ""
    """What `lora.target_modules` has before the names of the linear layers: `vision.` in a tower."""
    block: int | None = None
    """See `attend`."""
    joined: bool = False
    """See joined.py."""

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotation: Rotation | None,
        seen: Visible | None,
        cache: KVCache | None,
        layer: Int[Array, ""],
        start: Int[Array, ""] | int,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        c = self.config

        def linear(name: str, features: int, bias: bool) -> Linear:
            lora = self.lora if self.joined or is_target(f"{self.prefix}attention.{name}", self.lora) else None
            return Linear(features, lora, self.dtype, self.param_dtype, bias, c.quantization, name=name)

        def heads(x: Float[Array, "B T nh"]) -> Float[Array, "B n T h"]:
            x = rearrange(x, "B T (n h) -> B n T h", h=c.head_dim)
            # Heads that the axis does not divide are whole on every chip of it: attention never splits one.
            return checkpoint_name(constrain(x, BATCH, "tensor", None, None), HEADS)

        def placed(x: Float[Array, "B n T h"], norm: str) -> Float[Array, "B n T h"]:
            if c.qk_norm:
                x = make_norm(c, self.dtype, self.param_dtype, norm)(x)
            if rotation is None:
                return x
            return rotate(x, rotation.angles, 1.0 if rotation.length is None else rotation.length)

        features = {name: count * c.head_dim for name, count in zip(QKV, (c.num_heads, c.num_kv_heads, c.num_kv_heads), strict=True)}
        if self.joined:
            together = linear("qkv_proj", sum(features.values()), c.qkv_bias)(x_BTD, deterministic)
            parts = jnp.split(together, np.cumsum(list(features.values()))[:-1], axis=-1)
        else:
            parts = [linear(name, count, c.qkv_bias)(x_BTD, deterministic) for name, count in features.items()]
        q, k, v = map(heads, parts)
        q, k = placed(q, "q_norm"), placed(k, "k_norm")
        if cache is not None:
            at = (layer, 0, 0, start, 0)
            cache = KVCache(
                jax.lax.dynamic_update_slice(cache.k_LBKSh, k[None].astype(cache.k_LBKSh.dtype), at),
                jax.lax.dynamic_update_slice(cache.v_LBKSh, v[None].astype(cache.v_LBKSh.dtype), at),
            )
            if seen is None or not seen.whole:
                k = jax.lax.dynamic_index_in_dim(cache.k_LBKSh, layer, 0, keepdims=False)
                v = jax.lax.dynamic_index_in_dim(cache.v_LBKSh, layer, 0, keepdims=False)
        out = attend(q, k, v, seen, c.attention_scale or c.head_dim**-0.5, c.attention_softcap, self.block)
        out = rearrange(out, "B H T h -> B T (H h)")
        return linear("o_proj", x_BTD.shape[-1], c.o_bias)(out, deterministic), cache


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), a gated unit (Shazeer 2020); or down(act(up(x))) without a gate."""

    config: DecoderConfig | TowerConfig
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any
    prefix: str = ""
    joined: bool = False
    """See joined.py."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], deterministic: bool) -> Float[Array, "B T D"]:
        c = self.config

        def linear(name: str, features: int) -> Linear:
            lora = self.lora if self.joined or is_target(f"{self.prefix}mlp.{name}", self.lora) else None
            return Linear(features, lora, self.dtype, self.param_dtype, c.mlp_bias, c.quantization, name=name)

        act = ACTIVATIONS[c.activation]
        if c.gated_mlp:
            if self.joined:
                gate, up = jnp.split(linear("gate_up_proj", 2 * c.intermediate_size)(x, deterministic), 2, axis=-1)
            else:
                gate, up = (linear(name, c.intermediate_size)(x, deterministic) for name in GATE_UP)
            inner = act(gate) * up
        else:
            inner = act(linear("up_proj", c.intermediate_size)(x, deterministic))
        return linear("down_proj", x.shape[-1])(constrain(inner, BATCH, None, "tensor"), deterministic)
