"""What an update of RL descends: the losses of policy and value model, and their gradients. Letters: B episodes, R response tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.algorithms import kl, ppo, reinforce
from pe_rlhf_jax.algorithms.masked import masked_mean, select
from pe_rlhf_jax.config import RLConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import response_values
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.experience import critic_metrics, estimate, predict
from pe_rlhf_jax.training.step import Gradient, GradientOf, Statistics, TellingLoss, gradient_of
from pe_rlhf_jax.types import Estimates, Experience, PyTree

SAMPLER_KL = "val/sampler_kl"
"""KL per token (k3) of the policy that is about to learn from the log-probabilities that it sampled with: nothing but rounding."""

Told = tuple[Array, tuple[Statistics, Float[Array, "B R"] | None]]

Trained = dict[str, Role]
"""What is trained of "policy" and, where the algorithm has a critic, "value"."""


class Frozen(NamedTuple):
    """What the learning step reads and never changes."""

    backbone: PyTree
    roles: dict[str, Role]
    """By the names of what is trained: the parts that are not."""
    kl_coef: Float[Array, ""]


def whole_roles(frozen: dict[str, Role], trained: Trained) -> dict[str, Role]:
    """The whole roles of which a part is trained."""
    return {name: role.join(frozen[name]) for name, role in trained.items()}


def asked_before(config: RLConfig, roles: dict[str, Role]) -> Role | None:
    """The value model, where it says its values in a pass before it learns."""
    return None if config.values_while_learning else roles.get("value")


def group_to_learn(config: RLConfig) -> int:
    """How many neighbouring rows of an update answer one prompt: mini-batches are of shuffled rows, and micro-batches may cut a group."""
    if config.mini_batches > 1:
        return 1
    return math.gcd(config.answers_each, config.micro_batch_size or config.batch_size)


def gradient_of_update(context: Context) -> GradientOf:
    """Of the losses of all that is trained, over `rl.micro_batch_size` episodes at a time.

    A value model of its own learns before the policy: with micro-batches the activations of one of them exist at a time. Where a batch
    gets one update (`rl.values_while_learning`), advantages are made of what the value model says on the way: it makes no other pass.
    """
    config = context.config.rl
    of_policy = gradient_of(_policy_loss(context), config.micro_batch_size)
    of_value = gradient_of(_value_loss(context), config.micro_batch_size)

    def at_once(trained: Trained, frozen: Frozen, experience: Experience, total: Array, key: jax.Array) -> Gradient:
        found = of_policy(trained, frozen, experience, total, key)
        if not config.values_while_learning:
            return found
        more = critic_metrics(_estimates(config, experience, found.told), experience.rollout.response_mask)
        return found._replace(statistics=found.statistics | more)

    def in_turn(trained: Trained, frozen: Frozen, experience: Experience, total: Array, key: jax.Array) -> Gradient:
        value = of_value({"value": trained["value"]}, frozen, experience, total, key)
        statistics = value.statistics
        if config.values_while_learning:
            estimates = _estimates(config, experience, value.told)
            statistics |= critic_metrics(estimates, experience.rollout.response_mask)
            experience = experience.replace(rewards=None, estimates=estimates)
        policy = of_policy({"policy": trained["policy"]}, frozen, experience, total, key)
        return Gradient(value.loss + policy.loss, statistics | policy.statistics, value.gradients | policy.gradients)

    return in_turn if config.has_critic and config.value_model == "adapter" else at_once


def _value_loss(context: Context) -> TellingLoss:
    """Of a value model of its own."""
    config, decoder = context.config.rl, context.decoder

    def loss(trained: Trained, frozen: Frozen, rows: Experience, total: Array, key: jax.Array) -> Told:
        values = response_values(decoder, frozen.backbone, whole_roles(frozen.roles, trained)["value"], rows.rollout)
        found, statistics = _of_values(config, values, _estimates(config, rows, values), rows.rollout.response_mask, total)
        return found, (statistics, _told(config, values))

    return loss


def _policy_loss(context: Context) -> TellingLoss:
    """Of the policy; and of the value model, if it is a head on it."""
    config, decoder, chunk = context.config.rl, context.decoder, context.config.model.logprob_chunk
    group = group_to_learn(config)

    def loss(trained: Trained, frozen: Frozen, rows: Experience, total: Array, key: jax.Array) -> Told:
        mask, rollout = rows.rollout.response_mask, rows.rollout
        roles = whole_roles(frozen.roles, trained)
        head = roles.get("value")
        logprobs, entropy, values = predict(decoder, config, chunk, frozen.backbone, roles["policy"], head, rollout, group)
        estimates = _estimates(config, rows, values)
        off = jnp.where(mask, logprobs - rollout.logprobs, 0.0)
        statistics: Statistics = {
            "policy/entropy_avg": masked_mean(entropy, mask, total),
            SAMPLER_KL: masked_mean(jnp.expm1(off) - off, mask, total),
        }
        if config.algorithm == "reinforce":
            policy_loss = reinforce.policy_loss(logprobs, estimates.returns, estimates.values, mask, total)
        else:
            policy_loss, more = ppo.policy_loss(logprobs, rows.old_logprobs, estimates.advantages, mask, config.cliprange, total)
            statistics |= more
        whole = policy_loss
        if config.algorithm == "grpo":
            # What stands behind a response's end may be far apart, and the exponential of it infinite.
            penalty = masked_mean(kl.kl_per_token(select(logprobs, mask), select(rows.ref_logprobs, mask), "k3"), mask, total)
            statistics["loss/kl_avg"] = penalty
            whole += frozen.kl_coef * penalty
        if head is not None:
            value_loss, more = _of_values(config, values, estimates, mask, total)
            statistics |= more
            whole += value_loss
        return whole, (statistics | {"loss/policy_avg": policy_loss}, None if head is None else _told(config, values))

    return loss


def _told(config: RLConfig, values: Float[Array, "B R"]) -> Float[Array, "B R"] | None:
    """The values, where nobody knows them yet."""
    return jax.lax.stop_gradient(values) if config.values_while_learning else None


def _estimates(config: RLConfig, rows: Experience, values: Float[Array, "B R"]) -> Estimates:
    """Those that the rows have, or else those that go with what the value model is saying now."""
    if rows.estimates is not None:
        return rows.estimates
    assert rows.rewards is not None  # one of the two is there
    return estimate(config, rows.rewards, jax.lax.stop_gradient(values), rows.rollout.response_mask)


def _of_values(
    config: RLConfig, values: Float[Array, "B R"], estimates: Estimates, mask: Bool[Array, "B R"], total: Array
) -> tuple[Array, Statistics]:
    """The value model's share of the loss, and its statistics."""
    if config.algorithm == "ppo":
        loss, statistics = ppo.value_loss(values, estimates.values, estimates.returns, mask, config.cliprange_value, total)
    else:
        loss, statistics = reinforce.value_loss(values, estimates.returns, mask, total), {}
    weighs = config.algorithm == "ppo" or config.value_model == "trunk"
    return (config.vf_coef * loss if weighs else loss), statistics | {"loss/value_avg": loss}
