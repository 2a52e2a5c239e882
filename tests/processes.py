"""Several processes on this machine that work as one run, as if each were a host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path


def with_devices(count: int) -> str:
    """This process's XLA_FLAGS, and so many CPU devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def start(
    arguments: Sequence[str],
    count: int,
    devices: int = 1,
    *,
    each: Sequence[Sequence[str]] = (),
    folders: Sequence[Path] = (),
    **environment: str,
) -> list[subprocess.Popen]:
    """`python ARGUMENTS` as `count` processes with `devices` CPU devices each; with one, as anybody would start it.

    Args:
        each: further arguments of every process.
        folders: in which each one is started.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | environment
    if devices > 1:
        given["XLA_FLAGS"] = with_devices(devices)
    started = []
    for number in range(count):
        run = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)} if count > 1 else {}
        command = [sys.executable, *arguments, *(each[number] if each else ())]
        cwd = folders[number] if folders else None
        started.append(subprocess.Popen(command, env=given | run, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return started


def finish(processes: Sequence[subprocess.Popen], *codes: int, timeout: float = 900.0) -> list[str]:
    """Waits for all of them and checks their exit codes (one code is for all); returns what they printed."""
    until = time.monotonic() + timeout
    late = threading.Timer(timeout, lambda: [process.kill() for process in processes])  # what they printed is worth more than an exception
    late.start()
    outputs = [process.communicate()[0] for process in processes]
    late.cancel()
    assert time.monotonic() < until, "\n----\n".join(output[-4000:] for output in outputs)
    found = [process.returncode for process in processes]
    assert found == list(codes if len(codes) > 1 else codes * len(found)), "\n----\n".join(output[-4000:] for output in outputs)
    return outputs


def same_on_eight_devices(script: str) -> None:
    """Runs a script, which ends by printing `same`, in a process of its own with eight CPU devices."""
    environment = {**os.environ, "XLA_FLAGS": with_devices(8), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("same\n"), done.stderr[-4000:]
