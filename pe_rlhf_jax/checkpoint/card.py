"""Model cards: the README of an exported folder, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import yaml
from huggingface_hub import ModelCardData

from pe_rlhf_jax.config import Config
from pe_rlhf_jax.models.families import Family
from pe_rlhf_jax.types import PyTree

Kind = Literal["policy", "reward"]
Form = Literal["adapter", "merged", "full"]
"""An adapter for the backbone; a whole model with its adapter merged in; or one whose own weights were trained."""
_SECTIONS: dict[Kind, tuple[str, ...]] = {"policy": ("sft", "rl"), "reward": ("reward",)}
_PIPELINE = {"policy": "text-generation", "reward": "text-classification"}
_SEEING_PIPELINE = _PIPELINE | {"policy": "image-text-to-text"}  # the hub has no name for scoring a text about pictures
SCORING = """
A text's score is the only logit: `score.weight` times the last hidden state at the last token that is not padding, so
`model.config.get_text_config().pad_token_id` must be set. A text ends with the end token, as in training. The head was trained with a
bias, for which a sequence classifier has no place: add {bias!r} for the same number. It changes no comparison.
"""
SEEING = """
Pictures go in as the backbone's processor makes them, and prompt and answer as one text. `token_type_ids` are needed where the processor
makes them; PaliGemma's are 0 at the prompt, which is read in both directions, and 1 at the answer (the processor's `suffix`).
"""
_UNKNOWN = """\
from transformers import {prefix}PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification


class {name}(GenericForSequenceClassification, {prefix}PreTrainedModel):
    pass  # transformers has all of it but the class
"""
_COMPOSED = "put before the backbone; no file holds the two as one model, so other programs read what `export.merged` writes"
_TITLES: dict[Form, str] = {"adapter": " adapter (LoRA)", "merged": ", its adapter merged in", "full": ", tuned in full"}
_DATA = {"sft": "sft", "reward": "preference", "rl": "prompts"}


@dataclass(frozen=True)
class Figure:
    """A measured figure: its name, the value, the 95% interval or another detail, and a sentence."""

    name: str
    value: str
    interval: str
    reading: str


@dataclass(frozen=True)
class Training:
    """What a card tells about how a model was made."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Rows of a table."""
    figures: Sequence[Figure] = ()
    command: str | None = None
    configuration: str = ""
    """YAML of the sections that made it."""
    datasets: Sequence[str] = ()
    """Names on the hub."""
    tags: Sequence[str] = ()
    license: str | None = None
    """The backbone's, as its own card or file declares it."""
    sees: bool = False
    """Whether the backbone takes pictures."""


def training(
    kind: Kind,
    config: Config,
    stages: Sequence[str],
    figures: Sequence[Figure],
    command: str | None,
    license: str | None,
    sees: bool = False,
) -> Training:
    """What a run tells of its policy or reward model, given the stages that are finished; the rest as in `Training`."""
    done = [name for name in _SECTIONS[kind] if name in stages]
    recipe: dict[str, Any] = {"run": config.run.name, "seed": config.run.seed, "stages": ", ".join(done) or "none: it is where they start"}
    if config.model.revision:
        recipe["revision"] = config.model.revision
    if config.model.vision is not None:
        recipe["image encoder"] = f"`{config.model.vision.source}`, {_COMPOSED}"
    datasets: list[str] = []
    for name in done:
        recipe[name] = _stage(name, getattr(config, name))
        if sources := _sources(config, name):
            recipe[f"{name}: data"] = ", ".join(sources)
        datasets += [match[1] for source in sources if (match := re.match(r"hf:([^/:]+/[^/:]+)", source))]
    dumped = {name: getattr(config, name).model_dump(mode="json") for name in ("lora", *done)}
    tags = ["rlhf", *([config.rl.algorithm] if "rl" in done else []), *(["reward-model"] if kind == "reward" else [])]
    text = yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True)
    return Training(recipe, figures, command, text, tuple(dict.fromkeys(datasets)), tags, license, sees)


def scorer(family: Family) -> tuple[str, str]:
    """The class of a reward model on a backbone of the family, and the lines of Python that import or define it."""
    if family.has_classifier:
        return "AutoModelForSequenceClassification", "from transformers import AutoModelForSequenceClassification"
    return family.classifier, _UNKNOWN.format(prefix=family.class_prefix, name=family.classifier)


def scoring(family: Family, head: PyTree) -> str:
    """What a reward model's logit is, in Markdown."""
    return SCORING.format(bias=score_bias(head)) + (SEEING if family.image_prompt else "")


def score_bias(head: PyTree) -> float:
    """What a sequence classifier has no place for."""
    return float(np.asarray(head["bias"], np.float32)[0])


def card(kind: Kind, form: Form, base_model: str, sha256: str, rows: Mapping[str, Any], usage: str, training: Training | None) -> str:
    """The card of an adapter, or of a whole model.

    Args:
        base_model: the backbone as `model.source` names it.
        sha256: of its weight file, or as `Backbone.sha256` says.
        rows: what else the first table tells.
        usage: Markdown that says how to load the folder.
    """
    told = training or Training()
    title = {"policy": "Policy", "reward": "Reward model"}[kind] + _TITLES[form]
    table = {"backbone": f"`{base_model}`", "SHA-256 of its weights": f"`{sha256}`", **rows, **told.recipe}
    parts = [
        f"# {title}",
        "Made with pe_rlhf_jax: parameter-efficient reinforcement learning from human feedback, in JAX.",
        _table(("", ""), table.items()),
        usage.strip(),
    ]
    if form == "adapter":
        parts.insert(3, "The adapter belongs to exactly these weights: on others it computes something else without a warning.")
    if told.command:
        parts += ["## How it was made", f"```bash\n{told.command}\n```"]
    if told.configuration:
        parts += [f"<details><summary>Configuration</summary>\n\n```yaml\n{told.configuration.strip()}\n```\n\n</details>"]
    if told.figures:
        parts += ["## Results", _table(("figure", "value", "", ""), [(f.name, f.value, f.interval, f.reading) for f in told.figures])]
    declared = f"it declares `{told.license}`" if told.license else "its own card says which they are"
    parts += ["## Licence", f"Licence and terms of the backbone apply to what is made of it; {declared}."]
    return f"---\n{_front_matter(kind, form, base_model, told)}\n---\n" + "\n\n".join(parts) + "\n"


def _front_matter(kind: Kind, form: Form, base_model: str, told: Training) -> str:
    # Only names of the hub: it refuses others. A file's or package's name stands in the table.
    hub = base_model.removeprefix("hf:") if base_model.startswith("hf:") else None
    data = ModelCardData(
        base_model=hub,
        base_model_relation=("adapter" if form == "adapter" else "finetune") if hub else None,
        datasets=list(told.datasets) or None,
        library_name="peft" if form == "adapter" else "transformers",
        license=told.license,
        pipeline_tag=(_SEEING_PIPELINE if told.sees else _PIPELINE)[kind],
        tags=["pe_rlhf_jax", *(["lora"] if form == "adapter" else []), *told.tags],
    )
    return data.to_yaml().strip()


def _stage(name: str, section: Any) -> str:
    """A stage's headline; the configuration has the rest."""
    optimizer = section.optimizer
    said = [f"{section.steps} steps of {section.batch_size}", f"learning rate {optimizer.learning_rate:g} ({optimizer.schedule})"]
    if name == "rl":
        said = [section.algorithm, *said, f"KL coefficient {section.kl_coef:g}"]
        said += [f"temperature {section.sampling.temperature:g}", f"at most {section.sampling.max_new_tokens} new tokens"]
    if name == "reward":
        said = [section.kind, *said]
    return ", ".join([*said, {"lora": "adapter", "full": "all weights"}[section.tuning]])


def _sources(config: Config, stage: str) -> list[str]:
    """Where a stage's rows come from; of files, the names only."""
    kind = "label" if stage == "reward" and config.reward.kind == "labels" else _DATA[stage]
    files = getattr(config.data, kind)
    if files is None:
        return [config.data.source] if config.data.source else []
    return [name if name.startswith(("hf:", "tfds:")) else name.replace("\\", "/").rpartition("/")[2] for name in files.train]


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
