"""A policy or reward model as a plain model in Hugging Face's layout: the adapter merged in, or the parameters after full tuning.

A reward model is a sequence classifier with one label, whose `score` is our head without its bias.

Tensors go from the backbone's files to the new ones, one at a time: the model is never in memory as a whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from pe_rlhf_jax import hosts
from pe_rlhf_jax.checkpoint.card import Form, Kind, Training, card, score_bias, scorer, scoring
from pe_rlhf_jax.checkpoint.folder import written_whole
from pe_rlhf_jax.checkpoint.peft_layout import adapted_modules, saved_whole
from pe_rlhf_jax.checkpoint.safetensors_writer import write_safetensors
from pe_rlhf_jax.checkpoint.source import Backbone
from pe_rlhf_jax.checkpoint.weights import WeightsError, account, grouped, leaf_shapes
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.families import Weight, join
from pe_rlhf_jax.types import PyTree

Dtype = Literal["bfloat16", "float16", "float32"]

# How pictures and prompts are prepared, which training does not change.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "chat_template.json")
# What `config.json` of a GGUF file's model need not say.
_DEFAULTS = {"partial_rotary_factor": 1.0}


def export_merged(
    folder: Path,
    backbone: Backbone,
    lora: PyTree | None,
    config: LoRAConfig,
    *,
    params: PyTree | None = None,
    head: PyTree | None = None,
    dtype: Dtype = "bfloat16",
    shard_bytes: int = 4_000_000_000,
    training: Training | None = None,
) -> None:
    """Write weights, `config.json`, tokenizer, chat template, of a policy `generation_config.json`, and the model card.

    An old folder is replaced as a whole.

    Args:
        backbone: whose weights are read again, from its files.
        lora: the model's adapter, or None.
        config: that the adapter is applied with.
        params: the model's own parameters after full tuning, in place of the backbone's. Of several processes the first one writes; all
            call this function together.
        head: a reward model's, {"kernel": [D, 1], "bias": [1]}; None for a policy.
        dtype: of the written weights; the sum is taken in float32.
        shard_bytes: a file's size at most (of several tensors).
        training: what the model card tells about the training.

    Raises:
        WeightsError: the backbone's weights are damaged, or a sum does not fit into the dtype.
    """
    leaves = leaf_shapes(backbone.config)
    table = backbone.family.weights(backbone.config)
    names = account(backbone.reader, backbone.family, backbone.config, [(weight, leaves[weight.leaf]) for weight in table])
    changes = {} if lora is None else _updates(lora, table, config)
    shapes, makers = {}, []
    for group, layer, name in _in_order(table, backbone.config.num_layers):
        if head is not None and group[0].leaf == ("lm_head",):  # the score takes its place
            continue
        leaf = leaves[group[0].leaf]
        shapes[name] = group[0].file_shape(leaf[1:] if group[0].per_layer else leaf)
        makers.append((name, _maker(backbone, group, layer, names[name], params, changes.get(group[0].name), dtype)))
    if head is not None:
        score = np.asarray(head["kernel"]).T
        shapes["score.weight"] = score.shape
        makers.append(("score.weight", lambda: _narrow(score, "score.weight", dtype)))
    for name, file_name in _unused(backbone, shapes).items():
        shapes[name] = backbone.reader.shape(file_name)
        makers.append((name, _maker(backbone, [], None, file_name, None, None, dtype)))
    if not hosts.first():
        if params is not None:  # parts of them lie here
            for _, make in makers:
                make()
        return
    if head is None:  # classifiers have no published names
        shapes = {backbone.family.written(name): shape for name, shape in shapes.items()}
        makers = [(backbone.family.written(name), make) for name, make in makers]
    with written_whole(folder) as unfinished:
        write_safetensors(unfinished, shapes, dtype, makers, shard_bytes)
        backbone.tokenizer.save_pretrained(unfinished)
        _for_all_versions(unfinished / "tokenizer_config.json")
        _write(unfinished / "config.json", _config(backbone, dtype, head))
        if head is None:
            _write(unfinished / "generation_config.json", _generation_config(backbone))
        for file in (backbone.reader.path / name for name in _PROCESSOR if backbone.config.vision is not None):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)
        if backbone.preprocessor is not None:
            _write(unfinished / "preprocessor_config.json", dict(backbone.preprocessor))
        if backbone.processor is not None:
            _write(unfinished / "processor_config.json", dict(backbone.processor))
        (unfinished / "README.md").write_text(
            _card(backbone, "full" if lora is None else "merged", dtype, head, training), encoding="utf-8"
        )


def _in_order(table: Sequence[Weight], num_layers: int) -> Iterator[tuple[list[Weight], int | None, str]]:
    """(weights of one tensor, layer, the tensor's name) in the order of the table, where each stack of layers stands layer by layer."""
    stacks: dict[str, list[list[Weight]]] = {}
    for group in grouped(table):
        before, layers, _ = group[0].name.partition("{layer}")
        stacks.setdefault(before if layers else group[0].name, []).append(group)
    for groups in stacks.values():
        for layer, _ in enumerate(groups[0][0].names(num_layers)):
            yield from ((group, layer if group[0].per_layer else None, group[0].name.format(layer=layer)) for group in groups)


def _unused(backbone: Backbone, shapes: Mapping[str, Any]) -> dict[str, str]:
    """Tensors of the tower that no feature is made of, but that transformers looks for: their names there and in the file."""
    names = {backbone.family.canonical(name): name for name in backbone.reader.names}
    return {name: file for name, file in names.items() if name not in shapes and "vision" in name and not name.endswith("position_ids")}


def _updates(lora: PyTree, table: Sequence[Weight], config: LoRAConfig) -> dict[str, Callable[[int], Shaped[np.ndarray, "*file"]]]:
    """For each adapted tensor, by its name in the table, a function from the layer to what is added to it, in float32.

    The layer means nothing to a tensor of a module that is trained whole.
    """

    def update(group: list[Weight], factors: dict[Weight, dict[str, Any]]) -> Callable[[int], Shaped[np.ndarray, "*file"]]:
        def of(layer: int) -> Shaped[np.ndarray, "*file"]:
            products = {
                weight: np.asarray(found["a"][layer], np.float32) @ (np.asarray(found["b"][layer], np.float32) * np.float32(config.scale))
                for weight, found in factors.items()
            }
            like = next(iter(products.values()))
            return join(group, [products.get(weight, np.zeros_like(like)) for weight in group])

        return of

    whole = {weight: _at(lora, weight.leaf) for weight in saved_whole(lora, table)}
    kernels = {group[0].name: group for group in grouped([weight for weight in table if weight.leaf[-1] == "kernel"])}
    found = {}
    for module in adapted_modules(lora, table):
        name = f"{module.name}.weight"
        found[name] = update(kernels[name], dict(zip(module.weights, module.factors(lora), strict=True)))
    for weight, added in whole.items():
        found[weight.name] = _always(join([weight], [np.asarray(added, np.float32)]))
    return found


def _always(tensor: Shaped[np.ndarray, "*file"]) -> Callable[[int], Shaped[np.ndarray, "*file"]]:
    return lambda _: tensor


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if tree is not None else None
    return tree


def _maker(
    backbone: Backbone,
    group: list[Weight],
    layer: int | None,
    file_name: str,
    params: PyTree | None,
    change: Callable[[int], Shaped[np.ndarray, "*file"]] | None,
    dtype: str,
) -> Callable[[], Shaped[np.ndarray, "*file"]]:
    def make() -> Shaped[np.ndarray, "*file"]:
        if params is None or (group[0].leaf[0] not in params):  # a tower stays the backbone's
            tensor = backbone.reader.read(file_name)
        else:
            leaves = [_leaf(params, weight) for weight in group]
            tensor = join(group, [hosts.fetch(leaf if layer is None else leaf[layer]) for leaf in leaves])
        if change is not None:
            tensor = tensor.astype(np.float32) + change(0 if layer is None else layer)
        return _narrow(tensor, file_name, dtype)

    return make


def _narrow(tensor: Shaped[np.ndarray, "*file"], name: str, dtype: str) -> Shaped[np.ndarray, "*file"]:
    """In the dtype that is written. Raises WeightsError if a number does not fit."""
    with np.errstate(over="ignore"):  # said below
        tensor = tensor.astype(jnp.dtype(dtype))
    if not np.isfinite(tensor).all():
        raise WeightsError(f"{name}: not finite in {dtype}; the file is damaged, or needs export in float32 or bfloat16")
    return tensor


def _leaf(params: PyTree, weight: Weight) -> Any:
    for name in weight.leaf:
        params = params[name]
    return params


def _config(backbone: Backbone, dtype: str, head: PyTree | None) -> dict[str, Any]:
    # With its nulls: where transformers has a default, as Mistral's window, they say that there is none.
    found = {key: value for key, value in backbone.reader.config.items() if (key, value) not in _DEFAULTS.items()}
    found["pad_token_id"] = backbone.tokenizer.pad_token_id
    architecture = backbone.family.architecture
    if head is not None:
        architecture = backbone.family.classifier
        # One label is how transformers says that there is one score.
        found |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "score_bias": score_bias(head)}
        if "text_config" in found:  # where a classifier of a model that sees looks for it
            found["text_config"] = {**found["text_config"], "pad_token_id": found["pad_token_id"]}
    # transformers 5 reads `dtype`, earlier ones `torch_dtype`.
    return {**found, "architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}


def _for_all_versions(file: Path) -> None:
    """What transformers 5 writes of a tokenizer, in the words that version 4 reads too, on which servers stand."""
    found = json.loads(file.read_text(encoding="utf-8"))
    found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    _write(file, found)


def _card(backbone: Backbone, form: Form, dtype: str, head: PyTree | None, training: Training | None) -> str:
    kind: Kind = "policy" if head is None else "reward"
    if head is None:
        auto = "AutoModelForCausalLM" if backbone.config.vision is None else "AutoModelForImageTextToText"
        usage = _USAGE.format(imported=f"from transformers import {auto}", auto=auto)
    else:
        auto, imported = scorer(backbone.family)
        usage = _USAGE.format(imported=imported, auto=auto) + scoring(backbone.family, head)
    return card(kind, form, backbone.source, backbone.sha256, {"weights": dtype}, usage, training)


def _generation_config(backbone: Backbone) -> dict[str, Any]:
    file = backbone.reader.path / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    bos = {} if backbone.tokenizer.bos_token_id is None else {"bos_token_id": backbone.tokenizer.bos_token_id}
    return {**bos, **found, "eos_token_id": list(backbone.eos_token_ids), "pad_token_id": backbone.tokenizer.pad_token_id}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


_USAGE = """\
```python
from transformers import AutoTokenizer
{imported}

model = {auto}.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```
"""
