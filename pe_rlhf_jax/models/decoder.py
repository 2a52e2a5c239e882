"""One decoder-only transformer, driven by a configuration; layers are scanned over stacked weights.

Letters: B batch, T query tokens, S key slots, D hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.layers import Attention, GatedMLP, KVCache, RMSNorm, rope_angles
from pe_rlhf_jax.models.lora import MODULES
from pe_rlhf_jax.types import PyTree

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a Llama-like decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int


class Layer(nn.Module):
    """Pre-norm transformer block; the body of the scan over layers."""

    config: DecoderConfig
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, carry, layer, angles, mask, start, deterministic):
        x, cache = carry
        c = self.config
        norm = {"eps": c.rms_norm_eps, "dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {"lora": self.lora, "dtype": self.dtype, "param_dtype": self.param_dtype}
        attention = Attention(c.num_heads, c.num_kv_heads, c.head_dim, **common, name="attention")
        y, cache = attention(RMSNorm(**norm, name="attention_norm")(x), angles, mask, cache, layer, start, deterministic)
        x = x + y
        x = x + GatedMLP(c.intermediate_size, **common, name="mlp")(RMSNorm(**norm, name="mlp_norm")(x), deterministic)
        return (x, cache), None


class Decoder(nn.Module):
    """Hidden states of a sequence; `unembed` turns them into logits.

    `lora` says where adapters may sit; they act when the collection `lora` is among the variables. `remat` names what the backward
    pass recomputes: `none`, `full`, or `dots` (all but the results of matrix products).
    """

    config: DecoderConfig
    lora: LoRAConfig | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        mask_BS: Bool[Array, "B S"],
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Returns final-normed hidden states and the updated cache (None without one).

        `mask_BS` marks real tokens among the key slots: the sequence itself (S = T), or all slots of the cache. The tokens stand at
        slots start .. start + T - 1 and see real tokens up to their own slot. Positions default to counting real tokens only, so that
        left padding changes nothing; they must be given when `start` is not 0.
        """
        c = self.config
        length = tokens_BT.shape[1]
        if positions_BT is None:
            positions_BT = positions(mask_BS)[:, :length]
        embedding = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.param_dtype)
        x = embedding[tokens_BT].astype(self.dtype)
        slots_T = start + jnp.arange(length)
        sees_TS = jnp.arange(mask_BS.shape[1])[None, :] <= slots_T[:, None]
        mask = mask_BS[:, None, None, :] & sees_TS[None, None]
        layer_class = Layer
        if self.remat != "none":
            layer_class = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False, static_argnums=(6,))
        layers = nn.scan(
            layer_class,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "lora": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.lora, self.dtype, self.param_dtype, name="layers")
        angles = rope_angles(positions_BT, c.head_dim, c.rope_theta)
        (x, cache), _ = layers((x, cache), jnp.arange(c.num_layers), angles, mask, start, deterministic)
        x = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, name="final_norm")(x)
        if not c.tie_word_embeddings and self.is_initializing():
            self.param("lm_head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.param_dtype)
        return x, cache

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for `slots` tokens a row, in the computation dtype."""
        c = self.config
        zeros = jnp.zeros((c.num_layers, batch, slots, c.num_kv_heads, c.head_dim), self.dtype)
        return KVCache(zeros, zeros)

    def init_lora(self, key: jax.Array) -> PyTree:
        """A fresh adapter: it changes nothing until it is trained. The backbone's own initialisation is not computed."""
        if "lora" not in jax.eval_shape(self._init, key):
            wanted = "None" if self.lora is None else repr(self.lora.target_modules)
            raise ValueError(f"no adapter to make: lora.target_modules = {wanted} fits no module; modules are {', '.join(MODULES)}")
        return jax.jit(lambda k: self._init(k)["lora"])(key)

    def init_params(self, key: jax.Array) -> PyTree:
        """Random parameters, for tests and for shapes under `jax.eval_shape`."""
        return self._init(key)["params"]

    def _init(self, key: jax.Array) -> PyTree:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self.init({"params": key, "lora": key}, tokens, tokens == 0)


def positions(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each real token among the row's real tokens; 0 at leading padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def unembed(params: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Logits in float32, by the head of its own or the tied embedding."""
    matrix_VD = params["lm_head"] if "lm_head" in params else params["embed"]
    return jnp.einsum("...d,vd->...v", hidden, matrix_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)
