"""Reward modelling on preference pairs. Letter: B pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pe_rlhf_jax.algorithms.masked import divide, masked_sum, select


def bradley_terry(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    *,
    margin: Float[Array, " B"] | None = None,
    center_coef: float = 0.0,
    weight: Float[Array, " B"] | None = None,
    total: ArrayLike | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted mean of -log sigmoid(chosen - rejected - margin) + center_coef (chosen + rejected)^2, and statistics.

    The likelihood of Bradley and Terry (1952) as used for rewards by Ziegler et al. (2019); the margin is Llama 2's
    (arXiv 2307.09288, eq. 2); centering is Eisenstein et al.'s (arXiv 2312.09244). `weight` is 1 for each pair by
    default; a pair of weight 0 never matters, whatever its scores. `total`, by default the sum of the weights, is the
    whole batch's when this is a micro-batch of it.

    Statistics, weighted means too: `accuracy`, the share of pairs with chosen > rejected, where a tie counts 0.5 (the
    margin plays no part); `margin`, chosen - rejected; `mean_reward`, of both sides.
    """
    weight = jnp.ones_like(chosen, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    real = weight > 0
    chosen, rejected = select(chosen, real), select(rejected, real)
    total = jnp.sum(weight) if total is None else total

    def mean(x: Float[Array, " B"]) -> Float[Array, ""]:
        return divide(masked_sum(weight * x, real), total)

    difference = chosen - rejected
    needed = 0.0 if margin is None else select(margin, real)
    loss = mean(-jax.nn.log_sigmoid(difference - needed) + center_coef * jnp.square(chosen + rejected))
    return loss, {
        "accuracy": mean(0.5 * (1.0 + jnp.sign(difference))),
        "margin": mean(difference),
        "mean_reward": mean(0.5 * (chosen + rejected)),
    }
