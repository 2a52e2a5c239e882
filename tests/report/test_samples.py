"""Samples hold whatever a model wrote: they come back whole and cannot act on the terminal."""

import io
import json

import pytest
from rich.console import Console

from pe_rlhf_jax.report import samples

HOSTILE = "\x1b[2J[bold red]x[/] [link=file:///etc]y \u202egnp.exe\x9b31m \x00 <script>alert(1)</script> \U0001f44d 映画\nnext\tline"


def sample(**more):
    return {"prompt": "p", "reference": "r", "policy": "q", "reward_reference": -0.31, "reward_policy": 1.204} | more


def shown(rows, limit=5, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    samples.show(console, rows, limit)
    return console.file.getvalue()


def test_samples_come_back_as_they_were(tmp_path):
    rows = [sample(policy=HOSTILE, judge_policy=0.5), sample(prompt="line\u2028separator", reference="\ud800 alone")]
    samples.write(tmp_path / "samples/a.jsonl", rows)
    assert samples.read(tmp_path / "samples/a.jsonl") == rows


def test_numbers_that_are_not_finite_become_null(tmp_path):
    samples.write(tmp_path / "a.jsonl", [sample(reward_policy=float("nan"))])
    assert json.loads((tmp_path / "a.jsonl").read_text())["reward_policy"] is None


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        samples.read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, found list"):
        samples.read(tmp_path / "a.jsonl")


def test_the_table_shows_text_and_rewards_and_fits():
    text = shown([sample(judge_reference=-0.2, judge_policy=0.7), sample(prompt="second")], limit=1)
    for part in ("prompt", "reference (before)", "policy (after)", "\N{MINUS SIGN}0.31", "→ +1.20", "judge", "→ +0.70"):
        assert part in text
    assert "second" not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "judge" not in shown([sample()])


def test_hostile_text_is_shown_not_obeyed():
    text = shown([sample(policy=HOSTILE, prompt="[/nothing]")], width=200)
    assert not set(text) & set("\x1b\x9b\x00\u202e\t")
    for part in ("<U+001B>[2J[bold red]x[/]", "<U+202E>", "<U+0000>", "[/nothing]", "\U0001f44d 映画"):
        assert part in text


def test_missing_and_long_parts_are_shown_as_such():
    text = shown([{"prompt": "p", "policy": "y" * 700, "reward_policy": None}], width=200)
    assert "(empty)" in text and "(+100 characters)" in text and "—" in text


def test_nothing_to_show_prints_nothing():
    assert shown([]) == ""


def test_ones_own_prompts_are_shown_whole_and_without_what_nobody_measured():
    text = shown([{"prompt": "p", "reference": "r" * 900, "policy": "q"}])
    assert text.count("r") >= 900 and "characters)" not in text
    assert "Held-out" not in text and "reward" not in text
    assert "characters)" in shown([sample(reference="r" * 900)])
    assert "policy" not in shown([{"prompt": "p", "reference": "before RL"}])
