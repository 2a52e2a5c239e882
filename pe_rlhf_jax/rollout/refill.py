"""Rows that answer more prompts than there are rows: which of them take new prompts, and when these are read.

A mesh has groups of devices, each with a share of the rows and of the prompts. A group's rows answer its own prompts, so that neither
prompts nor what was read of them travel between devices.

A few prompts are read at once and kept. Rows that have ended take them, each prompt as often as it is to be answered; when none is
left and enough rows wait for one, the next are read.

Letters: N prompts as they are to be answered, each as often as it has answers; n of a group, G groups, B rows, b of a group, D different
prompts that a group reads at once, M answers to them, K rows that are worth a reading; P prompt tokens, R response tokens, S slots of
the cache, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.models.layers import KVCache
from pe_rlhf_jax.rollout.decode import NONE, DecodeState, Read, Sampler, distinct, idle, read, rollout_of
from pe_rlhf_jax.sharding import BATCH, apart, constrain, row_groups
from pe_rlhf_jax.types import PromptBatch, PyTree, Rollout

SHARE = 8
"""One row in so many that has ended is worth a reading. Fewer prompts would be read less efficiently, for more, rows would wait longer."""


class Queue(flax.struct.PyTreeNode):
    """Rows, and the prompts that they answer one after the other."""

    state: DecodeState
    read: Read
    """Those of each group that were read last, D of them."""
    number: Int[Array, " G"]
    """Which these are: the group's first ones, 0, or the next, 1, and so on. NONE at the beginning."""
    begun: Int[Array, " G"]
    """Answers of each group, its first ones, that were given to a row."""
    tokens: Int[Array, "N R"]
    """What the rows had when prompts were last given: all of those that have ended."""
    logprobs: Float[Array, "N R"]
    answers: int = flax.struct.field(pytree_node=False)
    """Of each prompt in a group."""

    @property
    def answers_read(self) -> int:
        """M."""
        return len(self.read.position) // len(self.begun) * self.answers


def new_queue(sampler: Sampler, prompts: PromptBatch, rows: int) -> Queue:
    """Nothing is read and nothing is begun."""
    count, prompt_length = prompts.tokens.shape
    length = sampler.sampling.max_new_tokens
    groups = row_groups(count, rows)
    answers = math.gcd(sampler.answers, count // groups)
    state = idle(sampler, rows, prompt_length + length)
    unread = idle(sampler, groups * prompts_at_once(rows // groups, answers), prompt_length)
    return Queue(
        state=state.replace(prompt=jnp.full((rows,), count)),  # no prompt's number
        read=Read(unread.cache, unread.position, unread.hidden),
        number=jnp.full((groups,), NONE),
        begun=jnp.zeros((groups,), jnp.int32),
        tokens=constrain(jnp.full((count, length), NONE), BATCH, None),
        logprobs=constrain(jnp.zeros((count, length)), BATCH, None),
        answers=answers,
    )


def read_next(sampler: Sampler, variables: PyTree, prompts: PromptBatch, queue: Queue) -> Queue:
    """Every group reads the prompts that are next; again those that it has, if not all answers to them are begun."""
    number, at_once = queue.begun // queue.answers_read, queue.answers_read // queue.answers
    prompt_GD = number[:, None] * at_once + jnp.arange(at_once)
    asked = _take(distinct(prompts, queue.answers), prompt_GD)
    return queue.replace(read=read(sampler, variables, asked, room=0), number=number)


def give(sampler: Sampler, prompts: PromptBatch, queue: Queue) -> Queue:
    """Rows that have ended begin the next answers to prompts that are read, as many as there are of both."""
    queue = _keep(queue)
    state, groups, at_once = queue.state, len(queue.begun), queue.answers_read
    count, rows = len(prompts.tokens) // groups, len(state.alive) // groups
    alive_Gb = state.alive.reshape(groups, rows)
    left_G = jnp.where(_is_read(queue), jnp.minimum(waits(prompts, queue), at_once - queue.begun % at_once), 0)
    given_G = jnp.minimum(left_G, jnp.sum(~alive_Gb, axis=1))
    order_M = jnp.arange(min(at_once, rows))
    row_GM = jnp.argsort(alive_Gb, axis=1, stable=True)[:, : len(order_M)]  # those that have ended come first
    row_GM = jnp.where(order_M < given_G[:, None], row_GM, rows)  # there is no such row: what is put there is dropped
    answer_GM = queue.begun[:, None] + order_M
    from_GM = answer_GM % at_once // queue.answers

    position, hidden = _take((queue.read.position, queue.read.hidden), from_GM)
    fresh = idle(sampler, groups * len(order_M), slots=1)
    fresh = fresh.replace(
        prompt=(answer_GM + count * jnp.arange(groups)[:, None]).reshape(-1),
        position=position,
        alive=jnp.ones_like(fresh.alive),
        hidden=hidden,
    )
    common: dict[str, Any] = {"slot": None, "cache": None}  # the rest has a row for each
    filled = _put(state.replace(**common), row_GM, fresh.replace(**common))
    cache = _insert(state.cache, given_G, row_GM, from_GM, queue.read.cache, state.slot)
    return queue.replace(state=filled.replace(slot=state.slot, cache=cache), begun=queue.begun + given_G)


def prompts_at_once(rows: int, answers: int) -> int:
    """D, of so many rows of a group."""
    return -(-_worth_reading(rows) // answers)


def _worth_reading(rows: int) -> int:
    return -(-rows // SHARE)


def waits(prompts: PromptBatch, queue: Queue) -> Int[Array, " G"]:
    """Answers of each group that no row has begun."""
    return len(prompts.tokens) // len(queue.begun) - queue.begun


def _is_read(queue: Queue) -> Bool[Array, " G"]:
    """Whether the next answer's prompt is there."""
    return queue.begun // queue.answers_read == queue.number


def enough(prompts: PromptBatch, queue: Queue) -> Bool[Array, ""]:
    """Whether to read prompts now: so many rows wait for one as three quarters of what is worth a reading in every group.

    All groups read at once, and those that have no row to give would hold up the others if all were waited for.
    """
    alive_Gb = queue.state.alive.reshape(len(queue.begun), -1)
    waits_G = waits(prompts, queue)
    most = jnp.minimum(waits_G, _worth_reading(alive_Gb.shape[1]))
    now = jnp.minimum(jnp.minimum(waits_G, queue.answers_read), jnp.sum(~alive_Gb, axis=1))
    now = jnp.where(_is_read(queue), 0, now)
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


def _insert(
    cache: KVCache, given: Int[Array, " G"], row: Int[Array, "G M"], source: Int[Array, "G M"], read: KVCache, slot: Int[Array, ""]
) -> KVCache:
    """Of the rows that were read, those at `source` go to the P slots before the given one, around the ring: the first `given` of them."""

    def put(
        x: Float[Array, "L b K S h"],
        given: Int[Array, " 1"],
        row: Int[Array, "1 M"],
        source: Int[Array, "1 M"],
        new: Float[Array, "L D K P h"],
        slot: Int[Array, ""],
    ) -> Float[Array, "L b K S h"]:
        slots, length = x.shape[3], new.shape[3]
        first = (slot - length) % slots

        def put_row(number: Int[Array, ""], x: Float[Array, "L b K S h"]) -> Float[Array, "L b K S h"]:
            # Slices in place: with a scatter the TPU compiler reserves a second cache. Two of them, for both sides of the ring's end.
            for start in (jnp.minimum(first, slots - length), jnp.zeros_like(first)):
                token = (start + jnp.arange(length) - first) % slots
                at, size = (0, row[0, number], 0, start, 0), (len(x), 1, x.shape[2], length, x.shape[4])
                one = jax.lax.dynamic_slice_in_dim(new, source[0, number], 1, axis=1)
                one = jnp.take(one, token, axis=3, mode="clip")
                one = jnp.where((token < length)[:, None], one, jax.lax.dynamic_slice(x, at, size))
                x = jax.lax.dynamic_update_slice(x, one, at)
            return x

        return jax.lax.fori_loop(0, given[0], put_row, x)

    place, of_group = (None, BATCH, "tensor", None, None), (BATCH, None)
    put_apart = apart(put, len(row), (place, (BATCH,), of_group, of_group, place, ()), place)
    pairs = ((cache.k_LBKSh, read.k_LBKSh), (cache.v_LBKSh, read.v_LBKSh))
    return KVCache(*(put_apart(x, given, row, source, new, slot) for x, new in pairs))
