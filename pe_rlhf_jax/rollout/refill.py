"""Rows that answer more prompts than there are rows: which of them take new prompts, and when.

A mesh has groups of devices, each with a share of the rows and of the prompts. A group's rows answer its own prompts, so that neither
prompts nor what was read of them travel between devices.

Letters: N prompts, n of a group, G groups, B rows, b of a group, K of a group that take prompts at once; P prompt tokens, R response
tokens, S slots of the cache, L layers.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.models.layers import KVCache
from pe_rlhf_jax.rollout.decode import NONE, DecodeState, Sampler, begin, idle, rollout_of
from pe_rlhf_jax.sharding import BATCH, apart, constrain, row_groups
from pe_rlhf_jax.types import PromptBatch, PyTree, Rollout

SHARE = 8
"""One row in so many takes a prompt at once. Fewer would be read less efficiently, and for more, rows that have ended would wait longer."""


class Queue(flax.struct.PyTreeNode):
    """Rows, and the prompts that they answer one after the other."""

    state: DecodeState
    begun: Int[Array, " G"]
    """Prompts of each group, its first ones, that were given to a row."""
    tokens: Int[Array, "N R"]
    """What the rows had when prompts were last given: all of those that have ended."""
    logprobs: Float[Array, "N R"]


def new_queue(sampler: Sampler, prompts: PromptBatch, rows: int) -> Queue:
    """Nothing is begun."""
    count, prompt_length = prompts.tokens.shape
    length = sampler.sampling.max_new_tokens
    state = idle(sampler, rows, prompt_length + length)
    return Queue(
        state=state.replace(prompt=jnp.full((rows,), count)),  # no prompt's number
        begun=jnp.zeros((row_groups(count, rows),), jnp.int32),
        tokens=constrain(jnp.full((count, length), NONE), BATCH, None),
        logprobs=constrain(jnp.zeros((count, length)), BATCH, None),
    )


def refill(sampler: Sampler, variables: PyTree, prompts: PromptBatch, queue: Queue) -> Queue:
    """Rows that have ended are given the next prompts, up to K in each group."""
    state, groups = queue.state, len(queue.begun)
    count, rows = len(prompts.tokens) // groups, len(state.alive) // groups
    alive_Gb = state.alive.reshape(groups, rows)
    next_K = jnp.arange(rows_at_once(rows))
    row_GK = jnp.argsort(alive_Gb, axis=1, stable=True)[:, : len(next_K)]  # those that have ended come first
    prompt_GK = queue.begun[:, None] + next_K
    given_GK = ~jnp.take_along_axis(alive_Gb, row_GK, axis=1) & (prompt_GK < count)
    row_GK = jnp.where(given_GK, row_GK, rows + next_K)  # there is no such row: what is put there is dropped

    read = begin(sampler, variables, _take(prompts, prompt_GK), room=0)
    read = read.replace(prompt=(prompt_GK + count * jnp.arange(groups)[:, None]).reshape(-1))
    queue = _keep(queue)
    common: dict[str, Any] = {"slot": None, "cache": None}  # the rest has a row for each
    filled = _put(state.replace(**common), row_GK, read.replace(**common))
    cache = _insert(state.cache, row_GK, read.cache, state.slot)
    return queue.replace(state=filled.replace(slot=state.slot, cache=cache), begun=queue.begun + jnp.sum(given_GK, axis=1))


def rows_at_once(rows: int) -> int:
    """K, of so many rows of a group."""
    return -(-rows // SHARE)


def waits(prompts: PromptBatch, queue: Queue) -> Int[Array, " G"]:
    """Prompts of each group that no row has taken."""
    return len(prompts.tokens) // len(queue.begun) - queue.begun


def enough(prompts: PromptBatch, queue: Queue) -> Bool[Array, ""]:
    """Whether to read prompts now: three quarters of the rows that could take one at once are there.

    All groups read at once, and those that have no row to give would hold up the others if all were waited for.
    """
    alive_Gb = queue.state.alive.reshape(len(queue.begun), -1)
    most = jnp.minimum(waits(prompts, queue), rows_at_once(alive_Gb.shape[1]))
    now = jnp.minimum(most, jnp.sum(~alive_Gb, axis=1))
    return (jnp.sum(now) > 0) & (4 * jnp.sum(now) >= 3 * jnp.sum(most))


def finish(sampler: Sampler, prompts: PromptBatch, queue: Queue) -> Rollout:
    """The responses, in the order of the prompts."""
    queue = _keep(queue)
    return rollout_of(sampler, prompts, queue.tokens, queue.logprobs)


def _keep(queue: Queue) -> Queue:
    """What the rows have so far goes to its prompts' places."""
    state, groups = queue.state, len(queue.begun)
    count = len(queue.tokens) // groups
    prompt_Gb = state.prompt.reshape(groups, -1) - count * jnp.arange(groups)[:, None]
    return queue.replace(tokens=_put(queue.tokens, prompt_Gb, state.tokens), logprobs=_put(queue.logprobs, prompt_Gb, state.logprobs))


def _take(tree: PyTree, at: Int[Array, "G K"]) -> PyTree:
    """Of each group of rows those at the given places in it; the last one for a place that it does not have."""
    return jax.tree.map(lambda x: _joined(jax.vmap(lambda rows, at: rows.at[at].get(mode="clip"))(_split(x, len(at)), at)), tree)


def _put(tree: PyTree, at: Int[Array, "G K"], new: PyTree) -> PyTree:
    """Writes rows to places in their groups, but for those that are not there."""

    def put(x: Array, new: Array) -> Array:
        groups = len(at)
        return _joined(jax.vmap(lambda rows, at, new: rows.at[at].set(new, mode="drop"))(_split(x, groups), at, _split(new, groups)))

    return jax.tree.map(put, tree, new)


def _split(x: Array, groups: int) -> Array:
    return constrain(x.reshape(groups, -1, *x.shape[1:]), BATCH, *(None for _ in x.shape))


def _joined(x: Array) -> Array:
    return constrain(x.reshape(-1, *x.shape[2:]), BATCH, *(None for _ in x.shape[2:]))


def _insert(cache: KVCache, row: Int[Array, "G K"], read: KVCache, slot: Int[Array, ""]) -> KVCache:
    """What was read of prompts goes to the P slots before the given one, around the ring."""

    def put(
        x: Float[Array, "L b S K h"], row: Int[Array, "1 K"], new: Float[Array, "L K P K h"], slot: Int[Array, ""]
    ) -> Float[Array, "L b S K h"]:
        rows, slots, length = x.shape[1], x.shape[2], new.shape[2]
        first = (slot - length) % slots

        def put_row(number: Int[Array, ""], x: Float[Array, "L b S K h"]) -> Float[Array, "L b S K h"]:
            # Slices in place: with a scatter the TPU compiler reserves a second cache. Two of them, for both sides of the ring's end.
            for start in (jnp.minimum(first, slots - length), jnp.zeros_like(first)):
                token = (start + jnp.arange(length) - first) % slots
                given = (token < length) & (row[0, number] < rows)
                at, size = (0, row[0, number], start, 0, 0), (len(x), 1, length, *x.shape[3:])
                one = jax.lax.dynamic_slice_in_dim(new, number, 1, axis=1)
                one = jnp.take(one, token, axis=2, mode="clip")
                one = jnp.where(given[:, None, None], one, jax.lax.dynamic_slice(x, at, size))
                x = jax.lax.dynamic_update_slice(x, one, at)
            return x

        return jax.lax.fori_loop(0, row.shape[1], put_row, x)

    place = (None, BATCH, None, "tensor", None)
    put_apart = apart(put, len(row), (place, (BATCH, None), place, ()), place)
    return KVCache(*(put_apart(x, row, new, slot) for x, new in ((cache.k_LBSKh, read.k_LBSKh), (cache.v_LBSKh, read.v_LBSKh))))
