"""One update: what it may change, micro-batches, and numbers that are not finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pe_rlhf_jax.config import OptimizerConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training.optimizer import learning_rate, make_optimizer
from pe_rlhf_jax.training.step import NonFiniteError, applied, make_step, new_state, skip, stage_key, stop_if_not_finite


def role() -> Role:
    return Role(lora={"a": jnp.ones((2, 3))}, head={"bias": jnp.zeros((1,))}, params={"kernel": jnp.ones((4, 5))})


@pytest.mark.parametrize(("tuning", "frozen"), [("lora", "params"), ("full", "lora")])
def test_a_frozen_leaf_that_reaches_the_optimizer_does_not_move(tuning, frozen):
    """Even with a gradient of ones for it, and with weight decay; `optax.masked` would let the gradient through."""
    start = role()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=None), 10, tuning)
    state = optimizer.init(start)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, start), state, start)
    after = optax.apply_updates(start, updates)
    for name in ("lora", "head", "params"):
        same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), getattr(start, name), getattr(after, name))))
        assert same == (name == frozen)


def test_optimizer_state_exists_only_for_what_is_trained():
    sizes = {2 * 3, 1}  # the adapter's leaf and the head's
    state = make_optimizer(OptimizerConfig(), 10, "lora").init(role())
    moments = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(moments) == sorted([*sizes, *sizes])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_what_starts_at_zero_moves_by_the_rate(name):
    """Half of every fresh adapter does, and the head of a reward model of labels."""
    trained = {"head": {"kernel": jnp.zeros((8, 1))}, "lora": {"b": jnp.zeros((4, 8))}}
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=0.01), 10, "lora")
    gradients = jax.tree.map(jnp.ones_like, trained)
    updates, _ = optimizer.update(gradients, optimizer.init(trained), trained)
    for leaf in jax.tree.leaves(updates):
        assert 0.005 < -float(jnp.mean(leaf)) < 0.02


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weights_decay_in_proportion_to_the_rate(name):
    """Biases, and what scales a norm, do not."""
    trained = {"params": {"b": jnp.full((4, 8), 2.0), "norm": {"scale": jnp.full((8,), 2.0)}}, "head": {"bias": jnp.full((1,), 2.0)}}
    optimizer = make_optimizer(OptimizerConfig(name=name, learning_rate=1e-3, weight_decay=0.1), 10, "full")
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, trained), optimizer.init(trained), trained)
    np.testing.assert_allclose(updates["params"]["b"], -1e-3 * 0.1 * 2.0, rtol=1e-6)
    assert not np.any(updates["head"]["bias"]) and not np.any(updates["params"]["norm"]["scale"])


def test_schedule_warms_up_and_decays():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_ratio=0.2), 10)
    np.testing.assert_allclose([rate(i) for i in (0, 1, 2, 6, 10)], [0.0, 0.5, 1.0, 0.5, 0.0], atol=1e-6)


def quadratic(trainable, target, rows, total, key):
    loss = jnp.sum((rows["x"] @ trainable["w"] - target) ** 2) / total
    return loss, {"rows": jnp.sum(rows["x"][:, 0] * 0 + 1) / total}


def step_of(micro: int | None):
    return make_step(quadratic, lambda rows: jnp.float32(len(rows["x"])), optax.sgd(0.1), micro)


def test_micro_batches_add_up_to_the_whole_batch():
    rows = {"x": jnp.asarray(np.random.default_rng(0).standard_normal((12, 3)), jnp.float32)}
    results = []
    for micro in (None, 4, 1):
        state, metrics = step_of(micro)(new_state({"w": jnp.ones(3)}, optax.sgd(0.1)), jnp.ones(()), rows, jax.random.key(0))
        results.append((state.trainable["w"], metrics["loss"], metrics["grad_norm"], metrics["rows"]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert float(results[0][3]) == pytest.approx(1.0)


def test_adapters_in_bfloat16_are_learned_in_float32():
    """Of 64 micro-batches with gradients of 1 and 1/256, a sum in bfloat16 would lose the small ones; so would the second moment."""
    trainable = {"lora": {"w": jnp.zeros(1, jnp.bfloat16)}}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, mu_dtype="bfloat16", max_grad_norm=None, eps=1e-12), 10, "lora")

    def loss(trainable, _, rows, total, key):
        return jnp.sum(rows["x"] * trainable["lora"]["w"].astype(jnp.float32)), {}

    rows = {"x": jnp.full((64, 1), 1 / 256).at[0].set(1.0)}
    step = make_step(loss, lambda rows: jnp.float32(1), optimizer, 1)
    state, metrics = step(new_state(trainable, optimizer), None, rows, jax.random.key(0))
    assert float(metrics["grad_norm"]) == 1 + 63 / 256
    assert state.trainable["lora"]["w"].dtype == jnp.bfloat16 and float(state.trainable["lora"]["w"][0]) == -1.0
    mu, nu = (optax.tree_utils.tree_get(state.opt_state, name)["lora"]["w"] for name in ("mu", "nu"))
    assert (mu.dtype, nu.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(nu, 1e-3 * (1 + 63 / 256) ** 2, rtol=1e-6)
    state, _ = step(state, None, rows, jax.random.key(0))  # of the same types: the program is not compiled again
    assert step._cache_size() == 1


def test_gradients_of_adapters_in_bfloat16_are_float32():
    """Of a whole batch too: the norm of leaves of 1 and 1/256 is more than 1."""
    trainable = {"lora": {"a": jnp.ones(1, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)}}
    optimizer = make_optimizer(OptimizerConfig(), 10, "lora")

    def loss(trainable, _, rows, total, key):
        return jnp.sum(trainable["lora"]["a"] + trainable["lora"]["b"] / 256) * jnp.sum(rows["x"]), {}

    step = make_step(loss, lambda rows: jnp.float32(1), optimizer, None)
    _, metrics = step(new_state(trainable, optimizer), None, {"x": jnp.ones(1)}, jax.random.key(0))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(1 + 2.0**-16), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_update_changes_nothing_but_the_counters(bad):
    step, optimizer = step_of(None), optax.sgd(0.1)
    good, broken = {"x": jnp.ones((2, 3))}, {"x": jnp.full((2, 3), bad)}
    state, _ = step(new_state({"w": jnp.ones(3)}, optimizer), jnp.ones(()), good, jax.random.key(0))
    before = np.asarray(state.trainable["w"])
    for count in (1, 2):
        state, metrics = step(state, jnp.ones(()), broken, jax.random.key(0))
        assert (int(metrics["skipped"]), int(state.skipped_in_a_row)) == (count, count)
        np.testing.assert_array_equal(state.trainable["w"], before)
    stop_if_not_finite(state, 3, "sft")
    with pytest.raises(NonFiniteError, match=r"2 updates in a row were skipped .* its loss or gradient .* A lower learning rate"):
        stop_if_not_finite(state, 2, "sft")
    with pytest.raises(NonFiniteError, match=r"the last because the score is wrong. .* another reward model"):
        stop_if_not_finite(state, 2, "rl", "the score is wrong")
    state, metrics = step(state, jnp.ones(()), good, jax.random.key(0))
    assert (int(metrics["skipped"]), int(state.skipped_in_a_row)) == (2, 0)
    assert not np.array_equal(state.trainable["w"], before)


def test_norms_of_several_models_are_told_apart():
    """Each is clipped by its own; and the joint one is that of all gradients."""

    def loss(trainable, _, rows, total, key):
        return 3 * trainable["policy"]["w"][0] + 4 * trainable["value"]["w"][0], {}

    trainable = {name: {"w": jnp.ones(1)} for name in ("policy", "value")}
    step = make_step(loss, lambda rows: jnp.float32(1), optax.sgd(0.1), None)
    _, metrics = step(new_state(trainable, optax.sgd(0.1)), None, {"x": jnp.ones(1)}, jax.random.key(0))
    assert {name: float(x) for name, x in metrics.items() if "norm" in name} == {
        "grad_norm": 5.0,
        "grad_norm/policy": 3.0,
        "grad_norm/value": 4.0,
    }


def test_skipped_updates_are_not_applied_ones():
    optimizer = make_optimizer(OptimizerConfig(schedule="linear"), 10, "lora")

    def loss(trainable, _, rows, total, key):
        return jnp.sum(trainable["lora"]["w"] * rows["x"]), {}

    step, state = make_step(loss, lambda rows: jnp.float32(1), optimizer, None), new_state({"lora": {"w": jnp.ones(1)}}, optimizer)
    for number, x in enumerate((1.0, np.nan, 1.0, 1.0)):
        assert applied(state) == number - (number > 1)
        state, _ = step(state, None, {"x": jnp.full(1, x)}, jax.random.key(0))
    assert applied(skip(state)) == 3 and int(skip(state).skipped) == 2 and int(skip(state).skipped_in_a_row) == 1


def test_stages_and_seeds_have_different_keys():
    keys = {tuple(jax.random.key_data(stage_key(seed, stage)).tolist()) for seed in (0, 1) for stage in ("sft", "reward", "rl")}
    assert len(keys) == 6
