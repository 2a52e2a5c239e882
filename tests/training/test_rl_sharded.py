"""RL on eight devices is RL on one. In a process of its own: JAX fixes the number of CPU devices at its start."""

from __future__ import annotations

from pathlib import Path

from processes import same_on_eight_devices

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]

import dataclasses
import tiny_decoder
import jax
import numpy as np
from tiny_context import tiny_context

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import reward, rl
from pe_rlhf_jax.training.rewards import RewardModel, Rewards

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)
model = tiny_decoder.make_model(tiny_decoder.TINY, LoRAConfig(r=3, lora_alpha=6.0))
section = dict(steps=3, batch_size=8, num_mini_batches=2, micro_batch_size=4, optimizer=dict(learning_rate=1e-2))
section |= dict(sampling=dict(max_new_tokens=6, temperature=0.8), missing_eos_penalty=-1.0, kl_target=1.0, normalize_rewards=True)


def trained(devices, mesh):
    context = tiny_context(model, devices, mesh=mesh, rl=section)
    # One device has all logits at once; eight have them in several chunks, of one or two tokens of each row.
    chunked = context.config.model.model_copy(update=dict(logprob_chunk=1024 if devices == 1 else 2))
    context = dataclasses.replace(context, config=context.config.model_copy(update=dict(model=chunked)))
    with jax.set_mesh(context.mesh):
        start = reward.init(context, Role()).trainable
        state, rows = rl.init(context, Role(), start), []
        rewards = Rewards(context, {{"run": RewardModel(context.decoder, context.backbone, start)}})
        for state, metrics in rl.run(context, Role(), start, rewards, state):
            rows.append(metrics)
    return state, rows


one, expected = trained(1, dict(data=1))
eight, found = trained(8, dict(data=2, fsdp=2, tensor=2))
a, b = (state.train.trainable["policy"].lora["layers"]["mlp"]["up_proj"]["a"] for state in (one, eight))
assert len(a.sharding.device_set) == 1 and len(b.sharding.device_set) == 8 and not b.is_fully_replicated
for other, row in zip(found, expected, strict=True):
    assert other.keys() == row.keys()
    for name in ("objective/length", "objective/distinct_2", "val/num_eos_tokens"):  # the same tokens, not merely similar ones
        assert other[name] == row[name], name
    for name in row:  # differences of 5e-6 were found, sums in another order
        if not name.startswith(("time/", "perf/")):
            np.testing.assert_allclose(other[name], row[name], rtol=1e-4, atol=1e-6, err_msg=name)
assert abs(expected[-1]["objective/kl"]) > 0.01  # it has moved, so that later steps depend on what was learned
np.testing.assert_allclose(float(eight.kl_coef), float(one.kl_coef), rtol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one.train.trainable, eight.train.trainable)
print("same")
"""


def test_eight_devices_train_what_one_does():
    """Data, fsdp and tensor axes of two: the same tokens, and metrics and adapters that are the same to rounding, over three batches."""
    here = Path(__file__).parent
    script = SCRIPT.format(tests=str(here.parent), here=str(here))
    same_on_eight_devices(script)
