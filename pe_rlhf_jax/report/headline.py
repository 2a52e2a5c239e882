"""The report's headline: each figure as a tile with one sentence in plain words.

Figures come from summary.json; a run that has not been evaluated yet shows what its metrics tell, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pe_rlhf_jax.report.progress import duration

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Tile:
    """A headline figure. `tone` is "good", "bad" or "" (neither); `interval` is its 95% interval or another detail."""

    label: str
    value: str
    interval: str
    reading: str
    tone: str = ""


def tiles(summary: Mapping[str, Any], rows: Mapping[str, Rows], about: Literal["run", "policy", "reward"] = "run") -> list[Tile]:
    """The tiles that summary (summary.json) and rows (metrics by stage) allow: all, or those that are about one of its models."""
    policy, reward = (_gain, _judge, _kl, _form), (_reward_model,)
    run = (_gain, _judge, _reward_model, _kl, _form, _time, _memory, _model)
    makers = {"run": run, "policy": policy, "reward": reward}[about]
    return [tile for maker in makers if (tile := maker(summary, rows))]


def _gain(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    gain, raw, before, after = (number(summary, "rl", key) for key in ("gain_in_std", "gain", "reward_before", "reward_after"))
    label = "Reward, before to after"
    if gain is None and raw is not None:
        interval = _interval(summary.get("rl"), "gain_ci")
        moved = f" from {signed(before)} to {signed(after)}" if before is not None and after is not None else f" by {signed(raw)}"
        reading = f"On held-out prompts the mean reward went{moved}, in its own unit: the reference's rewards are all the same."
        return Tile(label, signed(raw), _show(interval), reading + _sure(interval), _tone(raw, interval))
    if gain is not None:
        interval = _interval(summary.get("rl"))
        moved = f"from {signed(before)} to {signed(after)}" if before is not None and after is not None else ""
        reading = (
            f"On held-out prompts the mean reward went {moved}; the unit is the standard deviation of the reference's rewards."
            if moved
            else "Change of the mean reward on held-out prompts, in standard deviations of the reference's rewards."
        )
        return Tile(label, f"{signed(gain)} std", _show(interval), reading + _sure(interval), _tone(gain, interval))
    scores = [row["objective/scores"] for row in rows.get("rl", ()) if _is_number(row.get("objective/scores"))]
    if len(scores) < 2:
        return None
    k = max(1, len(scores) // 10)
    first, last = sum(scores[:k]) / k, sum(scores[-k:]) / k
    reading = "Mean reward of the first and last tenth of the training batches; not yet measured on held-out prompts."
    return Tile(label, f"{signed(first)} → {signed(last)}", "training batches", reading)


def _judge(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    delta = number(summary, "judge", "delta")
    if delta is None:
        return None
    interval = _interval(summary["judge"])
    name = str(summary["judge"].get("name") or "An independent judge").rpartition(":")[2]
    tone = _tone(delta, interval)
    verdict = {
        "good": "agrees that answers got better",
        "bad": "finds that answers got worse",
        "": "sees no clear change",
    }
    before, after = (number(summary, "judge", key) for key in ("before", "after"))
    moved = f" (mean {signed(before)} before, {signed(after)} after)" if before is not None and after is not None else ""
    reading = f"{name}, which training never saw, {verdict[tone]}{moved}." + _sure(interval)
    return Tile("Independent judge", signed(delta), _show(interval), reading, tone)


def _reward_model(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    accuracy = number(summary, "reward_model", "accuracy")
    label = "Reward model accuracy"
    auc = number(summary, "reward_model", "auc")
    if auc is not None:
        interval = _interval(summary["reward_model"], "auc_ci")
        count = number(summary, "reward_model", "rows") or 0
        above = interval[0] > 0.5 if interval else auc > 0.5
        reading = (
            f"On {count:,.0f} held-out rows{_chose(summary)}: the share of (good, bad) pairs in which the good one scores higher; "
            f"guessing reaches 0.5. {accuracy or 0:.1%} of the rows are on the right side of 0"
        )
        guess = number(summary, "reward_model", "guessing", "accuracy")
        reading += f"; always the more common label would be right in {guess:.1%}." if guess is not None else "."
        return Tile("Reward model AUC", f"{auc:.3f}", _show(interval, ".3f"), reading, "good" if above else "bad")
    if accuracy is not None:
        interval = _interval(summary["reward_model"])
        pairs = number(summary, "reward_model", "pairs")
        where = f"On {pairs:,.0f} held-out pairs{_chose(summary)}" if pairs else "On held-out pairs"
        above = interval[0] > 0.5 if interval else accuracy > 0.5
        verdict = "guessing would reach 50%." if above else "that is not clearly better than guessing (50%)."
        reading = f"{where} it prefers the side that people preferred in {accuracy:.0%} of cases; {verdict}"
        return Tile(label, f"{accuracy:.1%}", _show(interval, ".1%"), reading, "good" if above else "bad")
    reward = rows.get("reward", ())
    key, form = "eval/accuracy", ".1%"
    if any("eval/auc" in row for row in reward):
        key, label, form = "eval/auc", "Reward model AUC", ".3f"
    found = [(row["step"], row[key]) for row in reward if _is_number(row.get(key))]
    if not found:
        return None
    kept = dict(found).get(number(summary, "reward_model", "best_step"))
    if kept is not None:
        reading = "Of the checkpoint that was kept, on the held-out rows that chose it; the stage `evaluate` measures it on more."
        return Tile(label, format(kept, form), "during training", reading)
    reading = "Latest evaluation during training, on the held-out rows kept for it; the final measurement is still to come."
    return Tile(label, format(found[-1][1], form), "during training", reading)


def _chose(summary: Mapping[str, Any]) -> str:
    count = number(summary, "reward_model", "selected_on")
    return f" ({count:,.0f} of them also chose the checkpoint)" if count else ""


def _kl(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    per_token, per_response = (number(summary, "rl", key) for key in ("kl_per_token", "kl_per_response"))
    label = "KL to the reference, in nats"
    reading = "How far the policy has moved from the reference; near 0 it writes alike."
    if per_token is not None:
        total = f", {per_response:.3g} per response" if per_response is not None else ""
        return Tile(label, f"{per_token:.3g}", f"per token{total}", reading)
    found = [row["objective/kl_per_token"] for row in rows.get("rl", ()) if _is_number(row.get("objective/kl_per_token"))]
    return Tile(label, f"{found[-1]:.3g}", "per token, last training step", reading) if found else None


def _form(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    length = [number(summary, "rl", f"length_{when}") for when in ("before", "after")]
    if None in length:
        return None
    details = []
    for key, form, text in (
        ("distinct_2", ".2f", "share of distinct token pairs"),
        ("ended", ".0%", "answers that end by themselves"),
    ):
        before, after = (number(summary, "rl", f"{key}_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            details.append(f"{text} {before:{form}} → {after:{form}}")
    text = "; ".join(details)
    reading = f"{text[:1].upper()}{text[1:]}. Large changes hint at a policy that games the reward." if text else ""
    return Tile("Response length", f"{length[0]:.1f} → {length[1]:.1f}", "tokens, mean", reading)


def _time(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    total = number(summary, "time", "total_s")
    if total is None:
        return None
    split = {part: number(summary, "time", f"rl_{part}_s") or 0.0 for part in ("rollout", "score", "learn")}
    spent = sum(split.values())
    parts = ", ".join(f"{seconds / spent:.0%} {part}" for part, seconds in split.items()) if spent else ""
    return Tile("Total time", duration(total), "", f"Of the RL steps' time: {parts}." if parts else "All stages together.")


def _memory(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    peak = number(summary, "peak_memory_gib")
    detail = ""
    if peak is None:
        found = [row["perf/peak_memory_gib"] for part in rows.values() for row in part if _is_number(row.get("perf/peak_memory_gib"))]
        if not found:
            return None
        peak, detail = max(found), "so far"
    return Tile("Peak memory", f"{peak:.2f} GiB", detail, "The most memory in use at any time of the run.")


def _model(summary: Mapping[str, Any], rows: Mapping[str, Rows]) -> Tile | None:
    total, trained = (number(summary, "model", key) for key in ("parameters", "trainable_parameters"))
    if not total or trained is None:
        return None
    reading = f"Of the policy, beside the backbone's {total / 1e6:,.0f} million; a reward or value model has as many, and a head."
    return Tile("Trained parameters", f"{trained / total:.2%}", f"{trained / 1e6:,.1f} million", reading)


def number(values: Mapping[str, Any], *path: str) -> float | None:
    """The number at a path of nested mappings, or None where there is none."""
    found: Any = values
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if _is_number(found) else None


def signed(value: float) -> str:
    """Two decimals with a sign (a true minus)."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _interval(section: Any, key: str = "ci") -> tuple[float, float] | None:
    interval = section.get(key) if isinstance(section, Mapping) else None
    usable = isinstance(interval, Sequence) and len(interval) == 2 and all(_is_number(value) for value in interval)
    return (interval[0], interval[1]) if usable and interval else None


def _show(interval: tuple[float, float] | None, form: str = "") -> str:
    if interval is None:
        return ""
    low, high = (format(value, form) if form else signed(value) for value in interval)
    return f"95% interval {low} to {high}"


def _sure(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return ""
    return " The interval excludes zero." if interval[0] > 0 or interval[1] < 0 else " The interval includes zero: it may be chance."


def _tone(value: float, interval: tuple[float, float] | None) -> str:
    low, high = interval or (value, value)
    return "good" if low > 0 else "bad" if high < 0 else ""
