"""Reading `config.json`: values of a kind, or an error that names the key; and what the Llama-like families share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import Activation
from pe_rlhf_jax.models.families.family import UnsupportedModelError
from pe_rlhf_jax.models.rope import RopeScaling

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Keys whose presence would change what is computed, in families that have no other word for it.
_NEVER: dict[str, Any] = {
    "quantization_config": None,
    "num_local_experts": None,
    "num_experts": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
}
Fields = Mapping[str, Any]


def only(config: Fields, expected: Mapping[str, Any]) -> None:
    """Refuses a key that is set to another value than the decoder computes; a tuple is a choice, and None is always fine."""
    for key, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if (found := config.get(key)) is not None and found not in allowed:
            raise UnsupportedModelError(f"{key}: {found!r} is not supported (only {allowed[0]!r} is)")


def positive(config: Fields, key: str, default: Any = None, kind: type = int) -> Any:
    """A positive number. Without a default the key must be there."""
    found = config.get(key)
    if found is None and default is not None:
        return default
    allowed = (int, float) if kind is float else (int,)
    # 2**31: what indices on devices hold, and more than any model has of anything.
    if isinstance(found, bool) or not isinstance(found, allowed) or not 0 < found < (float("inf") if kind is float else 2**31):
        raise UnsupportedModelError(f"{key}: expected a positive {kind.__name__}, found {found!r}")
    return kind(found)


def layer_count(config: Fields) -> int:
    """The number of layers, which no published model has thousands of: lists of that length are made."""
    count: int = positive(config, "num_hidden_layers")
    if count > 9_999:
        raise UnsupportedModelError(f"num_hidden_layers: {count} is more than any model has")
    return count


def optional(config: Fields, key: str, default: Any = None, kind: type = float) -> Any:
    """A positive number, or None where the file says null; a key that is not there has the default."""
    return default if key not in config else None if config[key] is None else positive(config, key, kind=kind)


def flag(config: Fields, key: str, default: bool) -> bool:
    """True or false."""
    found = config.get(key, default)
    if not isinstance(found, bool):
        raise UnsupportedModelError(f"{key}: expected true or false, found {found!r}")
    return found


def activation(config: Fields, key: str, default: str) -> Activation:
    """The MLP's activation by its name."""
    found = config.get(key) or default
    if not isinstance(found, str) or found not in ACTIVATIONS:
        raise UnsupportedModelError(f"{key}: {found!r} is not supported (only {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[found]


def layers(config: Fields, key: str, wanted: Any, known: tuple[Any, ...], default: list[Any]) -> tuple[int, ...]:
    """Indices of the layers for which a list with one entry per layer says `wanted`; other entries must be `known`."""
    found = config.get(key) or default
    count = layer_count(config)
    if not isinstance(found, list) or len(found) < count:
        raise UnsupportedModelError(f"{key}: expected a list of {count} entries, found {found!r}")
    for value in found[:count]:
        if isinstance(value, (list, dict)) or value not in known:
            raise UnsupportedModelError(f"{key}: {value!r} is not supported (only {', '.join(map(repr, known))})")
    return tuple(i for i in range(count) if found[i] == wanted)


def windows(config: Fields, default: list[str]) -> tuple[int, ...]:
    """Indices of the layers with a sliding window."""
    return layers(config, "layer_types", "sliding_attention", ("sliding_attention", "full_attention"), default)


def rope(config: Fields, theta: float, kind: str | None = None, partial: bool = False) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions; `theta` is the family's default base.

    transformers before version 5 wrote rope_theta and rope_scaling, later ones rope_parameters with both, and with one such
    section per kind of layer where these differ: `kind` is the one to read. `partial` allows for a rotation of a part of each head.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    section = config.get(key) or {}
    if isinstance(section, Mapping) and kind is not None and isinstance(section.get(kind), Mapping):
        section = section[kind]
    if not isinstance(section, Mapping) or any(isinstance(value, Mapping) for value in section.values()):
        raise UnsupportedModelError(f"{key}: expected one set of values, found {section!r}")
    type_ = section.get("rope_type", section.get("type", "default"))
    if type_ not in ROPE_TYPES:
        raise UnsupportedModelError(f"{key}: rope type {type_!r} is not supported (only {', '.join(ROPE_TYPES)})")
    if not partial:
        only(section, {"partial_rotary_factor": 1.0})
        only(config, {"partial_rotary_factor": 1.0})
    theta = positive(section if section.get("rope_theta") is not None else config, "rope_theta", theta, float)
    if type_ == "default":
        return theta, None
    factor = positive(section, "factor", kind=float)
    if type_ == "linear":
        return theta, RopeScaling("linear", factor)
    length = positive(config, "original_max_position_embeddings", positive(config, "max_position_embeddings"))
    length = positive(section, "original_max_position_embeddings", length)
    if type_ == "llama3":
        low, high = (positive(section, f"{word}_freq_factor", kind=float) for word in ("low", "high"))
        if not low < high:
            raise UnsupportedModelError(f"{key}: low_freq_factor {low} must be below high_freq_factor {high}")
        return theta, RopeScaling("llama3", factor, length, low, high)
    fast, slow = positive(section, "beta_fast", 32.0, float), positive(section, "beta_slow", 1.0, float)
    long = section.get("attention_factor")
    long = _yarn_length(section, factor) if long is None else positive(section, "attention_factor", kind=float)
    truncate = flag(section, "truncate", True)
    return theta, RopeScaling("yarn", factor, length, beta_fast=fast, beta_slow=slow, truncate=truncate, attention_factor=long)


def _yarn_length(section: Fields, factor: float) -> float:
    def length(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weights = [section.get(key) for key in ("mscale", "mscale_all_dim")]
    if all(weights):
        one, other = (positive(section, key, kind=float) for key in ("mscale", "mscale_all_dim"))
        return length(one) / length(other)
    return length(1.0)


def sizes(config: Fields, *, kv_heads: bool = False, head_dim: bool = False, tied: bool = False) -> dict[str, Any]:
    """The fields that all Llama-like families read alike.

    With `kv_heads` or `head_dim` the key must be there, as its default does not follow from the others; `tied` is the default.
    """
    only(config, _NEVER)
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    shared = positive(config, "num_key_value_heads", None if kv_heads else heads)
    size = positive(config, "head_dim", None if head_dim else max(hidden // heads, 1))
    check_heads(heads, shared, size)
    return {
        "vocab_size": positive(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": positive(config, "intermediate_size"),
        "num_layers": layer_count(config),
        "num_heads": heads,
        "num_kv_heads": shared,
        "head_dim": size,
        "rms_norm_eps": positive(config, "rms_norm_eps", 1e-6, float),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", tied),
        "max_position_embeddings": positive(config, "max_position_embeddings", 2048),
    }


def check_heads(heads: int, kv_heads: int, rotated: int) -> None:
    """Refuses heads that cannot be grouped or rotated."""
    if heads % kv_heads:
        raise UnsupportedModelError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    if rotated % 2:
        raise UnsupportedModelError(f"head_dim {rotated} is odd; rotary positions turn pairs")
