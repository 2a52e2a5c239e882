"""Parameters in the form in which a GPU decodes them fastest: few large matrices, next to each other.

A decode step multiplies a few rows by every matrix, which takes hardly longer than starting the product. So q, k and v of a layer are one
matrix, and gate and up; their adapters are one as well, whose B has a block for each; and all factors are scaled and in the type in which
they are computed. The numbers are those of the layers apart. What is joined is a copy, for as long as responses are sampled.

Letters: L layers, r rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.layers import GATE_UP, QKV
from pe_rlhf_jax.types import PyTree

GROUPS = {"attention": ("qkv_proj", QKV), "mlp": ("gate_up_proj", GATE_UP)}
"""Of each part of a layer, the joined module and those that it stands for."""


def join(decoder: Decoder, variables: PyTree) -> tuple[Decoder, PyTree]:
    """The decoder and its variables in this form, inside a compiled program.

    Raises ValueError for a quantized backbone, whose matrices stay apart.
    """
    if decoder.config.quantization is not None:
        raise ValueError(f"expected a backbone in floating point, found one in {decoder.config.quantization}")
    layers, adapters = variables["params"]["layers"], variables.get("lora", {}).get("layers", {})
    lora, dtype = decoder.lora, decoder.dtype
    joined = {**layers}
    ready: dict[str, Any] = {}
    for part, (name, members) in GROUPS.items():
        modules, factors = dict(layers[part]), {}
        for module, pair in adapters.get(part, {}).items():
            assert lora is not None
            factors[module] = {"a": pair["a"].astype(dtype), "b": (pair["b"].astype(jnp.float32) * lora.scale).astype(dtype)}
        if all(member in modules for member in members):  # an MLP may have no gate
            apart = [modules.pop(member) for member in members]
            modules[name] = {leaf: jnp.concatenate([one[leaf] for one in apart], axis=-1) for leaf in apart[0]}
            pairs = [factors.pop(member, None) for member in members]
            if any(pair is not None for pair in pairs):
                factors[name] = _side_by_side(pairs, [one["kernel"].shape[-1] for one in apart])
        joined[part] = modules
        if factors:
            ready[part] = factors
    variables = {**variables, "params": {**variables["params"], "layers": joined}}
    if "lora" in variables:
        variables["lora"] = {**variables["lora"], "layers": ready}
    return dataclasses.replace(decoder, joined=True, lora=None if lora is None else unscaled(lora)), variables


def unscaled(lora: LoRAConfig) -> LoRAConfig:
    """The same with scale 1."""
    return lora.model_copy(update={"lora_alpha": float(lora.r), "use_rslora": False})


def _side_by_side(pairs: Sequence[dict[str, Array] | None], features: Sequence[int]) -> dict[str, Float[Array, "L _ _"]]:
    """Adapters of matrices that stand side by side, of so many features each, as one: their A side by side, each B in its own columns."""
    a = jnp.concatenate([pair["a"] for pair in pairs if pair is not None], axis=-1)
    rows, before = [], 0
    for pair, count in zip(pairs, features, strict=True):
        if pair is not None:
            rows.append(jnp.pad(pair["b"], ((0, 0), (0, 0), (before, sum(features) - before - count))))
        before += count
    return {"a": a, "b": jnp.concatenate(rows, axis=-2)}
