"""Roles computed one row at a time, without padding and in float64, by the decoder of tests/numpy_decoder.py on merged weights."""

from __future__ import annotations

import numpy as np
from numpy_decoder import forward

from pe_rlhf_jax.models.lora import merge

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
"""Ours is in float32: log-probabilities of order 3 were found to differ by 3e-6."""


def outputs(context, role, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [T, D] and logits [T, V]."""
    params = context.backbone if role.lora is None else merge(context.backbone, role.lora, context.config.lora)
    return forward(params, context.decoder.config, np.asarray(tokens))


def logprobs(context, role, tokens, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of tokens[1:], [T - 1]."""
    logits = outputs(context, role, tokens)[1][:-1] / temperature
    logits = logits - logits.max(-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(tokens) - 1), np.asarray(tokens[1:])]


def head(context, role, tokens) -> np.ndarray:
    """The head's number after each token, [T]."""
    hidden = outputs(context, role, tokens)[0]
    return hidden @ np.asarray(role.head["kernel"], np.float64)[:, 0] + float(role.head["bias"][0])
