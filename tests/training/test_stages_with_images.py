"""Stages whose rows have pictures: one tower sees each picture once, and every role and epoch uses what it saw."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from tiny_pictures import bits, new_encoder, seeing_context

from pe_rlhf_jax.data import Split, pad_labels, pad_preferences, pad_prompts, pad_sft
from pe_rlhf_jax.data.image_batches import WholeExamples
from pe_rlhf_jax.data.images import Picture
from pe_rlhf_jax.data.sources import Skipped
from pe_rlhf_jax.models.heads import init_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import response_logprobs
from pe_rlhf_jax.training import evaluate, images, reward, rl, sft
from pe_rlhf_jax.training.reward_kinds import label_scores, pair_scores
from pe_rlhf_jax.training.rewards import RewardModel, Rewards, _score
from pe_rlhf_jax.training.rollouts import respond

TOWER = r"(vision\.)?attention\..*"


@pytest.fixture
def encoded(monkeypatch):
    """Counts the pictures that the tower is given; fillers are black pictures of zeros."""
    seen = []
    original = images._encode

    def encode(decoder, tower, pixels):
        seen.extend(picture.tobytes() for picture in np.asarray(pixels) if picture.any())
        return original(decoder, tower, pixels)

    monkeypatch.setattr(images, "_encode", encode)
    return seen


def whole_run(context):
    """SFT, a reward model, RL and an evaluation; the states' leaves and the figures."""
    *_, (state, _) = sft.run(context, sft.init(context))
    reference, figures = sft.finish(context, state)
    *_, (state, _) = reward.run(context, reference, reward.init(context, reference))
    model = reward.whole(context, reference, reward.finish(context, reference, state)[0])
    rewards = Rewards(context, {"run": RewardModel(context.decoder, context.backbone, model)})
    *_, (state, metrics) = rl.run(context, reference, model, rewards, rl.init(context, reference, model))
    roles = rl.whole(context, reference, model, state.train.trainable)
    *_, (_, result) = evaluate.policy(context, {"reference": reference, "policy": roles["policy"]}, rewards)
    return state, figures, metrics, result


@pytest.mark.parametrize("name", ["paligemma", pytest.param("llava", marks=pytest.mark.slow)])
def test_each_picture_is_encoded_once_for_all_roles_epochs_and_stages(encoded, name, quick_compile):
    context = seeing_context(name, rl={"num_mini_batches": 2}, reward={"kind": "labels"})
    tower = bits(context.backbone["vision"])
    state, figures, metrics, result = whole_run(context)
    assert figures["loss_after"] < figures["loss_before"]
    assert all(np.isfinite(value) for value in metrics.values())
    assert abs(metrics["val/sampler_kl"]) < 1e-3  # later mini-batches have moved
    assert np.isfinite(result["rl"]["gain_in_std"])
    assert len(encoded) == len(set(encoded)) == len({row.pictures[0].key for row in context.data.prompts.train})
    assert bits(context.backbone["vision"]) == tower
    assert all("vision" not in (role.lora or {}) for role in state.train.trainable.values())


def test_without_a_cache_a_picture_is_encoded_once_a_batch(encoded, quick_compile):
    context = seeing_context(rl={"algorithm": "rloo", "group_size": 2, "steps": 2, "num_ppo_epochs": 3, "value_init": "zero"})
    context = dataclasses.replace(context, encoder=new_encoder(context, cached_bytes=0))
    rewards = Rewards(context, {"run": RewardModel(context.decoder, context.backbone, reward.init(context, Role()).trainable)})
    list(rl.run(context, Role(), None, rewards, rl.init(context, Role(), None)))
    assert len(encoded) == 2 * 2  # steps, prompts


def test_no_more_pictures_are_read_ahead_than_are_encoded_at_once(encoded, monkeypatch):
    """So that a batch's pixels never exist as a whole."""
    context = seeing_context()
    read, most = [], []
    original = context.encoder.read.tiles
    monkeypatch.setattr(
        context.encoder.read, "tiles", lambda *row: read.append(row) or most.append(len(read) - len(encoded)) or original(*row)
    )
    rows = context.data.prompts.train
    context.encoder(rows)
    assert len(read) == len(encoded) == len({row.pictures[0].key for row in rows}) > images.AT_ONCE
    assert max(most) <= images.AT_ONCE


@pytest.mark.parametrize("name", ["paligemma", "llava", "gemma3"])
def test_features_do_not_depend_on_the_cache_or_on_other_pictures(name):
    context = seeing_context(name, pictures=2)
    rows = context.data.prompts.train
    kept = context.encoder
    first = bits(kept(rows))
    assert bits(kept(rows)) == first
    anew = new_encoder(context)
    alone = [new_encoder(context)([row]) for row in reversed(rows)][::-1]
    for row, seen, whole in zip(rows, alone, anew(rows).features, strict=True):
        if not row.pictures:
            assert seen is None
            continue
        assert bits(seen.features[0, : len(row.pictures)]) == bits(whole[: len(row.pictures)])
    assert bits(anew(rows)) == first


def test_the_cache_is_bounded():
    context = seeing_context()
    rows = context.data.prompts.train
    one = context.encoder(rows[:1]).features.nbytes
    encoder = new_encoder(context, cached_bytes=3 * one)
    for row in rows:
        encoder([row])
    assert list(encoder._kept) == [row.pictures[0].key for row in rows[-3:]]


def test_without_pictures_a_batch_is_what_it_is_for_text():
    """A model whose prompts are read from left to right: the same bits as through the path of models of text."""
    context = seeing_context(pictures=0)
    text = dataclasses.replace(context, encoder=None)
    results = [jax.tree.leaves((state, metrics)) for state, metrics in map(_first, (context, text))]
    assert bits(results[0]) == bits(results[1])
    rollouts = [
        respond(c, Role(), c.rows(pad_prompts(rows := c.data.prompts.train[:4], 0, 8), rows), jax.random.key(0)) for c in (context, text)
    ]
    assert bits(rollouts[0]) == bits(rollouts[1])


def _first(context):
    state, metrics = next(iter(sft.run(context, sft.init(context))))
    return state, {name: value for name, value in metrics.items() if not name.startswith(("time/", "perf/"))}


@pytest.mark.parametrize(("stage", "adapted"), [("sft", False), ("pairs", True), ("labels", False), ("rl", False)])
def test_micro_batches_are_the_whole_batch(stage, adapted, quick_compile):
    found = []
    for micro in (None, 2):
        sections = {"reward": {"kind": "labels" if stage == "labels" else "pairs"}}
        name = stage if stage in ("sft", "rl") else "reward"
        sections[name] = {**sections.get(name, {}), "micro_batch_size": micro, "steps": 1}
        if name == "rl":
            sections[name] |= {"num_ppo_epochs": 1, "value_init": "zero", "rewards": [{"function": "tiny_pictures:remainders"}]}
        context = seeing_context("paligemma", 2, target_modules=TOWER if adapted else "all-linear", **sections)
        if name == "sft":
            state, metrics = next(iter(sft.run(context, sft.init(context))))
        elif name == "reward":
            start = reward.init(context, Role())  # a head for labels starts at 0, and nothing else would have a gradient
            head = init_head(jax.random.key(1), context.decoder.config.hidden_size)
            state, metrics = next(iter(reward.run(context, Role(), start.replace(trainable=start.trainable.replace(head=head)))))
        else:
            state, metrics = next(iter(rl.run(context, Role(), None, Rewards(context, {}), rl.init(context, Role(), None))))
            state = state.train
        found.append((metrics["grad_norm"], state.opt_state))
    assert found[0][0] > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), *found)


def test_what_a_fresh_adapter_on_the_tower_sees_is_what_the_frozen_tower_sees(quick_compile):
    """Pixels that each role encodes, and features that are encoded once, for every stage's scores."""
    frozen, adapted = seeing_context("gemma3", 2), seeing_context("gemma3", 2, target_modules=TOWER)
    assert adapted.encoder(adapted.data.sft.train).features is None
    assert frozen.encoder(frozen.data.sft.train).pixels is None
    results = []
    for context in (frozen, adapted):
        role = reward.init(context, Role()).trainable
        data, decoder, backbone = context.data, context.decoder, context.backbone

        def placed(pad, rows, context=context):
            return context.rows(pad(rows, 0, 8, **({} if pad is pad_sft else {"rows": 8})), rows)

        rollout = respond(context, role, placed(pad_prompts, data.prompts.train[:5]), jax.random.key(2))
        results.append(
            [
                sft._evaluate(decoder, 16, role, backbone, placed(pad_sft, data.sft.train)),
                pair_scores(decoder, role, backbone, placed(pad_preferences, data.preference.train[:5])),
                label_scores(decoder, role, backbone, placed(pad_labels, data.label.train[:5])),
                rollout.logprobs,
                response_logprobs(decoder, backbone, role, rollout, 1.0, 16),
                _score(decoder, 1, None, role, backbone, rollout),
            ]
        )
        mask = np.asarray(rollout.response_mask)
        np.testing.assert_allclose(rollout.logprobs * mask, results[-1][4][0] * mask, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_what_is_shown_matters():
    """Another picture under the same prompt: other scores, other log-probabilities, and other answers' probabilities."""
    context = seeing_context()
    role, rows = reward.init(context, Role()).trainable, context.data.label.train[:4]
    other = [dataclasses.replace(row, pictures=context.data.label.train[i + 1].pictures) for i, row in enumerate(rows)]
    scores = [
        np.asarray(label_scores(context.decoder, role, context.backbone, context.rows(pad_labels(seen, 0, 8), seen)))
        for seen in (rows, other)
    ]
    assert np.all(np.abs(scores[0] - scores[1]) > 1e-4)


def test_a_reward_model_with_a_tower_of_its_own_sees_for_itself():
    """Its backbone is another one: the policy's features mean nothing to it."""
    context = seeing_context()
    other = {**context.backbone, "vision": jax.tree.map(lambda x: x * 1.3, context.backbone["vision"])}
    encoder = new_encoder(dataclasses.replace(context, backbone=other))
    role, rows = reward.init(context, Role()).trainable, context.data.prompts.train[:3]
    rollout = respond(context, Role(), context.rows(pad_prompts(rows, 0, 8, rows=4), rows), jax.random.key(0))
    found = Rewards(context, {"run": RewardModel(context.decoder, other, role, encoder)})(rollout, rows).total
    shown = rollout.replace(images=encoder([*rows, rows[0]]))
    # Placed otherwise, it is compiled anew, and differs by 5e-7.
    np.testing.assert_allclose(found, _score(context.decoder, 1, None, role, other, shown)[:3], rtol=1e-5)
    assert np.all(np.abs(found - np.asarray(_score(context.decoder, 1, None, role, other, rollout))[:3]) > 1e-4)


def test_pictures_are_decoded_when_a_batch_needs_them(monkeypatch, quick_compile):
    """Neither to sort rows by length nor to weigh the classes."""
    context = seeing_context(data={"group_by_length": True}, reward={"kind": "labels", "balance_classes": True, "steps": 1})
    skipped = Skipped()
    splits = {
        name: Split(*(WholeExamples(part, context.data.pixels, skipped) for part in (split.train, split.validation[:1])))
        for name, split in (("sft", context.data.sft), ("label", context.data.label))
    }
    context = dataclasses.replace(context, data=dataclasses.replace(context.data, **splits))
    decoded, decode = [], Picture.decode
    monkeypatch.setattr(Picture, "decode", lambda picture: (decoded.append(picture.key), decode(picture))[1])
    next(sft.run(context, sft.init(context)))
    asked = 2 * context.config.sft.batch_size  # the step's, and the next one's, which is made while the device computes
    assert len(decoded) == asked
    kind = reward.kind_of(context.config.reward)
    collate = kind.collator(context)
    assert len(decoded) == asked
    assert collate(context.data.label.train[:2]).weight.shape == (2,)
