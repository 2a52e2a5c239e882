"""Reinforcement learning: sampling, rewards, the algorithm. Field names follow TRL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pe_rlhf_jax.config.optimizer import OptimizerConfig
from pe_rlhf_jax.config.section import Section
from pe_rlhf_jax.files import path_of

LEARNING_RATE = 1e-4
"""Of RL, where `rl.optimizer` names none."""


class SamplingConfig(Section):
    """Sampling of responses."""

    max_new_tokens: int = Field(64, ge=1, description="Longest response that is generated, in tokens, end included.")
    temperature: float = Field(1.0, ge=0, description="0 is greedy. Divides the logits in every log-probability of RL as well.")
    top_k: int = Field(0, ge=0, description="Sample among the k most likely tokens; 0 for all.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample among the fewest tokens that hold this probability; 1 for all. With this or `top_k`, estimates of RL's KL are "
        "wrong, because log-probabilities are those of all tokens.",
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="Responses that are sampled at once, in RL and in evaluation. With fewer than the batch has, the next prompts take the "
        "places of responses that have ended (continuous batching): a few long ones hold up nothing, the cache is smaller, and the samples "
        "are the same. null for the whole batch.",
    )
    gather_weights: bool = Field(
        False,
        description="Gather the weights over `mesh.fsdp` once for all the tokens of a batch of responses, in place of once for each token: "
        "far faster, and each device meanwhile holds them whole, or its part of `mesh.tensor`. The samples are the same.",
    )
    join_weights: bool | None = Field(
        None,
        description="For the tokens of a batch of responses, join q, k, v and gate, up of each layer to one matrix each, their adapters "
        "too: fewer and larger products, which a GPU does faster (a CPU does not), and meanwhile a copy of these matrices, about half of "
        "the backbone, and a program in which every layer is written out. The samples are the same to rounding. Only where each device "
        "holds whole, unquantized weights. null: on NVIDIA GPUs.",
    )
    stop_strings: tuple[str, ...] = Field(
        (),
        strict=False,
        description="A response ends with the token that completes one of these; what was sampled after it is dropped. It is "
        "then judged without an end token, and as one that ended.",
    )

    @field_validator("stop_strings")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("a stop string must not be empty")
        return value

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never sampled."""
        return self.top_k > 0 or self.top_p < 1

    def rows_at_once(self, batch_size: int) -> int:
        """Responses of a batch that are sampled at once."""
        return min(self.max_num_seqs or batch_size, batch_size)


class RewardTermConfig(Section):
    """One of the rewards whose weighted sum RL maximises: a reward model or a function."""

    model: str | None = Field(
        None, description="`run` for this run's reward model, or the folder of another run, whose reward model is used as it is."
    )
    function: str | None = Field(
        None, description="`module:function`, called as f(prompts, completions, **columns) -> list of float, one for each completion."
    )
    weight: float = Field(1.0, description="Factor in the sum; 0 only watches it: logged, but never trained on.")

    @model_validator(mode="after")
    def _one_source(self) -> RewardTermConfig:
        if (self.model is None) == (self.function is None):
            raise ValueError("a reward needs either `model` or `function`")
        if self.model is not None:
            path_of(self.model)  # raises where there is no such kind of place
        return self

    @property
    def name(self) -> str:
        """Under which it is logged."""
        if self.function is not None:
            return self.function.rpartition(":")[2]
        return "model" if self.model == "run" else Path(str(self.model)).name


class RLConfig(Section):
    algorithm: Literal["ppo", "reinforce", "rloo", "grpo"] = Field(
        "ppo",
        description="PPO with GAE and clipping; the paper's REINFORCE with a learned value baseline, one update a batch; or, without a "
        "value model, RLOO or GRPO, whose baselines are the other responses to the same prompt. Losses are means over the tokens of an "
        "update, so that a long response weighs more than a short one.",
    )
    tuning: Literal["lora", "full"] = Field("lora", description="Train adapters on the shared backbone, or a copy of the backbone.")
    roles: Literal["shared", "separate"] = Field(
        "shared",
        description="`shared`: policy, reference, reward and value are adapters on one backbone in memory. `separate`: the reward model "
        "has a backbone of its own (its adapter merged into it), which may be another, larger one; needed where anything is fully tuned.",
    )
    rewards: tuple[RewardTermConfig, ...] = Field(
        (RewardTermConfig(model="run"),), strict=False, min_length=1, description="What is maximised: the weighted sum of these."
    )
    steps: int = Field(100, ge=1, description="Rollout batches.")
    batch_size: int = Field(32, ge=1, description="Episodes in a rollout batch.")
    group_size: int = Field(4, ge=2, description="RLOO, GRPO: responses to each prompt; must divide batch_size.")
    num_ppo_epochs: int = Field(4, ge=1, description="Passes over a rollout batch; REINFORCE makes one update a batch instead.")
    num_mini_batches: int = Field(1, ge=1, description="Updates per pass; must divide the batch.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Episodes computed at once, in updates (gradient accumulation), scores, log-probabilities and values, and where the "
        "policy is evaluated; null for all.",
    )
    sampling: SamplingConfig = Field(SamplingConfig(), description="How responses are sampled.")
    old_logprobs: Literal["sampler", "recompute"] | None = Field(
        None,
        description="Log-probabilities of a rollout under the policy that made it: those that it was sampled with, or another forward "
        "pass. null: the sampler's where the model computes in float32, in which they are the same to rounding (`val/sampler_kl`).",
    )
    kl_coef: float = Field(0.05, ge=0, description="Weight of the KL penalty; the paper's beta, whose objective is (1 - beta) r - beta KL.")
    kl_target: float | None = Field(None, gt=0, description="Adapt kl_coef to this mean KL per response (nats); null keeps it fixed.")
    kl_horizon: float = Field(10_000, gt=0, description="Episodes over which an adaptive coefficient moves.")
    gamma: float = Field(1.0, ge=0, le=1, description="PPO, REINFORCE: discount.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    cliprange: float = Field(0.2, gt=0, description="PPO, RLOO, GRPO: clip of the probability ratio.")
    cliprange_value: float = Field(0.2, gt=0, description="PPO: clip of the value change.")
    vf_coef: float = Field(
        0.1,
        ge=0,
        description="PPO, and REINFORCE with `value_model: trunk`: weight of the value loss beside the policy's. It matters with `trunk`, "
        "where both move one adapter; a value model of its own has an optimizer of its own, for which `value_learning_rate` counts.",
    )
    scale_rewards: bool = Field(True, description="GRPO: divide a group's advantages by its standard deviation.")
    whiten_rewards: bool = Field(False, description="PPO, REINFORCE: scale token rewards to unit variance, keeping their mean.")
    whiten_advantages: bool = Field(True, description="PPO: whiten advantages under the mask.")
    missing_eos_penalty: float | None = Field(
        None,
        le=0,
        description="A response without an end token scores at most this, which should be less than what ended ones get (TRL takes it off "
        "instead); null keeps the rewards' score.",
    )
    length_penalty: float = Field(0.0, ge=0, description="Taken off the score for each response token beyond `length_target`.")
    length_target: int = Field(0, ge=0, description="Tokens of a response that cost nothing.")
    normalize_rewards: bool = Field(False, description="Scale scores by the running mean and standard deviation of all so far.")
    reward_clip: float | None = Field(None, gt=0, description="Keep scores between minus this and this, after `normalize_rewards`.")
    value_model: Literal["adapter", "trunk"] = Field(
        "adapter", description="The value model has its own adapter and head (the paper), or is a head on the policy's hidden states."
    )
    value_tuning: Literal["lora", "full"] | None = Field(None, description="Tuning of the value model, where not the policy's.")
    value_init: Literal["reward", "zero"] | None = Field(
        None,
        description="Value adapter and head start from the reward model, or from the backbone with a zero head: better where "
        "`normalize_rewards`, weights or other rewards put scores on another scale than that model's. null: from the reward model, but "
        "`trunk` from zero, because that model's head was not fitted to the policy's hidden states.",
    )
    value_learning_rate: float | None = Field(None, gt=0, description="Learning rate of the value model; null for the optimizer's own.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(learning_rate=LEARNING_RATE), description="Optimizer of policy and value.")

    @field_validator("optimizer", mode="before")
    @classmethod
    def _own_learning_rate(cls, value: Any) -> Any:
        """Where only other fields are set, the learning rate stays RL's, not that of other stages."""
        return {"learning_rate": LEARNING_RATE, **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _batches_nest(self) -> RLConfig:
        if self.batch_size % self.num_mini_batches:
            raise ValueError(f"num_mini_batches {self.num_mini_batches} does not divide batch_size {self.batch_size}")
        if not self.has_critic and self.batch_size % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide batch_size {self.batch_size}")
        if self.value_model == "trunk" and self.value_tuning is not None:
            raise ValueError("value_model trunk is a head on the policy and has no tuning of its own; leave value_tuning out")
        if len({term.name for term in self.rewards}) < len(self.rewards):
            raise ValueError(
                f"two rewards are called alike: {', '.join(term.name for term in self.rewards)}; each is logged under its function's or "
                "its folder's name, so rename one of them"
            )
        if not any(term.weight for term in self.rewards):
            raise ValueError("all rewards have weight 0, so there is nothing to maximise")
        if self.algorithm == "reinforce" and (self.kl_coef > 1 or self.kl_target is not None):
            raise ValueError(
                "reinforce maximises (1 - kl_coef) r - kl_coef KL: kl_coef must be a fixed number of at most 1, without kl_target"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target steers by multiplying kl_coef, which would stay 0; begin with a kl_coef above 0")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0 in RL: a greedy policy has no log-probability to learn from")
        return self

    @property
    def has_critic(self) -> bool:
        """Whether the algorithm learns a value model."""
        return self.algorithm in ("ppo", "reinforce")

    @property
    def uses_reward_stage(self) -> bool:
        """Whether one of the rewards is this run's reward model."""
        return any(term.model == "run" for term in self.rewards)

    @property
    def answers_each(self) -> int:
        """Responses to each prompt of a batch; they are neighbours."""
        return 1 if self.has_critic else self.group_size

    @property
    def epochs(self) -> int:
        """Passes over a batch."""
        return 1 if self.algorithm == "reinforce" else self.num_ppo_epochs

    @property
    def mini_batches(self) -> int:
        """Updates per pass over a batch."""
        return 1 if self.algorithm == "reinforce" else self.num_mini_batches

    @property
    def updates_a_batch(self) -> int:
        """In all its passes."""
        return self.epochs * self.mini_batches

    @property
    def values_while_learning(self) -> bool:
        """Whether the value model says its values in the pass in which it learns, the only one that it makes over a batch.

        Not so a head on the policy where advantages are whitened over the whole batch: in that pass the policy learns from them.
        """
        needed_before = self.value_model == "trunk" and self.algorithm == "ppo" and self.whiten_advantages
        return self.has_critic and self.updates_a_batch == 1 and not needed_before

    @property
    def value_from_reward(self) -> bool:
        """Whether a value model starts from this run's reward model."""
        return self.has_critic and (self.value_init or {"adapter": "reward", "trunk": "zero"}[self.value_model]) == "reward"

    def keeps_sampled_logprobs(self, dtype: str) -> bool:
        """Whether a policy that computes in this dtype takes its sampler's log-probabilities as the old ones."""
        return self.old_logprobs == "sampler" if self.old_logprobs is not None else dtype == "float32"

    def tuning_of(self, role: str) -> Literal["lora", "full"]:
        """How `policy` or `value` is tuned."""
        return self.value_tuning or self.tuning if role == "value" else self.tuning
