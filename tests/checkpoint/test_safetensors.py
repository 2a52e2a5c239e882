import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_gguf import CONFIG, hf_tensors, write_folder

from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.weights import WeightsError


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_tensors_come_back_as_they_are(tmp_path, shards, dtype):
    tensors = {name: x.astype(dtype) for name, x in hf_tensors().items()}
    write_folder(tmp_path, tensors, shards=shards)
    folder = SafetensorsFolder(tmp_path)
    assert set(folder.names) == set(tensors) and len(folder.files) == shards
    for name, tensor in tensors.items():
        read = folder.read(name)
        assert folder.shape(name) == tensor.shape and read.dtype == dtype
        np.testing.assert_array_equal(read, tensor)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gate_and_up_projection_in_one_tensor_are_taken_apart(tmp_path, dtype):
    """As files of DINOv2 giant hold them; a tensor that has no halves stays, and is told to be unknown when it is read into a model."""
    prefix, both = "encoder.layer.0.mlp.", np.arange(24).reshape(6, 4).astype(dtype)
    bias = both[:, 0].copy()
    stored = {f"{prefix}weights_in.weight": both, f"{prefix}weights_in.bias": bias, "odd.mlp.weights_in.bias": bias[:3]}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = SafetensorsFolder(tmp_path)
    halves = {f"{prefix}{name}.{kind}" for name in ("gate_proj", "up_proj") for kind in ("weight", "bias")}
    assert set(reader.names) == {*halves, "odd.mlp.weights_in.bias"}
    for name, rows in (("gate_proj", slice(3)), ("up_proj", slice(3, 6))):
        assert reader.shape(f"{prefix}{name}.weight") == (3, 4)
        np.testing.assert_array_equal(reader.read(f"{prefix}{name}.weight"), both[rows])
        np.testing.assert_array_equal(reader.read(f"{prefix}{name}.bias"), both[rows, 0])


def test_end_tokens_of_both_files_are_joined(tmp_path):
    write_folder(tmp_path, hf_tensors())
    assert SafetensorsFolder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 7]}')
    assert SafetensorsFolder(tmp_path).eos_token_ids == (2, 5, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(WeightsError, match="eos_token_id"):
        SafetensorsFolder(tmp_path)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"config.json is missing"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"expected model.safetensors.*found pytorch_model.bin.*Pickled"):
        SafetensorsFolder(tmp_path)
    write_folder(tmp_path, hf_tensors(), shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"model-00001-of-00002.safetensors lacks model.ghost.weight"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"shard model-00002-of-00002.safetensors is missing"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("shard", ["../m.safetensors", "/m.safetensors", "..", 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    save_file(hf_tensors(), tmp_path / "m.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(WeightsError, match=r"index.json: (refusing|expected)"):
        SafetensorsFolder(folder)


def test_truncated_and_damaged_files_are_errors_of_ours(tmp_path):
    write_folder(tmp_path, hf_tensors())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for n in (0, 4, 8, 50, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            SafetensorsFolder(tmp_path)
    file.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", "[" * 100_000])
def test_a_damaged_configuration_is_an_error_of_ours(tmp_path, text):
    write_folder(tmp_path, hf_tensors())
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(WeightsError, match=r"config.json"):
        SafetensorsFolder(tmp_path)


def test_other_tensor_types_are_refused_by_name(tmp_path):
    write_folder(tmp_path, {"model.norm.weight": np.ones(3, np.int8)})
    with pytest.raises(WeightsError, match=r"model.norm.weight is of type I8, which is not supported; supported: F32, F16, BF16"):
        SafetensorsFolder(tmp_path).read("model.norm.weight")
