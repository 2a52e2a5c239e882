"""Configurations as they are published, and the numbers of parameters that their model cards give. Nothing is allocated."""

from __future__ import annotations

import math

import pytest

from pe_rlhf_jax.checkpoint.weights import leaf_shapes
from pe_rlhf_jax.models.families import family_of

_LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _config(model_type, vocab, hidden, inner, layers, heads, kv_heads, **others):
    """The keys that most families share, and others."""
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
_QWEN3 = {"head_dim": 128, "tie_word_embeddings": True, "sliding_window": None}

PUBLISHED = {
    "SmolLM2-135M": (_config("llama", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, rope_theta=100000), 134_515_008),
    "Llama-2-7b": (_config("llama", 32000, 4096, 11008, 32, 32, 32, pretraining_tp=1, rope_scaling=None), 6_738_415_616),
    "Llama-3.2-1B": (
        _config("llama", 128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=_LLAMA3, head_dim=64),
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (_config("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096, rope_theta=10000.0), 7_241_732_096),
    "Qwen2.5-0.5B": (
        _config("qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True, use_sliding_window=False, max_window_layers=24),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        _config("qwen3", 151936, 1024, 3072, 28, 16, 8, **_QWEN3),
        596_049_920,
    ),
    "gemma-2-2b": (_config("gemma2", 256000, 2304, 9216, 26, 8, 4, **_GEMMA, sliding_window=4096), 2_614_341_888),
    "gemma-3-270m": (_config("gemma3_text", 262144, 640, 2048, 18, 4, 1, **_GEMMA, sliding_window=512, rope_scaling=None), 268_098_176),
    "gemma-3-1b": (_config("gemma3_text", 262144, 1152, 6912, 26, 4, 1, **_GEMMA, sliding_window=512), 999_885_952),
    "SmolLM3-3B": (_config("smollm3", 128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True, rope_theta=5000000.0), 3_075_098_624),
    "pythia-70m": (
        {
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        70_426_624,
    ),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024},
        124_439_808,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_number_of_parameters(name):
    config, expected = PUBLISHED[name]
    family = family_of(config)
    architecture = family.config_from_hf({"max_position_embeddings": 1024, **config})
    leaves = leaf_shapes(architecture)
    assert sum(math.prod(shape) for shape in leaves.values()) == expected
    assert {weight.leaf for weight in family.weights(architecture)} == set(leaves)


def test_layers_differ_where_the_published_models_layers_do():
    gemma2, gemma3, smollm3, mistral, pythia = (
        family_of(PUBLISHED[name][0]).config_from_hf({"max_position_embeddings": 1024, **PUBLISHED[name][0]})
        for name in ("gemma-2-2b", "gemma-3-270m", "SmolLM3-3B", "Mistral-7B-v0.1", "pythia-70m")
    )
    assert gemma2.windowed_layers == tuple(range(0, 26, 2))
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.attention_scale) == (50.0, 30.0, 1 / 16)
    assert [i for i in range(18) if not gemma3.is_windowed(i)] == [5, 11, 17]
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.final_softcap) == (1e6, 1e4, None)
    assert smollm3.unrotated_layers == tuple(range(3, 36, 4)) and smollm3.sliding_window is None
    assert mistral.sliding_window == 4096 and all(mistral.is_windowed(i) for i in range(32))
    assert (pythia.rotary_dim, pythia.head_dim) == (16, 64)
