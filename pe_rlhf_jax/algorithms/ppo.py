"""Proximal policy optimization: the clipped losses of policy and value (Schulman et al. 2017, arXiv 1707.06347).

Losses and statistics are means over real tokens, divided by `total` where it is given, so that those of micro-batches
add up (see `masked`). Letters: B batch, R response tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms.masked import masked_mean, select

Statistics = dict[str, Float[Array, ""]]


def policy_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    cliprange: float,
    total: ArrayLike | None = None,
) -> tuple[Float[Array, ""], Statistics]:
    """mean max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) with ratio = exp(log pi - log pi_old) (eq. 7, negated).

    Gradients reach `logprobs` only. Both log-probabilities must be of the sampling temperature. Statistics:
      policy/approxkl_avg  mean of (log ratio)^2 / 2, which estimates KL(old || new)
      policy/clipfrac_avg  share of tokens whose clipped term is the larger one: they give no gradient
      val/ratio            mean ratio
      val/ratio_var        mean of (ratio - 1)^2: the variance about 1, the ratio's expectation under the old policy
                           (about the sample's own mean, micro-batches would not add up)
    """
    old_logprobs, advantages = jax.lax.stop_gradient((select(old_logprobs, mask), select(advantages, mask)))
    log_ratio = select(logprobs, mask) - old_logprobs
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - cliprange, 1.0 + cliprange)
    return masked_mean(jnp.maximum(unclipped, clipped), mask, total), {
        "policy/approxkl_avg": masked_mean(0.5 * jnp.square(log_ratio), mask, total),
        "policy/clipfrac_avg": masked_mean(clipped > unclipped, mask, total),
        "val/ratio": masked_mean(ratio, mask, total),
        "val/ratio_var": masked_mean(jnp.square(ratio - 1.0), mask, total),
    }


def value_loss(
    values: Float[Array, "B R"],
    old_values: Float[Array, "B R"],
    returns: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    cliprange_value: float,
    total: ArrayLike | None = None,
) -> tuple[Float[Array, ""], Statistics]:
    """mean max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2, as in OpenAI's baselines and Ziegler et al. 2019.

    Gradients reach `values` only. Statistics: `val/clipfrac_avg`, the share of tokens whose clipped term is the larger.
    """
    old_values, returns = jax.lax.stop_gradient((select(old_values, mask), select(returns, mask)))
    values = select(values, mask)
    unclipped = jnp.square(values - returns)
    # Not V_old + clip(V - V_old): it rounds differently from V, and unclipped tokens would count as clipped.
    clipped = jnp.square(jnp.clip(values, old_values - cliprange_value, old_values + cliprange_value) - returns)
    loss = masked_mean(0.5 * jnp.maximum(unclipped, clipped), mask, total)
    return loss, {"val/clipfrac_avg": masked_mean(clipped > unclipped, mask, total)}
