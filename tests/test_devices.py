"""Which devices are looked for, in fresh processes, since JAX looks once; and what they are."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from pe_rlhf_jax import devices

SCRIPT = """
from jax._src import cloud_tpu_init
from jax.extend import backend

asked = []
backend.register_backend_factory("tpu", lambda: asked.append("tpu"))
cloud_tpu_init.running_in_cloud_tpu_vm = {there}
from pe_rlhf_jax.devices import skip_missing_tpu

skip_missing_tpu()
import jax

assert not asked
try:
    jax.devices()
except RuntimeError:  # a platform that was asked for and is not there
    pass
print(asked)
"""


@pytest.mark.parametrize(
    ("there", "platforms", "asked"),
    [(False, "", []), (True, "", ["tpu"]), (False, "tpu,cpu", ["tpu"]), (False, "cpu", [])],
)
def test_tpus_are_only_looked_for_where_one_is_or_is_asked_for(there, platforms, asked):
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(there=there)], capture_output=True, text=True, env=environment)
    assert done.stdout == f"{asked}\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("default", "version", "capability", "nvidia", "ampere"),
    [
        ("gpu", "cuda 13000", "9.0", True, True),
        ("gpu", "cuda 12080", "12.0", True, True),
        ("gpu", "cuda 12080", "8.0", True, True),
        ("gpu", "cuda 12080", "7.5", True, False),
        ("gpu", "rocm 70000", "gfx942", False, False),
        ("cpu", "cuda 13000", "9.0", False, False),
    ],
)
def test_nvidia_gpus_are_told_from_others_and_early_from_late_ones(monkeypatch, default, version, capability, nvidia, ampere):
    monkeypatch.setattr(jax, "default_backend", lambda: default)
    monkeypatch.setattr(devices.backend, "get_backend", lambda: SimpleNamespace(platform_version=version))
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert (devices.is_nvidia(), devices.is_nvidia(capability=8.0)) == (nvidia, ampere)
