"""Reward modelling on preference pairs and on 0/1 labels. Letter: B pairs, or labelled rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from pe_rlhf_jax.algorithms.masked import divide, masked_mean, masked_sum, select


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


def logistic(
    scores: Float[Array, " B"],
    labels: Float[Array, " B"],
    *,
    weight: Float[Array, " B"] | None = None,
    total: ArrayLike | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of -w [y log sigmoid(s) + (1 - y) log sigmoid(-s)], weighted binary cross-entropy on the logit s, and statistics.

    The paper's reward models of single actions (arXiv 2403.10704, section 4.2). RL is fed the logit itself: sigmoid(s) saturates, and
    with it the difference between a good and a better response. `weight` is 1 for each row by default, or holds class weights: a batch that
    happens to have one class is then worth as much as this class should be. A row of weight 0 never matters. `total`, by default the
    number of the other rows, is the whole batch's when this is a micro-batch of it. Statistics, means over rows: `accuracy`, the share on
    the right side of 0 (a score of 0 counts 0.5), and `mean_reward`.
    """
    weight = jnp.ones_like(scores, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    real = weight > 0
    scores, labels = select(scores, real), select(labels, real)
    loss = -weight * (labels * jax.nn.log_sigmoid(scores) + (1.0 - labels) * jax.nn.log_sigmoid(-scores))
    right = 0.5 * (1.0 + jnp.sign(scores * (2.0 * labels - 1.0)))
    return masked_mean(loss, real, total), {"accuracy": masked_mean(right, real, total), "mean_reward": masked_mean(scores, real, total)}
