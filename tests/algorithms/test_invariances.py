"""What must not matter: junk where masked, more padding, the order of rows, how a batch is cut into micro-batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.algorithms import advantages, kl, masked, ppo, reinforce
from pe_rlhf_jax.algorithms.sft import cross_entropy

LOSSES = {
    "masked_mean": (("rewards",), masked.masked_mean),
    "ppo policy": (
        ("logprobs", "old_logprobs", "advantages"),
        lambda a, b, c, mask, total=None: ppo.policy_loss(a, b, c, mask, 0.2, total),
    ),
    "ppo value": (
        ("values", "old_values", "returns"),
        lambda a, b, c, mask, total=None: ppo.value_loss(a, b, c, mask, 0.2, total),
    ),
    "reinforce policy": (("logprobs", "returns", "values"), reinforce.policy_loss),
    "reinforce value": (("values", "returns"), reinforce.value_loss),
    "sft": (("logprobs",), cross_entropy),
}
PER_TOKEN = {
    "masked_whiten": (("rewards",), masked.masked_whiten),
    "masked_whiten, mean kept": (("rewards",), lambda x, mask: masked.masked_whiten(x, mask, shift_mean=False)),
    "gae": (("rewards", "values"), lambda r, v, mask: advantages.gae(r, v, mask, 0.9, 0.8)),
    "returns_to_go": (("rewards",), lambda r, mask: advantages.returns_to_go(r, mask, 0.9)),
    "token_rewards of k1": (
        ("logprobs", "ref_logprobs"),
        lambda a, b, mask: kl.token_rewards(jnp.arange(len(a)) + 0.5, kl.kl_per_token(a, b, "k1"), mask, 0.1),
    ),
    "token_rewards of k3": (
        ("logprobs", "ref_logprobs"),
        lambda a, b, mask: kl.token_rewards(jnp.arange(len(a)) + 0.5, kl.kl_per_token(a, b, "k3"), mask, 0.1),
    ),
}
STATISTICS = {
    "masked_sum": (("rewards",), masked.masked_sum),
    "masked_var": (("rewards",), masked.masked_var),
    "explained_variance": (("values", "returns"), advantages.explained_variance),
}
ALL = LOSSES | PER_TOKEN | STATISTICS


def arrays_of(case, names):
    return [jnp.asarray(getattr(case, name)) for name in names]


def gradient(function, arrays, mask):
    """Of all outputs' sum with respect to the first array. k3 of a reward is never differentiated, k1 neither."""
    return jax.grad(lambda x, *rest: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(x, *rest, mask))))(*arrays)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 3e38])
def test_junk_where_masked_changes_no_bit_of_values_and_gradients(case, name, junk):
    names, function = ALL[name]
    clean = [jnp.where(case.mask, x, 0) for x in arrays_of(case, names)]
    dirty = [jnp.where(case.mask, x, junk) for x in clean]
    for expected, found in zip(
        jax.tree.leaves(function(*clean, case.mask)), jax.tree.leaves(function(*dirty, case.mask)), strict=True
    ):
        assert np.all(np.isfinite(found))
        np.testing.assert_array_equal(found, expected)
    if not name.startswith("token_rewards"):  # rewards are constants to the learner
        found = gradient(function, dirty, case.mask)
        np.testing.assert_array_equal(found, gradient(function, clean, case.mask))
        assert not np.any(found[~case.mask])


@pytest.mark.parametrize("name", ALL)
def test_more_padding_and_another_order_of_rows_change_nothing(case, name):
    """Up to float32 rounding of sums of 35 numbers in another order."""
    names, function = ALL[name]
    order = np.random.default_rng(0).permutation(len(case.mask))
    if name.startswith("token_rewards"):
        order = np.arange(len(order))  # their scores are by position here
    arrays = arrays_of(case, names)
    moved = [jnp.pad(x[order], ((0, 1), (0, 3)), constant_values=np.nan) for x in arrays]
    mask = np.pad(case.mask[order], ((0, 1), (0, 3)))
    for expected, found in zip(
        jax.tree.leaves(function(*arrays, case.mask)), jax.tree.leaves(function(*moved, mask)), strict=True
    ):
        if expected.ndim:
            assert not np.any(found[~mask])
            expected, found = expected[order], found[:-1, :-3]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [(2,), (1, 2, 3, 4)])
def test_micro_batches_add_up_to_the_batch(case, name, cuts):
    """Loss, statistics and gradients, also with a micro-batch that has no real token (row 0 alone)."""
    names, function = LOSSES[name]
    arrays, total = arrays_of(case, names), jnp.float32(case.mask.sum())

    def run(arrays, mask, total=None):
        def loss(x):
            out = function(x, *arrays[1:], mask, total)
            return out if isinstance(out, tuple) else (out, {})

        (value, stats), slope = jax.value_and_grad(loss, has_aux=True)(arrays[0])
        return {"loss": value, **stats}, slope

    whole, slope = run(arrays, case.mask)
    parts = [
        run(rows[:-1], rows[-1], total)
        for rows in zip(*(np.split(x, cuts) for x in (*arrays, case.mask)), strict=True)
    ]
    for key in whole:
        np.testing.assert_allclose(sum(p[0][key] for p in parts), whole[key], rtol=1e-5, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), slope, rtol=1e-6, atol=1e-9)


def test_all_of_it_works_under_jit_with_a_traced_normaliser(case):
    for names, function in LOSSES.values():
        arrays = arrays_of(case, names)
        expected, found = function(*arrays, case.mask, 7.0), jax.jit(function)(*arrays, case.mask, jnp.float32(7))
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)  # XLA fuses and reorders sums
