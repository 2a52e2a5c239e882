"""Live progress: a bar with the numbers that matter on a terminal, plain lines elsewhere (CI, nohup, a notebook)."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pe_rlhf_jax.report.samples import visible

PLAIN_EVERY_S = 10.0
RATE_STEPS = 50
SPARK_COLUMNS = 16

FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    # stage: (metric, label, format), the most important first; its course is drawn
    "sft": (("loss", "loss", ".3f"), ("eval/loss", "evaluation loss", ".3f")),
    "reward": (
        ("loss", "loss", ".3f"),
        ("accuracy", "accuracy", ".1%"),
        ("eval/accuracy", "held-out accuracy", ".1%"),
        ("eval/auc", "held-out AUC", ".3f"),
        ("margin", "margin", ".2f"),
    ),
    "rl": (
        ("objective/scores", "reward", "+.3f"),
        ("objective/kl", "KL", ".3f"),
        ("objective/length", "length", ".0f"),
        ("policy/entropy_avg", "entropy", ".2f"),
        ("loss/value_avg", "value loss", ".3f"),
    ),
}


class Progress:
    """Shows one stage at a time. A console that is not an interactive terminal gets plain lines."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[StageProgress]:
        """Shows a stage of `total` steps of which `done` were finished before (a resumed run)."""
        stage = StageProgress(name, total, done)
        live = Live(stage, console=self.console, refresh_per_second=4, transient=True) if self.live else None
        if not live:
            stage.on_update = self._plain_updates(stage)
            self._line(Text(f"{name}: {stage.position()}, {stage.pace()}"))
        outcome = "stopped"
        try:
            with live or contextlib.nullcontext():
                yield stage
            outcome, stage.ended = "done", True
        finally:  # after the live display is gone, whether the stage ended or was interrupted
            mark = ("✓ ", "green") if outcome == "done" else ("✗ ", "red")
            self._line(Text.assemble(mark, (name, "bold"), f" {outcome}: ", stage.summary()))

    def note(self, text: str) -> None:
        """Prints a line, above the display if there is one."""
        self._line(Text(visible(text)))

    def warn(self, text: str) -> None:
        """Prints a warning that stands out."""
        self._line(Text.assemble(("warning: ", "bold yellow"), visible(text)))

    def _line(self, text: Text) -> None:
        # A log keeps one line per message; a terminal wraps at words.
        self.console.print(text, soft_wrap=not self.live, highlight=False)

    def _plain_updates(self, stage: StageProgress) -> Any:
        last = time.monotonic()

        def on_update() -> None:
            nonlocal last
            if time.monotonic() - last >= PLAIN_EVERY_S:
                last = time.monotonic()
                self._line(Text(f"{stage.name}: {stage.summary().plain}"))

        return on_update


class StageProgress:
    """The state of one stage's display; `update` after every step."""

    def __init__(self, name: str, total: int, done: int = 0):
        self.name, self.total, self.step, self.resumed_at = name, total, done, done
        self.ended = False
        """Whether the stage is over, after all its steps or before."""
        self.started = time.monotonic()
        self.latest: dict[str, float] = {}
        self.course: list[float] = []
        self.marks: deque[tuple[float, int]] = deque(maxlen=RATE_STEPS + 1)
        self.on_update: Any = lambda: None
        self._spinner = Spinner("dots", style="cyan")

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` steps are finished, `total` at the end. Metrics that come now and then (evaluations) stay shown."""
        # The first update only starts the clock: the time before it is mostly compilation.
        if step > self.resumed_at:
            self.marks.append((time.monotonic(), step))
        self.step = step
        metrics = metrics or {}
        self.latest.update({key: float(value) for key, value in metrics.items()})
        figures = FIGURES.get(self.name)
        if figures and math.isfinite(value := float(metrics.get(figures[0][0], math.nan))):
            self.course.append(value)
        self.on_update()

    def seconds_per_step(self) -> float | None:
        """Mean of the recent steps, None before two updates. A slow one (a late compilation) counts as five at most."""
        marks = list(self.marks)
        spans = [(t1 - t0) / (s1 - s0) for (t0, s0), (t1, s1) in itertools.pairwise(marks) if s1 > s0]
        if not spans:
            return None
        limit = 5 * statistics.median(spans)
        return statistics.fmean(min(span, limit) for span in spans)

    def position(self) -> str:
        return f"{self.step}/{self.total}"

    def pace(self) -> str:
        """Rate and time left, or why there is none yet."""
        over = self.ended or self.step >= self.total
        if not self.marks:
            resumed = f"resumed after step {self.resumed_at}, " if self.resumed_at else ""
            return "nothing left to do" if over else f"{resumed}compiling"
        seconds = self.seconds_per_step()
        if seconds is None:
            return "" if over else "first step done"
        rate = f"{seconds:.1f} s/step" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.1f} steps/s"
        return rate if over else f"{rate}, {duration(seconds * (self.total - self.step))} left"

    def figures(self) -> list[Text]:
        """The stage's numbers, as far as known."""
        parts = [
            Text.assemble((f"{label} ", "dim"), (_number(self.latest[key], form), "" if i else "bold"))
            for i, (key, label, form) in enumerate(FIGURES.get(self.name, ()))
            if key in self.latest
        ]
        if self.latest.get("skipped"):
            parts.append(Text(f"{self.latest['skipped']:.0f} updates skipped", style="yellow"))
        return parts

    def summary(self) -> Text:
        """One line: position, elapsed, pace, figures."""
        parts = [self.position(), duration(time.monotonic() - self.started), self.pace()]
        return Text(", ").join([*(Text(part) for part in parts if part), *self.figures()])

    def __rich__(self) -> RenderableType:
        first = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [
            self._spinner,
            Text(self.name, style="bold"),
            ProgressBar(total=max(self.total, 1), completed=self.step, width=24),
            Text(self.position(), style="cyan"),
            Text(duration(time.monotonic() - self.started), style="dim"),
            Text(self.pace()),
        ]
        first.add_row(*cells)
        second = Text("  ") + Text(sparkline(self.course), style="cyan")
        second += Text("  " if self.course else "") + Text(" · ", style="dim").join(self.figures())
        second.no_wrap, second.overflow = True, "ellipsis"
        return Group(first, second) if self.latest else first


def sparkline(values: list[float], columns: int = SPARK_COLUMNS) -> str:
    """The course of `values` as block characters, each the mean of its share; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    columns = min(columns, len(values))
    edges = [i * len(values) // columns for i in range(columns + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (m - low) / (high - low)) if high > low else 3] for m in means)


def duration(seconds: float) -> str:
    """Such as `0:42`, `12:05` or `3:07:30`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"
