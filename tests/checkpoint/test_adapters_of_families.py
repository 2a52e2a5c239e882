"""Adapters of every family: out in PEFT's layout, where they do to the published matrices what ours do to ours, and back to the bit."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_families import Tiny

from pe_rlhf_jax.checkpoint.export import AdapterError, export_policy, export_reward, import_adapter
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.lora import merge

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "smollm3", "gpt_neox", "gpt2")
SOURCE = {"base_model": "hf:owner/name", "sha256": "0" * 64}


def adapter(tiny: Tiny, config: LoRAConfig, seed: int = 0):
    shapes = jax.eval_shape(Decoder(tiny.architecture, config).init_lora, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def table(tiny: Tiny):
    return tiny.family.weights(tiny.architecture)


def assert_identical(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()


def scale_in(settings, target: str) -> float:
    """As PEFT computes it."""
    alpha = settings.get("alpha_pattern", {}).get(target, settings["lora_alpha"])
    rank = settings.get("rank_pattern", {}).get(target, settings["r"])
    return alpha / (rank**0.5 if settings["use_rslora"] else rank)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("target", "rslora"), [("all-linear", False), ("attention", True), (r"attention\.[qv]_proj", False), (r"attention\.k_proj", True)]
)
def test_what_is_exported_acts_on_the_published_matrices_as_ours_does_and_comes_back(tmp_path, name, target, rslora):
    tiny, config = Tiny(name), LoRAConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=target)
    lora, weights = adapter(tiny, config), table(Tiny(name))
    export_policy(tmp_path / "policy", lora, config, **SOURCE, weights=weights)
    settings = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "policy" / "adapter_model.safetensors")
    changed = dict(tiny.tensors)
    for a_name in [n for n in tensors if n.endswith("lora_A.weight")]:
        module = a_name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        [ending] = [t for t in settings["target_modules"] if module.endswith(f".{t}")]
        update = scale_in(settings, ending) * tensors[a_name.replace("lora_A", "lora_B")] @ tensors[a_name]
        changed[f"{module}.weight"] = tiny.tensors[f"{module}.weight"] + (update.T if name == "gpt2" else update)
    assert 0 < len(tensors) == 2 * sum(not np.array_equal(changed[n], tiny.tensors[n]) for n in changed)
    expected = merge(load_params(tiny, tiny.family, tiny.architecture, "float32"), lora, config)
    tiny.tensors = changed
    found = load_params(tiny, tiny.family, tiny.architecture, "float32")
    # Sums of 3 products in another order, of numbers below 10.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6, rtol=0), found, expected)
    back, head = import_adapter(tmp_path / "policy", lora, config, weights=weights, base_model="hf:owner/name", sha256="0" * 64)
    assert_identical(back, lora)
    assert head is None


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "gpt2"])
def test_rewards_come_back_with_their_head(tmp_path, name):
    tiny, config = Tiny(name), LoRAConfig(r=2)
    lora, head = adapter(tiny, config), {"kernel": jnp.linspace(-1, 1, 16)[:, None], "bias": jnp.array([0.1], jnp.float32)}
    export_reward(tmp_path / "reward", lora, head, config, **SOURCE, weights=table(tiny))
    assert_identical(import_adapter(tmp_path / "reward", lora, config, weights=table(tiny)), (lora, head))


def test_modules_are_named_so_that_no_other_is_meant(tmp_path):
    for name, expected in [
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ]:
        tiny, config = Tiny(name), LoRAConfig(r=2, lora_alpha=3)
        export_policy(tmp_path / name, adapter(tiny, config), config, **SOURCE, weights=table(tiny))
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert settings["target_modules"] == expected
        assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({expected[0]: 6}, {expected[0]: 9})
        assert settings["fan_in_fan_out"] == (name == "gpt2")
    with pytest.raises(ValueError, match=r"the adapter has mlp\.gate_proj, which the model does not"):
        config = LoRAConfig(r=2)
        export_policy(tmp_path / "wrong", adapter(Tiny("llama"), config), config, **SOURCE, weights=table(Tiny("gpt2")))


@pytest.fixture
def fused(tmp_path):
    """An adapter of rank 2 on GPT-NeoX as PEFT makes it: one A for query, key and value."""
    tiny, config = Tiny("gpt_neox"), LoRAConfig(r=2, lora_alpha=3, target_modules=r"attention\.[qkv]_proj")
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(3):
        module = f"base_model.model.gpt_neox.layers.{layer}.attention.query_key_value"
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((2, 16)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((48, 2)).astype(np.float32)
    folder = tmp_path / "theirs"
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "owner/name"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, tiny, config, tensors


def test_an_adapter_made_on_a_fused_module_becomes_three_with_one_a(fused):
    folder, tiny, config, tensors = fused
    lora, _ = import_adapter(folder, adapter(tiny, config), config, weights=table(tiny))
    module = "base_model.model.gpt_neox.layers.1.attention.query_key_value"
    whole = (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]).reshape(4, 3, 4, 16)
    for i, part in enumerate("qkv"):
        factors = lora["layers"]["attention"][f"{part}_proj"]
        np.testing.assert_array_equal(factors["a"][1], tensors[f"{module}.lora_A.weight"].T)
        np.testing.assert_allclose((factors["a"][1] @ factors["b"][1]).T, whole[:, i].reshape(16, 16), atol=1e-6)


def test_a_fused_adapter_needs_all_three_and_its_scale(fused):
    folder, tiny, config, _ = fused
    only_q = config.model_copy(update={"target_modules": r"attention\.q_proj"})
    with pytest.raises(AdapterError, match=r"lora_B.weight adapts more outputs than attention.q_proj; adapt query, key and value"):
        import_adapter(folder, adapter(tiny, only_q), only_q, weights=table(tiny))
    two = config.model_copy(update={"target_modules": r"attention\.[qk]_proj"})
    with pytest.raises(AdapterError, match=r"lora_A.weight should be \[4, 16\], but is \[2, 16\]"):
        import_adapter(folder, adapter(tiny, two), two, weights=table(tiny))
    settings = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"alpha_pattern": {"query_key_value": 8}}, {"rank_pattern": {"dense": 6}}, {"rank_pattern": [1]}):
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(AdapterError, match=f"{next(iter(change))}: .* is not supported"):
            import_adapter(folder, adapter(tiny, config), config, weights=table(tiny))
    both = {"rank_pattern": {"query_key_value": 6}, "alpha_pattern": {"query_key_value": 9}}
    for key, pattern in both.items():
        (folder / "adapter_config.json").write_text(json.dumps(settings | {key: pattern}))
        with pytest.raises(AdapterError, match="query_key_value in only one of rank_pattern and alpha_pattern, which gives another scale"):
            import_adapter(folder, adapter(tiny, config), config, weights=table(tiny))
    (folder / "adapter_config.json").write_text(json.dumps(settings | both))
    import_adapter(folder, adapter(tiny, config), config, weights=table(tiny))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"r": 4}, {}, "r is 4, but lora.r is 2"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights: 'pissa' is not supported"),
        ({"use_dora": True}, {}, "use_dora: True is not supported"),
        ({}, {"base_model": "hf:owner/other"}, "trained on 'owner/name', but model.source is 'hf:owner/other'"),
    ],
)
def test_adapters_that_would_act_differently_are_refused(fused, change, arguments, message):
    folder, tiny, config, _ = fused
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(AdapterError, match=message):
        import_adapter(folder, adapter(tiny, config), config, weights=table(tiny), **arguments)


def test_another_backbone_is_refused_by_its_hash(tmp_path):
    tiny, config = Tiny("llama"), LoRAConfig(r=2)
    lora = adapter(tiny, config)
    export_policy(tmp_path / "policy", lora, config, **SOURCE)
    import_adapter(tmp_path / "policy", lora, config, base_model="a/copy", sha256="0" * 64)
    with pytest.raises(AdapterError, match=f"trained on weights with SHA-256 {'0' * 64}, but the backbone's is {'1' * 64}"):
        import_adapter(tmp_path / "policy", lora, config, base_model="hf:owner/name", sha256="1" * 64)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.int32])
def test_other_types_are_converted_or_refused(fused, dtype):
    folder, tiny, config, tensors = fused
    safetensors.numpy.save_file({n: np.asarray(x).astype(dtype) for n, x in tensors.items()}, folder / "adapter_model.safetensors")
    if dtype is np.int32:
        with pytest.raises(AdapterError, match="of type int32, which is not supported; supported: F32, F16, BF16"):
            import_adapter(folder, adapter(tiny, config), config, weights=table(tiny))
    else:
        lora, _ = import_adapter(folder, adapter(tiny, config), config, weights=table(tiny))
        assert {leaf.dtype for leaf in jax.tree.leaves(lora)} == {jnp.dtype(jnp.float32)}
