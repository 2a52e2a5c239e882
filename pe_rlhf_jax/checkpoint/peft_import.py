"""Adapters in PEFT's format, made by PEFT or by `export`, as the start of a stage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (teaches NumPy the name bfloat16, by which safetensors asks for it)
import numpy as np
import safetensors

from pe_rlhf_jax.checkpoint.peft_layout import PREFIX, Module, adapted_modules, modules_to_save, patterns, saved_whole, unpack
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.families import Weight
from pe_rlhf_jax.models.families.llama import LINEAR_LAYERS
from pe_rlhf_jax.types import PyTree

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SCORE = f"{PREFIX}score.weight"

# Settings under which PEFT would compute something else, and the values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "fan_in_fan_out": (False, True, None),
    # Others take parts of the backbone's weights into the adapter, and change the backbone.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


_FIT = "do lora.target_modules, lora.modules_to_save and the backbone fit the adapter?"


class AdapterError(ValueError):
    """A folder that holds no adapter, or one that does not fit; the message says what was expected and found."""


def import_adapter(
    folder: Path,
    like: PyTree,
    config: LoRAConfig,
    *,
    weights: Sequence[Weight] = LINEAR_LAYERS,
    base_model: str | None = None,
    sha256: str | None = None,
    revision: str | None = None,
    backbone: PyTree | None = None,
) -> tuple[PyTree, PyTree | None]:
    """Read an adapter in PEFT's format: (lora, head), the inverse of the exports to the bit; the head is None where there is no score.

    Factors are rounded to the dtype of `like`. Of what is trained whole the file has sums, and what they add to the backbone is read: that
    is the inverse to a float32's rounding.

    Args:
        like: the decoder's adapter, or its shapes by `jax.eval_shape(decoder.init_lora, key)`.
        config: what the adapter will be applied with; rank, scale and targets must be the file's.
        weights: the family's table, `backbone.family.weights(backbone.config)`; by default the names of Llama and those like it.
        base_model, sha256, revision: the backbone's, to be compared with what the adapter says that it was trained on, where it does.
        backbone: its parameters, needed where `like` trains modules whole (`lora.modules_to_save`).

    Raises:
        AdapterError: files are missing or unreadable; a setting, a name, a shape or the backbone differs; values are not finite.
        ValueError: modules are trained whole and the backbone is not given.
    """
    folder = Path(folder)
    whole = saved_whole(like, weights)
    if whole and backbone is None:
        raise ValueError(f"{folder} has {', '.join(modules_to_save(whole))} whole: give the backbone, of which the difference is taken")
    check_adapter(folder, like, config, weights=weights, base_model=base_model, sha256=sha256, revision=revision)
    modules, file = adapted_modules(like, weights), folder / WEIGHTS_FILE
    tensors, header = _stored(file, tensors=True)
    for name, tensor in tensors.items():
        if tensor.dtype not in (np.float32, np.float16, jnp.bfloat16):
            raise AdapterError(f"{file}: {name} is of type {tensor.dtype}, which is not supported; supported: F32, F16, BF16")
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{file}: {name} holds values that are not finite; the file is damaged")
    lora: dict[str, Any] = {}
    for module in modules:
        shapes = module.factors(like)
        stacks = [{factor: np.empty(shape[factor].shape, shape[factor].dtype) for factor in "ab"} for shape in shapes]
        for layer in range(_layers(module, like)):
            for stack, (a, b) in zip(stacks, _layer(file, module, layer, tensors, shapes, config.r), strict=True):
                stack["a"][layer], stack["b"][layer] = a, b
        for weight, stack in zip(module.weights, stacks, strict=True):
            _node(lora, weight).update({factor: jnp.asarray(x) for factor, x in stack.items()})
    for weight in whole:
        _node(lora, weight)[weight.leaf[-1]] = jnp.asarray(_added(file, weight, tensors, backbone))
    return lora, _head(file, tensors, header)


def check_adapter(
    folder: Path,
    like: PyTree,
    config: LoRAConfig,
    *,
    weights: Sequence[Weight] = LINEAR_LAYERS,
    base_model: str | None = None,
    sha256: str | None = None,
    revision: str | None = None,
) -> None:
    """Raises what `import_adapter` does of an adapter's settings, backbone and names of tensors, none of which are read."""
    modules, file = adapted_modules(like, weights), Path(folder) / WEIGHTS_FILE
    settings = _settings(file.with_name(CONFIG_FILE))
    _check_settings(file.with_name(CONFIG_FILE), settings, config, modules)
    tensors, header = _stored(file, tensors=False)
    _check_backbone(file, settings, header, base_model, sha256, revision)
    names = {name for module in modules for layer in range(_layers(module, like)) for name in module.tensor_names(layer)}
    names |= {PREFIX + weight.name for weight in saved_whole(like, weights)}
    if missing := sorted(names - tensors.keys()):
        raise AdapterError(f"{file}: {_some(missing)} missing; {_FIT}")
    if unknown := sorted(tensors.keys() - names - {SCORE}):
        raise AdapterError(f"{file}: {_some(unknown)} without a place; {_FIT}")


def _stored(file: Path, tensors: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's tensors by their names, or only these, and its header."""
    try:
        with safetensors.safe_open(file, framework="numpy") as stored:
            found = {name: stored.get_tensor(name) if tensors else None for name in stored.keys()}  # noqa: SIM118
            return found, stored.metadata() or {}
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file}: cannot be read as safetensors: {error}") from error


def _layers(module: Module, like: PyTree) -> int:
    return module.factors(like)[0]["a"].shape[0]


def _layer(
    file: Path, module: Module, layer: int, tensors: Mapping[str, np.ndarray], shapes: Sequence[Mapping[str, Any]], rank: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    names = module.tensor_names(layer)
    a, b = (tensors[name].astype(np.float32) for name in names)
    inner = shapes[0]["a"].shape[1]
    outer = shapes[0]["b"].shape[2] * module.count
    several = rank * len(module.weights)
    ranks = {rank, several} if len(module.weights) == module.count else {several}
    for name, found, expected in ((names[0], a, [(r, inner) for r in ranks]), (names[1], b, [(outer, r) for r in ranks])):
        if found.shape not in expected:
            wanted = " or ".join(str(list(shape)) for shape in sorted(expected))
            raise AdapterError(f"{file}: {name} should be {wanted}, but is {list(found.shape)}; do `lora` and the backbone fit?")
    if len(a) != b.shape[1]:
        raise AdapterError(f"{file}: {names[0]} has rank {len(a)}, but {names[1]} has {b.shape[1]}")
    try:
        return unpack(module, a, b, rank)
    except ValueError as error:
        raise AdapterError(f"{file}: {names[1]} {error}; adapt query, key and value together (lora.target_modules)") from error


def _node(lora: dict[str, Any], weight: Weight) -> dict[str, Any]:
    """Where a weight's leaves go."""
    for part in weight.leaf[:-1]:
        lora = lora.setdefault(part, {})
    return lora


def _added(file: Path, weight: Weight, tensors: Mapping[str, np.ndarray], backbone: PyTree) -> np.ndarray:
    """What a tensor of a module that was trained whole adds to the backbone's."""
    for part in weight.leaf:
        backbone = backbone[part]
    name = PREFIX + weight.name
    found, expected = tensors[name], weight.file_shape(backbone.shape)
    if found.shape != expected:
        raise AdapterError(f"{file}: {name} should be {list(expected)}, but is {list(found.shape)}; does the backbone fit?")
    return weight.take(found.astype(np.float32)) - np.asarray(backbone, np.float32)


def _head(file: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> PyTree | None:
    if SCORE not in tensors:
        return None
    score = tensors[SCORE].astype(np.float32)
    if score.ndim != 2 or len(score) != 1:
        raise AdapterError(f"{file}: {SCORE} should be [1, D], one score, but is {list(score.shape)}")
    try:
        bias = np.array([float(header.get("score_bias", 0.0))], np.float32)
    except ValueError as error:
        raise AdapterError(f"{file}: the header's score_bias should be a number, but is {header['score_bias']!r}") from error
    if not np.isfinite(bias).all():
        raise AdapterError(f"{file}: the header's score_bias is not finite; the file is damaged")
    return {"kernel": jnp.asarray(score.T), "bias": jnp.asarray(bias)}


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def _check_settings(file: Path, found: Mapping[str, Any], config: LoRAConfig, modules: Sequence[Module]) -> None:
    for key, allowed in _PLAIN.items():
        if (value := found.get(key)) not in allowed:
            raise AdapterError(f"{file}: {key}: {value!r} is not supported (only {allowed[0]!r} is)")
    for key in ("r", "lora_alpha", "use_rslora"):
        expected = getattr(config, key)
        if (value := found.get(key, False)) != expected:
            raise AdapterError(f"{file}: {key} is {value!r}, but lora.{key} is {expected!r}; set it to the adapter's")
    # A module's own rank and alpha, as export writes them where one module is several of ours.
    for key, expected in patterns(modules, config).items():
        value = found.get(key) or {}
        close = isinstance(value, dict) and all(
            isinstance(x, (int, float)) and target in expected and math.isclose(x, expected[target], rel_tol=1e-9)
            for target, x in value.items()
        )
        if not close:
            raise AdapterError(f"{file}: {key}: {value!r} is not supported (only none, or {expected!r})")
    ranks, alphas = (set(found.get(key) or ()) for key in ("rank_pattern", "alpha_pattern"))
    if alone := sorted(ranks ^ alphas):
        raise AdapterError(
            f"{file}: {', '.join(alone)} in only one of rank_pattern and alpha_pattern, which gives another scale, is not supported"
        )


_MEND = "use the same backbone, or if you know better, set model.any_backbone: true"


def _check_backbone(
    file: Path, settings: Mapping[str, Any], header: Mapping[str, str], base_model: str | None, sha256: str | None, revision: str | None
) -> None:
    trained = header.get("base_model_sha256")
    if sha256 is not None and trained is not None and trained != sha256:
        raise AdapterError(f"{file}: trained on weights with SHA-256 {trained}, but the backbone's is {sha256}; {_MEND}")
    name = settings.get("base_model_name_or_path")
    # Two names of the hub are seldom the same weights; anything else may be a copy of them.
    named = trained is None and base_model is not None and base_model.startswith("hf:") and _is_hub_name(name)
    if named and f"hf:{name}" != base_model:
        raise AdapterError(f"{file}: trained on {name!r}, but model.source is {base_model!r}; {_MEND}")
    found, ours = settings.get("revision"), revision or "main"  # what the hub gives where none is named
    if named and found is not None and found != ours:
        raise AdapterError(f"{file}: trained on revision {found!r} of {name!r}, but model.revision is {ours!r}; {_MEND}")


def _is_hub_name(name: Any) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors are"
