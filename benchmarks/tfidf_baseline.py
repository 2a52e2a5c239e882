"""TF-IDF + logistic regression on the reward model's own training pairs: the baseline that a reward model must beat.

    pip install scikit-learn
    python benchmarks/tfidf_baseline.py --config configs/quickstart.yaml [--set data.train_pairs=640]

A text is scored by a linear function of its TF-IDF features, a pair by the difference of its two scores: the Bradley-Terry model with
linear rewards. Each pair is given in both orders, so there is no intercept. Words or words and pairs of words, and the strength of the
penalty, are chosen by cross-validation on the training pairs alone. Prints one JSON line: accuracy on the held-out pairs, with a 95%
bootstrap interval over pairs. Training and held-out pairs are exactly those of `pe-rlhf`, length limits included (at most
`evaluate.pairs` held-out ones).
"""

from __future__ import annotations

import argparse
import itertools
import json

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import data
from pe_rlhf_jax.checkpoint import source

NGRAMS = ((1, 1), (1, 2))
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
FOLDS = 5

Pairs = list[tuple[str, str]]


class Scorer:
    """Scores texts after learning from pairs (better, worse)."""

    def __init__(self, pairs: Pairs, ngrams: tuple[int, int], c: float):
        self.features = TfidfVectorizer(ngram_range=ngrams, sublinear_tf=True)
        self.features.fit(dict.fromkeys(text for pair in pairs for text in pair))
        difference = self._difference(pairs)
        labels = np.repeat([1, 0], len(pairs))
        self.model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000)
        self.model.fit(sparse.vstack([difference, -difference]), labels)

    def correct(self, pairs: Pairs) -> np.ndarray:
        """1 where the better text has the higher score, 0.5 where both have the same."""
        return (np.sign(self.model.decision_function(self._difference(pairs))) + 1) / 2

    def _difference(self, pairs: Pairs):
        better, worse = zip(*pairs, strict=True)
        return self.features.transform(better) - self.features.transform(worse)


def choose(pairs: Pairs) -> tuple[tuple[int, int], float, float]:
    """N-grams and C with the best cross-validated accuracy on the training pairs, and that accuracy."""
    folds = list(KFold(FOLDS, shuffle=True, random_state=0).split(pairs))

    def accuracy(ngrams: tuple[int, int], c: float) -> float:
        correct = [Scorer([pairs[i] for i in fit], ngrams, c).correct([pairs[i] for i in test]) for fit, test in folds]
        return float(np.concatenate(correct).mean())

    results = {setting: accuracy(*setting) for setting in itertools.product(NGRAMS, PENALTIES)}
    best = max(results, key=results.__getitem__)
    return *best, results[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    arguments = parser.parse_args()
    config = configuration.load(arguments.config, arguments.overrides)

    # Read through the model's tokenizer and back: the same rows are too long, and no text is seen that the reward model does not see.
    tokenizer = source.resolve(config.model).tokenizer
    split = data.load(config.data, tokenizer, needs={"preference"}).preference
    assert split is not None

    def texts(examples) -> Pairs:
        sides = [tokens for example in examples for tokens in (example.chosen, example.rejected)]
        decoded = iter(tokenizer.batch_decode(sides, skip_special_tokens=True))
        return list(zip(decoded, decoded, strict=True))

    train, held_out = texts(split.train), texts(split.validation[: config.evaluate.pairs])
    ngrams, c, cross_validated = choose(train)
    correct = Scorer(train, ngrams, c).correct(held_out)
    resamples = np.random.default_rng(0).choice(correct, (config.evaluate.bootstrap, len(correct)))
    result = {
        "accuracy": round(float(correct.mean()), 4),
        "ci": [round(float(x), 4) for x in np.quantile(resamples.mean(axis=1), [0.025, 0.975])],
        "train_pairs": len(train),
        "held_out_pairs": len(held_out),
        "ngrams": ngrams,
        "c": c,
        "cross_validated_accuracy": round(cross_validated, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
