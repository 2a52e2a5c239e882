"""A llama GGUF file run as llama.cpp runs it, in numpy and float64: an implementation apart from the package's.

Tensors come straight from the `gguf` package. Query and key rows stay as the file has them, and rotary positions turn the
neighbours (x_2i, x_2i+1); our reader reorders the rows instead and turns (x_i, x_i+h/2).
"""

from __future__ import annotations

import gguf
import numpy as np


def losses(path, tokens) -> np.ndarray:
    """Negative log-likelihood of tokens[1:], each given those before it; [T - 1], nats."""
    reader = gguf.GGUFReader(path)
    file = {t.name: t for t in reader.tensors}

    def weight(name):
        return gguf.quants.dequantize(file[name].data, file[name].tensor_type).astype(np.float64)

    def value(key):
        return reader.fields[f"llama.{key}"].contents()

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + value("attention.layer_norm_rms_epsilon")) * weight(name)

    heads, kv_heads, size = value("attention.head_count"), value("attention.head_count_kv"), value("rope.dimension_count")
    length = len(tokens)
    angle = np.outer(np.arange(length), value("rope.freq_base") ** (-np.arange(0, size, 2) / size))
    turn = np.exp(1j * angle)[:, None, :]

    def rotated(x):  # [T, heads, size]
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    embedding = weight("token_embd.weight")
    x = embedding[np.asarray(tokens)]
    future = np.triu(np.full((length, length), -np.inf), 1)
    for i in range(value("block_count")):
        block = f"blk.{i}."
        y = norm(x, block + "attn_norm.weight")
        q = rotated((y @ weight(block + "attn_q.weight").T).reshape(length, heads, size))
        k = rotated((y @ weight(block + "attn_k.weight").T).reshape(length, kv_heads, size))
        v = (y @ weight(block + "attn_v.weight").T).reshape(length, kv_heads, size)
        out = np.empty_like(q)
        for h in range(heads):
            g = h * kv_heads // heads
            scores = q[:, h] @ k[:, g].T / np.sqrt(size) + future
            share = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = share / share.sum(-1, keepdims=True) @ v[:, g]
        x = x + out.reshape(length, heads * size) @ weight(block + "attn_output.weight").T
        y = norm(x, block + "ffn_norm.weight")
        gate = y @ weight(block + "ffn_gate.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weight(block + "ffn_up.weight").T)) @ weight(block + "ffn_down.weight").T
    logits = norm(x, "output_norm.weight") @ (weight("output.weight") if "output.weight" in file else embedding).T
    top = logits.max(-1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -logprobs[np.arange(length - 1), np.asarray(tokens[1:])]
