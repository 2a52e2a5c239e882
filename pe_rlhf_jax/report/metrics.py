"""The metrics log: one JSON object per line in `metrics.jsonl`, mirrored to TensorBoard and, if asked, to W&B.

`metrics.jsonl` is the record: resuming rewinds it to the checkpoint, so that a run that was killed leaves the rows of
an uninterrupted one. The mirrors follow it as closely as their formats allow.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.files import is_remote, write_atomically

RESERVED = ("stage", "step")
REMOTE_EVERY_S = 60.0


class MetricsLog:
    """Appends rows `{"stage": ..., "step": ..., **metrics}` to `<folder>/metrics.jsonl`.

    JSON has no NaN and no infinity: a value that is not finite is written as `null`, so that strict readers (jq,
    pandas, JavaScript) read the file. A row is in the file when `write` returns and survives a kill of the process; in an object store,
    which cannot append, when `flush` returns, and at the latest with the first row after a minute.

    Args:
        folder: the run folder; made if missing.
        tensorboard: also write event files under `<folder>/tensorboard/<stage>`, tags `<stage>/<metric>`; not in an object store.
        wandb_project: also log to this Weights & Biases project. A resumed run continues there; W&B cannot take rows
            back, so steps after the last checkpoint appear twice there.
        name, config: the run's name and configuration shown by W&B.

    Raises:
        ConfigError: `wandb_project` is given and the package `wandb` is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        name: str = "",
        config: dict | None = None,
    ):
        self.path = folder / "metrics.jsonl"
        self._wandb = _WandbMirror(folder, wandb_project, name, config) if wandb_project else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend(self.path)
        self._waiting: list[bytes] = []
        self._flushed = time.monotonic()
        self._tensorboard = None
        if tensorboard and not is_remote(folder):  # imported here: tensorboardX loads torch where torch is installed, which takes seconds
            from pe_rlhf_jax.report.tensorboard import TensorBoardMirror

            self._tensorboard = TensorBoardMirror(folder / "tensorboard")

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row; values may be Python, numpy or JAX scalars.

        Raises:
            ValueError: a metric is not a number, or is called `stage` or `step`.
            OSError: the row could not be written (a full disk); the rows before it stay whole.
        """
        row = {key: _number(key, value) for key, value in metrics.items()}
        clash = [key for key in RESERVED if key in row]
        if clash:
            raise ValueError(f"stage {stage!r} has a metric called {clash[0]!r}, which is a column of every row; rename it")
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._append(json.dumps({"stage": stage, "step": int(step), **finite}).encode() + b"\n")
        if self._tensorboard:
            self._tensorboard.write(stage, int(step), row)
        if self._wandb:
            self._wandb.write(stage, int(step), row)

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows of `stage` after `step`, where training resumes; other rows keep their bytes and order.

        The file is replaced in one move, so a kill leaves either the old rows or the new ones.
        """
        self.flush()
        _mend(self.path)
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        rows = zip(lines, _parse(self.path), strict=True)
        kept = [line + b"\n" for line, row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(lines):
            write_atomically(self.path, b"".join(kept))
        if self._tensorboard:
            self._tensorboard.rewind(stage, step)

    def rows(self, stage: str | None = None) -> list[dict]:
        """All rows in the order of the file, or those of one stage."""
        self.flush()
        return read(self.path, stage)

    def close(self) -> None:
        """Ends the mirrors; metrics.jsonl itself is never held open."""
        self.flush()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.close()

    def flush(self) -> None:
        """Puts the rows that wait into the file: to be called before a checkpoint is saved, whose rows must be there when it is found."""
        if self._waiting:
            before = self.path.read_bytes() if self.path.exists() else b""
            write_atomically(self.path, before + b"".join(self._waiting))
            self._waiting.clear()
        self._flushed = time.monotonic()

    def _append(self, data: bytes) -> None:
        if is_remote(self.path):
            self._waiting.append(data)
            if time.monotonic() - self._flushed > REMOTE_EVERY_S:
                self.flush()
            return
        with self.path.open("ab", buffering=0) as file:
            size, written = file.tell(), 0
            try:
                while written < len(data):
                    written += file.write(data[written:]) or 0
            except OSError:
                file.truncate(size)  # no half row for the next one to join
                raise


def read(path: Path, stage: str | None = None) -> list[dict]:
    """Rows of a metrics file, of one stage if given; a half-written last line is left out, a missing file has no rows.

    Raises:
        ConfigError: a line that is not a row, with its number.
    """
    return [row for row in _parse(path) if stage is None or row["stage"] == stage]


def _parse(path: Path) -> list[dict]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # what follows the last line break is empty, or a row cut short
            raise ConfigError(
                f"{path}, line {number}: expected a JSON object with a stage and a step, found {line[:80]!r}; "
                "the file was changed or damaged: remove that line"
            )
    return rows


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    whole = isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    return row if whole else None


def _mend(path: Path) -> None:
    """Makes the file end with a whole line: a killed writer can leave part of one."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        head, newline, tail = data.rpartition(b"\n")
        write_atomically(path, data + b"\n" if _row(tail) else head + newline)


def _number(key: str, value: Any) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return value
    raise ValueError(f"metric {key!r}: expected a number, found {type(value).__name__} {value!r}")


class _WandbMirror:
    """Logs to Weights & Biases, each stage over its own step. Its run id is kept in the run folder, for resuming."""

    def __init__(self, folder: Path, project: str, name: str, config: dict | None):
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                f"run.wandb_project is {project!r}, but the package wandb cannot be imported ({error}); "
                "install it with `pip install 'pe_rlhf_jax[wandb]'`, or set run.wandb_project to null"
            ) from error
        id_file = folder / "wandb_id.txt"
        known = id_file.read_text().strip() if id_file.exists() else None
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=project, name=name or None, config=config, dir=None if is_remote(folder) else str(folder), id=known, resume="allow"
        )
        self.stages: set[str] = set()
        if self.run.id != known:
            write_atomically(id_file, f"{self.run.id}\n".encode())

    def write(self, stage: str, step: int, row: Mapping[str, int | float]) -> None:
        if stage not in self.stages:
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self.stages.add(stage)
        self.run.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in row.items()}})

    def close(self) -> None:
        self.run.finish()
