"""Group baselines: hand values, identities, numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import group, kl, ppo
from pe_rlhf_jax.algorithms.masked import masked_sum

SCORES = np.random.default_rng(0).normal(size=24).astype(np.float32)
# Sums of at most 6 float32 numbers of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def test_by_hand():
    scores = jnp.array([1.0, 2.0, 6.0, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(group.leave_one_out(scores, 3), [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    deviation = np.sqrt((4 + 1 + 9) / 2)
    expected = np.array([-2, -1, 3]) / (deviation + 1e-4)
    np.testing.assert_allclose(group.group_normalised(scores, 3), [*expected, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(group.group_normalised(scores, 3, scale=False), [-2, -1, 3, 0, 0, 0])
    assert group.spread(scores, 3) == pytest.approx(deviation / 2)


@pytest.mark.parametrize("k", [3, 5, 6, 7, 12])
def test_equal_scores_teach_nothing_however_large_they_are(k):
    for score in np.random.default_rng(k).uniform(-3000, 3000, 200).astype(np.float32):
        np.testing.assert_array_equal(group.group_normalised(jnp.full(k, score), k), 0)


def test_two_responses_are_each_others_baseline():
    pairs = SCORES.reshape(-1, 2)
    np.testing.assert_allclose(group.leave_one_out(jnp.asarray(SCORES), 2), (pairs - pairs[:, ::-1]).ravel(), **TOLERANCE)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_against_float64(k):
    rows = SCORES.astype(np.float64).reshape(-1, k)
    others = np.array([[np.mean(np.delete(row, i)) for i in range(k)] for row in rows])
    np.testing.assert_allclose(group.leave_one_out(jnp.asarray(SCORES), k), (rows - others).ravel(), **TOLERANCE)
    normalised = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group.group_normalised(jnp.asarray(SCORES), k), normalised.ravel(), **TOLERANCE)


@pytest.mark.parametrize("k", [2, 4])
def test_what_the_two_baselines_share(k):
    """Leave-one-out is the deviation from the mean times k / (k - 1); both sum to 0 in a group, and a prompt's own level never matters."""
    scores = jnp.asarray(SCORES)
    centred = group.group_normalised(scores, k, scale=False)
    np.testing.assert_allclose(group.leave_one_out(scores, k), centred * k / (k - 1), **TOLERANCE)
    np.testing.assert_allclose(np.asarray(centred).reshape(-1, k).sum(1), 0, atol=1e-5)
    levels = jnp.repeat(jnp.arange(len(SCORES) // k) * 3.0, k)
    for advantages in (group.leave_one_out, group.group_normalised):
        np.testing.assert_allclose(advantages(scores + levels, k), advantages(scores, k), rtol=1e-3, atol=1e-4)  # digits lost to the level


def test_the_own_score_never_enters_the_baseline():
    """The derivative of a leave-one-out advantage by its own score is exactly 1."""
    jacobian = jax.jacobian(lambda s: group.leave_one_out(s, 4))(jnp.asarray(SCORES))
    np.testing.assert_array_equal(np.diag(jacobian), 1.0)


@pytest.mark.parametrize(("size", "rows"), [(1, 4), (3, 4)])
def test_groups_that_cannot_be(size, rows):
    for function in (group.leave_one_out, group.group_normalised):
        with pytest.raises(ValueError, match="expected"):
            function(jnp.zeros(rows), size)


def test_tokens_get_their_responses_advantage(case):
    advantages = jnp.arange(len(case.mask)) + 1.0
    found = np.asarray(group.to_tokens(advantages, case.mask))
    assert np.all(found[~case.mask] == 0)
    np.testing.assert_array_equal(found[case.mask], np.broadcast_to(advantages[:, None], case.mask.shape)[case.mask])


def test_grpos_penalty_pulls_towards_the_reference():
    """k3 in the loss, sampled from the policy: its expected gradient is that of KL(reference || policy), and 0 at the reference."""
    reference = jnp.array([0.2, -0.4, 0.9, 0.0])
    mask = jnp.ones((4, 1), bool)

    def penalty(logits, sampler):
        logprobs, ref = jax.nn.log_softmax(logits)[:, None], jax.nn.log_softmax(reference)[:, None]
        weight = jax.lax.stop_gradient(jax.nn.softmax(sampler))[:, None]
        return masked_sum(weight * kl.kl_per_token(logprobs, ref, "k3"), mask)

    def divergence(logits):
        ref = jax.nn.log_softmax(reference)
        return jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(logits)))

    logits = jnp.array([0.5, 0.1, -0.3, 1.0])
    np.testing.assert_allclose(jax.grad(penalty)(logits, logits), jax.grad(divergence)(logits), atol=1e-6)
    np.testing.assert_allclose(jax.grad(penalty)(reference, reference), 0, atol=1e-7)


def test_at_the_sampling_policy_the_clipped_loss_is_the_policy_gradient(case):
    """Ratio 1: the gradient with respect to each log-probability is minus its advantage over the number of tokens."""
    advantages = group.to_tokens(group.leave_one_out(jnp.arange(len(case.mask) // 2 * 2) * 0.3, 2), case.mask[: len(case.mask) // 2 * 2])
    mask, logprobs = case.mask[: len(advantages)], case.logprobs[: len(advantages)]
    gradient = jax.grad(lambda lp: ppo.policy_loss(lp, logprobs, advantages, mask, 0.2)[0])(jnp.asarray(logprobs))
    np.testing.assert_allclose(gradient, np.where(mask, -advantages / mask.sum(), 0), rtol=1e-5, atol=1e-7)
