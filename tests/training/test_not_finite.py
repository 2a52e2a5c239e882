"""Losses and rewards that are no finite numbers: what is skipped, what is logged, and when a stage stops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.models.heads import zero_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import loop, rl, sft
from pe_rlhf_jax.training.rewards import RewardModel, Rewards
from pe_rlhf_jax.training.step import NonFiniteError

pytestmark = pytest.mark.usefixtures("quick_compile")


def bits(tree):
    return [np.array(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def counted(updates):
    """The rows of a stage until it stops, what was trained after each, and what it says."""
    rows, trained = [], []
    try:
        for state, metrics in updates:
            state = getattr(state, "train", state)
            rows.append(metrics)
            trained.append(bits(state.trainable))
    except NonFiniteError as error:
        return rows, trained, str(error)
    return rows, trained, ""


@pytest.fixture
def judged(make_context):
    """judged(bad, **changes): rewards whose model gives NaN to one response of the batches that `bad` numbers."""

    def make(bad, rl=(), **changes):
        section = {"steps": 4, "num_mini_batches": 2, "value_init": "zero", "optimizer": {"learning_rate": 1e-2, "schedule": "linear"}}
        context = make_context(rl=section | dict(rl), **changes)
        size, batches = context.decoder.config.hidden_size, iter(range(9))
        model = RewardModel(context.decoder, context.backbone, Role(head={**zero_head(size), "bias": jnp.array([0.5])}))

        class Judge(Rewards):
            def _model(self, *given):
                scores = super()._model(*given) + jnp.arange(4)
                return scores.at[1].set(jnp.nan) if next(batches) in bad else scores

        return context, Judge(context, {"run": model})

    return make


def test_a_batch_with_a_reward_that_is_no_number_is_one_skip(judged):
    context, rewards = judged({1})
    rows, trained, said = counted(rl.run(context, Role(), None, rewards, rl.init(context, Role(), None)))
    assert not said and len(rows) == 4
    assert [row["val/nonfinite_scores"] for row in rows] == [0, 1, 0, 0]
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1]
    assert trained[1] == trained[0] and trained[2] != trained[1] != trained[3]
    assert np.isnan(rows[1]["objective/scores"]) and np.isnan(rows[1]["critic/explained_variance"])
    assert "loss/policy_avg" not in rows[1] and np.isfinite(rows[2]["loss/policy_avg"])
    assert all(np.isfinite(row["objective/kl"]) for row in rows)
    # Four updates a batch of sixteen in all; the schedule goes on where it stood.
    np.testing.assert_allclose([row["lr"] for row in rows], [1e-2, 0.75e-2, 0.75e-2, 0.5e-2], rtol=1e-6)


def test_a_batch_that_would_be_learned_once_has_no_figures_of_learning(judged):
    context, rewards = judged({1}, rl={"num_mini_batches": 1, "num_ppo_epochs": 1})
    rows, _, said = counted(rl.run(context, Role(), None, rewards, rl.init(context, Role(), None)))
    assert context.config.rl.values_while_learning and not said and [row["skipped"] for row in rows] == [0, 1, 1, 1]
    assert ["critic/explained_variance" in row for row in rows] == [True, False, True, True]


def test_a_reward_that_stops_a_run_is_named_when_its_row_is_written(judged):
    context, rewards = judged({1, 2}, run={"max_nonfinite": 2})
    rows, _, said = counted(rl.run(context, Role(), None, rewards, rl.init(context, Role(), None)))
    assert [row["skipped"] for row in rows] == [0, 1, 2]
    assert "2 updates in a row were skipped" in said
    assert "because the reward 'model' is not a finite number for 1 of 4 responses" in said and "another reward model" in said


def test_a_stage_that_stopped_does_not_go_on_from_what_it_saved(judged):
    context, rewards = judged({0}, run={"max_nonfinite": 1})
    state = next(rl.run(context, Role(), None, rewards, rl.init(context, Role(), None)))[0]
    rows, _, said = counted(rl.run(context, Role(), None, rewards, state))
    assert not rows and "1 updates in a row were skipped" in said and "metrics.jsonl" in said


def test_the_row_of_the_update_that_stops_a_stage_is_written(make_context, monkeypatch):
    """The third loss is NaN, and so are all from the fifth on; `lr` is what the next update to be applied takes."""
    optimizer = {"learning_rate": 1e-2, "schedule": "linear"}
    context = make_context(sft={"steps": 10, "evaluate_every": 2, "optimizer": optimizer}, run={"max_nonfinite": 2})
    make_step, wrong = loop.make_step, iter([False, False, True, False, True, True])

    def make(loss, total, *rest):
        step, broken = make_step(loss, total, *rest), make_step(loss, lambda batch: jnp.nan * total(batch), *rest)
        return lambda *given: (broken if next(wrong) else step)(*given)

    monkeypatch.setattr(loop, "make_step", make)
    rows, trained, said = counted(sft.run(context, sft.init(context)))
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2, 3]
    np.testing.assert_allclose([row["lr"] for row in rows], [1e-2, 0.9e-2, 0.8e-2, 0.8e-2, 0.7e-2, 0.7e-2], rtol=1e-6)
    assert trained[2] == trained[1] != trained[3] == trained[5]
    # Not judged when it stops: figures that stay as they are would end a stage early, as if it were done.
    assert ["eval/loss" in row for row in rows] == [False, True, False, True, False, False]
    assert "sft: 2 updates in a row were skipped" in said and "A lower learning rate" in said
