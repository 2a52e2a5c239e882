"""The question-only baseline: what it answers, and that it looks at nothing else."""

import pytest
import question_baseline

from pe_rlhf_jax.data.easy_vqa import Question

TRAIN = [("what?", "red"), ("what?", "red"), ("what?", "blue"), ("is it?", "yes"), ("is it?", "no"), ("is it?", "yes"), ("is it?", "yes")]
TEST = [("what?", "red", "a"), ("what?", "blue", "a"), ("is it?", "yes", "b"), ("new?", "yes", "b"), ("new?", "red", "c")]


def test_the_most_common_answer_of_the_training_questions():
    train = [Question(f"{i}", text, answer, "x") for i, (text, answer) in enumerate(TRAIN)]
    test = [Question(f"{i}", text, answer, image) for i, (text, answer, image) in enumerate(TEST)]
    assert question_baseline.answers(train, test) == ["red", "red", "yes", "yes", "yes"]
    found = question_baseline.measure(train, test)
    assert found["questions"] == 5 and found["seen_wording"] == pytest.approx(0.6)
    assert [found[name]["accuracy"] for name in ("all", "yes_no", "other")] == pytest.approx([3 / 5, 1.0, 1 / 3])
    low, high = found["all"]["interval"]
    assert 0 <= low < 0.6 < high <= 1
