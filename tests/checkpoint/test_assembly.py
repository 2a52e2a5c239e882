"""Leaves put together on the host: the same bits as NumPy's own assignment, in memory that JAX takes as it is."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.checkpoint.assembly import Assembly, copy, pages

DTYPES = ("float32", "bfloat16", "float16")


def numbers(shape, dtype) -> np.ndarray:
    """Of all sizes, both zeros and the smallest numbers among them, none of which overflows in 16 bits."""
    drawn = np.random.default_rng(0).standard_normal(shape) * 10.0 ** np.random.default_rng(1).integers(-9, 4, shape)
    drawn.reshape(-1)[:5] = 0.0, -0.0, 2.0**-24, -(2.0**-133), 65504
    return drawn.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", [(130, 37), (64, 64), (3, 200), (1, 9), (70, 1)])
def test_copies_are_numpys_to_the_bit(source, target, shape):
    tensor = numbers(shape, source)
    for view in (tensor, tensor.T, tensor.T[1:, 2:], tensor[:, 1:], tensor.reshape(-1)[2:]):
        room = np.full((2, *view.shape, 2), 7, jnp.dtype(target))
        slot = room[1, ..., 0]  # not contiguous, and nothing beside it may change
        copy(view, slot)
        assert slot.tobytes() == view.astype(jnp.dtype(target)).tobytes()
        assert (room[0] == 7).all() and (room[..., 1] == 7).all()


def test_conversions_are_xlas():
    tensor = numbers((64, 64), "float32")
    np.testing.assert_array_equal(jnp.asarray(tensor).astype(jnp.bfloat16), tensor.astype(jnp.bfloat16))


def test_the_host_copies_nothing_again():
    layers = [numbers((8, 5), "bfloat16") for _ in range(3)]
    stacked, whole = Assembly((3, 5, 8), "float32", None), Assembly((8, 5), "bfloat16", None)
    for layer, tensor in enumerate(layers):
        stacked.fill(tensor.T, layer)
    (part,) = stacked._parts.values()
    placed = stacked.placed()
    assert placed.unsafe_buffer_pointer() == part.ctypes.data
    np.testing.assert_array_equal(placed, np.stack([tensor.T for tensor in layers]))
    aligned = pages((8, 5), "bfloat16")
    aligned[...] = layers[0]
    whole.fill(aligned)
    assert whole.placed().unsafe_buffer_pointer() == aligned.ctypes.data
    assert not whole.placed().committed  # it may still be used beside arrays of any mesh
    aligned.flags.writeable = False  # as pages of a file are, which may change
    copied = Assembly((8, 5), "bfloat16", None)
    copied.fill(aligned)
    assert copied.placed().unsafe_buffer_pointer() != aligned.ctypes.data
    np.testing.assert_array_equal(copied.placed(), layers[0])
