"""Several processes, usually one a host, as one run: they start together, agree, share what is done once, and end together.

`once`, `largest`, `same` and `fetch` are meetings: all processes call them, in the same order. With one process none of this does anything.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.files import passing
from pe_rlhf_jax.types import PyTree

T = TypeVar("T")

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables that say which processes make up a run, where no cluster does: HOST:PORT of the first, their number, and this
one's, from 0."""

JOIN_S = 900
"""Seconds for which a process waits for the others to start: a node that is new may fetch its image first."""
LAST = 3.0  # seconds by which the first process outlives the others, so that they can say what went wrong

_alone = 0  # depth of `once`: what runs there runs on the first process only and must not wait for the others


def start(timeout_s: int) -> None:
    """Joins the other processes of a run, before any device is used. With one process, and called again, it does nothing.

    The processes are those of `VARIABLES`, of the Slurm step, or of the Cloud TPU slice (GCE or GKE).

    Args:
        timeout_s: a process that gives no sign of life for this long counts as dead, which ends all others.

    Raises:
        ConfigError: variables are missing or wrong.
        ConnectionError: the first process's address is not known yet. (Where one of them does not start within JOIN_S, JAX aborts.)
    """
    if jax.distributed.is_initialized():
        return
    address, count, number = given = [os.environ.get(name, "") for name in VARIABLES]
    arguments: dict[str, Any] = {}
    if any(given):
        if not (address and count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            found = ", ".join(f"{name}={value}" for name, value in zip(VARIABLES, given, strict=True))
            raise ConfigError(
                f"expected {', '.join(VARIABLES)} to be the first process's HOST:PORT, the number of processes and this one's number "
                f"below it, or none of them; found {found}"
            )
        if count == "1":
            return
        arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
        arguments |= {"cluster_detection_method": "deactivate"}
    elif _in_slurm():
        gpus = os.environ.get("SLURM_GPUS_ON_NODE")
        if gpus and os.environ["SLURM_NTASKS"] == os.environ.get("SLURM_STEP_NUM_NODES"):
            arguments = {"local_device_ids": list(range(int(gpus)))}  # JAX would give the only task of a node one of its GPUs
    elif not on_tpu():
        return
    # Its handler would take SIGTERM away from ours, and does not know Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=timeout_s, initialization_timeout=JOIN_S)
    except (RuntimeError, ValueError, OSError) as error:
        if not (any(given) or _in_slurm() or isinstance(error, RuntimeError)):
            return  # a TPU of neither GCE nor GKE, such as a notebook's: one host
        text = f"cannot join the other processes of the run: {error}; is the same command running on every host?"
        raise (ConfigError if isinstance(error, ValueError) else ConnectionError)(text) from error


def _in_slurm() -> bool:
    """Whether this is a task of a Slurm step of several, as JAX knows it."""
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    return all(f"SLURM_{name}" in os.environ for name in names) and int(os.environ["SLURM_NTASKS"]) > 1


def on_tpu() -> bool:
    """Whether this is a TPU VM whose TPU is to be used: JAX's own answer, for which no device has to be started."""
    from jax._src import cloud_tpu_init

    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (not platforms or "tpu" in platforms) and bool(getattr(cloud_tpu_init, "running_in_cloud_tpu_vm", False))


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return not several() or jax.process_index() == 0


def once(f: Callable[[], T]) -> T:
    """What `f` returns, on every process; it is run by the first alone. What it raises is raised on every process."""
    global _alone
    if not several() or _alone:
        return f()
    sent = b""
    if first():
        _alone += 1
        try:
            outcome: Any = (True, f())
        except Exception as error:
            outcome = (False, error)
        finally:
            _alone -= 1
        sent = _packed(outcome)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    room = 1 << max(size - 1, 255).bit_length()  # few sizes, few programs
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(sent.ljust(room, b"\0"), np.uint8))
    if not first():
        *outcome, away = pickle.loads(np.asarray(received, np.uint8).tobytes()[:size])
        if away:  # what caused an exception does not travel, and says with which code to end
            outcome[1].__cause__ = ConnectionError("of the first process")
    good, value = outcome
    if not good:
        raise value
    return value


def _packed(outcome: tuple[bool, Any]) -> bytes:
    """The outcome, and of a failure whether it may pass."""
    good, value = outcome
    away = not good and passing(value)
    try:
        packed = pickle.dumps((good, value, away))
        pickle.loads(packed)  # an exception may pickle and not come back
        return packed
    except Exception:
        if good:
            raise
        return pickle.dumps((False, RuntimeError(f"on the first process: {type(value).__name__}: {value}"), away))


def largest(value: float) -> float:
    """The largest of the processes' values, in float32."""
    return float(np.max(multihost_utils.process_allgather(np.float32(value)))) if several() else value


def same(values: Mapping[str, bytes]) -> None:
    """Raises ConfigError on every process where not all of them have the same values, by name."""
    if not several():
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(value).digest(), np.uint8) for value in values.values()])
    everywhere = np.asarray(multihost_utils.process_allgather(digests))
    for name, column in zip(values, np.swapaxes(everywhere, 0, 1), strict=True):
        if others := np.flatnonzero(np.any(column != column[0], axis=1)).tolist():
            raise ConfigError(
                f"process {others[0]} has another {name} than process 0 ({len(others)} of {len(column)} processes differ); every host must "
                "be given the same command, model and data"
            )


def fetch(tree: PyTree) -> PyTree:
    """Arrays in host memory (NumPy), whole on every process wherever their parts lie."""

    def whole(x: Any) -> Any:
        apart = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if apart else x

    return jax.device_get(jax.tree.map(whole, tree))


LOST = (
    "another process of this run has ended or cannot be reached, so this one stops too; the first of them to end says why. The same "
    "command on every host continues from the last checkpoint."
)


def is_loss(error: BaseException) -> bool:
    """Whether JAX could not finish what needs all processes, by what its transports (gRPC, Gloo, NCCL) say."""
    words = ("Gloo", "NCCL", "UNAVAILABLE:", "DEADLINE_EXCEEDED:", "ABORTED:", "coordination service")
    return any(word in f"{error} {error.__cause__}" for word in words)


def leave(code: int) -> None:
    """The end of a process of several. One that failed ends at once with its code: it must not wait for the others, which wait for it."""
    if not several():
        return
    if code in (0, 75):
        jax.distributed.shutdown()
        return
    if first():
        time.sleep(LAST)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
