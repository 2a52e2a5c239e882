"""Adapters go out in PEFT's format and come back to the bit."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_decoder import TINY

from pe_rlhf_jax import files
from pe_rlhf_jax.checkpoint.card import Training
from pe_rlhf_jax.checkpoint.export import AdapterError, export_policy, export_reward, import_adapter
from pe_rlhf_jax.checkpoint.folder import written_whole
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder

CONFIG = dataclasses.replace(TINY, num_layers=3, rope_theta=1e4)
LORA = LoRAConfig(r=5, lora_alpha=7.5, use_rslora=True)
SOURCE = {"base_model": "hf:owner/name", "sha256": "0" * 64}
HEAD = {"kernel": jnp.linspace(-1, 1, 16)[:, None], "bias": jnp.array([0.1], jnp.float32)}


@functools.cache
def shapes(config: LoRAConfig = LORA):
    return jax.eval_shape(Decoder(CONFIG, config).init_lora, jax.random.key(0))


def random_like(tree, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), tree)


def assert_identical(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(("target", "dtype"), [("attention", "float32"), ("all-linear", "bfloat16"), (r"mlp\..*", "float32")])
def test_the_way_back_is_exact(tmp_path, target, dtype):
    config = LoRAConfig(r=5, target_modules=target, dtype=dtype)
    lora = random_like(shapes(config))
    export_policy(tmp_path / "policy", lora, config, **SOURCE)
    export_reward(tmp_path / "reward", lora, HEAD, config, **SOURCE)
    found, head = import_adapter(tmp_path / "policy", shapes(config), config)
    assert_identical(found, lora)
    assert head is None
    found, head = import_adapter(tmp_path / "reward", lora, config)
    assert_identical((found, head), (lora, HEAD))


def test_layout_of_a_reward_model(tmp_path):
    lora = random_like(shapes())
    export_reward(tmp_path / "reward", lora, HEAD, LORA, **SOURCE, training=Training(recipe={"seed": 3}))
    assert sorted(os.listdir(tmp_path / "reward")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((tmp_path / "reward/adapter_config.json").read_text())
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(settings.pop("target_modules")) == sorted(modules)
    expected = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 5, "lora_alpha": 7.5, "use_rslora": True, "lora_dropout": 0.0}
    expected |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": ["score"]}
    assert settings == expected | {"base_model_name_or_path": "owner/name", "revision": None}
    tensors = safetensors.numpy.load_file(tmp_path / "reward/adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3 + 1
    factors = lora["layers"]["attention"]["k_proj"]
    name = "base_model.model.model.layers.2.self_attn.k_proj.lora"
    np.testing.assert_array_equal(tensors[f"{name}_A.weight"], factors["a"][2].T)
    np.testing.assert_array_equal(tensors[f"{name}_B.weight"], factors["b"][2].T)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (5, 24)
    np.testing.assert_array_equal(tensors["base_model.model.score.weight"], HEAD["kernel"].T)
    readme = (tmp_path / "reward/README.md").read_text()
    for part in ("hf:owner/name", "0" * 64, "| seed | 3 |", repr(float(np.float32(0.1))), "AutoModelForSequenceClassification"):
        assert part in readme


def test_a_revision_goes_with_the_adapter_and_is_compared_where_no_hash_is(tmp_path):
    lora = random_like(shapes())
    for folder, export in (("policy", export_policy), ("reward", functools.partial(export_reward, head=HEAD))):
        export(tmp_path / folder, lora, config=LORA, **SOURCE, revision="v1.5")
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["revision"] == "v1.5"
        arguments = ", num_labels=1" * (folder == "reward") + ", revision='v1.5'"
        assert f".from_pretrained(backbone{arguments})\n" in (tmp_path / folder / "README.md").read_text()
    read = functools.partial(import_adapter, tmp_path / "policy", shapes(), LORA, base_model=SOURCE["base_model"])
    read(sha256=SOURCE["sha256"])  # the same weights, by whatever name
    file = tmp_path / "policy" / "adapter_model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file)  # as PEFT writes it: without a hash
    read(revision="v1.5")
    with pytest.raises(AdapterError, match=r"trained on revision 'v1.5' of 'owner/name', but model.revision is 'main'"):
        read()
    settings = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    for named in (None, "main"):
        (tmp_path / "policy" / "adapter_config.json").write_text(json.dumps(settings | {"revision": named}))
        read()


def test_what_a_kill_leaves_between_two_renames_gets_its_name_back(tmp_path, monkeypatch):
    """Whoever writes next and fails must find the old export as it was; and files are on the disk before they get their name."""
    folder = tmp_path / "export" / "policy"
    with written_whole(folder) as unfinished:
        (unfinished / "file").write_text("old")
    folder.rename(folder.with_name(".replaced-policy"))
    with pytest.raises(OSError, match="full"), written_whole(folder):
        raise OSError("full")
    assert (folder / "file").read_text() == "old" and os.listdir(folder.parent) == ["policy"]
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with written_whole(folder) as unfinished:
        (unfinished / "file").write_text("new")
    assert [os.path.relpath(path, folder.parent) for path in synced] == [".writing-policy/file", ".writing-policy", "."]


def test_an_export_is_replaced_as_a_whole_or_stays(tmp_path, monkeypatch):
    first, second = random_like(shapes(), 1), random_like(shapes(), 2)
    folder = tmp_path / "export" / "policy"
    export_policy(folder, first, LORA, **SOURCE)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", full)
        with pytest.raises(OSError, match="No space"):
            export_policy(folder, second, LORA, **SOURCE)
    assert os.listdir(folder.parent) == ["policy"]
    assert_identical(import_adapter(folder, shapes(), LORA)[0], first)
    export_policy(folder, second, LORA, **SOURCE)
    assert os.listdir(folder.parent) == ["policy"]
    assert_identical(import_adapter(folder, shapes(), LORA)[0], second)


def test_what_does_not_fit_is_named(tmp_path):
    folder, lora = tmp_path / "policy", random_like(shapes())
    with pytest.raises(AdapterError, match=r"adapter_config.json: cannot be read as JSON: .*No such file"):
        import_adapter(folder, lora, LORA)
    export_policy(folder, lora, LORA, **SOURCE)
    with pytest.raises(AdapterError, match=r"lora_alpha is 7.5, but lora.lora_alpha is 32.0"):
        import_adapter(folder, lora, LORA.model_copy(update={"lora_alpha": 32.0}))
    attention = shapes(LORA.model_copy(update={"target_modules": "attention"}))
    with pytest.raises(AdapterError, match=r"layers.0.mlp.down_proj.lora_A.weight and 17 more tensors are without a place"):
        import_adapter(folder, attention, LORA)
    deeper = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape[1:]), leaf.dtype), lora)
    with pytest.raises(AdapterError, match=r"layers.3.mlp.down_proj.lora_A.weight and 13 more tensors are missing"):
        import_adapter(folder, deeper, LORA)
    wider = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, leaf.shape[1], leaf.shape[2] + 1), leaf.dtype), lora)
    with pytest.raises(AdapterError, match=r"lora_B.weight should be \[17, 5\], but is \[16, 5\]"):
        import_adapter(folder, wider, LORA)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora: True is not supported"):
        import_adapter(folder, lora, LORA)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        import_adapter(folder, lora, LORA)
    broken = jax.tree.map(lambda leaf: np.where(np.arange(3)[:, None, None] == 1, np.float32("nan"), leaf), lora)
    export_policy(folder, broken, LORA, **SOURCE)
    with pytest.raises(AdapterError, match=r"layers.1.* holds values that are not finite"):
        import_adapter(folder, lora, LORA)
