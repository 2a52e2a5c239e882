"""An image encoder out of an ONNX file: every tensor under Hugging Face's name; the real one in the slow and parity tests."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_onnx

from pe_rlhf_jax.checkpoint.onnx import PREPROCESSOR, ONNXEncoder, image_encoder
from pe_rlhf_jax.checkpoint.weights import WeightsError
from pe_rlhf_jax.data.image_processing import from_hf

WEIGHTS = tiny_onnx.weights()


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(tiny_onnx.model(WEIGHTS))
    return tmp_path / "model.onnx"


def test_tensors_have_their_names_and_sides(file):
    encoder = ONNXEncoder(file)
    assert set(encoder.names) == set(WEIGHTS) and len(encoder.names) == len(WEIGHTS)
    for name, value in WEIGHTS.items():
        assert encoder.shape(name) == value.shape, name
        found = encoder.read(name)
        np.testing.assert_array_equal(found, value, err_msg=name)
        assert found.dtype == np.float32 and found.flags.c_contiguous


def test_the_configuration_follows_from_the_shapes(file):
    config = ONNXEncoder(file).config
    assert config == {
        "model_type": "dinov2",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "mlp_ratio": 1.5,
        "image_size": 6,
        "patch_size": 2,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    }


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("backbone.layernorm.weight", "expected a DINOv2 backbone, found none of layernorm.weight"),
        ("onnx::Reshape", "found no patch positions"),
        ("onnx::", "found no class position and no patch positions"),
        ("cls_token", "found none of embeddings.cls_token"),
    ],
)
def test_another_model_is_refused(tmp_path, left_out, message):
    (tmp_path / "model.onnx").write_bytes(tiny_onnx.model(WEIGHTS, leave_out=left_out))
    with pytest.raises(WeightsError, match=message):
        ONNXEncoder(tmp_path / "model.onnx")


def test_missing_layers_are_refused(tmp_path):
    renamed = {name.replace("layer.1.", "layer.3."): value for name, value in WEIGHTS.items()}
    (tmp_path / "model.onnx").write_bytes(tiny_onnx.model(renamed))
    with pytest.raises(WeightsError, match="its layers in a row"):
        ONNXEncoder(tmp_path / "model.onnx")


def test_damaged_files_are_refused(file, tmp_path):
    whole = file.read_bytes()
    for end in (1, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(WeightsError, match=r"model.onnx: (expected an ONNX file|expected position)"):
            ONNXEncoder(file)
    file.write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be read"):
        ONNXEncoder(file)
    with pytest.raises(WeightsError, match="cannot be read"):
        ONNXEncoder(tmp_path / "gone.onnx")


def test_its_preprocessing_is_read():
    assert from_hf(PREPROCESSOR).crop == (224, 224)


@pytest.mark.slow
def test_the_published_encoder():
    """DINOv2 ViT-S/14 by its shapes; needs the package in the cache, or a network."""
    encoder = image_encoder()
    assert {key: encoder.config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "image_size")} == {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "image_size": 518,
    }
    assert len(encoder.names) == 12 * 18 + 6 and all(np.isfinite(encoder.read(name)).all() for name in encoder.names)


@pytest.mark.slow
@pytest.mark.parity
def test_the_published_encoder_is_loaded_by_transformers(tmp_path):
    """As Dinov2Model: every tensor finds its place, and none is missing but the mask token of its training."""
    pytest.importorskip("torch")
    from transformers import Dinov2Model

    encoder = image_encoder()
    safetensors.numpy.save_file({name: encoder.read(name) for name in encoder.names}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**encoder.config, "architectures": ["Dinov2Model"]}))
    _, found = Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert found["missing_keys"] == {"embeddings.mask_token"}
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
