"""Progress on a terminal and off it, with a clock under the test's control."""

import io

import pytest
from rich.console import Console

from pe_rlhf_jax.report import progress
from pe_rlhf_jax.report.progress import Progress, StageProgress, duration, sparkline


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def rl(reward=0.5, **more):
    return {"objective/scores": reward, "objective/kl": 0.125, "objective/length": 31.4, "policy/entropy_avg": 2.0} | more


def test_off_a_terminal_lines_are_few_plain_and_unwrapped(clock):
    console = plain()
    with Progress(console).stage("rl", total=100) as stage:
        clock(30)
        for step in range(1, 101):
            stage.update(step, rl())
            clock(1)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "rl: 0/100, compiling"
    assert len(lines) == 1 + 10 + 1  # the start, one per 10 s, the end
    assert "\x1b" not in console.file.getvalue()
    assert lines[2].startswith("rl: 11/100, 0:40, 1.0 s/step, 1:29 left, reward +0.500, KL 0.125, length 31, entropy 2.00")
    assert lines[-1].startswith("✓ rl done: 100/100, 2:10, 1.0 s/step, reward +0.500")


def test_compilation_does_not_count_in_the_rate(clock):
    stage = StageProgress("rl", total=11)
    stage.update(0, {"eval/accuracy": 0.5})  # judged before the first update
    clock(300)
    assert stage.pace() == "compiling"
    stage.update(1, rl())
    assert stage.seconds_per_step() is None
    for step in (2, 3):
        clock(2)
        stage.update(step, rl())
    assert stage.pace() == "2.0 s/step, 0:16 left"


def test_a_late_compilation_bends_the_rate_only_a_little(clock):
    stage = StageProgress("rl", total=100)
    for step in range(1, 22):
        stage.update(step, rl())
        clock(100 if step == 10 else 1)
    assert stage.seconds_per_step() == pytest.approx((19 * 1 + 5) / 20)


def test_a_resumed_stage_starts_where_it_was(clock):
    stage = StageProgress("sft", total=100, done=40)
    assert stage.position() == "40/100"
    assert stage.pace() == "resumed after step 40, compiling"
    for step in (41, 42):
        stage.update(step, {"loss": 3.0})
        clock(0.5)
    assert stage.pace() == "2.0 steps/s, 0:29 left"


def test_evaluations_stay_shown_and_skipped_updates_are_said(clock):
    stage = StageProgress("reward", total=10)
    stage.update(1, {"loss": 0.7, "accuracy": 0.5, "eval/accuracy": 0.719, "margin": 0.1})
    stage.update(2, {"loss": float("nan"), "accuracy": 0.75, "margin": 0.2, "skipped": 1})
    text = stage.summary().plain
    assert text.endswith("loss not finite, accuracy 75.0%, held-out accuracy 71.9%, margin 0.20, 1 updates skipped")


def test_an_interrupted_stage_says_stopped(clock):
    console = plain()
    with pytest.raises(KeyboardInterrupt), Progress(console).stage("evaluate", total=4) as stage:
        stage.update(1, {})
        raise KeyboardInterrupt
    assert console.file.getvalue().splitlines()[-1].startswith("✗ evaluate stopped: 1/4")


def test_on_a_terminal_the_display_is_live_and_leaves_one_line():
    console = Console(
        file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    with Progress(console).stage("rl", total=2) as stage:
        stage.update(1, rl())
        stage.update(2, rl(0.75))
    written = console.file.getvalue()
    assert "\x1b[?25l" in written and "\x1b[?25h" in written  # the cursor was hidden, and is back
    assert written.splitlines()[-1].strip().endswith("entropy 2.00")
    rendered = plain()
    rendered.print(stage)
    assert "2/2" in rendered.file.getvalue() and "▁█" in rendered.file.getvalue()


def test_notes_are_not_markup_and_cannot_steer_the_terminal():
    console = plain()
    display = Progress(console)
    display.note("runs/[bold]x[/bold] \x1b[31m[/]")
    display.warn("row 3 skipped")
    assert console.file.getvalue().splitlines() == ["runs/[bold]x[/bold] <U+001B>[31m[/]", "warning: row 3 skipped"]


def test_duration_and_sparkline():
    assert [duration(s) for s in (0.4, 42, 725, 11250)] == ["0:00", "0:42", "12:05", "3:07:30"]
    assert sparkline([1.0]) == ""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(1000)))) == progress.SPARK_COLUMNS
    assert sparkline([2.0, 2.0]) == "▄▄"


def test_a_stage_that_ends_early_has_nothing_left(clock):
    console = plain()
    with Progress(console).stage("reward", 200) as stage:
        for step in (1, 2, 3):
            clock(2)
            stage.update(step, {"loss": 0.6})
    assert console.file.getvalue().splitlines()[-1] == "✓ reward done: 3/200, 0:06, 2.0 s/step, loss 0.600"
    with Progress(console).stage("reward", 200, done=40):
        pass
    assert console.file.getvalue().splitlines()[-1] == "✓ reward done: 40/200, 0:00, nothing left to do"
