"""REINFORCE's losses: hand values, numpy in float64, the paper's sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import reinforce

policy_loss, value_loss = jax.jit(reinforce.policy_loss), jax.jit(reinforce.value_loss)

# Means of at most 35 float32 numbers of size up to about 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def test_by_hand():
    logprobs, values = jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[0.5, 1.0, 9.0]])
    returns, mask = jnp.array([[2.0, -1.0, 9.0]]), jnp.array([[True, True, False]])
    loss, gradient = jax.jit(jax.value_and_grad(reinforce.policy_loss))(logprobs, returns, values, mask)
    assert loss == (1.5 - 4) / 2
    np.testing.assert_array_equal(gradient, [[-0.75, 1, 0]])
    loss, gradient = jax.jit(jax.value_and_grad(reinforce.value_loss))(values, returns, mask)
    assert loss == (1.5**2 + 2**2) / 2
    np.testing.assert_array_equal(gradient, [[-1.5, 2, 0]])


def test_equals_the_papers_sums_per_episode_in_float64(case):
    logprobs, returns, values = (np.where(case.mask, x, 0).astype(np.float64) for x in (case.logprobs, case.returns, case.values))
    episodes = len(case.mask)
    found = policy_loss(case.logprobs, case.returns, case.values, case.mask, total=episodes)
    np.testing.assert_allclose(found, -(logprobs * (returns - values)).sum(axis=1).mean(), **TOLERANCE)
    found = value_loss(case.values, case.returns, case.mask, total=episodes)
    np.testing.assert_allclose(found, ((returns - values) ** 2).sum(axis=1).mean(), **TOLERANCE)


ALL_GRADIENTS = [
    (("logprobs", "returns", "values"), jax.jit(jax.grad(reinforce.policy_loss, argnums=(0, 1, 2)))),
    (("values", "returns"), jax.jit(jax.grad(reinforce.value_loss, argnums=(0, 1)))),
]


@pytest.mark.parametrize(("names", "gradients"), ALL_GRADIENTS, ids=["policy", "value"])
def test_gradients_reach_only_what_is_learned(case, names, gradients):
    learned, *fixed = jax.device_get(gradients(*(getattr(case, name) for name in names), case.mask))
    assert np.any(learned)
    assert not np.any(fixed)
