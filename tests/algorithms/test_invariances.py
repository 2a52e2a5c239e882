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
    return [getattr(case, name) for name in names]


def leaves(outputs):
    return jax.tree.leaves(jax.device_get(outputs))


def with_statistics(loss):
    def both(*arguments):
        out = loss(*arguments)
        return out if isinstance(out, tuple) else (out, {})

    return both


def total_of(function):
    return lambda *arguments: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(*arguments)))


# Compiled once; also shows that everything works under jit, with a traced normaliser.
COMPILED = {name: jax.jit(function) for name, (_, function) in ALL.items()}
GRADIENTS = {name: jax.jit(jax.grad(total_of(function))) for name, (_, function) in ALL.items()}
"""Of the sum of all outputs with respect to the first array."""
WITH_GRADIENTS = {name: jax.jit(jax.value_and_grad(with_statistics(loss), has_aux=True)) for name, (_, loss) in LOSSES.items()}


@pytest.mark.parametrize("name", ALL)
def test_junk_where_masked_changes_no_bit_of_values_and_gradients(case, name):
    names, function = ALL[name][0], COMPILED[name]
    clean = [np.where(case.mask, x, 0) for x in arrays_of(case, names)]
    junk = np.resize(np.array([np.nan, np.inf, -np.inf, 3e38], np.float32), case.mask.shape)
    dirty = [np.where(case.mask, x, np.roll(junk, i)) for i, x in enumerate(clean)]
    for expected, found in zip(leaves(function(*clean, case.mask)), leaves(function(*dirty, case.mask)), strict=True):
        assert np.all(np.isfinite(found))
        np.testing.assert_array_equal(found, expected)
    if not name.startswith("token_rewards"):  # rewards are constants to the learner
        found = np.asarray(GRADIENTS[name](*dirty, case.mask))
        np.testing.assert_array_equal(found, GRADIENTS[name](*clean, case.mask))
        assert not np.any(found[~case.mask])


@pytest.mark.parametrize("name", ALL)
def test_more_padding_and_another_order_of_rows_change_nothing(case, name):
    """Up to float32 rounding of sums of 35 numbers in another order."""
    names, function = ALL[name][0], COMPILED[name]
    order = np.random.default_rng(0).permutation(len(case.mask))
    if name.startswith("token_rewards"):
        order = np.arange(len(order))  # their scores are by position here
    arrays = arrays_of(case, names)
    moved = [np.pad(x[order], ((0, 1), (0, 3)), constant_values=np.nan) for x in arrays]
    mask = np.pad(case.mask[order], ((0, 1), (0, 3)))
    for expected, found in zip(leaves(function(*arrays, case.mask)), leaves(function(*moved, mask)), strict=True):
        if expected.ndim:
            assert not np.any(found[~mask])
            expected, found = expected[order], found[:-1, :-3]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up_to_the_batch(case, name):
    """Loss, statistics and gradients, row by row; one row has no real token."""
    names, run = LOSSES[name][0], WITH_GRADIENTS[name]
    arrays, total = arrays_of(case, names), jnp.float32(case.mask.sum())
    (loss, stats), slope = run(*arrays, case.mask)
    parts = [run(*rows, total) for rows in zip(*(np.split(x, len(x)) for x in (*arrays, case.mask)), strict=True)]
    np.testing.assert_allclose(sum(part[0][0] for part in parts), loss, rtol=1e-5, atol=1e-6)
    for key in stats:
        found = sum(part[0][1][key] for part in parts)
        np.testing.assert_allclose(found, stats[key], rtol=1e-5, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), slope, rtol=1e-6, atol=1e-9)
