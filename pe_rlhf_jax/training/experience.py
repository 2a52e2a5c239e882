"""From a scored rollout to what learning needs: log-probabilities, and rewards or what is made of them and of values.

Letters: B episodes, R response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms import advantages, group, kl
from pe_rlhf_jax.algorithms.masked import masked_mean, masked_sum, masked_whiten, select
from pe_rlhf_jax.config import RLConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.heads import apply_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import response_hidden, response_logprobs, response_values, token_logprobs
from pe_rlhf_jax.sharding import row_groups
from pe_rlhf_jax.training.micro_batches import in_micro_batches
from pe_rlhf_jax.training.shared_rows import answers_in_a_row
from pe_rlhf_jax.types import Estimates, Experience, PyTree, Rollout


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
    """Log-probabilities, rewards and estimates of a rollout, and its metrics.

    PPO and REINFORCE pay the KL penalty token by token. RLOO pays it once for the whole response, before the group's baseline is
    taken off; GRPO has it in its loss instead. Forward passes are over `rl.micro_batch_size` episodes at a time, all the rest is over the
    whole batch. Where `rl.values_while_learning`, no value model is asked, and estimates are left to learning.
    """
    mask = rollout.response_mask

    def forward(part: Rollout) -> tuple[Float[Array, "B R"], Float[Array, "B R"], Float[Array, "B R"]]:
        answers = answers_in_a_row(decoder.config, part, config.answers_each, row_groups())
        ref_logprobs, _ = response_logprobs(decoder, backbone, reference, part, config.sampling.temperature, chunk, answers)
        said = predict(decoder, config, chunk, backbone, policy, value, part, config.answers_each)
        sampled = config.keeps_sampled_logprobs(jnp.dtype(decoder.dtype).name)  # then the policy's pass is for nothing, and not compiled
        return part.logprobs if sampled else said.logprobs, said.values, ref_logprobs

    old_logprobs, values, ref_logprobs = in_micro_batches(forward, rollout, config.micro_batch_size)
    kl_BR = kl.kl_per_token(old_logprobs, ref_logprobs, "k1")  # k3 as a reward has another optimum
    kl_B = masked_sum(kl_BR, mask, axis=1)
    estimates, metrics = None, dict[str, Array]()

    if config.has_critic:
        score_coef = 1.0 if config.algorithm == "ppo" else 1.0 - kl_coef
        rewards = kl.token_rewards(scores, kl_BR, mask, kl_coef, score_coef)
        episode = masked_sum(rewards, mask) / len(scores)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        if not config.values_while_learning:
            estimates = estimate(config, rewards, values, mask)
            metrics = critic_metrics(estimates, mask)
    else:
        if config.algorithm == "rloo":
            advantage_B = group.leave_one_out(scores - kl_coef * kl_B, config.group_size)
        else:
            advantage_B = group.group_normalised(scores, config.group_size, config.scale_rewards)
        nothing = jnp.zeros_like(kl_BR)
        estimates = Estimates(values=nothing, advantages=group.to_tokens(advantage_B, mask), returns=nothing)
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
    return Experience(rollout, old_logprobs, ref_logprobs, rewards if estimates is None else None, estimates), metrics


def estimate(config: RLConfig, rewards: Float[Array, "B R"], values: Float[Array, "B R"], mask: Bool[Array, "B R"]) -> Estimates:
    """Advantages and returns of token rewards where the value model says these values.

    Of a part of a batch, whitened advantages are not the batch's; all the rest is.
    """
    values = select(values, mask)
    if config.algorithm == "ppo":
        advantage, returns = advantages.gae(rewards, values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantage = masked_whiten(advantage, mask)
    else:
        returns = advantages.returns_to_go(rewards, mask, config.gamma)
        advantage = returns - values
    return Estimates(values, advantage, returns)


def critic_metrics(estimates: Estimates, mask: Bool[Array, "B R"]) -> dict[str, Array]:
    """How much of the returns of a whole batch the values explain."""
    return {"critic/explained_variance": advantages.explained_variance(estimates.values, estimates.returns, mask)}
