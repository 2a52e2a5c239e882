"""Merged models are plain models that are read like any other, with the weights that merging gives in memory."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapters_of_families import FAMILIES, adapter
from tiny_families import CASES, Tiny
from tiny_gguf import hf_tensors, write_gguf
from transformers import AutoTokenizer

from pe_rlhf_jax.checkpoint.card import Training
from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.merged import export_merged
from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.safetensors_writer import write_safetensors
from pe_rlhf_jax.checkpoint.source import Backbone, resolve
from pe_rlhf_jax.checkpoint.tokenizer import tokenizer_from_gguf
from pe_rlhf_jax.checkpoint.weights import WeightsError, load_params
from pe_rlhf_jax.config import LoRAConfig, ModelConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.lora import merge

CONFIG = LoRAConfig(r=3, lora_alpha=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    write_gguf(path, hf_tensors())
    return tokenizer_from_gguf(GGUFFile(path))


def backbone_of(tiny: Tiny, tokenizer) -> Backbone:
    return Backbone(tiny.architecture, tiny.family, tiny, tokenizer, (2, 0), "hf:owner/name", "0" * 64)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_back_is_the_merged_model(tmp_path, tokenizer, name):
    tiny = Tiny(name)
    lora = adapter(tiny, CONFIG)
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), lora, CONFIG, dtype="float32", shard_bytes=9_000)
    folder = SafetensorsFolder(tmp_path / "merged")
    assert len(folder.files) > 2 and set(folder.names) == set(tiny.names)
    said = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"  # version 4 of transformers knows no TokenizersBackend
    architecture = "GPT2LMHeadModel" if name == "gpt2" else f"{tiny.family.class_prefix}ForCausalLM"
    assert folder.config["architectures"] == [architecture]
    assert all(file.stat().st_size < 9_000 + 3_000 for file in folder.files)  # with the header
    assert tiny.family.config_from_hf(folder.config) == tiny.architecture
    found = load_params(folder, tiny.family, tiny.architecture, "float32")
    expected = merge(load_params(tiny, tiny.family, tiny.architecture, "float32"), lora, CONFIG)
    # Products of 3 numbers below 10, summed in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6, rtol=0), found, expected)
    own = jax.tree.map(lambda x: np.asarray(x) * 2, expected)
    export_merged(tmp_path / "tuned", backbone_of(tiny, tokenizer), None, CONFIG, params=own, dtype="float32")
    found = load_params(SafetensorsFolder(tmp_path / "tuned"), tiny.family, tiny.architecture, "float32")
    jax.tree.map(np.testing.assert_array_equal, found, own)
    titles = [(tmp_path / folder / "README.md").read_text().partition("# ")[2].splitlines()[0] for folder in ("merged", "tuned")]
    assert titles == ["Policy, its adapter merged in", "Policy, tuned in full"]


def test_special_tokens_stay_so_in_the_words_of_every_version(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    tiny = Tiny("llama")
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), None, CONFIG, dtype="float32")
    said = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert said["additional_special_tokens"] == ["<extra>"] and "extra_special_tokens" not in said
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert "<extra>" in again.all_special_tokens and again.vocab_size == tokenizer.vocab_size
    assert again("hello<extra> 12").input_ids == tokenizer("hello<extra> 12").input_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_the_nearest_to_the_sum_in_float32(tmp_path, tokenizer, dtype):
    tiny = Tiny("qwen2")
    for name, tensor in tiny.tensors.items():
        tiny.tensors[name] = tensor.astype(jnp.bfloat16)
    lora = adapter(tiny, CONFIG)
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), lora, CONFIG, dtype=dtype)
    folder = SafetensorsFolder(tmp_path / "merged")
    whole = merge(load_params(tiny, tiny.family, tiny.architecture, "float32"), lora, CONFIG)
    for layer in range(3):
        found = folder.read(f"model.layers.{layer}.mlp.up_proj.weight")
        exact = np.asarray(whole["layers"]["mlp"]["up_proj"]["kernel"][layer]).T
        assert found.dtype == jnp.dtype(dtype)
        # Half a step of 8 or 11 bits; adding in bfloat16 would miss it by up to a whole one.
        np.testing.assert_allclose(found.astype(np.float32), exact, rtol=1.01 * 2.0 ** -(8 if dtype == "bfloat16" else 11), atol=1e-6)


def test_a_merged_folder_is_a_source_like_any_other(tmp_path):
    write_gguf(tmp_path / "m.gguf", hf_tensors(tied=False))
    backbone = resolve(ModelConfig(source=str(tmp_path / "m.gguf")))
    lora = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.01), jax.eval_shape(Decoder(backbone.config, CONFIG).init_lora, jax.random.key(0))
    )
    export_merged(tmp_path / "merged", backbone, lora, CONFIG, dtype="float32", training=Training(recipe={"seed": 3}))
    assert sorted(os.listdir(tmp_path)) == ["cache", "m.gguf", "merged"]
    again = resolve(ModelConfig(source=str(tmp_path / "merged")))
    assert again.config == backbone.config and again.eos_token_ids == backbone.eos_token_ids
    assert again.tokenizer("hello 12").input_ids == backbone.tokenizer("hello 12").input_ids
    assert again.tokenizer.chat_template == backbone.tokenizer.chat_template
    assert again.tokenizer.pad_token_id == backbone.tokenizer.pad_token_id
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32" and None not in config.values()
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 4}
    readme = (tmp_path / "merged" / "README.md").read_text()
    assert backbone.sha256 in readme and "| seed | 3 |" in readme


def test_a_null_that_takes_a_default_away_stays(tmp_path, tokenizer):
    """Without it, a Mistral that has no window would be read with one of 4096 tokens, by transformers and by us."""
    tiny = Tiny("mistral", {**CASES["mistral"], "sliding_window": None})
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), None, CONFIG)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["sliding_window"] is None and tiny.family.config_from_hf(config).sliding_window is None


def test_numbers_that_do_not_fit_are_an_error_and_nothing_is_left(tmp_path, tokenizer):
    tiny = Tiny("llama")
    tiny.tensors["model.norm.weight"] = np.full(16, 1e5, np.float32)
    with pytest.raises(WeightsError, match=r"model.norm.weight: not finite in float16.*export in float32 or bfloat16"):
        export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), None, CONFIG, dtype="float16")
    assert not os.listdir(tmp_path)


def test_the_model_is_never_in_memory_as_a_whole(tmp_path, tokenizer):
    """Tensors that were read are dropped before the next but one is."""
    tiny = Tiny("llama")
    read, references, alive = tiny.read, [], []

    def counted(name):
        tensor = read(name).copy()
        references.append(weakref.ref(tensor))
        alive.append(sum(reference() is not None for reference in references))
        return tensor

    tiny.read = counted  # type: ignore[method-assign]
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), None, CONFIG)
    assert len(alive) == len(tiny.names) and max(alive) <= 2


def test_the_writer_refuses_another_tensor_than_it_announced(tmp_path):
    with pytest.raises(ValueError, match=r"expected a \(2,\) in float32, found a \(3,\) in float32"):
        write_safetensors(tmp_path, {"a": (2,)}, "float32", [("a", lambda: np.zeros(3, np.float32))], 100)


def test_tied_heads_are_not_written_twice(tmp_path, tokenizer):
    tiny = Tiny("qwen2")
    assert tiny.architecture.tie_word_embeddings
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), None, CONFIG)
    assert "lm_head.weight" not in SafetensorsFolder(tmp_path / "merged").names
    untied = dataclasses.replace(tiny.architecture, tie_word_embeddings=False)
    assert "lm_head.weight" in {weight.name for weight in tiny.family.weights(untied)}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2-untied"])
def test_a_reward_model_is_a_sequence_classifier(tmp_path, tokenizer, name):
    """The policy's weights without the head of the vocabulary, and the score head in its place."""
    tiny = Tiny(name)
    lora = adapter(tiny, CONFIG)
    head = {"kernel": jnp.linspace(-1, 1, 16)[:, None], "bias": jnp.array([0.1], jnp.float32)}
    common = {"dtype": "float32", "shard_bytes": 9_000}
    export_merged(tmp_path / "policy", backbone_of(tiny, tokenizer), lora, CONFIG, **common)
    export_merged(tmp_path / "reward", backbone_of(tiny, tokenizer), lora, CONFIG, head=head, **common)
    policy, reward = (SafetensorsFolder(tmp_path / kind) for kind in ("policy", "reward"))
    assert set(reward.names) == (set(policy.names) - {"lm_head.weight"}) | {"score.weight"}
    for name in set(reward.names) - {"score.weight"}:
        np.testing.assert_array_equal(reward.read(name), policy.read(name))
    np.testing.assert_array_equal(reward.read("score.weight"), np.asarray(head["kernel"]).T)
    classes = {"llama": "Llama", "gemma3": "Gemma3Text", "gpt2-untied": "GPT2"}
    assert reward.config["architectures"] == [f"{classes[tiny.name]}ForSequenceClassification"]
    assert reward.config["id2label"] == {"0": "score"} and reward.config["pad_token_id"] == tokenizer.pad_token_id
    assert reward.config["score_bias"] == float(np.float32(0.1))
    assert not (tmp_path / "reward" / "generation_config.json").exists()
    readme = (tmp_path / "reward" / "README.md").read_text()
    assert repr(float(np.float32(0.1))) in readme and "AutoModelForSequenceClassification" in readme
