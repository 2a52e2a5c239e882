"""Pictures among the tokens: what a decoder with `config.vision` does with images. `Decoder` calls this; the data side fills the arrays.

Letters: B rows, M pictures a row, N pictures in all, H and W their sides in pixels, T tokens, S key slots, F tokens a picture, E size of
a feature, D hidden.

The interface, for whoever makes batches and for the stages:

    images_BMHWC   float32 pixel values [B, M, H, W, 3], as the family's preprocessing makes them (H = W = config.vision.image_size).
                   M is the same for every row of a batch; what a row does not have is zero. A tile is a picture of its own. Row by
                   row, so that micro-batches, shards and groups of one prompt take pictures along with their rows.
    tokens_BT      each picture is written out: `config.vision.tokens_per_image` times the id `config.vision.image_token`, with the
                   family's begin and end tokens around them (`ImagePrompt.expand`), in the order of the row's pictures.
    prompt_BT      True at the prompt's real tokens, False at the response and at padding. Placeholders are looked for in it only: a
                   policy that samples the placeholder's id gets the id's own embedding, in sampling and in learning alike.

    features_BMFE = decoder.encode_images(variables, images_BMHWC)
                   The tower, and the family's pooling or shuffling, none of which has trained parameters by default: encode once,
                   use for policy, reference, reward and value alike (unless `adapts_tower(lora)`, then each role has its own).
    hidden, cache = decoder.apply(variables, tokens_BT, mask_BS, ..., features=features_BMFE, prompt=prompt_BT)
                   The projector runs here, where it can be trained. Rows without a picture have no placeholder in their prompt.
                   Without any picture in a batch leave `features` out. `prompt` is needed with features, and by families whose
                   prompts are read in both directions (`config.vision.attention == "prefix"`) always, but for single tokens: a
                   decode step after the prefill takes neither.

Who sees whom follows from one integer per token (`blocks`), as visibility.py reads it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.architecture import VisionConfig
from pe_rlhf_jax.models.layers import ACTIVATIONS, RMSNorm
from pe_rlhf_jax.models.lora import MODULES, VISION, Linear, is_target


class Projector(nn.Module):
    """From features of the tower to embeddings of the decoder. With `modules_to_save: [projector]` the adapter trains it whole."""

    config: VisionConfig
    hidden_size: int
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, features: Float[Array, "*batch E"]) -> Float[Array, "*batch D"]:
        c = self.config
        whole = self.lora is not None and "projector" in self.lora.modules_to_save

        def linear(name: str) -> Linear:
            return Linear(self.hidden_size, None, self.dtype, self.param_dtype, c.projector_bias, whole=whole, name=name)

        x = features.astype(self.dtype)
        if c.projector == "mlp":
            return linear("linear_2")(ACTIVATIONS[c.projector_activation](linear("linear_1")(x)))
        if c.projector == "norm-linear":
            x = RMSNorm(c.tower.rms_norm_eps, self.dtype, self.param_dtype, 1.0, whole, name="norm")(x)
        return linear("linear")(x)


def adapts_tower(lora: LoRAConfig | None) -> bool:
    """Whether an adapter changes the tower's features, so that each role has its own and they cannot be encoded once for all."""
    return any(is_target(VISION + module, lora) for module in MODULES)


def condense(config: VisionConfig, features: Float[Array, "*batch T D"]) -> Float[Array, "*batch F E"]:
    """What is left of the tower's features for the projector: without the first, averaged, or put side by side."""
    if config.drop_first:
        features = features[..., 1:, :]
    side = config.tower.side
    if config.pool > 1:
        width = side // config.pool * config.pool
        grid = features.reshape(*features.shape[:-2], side, side, -1)[..., :width, :width, :]
        grid = rearrange(grid, "... (h y) (w x) D -> ... (h w) y x D", y=config.pool, x=config.pool)
        features = jnp.mean(grid.astype(jnp.float32), axis=(-3, -2)).astype(features.dtype)
    if config.shuffle > 1:
        features = rearrange(features, "... (h y w x) D -> ... (h w) (y x D)", h=side // config.shuffle, y=config.shuffle, x=config.shuffle)
    return features


def placeholders(config: VisionConfig, tokens_BT: Int[Array, "B T"], prompt_BT: Bool[Array, "B T"] | None) -> Bool[Array, "B T"] | None:
    """Which tokens stand for features; None where no prompt is among the tokens.

    Raises:
        ValueError: the family reads prompts in both directions, and which tokens are the prompt is not said.
    """
    if prompt_BT is not None:
        return (tokens_BT == config.image_token) & prompt_BT
    if config.attention == "prefix" and tokens_BT.shape[1] > 1:
        raise ValueError("this model reads prompts in both directions: expected `prompt`, which says which tokens they are, found None")
    return None


def insert(
    embeddings_BTD: Float[Array, "B T D"], projected_BMFD: Float[Array, "B M F D"], placeholder_BT: Bool[Array, "B T"]
) -> Float[Array, "B T D"]:
    """The row's features in place of its placeholders, in order.

    Placeholders beyond the row's features become not a number, which is noticed, rather than some other picture's.
    """
    index_BT = jnp.maximum(jnp.cumsum(placeholder_BT, axis=1) - 1, 0)
    flat = rearrange(projected_BMFD, "B M F D -> B (M F) D").astype(embeddings_BTD.dtype)
    placed = jnp.take_along_axis(flat, index_BT[..., None], axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(placeholder_BT[..., None], placed, embeddings_BTD)


def blocks(config: VisionConfig, prompt_BT: Bool[Array, "B T"], placeholder_BT: Bool[Array, "B T"]) -> Int[Array, "B T"] | None:
    """One integer per token: 0 sees what comes before it; tokens of one block see each other besides. None: all are 0.

    A picture (its placeholders in a row, for families with an end token between pictures) or the whole prompt is a block.
    """
    if config.attention == "causal":
        return None
    if config.attention == "prefix":
        return prompt_BT.astype(jnp.int32)
    before = jnp.pad(placeholder_BT, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(placeholder_BT, jnp.cumsum(placeholder_BT & ~before, axis=1), 0)
