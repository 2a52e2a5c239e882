"""RL's forward passes over micro-batches: the same experience, in the memory of an update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_context import tiny_context

from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.plan.compiled import compile_call
from pe_rlhf_jax.plan.plan import backbone_matrices
from pe_rlhf_jax.plan.programs import Call, abstract_context, stage_calls
from pe_rlhf_jax.training import reward, rl
from pe_rlhf_jax.training.micro_batches import in_micro_batches
from pe_rlhf_jax.training.rewards import RewardModel, Rewards

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_rows_come_back_in_their_order_and_neighbours_stay_together():
    rows = {"a": jnp.arange(12), "b": jnp.arange(24.0).reshape(12, 2)}
    sizes = []

    def f(part):
        sizes.append(len(part["a"]))
        pairs = part["a"].reshape(-1, 2)
        return part["b"] + 1, jnp.repeat(pairs[:, 0], 2)

    for size, expected in ((4, 4), (12, 12), (None, 12)):
        found, first = jax.jit(lambda rows, size=size: in_micro_batches(f, rows, size))(rows)
        np.testing.assert_array_equal(found, rows["b"] + 1)
        np.testing.assert_array_equal(first, np.arange(12) // 2 * 2)
        assert set(sizes) == {expected}
        sizes.clear()


def test_scores_and_experience_fit_where_the_update_does(tiny):
    """32 episodes, of which two are computed at once."""
    data = {"max_prompt_length": 24, "max_response_length": 8, "length_multiple": 8}
    context = tiny_context(tiny, data=data, rl={"batch_size": 32, "micro_batch_size": 2, "sampling": {"max_new_tokens": 8}})
    abstract, temporaries = abstract_context(context.config, tiny.config, jnp.dtype("float32"), jax.devices()[:1]), {}

    def compile(call: Call):
        if call.name == "rollout":
            return jax.eval_shape(lambda *arguments: call.function(*call.static, *arguments), *call.arguments.values())
        program, returned = compile_call(call, abstract.mesh, backbone_matrices(tiny.config), tiny.config.vocab_size)
        temporaries[program.name] = program.temporaries
        return returned

    stage_calls(abstract, "rl", compile)
    assert temporaries.keys() == {"score", "experience", "update"}
    assert max(temporaries.values()) == temporaries["update"], temporaries


@pytest.mark.parametrize(
    ("section", "micro"),
    [
        ({"algorithm": "ppo"}, 2),
        ({"algorithm": "ppo", "value_model": "trunk", "value_init": "zero", "whiten_rewards": True}, 4),
        ({"algorithm": "grpo", "group_size": 4}, 4),  # a group in each
        ({"algorithm": "rloo", "group_size": 4}, 2),  # half of one
    ],
    ids=["ppo", "trunk", "groups", "half-groups"],
)
def test_a_step_is_that_of_the_whole_batch(make_context, section, micro):
    """Baselines and whitening are over the whole batch."""
    found = []
    for size in (None, micro):
        context = make_context(rl=section | {"batch_size": 8, "num_ppo_epochs": 1, "steps": 1, "micro_batch_size": size})
        model = reward.init(context, Role()).trainable
        rewards = Rewards(context, {"run": RewardModel(context.decoder, context.backbone, model)})
        state, metrics = next(rl.run(context, Role(), model, rewards, rl.init(context, Role(), model)))
        figures = {name: value for name, value in metrics.items() if not name.startswith(("time/", "perf/"))}
        found.append((figures, state.train.opt_state))
    assert found[0][0]["grad_norm"] > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), *found)
