"""Early warnings of the ways in which RL from rewards is known to fail, from its metrics alone, and what to try.

The first steps of a run are what the later ones are compared with. Each failure is reported once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pe_rlhf_jax.config import Config

WINDOW = 5
"""Steps whose mean is compared: the first ones with the latest ones. Nothing is said before there are two windows."""
OVER_TARGET = 1.5
FAR_NATS_PER_TOKEN = 1.0
FEWER_PAIRS = 0.7
LONGER, SHORTER = 1.5, 0.6
LESS_ENTROPY = 0.3
MISMATCH_NATS = 0.01

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A failure that shows, at the step where it was first seen."""

    step: int
    kind: str
    text: str


def findings(rows: Sequence[Row], config: Config | None) -> list[Finding]:
    """All failures that the RL stage's metrics show, each at its first step. Without a configuration, those that need it are left out."""
    watch = Watch(config, [])
    return [Finding(number, kind, text) for number, row in enumerate(rows, start=1) for kind, text in watch.seen(row)]


class Watch:
    """Looks at one step after another.

    Args:
        config: the run's; None leaves out what depends on it.
        rows: the metrics of the steps before, as in metrics.jsonl.
    """

    def __init__(self, config: Config | None, rows: Sequence[Row]):
        self.config = config
        self.rows: list[Row] = []
        self.known: set[str] = set()
        for row in rows:
            list(self.seen(row))

    def after(self, row: Row) -> list[str]:
        """The warnings that this step is the first to give."""
        return [text for _, text in self.seen(row)]

    def seen(self, row: Row) -> Iterator[tuple[str, str]]:
        """Kind and text of what is new."""
        self.rows.append(row)
        if len(self.rows) < 2 * WINDOW:
            return
        for check in CHECKS:
            if check.__name__ not in self.known and (text := check(self)):
                self.known.add(check.__name__)
                yield check.__name__.strip("_").replace("_", " "), text

    def first(self, key: str) -> float:
        return _mean(self.rows[:WINDOW], key)

    def last(self, key: str) -> float:
        return _mean(self.rows[-WINDOW:], key)

    def always(self, key: str, limit: float) -> bool:
        """Whether the metric was there and above the limit at each of the latest steps."""
        return all(_value(row, key) > limit for row in self.rows[-WINDOW:])


def _reward_hacking(watch: Watch) -> str | None:
    """The score rises while something that is only watched falls."""
    if watch.config is None or not watch.last("objective/scores") > watch.first("objective/scores") + 0.2 * watch.first(
        "objective/scores_std"
    ):
        return None
    for term in watch.config.rl.rewards:
        key = f"rewards/{term.name}"
        before, now = watch.first(key), watch.last(key)
        noise = 2 * math.hypot(_error(watch.rows[:WINDOW], key), _error(watch.rows[-WINDOW:], key))
        if term.weight == 0 and now < before - noise:
            return (
                f"the score rises ({_change(watch, 'objective/scores')}) while {term.name}, which is not trained on, falls "
                f"({before:.3g} to {now:.3g}): the policy may be gaming its reward. Raise rl.kl_coef, stop earlier, or train the reward "
                "model on such answers"
            )
    return None


def _kl_over_target(watch: Watch) -> str | None:
    target = watch.config.rl.kl_target if watch.config else None
    if target is None or not watch.always("objective/kl", OVER_TARGET * target):
        return None
    return (
        f"KL has been above {OVER_TARGET:g} times its target ({watch.last('objective/kl'):.3g} against {target:g} nats per response) for "
        f"{WINDOW} steps. Lower rl.kl_horizon or the learning rate, or start with a larger rl.kl_coef"
    )


def _far_from_the_reference(watch: Watch) -> str | None:
    if not watch.always("objective/kl_per_token", FAR_NATS_PER_TOKEN):
        return None
    return (
        f"the policy is far from its reference ({watch.last('objective/kl_per_token'):.2f} nats per token for {WINDOW} steps), where the "
        "reward model was not trained to judge. Raise rl.kl_coef, set rl.kl_target, lower the learning rate, or stop earlier"
    )


def _collapse_to_few_answers(watch: Watch) -> str | None:
    if not watch.last("objective/distinct_2") < FEWER_PAIRS * watch.first("objective/distinct_2"):
        return None
    return (
        f"answers become alike: the share of distinct token pairs went from {_change(watch, 'objective/distinct_2')}. Raise rl.kl_coef or "
        "rl.sampling.temperature, or lower the learning rate"
    )


def _entropy_collapse(watch: Watch) -> str | None:
    if not watch.last("policy/entropy_avg") < LESS_ENTROPY * watch.first("policy/entropy_avg"):
        return None
    return (
        f"the policy's entropy went from {_change(watch, 'policy/entropy_avg')} nats per token; soon it explores nothing. "
        "Raise rl.kl_coef, or lower the learning rate"
    )


def _length_drift(watch: Watch) -> str | None:
    before, now = watch.first("objective/length"), watch.last("objective/length")
    if not (now > LONGER * before or now < SHORTER * before):
        return None
    remedy = (
        "rl.length_penalty with rl.length_target holds it"
        if now > before
        else "look at the samples; rl.missing_eos_penalty must not make short answers pay"
    )
    return f"responses went from {before:.1f} to {now:.1f} tokens, which pleases a reward model that likes length or brevity: {remedy}"


def _scores_that_are_no_numbers(watch: Watch) -> str | None:
    bad = [row for row in watch.rows[-2 * WINDOW :] if _value(row, "val/nonfinite_scores") > 0]
    if not bad:
        return None
    responses = sum(_value(row, "val/nonfinite_scores") for row in bad)
    return (
        f"a reward was not a finite number for {responses:.0f} responses in {len(bad)} of the latest {2 * WINDOW} steps; such a step may "
        "teach nothing. A rewards/... that is empty in metrics.jsonl tells which: look at that model, or try model.dtype float32"
    )


def _sampler_mismatch(watch: Watch) -> str | None:
    if not watch.last("val/sampler_kl") > MISMATCH_NATS:
        return None
    return (
        f"the log-probabilities that sampled and those that learn differ by {watch.last('val/sampler_kl'):.2g} nats per token, more than "
        "rounding. With model.dtype float32 this is a bug; please report it"
    )


CHECKS: tuple[Callable[[Watch], str | None], ...] = (
    _reward_hacking,
    _kl_over_target,
    _far_from_the_reference,
    _collapse_to_few_answers,
    _entropy_collapse,
    _length_drift,
    _scores_that_are_no_numbers,
    _sampler_mismatch,
)


def _value(row: Row, key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan  # comparisons with NaN are false: a missing metric says nothing


def _there(rows: Sequence[Row], key: str) -> list[float]:
    """The metric at the steps that have it: one that was not a finite number says nothing of the others."""
    return [value for row in rows if math.isfinite(value := _value(row, key))]


def _mean(rows: Sequence[Row], key: str) -> float:
    values = _there(rows, key)
    return statistics.fmean(values) if values else math.nan


def _error(rows: Sequence[Row], key: str) -> float:
    """Standard error of the mean over the steps."""
    values = _there(rows, key)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _change(watch: Watch, key: str) -> str:
    return f"{watch.first(key):.2g} to {watch.last(key):.2g}"
