"""The ways in which a reward model learns: from preference pairs, 0/1 labels, or pairs as labels; behind one face. Letter: B rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pe_rlhf_jax.algorithms.reward import bradley_terry, logistic
from pe_rlhf_jax.config import ConfigError, RewardConfig
from pe_rlhf_jax.data import LabelExample, PreferenceExample, as_read
from pe_rlhf_jax.hosts import fetch
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.heads import apply_head
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import features_of, hidden_at
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.reward_batches import Batched, DataKind, scored_batches, training_batch
from pe_rlhf_jax.training.statistics import (
    Groups,
    accuracy_by,
    area_under_curve,
    bootstrap_auc_ci,
    bootstrap_ci,
    bootstrap_pairs_auc_ci,
    calibration,
    class_weights,
    label_calibration,
    members,
    pairwise_right,
)
from pe_rlhf_jax.types import LabelBatch, PreferenceBatch, PyTree

Statistics = dict[str, Array]


class Kind(Protocol):
    """What the reward stage and its evaluation need to know of a way of learning."""

    data: DataKind
    select: str
    """The held-out figure whose best checkpoint is kept; higher is better."""

    def collator(self, context: Context) -> Callable[[Sequence[Any]], Any]:
        """What makes a training batch of rows."""

    def loss(
        self, config: RewardConfig, decoder: Decoder, role: Role, backbone: PyTree, batch: Any, total: Array, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Statistics]:
        """Loss and statistics; adapters drop out when a key is given."""

    def scores(self, context: Context, role: Role, rows: Sequence[Any]) -> tuple[np.ndarray, ...]:
        """The role's scores of the rows, float32 [len(rows)] each: of both sides of pairs, or of labelled responses."""

    def probed(self, context: Context, role: Role, rows: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """Hidden states of the rows that a head is fitted to [N, D], and their labels [N]; or differences that it makes positive,
        without labels. N is a multiple of the rows, which it has in their order, once or twice.
        """

    def quick(self, context: Context, rows: Sequence[Any], *scores: np.ndarray) -> dict[str, float]:
        """Held-out figures during training; the loss is the one that is trained, with margins, centering or class weights."""

    def figures(self, context: Context, rows: Sequence[Any], *scores: np.ndarray) -> dict[str, Any]:
        """The figures of the finished model, with 95% intervals. `guessing`: loss and accuracy of the best that pays no heed to texts."""


class Pairs:
    """Preference pairs, Bradley-Terry."""

    data: DataKind = "preference"
    select = "accuracy"

    def collator(self, context: Context) -> Callable[[Sequence[PreferenceExample]], PreferenceBatch]:
        if context.config.reward.use_margin and not any(pair.margin for pair in as_read(context.split("preference").train)):
            raise ConfigError("reward.use_margin: no pair for training has a `margin` above 0, so it would do nothing; leave it out")
        return training_batch(context, "preference")

    def loss(
        self, config: RewardConfig, decoder: Decoder, role: Role, backbone: PyTree, batch: Any, total: Array, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Statistics]:
        chosen, rejected = pair_scores(decoder, role, backbone, batch, key)
        return bradley_terry(
            chosen,
            rejected,
            margin=batch.margin.reshape(-1) if config.use_margin else None,
            center_coef=config.center_rewards_coefficient,
            weight=batch.weight.reshape(-1),
            total=total,
        )

    def scores(self, context: Context, role: Role, rows: Sequence[PreferenceExample]) -> tuple[np.ndarray, ...]:
        return self._sides(_score_pairs, context, role, rows)

    def probed(self, context: Context, role: Role, rows: Sequence[PreferenceExample]) -> tuple[np.ndarray, np.ndarray | None]:
        chosen, rejected = (side.astype(np.float32) for side in self._sides(_hidden_of_pairs, context, role, rows))
        return chosen - rejected, None

    def _sides(self, read: Any, context: Context, role: Role, rows: Sequence[PreferenceExample]) -> tuple[np.ndarray, ...]:
        return _read(read, context, role, scored_batches(context, "preference", rows))

    def quick(self, context: Context, rows: Sequence[Any], *scores: np.ndarray) -> dict[str, float]:
        config, (chosen, rejected) = context.config.reward, map(jnp.asarray, scores)
        margin = jnp.asarray([pair.margin for pair in rows], jnp.float32) if config.use_margin else None
        loss, figures = bradley_terry(chosen, rejected, margin=margin, center_coef=config.center_rewards_coefficient)
        return {"loss": float(loss)} | {name: float(value) for name, value in figures.items()}

    def figures(self, context: Context, rows: Sequence[PreferenceExample], *scores: np.ndarray) -> dict[str, Any]:
        chosen, rejected = scores
        right, groups, resamples = pairwise_right(chosen, rejected), _groups(rows), context.config.evaluate.bootstrap
        nothing = np.zeros_like(chosen)
        margins = np.asarray([pair.margin for pair in rows])
        return {
            "accuracy": float(np.mean(right)),
            "ci": bootstrap_ci(right, resamples, groups),
            "pairs": len(rows),
            "groups": len(members(len(rows), groups)),
            "loss": self.quick(context, rows, *scores)["loss"],
            "guessing": {"loss": self.quick(context, rows, nothing, nothing)["loss"], "accuracy": 0.5},
            "calibration": calibration(chosen, rejected),
            "by_margin": accuracy_by(margins, right) if np.any(margins) else [],
            "by_length": accuracy_by(_longer(rows), right),
        }


class Labels:
    """Responses labelled 0 or 1, logistic loss. With `balance_classes` each class weighs half, whatever its share of the rows."""

    data: DataKind = "label"
    select = "auc"

    def collator(self, context: Context) -> Callable[[Sequence[LabelExample]], LabelBatch]:
        share, made = self._share(context), training_batch(context, "label")
        balanced = context.config.reward.balance_classes

        def collate(rows: Sequence[LabelExample]) -> LabelBatch:
            batch: LabelBatch = made(rows)
            if not balanced:
                return batch
            return batch.replace(weight=class_weights(np.asarray(batch.label), share).astype(np.float32) * batch.weight)

        return collate

    def loss(
        self, config: RewardConfig, decoder: Decoder, role: Role, backbone: PyTree, batch: Any, total: Array, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Statistics]:
        scores = label_scores(decoder, role, backbone, batch, key)
        return logistic(scores, batch.label.reshape(-1), weight=batch.weight.reshape(-1), total=total)

    def scores(self, context: Context, role: Role, rows: Sequence[LabelExample]) -> tuple[np.ndarray, ...]:
        return self._responses(_score_labels, context, role, rows)

    def probed(self, context: Context, role: Role, rows: Sequence[LabelExample]) -> tuple[np.ndarray, np.ndarray | None]:
        [hidden] = self._responses(_hidden_of_labels, context, role, rows)
        return hidden, _labels(rows)

    def _responses(self, read: Any, context: Context, role: Role, rows: Sequence[LabelExample]) -> tuple[np.ndarray, ...]:
        return _read(lambda *given: (read(*given),), context, role, scored_batches(context, "label", rows))

    def quick(self, context: Context, rows: Sequence[LabelExample], *scores: np.ndarray) -> dict[str, float]:
        labels = _labels(rows)
        weight = class_weights(labels, self._share(context)) if context.config.reward.balance_classes else np.ones_like(labels)
        return _quick_of_labels(scores[0], labels, weight)

    def figures(self, context: Context, rows: Sequence[LabelExample], *scores: np.ndarray) -> dict[str, Any]:
        labels, share, resamples = _labels(rows), self._share(context), context.config.evaluate.bootstrap
        right = _right_side(scores[0], labels)
        groups, lengths = _groups(rows), np.array([len(row.tokens) for row in rows])
        odds = np.log(share / (1 - share))
        balanced = context.config.reward.balance_classes
        guess = self.quick(context, rows, np.full(len(rows), 0.0 if balanced else odds, np.float32))["loss"]
        return {
            "loss": self.quick(context, rows, *scores)["loss"],
            **_of_areas(scores[0], labels, right, groups, resamples),
            "auc_ci": bootstrap_auc_ci(scores[0], labels, resamples, groups),
            "guessing": {"loss": guess, "accuracy": float(np.mean(_right_side(odds, labels)))},
            # Both classes alike: their logits leave the share of either to be added.
            "calibration": label_calibration(scores[0] + (odds if balanced else 0.0), labels),
            "by_length": accuracy_by(lengths, right),
        }

    def _share(self, context: Context) -> float:
        """Of the training rows, how many have label 1."""
        return float(np.mean(_labels(as_read(context.split("label").train))))


class PairsAsLabels(Pairs):
    """Both sides of preference pairs, labelled 1 and 0, logistic loss.

    The scores mean what those of `Labels` mean. In the gradient, what a right and a wrong answer to one prompt have in common cancels out;
    answers to different prompts differ by more than right and wrong do.
    """

    select = "auc"

    def loss(
        self, config: RewardConfig, decoder: Decoder, role: Role, backbone: PyTree, batch: Any, total: Array, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Statistics]:
        chosen, rejected = pair_scores(decoder, role, backbone, batch, key)
        labels = jnp.concatenate([jnp.ones_like(chosen), jnp.zeros_like(rejected)])
        weight = jnp.tile(batch.weight.reshape(-1), 2)
        return logistic(jnp.concatenate([chosen, rejected]), labels, weight=weight, total=2 * total)

    def probed(self, context: Context, role: Role, rows: Sequence[PreferenceExample]) -> tuple[np.ndarray, np.ndarray | None]:
        return np.concatenate(self._sides(_hidden_of_pairs, context, role, rows)), np.repeat([1.0, 0.0], len(rows))

    def quick(self, context: Context, rows: Sequence[Any], *scores: np.ndarray) -> dict[str, float]:
        return _quick_of_labels(np.concatenate(scores), np.repeat([1.0, 0.0], len(rows)), np.ones(2 * len(rows)))

    def figures(self, context: Context, rows: Sequence[PreferenceExample], *scores: np.ndarray) -> dict[str, Any]:
        chosen, rejected = scores
        both, labels = np.concatenate(scores), np.repeat([1.0, 0.0], len(rows))
        right = ((np.sign(chosen) - np.sign(rejected)) / 2 + 1) / 2  # of a pair: its sides go together
        groups, resamples = _groups(rows), context.config.evaluate.bootstrap
        return {
            "loss": self.quick(context, rows, *scores)["loss"],
            **_of_areas(both, labels, right, groups, resamples),
            "auc_ci": bootstrap_pairs_auc_ci(chosen, rejected, resamples, groups),
            "guessing": {"loss": float(np.log(2)), "accuracy": 0.5},
            "calibration": label_calibration(both, labels),
            "by_length": accuracy_by(_longer(rows), right),
            "pairwise_accuracy": float(np.mean(pairwise_right(chosen, rejected))),
        }


KINDS: dict[str, Kind] = {"pairs": Pairs(), "labels": Labels(), "pairs-as-labels": PairsAsLabels()}


def _quick_of_labels(scores: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    loss, figures = logistic(*(jnp.asarray(x, jnp.float32) for x in (scores, labels)), weight=jnp.asarray(weight, jnp.float32))
    values = {"loss": float(loss)} | {name: float(value) for name, value in figures.items()}
    return values | {"auc": area_under_curve(scores, labels)}


def _of_areas(scores: np.ndarray, labels: np.ndarray, right: np.ndarray, groups: Groups, resamples: int) -> dict[str, Any]:
    """What models of labels have in common; `right` and `groups` are of what is drawn: of rows, or of pairs whose sides are the rows."""
    return {
        "accuracy": float(np.mean(right)),
        "ci": bootstrap_ci(right, resamples, groups),
        "auc": area_under_curve(scores, labels),
        "rows": len(labels),
        "groups": len(members(len(right), groups)),
        "positive_share": float(np.mean(labels)),
    }


def _right_side(scores: np.ndarray | float, labels: np.ndarray) -> np.ndarray:
    """1 where a score is on its label's side of 0, 0.5 at 0."""
    return pairwise_right(scores * (2 * labels - 1), np.zeros(len(labels)))


def _longer(rows: Sequence[PreferenceExample]) -> np.ndarray:
    """By how many tokens the chosen side of each pair is the longer one."""
    return np.array([len(pair.chosen) - len(pair.rejected) for pair in rows])


def pair_scores(
    decoder: Decoder, role: Role, backbone: PyTree, batch: PreferenceBatch, dropout_key: jax.Array | None = None
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Scores of both sides of all pairs, as `pair_hidden` reads them."""
    chosen, rejected = apply_head(role.head, pair_hidden(decoder, role, backbone, batch, dropout_key))
    return chosen, rejected


def pair_hidden(
    decoder: Decoder, role: Role, backbone: PyTree, batch: PreferenceBatch, dropout_key: jax.Array | None = None
) -> Float[Array, "2 B D"]:
    """What a head reads of both sides of all pairs, in one pass, and what they share computed once, where the batch has it once; pictures
    always are.

    Adapters then drop out once for both sides in what they share, in place of twice.
    """
    prompt, features = _seen(decoder, role, backbone, batch, dropout_key)
    given = (batch.tokens, batch.mask, batch.last, batch.ends, prompt)
    tokens, mask, last, ends, prompt = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), given)
    features = None if features is None else jnp.repeat(features, batch.tokens.shape[1], axis=0)
    hidden = hidden_at(decoder, backbone, role, tokens, mask, last, ends, dropout_key is None, dropout_key, prompt, features)
    return jnp.moveaxis(hidden.reshape(-1, 2, hidden.shape[-1]), 1, 0)


def label_scores(
    decoder: Decoder, role: Role, backbone: PyTree, batch: LabelBatch, dropout_key: jax.Array | None = None
) -> Float[Array, " B"]:
    """The logit of each response."""
    return apply_head(role.head, label_hidden(decoder, role, backbone, batch, dropout_key))


def label_hidden(
    decoder: Decoder, role: Role, backbone: PyTree, batch: LabelBatch, dropout_key: jax.Array | None = None
) -> Float[Array, "B D"]:
    """What a head reads of each response."""
    prompt, features = _seen(decoder, role, backbone, batch, dropout_key)
    rows = (batch.tokens, batch.mask, batch.last, batch.ends)
    hidden = hidden_at(decoder, backbone, role, *rows, dropout_key is None, dropout_key, prompt, features)
    return hidden.reshape(-1, hidden.shape[-1])


def _seen(
    decoder: Decoder, role: Role, backbone: PyTree, batch: PreferenceBatch | LabelBatch, dropout_key: jax.Array | None
) -> tuple[Array | None, Array | None]:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return batch.prompt_mask, features_of(decoder, role.variables(backbone), batch.images, dropout_key is None, rngs)


_score_pairs = jax.jit(pair_scores, static_argnums=0)
_score_labels = jax.jit(label_scores, static_argnums=0)
_hidden_of_pairs = jax.jit(pair_hidden, static_argnums=0)
_hidden_of_labels = jax.jit(label_hidden, static_argnums=0)


def _read(read: Any, context: Context, role: Role, batches: Batched) -> tuple[np.ndarray, ...]:
    """What is read of each row, in the rows' order."""
    parts: list[list[np.ndarray]] = []
    order: list[int] = []
    for batch, numbers in batches:
        there = np.asarray(batch.weight).reshape(-1) > 0
        parts.append([np.asarray(x)[there] for x in fetch(read(context.decoder, role, context.backbone, context.rows(batch)))])
        order += numbers
    places = np.argsort(order)
    return tuple(np.concatenate(column)[places] for column in zip(*parts, strict=True))


def _groups(rows: Sequence[PreferenceExample | LabelExample]) -> Groups:
    return [row.group for row in rows]


def _labels(rows: Sequence[LabelExample]) -> np.ndarray:
    return np.asarray([row.label for row in rows])
