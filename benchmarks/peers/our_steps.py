"""Steps of this project's own stages, JAX: one line of JSON.

    python benchmarks/peers/our_steps.py --what reward_lora [--steps 3] [--dtype bfloat16] [--rows 32] ...

A step is what the stage does for one: it makes the batch, computes, and fetches and counts its metrics. In PPO the reward model is an
adapter as well, on the backbone of the others and not merged into it. Full tuning keeps the backbone that it began from, as a run does.
In bfloat16, adapters, heads, what full tuning trains, and the optimizer's moments are float32, and RL makes a pass for the old
log-probabilities; in float32, those of sampling are taken. What a peer's work has otherwise stands in its script.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import work

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.data import Data, PreferenceExample, PromptExample, Split
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.programs import abstract_context
from pe_rlhf_jax.training import reward as reward_stage
from pe_rlhf_jax.training import rl
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.rewards import RewardModel, Rewards
from pe_rlhf_jax.types import TrainState

ENDLESS = 10_000  # steps of a stage, none of which is the last, where it would evaluate


def make_context(w: work.Work, *more: str) -> Context:
    """The stage's configuration and a random backbone."""
    lora = [f"lora.r={work.RANK}", f"lora.lora_alpha={work.ALPHA}", "lora.target_modules=all-linear"]
    remat = f"model.remat={'full' if w.recompute else 'none'}"
    config = configuration.parse(f"model: {{source: none, dtype: {w.dtype}}}", [remat, *lora, *more])
    context = abstract_context(config, architecture(config.model, w.model_config), jnp.dtype(w.dtype))
    params = jax.jit(context.decoder.init_params)(jax.random.key(0))
    return dataclasses.replace(context, backbone=params, tokenizer=w.tokenizer(), end_tokens=(w.end,))


def taken(w: work.Work, stage: Iterable[tuple[Any, dict[str, float]]]) -> tuple[list[dict[str, float]], list[dict], Any]:
    """Seconds of steps by part, their metrics, and the last state."""
    steps, seen, states, began = [], [], [None], time.perf_counter()
    for states[0], metrics in itertools.islice(stage, w.total):
        now = time.perf_counter()
        steps.append({"step": now - began} | {part: metrics.get(f"time/{part}", 0.0) for part in ("rollout", "score", "learn")})
        seen.append(metrics)
        began = now
    return steps, seen, states[0]


def learned(state: TrainState) -> tuple[int, int]:
    """Numbers that are trained, and updates that the optimizer counted, alike for policy and value."""
    counts = {int(count) for _, count in optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")}
    assert len(counts) == 1 and not int(state.skipped), f"updates {counts}, skipped {int(state.skipped)}"
    return sum(x.size for x in jax.tree.leaves(state.trainable)), counts.pop()


def device() -> tuple[str, int | None]:
    """Its name, and the peak of what was in use of its memory."""
    one = jax.devices()[0]
    return one.device_kind, (one.memory_stats() or {}).get("peak_bytes_in_use")


def reward(w: work.Work) -> work.Done:
    tuning = "full" if w.what == "reward_full" else "lora"
    optimizer = f"reward.optimizer.learning_rate={work.LEARNING_RATE}"
    batch = [
        f"reward.batch_size={w.pairs}",
        f"reward.micro_batch_size={w.micro_batch or 'null'}",
        f"reward.steps={ENDLESS}",
        f"reward.evaluate_every={ENDLESS}",
    ]
    context = make_context(w, f"reward.tuning={tuning}", "rl.roles=separate", optimizer, *batch)
    pairs = [PreferenceExample(np.array(x, np.int32), np.array(y, np.int32)) for x, y in zip(*w.preferences(), strict=True)]
    context = dataclasses.replace(context, data=Data(sft=None, preference=Split(pairs, []), prompts=None, notes=[]))
    with jax.set_mesh(context.mesh):
        steps, _, state = taken(w, reward_stage.run(context, Role(), reward_stage.init(context, Role())))
    rows = np.shape(reward_stage.kind_of(context.config.reward).collator(context)(pairs).tokens)
    return work.Done(steps, *learned(state), *device(), note=f"{rows[0] * rows[1]} rows of {rows[2]}")


def reinforcement(w: work.Work) -> work.Done:
    algorithm, model = w.what.partition("_")[0], w.what == "ppo_model"
    source = "{model: run}" if model else "{function: 'work:reward'}"
    batch = [f"rl.batch_size={w.rows}", f"rl.micro_batch_size={w.micro_batch or 'null'}", f"rl.group_size={w.group}"]
    batch += ["rl.num_ppo_epochs=1", f"rl.steps={ENDLESS}"]
    optimizer = f"rl.optimizer.learning_rate={work.LEARNING_RATE}"
    how = [f"rl.algorithm={algorithm}", f"rl.kl_coef={work.KL_COEF}", f"rl.sampling.max_new_tokens={w.response}", optimizer]
    context = make_context(w, f"rl.rewards=[{source}]", f"rl.value_init={'reward' if model else 'zero'}", *batch, *how)
    prompts = w.prompts()
    asked = [PromptExample(np.array(x, np.int32), text, {}) for x, text in zip(prompts, work.texts(prompts), strict=True)]
    context = dataclasses.replace(context, data=Data(sft=None, preference=None, prompts=Split(asked, []), notes=[]))
    with jax.set_mesh(context.mesh):
        judge = reward_stage.init(context, Role()).trainable if model else None
        models = {} if judge is None else {"run": RewardModel(context.decoder, context.backbone, judge)}
        stage = rl.run(context, Role(), judge, Rewards(context, models), rl.init(context, Role(), judge))
        steps, metrics, state = taken(w, stage)
    generated = round(sum(step["objective/length"] for step in metrics) * w.rows)
    return work.Done(steps, *learned(state.train), *device(), generated, "all roles on one backbone")


if __name__ == "__main__":
    rewards = dict.fromkeys(("reward_lora", "reward_lora_prompt", "reward_full"), reward)
    work.main("ours", "pe_rlhf_jax", rewards | dict.fromkeys(("ppo_model", "ppo_function", "rloo"), reinforcement))
