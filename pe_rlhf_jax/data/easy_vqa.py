"""`easy-vqa`, a data set of questions about pictures: 5,000 of them, 48,248 questions, 13 answers, with its official split.

The pictures are drawn, not photographed: each is 64 x 64 pixels with one coloured shape on a light ground (Victor Zhou, 2019; MIT licence).
They come out of the wheel of the package easy-vqa; nothing of it is run.

SFT, preferences and labels come from the training pictures alone, with `data.validation_share` of the pictures held out. They learn from
as many yes/no questions as others: three of four are such, most of which the question alone answers, and a fresh projector learned to show
colours and shapes far sooner from the others. Prompts are trained on the training questions; their validation rows are the official test
split, which nothing else sees.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pe_rlhf_jax import package
from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data import images
from pe_rlhf_jax.data.formats import Kind, Text, TextRow
from pe_rlhf_jax.data.sources import DataError, hash_share
from pe_rlhf_jax.data.turns import PLACEHOLDER, Vision

PACKAGE = "easy-vqa==1.0"
# The wheel's identity: with other questions, figures of this data set would mean something else.
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"

KINDS_OF_ANSWER = (
    ("yes", "no"),
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)
"""Wrong answers are of the kind of the right one."""

Halves = tuple[list[TextRow], list[TextRow]]


@dataclass(frozen=True)
class Question:
    """A question about one picture."""

    place: str
    text: str
    answer: str
    image: str
    """The picture's file in the package."""


@dataclass(frozen=True)
class DataSet:
    """Questions of both splits, and the pictures' files."""

    train: tuple[Question, ...]
    test: tuple[Question, ...]
    files: dict[str, bytes]


def rows(config: DataConfig, kind: Kind, vision: Vision | None) -> Halves:
    """Training and held-out rows of one kind; see above for what is held out.

    Raises:
        DataError: the model takes no pictures.
        PackageError: the package cannot be fetched, or is another one.
    """
    if vision is None:
        raise DataError("data.source: easy-vqa has pictures, but this model takes none; choose a model that does, or another source")
    data = _read()
    if kind == "prompts":
        return [_row(data, kind, question) for question in data.train], [_row(data, kind, question) for question in data.test]
    halves: tuple[list[Question], list[Question]] = ([], [])
    for question in data.train:
        halves[hash_share(question.image) < config.validation_share].append(question)
    train, held_out = halves

    def written(questions: Sequence[Question]) -> list[TextRow]:
        if kind != "label":
            return [_row(data, kind, question) for question in questions]
        both = (((question.answer, 1.0), (wrong(question), 0.0)) for question in questions)
        return [_row(data, kind, q, answer, label) for q, answers in zip(questions, both, strict=True) for answer, label in answers]

    return written(_balanced(train)), written(held_out)


def _balanced(questions: Sequence[Question]) -> list[Question]:
    """As many yes/no questions as others, drawn by their hash, in the same order."""
    closed = sorted((q for q in questions if q.answer in KINDS_OF_ANSWER[0]), key=lambda q: hash_share(q.place))
    left_out = {q.place for q in closed[len(questions) - len(closed) :]}
    return [q for q in questions if q.place not in left_out]


def answer_accuracy(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """1 for a completion that is the right answer, else 0; a reward and a judge. `answer` is the column of the right answers."""
    if "answer" not in columns:
        raise ValueError(f"answer_accuracy needs the column `answer` of data.prompts, found {', '.join(columns) or 'none'}")
    return [
        float(completion.strip().rstrip(".").lower() == answer) for completion, answer in zip(completions, columns["answer"], strict=True)
    ]


def wrong(question: Question) -> str:
    """Another answer of the same kind, drawn by the question."""
    kind = next(kind for kind in KINDS_OF_ANSWER if question.answer in kind)
    return random.Random(question.place).choice([answer for answer in kind if answer != question.answer])


def questions() -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The questions of the official training and test splits."""
    data = _read()
    return data.train, data.test


def _row(data: DataSet, kind: Kind, question: Question, answer: str | None = None, label: float = 0.0) -> TextRow:
    # Behind the question: the pictures before it, a fresh projector had learned nothing after 3,200 questions.
    prompt = f"Question: {question.text}\n{PLACEHOLDER}\nAnswer:"
    if kind == "prompts":
        responses = [""]
    elif kind == "preference":
        responses = [f" {question.answer}", f" {wrong(question)}"]
    else:
        responses = [f" {answer or question.answer}"]
    picture = images.find(data.files[question.image], None, question.image)
    columns = {"answer": question.answer, "question": question.text} if kind == "prompts" else {}
    return TextRow(question.place, tuple(Text(prompt, r) for r in responses), label=label, columns=columns, pictures=(picture,))


@functools.cache
def _read() -> DataSet:
    archive = package.fetch_package(PACKAGE)
    if (found := package.sha256_of(archive)) != SHA256:
        raise package.PackageError(f"{archive}: expected SHA-256 {SHA256}, found {found}: delete it and run again")
    files = package.read_members(archive, "easy_vqa/data/*")
    return parse(files)


def parse(files: dict[str, bytes]) -> DataSet:
    """The data set out of the files of the package; `questions.json` is a list of question, answer, number of the picture."""
    splits = []
    for split in ("train", "test"):
        listed = json.loads(files[f"easy_vqa/data/{split}/questions.json"])
        splits.append(
            tuple(
                Question(f"easy-vqa:{split}:{number}", text, answer, f"easy_vqa/data/{split}/images/{image}.png")
                for number, (text, answer, image) in enumerate(listed, start=1)
            )
        )
    train, test = splits
    return DataSet(train, test, {name: content for name, content in files.items() if name.endswith(".png")})
