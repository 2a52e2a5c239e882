"""The scalar head of reward and value models."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pe_rlhf_jax.types import PyTree


class ScalarHead(nn.Module):
    """One number per hidden state, in float32. Weights start with standard deviation 1/sqrt(d + 1) (Huang et al. 2024, N+ details)."""

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        d = hidden.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal((d + 1) ** -0.5), (d, 1), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (1,), jnp.float32)
        # TPUs would multiply in bfloat16, and a value then carries two digits.
        return jnp.matmul(hidden.astype(jnp.float32), kernel, precision="highest")[..., 0] + bias[0]


def init_head(key: jax.Array, hidden_size: int) -> PyTree:
    """A fresh head: {"kernel": [D, 1], "bias": [1]}."""
    return ScalarHead().init(key, jnp.zeros((1, hidden_size)))["params"]


def zero_head(hidden_size: int) -> PyTree:
    """A head that says 0 everywhere."""
    return {"kernel": jnp.zeros((hidden_size, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}


def apply_head(head: PyTree, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """The head's number at every hidden state."""
    values: Array = ScalarHead().apply({"params": head}, hidden)  # type: ignore[assignment]  # apply's type allows for mutables
    return values
