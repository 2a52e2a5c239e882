"""From a configuration to what a run works with: backbone, data and devices, all checked before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pe_rlhf_jax import data, hosts
from pe_rlhf_jax.checkpoint.peft_import import check_adapter, import_adapter
from pe_rlhf_jax.checkpoint.preprocessing import vision_of
from pe_rlhf_jax.checkpoint.source import Backbone, resolve
from pe_rlhf_jax.config import Config, ConfigError, Quantization
from pe_rlhf_jax.data.formats import Kind
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.quantization import QuantizedMatrix, count, quantize_layers
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.sharding import check_batches, make_mesh, shardings
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.functions import load_function
from pe_rlhf_jax.training.images import ImageEncoder
from pe_rlhf_jax.training.reward import kind_of
from pe_rlhf_jax.types import PyTree


def load(config: Config, progress: Progress, needs: set[Kind]) -> tuple[Backbone, Context]:
    """Backbone, data and devices. Raises one of this package's errors, with what to do, before anything is trained."""
    mesh = make_mesh(config.mesh)
    check_batches(config, mesh)
    _check_functions(config)
    backbone = resolve(config.model)
    _check_lengths(config, backbone.config.max_position_embeddings)
    if config.model.revision is not None and not config.model.source.startswith("hf:"):
        progress.warn(f"model.revision is of the hub, and does nothing with {config.model.source}")
    decoder = decoder_of(config, backbone)
    for folder in (config.model.adapter, config.reward.adapter):
        if folder is not None:
            check_adapter(**_adapter(config, folder, backbone, decoder))
    vision = vision_of(backbone)
    several = hosts.several()
    loaded = data.load(
        config.data, backbone.tokenizer, needs=needs, vision=vision, end_tokens=backbone.eos_token_ids, several_hosts=several
    )
    if several:
        rows = b"".join(rows_of(split) for split in (loaded.sft, loaded.preference, loaded.label, loaded.prompts))
        hosts.same({"backbone (model.source)": backbone.sha256.encode(), "data": rows})
    decoder, params = load_decoder(decoder, config.model.quantization, backbone, mesh)
    held = jnp.dtype(decoder.dtype).name + (f" over {config.model.quantization}" if config.model.quantization else "")
    where = f"{jax.device_count()} {jax.default_backend()}" + (f" of {jax.process_count()} processes" if hosts.several() else "")
    progress.note(f"{backbone.source}: {count(params) / 1e6:.1f}M parameters, {held}, on {where}")
    for note in loaded.notes:
        progress.note(f"data: {note}")
    base, reward_base = (adapted(config, folder, backbone, decoder, params) for folder in (config.model.adapter, config.reward.adapter))
    tokenizer, ends = backbone.tokenizer, backbone.eos_token_ids
    encoder = None
    if loaded.pixels is not None:
        encoder = ImageEncoder(decoder, params, mesh, loaded.pixels, int(config.data.image_cache_gib * 2**30))
    return backbone, Context(config, decoder, params, tokenizer, ends, loaded, mesh, base.replace(head=None), reward_base, encoder, vision)


def decoder_of(config: Config, backbone: Backbone) -> Decoder:
    """The decoder, nothing of which is quantized. Raises ConfigError where no adapter fits."""
    dtype = jnp.dtype(config.model.dtype_on(jax.default_backend()))
    decoder = Decoder(backbone.config, config.lora, dtype, dtype, config.model.remat, config.model.attention_block)
    if "lora" in config.tunings().values():
        jax.eval_shape(decoder.init_lora, jax.random.key(0))
    return decoder


def load_decoder(decoder: Decoder, how: Quantization | None, backbone: Backbone, mesh: jax.sharding.Mesh) -> tuple[Decoder, PyTree]:
    """The decoder, quantized as `how` says, and its parameters, on the devices; what is to be quantized is so as soon as it is read.

    A vision tower and its projector stay in floating point.
    """
    dtype = decoder.dtype
    if dtype == jnp.float32 and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")  # an accelerator would round factors to bfloat16, or to TF32

    def places(decoder: Decoder) -> PyTree:
        return shardings(jax.eval_shape(decoder.init_params, jax.random.key(0)), mesh)

    if how is None:
        return decoder, backbone.load_params(dtype, places(decoder))
    quantized = dataclasses.replace(decoder, config=dataclasses.replace(backbone.config, quantization=how))
    kept = places(quantized)

    def store(path: tuple[str, ...], leaf: jax.Array) -> PyTree:
        place = functools.reduce(lambda node, name: node[name], path, kept)
        if not isinstance(place, QuantizedMatrix):
            return leaf
        return jax.block_until_ready(jax.jit(quantize_layers, static_argnums=1, out_shardings=place)(leaf, how))

    return quantized, backbone.load_params(dtype, places(decoder), store)


def adapted(config: Config, folder: str | None, backbone: Backbone, decoder: Decoder, params: PyTree) -> Role:
    """The role that a PEFT adapter makes of the backbone; the backbone itself without one. Raises AdapterError if it does not fit."""
    if folder is None:
        return Role()
    whole = hosts.fetch({name: params[name] for name in config.lora.modules_to_save})
    lora, head = import_adapter(**_adapter(config, folder, backbone, decoder), backbone=whole)
    return Role(lora=lora, head=head)


def _adapter(config: Config, folder: str, backbone: Backbone, decoder: Decoder) -> dict[str, Any]:
    """What checks and reads an adapter's folder is given."""
    compared = {} if config.model.any_backbone else {"base_model": backbone.source, "sha256": backbone.sha256}
    return {
        "folder": Path(folder).expanduser(),
        "like": jax.eval_shape(decoder.init_lora, jax.random.key(0)),
        "config": config.lora,
        "weights": backbone.family.weights(backbone.config),
        "revision": config.model.revision,
        **compared,
    }


def needed(config: Config) -> set[Kind]:
    """The kinds of data that the run's stages use. An evaluation takes what is there."""
    judged = kind_of(config.reward).data
    needs: set[Kind] = set()
    for stage in config.run.stages:
        if stage == "sft":
            needs.add("sft")
        elif stage == "reward":
            needs.add(judged)
        elif stage == "rl":
            needs.add("prompts")
        elif stage == "evaluate":
            needs |= {kind for kind in (judged, "prompts") if _has(config, kind)}
    return needs


def rows_of(split: data.Split | None) -> bytes:
    """What tells two sets of loaded rows apart."""
    digest = hashlib.sha256()
    for row in [*data.as_read(split.train), *data.as_read(split.validation)] if split else ():
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            if field.name == "pictures":  # their files may be copies, at other places and of other times
                value = [(picture.label, picture.height, picture.width) for picture in value]
            elif field.name == "columns":  # a catalog's objects may be shown by where they lie in memory
                value = json.dumps(value, sort_keys=True, default=lambda x: type(x).__name__)
            if field.name != "place":
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.digest()


def _has(config: Config, kind: Kind) -> bool:
    embedded = config.data.source is not None and (kind != "label" or config.data.source == "easy-vqa")
    return embedded or getattr(config.data, kind) is not None


def _check_functions(config: Config) -> None:
    if config.evaluate.judge and "evaluate" in config.run.stages:
        load_function(config.evaluate.judge)
    if {"rl", "evaluate"} & set(config.run.stages):
        for term in config.rl.rewards:
            if term.function is not None:
                load_function(term.function)


def _check_lengths(config: Config, positions: int) -> None:
    response = max(config.data.max_response_length, config.rl.sampling.max_new_tokens)
    if config.data.max_prompt_length + response > positions:
        raise ConfigError(
            f"data.max_prompt_length {config.data.max_prompt_length} and the longest response, {response} tokens "
            f"(data.max_response_length, rl.sampling.max_new_tokens), exceed the model's {positions} positions"
        )
