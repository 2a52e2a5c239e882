"""The product of linear layers: a plain product's numbers, and a backward pass without what the plain one does in vain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.models.matmul import matmul

ROWS, LENGTH, D_IN, D_OUT = 3, 20, 48, 7


@pytest.fixture
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, shape) for key, shape in zip(keys, [(ROWS, LENGTH, D_IN), (D_IN, D_OUT), (ROWS, LENGTH, D_OUT)], strict=True)
    ]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_product_and_gradients_are_those_of_float64(inputs, axes):
    x, w, dy = inputs
    x, dy = (a.reshape(*a.shape[:-1], 1, a.shape[-1])[(0,) * (3 - axes)].reshape(*a.shape[3 - axes :]) for a in (x, dy))
    y, back = jax.vjp(matmul, x, w)
    dx, dw = back(dy)
    x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
    for found, wanted in ((y, x64 @ w64), (dx, dy64 @ w64.T), (dw, x64.reshape(-1, D_IN).T @ dy64.reshape(-1, D_OUT))):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def scanned(x, stacked):
    """Layers over layers, as in the decoder."""
    return jax.lax.scan(lambda x, pair: (x + jax.checkpoint(lambda x, v: matmul(matmul(x, v[0]), v[1]))(x, pair), None), x, stacked)[0]


@pytest.mark.parametrize("through", ["alone", "scanned"])
def test_gradients_of_frozen_matrices_are_not_computed(inputs, through):
    x, w, _ = inputs
    stacked = jnp.stack([w] * 4), jnp.stack([w.T] * 4)

    def loss(x, frozen):
        return jnp.sum(jnp.sin(matmul(x, frozen[0][0]) if through == "alone" else scanned(x, frozen)))

    def flops(f):
        return jax.jit(f).lower(x, stacked).compile().cost_analysis()["flops"]

    both, one = flops(jax.grad(loss, argnums=(0, 1))), flops(jax.grad(loss))
    products = 1 if through == "alone" else 2  # a scan's body is counted once
    assert both - one >= products * 2 * ROWS * LENGTH * D_IN * D_OUT
    np.testing.assert_allclose(jax.grad(loss)(x, stacked), jax.grad(loss, argnums=(0, 1))(x, stacked)[0], rtol=1e-6)


def test_nothing_is_kept_for_a_gradient_that_nobody_wants(inputs):
    x, w, _ = inputs

    def kept(f, *args):
        return sorted(leaf.shape for leaf in jax.tree.leaves(jax.vjp(f, *args)[1]) if leaf.ndim)

    assert kept(lambda x: matmul(x, w), x) == [w.shape]
    assert kept(lambda w: matmul(x, w), w) == [x.shape]
    assert kept(matmul, x, w) == sorted([x.shape, w.shape])


@pytest.mark.parametrize("factor", ["a", "b"])
def test_no_wide_operand_is_turned_for_a_factors_gradient(inputs, factor):
    """What JAX derives for `x @ w` has a copy [d_out, tokens] of dy on the CPU, made element by element."""
    x, w, dy = inputs if factor == "a" else (inputs[2], inputs[1].T, inputs[0])
    tokens = ROWS * LENGTH

    def turned(product) -> bool:
        text = jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy)).lower(x, w, dy).compile().as_text()
        return f"f32[{max(w.shape)},{tokens}]" in text

    assert not turned(matmul)
    assert factor == "a" or turned(jnp.matmul)
