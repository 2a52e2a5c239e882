"""The report's charts: matplotlib figures as small SVG to be placed inside the page.

Text stays text and colours are the page's CSS variables, so that charts follow its font and its light or dark scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Stand-ins that no other element uses; the SVG gets the CSS variable instead.
VARIABLES = {
    "#010a01": "--ink-2",
    "#010a02": "--line",
    "#010a03": "--c1",
    "#010a04": "--c2",
    "#010a05": "--c3",
    "#010a06": "--c4",
    "#010a07": "--c5",
}
INK, LINE, *COLORS = VARIABLES
STYLES = ("-", "--", ":", "-.")
"""Of lines beyond as many as there are colors."""
MAX_POINTS = 200
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.5,
}

Rows = Sequence[Mapping[str, Any]]


def curves(
    title: str, rows: Rows, series: Mapping[str, str], ylabel: str, *, percent: bool = False, log: bool = False, smooth: bool = True
) -> Markup | None:
    """Metrics over steps, each a smooth line over its faint raw points.

    Args:
        series: metric name -> legend; metrics that no row holds are left out.
        percent: the metrics are shares.
        log: logarithmic values; only the positive ones are drawn.
        smooth: False for a metric without noise, drawn as it is.

    Returns:
        SVG, or None if there is nothing to draw.
    """
    lines = [(label, *_column(rows, name)) for name, label in series.items()]
    if log:
        lines = [(label, steps[values > 0], values[values > 0]) for label, steps, values in lines]
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        shown: list[Any] = []
        for number, (_, steps, values) in enumerate(lines):
            color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
            few = len(values) < 12
            noisy = smooth and not few
            line = values if not noisy else np.exp(smoothed(np.log(values))) if log else smoothed(values)
            thin = slice(None, None, max(1, -(-len(steps) // MAX_POINTS)))
            if noisy:
                axes.plot(steps[thin], values[thin], ".", color=color, alpha=0.3, markersize=5, markeredgewidth=0)
            axes.plot(steps[thin], line[thin], "o" * few + style, color=color, markersize=3)
            shown.append(axes.lines[-1])
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if log:
            axes.set_yscale("log")
        if percent:
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        if len(lines) > 1:  # labels of their own: matplotlib leaves out those that begin with _
            axes.legend(shown, [label for label, *_ in lines], loc="best", handlelength=1.2 if len(lines) <= len(COLORS) else 2.5)

    return _svg(title, draw)


def calibration(title: str, bins: Rows, what: str) -> Markup | None:
    """Predicted against observed share, of `what`, with 95% intervals (Wilson)."""
    predicted, observed, count = (_numbers(bins, key) for key in ("predicted", "observed", "count"))
    use = np.isfinite(predicted) & np.isfinite(observed) & (count > 0)
    if not use.any():
        return None

    def draw(axes: Axes) -> None:
        predicted_, observed_, count_ = predicted[use], observed[use], count[use]
        low = max(0.0, min(predicted_.min(), observed_.min(), 0.5) - 0.05)
        axes.plot([low, 1], [low, 1], "--", color=INK, linewidth=0.9, label="perfect")
        axes.errorbar(predicted_, observed_, yerr=_wilson(observed_, count_), fmt="none", ecolor=COLORS[0], elinewidth=1, alpha=0.5)
        axes.scatter(predicted_, observed_, s=40, color=COLORS[0], alpha=0.85, linewidths=0, label="reward model")
        axes.set(xlabel=f"predicted {what}", ylabel=f"observed {what}", xlim=(low, 1.02), ylim=(low, 1.04))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(loc="upper left", handlelength=1.6)

    return _svg(title, draw)


def accuracy_by(title: str, bins: Rows, xlabel: str, guessing: float | None = None) -> Markup | None:
    """Accuracy in bins of something that the rows differ in, such as length, with 95% intervals (Wilson), beside that of guessing, by
    default a half.
    """
    low, high, accuracy, count = (_numbers(bins, key) for key in ("low", "high", "accuracy", "count"))
    use = np.isfinite(accuracy) & (count > 0)
    if not use.any():
        return None

    def draw(axes: Axes) -> None:
        p, n = accuracy[use], count[use]
        x = np.arange(len(p))
        axes.bar(x, p, width=0.62, color=COLORS[0], alpha=0.75)
        axes.errorbar(x, p, yerr=_wilson(p, n), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        axes.axhline(0.5 if guessing is None else guessing, color=INK, linewidth=0.9, linestyle="--", label="guessing")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
        names = [f"{_short(a)} to {_short(b)}" for a, b in zip(low[use], high[use], strict=True)]
        axes.set_xticks(x, [f"{name}\nn = {int(k)}" for name, k in zip(names, n, strict=True)])
        axes.set(xlabel=xlabel, ylabel="accuracy", ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(False, axis="x")

    return _svg(title, draw)


def _wilson(share: np.ndarray, count: np.ndarray) -> np.ndarray:
    """How far the 95% interval of each share reaches below and above it [2, N] (Wilson 1927), as if rows were independent."""
    centre, scale = (share + 1.92 / count) / (1 + 3.84 / count), 1.96 / (1 + 3.84 / count)
    half = scale * np.sqrt(share * (1 - share) / count + 0.96 / count**2)
    return np.clip([share - (centre - half), centre + half - share], 0, None)


def _short(bound: float) -> str:
    return f"{bound:.0f}" if abs(bound) >= 10 else f"{bound:.2g}"


def stacked(title: str, rows: Rows, series: Mapping[str, str], ylabel: str) -> Markup | None:
    """Metrics over steps stacked on each other; long runs are averaged to at most 60 bars. Outliers are cut at the top."""
    steps = np.array([row["step"] for row in rows], float)
    parts = np.array([np.nan_to_num(_numbers(rows, name)) for name in series])
    if not len(steps) or not parts.any():
        return None

    def draw(axes: Axes) -> None:
        groups = np.array_split(np.arange(len(steps)), min(len(steps), 60))
        x = np.array([steps[g].mean() for g in groups])
        width = 0.85 * (x[1] - x[0] if len(x) > 1 else 1)
        bottom = np.zeros(len(groups))
        for color, (name, part) in zip(COLORS, zip(series.values(), parts, strict=True), strict=False):
            height = np.array([part[g].mean() for g in groups])
            axes.bar(x, height, width, bottom=bottom, color=color, alpha=0.8, label=name)
            bottom += height
        ceiling = 2.5 * float(np.median(bottom))  # compiling makes the first steps many times as long
        if 0 < ceiling < bottom.max():
            axes.set_ylim(0, ceiling)
        axes.set(xlabel="step", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(False, axis="x")
        axes.legend(loc="lower center", ncols=len(series), bbox_to_anchor=(0.5, 1.0), handlelength=1)

    return _svg(title, draw)


def smoothed(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Centred moving average with Gaussian weights, a twentieth of the series wide; at the ends over what there is."""
    sigma = max(1.0, len(values) / 20)
    reach = min(int(3 * sigma), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    total, weight = (np.convolve(x, kernel)[reach : reach + len(values)] for x in (values, np.ones(len(values))))
    return total / weight


def _column(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    values = _numbers(rows, name)
    steps = np.array([row["step"] for row in rows], float)
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _numbers(rows: Rows, name: str) -> np.ndarray:
    values = (row.get(name) for row in rows)
    return np.array([v if isinstance(v, int | float) else np.nan for v in values], float)


def _svg(title: str, draw: Any) -> Markup:
    key = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(5.3, 2.75), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        out = StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)  # a style would reach the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)  # coordinates, not labels
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg, count=1)
    # Several charts share a page: ids are made unique, and the namespaces that HTML does not need go.
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return Markup(re.sub(r"\s*\n\s*", " ", svg))
