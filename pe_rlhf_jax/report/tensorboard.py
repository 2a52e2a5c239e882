"""The metrics log's mirror for TensorBoard."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class TensorBoardMirror:
    """One event file per stage and start, written before `write` returns.

    tensorboardX's SummaryWriter hands events to a thread that flushes now and then; rows before the checkpoint could be
    lost in a kill. Its EventsWriter writes the same files directly.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.writers: dict[str, EventsWriter] = {}

    def write(self, stage: str, step: int, row: Mapping[str, int | float]) -> None:
        values = [Summary.Value(tag=f"{stage}/{key}", simple_value=value) for key, value in row.items()]
        self._put(stage, Event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def rewind(self, stage: str, step: int) -> None:
        """Starts a file that tells TensorBoard to forget what earlier files say after `step` (its purge_step)."""
        if (self.folder / stage).exists():
            self.close(stage)
            start = SessionLog(status=SessionLog.START)
            self._put(stage, Event(step=step + 1, wall_time=time.time(), session_log=start))

    def close(self, stage: str | None = None) -> None:
        for name in list(self.writers) if stage is None else [stage]:
            if name in self.writers:
                self.writers.pop(name).close()

    def _put(self, stage: str, event: Event) -> None:
        if stage not in self.writers:
            folder = self.folder / stage
            folder.mkdir(parents=True, exist_ok=True)
            # File names hold whole seconds, and TensorBoard reads files in the order of their names: number them too.
            suffix = next(s for n in itertools.count() if not list(folder.glob(f"*{(s := f'.{n:04d}')}")))
            self.writers[stage] = EventsWriter(str(folder / "events"), suffix)
        self.writers[stage].write_event(event)
        self.writers[stage].flush()
