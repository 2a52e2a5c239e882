"""Returns and advantages from token rewards. Letters: B batch, R response tokens.

`values[:, t]` is V(x_t), the value of the state *before* token t is chosen. An episode ends with its last real token,
also where a response was cut at the length limit: the value after it is 0. Masked positions are skipped and stay 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms.masked import masked_mean, masked_var, select


def gae(
    rewards: Float[Array, "B R"],
    values: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    gamma: ArrayLike,
    lam: ArrayLike,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16): (advantages, returns), float32.

        delta_t = r_t + gamma V(x_{t+1}) - V(x_t)
        A_t = delta_t + gamma lam A_{t+1}
        return_t = A_t + V(x_t)

    where t + 1 is the next real token. With lam = 1 the return is the discounted sum of rewards, with lam = 0 the
    advantage is delta_t.
    """
    rewards, values = select(rewards, mask), select(values, mask)

    def step(after: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_advantage, next_value = after
        reward, value, real = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        before = jnp.where(real, advantage, next_advantage), jnp.where(real, value, next_value)
        return before, jnp.where(real, advantage, 0.0)

    end = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(step, (end, end), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def returns_to_go(rewards: Float[Array, "B R"], mask: Bool[Array, "B R"], gamma: ArrayLike) -> Float[Array, "B R"]:
    """Discounted sum of the rewards from each real token to the end: Z_t = sum_{i >= t} gamma^(i - t) r_i."""
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[1]


def explained_variance(values: Float[Array, "B R"], returns: Float[Array, "B R"], mask: Bool[Array, "B R"]) -> Float[Array, ""]:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is a perfect critic, 0 no better than a constant.

    0 also where the returns do not vary, up to the rounding of float32; NaN where one is not a finite number.
    """
    values, returns = select(values, mask), select(returns, mask)
    variance = masked_var(returns, mask)
    varies = variance > 1e-12 * masked_mean(jnp.square(returns), mask)
    ratio = masked_var(returns - values, mask) / jnp.where(varies, variance, 1.0)
    return jnp.where(varies, 1.0 - ratio, jnp.where(jnp.isfinite(variance), 0.0, jnp.nan))
