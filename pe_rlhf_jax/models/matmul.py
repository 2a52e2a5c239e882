"""A matrix product whose backward pass suits the compiler."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float


def matmul(x: Float[Array, "*batch d_in"], w: Float[Array, "d_in d_out"]) -> Float[Array, "*batch d_out"]:
    """x w, in the wider dtype of the two. A frozen w has no gradient computed, and x is not kept for one.

    JAX would derive the gradient of w as the transpose of dy^T x. For tokens that have two axes, as rows do, XLA on the CPU makes that from
    a transposed copy of dy, element by element, which takes longer than the product itself where w is an adapter's factor.
    """
    dtype = jnp.promote_types(x.dtype, w.dtype)
    return _matmul(x.astype(dtype), w.astype(dtype))


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    return x @ w


Kept = tuple[Array | None, Array | None]


def _forward(x: CustomVJPPrimal, w: CustomVJPPrimal) -> tuple[Array, Kept]:
    return x.value @ w.value, (x.value if w.perturbed else None, w.value if x.perturbed else None)


def _backward(kept: Kept, dy: Array | SymbolicZero) -> tuple[Array | None, Array | None]:
    x, w = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dx = None if w is None else jnp.einsum("...q,pq->...p", dy, w)
    return dx, None if x is None else _over_tokens(x, dy)


def _over_tokens(x: Float[Array, "*batch p"], y: Float[Array, "*batch q"]) -> Float[Array, "p q"]:
    """x^T y, as a product whose first operand, which is turned, is the thinner one."""
    if x.shape[-1] > y.shape[-1]:
        return _over_tokens(y, x).T
    return jnp.einsum("...p,...q->pq", x, y)


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
