"""Answers to one prompt in one row are what they are in rows of their own, in both stages that have such; and none sees another."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_context import tiny_context
from tiny_families import CASES, Tiny
from tiny_pairs import FAST, MARGINS, assert_alike, learned, model_of, pairs, role_of
from tiny_pictures import seeing_context

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.data import PreferenceExample, Split, pad_preferences, pad_prompts
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import experience, reward, reward_batches, rl
from pe_rlhf_jax.training.reward_kinds import pair_scores
from pe_rlhf_jax.training.rl_loss import Frozen, gradient_of_update
from pe_rlhf_jax.training.rollouts import respond
from pe_rlhf_jax.training.shared_rows import answers_for, answers_in_a_row, longest_pair, pair_in_one_row

pytestmark = pytest.mark.usefixtures("quick_compile")


def one_and_two(context, examples):
    """The examples in one row each and in two, on the devices with their pictures."""
    return [
        context.rows(pad_preferences(examples, 0, multiple, in_one_row=lambda *_, one=one: one), examples)
        for one, multiple in ((True, 7), (False, 1))
    ]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES])
def test_one_row_is_two(name):
    """With other padding too."""
    model = model_of(name)
    context = tiny_context(model, reward=MARGINS)
    one, two = one_and_two(context, pairs(model.config.vocab_size))
    assert one.tokens.shape == (4, 1, 14) and two.tokens.shape == (4, 2, 9)
    assert_alike(*(learned(context, role_of(context), batch) for batch in (one, two)))


@pytest.mark.parametrize("name", ["paligemma", "gemma3", pytest.param("llava", marks=pytest.mark.slow)])
def test_one_row_is_two_with_pictures_in_the_prompt(name):
    """Prompts that are read in both directions, pictures that are, through windows, and neither."""
    context = seeing_context(name, pictures=2, reward=MARGINS)
    role = role_of(context)
    # The tiny answers differ in one token; here one goes on.
    examples = [
        dataclasses.replace(pair, chosen=np.append(pair.chosen, [7, 8, 1]).astype(np.int32)) for pair in context.data.preference.train[:3]
    ]
    assert all(0 < example.prompt_length <= example.shared for example in examples)
    one, two = one_and_two(context, examples)
    assert one.tokens.shape[1] == 1 and two.tokens.shape[1] == 2
    assert_alike(*(learned(context, role, batch) for batch in (one, two)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sides_do_not_see_each_other(name):
    """Not one bit of a score changes with the other side's tokens."""
    model = model_of(name)
    context = tiny_context(model)
    role = role_of(context)
    batch = one_and_two(context, pairs(model.config.vocab_size))[0]
    scores = jax.jit(lambda batch: jnp.stack(pair_scores(context.decoder, role, context.backbone, batch)))
    before = np.asarray(scores(batch))
    row = jnp.arange(batch.tokens.shape[-1])
    for side in (0, 1):  # what only its tokens see
        end, other = batch.last[..., side, None] + 1, (batch.tokens + 3) % model.config.vocab_size
        own = (batch.ends == end) & (row < end) & (row > batch.last[..., :1] if side else True)
        changed = np.asarray(scores(batch.replace(tokens=jnp.where(own, other, batch.tokens))))
        np.testing.assert_array_equal(changed[1 - side], before[1 - side])
        assert np.all(changed[side] != before[side])


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_group_learns_in_one_row_what_it_learns_in_rows_of_its_own(make_context, tiny, monkeypatch, micro_batch_size):
    """Experience, loss and gradients; micro-batches of two cut a group of four, of which two are then computed together."""
    section = {"algorithm": "grpo", "group_size": 4, "batch_size": 8, "micro_batch_size": micro_batch_size}
    context = make_context(rl={**section, "sampling": {"max_new_tokens": 6}})
    config, policy = context.config.rl, Role(lora=jax.tree.map(lambda x: 0.3 * x, tiny.lora))
    examples = [prompt for prompt in context.data.prompts.train[:2] for _ in range(4)]
    rollout = respond(context, policy, context.rows(pad_prompts(examples, 0, 8)), jax.random.key(1))
    scores, frozen = jnp.arange(8.0), Frozen(context.backbone, {"policy": Role()}, jnp.float32(0.3))
    chosen = []

    def learned():
        make = jax.jit(functools.partial(experience.make_experience.__wrapped__, context.decoder, config, 16))
        made, metrics = make(context.backbone, policy, Role(), None, rollout, scores, jnp.float32(0.3))
        rows = jax.tree.map(lambda x: x[: config.micro_batch_size], made)
        gradient = jax.jit(gradient_of_update(context))
        moved = {"policy": Role(lora=jax.tree.map(lambda x: 0.5 * x, tiny.lora))}
        made = made.replace(old_logprobs=made.old_logprobs * rollout.response_mask, ref_logprobs=made.ref_logprobs * rollout.response_mask)
        return made, metrics, gradient(moved, frozen, rows, rl._tokens(rows), jax.random.key(0))

    def choose(*arguments):
        chosen.append(answers_in_a_row(*arguments))
        return chosen[-1]

    monkeypatch.setattr(experience, "answers_in_a_row", choose)
    together = learned()
    assert min(chosen) > 1
    monkeypatch.setattr(experience, "answers_in_a_row", lambda *_: 1)
    alone = learned()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), together, alone)


SMOLLM2 = dataclasses.replace(Tiny("llama").architecture, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64)


def test_what_goes_into_one_row():
    """Where it is not slower: with prompts, or short. Only rows that divide over the devices, and fit a table of positions."""
    text = "{model: {source: unused}, reward: {batch_size: 8}, data: {max_prompt_length: 500, max_response_length: 250}}"
    config, fewer = configuration.parse(text), configuration.parse(text, ["reward.micro_batch_size=4"])
    table = dataclasses.replace(SMOLLM2, learned_positions=True, max_position_embeddings=600)
    assert pair_in_one_row(config, SMOLLM2, 8, 256 + 2 * 64, 256 + 64)
    assert not pair_in_one_row(config, SMOLLM2, 8, 2 * 256, 256)
    assert longest_pair(config, SMOLLM2, 8) == longest_pair(fewer, SMOLLM2, 4) == (1, 1024)
    assert longest_pair(fewer, SMOLLM2, 8) == longest_pair(config, table, 8) == (2, 768)
    assert answers_for(SMOLLM2, 32, 256, 64, 8, 1) == 8
    assert answers_for(SMOLLM2, 32, 256, 256, 8, 1) == 2  # attention over the others' answers would cost more than the prompt
    assert answers_for(SMOLLM2, 32, 256, 64, 8, 8) == 4
    assert answers_for(SMOLLM2, 12, 256, 64, 8, 8) == 1
    assert answers_for(table, 32, 256, 64, 8, 1) == 4


def test_the_reward_stage_is_the_same_either_way(make_context, monkeypatch):
    """Three updates with held-out figures: batches of one row each, as their shapes have it, and of two."""
    rng = np.random.default_rng(2)
    words = rng.integers(2, 31, (8, 20)).astype(np.int32)
    examples = [PreferenceExample(row[: 16 + i % 3], np.append(row[:14], row[17:]), 0.5, prompt_length=14) for i, row in enumerate(words)]
    context = make_context(reward=MARGINS | {"evaluate_every": 3})
    context = dataclasses.replace(context, data=dataclasses.replace(context.data, preference=Split(examples, examples[:5])))
    shapes = []

    def run():
        collate = reward.kind_of(context.config.reward).collator(context)
        shapes.append(collate(examples[:4]).tokens.shape)
        return [metrics for _, metrics in reward.run(context, Role(), reward.init(context, Role()))]

    one = run()
    monkeypatch.setattr(reward_batches, "pair_in_one_row", lambda *_: False)
    two = run()
    assert shapes == [(4, 1, 32), (4, 2, 24)]
    for a, b in zip(one, two, strict=True):
        assert a["perf/padding"] < 0.5 and a.keys() == b.keys()
        for name in a:
            if not name.startswith(("time/", "perf/")):
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert "eval/accuracy" in one[-1]
