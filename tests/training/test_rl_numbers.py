"""The numbers of RL, against a computation by hand: four roles that all differ, a temperature, a penalty, every switch."""

from __future__ import annotations

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.config import OptimizerConfig, RLConfig
from pe_rlhf_jax.data import pad_prompts
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import rl
from pe_rlhf_jax.training.experience import critic_metrics, estimate, make_experience
from pe_rlhf_jax.training.rewards import RewardModel, Rewards
from pe_rlhf_jax.training.rl_loss import Frozen, gradient_of_update
from pe_rlhf_jax.training.rollouts import respond

pytestmark = pytest.mark.usefixtures("quick_compile")

KL, TEMPERATURE, PENALTY, LAM, GAMMA = 0.3, 0.7, -2.5, 0.9, 0.95


@pytest.fixture
def roles(tiny):
    """Policy, reference, reward and value, far from each other and from the backbone."""

    def role(scale: float, head: int | None = None) -> Role:
        rng = np.random.default_rng(head)
        made = {"kernel": jnp.asarray(rng.normal(0, 0.3, (16, 1)), jnp.float32), "bias": jnp.asarray([0.35], jnp.float32)}
        return Role(lora=jax.tree.map(lambda x: x * scale, tiny.lora), head=None if head is None else made)

    return {"policy": role(0.3), "reference": role(0.1), "reward": role(-0.3, 1), "value": role(0.5, 2)}


def scored(context, roles):
    """A rollout of the policy and what `_experience` makes of it; some responses end, others do not."""
    context = dataclasses.replace(context, end_tokens=(1, 2, 3, 4))
    if context.config.rl.values_while_learning:
        roles = roles | {"value": None}
    prompts = context.data.prompts.train
    rollout = respond(context, roles["policy"], context.rows(pad_prompts(prompts, 0, 8)), jax.random.key(1))
    scores = judged_by(context, roles["reward"])(rollout, prompts)
    kept = (roles[name] for name in ("policy", "reference", "value"))
    experience, metrics = make_experience(
        context.decoder, context.config.rl, 16, context.backbone, *kept, rollout, jnp.asarray(scores.total), jnp.float32(KL)
    )
    metrics |= rl._of_scores(scores)
    assert 0 < np.sum(rollout.ended) < len(rollout.ended)
    return rollout, experience, metrics


def judged_by(context, model):
    return Rewards(context, {"run": RewardModel(context.decoder, context.backbone, model)})


def rows_of(rollout):
    """Prompt length and real tokens of each row."""
    for prompt, mask, response, real in zip(rollout.prompt, rollout.prompt_mask, rollout.response, rollout.response_mask, strict=True):
        prompt = np.asarray(prompt)[np.asarray(mask)]
        yield len(prompt), np.concatenate([prompt, np.asarray(response)[np.asarray(real)]])


def _numbers(estimates):
    return estimates.values, estimates.advantages, estimates.returns


def whitened(rows, shift):
    every = np.concatenate(rows)
    return [(row - every.mean()) / np.sqrt(every.var() + 1e-8) + (0 if shift else every.mean()) for row in rows]


def gae(rewards, values):
    advantages, after, next_value = [], 0.0, 0.0
    for reward, value in zip(rewards[::-1], values[::-1], strict=True):
        after = reward + GAMMA * next_value - value + GAMMA * LAM * after
        advantages, next_value = [after, *advantages], value
    return np.array(advantages)


@pytest.mark.parametrize(
    ("algorithm", "rewards_white", "advantages_white", "penalty"),
    [("ppo", False, True, PENALTY), ("ppo", True, False, None), ("reinforce", False, False, PENALTY)],
)
def test_experience_is_what_its_definition_says(make_context, roles, algorithm, rewards_white, advantages_white, penalty):
    section = {"algorithm": algorithm, "whiten_rewards": rewards_white, "whiten_advantages": advantages_white, "lam": LAM, "gamma": GAMMA}
    context = make_context(rl={**section, "missing_eos_penalty": penalty, "sampling": {"max_new_tokens": 8, "temperature": TEMPERATURE}})
    rollout, experience, metrics = scored(context, roles)
    share = 1.0 if algorithm == "ppo" else 1.0 - KL
    old, kl, rewards, values, scores = [], [], [], [], []
    for (length, tokens), ended in zip(rows_of(rollout), rollout.ended, strict=True):
        old.append(by_hand.logprobs(context, roles["policy"], tokens, TEMPERATURE)[length - 1 :])
        kl.append(old[-1] - by_hand.logprobs(context, roles["reference"], tokens, TEMPERATURE)[length - 1 :])
        values.append(by_hand.head(context, roles["value"], tokens)[length - 1 : -1])
        judged = by_hand.head(context, roles["reward"], tokens)[-1]
        scores.append(judged if ended or penalty is None else min(judged, penalty))
        rewards.append(-KL * kl[-1])
        rewards[-1][-1] += share * scores[-1]
    if rewards_white:
        rewards = whitened(rewards, shift=False)
    if algorithm == "ppo":
        advantages = [gae(r, v) for r, v in zip(rewards, values, strict=True)]
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        if advantages_white:
            advantages = whitened(advantages, shift=True)
    else:
        returns = [np.array([sum(GAMMA**i * r for i, r in enumerate(row[t:])) for t in range(len(row))]) for row in rewards]
        advantages = [r - v for r, v in zip(returns, values, strict=True)]

    mask = np.asarray(rollout.response_mask)
    if algorithm == "reinforce":
        np.testing.assert_allclose(np.asarray(experience.rewards)[mask], np.concatenate(rewards), **by_hand.TOLERANCE)
        assert experience.estimates is None  # the value model says them when it learns
        said = np.full(mask.shape, np.nan, np.float32)
        said[mask] = np.concatenate(values)
        experience = experience.replace(estimates=estimate(context.config.rl, experience.rewards, said, rollout.response_mask))
        metrics |= critic_metrics(experience.estimates, rollout.response_mask)
    found = (experience.old_logprobs, *_numbers(experience.estimates))
    for x, expected in zip(found, (old, values, advantages, returns), strict=True):
        np.testing.assert_allclose(np.asarray(x)[mask], np.concatenate(expected), **by_hand.TOLERANCE)
    expected = {
        "objective/kl": np.mean([row.sum() for row in kl]),
        "objective/kl_per_token": np.mean(np.concatenate(kl)),
        "objective/scores": np.mean(scores),
        "objective/scores_std": np.std(scores),
        "objective/rlhf_reward": np.mean([row.sum() for row in rewards]),
        "objective/non_score_reward": -KL * np.mean([row.sum() for row in kl]),
        "objective/entropy": np.mean([-row.sum() for row in old]),
        "critic/explained_variance": 1 - np.var(np.concatenate(returns) - np.concatenate(values)) / np.var(np.concatenate(returns)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, **by_hand.TOLERANCE, err_msg=name)


@pytest.mark.parametrize(("algorithm", "value_model"), [("ppo", "adapter"), ("reinforce", "adapter"), ("reinforce", "trunk")])
def test_the_loss_is_what_its_definition_says(make_context, roles, algorithm, value_model):
    """At roles that have moved since the rollout was scored, so that ratios and value changes are clipped here and there."""
    sampling = {"max_new_tokens": 8, "temperature": TEMPERATURE}
    context = make_context(rl={"algorithm": algorithm, "vf_coef": 0.7, "value_model": value_model, "sampling": sampling})
    rollout, experience, _ = scored(context, roles)
    moved = {name: roles[name].replace(lora=jax.tree.map(lambda x: x * 1.6, roles[name].lora)) for name in ("policy", "value")}
    frozen = Frozen(context.backbone, {"policy": Role(), "value": Role()}, jnp.float32(KL))
    loss = jax.jit(gradient_of_update(context))(moved, frozen, experience, rl._tokens(experience), jax.random.key(0)).loss

    terms, clipped = [], 0
    for row, (length, tokens) in enumerate(rows_of(rollout)):
        count = len(tokens) - length
        logprob = by_hand.logprobs(context, moved["policy"], tokens, TEMPERATURE)[length - 1 :]
        reads = moved["value"] if value_model == "adapter" else moved["policy"].replace(head=moved["value"].head)
        value = by_hand.head(context, reads, tokens)[length - 1 : -1]
        if algorithm == "ppo":
            kept = (experience.old_logprobs, *_numbers(experience.estimates))
            old, old_value, advantage, target = (np.asarray(x, np.float64)[row, :count] for x in kept)
            ratio, near = np.exp(logprob - old), np.clip(value, old_value - 0.2, old_value + 0.2)
            policy = np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2))
            terms.append(policy + 0.7 * 0.5 * np.maximum((value - target) ** 2, (near - target) ** 2))
            clipped += np.sum((ratio > 1.2) | (ratio < 0.8)) * np.sum(near != value)
        else:
            target = np.cumsum(np.asarray(experience.rewards, np.float64)[row, :count][::-1])[::-1]
            terms.append(-logprob * (target - value) + (0.7 if value_model == "trunk" else 1.0) * (target - value) ** 2)
    np.testing.assert_allclose(loss, np.mean(np.concatenate(terms)), rtol=1e-4)
    assert clipped or algorithm == "reinforce"


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize(
    ("algorithm", "value_model", "whitens"), [("ppo", "adapter", True), ("ppo", "trunk", False), ("reinforce", "adapter", False)]
)
def test_values_said_while_learning_are_those_of_a_pass_before(
    make_context, roles, monkeypatch, algorithm, value_model, whitens, micro_batch_size
):
    """Loss, statistics and gradients of a batch's only update; whitened advantages are so over all of it."""
    section = {"algorithm": algorithm, "value_model": value_model, "whiten_advantages": whitens, "num_ppo_epochs": 1}
    section |= {"lam": LAM, "gamma": GAMMA, "batch_size": 8}
    context = make_context(rl={**section, "micro_batch_size": micro_batch_size, "sampling": {"max_new_tokens": 8}})
    trained = {name: roles[name] for name in ("policy", "value")}
    if value_model == "trunk":
        trained["value"] = Role(head=roles["value"].head)
    frozen = Frozen(context.backbone, {"policy": Role(), "value": Role()}, jnp.float32(KL))

    def learned():
        _, experience, metrics = scored(context, roles)
        found = jax.jit(gradient_of_update(context))(trained, frozen, experience, rl._tokens(experience), jax.random.key(0))
        return experience, found.loss, metrics | found.statistics, found.gradients

    experience, *said = learned()
    assert experience.estimates is None
    with monkeypatch.context() as patch:
        patch.setattr(RLConfig, "values_while_learning", False)
        jax.clear_caches()
        experience, *before = learned()
    jax.clear_caches()
    assert experience.estimates is not None and said[1].keys() == before[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), said, before)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(said[2]["value"]))


def test_a_batch_that_is_learned_again_or_in_parts_has_values_before():
    """And a head on the policy in PPO."""
    one = {"batch_size": 8, "num_ppo_epochs": 1}
    assert RLConfig(**one, algorithm="ppo").values_while_learning
    assert RLConfig(batch_size=8, algorithm="reinforce", num_ppo_epochs=4, num_mini_batches=2).values_while_learning
    assert not RLConfig(batch_size=8, algorithm="ppo", num_ppo_epochs=2).values_while_learning
    assert not RLConfig(**one, algorithm="ppo", num_mini_batches=2).values_while_learning
    assert not RLConfig(**one, algorithm="ppo", value_model="trunk").values_while_learning
    assert RLConfig(**one, algorithm="ppo", value_model="trunk", whiten_advantages=False).values_while_learning
    assert not RLConfig(**one, algorithm="rloo").values_while_learning


def test_what_stands_behind_a_responses_end_never_reaches_the_gradient(make_context, roles):
    """Reference log-probabilities there so far from the policy's that the exponential of their difference is infinite."""
    context = make_context(rl={"algorithm": "grpo", "batch_size": 8, "group_size": 4, "sampling": {"max_new_tokens": 8}})
    _, experience, _ = scored(context, roles)
    mask = experience.rollout.response_mask & (np.arange(8) < 5)
    experience = experience.replace(rollout=experience.rollout.replace(response_mask=mask))
    frozen = Frozen(context.backbone, {"policy": Role()}, jnp.float32(KL))

    def gradient(ref):
        given = experience.replace(ref_logprobs=ref)
        return gradient_of_update(context)({"policy": roles["policy"]}, frozen, given, rl._tokens(given), jax.random.key(0)).gradients

    plain = gradient(experience.ref_logprobs)
    far = gradient(jnp.where(mask, experience.ref_logprobs, 100.0))
    jax.tree.map(np.testing.assert_array_equal, far, plain)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(plain))


def test_every_epoch_visits_every_episode_in_an_order_of_its_own(monkeypatch):
    config = RLConfig(batch_size=8, num_ppo_epochs=3, num_mini_batches=2)
    taken, keys = [], []
    monkeypatch.setattr(rl, "_take", lambda experience, rows: taken.append(rows.tolist()))

    def step(state, frozen, rows, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return state + 1, {"loss": 0.0, "grad_norm": 1.0, "skipped": 0.0, "x": float(state), rl.SAMPLER_KL: float(state + 1)}

    state, metrics = rl._learn(config, step, 0, None, None, jax.random.key(0))
    assert state == 6 and metrics == {"x": 2.5, "grad_norm": 1.0, "skipped": 0.0, rl.SAMPLER_KL: 1.0}  # means, and one of the first
    orders = [taken[i] + taken[i + 1] for i in (0, 2, 4)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3 and len(set(keys)) == 6


@pytest.mark.parametrize("bad", ["loss", "grad_norm"])
def test_metrics_are_of_the_updates_that_were_not_skipped(bad):
    config = RLConfig(batch_size=8, num_ppo_epochs=4)

    def step(state, frozen, rows, key):
        metrics = {"loss": 0.0, "grad_norm": 1.0, "x": float(state), "skipped": float(state > 1), rl.SAMPLER_KL: 0.0}
        return state + 1, metrics | ({bad: np.nan, "x": 0.0} if state == 1 else {})

    _, metrics = rl._learn(config, step, 0, None, None, jax.random.key(0))
    assert metrics == {"grad_norm": 1.0, "x": pytest.approx(5 / 3), "skipped": 1.0, rl.SAMPLER_KL: 0.0}
    _, metrics = rl._learn(config, lambda s, *_: step(1, *_), 0, None, None, jax.random.key(0))
    assert metrics["x"] == 0.0 and (bad == "loss" or np.isnan(metrics["grad_norm"]))  # all were


@pytest.mark.parametrize("count", [1, 2])
def test_no_update_waits_for_an_order(monkeypatch, count):
    """One mini-batch needs none, and several have theirs before the first update."""
    happened, permutation = [], jax.random.permutation
    monkeypatch.setattr(rl.jax.random, "permutation", lambda *given: happened.append("order") or permutation(*given))
    monkeypatch.setattr(rl, "_take", lambda experience, rows: None)

    def step(state, frozen, rows, key):
        happened.append("update")
        return state, {"loss": 0.0, "grad_norm": 1.0, "skipped": 0.0, rl.SAMPLER_KL: 0.0}

    rl._learn(RLConfig(batch_size=8, num_ppo_epochs=2, num_mini_batches=count), step, 0, None, None, jax.random.key(0))
    assert happened == (["order"] * 2 if count > 1 else []) + ["update"] * 2 * count


def test_every_batch_has_keys_of_its_own(make_context, roles, monkeypatch):
    context, keys = make_context(rl={"steps": 4}), []
    monkeypatch.setattr(rl, "respond", lambda c, policy, batch, key, **more: (keys.append(key), respond(c, policy, batch, key, **more))[1])

    def learn(config, step, state, frozen, experience, key):
        keys.append(key)
        return state, {}

    monkeypatch.setattr(rl, "_learn", learn)
    state = rl.init(context, roles["reference"], roles["reward"])
    rewards = judged_by(context, roles["reward"])
    assert len(list(rl.run(context, roles["reference"], roles["reward"], rewards, state))) == 4
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 8


@pytest.mark.parametrize(("algorithm", "updates"), [("ppo", 12), ("reinforce", 2)])
def test_the_learning_rate_reaches_0_with_the_last_update(algorithm, updates):
    """Of Adam, whose update under a constant gradient is the learning rate: 1 - i / updates of it here."""
    adam = OptimizerConfig(learning_rate=1.0, schedule="linear", eps=1e-12)
    config = RLConfig(algorithm=algorithm, steps=2, num_ppo_epochs=3, num_mini_batches=2, batch_size=4, optimizer=adam)
    optimizer = rl._optimizer(config)
    tree = {name: Role(lora={"a": jnp.zeros(())}) for name in ("policy", "value")}
    state, sizes = optimizer.init(tree), []
    for _ in range(updates):
        update, state = optimizer.update(jax.tree.map(jnp.ones_like, tree), state, tree)
        sizes.append(-float(update["policy"].lora["a"]))
    np.testing.assert_allclose(sizes, 1 - np.arange(updates) / updates, atol=1e-5)


def test_where_policy_and_value_start(make_context, roles):
    """Policy: the reference's adapter. Value: the reward model, or the fresh adapter with a head that says 0."""
    same = lambda a, b: all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))  # noqa: E731
    for value_init in (None, "zero"):
        context = make_context(rl={"value_init": value_init})
        trained = rl.init(context, roles["reference"], roles["reward"]).train.trainable
        assert same(trained["policy"].lora, roles["reference"].lora)
        assert same(trained["value"].head, roles["reward"].head) == (value_init is None)
        assert same(trained["value"].lora, roles["reward"].lora) == (value_init is None)
    assert not any(leaf.any() for leaf in jax.tree.leaves(trained["value"].head))
    b = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trained["value"].lora) if path[-1].key == "b"]
    assert b and not any(leaf.any() for leaf in b)
