"""Attention in blocks: the same numbers and gradients as all at once, in memory that grows with the row and not with its square."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import Tiny

from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.models import attention
from pe_rlhf_jax.models.attention import attend
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.visibility import positions, visible, with_blocks

LENGTH, BLOCK = 23, 4  # six blocks, the last of them not full
REAL = np.arange(LENGTH) >= np.array([[0], [3], [9]])
# How far each token's texts go: one beginning of two texts, two texts, and two trees of which the second branches twice.
BRANCHES = np.broadcast_to(np.repeat([23, 18, 23], [11, 7, 5]), REAL.shape)
APART = np.broadcast_to(np.repeat([13, 23], [13, 10]), REAL.shape)
TREES = np.broadcast_to(np.repeat([13, 10, 13, 23, 21, 19, 21, 23], [6, 4, 3, 2, 2, 2, 2, 2]), REAL.shape)
ENDS = {"branches": BRANCHES, "branches, window": BRANCHES, "apart": APART, "trees, window": TREES}
PICTURES = np.where((np.arange(LENGTH) % 8 < 3) & REAL, np.arange(LENGTH) // 8 + 1, 0)


def drawn(slots: int = LENGTH):
    """Queries, keys and values: four heads on two."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((3, 4, LENGTH, 8), (3, 2, slots, 8), (3, 2, slots, 8))
    return [3 * jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]


def in_cache():
    """23 tokens from slot 5 on of 40, of which earlier ones hold tokens too."""
    return visible(jnp.arange(40) >= jnp.array([[0], [3], [9]]), LENGTH, jnp.int32(5))


SEEN = {
    "left to right": visible(jnp.asarray(REAL), LENGTH),
    "window": visible(jnp.asarray(REAL), LENGTH).within(6),
    "branches": visible(jnp.asarray(REAL), LENGTH, 0, jnp.asarray(BRANCHES)),
    "branches, window": visible(jnp.asarray(REAL), LENGTH, 0, jnp.asarray(BRANCHES)).within(jnp.int32(5)),
    "apart": visible(jnp.asarray(REAL), LENGTH, 0, jnp.asarray(APART)),
    "trees, window": visible(jnp.asarray(REAL), LENGTH, 0, jnp.asarray(TREES)).within(5),
    "pictures": with_blocks(visible(jnp.asarray(REAL), LENGTH), 0, jnp.asarray(PICTURES), False).within(2),
    "pictures beyond windows": with_blocks(visible(jnp.asarray(REAL), LENGTH), 0, jnp.asarray(PICTURES), True).within(2),
    "cache": in_cache(),
}


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("name", [*SEEN, "all see all"])
def test_blocks_give_the_numbers_and_gradients_of_the_whole(name, cap):
    seen = SEEN.get(name)
    weights = jnp.where(REAL[:, None, :, None], jnp.sin(jnp.arange(32.0)).reshape(4, 1, 8), 0)  # padding sees nothing, and is junk

    def loss(block, q, k, v):
        out = attend(q, k, v, seen, 0.3, cap, block)
        return jnp.sum(out * weights), jnp.where(weights == 0, 0, out)

    def of(block):
        return jax.jit(jax.value_and_grad(lambda *x: loss(block, *x), argnums=(0, 1, 2), has_aux=True))(
            *drawn(LENGTH if seen is None else seen.real.shape[1])
        )

    (_, out), gradients = of(BLOCK)
    (_, expected), expected_gradients = of(None)
    np.testing.assert_allclose(out, expected, atol=1e-5)  # float32, of numbers up to 10
    assert float(jnp.abs(expected).max()) > 1
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
        assert float(jnp.abs(wanted).max()) > 1


@pytest.mark.parametrize("name", SEEN)
def test_a_mask_is_what_the_rules_say(name):
    """Token by token, in plain Python."""
    seen = SEEN[name]
    mask = np.asarray(jnp.broadcast_to(seen.mask(), (3, 1, LENGTH, seen.real.shape[1])))[:, 0]
    real = np.asarray(seen.real)
    start = 5 if name == "cache" else 0
    for row, query, key in np.ndindex(mask.shape):
        expected = key <= start + query and real[row, key]
        far = name == "window" and query - key >= 6
        if name in ENDS:
            sees = [j for j in range(query + 1) if real[row, j] and query < ENDS[name][row, j]]
            expected = key in sees
            far = expected and "window" in name and len(sees) - sees.index(key) > 5
        if "pictures" in name:
            together = PICTURES[row, query] == PICTURES[row, key] > 0
            far = query - key >= 2 and not (together and "beyond" in name)
            expected = expected or (together and real[row, key])
        if real[row, min(start + query, real.shape[1] - 1)]:
            assert mask[row, query, key] == (expected and not far), (row, query, key)


def test_positions_go_on_from_what_texts_begin_with():
    """With padding before the first token, and within a text; ends of padding say nothing."""
    real = np.array([[0, 1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1, 0, 1]], bool)
    ends = np.array([[9, 9, 9, 6, 6, 6, 9, 9, 0], [9, 4, 4, 4, 6, 6, 9, 2, 9]])
    expected = [[0, 0, 1, 2, 3, 3, 2, 3, 3], [0, 1, 1, 2, 1, 2, 1, 1, 2]]
    np.testing.assert_array_equal(positions(jnp.asarray(real), jnp.asarray(ends)), expected)


def test_positions_begin_anew_in_texts_that_share_nothing():
    """In the second row both of them branch, one of them again."""
    real = np.array([[1, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]], bool)
    ends = np.array([[3, 3, 3, 6, 6, 6, 7, 0], [4, 2, 4, 4, 8, 8, 7, 8]])
    expected = [[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 1, 2, 0, 1, 2, 2]]
    np.testing.assert_array_equal(positions(jnp.asarray(real), jnp.asarray(ends)), expected)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_decoder_in_blocks_is_the_decoder(name, remat):
    """Windows in half of the layers and capped scores; positions of a table."""
    tiny = Tiny(name)
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    tokens = np.random.default_rng(0).integers(1, tiny.architecture.vocab_size, (2, 14))
    mask = np.arange(14) < np.array([[14], [9]])

    def of(block):
        decoder = Decoder(tiny.architecture, remat=remat, attention_block=block)
        loss = lambda p: jnp.sum(jnp.where(mask[..., None], jnp.sin(decoder.apply({"params": p}, tokens, mask)[0]), 0))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (loss, gradients), (expected, expected_gradients) = of(3), of(None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.abs(wanted).max()) + 1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_grows_with_the_row_and_not_with_its_square(tiny, remat):
    """Temporaries of the compiled gradient."""

    def temporaries(length, block):
        decoder = dataclasses.replace(tiny.decoder, remat=remat, attention_block=block)
        mask = jnp.ones((1, length), bool)
        loss = lambda p, tokens: jnp.sum(decoder.apply({"params": p}, tokens, mask)[0])  # noqa: E731
        lowered = jax.jit(jax.grad(loss)).lower(tiny.params, jnp.ones((1, length), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole, blocks, longer = temporaries(1024, None), temporaries(1024, 64), temporaries(4096, 64)
    assert blocks < 0.5 * whole
    assert longer < 5 * blocks


def test_in_bfloat16_values_and_gradients_are_those_of_float32_to_rounding():
    """On a GPU this is cuDNN's kernel."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (2, heads, 128, 16), jnp.bfloat16) for key, heads in zip(keys, (4, 2, 2, 4), strict=True))
    real = jnp.arange(128) >= jnp.array([[0], [37]])
    weight = jnp.where(real[:, None, :, None], weight, 0)

    def loss(q, k, v):
        out = attend(q, k, v, visible(real, 128), 0.25, None, None)
        return jnp.sum((out * weight).astype(jnp.float32)), jnp.where(real[:, None, :, None], out, 0)

    def numbers(dtype):
        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float64) for x in (out, *gradients)]

    with jax.default_matmul_precision("highest"):
        expected = numbers(jnp.float32)
    for name, found, wanted in zip(("out", "q", "k", "v"), numbers(jnp.bfloat16), expected, strict=True):
        assert 1e-5 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 8e-3, name


def kernel(monkeypatch, calls):
    """As on an NVIDIA GPU, where cuDNN's kernel would be called; here the same function's other implementation is."""
    plain = jax.nn.dot_product_attention

    def called(q, k, v, *, mask, scale, implementation):
        assert implementation == "cudnn"
        calls.append(q.shape)
        return plain(q, k, v, mask=mask, scale=scale, implementation="xla")

    monkeypatch.setattr(attention, "is_nvidia", lambda capability: capability == 8.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", called)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))


def inputs(length, dtype=jnp.bfloat16, head=8):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (2, heads, length, head), dtype) for key, heads in zip(keys, (4, 2, 2), strict=True)]


@pytest.mark.parametrize(
    ("length", "head", "masked", "block", "shape"),
    [(6, 8, True, None, (2, 6, 4, 8)), (7, 128, False, None, (2, 7, 4, 128)), (6, 8, True, 3, (2, 4, 4, 8))],
    ids=["masked", "odd-without-a-mask", "blocks-of-an-even-size"],
)
def test_the_gpu_kernel_is_given_what_is_computed_without_it(monkeypatch, length, head, masked, block, shape):
    inside = inputs(length, head=head)
    mask = jnp.ones((2, length), bool).at[0, :2].set(False)  # left padding
    seen = visible(mask, length) if masked else None
    real = mask[:, None, :, None] if masked else jnp.ones((2, 1, length, 1), bool)

    def loss(q, k, v):
        out = jnp.where(real, attend(q, k, v, seen, 0.3, None, block), 0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    def numbers():
        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inside)
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    expected, calls = numbers(), []
    kernel(monkeypatch, calls)
    found = numbers()
    assert set(calls) == {shape}
    for one, wanted in zip(found, expected, strict=True):
        assert np.max(np.abs(one - wanted)) < 0.03 < np.max(np.abs(wanted))


@pytest.mark.parametrize(
    ("length", "changes", "cap"),
    [(5, {}, None), (6, {"dtype": jnp.float32}, None), (6, {"head": 136}, None), (6, {"head": 4}, None), (6, {}, 30.0)],
    ids=["odd", "float32", "wide-heads", "narrow-heads", "soft-cap"],
)
def test_what_the_gpu_kernel_does_not_take_is_computed_without_it(monkeypatch, length, changes, cap):
    calls = []
    kernel(monkeypatch, calls)
    out = attend(*inputs(length, **changes), visible(jnp.ones((2, length), bool), length), 0.3, cap, None)
    assert not calls and bool(jnp.all(jnp.isfinite(out)))


def test_one_query_of_a_cache_is_computed_without_the_gpu_kernel(monkeypatch):
    calls, (q, k, v) = [], inputs(6)
    kernel(monkeypatch, calls)
    out = attend(q[:, :, :1], k, v, visible(jnp.ones((2, 6), bool), 1, jnp.int32(5)), 0.3, None, None)
    assert not calls and out.shape == (2, 4, 1, 8)


@pytest.mark.parametrize("reason", ["several devices", "JAX 0.10"])
def test_where_the_gpu_kernel_was_not_tried_it_is_not_used(monkeypatch, reason):
    calls, seen = [], visible(jnp.ones((2, 6), bool), 6)
    kernel(monkeypatch, calls)
    attend(*inputs(6), seen, 0.3, None, None)
    assert len(calls) == 1
    if reason == "several devices":
        monkeypatch.setattr(attention, "one_device", lambda: False)
    else:
        monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    attend(*inputs(6), seen, 0.3, None, None)
    assert len(calls) == 1
