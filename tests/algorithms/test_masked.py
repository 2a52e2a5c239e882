"""Masked statistics against numpy in float64, and their edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import masked

masked_sum, masked_var = jax.jit(masked.masked_sum), jax.jit(masked.masked_var)
masked_mean = jax.jit(masked.masked_mean, static_argnames="axis")
masked_whiten = jax.jit(masked.masked_whiten, static_argnames="shift_mean")

# At most 35 numbers of size about 1: float32 sums err by less than 35 * 6e-8 * a few.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def test_by_hand():
    x = jnp.array([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    assert masked_sum(x, mask) == 9
    assert masked_mean(x, mask) == 3
    np.testing.assert_array_equal(masked_mean(x, mask, axis=1), [1.5, 6])
    np.testing.assert_array_equal(masked.masked_sum(x, mask, axis=1), [3, 6])
    assert masked_mean(x, mask, total=6) == 1.5
    np.testing.assert_allclose(masked_var(x, mask), (4 + 1 + 9) / 3, rtol=1e-6)  # not / 2
    sd = np.sqrt(14 / 3)
    np.testing.assert_allclose(masked_whiten(x, mask), [[-2 / sd, -1 / sd, 0], [3 / sd, 0, 0]], rtol=1e-6)
    kept = [[3 - 2 / sd, 3 - 1 / sd, 0], [3 + 3 / sd, 0, 0]]
    np.testing.assert_allclose(masked_whiten(x, mask, shift_mean=False), kept, rtol=1e-6)


def test_equals_numpy_in_float64(case):
    real = case.rewards[case.mask].astype(np.float64)
    np.testing.assert_allclose(masked_sum(case.rewards, case.mask), real.sum(), **TOLERANCE)
    np.testing.assert_allclose(masked_mean(case.rewards, case.mask), real.mean(), **TOLERANCE)
    np.testing.assert_allclose(masked_var(case.rewards, case.mask), real.var(), **TOLERANCE)
    whitened = np.asarray(masked_whiten(case.rewards, case.mask))
    np.testing.assert_allclose(whitened[case.mask], (real - real.mean()) / np.sqrt(real.var() + 1e-8), **TOLERANCE)
    assert not np.any(whitened[~case.mask])
    kept = masked_whiten(case.rewards, case.mask, shift_mean=False)
    np.testing.assert_allclose(masked_mean(kept, case.mask), real.mean(), **TOLERANCE)
    np.testing.assert_allclose(masked_var(kept, case.mask), 1, **TOLERANCE)


def test_junk_is_dropped_before_arithmetic():
    """Also op by op: under jit, XLA may turn a product with a mask into the selection that it should have been."""
    x, mask = jnp.array([1.5, jnp.nan, jnp.inf]), jnp.array([True, False, False])
    np.testing.assert_array_equal(masked.select(x, mask), [1.5, 0, 0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(masked.select(x, mask) ** 2))(x), [3, 0, 0])


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_nothing_real_gives_zeros_and_zero_gradients(function):
    x, mask = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    assert not np.any(function(x, mask))
    assert not np.any(jax.jit(jax.grad(lambda x: jnp.sum(function(x, mask))))(x))


def test_whitening_of_equal_values_is_bounded():
    """The variance is then 0 or a rounding error; eps keeps the quotient small: a few ulp of 0.7 (6e-8) / sqrt(1e-8)."""
    whitened = masked_whiten(jnp.full((3, 5), 0.7), jnp.ones((3, 5), bool))
    assert np.max(np.abs(whitened)) < 1e-2


def test_low_precision_inputs_are_summed_in_float32():
    x = jnp.full((1, 4096), 0.1, jnp.bfloat16)
    total = masked.masked_sum(x, jnp.ones_like(x, bool))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 4096 * float(x[0, 0]), rtol=1e-5)  # bfloat16 stops growing at 32


def test_wrong_masks_are_refused():
    with pytest.raises(ValueError, match=r"values \(2,\) and mask \(2, 2\)"):
        masked.masked_sum(jnp.ones(2), jnp.ones((2, 2), bool))  # would broadcast
    with pytest.raises(TypeError, match=r"boolean.*float32"):
        masked.masked_sum(jnp.ones(2), jnp.ones(2))
