"""Figures of an evaluation, with their uncertainty. Plain NumPy, deterministic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def bootstrap_ci(values: np.ndarray, resamples: int, seed: int = 0) -> list[float]:
    """95% percentile bootstrap interval of the mean (Efron 1979)."""
    generator = np.random.default_rng(seed)
    values = np.asarray(values, np.float64)
    means = [float(np.mean(generator.choice(values, len(values)))) for _ in range(resamples)]
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]


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


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in which the positive row scores higher, ties counting half
    (Mann and Whitney 1947). 0.5 where a class is missing.
    """
    labels = np.asarray(labels) == 1
    positives, negatives = int(np.sum(labels)), int(np.sum(~labels))
    if not positives or not negatives:
        return 0.5
    _, place, counts = np.unique(np.asarray(scores, np.float64), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of ties the middle one
    return float((np.sum(ranks[labels]) - positives * (positives + 1) / 2) / (positives * negatives))


def bootstrap_auc_ci(scores: np.ndarray, labels: np.ndarray, resamples: int) -> list[float]:
    """95% percentile bootstrap interval of `area_under_curve`; classes are resampled apart, so that neither goes missing."""
    labels = np.asarray(labels) == 1
    groups = [group for group in (np.flatnonzero(labels), np.flatnonzero(~labels)) if len(group)]

    def draw(generator: np.random.Generator) -> np.ndarray:
        return np.concatenate([generator.choice(group, len(group)) for group in groups])

    return _auc_interval(scores, labels, resamples, draw)


def bootstrap_pairs_auc_ci(chosen: np.ndarray, rejected: np.ndarray, resamples: int) -> list[float]:
    """The same of both sides of pairs, labelled 1 and 0; pairs are resampled, because their sides go together."""
    count = len(chosen)

    def draw(generator: np.random.Generator) -> np.ndarray:
        pairs = generator.choice(count, count)
        return np.concatenate([pairs, count + pairs])

    return _auc_interval(np.concatenate([chosen, rejected]), np.repeat([1, 0], count), resamples, draw)


def _auc_interval(scores: np.ndarray, labels: np.ndarray, resamples: int, draw: Callable[[np.random.Generator], np.ndarray]) -> list[float]:
    generator = np.random.default_rng(0)
    areas = [area_under_curve(scores[rows], labels[rows]) for rows in (draw(generator) for _ in range(resamples))]
    return [float(bound) for bound in np.quantile(areas, [0.025, 0.975])]


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
