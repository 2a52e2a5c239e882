"""The figures of an evaluation, by hand: what is before and what is after, and in which unit."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.data import PromptExample
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.report import headline
from pe_rlhf_jax.training import evaluate
from pe_rlhf_jax.training.rewards import RewardModel, Rewards
from pe_rlhf_jax.training.statistics import bootstrap_ci
from pe_rlhf_jax.training.step import NonFiniteError

PROMPTS = [PromptExample(np.array([2]), text, {"topic": topic}) for text, topic in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
COLUMNS = {"topic": [1.0, 2.0, 3.0]}


def judge(prompts, completions, topic):
    """Twice the topic for a completion that says `good`, else 0; completions come without white space at their ends."""
    assert prompts == ["a", "b", "c"] and all(text == text.strip() for text in completions)
    return [2 * t if text == "good" else 0 for text, t in zip(completions, topic, strict=True)]


def test_before_is_the_reference_and_after_the_policy(make_context, monkeypatch):
    monkeypatch.setattr(evaluate, "load_function", lambda spec: judge)
    config = make_context(evaluate={"judge": "somewhere:judge", "bootstrap": 500}).config
    before = SimpleNamespace(
        texts=["bad", "bad ", "good"],
        tokens=[[1, 2, 1, 2], [1], [3]],
        ended=[1.0, 0.0, 0.0],
        terms={"a": [1.0, 2.0, 6.0]},
        scores=[1.0, 3.0, 5.0],
        kl=[],
    )
    after = SimpleNamespace(
        texts=[" good", "good ", "bad"],
        tokens=[[1, 2, 3], [4], [5, 6]],
        ended=[1.0, 1.0, 0.0],
        terms={"a": [0.0, 1.0, 2.0]},
        scores=[2.0, 7.0, 9.0],
        kl=[0.5, 0.1, 0.6],
    )
    found = evaluate._figures(config, PROMPTS, COLUMNS, {"reference": before, "policy": after}, thumbnails=[])
    figures = found["rl"]
    expected = {"prompts": 3, "kl_per_response": 0.4, "kl_per_token": 1.2 / 6, "length_before": 2.0, "length_after": 2.0}
    expected |= {"ended_before": 1 / 3, "ended_after": 2 / 3, "reward_before": 3.0, "reward_after": 6.0, "reward_std_before": 2.0}
    expected |= {"gain": 3.0, "gain_in_std": 1.5, "distinct_2_before": 2 / 3, "distinct_2_after": 1.0}
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["gain_ci"] == bootstrap_ci(np.array([1.0, 4.0, 4.0]), 500)
    assert figures["ci"] == pytest.approx([bound / 2.0 for bound in figures["gain_ci"]])
    assert figures["rewards"] == {"a": {"before": 3.0, "after": 1.0}}
    expected = {"before": 2.0, "after": 2.0, "delta": 0.0}
    assert {name: found["judge"][name] for name in expected} == pytest.approx(expected)
    assert found["judge"]["ci"] == bootstrap_ci(np.array([2.0, 4.0, -6.0]), 500)
    assert found["samples"][1] == {
        "prompt": "b",
        "reference": "bad ",
        "policy": "good ",
        "reward_reference": 3.0,
        "reward_policy": 7.0,
        "judge_reference": 0.0,
        "judge_policy": 4.0,
    }
    after.texts = ["good"] * 3
    found = evaluate._figures(config, PROMPTS, COLUMNS, {"reference": before, "policy": after}, thumbnails=[])
    assert found["judge"]["delta"] == pytest.approx(2.0)


def test_intervals_draw_prompts_of_a_group_together(make_context, monkeypatch):
    monkeypatch.setattr(evaluate, "load_function", lambda spec: lambda prompts, completions, topic: list(map(float, completions)))
    config = make_context(evaluate={"bootstrap": 300, "judge": "somewhere:judge"}).config
    groups, scores = ["x", "y", "x"], np.array([1.0, 4.0, 2.0])
    prompts = [dataclasses.replace(prompt, group=group) for prompt, group in zip(PROMPTS, groups, strict=True)]
    parts = {"tokens": [[1]] * 3, "ended": [1.0] * 3, "terms": {}, "kl": [0.0] * 3}
    before = SimpleNamespace(**parts, texts=["0"] * 3, scores=[0.0, 0.0, 0.0])
    after = SimpleNamespace(**parts, texts=["1", "4", "2"], scores=scores.tolist())
    found = evaluate._figures(config, prompts, COLUMNS, {"reference": before, "policy": after}, thumbnails=[])
    assert found["rl"]["gain_ci"] == found["judge"]["ci"] == bootstrap_ci(scores, 300, groups) != bootstrap_ci(scores, 300)
    assert found["rl"]["groups"] == 2


@pytest.mark.parametrize("reward", [0.0, 0.1])  # numpy's standard deviation of 0.1 three times is 1.7e-17
def test_a_reference_whose_rewards_are_all_the_same_has_no_unit(make_context, reward):
    """A reward of right or wrong that the reference never earns, and then the policy does."""
    config = make_context(evaluate={"bootstrap": 500}).config
    parts = {"texts": ["x"] * 3, "tokens": [[1]] * 3, "ended": [1.0] * 3, "terms": {}, "kl": [0.0] * 3}
    before, after = SimpleNamespace(**parts, scores=[reward] * 3), SimpleNamespace(**parts, scores=[reward + 1.0] * 3)
    found = evaluate._figures(config, PROMPTS, COLUMNS, {"reference": before, "policy": after}, thumbnails=[])["rl"]
    assert found["gain"] == pytest.approx(1.0) and found["gain_ci"] == pytest.approx([1.0, 1.0])
    assert found["reward_std_before"] == 0 and found["gain_in_std"] is None and found["ci"] is None
    (tile, *_) = headline.tiles({"rl": found}, {})
    assert (tile.value, tile.interval, tile.tone) == ("+1.00", "95% interval +1.00 to +1.00", "good")
    assert "in its own unit" in tile.reading and "excludes zero" in tile.reading


@pytest.mark.usefixtures("quick_compile")
def test_a_reward_that_is_not_a_number_is_named_before_it_is_saved(make_context, tiny):
    context = make_context(evaluate={"prompts": 2, "batch_size": 2, "bootstrap": 100})
    head = {"kernel": jnp.full((16, 1), jnp.inf), "bias": jnp.zeros(1)}
    rewards = Rewards(context, {"run": RewardModel(context.decoder, context.backbone, Role(head=head))})
    with pytest.raises(NonFiniteError, match=r"evaluate: the reward 'model' of 2 of 2 held-out responses of the reference is not a finite"):
        list(evaluate.policy(context, {"reference": Role(), "policy": Role(lora=tiny.lora)}, rewards))


@pytest.mark.parametrize(
    ("batch", "micro", "devices", "expected"),
    [(32, None, 4, 32), (32, 8, 4, 8), (12, 8, 4, 4), (12, 8, 1, 6), (8, 2, 4, 4), (8, 32, 1, 8), (32, 7, 1, 4), (32, 24, 4, 16)],
)
def test_answers_are_judged_as_many_at_once_as_in_rl(make_context, batch, micro, devices, expected):
    """Of those that a batch of the evaluation has: a divisor of them, and a multiple of the devices."""
    context = make_context(evaluate={"batch_size": batch}, rl={"batch_size": micro or 32, "micro_batch_size": micro})
    mesh = jax.sharding.AbstractMesh((devices, 1, 1), ("data", "fsdp", "tensor"))
    assert evaluate.at_once(dataclasses.replace(context, mesh=mesh)) == expected


@pytest.mark.usefixtures("quick_compile")
def test_divergence_is_of_the_policy_from_its_reference_at_the_sampling_temperature(make_context, tiny, monkeypatch):
    """Three prompts in batches of two: the row that fills the last batch counts nowhere."""
    context = make_context(
        rl={"sampling": {"max_new_tokens": 6, "temperature": 0.7}}, evaluate={"prompts": 3, "batch_size": 2, "bootstrap": 100}
    )
    context = dataclasses.replace(context, end_tokens=(1, 2, 3, 4))
    roles = {name: Role(lora=jax.tree.map(lambda x, s=s: x * s, tiny.lora)) for name, s in (("policy", 0.3), ("reference", 0.1))}
    rng = np.random.default_rng(1)
    head = {"kernel": jnp.asarray(rng.normal(0, 0.3, (16, 1)), jnp.float32), "bias": jnp.zeros(1)}
    roles["reward"] = Role(lora=jax.tree.map(lambda x: x * -0.3, tiny.lora), head=head)
    rollouts, respond = [], evaluate.respond

    def kept(context, role, batch, key):
        rollouts.append(respond(context, role, batch, key))
        return rollouts[-1]

    monkeypatch.setattr(evaluate, "respond", kept)
    rewards = Rewards(context, {"run": RewardModel(context.decoder, context.backbone, roles["reward"])})
    *_, (done, figures) = evaluate.policy(context, roles, rewards)
    assert done == 3 and len(figures["samples"]) == 3
    ratios, scores, tokens = [], {"reference": [], "policy": []}, 0
    for index, rollout in enumerate(rollouts):  # reference and policy of the first batch, then of the second
        name = ("reference", "policy")[index % 2]
        for row in range(2 if index < 2 else 1):
            prompt = np.asarray(rollout.prompt[row])[np.asarray(rollout.prompt_mask[row])]
            response = np.asarray(rollout.response[row])[np.asarray(rollout.response_mask[row])]
            whole = np.concatenate([prompt, response])
            scores[name].append(by_hand.head(context, roles["reward"], whole)[-1])
            if name == "policy":
                ours, theirs = (by_hand.logprobs(context, roles[role], whole, 0.7) for role in ("policy", "reference"))
                ratios.append(np.sum((ours - theirs)[len(prompt) - 1 :]))
                tokens += len(response)
    assert figures["rl"]["kl_per_response"] == pytest.approx(np.mean(ratios), rel=1e-3)
    assert figures["rl"]["kl_per_token"] == pytest.approx(np.sum(ratios) / tokens, rel=1e-3)
    assert figures["rl"]["reward_before"] == pytest.approx(np.mean(scores["reference"]), rel=1e-3)
    assert figures["rl"]["reward_after"] == pytest.approx(np.mean(scores["policy"]), rel=1e-3)
