"""Figures of an evaluation, with their uncertainty. Plain NumPy, deterministic."""

from __future__ import annotations

from collections.abc import Sequence
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


def accuracy_by_margin(chosen: np.ndarray, rejected: np.ndarray, margin: np.ndarray, bins: int = 4) -> list[dict[str, Any]]:
    """Pairwise accuracy in bins of equal count by how far apart people rated the two sides; empty if no pair has a margin."""
    margin = np.asarray(margin, np.float64)
    if not np.any(margin):
        return []
    right = _right(np.asarray(chosen) - np.asarray(rejected))
    parts = np.array_split(np.argsort(margin, kind="stable"), bins)
    return [
        {
            "low": float(margin[i].min()),
            "high": float(margin[i].max()),
            "accuracy": float(np.mean(right[i])),
            "count": len(i),
        }
        for i in parts
        if len(i)
    ]


def pairwise_right(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """1 where the chosen side scores higher, 0.5 at a tie, 0 otherwise."""
    return _right(np.asarray(chosen) - np.asarray(rejected))


def _right(difference: np.ndarray) -> np.ndarray:
    return (np.sign(difference) + 1) / 2
