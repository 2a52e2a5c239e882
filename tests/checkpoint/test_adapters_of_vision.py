"""Adapters on models that see, in PEFT's format; the comparison with PEFT itself is in `test_vision_peft_parity.py`."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_families import flat
from tiny_vision import TinyVision

from pe_rlhf_jax.checkpoint.export import AdapterError, export_policy, export_reward, import_adapter
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder

SOURCE = {"base_model": "hf:someone/something", "sha256": "0" * 64}


HEAD = {"kernel": np.linspace(-1, 1, 16, dtype=np.float32)[:, None], "bias": np.array([0.1], np.float32)}
PROJECTORS = [
    ("llava", "model.multi_modal_projector"),
    ("paligemma", "model.multi_modal_projector.linear"),
    ("gemma3", "model.multi_modal_projector"),
    ("smolvlm", "model.connector.modality_projection.proj"),
]


def adapter(tiny: TinyVision, config: LoRAConfig):
    shapes = jax.eval_shape(Decoder(tiny.architecture, config).init_lora, jax.random.key(0))
    return jax.tree.map(lambda x: np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32), shapes)


def assert_same(found, lora) -> None:
    """Factors to the bit; what is trained whole to a rounding of the sum that is written and of the difference that is read."""
    found, expected = flat(found), flat(lora)
    assert found.keys() == expected.keys()
    for leaf, value in expected.items():
        whole = leaf.startswith("projector/")
        np.testing.assert_allclose(found[leaf], value, rtol=0, atol=1e-6 if whole else 0, err_msg=leaf)


@pytest.mark.parametrize("name", ["llava", "gemma3", "llava-dinov2-gated"])
@pytest.mark.parametrize("target", ["attention", r"(vision\.)?(attention|mlp)\..*"])
def test_export_names_modules_of_both_and_reads_them_back(tmp_path, name, target):
    tiny, config = TinyVision(name), LoRAConfig(r=2, target_modules=target)
    lora, weights = adapter(tiny, config), tiny.family.weights(tiny.architecture)
    export_policy(tmp_path / "policy", lora, config, **SOURCE, weights=weights)
    settings = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    written = safetensors.numpy.load_file(tmp_path / "policy" / "adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in written if ".lora_A." in key}
    linear = {name.removesuffix(".weight") for name in tiny.names if tiny.tensors[name].ndim == 2 and name.endswith("_proj.weight")}
    assert adapted and {name for name in linear | adapted if re.fullmatch(settings["target_modules"], name)} == adapted
    assert any("vision" in name for name in adapted) == (target != "attention")
    assert "AutoModelForImageTextToText" in (tmp_path / "policy" / "README.md").read_text()
    back, head = import_adapter(tmp_path / "policy", lora, config, weights=weights)
    assert head is None and flat(back).keys() == flat(lora).keys()
    assert all(np.array_equal(flat(back)[leaf], value) for leaf, value in flat(lora).items())


def test_a_sum_needs_the_backbone(tmp_path):
    tiny, config = TinyVision("llava"), LoRAConfig(r=2, modules_to_save=("projector",))
    lora, weights = adapter(tiny, config), tiny.family.weights(tiny.architecture)
    needed = r"trains model.multi_modal_projector whole, of which the sum is written: give the backbone"
    with pytest.raises(ValueError, match=needed):
        export_policy(tmp_path / "policy", lora, config, **SOURCE, weights=weights)
    with pytest.raises(ValueError, match=needed):
        export_reward(tmp_path / "reward", lora, HEAD, config, **SOURCE, weights=weights)
    with pytest.raises(ValueError, match=r"has model.multi_modal_projector whole: give the backbone"):
        import_adapter(tmp_path / "policy", lora, config, weights=weights)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "module"), PROJECTORS)
def test_a_projector_that_is_trained_whole_is_written_whole(tmp_path, name, module):
    tiny, config = TinyVision(name), LoRAConfig(r=2, modules_to_save=("projector",))
    lora, weights = adapter(tiny, config), tiny.family.weights(tiny.architecture)
    base = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    export_policy(tmp_path / "policy", lora, config, **SOURCE, weights=weights, backbone=base)
    settings = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == [module]
    written = safetensors.numpy.load_file(tmp_path / "policy" / "adapter_model.safetensors")
    inside = [key for key in tiny.names if key.startswith(f"{module}.")]
    assert inside and {key for key in written if ".lora_" not in key} == {f"base_model.model.{key}" for key in inside}
    for weight in weights:
        if weight.name in inside:
            added = flat(lora)["/".join(weight.leaf)]
            expected = weight.take(tiny.tensors[weight.name]) + added
            np.testing.assert_allclose(weight.take(written[f"base_model.model.{weight.name}"]), expected, rtol=1e-6)
    back, _ = import_adapter(tmp_path / "policy", lora, config, weights=weights, backbone=base)
    assert_same(back, lora)
    without = {name: part for name, part in lora.items() if name != "projector"}
    with pytest.raises(AdapterError, match=rf"{module}\.\S+ (is|and \d more tensors are) without a place; do .*lora.modules_to_save"):
        import_adapter(tmp_path / "policy", without, LoRAConfig(r=2), weights=weights)
    export_policy(tmp_path / "factors", without, LoRAConfig(r=2), **SOURCE, weights=weights)
    with pytest.raises(AdapterError, match=rf"{module}\.\S+ (is|and \d more tensors are) missing; do .*lora.modules_to_save"):
        import_adapter(tmp_path / "factors", lora, config, weights=weights, backbone=base)
    wider = jax.tree.map(lambda x: np.concatenate([x, x]), base["projector"])
    with pytest.raises(AdapterError, match=rf"{module}\.\S+ should be \[.*\], but is \[.*\]; does the backbone fit"):
        import_adapter(tmp_path / "policy", lora, config, weights=weights, backbone={"projector": wider})


@pytest.mark.parametrize(("name", "module"), PROJECTORS)
def test_a_reward_model_comes_back_with_its_head(tmp_path, name, module):
    tiny, config = TinyVision(name), LoRAConfig(r=2, modules_to_save=("projector",))
    lora, weights = adapter(tiny, config), tiny.family.weights(tiny.architecture)
    base = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    export_reward(tmp_path / "reward", lora, HEAD, config, **SOURCE, weights=weights, backbone=base, family=tiny.family)
    settings = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score", module]
    readme = (tmp_path / "reward" / "README.md").read_text()
    assert (f"class {tiny.family.class_prefix}ForSequenceClassification(" in readme) == (name != "gemma3")
    assert repr(float(HEAD["bias"][0])) in readme and "token_type_ids" in readme
    back, head = import_adapter(tmp_path / "reward", lora, config, weights=weights, backbone=base)
    assert_same(back, lora)
    assert head is not None and all(np.array_equal(head[part], HEAD[part]) for part in HEAD)
