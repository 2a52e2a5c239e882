"""VQAv2: the accuracy as published, and rows from small files in the original format."""

import json

import pytest
from tiny_data import make_tokenizer
from tiny_images import encoded, pixels

from pe_rlhf_jax.config import DataConfig, FilesConfig
from pe_rlhf_jax.data import load, vqa
from pe_rlhf_jax.data.converters import convert
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.sources import DataError, Skipped
from pe_rlhf_jax.data.turns import Vision
from pe_rlhf_jax.data.vqa_accuracy import CONTRACTIONS, accuracy, normalise, soft_accuracy
from pe_rlhf_jax.image_prompt import ImagePrompt

# Each as the official code gives it; by hand from its rules.
NORMALISED = {
    "The Two dogs": "2 dogs",
    "none": "0",
    "a": "",
    "dont know": "don't know",
    "couldntve": "couldntve",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "yes.": "yes",
    "3.5": "3.5",
    "T.V.": "tv",
    "blue-green": "blue green",  # between letters punctuation becomes a space
    "blue - green": "blue green",
    "yes! it": "yes it",  # beside a space it goes
    "1,000": "1000",  # a comma between digits goes, and with it all punctuation
    "1,000-2": "10002",
    "x/y, z/w": "x y z w",
    " red\n": "red",
    "can't": "can't",
}


@pytest.mark.parametrize("answer", NORMALISED)
def test_answers_are_normalised_as_published(answer):
    assert normalise(answer) == NORMALISED[answer]


def test_contractions_of_the_official_table():
    assert len(CONTRACTIONS) == 114  # those of its 120 that are lower-case and change anything
    assert CONTRACTIONS["hed"] == "he'd" and CONTRACTIONS["twas"] == "'twas" and CONTRACTIONS["yall'd've"] == "y'all'd've"
    assert "im" not in CONTRACTIONS and "ill" not in CONTRACTIONS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, 0.0),
        (1, 0.9 * 1 / 3),  # nine sets of nine have it once; the one without it, not at all
        (2, (8 * 2 / 3 + 2 * 1 / 3) / 10),
        (3, (7 * 1 + 3 * 2 / 3) / 10),
        (4, 1.0),
        (9, 1.0),
    ],
)
def test_accuracy_leaves_one_annotator_out(given, expected):
    answers = ["cat"] * given + [f"dog {i}" for i in range(10 - given)]
    assert accuracy(" The cat.", answers) == pytest.approx(expected)


def test_where_annotators_agree_nothing_is_normalised():
    assert accuracy("Yes", ["yes"] * 10) == 0 and accuracy(" yes\n", ["yes"] * 10) == 1
    assert accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


def test_as_a_reward():
    assert soft_accuracy(["p", "q"], [" yes", " no"], answers=[["yes"] * 10, ["yes"] * 10], image=[1, 2]) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"needs the column `answers` of data.prompts, found image"):
        soft_accuracy(["p"], ["yes"], image=[1])
    with pytest.raises(ValueError, match="found none"):
        accuracy("yes", [])


def annotation(number: int, image: int, answers: list[str], kind: str) -> dict:
    return {
        "question_type": "is the",
        "multiple_choice_answer": answers[0],
        "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(answers)],
        "image_id": image,
        "answer_type": kind,
        "question_id": number,
    }


@pytest.fixture
def folder(tmp_path):
    """The original layout: 12 questions about 4 images."""
    questions, annotations = [], []
    for i in range(12):
        image, kind = 42 + i // 3, ("yes/no", "number", "other")[i % 3]
        answers = {"yes/no": ["yes", "no"], "number": ["2", "three", "4"], "other": ["red", "Blue", "a dog", "cat"]}[kind]
        answer = answers[i // 3 % len(answers)]
        questions.append({"image_id": image, "question": f"What is it, number {i}? ", "question_id": image * 1000 + i})
        annotations.append(annotation(image * 1000 + i, image, [answer] * 7 + ["many"] * 3, kind))
    write(tmp_path, questions, annotations)
    (tmp_path / "val2014").mkdir()
    for image in range(42, 46):
        (tmp_path / "val2014" / f"COCO_val2014_{image:012d}.jpg").write_bytes(encoded(pixels(seed=image), "JPEG"))
    return tmp_path


def write(folder, questions, annotations):
    info = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    texts = {
        "v2_OpenEnded_mscoco_val2014_questions.json": {**info, "task_type": "Open-Ended", "questions": questions},
        "v2_mscoco_val2014_annotations.json": {**info, "annotations": annotations},
    }
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value))


def rows(folder, kind, on_error="error"):
    skipped = Skipped(on_error)
    return [row.values for row in convert("vqa", kind, vqa.read(f"{folder}:val2014", skipped), skipped)], skipped


def test_rows_of_every_kind(folder):
    first = {"prompt": "Question: What is it, number 0?\nAnswer:", "image": "val2014/COCO_val2014_000000000042.jpg"}
    assert rows(folder, "sft")[0][0] == {**first, "completion": " yes"}
    assert rows(folder, "label")[0][:2] == [{**first, "completion": " yes", "label": 1}, {**first, "completion": " no", "label": 0}]
    assert rows(folder, "preference")[0][0] == {**first, "chosen": " yes", "rejected": " no"}
    assert rows(folder, "prompts")[0][0] == {
        **first,
        "question_id": 42000,
        "answers": ["yes"] * 7 + ["many"] * 3,
        "question_type": "is the",
        "answer_type": "yes/no",
    }
    assert [len(rows(folder, kind)[0]) for kind in ("sft", "label", "preference", "prompts")] == [12, 24, 12, 12]


def test_wrong_answers_are_wrong_of_the_same_type_and_the_same_in_every_run(folder):
    found = list(vqa.read(f"{folder}:val2014", Skipped()))
    wrong = [vqa.wrong(row.values) for row in found]
    assert wrong == [vqa.wrong(row.values) for row in vqa.read(f"{folder}:val2014", Skipped())]
    for row, answer in zip(found, wrong, strict=True):
        values = row.values
        assert accuracy(answer, values["answers"]) == 0
        same_type = {other.values["answer"] for other in found if other.values["answer_type"] == values["answer_type"]}
        assert answer in same_type
    assert len(set(wrong)) > 5


def test_a_question_without_a_wrong_answer_gives_no_pair(folder):
    write(folder, [{"image_id": 42, "question": "What?", "question_id": 1}], [annotation(1, 42, ["yes"] * 10, "yes/no")])
    assert [len(rows(folder, kind)[0]) for kind in ("label", "preference")] == [1, 0]


def test_what_an_annotator_said_in_other_words_is_not_wrong(folder):
    questions = [{"image_id": 42, "question": "How many?", "question_id": number} for number in (1, 2)]
    answers = {1: ["2"] * 7 + ["3"] * 3, 2: ["Three"] * 10}
    write(folder, questions, [annotation(number, 42, given, "number") for number, given in answers.items()])
    assert [vqa.wrong(row.values) for row in vqa.read(f"{folder}:val2014", Skipped())] == [None, "2"]


def test_wrong_answers_are_drawn_only_where_they_are_used(folder, monkeypatch):
    monkeypatch.setattr(vqa, "accuracy", lambda *_: pytest.fail("a wrong answer was drawn"))
    assert len(rows(folder, "sft")[0]) == len(rows(folder, "prompts")[0]) == 12


def test_the_pipeline_reads_it_with_its_pictures(folder):
    files = FilesConfig(train=[f"{folder}:val2014"], format="vqa")
    vision = Vision(ImagePrompt("<image>", "*", 2), ImageProcessing((0, 0, 0), (1, 1, 1), size=(2, 2)))
    config = DataConfig(label=files, prompts=files, validation_share=0.3)
    loaded = load(config, make_tokenizer(), needs={"label", "prompts"}, vision=vision)
    for split in (loaded.label, loaded.prompts):
        sides = [{picture.label for example in side for picture in example.pictures} for side in (split.train, split.validation)]
        assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 4, "a picture is on both sides"
    assert loaded.prompts.train[0].columns["answers"][0] == "yes"


def test_what_is_wrong_is_said(folder):
    with pytest.raises(DataError, match=r"expected FOLDER:SUBTYPE, such as data/vqav2:val2014"):
        list(vqa.read("folder", Skipped()))
    with pytest.raises(DataError, match=r"v2_OpenEnded_mscoco_test2015_questions.json: no such file"):
        list(vqa.read(f"{folder}:test2015", Skipped()))
    questions = [{"image_id": 42, "question": "What?", "question_id": number} for number in (1, 2, 3)] + [{"question": "x"}, "y"]
    bad = {**annotation(2, 42, ["a"] * 10, "other"), "answers": []}
    write(folder, questions, [annotation(3, 42, ["a"] * 10, "other"), bad])
    with pytest.raises(DataError, match=r"questions.json:1: expected an annotation of question 1 in v2_mscoco_val2014_annotations.json"):
        rows(folder, "sft")
    found, skipped = rows(folder, "sft", on_error="skip")
    assert len(found) == 1 and skipped.notes()[0].startswith("4 rows skipped as bad")
    (folder / "v2_mscoco_val2014_annotations.json").write_text("[1]")
    with pytest.raises(DataError, match="expected an object with a list `annotations`"):
        rows(folder, "sft")
