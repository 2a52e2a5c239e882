"""The frozen matrices of linear layers in few bits, with adapters in full precision on top (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Formats and arithmetic are qwix's: `int8` has one scale for each output, `int4` and `nf4` (NormalFloat, for normally distributed weights)
one for every 64 inputs of each output. Embeddings, norms, biases and heads stay as they are.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float

from pe_rlhf_jax.config import Quantization
from pe_rlhf_jax.types import PyTree

BLOCK = 64
"""Inputs that share a scale in the 4-bit formats; as QLoRA has it."""


def quantize(kernel: Float[Array, "d_in d_out"], how: Quantization) -> qwix.QArray:
    """A matrix in few bits; its scales have the matrix's dtype. Where 64 does not divide `d_in`, blocks are as long as a common divisor."""
    tiles = {} if how == "int8" else {0: math.gcd(kernel.shape[0], BLOCK)}
    return qwix.quantize(kernel, how, channelwise_axes=(1,), tiled_axes=tiles)


def quantize_layers(kernels: Float[Array, "layers d_in d_out"], how: Quantization) -> qwix.QArray:
    """Stacked matrices, one after the other, so that what quantizing one needs exists once."""
    return jax.lax.map(functools.partial(quantize, how=how), kernels)


def product(x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"] | qwix.QArray, dtype: Any) -> Float[Array, "*batch d_out"]:
    """x W, with W in `dtype`. The backward pass expands a quantized matrix again, so that no expanded copy is kept for it."""
    if not isinstance(kernel, qwix.QArray):
        return x @ kernel.astype(dtype)
    return jax.checkpoint(lambda x, kernel: x @ qwix.dequantize(kernel).astype(dtype))(x, kernel)


def bits(dtype: Any) -> int:
    """Of a number in memory; NumPy counts a whole byte for those of 4 bits."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize


def count(tree: PyTree) -> int:
    """Numbers in a tree; a quantized matrix counts its entries and not its scales."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, qwix.QArray)))
