"""Rotary position embeddings (Su et al. 2021) and the scalings that stretch them to longer texts.

Letters: B batch, T query tokens, H heads, h head size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model's frequencies differ from theta^(-2i/h), by Hugging Face's names; each kind reads its own fields.

    `linear` divides all by the factor. `llama3` divides the slow ones and blends those between (Llama 3.1). `yarn` does so by a ramp
    over dimensions and makes rotated vectors longer (Peng et al. 2023, arXiv 2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int = 0
    """Of the texts that the model was first trained on."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Length of a rotated vector in units of the vector's own."""


def rope_angles(positions_BT: Int[Array, "B T"], size: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, "B T half"]:
    """Rotation angles of `size` dimensions, float32."""
    return positions_BT[..., None].astype(jnp.float32) * _frequencies(size, theta, scaling)


def rotate(x_BHTh: Float[Array, "B H T h"], angles: Float[Array, "B T half"], length: float | Array = 1.0) -> Float[Array, "B H T h"]:
    """Rotates the pairs (x_i, x_{i + half}), as Hugging Face does, and multiplies them by `length`; computed in float32.

    Dimensions from 2 * half on stay as they are (partial rotary embeddings).
    """
    turned, rest = jnp.split(x_BHTh, [2 * angles.shape[-1]], axis=-1)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    if not (isinstance(length, float) and length == 1.0):
        sin, cos = sin * length, cos * length
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BHTh.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)


def _frequencies(size: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " half"]:
    plain = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_length * plain / (2 * math.pi)  # over the length of the first training
        share = jnp.clip((turns - low) / (high - low), 0, 1)
        return (1 - share) * plain / scaling.factor + share * plain
    low, high = (_dimension(turns, size, theta, scaling.original_length) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0, 1)
    return ramp * plain / scaling.factor + (1 - ramp) * plain


def _dimension(turns: float, size: int, theta: float, length: int) -> float:
    """The pair that turns this often over a text of that length."""
    return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
