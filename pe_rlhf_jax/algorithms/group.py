"""Baselines from several responses to one prompt, without a value model: RLOO and GRPO.

Rows of one prompt stand side by side: row i belongs to group i // group_size. Both algorithms learn with PPO's clipped ratio
(`ppo.policy_loss`), which at the policy that sampled is the plain policy gradient. Letters: B batch, R response tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms.masked import masked_mean, select

SCALE_EPS = 1e-4
"""Added to a group's standard deviation, as in TRL: a group whose scores hardly differ teaches hardly anything."""


def leave_one_out(returns: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Each return minus the mean of the group's others (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    The baseline does not depend on the row itself, so the policy gradient stays unbiased. Raises ValueError for groups of one, or a
    batch that they do not divide.
    """
    grouped = _grouped(returns, group_size)
    others = (jnp.sum(grouped, axis=1, keepdims=True) - grouped) / (group_size - 1)
    return (grouped - others).reshape(-1)


def group_normalised(scores: Float[Array, " B"], group_size: int, scale: bool = True) -> Float[Array, " B"]:
    """(score - group mean) / (group standard deviation + 1e-4) (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample's (n - 1), as in TRL. Without `scale` only the mean is taken off, which gives easy and hard
    prompts their own weight (Liu et al. 2025, arXiv 2503.20783). Raises ValueError as `leave_one_out`.
    """
    grouped = _grouped(scores, group_size)
    grouped = grouped - grouped[:, :1]  # so that equal scores differ by nothing, however large they are
    centred = grouped - jnp.mean(grouped, axis=1, keepdims=True)
    if scale:
        centred = centred / (jnp.std(grouped, axis=1, keepdims=True, ddof=1) + SCALE_EPS)
    return centred.reshape(-1)


def to_tokens(advantages: Float[Array, " B"], mask: Bool[Array, "B R"]) -> Float[Array, "B R"]:
    """The response's advantage at each of its real tokens, zeros where masked."""
    return select(jnp.broadcast_to(advantages[:, None], mask.shape), mask)


def spread(scores: Float[Array, " B"], group_size: int) -> Float[Array, ""]:
    """Mean standard deviation inside a group: near 0, responses to a prompt have become alike and nothing is learned."""
    grouped = _grouped(scores, group_size)
    deviations = jnp.std(grouped, axis=1, ddof=1)
    return masked_mean(deviations, jnp.ones_like(deviations, bool))


def _grouped(x: Float[Array, " B"], group_size: int) -> Float[Array, "G K"]:
    if group_size < 2:
        raise ValueError(f"expected groups of at least 2 responses, found group_size {group_size}")
    if x.shape[0] % group_size:
        raise ValueError(f"expected a batch of whole groups of {group_size}, found {x.shape[0]} rows")
    return rearrange(x.astype(jnp.float32), "(G K) -> G K", K=group_size)
