"""In fresh processes, since JAX looks for devices once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
