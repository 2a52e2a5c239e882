"""Supervised fine-tuning."""

from __future__ import annotations

from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms.masked import masked_mean


def cross_entropy(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"], total: ArrayLike | None = None) -> Float[Array, ""]:
    """Mean negative log-probability of the target tokens, in nats per token (see `masked` for `total`)."""
    return -masked_mean(logprobs, mask, total)
