"""The KL penalty that keeps a policy near its reference: its estimators, the reward it shapes, its coefficient.

Letters: B batch, R response tokens.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms.masked import select

MAX_PROPORTIONAL_ERROR = 0.2


def kl_per_token(logprobs: Float[Array, "B R"], ref_logprobs: Float[Array, "B R"], estimator: Literal["k1", "k3"]) -> Float[Array, "B R"]:
    """Estimates KL(policy || reference) at each token that the policy sampled, in nats.

    With d = log policy - log reference: k1 = d, and k3 = exp(-d) - 1 + d, which is never negative and near the
    reference varies less (Schulman 2020, "Approximating KL divergence"). The mean of either is the KL.

    Only k1 is right *as a reward*, though. A policy gradient follows E[k grad log policy]: for k1 that is the gradient
    of KL(policy || reference), for k3 it is the gradient of KL(policy || reference) minus that of
    KL(reference || policy), which vanishes to second order at the reference: k3 hardly holds a nearby policy back.
    As a term *of the loss*, differentiated through `logprobs`, it is the other way round: k1's expected gradient is 0, and
    k3's is that of KL(reference || policy), which is how GRPO uses it (Shao et al. 2024, eq. 4).

    Both log-probabilities must be of one temperature. Masked positions give junk, which `token_rewards` drops.
    Raises ValueError for another estimator.
    """
    d = jnp.asarray(logprobs, jnp.float32) - jnp.asarray(ref_logprobs, jnp.float32)
    if estimator == "k1":
        return d
    if estimator == "k3":
        return jnp.expm1(-d) + d  # exp(-d) - 1 would round a small d away
    raise ValueError(f"KL estimator: expected 'k1' or 'k3', found {estimator!r}")


def token_rewards(
    scores: Float[Array, " B"],
    kl: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    kl_coef: ArrayLike,
    score_coef: ArrayLike = 1.0,
) -> Float[Array, "B R"]:
    """Rewards per token: -kl_coef * kl, plus score_coef * score at a row's last real token; zeros where masked.

    The last real token is the end token, or the last one of a response that was cut; a row without real tokens gets
    nothing. Always float32: scores are fractions and must not be rounded to the type of the tokens.
    Source: Ziegler et al. 2019, eq. 2. The paper's objective E[(1 - beta) r - beta KL] is score_coef = 1 - beta,
    kl_coef = beta.
    """
    penalty = -jnp.asarray(kl_coef, jnp.float32) * select(kl, mask)
    real_from_here = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    last = mask & (real_from_here == 1)
    score = select(jnp.broadcast_to(jnp.asarray(scores)[:, None], mask.shape), last)
    return penalty + jnp.asarray(score_coef, jnp.float32) * score


def adaptive_kl_coef(
    coef: ArrayLike, observed_kl: ArrayLike, target: ArrayLike, horizon: ArrayLike, episodes: ArrayLike
) -> Float[Array, ""]:
    """The next coefficient: coef * (1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon).

    `observed_kl` and `target` are mean KLs per response in nats; `episodes` are the responses since the last change,
    and `horizon` about how many of them a full correction takes. episodes / horizon counts as 1 at most, so that a
    batch larger than the horizon cannot make the coefficient negative. A NaN changes nothing.
    Source: Ziegler et al. 2019, section 2.2, with the horizon of their code.
    """
    coef = jnp.asarray(coef, jnp.float32)
    error = jnp.asarray(observed_kl, jnp.float32) / jnp.asarray(target, jnp.float32) - 1.0
    error = jnp.clip(error, -MAX_PROPORTIONAL_ERROR, MAX_PROPORTIONAL_ERROR)
    gain = jnp.minimum(jnp.asarray(episodes, jnp.float32) / jnp.asarray(horizon, jnp.float32), 1.0)
    return jnp.where(jnp.isnan(error), coef, coef * (1.0 + error * gain))
