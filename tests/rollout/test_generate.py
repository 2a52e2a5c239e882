"""Generation: against a float64 reference on a real decoder, and by hand on a decoder that follows a script."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import forward, log_softmax, merged
from scipy import stats
from scripted_decoder import LENGTH, PAD, Script

from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import BLOCK, generate
from pe_rlhf_jax.rollout.score import response_logprobs
from pe_rlhf_jax.types import PromptBatch

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_everything_after_the_first_of_several_end_tokens_is_masked_padding():
    out = Script().program(ends=(5, 10, 20), temperature=0.0)([1, 8, 17, 19, 20])
    expected = np.full((5, LENGTH), PAD)
    expected[0, :4] = [2, 3, 4, 5]
    expected[1, :2] = [9, 10]
    expected[2, :3] = [18, 19, 20]
    expected[3, :1] = [20]  # the first token ends
    expected[4] = [*range(21, 21 + LENGTH)]  # an end token in the prompt does not, and the length is filled
    np.testing.assert_array_equal(out.response, expected)
    np.testing.assert_array_equal(out.response_mask, np.arange(LENGTH) < np.array([[4], [2], [3], [1], [LENGTH]]))
    assert list(out.ended) == [True] * 4 + [False]
    assert not out.logprobs[~out.response_mask].any()


def test_decoding_stops_with_the_longest_response():
    """Decode steps that really ran, counted on the host."""
    script, end = Script(), 25
    run = script.program(ends=(end,), temperature=0.0, max_new_tokens=5 * BLOCK - 1)
    for lengths, steps in [([1, 2, 1], BLOCK), ([1, BLOCK, 2], BLOCK), ([BLOCK + 1, 1, 2], 2 * BLOCK), ([-1, 1, 1], 5 * BLOCK)]:
        script.steps = 0
        out = run(end - np.array(lengths))  # -1: starts behind the end token and never meets it
        assert script.steps == steps
        assert list(out.response_mask.sum(1)) == [n if n > 0 else 5 * BLOCK - 1 for n in lengths]


@pytest.mark.parametrize(("length", "steps"), [(3, 3), (BLOCK, BLOCK), (20, 20), (19, 20), (50, 50)])
def test_responses_of_full_length_take_few_steps_more(length, steps):
    """None, where half of BLOCK to all of it divides the length."""
    script = Script(vocabulary=60)
    out = script.program(max_new_tokens=length, temperature=0.0)([1, 2, 3])
    assert out.response_mask.all() and script.steps == steps


def test_rows_and_steps_draw_independently_from_the_distribution():
    """Frequencies follow the softmax; equal neighbours, along rows or along steps, are as rare as independence says."""
    logits = np.array([1.0, 2.5, 0.0, -1.0, 2.0, -3.0])
    out = Script(6, logits.astype(np.float32)).program(temperature=1.5)(np.zeros(1000, int))
    p = np.exp(log_softmax(logits / 1.5))
    tokens = out.response
    counts = np.bincount(tokens.ravel(), minlength=6)
    assert stats.chisquare(counts, p * tokens.size).pvalue > 1e-3
    np.testing.assert_allclose(out.logprobs, np.log(p)[tokens], atol=1e-6)
    same, error = (p**2).sum(), 0.5 / tokens.size**0.5
    assert abs((tokens[1:] == tokens[:-1]).mean() - same) < 5 * error
    assert abs((tokens[:, 1:] == tokens[:, :-1]).mean() - same) < 5 * error


def test_keys_reproduce_and_differ():
    run = Script(6, np.zeros(6, np.float32)).program()
    one, again, other = (run(np.zeros(8, int), seed).response for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.6  # 5/6 expected over 88 tokens; 0.6 is six standard errors away


PROMPTS = PromptBatch(
    jnp.array([[PAD, PAD, PAD, PAD, 11], [PAD, PAD, 3, 4, 5], [6, 7, 8, 9, 10], [PAD, 12, 13, 14, 15]]),
    jnp.array([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], bool),
)


@pytest.fixture(scope="module")
def run(tiny):
    """A compiled generation for each sampling configuration: f(config)(prompts, key)."""
    programs = {}

    def compiled(ends=(0, 1, 2), temperature=0.7, **fields):
        fields["temperature"] = temperature
        config = SamplingConfig(**{"max_new_tokens": LENGTH, **fields})
        if (config, ends) not in programs:
            programs[config, ends] = jax.jit(lambda p, key: generate(Sampler(tiny.decoder, config, ends, PAD), tiny.variables, p, key))
        return lambda prompts, seed=0: programs[config, ends](prompts, jax.random.key(seed))

    return compiled


def rows(out):
    """Row, its real tokens, its number of prompt tokens."""
    for row in range(len(out.prompt)):
        prompt = np.asarray(out.prompt[row])[np.asarray(out.prompt_mask[row])]
        response = np.asarray(out.response[row])[np.asarray(out.response_mask[row])]
        yield row, np.concatenate([prompt, response]), len(prompt)


def test_greedy_is_the_argmax_of_full_forwards_without_padding(tiny, run):
    """Each token is the argmax after all before it, so by induction this is decoding step by step; prompts of 1 to 5 tokens."""
    out = run(temperature=0.0)(PROMPTS)
    weights = merged(tiny.params, tiny.lora, 2.0)
    for row, tokens, prompt in rows(out):
        logits = forward(weights, tiny.config, tokens)[1][prompt - 1 : -1]
        top_two = np.sort(logits, -1)[:, -2:]
        assert (top_two[:, 1] - top_two[:, 0]).min() > 1e-3, "a near tie proves nothing: choose other weights"
        np.testing.assert_array_equal(tokens[prompt:], logits.argmax(-1))
        np.testing.assert_allclose(out.logprobs[row, : len(tokens) - prompt], log_softmax(logits).max(-1), atol=1e-4)
    assert len(set(map(tuple, np.asarray(out.response)))) == 4


def test_left_padding_and_batching_change_no_token(run):
    """A prompt of one token as a batch of one, and the same as row 0 (which has the same key) behind four tokens of padding."""
    together = run()(PROMPTS)
    alone = run()(PromptBatch(PROMPTS.tokens[:1, 4:], PROMPTS.mask[:1, 4:]))
    np.testing.assert_array_equal(alone.response[0], together.response[0])
    np.testing.assert_allclose(alone.logprobs[0], together.logprobs[0], atol=2e-5)
    assert together.response_mask[0].sum() > 4


def test_a_row_does_not_depend_on_the_others(run):
    changed = PromptBatch(PROMPTS.tokens.at[1:].set(29 - PROMPTS.tokens[1:] % 29), PROMPTS.mask.at[1].set(True))
    one, other = run()(PROMPTS), run()(changed)
    np.testing.assert_array_equal(one.response[0], other.response[0])
    assert all(not np.array_equal(one.response[row], other.response[row]) for row in (1, 2, 3))


def test_sampler_and_learner_agree_on_log_probabilities(tiny, run):
    role = Role(lora=tiny.lora)
    learner = jax.jit(lambda out, temperature: response_logprobs(tiny.decoder, tiny.params, role, out, temperature, 1024)[0])
    for fields in ({"temperature": 0.7}, {"temperature": 1.3, "top_k": 4, "top_p": 0.9}):
        out = run(**fields)(PROMPTS, 3)
        mask = np.asarray(out.response_mask)
        assert mask.sum() > 8 and not mask.all()
        found = np.asarray(learner(out, fields["temperature"]))
        np.testing.assert_allclose(np.asarray(out.logprobs)[mask], found[mask], atol=1e-5)


def test_bfloat16_generates_and_agrees_with_its_learner(tiny):
    decoder = dataclasses.replace(tiny.decoder, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    role, config = Role(lora=tiny.lora), SamplingConfig(max_new_tokens=4)

    @jax.jit
    def both(key):
        out = generate(Sampler(decoder, config, (0,), PAD), role.variables(params), PROMPTS, key)
        return out, response_logprobs(decoder, params, role, out, 1.0, 1024)[0]

    out, learner = both(jax.random.key(0))
    mask = np.asarray(out.response_mask)
    assert out.logprobs.dtype == jnp.float32 and np.isfinite(out.logprobs).all()
    # The same sums in another order of 8-bit roundings: logits of order 5 agree to about 5 * 2^-8 each.
    assert np.abs(out.logprobs - learner)[mask].mean() < 0.1
