"""The scripts of benchmarks/ that ask the planner: the same figures as `plan`, in less time."""

from __future__ import annotations

import dataclasses
import json
import subprocess

import cold_start
import jax
import paper_memory
import pytest

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.plan.plan import GIB, plan
from pe_rlhf_jax.plan.topology import Topology

CONFIG = """
model: {source: unused, logprob_chunk: 16, dtype: float32}
lora: {r: 2}
mesh: {data: 1, fsdp: 1, tensor: 1}
data: {max_prompt_length: 8, max_response_length: 8, length_multiple: 8}
run: {stages: [sft, reward, rl]}
rl: {batch_size: 4, num_mini_batches: 2, sampling: {max_new_tokens: 6}}
"""


@pytest.mark.usefixtures("quick_compile")
def test_updates_alone_take_what_the_whole_plan_says_of_them(tiny):
    here = Topology("one", jax.devices()[:1], None, None)
    config = configuration.parse(CONFIG, paper_memory.MODES["shared"])
    shared = paper_memory.measure(config, tiny.config, here, "rl", "shared")
    update = plan(config, tiny.config, here, only=["rl"]).stages[0].programs[-1]
    assert dataclasses.replace(shared.update, seconds=0.0) == dataclasses.replace(update.program, seconds=0.0)
    assert shared.whole == update.hbm / GIB
    separate, full = (
        paper_memory.measure(configuration.parse(CONFIG, paper_memory.MODES[mode]), tiny.config, here, "rl", mode)
        for mode in ("separate", "full")
    )
    # So the benchmark compiles it once for both.
    assert dataclasses.replace(separate.update, seconds=0.0) == dataclasses.replace(shared.update, seconds=0.0)
    backbone = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.params)) / GIB
    assert separate.whole - shared.whole == pytest.approx(backbone, rel=0.1)
    # Reference, reward model's and value model's backbones, two more of Adam's moments for each trained one, and gradients.
    assert full.whole > separate.whole + 6 * backbone
    assert f"{shared.whole / full.whole:.0%}" in paper_memory.line(shared, full)
    last = paper_memory.table([shared, separate, full._replace(slice="two")]).splitlines()
    assert last[0] == "| slice | rl, shared | rl, separate | rl, full |"
    assert last[2:] == [f"| one | {shared.whole:.2f} | {separate.whole:.2f} |  |", f"| two |  |  | {full.whole:.2f} |"]


@pytest.mark.parametrize(("devices", "data", "fsdp"), [(16, 1, 16), (192, 1, 192), (1024, 4, 256)])
def test_batches_and_mesh_go_by_the_slice(devices, data, fsdp):
    config = configuration.parse(CONFIG, paper_memory.by_the_device(3, devices))
    assert (config.reward.batch_size, config.rl.batch_size, config.rl.num_mini_batches) == (3 * devices, 3 * devices, 1)
    assert config.mesh.fsdp == fsdp and config.mesh.data == -1 and devices == data * fsdp
    assert config.reward.micro_batch_size is None and config.rl.micro_batch_size is None


def test_a_second_start_is_compared_with_the_first(monkeypatch, capsys):
    caches = []

    def run(command, env, **_):
        caches.append(env["JAX_COMPILATION_CACHE_DIR"])
        taken = {"name": "update", "seconds": 8.0 if len(caches) == 1 else 2.0}
        return subprocess.CompletedProcess(command, 1, json.dumps({"stages": [{"stage": "sft", "programs": [{"program": taken}]}]}))

    monkeypatch.setattr(cold_start.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["cold_start", "--config", "c.yaml"])
    cold_start.main()
    shown = capsys.readouterr().out
    assert caches[0] == caches[1] and "| sft: update | 8.00 | 2.00 |" in shown and "**2.0**, 25%" in shown
