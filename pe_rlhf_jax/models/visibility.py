"""Which tokens see which.

A row is read from left to right: each token sees the real tokens up to its own place. What a row may say besides, one integer a token:

    branches   0 is the trunk, which all see; tokens of a branch see the trunk and their own branch, as if the other branches were not
               there. So several answers to one prompt stand in one row, `prompt | answer | answer`, and the prompt is computed once.
               Positions go on from the trunk's end in every branch. The trunk comes first in the row.
    blocks     0 sees what comes before it; tokens of one block see each other besides (prompts and pictures: vlm.py). Blocks lie in
               the trunk.

Letters: B batch, T query tokens, S key slots.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visible(flax.struct.PyTreeNode):
    """What a layer's tokens see, with and without a window."""

    mask: Bool[Array, "#B 1 T S"]
    beyond: Bool[Array, "B 1 T S"] | None
    """Of it, what no window hides."""
    queries: Int[Array, "#B T"]
    """Places between which windows are measured: slots of the row, or positions where there are branches."""
    keys: Int[Array, "#B S"]

    def within(self, window: Int[Array, ""] | int) -> Visible:
        """What is seen by a layer in which a token's own place and those less than `window` before it are near enough.

        Slots count padding, so rows must be padded at their ends only.
        """
        near = (self.queries[:, :, None] - self.keys[:, None, :] < window)[:, None]
        inside = self.mask & near
        return self.replace(mask=inside if self.beyond is None else inside | self.beyond)


def visible(
    mask_BS: Bool[Array, "B S"],
    length: int,
    start: Int[Array, ""] | int = 0,
    branches_BT: Int[Array, "B T"] | None = None,
) -> Visible:
    """What tokens at slots start .. start + length - 1 see of the real ones, from left to right; branches only in a row that is whole.

    For a single token the slots are a ring: all others are before its own.
    """
    queries, keys = start + jnp.arange(length)[None], jnp.arange(mask_BS.shape[1])[None]
    if length == 1:
        keys = queries - (queries - keys) % mask_BS.shape[1]
    sees = (keys[:, None, :] <= queries[:, :, None])[:, None]
    if branches_BT is None:
        return Visible(mask_BS[:, None, None, :] & sees, None, queries, keys)
    of_key, of_query = branches_BT[:, None, None, :], branches_BT[:, None, :, None]
    mask = mask_BS[:, None, None, :] & sees & ((of_key == 0) | (of_key == of_query))
    position = jnp.maximum(jnp.sum(mask, axis=(1, 3)) - 1, 0)
    return Visible(mask, None, position, position)


def with_blocks(
    seen: Visible, mask_BS: Bool[Array, "B S"], start: Int[Array, ""] | int, block_BT: Int[Array, "B T"], beyond: bool
) -> Visible:
    """Tokens of one block see each other besides; `beyond` says whether through windows too."""
    # A block lies among these tokens as a whole: whatever else is in the cache belongs to none.
    block_BS = jax.lax.dynamic_update_slice(jnp.zeros(mask_BS.shape, block_BT.dtype), block_BT, (0, start))
    together = ((block_BT[:, :, None] == block_BS[:, None, :]) & (block_BT[:, :, None] > 0))[:, None] & mask_BS[:, None, None, :]
    return seen.replace(mask=seen.mask | together, beyond=together if beyond else None)
