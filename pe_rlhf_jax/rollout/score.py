"""Scoring given sequences: log-probabilities and entropies in chunks, rewards and values.

Letters: B batch, T tokens, P prompt tokens, R response tokens, D hidden, V vocabulary, C tokens of a row in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.heads import apply_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.sharding import row_groups
from pe_rlhf_jax.types import Images, PyTree, Rollout


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    logits_of: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy of its distribution, in float32.

    Each device has logits of at most `chunk` tokens at a time (but at least one token of each of its rows); the backward pass recomputes
    them. Chunks are cut along time, so that a batch that is sharded over devices stays sharded. Without a mesh in use (`jax.set_mesh`),
    or where it does not divide the rows, `chunk` counts the tokens of the whole batch.
    """
    batch, length = targets_BT.shape

    @jax.checkpoint
    def of_chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_BCD, target_BC = inputs
        logprobs_BCV = jax.nn.log_softmax(logits_of(hidden_BCD).astype(jnp.float32) / temperature, axis=-1)
        entropy_BC = -jnp.sum(jnp.exp(logprobs_BCV) * logprobs_BCV, axis=-1)
        return jnp.take_along_axis(logprobs_BCV, target_BC[..., None], axis=-1)[..., 0], entropy_BC

    chunks = -(-length // max(1, chunk * row_groups(batch) // batch))
    if chunks <= 1:  # none where rows are of one token, which predicts nothing
        return of_chunk((hidden_BTD, targets_BT))
    width = -(-length // chunks)
    missing = chunks * width - length
    hidden = rearrange(jnp.pad(hidden_BTD, ((0, 0), (0, missing), (0, 0))), "B (n C) D -> n B C D", n=chunks)
    targets = rearrange(jnp.pad(targets_BT, ((0, 0), (0, missing))), "B (n C) -> n B C", n=chunks)
    logprobs, entropy = (rearrange(x, "n B C -> B (n C)")[:, :length] for x in jax.lax.map(of_chunk, (hidden, targets)))
    return logprobs, entropy


def features_of(
    decoder: Decoder, variables: PyTree, images: Images | None, deterministic: bool = True, rngs: dict[str, jax.Array] | None = None
) -> Float[Array, "B M F E"] | None:
    """What `Decoder` takes of a batch's pictures: the features that it has, or the role's own where adapters change the tower."""
    if images is None or images.pixels is None:
        return None if images is None else images.features
    return decoder.encode_images(variables, images.pixels, deterministic, rngs)


class Rows(NamedTuple):
    """What the decoder reads of a rollout: G rows, in each a prompt and n responses to it."""

    tokens: Int[Array, "G T"]
    mask: Bool[Array, "G T"]
    ends: Int[Array, "G T"] | None
    """As in `models.visibility`; None where n is 1."""
    prompt: Bool[Array, "G T"] | None
    """None for a model of text, which does not ask."""
    images: Images | None


def rows_of(decoder: Decoder, rollout: Rollout, answers: int) -> Rows:
    """Each prompt once, with `answers` neighbouring responses, all of which answer it."""
    length = rollout.response.shape[1]

    def once(x: Array) -> Array:
        return x.reshape(-1, answers, *x.shape[1:])[:, 0]

    def beside(x: Array) -> Array:
        return x.reshape(len(x) // answers, answers * length)

    prompt_mask, response_mask = once(rollout.prompt_mask), beside(rollout.response_mask)
    tokens = jnp.concatenate([once(rollout.prompt), beside(rollout.response)], axis=1)
    mask = jnp.concatenate([prompt_mask, response_mask], axis=1)
    ends = prompt = None
    if answers > 1:
        starts = prompt_mask.shape[1] + length * jnp.arange(answers)
        end_T = jnp.concatenate([jnp.full(prompt_mask.shape[1], tokens.shape[1]), jnp.repeat(starts + length, length)])
        ends = jnp.broadcast_to(end_T, tokens.shape)
    if decoder.config.vision is not None:
        prompt = jnp.concatenate([prompt_mask, jnp.zeros_like(response_mask)], axis=1)
    return Rows(tokens, mask, ends, prompt, jax.tree.map(once, rollout.images))


def response_hidden(decoder: Decoder, backbone: PyTree, role: Role, rollout: Rollout, answers: int = 1) -> Float[Array, "B R D"]:
    """Hidden states that predict the response's tokens: of the last prompt token and of all but the last response token.

    So many neighbouring rows as `answers` says answer one prompt, which is computed once for them.
    """
    (batch, length), prompt_length = rollout.response.shape, rollout.prompt.shape[1]
    # The last token of a response predicts nothing; without it rows would have an odd length, which no mesh divides.
    rows, variables = rows_of(decoder, rollout, answers), role.variables(backbone)
    features = features_of(decoder, variables, rows.images)
    hidden, _ = decoder.apply(variables, rows.tokens, rows.mask, features=features, prompt=rows.prompt, ends=rows.ends)
    if answers == 1:
        return hidden[:, prompt_length - 1 : -1]
    begin = jnp.repeat(hidden[:, prompt_length - 1], answers, axis=0)[:, None]
    return jnp.concatenate([begin, hidden[:, prompt_length:].reshape(batch, length, -1)[:, :-1]], axis=1)


def response_logprobs(
    decoder: Decoder, backbone: PyTree, role: Role, rollout: Rollout, temperature: float, chunk: int, answers: int = 1
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Log-probability and entropy at each response token under a role, at the sampling temperature. Junk where masked.

    `answers` as for `response_hidden`.
    """
    variables = role.variables(backbone)
    hidden = response_hidden(decoder, backbone, role, rollout, answers)
    return token_logprobs(hidden, rollout.response, lambda h: decoder.unembed(variables["params"], h), temperature, chunk)


def response_values(decoder: Decoder, backbone: PyTree, role: Role, rollout: Rollout) -> Float[Array, "B R"]:
    """V(x_t): the value before each response token is chosen. Junk where masked."""
    return apply_head(role.head, response_hidden(decoder, backbone, role, rollout))


def response_scores(decoder: Decoder, backbone: PyTree, role: Role, rollout: Rollout, answers: int = 1) -> Float[Array, " B"]:
    """The role's head at each response's last token, of which each has one; `answers` as for `response_hidden`."""
    length, prompt_length = rollout.response.shape[1], rollout.prompt.shape[1]
    rows = rows_of(decoder, rollout, answers)
    starts = prompt_length + length * jnp.arange(answers)
    places = starts + jnp.sum(rollout.response_mask, axis=1).reshape(-1, answers) - 1
    features = features_of(decoder, role.variables(backbone), rows.images)
    at = (rows.tokens, rows.mask, places, rows.ends)
    return apply_head(role.head, hidden_at(decoder, backbone, role, *at, prompt=rows.prompt, features=features)).reshape(-1)


def sequence_score(
    decoder: Decoder,
    backbone: PyTree,
    role: Role,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    deterministic: bool = True,
    dropout_key: jax.Array | None = None,
    prompt: Bool[Array, "B T"] | None = None,
    features: Float[Array, "B M F E"] | None = None,
) -> Float[Array, " B"]:
    """The role's head at the last real token of each row, whatever the padding side; `prompt` and `features` as `Decoder` takes them."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    hidden = hidden_at(decoder, backbone, role, tokens, mask, last[:, None], None, deterministic, dropout_key, prompt, features)
    return apply_head(role.head, hidden)[:, 0]


def hidden_at(
    decoder: Decoder,
    backbone: PyTree,
    role: Role,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    places: Int[Array, "B n"],
    ends: Int[Array, "B T"] | None,
    deterministic: bool = True,
    dropout_key: jax.Array | None = None,
    prompt: Bool[Array, "B T"] | None = None,
    features: Float[Array, "B M F E"] | None = None,
) -> Float[Array, "B n D"]:
    """Hidden states, which a head reads, at `places` of each row: where its texts end, say; `ends` as `models.visibility` has them."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden, _ = decoder.apply(
        role.variables(backbone),
        tokens,
        mask,
        deterministic=deterministic,
        rngs=rngs,
        features=features,
        prompt=prompt,
        ends=ends,
    )
    return jnp.take_along_axis(hidden, places[..., None], axis=1)
