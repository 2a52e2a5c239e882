"""The predicted peak against what a process really takes: a reward model's update on this machine's CPU. Linux only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import re
import jax, jax.numpy as jnp
from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.plan.compiled import compile_call
from pe_rlhf_jax.plan.programs import abstract_context, placed_update

MIB = 2**20
shape = DecoderConfig(8192, 768, 2048, 12, 12, 4, 64, 1e4, 1e-5, True, 512)
config = configuration.parse('''
model: {source: unused}
lora: {r: 8}
data: {max_prompt_length: 128, max_response_length: 128}
run: {stages: [reward]}
reward: {batch_size: 8, tuning: %s}
rl: {roles: separate}
''')
context = abstract_context(config, shape, jnp.dtype("float32"))
call = placed_update(context, "reward")
program, _ = compile_call(call, context.mesh, {"embedding": (8192, 768)}, 8192)
with jax.set_mesh(context.mesh):
    step = call.function.lower(*call.arguments.values()).compile()


def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024


def filled(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0))
    # Made where it stays: what numpy would leave behind counts as this process's memory too.
    return jax.jit(lambda: jnp.full(leaf.shape, 1e-3, leaf.dtype), out_shardings=leaf.sharding)()


jax.block_until_ready(filled(jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.tree.leaves(call.arguments)[0].sharding)))
before = status("VmRSS")
arguments = jax.block_until_ready(jax.tree.map(filled, list(call.arguments.values())))
open("/proc/self/clear_refs", "w").write("5")  # begins a new high-water mark
jax.block_until_ready(step(*arguments))
# A CPU pads nothing: what the arguments have more than the program reads, jit drops (the backbone beside its own trained copy).
unread = sum(program.parts.values()) - program.arguments
print((program.peak + unread) / MIB, (status("VmHWM") - before) / MIB)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_peak_is_what_a_process_takes(tuning):
    # Every array gets pages of its own, which go back when it is freed: the allocator keeps nothing.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", SCRIPT % tuning], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    predicted, measured = map(float, done.stdout.split())
    # Scratch memory of matrix products, which the compiler does not count.
    assert measured == pytest.approx(predicted, rel=0.1), (predicted, measured)
