"""GGUF files of every architecture, written as llama.cpp's conversion writes them, give the tensors and the architecture back."""

from __future__ import annotations

import math

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from tiny_families import Tiny
from tiny_gguf import interleaved

from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.weights import WeightsError, load_params
from pe_rlhf_jax.models.families import family_of
from pe_rlhf_jax.models.rope import rope_angles

_SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rope_theta": 50.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_GEMMA = {"sliding_window": 4, "query_pre_attn_scalar": 8}
MODELS = {
    "llama": {"model_type": "llama", **_SIZES, "tie_word_embeddings": False},
    "llama-llama3": {"model_type": "llama", **_SIZES, "head_dim": 16, "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "llama-linear": {"model_type": "llama", **_SIZES, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"model_type": "qwen2", **_SIZES},
    "qwen2-yarn": {
        "model_type": "qwen2",
        **_SIZES,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3": {"model_type": "qwen3", **_SIZES},
    "gemma2": {"model_type": "gemma2", **_SIZES, **_GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3": {"model_type": "gemma3_text", **_SIZES, **_GEMMA},
    "gemma3-scaled": {"model_type": "gemma3_text", **_SIZES, **_GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
_ARCHITECTURES = {"gemma3_text": "gemma3"}
_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
_GEMMA_NAMES = {**_NAMES, "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
_GEMMA_NAMES |= {"post_feedforward_layernorm": "post_ffw_norm"}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str, gemma: bool) -> str:
    base, kind = name.rsplit(".", 1)
    if base in _ENDS:
        return f"{_ENDS[base]}.{kind}"
    _, _, layer, module = base.split(".", 3)
    return f"blk.{layer}.{(_GEMMA_NAMES if gemma else _NAMES)[module]}.{kind}"


def llama3_factors(scaling, theta: float, size: int) -> list[float]:
    """As convert_hf_to_gguf.py computes them, one by one."""
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        length = scaling["original_max_position_embeddings"]
        if wavelength < length / scaling["high_freq_factor"]:
            factors.append(1.0)
        elif wavelength > length / scaling["low_freq_factor"]:
            factors.append(scaling["factor"])
        else:
            smooth = (length / wavelength - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return factors


def write(path, tiny: Tiny, extra=None) -> None:
    config = tiny.config
    architecture = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    gemma = architecture.startswith("gemma")
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if gemma:
        values["attention.sliding_window"] = config["sliding_window"]
    if architecture == "gemma2":
        values |= {key: config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    scaling = config.get("rope_scaling")
    if scaling is not None and scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(llama3_factors(scaling, config["rope_theta"], config["head_dim"]), np.float32))
    elif scaling is not None:
        values |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"]}
        if "original_max_position_embeddings" in scaling:
            values["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in {**values, **(extra or {})}.items():
        add[type(value)](f"{architecture}.{key}", value)
    for name, tensor in tiny.tensors.items():
        if architecture == "llama" and name.endswith("q_proj.weight"):
            tensor = interleaved(tensor, config["num_attention_heads"])
        elif architecture == "llama" and name.endswith("k_proj.weight"):
            tensor = interleaved(tensor, config["num_key_value_heads"])
        elif gemma and name.endswith("norm.weight"):
            tensor = tensor + 1
        writer.add_tensor(gguf_name(name, gemma), tensor, raw_dtype=Quant.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_architecture_come_back(tmp_path, name):
    tiny = Tiny(name, MODELS[name])
    write(tmp_path / "m.gguf", tiny)
    file = GGUFFile(tmp_path / "m.gguf")
    assert family_of(file.config) is tiny.family
    assert tiny.family.config_from_hf(file.config) == tiny.architecture
    assert set(file.names) == set(tiny.names)
    for tensor_name, tensor in tiny.tensors.items():
        # Gemma's 1 is added and taken away in float32: half a step of numbers near 1 to 2.
        np.testing.assert_allclose(file.read(tensor_name), tensor, rtol=0, atol=2e-7 if "norm" in tensor_name else 0, err_msg=tensor_name)
    load_params(file, tiny.family, tiny.architecture, jnp.float32)


def test_llama_3s_scaling_is_what_its_factors_say():
    """The file has factors of the frequencies; we compute from the scaling that they stand for."""
    tiny = Tiny("llama-llama3", MODELS["llama-llama3"])
    at = jnp.arange(0, 20_000, 999)[None]
    plain, scaled = (rope_angles(at, 16, 5e5, scaling) for scaling in (None, tiny.architecture.rope_scaling))
    factors = np.array(llama3_factors(_LLAMA3, 5e5, 16))
    assert ((factors > 1.01) & (factors < 7.99)).sum() > 0
    np.testing.assert_allclose(scaled, np.asarray(plain) / factors, rtol=1e-5)


def test_newer_files_say_the_layers_and_the_base_of_their_windows(tmp_path):
    tiny = Tiny("gemma3", MODELS["gemma3"])
    write(tmp_path / "m.gguf", tiny, {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 20.0})
    found = tiny.family.config_from_hf(GGUFFile(tmp_path / "m.gguf").config)
    assert (found.windowed_layers, found.local_rope_theta) == ((0, 2, 4), 20.0)
    write(tmp_path / "n.gguf", tiny, {"attention.sliding_window_pattern": [False] * 5 + [True]})
    assert tiny.family.config_from_hf(GGUFFile(tmp_path / "n.gguf").config).windowed_layers == (5,)


@pytest.mark.parametrize(("name", "layers", "scalar"), [("gemma2", 46, 4), ("gemma2", 6, 8), ("gemma3", 62, 4)])
def test_the_largest_gemmas_scale_queries_by_hidden_size_per_head(tmp_path, name, layers, scalar):
    write(tmp_path / "m.gguf", Tiny(name, {**MODELS[name], "num_hidden_layers": layers}))
    assert GGUFFile(tmp_path / "m.gguf").config["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "linear scaling of rotary positions together with factors"),
        ({"rope.freq_base": 6e5}, "rope_freqs.weight is not Llama 3's scaling"),
        ({"block_count": 4_000_000}, "4000000 layers; the file is damaged"),
        ({"attention.value_length": 4}, "heads of 16 for keys and 4 for values"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, extra, message):
    write(tmp_path / "m.gguf", Tiny("llama-llama3", MODELS["llama-llama3"]), extra)
    with pytest.raises(WeightsError, match=message):
        GGUFFile(tmp_path / "m.gguf")
