"""Reward modelling on preference pairs (Bradley-Terry) or 0/1 labels (logistic)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pe_rlhf_jax import hosts
from pe_rlhf_jax.config import ConfigError, RewardConfig
from pe_rlhf_jax.data import as_read
from pe_rlhf_jax.models.heads import init_head, zero_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.sharding import place
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.loop import Metrics, updates
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.probe import linear_probe
from pe_rlhf_jax.training.reward_kinds import KINDS, Kind
from pe_rlhf_jax.training.step import new_state
from pe_rlhf_jax.types import PyTree, TrainState

STAGE = "reward"


def kind_of(config: RewardConfig) -> Kind:
    """The kind of data that the stage learns from."""
    return KINDS[config.kind]


def init(context: Context, sft: Role) -> TrainState:
    """The state before the first update: a fresh head, and an adapter that is fresh or, with `start_from: sft`, the reference's.

    With `reward.adapter`, that adapter and its head. A head for labels starts at 0: all that hidden states have in common, which is most
    of them, would otherwise move the scores of all rows alike, and steps would follow that rather than what tells right from wrong.
    """
    config = context.config.reward
    role, size = sft if config.start_from == "sft" else context.reward_base, context.decoder.config.hidden_size
    head = role.head or (init_head(context.key(f"{STAGE}/head"), size) if config.kind == "pairs" else zero_head(size))
    role = context.start(role.replace(head=head), config.tuning, STAGE)
    return new_state(role.trained(config.tuning), make_optimizer(config.optimizer, config.steps, config.tuning))


def run(context: Context, sft: Role, state: TrainState, fresh: bool = True) -> Iterator[tuple[TrainState, Metrics]]:
    """Yields the state and its metrics after each update; `eval/...` is there after an evaluation.

    With `reward.linear_probe`, a state of step 0 comes first, with the head that was fitted and held-out figures: it may be the best. A
    state that is not `fresh`, but was restored from a checkpoint, has its head.
    """
    config, rest, kind = context.config.reward, _rest(context, sft), kind_of(context.config.reward)
    split, collate = context.split(kind.data), kind.collator(context)
    held_out = split.validation[: config.evaluation_pairs]

    def evaluate(state: TrainState) -> Metrics:
        return kind.quick(context, held_out, *kind.scores(context, state.trainable.join(rest), held_out))

    if config.linear_probe is not None and fresh and int(state.step) == 0:
        state = state.replace(trainable=_probed(context, kind, state.trainable, rest, split.train))
        yield state, {f"eval/{name}": value for name, value in evaluate(state).items()}
    yield from updates(
        context,
        STAGE,
        config,
        state,
        frozen=(context.backbone, rest),
        examples=split.train,
        collate=collate,
        loss=_loss(context, kind),
        total=_examples,
        evaluate=evaluate,
    )


def finish(context: Context, sft: Role, state: TrainState) -> tuple[Role, dict[str, Any]]:
    """The trained part of the role, and the stage's figures.

    The bias of a model of pairs, which the loss leaves open, is set so that what people wrote averages 0. A model of labels keeps its
    own: its 0 is the boundary between the classes.
    """
    config, trained = context.config.reward, state.trainable
    figures = {"best_step": int(state.step), "skipped_updates": int(state.skipped)}
    if config.kind != "pairs":
        return trained, figures
    train = context.split("preference").train
    pairs = train[:: max(1, len(train) // config.evaluation_pairs)][: config.evaluation_pairs]  # neighbours often belong together
    mean = float(np.mean(np.concatenate(kind_of(config).scores(context, whole(context, sft, trained), pairs))))
    head = {**trained.head, "bias": trained.head["bias"] - mean}
    return trained.replace(head=head), figures | {"bias": -mean}


def evaluate(context: Context, role: Role) -> dict[str, Any]:
    """Figures of the finished model on held-out rows, with 95% intervals.

    `selected_on` of the rows also chose the checkpoint, whose figures on them are therefore a little too good.
    """
    config, settings = context.config.reward, context.config.evaluate
    check_labels(context, "evaluate.pairs", settings.pairs)
    kind = kind_of(config)
    rows = context.split(kind.data).validation[: settings.pairs]
    figures = kind.figures(context, rows, *kind.scores(context, role, rows))
    several = config.evaluate_every < config.steps or config.linear_probe is not None
    each = figures.get("rows", len(rows)) // len(rows)
    return figures | {"selected_on": each * min(len(rows), config.evaluation_pairs) if several else 0}


def _probed(context: Context, kind: Kind, role: Role, rest: Role, train: Sequence[Any]) -> Role:
    """The role with a head that is fitted to what it makes of rows for training."""
    config = context.config.reward
    rows = [train[i] for i in _drawn(context)]
    hidden, labels = kind.probed(context, role.join(rest), rows)
    names = [row.group or f"row {i}" for i, row in enumerate(as_read(rows))]
    groups = names * (len(hidden) // len(rows))
    # By one process: what others compute may differ in rounding.
    head = hosts.once(lambda: linear_probe(hidden, labels, groups, config.balance_classes))
    return role.replace(head=place(head, context.mesh))


def _drawn(context: Context) -> list[int]:
    """The training rows that a head is fitted to. Raises ConfigError where fewer than two of them have one of the labels."""
    config, kind = context.config.reward, kind_of(context.config.reward)
    train = as_read(context.split(kind.data).train)
    # Drawn: rows often come in an order, such as right and wrong answers by turns.
    drawn = np.random.default_rng(context.config.run.seed).permutation(len(train))[: config.linear_probe].tolist()
    labels = [train[i].label for i in drawn] if kind.data == "label" else [0, 1] * len(drawn)
    if config.kind != "pairs" and min(labels.count(0), labels.count(1)) < 2:
        raise ConfigError(
            f"reward.linear_probe: of the {len(drawn)} rows drawn for it, fewer than two have one of the labels; let it have more"
        )
    return drawn


def check(context: Context) -> None:
    """Raises ConfigError, before anything is trained, if the stage cannot learn from its training rows as it is configured."""
    kind_of(context.config.reward).collator(context)
    if context.config.reward.linear_probe is not None:
        _drawn(context)


def check_labels(context: Context, field: str, count: int) -> None:
    """Raises ConfigError, where the stage learns from labels, if the first `count` held-out rows have one label: any model judges those as
    well as another.
    """
    kind = kind_of(context.config.reward)
    rows = as_read(context.split(kind.data).validation)[:count] if kind.data == "label" else []
    if rows and len({row.label for row in rows}) < 2:
        raise ConfigError(
            f"{field}: the first {len(rows)} held-out rows have one label only, so no model is better than another; take more"
        )


def whole(context: Context, sft: Role, trained: Role) -> Role:
    """The role whose trained part is given."""
    return trained.join(_rest(context, sft))


def _rest(context: Context, sft: Role) -> Role:
    """What of the starting role is not trained."""
    config = context.config.reward
    return sft.frozen(config.tuning) if config.start_from == "sft" else Role()


def _examples(batch: PyTree) -> Float[Array, ""]:
    return jnp.sum(batch.weight > 0, dtype=jnp.float32)


def _loss(context: Context, kind: Kind):
    config, decoder, dropout = context.config.reward, context.decoder, context.config.lora.lora_dropout > 0

    def loss(trainable: Role, frozen: tuple[PyTree, Role], batch: PyTree, total: Array, key: jax.Array) -> tuple[Array, dict[str, Array]]:
        backbone, rest = frozen
        return kind.loss(config, decoder, trainable.join(rest), backbone, batch, total, key if dropout else None)

    return loss
