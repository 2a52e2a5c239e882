"""Which charts the report shows, in what order, and the sentence that says how to read each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pe_rlhf_jax.report import charts
from pe_rlhf_jax.report.headline import number

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A chart and how to read it."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    note: str
    charts: list[Chart]


def drawn(rows: Mapping[str, Rows], summary: Mapping[str, Any]) -> list[Section]:
    """The sections that rows (metrics by stage) and summary (summary.json) can fill."""
    sft, reward, rl = (rows.get(stage, []) for stage in ("sft", "reward", "rl"))
    sections = (
        ("Reinforcement learning", "Faint points are single steps, lines are smoothed.", _learning(rl)),
        ("Reward model", _skipped(reward), _scoring(reward, summary.get("reward_model"))),
        ("Supervised fine-tuning", _tuned(summary) or _skipped(sft), _tuning(sft)),
        ("Health of the optimization", _skipped(rl), _health(rl)),
        ("Time and memory", "", _cost(rl)),
    )
    found = [Section(title, note, [chart for chart in group if chart]) for title, note, group in sections]
    return [section for section in found if section.charts]


def _learning(rl: Rows) -> list[Chart | None]:
    return [
        _curve(
            "Reward",
            "Mean score of each batch of rollouts, and what is left of it after scaling and clipping, if any, and after the KL penalty, "
            "which GRPO has in its loss instead.",
            rl,
            {"objective/scores": "reward", "objective/rlhf_reward": "reward minus KL penalty"},
            "reward",
        ),
        _rewards(rl),
        _curve(
            "KL to the reference",
            "Summed over a response: how far the policy has moved.",
            rl,
            {"objective/kl": "KL"},
            "nats per response",
        ),
        _curve(
            "Response length",
            "A sudden climb or fall often means that the reward is being gamed.",
            rl,
            {"objective/length": "length"},
            "tokens",
        ),
        _curve(
            "Policy entropy",
            "Falls as the policy commits; near zero it has stopped exploring.",
            rl,
            {"policy/entropy_avg": "entropy"},
            "nats per token",
        ),
        _curve(
            "Endings and variety",
            "Share of responses that end by themselves, and of token pairs that are distinct.",
            rl,
            {"objective/ended": "ended", "objective/distinct_2": "distinct pairs"},
            "share",
            percent=True,
        ),
        _curve("Value loss", "Half the squared error of the value model, in PPO clipped.", rl, {"loss/value_avg": "value"}, "loss"),
        _curve("Policy loss", "The objective's level says little; jumps do.", rl, {"loss/policy_avg": "policy"}, "loss"),
        _curve(
            "Explained variance",
            "How much of the returns the value model foresees; 1 is everything.",
            rl,
            {"critic/explained_variance": "explained variance"},
            "share",
        ),
    ]


def _rewards(rl: Rows) -> Chart | None:
    """The rewards one by one, where there are several."""
    names = sorted({key for row in rl for key in row if key.startswith("rewards/")})
    if len(names) < 2:
        return None
    caption = "Mean of each reward as it came, before its weight. One of weight 0 is only watched."
    return _curve("Rewards", caption, rl, {name: name.removeprefix("rewards/") for name in names}, "reward")


def _scoring(reward: Rows, measured: Any) -> list[Chart | None]:
    """`measured`: `reward_model` of summary.json, once it was evaluated."""
    loss, right = (number({"all": measured}, "all", "guessing", name) for name in ("loss", "accuracy"))
    labels = any("eval/auc" in row for row in reward)
    # Of labelled rows that are not the sides of pairs, and, as older versions had it, of the longer side.
    whole = loss is None or (isinstance(measured, Mapping) and "rows" in measured and "pairwise_accuracy" not in measured)
    length = "tokens" if whole else "tokens by which the preferred side is longer"
    guess = f" Whoever pays no heed to the texts has {loss:.2f} at best." if loss is not None else ""
    return [
        _curve(
            "Reward model loss",
            f"{'Logistic loss on labels' if labels else 'Bradley-Terry loss on pairs'}.{guess}",
            reward,
            {"loss": "training", "eval/loss": "held-out"},
            "loss",
        ),
        _curve(
            "Reward model accuracy",
            "Share of pairs on which the preferred side scores higher, or of labelled rows on the right side of 0.",
            reward,
            {"accuracy": "training", "eval/accuracy": "held-out"},
            "accuracy",
            percent=True,
        ),
        _chart(
            "Accuracy by margin",
            "Pairs on which people clearly differ should be easier. Whiskers are 95% intervals.",
            charts.accuracy_by("Accuracy by margin", _listed(measured, "by_margin"), "difference of the ratings", right),
        ),
        _chart(
            "Accuracy by length",
            "A model that only looks at length does well on one side alone. Whiskers are 95% intervals.",
            charts.accuracy_by("Accuracy by length", _listed(measured, "by_length"), length, right),
        ),
        _chart(
            "Calibration",
            "On the dashed line, a predicted 70% comes true 70% of the time. Each point has as many rows; whiskers are 95% intervals.",
            charts.calibration("Calibration", _listed(measured, "calibration"), "share of good rows" if labels else "preference"),
        ),
        _curve(
            "Area under the curve",
            "Share of (good, bad) pairs of labelled rows in which the good one scores higher; 50% is guessing.",
            reward,
            {"eval/auc": "held-out"},
            "AUC",
            percent=True,
        ),
        _curve(
            "Score margin",
            "Score of the preferred side minus that of the other.",
            reward,
            {"margin": "training", "eval/margin": "held-out"},
            "score",
        ),
        _curve("Reward model gradient norm", "Before clipping.", reward, {"grad_norm": "norm"}, "norm"),
    ]


def _tuning(sft: Rows) -> list[Chart | None]:
    return [
        _curve(
            "SFT loss",
            "Mean over the tokens to be learned.",
            sft,
            {"loss": "training", "eval/loss": "held-out"},
            "nats per token",
        ),
        _curve("SFT gradient norm", "Before clipping.", sft, {"grad_norm": "norm"}, "norm"),
    ]


def _health(rl: Rows) -> list[Chart | None]:
    adaptive = len({row.get("objective/kl_coef") for row in rl}) > 1
    return [
        _curve(
            "Step size",
            "Approximate KL of an update, and share of clipped tokens; high values mean steps that are too large.",
            rl,
            {"policy/approxkl_avg": "approximate KL", "policy/clipfrac_avg": "clipped share"},
            "per update",
        ),
        _curve(
            "Sampler against learner",
            "Divergence between the log-probabilities that sampled and those that learn; should be rounding only.",
            rl,
            {"val/sampler_kl": "KL"},
            "nats per token",
            log=True,
        ),
        _curve("Gradient norm", "Before clipping.", rl, {"grad_norm": "norm"}, "norm"),
        _curve(
            "KL coefficient",
            "Weight of the KL penalty, adapted to its target.",
            rl,
            {"objective/kl_coef": "coefficient"},
            "coefficient",
        )
        if adaptive
        else None,
    ]


def _cost(rl: Rows) -> list[Chart | None]:
    parts = {"time/rollout": "rollout", "time/score": "score", "time/learn": "learn"}
    return [
        _chart(
            "Time of a step",
            "Sampling responses, scoring them, learning from them. Bars cut at the top are steps that compiled.",
            charts.stacked("Time of a step", rl, parts, "seconds"),
        ),
        _curve("Throughput", "In the steps of RL.", rl, {"perf/tokens_per_s": "tokens"}, "tokens per second"),
        _curve("Peak memory", "Highest use so far.", rl, {"perf/peak_memory_gib": "memory"}, "GiB", smooth=False),
    ]


def _curve(
    title: str,
    caption: str,
    rows: Rows,
    series: dict[str, str],
    ylabel: str,
    *,
    percent: bool = False,
    log: bool = False,
    smooth: bool = True,
) -> Chart | None:
    return _chart(title, caption, charts.curves(title, rows, series, ylabel, percent=percent, log=log, smooth=smooth))


def _chart(title: str, caption: str, svg: Markup | None) -> Chart | None:
    return Chart(title, svg, caption) if svg else None


def _skipped(rows: Rows) -> str:
    count = max((row["skipped"] for row in rows if isinstance(row.get("skipped"), int | float)), default=0)
    return f"Updates skipped because the loss, a gradient or a score was not finite: {count:.0f}." if count else ""


def _tuned(summary: Mapping[str, Any]) -> str:
    before, after = (number(summary, "sft", f"loss_{when}") for when in ("before", "after"))
    if before is None or after is None:
        return ""
    return f"Loss on held-out rows: {before:.3f} nats per token before, {after:.3f} after."


def _listed(values: Any, name: str) -> Rows:
    found = values.get(name) if isinstance(values, Mapping) else None
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
