"""A head fitted to hidden states of a model that stays as it is: logistic regression, before anything else is trained.

What the hidden states of all texts have in common is most of them: it reaches every score alike, and steps of a head that starts at 0
follow it for long. A head that already reads what the model knows gives the layers better gradients (linear probing, then fine-tuning:
Kumar et al. 2022, arXiv 2202.10054).

Letters: N rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float

from pe_rlhf_jax.training.statistics import area_under_curve, class_weights
from pe_rlhf_jax.types import PyTree

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Of half the squared weights on standardised hidden states, beside the mean loss."""
CERTAIN = 1e-3
"""The same for the size of scores, which would have no end where they are all right."""
FOLDS = 5


def linear_probe(hidden: Float[np.ndarray, "N D"], labels: Float[np.ndarray, " N"] | None, groups: Sequence[str], balanced: bool) -> PyTree:
    """The head whose scores tell labels 1 from 0, or, without labels, make differences of hidden states positive; as `models.heads` has it.

    Each number of a hidden state is standardised for the fit. The penalty is that whose scores of held-out fifths of the groups rank best:
    the mean area under the curve, or the share of differences that are positive. A head that ranks well may be much too sure of itself, so
    scores are then brought to the size, and with labels moved to the place, at which their loss on those fifths is least (Platt 1999).

    Args:
        groups: of each row; those of one group are held out together, unless it alone has one of the labels.
        balanced: each class weighs half.
    """
    hidden = np.asarray(hidden, np.float64)
    if not np.any(hidden - (0 if labels is None else hidden[0])):
        return {"kernel": np.zeros((hidden.shape[1], 1), np.float32), "bias": np.zeros(1, np.float32)}
    mean = np.zeros(hidden.shape[1]) if labels is None else hidden.mean(axis=0)
    scale = np.sqrt(np.mean((hidden - mean) ** 2, axis=0))
    scale[scale < 1e-6 * scale.max()] = np.inf  # what never changes tells nothing
    x, y = (hidden - mean) / scale, np.ones(len(hidden)) if labels is None else np.asarray(labels, np.float64)
    weight = class_weights(y, float(np.mean(y))) if balanced else np.ones(len(y))
    fold, labelled = _folds(groups, y), labels is not None
    held_out = [_held_out(x, y, weight, fold, penalty, labelled) for penalty in PENALTIES]
    best = int(np.argmax([_ranked(scores, y, fold, labelled) for scores in held_out]))
    found, bias = _fit(x, y, weight, PENALTIES[best], labelled)
    spread = float(np.sqrt(np.mean(held_out[best] ** 2)))
    [size], moved = _fit(held_out[best][:, None] / spread, y, weight, CERTAIN, labelled)
    size = max(size / spread, 0.0)
    kernel, bias = size * found / scale, size * bias + moved
    return {"kernel": kernel[:, None].astype(np.float32), "bias": np.array([bias - mean @ kernel], np.float32)}


def _folds(groups: Sequence[str], y: np.ndarray) -> np.ndarray:
    """A fold of each row, the same for a group's, with about as many groups of each share of labels in each. The rows of a group that alone
    has one of the labels, or is the only one, are apart, so that no head is without that label.
    """
    has = [{group for group, label in zip(groups, y, strict=True) if label == value} for value in np.unique(y)]
    apart = set().union(*(found for found in has if len(found) == 1))
    groups = [f"{group} {i}" if group in apart else group for i, group in enumerate(groups)]
    names, number = np.unique(groups, return_inverse=True)
    share = np.bincount(number, y) / np.bincount(number)
    shuffled = np.random.default_rng(0).permutation(len(names))
    dealt = shuffled[np.argsort(share[shuffled], kind="stable")]  # groups of like shares of labels go to one fold each
    place = np.empty(len(names), int)
    place[dealt] = np.arange(len(names)) % FOLDS
    return place[number]


def _held_out(x: np.ndarray, y: np.ndarray, weight: np.ndarray, fold: np.ndarray, penalty: float, labelled: bool) -> np.ndarray:
    """Scores of all rows, each by a head that has not seen its fold."""
    scores = np.zeros(len(x))
    for part in np.unique(fold):
        out = fold == part
        kernel, bias = _fit(x[~out], y[~out], weight[~out], penalty, labelled)
        scores[out] = x[out] @ kernel + bias
    return scores


def _ranked(scores: np.ndarray, y: np.ndarray, fold: np.ndarray, labelled: bool) -> float:
    """How well they rank within the folds, each of which has a head of its own."""
    if not labelled:
        return float(np.mean(scores > 0))
    parts = [fold == part for part in np.unique(fold)]
    areas = [area_under_curve(scores[part], y[part]) for part in parts if len(np.unique(y[part])) > 1]
    return float(np.mean(areas)) if areas else 0.0


def _loss(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.logaddexp(0, np.where(y == 1, -scores, scores)))


def _fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, penalty: float, intercept: bool) -> tuple[np.ndarray, float]:
    weight = weight / weight.sum()

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, bias = parameters[:-1], parameters[-1] * intercept
        scores = x @ kernel + bias
        wrong = weight * (scipy.special.expit(scores) - y)
        value = weight @ _loss(scores, y) + penalty / 2 * kernel @ kernel
        return float(value), np.append(x.T @ wrong + penalty * kernel, wrong.sum() * intercept)

    found = scipy.optimize.minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return found.x[:-1], float(found.x[-1] * intercept)
