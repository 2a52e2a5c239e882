"""Reinforcement learning from rewards: PPO, the paper's REINFORCE with a learned value baseline, RLOO or GRPO.

Policy, reference, reward and value are roles on one backbone. Differences from the textbooks: old, new and reference
log-probabilities are all taken at the sampling temperature; the KL penalty is part of the rewards (GRPO: of the loss); the value
model is its own adapter, or a head on the policy; losses are means over the tokens of the whole update, so that micro-batches and
devices change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pe_rlhf_jax import hosts
from pe_rlhf_jax.algorithms import kl
from pe_rlhf_jax.config import ConfigError, RLConfig
from pe_rlhf_jax.data import BatchOrder, pad_prompts
from pe_rlhf_jax.models.heads import zero_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.sharding import BATCH, constrain
from pe_rlhf_jax.training.context import Context, peak_memory_gib
from pe_rlhf_jax.training.experience import make_experience
from pe_rlhf_jax.training.loop import Metrics
from pe_rlhf_jax.training.optimizer import learning_rate, make_optimizer
from pe_rlhf_jax.training.rewards import Rewards, RewardStatistics, Scores, for_learning, not_finite
from pe_rlhf_jax.training.rl_loss import SAMPLER_KL, Frozen, asked_before, gradient_of_update, whole_roles
from pe_rlhf_jax.training.rollouts import respond, response_tokens
from pe_rlhf_jax.training.statistics import distinct_n
from pe_rlhf_jax.training.step import Step, applied, new_state, skip, step_of, stop_if_not_finite
from pe_rlhf_jax.types import Experience, Rollout, TrainState

STAGE = "rl"


class RLState(flax.struct.PyTreeNode):
    """Training state of policy and value, of the KL controller, and of the scores' scale."""

    train: TrainState
    """`trainable` is {"policy": Role} and, where the algorithm has a critic, "value": Role; `step` counts rollout batches."""
    kl_coef: Float[Array, ""]
    statistics: RewardStatistics

    @property
    def step(self) -> Array:
        return self.train.step


def init(context: Context, reference: Role, reward: Role | None) -> RLState:
    """Policy from the reference; value from the reward model, or from the backbone with a head that says 0.

    Raises ConfigError if the value model is to start from a reward model that the run does not have.
    """
    config = context.config.rl
    starts = {"policy": reference}
    if config.has_critic:
        starts["value"] = _value_start(context, reward)
    trainable = {}
    for name, role in starts.items():
        if name == "value" and config.value_model == "trunk":
            trainable[name] = Role(head=jax.tree.map(jnp.copy, role.head))
        else:
            tuning = config.tuning_of(name)
            trainable[name] = context.start(role, tuning, f"{STAGE}/{name}").trained(tuning)
    state = new_state(trainable, _optimizer(config))
    return RLState(state, jnp.asarray(config.kl_coef, jnp.float32), RewardStatistics.new())


def run(context: Context, reference: Role, reward: Role | None, rewards: Rewards, state: RLState) -> Iterator[tuple[RLState, Metrics]]:
    """Yields the state and its metrics after each rollout batch is learned, from where `state` stands.

    A batch with a score that is not a finite number teaches nothing, counts as one skipped update, and has no figures of learning. `lr` is
    that of the batch's first update; skipped ones do not count for it.

    Raises:
        NonFiniteError: too many updates in a row were skipped; the batch of the last of them is yielded before.
    """
    config, prompts = context.config.rl, context.split("prompts").train
    repeats = config.answers_each
    learn = step_of(gradient_of_update(context), _tokens, _optimizer(config))
    rate = learning_rate(config.optimizer, _updates(config))
    order, key = BatchOrder(len(prompts), config.batch_size // repeats, context.config.run.seed), context.key(STAGE)
    frozen_roles, limit = _frozen(context, reference, reward), context.config.run.max_nonfinite
    stop_if_not_finite(state.train, limit, STAGE, "a reward, its loss or its gradient is not a finite number (metrics.jsonl tells which)")
    for index in range(int(state.step), config.steps):
        rollout_key, learn_key = jax.random.split(jax.random.fold_in(key, index))
        examples = [prompts[i] for i in order(index) for _ in range(repeats)]
        began = time.perf_counter()
        batch = context.rows(pad_prompts(examples, context.pad_token, context.config.data.length_multiple), examples)
        roles = whole_roles(frozen_roles, state.train.trainable)
        rollout = respond(context, roles["policy"], batch, rollout_key, answers=repeats)
        rolled = time.perf_counter()
        scores = rewards(rollout, examples, repeats, config.micro_batch_size)
        used, statistics = for_learning(config, jnp.asarray(scores.total), state.statistics)
        chunk, backbone = context.config.model.logprob_chunk, context.backbone
        policy, value = roles["policy"], asked_before(config, roles)
        experience, metrics = make_experience(
            context.decoder, config, chunk, backbone, policy, reference, value, rollout, context.rows(used), state.kl_coef
        )
        seen = _of_responses(rollout, context.end_tokens) | _of_scores(scores)  # while the devices compute
        bad, cause = not_finite(config, scores)
        values = {name: float(x) for name, x in jax.device_get(metrics).items()} | seen | {"val/nonfinite_scores": bad}
        scored, values["lr"] = time.perf_counter(), float(rate(applied(state.train)))
        if learns := bool(np.all(np.isfinite(scores.total))):
            train, learned = _learn(config, learn, state.train, Frozen(backbone, frozen_roles, state.kl_coef), experience, learn_key)
        else:
            train = skip(state.train)
            learned = {"skipped": float(train.skipped)}
        values |= learned
        now = time.perf_counter()

        values |= {"objective/kl_coef": float(state.kl_coef), "episode": (index + 1) * config.batch_size}
        values |= {"time/rollout": rolled - began, "time/score": scored - rolled, "time/learn": now - scored}
        values["perf/tokens_per_s"] = values["objective/length"] * config.batch_size / (now - began)
        values["perf/peak_memory_gib"] = hosts.largest(peak_memory_gib())
        state = RLState(train.replace(step=train.step + 1), _next_kl_coef(config, state.kl_coef, values["objective/kl"]), statistics)
        yield state, values
        stop_if_not_finite(state.train, limit, STAGE, None if learns else cause)  # now that the row is written


def finish(state: RLState, config: RLConfig) -> tuple[dict[str, Role], dict[str, Any]]:
    """The trained parts of policy and value, and the stage's figures."""
    episodes = int(state.step) * config.batch_size
    return state.train.trainable, {"episodes": episodes, "kl_coef": float(state.kl_coef), "skipped_updates": int(state.train.skipped)}


def whole(context: Context, reference: Role, reward: Role | None, trained: dict[str, Role]) -> dict[str, Role]:
    """Policy and, where there is one, value, whose trained parts are given."""
    return whole_roles(_frozen(context, reference, reward), trained)


def _value_start(context: Context, reward: Role | None) -> Role:
    config = context.config.rl
    if not config.value_from_reward:
        return Role(head=zero_head(context.decoder.config.hidden_size))
    if reward is None:
        raise ConfigError("rl.value_init reward starts the value model from this run's reward model, and there is none; set it to zero")
    return reward


def _frozen(context: Context, reference: Role, reward: Role | None) -> dict[str, Role]:
    config = context.config.rl
    frozen = {"policy": reference.frozen(config.tuning)}
    if config.has_critic:
        start = reward if config.value_from_reward and config.value_model == "adapter" else None
        frozen["value"] = Role() if start is None else start.frozen(config.tuning_of("value"))
    return frozen


def _learn(
    config: RLConfig, step: Step, state: TrainState, frozen: Frozen, experience: Experience, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """Epochs of mini-batches in fresh orders, or REINFORCE's one update. Metrics are means over the updates that were not skipped, if there
    are any; how far the policy is from the one that sampled is that of the first update, before it moves."""
    collected: list[dict[str, Array]] = []
    epoch_keys, count = [jax.random.fold_in(key, epoch) for epoch in range(config.epochs)], config.mini_batches
    # All orders before the first update: each is fetched, which waits for whatever the devices are to do before.
    orders = jax.device_get([jax.random.permutation(epoch_key, config.batch_size) for epoch_key in epoch_keys if count > 1])
    parts = [np.split(order, count) for order in orders]
    for epoch, epoch_key in enumerate(epoch_keys):
        for number in range(count):
            mini_batch = _take(experience, parts[epoch][number]) if count > 1 else experience
            state, metrics = step(state, frozen, mini_batch, jax.random.fold_in(epoch_key, number))
            collected.append(metrics)
    host = jax.device_get(collected)
    good = [metrics for metrics in host if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])] or host
    means = {name: float(np.mean([metrics[name] for metrics in good])) for name in host[0] if name not in ("loss", "skipped")}
    return state, means | {SAMPLER_KL: float(host[0][SAMPLER_KL]), "skipped": float(host[-1]["skipped"])}


@jax.jit
def _take(experience: Experience, rows: Array) -> Experience:
    return jax.tree.map(lambda x: constrain(x[rows], BATCH, *(None for _ in x.shape[1:])), experience)


def _of_responses(rollout: Rollout, end_tokens: Sequence[int]) -> Metrics:
    """Length, endings and variety of a rollout's responses; one that a stop string cut has ended, without an end token."""
    responses, ended = response_tokens(rollout), hosts.fetch(rollout.ended)
    return {
        "objective/length": float(np.mean([len(response) for response in responses])),
        "objective/ended": float(np.mean(ended)),
        "objective/distinct_2": distinct_n(responses, 2),
        "val/num_eos_tokens": float(sum(response[-1] in end_tokens for response in responses)),
    }


def _of_scores(scores: Scores) -> Metrics:
    """Mean and spread of the scores before they are scaled, and of each reward."""
    with np.errstate(invalid="ignore"):
        values = {"objective/scores": float(np.mean(scores.total)), "objective/scores_std": float(np.std(scores.total))}
        return values | {f"rewards/{name}": float(np.mean(term)) for name, term in scores.terms.items()}


def _next_kl_coef(config: RLConfig, kl_coef: Array, observed_kl: float) -> Array:
    if config.kl_target is None:
        return kl_coef
    return kl.adaptive_kl_coef(kl_coef, jnp.float32(observed_kl), config.kl_target, config.kl_horizon, config.batch_size)


def _optimizer(config: RLConfig) -> optax.GradientTransformation:
    """Separate update rules for policy and value, each clipped by its own norm."""
    rates = {"policy": config.optimizer.learning_rate}
    if config.has_critic:
        rates["value"] = config.value_learning_rate or config.optimizer.learning_rate
    rules = {
        name: make_optimizer(config.optimizer.model_copy(update={"learning_rate": rate}), _updates(config), config.tuning_of(name))
        for name, rate in rates.items()
    }
    return optax.partition(rules, lambda tree: {name: jax.tree.map(lambda _, name=name: name, role) for name, role in tree.items()})


def _updates(config: RLConfig) -> int:
    return config.steps * config.updates_a_batch


def _tokens(experience: Experience) -> Float[Array, ""]:
    return jnp.sum(experience.rollout.response_mask, dtype=jnp.float32)
