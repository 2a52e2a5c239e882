"""Figures of an evaluation, with their uncertainty. Plain NumPy, deterministic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Groups = Sequence[str | None]
"""The group of each row (or pair): rows of a group are not independent of each other. A row whose group is None stands alone."""


def bootstrap_ci(values: np.ndarray, resamples: int, groups: Groups | None = None) -> list[float]:
    """95% percentile bootstrap interval of the mean (Efron 1979); with groups, whole ones are drawn (Davison and Hinkley 1997, 3.8)."""
    values = np.asarray(values, np.float64)
    return _interval([float(np.mean(values[rows])) for rows in _resampled(members(len(values), groups), resamples)])


def members(count: int, groups: Groups | None) -> list[np.ndarray]:
    """The rows of each group, by first row. Where all rows are of one group, each stands alone: what is drawn then tells of that group
    only, but a single group tells nothing of others.
    """
    found: dict[str | int, list[int]] = {}
    for row, group in enumerate([None] * count if groups is None else groups):
        found.setdefault(row if group is None else group, []).append(row)
    return [np.array(rows) for rows in (found.values() if len(found) > 1 else [[row] for row in range(count)])]


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Share of n-grams that are different ones, over all sequences together (Li et al. 2016)."""
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def calibration(chosen: np.ndarray, rejected: np.ndarray, bins: int = 5) -> list[dict[str, Any]]:
    """Predicted against observed preference: pairs sorted by sigmoid(|score difference|) into bins of equal count."""
    difference = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    return [
        {"predicted": float(np.mean(confidence[i])), "observed": float(np.mean(_right(difference[i]))), "count": len(i)}
        for i in parts
        if len(i)
    ]


def label_calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 5) -> list[dict[str, Any]]:
    """Predicted against observed share of positive rows: rows sorted by sigmoid(logit) into bins of equal count."""
    predicted = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    parts = np.array_split(np.argsort(predicted, kind="stable"), bins)
    return [{"predicted": float(np.mean(predicted[i])), "observed": float(np.mean(labels[i])), "count": len(i)} for i in parts if len(i)]


def class_weights(labels: np.ndarray, share: float) -> np.ndarray:
    """Weights of rows labelled 1 or 0 by which each class weighs half, where `share` of all rows are 1."""
    return np.where(labels == 1, 0.5 / share, 0.5 / (1 - share))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in which the positive row scores higher, ties counting half
    (Mann and Whitney 1947). 0.5 where a class is missing, NaN where a score is.
    """
    labels = np.asarray(labels) == 1
    if np.any(np.isnan(scores)):
        return float("nan")
    positives, negatives = int(np.sum(labels)), int(np.sum(~labels))
    if not positives or not negatives:
        return 0.5
    _, place, counts = np.unique(np.asarray(scores, np.float64), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of ties the middle one
    return float((np.sum(ranks[labels]) - positives * (positives + 1) / 2) / (positives * negatives))


def bootstrap_auc_ci(scores: np.ndarray, labels: np.ndarray, resamples: int, groups: Groups | None = None) -> list[float]:
    """95% percentile bootstrap interval of `area_under_curve`; rows or groups are drawn as for `bootstrap_ci`.

    Groups of positive rows, of negative ones and of both are drawn apart, so that no class goes missing.
    """
    labels = np.asarray(labels) == 1
    whole = members(len(labels), groups)
    share = np.array([np.mean(labels[rows]) for rows in whole])
    strata = [np.flatnonzero(share == 1), np.flatnonzero(share == 0), np.flatnonzero((share > 0) & (share < 1))]
    drawn = _resampled(whole, resamples, [stratum for stratum in strata if len(stratum)])
    return _interval([area_under_curve(scores[rows], labels[rows]) for rows in drawn])


def bootstrap_pairs_auc_ci(chosen: np.ndarray, rejected: np.ndarray, resamples: int, groups: Groups | None = None) -> list[float]:
    """The same of both sides of pairs, labelled 1 and 0; pairs are drawn, because their sides go together, or groups of pairs."""
    count = len(chosen)
    scores, labels = np.concatenate([chosen, rejected]), np.repeat([1, 0], count)
    drawn = (np.concatenate([pairs, count + pairs]) for pairs in _resampled(members(count, groups), resamples))
    return _interval([area_under_curve(scores[rows], labels[rows]) for rows in drawn])


def _resampled(whole: list[np.ndarray], resamples: int, strata: Sequence[np.ndarray] | None = None) -> Iterator[np.ndarray]:
    """The rows of as many groups as there are, of each stratum as many as it has, drawn with replacement."""
    generator = np.random.default_rng(0)
    for _ in range(resamples):
        drawn = np.concatenate([generator.choice(stratum, len(stratum)) for stratum in strata or [np.arange(len(whole))]])
        yield np.concatenate([whole[group] for group in drawn])


def _interval(figures: Sequence[float]) -> list[float]:
    return [float(bound) for bound in np.quantile(figures, [0.025, 0.975])]


def accuracy_by(values: np.ndarray, right: np.ndarray, bins: int = 4) -> list[dict[str, Any]]:
    """Accuracy in bins of equal count by a value of each row, such as its margin or its length; `right` is 1, 0.5 or 0."""
    values = np.asarray(values, np.float64)
    parts = np.array_split(np.argsort(values, kind="stable"), bins)
    return [
        {"low": float(values[i].min()), "high": float(values[i].max()), "accuracy": float(np.mean(right[i])), "count": len(i)}
        for i in parts
        if len(i)
    ]


def pairwise_right(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """1 where the chosen side scores higher, 0.5 at a tie, 0 otherwise."""
    return _right(np.asarray(chosen) - np.asarray(rejected))


def _right(difference: np.ndarray) -> np.ndarray:
    return (np.sign(difference) + 1) / 2
