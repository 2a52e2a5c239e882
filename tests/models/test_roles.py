"""Roles share one backbone; training a role never touches what it came from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.models.heads import apply_head, init_head, zero_head
from pe_rlhf_jax.models.lora import merge
from pe_rlhf_jax.models.roles import Role


def leaves(tree):
    return jax.tree.leaves(tree)


def test_the_empty_role_is_the_backbone_itself(tiny):
    variables = Role().variables(tiny.params)
    assert set(variables) == {"params"} and variables["params"] is tiny.params
    assert leaves(Role()) == []


def test_a_role_brings_its_adapter_and_shares_the_backbone(tiny):
    variables = Role(lora=tiny.lora, head=zero_head(16)).variables(tiny.params)
    assert set(variables) == {"params", "lora"}
    assert variables["params"] is tiny.params and variables["lora"] is tiny.lora


def test_parameters_of_its_own_replace_the_backbone(tiny):
    own = {"embed": jnp.zeros((1,))}
    assert Role(params=own).variables(tiny.params) == {"params": own}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_trained_and_frozen_parts_join_to_the_whole(tiny, tuning):
    role = Role(params=tiny.params).tuned(tuning, tiny.params, tiny.lora, tiny.decoder.lora).replace(head=zero_head(16))
    trained, frozen = role.trained(tuning), role.frozen(tuning)
    joined = trained.join(frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(role)
    assert all(a is b for a, b in zip(leaves(joined), leaves(role), strict=True))
    assert len(leaves(trained)) + len(leaves(frozen)) == len(leaves(role))
    assert (trained.params is None) == (tuning == "lora") and trained.head is not None
    assert (trained.lora is None) == (tuning == "full")


def test_a_start_for_training_can_be_donated(tiny):
    """Adapter, head and parameters are copies: deleting them leaves the origin readable."""
    origin = Role(lora=jax.tree.map(jnp.copy, tiny.lora), head=init_head(jax.random.key(0), 16))
    for tuning in ("lora", "full"):
        start = origin.tuned(tuning, tiny.params, tiny.lora, tiny.decoder.lora)
        for leaf in leaves(start):
            leaf.delete()
    assert all(np.isfinite(leaf).all() for leaf in leaves((origin, tiny.params)))


def test_a_scorer_has_no_copy_of_the_matrix_that_predicts_tokens(untied):
    scorer = Role(head=zero_head(16)).tuned("full", untied.params, None, untied.decoder.lora)
    assert set(untied.params) - set(scorer.params) == {"lm_head"}
    assert "lm_head" in Role().tuned("full", untied.params, None, untied.decoder.lora).params


def test_full_tuning_starts_from_the_merged_adapter_in_float32(tiny):
    backbone = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    start = Role(lora=tiny.lora).tuned("full", backbone, tiny.lora, tiny.decoder.lora)
    assert start.lora is None and {x.dtype for x in leaves(start.params)} == {jnp.dtype(jnp.float32)}
    expected = merge(jax.tree.map(lambda x: x.astype(jnp.float32), backbone), tiny.lora, tiny.decoder.lora)
    jax.tree.map(np.testing.assert_array_equal, start.params, expected)


def test_adapter_tuning_prefers_the_roles_own_adapter(tiny):
    other = jax.tree.map(lambda x: x + 1, tiny.lora)
    fresh = Role().tuned("lora", tiny.params, other, tiny.decoder.lora)
    own = Role(lora=tiny.lora).tuned("lora", tiny.params, other, tiny.decoder.lora)
    jax.tree.map(np.testing.assert_array_equal, fresh.lora, other)
    jax.tree.map(np.testing.assert_array_equal, own.lora, tiny.lora)


def test_head_by_hand():
    head = {"kernel": jnp.array([[2.0], [-1.0]]), "bias": jnp.array([0.5])}
    found = apply_head(head, jnp.array([[[1.0, 3.0], [0.25, 0.0]]], jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [[-0.5, 1.0]])


def test_head_computes_in_float32_from_bfloat16_hidden_states():
    """1 + 2^-12 cannot be told from 1 in bfloat16."""
    head = {"kernel": jnp.array([[1 + 2.0**-12]]), "bias": jnp.array([-1.0])}
    np.testing.assert_array_equal(apply_head(head, jnp.ones((1, 1), jnp.bfloat16)), [2.0**-12])


def test_heads_start_as_documented():
    head = init_head(jax.random.key(0), 4095)
    assert {name: x.shape for name, x in head.items()} == {"kernel": (4095, 1), "bias": (1,)}
    assert abs(head["kernel"].std() * 64 - 1) < 0.05 and not head["bias"].any()  # standard error 1 / sqrt(2 * 4095) = 0.011
    assert not any(x.any() for x in leaves(zero_head(5)))
    assert jax.tree.map(jnp.shape, zero_head(4095)) == jax.tree.map(jnp.shape, head)


def test_the_tower_stays_the_backbones(tiny):
    """Full tuning copies everything but the vision tower, and finds it in the backbone."""
    backbone = {**tiny.params, "vision": {"patch_kernel": jnp.ones((2, 2))}}
    start = Role().tuned("full", backbone, tiny.lora, tiny.decoder.lora)
    assert set(start.params) == set(tiny.params)
    variables = start.variables(backbone)["params"]
    assert variables["vision"] is backbone["vision"] and variables["embed"] is start.params["embed"]
    adapted = Role(lora={**tiny.lora, "vision": {}})
    with pytest.raises(ValueError, match="full tuning cannot start from an adapter on the vision tower"):
        adapted.tuned("full", backbone, tiny.lora, tiny.decoder.lora)
