"""Log-probabilities, entropies, scores and values of given sequences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import forward, log_softmax, merged

from pe_rlhf_jax.models.decoder import unembed
from pe_rlhf_jax.models.heads import init_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import response_logprobs, response_scores, response_values, sequence_score, token_logprobs
from pe_rlhf_jax.types import Rollout

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
HIDDEN = RNG.standard_normal((3, 7, 16)).astype(np.float32)
TARGETS = RNG.integers(0, 31, (3, 7))
MATRIX = RNG.standard_normal((31, 16)).astype(np.float32)
TEMPERATURE = 0.7


def scored(hidden, matrix, chunk):
    return token_logprobs(hidden, TARGETS, lambda h: h @ matrix.T, TEMPERATURE, chunk)


def test_token_logprobs_and_entropy_equal_the_reference():
    expected = log_softmax(HIDDEN.astype(np.float64) @ MATRIX.T.astype(np.float64) / TEMPERATURE)
    logprobs, entropy = scored(HIDDEN, MATRIX, 1000)
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, TARGETS[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(-1), atol=1e-5)


def test_chunks_change_neither_values_nor_gradients():
    """Chunks smaller than the batch, of two tokens a row (which do not divide the length), and just short of the whole."""
    weights = RNG.standard_normal((2, 3, 7))

    def loss(hidden, matrix, chunk):
        logprobs, entropy = scored(hidden, matrix, chunk)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy), (logprobs, entropy)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    whole = grad(HIDDEN, MATRIX, 1000)
    for chunk in (1, 6, 20):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grad(HIDDEN, MATRIX, chunk), whole)


def test_gradient_equals_the_reference():
    """d log p(target) / d logits = (onehot - p) / temperature, through chunks."""
    matrix = MATRIX.astype(np.float64)
    probabilities = np.exp(log_softmax(HIDDEN @ matrix.T / TEMPERATURE))
    expected = (np.eye(31)[TARGETS] - probabilities) / TEMPERATURE @ matrix
    found = jax.grad(lambda h: scored(h, MATRIX, 6)[0].sum())(HIDDEN)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_chunks_bound_the_logits_in_memory():
    """Compiled with its gradient, 8 chunks need less than the logits of all tokens; one chunk needs more."""
    hidden, matrix = jax.ShapeDtypeStruct((8, 64, 16), jnp.float32), jax.ShapeDtypeStruct((2048, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def temporary(chunk):
        def loss(hidden, targets, matrix):
            return token_logprobs(hidden, targets, lambda h: h @ matrix.T, 1.0, chunk)[0].sum()

        return jax.jit(jax.grad(loss)).lower(hidden, targets, matrix).compile().memory_analysis().temp_size_in_bytes

    logits = 8 * 64 * 2048 * 4
    assert temporary(64) < logits / 2 and temporary(512) >= logits


@pytest.fixture(scope="module")
def rollout():
    """Left-padded prompts, responses that end early."""
    response_mask = np.arange(5) < np.array([[5], [2], [4]])
    prompt_mask = np.arange(4) >= np.array([[0], [3], [1]])
    return Rollout(
        prompt=jnp.asarray(RNG.integers(0, 31, (3, 4))),
        prompt_mask=jnp.asarray(prompt_mask),
        response=jnp.asarray(RNG.integers(0, 31, (3, 5))),
        response_mask=jnp.asarray(response_mask),
        logprobs=jnp.zeros((3, 5)),
        ended=jnp.ones(3, bool),
    )


def sequence(rollout):
    """Prompt and response as one sequence, and its mask."""
    pairs = ((rollout.prompt, rollout.response), (rollout.prompt_mask, rollout.response_mask))
    return tuple(jnp.concatenate(pair, axis=1) for pair in pairs)


def real_rows(rollout):
    """Row, its real tokens, and how many of them are the prompt's."""
    tokens, mask = (np.asarray(x) for x in sequence(rollout))
    for row in range(len(tokens)):
        yield row, tokens[row][mask[row]], int(rollout.prompt_mask[row].sum())


def test_response_logprobs_equal_the_reference(tiny, rollout):
    found = jax.jit(lambda role: response_logprobs(tiny.decoder, tiny.params, role, rollout, TEMPERATURE, 6))
    role = Role(lora=tiny.lora)
    for tried, weights in [(Role(), tiny.params), (role, merged(tiny.params, tiny.lora, 2.0))]:
        logprobs, entropy = found(tried)
        assert logprobs.shape == entropy.shape == (3, 5)
        for row, tokens, prompt in real_rows(rollout):
            expected = log_softmax(forward(weights, tiny.config, tokens)[1] / TEMPERATURE)[prompt - 1 : -1]
            count = len(tokens) - prompt
            np.testing.assert_allclose(logprobs[row, :count], expected[np.arange(count), tokens[prompt:]], atol=1e-4)
            np.testing.assert_allclose(entropy[row, :count], -(np.exp(expected) * expected).sum(-1), atol=1e-4)


def test_responses_in_one_row_are_what_they_are_alone(tiny):
    """Two and four of four responses behind one left-padded prompt: log-probabilities, entropies, and scores at the last tokens."""
    once = lambda x: jnp.repeat(jnp.asarray(x), 4, axis=0)  # noqa: E731
    rollout = Rollout(
        prompt=once(RNG.integers(0, 31, (2, 4))),
        prompt_mask=once(np.arange(4) >= np.array([[0], [3]])),
        response=jnp.asarray(RNG.integers(0, 31, (8, 5))),
        response_mask=jnp.asarray(np.arange(5) < np.array([5, 2, 4, 1, 3, 3, 1, 5])[:, None]),
        logprobs=jnp.zeros((8, 5)),
        ended=jnp.ones(8, bool),
    )
    role = Role(lora=tiny.lora, head=init_head(jax.random.key(0), 16))

    def of(answers):
        logprobs, entropy = response_logprobs(tiny.decoder, tiny.params, role, rollout, TEMPERATURE, 6, answers)
        return *(x[rollout.response_mask] for x in (logprobs, entropy)), response_scores(tiny.decoder, tiny.params, role, rollout, answers)

    alone = of(1)
    tokens, mask = sequence(rollout)
    np.testing.assert_allclose(alone[2], sequence_score(tiny.decoder, tiny.params, role, tokens, mask), rtol=1e-5, atol=1e-6)
    for answers in (2, 4):
        for found, expected in zip(of(answers), alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_values_are_read_before_each_response_token(tiny, rollout):
    head = init_head(jax.random.key(0), 16)
    values = jax.jit(lambda role: response_values(tiny.decoder, tiny.params, role, rollout))(Role(head=head))
    for row, tokens, prompt in real_rows(rollout):
        hidden = forward(tiny.params, tiny.config, tokens)[0]
        expected = (hidden @ np.asarray(head["kernel"], np.float64))[prompt - 1 : -1, 0]
        np.testing.assert_allclose(values[row, : len(expected)], expected, atol=2e-5)


def test_score_is_read_at_the_last_real_token_whatever_the_padding(tiny):
    head = {"kernel": init_head(jax.random.key(0), 16)["kernel"], "bias": jnp.array([0.25])}
    role = Role(lora=tiny.lora, head=head)
    weights = merged(tiny.params, tiny.lora, 2.0)
    text = np.array([4, 8, 15, 16])
    tokens, mask = np.full((3, 7), 23), np.zeros((3, 7), bool)
    for row, left in enumerate((0, 3, 2)):
        tokens[row, left : left + 4], mask[row, left : left + 4] = text, True
    score = jax.jit(lambda role: sequence_score(tiny.decoder, tiny.params, role, tokens, mask))(role)
    expected = forward(weights, tiny.config, text)[0][-1] @ np.asarray(head["kernel"], np.float64)[:, 0] + 0.25
    np.testing.assert_allclose(score, np.full(3, expected), atol=2e-5)


def test_score_draws_dropout_from_its_key(tiny):
    decoder = dataclasses.replace(tiny.decoder, lora=tiny.decoder.lora.model_copy(update={"lora_dropout": 0.5}))
    role = Role(lora=tiny.lora, head=init_head(jax.random.key(0), 16))
    tokens, mask = jnp.arange(5)[None], jnp.ones((1, 5), bool)
    score = jax.jit(lambda key: sequence_score(decoder, tiny.params, role, tokens, mask, False, key)[0])
    values = [float(score(jax.random.key(seed))) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_unembed_reads_the_right_matrix(tiny, untied):
    hidden = np.eye(16, dtype=np.float32)
    np.testing.assert_allclose(unembed(tiny.params, hidden), tiny.params["embed"].T, atol=1e-6)
    np.testing.assert_allclose(unembed(untied.params, hidden), untied.params["lm_head"].T, atol=1e-6)
