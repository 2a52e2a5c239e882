"""The frozen matrices of linear layers in few bits, with adapters in full precision on top (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Formats and arithmetic are qwix's: `int8` has one scale for each output, `int4` and `nf4` (NormalFloat, for normally distributed weights)
one for every 64 inputs of each output. Embeddings, norms, biases and heads stay as they are.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float

from pe_rlhf_jax.config import ConfigError, Quantization
from pe_rlhf_jax.models.matmul import matmul
from pe_rlhf_jax.sharding import gathered
from pe_rlhf_jax.types import PyTree

BLOCK = 64
"""Inputs that share a scale in the 4-bit formats; as QLoRA has it."""
_NIBBLES = {"int4": jnp.int4, "nf4": jnp.uint4}


class QuantizedMatrix(flax.struct.PyTreeNode):
    """A matrix [..., d_in, d_out] in few bits.

    Two 4-bit values share a byte, [..., d_in, d_out / 2]: where a program has arrays of 4-bit numbers, XLA on the CPU expands the stacked
    matrices of all layers before it takes one of them.
    """

    values: Array
    scale: Float[Array, "*layers blocks d_out"]
    format: Quantization = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for."""
        return (*self.values.shape[:-1], self.scale.shape[-1])

    def expand(self, dtype: Any) -> Float[Array, "*layers d_in d_out"]:
        """The matrix in floating point."""
        values = self.values
        if self.format in _NIBBLES:
            values = jax.lax.bitcast_convert_type(values, _NIBBLES[self.format]).reshape(self.shape)
        if self.format != "nf4":
            return qwix.dequantize(qwix.QArray(values, self.scale, qtype=self.format)).astype(dtype)
        # Looked up where they lie: qwix flattens the matrix for it, which every chip of the axis `tensor` then gathers whole.
        entries = _entries().astype(self.scale.dtype)[values.astype(jnp.int32)]
        blocks = entries.reshape(*self.scale.shape[:-1], -1, self.scale.shape[-1])
        return (blocks * self.scale[..., None, :]).reshape(self.shape).astype(dtype)


def _entries() -> Float[Array, " 16"]:
    """The numbers that the 16 values of nf4 stand for, qwix's."""
    values = jnp.arange(16).astype(jnp.uint4)[:, None]
    return qwix.dequantize(qwix.QArray(values, jnp.ones((1, 1)), qtype="nf4"))[:, 0]


def quantize(kernel: Float[Array, "d_in d_out"], how: Quantization) -> QuantizedMatrix:
    """A matrix in few bits; its scales have the matrix's dtype. Where 64 does not divide `d_in`, blocks are as long as a common divisor.

    Raises ConfigError for an odd `d_out` in the 4-bit formats.
    """
    d_in, d_out = kernel.shape
    if how == "int8":
        stored = qwix.quantize(kernel, how, channelwise_axes=(1,))
        return QuantizedMatrix(stored.qvalue, stored.scale, how)
    if d_out % 2:
        raise ConfigError(f"{how} needs matrices with an even number of outputs, found one of {d_in} x {d_out}; use int8")
    stored = qwix.quantize(kernel, how, channelwise_axes=(1,), tiled_axes={0: math.gcd(d_in, BLOCK)})
    return QuantizedMatrix(jax.lax.bitcast_convert_type(stored.qvalue.reshape(d_in, d_out // 2, 2), jnp.uint8), stored.scale, how)


def quantize_layers(kernels: Float[Array, "layers d_in d_out"], how: Quantization) -> QuantizedMatrix:
    """Stacked matrices, one after the other, so that what quantizing one needs exists once."""
    return jax.lax.map(functools.partial(quantize, how=how), kernels)


def product(
    x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"] | QuantizedMatrix, dtype: Any, name: str = ""
) -> Float[Array, "*batch d_out"]:
    """x W, with W in `dtype`. The backward pass expands a quantized matrix again, so that no expanded copy is kept for it.

    A quantized matrix that is sharded over `fsdp`, as that of the linear layer `name` is, travels in few bits.
    """
    if not isinstance(kernel, QuantizedMatrix):
        return matmul(x, kernel.astype(dtype))

    @jax.checkpoint
    def expanded(x: Array, kernel: QuantizedMatrix) -> Array:
        return x @ gathered({name: {"kernel": kernel}})[name]["kernel"].expand(dtype)

    return expanded(x, kernel)


def count(tree: PyTree) -> int:
    """Numbers in a tree; a quantized matrix counts its entries and not its scales."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, QuantizedMatrix)))
