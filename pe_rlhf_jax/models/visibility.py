"""Which tokens see which.

A row is read from left to right: each token sees the real tokens up to its own place. What a row may say besides, one integer a token:

    segments   tokens see their own segment only, as if it stood in a row of its own; positions begin anew in each. So short rows are
               packed into one. Each segment is one stretch.
    branches   0 is the trunk, which all see; tokens of a branch see the trunk and their own branch, as if the other branches were not
               there. So several answers to one prompt stand in one row, `prompt | answer | answer`, and the prompt is computed once.
               Positions go on from the trunk's end in every branch. The trunk comes first in the row (with segments: in each), each
               branch is one stretch.
    blocks     0 sees what comes before it; tokens of one block see each other besides (prompts and pictures: vlm.py). Blocks lie in
               the trunk.

Who sees whom is worked out from these where scores are computed, for as many tokens as are at hand: the square of a long row never exists.

Letters: B batch, T query tokens, S key slots, N either.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Places(flax.struct.PyTreeNode):
    """Where queries or keys stand."""

    slot: Int[Array, "#B N"]
    place: Int[Array, "#B N"]
    """Between places windows are measured: slots of the row, or positions where there are branches or segments."""
    branch: Int[Array, "B N"] | None = None
    segment: Int[Array, "B N"] | None = None
    block: Int[Array, "B N"] | None = None


class Visible(flax.struct.PyTreeNode):
    """What a layer's tokens see."""

    real: Bool[Array, "B S"]
    queries: Places
    keys: Places
    window: Int[Array, ""] | int | None = None
    beyond: bool = flax.struct.field(pytree_node=False, default=False)
    """No window hides tokens of one block from each other."""
    whole: bool = flax.struct.field(pytree_node=False, default=False)
    """The queries are the keys, whatever else a cache has room for."""

    @property
    def ordered(self) -> bool:
        """Whether the queries are the keys and none sees a key behind it."""
        return self.whole and self.queries.block is None

    def within(self, window: Int[Array, ""] | int) -> Visible:
        """What is seen by a layer in which a token's own place and those less than `window` before it are near enough.

        Slots count padding, so rows must be padded at their ends only.
        """
        return self.replace(window=window)

    def mask(self) -> Bool[Array, "B 1 T S"]:
        """Whether a query sees a key."""
        query, key = (
            jax.tree.map(lambda x: x[:, :, None], self.queries),
            jax.tree.map(lambda x: x[:, None, :], self.keys),
        )
        sees = key.slot <= query.slot
        if query.branch is not None:
            sees &= (key.branch == 0) | (key.branch == query.branch)
        if query.segment is not None:
            sees &= key.segment == query.segment
        together = None if query.block is None else (key.block == query.block) & (query.block > 0)
        if together is not None and not self.beyond:
            sees |= together
        if self.window is not None:
            sees &= query.place - key.place < self.window
        if together is not None and self.beyond:
            sees |= together
        return (sees & self.real[:, None, :])[:, None]

    def first(self, keys: int) -> Visible:
        """Of so many keys only."""
        return self.replace(real=self.real[:, :keys], keys=jax.tree.map(lambda x: x[:, :keys], self.keys))


def visible(
    mask_BS: Bool[Array, "B S"],
    length: int,
    start: Int[Array, ""] | int = 0,
    branches_BT: Int[Array, "B T"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
) -> Visible:
    """What tokens at slots start .. start + length - 1 see of the real ones, from left to right; branches and segments only in rows that
    are whole.

    For a single token the slots are a ring: all others are before its own.
    """
    whole = isinstance(start, int) and start == 0 and (length > 1 or mask_BS.shape[1] == 1)
    if whole:  # what a cache has room for besides is not looked at
        mask_BS = mask_BS[:, :length]
    queries, keys = start + jnp.arange(length)[None], jnp.arange(mask_BS.shape[1])[None]
    if length == 1:
        keys = queries - (queries - keys) % mask_BS.shape[1]
    if branches_BT is None and segments_BT is None:
        return Visible(mask_BS, Places(queries, queries), Places(keys, keys), whole=whole)
    own = Places(queries, positions(mask_BS, branches_BT, segments_BT), branches_BT, segments_BT)
    return Visible(mask_BS, own, own, whole=True)


def positions(
    mask_BT: Bool[Array, "B T"], branches_BT: Int[Array, "B T"] | None = None, segments_BT: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Position of each real token among the real tokens that it sees of its row; 0 at leading padding."""
    begins = jnp.zeros_like(mask_BT) if segments_BT is None else _begins(segments_BT)
    count = _since(begins, mask_BT)
    if branches_BT is not None:
        trunk = _since(begins, mask_BT & (branches_BT == 0))
        own = _since(begins | _begins(branches_BT), mask_BT)
        count = jnp.where(branches_BT == 0, count, trunk + own)
    return jnp.maximum(count - 1, 0)


def _begins(stretches_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where the number of a stretch is another than before."""
    return stretches_BT != jnp.pad(stretches_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]


def _since(begins_BT: Bool[Array, "B T"], counted_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens are counted from the last beginning on, or from the row's."""
    count = jnp.cumsum(counted_BT, axis=1)
    return count - jax.lax.cummax(jnp.where(begins_BT, count - counted_BT, 0), axis=1)


def with_blocks(seen: Visible, start: Int[Array, ""] | int, block_BT: Int[Array, "B T"], beyond: bool) -> Visible:
    """Tokens of one block see each other besides; `beyond` says whether through windows too."""
    # A block lies among these tokens as a whole: whatever else is in the cache belongs to none.
    block_BS = jax.lax.dynamic_update_slice(jnp.zeros(seen.real.shape, block_BT.dtype), block_BT, (0, start))
    queries, keys = seen.queries.replace(block=block_BT), seen.keys.replace(block=block_BS)
    return seen.replace(queries=queries, keys=keys, beyond=beyond)
