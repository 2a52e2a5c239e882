"""Stages on a tiny decoder: what learns, what stays, and how roles and rewards travel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_context import tiny_context

from pe_rlhf_jax.data import pad_preferences, pad_prompts
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import evaluate, reward, rl, sft
from pe_rlhf_jax.training.experience import estimate, make_experience
from pe_rlhf_jax.training.reward_kinds import Pairs, pair_scores
from pe_rlhf_jax.training.rewards import RewardModel, Rewards
from pe_rlhf_jax.training.rollouts import respond

ROLES = {"lora": "shared", "full": "separate"}


def copy_of(tree):
    return jax.tree.map(np.array, tree)


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)), a, b)


def judged_by(context, model: Role) -> Rewards:
    return Rewards(context, {"run": RewardModel(context.decoder, context.backbone, model)})


def reward_role(context, bias: float = 0.0) -> Role:
    role = reward.init(context, Role()).trainable
    return role.replace(head={**role.head, "bias": jnp.asarray([bias], jnp.float32)})


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_every_stage_learns_and_the_backbone_keeps_its_bits(make_context, tuning):
    context = make_context(sft={"tuning": tuning}, reward={"tuning": tuning}, rl={"tuning": tuning, "roles": ROLES[tuning]})
    backbone = copy_of(context.backbone)
    state = sft.init(context)
    start = copy_of(state.trainable)
    for last, metrics in sft.run(context, state):
        state = last
        assert np.isfinite(metrics["loss"])
    reference, figures = sft.finish(context, state)
    assert figures["loss_after"] < figures["loss_before"]
    assert not np.array_equal(jax.tree.leaves(start)[0], jax.tree.leaves(reference)[0])

    *_, (state, metrics) = reward.run(context, reference, reward.init(context, reference))
    trained, _ = reward.finish(context, reference, state)
    model = reward.whole(context, reference, trained)
    people = np.concatenate(Pairs().scores(context, model, context.data.preference.train))
    assert abs(float(np.mean(people))) < 1e-5  # the bias is set so that what people wrote averages 0

    kept = copy_of((reference, model))
    *_, (state, metrics) = rl.run(context, reference, model, judged_by(context, model), rl.init(context, reference, model))
    assert all(np.isfinite(value) for value in metrics.values())
    assert_same_bits(copy_of((reference, model)), kept)
    assert_same_bits(copy_of(context.backbone), backbone)


def test_fully_tuned_scorers_have_no_part_of_an_output_matrix_of_its_own(untied):
    """The policy has one: it predicts tokens."""
    full = {"tuning": "full"}
    context = tiny_context(untied, reward=full, rl={**full, "roles": "separate", "value_init": "reward"})
    *_, (state, _) = reward.run(context, Role(), reward.init(context, Role()))
    model = reward.whole(context, Role(), state.trainable)
    *_, (after, metrics) = rl.run(context, Role(), model, judged_by(context, model), rl.init(context, Role(), model))
    roles = {"reward": model, **after.train.trainable}
    assert {name: "lm_head" in role.params for name, role in roles.items()} == {"reward": False, "policy": True, "value": False}
    assert np.isfinite(metrics["loss/value_avg"]) and np.isfinite(metrics["loss/policy_avg"])


def test_optimizer_state_and_gradients_are_of_adapters_and_heads_only(make_context):
    context = make_context()
    state = reward.init(context, Role())
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert state.trainable.params is None
    assert moments == 2 * trained


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_before_an_update_policy_and_reference_agree_exactly(make_context, algorithm):
    context = make_context(rl={"algorithm": algorithm, "old_logprobs": "recompute"})
    model = reward_role(context)
    _, metrics = next(rl.run(context, Role(), model, judged_by(context, model), rl.init(context, Role(), model)))
    assert metrics["objective/kl"] == 0.0
    assert metrics["objective/non_score_reward"] == 0.0
    assert metrics["val/sampler_kl"] < 1e-6


@pytest.mark.parametrize(
    "section",
    [
        {"algorithm": "ppo"},
        {"algorithm": "ppo", "value_model": "trunk", "value_init": "zero"},
        {"algorithm": "reinforce", "micro_batch_size": 2},
        {"algorithm": "rloo"},
    ],
    ids=["ppo", "trunk", "reinforce", "rloo"],
)
def test_the_samplers_log_probabilities_serve_as_well_as_another_pass(make_context, section, tiny):
    """Experience and a first update; the policy has moved away from its reference."""
    learned = []
    for source in ("sampler", "recompute"):
        context = make_context(rl={**section, "old_logprobs": source, "sampling": {"max_new_tokens": 6, "temperature": 0.7}})
        model = reward_role(context)
        state = rl.init(context, Role(), model)
        moved = {"policy": Role(lora=jax.tree.map(lambda x: 0.3 * x, tiny.lora))}
        state = state.replace(train=state.train.replace(trainable=state.train.trainable | moved))
        state, metrics = next(rl.run(context, Role(), model, judged_by(context, model), state))
        learned.append((state.train.trainable, {name: x for name, x in metrics.items() if not name.startswith(("time/", "perf/"))}))
    assert abs(metrics["objective/kl"]) > 0.01  # k1, of few samples
    assert 0 < metrics["val/sampler_kl"] < 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *learned)


def test_in_bfloat16_the_policy_is_asked_again(make_context):
    """Where sampling and learning round differently, ratios begin at exactly 1 all the same."""
    context = make_context()
    half = dataclasses.replace(context, decoder=dataclasses.replace(context.decoder, dtype=jnp.bfloat16))
    model = reward_role(half)
    for each, differs in ((context, False), (half, True)):
        rollout, experience, _ = experience_of(each, model)
        off = np.where(rollout.response_mask, experience.old_logprobs - rollout.logprobs, 0)
        assert bool(np.any(off)) == differs


@pytest.mark.parametrize("score", [0.7, -1.6])
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_fractional_rewards_arrive_whole(make_context, score, algorithm):
    """A library that stores rewards in the integer type of the tokens trains on 0 and -1 instead."""
    context = make_context(rl={"algorithm": algorithm, "whiten_advantages": False, "value_init": "zero", "gamma": 1.0, "lam": 1.0})
    model = reward_role(context)
    model = model.replace(head={"kernel": jnp.zeros_like(model.head["kernel"]), "bias": jnp.asarray([score], jnp.float32)})
    rollout, experience, metrics = experience_of(context, model)
    share = 1.0 if algorithm == "ppo" else 1.0 - context.config.rl.kl_coef
    mask = np.asarray(rollout.response_mask)
    said = jnp.zeros(mask.shape)  # by a value model that begins at 0, and in REINFORCE says so when it learns
    estimates = experience.estimates or estimate(context.config.rl, experience.rewards, said, rollout.response_mask)
    np.testing.assert_allclose(np.asarray(estimates.returns)[mask], share * score, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(estimates.advantages)[mask], share * score, rtol=1e-6)
    assert float(metrics["objective/rlhf_reward"]) == pytest.approx(share * score)


def test_a_response_without_an_end_gets_the_penalty(make_context):
    context = make_context(rl={"missing_eos_penalty": -3.0, "sampling": {"max_new_tokens": 2}})
    model = reward_role(context, bias=0.25)
    rollout, *_ = experience_of(context, model)
    scores = judged_by(context, model)(rollout, context.data.prompts.train[:4]).total
    ended = np.asarray(rollout.ended)
    assert not ended.all()
    np.testing.assert_array_equal(np.asarray(scores)[~ended], -3.0)
    assert not np.any(np.asarray(scores)[ended] == -3.0)


def experience_of(context, model):
    config = context.config.rl
    state = rl.init(context, Role(), model)
    roles = rl.whole(context, Role(), model, state.train.trainable)
    batch = context.rows(pad_prompts(context.data.prompts.train[:4], 0, 8))
    rollout = respond(context, roles["policy"], batch, jax.random.key(3))
    scores = jnp.asarray(judged_by(context, model)(rollout, context.data.prompts.train[:4]).total)
    experience, metrics = make_experience(
        context.decoder,
        config,
        16,
        context.backbone,
        roles["policy"],
        Role(),
        roles.get("value"),
        rollout,
        scores,
        state.kl_coef,
    )
    return rollout, experience, metrics


def test_reward_model_score_does_not_depend_on_padding(make_context):
    context = make_context()
    model, pairs = reward_role(context), context.data.preference.train[:4]
    narrow, wide = (pad_preferences(pairs, 0, multiple) for multiple in (8, 32))
    a, b = (pair_scores(context.decoder, model, context.backbone, context.rows(batch)) for batch in (narrow, wide))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_the_policy_learns_to_please_its_reward_model(make_context, algorithm):
    """Through the whole loop: a reward model that likes some tokens sees its score rise on fresh rollouts."""
    context = make_context(
        rl={
            "algorithm": algorithm,
            "steps": 40,
            "batch_size": 32,
            "kl_coef": 0.0,
            "sampling": {"max_new_tokens": 4},
            "optimizer": {"learning_rate": 2e-2},
        }
    )
    model = reward_role(context)
    seen = [
        metrics["objective/scores"]
        for _, metrics in rl.run(context, Role(), model, judged_by(context, model), rl.init(context, Role(), model))
    ]
    spread = np.std(seen[:10])
    assert np.mean(seen[-5:]) > np.mean(seen[:5]) + 3 * spread / np.sqrt(5)


def test_adaptive_coefficient_rises_with_too_much_divergence(make_context):
    context = make_context(rl={"kl_target": 0.01, "kl_horizon": 10.0, "optimizer": {"learning_rate": 5e-2}, "steps": 4})
    model = reward_role(context)
    states = [state for state, _ in rl.run(context, Role(), model, judged_by(context, model), rl.init(context, Role(), model))]
    assert float(states[0].kl_coef) < context.config.rl.kl_coef  # no divergence yet: below the target
    assert float(states[-1].kl_coef) > float(states[0].kl_coef)


def test_learning_rates_of_policy_and_value_are_their_own(make_context):
    """A policy that cannot move stays, while the value model learns."""
    context = make_context(rl={"optimizer": {"learning_rate": 1e-30}, "value_learning_rate": 1e-2})
    model = reward_role(context)
    start = rl.init(context, Role(), model)
    before = copy_of(start.train.trainable)
    *_, (state, _) = rl.run(context, Role(), model, judged_by(context, model), start)
    after = copy_of(state.train.trainable)
    # A fresh B is zero, so even 1e-30 shows in its bits; anything but the rate's own size would be far larger.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-25), before["policy"], after["policy"])
    assert not np.array_equal(before["value"].lora["layers"]["mlp"]["up_proj"]["b"], after["value"].lora["layers"]["mlp"]["up_proj"]["b"])


def test_evaluation_of_equal_policies_finds_no_difference_in_divergence(make_context):
    context = make_context(evaluate={"prompts": 6, "batch_size": 4, "bootstrap": 100})
    roles = {"reference": Role(), "policy": Role()}
    *_, (done, figures) = evaluate.policy(context, roles, judged_by(context, reward_role(context)))
    assert done == 6
    assert figures["rl"]["kl_per_response"] == 0.0
    assert figures["rl"]["gain_in_std"] == 0.0  # the same keys draw the same answers
    assert [row["reference"] for row in figures["samples"]] == [row["policy"] for row in figures["samples"]]


def test_logits_are_capped_in_training_as_in_sampling(make_context):
    """Gemma 2 caps its logits: the likelihoods that SFT and RL learn from are those of the capped ones."""
    context = make_context(rl={"rewards": [{"model": "run"}], "steps": 1})
    capped = dataclasses.replace(context.decoder, config=dataclasses.replace(context.decoder.config, final_softcap=0.5))
    capped_context = dataclasses.replace(context, decoder=capped)
    loss, plain = sft.evaluate(capped_context, Role()), sft.evaluate(context, Role())
    assert abs(loss - np.log(capped.config.vocab_size)) < 0.5 < abs(plain - np.log(capped.config.vocab_size))  # near uniform
    model = reward_role(capped_context)
    _, metrics = next(rl.run(capped_context, Role(), model, judged_by(capped_context, model), rl.init(capped_context, Role(), model)))
    assert metrics["val/sampler_kl"] < 1e-6
