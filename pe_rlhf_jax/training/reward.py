"""Reward modelling on preference pairs (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pe_rlhf_jax.algorithms.reward import bradley_terry
from pe_rlhf_jax.data import PreferenceExample, pad_preferences
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.heads import init_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import sequence_score
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.loop import Metrics, updates
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.step import new_state
from pe_rlhf_jax.types import PreferenceBatch, PyTree, TrainState

STAGE = "reward"


def init(context: Context, sft: Role) -> TrainState:
    """The state before the first update: a fresh head, and an adapter that is fresh or, with `start_from: sft`, the reference's."""
    config = context.config.reward
    head = init_head(context.key(f"{STAGE}/head"), context.decoder.config.hidden_size)
    role = context.start(sft if config.start_from == "sft" else Role(), config.tuning, STAGE)
    return new_state(role.replace(head=head).trained(config.tuning), make_optimizer(config.optimizer, config.steps, config.tuning))


def run(context: Context, sft: Role, state: TrainState) -> Iterator[tuple[TrainState, Metrics]]:
    """Yields the state and its metrics after each update; `eval/accuracy` is there after an evaluation."""
    config, rest = context.config.reward, _rest(context, sft)

    def evaluate(state: TrainState) -> Metrics:
        chosen, rejected = scores(context, state.trainable.join(rest), context.split("preference").validation[: config.evaluation_pairs])
        loss, figures = bradley_terry(jnp.asarray(chosen), jnp.asarray(rejected))
        return {"loss": float(loss)} | {name: float(value) for name, value in figures.items()}

    return updates(
        context,
        STAGE,
        config,
        state,
        frozen=(context.backbone, rest),
        examples=context.split("preference").train,
        collate=lambda rows: pad_preferences(rows, context.pad_token, context.config.data.length_multiple),
        loss=_loss(context),
        total=lambda batch: jnp.sum(batch.weight),
        evaluate=evaluate,
    )


def finish(context: Context, sft: Role, state: TrainState) -> tuple[Role, dict[str, Any]]:
    """The trained part of the role, its bias set so that what people wrote averages 0, and the stage's figures."""
    trained = state.trainable
    pairs = context.split("preference").train[: context.config.reward.evaluation_pairs]
    mean = float(np.mean(np.concatenate(scores(context, whole(context, sft, trained), pairs))))
    head = {**trained.head, "bias": trained.head["bias"] - mean}
    return trained.replace(head=head), {"best_step": int(state.step), "bias": -mean, "skipped_updates": int(state.skipped)}


def scores(context: Context, role: Role, pairs: Sequence[PreferenceExample]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the chosen and of the rejected sides, float32 [len(pairs)] each."""
    size = context.config.reward.batch_size
    chosen: list[np.ndarray] = []
    rejected: list[np.ndarray] = []
    for at in range(0, len(pairs), size):
        rows = pairs[at : at + size]
        batch = context.rows(pad_preferences(rows, context.pad_token, context.config.data.length_multiple, rows=size))
        a, b = jax.device_get(_score_pairs(context.decoder, role, context.backbone, batch))
        chosen.append(a[: len(rows)])
        rejected.append(b[: len(rows)])
    return np.concatenate(chosen), np.concatenate(rejected)


def whole(context: Context, sft: Role, trained: Role) -> Role:
    """The role whose trained part is given."""
    return trained.join(_rest(context, sft))


def _rest(context: Context, sft: Role) -> Role:
    """What of the starting role is not trained."""
    config = context.config.reward
    return sft.frozen(config.tuning) if config.start_from == "sft" else Role()


def _pair_scores(
    decoder: Decoder, role: Role, backbone: PyTree, batch: PreferenceBatch, dropout_key: jax.Array | None = None
) -> tuple[Array, Array]:
    """Both sides in one pass, [B] each."""
    tokens = jnp.concatenate([batch.chosen, batch.rejected])
    mask = jnp.concatenate([batch.chosen_mask, batch.rejected_mask])
    both = sequence_score(decoder, backbone, role, tokens, mask, dropout_key is None, dropout_key)
    return both[: len(batch.chosen)], both[len(batch.chosen) :]


def _loss(context: Context):
    config, decoder, dropout = context.config.reward, context.decoder, context.config.lora.lora_dropout > 0

    def loss(
        trainable: Role, frozen: tuple[PyTree, Role], batch: PreferenceBatch, total: Array, key: jax.Array
    ) -> tuple[Array, dict[str, Array]]:
        backbone, rest = frozen
        chosen, rejected = _pair_scores(decoder, trainable.join(rest), backbone, batch, key if dropout else None)
        margin = batch.margin if config.use_margin else None
        return bradley_terry(
            chosen,
            rejected,
            margin=margin,
            center_coef=config.center_rewards_coefficient,
            weight=batch.weight,
            total=total,
        )

    return loss


_score_pairs = jax.jit(_pair_scores, static_argnums=0)
