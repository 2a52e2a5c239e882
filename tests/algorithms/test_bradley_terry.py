"""The preference loss, and the cross-entropy of supervised fine-tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import reward, sft

# Compiled once per shape: faster than op by op, and how training runs them.
bradley_terry, cross_entropy = jax.jit(reward.bradley_terry), jax.jit(sft.cross_entropy)


def test_by_hand():
    """Differences ln 3, 0 and -ln 3: probabilities 3/4, 1/2, 1/4."""
    chosen, rejected = jnp.array([np.log(3), 2.0, 1.0]), jnp.array([0.0, 2.0, 1.0 + np.log(3)])
    loss, stats = bradley_terry(chosen, rejected)
    assert float(loss) == pytest.approx(-np.log(0.75 * 0.5 * 0.25) / 3)
    assert float(stats["accuracy"]) == 0.5  # right, tie, wrong
    assert float(stats["margin"]) == pytest.approx(0, abs=1e-6)
    assert float(stats["mean_reward"]) == pytest.approx((2 * np.log(3) + 6) / 6)
    gradient, _ = jax.grad(bradley_terry, has_aux=True)(chosen, rejected)
    np.testing.assert_allclose(gradient, [-0.25 / 3, -0.5 / 3, -0.75 / 3], rtol=1e-5)


def test_equal_scores_cost_ln_2_and_constants_do_not_matter(case):
    loss, _ = bradley_terry(case.scores, case.scores)
    assert float(loss) == pytest.approx(np.log(2))
    other = case.returns[:, 0]
    np.testing.assert_allclose(
        bradley_terry(case.scores + 4, other + 4)[0], bradley_terry(case.scores, other)[0], rtol=1e-5
    )  # adding 4 rounds scores by 2e-7


def test_margin_centering_and_weights_in_float64(case):
    chosen, rejected = case.scores, case.returns[:, 0]
    margin, weight = np.abs(case.values[:, 0]), np.array([1, 0, 0.5, 1, 0.25], np.float32)
    found, stats = bradley_terry(chosen, rejected, margin=margin, center_coef=0.01, weight=weight)
    c, r, m, w = (x.astype(np.float64) for x in (chosen, rejected, margin, weight))
    each = np.log1p(np.exp(-(c - r - m))) + 0.01 * (c + r) ** 2
    np.testing.assert_allclose(found, (w * each).sum() / w.sum(), rtol=1e-5)  # five float32 numbers
    np.testing.assert_allclose(stats["accuracy"], (w * (c > r)).sum() / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(stats["margin"], (w * (c - r)).sum() / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(stats["mean_reward"], (w * (c + r)).sum() / w.sum() / 2, rtol=1e-5)


def test_a_margin_asks_for_more_but_does_not_change_the_accuracy():
    chosen, rejected = jnp.array([1.0]), jnp.array([0.5])
    plain, asked = (bradley_terry(chosen, rejected, margin=m) for m in (None, jnp.array([2.0])))
    assert float(asked[0]) > float(plain[0])
    assert float(asked[1]["accuracy"]) == float(plain[1]["accuracy"]) == 1
    pulled = jax.grad(lambda c: bradley_terry(c, rejected, center_coef=10.0)[0])(chosen)
    assert float(pulled[0]) > 0  # scores of a large sum are pulled down


def test_a_pair_of_weight_zero_never_matters():
    weight = jnp.array([1.0, 1.0, 0.0])
    margin = jnp.array([0.1, 0.2, jnp.nan])

    def loss(chosen):
        return bradley_terry(chosen, jnp.array([0.2, 0.9, jnp.inf]), margin=margin, center_coef=0.1, weight=weight)

    (with_junk, stats), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.array([0.7, -1.6, jnp.nan]))
    expected, expected_stats = bradley_terry(jnp.array([0.7, -1.6]), jnp.array([0.2, 0.9]), margin=margin[:2], center_coef=0.1)
    assert float(with_junk) == pytest.approx(float(expected))
    assert {k: float(v) for k, v in stats.items()} == pytest.approx({k: float(v) for k, v in expected_stats.items()})
    assert np.all(np.isfinite(gradient))
    assert gradient[2] == 0
    nothing, _ = bradley_terry(jnp.array([1.0]), jnp.array([2.0]), weight=jnp.zeros(1))
    assert float(nothing) == 0


def test_far_apart_scores_stay_finite():
    """log(sigmoid(-1000)) would be log(0)."""
    (loss, _), gradient = jax.value_and_grad(bradley_terry, has_aux=True)(jnp.array([-500.0]), jnp.array([500.0]))
    assert float(loss) == 1000
    assert float(gradient[0]) == -1


def test_cross_entropy(case):
    expected = -case.logprobs[case.mask].astype(np.float64).mean()
    np.testing.assert_allclose(cross_entropy(case.logprobs, case.mask), expected, rtol=1e-5)
    gradient = jax.grad(cross_entropy)(case.logprobs, case.mask)
    np.testing.assert_allclose(gradient, np.where(case.mask, -1 / case.mask.sum(), 0), rtol=1e-6)


def test_cross_entropy_of_a_uniform_model_is_the_log_of_its_vocabulary():
    mask = jnp.array([[True, True, False], [False, True, False]])
    loss = cross_entropy(jnp.full((2, 3), -np.log(50.0)), mask)
    assert float(loss) == pytest.approx(np.log(50))
