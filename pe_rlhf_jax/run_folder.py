"""The folder of a run: one process at a time, one configuration, one summary."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import Config, ConfigError

MAY_CHANGE = ("run.stages", "run.tensorboard", "run.wandb_project", "run.compilation_cache")
"""Fields that say which part of a run is done now, or what is written beside it; they may differ when a run is continued."""


@contextlib.contextmanager
def opened(config: Config, restart: bool) -> Iterator[Path]:
    """The run's folder, made or continued, locked against a second process.

    With `restart` an existing folder is moved aside. Raises ConfigError if another process works in it, or if it was started with
    another configuration.
    """
    folder = config.run_folder
    if restart and folder.exists():
        folder.rename(_free_name(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{folder}: another process is running there; wait for it, or give another run.name") from error
        _check_configuration(folder, config)
        write_text(folder / "config.yaml", configuration.dump(config))
        yield folder


def read_config(folder: Path) -> Config:
    """The configuration that a run folder was made with."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
    return configuration.load(path)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json; readers see the old one or the new one."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once, so that a kill leaves the old content or the new."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _check_configuration(folder: Path, config: Config) -> None:
    if not (folder / "config.yaml").is_file():
        return
    lines = [line for line in configuration.differences(read_config(folder), config) if not line.startswith(MAY_CHANGE)]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(
            f"{folder} was started with another configuration (there -> given now):\n{shown}\n"
            "Give another run.name, go back to the configuration, or start anew with --restart (the old folder is moved aside)."
        )


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return path
