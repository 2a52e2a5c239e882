"""One decoder-only transformer, driven by a configuration; layers are scanned over stacked weights. What it does with pictures: vlm.py.

Letters: B batch, T query tokens, S key slots, D hidden, V vocabulary, L layers; M pictures a row, F tokens a picture, E feature size.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.config import ConfigError, LoRAConfig
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.models.attention import blocks_of, softcap
from pe_rlhf_jax.models.layers import HEADS, MLP, Attention, KVCache, Rotation, make_norm
from pe_rlhf_jax.models.lora import MODULES
from pe_rlhf_jax.models.rope import RopeScaling, rope_angles
from pe_rlhf_jax.models.visibility import Visible, positions, visible, with_blocks
from pe_rlhf_jax.models.vision import VisionTower, tower_features
from pe_rlhf_jax.models.vlm import Projector, blocks, condense, insert, placeholders
from pe_rlhf_jax.sharding import BATCH, constrain
from pe_rlhf_jax.types import PyTree

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class PerLayer(flax.struct.PyTreeNode):
    """What differs from layer to layer; the scan hands each layer its own. None where all layers are alike."""

    index: Int[Array, "*L"]
    window: Int[Array, "*L"] | None
    """Tokens that are seen, itself included."""
    kind: Int[Array, "*L"] | None
    """Which of the kinds of rotation."""


class Layer(nn.Module):
    """Transformer block; the body of the scan over layers."""

    config: DecoderConfig
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any
    remat: str
    attention_block: int | None
    joined: bool

    @nn.compact
    def __call__(self, carry, layer: PerLayer, rotation: Rotation | None, seen: Visible, start, deterministic):
        x, cache = carry
        # What is kept for the backward pass is shared among the chips of `tensor`, each a stretch of every row, and is whole in between.
        x = constrain(constrain(x, BATCH, "tensor", None), BATCH, None, None)
        c = self.config
        common = {"lora": self.lora, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str, y: Array) -> Array:
            return make_norm(c, self.dtype, self.param_dtype, name)(y)

        if layer.kind is not None:
            rotation = jax.tree.map(lambda leaf: leaf[layer.kind], rotation)
        if layer.window is not None:
            seen = seen.within(layer.window)
        attention_class = Attention
        if self.remat == "full" and blocks_of(x.shape[1], self.attention_block)[0] == 1:
            # What attention keeps for its own backward pass, scores first of all, is not to lie beside what the MLP's needs: it is computed
            # again once that is through, from queries, keys and values, which is little beside the projections.
            keep = jax.checkpoint_policies.save_only_these_names(HEADS)
            attention_class = nn.remat(Attention, policy=keep, static_argnums=(7,))
        attention = attention_class(c, **common, block=self.attention_block, joined=self.joined, name="attention")
        mlp = MLP(c, **common, joined=self.joined, name="mlp")
        y, cache = attention(norm("attention_norm", x), rotation, seen, cache, layer.index, start, deterministic)
        if c.post_norms:
            y = norm("attention_post_norm", y)
        read, x = x, x + y
        z = mlp(norm("mlp_norm", read if c.parallel_residual else x), deterministic)
        if c.post_norms:
            z = norm("mlp_post_norm", z)
        return (constrain(constrain(x + z, BATCH, None, None), BATCH, "tensor", None), cache), None


class Decoder(nn.Module):
    """Hidden states of a sequence; `unembed` turns them into logits.

    `lora` says where adapters may sit; they act when the collection `lora` is among the variables. `remat` names what the backward
    pass recomputes: `none`, `full`, or `dots` (all but the results of matrix products). `attention_block` is `attend`'s. `joined` says
    that the layers' parameters are those of joined.py; the layers are then written out one after the other, not scanned.
    """

    config: DecoderConfig
    lora: LoRAConfig | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"
    attention_block: int | None = None
    joined: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        mask_BS: Bool[Array, "B S"],
        positions_BT: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | int = 0,
        deterministic: bool = True,
        features: Float[Array, "B M F E"] | None = None,
        prompt: Bool[Array, "B T"] | None = None,
        ends: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Returns final-normed hidden states and the updated cache (None without one).

        `mask_BS` marks real tokens among the key slots: the sequence itself (S = T), or all slots of the cache. The tokens stand at
        slots start .. start + T - 1 and see real tokens up to their own slot; for a single token the cache is a ring, in which all
        other slots are before its own. Positions default to counting real tokens only, so that left padding changes nothing; they must
        be given when `start` is not 0. `features` of pictures take the place of the prompt's placeholders, and tokens that are read in
        both directions see each other: vlm.py says how, and when `prompt` is needed.
        `ends` are for several texts in one row, whose common beginnings are there once, without a cache: visibility.py.
        """
        c = self.config
        seen = visible(mask_BS, tokens_BT.shape[1], start, ends)
        if features is not None and (c.vision is None or prompt is None):
            what = "a model without a vision tower" if c.vision is None else "no `prompt`, which says where its placeholders are"
            raise ValueError(f"expected features of pictures only for a model that sees, together with `prompt`; found {what}")
        if positions_BT is None:
            positions_BT = positions(mask_BS)[:, : tokens_BT.shape[1]] if ends is None else seen.queries.place
        embedding = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.param_dtype)
        x = constrain(embedding[tokens_BT].astype(self.dtype), BATCH, None, None)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, self.dtype)  # rounded first, as the models were trained
        if c.learned_positions:
            x = x + self._learned_positions(positions_BT)
        if c.vision is not None:
            placeholder_BT = placeholders(c.vision, tokens_BT, prompt)
            x = self._insert(x, features, placeholder_BT)
            block_BT = None if prompt is None or placeholder_BT is None else blocks(c.vision, prompt, placeholder_BT)
            if block_BT is not None:
                seen = with_blocks(seen, start, block_BT, c.vision.blocks_beyond_windows)
        layer_class = Layer
        if self.remat != "none":
            layer_class = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False, static_argnums=(6,))
        layers = nn.scan(
            layer_class,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "lora": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=c.num_layers,
            unroll=c.num_layers if self.joined else 1,
        )(c, self.lora, self.dtype, self.param_dtype, self.remat, self.attention_block, self.joined, name="layers")
        rotation, kinds = rotations(c, positions_BT)
        window = None
        windows = [c.sliding_window if c.is_windowed(i) else None for i in range(c.num_layers)]
        if len(set(windows)) > 1:
            window = jnp.array([mask_BS.shape[1] if w is None else w for w in windows], jnp.int32)
        elif windows[0] is not None:
            seen = seen.within(windows[0])
        per_layer = PerLayer(jnp.arange(c.num_layers), window, kinds)
        (x, cache), _ = layers((x, cache), per_layer, rotation, seen, start, deterministic)
        x = make_norm(c, self.dtype, self.param_dtype, "final_norm")(x)  # still shared along `tensor`: readers take parts of rows
        if not c.tie_word_embeddings and self.is_initializing():
            self.param("lm_head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.param_dtype)
        return x, cache

    def _insert(
        self, x: Float[Array, "B T D"], features: Float[Array, "B M F E"] | None, placeholder_BT: Bool[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        vision = self.config.vision
        assert vision is not None
        if self.is_initializing():  # makes the tower's parameters; later it is applied on its own, by `encode_images`
            size = vision.tower.image_size
            self._tower(name="vision")(jnp.zeros((1, size, size, 3)))
            features = jnp.zeros((1, 1, vision.tokens_per_image, vision.feature_size))
        if features is None:
            return x
        projector = Projector(vision, self.config.hidden_size, self.lora, self.dtype, self.param_dtype, name="projector")
        projected = projector(features)
        return x if placeholder_BT is None else insert(x, projected, placeholder_BT)

    def encode_images(
        self,
        variables: PyTree,
        images: Float[Array, "*batch H W 3"],
        deterministic: bool = True,
        rngs: dict[str, jax.Array] | None = None,
    ) -> Float[Array, "*batch F E"]:
        """Features of pictures, for the argument `features`: the tower's, as the projector takes them. See vlm.py for both.

        `deterministic` and `rngs` are for adapters on the tower, as in `apply`.
        """
        vision = self.config.vision
        if vision is None:
            raise ValueError("expected a model with a vision tower, found one for text only")
        own = {name: tree["vision"] for name, tree in variables.items() if name in ("params", "lora") and "vision" in tree}
        return condense(vision, tower_features(self._tower(parent=None), own, images, deterministic, rngs))

    def _tower(self, **where: Any) -> VisionTower:
        assert self.config.vision is not None
        return VisionTower(self.config.vision.tower, self.lora, self.dtype, self.param_dtype, self.remat, self.attention_block, **where)

    def _learned_positions(self, positions_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        shape = (c.max_position_embeddings, c.hidden_size)
        table = self.param("position_embed", nn.initializers.normal(0.02), shape, self.param_dtype)
        # A padded row may be longer than the table. A token beyond it: not a number, which is noticed, not the last position again.
        return table.at[positions_BT].get(mode="fill", fill_value=jnp.nan).astype(self.dtype)

    def unembed(self, params: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits of hidden states, in float32."""
        return unembed(params, hidden, self.config.final_softcap)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for `slots` tokens a row, in the computation dtype."""
        c = self.config
        zeros = jnp.zeros((c.num_layers, batch, c.num_kv_heads, slots, c.head_dim), self.dtype)
        zeros = constrain(zeros, None, BATCH, "tensor", None, None)
        return KVCache(zeros, zeros)

    def init_lora(self, key: jax.Array) -> PyTree:
        """A fresh adapter: it changes nothing until it is trained. The backbone's own initialisation is not computed."""
        if "lora" not in jax.eval_shape(self._init, key):
            wanted = "None" if self.lora is None else repr(self.lora.target_modules)
            raise ConfigError(f"no adapter to make: lora.target_modules = {wanted} fits no module; modules are {', '.join(MODULES)}")
        if self.lora is not None and self.lora.modules_to_save and self.config.vision is None:
            raise ConfigError(f"lora.modules_to_save = {list(self.lora.modules_to_save)}: a model for text has no projector to train")
        return jax.jit(lambda k: self._init(k)["lora"])(key)

    def init_params(self, key: jax.Array) -> PyTree:
        """Random parameters, for tests and for shapes under `jax.eval_shape`."""
        return self._init(key)["params"]

    def _init(self, key: jax.Array) -> PyTree:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return self.init({"params": key, "lora": key}, tokens, tokens == 0)


def rotations(c: DecoderConfig, positions_BT: Int[Array, "B T"]) -> tuple[Rotation | None, Int[Array, " L"] | None]:
    """How the layers rotate queries and keys, and where they differ, which kind each layer has."""
    size = c.head_dim if c.rotary_dim is None else c.rotary_dim
    if c.learned_positions or not size:
        return None, None

    def kind(layer: int) -> tuple[float, RopeScaling | None] | None:
        if layer in c.unrotated_layers:
            return None
        if c.local_rope_theta is not None and c.is_windowed(layer):
            return c.local_rope_theta, None
        return c.rope_theta, c.rope_scaling

    kinds = [kind(layer) for layer in range(c.num_layers)]
    distinct = list(dict.fromkeys(kinds))

    def angles(kind: tuple[float, RopeScaling | None] | None) -> Float[Array, "B T half"]:
        if kind is None:  # turning by 0 changes no bit
            return jnp.zeros((*positions_BT.shape, size // 2), jnp.float32)
        return rope_angles(positions_BT, size, *kind)

    lengths = [1.0 if kind is None or kind[1] is None else kind[1].attention_factor for kind in distinct]
    length = None if set(lengths) == {1.0} else jnp.array(lengths, jnp.float32)
    if len(distinct) == 1:
        return Rotation(angles(distinct[0]), None if length is None else length[0]), None
    return Rotation(jnp.stack([angles(kind) for kind in distinct]), length), jnp.array([distinct.index(kind) for kind in kinds])


def unembed(params: PyTree, hidden: Float[Array, "*batch D"], final_softcap: float | None = None) -> Float[Array, "*batch V"]:
    """Logits in float32, by the head of its own or the tied embedding. `Decoder.unembed` knows the model's soft cap."""
    matrix_VD = params["lm_head"] if "lm_head" in params else params["embed"]
    logits = jnp.einsum("...d,vd->...v", hidden, matrix_VD.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = constrain(logits, *((BATCH, *(None,) * (logits.ndim - 2), "tensor") if logits.ndim > 1 else ("tensor",)))
    return softcap(logits, final_softcap)
