"""Lengths of rows, and rows that hold several examples."""

import numpy as np
import pytest

from pe_rlhf_jax.data import LabelExample, Packing, PreferenceExample, SFTExample, pack_labels, pack_preferences, pad_sft
from pe_rlhf_jax.data.rows import MOST_IN_A_ROW, Rows, packed, padded

PAD = 9


def ids(*values):
    return np.array(values, np.int32)


def alone(*lengths):
    """Examples of one text each."""
    return [[length] for length in lengths]


def test_few_lengths_are_padded_to():
    lengths = [padded(n, 16) for n in range(1, 5000)]
    assert all(n <= length < n * 1.125 + 16 and length % 16 == 0 for n, length in enumerate(lengths, start=1))
    assert lengths == sorted(lengths) and len({length for length in lengths if 256 < length <= 512}) == 8
    assert [padded(n, 16) for n in (1, 17, 256, 257, 512, 513, 1024, 8192)] == [16, 32, 256, 288, 512, 576, 1024, 8192]


def test_the_longest_come_first_each_into_the_first_row_with_room():
    assert packed(alone(2, 5, 3, 4, 1), Packing(6, 1)) == [[1, 4], [3, 0], [2]]
    assert packed(alone(3), Packing(3, 4)) == [[0], [], [], []]
    assert packed(alone(2, 5, 3, 4, 1), Packing(6, 2)) == [[1, 4], [3, 0], [2], []]


def test_no_row_is_too_long_and_none_is_lost():
    rng = np.random.default_rng(0)
    for count in (1, 7, 64, 200):
        lengths = rng.integers(1, 40, count).tolist()
        rows = packed(alone(*lengths), Packing(40, 4))
        assert sorted(i for row in rows for i in row) == list(range(count))
        assert all(sum(lengths[i] for i in row) <= 40 and len(row) <= MOST_IN_A_ROW for row in rows)
        assert len(rows) % 4 == 0 and sum(lengths) / 40 <= len(rows) <= -(-count // 4) * 4


def test_a_row_holds_no_more_examples_than_it_has_places_for():
    assert [len(row) for row in packed([[1]] * 40, Packing(64, 1))] == [16, 16, 8]
    assert [len(row) for row in packed([[1]] * 40, Packing(64, 1, most=64))] == [40]


def test_batches_have_few_numbers_of_rows():
    """As many as `padded` has lengths."""
    counts = {len(packed([[20]] * 2 * rows, Packing(40, 1))) for rows in range(33, 65)}
    assert counts == {36, 40, 44, 48, 52, 56, 60, 64}


def test_no_more_rows_than_examples():
    """Of 33 rows of one example each, 36 would be one of the few numbers, but are not needed."""
    assert len(packed([[40]] * 33, Packing(40, 1))) == 36 - 3


def test_packed_sft():
    examples = [SFTExample(ids(1), ids(2)), SFTExample(ids(), ids(3, 4, 5)), SFTExample(ids(6, 7), ids(8, 8, 8))]
    batch = pad_sft(examples, PAD, 4, Packing(6, 1))
    assert batch.tokens.tolist() == [[6, 7, 8, 8, 8, 9], [3, 4, 5, 1, 2, 9]]
    assert batch.ends.tolist() == [[5, 5, 5, 5, 5, 0], [3, 3, 3, 5, 5, 0]]
    assert (batch.ends > 0).tolist() == batch.mask.tolist()
    # What a text without a prompt begins with follows on nothing: its neighbour's end does not predict it.
    assert batch.target_mask.tolist() == [[False, False, True, True, True, False], [False, True, True, False, True, False]]
    assert batch.tokens.dtype == batch.ends.dtype == np.int32 and batch.target_mask.dtype == bool


def test_packed_labels():
    examples = [LabelExample(ids(1, 2), 1.0), LabelExample(ids(3, 3, 3), 0.0), LabelExample(ids(4), 1.0)]
    batch = pack_labels(examples, PAD, Packing(4, 1))[0]
    assert batch.tokens.tolist() == [[3, 3, 3, 4], [1, 2, 9, 9]] and batch.ends.tolist() == [[3, 3, 3, 4], [2, 2, 0, 0]]
    assert batch.last.shape == batch.label.shape == batch.weight.shape == (2, MOST_IN_A_ROW)
    assert batch.last[:, :2].tolist() == [[2, 3], [1, 0]] and batch.label[:, :2].tolist() == [[0, 1], [1, 0]]
    assert batch.weight.sum() == 3 and batch.weight[:, :2].tolist() == [[1, 1], [1, 0]]
    assert batch.last.dtype == np.int32 and batch.label.dtype == batch.weight.dtype == np.float32


def test_packed_pairs():
    """Both sides of each behind what they share, with filling at weight 0."""
    examples = [PreferenceExample(ids(1, 2, 3), ids(1, 4), 0.5), PreferenceExample(ids(5), ids(6), 1.5)]
    batch = pack_preferences(examples, PAD, Packing(6, 1))[0]
    assert batch.tokens.tolist() == [[[1, 2, 3, 4, 5, 6]]] and batch.ends.tolist() == [[[4, 3, 3, 4, 5, 6]]]
    assert batch.mask.all()
    assert batch.last.shape == (1, 1, 2 * MOST_IN_A_ROW) and batch.last[0, 0, :6].tolist() == [2, 3, 4, 5, 0, 0]
    assert batch.margin[0, :3].tolist() == [0.5, 1.5, 0] and batch.weight[0, :3].tolist() == [1, 1, 0]


def test_what_examples_of_a_row_begin_with_is_there_once():
    """A text within another, one twice, and one that another row has room for."""
    texts = [ids(1, 2), ids(3, 4), ids(1, 2, 5, 5), ids(1, 2, 6), ids(1, 2, 6)]
    batch, rows = pack_labels([LabelExample(text, float(i % 2)) for i, text in enumerate(texts)], PAD, Packing(5, 1))
    assert batch.tokens.tolist() == [[1, 2, 5, 5, 6], [3, 4, 9, 9, 9]] and batch.ends.tolist() == [[5, 5, 4, 4, 5], [2, 2, 0, 0, 0]]
    assert batch.last[0, :4].tolist() == [3, 4, 4, 1] and batch.label[0, :4].tolist() == [0, 1, 0, 0]
    assert batch.last[1, 0] == 1 and batch.weight.sum() == 5 and rows == [[2, 3, 4, 0], [1]]


def test_pairs_of_one_prompts_answers():
    """Three answers, each in two pairs: every token once."""
    a, b, c = ids(1, 1, 2), ids(1, 1, 3, 3), ids(1, 1, 4)
    examples = [PreferenceExample(a, b), PreferenceExample(b, c), PreferenceExample(a, c)]
    batch = pack_preferences(examples, PAD, Packing(8, 1))[0]
    assert batch.tokens.tolist() == [[[1, 1, 2, 3, 3, 4, 9, 9]]] and batch.ends.tolist() == [[[6, 6, 3, 5, 5, 6, 0, 0]]]
    ends = batch.last[0, 0, :6].reshape(3, 2)
    assert sorted(map(tuple, ends.tolist())) == [(2, 4), (2, 5), (4, 5)]


def test_every_text_is_whole_in_its_row():
    """Its tokens are what its last one sees, and no token is there twice."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        texts = [rng.integers(0, 3, rng.integers(1, 9)).astype(np.int32) for _ in range(int(rng.integers(1, 12)))]
        rows = Rows([(text,) for text in texts], 1, Packing(12, 1))
        (tokens, mask), ends = rows.tokens(PAD), rows.ends()
        for row, slots in enumerate(rows.slots):
            for (i, _), own in slots.items():
                sees = [at for at in range(12) if mask[row, at] and at <= own[-1] < ends[row, at]]
                assert sees == own.tolist() and tokens[row, own].tolist() == texts[i].tolist()
            assert mask[row].sum() == len({tuple(texts[i][: end + 1]) for i, _ in slots for end in range(len(texts[i]))})
        assert sorted(i for slots in rows.slots for i, _ in slots) == list(range(len(texts)))


def test_an_example_that_is_longer_than_rows():
    with pytest.raises(ValueError, match="at most 4 tokens, found one of 5"):
        pack_labels([LabelExample(ids(1, 2, 3, 4, 5), 1.0)], PAD, Packing(4, 1))
