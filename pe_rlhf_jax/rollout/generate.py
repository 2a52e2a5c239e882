"""Generation of whole responses as one program: prompts are read, then blocks of a scan over decode steps, until every row has ended.

With fewer rows than prompts, a row whose response has ended takes the next prompt (continuous batching): refill.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pe_rlhf_jax.rollout.decode import DecodeState, Sampler, advance, begin, for_decoding, so_far
from pe_rlhf_jax.rollout.refill import Queue, enough, finish, give, new_queue, read_next, waits
from pe_rlhf_jax.types import PromptBatch, PyTree, Rollout

BLOCK = 8
"""Decode steps between two looks at which rows have ended, at most."""


def block_steps(max_new_tokens: int) -> int:
    """Decode steps of a block: as many as leave fewest over when a response has full length, of half of BLOCK to all of it."""
    most = min(max_new_tokens, BLOCK)
    return min(range(most, most // 2, -1), key=lambda steps: -max_new_tokens % steps)


def generate(sampler: Sampler, variables: PyTree, prompts: PromptBatch, key: jax.Array) -> Rollout:
    """Samples a response of at most `max_new_tokens` tokens to each prompt, `max_num_seqs` of them at once; see `advance` for `key`.

    What is sampled does not depend on how many rows there are, but for the rounding of sums in another order.
    """
    count, sampling = len(prompts.tokens), sampler.sampling
    steps = block_steps(sampling.max_new_tokens)

    decoding = for_decoding(sampler, variables)

    def block(state: DecodeState) -> DecodeState:
        return advance(*decoding, key, state, steps)

    if sampling.max_num_seqs is None or sampling.max_num_seqs >= count:
        state = begin(sampler, variables, prompts, sampling.max_new_tokens)
        return so_far(sampler, prompts, jax.lax.while_loop(lambda s: jnp.any(s.alive), block, state))

    def turn(queue: Queue) -> Queue:
        queue = give(sampler, prompts, read_next(sampler, variables, prompts, queue))

        def going(queue: Queue) -> jax.Array:
            return jnp.any(queue.state.alive) & ~enough(prompts, queue)

        return jax.lax.while_loop(going, lambda q: give(sampler, prompts, q.replace(state=block(q.state))), queue)

    def unanswered(queue: Queue) -> jax.Array:
        return jnp.any(waits(prompts, queue) > 0)

    # The last turn goes on until every row has ended.
    return finish(sampler, prompts, jax.lax.while_loop(unanswered, turn, new_queue(sampler, prompts, sampling.max_num_seqs)))
