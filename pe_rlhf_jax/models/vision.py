"""One vision transformer (Dosovitskiy et al. 2020) for SigLIP, CLIP and DINOv2; layers are scanned over stacked weights.

Letters: N pictures, H and W their sides in pixels, p patches along a side, q pixels along a patch, C colours, T tokens, D hidden, L layers,
G kinds of features.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.architecture import TowerConfig
from pe_rlhf_jax.models.layers import MLP, Attention, make_norm
from pe_rlhf_jax.models.lora import VISION
from pe_rlhf_jax.sharding import BATCH, constrain


class TowerLayer(nn.Module):
    """Transformer block without a mask; the body of the scan over layers. Beside its output it carries the features to be kept."""

    config: TowerConfig
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any
    attention_block: int | None

    @nn.compact
    def __call__(self, carry: tuple[Array, Array | None], layer: Int[Array, ""], deterministic: bool) -> tuple[tuple[Array, Any], None]:
        x, kept = carry
        c = self.config
        common = {"lora": self.lora, "dtype": self.dtype, "param_dtype": self.param_dtype, "prefix": VISION}

        def norm(name: str, y: Array) -> Array:
            return make_norm(c, self.dtype, self.param_dtype, name)(y)

        def scaled(name: str, y: Array) -> Array:
            if not c.layer_scale:
                return y
            return y * self.param(name, nn.initializers.ones, (c.hidden_size,), self.param_dtype).astype(self.dtype)

        attention, mlp = Attention(c, **common, block=self.attention_block, name="attention"), MLP(c, **common, name="mlp")
        y, _ = attention(norm("attention_norm", x), None, None, None, layer, 0, deterministic)
        x = x + scaled("attention_scale", y)
        x = constrain(x + scaled("mlp_scale", mlp(norm("mlp_norm", x), deterministic)), BATCH, None, None)
        if kept is not None and c.feature_layers is not None:
            kept = jnp.where((jnp.array(c.feature_layers) == layer + 1)[:, None, None, None], x[None], kept)
        return (x, kept), None


class VisionTower(nn.Module):
    """Features of pictures, patch by patch in reading order, the class token before them where there is one.

    `remat` and `attention_block`: as in `Decoder`; the former matters only where the tower is trained.
    """

    config: TowerConfig
    lora: LoRAConfig | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"
    attention_block: int | None = None

    @nn.compact
    def __call__(self, images_NHWC: Float[Array, "N H W 3"], deterministic: bool = True) -> Float[Array, "N T D"]:
        """Of several kept layers, the features of a token lie side by side (D is then their number times the hidden size)."""
        c = self.config
        if images_NHWC.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"expected pictures of [{c.image_size}, {c.image_size}, 3], found {list(images_NHWC.shape[1:])}")
        x = constrain(self._patches(images_NHWC.astype(self.dtype)), BATCH, None, None)
        if c.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (c.hidden_size,), self.param_dtype)
            x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, c.hidden_size)), x], axis=1)
        x = x + self._positions()
        if c.pre_norm:
            x = make_norm(c, self.dtype, self.param_dtype, "pre_norm")(x)
        kept = None
        if c.feature_layers is not None:  # those after no layer at all are there
            kept = jnp.where((jnp.array(c.feature_layers) == 0)[:, None, None, None], x[None], 0)
        layer_class = TowerLayer
        if self.remat != "none":
            layer_class = nn.remat(TowerLayer, prevent_cse=False, static_argnums=(3,))
        layers = nn.scan(
            layer_class,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "lora": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
        )(c, self.lora, self.dtype, self.param_dtype, self.attention_block, name="layers")
        (x, kept), _ = layers((x, kept), jnp.arange(c.num_layers), deterministic)
        if kept is not None:
            return rearrange(kept, "G N T D -> N T (G D)")
        return make_norm(c, self.dtype, self.param_dtype, "post_norm")(x)

    def _patches(self, images_NHWC: Float[Array, "N H W C"]) -> Float[Array, "N T D"]:
        c, q = self.config, self.config.patch_size
        # Width before height, as the file's [D, C, q, q] has it when its axes are reversed.
        kernel = self.param("patch_kernel", nn.initializers.lecun_normal((0, 1, 2), 3), (q, q, 3, c.hidden_size), self.param_dtype)
        whole = images_NHWC[:, : c.side * q, : c.side * q]
        patches = rearrange(whole, "N (h y) (w x) C -> N h w x y C", y=q, x=q)
        features = jnp.einsum("NhwxyC,xyCD->NhwD", patches, kernel.astype(self.dtype))
        if c.patch_bias:
            features = features + self.param("patch_bias", nn.initializers.zeros, (c.hidden_size,), self.param_dtype).astype(self.dtype)
        return rearrange(features, "N h w D -> N (h w) D")

    def _positions(self) -> Float[Array, "T D"]:
        c = self.config
        stored = c.side if c.position_side is None else c.position_side
        table = self.param("position_embed", nn.initializers.normal(0.02), (stored**2 + c.class_token, c.hidden_size), self.param_dtype)
        if stored == c.side:
            return table.astype(self.dtype)
        first, grid = jnp.split(table.astype(jnp.float32), [int(c.class_token)])
        matrix = cubic_interpolation(stored, c.side)
        grid = jnp.einsum("hi,wj,ijD->hwD", matrix, matrix, grid.reshape(stored, stored, -1), precision="highest")
        return jnp.concatenate([first, grid.reshape(c.side**2, -1)]).astype(self.dtype)


@functools.cache
def cubic_interpolation(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights that resize a row by cubic convolution (Keys 1981, a = -0.75), as `torch.nn.functional.interpolate` does for `bicubic`.

    Pixels are areas (`align_corners=False`), nothing is smoothed when the row becomes shorter, and the ends are repeated.
    """
    a = -0.75
    matrix = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        whole = int(np.floor(place))
        for j in range(whole - 1, whole + 3):
            x = abs(place - j)
            weight = (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix.astype(np.float32)


def tower_features(
    tower: VisionTower,
    variables: dict[str, Any],
    images: Float[Array, "*batch H W 3"],
    deterministic: bool = True,
    rngs: dict[str, jax.Array] | None = None,
) -> Float[Array, "*batch T D"]:
    """The tower's features of any number of pictures; `variables` are the tower's own."""
    lead = images.shape[:-3]
    features = tower.apply(variables, images.reshape(-1, *images.shape[-3:]), deterministic, rngs=rngs)
    assert isinstance(features, jax.Array)
    return features.reshape(*lead, *features.shape[1:])
