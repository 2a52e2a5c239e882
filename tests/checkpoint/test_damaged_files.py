"""Damaged and hostile files of every format: only errors of ours, soon, and without memory that the file does not have.

Cases are drawn by hypothesis, always the same ones, so that a failure can be repeated.
"""

from __future__ import annotations

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_families import CASES, Tiny
from tiny_gguf import CONFIG, hf_tensors, write_folder
from tiny_vision import CASES as SEEING_CASES

from pe_rlhf_jax.checkpoint.export import export_reward
from pe_rlhf_jax.checkpoint.peft_import import AdapterError, import_adapter
from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.weights import WeightsError, account, leaf_shapes
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.families import FAMILIES, UnsupportedModelError, family_of

bounded = settings(
    max_examples=500, deadline=2000, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LORA = LoRAConfig(r=2)

scalars = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8)
scalars |= st.sampled_from([1, 2, 3, 8, 0.5, "llama3"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)
places = st.sampled_from(["../x", "config.json", "/etc/passwd", "model-00001-of-00002.safetensors"])


@st.composite
def damages(draw):
    """A function that damages bytes: flips, cuts, doubles or replaces a piece, mostly near the start, where the structure is."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "number"]))
    near, offset = draw(st.booleans()), draw(st.integers(0, 2**20))
    byte, amount, number = draw(st.integers(1, 255)), draw(st.integers(1, 40)), draw(st.integers(0, 2**64 - 1))

    def damage(whole: bytes) -> bytes:
        at = offset % (min(len(whole), 3000) if near else len(whole))
        if kind == "flip":
            return whole[:at] + bytes([whole[at] ^ byte]) + whole[at + 1 :]
        if kind == "cut":
            return whole[:at] + whole[at + amount :]
        if kind == "insert":
            return whole[:at] + bytes([byte]) * amount + whole[at:]
        return whole[:at] + struct.pack("<Q", number) + whole[at + 8 :]

    return damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    write_folder(path, {name: x.astype(jnp.bfloat16) for name, x in hf_tensors().items()})
    return path, (path / "model.safetensors").read_bytes(), leaf_shapes(family_of(CONFIG).config_from_hf(CONFIG))


@bounded
@given(damages())
def test_damaged_safetensors(folder, damage):
    path, whole, leaves = folder
    (path / "model.safetensors").write_bytes(damage(whole))
    family = family_of(CONFIG)
    architecture = family.config_from_hf(CONFIG)
    try:
        opened = SafetensorsFolder(path)
        account(opened, family, architecture, [(w, leaves[w.leaf]) for w in family.weights(architecture)])
        assert all(opened.read(name).nbytes <= len(whole) for name in opened.names)
    except WeightsError as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    write_folder(path, hf_tensors(), shards=2)
    return path, json.loads((path / "model.safetensors.index.json").read_text())


@bounded
@given(st.data())
def test_damaged_indices(sharded, data):
    path, index = sharded
    names = list(index["weight_map"])
    kind = data.draw(st.sampled_from(["text", "value", "map", "entry"]))
    if kind == "text":
        text = data.draw(damages())(json.dumps(index).encode())
    else:
        changed = {**index, "weight_map": dict(index["weight_map"])}
        if kind == "value":
            changed = data.draw(values)
        elif kind == "map":
            changed["weight_map"] = data.draw(values)
        else:
            name = data.draw(st.sampled_from(names) | st.text(max_size=5))
            changed["weight_map"][name] = data.draw(values | places)
        text = json.dumps(changed).encode()
    (path / "model.safetensors.index.json").write_bytes(text)
    try:
        opened = SafetensorsFolder(path)
        assert all(file.parent == path for file in opened.files)
        for name in opened.names:
            opened.read(name)
    except WeightsError as error:
        assert str(path) in str(error)


KEYS = sorted(
    {key for case in CASES.values() for key in case}
    | {"rope_scaling", "rope_theta", "rope_local_base_freq", "rotary_pct", "rotary_emb_base", "no_rope_layer_interval", "max_window_layers"}
    | {"sliding_window_pattern", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "hidden_activation", "quantization_config"}
)
ropes = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"])
    | st.sampled_from(["original_max_position_embeddings", "attention_factor", "beta_fast", "truncate", "full_attention"]),
    scalars | st.sampled_from(["linear", "llama3", "yarn", "default", "dynamic"]),
    max_size=6,
)


@bounded
@given(st.sampled_from(sorted(CASES)), st.dictionaries(st.sampled_from(KEYS), values | ropes, min_size=1, max_size=3))
def test_configurations_that_nobody_meant(name, changes):
    config = {**CASES[name], **changes, "model_type": CASES[name]["model_type"]}
    try:
        architecture = family_of(config).config_from_hf(config)
    except UnsupportedModelError:
        return
    hash(architecture)  # it is a key of compiled programs
    assert architecture.num_heads % architecture.num_kv_heads == 0
    assert all(0 <= layer < architecture.num_layers for layer in architecture.windowed_layers or ())


SEEING_KEYS = sorted(
    {key for case in SEEING_CASES.values() for part in (case, case["text_config"], case["vision_config"]) for key in part}
    | {"num_channels", "layer_norm_eps", "hidden_act", "projector_hidden_act", "rope_scaling"}
)


@bounded
@given(
    st.sampled_from(sorted(SEEING_CASES)),
    st.sampled_from([None, "text_config", "vision_config"]),
    st.dictionaries(st.sampled_from(SEEING_KEYS), values | ropes, min_size=1, max_size=3),
)
def test_configurations_with_images_that_nobody_meant(name, section, changes):
    case = SEEING_CASES[name]
    config = {**case, **changes} if section is None else {**case, section: {**case[section], **changes}}
    config["model_type"] = case["model_type"]
    try:
        architecture = family_of(config).config_from_hf(config)
    except UnsupportedModelError:
        return
    hash(architecture)
    assert architecture.vision.tokens_per_image >= 0 and architecture.vision.tower.side >= 1
    assert architecture.vision.feature_size >= architecture.vision.tower.hidden_size


@given(values)
@settings(max_examples=200, deadline=2000, derandomize=True, database=None)
def test_model_types_that_nobody_has(value):
    if value not in list(FAMILIES):
        with pytest.raises(UnsupportedModelError):
            family_of({"model_type": value})


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    tiny, path = Tiny("gpt2"), tmp_path_factory.mktemp("adapter") / "reward"
    like = jax.eval_shape(Decoder(tiny.architecture, LORA).init_lora, jax.random.key(0))
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), like)
    weights = tiny.family.weights(tiny.architecture)
    head = {"kernel": np.ones((16, 1), np.float32), "bias": np.zeros(1, np.float32)}
    export_reward(path, lora, head, LORA, base_model="hf:a/b", sha256="0" * 64, weights=weights)
    files = {name: (path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    return path, files, like, weights


@bounded
@given(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), damages())
def test_damaged_adapters(adapter_folder, file, damage):
    path, files, like, weights = adapter_folder
    for name, whole in files.items():
        (path / name).write_bytes(damage(whole) if name == file else whole)
    try:
        lora, head = import_adapter(path, like, LORA, weights=weights, base_model="hf:a/b", sha256="0" * 64)
    except AdapterError as error:
        assert str(path) in str(error)
        return
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((lora, head)))
    assert jax.tree.map(lambda leaf: leaf.shape, lora) == jax.tree.map(lambda leaf: leaf.shape, dict(like))


SETTINGS = ["peft_type", "r", "lora_alpha", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_parameters"]


@bounded
@given(st.dictionaries(st.sampled_from(SETTINGS) | st.just("base_model_name_or_path"), values, min_size=1, max_size=2) | values)
def test_settings_of_adapters_that_nobody_meant(adapter_folder, changes):
    path, files, like, weights = adapter_folder
    found = json.loads(files["adapter_config.json"])
    found = {**found, **changes} if isinstance(changes, dict) else changes
    (path / "adapter_model.safetensors").write_bytes(files["adapter_model.safetensors"])
    (path / "adapter_config.json").write_text(json.dumps(found))
    try:
        import_adapter(path, like, LORA, weights=weights, base_model="hf:a/b")
    except AdapterError as error:
        assert str(path) in str(error)
        return
    assert (found["r"], found["lora_alpha"], found["peft_type"]) == (2, 32, "LORA")


def test_shapes_that_no_file_could_fill_are_refused_before_anything_is_made(tmp_path):
    write_folder(tmp_path, hf_tensors(), {**CONFIG, "vocab_size": 2**30, "intermediate_size": 2**30})
    family = family_of(CONFIG)
    opened = SafetensorsFolder(tmp_path)
    with pytest.raises(UnsupportedModelError, match="vocab_size: expected a positive int, found 2147483648"):
        family.config_from_hf({**CONFIG, "vocab_size": 2**31})
    architecture = family.config_from_hf(opened.config)
    leaves = leaf_shapes(architecture)
    with pytest.raises(WeightsError, match=r"should be .* by the configuration"):
        account(opened, family, architecture, [(w, leaves[w.leaf]) for w in family.weights(architecture)])


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError, match="Pickled weights are not read"):
        SafetensorsFolder(tmp_path)
    safetensors.numpy.save_file({"model.norm.weight": np.ones(3, np.float64)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="of type F64, which is not supported"):
        SafetensorsFolder(tmp_path).read("model.norm.weight")
