"""The folder of a run: one process at a time, one configuration, one summary."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import hosts
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.files import is_remote, write_atomically

RENEWED_S, STALE_S = 10.0, 40.0  # how often a note in an object store is renewed, and how long an unchanged one is waited for

MAY_CHANGE = re.compile(
    r"run\.(name|folder|stages|checkpoint_every|max_nonfinite|tensorboard|wandb_project|host_timeout_s|compilation_cache)"
    r"|(evaluate|export|mesh)\..*|(sft|reward|rl)\.micro_batch_size|rl\.sampling\.(max_num_seqs|(gather|join)_weights)"
    r"|model\.(any_backbone|remat|attention_block|logprob_chunk)|data\.image_cache_gib"
)
"""Fields that may differ when a run is continued: which part of it is done now, what is written beside it and how often, what is let
through, what is done with the trained models, and where and in which portions it is computed, which changes results by rounding only."""


@contextlib.contextmanager
def opened(config: Config, restart: bool) -> Iterator[Path]:
    """The run's folder, made or continued, locked against a second process. Of several hosts the first one does that for all of them.

    With `restart` an existing folder is moved aside. Raises ConfigError if another process works in it, if it was started with another
    configuration, if it cannot be made or written, or if the hosts do not share it.
    """
    folder = config.run_folder
    with contextlib.ExitStack() as locks:
        mark = hosts.once(lambda: _open(folder, config, restart, locks))
        if hosts.largest(_mark(folder) != mark):
            raise ConfigError(
                f"{folder} is not the same folder on all hosts; set run.folder to one that they share: an object store "
                "(gs://BUCKET/FOLDER) or a network disk"
            )
        yield folder


def _open(folder: Path, config: Config, restart: bool, locks: contextlib.ExitStack) -> str:
    """Makes, locks and checks the folder; returns what its lock says."""
    try:
        if is_remote(folder):
            locks.enter_context(_noted(folder))
        if restart and folder.exists():
            if not is_remote(folder):
                # Locked before it is moved, and until the end: a process that works in it would go on in the new folder.
                locks.enter_context(_locked(folder))
            folder.rename(_free_name(folder))
        folder.mkdir(parents=True, exist_ok=True)
        if not is_remote(folder):
            locks.enter_context(_locked(folder))
        _check_configuration(folder, config)
        write_atomically(folder / "config.yaml", configuration.dump(config).encode())
        return _mark(folder)
    except ImportError as error:
        raise ConfigError(f"{folder}: {error}; for gs:// install `pe_rlhf_jax[gcs]`") from error
    except ConfigError:
        raise
    except Exception as error:  # clients of object stores have errors of their own
        raise ConfigError(
            f"{folder} cannot be used as a run folder ({error}); make room or give access, or choose another place with run.folder"
        ) from error


def _mark(folder: Path) -> str:
    """Which process the lock says to be running there; empty where none."""
    return _note(_lock(folder)).partition(" ")[0]


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock") if is_remote(folder) else folder / ".lock"


def _note(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _taken(folder: Path) -> ConfigError:
    return ConfigError(f"{folder}: another process is running there; wait for it, or give another run.name")


def config_file(folder: Path) -> Path:
    """Where a run folder's configuration is. Raises ConfigError if it is no run folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
    return path


def read_config(folder: Path) -> Config:
    """The configuration that a run folder was made with."""
    return configuration.load(config_file(folder))


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, in which numbers that are not finite are null; readers see the old one or the new one."""
    write_atomically(folder / "summary.json", (json.dumps(_finite(summary), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _noted(folder: Path) -> Iterator[None]:
    """Object stores have no locks: a note beside the folder is written anew all the time while a process runs, and goes when it ends. One
    that stands still belongs to a process that was killed.
    """
    path, mine, done = _lock(folder), uuid.uuid4().hex, threading.Event()

    def write(number: int) -> None:
        write_atomically(path, f"{mine} {number}".encode())

    def renew() -> None:
        number = 0
        while not done.wait(RENEWED_S):
            with contextlib.suppress(Exception):  # the network may come back in time
                if _mark(folder) not in (mine, ""):
                    print(f"error: another process has taken {folder} over, since this one stood still for too long", file=sys.stderr)
                    os._exit(2)
                write(number := number + 1)

    if before := _note(path):
        time.sleep(STALE_S)
        if _note(path) not in (before, ""):
            raise _taken(folder)
    write(0)
    time.sleep(RENEWED_S / 5)  # of two that start at once the later one stays
    if _mark(folder) != mine:
        raise _taken(folder)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = _lock(folder)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever moved the folder aside since it was opened holds the lock of the new one.
            mine = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise _taken(folder)
        lock.truncate(0)  # what is read there tells the hosts of a run that they see the same folder
        lock.write(uuid.uuid4().hex)
        lock.flush()
        os.fsync(lock.fileno())
        yield


def _check_configuration(folder: Path, config: Config) -> None:
    """Raises ConfigError if what has been trained there was trained with another configuration."""
    if not (folder / "config.yaml").is_file():
        if (folder / "checkpoints").exists():  # such as what a kill left while it was moved aside in an object store
            raise ConfigError(f"{folder} has checkpoints and no config.yaml; move it away with --restart, or give another run.name")
        return
    checkpoints = folder / "checkpoints"
    if not checkpoints.exists():
        return
    reads = {"sft": "sft", "reward": "label" if config.reward.kind == "labels" else "preference", "rl": "prompts"}
    begun = [stage for stage in reads if (checkpoints / stage).exists()]
    unread = {"sft", "preference", "label", "prompts"} - {reads[stage] for stage in begun}
    untouched = (*(f"{stage}." for stage in reads if stage not in begun), *(f"data.{kind}." for kind in unread))
    lines = [
        line
        for line in configuration.differences(read_config(folder), config)
        if not MAY_CHANGE.fullmatch(line.partition(":")[0]) and not line.startswith(untouched)
    ]
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
