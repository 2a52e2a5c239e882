"""Several processes are one run: what one does with all the devices, they do together.

Whole runs are in end_to_end/test_run_on_hosts.py.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from processes import finish, start

from pe_rlhf_jax import files, hosts
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import SFTExample, Split
from pe_rlhf_jax.data.images import Picture
from pe_rlhf_jax.loading import rows_of

SCRIPT = """
import itertools, json, os, signal, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]

import tiny_decoder
import jax
import numpy as np
from tiny_context import tiny_context

from pe_rlhf_jax import hosts
from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.config import ConfigError, LoRAConfig
from pe_rlhf_jax.main import StopSignal
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.outcomes import Outcomes
from pe_rlhf_jax.training import evaluate, loop, reward, rl, sft
from pe_rlhf_jax.training.rewards import RewardModel, Rewards

folder = sys.argv[1]
jax.config.update("jax_disable_most_optimizations", True)
hosts.start(10)
several, number = hosts.several(), jax.process_index()
assert jax.device_count() == 2 and jax.process_count() == (2 if several else 1)
calls = []


def short(prompts, completions, **columns):
    calls.append(len(completions))
    return [-float(len(text)) for text in completions]


def judge(prompts, completions, **columns):
    return short(prompts, completions, **columns)


MESH = json.loads(sys.argv[2])
SECTIONS = dict(
    mesh=MESH,
    sft=dict(steps=3, batch_size=4),
    rl=dict(
        steps=2,
        algorithm="rloo",
        group_size=2,
        batch_size=4,
        rewards=[dict(model="run"), dict(function="__main__:short")],
        sampling=dict(max_new_tokens=6, stop_strings=["7"]),
    ),
    evaluate=dict(prompts=3, batch_size=4, bootstrap=100, judge="__main__:judge"),
)
context = tiny_context(tiny_decoder.make_model(tiny_decoder.TINY, LoRAConfig(r=3, lora_alpha=6.0)), 2, **SECTIONS)
store, rows = Store(folder), []
loop.peak_memory_gib = rl.peak_memory_gib = lambda: 1.0 if several and number == 0 else 2.0  # which is then the largest


def run(updates, steps=2):
    for state, metrics in itertools.islice(updates, steps):
        peak = metrics["perf/peak_memory_gib"]
        rows.append({{k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))}} | {{"peak": peak}})
    return state


placed = context.rows(np.arange(8))
held = sorted({{int(row) for shard in placed.addressable_shards for row in np.asarray(shard.data)}})
assert held == (list(range(4 * number, 4 * number + 4)) if several and MESH.get("fsdp") else list(range(8)))

with jax.set_mesh(context.mesh):
    state = run(sft.run(context, sft.init(context)))
    store.save("sft", 2, state, {{"a": 1}})
    like = Outcomes(store, None, context).like(lambda: sft.init(context))
    again, meta = store.restore("sft", like)
    jax.tree.map(np.testing.assert_array_equal, hosts.fetch(again), hosts.fetch(state))
    assert meta == {{"a": 1}} and store.latest("sft") == 2 and store.latest("other") is None
    reference = state.trainable
    model = reward.whole(context, reference, reward.init(context, reference).trainable)
    rewards = Rewards(context, {{"run": RewardModel(context.decoder, context.backbone, model)}})
    state = run(rl.run(context, reference, model, rewards, rl.init(context, reference, model)), 1)
    roles = {{"reference": reference, "policy": rl.whole(context, reference, model, state.train.trainable)["policy"]}}
    *_, (_, figures) = evaluate.policy(context, roles, rewards)
    rows.append(figures)
    leaves = [leaf for leaf in jax.tree.leaves((context.backbone, state)) if leaf.ndim]
    assert several == any(not (leaf.is_fully_addressable or leaf.is_fully_replicated) for leaf in leaves) or MESH["data"] > 1
assert calls == ([4, 3, 3, 3, 3] if number == 0 else [])  # each function once, for all the rows

if several:
    assert hosts.once(lambda: jax.process_index()) == 0 and hosts.first() == (number == 0)
    assert hosts.once(lambda: hosts.once(lambda: "x" * 1000)) == "x" * 1000
    try:
        hosts.once(lambda: [][0])
    except IndexError:
        pass
    hosts.same(dict(data=b"1"))
    try:
        hosts.same(dict(backbone=b"1", data=str(number).encode()))
        raise SystemExit("not told")
    except ConfigError as error:
        assert "process 1 has another data than process 0" in str(error)
    with StopSignal() as stop:
        assert stop.asked() is None
        if number == 1:
            signal.raise_signal(signal.SIGTERM)
        assert stop.asked() == "SIGTERM"
    print(json.dumps(rows), flush=True)
    hosts.largest(0)
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        hosts.largest(1)
    except Exception as error:
        assert hosts.is_loss(error), repr(error)
        print(hosts.LOST, flush=True)
        hosts.leave(1)
print(json.dumps(rows))
"""


@pytest.mark.parametrize(
    "mesh", [pytest.param({"data": 1, "fsdp": 2}, id="fsdp"), pytest.param({"data": 1, "tensor": 2}, id="tensor", marks=pytest.mark.slow)]
)
def test_two_processes_do_what_one_does_and_stop_together(tmp_path, mesh):
    """Training, checkpoints, functions, evaluation; then a signal to one of them, and one is killed."""
    arguments = ["-c", SCRIPT.format(tests=str(Path(__file__).parent))]
    alone = finish(start([*arguments, str(tmp_path / "one"), json.dumps(mesh)], count=1, devices=2), 0)
    first, second = finish(start([*arguments, str(tmp_path / "two"), json.dumps(mesh)], count=2), 1, -9)
    rows = [json.loads(next(line for line in output.splitlines() if line.startswith("[{"))) for output in (*alone, first, second)]
    assert rows[0] == rows[1] == rows[2]
    assert hosts.LOST in first


@pytest.mark.parametrize(
    "given",
    [("127.0.0.1:1", None, "0"), (None, "2", "0"), ("127.0.0.1:1", "2", "2"), ("127.0.0.1:1", "two", "0")],
)
def test_variables_that_do_not_make_a_run_are_refused(monkeypatch, given):
    for name, value in zip(hosts.VARIABLES, given, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"expected JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.*or none of them; found"):
        hosts.start(10)


def test_a_process_of_its_own_needs_no_others(monkeypatch):
    for name in [*hosts.VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    hosts.start(10)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    hosts.start(10)
    assert not hosts.several() and hosts.first()
    assert hosts.once(lambda: 3) == 3 and hosts.largest(0.1) == 0.1
    hosts.same({"data": b""})
    hosts.leave(2)  # does not end it


@pytest.mark.parametrize(
    ("error", "alone"), [(ValueError("no coordinator"), True), (OSError("no metadata"), True), (RuntimeError(), False)]
)
def test_a_tpu_without_a_cluster_is_one_host_and_a_coordinator_that_is_late_may_come(monkeypatch, error, alone):
    for name in [*hosts.VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)

    def initialize(**_):
        raise error

    monkeypatch.setattr(hosts, "on_tpu", lambda: True)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(hosts.jax.config, "update", lambda *_: None)
    with contextlib.nullcontext() if alone else pytest.raises(ConnectionError, match="is the same command running on every host") as late:
        hosts.start(10)
    assert alone or files.passing(late.value)


def test_an_exception_that_cannot_travel_keeps_its_text():
    class Local(Exception):
        pass

    import pickle

    good, error, away = pickle.loads(hosts._packed((False, Local("what was wrong"))))
    assert not good and not away and "Local: what was wrong" in str(error)
    caused = ConfigError("this field")
    caused.__cause__ = ConnectionResetError("by peer")
    good, error, away = pickle.loads(hosts._packed((False, caused)))
    assert away and isinstance(error, ConfigError) and str(error) == "this field"


@pytest.mark.parametrize(("tasks", "expected"), [("2", {"local_device_ids": [0, 1, 2, 3]}), ("8", {})])
def test_in_slurm_a_task_that_has_a_node_for_itself_takes_all_its_gpus(monkeypatch, tasks, expected):
    """Two nodes of four GPUs; tasks that share a node take one each, as JAX has it."""
    for name in hosts.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    step = {"JOB_ID": "1", "STEP_NODELIST": "n[1-2]", "PROCID": "0", "LOCALID": "0", "STEP_NUM_NODES": "2", "GPUS_ON_NODE": "4"}
    for name, value in (step | {"NTASKS": tasks}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    given = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **arguments: given.append(arguments))
    monkeypatch.setattr(hosts.jax.config, "update", lambda *_: None)
    hosts.start(7)
    assert given == [{"heartbeat_timeout_seconds": 7, "initialization_timeout": hosts.JOIN_S} | expected]


def test_rows_are_told_apart_by_what_is_learned_and_not_by_where_they_lie():
    def of(label: str, place: str, *tokens: int) -> bytes:
        picture = Picture(key=place, label=label, name=place, height=2, width=3, content=b"")
        row = SFTExample(np.arange(3), np.asarray(tokens), (picture,), place)
        return rows_of(Split([row], []))

    assert of("a.png", "here", 1, 2) == of("a.png", "there", 1, 2)
    assert len({of("a.png", "here", 1, 2), of("b.png", "here", 1, 2), of("a.png", "here", 1, 3)}) == 3
