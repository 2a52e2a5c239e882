"""Adapters in PEFT's format, so that they serve wherever PyTorch's tools do (`peft_layout` says how); `peft_import` is the way back.

The reward model's score head becomes the `score` of a sequence classifier with one label, which has no bias: ours goes into the header of
the weight file (key `score_bias`) and into the README. Loaded by PEFT, scores are lower by that constant; no comparison of two texts
changes. Of most families that see transformers has no such class, but everything of it: the README has the lines that define it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from pe_rlhf_jax.checkpoint.card import Kind, Training, card, score_bias, scorer, scoring
from pe_rlhf_jax.checkpoint.folder import written_whole
from pe_rlhf_jax.checkpoint.peft_import import CONFIG_FILE, SCORE, WEIGHTS_FILE, AdapterError, import_adapter
from pe_rlhf_jax.checkpoint.peft_layout import PREFIX, adapted_modules, modules_to_save, pack, patterns, saved_whole, target_modules
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.families import Family, Weight, join
from pe_rlhf_jax.models.families.llama import LINEAR_LAYERS, LLAMA
from pe_rlhf_jax.types import PyTree

__all__ = ["AdapterError", "export_policy", "export_reward", "import_adapter"]


def export_policy(
    folder: Path,
    lora: PyTree,
    config: LoRAConfig,
    *,
    base_model: str,
    sha256: str,
    revision: str | None = None,
    training: Training | None = None,
    weights: Sequence[Weight] = LINEAR_LAYERS,
    backbone: PyTree | None = None,
) -> None:
    """Write a policy's adapter for the backbone's causal language model; a folder that is already there is replaced as a whole.

    Args:
        lora: factors {"a": [L, in, r], "b": [L, r, out]} of every targeted module, under `layers/<part>/<module>`.
        base_model: the backbone as `model.source` names it.
        sha256: of the backbone's weight file.
        revision: of the backbone on the hub, where one was named.
        training: what the model card tells about the training.
        weights: the family's table, `backbone.family.weights(backbone.config)`; by default the names of Llama and those like it.
        backbone: the backbone's parameters, needed where the adapter trains modules whole: what is written is their sum.

    Raises:
        ValueError: the adapter is not of that family, or trains modules whole and the backbone is not given.
    """
    auto = "AutoModelForImageTextToText" if any(weight.leaf[0] == "vision" for weight in weights) else "AutoModelForCausalLM"
    usage = _usage(f"from transformers import {auto}", auto, revision)
    tensors = _sums(lora, weights, backbone)
    _export(folder, lora, config, "policy", base_model, sha256, revision, training, weights, tensors, header={}, usage=usage)


def export_reward(
    folder: Path,
    lora: PyTree,
    head: PyTree,
    config: LoRAConfig,
    *,
    base_model: str,
    sha256: str,
    revision: str | None = None,
    training: Training | None = None,
    weights: Sequence[Weight] = LINEAR_LAYERS,
    backbone: PyTree | None = None,
    family: Family = LLAMA,
) -> None:
    """Write a reward model's adapter and score head for the backbone's sequence classifier. Arguments and errors as of `export_policy`.

    Args:
        head: {"kernel": [D, 1], "bias": [1]}.
        family: the backbone's, whose classifier the README loads.
    """
    auto, imported = scorer(family)
    usage = _usage(imported, auto, revision, ", num_labels=1") + scoring(family, head)
    tensors = {SCORE: np.asarray(head["kernel"]).T, **_sums(lora, weights, backbone)}
    header = {"score_bias": repr(score_bias(head))}
    _export(folder, lora, config, "reward", base_model, sha256, revision, training, weights, tensors, header, usage)


def _export(
    folder: Path,
    lora: PyTree,
    config: LoRAConfig,
    kind: Kind,
    base_model: str,
    sha256: str,
    revision: str | None,
    training: Training | None,
    weights: Sequence[Weight],
    tensors: dict[str, np.ndarray],
    header: dict[str, str],
    usage: str,
) -> None:
    modules, whole = adapted_modules(lora, weights), modules_to_save(saved_whole(lora, weights))
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _TASKS[kind],
        "base_model_name_or_path": base_model.removeprefix("hf:"),
        "revision": revision,
        "r": config.r,
        "lora_alpha": _plain(config.lora_alpha),
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "target_modules": target_modules(modules, weights),
        "modules_to_save": [*(["score"] if kind == "reward" else []), *whole] or None,
        "bias": "none",
        "fan_in_fan_out": not modules[0].weights[0].transposed,  # for merging only; the factors lie alike
        "inference_mode": True,
    }
    for key, values in patterns(modules, config).items():
        if values:
            settings[key] = {target: _plain(value) for target, value in values.items()}
    for module in modules:
        factors = [{name: np.asarray(leaf, np.float32) for name, leaf in found.items()} for found in module.factors(lora)]
        for layer in range(len(factors[0]["a"])):
            packed = pack(module, [found["a"][layer] for found in factors], [found["b"][layer] for found in factors])
            tensors |= zip(module.tensor_names(layer), packed, strict=True)
    header = {"format": "pt", "base_model": base_model, "base_model_sha256": sha256, **header}
    rows = {
        "adapted modules": ", ".join(module.target for module in modules),
        "rank, alpha": f"{config.r}, {config.lora_alpha:g}" + (" (rank-stabilised)" if config.use_rslora else ""),
    }
    readme = card(kind, "adapter", base_model, sha256, rows, usage, training)

    with written_whole(folder) as unfinished:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(contiguous, unfinished / WEIGHTS_FILE, metadata=header)
        (unfinished / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(readme, encoding="utf-8")


def _sums(lora: PyTree, weights: Sequence[Weight], backbone: PyTree | None) -> dict[str, np.ndarray]:
    """The tensors of what is trained whole, by their names in PEFT's file."""
    whole = saved_whole(lora, weights)
    if whole and backbone is None:
        raise ValueError(f"the adapter trains {', '.join(modules_to_save(whole))} whole, of which the sum is written: give the backbone")
    return {PREFIX + weight.name: _sum(weight, backbone, lora) for weight in whole}


def _sum(weight: Weight, backbone: PyTree, lora: PyTree) -> np.ndarray:
    """A tensor of a module that is trained whole, in float32 as it is trained."""
    base, added = backbone, lora
    for name in weight.leaf:
        base, added = base[name], added[name]
    return join([weight], [np.asarray(base, np.float32) + np.asarray(added, np.float32)])


def _plain(number: float) -> float:
    """As an int where it is one, as PEFT's files have it."""
    return int(number) if number == int(number) else number


_TASKS: dict[Kind, str] = {"policy": "CAUSAL_LM", "reward": "SEQ_CLS"}


def _usage(imported: str, auto: str, revision: str | None, arguments: str = "") -> str:
    """Markdown that loads an adapter, given the class of its model and arguments of `from_pretrained`."""
    return _USAGE.format(imported=imported, auto=auto, arguments=arguments + (f", revision={revision!r}" if revision else ""))


_USAGE = """\
```python
from peft import PeftModel
{imported}

# The backbone above. For one in a GGUF file: from_pretrained(folder, gguf_file="name.gguf"{arguments}).
model = {auto}.from_pretrained(backbone{arguments})
model = PeftModel.from_pretrained(model, "this folder")
```
"""
