"""The soft accuracy of VQA, as its official evaluation computes it (Antol et al. 2015; the code of release 2.0, "Fixed processing
answers bug"), usable as a reward, as a judge and for evaluation: `pe_rlhf_jax.data.vqa_accuracy:soft_accuracy`.

An answer is right by a third for each annotator who gave it, at most wholly; that is averaged over the ten sets of nine annotators. Where
the annotators are not of one mind, answers are compared without punctuation and articles, lower-cased, numbers as digits and contractions
with their apostrophes. Where they are, the answer must equal theirs as it stands: that is what the official code does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        (("none", "zero"), ("one",), ("two",), ("three",), ("four",), ("five",), ("six",), ("seven",), ("eight",), ("nine",), ("ten",))
    )
    for word in words
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official code passes re.UNICODE, which is 32, where `re.sub` takes the number of replacements.
_PERIODS = 32

_WITHOUT_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am
    mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd
    someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
    wouldn't y'all you'd you'll you're you've
"""
_WITHOUT_ONE = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've
    we'd've who'd've wouldn't've y'all'll you'd've
"""
"""Of these, either apostrophe may be missing."""


def _contractions() -> dict[str, str]:
    known = {word.replace("'", ""): word for word in _WITHOUT_APOSTROPHE.split()}
    for word in _WITHOUT_ONE.split():
        first, second, third = word.split("'")
        known |= {f"{first}{second}'{third}": word, f"{first}'{second}{third}": word}
    known |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    known |= {"ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
    return known | {"somebody'd": "somebodyd"}  # the other way round, as published


CONTRACTIONS = _contractions()
"""As written -> with its apostrophes. Those of the official table that begin with a capital letter never meet a lower-cased word."""


def soft_accuracy(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """The accuracy of each completion, from 0 to 1.

    Args:
        columns: `answers` holds the annotators' answers to each question, as in rows of the format `vqa`.

    Raises:
        ValueError: there are no `answers`.
    """
    if "answers" not in columns:
        raise ValueError(f"soft_accuracy needs the column `answers` of data.prompts, found {', '.join(columns) or 'none'}")
    return [accuracy(completion, answers) for completion, answers in zip(completions, columns["answers"], strict=True)]


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """The share of sets of all annotators but one in which the answer is right, by thirds."""
    if not answers:
        raise ValueError("expected the annotators' answers, found none")
    answer, answers = _plain(answer), [_plain(given) for given in answers]
    if len(set(answers)) > 1:
        answer, answers = normalise(answer), [normalise(given) for given in answers]
    same = [given == answer for given in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def normalise(answer: str) -> str:
    """What is compared of an answer where the annotators differ."""
    return _words(_without_punctuation(_plain(answer)))


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Punctuation beside a space, and any where a number has a comma, goes; elsewhere it becomes a space."""
    joined = _COMMA_IN_NUMBER.search(text) is not None
    found = text
    for mark in _PUNCTUATION:
        found = found.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", found, count=_PERIODS)


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
