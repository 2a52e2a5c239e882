"""The next token: greedy, cut and free sampling, and the log-probability that is reported with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import log_softmax
from scipy import stats

from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.rollout.sampling import sample

pytestmark = pytest.mark.usefixtures("quick_compile")

LOGITS = np.array([1.0, 2.5, 0.0, -1.0, 2.0, -3.0])
ROWS = 20_000


def draw(logits=LOGITS, seed=0, **config):
    tokens, logprobs = sample(jnp.tile(jnp.asarray(logits, jnp.float32), (ROWS, 1)), jax.random.key(seed), SamplingConfig(**config))
    return np.asarray(tokens), np.asarray(logprobs)


def assert_follows(tokens, probabilities):
    """Chi-square at 0.1%; the seeds are fixed, so this does not flicker. Tokens of probability 0 must not appear at all."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    kept = probabilities > 0
    assert not counts[~kept].any()
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], ROWS * probabilities[kept] / probabilities.sum()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature):
    tokens, logprobs = draw(temperature=temperature)
    expected = log_softmax(LOGITS / temperature)
    assert_follows(tokens, np.exp(expected))
    np.testing.assert_allclose(logprobs, expected[tokens], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        # Probabilities 0.507, 0.307, 0.113, 0.042, 0.015, ... of tokens 1, 4, 0, 2, 3, 5.
        ({"top_p": 0.50}, [1]),
        ({"top_p": 0.52}, [1, 4]),
        ({"top_p": 0.85}, [0, 1, 4]),
        ({"top_k": 2, "top_p": 0.85}, [1, 4]),
        # Among the two that top-k leaves, token 1 holds 0.62.
        ({"top_k": 2, "top_p": 0.60}, [1]),
    ],
)
def test_tail_is_cut_and_the_rest_keeps_its_proportions(config, kept):
    tokens, logprobs = draw(**config)
    probabilities = np.zeros(6)
    probabilities[kept] = np.exp(LOGITS[kept])
    assert_follows(tokens, probabilities)
    np.testing.assert_allclose(logprobs, log_softmax(LOGITS)[tokens], atol=1e-6)  # of the whole distribution


def test_top_p_counts_probability_at_the_temperature():
    """At temperature 4 the most likely token holds less than 0.4."""
    assert set(draw(top_p=0.4, temperature=4.0)[0]) == {1, 4}
    assert set(draw(top_p=0.4, temperature=1.0)[0]) == {1}


@pytest.mark.parametrize("config", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}])
def test_greedy_in_three_ways(config):
    logits = jax.random.normal(jax.random.key(1), (64, 31))
    tokens, logprobs = sample(logits, jax.random.key(2), SamplingConfig(**config))
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, -1))
    np.testing.assert_allclose(logprobs, log_softmax(np.asarray(logits, np.float64)).max(-1), atol=1e-6)


def test_half_precision_logits_are_reported_in_float32():
    tokens, logprobs = sample(jnp.asarray(LOGITS, jnp.bfloat16)[None], jax.random.key(0), SamplingConfig())
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs[0], log_softmax(LOGITS)[tokens[0]], atol=1e-6)  # these logits are exact in bfloat16


@pytest.mark.parametrize("vocabulary", [5, 128, 1000])
def test_draws_are_those_of_jax(vocabulary):
    """Whatever the order in which the greatest number is looked for; of equal ones the first."""
    key = jax.random.key(3)
    logits = jnp.round(jax.random.normal(key, (64, vocabulary)))
    np.testing.assert_array_equal(sample(logits, key, SamplingConfig())[0], jax.random.categorical(key, logits))
    greedy = sample(logits, key, SamplingConfig(temperature=0.0))[0]
    np.testing.assert_array_equal(greedy, np.argmax(np.asarray(logits), axis=-1))
    assert len(set(np.asarray(greedy) // 128)) == -(-vocabulary // 128)
