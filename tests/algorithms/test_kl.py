"""KL estimators, reward shaping and the adaptive coefficient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import kl, reinforce
from pe_rlhf_jax.algorithms.advantages import gae, returns_to_go

kl_per_token = jax.jit(kl.kl_per_token, static_argnums=2)
token_rewards = jax.jit(kl.token_rewards)
adaptive_kl_coef = jax.jit(kl.adaptive_kl_coef)


def test_estimators_by_hand():
    logprobs, reference = jnp.log(jnp.array([[0.5, 0.2]])), jnp.log(jnp.array([[0.25, 0.4]]))
    np.testing.assert_allclose(kl_per_token(logprobs, reference, "k1"), np.log([[2, 0.5]]), rtol=1e-6)
    expected = [[0.5 - 1 + np.log(2), 2 - 1 - np.log(2)]]
    np.testing.assert_allclose(kl_per_token(logprobs, reference, "k3"), expected, rtol=1e-6)


def test_estimators_are_zero_at_equality(case):
    for estimator in ("k1", "k3"):
        assert not np.any(kl_per_token(case.logprobs, case.logprobs, estimator))


def test_k3_is_exact_for_small_differences():
    """k3 is d^2 / 2 there: 5e-9 for d = 1e-4, far below the rounding (6e-8) of exp(-d) - 1 taken naively."""
    d = jnp.array([[1e-4, -1e-4]])
    np.testing.assert_allclose(kl_per_token(d, jnp.zeros_like(d), "k3"), [[5e-9, 5e-9]], rtol=1e-2)


def test_estimators_have_the_kl_as_mean_but_only_k1_has_its_gradient():
    """Exact expectations over five outcomes, in float32: sums of five numbers of size 1, so 1e-5 is ample."""
    theta, reference = jax.random.normal(jax.random.key(0), (2, 5))
    reference = jax.nn.log_softmax(reference)
    outcomes = jnp.arange(5)[:, None]

    @jax.jit
    def exact(theta):
        logprobs = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - reference))

    @functools.partial(jax.jit, static_argnums=1)
    def mean(theta, estimator):
        logprobs = jax.nn.log_softmax(theta)
        estimates = kl_per_token(logprobs[outcomes], reference[outcomes], estimator)[:, 0]
        return jnp.sum(jnp.exp(logprobs) * estimates)

    @functools.partial(jax.jit, static_argnums=1)
    def score_gradient(theta, estimator):  # E[k grad log pi]
        logprobs = jax.nn.log_softmax(theta)
        estimates = kl_per_token(logprobs, reference, estimator)
        return jax.grad(lambda t: jnp.sum(jnp.exp(logprobs) * estimates * jax.nn.log_softmax(t)))(theta)

    for estimator in ("k1", "k3"):
        np.testing.assert_allclose(mean(theta, estimator), exact(theta), rtol=1e-5)
    np.testing.assert_allclose(score_gradient(theta, "k1"), jax.grad(exact)(theta), atol=1e-5)
    reverse = jax.grad(lambda t: jnp.sum(jnp.exp(reference) * (reference - jax.nn.log_softmax(t))))(theta)
    np.testing.assert_allclose(score_gradient(theta, "k3"), jax.grad(exact)(theta) - reverse, atol=1e-5)
    near = reference + 0.01 * theta
    force = {e: float(jnp.linalg.norm(score_gradient(near, e))) for e in ("k1", "k3")}
    assert force["k3"] < 0.05 * force["k1"]


def test_unknown_estimator():
    with pytest.raises(ValueError, match=r"'k1' or 'k3', found 'k2'"):
        kl_per_token(jnp.zeros((1, 1)), jnp.zeros((1, 1)), "k2")


def test_token_rewards_by_hand():
    mask = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
    penalties = jnp.array([[1.0, 2.0, 100.0], [0.0, -1.0, 3.0], [100.0, 100.0, 100.0]])
    found = token_rewards(jnp.array([10.0, -20.0, jnp.nan]), penalties, mask, kl_coef=0.5, score_coef=0.25)
    np.testing.assert_array_equal(found, [[-0.5, -1.0 + 2.5, 0], [0, 0.5, -1.5 - 5], [0, 0, 0]])


def test_token_rewards_sum_to_the_papers_episode_reward(case):
    """(1 - beta) r - beta log(pi / reference), for any mask that has a real token."""
    beta, rows = 0.05, case.mask.any(axis=1)
    penalties = kl_per_token(case.logprobs, case.ref_logprobs, "k1")
    rewards = token_rewards(case.scores, penalties, case.mask, kl_coef=beta, score_coef=1 - beta)
    found = np.asarray(rewards).sum(axis=1)
    ratio = ((case.logprobs.astype(np.float64) - case.ref_logprobs) * case.mask).sum(axis=1)
    expected = (1 - beta) * case.scores.astype(np.float64) - beta * ratio
    np.testing.assert_allclose(found[rows], expected[rows], rtol=1e-5, atol=1e-6)  # 7 float32 numbers of size 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fractional_rewards_arrive_unrounded(dtype):
    """0.7 and -1.6 stay themselves, to the bit, from score to gradient. As integers they would be 0 and -1."""
    scores = np.array([0.7, -1.6], dtype)
    exact = scores.astype(np.float32)
    mask = jnp.array([[True, True, True, False], [True, False, False, False]])
    zeros = jnp.zeros(mask.shape)
    rewards = token_rewards(scores, zeros, mask, kl_coef=0.05)
    assert rewards.dtype == jnp.float32
    np.testing.assert_array_equal(rewards, [[0, 0, exact[0], 0], [exact[1], 0, 0, 0]])
    advantages, returns = jax.jit(gae)(rewards, zeros, mask, gamma=1.0, lam=1.0)
    expected = np.where(mask, exact[:, None], 0)
    np.testing.assert_array_equal(advantages, expected)
    np.testing.assert_array_equal(returns, expected)
    np.testing.assert_array_equal(returns_to_go(rewards, mask, gamma=1.0), expected)
    gradient = jax.jit(jax.grad(reinforce.policy_loss))(zeros, returns, zeros, mask)
    np.testing.assert_array_equal(gradient, -expected / 4)  # 4 real tokens: a power of two divides exactly


def test_adaptive_coefficient_by_hand():
    def step(observed, target=6.0, horizon=100, episodes=50):
        return float(adaptive_kl_coef(0.2, observed, target, horizon, episodes))

    assert step(6.0) == pytest.approx(0.2)
    assert step(6.6) == pytest.approx(0.2 * (1 + 0.1 * 0.5))  # tolerance: approx's 1e-6, some ulp of float32
    assert step(5.4) == pytest.approx(0.2 * (1 - 0.1 * 0.5))
    assert [step(60.0), step(7.2)] == pytest.approx([0.2 * 1.1] * 2)  # the error is clipped at 0.2
    assert [step(0.0), step(-5.0)] == pytest.approx([0.2 * 0.9] * 2)
    assert step(0.0, episodes=10_000) == pytest.approx(0.2 * 0.8)  # never negative
    assert step(float("nan")) == pytest.approx(0.2)


def test_adaptive_coefficient_settles_at_the_target():
    """A policy whose KL is 1 / coef settles at coef = 1 / target; 400 steps shrink the error by (1 - 0.1)^400."""
    coef = jnp.float32(3.0)
    for _ in range(400):
        coef = adaptive_kl_coef(coef, 1.0 / coef, 5.0, horizon=1000, episodes=100)
    assert float(coef) == pytest.approx(0.2, rel=1e-4)
