"""With the real TPU compiler, for slices that need not exist: `make test-tpu`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.plan.chips import CHIPS
from pe_rlhf_jax.plan.plan import plan
from pe_rlhf_jax.plan.topology import describe

pytestmark = pytest.mark.tpu
CONFIG = """
model: {source: unused, logprob_chunk: 64}
lora: {r: 4}
mesh: {data: 1, fsdp: 2, tensor: 2}
data: {max_prompt_length: 32, max_response_length: 32, length_multiple: 8}
run: {stages: [rl]}
rl: {batch_size: 8, num_mini_batches: 2, sampling: {max_new_tokens: 16}}
"""


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v4:2x2x1", 4), ("v5e:4x4", 16), ("v5e:1x1", 1), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("v6e:1x1", 1), ("tpu7x:2x2x1", 8)],
)
def test_slices_have_their_devices(name, devices):
    found = describe(name)
    assert len(found.devices) == devices and found.chip is CHIPS[name.partition(":")[0]]
    assert {device.platform for device in found.devices} == {"tpu"}


def test_two_plans_may_run_at_once():
    """libtpu lets one process at a time use a machine's chips, and takes every process for one that does."""
    describe("v5e:2x2")
    code = "from pe_rlhf_jax.plan.topology import describe; print(len(describe('v5e:2x2').devices))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr[-2000:]


def test_a_slice_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="v5e:3x3: the TPU compiler knows no such slice"):
        describe("v5e:3x3")


def test_every_program_of_rl_compiles_for_a_slice(tiny):
    found = plan(configuration.parse(CONFIG), tiny.config, describe("v5e:2x2"))
    (stage,) = found.stages
    assert [timed.program.name for timed in stage.programs] == ["rollout", "score", "experience", "mini-batch", "update"]
    assert found.fits and found.dtype == "bfloat16" and 0 < found.hbm < 2**30
    for timed in stage.programs:
        assert timed.time.most >= timed.time.least >= 0
    rollout = stage.programs[0].program
    # The loop over blocks ends when all rows have; those inside it are counted by their bounds.
    assert rollout.communication.unknown_loops == 1 and rollout.communication.collectives
    assert all(timed.program.communication.unknown_loops == 0 for timed in stage.programs[1:])


def test_what_does_not_fit_is_an_answer(tiny):
    """The compiler refuses; its figure is the plan's."""
    config = configuration.parse(CONFIG, ["run.stages=[reward]", "reward.batch_size=4194304", "mesh.fsdp=4", "mesh.tensor=1"])
    found = plan(config, tiny.config, describe("v5e:2x2"))
    (timed,) = found.stages[0].programs
    assert not found.fits and "RESOURCE_EXHAUSTED" in timed.program.refused
    assert found.hbm > 16 * 2**30
