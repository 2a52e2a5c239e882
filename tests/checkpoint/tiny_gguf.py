"""Tiny llama models written as llama.cpp's conversion writes them, and as Hugging Face's folder, from the same tensors."""

from __future__ import annotations

import json

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "Ċ Ċ"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
CONFIG = {
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rope_theta": 1000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def hf_tensors(tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors by Hugging Face's names and shapes, at scales where every part moves the logits."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    if not tied:
        shapes["lm_head"] = (len(TOKENS), HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (HIDDEN,), layer + "post_attention_layernorm": (HIDDEN,)}
        shapes |= {layer + "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN), layer + "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM)}
        shapes |= {layer + f"self_attn.{n}_proj": (KV_HEADS * HEAD_DIM, HIDDEN) for n in "kv"}
        shapes |= {layer + f"mlp.{n}_proj": (INNER, HIDDEN) for n in ("gate", "up")} | {layer + "mlp.down_proj": (HIDDEN, INNER)}
    noise = {name + ".weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {n: 1 + 0.2 * x if "norm" in n else (0.3 if "embed" in n or "lm_head" in n else HIDDEN**-0.5 * 2) * x for n, x in noise.items()}


def write_folder(folder, tensors, config=CONFIG, shards=1) -> None:
    """Hugging Face's layout, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        return save_file(tensors, folder / "model.safetensors")
    file_of = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(file_of.values()):
        save_file({name: x for name, x in tensors.items() if file_of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def gguf_name(name: str) -> str:
    base = name.removesuffix(".weight")
    if base.startswith("model.layers."):
        _, _, layer, module = base.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[module]}.weight"
    return _GGUF_NAMES[base] + ".weight"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of query and key rows in a GGUF file, as llama.cpp's conversion script computes it."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, tensors, quant=Quant.F32, metadata=None, extra=None, drop=()) -> None:
    """A GGUF file: matrices in `quant`, norms in float32. `metadata` overrides values (None leaves a key out); `extra`
    adds raw tensors."""
    values = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 1000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        if value is not None and key not in drop:
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensor = interleaved(tensor, HEADS)
        elif name.endswith("k_proj.weight"):
            tensor = interleaved(tensor, KV_HEADS)
        kind = quant if tensor.ndim == 2 else Quant.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    for name, (array, kind) in (extra or {}).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
