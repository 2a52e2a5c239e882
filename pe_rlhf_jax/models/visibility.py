"""Which tokens see which.

A row is read from left to right: each token sees the real tokens up to its own place. What a row may say besides, one integer a token:

    ends       up to which slot the row goes on from the token: later tokens do not see it. A text that ends where the next begins stands
               as if in a row of its own. Of answers to one prompt, `prompt | answer | answer`, each ends where the next begins, and the
               prompt with the row: it is computed once for all. In general a row holds trees of texts, depth first: what several begin
               with is there once, and ends at the end of the last of them. Positions go on from token to token of a text.
    blocks     0 sees what comes before it; tokens of one block see each other besides (prompts and pictures: vlm.py). Every text of the
               row goes on from them.

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
    """Between places windows are measured: slots of the row, or positions where tokens have ends."""
    end: Int[Array, "B N"] | None = None
    """Of keys only."""
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
        if key.end is not None:
            sees &= query.slot < key.end
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


def visible(mask_BS: Bool[Array, "B S"], length: int, start: Int[Array, ""] | int = 0, ends_BT: Int[Array, "B T"] | None = None) -> Visible:
    """What tokens at slots start .. start + length - 1 see of the real ones, from left to right; ends only in rows that are whole.

    For a single token the slots are a ring: all others are before its own.
    """
    whole = isinstance(start, int) and start == 0 and (length > 1 or mask_BS.shape[1] == 1)
    if whole:  # what a cache has room for besides is not looked at
        mask_BS = mask_BS[:, :length]
    queries, keys = start + jnp.arange(length)[None], jnp.arange(mask_BS.shape[1])[None]
    if length == 1:
        keys = queries - (queries - keys) % mask_BS.shape[1]
    if ends_BT is None:
        return Visible(mask_BS, Places(queries, queries), Places(keys, keys), whole=whole)
    own = Places(queries, positions(mask_BS, ends_BT))
    return Visible(mask_BS, own, own.replace(end=ends_BT), whole=True)


def positions(mask_BT: Bool[Array, "B T"], ends_BT: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """Position of each real token among the real tokens that it sees of its row; 0 at leading padding."""
    count = jnp.cumsum(mask_BT, axis=1)
    if ends_BT is not None:
        ended = jax.vmap(lambda real, ends: jnp.zeros(len(real) + 1, jnp.int32).at[ends].add(real))(mask_BT, ends_BT)
        count -= jnp.cumsum(ended[:, :-1], axis=1)
    return jnp.maximum(count - 1, 0)


def with_blocks(seen: Visible, start: Int[Array, ""] | int, block_BT: Int[Array, "B T"], beyond: bool) -> Visible:
    """Tokens of one block see each other besides; `beyond` says whether through windows too."""
    # A block lies among these tokens as a whole: whatever else is in the cache belongs to none.
    block_BS = jax.lax.dynamic_update_slice(jnp.zeros(seen.real.shape, block_BT.dtype), block_BT, (0, start))
    queries, keys = seen.queries.replace(block=block_BT), seen.keys.replace(block=block_BS)
    return seen.replace(queries=queries, keys=keys, beyond=beyond)
