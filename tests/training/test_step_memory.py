"""What the compiler reserves for the real steps of reward model and PPO: adapters cost no gradient and no moment of the backbone."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import pytest
from deep_backbone import BACKBONE
from memory import figures, size

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.plan.programs import abstract_context

ROLES = {"reward": 1, "rl": 2}  # trained at once: the reward model; policy and value
CONFIG = """
model: {source: unused, remat: full, logprob_chunk: 16}
lora: {r: 4}
data: {max_prompt_length: 8, max_response_length: 8, length_multiple: 8}
reward: {batch_size: 4, micro_batch_size: %(micro)s}
rl: {batch_size: 4, micro_batch_size: %(micro)s, sampling: {max_new_tokens: 8}}
"""


@functools.cache
def context(micro: str):
    config = configuration.parse(CONFIG % {"micro": micro})
    return abstract_context(config, BACKBONE, jnp.dtype("float32"))


@functools.cache
def measured(stage: str, tuning: str, micro: str) -> dict[str, int]:
    return figures(context(micro), stage, tuning)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("stage", "micro"), [("reward", "null"), ("reward", "2"), ("rl", "null")])
def test_adapters_need_no_buffer_for_gradients_of_the_backbone(stage, micro):
    """Gradients live among the temporaries; the fully tuned twin, through the same code, has those of each role's whole backbone."""
    backbone = size(context(micro).backbone)
    lora, full = (measured(stage, tuning, micro) for tuning in ("lora", "full"))
    assert lora["temporaries"] < backbone / 2
    # 0.9: the adapters' own gradients count on one side only, and XLA finds places to reuse.
    assert full["temporaries"] - lora["temporaries"] > 0.9 * ROLES[stage] * backbone


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("epochs", [1, 2])
def test_activations_of_policy_and_value_model_never_exist_together(epochs):
    """Of micro-batches: a value model beside the policy takes little more than the policy without one."""
    text = CONFIG % {"micro": "2"}
    wide = ["model.remat=none", "data.max_prompt_length=64", "rl.sampling.max_new_tokens=64", f"rl.num_ppo_epochs={epochs}"]
    ppo, rloo = (
        figures(abstract_context(configuration.parse(text, [*wide, *more]), BACKBONE, jnp.dtype("float32")), "rl", "lora")["temporaries"]
        for more in (["rl.algorithm=ppo"], ["rl.algorithm=rloo", "rl.group_size=2", "rl.micro_batch_size=2"])
    )
    assert 0.7 * rloo < ppo < 1.3 * rloo


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("stage", ROLES)
def test_adapters_need_no_optimizer_state_of_the_backbone(stage):
    backbone = size(context("null").backbone)
    lora, full = (measured(stage, tuning, "null") for tuning in ("lora", "full"))
    for one in (lora, full):  # Adam: two moments a trained leaf, and a few counters
        assert 2 * one["trained"] <= one["optimizer"] < 2 * one["trained"] + 1000
        assert one["reused"] > 0.99 * (one["trained"] + one["optimizer"])  # the state is updated in place
    assert lora["trained"] < 0.1 * ROLES[stage] * backbone
    assert full["trained"] > ROLES[stage] * backbone
    assert lora["arguments"] < 1.1 * backbone + 3 * lora["trained"]
    assert full["arguments"] > 3 * ROLES[stage] * backbone


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("stage", ROLES)
def test_a_step_with_adapters_fits_where_little_more_than_the_backbone_does(stage):
    """The twin holds each trained role four times over: parameters, gradients, two moments."""
    backbone = size(context("null").backbone)
    lora, full = (measured(stage, tuning, "null") for tuning in ("lora", "full"))
    assert lora["peak"] < 1.6 * backbone
    assert full["peak"] > 3.9 * ROLES[stage] * backbone
