"""What a run refuses before anything is trained: stages that will not find what they begin from, or rows that teach nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.models.vlm import adapts_tower
from pe_rlhf_jax.outcomes import ROLE_OF, Outcomes
from pe_rlhf_jax.training import reward, rl, sft
from pe_rlhf_jax.training.context import Context


class Checked(Protocol):
    """What is looked at of a run."""

    config: Config
    folder: Path
    store: Store
    context: Context
    outcomes: Outcomes

    def evaluated(self) -> bool:
        """Whether what is there now was evaluated."""


def order(run: Checked) -> None:
    """Raises ConfigError, before anything is trained, for what a stage is going to need and will not find."""
    stages, config = run.config.run.stages, run.config.rl
    reference(run)
    trained = run.store.latest(ROLE_OF[rl.STAGE]) is not None
    towers(run)
    if "reward" in stages and run.store.latest(reward.STAGE) is None:
        reward.check(run.context)
        reward.check_labels(run.context, "reward.evaluation_pairs", run.config.reward.evaluation_pairs)
        if "evaluate" in stages:
            reward.check_labels(run.context, "evaluate.pairs", run.config.evaluate.pairs)
    if "rl" in stages and not trained and config.value_model == "trunk" and config.value_from_reward:
        raise ConfigError(
            "rl.value_model trunk reads the policy's hidden states, to which the reward model's head was not fitted; set rl.value_init "
            "to zero"
        )
    if ("rl" in stages and not trained) or ("evaluate" in stages and trained and not run.evaluated()):
        run.outcomes.check_other_runs()
    if "rl" in stages and not trained and config.roles == "shared":
        for stage in (sft.STAGE, reward.STAGE):
            if run.store.latest(ROLE_OF[stage]) is not None and getattr(run.config, stage).tuning == "full":
                raise ConfigError(f"rl.roles shared keeps one backbone in memory, but {stage} was tuned in full; set rl.roles: separate")
    sft_missing = run.store.latest(ROLE_OF[sft.STAGE]) is None and run.config.model.adapter is None
    if "reward" in stages and run.config.reward.start_from == "sft" and sft_missing and "sft" not in stages[: stages.index("reward")]:
        raise ConfigError(
            f"reward.start_from sft needs an SFT model, and {run.folder} has none; run the stage `sft` first, or name one as model.adapter"
        )
    if "rl" not in stages or "reward" in stages[: stages.index("rl")] or run.store.latest(ROLE_OF[reward.STAGE]) is not None:
        return
    if config.uses_reward_stage:
        raise ConfigError(f"stage rl needs a reward model, and {run.folder} has none; run the stage `reward` first")
    if config.value_from_reward:
        raise ConfigError(
            f"rl.value_init reward starts the value model from this run's reward model, and {run.folder} has none; set it to zero"
        )


def towers(run: Checked) -> None:
    """Raises ConfigError if a stage would tune in full what an earlier one, or a named adapter, leaves with an adapter on the tower."""
    stages, config = run.config.run.stages, run.config
    if not adapts_tower(config.lora) or run.context.decoder.config.vision is None:
        return
    done = {stage: run.store.latest(outcome) is not None for stage, outcome in ROLE_OF.items()}
    has_sft = sft.STAGE in stages or done[sft.STAGE]
    of_sft = config.sft.tuning == "lora" if has_sft else run.context.base.lora is not None
    start = of_sft if config.reward.start_from == "sft" else run.context.reward_base.lora is not None
    value = config.rl.value_from_reward and config.rl.value_model == "adapter" and config.reward.tuning == "lora"
    starts = {
        "reward.tuning": (reward.STAGE, config.reward.tuning, start),
        "rl.tuning": (rl.STAGE, config.rl.tuning, of_sft),
        "rl.value_tuning": (rl.STAGE, config.rl.tuning_of("value"), value),
    }
    for field, (stage, tuning, adapted) in starts.items():
        if stage in stages and not done[stage] and tuning == "full" and adapted:
            raise ConfigError(
                f"{field} full would start from an adapter on the vision tower, which is the backbone's and stays as it is; set it to "
                "lora, or let lora.target_modules leave the tower out"
            )


def reference(run: Checked) -> None:
    """Raises ConfigError if a stage would begin from another reference than the one that SFT leaves, or has begun from another."""
    stages = run.config.run.stages
    if run.store.latest(ROLE_OF[sft.STAGE]) is not None:
        return
    # Full tuning leaves the very parameters that an adapter stands on, and a finished reward model is an adapter on its reference.
    stands = run.store.latest(ROLE_OF[reward.STAGE]) is None or run.config.sft.tuning == "full"
    from_sft = run.config.reward.start_from == "sft" and stands
    for stage in (rl.STAGE, *((reward.STAGE,) if from_sft else ())):
        before = stages[: stages.index(stage)] if stage in stages else stages
        if sft.STAGE not in before:
            if stage in stages and sft.STAGE in stages:
                raise ConfigError(f"run.stages: {stage} begins from what sft leaves; put sft before it")
            if stage in stages and run.store.latest(sft.STAGE) is not None:
                raise ConfigError(f"{run.folder} has an SFT that has not ended, and {stage} begins from what it leaves; run sft first")
        elif run.store.latest(stage) is not None:
            raise ConfigError(
                f"{run.folder} has a stage {stage} that began without SFT, which would change what it began from; leave sft out of "
                "run.stages, or give another run.name"
            )
