"""PPO's losses: hand values, where gradients flow and where not, and numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import ppo, reinforce

# Compiled once per shape: faster than op by op, and how training runs them.
policy_loss, value_loss = jax.jit(ppo.policy_loss), jax.jit(ppo.value_loss)
policy_gradient = jax.jit(jax.grad(ppo.policy_loss, has_aux=True))

# Means of at most 35 float32 numbers of size up to about 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def test_policy_loss_by_hand():
    """Ratios 2, 2, 1/2, 1/2 with advantages 1, -1, 1, -1 and c = 0.25, and one masked token."""
    logprobs = jnp.log(jnp.array([[2.0, 2.0, 0.5, 0.5, 7.0]]))
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 7.0]])
    mask = jnp.array([[True, True, True, True, False]])
    loss, stats = policy_loss(logprobs, jnp.zeros((1, 5)), advantages, mask, 0.25)
    assert float(loss) == pytest.approx((-1.25 + 2 - 0.5 + 0.75) / 4)
    assert float(stats["policy/clipfrac_avg"]) == 0.5
    assert float(stats["val/ratio"]) == pytest.approx(1.25)
    assert float(stats["val/ratio_var"]) == pytest.approx((1 + 1 + 0.25 + 0.25) / 4)
    assert float(stats["policy/approxkl_avg"]) == pytest.approx(0.5 * np.log(2) ** 2)


def test_policy_loss_equals_numpy_in_float64(case):
    loss, stats = policy_loss(case.logprobs, case.old_logprobs, case.advantages, case.mask, 0.2)
    new, old, advantage = (x[case.mask].astype(np.float64) for x in (case.logprobs, case.old_logprobs, case.advantages))
    ratio = np.exp(new - old)
    terms = -advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.2)
    np.testing.assert_allclose(loss, np.maximum(*terms).mean(), **TOLERANCE)
    np.testing.assert_allclose(stats["policy/clipfrac_avg"], (terms[1] > terms[0]).mean(), **TOLERANCE)
    np.testing.assert_allclose(stats["policy/approxkl_avg"], ((new - old) ** 2).mean() / 2, **TOLERANCE)
    np.testing.assert_allclose(stats["val/ratio"], ratio.mean(), **TOLERANCE)
    np.testing.assert_allclose(stats["val/ratio_var"], ((ratio - 1) ** 2).mean(), **TOLERANCE)


def test_at_ratio_one_the_gradient_is_the_policy_gradient(case):
    """And that is REINFORCE's with the same advantages. The ratio is exactly 1, so the two agree to the last bits."""
    gradient, stats = policy_gradient(case.logprobs, case.logprobs, case.advantages, case.mask, 0.2)
    np.testing.assert_allclose(gradient, np.where(case.mask, -case.advantages, 0) / case.mask.sum(), rtol=1e-6)
    vanilla = jax.jit(jax.grad(reinforce.policy_loss))(case.logprobs, case.advantages, np.zeros_like(case.values), case.mask)
    np.testing.assert_allclose(gradient, vanilla, rtol=1e-6)
    assert float(stats["val/ratio"]) == 1
    assert not any(float(stats[name]) for name in ("policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio_var"))


def test_policy_gradient_stops_outside_the_clip_only_where_it_would_go_on():
    """Pushing a ratio further out gives exactly no gradient; pulling it back gives the full one, -A ratio / n."""
    logprobs = jnp.log(jnp.array([[2.0, 2.0, 0.5, 0.5]]))
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0]])
    gradient, _ = policy_gradient(logprobs, jnp.zeros((1, 4)), advantages, jnp.ones((1, 4), bool), 0.2)
    np.testing.assert_allclose(gradient, [[0, 2 / 4, -0.5 / 4, 0]], rtol=1e-6)
    assert gradient[0, 0] == gradient[0, 3] == 0


def test_value_loss_by_hand():
    """Old value 0, c = 1/2. V = 2: clipped to 1/2. Target 3: the clipped term (2.5^2) is larger; target 0: it is not."""
    values, old = jnp.array([[2.0, 2.0, 0.25, 9.0]]), jnp.zeros((1, 4))
    returns = jnp.array([[3.0, 0.0, 1.25, 0.0]])
    mask = jnp.array([[True, True, True, False]])
    (loss, stats), gradient = jax.jit(jax.value_and_grad(ppo.value_loss, has_aux=True))(values, old, returns, mask, 0.5)
    assert float(loss) == pytest.approx(0.5 * (6.25 + 4 + 1) / 3)
    assert float(stats["val/clipfrac_avg"]) == pytest.approx(1 / 3)
    np.testing.assert_allclose(gradient, [[0, 2 / 3, -1 / 3, 0]], rtol=1e-6)


def test_value_loss_equals_numpy_in_float64(case):
    loss, stats = value_loss(case.values, case.old_values, case.returns, case.mask, 0.2)
    value, old, target = (x[case.mask].astype(np.float64) for x in (case.values, case.old_values, case.returns))
    terms = (value - target) ** 2, (np.clip(value, old - 0.2, old + 0.2) - target) ** 2
    np.testing.assert_allclose(loss, 0.5 * np.maximum(*terms).mean(), **TOLERANCE)
    np.testing.assert_allclose(stats["val/clipfrac_avg"], (terms[1] > terms[0]).mean(), **TOLERANCE)


def test_values_within_the_clip_are_never_counted_as_clipped(case):
    """Not even by rounding: a value near 0 is lost in its difference from an old one of size 1."""
    _, stats = value_loss(0.01 * case.values, case.old_values, np.zeros_like(case.values), case.mask, 10.0)
    assert float(stats["val/clipfrac_avg"]) == 0


ALL_GRADIENTS = [
    (("logprobs", "old_logprobs", "advantages"), jax.jit(jax.grad(ppo.policy_loss, argnums=(0, 1, 2), has_aux=True))),
    (("values", "old_values", "returns"), jax.jit(jax.grad(ppo.value_loss, argnums=(0, 1, 2), has_aux=True))),
]


@pytest.mark.parametrize(("names", "gradients"), ALL_GRADIENTS, ids=["policy", "value"])
def test_gradients_reach_only_what_is_learned(case, names, gradients):
    (learned, *fixed), _ = jax.device_get(gradients(*(getattr(case, name) for name in names), case.mask, 0.2))
    assert np.any(learned)
    assert not np.any(fixed)
