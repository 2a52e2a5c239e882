"""Runs a configuration over ranks, learning rates, dropouts and seeds, and tabulates what came out, as the paper's Tables 2 and 3 do.

    python benchmarks/sweep.py --config configs/quickstart.yaml --output runs/sweep --stages reward evaluate \\
        --grid lora.r=1,4,8,16 reward.optimizer.learning_rate=1e-4,3e-4 --seeds 0 1 2

Each point is a run folder of its own under `--output`, made by the same command that a person would type; so a sweep that was stopped
continues, and finished points are only read. Writes `sweep.csv` (one line a run), `sweep.md` (a mean over seeds for each point, with a
95% interval of that mean by Student's t; one seed has none) and `sweep.svg` (the metric over the first field of the grid, one line for
each setting of the rest). `--run-only I/N` does every N-th point, for several machines that share a disk.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

METRICS = (
    "reward_model.auc",
    "reward_model.accuracy",
    "rl.gain_in_std",
    "rl.gain",
    "rl.kl_per_token",
    "judge.delta",
    "peak_memory_gib",
    "time.total_s",
)
"""Figures of summary.json that are kept, where a run has them."""

Point = tuple[str, ...]
"""The grid's overrides, `a.b=c` each."""


def points(grid: Sequence[str]) -> list[Point]:
    """All combinations of `field=v1,v2,...`. Raises SystemExit for a field without values."""
    axes = []
    for axis in grid:
        field, equals, values = axis.partition("=")
        if not equals or not values:
            raise SystemExit(f"--grid expects field=value,value,..., found {axis!r}")
        axes.append([f"{field}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def folder_name(point: Point, seed: int) -> str:
    """A run name for a point, readable and valid."""
    parts = [f"{field.rpartition('.')[2]}-{value}" for field, _, value in (override.partition("=") for override in point)]
    return "_".join([*parts, f"seed-{seed}"])


def run(config: Path, output: Path, stages: Sequence[str], point: Point, seed: int) -> dict[str, Any] | None:
    """The summary of a point, running or continuing it first; None if it failed (its output says why)."""
    name = folder_name(point, seed)
    command = [sys.executable, "-m", "pe_rlhf_jax.main", "--config", str(config)]
    for override in (f"run.folder={output}", f"run.name={name}", f"run.seed={seed}", f"run.stages=[{','.join(stages)}]", *point):
        command += ["--set", override]
    print(f"{name} ...", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} failed with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}", file=sys.stderr)
        return None
    summary: dict[str, Any] = json.loads((output / name / "summary.json").read_text(encoding="utf-8"))
    return summary


def figure(summary: dict[str, Any], path: str) -> float | None:
    """The number at a dotted path, or None."""
    found: Any = summary
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) else None


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95% interval of the mean of a few seeds; None for one."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def table(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> str:
    """Markdown: a line for each point, mean and interval over its seeds."""
    found = [metric for metric in METRICS if any(row.get(metric) is not None for row in rows)]
    lines = ["| " + " | ".join([*fields, "seeds", *found]) + " |", "|---" * (len(fields) + 1 + len(found)) + "|"]
    for key, group in itertools.groupby(rows, key=lambda row: tuple(row[field] for field in fields)):
        runs = list(group)
        cells = [*key, str(len(runs))]
        for metric in found:
            values = [row[metric] for row in runs if row.get(metric) is not None]
            half = interval(values) if values else None
            cells.append("" if not values else f"{statistics.fmean(values):.3f}" + (f" ± {half:.3f}" if half is not None else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], fields: Sequence[str], path: Path) -> None:
    """The first metric that the runs have, over the first field."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    metric = next(m for m in METRICS if any(row.get(m) is not None for row in rows))
    figure_, axes = pyplot.subplots(figsize=(6, 4))
    places = list(dict.fromkeys(row[fields[0]] for row in rows))
    rest = lambda row: tuple(f"{field.rpartition('.')[2]} {row[field]}" for field in fields[1:])  # noqa: E731
    for setting in dict.fromkeys(map(rest, rows)):
        means, halves = [], []
        for place in places:
            values = [row[metric] for row in rows if row[fields[0]] == place and rest(row) == setting and row.get(metric) is not None]
            means.append(statistics.fmean(values) if values else math.nan)
            halves.append((interval(values) if values else None) or 0.0)
        axes.errorbar(range(len(places)), means, yerr=halves, marker="o", capsize=3, label=", ".join(setting) or None)
    axes.set_xticks(range(len(places)), places)
    axes.set(xlabel=fields[0], ylabel=metric)
    if len(fields) > 1:
        axes.legend()
    figure_.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="folder of the runs and of the tables")
    parser.add_argument("--grid", nargs="+", required=True, metavar="FIELD=V1,V2", help="fields and their values")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", nargs="+", default=["sft", "reward", "rl", "evaluate"])
    parser.add_argument("--run-only", metavar="I/N", help="run the I-th of every N points only (from 0), and tabulate nothing")
    arguments = parser.parse_args()
    share, _, count = (arguments.run_only or "0/1").partition("/")
    fields = [axis.partition("=")[0] for axis in arguments.grid]
    rows = []
    for number, (point, seed) in enumerate(itertools.product(points(arguments.grid), arguments.seeds)):
        if number % int(count) != int(share):
            continue
        summary = run(arguments.config, arguments.output, arguments.stages, point, seed)
        if summary is not None:
            values = dict(override.split("=", 1) for override in point)
            rows.append(values | {"seed": seed} | {metric: figure(summary, metric) for metric in METRICS})
    if not rows:
        raise SystemExit("no run ended well, so there is nothing to tabulate")
    if arguments.run_only:
        print("This share is done. When all are, the same command without --run-only reads the finished runs and writes the tables.")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*fields, "seed", *METRICS])
        writer.writeheader()
        writer.writerows(rows)
    (arguments.output / "sweep.md").write_text(table(rows, fields), encoding="utf-8")
    plot(rows, fields, arguments.output / "sweep.svg")
    print(table(rows, fields))


if __name__ == "__main__":
    main()
