"""Pairs for random tiny models, and what the reward stage learns from them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tiny_families import Tiny

from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.data import PreferenceExample
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.training import reward

MARGINS = {"use_margin": True, "center_rewards_coefficient": 0.1}
"""So that the loss tells scores that are both too high by one number."""
LORA = LoRAConfig(r=3, lora_alpha=6.0)
SHAPES = ((5, 3, 4), (0, 2, 5), (7, 1, 1), (2, 6, 3))
"""Tokens of prompt, chosen and rejected; the longest are longer than every window, and one pair shares nothing."""


def model_of(name: str) -> SimpleNamespace:
    tiny = Tiny(name)
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    return SimpleNamespace(decoder=Decoder(tiny.architecture, LORA), config=tiny.architecture, params=params)


def role_of(context) -> Role:
    """A reward model whose adapter is far from fresh."""
    role = reward.init(context, Role()).trainable
    draw = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return role.replace(lora=jax.tree.map(draw, role.lora))


def pairs(vocabulary: int, shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> list[PreferenceExample]:
    rng = np.random.default_rng(5)
    found = []
    for prompt, *answers in shapes:
        asked = rng.integers(2, vocabulary, prompt)
        first = rng.permutation(np.arange(2, vocabulary))  # answers that differ from their first token on
        sides = [np.concatenate([asked, first[i : i + 1], rng.integers(2, vocabulary, n - 1)]) for i, n in enumerate(answers)]
        found.append(PreferenceExample(*(side.astype(np.int32) for side in sides), margin=0.5, prompt_length=prompt))
    return found


def learned(context, role, batch):
    """Loss, figures of the scores, and gradients of the reward stage."""
    context = dataclasses.replace(context, decoder=dataclasses.replace(context.decoder, remat="none"))  # compiles sooner
    loss = reward._loss(context, reward.kind_of(context.config.reward))
    total, key = reward._examples(batch), jax.random.key(0)
    return jax.jit(jax.value_and_grad(lambda r: loss(r, (context.backbone, Role()), batch, total, key), has_aux=True))(role)


def assert_alike(a, b, tolerance=1e-5):
    """To float32's rounding, of what each leaf holds at most."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(np.max(np.abs(y))))


FAST = ("mistral", "gemma3", "gpt2")
"""Windows in all layers; in some, with rotations of their own; a table of positions. test_losses.py holds Llama's to NumPy."""
