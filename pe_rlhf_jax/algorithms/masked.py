"""Sums, means and whitening over the real positions of padded arrays.

What stands at a masked position never matters, not even NaN or infinity, neither to a value nor to a gradient: `select`
replaces it before any arithmetic. (Masking afterwards would leave 0 * NaN in the backward pass.)

`total`: the normaliser of a mean, by default the number of real positions. A batch that is computed in micro-batches
passes the whole batch's number to each of them, so that their means, and their gradients, add up to the whole batch's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

WHITEN_EPS = 1e-8
"""Added to the variance, as in lm-human-preferences (Ziegler et al. 2019) and TRL."""


def select(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x as float32, zeros where masked. Raises ValueError for a mask of another shape, TypeError if it is not boolean."""
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    if x.shape != mask.shape:
        raise ValueError(f"values and mask must have one shape; found values {x.shape} and mask {mask.shape}")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"a mask must be boolean, True where a position is real; found {mask.dtype}")
    return jnp.where(mask, x.astype(jnp.float32), 0.0)


def divide(x: Float[Array, "*shape"], total: ArrayLike) -> Float[Array, "*shape"]:
    """x / total, and x where total is 0: an empty sum stays 0."""
    total = jnp.asarray(total, jnp.float32)
    return x / jnp.where(total == 0, 1.0, total)


def masked_sum(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: int | tuple[int, ...] | None = None) -> Float[Array, "*rest"]:
    """Sum over real positions, of all axes or of `axis`."""
    return jnp.sum(select(x, mask), axis=axis)


def masked_mean(
    x: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    total: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> Float[Array, "*rest"]:
    """Mean over real positions, of all axes or of `axis`; 0 where there is none. `total` replaces their number."""
    if total is None:
        total = jnp.sum(mask, axis=axis, dtype=jnp.float32)
    return divide(masked_sum(x, mask, axis), total)


def masked_var(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Population variance (divided by n, not n - 1) over real positions; 0 where there is none."""
    return masked_mean(jnp.square(select(x, mask) - masked_mean(x, mask)), mask)


def masked_whiten(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], shift_mean: bool = True) -> Float[Array, "*shape"]:
    """(x - mean) / sqrt(var + 1e-8) over real positions, zeros where masked; `shift_mean` False adds the mean back.

    Advantages are whitened with their mean shifted to 0; rewards keep their mean (Huang et al. 2024, "The N+
    implementation details of RLHF with PPO").
    """
    mean = masked_mean(x, mask)
    whitened = (select(x, mask) - mean) * jax.lax.rsqrt(masked_var(x, mask) + WHITEN_EPS)
    return select(whitened if shift_mean else whitened + mean, mask)
