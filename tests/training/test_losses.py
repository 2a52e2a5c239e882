"""The losses of SFT and reward modelling, and their evaluations, against a computation by hand."""

from __future__ import annotations

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import Split, pad_preferences, pad_sft
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import loop, reward, sft
from pe_rlhf_jax.training.reward_kinds import Pairs

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def role(tiny):
    rng = np.random.default_rng(1)
    head = {"kernel": jnp.asarray(rng.normal(0, 0.3, (16, 1)), jnp.float32), "bias": jnp.asarray([0.35], jnp.float32)}
    return Role(lora=jax.tree.map(lambda x: x * 0.3, tiny.lora), head=head)


def fewer(context, kind: str, count: int):
    """The context with that many held-out rows, fewer than a multiple of the batch."""
    split = getattr(context.data, kind)
    return dataclasses.replace(context, data=dataclasses.replace(context.data, **{kind: Split(split.train, split.validation[:count])}))


def sft_loss_by_hand(context, role, examples) -> float:
    """Mean over the tokens of all responses, end tokens included, prompts not."""
    losses = []
    for example in examples:
        tokens = np.concatenate([example.prompt, example.response])
        losses.append(-by_hand.logprobs(context, role, tokens)[len(example.prompt) - 1 :])
    return float(np.mean(np.concatenate(losses)))


def test_sft_learns_and_measures_the_responses_tokens(make_context, role):
    context, role = fewer(make_context(), "sft", 6), role.replace(head=None)
    examples = context.data.sft.validation
    expected = sft_loss_by_hand(context, role, examples)
    assert sft.evaluate(context, role) == pytest.approx(expected, rel=1e-4)
    batch = pad_sft(examples, 0, 8)
    loss, _ = sft._loss(context)(role, context.backbone, batch, sft._targets(batch), jax.random.key(0))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert abs(expected - sft_loss_by_hand(context, Role(), examples)) > 0.01


@pytest.mark.parametrize(("use_margin", "center"), [(False, 0.0), (True, 0.0), (False, 0.2)])
def test_reward_learns_that_the_chosen_side_is_better(make_context, role, use_margin, center):
    context = fewer(make_context(reward={"use_margin": use_margin, "center_rewards_coefficient": center}), "preference", 6)
    pairs = context.data.preference.validation
    chosen, rejected = (
        np.array([by_hand.head(context, role, getattr(pair, side))[-1] for pair in pairs]) for side in ("chosen", "rejected")
    )
    for found, expected in zip(Pairs().scores(context, role, pairs), (chosen, rejected), strict=True):
        np.testing.assert_allclose(found, expected, **by_hand.TOLERANCE)
    needed = np.array([pair.margin for pair in pairs]) if use_margin else 0.0
    expected = np.mean(np.log1p(np.exp(-(chosen - rejected - needed))) + center * (chosen + rejected) ** 2)
    batch = pad_preferences(pairs, 0, 8)
    loss, _ = reward._loss(context, Pairs())(role, (context.backbone, Role()), batch, jnp.float32(len(pairs)), jax.random.key(0))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_margins_that_no_pair_has_are_refused(make_context):
    context = make_context(reward={"use_margin": True})
    pairs = [dataclasses.replace(pair, margin=0.0) for pair in context.data.preference.train]
    bare = dataclasses.replace(context, data=dataclasses.replace(context.data, preference=Split(pairs, pairs)))
    Pairs().collator(context)
    with pytest.raises(ConfigError, match=r"reward.use_margin: no pair for training has a `margin`"):
        Pairs().collator(bare)


def test_adapters_drop_out_in_training_and_not_in_evaluation(make_context, role):
    context = make_context(lora={"lora_dropout": 0.5})
    plain = make_context()
    pairs, rows = context.data.preference.train[:4], context.data.sft.train[:4]
    batches = {reward: pad_preferences(pairs, 0, 8), sft: pad_sft(rows, 0, 8)}
    frozen = {reward: (context.backbone, Role()), sft: context.backbone}
    for stage, batch in batches.items():
        loss = jax.jit(reward._loss(context, Pairs()) if stage is reward else sft._loss(context))
        a, b, again = (loss(role, frozen[stage], batch, jnp.float32(4), jax.random.key(key))[0] for key in (0, 1, 0))
        assert a != b and a == again
    assert sft.evaluate(context, role) == sft.evaluate(plain, role)
    np.testing.assert_array_equal(Pairs().scores(context, role, pairs), Pairs().scores(plain, role, pairs))


def test_every_update_has_a_key_of_its_own(make_context, monkeypatch):
    context, keys = make_context(sft={"steps": 5, "evaluate_every": 9}), []

    def step(state, frozen, batch, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return state, {"loss": 0.0, "skipped": 0.0}

    monkeypatch.setattr(loop, "make_step", lambda *_: step)
    monkeypatch.setattr(sft, "evaluate", lambda *_: 0.0)
    list(sft.run(context, sft.init(context)))
    assert len(keys) == len(set(keys)) == 5


def test_the_next_batch_is_made_while_the_device_computes(make_context, monkeypatch):
    context, events = make_context(sft={"steps": 3, "evaluate_every": 9}), []

    def step(state, frozen, batch, key):
        events.append("step")
        return state, {"loss": 0.0, "skipped": 0.0}

    rows, fetch = loop.BatchOrder.__call__, jax.device_get
    monkeypatch.setattr(loop, "make_step", lambda *_: step)
    monkeypatch.setattr(loop.BatchOrder, "__call__", lambda self, at: events.append(f"rows {at}") or rows(self, at))
    monkeypatch.setattr(jax, "device_get", lambda tree: events.append("metrics") or fetch(tree))
    monkeypatch.setattr(sft, "evaluate", lambda *_: 0.0)
    list(sft.run(context, sft.init(context)))
    assert events == ["rows 0", "step", "rows 1", "metrics", "step", "rows 2", "metrics", "step", "metrics"]


def test_a_batch_that_cannot_be_made_fails_at_its_own_step(make_context, monkeypatch):
    """Not at the one before, which is done and to be saved; nor where the stage has no step left."""
    context = make_context(sft={"steps": 3, "evaluate_every": 9})
    rows = loop.BatchOrder.__call__

    def order(self, at):
        if at >= 2:
            raise ValueError(f"no batch {at}")
        return rows(self, at)

    monkeypatch.setattr(loop, "make_step", lambda *_: lambda state, *_: (state, {"loss": 0.0, "skipped": 0.0}))
    monkeypatch.setattr(loop.BatchOrder, "__call__", order)
    monkeypatch.setattr(sft, "evaluate", lambda *_: 0.0)
    seen = []
    with pytest.raises(ValueError, match="no batch 2"):
        for state, _ in sft.run(context, sft.init(context)):
            seen.append(int(state.step))
    assert seen == [1, 2]
    monkeypatch.setattr(loop.hosts, "several", lambda: True)  # the others wait for this one in the making of the batch
    monkeypatch.setattr(loop.hosts, "largest", lambda value: value)
    with pytest.raises(ValueError, match="no batch 2"):
        for state, _ in sft.run(context, sft.init(context)):
            seen.append(int(state.step))
    assert seen == [1, 2, 1]
    monkeypatch.undo()
    monkeypatch.setattr(loop.BatchOrder, "__call__", order)
    state = sft.init(context)
    assert list(sft.run(context, state.replace(step=state.step + 3))) == []


@pytest.mark.parametrize("start_from", ["base", "sft"])
def test_where_the_reward_model_starts(make_context, role, start_from):
    context = make_context(reward={"start_from": start_from})
    found = reward.init(context, role.replace(head=None)).trainable
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found.lora, role.lora)
    assert all(jax.tree.leaves(same)) == (start_from == "sft")
    assert found.head["kernel"].any() and not found.head["bias"].any()
