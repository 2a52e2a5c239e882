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

from pe_rlhf_jax.types import PyTree

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Of half the squared weights on standardised hidden states, beside the mean loss."""
FOLDS = 5


def linear_probe(hidden: Float[np.ndarray, "N D"], labels: Float[np.ndarray, " N"] | None, groups: Sequence[str], balanced: bool) -> PyTree:
    """The head whose scores tell labels 1 from 0, or, without labels, make differences of hidden states positive; as `models.heads` has it.

    Each number of a hidden state is standardised for the fit. The penalty is that with the least loss on held-out fifths of the groups.

    Args:
        groups: of each row; those of one group are held out together.
        balanced: each class weighs half.
    """
    hidden = np.asarray(hidden, np.float64)
    mean = np.zeros(hidden.shape[1]) if labels is None else hidden.mean(axis=0)
    scale = np.sqrt(np.mean((hidden - mean) ** 2, axis=0))
    scale[scale < 1e-6 * scale.max()] = np.inf  # what never changes tells nothing
    x, y = (hidden - mean) / scale, np.ones(len(hidden)) if labels is None else np.asarray(labels, np.float64)
    share = float(np.mean(y))
    weight = np.where(y == 1, 0.5 / share, 0.5 / max(1 - share, 1e-9)) if balanced else np.ones(len(y))
    fold = _folds(groups)
    losses = [sum(_held_out(x, y, weight, fold == part, penalty, labels is not None) for part in range(FOLDS)) for penalty in PENALTIES]
    found, bias = _fit(x, y, weight, PENALTIES[int(np.argmin(losses))], labels is not None)
    kernel = found / scale
    return {"kernel": kernel[:, None].astype(np.float32), "bias": np.array([bias - mean @ kernel], np.float32)}


def _folds(groups: Sequence[str]) -> np.ndarray:
    """A fold of each row, the same for a group's."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    shuffled = np.random.default_rng(0).permutation(len(number))
    return np.array([shuffled[number[group]] % FOLDS for group in groups])


def _held_out(x: np.ndarray, y: np.ndarray, weight: np.ndarray, out: np.ndarray, penalty: float, intercept: bool) -> float:
    """Loss on the rows that were left out."""
    if not np.any(out) or np.all(out):
        return 0.0
    kernel, bias = _fit(x[~out], y[~out], weight[~out], penalty, intercept)
    return float(weight[out] @ _loss(x[out] @ kernel + bias, y[out]))


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
