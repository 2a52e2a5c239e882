"""TF-IDF + logistic regression on the reward model's own training rows: the baseline that a reward model must beat.

    pip install scikit-learn
    python benchmarks/tfidf_baseline.py --config configs/quickstart.yaml [--set data.train_pairs=640]

For data without pictures. Pairs (`data.preference` or a named source): a text is scored by a linear function of its TF-IDF features, a pair
by the difference of its two scores: the Bradley-Terry model with linear rewards. Each pair is given in both orders, so there is no
intercept. Labels (`data.label`): logistic regression on the features of prompt and response together. Words or words and pairs of words,
and the strength of the penalty, are chosen by cross-validation on the training rows alone; for labels in folds of neighbouring rows,
because rows of one conversation usually stand together.

Prints one JSON line for each kind: accuracy on the held-out rows, for labels the area under the ROC curve first (chance is 0.5, whatever
the share of good rows), each with a 95% bootstrap interval over rows, or over groups where rows are not independent: those of
`data.group_by`, such as conversations, or else of one prompt. `most_common` is the accuracy of always answering what is more frequent in
training. Training and held-out rows are exactly those of `pe-rlhf`, length limits included (at most `evaluate.pairs`
held-out ones).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import data
from pe_rlhf_jax.checkpoint import source
from pe_rlhf_jax.training.statistics import Groups, members

NGRAMS = ((1, 1), (1, 2))
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
FOLDS = 5

Pairs = list[tuple[str, str]]
"""Better and worse text."""
Labels = list[tuple[str, float]]
"""Text and label."""


class PairScorer:
    """Scores texts after learning from pairs (better, worse)."""

    folds = KFold(FOLDS, shuffle=True, random_state=0)

    def __init__(self, pairs: Pairs, ngrams: tuple[int, int], c: float):
        self.features = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True)
        self.features.fit(dict.fromkeys(text for pair in pairs for text in pair))
        difference = self._difference(pairs)
        labels = np.repeat([1, 0], len(pairs))
        self.model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000)
        self.model.fit(sparse.vstack([difference, -difference]), labels)

    def __call__(self, pairs: Pairs) -> np.ndarray:
        """How much higher the better text scores."""
        return self.model.decision_function(self._difference(pairs))

    def _difference(self, pairs: Pairs):
        better, worse = zip(*pairs, strict=True)
        return self.features.transform(better) - self.features.transform(worse)


class LabelScorer:
    """Scores texts after learning from texts with labels."""

    folds = KFold(FOLDS)

    def __init__(self, rows: Labels, ngrams: tuple[int, int], c: float):
        texts, labels = zip(*rows, strict=True)
        self.features = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True)
        self.model = LogisticRegression(C=c, max_iter=1000)
        self.model.fit(self.features.fit_transform(texts), labels)

    def __call__(self, rows: Labels) -> np.ndarray:
        """Log-odds of each row's label being 1."""
        return self.model.decision_function(self.features.transform([text for text, _ in rows]))


def pair_accuracy(scores: np.ndarray, rows: np.ndarray) -> float:
    """Share of pairs whose better text scores higher; half of those with equal scores."""
    return float((np.sign(scores) + 1).mean() / 2)


def label_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(roc_auc_score(labels, scores)) if len(set(labels)) > 1 else np.nan


def label_accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(((scores > 0) == (labels > 0.5)).mean())


Metric = Callable[[np.ndarray, np.ndarray], float]


def choose(
    scorer: type[PairScorer] | type[LabelScorer], rows: Sequence, labels: np.ndarray, metric: Metric
) -> tuple[tuple[int, int], float, float]:
    """N-grams and C with the best cross-validated metric on the training rows, and that metric."""
    folds = list(scorer.folds.split(rows))

    def validated(ngrams: tuple[int, int], c: float) -> float:
        scores = [scorer([rows[i] for i in fit], ngrams, c)([rows[i] for i in test]) for fit, test in folds]
        return metric(np.concatenate(scores), labels)

    results = {setting: validated(*setting) for setting in itertools.product(NGRAMS, PENALTIES)}
    best = max(results, key=results.__getitem__)
    return *best, results[best]


def measure(
    scorer: type[PairScorer] | type[LabelScorer],
    train: Sequence,
    held_out: Sequence,
    groups: Groups,
    metrics: dict[str, Metric],
    bootstrap: int,
) -> dict:
    """The held-out figures of the best setting; the first metric chooses it."""
    labels, held_out_labels = (np.array([row[1] if isinstance(row[1], float) else 1.0 for row in rows]) for rows in (train, held_out))
    ngrams, c, cross_validated = choose(scorer, train, labels, next(iter(metrics.values())))
    scores = scorer(train, ngrams, c)(held_out)
    whole = members(len(held_out), groups)
    drawn = np.random.default_rng(0).integers(len(whole), size=(bootstrap, len(whole)))
    picks = [np.concatenate([whole[group] for group in pick]) for pick in drawn]
    figures: dict = {}
    for name, metric in metrics.items():
        resampled = [metric(scores[pick], held_out_labels[pick]) for pick in picks]
        figures[name] = round(metric(scores, held_out_labels), 4)
        figures[f"{name}_ci"] = [round(float(x), 4) for x in np.nanquantile(resampled, [0.025, 0.975])]
    if scorer is LabelScorer:
        figures["most_common"] = round(float((held_out_labels == (labels.mean() > 0.5)).mean()), 4)
    first = next(iter(metrics))
    sizes = {"train_rows": len(train), "held_out_rows": len(held_out)}
    sizes |= {"held_out_groups": len(whole)} if len(whole) < len(held_out) else {}
    return figures | sizes | {"ngrams": ngrams, "c": c, f"cross_validated_{first}": round(cross_validated, 4)}


def results(config: configuration.Config) -> Iterator[dict]:
    """One result for each kind of judged data that the configuration has."""
    # Read through the model's tokenizer and back: the same rows are too long, and no text is seen that the reward model does not see.
    tokenizer = source.resolve(config.model).tokenizer

    def decode(rows: Sequence[np.ndarray]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    def pairs(examples: Sequence[data.PreferenceExample]) -> Pairs:
        return list(zip(decode([e.chosen for e in examples]), decode([e.rejected for e in examples]), strict=True))

    def labels(examples: Sequence[data.LabelExample]) -> Labels:
        return list(zip(decode([e.tokens for e in examples]), [e.label for e in examples], strict=True))

    evaluate = config.evaluate
    if config.data.preference or config.data.source:
        split = data.load(config.data, tokenizer, needs={"preference"}).preference
        assert split is not None
        held_out = split.validation[: evaluate.pairs]
        rows = pairs(split.train), pairs(held_out), [pair.group for pair in held_out]
        yield {"kind": "preference"} | measure(PairScorer, *rows, {"accuracy": pair_accuracy}, evaluate.bootstrap)
    if config.data.label:
        split = data.load(config.data, tokenizer, needs={"label"}).label
        assert split is not None
        held_out = split.validation[: evaluate.pairs]
        labeled = labels(split.train), labels(held_out), [row.group for row in held_out]
        yield {"kind": "label"} | measure(LabelScorer, *labeled, {"auc": label_auc, "accuracy": label_accuracy}, evaluate.bootstrap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    arguments = parser.parse_args()
    config = configuration.load(arguments.config, arguments.overrides)
    if not (config.data.preference or config.data.label or config.data.source):
        raise SystemExit(f"{arguments.config}: expected data.preference, data.label or data.source, found none of them")
    for result in results(config):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
