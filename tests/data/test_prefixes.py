"""Texts that begin alike."""

import itertools

import numpy as np
import pytest

from pe_rlhf_jax.data.prefixes import common, common_prefixes, families


def ids(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 4), 2), ((1,), (2,), 0), ((), (1,), 0), ((1, 2), (1, 2), 2), ((1, 2), (3, 2), 0)],
)
def test_common(a, b, expected):
    assert common(ids(*a), ids(*b)) == expected


def test_common_prefixes_of_each_two():
    """Of ids above 255 and 65535 too, which sort by all of their bytes."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 17):
        texts = [rng.choice([1, 256, 257, 70000], rng.integers(1, 6)).astype(np.int32) for _ in range(count)]
        found = common_prefixes(texts)
        assert found.shape == (count, count)
        for i, j in itertools.product(range(count), repeat=2):
            assert found[i, j] == common(texts[i], texts[j])


def test_families():
    """By the share of the shorter of two neighbours, and no more than `most`."""
    texts = [ids(5, 6, 7, 8), ids(1, 2, 3, 4), ids(1, 2, 9, 9, 9, 9, 9), ids(1, 8, 8, 8), ids(5, 6, 7)]
    assert families(texts, 0.5, 8) == [[1, 2], [3], [4, 0]]
    assert families(texts, 0.25, 8) == [[1, 2, 3], [4, 0]]
    assert families(texts, 0.25, 2) == [[1, 2], [3], [4, 0]]
    assert families([ids(1)] * 5, 1.0, 2) == [[0, 1], [2, 3], [4]] and families([], 0.5, 2) == []


def test_what_all_begin_with_makes_no_family():
    """A chat template of six tokens before thirty texts, and one that goes on as the first does."""
    template = list(range(50, 56))
    texts = [ids(*template, 100 + i, 7) for i in range(30)] + [ids(*template, 100, 7, 8)]
    found = families(texts, 0.25, 8)
    assert [0, 30] in found and sum(len(family) for family in found) == 31 and len(found) == 30
