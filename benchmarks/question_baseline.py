"""What can be answered without looking: the most common answer to each question of easy-vqa, learned from its training split.

    python benchmarks/question_baseline.py

For every wording of a question the answer that the training split gives most often, or for a wording that is not there the
most common answer of all. No model that sees the question alone does better on questions like these, unless by chance. Prints
one JSON line: accuracy on the official test split with a 95% bootstrap interval over pictures (questions about one picture go
together), the same for questions that are answered yes or no and for others, and the share of test questions whose wording is
in the training split.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from pe_rlhf_jax.data import easy_vqa
from pe_rlhf_jax.data.easy_vqa import Question


def answers(train: Sequence[Question], test: Sequence[Question]) -> list[str]:
    """The most common answer of the training split to each test question; of equally common ones, the first by the alphabet."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question.text][question.answer] += 1
        counts[""][question.answer] += 1

    def common(text: str) -> str:
        found = counts[text] if text in counts else counts[""]
        return min(found, key=lambda answer: (-found[answer], answer))

    return [common(question.text) for question in test]


def interval(right: np.ndarray, pictures: Sequence[str], resamples: int = 2000) -> list[float]:
    """95% bootstrap interval of the mean over groups of questions about one picture."""
    _, group = np.unique(np.asarray(pictures), return_inverse=True)
    total, count = np.bincount(group, weights=right), np.bincount(group)
    drawn = np.random.default_rng(0).integers(0, len(count), (resamples, len(count)))
    return [float(x) for x in np.percentile(total[drawn].sum(1) / count[drawn].sum(1), [2.5, 97.5])]


def measure(train: Sequence[Question], test: Sequence[Question]) -> dict[str, object]:
    """The figures that are printed."""
    right = np.array([given == question.answer for given, question in zip(answers(train, test), test, strict=True)], float)
    known = {question.text for question in train}
    yes_no = np.array([question.answer in easy_vqa.KINDS_OF_ANSWER[0] for question in test])
    figures: dict[str, object] = {"questions": len(test), "seen_wording": float(np.mean([q.text in known for q in test]))}
    for name, chosen in (("all", np.ones_like(yes_no)), ("yes_no", yes_no), ("other", ~yes_no)):
        pictures = [question.image for question, take in zip(test, chosen, strict=True) if take]
        figures[name] = {"accuracy": float(right[chosen].mean()), "interval": interval(right[chosen], pictures)}
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(*easy_vqa.questions())))
