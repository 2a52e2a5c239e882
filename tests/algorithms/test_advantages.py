"""GAE and returns: hand values, identities, and plain loops in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import advantages as algorithms

gae, returns_to_go = jax.jit(algorithms.gae), jax.jit(algorithms.returns_to_go)
explained_variance = jax.jit(algorithms.explained_variance)

# Seven steps over float32 numbers of size 1 that grow to about 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def loop_gae(rewards, values, mask, gamma, lam):
    """The definition: A_t = sum_l (gamma lam)^l delta_{t+l}, over each row's real tokens, in float64."""
    advantages = np.zeros(rewards.shape)
    for row in range(len(rewards)):
        real = np.flatnonzero(mask[row])
        r, v = rewards[row, real].astype(np.float64), values[row, real].astype(np.float64)
        delta = r + gamma * np.append(v, 0)[1:] - v
        for t, position in enumerate(real):
            advantages[row, position] = sum((gamma * lam) ** i * d for i, d in enumerate(delta[t:]))
    return advantages, np.where(mask, advantages + values, 0)


def test_by_hand():
    """gamma 1/2, lam 1/2: all numbers are exact in binary."""
    rewards = jnp.array([[1.0, 2.0, 4.0, 99.0]])
    values = jnp.array([[2.0, 4.0, 8.0, 99.0]])
    mask = jnp.array([[True, True, True, False]])
    # delta: 4 - 8 = -4 (no value follows the last token); 2 + 4 - 4 = 2; 1 + 2 - 2 = 1
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    np.testing.assert_array_equal(advantages, [[1 + 0.25, 2 - 1, -4, 0]])
    np.testing.assert_array_equal(returns, [[3.25, 5, 4, 0]])
    np.testing.assert_array_equal(returns_to_go(rewards, mask, 0.5), [[1 + 1 + 1, 2 + 2, 4, 0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.7)])
def test_equals_the_definition_in_float64(case, gamma, lam):
    advantages, returns = jax.device_get(gae(case.rewards, case.values, case.mask, gamma, lam))
    expected_advantages, expected_returns = loop_gae(case.rewards, case.values, case.mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected_advantages, **TOLERANCE)
    np.testing.assert_allclose(returns, expected_returns, **TOLERANCE)
    assert not np.any(advantages[~case.mask])
    assert not np.any(returns[~case.mask])


def test_lambda_one_is_return_minus_value(case):
    advantages, returns = gae(case.rewards, case.values, case.mask, 0.9, 1.0)
    expected = returns_to_go(case.rewards, case.mask, 0.9)
    np.testing.assert_allclose(returns, expected, **TOLERANCE)
    np.testing.assert_allclose(advantages, expected - np.where(case.mask, case.values, 0), **TOLERANCE)


def test_lambda_zero_is_the_temporal_difference():
    rewards, values = jnp.array([[0.7, -1.6, 0.3]]), jnp.array([[0.5, 0.25, -0.5]])
    advantages, _ = gae(rewards, values, jnp.ones((1, 3), bool), 0.5, 0.0)
    np.testing.assert_allclose(advantages, [[0.7 + 0.125 - 0.5, -1.6 - 0.25 - 0.25, 0.3 + 0.5]], rtol=1e-6)


def test_returns_with_gamma_one_are_suffix_sums(case):
    rewards = np.where(case.mask, case.rewards, 0).astype(np.float64)
    expected = np.where(case.mask, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], 0)
    np.testing.assert_allclose(returns_to_go(case.rewards, case.mask, 1.0), expected, **TOLERANCE)


def test_perfect_values_leave_no_advantage(case):
    values = returns_to_go(case.rewards, case.mask, 0.9)
    advantages, returns = gae(case.rewards, values, case.mask, 0.9, 0.95)
    np.testing.assert_allclose(advantages, 0, atol=1e-5)
    assert float(explained_variance(values, returns, case.mask)) == pytest.approx(1, abs=1e-5)


def test_explained_variance(case):
    values, returns = (x[case.mask].astype(np.float64) for x in (case.values, case.returns))
    found = explained_variance(case.values, case.returns, case.mask)
    assert float(found) == pytest.approx(1 - np.var(returns - values) / np.var(returns), rel=1e-4, abs=1e-4)
    constant = jnp.full(case.mask.shape, 3.0)
    assert float(explained_variance(constant, case.returns, case.mask)) == pytest.approx(0, abs=1e-5)
    assert float(explained_variance(case.values, jnp.full(case.mask.shape, 0.7), case.mask)) == 0
    assert float(explained_variance(case.values, case.returns, np.zeros_like(case.mask))) == 0
    for bad in (np.nan, np.inf):
        assert np.isnan(explained_variance(case.values, np.where(case.mask, case.returns, 0) + bad, case.mask))
