"""Layers of a decoder. Letters: B batch, T query tokens, S key slots, D hidden, H query heads, K key-value heads, h head size, L layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.lora import Linear, is_target


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers. Slot s of a row holds the token at position s of the padded sequence."""

    k_LBSKh: Float[Array, "L B S K h"]
    v_LBSKh: Float[Array, "L B S K h"]


def rope_angles(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "B T half"]:
    """Rotation angles of rotary position embeddings (Su et al. 2021), float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions_BT[..., None].astype(jnp.float32) * frequencies


def rotate(x_BTHh: Float[Array, "B T H h"], angles: Float[Array, "B T half"]) -> Float[Array, "B T H h"]:
    """Rotates the pairs (x_i, x_{i + h/2}), as Hugging Face's Llama does; computed in float32."""
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHh.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale, computed in float32."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and an optional key-value cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        angles: Float[Array, "B T half"],
        mask: Bool[Array, "B 1 T S"],
        cache: KVCache | None,
        layer: Int[Array, ""],
        start: Int[Array, ""] | int,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        def linear(name: str, features: int) -> Linear:
            lora = self.lora if is_target(f"attention.{name}", self.lora) else None
            return Linear(features, lora, self.dtype, self.param_dtype, name=name)

        def heads(name: str, count: int) -> Float[Array, "B T count h"]:
            return rearrange(linear(name, count * self.head_dim)(x_BTD, deterministic), "B T (n h) -> B T n h", n=count)

        q = rotate(heads("q_proj", self.num_heads), angles)
        k = rotate(heads("k_proj", self.num_kv_heads), angles)
        v = heads("v_proj", self.num_kv_heads)
        if cache is not None:
            at = (layer, 0, start, 0, 0)
            cache = KVCache(
                jax.lax.dynamic_update_slice(cache.k_LBSKh, k[None].astype(cache.k_LBSKh.dtype), at),
                jax.lax.dynamic_update_slice(cache.v_LBSKh, v[None].astype(cache.v_LBSKh.dtype), at),
            )
            k = jax.lax.dynamic_index_in_dim(cache.k_LBSKh, layer, 0, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(cache.v_LBSKh, layer, 0, keepdims=False)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        out = rearrange(out, "B T H h -> B T (H h)")
        return linear("o_proj", x_BTD.shape[-1])(out, deterministic), cache


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (Shazeer 2020)."""

    intermediate_size: int
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], deterministic: bool) -> Float[Array, "B T D"]:
        def linear(name: str, features: int) -> Linear:
            lora = self.lora if is_target(f"mlp.{name}", self.lora) else None
            return Linear(features, lora, self.dtype, self.param_dtype, name=name)

        gate = linear("gate_proj", self.intermediate_size)(x, deterministic)
        up = linear("up_proj", self.intermediate_size)(x, deterministic)
        return linear("down_proj", x.shape[-1])(nn.silu(gate) * up, deterministic)
