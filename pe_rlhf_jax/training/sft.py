"""Supervised fine-tuning: the reference policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pe_rlhf_jax.algorithms.sft import cross_entropy
from pe_rlhf_jax.data import as_read, fill, pad_sft
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import features_of, token_logprobs
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.loop import Metrics, updates
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.step import new_state
from pe_rlhf_jax.types import Batch, PyTree, TrainState

STAGE = "sft"


def init(context: Context) -> TrainState:
    """The state before the first update."""
    config = context.config.sft
    role = context.start(context.base, config.tuning, STAGE)
    return new_state(role.trained(config.tuning), make_optimizer(config.optimizer, config.steps, config.tuning))


def run(context: Context, state: TrainState) -> Iterator[tuple[TrainState, Metrics]]:
    """Yields the state and its metrics after each update, from where `state` stands."""
    packing = context.packing("sft", "sft")
    return updates(
        context,
        STAGE,
        context.config.sft,
        state,
        frozen=context.backbone,
        examples=context.split("sft").train,
        collate=lambda rows: pad_sft(rows, context.pad_token, context.config.data.length_multiple, packing),
        loss=_loss(context),
        total=_targets,
        evaluate=lambda state: {"loss": evaluate(context, state.trainable)},
    )


def finish(context: Context, state: TrainState) -> tuple[Role, dict[str, Any]]:
    """The trained role and its figures."""
    before, after = evaluate(context, context.base), evaluate(context, state.trainable)
    return state.trainable, {"loss_before": before, "loss_after": after, "skipped_updates": int(state.skipped)}


def evaluate(context: Context, role: Role) -> float:
    """Mean loss per response token on held-out rows."""
    examples, size = context.split("sft").validation[: context.config.sft.evaluation_rows], context.evaluated_at_once("sft")
    losses, tokens = 0.0, 0.0
    order = np.argsort([example.length for example in as_read(examples)], kind="stable")  # rows of similar length need less padding
    for at in range(0, len(examples), size):
        rows = [examples[i] for i in order[at : at + size].tolist()]
        batch = pad_sft(fill(rows, size), context.pad_token, context.config.data.length_multiple)
        batch.target_mask[len(rows) :] = False
        placed = context.rows(batch, rows)
        total, count = _evaluate(context.decoder, context.config.model.logprob_chunk, role, context.backbone, placed)
        losses, tokens = losses + float(total), tokens + float(count)
    return losses / max(tokens, 1.0)


def _logprobs(decoder: Decoder, chunk: int, role: Role, backbone: PyTree, batch: Batch, key: jax.Array | None) -> Float[Array, "B T"]:
    """Log-probabilities of tokens 1 .. T-1; adapters drop out when a key is given."""
    variables = role.variables(backbone)
    rngs = None if key is None else {"dropout": key}
    features = features_of(decoder, variables, batch.images, key is None, rngs)
    hidden, _ = decoder.apply(
        variables,
        batch.tokens,
        batch.mask,
        deterministic=key is None,
        rngs=rngs,
        features=features,
        prompt=batch.prompt_mask,
        ends=batch.ends,
    )
    return token_logprobs(hidden[:, :-1], batch.tokens[:, 1:], lambda h: decoder.unembed(variables["params"], h), 1.0, chunk)[0]


def _loss(context: Context):
    decoder, chunk, dropout = context.decoder, context.config.model.logprob_chunk, context.config.lora.lora_dropout > 0

    def loss(role: Role, backbone: PyTree, batch: Batch, total: Array, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        logprobs = _logprobs(decoder, chunk, role, backbone, batch, key if dropout else None)
        return cross_entropy(logprobs, batch.target_mask[:, 1:], total), {}

    return loss


def _targets(batch: Batch) -> Float[Array, ""]:
    return jnp.sum(batch.target_mask[:, 1:], dtype=jnp.float32)


@jax.jit(static_argnums=(0, 1))
def _evaluate(decoder: Decoder, chunk: int, role: Role, backbone: PyTree, batch: Batch) -> tuple[Array, Array]:
    mask = batch.target_mask[:, 1:]
    logprobs = _logprobs(decoder, chunk, role, backbone, batch, None)
    return cross_entropy(logprobs, mask, jnp.ones(())), jnp.sum(mask)
