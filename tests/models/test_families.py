"""Every family against what transformers and torch computed (`record_families.py`), and what generation rests on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from tiny_families import CASES, LENGTH, RECORDED, RECORDED_LEAVES, Tiny, flat, loss, tokens
from tiny_vision import CASES as SEEING_CASES

from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.families import FAMILIES
from pe_rlhf_jax.models.rope import RopeScaling

pytestmark = pytest.mark.usefixtures("quick_compile")

# Logits are of order 1 to 10, gradients of 0.01 to 1, and both sides compute in float32: they were found to differ by 1.2e-5 and 1e-5
# at most. A feature left out moves logits by 5e-4 at least (`test_every_feature_moves_the_logits`).
NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES]  # what is loaded is loaded once
LOGITS = 1e-4
GRADIENTS = 5e-5


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with safetensors.safe_open(RECORDED, framework="numpy") as file:
        assert file.metadata()[name] == str(Tiny(name).checksum()), "the weights changed: run tests/models/record_families.py again"
        return {leaf: file.get_tensor(f"{name}/{leaf}") for leaf in ("logits", *RECORDED_LEAVES)}


@functools.cache
def loaded(name: str):
    tiny = Tiny(name)
    return tiny.architecture, load_params(tiny, tiny.family, tiny.architecture, jnp.float32)


def with_leaves(tree, leaves, path=()):
    """The tree with the leaves that are given by their path in place of its own."""
    if not isinstance(tree, dict):
        return leaves.get("/".join(path), tree)
    return {name: with_leaves(part, leaves, (*path, name)) for name, part in tree.items()}


def test_every_family_has_a_case():
    assert {case["model_type"] for case in (*CASES.values(), *SEEING_CASES.values())} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_equal_torchs(name):
    architecture, params = loaded(name)
    mask = np.ones_like(tokens(), bool)
    decoder = Decoder(architecture, remat="none")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def compared(leaves):
        return loss(decoder, with_leaves(params, leaves), tokens(), mask)

    (_, logits), found = compared({leaf: flat(params)[leaf] for leaf in RECORDED_LEAVES})
    np.testing.assert_allclose(logits, recorded(name)["logits"], atol=LOGITS, rtol=0)
    for leaf in RECORDED_LEAVES:
        np.testing.assert_allclose(found[leaf], recorded(name)[leaf], atol=GRADIENTS, rtol=0, err_msg=leaf)
        assert np.abs(recorded(name)[leaf]).max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_decoding_left_padded_rows_with_a_cache_equals_torchs_whole_rows(name):
    """Rows padded by 3 and 0 on the left; 7 slots at once, then one at a time, in a cache with room to spare."""
    architecture, params = loaded(name)
    decoder, pads, slots, first = Decoder(architecture, remat="none"), (3, 0), LENGTH + 5, 7
    mask, padded = np.zeros((2, slots), bool), np.full((2, slots), 36)
    for row, pad in enumerate(pads):
        mask[row, pad : pad + LENGTH], padded[row, pad : pad + LENGTH] = True, tokens()[row]
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)

    @jax.jit
    def step(tokens, mask, positions, cache, start):
        hidden, cache = decoder.apply({"params": params}, tokens, mask, positions, cache, start)
        return decoder.unembed(params, hidden), cache

    logits, cache = step(padded[:, :first], mask, places[:, :first], decoder.new_cache(2, slots), 0)
    parts = [logits]
    for slot in range(first, LENGTH + max(pads)):
        known = mask & (np.arange(slots) <= slot)
        logits, cache = step(padded[:, slot : slot + 1], known, places[:, slot : slot + 1], cache, slot)
        parts.append(logits)
    found = np.concatenate(parts, axis=1)
    for row, pad in enumerate(pads):
        np.testing.assert_allclose(found[row, pad : pad + LENGTH], recorded(name)["logits"][row], atol=LOGITS, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-llama3", {"rope_scaling": None}),
        ("llama-llama3", {"rope_scaling": RopeScaling("linear", 4.0)}),
        ("llama-yarn", {"rope_scaling": RopeScaling("yarn", 4.0, 8, beta_fast=1.0, beta_slow=0.1)}),  # without its longer vectors
        ("llama-yarn", {"rope_scaling": RopeScaling("linear", 4.0, attention_factor=1.1386294)}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2-windowed", {"windowed_layers": (1, 2)}),
        ("gemma2", {"windowed_layers": (1,)}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"final_softcap": None}),
        ("gemma2", {"attention_scale": None}),
        ("gemma2", {"embedding_scale": None}),
        ("gemma2", {"norm_offset": 0.0}),
        ("gemma3", {"local_rope_theta": None}),
        ("smollm3", {"unrotated_layers": ()}),
        ("gpt_neox", {"rotary_dim": None}),
        ("gpt_neox", {"parallel_residual": False}),
        ("gpt_neox", {"activation": "gelu_tanh"}),
        ("gpt2", {"activation": "gelu"}),  # the smallest difference of all
    ],
)
def test_every_feature_moves_the_logits(name, change):
    """Otherwise the comparisons above would not notice that it is missing."""
    architecture, params = loaded(name)
    decoder = Decoder(dataclasses.replace(architecture, **change), remat="none")
    found = jax.jit(lambda p: loss(decoder, p, tokens(), np.ones_like(tokens(), bool))[1])(params)
    assert np.abs(found - recorded(name)["logits"]).max() > 5 * LOGITS


def test_windows_hide_exactly_what_lies_before_them():
    """With 3 layers of window 4, a token is seen 9 tokens further on and no further."""
    architecture, params = loaded("mistral")
    decoder = Decoder(architecture, remat="none")
    mask = np.ones((1, LENGTH), bool)

    def of(embed):
        hidden, _ = decoder.apply({"params": {**params, "embed": embed}}, np.arange(LENGTH)[None], mask)
        return jnp.sum(jnp.sin(hidden[0, -1]))

    influence = np.abs(jax.jit(jax.grad(of))(params["embed"])).max(axis=-1)[:LENGTH]
    np.testing.assert_array_equal(influence > 0, np.arange(LENGTH) >= LENGTH - 1 - 9)


def test_tokens_beyond_learned_positions_are_not_a_number():
    architecture, params = loaded("gpt2")
    decoder = Decoder(dataclasses.replace(architecture, max_position_embeddings=8))
    params = {**params, "position_embed": params["position_embed"][:8]}
    padded = np.arange(LENGTH)[None] < 8  # a row longer than the table, its text not
    hidden, _ = decoder.apply({"params": params}, tokens()[:1], padded)
    short, _ = decoder.apply({"params": params}, tokens()[:1, :8], padded[:, :8])
    np.testing.assert_allclose(hidden[:, :8], short, atol=1e-6)
    hidden, _ = decoder.apply({"params": params}, tokens()[:, :2], np.ones((2, 2), bool), np.array([[7, 8], [7, 7]]))
    np.testing.assert_array_equal(np.isnan(hidden).any(axis=(1, 2)), [True, False])
