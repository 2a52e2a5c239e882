"""Intervals where rows are not independent: whole groups are drawn, by identities with what has no groups."""

import numpy as np
import pytest

from pe_rlhf_jax.training.statistics import area_under_curve, bootstrap_auc_ci, bootstrap_ci, bootstrap_pairs_auc_ci, members

RNG = np.random.default_rng(0)
LABELS = np.repeat([1, 0, 1, 0], [9, 12, 6, 13])
SCORES = RNG.normal(size=40) + LABELS
NAMES = [f"{RNG.integers(1000)}-{row}" for row in range(40)]  # their order is not the rows'


def test_groups_are_rows_by_first_row_and_rows_without_one_stand_alone():
    shown = lambda *given: [rows.tolist() for rows in members(*given)]  # noqa: E731
    assert shown(5, ["b", None, "a", "b", None]) == [[0, 3], [1], [2], [4]]
    assert shown(3, None) == shown(3, [None] * 3) == [[0], [1], [2]]
    assert shown(3, ["a"] * 3) == [[0], [1], [2]]  # a single group tells nothing of others


def test_without_groups_the_draws_are_those_of_published_figures():
    """Figures in the README were made so."""
    generator = np.random.default_rng(0)
    means = [np.mean(generator.choice(SCORES, 40)) for _ in range(100)]
    assert bootstrap_ci(SCORES, 100) == np.quantile(means, [0.025, 0.975]).tolist()
    generator = np.random.default_rng(0)
    classes = [np.flatnonzero(LABELS == 1), np.flatnonzero(LABELS == 0)]
    drawn = [np.concatenate([generator.choice(rows, len(rows)) for rows in classes]) for _ in range(100)]
    areas = [area_under_curve(SCORES[rows], LABELS[rows]) for rows in drawn]
    assert bootstrap_auc_ci(SCORES, LABELS, 100) == np.quantile(areas, [0.025, 0.975]).tolist()
    generator, areas = np.random.default_rng(0), []
    for _ in range(100):
        pairs = generator.choice(20, 20)
        areas.append(area_under_curve(np.concatenate([SCORES[:20][pairs], SCORES[20:][pairs]]), np.repeat([1, 0], 20)))
    assert bootstrap_pairs_auc_ci(SCORES[:20], SCORES[20:], 100) == np.quantile(areas, [0.025, 0.975]).tolist()


@pytest.mark.parametrize("interval", [bootstrap_ci, bootstrap_auc_ci, bootstrap_pairs_auc_ci])
def test_groups_of_one_change_nothing_and_copies_in_a_group_add_nothing(interval):
    """Ten copies of every row, each row with its copies in one group, tell as much as the rows; taken as rows, they seem to tell more."""
    given = {bootstrap_ci: (SCORES,), bootstrap_auc_ci: (SCORES, LABELS), bootstrap_pairs_auc_ci: (SCORES[:20], SCORES[20:])}[interval]
    count = len(given[0])
    plain = interval(*given, 200)
    assert interval(*given, 200, NAMES[:count]) == plain
    copies = [np.repeat(part, 10) for part in given]
    assert interval(*copies, 200, np.repeat(NAMES[:count], 10).tolist()) == pytest.approx(plain)
    low, high = interval(*copies, 200)
    assert high - low < 0.5 * (plain[1] - plain[0])


def test_groups_of_a_positive_and_a_negative_row_are_pairs():
    chosen, rejected = SCORES[:20] + 1, SCORES[20:]
    both, labels = np.concatenate([chosen, rejected]), np.repeat([1, 0], 20)
    assert bootstrap_auc_ci(both, labels, 200, NAMES[:20] * 2) == bootstrap_pairs_auc_ci(chosen, rejected, 200)


def test_no_class_goes_missing():
    """One positive group and one negative one: drawn apart, both are in every draw."""
    scores, labels = np.array([2.0, 3.0, 0.0, 1.0]), np.array([1, 1, 0, 0])
    assert bootstrap_auc_ci(scores, labels, 100, ["a", "a", "b", "b"]) == [1.0, 1.0]
