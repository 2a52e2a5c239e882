"""Adapters in PEFT's format, so that they serve wherever PyTorch's tools do; and back.

PEFT keeps one pair of matrices per layer, [r, in] and [out, r]; ours are stacked over layers and transposed. The reward model's score
head becomes the `score` of a sequence classifier with one label, which has no bias: ours goes into the header of the weight file (key
`score_bias`) and into the README. Loaded by PEFT, scores are lower by that constant; no comparison of two texts changes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.types import PyTree

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SCORE = "base_model.model.score.weight"
_PARENTS = {"attention": "self_attn", "mlp": "mlp"}  # our names of a layer's parts, and Hugging Face's


class AdapterError(ValueError):
    """A folder that holds no adapter, or one that does not fit; the message says what was expected and found."""


def export_policy(
    folder: Path, lora: PyTree, config: LoRAConfig, *, base_model: str, sha256: str, recipe: Mapping[str, Any] | None = None
) -> None:
    """Write a policy's adapter for `LlamaForCausalLM`; a folder that is already there is replaced as a whole.

    Args:
        lora: factors {"a": [L, in, r], "b": [L, r, out]} of every targeted module, under `layers/<part>/<module>`.
        base_model: the backbone as `model.source` names it.
        sha256: of the backbone's weight file.
        recipe: what the README tells about the training.
    """
    usage = _USAGE.format(auto="AutoModelForCausalLM", arguments="")
    _export(folder, lora, config, "CAUSAL_LM", base_model, sha256, recipe, tensors={}, header={}, usage=usage)


def export_reward(
    folder: Path, lora: PyTree, head: PyTree, config: LoRAConfig, *, base_model: str, sha256: str, recipe: Mapping[str, Any] | None = None
) -> None:
    """Write a reward model's adapter and score head for `LlamaForSequenceClassification`. Arguments as for `export_policy`.

    Args:
        head: {"kernel": [D, 1], "bias": [1]}.
    """
    bias = float(np.asarray(head["bias"], np.float32)[0])
    usage = _USAGE.format(auto="AutoModelForSequenceClassification", arguments=", num_labels=1") + _SCORING.format(bias=bias)
    tensors, header = {SCORE: np.asarray(head["kernel"]).T}, {"score_bias": repr(bias)}
    _export(folder, lora, config, "SEQ_CLS", base_model, sha256, recipe, tensors, header, usage)


def import_adapter(folder: Path, like: PyTree, config: LoRAConfig) -> tuple[PyTree, PyTree | None]:
    """Read an adapter in PEFT's format: (lora, head), the inverse of the exports to the bit; the head is None where there is no score.

    Args:
        like: the decoder's adapter, or its shapes by `jax.eval_shape`.
        config: what the adapter will be applied with; its scale must be the file's.

    Raises:
        AdapterError: files are missing or unreadable; a setting, a name or a shape differs; values are not finite.
    """
    _check_settings(folder / CONFIG_FILE, config)
    file = folder / WEIGHTS_FILE
    try:
        with safetensors.safe_open(file, framework="numpy") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            header = stored.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{file}: cannot be read as safetensors: {error}") from error
    names = {name for name, *_ in _slices(like)}
    if missing := sorted(names - tensors.keys()):
        raise AdapterError(f"{file}: {missing[0]} and {len(missing) - 1} more tensors are missing; do `lora` and the backbone fit?")
    if unknown := sorted(tensors.keys() - names - {SCORE}):
        raise AdapterError(f"{file}: {unknown[0]} and {len(unknown) - 1} more tensors have no place; do `lora` and the backbone fit?")
    stacks: dict[tuple[str, str, str], np.ndarray] = {}
    for name, path, layer, leaf in _slices(like):
        tensor = tensors[name].T
        if tensor.shape != leaf.shape[1:]:
            raise AdapterError(f"{file}: {name} should be {list(leaf.shape[:0:-1])}, but is {list(tensors[name].shape)}")
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{file}: {name} holds values that are not finite; the file is damaged")
        stacks.setdefault(path, np.empty(leaf.shape, leaf.dtype))[layer] = tensor
    lora: dict[str, Any] = {"layers": {}}
    for (part, module, factor), stack in stacks.items():
        lora["layers"].setdefault(part, {}).setdefault(module, {})[factor] = jnp.asarray(stack)
    if SCORE not in tensors:
        return lora, None
    score = np.asarray(tensors[SCORE], np.float32)
    if score.ndim != 2 or len(score) != 1 or not np.isfinite(score).all():
        raise AdapterError(f"{file}: {SCORE} should be [1, D] and finite, but is {list(score.shape)}")
    bias = np.array([float(header.get("score_bias", 0.0))], np.float32)
    return lora, {"kernel": jnp.asarray(score.T), "bias": jnp.asarray(bias)}


def _slices(lora: PyTree) -> Iterator[tuple[str, tuple[str, str, str], int, Any]]:
    """(PEFT's name, our path, layer, our stacked leaf) of every matrix of an adapter."""
    for part, modules in lora["layers"].items():
        for module, factors in modules.items():
            for factor, leaf in factors.items():
                for layer in range(leaf.shape[0]):
                    name = f"base_model.model.model.layers.{layer}.{_PARENTS[part]}.{module}.lora_{factor.upper()}.weight"
                    yield name, (part, module, factor), layer, leaf


def _export(
    folder: Path,
    lora: PyTree,
    config: LoRAConfig,
    task_type: str,
    base_model: str,
    sha256: str,
    recipe: Mapping[str, Any] | None,
    tensors: dict[str, np.ndarray],
    header: dict[str, str],
    usage: str,
) -> None:
    modules = [module for part in lora["layers"].values() for module in part]
    settings = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model.removeprefix("hf:"),
        "r": config.r,
        "lora_alpha": int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "target_modules": modules,
        "modules_to_save": ["score"] if task_type == "SEQ_CLS" else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    host: dict[str, np.ndarray] = {}
    for name, path, layer, leaf in _slices(lora):
        stack = host.setdefault("/".join(path), np.asarray(leaf))
        tensors[name] = stack[layer].T
    header = {"format": "pt", "base_model": base_model, "base_model_sha256": sha256, **header}
    kind = "Reward model" if task_type == "SEQ_CLS" else "Policy"
    rows = {"backbone": f"`{base_model}`", "SHA-256 of its weight file": f"`{sha256}`", "adapted modules": ", ".join(modules)}
    rows |= {"rank, alpha": f"{config.r}, {config.lora_alpha:g}" + (" (rank-stabilised)" if config.use_rslora else "")}
    rows |= {key: str(value) for key, value in (recipe or {}).items()}
    readme = _README.format(kind=kind, rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()), usage=usage)

    # As a whole or not at all: under another name first, then by a rename.
    folder = Path(folder)
    unfinished, replaced = (folder.with_name(f".{word}-{folder.name}") for word in ("writing", "replaced"))
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(contiguous, unfinished / WEIGHTS_FILE, metadata=header)
        (unfinished / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(readme, encoding="utf-8")
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


# Settings under which PEFT would compute something else, and the values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
}


def _check_settings(file: Path, config: LoRAConfig) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read as JSON: {error}") from error
    for key, allowed in _PLAIN.items():
        if found.get(key) not in allowed:
            raise AdapterError(f"{file}: {key}: {found.get(key)!r} is not supported (only {allowed[0]!r} is)")
    for key in ("r", "lora_alpha", "use_rslora"):
        expected = getattr(config, key)
        if found.get(key, False) != expected:
            raise AdapterError(f"{file}: {key} is {found.get(key)!r}, but lora.{key} is {expected!r}; set it to the adapter's")


_README = """\
---
library_name: peft
tags: [lora]
---
# {kind} adapter (LoRA)

|  |  |
|---|---|
{rows}

The adapter belongs to exactly these weights: on others it computes something else without a warning.

{usage}"""

_USAGE = """\
```python
from peft import PeftModel
from transformers import {auto}

# The backbone above. For one in a GGUF file: from_pretrained(folder, gguf_file="name.gguf"{arguments}).
model = {auto}.from_pretrained(backbone{arguments})
model = PeftModel.from_pretrained(model, "this folder")
```
"""

_SCORING = """
A text's score is the only logit; it is read at the last token that is not padding, so set `model.config.pad_token_id`. A text ends with
the end token, as in training. The head was trained with a bias, for which a sequence classifier has no place: add {bias!r} for the same
number. It changes no comparison.
"""
