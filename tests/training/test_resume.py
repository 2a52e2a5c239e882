"""A stage continued from any of its states is the stage that was never stopped, to the bit."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.sharding import place
from pe_rlhf_jax.training import loop, reward, rl, sft
from pe_rlhf_jax.training.rewards import RewardModel, Rewards

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """The continued stage uses the program of the whole one, which is the same: compiling takes most of these tests' time."""
    for module, name, make in ((loop, "make_step", loop.make_step), (rl, "step_of", rl.step_of)):
        programs: list = []

        def once(*arguments, make=make, programs=programs):
            programs.append(programs[0] if programs else make(*arguments))
            return programs[0]

        monkeypatch.setattr(module, name, once)


def rl_stage(context, state=None):
    model = reward.init(context, Role()).trainable
    rewards = Rewards(context, {"run": RewardModel(context.decoder, context.backbone, model)})
    return rl.run(context, Role(), model, rewards, rl.init(context, Role(), model) if state is None else state)


# Reward modelling runs in the same loop as SFT.
STAGES = {
    "sft": lambda context, state=None: sft.run(context, sft.init(context) if state is None else state),
    "rl": rl_stage,
}


def history(rows):
    """Of each step: the state as it was then, in host memory (the next step takes its buffers), and what must not differ."""
    kept = []
    for state, metrics in rows:
        kept.append((jax.tree.map(np.array, state), {k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))}))
    return kept


@pytest.mark.parametrize("stage", STAGES)
def test_continued_from_the_first_state_it_is_the_same(make_context, stage):
    """With dropout, a batch that does not divide the rows, a KL coefficient that moves, and rewards scaled by all that were seen."""
    context = make_context(
        lora={"lora_dropout": 0.1},
        sft={"batch_size": 3, "evaluate_every": 2},
        rl={"steps": 3, "batch_size": 6, "kl_target": 0.01, "kl_horizon": 20.0, "normalize_rewards": True, "num_mini_batches": 2},
    )
    whole = history(STAGES[stage](context))
    assert [int(state.step) for state, _ in whole] == [1, 2, 3]
    rest = history(STAGES[stage](context, place(whole[0][0], context.mesh)))
    assert [metrics for _, metrics in rest] == [metrics for _, metrics in whole[1:]]
    jax.tree.map(np.testing.assert_array_equal, rest[-1][0], whole[-1][0])
    assert whole[0][1] != whole[1][1]
    if stage == "rl":
        assert whole[0][1]["objective/kl_coef"] != whole[1][1]["objective/kl_coef"]
