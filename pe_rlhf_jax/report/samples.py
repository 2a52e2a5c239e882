"""Answers before and after training: kept as JSON lines, shown as a table.

A sample is `{"prompt", "reference", "policy", "reward_reference", "reward_policy"}` and, where a judge was asked,
`"judge_reference"` and `"judge_policy"`; the first of those with pictures have `"images"`, a list of data URIs. Its text is whatever a
model wrote; nothing here lets it act on the terminal.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pe_rlhf_jax.files import write_atomically

SHOWN_CHARACTERS = 600
"""Longer texts are cut in the terminal; the file and the HTML report keep them whole."""


def show(console: Console, samples: list[dict], limit: int) -> None:
    """Prints the first `limit` samples: prompt, the reference's answer, the policy's, and what each was worth, as far as they have it.

    Without rewards they are somebody's own prompts, which are shown whole.
    """
    judged = any("judge_policy" in sample for sample in samples[:limit])
    rewarded = any("reward_policy" in sample for sample in samples[:limit])
    title = Text("Held-out prompts, before and after", style="bold") if rewarded else None
    table = Table(box=box.ROUNDED, show_lines=True, expand=True, title=title, title_justify="left")
    table.add_column("prompt", ratio=3, overflow="fold", style="dim")
    table.add_column("reference (before)", ratio=5, overflow="fold")
    if trained := any("policy" in sample for sample in samples[:limit]):
        table.add_column("policy (after)", ratio=5, overflow="fold")
    if rewarded:
        table.add_column("reward", width=8, justify="right")
    if judged:
        table.add_column("judge", width=8, justify="right")
    for sample in samples[:limit]:
        cells = [
            _cell(sample.get(key), SHOWN_CHARACTERS if rewarded else None)
            for key in ("prompt", "reference", *(["policy"] if trained else []))
        ]
        changes = [_change(sample, name) for name, there in (("reward", rewarded), ("judge", judged)) if there]
        table.add_row(*cells, *changes)
    if table.rows:
        console.print(table)


def write(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file by one JSON object per line, in UTF-8; numbers that are not finite become `null`."""
    rows = [{key: _finite(value) for key, value in sample.items()} for sample in samples]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    # A lone surrogate has no UTF-8; as the escape \udXXX it is still the same JSON string.
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode("utf-8", errors="backslashreplace"))


def read(path: Path) -> list[dict]:
    """Reads what `write` wrote.

    Raises:
        ValueError: a line that is not a JSON object, with file and line.
    """
    samples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {line[:80]!r} ({error})") from error
        if not isinstance(sample, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(sample).__name__}")
        samples.append(sample)
    return samples


def visible(text: str) -> str:
    """Text that is safe to print: a character that acts rather than shows (escape, bidirectional override, lone
    surrogate) becomes its code, such as `<U+001B>`; line breaks stay, tabs become spaces."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(_visible(c) for c in text)


def _visible(character: str) -> str:
    if character in "\n\u200d\u200c":  # joiners are part of emoji and of several scripts
        return character
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"<U+{ord(character):04X}>" if hidden else character


def _cell(text: Any, most: int | None) -> Text:
    text = visible(text if isinstance(text, str) else "" if text is None else json.dumps(text, ensure_ascii=False))
    if most is not None and len(text) > most:
        text = f"{text[:most]}… (+{len(text) - most} characters)"
    return Text(text.strip() or "(empty)", style="" if text.strip() else "dim")


def _change(sample: Mapping[str, Any], name: str) -> Text:
    before, after = (sample.get(f"{name}_{role}") for role in ("reference", "policy"))
    text = Text(f"{_signed(before)}\n→ ", style="dim")
    gain = after - before if isinstance(before, int | float) and isinstance(after, int | float) else 0
    return text.append(_signed(after), style="bold green" if gain > 0 else "bold red" if gain < 0 else "bold")


def _signed(value: Any) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if isinstance(value, int | float) else "—"


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
