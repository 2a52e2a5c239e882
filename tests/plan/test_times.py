"""Memory and time of one program in its stage, of programs and a chip made by hand: every figure is worked out here."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.architecture import TowerConfig, VisionConfig
from pe_rlhf_jax.plan.chips import Chip
from pe_rlhf_jax.plan.compiled import Program
from pe_rlhf_jax.plan.flops import Costs
from pe_rlhf_jax.plan.hlo import Collective, Communication
from pe_rlhf_jax.plan.plan import _timed
from pe_rlhf_jax.plan.topology import Topology

# 10^12 FLOP/s, 1000 bytes a second from memory, 10^9 over two of four ports.
CHIP = Chip("hand", hbm=1, usable=1, flops=1e12, hbm_rate=1000, ici_rate=2e9, ports=4)
FOUR = Topology("four", (None,) * 4, CHIP, CHIP.usable)
COSTS = SimpleNamespace(of=lambda stage, name: {"update": 8e12, "rollout": 2e13}[name])
SENT = Communication((Collective("all-gather", 7, 1e9), Collective("all-reduce", 2, 5e8)), 0)
TEXT = """
model: {source: unused}
data: {max_prompt_length: 8}
rl: {batch_size: 8, roles: separate, sampling: {max_new_tokens: 6}}
"""


def program(name: str, repeats: int = 1, communication: Communication = SENT, **parts: int) -> Program:
    """Peak 700, 300 of it read from what stays."""
    return Program(name, repeats, 400, 200, 300, 200, 700, parts, 300, (), communication, (), 1.0)


def context(tiny, *overrides: str, data: int = 1, fsdp: int = 2, tensor: int = 2) -> SimpleNamespace:
    """Two layers, two key-value heads of four."""
    mesh = SimpleNamespace(shape={"data": data, "fsdp": fsdp, "tensor": tensor})
    decoder = SimpleNamespace(config=tiny.config, dtype=jnp.bfloat16)
    return SimpleNamespace(config=configuration.parse(TEXT, overrides), mesh=mesh, decoder=decoder)


def test_what_stays_and_is_not_read_is_added_to_the_peak(tiny):
    hbm = [_timed("rl", program("update"), {"a": size, "b": 200}, COSTS, context(tiny), FOUR).hbm for size in (300, 50)]
    assert hbm == [700 + 500 - 300, 700]


def test_compute_and_links_are_those_of_all_calls(tiny):
    timed = _timed("rl", program("update", 3), {}, COSTS, context(tiny), FOUR)
    assert timed.flops == 8e12
    # A quarter of 8e12 FLOPs takes 2 s, 1.5e9 bytes take 1.5 s; three times.
    assert (timed.time.compute, timed.time.memory, timed.time.links) == (6, 0, 4.5)
    assert (timed.time.least, timed.time.most) == (6, 10.5)


@pytest.mark.parametrize(("devices", "calls"), [(1, 16), (4, 4)])
def test_pictures_are_encoded_four_at_once_on_each_device(tiny, devices, calls):
    """64 pictures in so many calls cost what 64 pictures cost."""
    tower = TowerConfig(8, 16, 2, 2, image_size=8, patch_size=4, rms_norm_eps=1e-6, activation="gelu")
    sees = dataclasses.replace(tiny.config, vision=VisionConfig(tower, 0, "linear", projector_bias=True))
    costs = Costs(configuration.parse(TEXT, ["rl.batch_size=64"]), sees, devices)
    timed = _timed("rl", program("encode", calls), {}, costs, context(tiny), FOUR)
    assert calls * timed.flops == costs.encode(64)
    assert timed.time.compute == pytest.approx(costs.encode(64) / 4 / CHIP.flops)


def test_what_only_moves_rows_computes_nothing(tiny):
    timed = _timed("rl", program("mini-batch"), {}, COSTS, context(tiny), FOUR)
    assert timed.flops == timed.time.compute == 0 and timed.time.links == 1.5


@pytest.mark.parametrize(
    ("mesh", "overrides", "seconds"),
    [
        # 6 tokens each read the backbone over both chips of fsdp, 2000 bytes, and the cache: keys and values of 2 layers, 8 rows over 2, 14
        # slots, 2 heads over 2, of 4 numbers of 2 bytes, 1792.
        ({}, [], 6 * (2000 + 1792) / 1000),
        # 4 rows at once, so that 12 tokens are generated one after the other, with half of the cache.
        ({}, ["rl.sampling.max_num_seqs=4"], 12 * (2000 + 896) / 1000),
        # Heads that the axis does not divide are whole on every chip: 8 rows, 2 heads.
        ({"fsdp": 1, "tensor": 4}, [], 6 * (1000 + 7168) / 1000),
        # Copies have rows of their own.
        ({"data": 4, "fsdp": 1, "tensor": 1}, [], 6 * (1000 + 1792) / 1000),
        # The policy's own matrices, 6000 bytes in float32, are read in bfloat16.
        ({}, ["rl.tuning=full"], 6 * (6000 + 1792) / 1000),
    ],
)
def test_each_generated_token_reads_the_backbone_and_the_cache(tiny, mesh, overrides, seconds):
    timed = _timed("rl", program("rollout", backbone=1000, policy=6000), {}, COSTS, context(tiny, *overrides, **mesh), FOUR)
    assert timed.time.memory == pytest.approx(seconds)
    assert (timed.time.compute, timed.time.links) == (5, 1.5)  # both beside the other where everything overlaps
    assert (timed.time.least, timed.time.most) == (pytest.approx(seconds), pytest.approx(seconds + 1.5))


def test_without_published_rates_there_is_no_time(tiny):
    assert _timed("rl", program("update"), {}, COSTS, context(tiny), Topology("local", (None,), None, None)).time is None
