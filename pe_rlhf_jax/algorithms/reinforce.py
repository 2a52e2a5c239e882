"""REINFORCE with a learned value baseline, as the paper runs it (RLAIF, arXiv 2309.00267, appendix F).

    L_PG = -sum_t log pi(a_t | x_t) stopgrad(Z_t - V(x_t))        L_V = sum_t (Z_t - V(x_t))^2

No ratio, no clipping, no GAE, one update per batch. Three notes on how the sums are taken here:

- Z_t is `advantages.returns_to_go` of `kl.token_rewards(score_coef=1 - beta, kl_coef=beta)` with gamma = 1. The paper's
  Z_t is the whole episode's reward; the two differ by the KL penalties of tokens before t. These do not depend on a_t,
  so the expected gradient is the same and varies less (the baseline argument). Without a penalty the two are equal.
- KL enters as k1, whose gradient through the reward is the gradient of the KL (see `kl.kl_per_token`).
- Sums are divided by the number of real tokens, or by `total`; with the number of episodes as `total` they are the
  paper's sums. The factor between the two is the mean response length. It scales plain gradient descent's learning rate
  and hardly changes what Adam or Adafactor do.

Letters: B batch, R response tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms.masked import masked_mean, select


def policy_loss(
    logprobs: Float[Array, "B R"],
    returns: Float[Array, "B R"],
    values: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    total: ArrayLike | None = None,
) -> Float[Array, ""]:
    """mean -log pi(a_t | x_t) (Z_t - V(x_t)); gradients reach `logprobs` only."""
    advantages = jax.lax.stop_gradient(select(returns, mask) - select(values, mask))
    return masked_mean(-select(logprobs, mask) * advantages, mask, total)


def value_loss(
    values: Float[Array, "B R"], returns: Float[Array, "B R"], mask: Bool[Array, "B R"], total: ArrayLike | None = None
) -> Float[Array, ""]:
    """mean (Z_t - V(x_t))^2, without PPO's factor 1/2; gradients reach `values` only."""
    returns = jax.lax.stop_gradient(select(returns, mask))
    return masked_mean(jnp.square(returns - select(values, mask)), mask, total)
