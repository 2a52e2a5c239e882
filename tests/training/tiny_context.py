"""A context around a tiny decoder: preference pairs and prompts made of numbered tokens."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import yaml

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.data import Data, PreferenceExample, PromptExample, SFTExample, Split
from pe_rlhf_jax.sharding import make_mesh, place
from pe_rlhf_jax.training.context import Context

PAD, END = 0, 1


def tiny_context(model, devices: int = 1, **sections: dict) -> Context:
    """A context over a model of tests/tiny_decoder.py, with changed configuration, on the first `devices` devices."""
    values = {
        "model": {"source": "unused", "logprob_chunk": 16},
        "lora": {"r": model.decoder.lora.r, "lora_alpha": model.decoder.lora.lora_alpha},
        "sft": {"steps": 3, "batch_size": 4, "optimizer": {"learning_rate": 1e-2}},
        "reward": {"steps": 3, "batch_size": 4, "optimizer": {"learning_rate": 1e-2}},
        "rl": {"steps": 2, "batch_size": 4, "num_ppo_epochs": 2, "sampling": {"max_new_tokens": 6}},
        "data": {"length_multiple": 8},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    config = configuration.parse(yaml.safe_dump(values))
    rng = np.random.default_rng(0)
    words = lambda n: rng.integers(2, model.config.vocab_size, n).astype(np.int32)  # noqa: E731
    sft = [SFTExample(words(3), np.append(words(2 + i % 3), END).astype(np.int32)) for i in range(8)]
    pairs = [PreferenceExample(np.append(words(4 + i % 3), END), np.append(words(5), END), 0.5) for i in range(8)]
    prompts = [PromptExample(words(2 + i % 3), f"prompt {i}", {}) for i in range(8)]
    data = Data(sft=Split(sft, sft), preference=Split(pairs, pairs), prompts=Split(prompts, prompts), notes=[])
    decoder = dataclasses.replace(model.decoder, lora=config.lora, remat=config.model.remat)
    tokenizer = SimpleNamespace(pad_token_id=PAD, decode=lambda row, **_: " ".join(map(str, row)))
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    return Context(config, decoder, place(model.params, mesh), tokenizer, (END,), data, mesh)
