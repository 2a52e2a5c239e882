"""Predicted peaks beside what a process really takes on this machine's CPU: of stages, and of their programs. Linux only."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, re
import jax, jax.numpy as jnp
from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.architecture import DecoderConfig
from pe_rlhf_jax.plan.compiled import compile_call
from pe_rlhf_jax.plan.programs import abstract_context, stage_calls

shape = DecoderConfig(8192, 768, 2048, 12, 12, 4, 64, 1e4, 1e-5, True, 512)
config = configuration.parse('''
model: {source: unused}
lora: {r: 8}
data: {max_prompt_length: 128, max_response_length: 128}
run: {stages: [reward, rl, evaluate]}
reward: {batch_size: 8, tuning: %(tuning)s}
rl: {batch_size: 16, roles: %(roles)s, tuning: %(tuning)s, sampling: {max_new_tokens: 128}}
evaluate: {batch_size: 32}
''')
context = abstract_context(config, shape, jnp.dtype("float32"))


def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024


def filled(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0))
    # Made where it stays: what numpy would leave behind counts as this process's memory too.
    return jax.jit(lambda: jnp.full(leaf.shape, jnp.array(1e-3).astype(leaf.dtype), leaf.dtype), out_shardings=leaf.sharding)()


def measured(call):
    # Compiled before anything is measured, and its arguments new: the update of a state takes the place of what it is given.
    program, returned = compile_call(call, context.mesh, {"embedding": (8192, 768)}, 8192)
    with jax.set_mesh(context.mesh):
        run = call.function.lower(*call.static, *call.arguments.values()).compile()
    jax.block_until_ready(filled(jax.tree.leaves(call.arguments)[0]))
    before = status("VmRSS")
    arguments = jax.block_until_ready(jax.tree.map(filled, list(call.arguments.values())))
    open("/proc/self/clear_refs", "w").write("5")  # begins a new high-water mark
    jax.block_until_ready(run(*arguments))
    # A CPU pads nothing: what the arguments have more than the program reads, jit drops (the backbone beside its own trained copy).
    unread = sum(program.parts.values()) - program.arguments
    print(json.dumps([call.name, program.peak + unread, status("VmHWM") - before]), flush=True)
    return returned


stage_calls(context, "%(stage)s", measured)
"""
ROLES = {"lora": "shared", "full": "separate"}
NAMES = {
    "reward": ["update"],
    "rl": ["rollout", "score", "experience", "update"],
    "evaluate": ["rollout", "score", "log-ratio"],
}


def programs(stage: str, tuning: str, flags: str) -> list[tuple[str, int, int]]:
    """Name, predicted and measured bytes of each."""
    # Every array gets pages of its own, which go back when it is freed: the allocator keeps nothing.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "XLA_FLAGS": flags}
    script = SCRIPT % {"stage": stage, "tuning": tuning, "roles": ROLES[tuning]}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == NAMES[stage]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("stage", ["reward", "rl"])
def test_the_peak_of_a_stage_is_what_a_process_takes(stage, tuning):
    _, *sizes = zip(*programs(stage, tuning, ""), strict=True)
    predicted, measured = map(max, sizes)
    # Scratch memory of XLA's YNN kernels, which the compiler does not count: 13 kB for each token at once.
    assert measured == pytest.approx(predicted, rel=0.1), (predicted, measured)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("stage", ["reward", "rl", "evaluate"])
def test_without_the_kernels_scratch_every_program_takes_what_was_predicted(stage, tuning):
    for name, predicted, measured in programs(stage, tuning, "--xla_cpu_experimental_ynn_fusion_type=invalid"):
        assert measured == pytest.approx(predicted, rel=0.1), (name, predicted, measured)
