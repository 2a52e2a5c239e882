"""The decoder against a float64 reference, and the properties that training and generation rest on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import forward, merged

from pe_rlhf_jax.models.decoder import unembed
from pe_rlhf_jax.models.visibility import positions

ROUNDING = 2e-5
"""Float32 rounding of a two-layer decoder whose hidden states and logits are of order 1 to 10."""

TOKENS = np.array([[3, 14, 15, 9, 2, 6, 5], [8, 9, 7, 9, 3, 2, 3]])


@pytest.fixture(scope="module")
def run(tiny):
    """A jitted full forward: hidden states."""
    return jax.jit(lambda variables, tokens, mask: tiny.decoder.apply(variables, tokens, mask)[0])


@pytest.mark.parametrize("name", ["tiny", "untied"])
def test_hidden_states_and_logits_equal_the_reference(name, request):
    model = request.getfixturevalue(name)
    hidden = jax.jit(lambda p: model.decoder.apply({"params": p}, TOKENS, np.ones_like(TOKENS, bool))[0])(model.params)
    logits = unembed(model.params, hidden)
    assert ("lm_head" in model.params) == (name == "untied")
    for row, tokens in enumerate(TOKENS):
        expected_hidden, expected_logits = forward(model.params, model.config, tokens)
        np.testing.assert_allclose(hidden[row], expected_hidden, atol=ROUNDING)
        np.testing.assert_allclose(logits[row], expected_logits, atol=5 * ROUNDING)


def test_an_adapter_equals_the_reference_with_merged_weights(tiny, run):
    weights = merged(tiny.params, tiny.lora, scale=6.0 / 3)
    hidden = run(tiny.variables, TOKENS, np.ones_like(TOKENS, bool))
    for row, tokens in enumerate(TOKENS):
        expected = forward(weights, tiny.config, tokens)[0]
        np.testing.assert_allclose(hidden[row], expected, atol=ROUNDING)
        assert np.abs(expected - forward(tiny.params, tiny.config, tokens)[0]).max() > 0.1


@pytest.mark.usefixtures("quick_compile")
def test_later_and_masked_tokens_have_exactly_no_influence(tiny):
    """d hidden[t] / d embedding(token s) is 0 to the bit for s > t and for masked s, and not 0 otherwise."""
    tokens = jnp.arange(7)[None]
    mask = jnp.array([[False, False, True, True, False, True, True]])
    direction = jax.random.normal(jax.random.key(0), (tiny.config.hidden_size,))

    @jax.jit
    @jax.vmap
    def influence(t):
        def of(embed):
            variables = {**tiny.variables, "params": {**tiny.params, "embed": embed}}
            return tiny.decoder.apply(variables, tokens, mask)[0][0, t] @ direction

        return jnp.abs(jax.grad(of)(tiny.params["embed"])[:7]).max(axis=-1)

    real = np.asarray(mask[0])
    found = np.asarray(influence(jnp.arange(7)))[real]
    expected = np.tril(np.ones((7, 7), bool))[real] & real
    np.testing.assert_array_equal(found > 0, expected)


def test_padding_changes_nothing_on_either_side(tiny, run):
    alone = run(tiny.variables, TOKENS[:1], np.ones((1, 7), bool))
    for left, right in [(3, 0), (0, 3), (2, 1)]:
        padded = np.pad(TOKENS[:1], ((0, 0), (left, right)), constant_values=30)
        mask = np.pad(np.ones((1, 7), bool), ((0, 0), (left, right)))
        found = run(tiny.variables, padded, mask)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[:, left : left + 7], alone, atol=ROUNDING)


def test_positions_count_real_tokens():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]], bool)
    np.testing.assert_array_equal(positions(mask), [[0, 0, 0, 1, 2], [0, 1, 1, 1, 2]])


@pytest.mark.parametrize("piece", [1, 3])
@pytest.mark.usefixtures("quick_compile")
def test_decoding_with_a_cache_equals_one_forward(tiny, run, piece):
    """Prefill of 4 of 10 left-padded slots, then the rest in pieces, in a cache with room to spare."""
    tokens = np.concatenate([TOKENS, TOKENS[:, :3]], axis=1)
    mask = np.ones_like(tokens, bool)
    mask[0, :2] = False
    slots = 13
    expected = run(tiny.variables, tokens, mask)
    padded_mask = np.pad(mask, ((0, 0), (0, slots - 10)))
    step = jax.jit(tiny.decoder.apply)
    hidden, cache = step(tiny.variables, tokens[:, :4], padded_mask, cache=tiny.decoder.new_cache(2, slots))
    parts = [hidden]
    for start in range(4, 10, piece):
        here = slice(start, start + piece)
        known = padded_mask & (np.arange(slots) < start + piece)
        hidden, cache = step(tiny.variables, tokens[:, here], known, np.asarray(positions(mask))[:, here], cache, start)
        parts.append(hidden)
    found = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(found[mask], expected[mask], atol=ROUNDING)
    assert cache.k_LBKSh.shape == (2, 2, 2, slots, 4)
    assert not np.asarray(cache.k_LBKSh)[:, :, :, 10:].any()


@pytest.mark.usefixtures("quick_compile")
def test_remat_changes_memory_and_not_gradients(tiny):
    mask = np.ones_like(TOKENS, bool)

    def gradient(remat):
        decoder = dataclasses.replace(tiny.decoder, remat=remat)

        def loss(lora):
            hidden, _ = decoder.apply({"params": tiny.params, "lora": lora}, TOKENS, mask)
            return jnp.sum(jnp.sin(hidden))

        compiled = jax.jit(jax.grad(loss)).lower(tiny.lora).compile()
        return compiled(tiny.lora), compiled.memory_analysis().temp_size_in_bytes

    none, full, dots = (gradient(remat) for remat in ("none", "full", "dots"))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(none[0])) > 0.1
    for other in (full, dots):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), none[0], other[0])
    assert full[1] < dots[1] < none[1]


@pytest.mark.usefixtures("quick_compile")
def test_bfloat16_computes_in_bfloat16_and_stays_near(tiny, run):
    decoder = dataclasses.replace(tiny.decoder, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    mask = np.ones_like(TOKENS, bool)
    variables = {"params": params, "lora": tiny.lora}
    hidden, cache = jax.jit(decoder.apply)(variables, TOKENS, mask, cache=decoder.new_cache(2, 7))
    logits = unembed(params, hidden)
    assert (hidden.dtype, logits.dtype, cache.k_LBKSh.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    expected = np.asarray(unembed(tiny.params, run(tiny.variables, TOKENS, mask)))
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05  # bfloat16 keeps 8 bits: 0.4% an operation, over some thirty of them


def test_parameter_tree_is_the_documented_one(untied):
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(untied.decoder.init_params, jax.random.key(0)))
    }
    assert shapes == {
        "embed": (31, 16),
        "lm_head": (31, 16),
        "final_norm/scale": (16,),
        "layers/attention_norm/scale": (2, 16),
        "layers/mlp_norm/scale": (2, 16),
        "layers/attention/q_proj/kernel": (2, 16, 16),
        "layers/attention/k_proj/kernel": (2, 16, 8),
        "layers/attention/v_proj/kernel": (2, 16, 8),
        "layers/attention/o_proj/kernel": (2, 16, 16),
        "layers/mlp/gate_proj/kernel": (2, 16, 24),
        "layers/mlp/up_proj/kernel": (2, 16, 24),
        "layers/mlp/down_proj/kernel": (2, 24, 16),
    }
