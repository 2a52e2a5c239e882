"""Generation: prefill, then blocks of a scan over decode steps, until every row has ended.

`generate` is all of it as one program; `begin`, `advance` and `so_far` are its parts, for programs that show what is there in between.

Letters: B batch, P prompt tokens (left-padded), R response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.layers import KVCache
from pe_rlhf_jax.rollout.sampling import sample
from pe_rlhf_jax.rollout.score import features_of
from pe_rlhf_jax.types import PromptBatch, PyTree, Rollout

BLOCK = 8
"""Decode steps between two looks at whether every row has ended."""


_Output = tuple[Array, KVCache]
"""What the decoder returns when it is given a cache."""


class DecodeState(flax.struct.PyTreeNode):
    """What a decode step carries. R is a multiple of BLOCK here."""

    step: Int[Array, ""]
    logits: Float[Array, "B V"]
    """Of the token to be sampled next."""
    position: Int[Array, " B"]
    """Position of that token among the row's real tokens."""
    alive: Bool[Array, " B"]
    cache: KVCache
    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]
    logprobs: Float[Array, "B R"]


def generate(
    decoder: Decoder,
    variables: PyTree,
    prompts: PromptBatch,
    key: jax.Array,
    sampling: SamplingConfig,
    end_tokens: tuple[int, ...],
    pad_token: int,
) -> Rollout:
    """Samples a response of at most `sampling.max_new_tokens` tokens to each prompt; the end token is part of the response.

    Every row draws from its own key, folded from `key`, its index and the step: calls for parts of one batch need different keys. The
    trip count of the outer loop is the early exit; cost is bounded by the longest response, rounded up to a block.
    """
    state = begin(decoder, variables, prompts, sampling, pad_token)
    state = jax.lax.while_loop(
        lambda s: jnp.any(s.alive) & (s.step < sampling.max_new_tokens),
        lambda s: advance(decoder, variables, prompts, key, sampling, end_tokens, pad_token, s, BLOCK),
        state,
    )
    return so_far(prompts, state, sampling, end_tokens)


def begin(decoder: Decoder, variables: PyTree, prompts: PromptBatch, sampling: SamplingConfig, pad_token: int) -> DecodeState:
    """Reads the prompts: the state before the first token."""
    batch, prompt_length = prompts.tokens.shape
    width = (batch, -(-sampling.max_new_tokens // BLOCK) * BLOCK)
    slots = prompt_length + width[1]
    padded_mask = jnp.pad(prompts.mask, ((0, 0), (0, width[1])))
    features = features_of(decoder, variables, prompts.images)
    prompt = None if decoder.config.vision is None else prompts.mask
    cache = decoder.new_cache(batch, slots)
    hidden, cache = cast(_Output, decoder.apply(variables, prompts.tokens, padded_mask, cache=cache, features=features, prompt=prompt))
    return DecodeState(
        step=jnp.zeros((), jnp.int32),
        logits=decoder.unembed(variables["params"], hidden[:, -1]),
        position=jnp.sum(prompts.mask, axis=1),
        alive=jnp.ones((batch,), bool),
        cache=cache,
        tokens=jnp.full(width, pad_token, jnp.int32),
        mask=jnp.zeros(width, bool),
        logprobs=jnp.zeros(width, jnp.float32),
    )


def advance(
    decoder: Decoder,
    variables: PyTree,
    prompts: PromptBatch,
    key: jax.Array,
    sampling: SamplingConfig,
    end_tokens: tuple[int, ...],
    pad_token: int,
    state: DecodeState,
    steps: int,
) -> DecodeState:
    """The state after so many more tokens of each row; arguments as for `generate`. `steps` must divide BLOCK."""
    batch, prompt_length = prompts.tokens.shape
    ends = jnp.asarray(end_tokens, jnp.int32)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def decode_step(state: DecodeState, _: None) -> tuple[DecodeState, None]:
        step_keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, state.step))(row_keys)
        token, logprob = jax.vmap(lambda logits, k: _sample_row(logits, k, sampling))(state.logits, step_keys)
        token = jnp.where(state.alive, token, pad_token)
        mask = state.mask.at[:, state.step].set(state.alive)
        slot_mask = jnp.concatenate([prompts.mask, mask], axis=1)
        slot = prompt_length + state.step
        output = decoder.apply(variables, token[:, None], slot_mask, state.position[:, None], state.cache, slot)
        hidden, cache = cast(_Output, output)
        state = DecodeState(
            step=state.step + 1,
            logits=decoder.unembed(variables["params"], hidden[:, 0]),
            position=state.position + 1,
            alive=state.alive & ~jnp.isin(token, ends),
            cache=cache,
            tokens=state.tokens.at[:, state.step].set(token),
            mask=mask,
            logprobs=state.logprobs.at[:, state.step].set(jnp.where(state.alive, logprob, 0.0)),
        )
        return state, None

    return jax.lax.scan(decode_step, state, length=steps)[0]


def so_far(prompts: PromptBatch, state: DecodeState, sampling: SamplingConfig, end_tokens: tuple[int, ...]) -> Rollout:
    """The responses up to the state's step; at the end, the whole ones."""
    length = sampling.max_new_tokens
    tokens, mask = state.tokens[:, :length], state.mask[:, :length]
    ended = jnp.any(jnp.isin(tokens, jnp.asarray(end_tokens, jnp.int32)) & mask, axis=1)
    return Rollout(prompts.tokens, prompts.mask, tokens, mask, state.logprobs[:, :length], ended, prompts.images)


def _sample_row(logits: Float[Array, " V"], key: jax.Array, sampling: SamplingConfig) -> tuple[Int[Array, ""], Float[Array, ""]]:
    token, logprob = sample(logits[None], key, sampling)
    return token[0], logprob[0]
