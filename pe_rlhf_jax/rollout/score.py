"""Scoring given sequences: log-probabilities and entropies in chunks, rewards and values.

Letters: B batch, T tokens, P prompt tokens, R response tokens, D hidden, V vocabulary, C tokens of a row in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.heads import apply_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.types import Images, PyTree, Rollout


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    logits_of: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy of its distribution, in float32.

    Logits of at most `chunk` tokens exist at a time (but at least one token of every row); the backward pass recomputes them. Chunks are
    cut along time, so that a batch that is sharded over devices stays sharded.
    """
    batch, length = targets_BT.shape

    @jax.checkpoint
    def of_chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_BCD, target_BC = inputs
        logprobs_BCV = jax.nn.log_softmax(logits_of(hidden_BCD).astype(jnp.float32) / temperature, axis=-1)
        entropy_BC = -jnp.sum(jnp.exp(logprobs_BCV) * logprobs_BCV, axis=-1)
        return jnp.take_along_axis(logprobs_BCV, target_BC[..., None], axis=-1)[..., 0], entropy_BC

    chunks = -(-length // max(1, chunk // batch))
    if chunks == 1:
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


def prompt_of(decoder: Decoder, rollout: Rollout) -> Bool[Array, "B T"] | None:
    """Which tokens of a rollout's sequence are the prompt; None for a model of text, which does not ask."""
    if decoder.config.vision is None:
        return None
    return jnp.concatenate([rollout.prompt_mask, jnp.zeros_like(rollout.response_mask)], axis=1)


def sequence(rollout: Rollout) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Prompt and response as one sequence and its mask, T = P + R."""
    tokens = jnp.concatenate([rollout.prompt, rollout.response], axis=1)
    return tokens, jnp.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)


def response_hidden(decoder: Decoder, backbone: PyTree, role: Role, rollout: Rollout) -> Float[Array, "B R D"]:
    """Hidden states that predict the response's tokens: of the last prompt token and of all but the last response token."""
    tokens, mask = sequence(rollout)
    variables, prompt = role.variables(backbone), prompt_of(decoder, rollout)
    features = features_of(decoder, variables, rollout.images)
    prompt = None if prompt is None else prompt[:, :-1]
    hidden, _ = decoder.apply(variables, tokens[:, :-1], mask[:, :-1], features=features, prompt=prompt)
    return hidden[:, rollout.prompt.shape[1] - 1 :]


def response_logprobs(
    decoder: Decoder, backbone: PyTree, role: Role, rollout: Rollout, temperature: float, chunk: int
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Log-probability and entropy at each response token under a role, at the sampling temperature. Junk where masked."""
    variables = role.variables(backbone)
    hidden = response_hidden(decoder, backbone, role, rollout)
    return token_logprobs(hidden, rollout.response, lambda h: decoder.unembed(variables["params"], h), temperature, chunk)


def response_values(decoder: Decoder, backbone: PyTree, role: Role, rollout: Rollout) -> Float[Array, "B R"]:
    """V(x_t): the value before each response token is chosen. Junk where masked."""
    return apply_head(role.head, response_hidden(decoder, backbone, role, rollout))


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
    return scores_at(decoder, backbone, role, tokens, mask, last[:, None], None, deterministic, dropout_key, prompt, features)[:, 0]


def scores_at(
    decoder: Decoder,
    backbone: PyTree,
    role: Role,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    places: Int[Array, "B n"],
    branches: Int[Array, "B T"] | None,
    deterministic: bool = True,
    dropout_key: jax.Array | None = None,
    prompt: Bool[Array, "B T"] | None = None,
    features: Float[Array, "B M F E"] | None = None,
) -> Float[Array, "B n"]:
    """The role's head at `places` of each row: the ends of its branches, say, as `models.visibility` has them."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden, _ = decoder.apply(
        role.variables(backbone), tokens, mask, deterministic=deterministic, rngs=rngs, features=features, prompt=prompt, branches=branches
    )
    return apply_head(role.head, jnp.take_along_axis(hidden, places[..., None], axis=1))
