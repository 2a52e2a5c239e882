"""Vision towers of the families that see pictures: SigLIP (Zhai et al. 2023), CLIP (Radford et al. 2021), DINOv2 (Oquab et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pe_rlhf_jax.models.architecture import TowerConfig
from pe_rlhf_jax.models.families.family import UnsupportedModelError, Weight
from pe_rlhf_jax.models.families.reading import activation, flag, layer_count, only, positive

# Files leave out what equals transformers' defaults.
_SIZES = {"num_hidden_layers": 12, "num_channels": 3}
_SIGLIP = {**_SIZES, "intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "image_size": 224}
DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {**_SIGLIP, "hidden_size": 768, "num_attention_heads": 12, "patch_size": 16},
    "idefics3_vision": {**_SIGLIP, "hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},  # and SmolVLM's
    "clip_vision_model": {
        **_SIZES,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "image_size": 224,
        "patch_size": 32,
    },
    "dinov2": {
        **_SIZES,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "patch_size": 14,
    },
}


def tower(section: Mapping[str, Any], kind: str, feature_layers: tuple[int, ...] | None = None) -> TowerConfig:
    """The tower of a `vision_config`; `kind` is one of DEFAULTS.

    Raises:
        UnsupportedModelError: a key is malformed or has a value that is not computed.
    """
    config = {**DEFAULTS[kind], **{key: value for key, value in section.items() if value is not None}}
    only(config, {"num_channels": 3})
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    if hidden % heads:
        raise UnsupportedModelError(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
    image, patch = positive(config, "image_size"), positive(config, "patch_size")
    if patch > image:
        raise UnsupportedModelError(f"patch_size {patch} is larger than image_size {image}")
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_layers": layer_count(config),
        "num_heads": heads,
        "image_size": image,
        "patch_size": patch,
        "rms_norm_eps": positive(config, "layer_norm_eps", kind=float),
        "feature_layers": feature_layers,
    }
    if kind == "dinov2":
        swiglu = flag(config, "use_swiglu_ffn", False)
        inner = int(hidden * positive(config, "mlp_ratio", kind=float))
        return TowerConfig(
            **fields,
            intermediate_size=(int(inner * 2 / 3) + 7) // 8 * 8 if swiglu else inner,
            activation="silu" if swiglu else activation(config, "hidden_act", "gelu"),
            gated_mlp=swiglu,
            class_token=True,
            qkv_bias=flag(config, "qkv_bias", True),
            layer_scale=True,
        )
    return TowerConfig(
        **fields,
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", ""),
        class_token=kind == "clip_vision_model",
        pre_norm=kind == "clip_vision_model",
        patch_bias=kind != "clip_vision_model",
    )


def weights(config: TowerConfig, prefix: str) -> list[Weight]:
    """Every tensor of the tower that is computed with; `prefix` is before all names and ends with a dot."""
    return _dinov2(config, prefix) if config.layer_scale else _siglip(config, prefix)


def ignorable(config: TowerConfig, prefix: str) -> list[str]:
    """Tensors of outputs that no language model takes: pooled ones, and the norm of the last layer where an earlier one is taken."""
    last = [] if config.feature_layers is None else [rf"{prefix}(post_layernorm|layernorm)\.(weight|bias)"]
    return [rf"{prefix}embeddings\.(position_ids|mask_token)", rf"{prefix}head\..*", *last]


def canonical(name: str) -> str:
    """A tensor's name in a file that holds a tower alone, as `weights` has it without a prefix."""
    name = re.sub(r"\A(vision_model|dinov2)\.", "", name)
    for old, new in OLD_DINOV2:
        name = re.sub(rf"\A(encoder\.layer\.\d+\.){old}", rf"\g<1>{new}", name)
    return name


def _siglip(c: TowerConfig, prefix: str) -> list[Weight]:
    """SigLIP's and CLIP's names."""
    patch = f"{prefix}embeddings.patch_embedding"
    table = [Weight(f"{patch}.weight", ("vision", "patch_kernel"), transposed=True)]
    table += [Weight(f"{patch}.bias", ("vision", "patch_bias"))] if c.patch_bias else []
    table += [Weight(f"{prefix}embeddings.position_embedding.weight", ("vision", "position_embed"))]
    table += [Weight(f"{prefix}embeddings.class_embedding", ("vision", "class_token"))] if c.class_token else []
    ends = [("pre_layrnorm", "pre_norm")] if c.pre_norm else []
    for theirs, ours in ends + ([("post_layernorm", "post_norm")] if c.feature_layers is None else []):
        table += _pair(f"{prefix}{theirs}", ("vision", ours), "scale")
    layer = f"{prefix}encoder.layers.{{layer}}."
    names = {f"self_attn.{x}_proj": f"attention.{x}_proj" for x in "qkv"} | {"self_attn.out_proj": "attention.o_proj"}
    names |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    return table + _layers(layer, names, {"layer_norm1": "attention_norm", "layer_norm2": "mlp_norm"}, c)


def _dinov2(c: TowerConfig, prefix: str) -> list[Weight]:
    patch = f"{prefix}embeddings.patch_embeddings.projection"
    table = [Weight(f"{patch}.weight", ("vision", "patch_kernel"), transposed=True), Weight(f"{patch}.bias", ("vision", "patch_bias"))]
    table += [Weight(f"{prefix}embeddings.cls_token", ("vision", "class_token"), ones=2)]
    table += [Weight(f"{prefix}embeddings.position_embeddings", ("vision", "position_embed"), ones=1)]
    if c.feature_layers is None:
        table += _pair(f"{prefix}layernorm", ("vision", "post_norm"), "scale")
    layer = f"{prefix}encoder.layer.{{layer}}."
    names = {f"attention.{x}_proj": f"attention.{x}_proj" for x in "qkvo"}
    names |= {f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")} if c.gated_mlp else {}
    names |= {} if c.gated_mlp else {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    scales = {"layer_scale1": "attention_scale", "layer_scale2": "mlp_scale"}
    table += [Weight(f"{layer}{theirs}.lambda1", ("vision", "layers", ours), layers=c.num_layers) for theirs, ours in scales.items()]
    return table + _layers(layer, names, {"norm1": "attention_norm", "norm2": "mlp_norm"}, c)


def _layers(prefix: str, linears: Mapping[str, str], norms: Mapping[str, str], c: TowerConfig) -> list[Weight]:
    table = []
    for theirs, ours in norms.items():
        table += _pair(f"{prefix}{theirs}", ("vision", "layers", ours), "scale", layers=c.num_layers)
    for theirs, ours in linears.items():
        pair = _pair(f"{prefix}{theirs}", ("vision", "layers", *ours.split(".")), "kernel", transposed=True, layers=c.num_layers)
        biased = c.qkv_bias or ours[-6:] not in ("q_proj", "k_proj", "v_proj")
        table += pair if biased else pair[:1]
    return table


def _pair(theirs: str, ours: tuple[str, ...], weight: str, transposed: bool = False, layers: int | None = None) -> list[Weight]:
    return [
        Weight(f"{theirs}.weight", (*ours, weight), transposed=transposed, layers=layers),
        Weight(f"{theirs}.bias", (*ours, "bias"), layers=layers),
    ]


_INSIDE = r"patch_embedding|position_embedding|position_ids|class_embedding"
WITHIN_MODEL = rf"(?:encoder\.layers|embeddings\.(?:{_INSIDE})|pre_layrnorm|post_layernorm|head)\b"
"""How names of SigLIP and CLIP begin, which files have within `vision_model.`; none of DINOv2 begins so."""
PUBLISHED_DINOV2 = (
    *((f"attention.attention.{word}", rf"attention\.{word[0]}_proj") for word in ("query", "key", "value")),
    ("attention.output.dense", r"attention\.o_proj"),
)
# Names that files had before transformers 5, to be written behind a prefix.
OLD_DINOV2 = (
    *((rf"attention\.attention\.{word}", f"attention.{word[0]}_proj") for word in ("query", "key", "value")),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"mlp\.weights_out", "mlp.down_proj"),
)
