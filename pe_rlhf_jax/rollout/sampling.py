"""Drawing the next token. Letters: B batch, V vocabulary, n blocks of C tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pe_rlhf_jax.config import SamplingConfig

BLOCK = 128


def sample(logits_BV: Float[Array, "B V"], key: jax.Array, config: SamplingConfig) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each row, and its log-probability.

    The log-probability is that of the whole distribution at the sampling temperature, before top-k and top-p cut its tail, which is the
    one that learning uses; at temperature 0 the choice is greedy and the log-probability is taken at temperature 1.
    """
    logits_BV = logits_BV.astype(jnp.float32) / (config.temperature or 1.0)
    if config.temperature == 0:
        token_B = _argmax(logits_BV)
    else:
        noise_BV = jax.random.gumbel(key, logits_BV.shape)
        token_B = _argmax(_cut_tail(logits_BV, config.top_k, config.top_p) + noise_BV)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _argmax(x_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`jnp.argmax`, by the greatest number of each block: on a CPU, XLA takes the place and the number together, one by one, and with them
    computes the noise, which makes sampling two to three times as long."""
    x_BnC = jnp.pad(x_BV, ((0, 0), (0, -x_BV.shape[-1] % BLOCK)), constant_values=-jnp.inf).reshape(len(x_BV), -1, BLOCK)
    block_B = jnp.argmax(jnp.max(x_BnC, axis=-1), axis=-1)
    x_BC = jnp.take_along_axis(x_BnC, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + jnp.argmax(x_BC, axis=-1)


def _cut_tail(logits_BV: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Minus infinity outside the k most likely tokens and outside the fewest that hold probability p; the likeliest stays."""
    if 0 < top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least, logits_BV, -jnp.inf)
    if top_p < 1:
        descending_BV = -jnp.sort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least = jnp.min(jnp.where(before_BV < top_p, descending_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least, logits_BV, -jnp.inf)
    return logits_BV
