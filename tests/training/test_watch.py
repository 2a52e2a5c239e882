"""Responses watched while they are sampled are those that are sampled at once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pe_rlhf_jax.answering import Answerer
from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.data import pad_prompts
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.generate import BLOCK
from pe_rlhf_jax.training import rollouts
from pe_rlhf_jax.training.rollouts import WATCHED, respond, watch

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTH = 2 * BLOCK + 3
"""Neither a multiple of a block nor of what is watched at once."""


def test_every_look_shows_the_beginning_of_what_is_sampled_at_once(tiny, make_context):
    context = make_context()
    batch = context.rows(pad_prompts(context.data.prompts.train[:4], context.pad_token, 8))
    role, sampling = Role(lora=tiny.lora), SamplingConfig(max_new_tokens=LENGTH)
    for seed in range(2):
        key = jax.random.key(seed)
        whole, looks = respond(context, role, batch, key, sampling), list(watch(context, role, batch, key, sampling))
        np.testing.assert_array_equal(looks[-1].response, whole.response)
        np.testing.assert_array_equal(looks[-1].response_mask, whole.response_mask)
        np.testing.assert_array_equal(looks[-1].ended, whole.ended)
        np.testing.assert_allclose(looks[-1].logprobs, whole.logprobs, atol=1e-5)
        longest = int(np.asarray(whole.response_mask).sum(1).max())
        assert len(looks) == -(-longest // WATCHED) > 2
        for i, look in enumerate(looks):
            seen = np.arange(LENGTH) < (i + 1) * WATCHED
            np.testing.assert_array_equal(look.response_mask, np.asarray(whole.response_mask) & seen)
            np.testing.assert_array_equal(look.response, np.where(look.response_mask, whole.response, context.pad_token))


def test_a_stop_string_ends_what_is_watched_too(tiny, make_context):
    """With whatever the first row says from its sixth to its seventh token."""
    context = make_context()
    batch = context.rows(pad_prompts(context.data.prompts.train[:1], context.pad_token, 8))
    role, key = Role(lora=tiny.lora), jax.random.key(2)
    free = respond(context, role, batch, key, SamplingConfig(max_new_tokens=LENGTH))
    tokens = np.asarray(free.response)[0]
    assert np.asarray(free.response_mask)[0, :8].all()
    sampling = SamplingConfig(max_new_tokens=LENGTH, stop_strings=[f"{tokens[5]} {tokens[6]}"])
    whole, looks = respond(context, role, batch, key, sampling), list(watch(context, role, batch, key, sampling))
    assert len(looks) == 2 and np.asarray(whole.response_mask).sum() == 7
    np.testing.assert_array_equal(looks[-1].response, whole.response)
    np.testing.assert_array_equal(looks[-1].response_mask, whole.response_mask)
    assert looks[-1].ended.all() and not looks[0].ended.any()


@pytest.fixture
def answerer(tiny, make_context):
    """Of a policy and a reference on the tiny decoder; a prompt is as many tokens as its text says."""
    context = make_context()
    made = object.__new__(Answerer)  # without a run folder

    class Tokenizer:
        decode, tokenize = staticmethod(context.tokenizer.decode), list
        bos_token_id, eos_token_id, chat_template = None, 1, None

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [[2 + i % 20 for i in range(int(text or 0))] for text in texts]}

    made.context, made.sampling, made.key, made.asked = context, SamplingConfig(max_new_tokens=LENGTH), jax.random.key(3), 0
    made.backbone = type("Backbone", (), {"tokenizer": Tokenizer(), "config": context.decoder.config})
    made.roles = {"reference": Role(), "policy": Role(lora=tiny.lora)}
    return made


def test_streamed_answers_are_the_answers_and_few_lengths_are_compiled(answerer, monkeypatch):
    for prompt in ("3", "6"):
        asked = answerer.asked
        (expected,) = answerer([prompt])
        answerer.asked = asked
        found: dict[str, str] = {}
        for name, piece in answerer.stream(prompt):
            found[name] = found.get(name, "") + piece
        assert found == {name: expected[name] for name in ("reference", "policy")} and found["policy"] != found["reference"]
    traced, advance = [], rollouts.advance

    def counted(sampler, variables, key, state, steps):
        traced.append(state.cache.slots - LENGTH)
        return advance(sampler, variables, key, state, steps)

    monkeypatch.setattr(rollouts, "advance", counted)
    list(answerer.stream("8"))
    assert not traced  # a longer prompt, but for the same program
    list(answerer.stream("9"))
    assert traced == [16, 16]  # reference and policy
    list(answerer.stream("16"))
    assert traced == [16, 16]
