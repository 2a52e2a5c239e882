"""The HTML report of a run: one file, no scripts, nothing loaded from anywhere.

It is built from whatever the run folder holds; what is missing or cannot be read is said on the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.files import is_remote, write_atomically
from pe_rlhf_jax.report import headline, health, metrics, samples, sections
from pe_rlhf_jax.report.progress import duration

SAMPLES_OPEN, SAMPLES_SHOWN = 8, 50
_PICTURE = re.compile(r"data:image/(?:webp|png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")
STAGE_TITLES = {
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "rl": "reinforcement learning",
    "evaluate": "evaluation",
    "export": "export",
}
FIGURES_OF = {"sft": "sft", "reward": "reward_model", "rl": "rl"}
"""Where in summary.json the figures of a stage are."""


@dataclass
class Run:
    """What a run folder holds, as far as it could be read."""

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[dict]] = field(default_factory=dict)
    samples: list[tuple[str, list[dict]]] = field(default_factory=list)
    config: str = ""
    warnings: list[health.Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def build(folder: Path) -> Path:
    """Writes `<folder>/report.html` from config.yaml, metrics.jsonl, summary.json and samples/*.jsonl; returns its path.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder; expected one that `pe-rlhf run` made")
    run = load(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=lambda value: samples.visible(str(value)), change=change, pictures=pictures)
    page = environment.get_template("template.html.j2").render(
        run=run,
        tiles=headline.tiles(run.summary, run.rows),
        sections=sections.drawn(run.rows, run.summary),
        stage_times=_stage_times(run.summary),
        facts=_facts(run),
        samples_open=SAMPLES_OPEN,
        samples_shown=SAMPLES_SHOWN,
    )
    path = folder / "report.html"
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def load(folder: Path) -> Run:
    """Reads a run folder; what is missing or damaged becomes a line of `problems`."""
    run = Run(name=folder.name if is_remote(folder) else folder.resolve().name)

    config = folder / "config.yaml"
    if config.exists():
        run.config = config.read_bytes().decode("utf-8", errors="replace")
    else:
        run.problems.append("config.yaml is missing, so the configuration is not shown.")

    try:
        for row in metrics.read(folder / "metrics.jsonl"):
            run.rows.setdefault(row["stage"], []).append(row)
    except ValueError as error:
        run.problems.append(f"Curves are left out: {error}")
    else:
        if not run.rows:
            run.problems.append("metrics.jsonl is missing or empty: no stage has trained yet, so there are no curves.")

    parsed = _parsed(run.config)
    run.warnings = health.findings(run.rows.get("rl", []), parsed)
    stages = set(STAGE_TITLES if parsed is None else parsed.run.stages) | run.rows.keys()

    summary = folder / "summary.json"
    if not summary.exists():
        interim = " Figures come from training, not from held-out data." if run.rows else ""
        run.problems.append(f"summary.json is missing: the run has not ended.{interim}")
    else:
        try:
            run.summary = json.loads(summary.read_text(encoding="utf-8"))
            if not isinstance(run.summary, dict):
                raise ValueError(f"expected a JSON object, found {type(run.summary).__name__}")
        except ValueError as error:
            run.summary = {}
            run.problems.append(f"summary.json cannot be read ({error}); `evaluate` writes it again.")
    if run.summary:
        absent = [name for stage, name in FIGURES_OF.items() if stage in stages and not run.summary.get(name)]
        if absent:
            run.problems.append(f"summary.json has no figures of {', '.join(absent)}: these stages were not run or not evaluated.")

    for path in sorted((folder / "samples").glob("*.jsonl"), key=_natural):
        try:
            run.samples.append((path.stem, samples.read(path)))
        except ValueError as error:
            run.problems.append(f"Samples are left out: {error}")
    if "rl" in stages and not any(rows for _, rows in run.samples):
        run.problems.append("samples/ has no samples: `evaluate` writes them.")
    return run


def _parsed(text: str) -> configuration.Config | None:
    """The configuration; None if this version cannot read it."""
    try:
        return configuration.parse(text)
    except configuration.ConfigError:
        return None


def _stage_times(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds of each stage with its share of their sum, for the bar."""
    seconds = {stage: headline.number(summary, "time", f"{stage}_s") or 0.0 for stage in STAGE_TITLES}
    total = sum(seconds.values())
    return [
        {"title": STAGE_TITLES[stage], "share": spent / total, "time": duration(spent)} for stage, spent in seconds.items() if spent > 0
    ]


def _facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Model, device and versions as tables."""
    tables = []
    for key, title in (("model", "Model"), ("device", "Device"), ("versions", "Versions")):
        values = run.summary.get(key)
        if isinstance(values, Mapping):
            tables.append((title, [(str(name).replace("_", " "), _fact(value)) for name, value in values.items()]))
        elif values:
            tables.append((title, [(title.lower(), _fact(values))]))
    return tables


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def change(sample: Mapping[str, Any], name: str) -> dict[str, str]:
    """Reward (or judge) of a sample before and after, ready to show."""
    before, after = (headline.number(sample, f"{name}_{role}") for role in ("reference", "policy"))
    tone = "" if before is None or after is None or before == after else "good" if after > before else "bad"
    shown = ["—" if value is None else headline.signed(value) for value in (before, after)]
    return {"before": shown[0], "after": shown[1], "tone": tone}


def pictures(sample: Mapping[str, Any]) -> list[str]:
    """The sample's pictures, of which each is in the file itself; anything else is left out."""
    found = sample.get("images")
    return [uri for uri in found if isinstance(uri, str) and _PICTURE.fullmatch(uri)] if isinstance(found, list) else []


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
