"""Pictures on eight devices: the same features, and the same update as on one. In a process of its own, as in `test_rl_sharded`."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import same_on_eight_devices

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]

import jax
import numpy as np
from tiny_pictures import new_encoder, seeing_context

from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import reward, sft

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)


def trained(devices, mesh, target):
    batch = dict(steps=1, batch_size=8)
    context = seeing_context("paligemma", 2, devices, target, mesh=mesh, sft=batch, reward=batch)
    with jax.set_mesh(context.mesh):
        rows = context.data.sft.train
        images = new_encoder(context)(rows)
        placed = context.rows(images)
        shape = jax.tree.leaves(placed)[0].sharding.shard_shape(jax.tree.leaves(placed)[0].shape)
        _, learned = next(sft.run(context, sft.init(context)))
        _, judged = next(reward.run(context, Role(), reward.init(context, Role())))
    return jax.tree.leaves(images)[0], shape, [learned["loss"], learned["grad_norm"], judged["loss"], judged["grad_norm"]]


for target in ("all-linear", r"(vision\\.)?attention\\..*"):
    features, _, expected = trained(1, dict(data=1), target)
    others, shape, found = trained(8, dict(data=2, fsdp=2, tensor=2), target)
    assert shape[0] == len(features) // 4
    np.testing.assert_allclose(others, features, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
print("same")
"""


@pytest.mark.slow
def test_eight_devices_see_what_one_does():
    """Data, fsdp and tensor axes of two, with a frozen tower and with an adapted one."""
    here = Path(__file__).parent
    script = SCRIPT.format(tests=str(here.parent), here=str(here))
    same_on_eight_devices(script)
