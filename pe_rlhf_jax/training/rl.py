"""Reinforcement learning from a reward model: PPO, or the paper's REINFORCE with a learned value baseline.

Policy, reference, reward and value are roles on one backbone. Differences from textbook PPO: the KL penalty is part of the token
rewards; old, new and reference log-probabilities are all taken at the sampling temperature; the value model is its own adapter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pe_rlhf_jax.algorithms import advantages, kl, ppo, reinforce
from pe_rlhf_jax.algorithms.masked import masked_mean, masked_sum, masked_whiten
from pe_rlhf_jax.config import RLConfig
from pe_rlhf_jax.data import BatchOrder, pad_prompts
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.heads import zero_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.rollout.score import response_logprobs, response_values, sequence, sequence_score
from pe_rlhf_jax.training.context import Context, peak_memory_gib
from pe_rlhf_jax.training.loop import Metrics
from pe_rlhf_jax.training.optimizer import learning_rate, make_optimizer
from pe_rlhf_jax.training.statistics import distinct_n
from pe_rlhf_jax.training.step import Step, make_step, new_state, stop_if_not_finite
from pe_rlhf_jax.types import Experience, PromptBatch, PyTree, Rollout, TrainState

STAGE = "rl"


class RLState(flax.struct.PyTreeNode):
    """Training state of policy and value, and of the KL controller."""

    train: TrainState
    """`trainable` is {"policy": Role, "value": Role}; `step` counts rollout batches."""
    kl_coef: Float[Array, ""]

    @property
    def step(self) -> Array:
        return self.train.step


class Frozen(NamedTuple):
    """What the learning step reads and never changes."""

    backbone: PyTree
    policy: Role
    value: Role


def init(context: Context, reference: Role, reward: Role) -> RLState:
    """Policy from the reference; value from the reward model, or from the backbone with a head that says 0."""
    tuning = context.config.rl.tuning
    value = reward if context.config.rl.value_init == "reward" else Role(head=zero_head(context.decoder.config.hidden_size))
    starts = {"policy": reference, "value": value}
    trainable = {name: context.start(role, tuning, f"{STAGE}/{name}").trained(tuning) for name, role in starts.items()}
    state = new_state(trainable, _optimizer(context.config.rl))
    return RLState(state, jnp.asarray(context.config.rl.kl_coef, jnp.float32))


def run(context: Context, reference: Role, reward: Role, state: RLState) -> Iterator[tuple[RLState, Metrics]]:
    """Yields the state and its metrics after each rollout batch is learned, from where `state` stands."""
    config, prompts = context.config.rl, context.split("prompts").train
    frozen = _frozen(context, reference, reward)
    rows = config.batch_size // _mini_batches(config)
    learn = make_step(_loss(context), _tokens, _optimizer(config), rows, config.micro_batch_size)
    rate = learning_rate(config.optimizer, _updates(config))
    order, key = BatchOrder(len(prompts), config.batch_size, context.config.run.seed), context.key(STAGE)
    for index in range(int(state.step), config.steps):
        rollout_key, learn_key = jax.random.split(jax.random.fold_in(key, index))
        examples = [prompts[i] for i in order(index)]
        batch = context.rows(pad_prompts(examples, context.pad_token, context.config.data.length_multiple))

        began = time.perf_counter()
        roles = whole(context, reference, reward, state.train.trainable)
        rollout = jax.block_until_ready(respond(context, roles["policy"], batch, rollout_key))
        rolled = time.perf_counter()
        policy, value, chunk = roles["policy"], roles["value"], context.config.model.logprob_chunk
        experience, metrics = _experience(context.decoder, config, chunk, frozen, policy, reference, reward, value, rollout, state.kl_coef)
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        values |= _of_responses(rollout)
        scored = time.perf_counter()
        train, learned = _learn(config, learn, state.train, frozen, experience, learn_key)
        values |= learned
        now = time.perf_counter()

        values |= {"objective/kl_coef": float(state.kl_coef), "episode": (index + 1) * config.batch_size}
        values["lr"] = float(rate(index * _updates_per_batch(config)))
        values |= {"time/rollout": rolled - began, "time/score": scored - rolled, "time/learn": now - scored}
        values["perf/tokens_per_s"] = values["objective/length"] * config.batch_size / (now - began)
        values["perf/peak_memory_gib"] = peak_memory_gib()
        state = RLState(train.replace(step=train.step + 1), _next_kl_coef(config, state.kl_coef, values["objective/kl"]))
        stop_if_not_finite(state.train, context.config.run.max_nonfinite, STAGE)
        yield state, values


def finish(state: RLState, config: RLConfig) -> tuple[dict[str, Role], dict[str, Any]]:
    """The trained parts of policy and value, and the stage's figures."""
    episodes = int(state.step) * config.batch_size
    return state.train.trainable, {"episodes": episodes, "kl_coef": float(state.kl_coef), "skipped_updates": int(state.train.skipped)}


def whole(context: Context, reference: Role, reward: Role, trained: dict[str, Role]) -> dict[str, Role]:
    """Policy and value whose trained parts are given."""
    frozen = _frozen(context, reference, reward)
    return {"policy": trained["policy"].join(frozen.policy), "value": trained["value"].join(frozen.value)}


def respond(context: Context, policy: Role, prompts: PromptBatch, key: jax.Array) -> Rollout:
    """Samples a response to each prompt as `rl.sampling` says."""
    return _respond(
        context.decoder,
        context.config.rl,
        context.end_tokens,
        context.pad_token,
        policy,
        context.backbone,
        prompts,
        key,
    )


@jax.jit(static_argnums=(0, 1, 2, 3))
def _respond(
    decoder: Decoder,
    config: RLConfig,
    end_tokens: tuple[int, ...],
    pad_token: int,
    policy: Role,
    backbone: PyTree,
    prompts: PromptBatch,
    key: jax.Array,
) -> Rollout:
    return generate(decoder, policy.variables(backbone), prompts, key, config.sampling, end_tokens, pad_token)


@jax.jit(static_argnums=(0, 1))
def rollout_scores(decoder: Decoder, config: RLConfig, reward: Role, backbone: PyTree, rollout: Rollout) -> Float[Array, " B"]:
    """The reward model's score at the last real token; `missing_eos_penalty` where a response has no end token."""
    scores = sequence_score(decoder, backbone, reward, *sequence(rollout))
    return scores if config.missing_eos_penalty is None else jnp.where(rollout.ended, scores, config.missing_eos_penalty)


@jax.jit(static_argnums=(0, 1, 2))
def _experience(
    decoder: Decoder,
    config: RLConfig,
    chunk: int,
    frozen: Frozen,
    policy: Role,
    reference: Role,
    reward: Role,
    value: Role,
    rollout: Rollout,
    kl_coef: Float[Array, ""],
) -> tuple[Experience, dict[str, Array]]:
    """Scores a rollout with all four roles, and shapes rewards, advantages and returns."""
    mask, backbone, temperature = rollout.response_mask, frozen.backbone, config.sampling.temperature
    old_logprobs, entropy = response_logprobs(decoder, backbone, policy, rollout, temperature, chunk)
    ref_logprobs, _ = response_logprobs(decoder, backbone, reference, rollout, temperature, chunk)
    values = jnp.where(mask, response_values(decoder, backbone, value, rollout), 0.0)
    scores = rollout_scores(decoder, config, reward, backbone, rollout)

    kl_BR = kl.kl_per_token(old_logprobs, ref_logprobs, "k1")  # k3 as a reward has another optimum
    score_coef = 1.0 if config.algorithm == "ppo" else 1.0 - kl_coef
    rewards = kl.token_rewards(scores, kl_BR, mask, kl_coef, score_coef)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    if config.algorithm == "ppo":
        advantage, returns = advantages.gae(rewards, values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantage = masked_whiten(advantage, mask)
    else:
        returns = advantages.returns_to_go(rewards, mask, config.gamma)
        advantage = jnp.where(mask, returns - values, 0.0)

    per_sequence = jnp.sum(jnp.where(mask, kl_BR, 0.0), axis=1)
    sampler = jnp.where(mask, old_logprobs - rollout.logprobs, 0.0)
    episode = masked_sum(rewards, mask) / len(scores)
    metrics = {
        "objective/kl": jnp.mean(per_sequence),
        "objective/kl_per_token": masked_mean(kl_BR, mask),
        "objective/entropy": jnp.mean(jnp.sum(jnp.where(mask, -old_logprobs, 0.0), axis=1)),
        "objective/scores": jnp.mean(scores),
        "objective/scores_std": jnp.std(scores),
        "objective/rlhf_reward": episode,
        "objective/non_score_reward": -kl_coef * jnp.mean(per_sequence),
        "policy/entropy_avg": masked_mean(entropy, mask),
        "val/sampler_kl": masked_mean(jnp.expm1(sampler) - sampler, mask),
        "critic/explained_variance": advantages.explained_variance(values, returns, mask),
    }
    return Experience(rollout, old_logprobs, values, advantage, returns), metrics


def _loss(context: Context):
    config, decoder, chunk = context.config.rl, context.decoder, context.config.model.logprob_chunk

    def loss(trainable: dict[str, Role], frozen: Frozen, rows: Experience, total: Array, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        mask = rows.rollout.response_mask
        policy, value = trainable["policy"].join(frozen.policy), trainable["value"].join(frozen.value)
        logprobs, _ = response_logprobs(decoder, frozen.backbone, policy, rows.rollout, config.sampling.temperature, chunk)
        values = response_values(decoder, frozen.backbone, value, rows.rollout)
        if config.algorithm == "ppo":
            policy_loss, statistics = ppo.policy_loss(logprobs, rows.old_logprobs, rows.advantages, mask, config.cliprange, total)
            value_loss, more = ppo.value_loss(values, rows.values, rows.returns, mask, config.cliprange_value, total)
            statistics |= more
            coefficient = config.vf_coef
        else:
            policy_loss = reinforce.policy_loss(logprobs, rows.returns, rows.values, mask, total)
            value_loss = reinforce.value_loss(values, rows.returns, mask, total)
            statistics, coefficient = {}, 1.0
        statistics |= {"loss/policy_avg": policy_loss, "loss/value_avg": value_loss}
        return policy_loss + coefficient * value_loss, statistics

    return loss


def _learn(
    config: RLConfig, step: Step, state: TrainState, frozen: Frozen, experience: Experience, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """Epochs of mini-batches in fresh orders (PPO), or the one update (REINFORCE); metrics are means over the updates."""
    collected: list[dict[str, Array]] = []
    for epoch in range(config.num_ppo_epochs if config.algorithm == "ppo" else 1):
        epoch_key = jax.random.fold_in(key, epoch)
        order = np.asarray(jax.random.permutation(epoch_key, config.batch_size))
        for number, rows in enumerate(np.split(order, _mini_batches(config))):
            mini_batch = _take(experience, rows) if _mini_batches(config) > 1 else experience
            state, metrics = step(state, frozen, mini_batch, jax.random.fold_in(epoch_key, number))
            collected.append(metrics)
    host = jax.device_get(collected)
    means = {name: float(np.mean([metrics[name] for metrics in host])) for name in host[0] if name not in ("loss", "skipped")}
    return state, means | {"skipped": float(host[-1]["skipped"])}


@jax.jit
def _take(experience: Experience, rows: Array) -> Experience:
    return jax.tree.map(lambda x: x[rows], experience)


def response_tokens(rollout: Rollout) -> list[list[int]]:
    """The responses' real tokens, end token included."""
    tokens, mask = jax.device_get((rollout.response, rollout.response_mask))
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


def _of_responses(rollout: Rollout) -> Metrics:
    """Length, endings and variety of a rollout's responses."""
    responses, ended = response_tokens(rollout), np.asarray(rollout.ended)
    return {
        "objective/length": float(np.mean([len(response) for response in responses])),
        "objective/ended": float(np.mean(ended)),
        "objective/distinct_2": distinct_n(responses, 2),
        "val/num_eos_tokens": float(np.sum(ended)),
    }


def _next_kl_coef(config: RLConfig, kl_coef: Array, observed_kl: float) -> Array:
    if config.kl_target is None:
        return kl_coef
    return kl.adaptive_kl_coef(kl_coef, jnp.float32(observed_kl), config.kl_target, config.kl_horizon, config.batch_size)


def _frozen(context: Context, reference: Role, reward: Role) -> Frozen:
    config = context.config.rl
    value = reward if config.value_init == "reward" else Role()
    return Frozen(context.backbone, reference.frozen(config.tuning), value.frozen(config.tuning))


def _optimizer(config: RLConfig) -> optax.GradientTransformation:
    """Separate update rules for policy and value, each clipped by its own norm."""
    rates = {
        "policy": config.optimizer.learning_rate,
        "value": config.value_learning_rate or config.optimizer.learning_rate,
    }
    rules = {
        name: make_optimizer(config.optimizer.model_copy(update={"learning_rate": rate}), _updates(config), config.tuning)
        for name, rate in rates.items()
    }
    return optax.partition(rules, lambda tree: {name: jax.tree.map(lambda _, name=name: name, role) for name, role in tree.items()})


def _mini_batches(config: RLConfig) -> int:
    return config.num_mini_batches if config.algorithm == "ppo" else 1


def _updates_per_batch(config: RLConfig) -> int:
    return config.num_ppo_epochs * config.num_mini_batches if config.algorithm == "ppo" else 1


def _updates(config: RLConfig) -> int:
    return config.steps * _updates_per_batch(config)


def _tokens(experience: Experience) -> Float[Array, ""]:
    return jnp.sum(experience.rollout.response_mask, dtype=jnp.float32)
