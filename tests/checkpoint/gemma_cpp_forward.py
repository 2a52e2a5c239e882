"""A Gemma 3 GGUF file run as llama.cpp runs it, in numpy and float32: an implementation apart from the package's.

Everything that the file does not say is written here once more: the layers without a window (every sixth), the rotary base of the others,
the embedding's scale. Norms are used as the file has them, 1 included.
"""

from __future__ import annotations

import gguf
import numpy as np


def logits(path, tokens) -> np.ndarray:
    """[T, V] of one sequence."""
    reader = gguf.GGUFReader(path)
    file = {t.name: t for t in reader.tensors}

    def weight(name):
        return gguf.quants.dequantize(file[name].data, file[name].tensor_type).astype(np.float32)

    def value(key):
        return reader.fields[f"gemma3.{key}"].contents()

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + value("attention.layer_norm_rms_epsilon")) * weight(name)

    heads, kv_heads, size = value("attention.head_count"), value("attention.head_count_kv"), value("attention.key_length")
    length = len(tokens)

    def rotated(x, base):  # [T, heads, size]: the pairs (x_i, x_{i + size/2}) as complex numbers
        turn = np.exp(1j * np.outer(np.arange(length), base ** (-np.arange(0, size, 2) / size)))[:, None, :]
        z = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1).astype(np.float32)

    embedding = weight("token_embd.weight")
    x = embedding[np.asarray(tokens)] * np.float32(value("embedding_length") ** 0.5)
    ago = np.arange(length)[:, None] - np.arange(length)
    for i in range(value("block_count")):
        block, everywhere = f"blk.{i}.", i % 6 == 5
        hidden = (ago < 0) | (~everywhere & (ago >= value("attention.sliding_window")))
        base = value("rope.freq_base") if everywhere else 10_000.0
        y = norm(x, block + "attn_norm.weight")
        q = (y @ weight(block + "attn_q.weight").T).reshape(length, heads, size)
        k = (y @ weight(block + "attn_k.weight").T).reshape(length, kv_heads, size)
        v = (y @ weight(block + "attn_v.weight").T).reshape(length, kv_heads, size)
        q, k = rotated(norm(q, block + "attn_q_norm.weight"), base), rotated(norm(k, block + "attn_k_norm.weight"), base)
        out = np.empty_like(q)
        for h in range(heads):
            g = h * kv_heads // heads
            scores = np.where(hidden, -np.inf, q[:, h] @ k[:, g].T / np.sqrt(size))
            share = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = share / share.sum(-1, keepdims=True) @ v[:, g]
        x = x + norm(out.reshape(length, heads * size) @ weight(block + "attn_output.weight").T, block + "post_attention_norm.weight")
        y = norm(x, block + "ffn_norm.weight")
        gate = y @ weight(block + "ffn_gate.weight").T
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        inner = gate * (y @ weight(block + "ffn_up.weight").T)
        x = x + norm(inner @ weight(block + "ffn_down.weight").T, block + "post_ffw_norm.weight")
    return norm(x, "output_norm.weight") @ embedding.T
