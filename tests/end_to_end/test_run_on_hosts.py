"""A whole run on several hosts, which are processes here: the run of one host, also when it is stopped, killed and continued elsewhere.

.venv/bin/python -m pytest -m slow tests/end_to_end/test_run_on_hosts.py
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_gcs import Handler, serve
from processes import finish, start
from tiny_project import result, write_config

from pe_rlhf_jax import hosts

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("whole runs")]

RUN = ("-m", "pe_rlhf_jax.main", "--config")
WATCHED = """
import os, runpy, sys

changes = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.move", "shutil.rmtree")


def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (writes or event in changes) and not isinstance(arguments[0], int):
        os.write(2, b"changes " + os.fsencode(arguments[0]) + b"\\n")


sys.addaudithook(watch)
runpy.run_module("pe_rlhf_jax.main", run_name="__main__")
"""
"""The same, and a line for every file that Python code changes; the parts of checkpoints are written by others (TensorStore)."""


@pytest.fixture(scope="module")
def alone(project, compiled, tmp_path_factory) -> Callable[[int], Path]:
    """The folder of an undisturbed run of one process with so many devices."""

    @functools.cache
    def of(devices: int) -> Path:
        folder = tmp_path_factory.mktemp(f"devices{devices}")
        finish(start([*RUN, str(write_config(project, folder))], 1, devices, PE_RLHF_CACHE=str(compiled)), 0)
        return folder

    return of


def begin(config: Path, compiled: Path, metrics: Path, until: str, count: int = 2) -> list[subprocess.Popen]:
    """A run of several hosts that has got so far."""
    processes = start([*RUN, str(config)], count, PE_RLHF_CACHE=str(compiled))
    limit = time.monotonic() + 900
    while until not in (metrics.read_text() if metrics.exists() else "") and all(p.poll() is None for p in processes):
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.02)
    return processes


def says_that_it_lost(code: int, output: str) -> bool:
    """Whether a host ended for the loss of another one. JAX aborts a process that did not wait for the other at that moment."""
    words = {1: hosts.LOST, -signal.SIGABRT: "the JAX distributed service detected fatal errors"}
    return code in words and words[code] in output


def test_two_hosts_make_the_run_of_one(alone, project, compiled, tmp_path):
    """To the bit; what is said is said once, and written once; and the summary knows the hosts."""
    command = ["-c", WATCHED, "--config", str(write_config(project, tmp_path))]
    first, second = finish(start(command, 2, PE_RLHF_CACHE=str(compiled)), 0)
    run = f"changes {tmp_path / 'runs'}"
    ours, others = ([line for line in output.splitlines() if line.startswith(run)] for output in (first, second))
    assert all(any(name in line for line in ours) for name in ("metrics.jsonl", "summary.json", "report.html", "samples", "export"))
    assert all("/checkpoints/" in line for line in others), others
    assert result(tmp_path) == result(alone(2))
    assert "report:" in first and "sft done" in first
    assert "report:" not in second and "sft done" not in second
    assert json.loads((tmp_path / "runs/run/summary.json").read_text())["device"]["hosts"] == 2
    samples = "runs/run/samples/evaluation.jsonl"
    assert (tmp_path / samples).read_text() == (alone(2) / samples).read_text()


def same_to_rounding(found: list[dict], expected: list[dict]) -> None:
    """Metrics of runs whose sums have four summands, the order of which is open.

    Differences of log-probabilities (KL, ratios) keep the rounding of what they are differences of: 1e-5 of the figure or on its own. No
    sampled token was so close to another that rounding would choose between them.
    """
    assert {row["stage"] for row in found} == {"sft", "reward", "rl"}
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys() and row["stage"] == other["stage"]
        for name in row.keys() - {"stage"}:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=1e-5, err_msg=f"{row['stage']} {row['step']} {name}")


def test_four_hosts_with_a_sharded_model_learn_what_one_does(alone, project, compiled, tmp_path):
    """Parameters are sharded over hosts, and all is merged and exported."""
    config = write_config(project, tmp_path, mesh={"data": 2, "fsdp": 2}, export={"merged": True})
    finish(start([*RUN, str(config), "--set", "run.stages=[sft, reward, rl, export]"], 4, PE_RLHF_CACHE=str(compiled)), 0)
    (_, four), (_, one) = result(tmp_path), result(alone(4))
    same_to_rounding(four, one)
    for role in ("policy", "reward"):
        assert (tmp_path / "runs/run/export/merged" / role / "model.safetensors").is_file()


def test_killed_stopped_and_continued_on_another_number_of_hosts_it_ends_the_same(alone, project, compiled, tmp_path):
    config = write_config(project, tmp_path, run={"host_timeout_s": 10})
    metrics, checkpoints = tmp_path / "runs/run/metrics.jsonl", tmp_path / "runs/run/checkpoints"

    processes = begin(config, compiled, metrics, '"sft", "step": 3')
    processes[1].kill()
    killed = time.monotonic()
    first, _ = finish(processes, 1, -signal.SIGKILL)
    assert hosts.LOST in first and time.monotonic() - killed < 60

    processes = begin(config, compiled, metrics, '"rl", "step": 1')
    processes[1].send_signal(signal.SIGTERM)
    for output in finish(processes, 75):
        assert "Stopped by SIGTERM; everything is saved" in output
    done = json.loads(metrics.read_text().splitlines()[-1])
    assert done["stage"] == "rl" and max(int(path.name) for path in (checkpoints / "rl").iterdir()) == done["step"] < 5

    finish(start([*RUN, str(config)], 1, 2, PE_RLHF_CACHE=str(compiled)), 0)
    assert result(tmp_path) == result(alone(2))


def test_what_four_hosts_began_two_end(alone, project, compiled, tmp_path):
    """With parameters sharded over hosts; stopped in RL, and continued with two devices on each of two."""
    config = write_config(project, tmp_path, mesh={"data": 2, "fsdp": 2}, run={"stages": ["sft", "reward", "rl"]})
    processes = begin(config, compiled, tmp_path / "runs/run/metrics.jsonl", '"rl", "step": 1', count=4)
    processes[3].send_signal(signal.SIGTERM)
    for output in finish(processes, 75):
        assert "Stopped by SIGTERM; everything is saved" in output
    done = json.loads((tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()[-1])
    assert done["stage"] == "rl" and 0 < done["step"] < 5
    first, _ = finish(start([*RUN, str(config)], 2, 2, PE_RLHF_CACHE=str(compiled)), 0)
    assert "sft: finished before" in first and "reward: finished before" in first and f"resumed after step {done['step']}" in first, first
    (_, found), (_, expected) = result(tmp_path), result(alone(4))
    same_to_rounding(found, expected)


def test_a_host_that_hangs_counts_as_dead_after_its_time(project, compiled, tmp_path):
    """As one does whose machine is frozen or cut off: its process is there and says nothing."""
    config = write_config(project, tmp_path, run={"host_timeout_s": 10})
    processes = begin(config, compiled, tmp_path / "runs/run/metrics.jsonl", '"sft", "step": 3')
    processes[1].send_signal(signal.SIGSTOP)
    try:
        code = processes[0].wait(70)
    finally:
        for process in processes:
            process.kill()
    first, _ = finish(processes, code, -signal.SIGKILL)
    assert says_that_it_lost(code, first), first


def test_when_the_first_host_is_killed_the_other_ends_soon_and_says_why(project, compiled, tmp_path):
    """The first is the one that all the others report to."""
    config = write_config(project, tmp_path, run={"host_timeout_s": 10})
    processes = begin(config, compiled, tmp_path / "runs/run/metrics.jsonl", '"sft", "step": 3')
    processes[0].kill()
    try:
        code = processes[1].wait(60)
    finally:
        processes[1].kill()
    _, second = finish(processes, -signal.SIGKILL, code)
    assert says_that_it_lost(code, second), second


def test_hosts_that_were_given_something_else_say_so_and_none_waits(project, compiled, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    config = write_config(project, tmp_path)
    outputs = finish(start([*RUN, str(config)], 2, each=[(), ("--set", "rl.kl_coef=0.5")], PE_RLHF_CACHE=str(compiled)), 2)
    assert all("process 1 has another configuration than process 0" in output for output in outputs)
    apart = [*RUN, str(config), "--set", "run.folder=runs"]
    outputs = finish(start(apart, 2, folders=[tmp_path, tmp_path / "elsewhere"], PE_RLHF_CACHE=str(compiled)), 2)
    assert all("is not the same folder on all hosts" in output for output in outputs)


def test_a_run_in_a_bucket_is_the_run_on_a_disk(alone, project, tmp_path):
    """On two hosts, in two goes, by the real clients of Google Cloud Storage; the server only keeps what it is sent."""
    server, address = serve()
    reaches = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    arguments = [*RUN, str(write_config(project, tmp_path)), "--set", "run.folder=gs://bucket/runs"]
    finish(start([*arguments, "--set", "run.stages=[sft]"], 2, PE_RLHF_CACHE=str(tmp_path / "cache"), **reaches), 0)
    first, _ = finish(start(arguments, 2, PE_RLHF_CACHE=str(tmp_path / "cache"), **reaches), 0)
    assert "sft: finished before" in first and "report: gs://bucket/runs/run/report.html" in first
    assert any(key.startswith("bucket/runs/.compiled/") for key in Handler.objects) and not (tmp_path / "cache" / "compiled").exists()
    server.shutdown()
    server.server_close()
    for key, (content, _) in Handler.objects.items():
        file = tmp_path / key.removeprefix("bucket/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert result(tmp_path) == result(alone(2))
    assert not (tmp_path / "runs" / ".run.lock").exists()
