"""VQAv2 in its original files (Goyal et al. 2017, "Making the V in VQA Matter"): questions, annotations and COCO's images.

A source is FOLDER:SUBTYPE, such as `data/vqav2:val2014`. The folder holds

    v2_OpenEnded_mscoco_val2014_questions.json     v2_mscoco_val2014_annotations.json     val2014/COCO_val2014_000000262148.jpg
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pe_rlhf_jax.data.sources import BadRow, DataError, Row, Skipped
from pe_rlhf_jax.data.vqa_accuracy import accuracy

FORM = "FOLDER:SUBTYPE, such as data/vqav2:val2014"
ATTEMPTS = 50
"""Answers of other questions that are tried as wrong answer to a question."""

Values = dict[str, Any]


def read(source: str, skipped: Skipped) -> Iterator[Row]:
    """One row a question, in the order of the questions file: `question`, `image`, `answers` and what else the files say of it.

    `others` holds the right answers of all questions of the same answer type, from which `wrong` draws.

    Raises:
        DataError: a file is missing or not of this form; or a question has no annotation, and bad rows are not skipped.
    """
    folder, colon, subtype = source.rpartition(":")
    if not colon or not folder or not subtype:
        raise DataError(f"{source}: expected {FORM}")
    root = Path(folder).expanduser()
    questions_file = root / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
    annotations_file = root / f"v2_mscoco_{subtype}_annotations.json"
    questions = _list(questions_file, "questions")
    annotations = {value.get("question_id"): value for value in _list(annotations_file, "annotations") if isinstance(value, dict)}
    pools: dict[str, list[str]] = defaultdict(list)
    for annotation in annotations.values():
        if isinstance(annotation.get("multiple_choice_answer"), str):
            pools[str(annotation.get("answer_type"))].append(annotation["multiple_choice_answer"])
    for number, question in enumerate(questions, start=1):
        place = f"{questions_file}:{number}"
        try:
            values = _joined(question, annotations, annotations_file.name)
        except BadRow as problem:
            skipped.bad(place, str(problem))
            continue
        values["image"] = f"{subtype}/COCO_{subtype}_{values['image_id']:012d}.jpg"
        values["others"] = pools[values["answer_type"]]
        yield Row(values, place)


def sft(row: Values) -> list[Values]:
    """The question, and the answer that most annotators gave."""
    return [{**_question(row), "completion": f" {row['answer']}"}]


def label(row: Values) -> list[Values]:
    """The answer that most annotators gave, labelled 1, and another question's, labelled 0."""
    right, other = [{**_question(row), "completion": f" {row['answer']}", "label": 1}], wrong(row)
    return right + ([] if other is None else [{**_question(row), "completion": f" {other}", "label": 0}])


def preference(row: Values) -> list[Values]:
    """The same two answers as a pair; no row where there is no wrong answer."""
    other = wrong(row)
    return [] if other is None else [{**_question(row), "chosen": f" {row['answer']}", "rejected": f" {other}"}]


def prompts(row: Values) -> list[Values]:
    """The question; `answers` serves `pe_rlhf_jax.data.vqa_accuracy:soft_accuracy`."""
    return [{**_question(row), **{key: row[key] for key in ("question_id", "answers", "question_type", "answer_type")}}]


def wrong(row: Values) -> str | None:
    """An answer that is right for another question of the same answer type and for none of this one's annotators, drawn by the question's
    id; None where there is no such answer. As often as it is right elsewhere, so that answers alone do not tell right from wrong.
    """
    draw = random.Random(row["question_id"])
    for _ in range(ATTEMPTS):
        other = draw.choice(row["others"]).strip()
        if other and other != row["answer"] and other not in row["answers"] and accuracy(other, row["answers"]) == 0:
            return other
    return None


def _question(row: Values) -> Values:
    return {"prompt": f"Question: {row['question']}\nAnswer:", "image": row["image"]}


def _joined(question: Any, annotations: dict[Any, Values], file: str) -> Values:
    if not isinstance(question, dict):
        raise BadRow("expected an object with question_id, image_id and question, found another value")
    for key, kind, wanted in (("question_id", int, "a whole number"), ("image_id", int, "a whole number"), ("question", str, "text")):
        if not isinstance(question.get(key), kind):
            raise BadRow(f"expected `{key}` with {wanted}, found {question.get(key)!r}")
    annotation = annotations.get(question["question_id"])
    if annotation is None:
        raise BadRow(f"expected an annotation of question {question['question_id']} in {file}, found none")
    answers, answer = annotation.get("answers"), annotation.get("multiple_choice_answer")
    if not isinstance(answers, list) or not answers or not all(isinstance(given, str) for given in answers):
        raise BadRow(f"expected `answers` of question {question['question_id']} in {file}, each with `answer`, found others")
    if not isinstance(answer, str) or not answer.strip():
        raise BadRow(f"expected `multiple_choice_answer` of question {question['question_id']} in {file} with text, found {answer!r}")
    return {
        "question": question["question"].strip(),
        "question_id": question["question_id"],
        "image_id": question["image_id"],
        "answer": answer.strip(),
        "answers": answers,
        "question_type": annotation.get("question_type"),
        "answer_type": str(annotation.get("answer_type")),
    }


def _list(file: Path, key: str) -> list[Any]:
    try:
        with open(file, "rb") as opened:
            found = json.load(opened, object_hook=_answer)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file; expected the original files of VQAv2 (from {Path.cwd()})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected JSON, found what cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get(key), list):
        raise DataError(f"{file}: expected an object with a list `{key}`")
    return found[key]


def _answer(value: Values) -> Any:
    """An annotator's answer as its text alone: millions of them as objects would take gigabytes."""
    return value["answer"] if value.keys() == {"answer", "answer_confidence", "answer_id"} else value
