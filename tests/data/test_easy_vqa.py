"""The data set of questions about drawn pictures: splits, wrong answers, rows; the real package in the slow tests."""

import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from tiny_data import make_tokenizer
from tiny_images import encoded, pixels

from pe_rlhf_jax import package
from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data import DataError, easy_vqa, load
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.turns import Vision
from pe_rlhf_jax.image_prompt import ImagePrompt

VISION = Vision(ImagePrompt("<image>", "*", 2), ImageProcessing((0, 0, 0), (1, 1, 1), size=(4, 4)))
ANSWERS = [answer for kind in easy_vqa.KINDS_OF_ANSWER for answer in kind]


def files() -> dict[str, bytes]:
    """40 training and 4 test pictures with three questions each."""
    found = {}
    for split, count in (("train", 40), ("test", 4)):
        name = f"easy_vqa/data/{split}"
        asked = [[f"what is it, {split} {i}?", ANSWERS[i % 13], i // 3] for i in range(3 * count)]
        found[f"{name}/questions.json"] = json.dumps(asked).encode()
        found |= {f"{name}/images/{i}.png": encoded(pixels(seed=i + (split == "test") * 100)) for i in range(count)}
    return found


@pytest.fixture
def data(monkeypatch):
    parsed = easy_vqa.parse(files())
    monkeypatch.setattr(easy_vqa, "_read", lambda: parsed)
    return parsed


def test_splits_are_the_official_ones_and_pictures_are_held_out(data):
    config = DataConfig(source="easy-vqa", validation_share=0.3)
    loaded = load(config, make_tokenizer(), needs={"sft", "preference", "label", "prompts"}, vision=VISION)
    assert (len(loaded.prompts.train), len(loaded.prompts.validation)) == (120, 12)
    splits = {name: getattr(loaded, name) for name in ("sft", "preference", "label", "prompts")}
    shown = {name: [{p.key for e in side for p in e.pictures} for side in (s.train, s.validation)] for name, s in splits.items()}
    test = shown["prompts"][1]
    for name in ("sft", "preference", "label"):
        train, held_out = shown[name]
        assert train.isdisjoint(held_out) and (train | held_out).isdisjoint(test)
        assert len(train | held_out) == 40 and 5 <= len(held_out) <= 20
    assert len(loaded.label.train) == 2 * len(loaded.sft.train) and {e.label for e in loaded.label.train} == {0.0, 1.0}


def test_training_has_as_many_yes_or_no_questions_as_others(monkeypatch):
    given = files()
    for split in ("train", "test"):
        listed = f"easy_vqa/data/{split}/questions.json"
        asked = [[text, "red" if i % 4 == 0 else "no", image] for i, (text, _, image) in enumerate(json.loads(given[listed]))]
        given[listed] = json.dumps(asked).encode()
    monkeypatch.setattr(easy_vqa, "_read", lambda: easy_vqa.parse(given))
    loaded = load(DataConfig(source="easy-vqa", validation_share=0.3), make_tokenizer(), needs={"sft", "label", "prompts"}, vision=VISION)
    answer_of = lambda row: loaded.prompts.train[int(row.place.split(":")[2]) - 1].columns["answer"]  # noqa: E731
    answers = [answer_of(row) for row in loaded.sft.train]
    assert answers.count("red") == answers.count("no") >= 15 and len(loaded.label.train) == 2 * len(answers)
    assert [row.place for row in loaded.sft.train] == sorted((row.place for row in loaded.sft.train), key=lambda p: int(p.split(":")[2]))
    assert Counter(row.columns["answer"] for row in loaded.prompts.train) == {"red": 30, "no": 90}
    held_out = Counter(answer_of(row) for row in loaded.sft.validation)
    assert held_out["no"] > 2 * held_out["red"] >= 10


def test_rows_show_picture_question_and_answer(data):
    tokenizer = make_tokenizer()
    loaded = load(DataConfig(source="easy-vqa"), tokenizer, needs={"sft", "prompts"}, vision=VISION)
    example = next(example for example in loaded.prompts.validation if example.place == "easy-vqa:test:2")
    assert tokenizer.decode(example.tokens) == "Question: what is it, test 1?\n**\nAnswer:" and example.columns == {
        "answer": "no",
        "question": "what is it, test 1?",
    }
    np.testing.assert_array_equal(example.pictures[0].decode(), pixels(seed=100))
    first = loaded.sft.train[0]
    assert tokenizer.decode(first.response) == f" {ANSWERS[int(first.place.split(':')[2]) % 13 - 1]}<|end|>"


def test_the_first_held_out_questions_are_about_many_pictures(data):
    loaded = load(DataConfig(source="easy-vqa", validation_share=0.5), make_tokenizer(), needs={"label", "prompts"}, vision=VISION)
    assert len({example.pictures[0].key for example in loaded.prompts.validation[:4]}) >= 3
    first = loaded.label.validation[:16]  # in the order of the data set they would be about two or three
    assert len({example.pictures[0].key for example in first}) >= 6
    assert [(a.place, a.label, b.label) for a, b in zip(first[::2], first[1::2], strict=True)] == [(b.place, 1, 0) for b in first[1::2]]


def test_wrong_answers_are_of_the_same_kind_and_the_same_in_every_run(data):
    for question in data.train:
        kind = next(kind for kind in easy_vqa.KINDS_OF_ANSWER if question.answer in kind)
        assert easy_vqa.wrong(question) in kind and easy_vqa.wrong(question) != question.answer
        assert easy_vqa.wrong(question) == easy_vqa.wrong(question)
    reds = Counter(easy_vqa.wrong(easy_vqa.Question(f"p{i}", "x", "red", "")) for i in range(200))
    assert len(reds) == 7 and min(reds.values()) > 5


def test_accuracy_as_reward_and_judge():
    found = easy_vqa.answer_accuracy([""] * 4, [" red", "Red.", " red square", ""], answer=["red"] * 4, question=[""] * 4)
    assert found == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="needs the column `answer`"):
        easy_vqa.answer_accuracy([""], ["red"])


def test_a_model_that_sees_nothing_is_told():
    with pytest.raises(DataError, match="easy-vqa has pictures, but this model takes none"):
        load(DataConfig(source="easy-vqa"), make_tokenizer(), needs={"label"})


def test_the_package_is_read_and_its_identity_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    folder = tmp_path / "packages" / "easy-vqa-1.0" / "wheel"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "easy_vqa-1.0-py3-none-any.whl", "w") as archive:
        for name, content in files().items():
            archive.writestr(name, content)
        archive.writestr("easy_vqa/__init__.py", "raise RuntimeError")
    easy_vqa._read.cache_clear()
    with pytest.raises(package.PackageError, match="expected SHA-256 fcb51b30"):
        easy_vqa._read()
    monkeypatch.setattr(easy_vqa, "SHA256", package.sha256_of(folder / "easy_vqa-1.0-py3-none-any.whl"))
    assert len(easy_vqa._read().files) == 44
    easy_vqa._read.cache_clear()


@pytest.mark.slow
def test_the_published_data_set():
    """Needs the package in the cache, or a network."""
    easy_vqa._read.cache_clear()
    data = easy_vqa._read()
    assert (len(data.train), len(data.test), len(data.files)) == (38_575, 9_673, 5_000)
    assert {question.answer for question in data.train} == {question.answer for question in data.test} == set(ANSWERS)
    yes_no = [sum(question.answer in ("yes", "no") for question in split) for split in (data.train, data.test)]
    assert yes_no == [28_407, 7_136]
    config = DataConfig(source="easy-vqa")
    loaded = load(config, make_tokenizer(), needs={"sft", "label", "prompts"}, vision=VISION)
    assert loaded.notes == [] and len(loaded.prompts.validation) == 9_673
    assert loaded.sft.train[0].pictures[0].decode().shape == (64, 64, 3)
