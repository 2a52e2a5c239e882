"""With policy, reference, reward and value in use at once, one backbone is in memory: read from the live buffers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_pictures import seeing_context

from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import evaluate, reward, rl, sft
from pe_rlhf_jax.training.rewards import RewardModel, Rewards


def buffers_like(backbone) -> set[int]:
    """Live buffers that have the shape and type of a leaf of the backbone that no adapter and no head has."""
    kinds = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(backbone) if leaf.ndim > 1}
    return {x.unsafe_buffer_pointer() for x in jax.live_arrays() if (x.shape, x.dtype) in kinds}


@pytest.mark.parametrize("sees", [False, True])
def test_four_roles_share_one_copy_of_the_backbone(make_context, sees):
    """And of the vision tower, where there is one."""
    context = seeing_context("paligemma") if sees else make_context()
    before = buffers_like(context.backbone)
    wide = [leaf for leaf in jax.tree.leaves(context.backbone) if leaf.ndim > 1]
    assert {leaf.unsafe_buffer_pointer() for leaf in wide} <= before

    *_, (state, _) = sft.run(context, sft.init(context))
    reference, _ = sft.finish(context, state)
    *_, (state, _) = reward.run(context, reference, reward.init(context, reference))
    model = reward.whole(context, reference, reward.finish(context, reference, state)[0])
    rewards = Rewards(context, {"run": RewardModel(context.decoder, context.backbone, model)})
    during = []
    for state, _ in rl.run(context, reference, model, rewards, rl.init(context, reference, model)):  # noqa: B007
        during.append(buffers_like(context.backbone) - before)
    roles = rl.whole(context, reference, model, state.train.trainable)
    *_, (_, figures) = evaluate.policy(context, {"reference": reference, "policy": roles["policy"]}, rewards)
    assert all(role.params is None for role in (reference, model, *roles.values()))
    assert during == [set(), set()]
    assert buffers_like(context.backbone) - before == set()
    assert np.isfinite(figures["rl"]["gain_in_std"])


def test_a_full_twin_is_seen_by_the_same_count(make_context):
    """What the count above would show if a role had a copy: every matrix once more for each of policy and value."""
    context = make_context(rl={"tuning": "full", "roles": "separate", "value_init": "zero"})
    before = buffers_like(context.backbone)
    state = rl.init(context, Role(), None)
    matrices = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(context.backbone))
    assert len(buffers_like(context.backbone) - before) >= 2 * matrices
    assert int(state.step) == 0
