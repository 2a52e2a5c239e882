"""A Llama-like decoder in numpy and float64, written apart from the package's: one sequence, no padding, no cache, no adapters.

Rotary positions are a product of complex numbers and heads are a plain loop, so that a mistake is not made twice.
"""

from __future__ import annotations

import numpy as np


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, theta):
    """x is [T, h]: the pairs (x_i, x_{i + h/2}) as complex numbers, turned by position * theta^(-2i/h)."""
    length, size = x.shape
    turned = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * np.exp(
        1j * np.outer(np.arange(length), theta ** (-2.0 * np.arange(size // 2) / size))
    )
    return np.concatenate([turned.real, turned.imag], -1)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(params, config, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Final-normed hidden states [T, D] and logits [T, V] of one sequence of token ids, in float64."""

    def weight(*path, layer=None):
        node = params
        for name in path:
            node = node[name]
        array = np.asarray(node, np.float64)
        return array if layer is None else array[layer]

    c = config
    length = len(tokens)
    x = weight("embed")[np.asarray(tokens)]
    hidden_future = np.triu(np.full((length, length), -np.inf), 1)
    for i in range(c.num_layers):
        y = _norm(x, weight("layers", "attention_norm", "scale", layer=i), c.rms_norm_eps)
        q, k, v, o = (weight("layers", "attention", f"{n}_proj", "kernel", layer=i) for n in "qkvo")
        heads = []
        for h in range(c.num_heads):
            shared = h // (c.num_heads // c.num_kv_heads)
            mine, theirs = (slice(n * c.head_dim, (n + 1) * c.head_dim) for n in (h, shared))
            scores = _rotate(y @ q[:, mine], c.rope_theta) @ _rotate(y @ k[:, theirs], c.rope_theta).T
            heads.append(_softmax(scores / np.sqrt(c.head_dim) + hidden_future) @ (y @ v[:, theirs]))
        x = x + np.concatenate(heads, -1) @ o
        y = _norm(x, weight("layers", "mlp_norm", "scale", layer=i), c.rms_norm_eps)
        gate, up, down = (weight("layers", "mlp", f"{n}_proj", "kernel", layer=i) for n in ("gate", "up", "down"))
        gated = y @ gate
        x = x + (gated / (1 + np.exp(-gated)) * (y @ up)) @ down
    x = _norm(x, weight("final_norm", "scale"), c.rms_norm_eps)
    return x, x @ weight("embed" if c.tie_word_embeddings else "lm_head").T


def merged(params, lora, scale):
    """The parameters with scale * A B added to every kernel that has an adapter, in float64."""
    if "a" in lora:
        a, b = (np.asarray(lora[n], np.float64) for n in "ab")
        return {"kernel": np.asarray(params["kernel"], np.float64) + scale * np.einsum("ldr,lrf->ldf", a, b)}
    return {name: merged(part, lora[name], scale) if name in lora else part for name, part in params.items()}


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
