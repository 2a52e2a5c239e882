"""Early warnings: each failure is seen once, at its step, and a healthy run says nothing."""

from __future__ import annotations

import numpy as np
import pytest

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.report import health

CONFIG = configuration.parse(
    """
model: {source: nowhere}
rl:
  kl_target: 4.0
  rewards: [{model: run}, {function: "somewhere:judge", weight: 0}]
"""
)
STEPS = 20


def rows(**changed) -> list[dict]:
    """A healthy run of 20 steps, with some noise; a changed metric is a function of progress from 0 to 1."""
    noise = np.random.default_rng(0).normal(0, 0.02, (STEPS, 10))
    metrics = {
        "objective/scores": lambda p: 1.0 + p,
        "objective/scores_std": lambda p: 1.0,
        "rewards/model": lambda p: 1.0 + p,
        "rewards/judge": lambda p: 0.2 + 0.3 * p,
        "objective/kl": lambda p: 4 * p,
        "objective/kl_per_token": lambda p: 0.3 * p,
        "objective/distinct_2": lambda p: 0.8 - 0.05 * p,
        "objective/length": lambda p: 20 + 2 * p,
        "policy/entropy_avg": lambda p: 2.0 - 0.5 * p,
        "val/sampler_kl": lambda p: 1e-8,
    } | changed
    steps = [i / (STEPS - 1) for i in range(STEPS)]
    return [
        {name: f(p) * (1 + noise[i, j] * (name != "val/sampler_kl")) for j, (name, f) in enumerate(metrics.items())}
        for i, p in enumerate(steps)
    ]


FAILURES = {
    "reward hacking": {"rewards/judge": lambda p: 0.5 - 0.6 * p},
    "kl over target": {"objective/kl": lambda p: 12 * p},
    "far from the reference": {"objective/kl_per_token": lambda p: 3 * p},
    "collapse to few answers": {"objective/distinct_2": lambda p: 0.8 - 0.6 * p},
    "entropy collapse": {"policy/entropy_avg": lambda p: 2.0 - 1.9 * p},
    "length drift": {"objective/length": lambda p: 20 + 25 * p},
    "sampler mismatch": {"val/sampler_kl": lambda p: 0.05 * p},
}


def test_a_healthy_run_says_nothing():
    assert health.findings(rows(), CONFIG) == []


@pytest.mark.parametrize("kind", FAILURES)
def test_each_failure_is_seen_once_and_before_the_end(kind):
    found = health.findings(rows(**FAILURES[kind]), CONFIG)
    assert [finding.kind for finding in found] == [kind]
    assert 2 * health.WINDOW <= found[0].step < STEPS
    assert len(found[0].text) < 300


def test_shorter_answers_are_a_drift_as_well():
    found = health.findings(rows(**{"objective/length": lambda p: 20 - 15 * p}), CONFIG)
    assert [finding.kind for finding in found] == ["length drift"]


def test_a_judge_that_falls_with_the_score_is_no_hacking():
    falling = {"objective/scores": lambda p: 1 - p, "rewards/judge": lambda p: 0.5 - 0.6 * p}
    assert health.findings(rows(**falling), CONFIG) == []


def test_a_trained_reward_that_falls_is_a_trade_off_not_hacking():
    config = configuration.parse('model: {source: x}\nrl: {rewards: [{model: run}, {function: "somewhere:judge", weight: 0.1}]}')
    assert health.findings(rows(**FAILURES["reward hacking"]), config) == []


def test_without_a_configuration_the_rest_is_still_seen():
    changed = FAILURES["reward hacking"] | FAILURES["length drift"]
    assert [finding.kind for finding in health.findings(rows(**changed), None)] == ["length drift"]


def test_a_continued_run_warns_of_what_is_new_only():
    steps = rows(**FAILURES["length drift"])
    (first,) = health.findings(steps, CONFIG)
    before, after = steps[: first.step], steps[first.step :]
    watch = health.Watch(CONFIG, before)
    assert [text for row in after for text in watch.after(row)] == []
    late = health.Watch(CONFIG, steps[: first.step - 1])
    assert late.after(steps[first.step - 1]) == [first.text]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [kind for kind in FAILURES if kind not in ("kl over target", "far from the reference")])
def test_one_step_without_a_number_hides_nothing(kind, value):
    """One of the first steps, with which all later ones are compared."""
    steps = rows(**FAILURES[kind])
    steps[2] = dict.fromkeys(steps[2], value)
    assert [finding.kind for finding in health.findings(steps, CONFIG)] == [kind]


@pytest.mark.parametrize("step", [0, 15])
def test_scores_that_are_no_numbers_are_told(step):
    steps = [row | {"val/nonfinite_scores": 3 * (i == step)} for i, row in enumerate(rows())]
    (found,) = health.findings(steps, CONFIG)
    assert (found.kind, found.step) == ("scores that are no numbers", max(step + 1, 2 * health.WINDOW))
    assert "for 3 responses in 1 of" in found.text and len(found.text) < 300


def test_missing_metrics_say_nothing():
    assert health.findings([{"objective/scores": None, "objective/kl": float("nan")}] * STEPS, CONFIG) == []
