"""Batch order and padding."""

import itertools
from collections import Counter

import numpy as np
import pytest

from pe_rlhf_jax.data import (
    BatchOrder,
    FamilyOrder,
    LabelExample,
    PreferenceExample,
    PromptExample,
    SFTExample,
    pad_labels,
    pad_preferences,
    pad_prompts,
    pad_sft,
)

PAD = 9


def ids(*values):
    return np.array(values, np.int32)


def test_every_row_once_an_epoch_and_reshuffled():
    order = BatchOrder(10, 4, seed=1)
    stream = np.concatenate([order(step) for step in range(10)]).reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 4


def test_order_depends_on_step_and_seed_alone():
    forwards, other = BatchOrder(50, 8, seed=3), BatchOrder(50, 8, seed=3)
    batches = [forwards(step).tolist() for step in range(32)]
    for step in (7, 0, 31, 7):
        assert other(step).tolist() == batches[step]
    assert BatchOrder(50, 8, seed=4)(0).tolist() != forwards(0).tolist()


def test_fewer_rows_than_a_batch():
    batch = BatchOrder(3, 8, seed=0)(5)
    assert len(batch) == 8 and set(Counter(batch.tolist()).values()) <= {2, 3, 4} and set(batch.tolist()) == {0, 1, 2}


def test_families_stand_together_and_are_shuffled():
    """Each row once an epoch; one epoch's last batch begins the next; a function of the step alone."""
    families = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9]]
    order = FamilyOrder(families, 4, seed=1)
    stream = np.concatenate([order(step) for step in range(10)]).reshape(4, 10).tolist()
    assert all(sorted(epoch) == list(range(10)) for epoch in stream) and len(set(map(tuple, stream))) == 4
    for epoch, family in itertools.product(stream, families):
        at = epoch.index(family[0])
        assert epoch[at : at + len(family)] == family
    other = FamilyOrder(families, 4, seed=1)
    assert [other(step).tolist() for step in (7, 2)] == [order(step).tolist() for step in (7, 2)]
    assert any(FamilyOrder(families, 4, seed=2)(step).tolist() != order(step).tolist() for step in range(3))
    assert set(Counter(FamilyOrder(families, 25, seed=1)(0).tolist()).values()) == {2, 3}  # a batch of several epochs


def test_rows_of_similar_length_share_batches():
    lengths = np.random.default_rng(0).integers(1, 500, size=400)
    order, plain = BatchOrder(400, 8, seed=1, lengths=lengths), BatchOrder(400, 8, seed=1)
    padded = {grouped: sum(8 * lengths[of(step)].max() for step in range(50)) for grouped, of in ((True, order), (False, plain))}
    real = lengths.sum()
    assert padded[True] - real < 0.25 * (padded[False] - real)
    counts = Counter(np.concatenate([order(step) for step in range(300)]).tolist())
    assert set(counts.values()) == {6} and len(counts) == 400  # 25 windows of 12 batches are 6 epochs
    assert {tuple(sorted(order(step))) for step in range(50)}.isdisjoint(tuple(sorted(order(step))) for step in range(50, 100))
    means = np.array([lengths[order(step)].mean() for step in range(48)])
    assert abs(np.corrcoef(means, np.arange(48))[0, 1]) < 0.4  # short and long batches alternate
    other = BatchOrder(400, 8, seed=1, lengths=lengths)
    assert [other(step).tolist() for step in (60, 3)] == [order(step).tolist() for step in (60, 3)]


def test_a_window_is_put_together_once(monkeypatch):
    """Of up to 50 batches, which its steps take one by one: to make it again at each step took 200 ms at 128 rows."""
    order, asked = BatchOrder(400, 8, seed=1, lengths=np.arange(400) % 37), []

    class Windows:
        def __getitem__(self, window, of=order._windows):
            asked.append(window)
            return of[window]

    monkeypatch.setattr(order, "_windows", Windows())
    forwards = [order(step).tolist() for step in range(36)]
    assert asked == [0, 1, 2]
    assert [order(step).tolist() for step in reversed(range(36))] == forwards[::-1]


@pytest.mark.parametrize(("size", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_order(size, batch_size):
    with pytest.raises(ValueError, match="at least one row"):
        BatchOrder(size, batch_size, seed=0)
    with pytest.raises(ValueError, match="at least one row"):
        FamilyOrder([range(size)], batch_size, seed=0)


def test_pad_sft():
    batch = pad_sft([SFTExample(ids(1, 2), ids(3, 4, 5)), SFTExample(ids(6), ids(7))], PAD, 4)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6, 7, 9, 9, 9, 9, 9, 9]]
    assert batch.mask.tolist() == [[True] * 5 + [False] * 3, [True] * 2 + [False] * 6]
    assert batch.target_mask.tolist() == [[False] * 2 + [True] * 3 + [False] * 3, [False, True] + [False] * 6]
    assert batch.tokens.dtype == np.int32 and batch.mask.dtype == bool


def test_pad_preferences_to_two_rows_and_fill():
    examples = [PreferenceExample(ids(1, 2, 3), ids(4), 0.5), PreferenceExample(ids(5), ids(6, 7, 8, 8, 8), 1.5)]
    asked = []

    def never(pair: int, side: int) -> bool:
        asked.append((pair, side))
        return False

    batch = pad_preferences(examples, PAD, 3, rows=4, in_one_row=never)
    assert asked == [(6, 6)]
    first, second = [[1, 2, 3, 9, 9, 9], [4, 9, 9, 9, 9, 9]], [[5, 9, 9, 9, 9, 9], [6, 7, 8, 8, 8, 9]]
    assert batch.tokens.tolist() == [first, second, first, first]
    assert (batch.tokens != PAD).tolist() == batch.mask.tolist()
    assert batch.last.tolist() == [[[2], [0]], [[0], [4]], [[2], [0]], [[2], [0]]] and batch.ends is None
    assert batch.margin.tolist() == [0.5, 1.5, 0.5, 0.5] and batch.weight.tolist() == [1, 1, 0, 0]
    assert batch.margin.dtype == batch.weight.dtype == np.float32
    assert pad_preferences(examples, PAD, 5).weight.tolist() == [1, 1]


def test_pad_preferences_to_one_row_after_what_both_sides_share():
    """As much as is alike; nothing at all; and a side that the other begins with, which ends on the way of the other."""
    examples = [
        PreferenceExample(ids(1, 2, 3, 4), ids(1, 2, 5), 0.5, prompt_length=1),
        PreferenceExample(ids(6), ids(7, 8)),
        PreferenceExample(ids(1, 2), ids(1, 2, 2, 2, 3)),
    ]
    assert [(example.shared, example.length) for example in examples] == [(2, 5), (0, 3), (2, 5)]
    batch = pad_preferences(examples, PAD, 3, rows=4)
    assert batch.tokens.tolist() == [[[1, 2, 3, 4, 5, 9]], [[6, 7, 8, 9, 9, 9]], [[1, 2, 2, 2, 3, 9]], [[1, 2, 3, 4, 5, 9]]]
    assert (batch.tokens != PAD).tolist() == batch.mask.tolist()
    assert batch.ends.tolist() == [[[5, 5, 4, 4, 5, 0]], [[1, 3, 3, 0, 0, 0]], [[5, 5, 5, 5, 5, 0]], [[5, 5, 4, 4, 5, 0]]]
    assert batch.last.tolist() == [[[3, 4]], [[0, 2]], [[1, 4]], [[3, 4]]]
    assert batch.tokens.dtype == batch.last.dtype == batch.ends.dtype == np.int32


def test_sides_with_prompts_of_their_own_have_rows_of_their_own():
    """A prompt that is read in both directions could not stand in one row with another."""
    pair = PreferenceExample(ids(1, 2, 3, 4), ids(1, 5, 6), prompt_length=2)
    assert pad_preferences([pair], PAD, 1).tokens.shape == (1, 2, 4)


def test_pad_labels_and_fill():
    batch = pad_labels([LabelExample(ids(1, 2, 3), 0.0), LabelExample(ids(4), 1.0)], PAD, 2, rows=3)
    assert batch.tokens.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9], [1, 2, 3, 9]]
    assert batch.mask.tolist() == [[True, True, True, False], [True, False, False, False], [True, True, True, False]]
    assert batch.label.tolist() == [0, 1, 0] and batch.weight.tolist() == [1, 1, 0]
    assert batch.tokens.dtype == np.int32 and batch.label.dtype == batch.weight.dtype == np.float32


def test_pad_prompts_on_the_left():
    examples = [PromptExample(ids(1, 2), "a", {}), PromptExample(ids(3, 4, 5), "b", {})]
    batch = pad_prompts(examples, PAD, 4, rows=3)
    assert batch.tokens.tolist() == [[9, 9, 1, 2], [9, 3, 4, 5], [9, 9, 1, 2]]
    assert batch.mask.tolist() == [[False, False, True, True], [False, True, True, True], [False, False, True, True]]
    assert pad_prompts(examples, PAD, 3).tokens.shape == (2, 3)


def test_more_examples_than_rows():
    with pytest.raises(ValueError, match="between 1 and 1 examples, found 2"):
        pad_prompts([PromptExample(ids(1), "a", {})] * 2, PAD, 4, rows=1)
