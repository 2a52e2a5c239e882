"""libtpu, where it is installed for `plan`, neither slows nor disturbs what runs on a CPU: `make test-tpu`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu
START = """
import contextlib, io, jax
from pe_rlhf_jax import main

with contextlib.redirect_stdout(io.StringIO()):
    main.cli(["report", "nothing"])
print(jax.default_backend())
"""


def started(**environment: str) -> tuple[str, str, float]:
    """What a fresh process prints on both streams, and its processor time in seconds, which other processes' work does not change."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS" and not name.startswith("TPU_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=inherited | environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_start_on_a_cpu_is_as_quiet_and_as_fast_as_without_libtpu():
    import libtpu  # noqa: F401  the test means nothing without it

    # Naming the platform keeps JAX from loading libtpu: that is a start without it. The first start reads files that later ones find in
    # memory; the fastest of a few is what each takes.
    pairs = [(started(), started(JAX_PLATFORMS="cpu")) for _ in range(4)]
    for found, without in pairs:
        assert found[:2] == without[:2] == ("cpu\n", without[1])
    ours, theirs = (min(pair[side][2] for pair in pairs[1:]) for side in (0, 1))
    assert ours < 1.1 * theirs, f"{ours:.2f} s with libtpu looked for, {theirs:.2f} s without"
