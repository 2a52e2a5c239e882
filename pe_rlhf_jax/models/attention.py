"""Attention: scores, softmax, and the sum of values, for as many queries at a time as memory allows.

Letters: B batch, T query tokens, S key slots, H query heads, K key-value heads, G query heads of one key-value head, h head size, n blocks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pe_rlhf_jax.devices import is_nvidia
from pe_rlhf_jax.models.visibility import Places, Visible
from pe_rlhf_jax.sharding import one_device

PARTS = 4
"""Of a row that is read from left to right: the queries of each meet only keys up to its end. Of the square, 5/8 are computed (of two
blocks 3/4, of three 2/3)."""


def keys_met(length: int, block: int | None, ordered: bool) -> float:
    """Keys that a token of a row of so many meets in `attend`, on average, seen or masked."""
    blocks, size = blocks_of(length, block)
    if not ordered:
        return length
    ends = [len(part) * min((int(part[-1]) + 1) * size, length) for part in _parts(blocks)]
    return sum(ends) / blocks


def blocks_of(length: int, block: int | None) -> tuple[int, int]:
    """In how many blocks so many queries are computed, 1 where all at once, and the queries of each."""
    blocks = -(-length // (block or length))
    size = -(-length // blocks)
    return blocks, size if blocks == 1 else size + size % 2  # GPU kernels take even ones


def _parts(blocks: int) -> list[np.ndarray]:
    """Numbers of the blocks that meet the same keys."""
    return np.array_split(np.arange(blocks), min(PARTS, blocks))


def attend(
    q: Float[Array, "B H T h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    seen: Visible | None,
    scale: float,
    cap: float | None,
    block: int | None,
) -> Float[Array, "B H T h"]:
    """Softmax attention; scores, in float32, are soft-capped if asked (Gemma 2). `seen` None: all see all.

    Of more than `block` queries, the scores of at most so many exist at a time, forward and backward: they are computed again (as by Rabe
    and Staats 2021; the softmax is still over whole rows, since they cost memory in proportion to the row only).
    """
    length = q.shape[2]
    blocks, size = blocks_of(length, block)
    if blocks == 1:
        return _attend(q, k, v, None if seen is None else seen.mask(), scale, cap)

    def cut(x: Array, axis: int) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, blocks * size - length)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    ordered = seen is not None and seen.ordered
    inputs = cut(q, 2), None if seen is None else jax.tree.map(lambda x: cut(x, 1), seen.queries)
    out = []
    for part in _parts(blocks) if ordered else [np.arange(blocks)]:
        first, end = int(part[0]), int(part[-1]) + 1
        keys = min(end * size, k.shape[2]) if ordered else k.shape[2]
        k_part, v_part, seen_part = k[:, :, :keys], v[:, :, :keys], None if seen is None else seen.first(keys)

        @jax.checkpoint
        def of_block(inputs: tuple[Array, Places | None], k: Array = k_part, v: Array = v_part, seen: Visible | None = seen_part) -> Array:
            q, places = jax.lax.optimization_barrier(inputs)  # else the masks of all blocks, as wide as their scores, are made at once
            return _attend(q, k, v, None if seen is None else seen.replace(queries=places).mask(), scale, cap)

        out.append(jax.lax.map(of_block, jax.tree.map(lambda x, a=first, b=end: x[a:b], inputs)))
    return rearrange(jnp.concatenate(out), "n B H t h -> B H (n t) h")[:, :, :length]


def _attend(
    q: Float[Array, "B H T h"],
    k: Float[Array, "B K S h"],
    v: Float[Array, "B K S h"],
    mask: Bool[Array, "B 1 T S"] | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "B H T h"]:
    if cap is None and _has_kernel(q, k, mask):
        q, k, v = (rearrange(x, "B n T h -> B T n h") for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
        return rearrange(out, "B T H h -> B H T h")
    # Written out: on a CPU, `jax.nn.dot_product_attention` takes twice as long, forward and backward; and it has no argument for a cap.
    q_BKGTh = rearrange(q, "B (K G) T h -> B K G T h", K=k.shape[1])
    scores = softcap(jnp.einsum("BKGTh,BKSh->BKGTS", q_BKGTh, k, preferred_element_type=jnp.float32) * scale, cap)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("BKGTS,BKSh->BKGTh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return rearrange(out, "B K G T h -> B (K G) T h")


def _has_kernel(q: Float[Array, "B H T h"], k: Float[Array, "B K S h"], mask: Array | None) -> bool:
    """Whether cuDNN's kernel, which writes the mask for all heads together but never the scores, takes these: it is for NVIDIA GPUs from
    Ampere on, in bfloat16, with heads of up to 128.

    With a mask it takes even numbers of queries and keys, so no single query, which would gain nothing. JAX before 0.11 computes a gradient
    of the mask besides. Several devices: not tried, and heads that the axis `tensor` does not divide alike are refused.
    """
    (length, head), keys = q.shape[2:], k.shape[2]
    even = mask is None or (length % 2 == 0 and keys % 2 == 0)
    fits = q.dtype == k.dtype == jnp.bfloat16 and head <= 128 and head % 8 == 0 and even
    return fits and jax.__version_info__ >= (0, 11) and one_device() and is_nvidia(capability=8.0)


def softcap(x: Float[Array, "*batch"], cap: float | None) -> Float[Array, "*batch"]:
    """cap * tanh(x / cap): about x where that is small, and within +-cap. None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)
