"""Rows that are decoded together: how they begin, how they advance by some tokens, and what they show.

Letters: B rows, P prompt tokens (left-padded), R response tokens, S = P + R slots of the cache, D hidden, V vocabulary.

The slots are a ring, and at every step all rows write the same one, so that a write is one slice in place. A prompt lies in the P slots
before the one that is written next when it is read, whenever that is. So a row's own tokens are the latest ones in the ring, as many
as its position says, and what the ring holds of an earlier row is further back; when a row's first token is written over it has ended.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.config import SamplingConfig
from pe_rlhf_jax.devices import is_nvidia
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.joined import join
from pe_rlhf_jax.models.layers import KVCache
from pe_rlhf_jax.rollout.sampling import sample
from pe_rlhf_jax.rollout.score import features_of
from pe_rlhf_jax.sharding import BATCH, constrain, holds_whole, row_groups
from pe_rlhf_jax.types import PromptBatch, PyTree, Rollout

_Output = tuple[Array, KVCache]
"""What the decoder returns when it is given a cache."""

NONE = -1
"""In place of a token that has not been sampled."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What a program that samples is compiled for."""

    decoder: Decoder
    sampling: SamplingConfig
    end_tokens: tuple[int, ...]
    """Each ends a response, of which it is part."""
    pad_token: int
    answers: int = 1
    """So many neighbouring rows answer one prompt, which is read once for all of them."""


class Read(flax.struct.PyTreeNode):
    """What decoding needs of prompts that were read, one in each row."""

    cache: KVCache
    """With the prompts in its first P slots."""
    position: Int[Array, " B"]
    """As in `DecodeState`, and so is `hidden`."""
    hidden: Float[Array, "B D"]


class DecodeState(flax.struct.PyTreeNode):
    """What a decode step carries."""

    slot: Int[Array, ""]
    """Of the cache, which the next token takes."""
    cache: KVCache
    prompt: Int[Array, " B"]
    """Number of the prompt that the row answers."""
    step: Int[Array, " B"]
    """Tokens of the response so far."""
    position: Int[Array, " B"]
    """Of the token to be sampled next, among the row's real tokens."""
    alive: Bool[Array, " B"]
    """Whether the response goes on."""
    hidden: Float[Array, "B D"]
    """State that predicts the token to be sampled next."""
    tokens: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]


def idle(sampler: Sampler, rows: int, slots: int) -> DecodeState:
    """Rows that answer nothing yet."""
    length = sampler.sampling.max_new_tokens

    def every_row(value: float, dtype: type, *shape: int) -> Array:
        return constrain(jnp.full((rows, *shape), value, dtype), BATCH, *(None for _ in shape))

    decoder = sampler.decoder
    return DecodeState(
        slot=jnp.zeros((), jnp.int32),
        cache=decoder.new_cache(rows, slots),
        prompt=jnp.arange(rows),
        step=every_row(0, jnp.int32),
        position=every_row(0, jnp.int32),
        alive=every_row(False, jnp.bool_),
        hidden=every_row(0, decoder.dtype, decoder.config.hidden_size),
        tokens=every_row(NONE, jnp.int32, length),
        logprobs=every_row(0, jnp.float32, length),
    )


def begin(sampler: Sampler, variables: PyTree, prompts: PromptBatch, room: int) -> DecodeState:
    """Reads the prompts, one in each row, into a cache with slots for `room` more tokens: the state before the first one.

    A prompt of several rows is read once, or once by each group of devices that has any of them.
    """
    rows, length = prompts.tokens.shape
    answers = math.gcd(sampler.answers, rows // row_groups(rows))
    if answers == 1:
        found = read(sampler, variables, prompts, room)
    else:
        found = _repeated(read(sampler, variables, distinct(prompts, answers), room=0), answers, room)
    state = idle(sampler, rows, length + room)
    alive = jnp.ones_like(state.alive)
    return state.replace(slot=jnp.asarray(length, jnp.int32), cache=found.cache, position=found.position, alive=alive, hidden=found.hidden)


def distinct(prompts: PromptBatch, answers: int) -> PromptBatch:
    """Each prompt once, of so many neighbouring rows that have it."""

    def first(x: Array) -> Array:
        return constrain(x.reshape(-1, answers, *x.shape[1:])[:, 0], BATCH, *(None for _ in x.shape[1:]))

    return jax.tree.map(first, prompts) if answers > 1 else prompts


def read(sampler: Sampler, variables: PyTree, prompts: PromptBatch, room: int) -> Read:
    """Every row's prompt, in a cache with slots for `room` more tokens."""
    decoder, (rows, length) = sampler.decoder, prompts.tokens.shape
    padded_mask = jnp.pad(prompts.mask, ((0, 0), (0, room)))
    features = features_of(decoder, variables, prompts.images)
    prompt = None if decoder.config.vision is None else prompts.mask
    cache = decoder.new_cache(rows, length + room)
    hidden, cache = cast(_Output, decoder.apply(variables, prompts.tokens, padded_mask, cache=cache, features=features, prompt=prompt))
    return Read(cache, jnp.sum(prompts.mask, axis=1), hidden[:, -1])


def _repeated(once: Read, answers: int, room: int) -> Read:
    """Each row so many times, and with room in its cache."""

    def cache(x: Float[Array, "L G K P h"]) -> Float[Array, "L B K S h"]:
        x = jnp.pad(jnp.repeat(x, answers, axis=1), ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))
        return constrain(x, None, BATCH, "tensor", None, None)

    rows = [constrain(jnp.repeat(x, answers, axis=0), BATCH, *(None for _ in x.shape[1:])) for x in (once.position, once.hidden)]
    return Read(jax.tree.map(cache, once.cache), *rows)


def joins(sampling: SamplingConfig) -> bool:
    """Whether weights are to be joined, the default decided."""
    return is_nvidia() if sampling.join_weights is None else sampling.join_weights


def for_decoding(sampler: Sampler, variables: PyTree) -> tuple[Sampler, PyTree]:
    """What `advance` takes where it is called again and again: with joined weights, if the configuration asks for them, where each device
    holds whole, unquantized ones.
    """
    sampling = sampler.sampling
    if not joins(sampling) or not holds_whole(sampling.gather_weights) or sampler.decoder.config.quantization is not None:
        return sampler, variables
    decoder, variables = join(sampler.decoder, variables)
    return dataclasses.replace(sampler, decoder=decoder), variables


def advance(sampler: Sampler, variables: PyTree, key: jax.Array, state: DecodeState, steps: int) -> DecodeState:
    """The state after so many more tokens of each row that goes on.

    Every token is drawn from a key of its own, folded from `key`, the number of its prompt and its place in the response: it depends
    neither on the row nor on when its turn comes, and calls for parts of one batch need different keys.
    """
    decoder, sampling, slots = sampler.decoder, sampler.sampling, state.cache.slots
    ends = jnp.asarray(sampler.end_tokens, jnp.int32)
    row_keys = jax.vmap(lambda prompt: jax.random.fold_in(key, prompt))(state.prompt)

    def decode_step(state: DecodeState, _: None) -> tuple[DecodeState, None]:
        step_keys = jax.vmap(jax.random.fold_in)(row_keys, state.step)
        logits = decoder.unembed(variables["params"], state.hidden)
        token, logprob = jax.vmap(lambda logits, k: _sample_row(logits, k, sampling))(logits, step_keys)
        back = (state.slot - jnp.arange(slots)) % slots
        own = back[None, :] <= state.position[:, None]
        output = decoder.apply(variables, token[:, None], own, state.position[:, None], state.cache, state.slot)
        hidden, cache = cast(_Output, output)
        now = state.alive[:, None] & (jnp.arange(sampling.max_new_tokens) == state.step[:, None])
        step = state.step + state.alive
        # A row that has ended stays where it is: what it goes on to compute is not looked at, but must be a number.
        alive = state.alive & ~jnp.isin(token, ends) & (step < sampling.max_new_tokens)
        state = state.replace(
            slot=(state.slot + 1) % slots,
            cache=cache,
            step=step,
            position=state.position + alive,
            alive=alive,
            hidden=hidden[:, 0],
            tokens=jnp.where(now, token[:, None], state.tokens),
            logprobs=jnp.where(now, logprob[:, None], state.logprobs),
        )
        return state, None

    return jax.lax.scan(decode_step, state, length=steps)[0]


def so_far(sampler: Sampler, prompts: PromptBatch, state: DecodeState) -> Rollout:
    """The responses of rows that answer the prompts in their order, up to the state's step; at the end, the whole ones."""
    return rollout_of(sampler, prompts, state.tokens, state.logprobs)


def rollout_of(sampler: Sampler, prompts: PromptBatch, tokens: Int[Array, "N R"], logprobs: Float[Array, "N R"]) -> Rollout:
    """A state's tokens and log-probabilities, as they travel."""
    mask = tokens != NONE
    ended = jnp.any(jnp.isin(tokens, jnp.asarray(sampler.end_tokens, jnp.int32)), axis=1)
    return Rollout(prompts.tokens, prompts.mask, jnp.where(mask, tokens, sampler.pad_token), mask, logprobs, ended, prompts.images)


def _sample_row(logits: Float[Array, " V"], key: jax.Array, sampling: SamplingConfig) -> tuple[Int[Array, ""], Float[Array, ""]]:
    token, logprob = sample(logits[None], key, sampling)
    return token[0], logprob[0]
