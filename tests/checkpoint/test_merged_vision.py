"""Merged models that see: what is read back is the merged model, and what is not computed with is carried along."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapters_of_vision import adapter
from test_merged import backbone_of, tokenizer
from tiny_families import flat
from tiny_vision import CASES, TinyVision

from pe_rlhf_jax.checkpoint.merged import export_merged
from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.lora import merge

__all__ = ["tokenizer"]  # a fixture
CONFIG = LoRAConfig(r=2, lora_alpha=5, target_modules=r"(vision\.)?(attention|mlp)\..*", modules_to_save=("projector",))


@pytest.mark.parametrize("name", ["llava", "gemma3", "llava-dinov2-gated", "smolvlm"])
def test_what_is_read_back_is_the_merged_model(tmp_path, tokenizer, name):
    tiny = TinyVision(name)
    lora = adapter(tiny, CONFIG)
    unused = {"model.vision_tower.post_layernorm.weight": np.full(12, 2.5, np.float32)} if name == "llava" else {}
    tiny.tensors |= unused
    tiny.names = tuple(tiny.tensors)
    tiny.path = tmp_path
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 1}', encoding="utf-8")
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), lora, CONFIG, dtype="float32", shard_bytes=9_000)
    folder = SafetensorsFolder(tmp_path / "merged")
    assert {tiny.family.canonical(key) for key in folder.names} == set(tiny.names) and tiny.family.config_from_hf(
        folder.config
    ) == tiny.architecture
    assert all(np.array_equal(folder.read(tiny.family.written(key)), tensor) for key, tensor in unused.items())
    found = flat(load_params(folder, tiny.family, tiny.architecture, jnp.float32))
    base = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    expected = flat(merge(base, lora, CONFIG))
    assert found.keys() == expected.keys()
    for leaf, value in expected.items():
        np.testing.assert_allclose(found[leaf], value, atol=5e-6, rtol=0, err_msg=leaf)
    assert np.abs(found["vision/layers/attention/q_proj/kernel"] - flat(base)["vision/layers/attention/q_proj/kernel"]).max() > 0.1
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == [f"{tiny.family.class_prefix}ForConditionalGeneration"]
    assert json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text()) == {"image_mean": 1}
    assert "AutoModelForImageTextToText.from_pretrained" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("name", CASES)
def test_names_are_those_of_published_files(tmp_path, tokenizer, name):
    """As transformers 4.57 saves these models, which it and servers read; version 5 reads them too."""
    tiny = TinyVision(name)
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), None, CONFIG, dtype="float32")
    names = SafetensorsFolder(tmp_path / "merged").names
    if name in ("idefics3", "smolvlm"):
        assert set(names) == set(tiny.names)
        return
    beginnings = {key.rpartition(".layer")[0] if ".layer" in key else key.rpartition(".")[0] for key in names}
    assert {key.partition(".")[0] for key in names} == {"language_model", "vision_tower", "multi_modal_projector"}
    assert "language_model.model" in beginnings and ("language_model.lm_head" in beginnings) == ("lm_head.weight" in tiny.names)
    if "dinov2" in name:
        assert "vision_tower.encoder" in beginnings
        assert "vision_tower.encoder.layer.1.attention.attention.query.weight" in names
        assert "vision_tower.encoder.layer.1.attention.output.dense.bias" in names
    else:
        assert not [key for key in names if key.startswith("vision_tower.") and not key.startswith("vision_tower.vision_model.")]


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_reward_model_has_a_score_in_place_of_its_logits(tmp_path, tokenizer, name):
    tiny = TinyVision(name)
    head = {"kernel": np.linspace(-1, 1, 16, dtype=np.float32)[:, None], "bias": np.array([0.1], np.float32)}
    export_merged(tmp_path / "policy", backbone_of(tiny, tokenizer), None, CONFIG, dtype="float32")
    export_merged(tmp_path / "reward", backbone_of(tiny, tokenizer), None, CONFIG, head=head, dtype="float32")
    policy, reward = (SafetensorsFolder(tmp_path / kind) for kind in ("policy", "reward"))
    names = {tiny.family.canonical(key) for key in policy.names}
    assert set(reward.names) == (names - {"lm_head.weight"}) | {"score.weight"}
    np.testing.assert_array_equal(reward.read("score.weight"), head["kernel"].T)
    assert reward.config["architectures"] == [f"{tiny.family.class_prefix}ForSequenceClassification"]
    assert reward.config["text_config"]["pad_token_id"] == tokenizer.pad_token_id
    assert "pad_token_id" not in tiny.config and tiny.config["text_config"]["pad_token_id"] != tokenizer.pad_token_id  # left alone
    readme = (tmp_path / "reward" / "README.md").read_text()
    assert ("class LlavaForSequenceClassification(" in readme) == (name == "llava")


def test_after_full_tuning_the_tower_is_the_backbones(tmp_path, tokenizer):
    tiny = TinyVision("gemma3")
    base = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    own = {name: jax.tree.map(lambda x: np.asarray(x) * 2, part) for name, part in base.items() if name != "vision"}
    export_merged(tmp_path / "tuned", backbone_of(tiny, tokenizer), None, CONFIG, params=own, dtype="float32")
    found = load_params(SafetensorsFolder(tmp_path / "tuned"), tiny.family, tiny.architecture, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, found, {**own, "vision": base["vision"]})
