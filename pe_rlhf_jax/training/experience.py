"""From a scored rollout to what learning needs: log-probabilities, values, advantages and returns.

Letters: B episodes, R response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pe_rlhf_jax.algorithms import advantages, group, kl
from pe_rlhf_jax.algorithms.masked import masked_mean, masked_sum, masked_whiten
from pe_rlhf_jax.config import RLConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.heads import apply_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import response_hidden, response_logprobs, response_values, token_logprobs
from pe_rlhf_jax.sharding import row_groups
from pe_rlhf_jax.training.micro_batches import in_micro_batches
from pe_rlhf_jax.training.shared_rows import answers_in_a_row
from pe_rlhf_jax.types import Experience, PyTree, Rollout


class Predictions(NamedTuple):
    """What policy and value model say at each response token; junk where masked."""

    logprobs: Float[Array, "B R"]
    entropy: Float[Array, "B R"]
    values: Float[Array, "B R"]
    """V(x_t) before the token is chosen; zeros without a value model."""


def predict(
    decoder: Decoder,
    config: RLConfig,
    chunk: int,
    backbone: PyTree,
    policy: Role,
    value: Role | None,
    rollout: Rollout,
    group: int = 1,
) -> Predictions:
    """Policy and value model over a rollout, at the sampling temperature; one pass where the value is a head on the policy's trunk.

    `group` neighbouring rows answer one prompt.
    """
    variables = policy.variables(backbone)
    answers = answers_in_a_row(decoder.config, rollout, group, row_groups())
    hidden = response_hidden(decoder, backbone, policy, rollout, answers)
    temperature = config.sampling.temperature
    logprobs, entropy = token_logprobs(hidden, rollout.response, lambda h: decoder.unembed(variables["params"], h), temperature, chunk)
    if value is None:
        return Predictions(logprobs, entropy, jnp.zeros_like(logprobs))
    if config.value_model == "trunk":
        return Predictions(logprobs, entropy, apply_head(value.head, hidden))
    return Predictions(logprobs, entropy, response_values(decoder, backbone, value, rollout))


@jax.jit(static_argnums=(0, 1, 2))
def make_experience(
    decoder: Decoder,
    config: RLConfig,
    chunk: int,
    backbone: PyTree,
    policy: Role,
    reference: Role,
    value: Role | None,
    rollout: Rollout,
    scores: Float[Array, " B"],
    kl_coef: Float[Array, ""],
) -> tuple[Experience, dict[str, Array]]:
    """Shapes rewards, advantages and returns of a rollout, and its metrics.

    PPO and REINFORCE pay the KL penalty token by token. RLOO pays it once for the whole response, before the group's baseline is
    taken off; GRPO has it in its loss instead. Forward passes are over `rl.micro_batch_size` episodes at a time, all the rest is over the
    whole batch.
    """
    mask = rollout.response_mask

    def forward(part: Rollout) -> tuple[Float[Array, "B R"], Float[Array, "B R"], Float[Array, "B R"]]:
        answers = answers_in_a_row(decoder.config, part, config.answers_each, row_groups())
        ref_logprobs, _ = response_logprobs(decoder, backbone, reference, part, config.sampling.temperature, chunk, answers)
        said = predict(decoder, config, chunk, backbone, policy, value, part, config.answers_each)
        sampled = config.keeps_sampled_logprobs(jnp.dtype(decoder.dtype).name)  # then the policy's pass is for nothing, and not compiled
        return part.logprobs if sampled else said.logprobs, said.values, ref_logprobs

    old_logprobs, values, ref_logprobs = in_micro_batches(forward, rollout, config.micro_batch_size)
    values = jnp.where(mask, values, 0.0)
    kl_BR = kl.kl_per_token(old_logprobs, ref_logprobs, "k1")  # k3 as a reward has another optimum
    kl_B = masked_sum(kl_BR, mask, axis=1)
    metrics: dict[str, Array] = {}

    if config.has_critic:
        score_coef = 1.0 if config.algorithm == "ppo" else 1.0 - kl_coef
        rewards = kl.token_rewards(scores, kl_BR, mask, kl_coef, score_coef)
        episode = masked_sum(rewards, mask) / len(scores)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        if config.algorithm == "ppo":
            advantage, returns = advantages.gae(rewards, values, mask, config.gamma, config.lam)
            if config.whiten_advantages:
                advantage = masked_whiten(advantage, mask)
        else:
            returns = advantages.returns_to_go(rewards, mask, config.gamma)
            advantage = jnp.where(mask, returns - values, 0.0)
        metrics["critic/explained_variance"] = advantages.explained_variance(values, returns, mask)
    else:
        if config.algorithm == "rloo":
            advantage_B = group.leave_one_out(scores - kl_coef * kl_B, config.group_size)
        else:
            advantage_B = group.group_normalised(scores, config.group_size, config.scale_rewards)
        advantage = group.to_tokens(advantage_B, mask)
        returns = jnp.zeros_like(values)
        episode = jnp.mean(scores - kl_coef * kl_B)
        metrics["objective/group_std"] = group.spread(scores, config.group_size)

    metrics |= {
        "objective/kl": jnp.mean(kl_B),
        "objective/kl_per_token": masked_mean(kl_BR, mask),
        "objective/kl_k3": jnp.mean(masked_sum(kl.kl_per_token(old_logprobs, ref_logprobs, "k3"), mask, axis=1)),
        "objective/entropy": jnp.mean(masked_sum(-old_logprobs, mask, axis=1)),
        "objective/rlhf_reward": episode,
        "objective/non_score_reward": -kl_coef * jnp.mean(kl_B),
    }
    return Experience(rollout, old_logprobs, ref_logprobs, values, advantage, returns), metrics
