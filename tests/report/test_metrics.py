"""The metrics log after kills, resumes, odd numbers and full disks."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.report import metrics
from pe_rlhf_jax.report.metrics import MetricsLog


def log_steps(folder, stage, steps, **kwargs):
    log = MetricsLog(folder, tensorboard=False, **kwargs)
    for step in steps:
        log.write(stage, step, {"loss": 1 / step})
    log.close()


def strictly(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_rows_are_strict_json_in_order(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write("sft", 1, {"loss": np.float32(0.5), "grad_norm": math.nan, "lr": math.inf, "skipped": np.int64(1)})
    log.write("rl", 1, {"objective/kl": 0.1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: a row is on its way at once
    assert strictly(lines[0]) == {"stage": "sft", "step": 1, "loss": 0.5, "grad_norm": None, "lr": None, "skipped": 1}
    assert log.rows("rl") == [{"stage": "rl", "step": 1, "objective/kl": 0.1}]
    assert [row["stage"] for row in log.rows()] == ["sft", "rl"]


def test_a_float_survives_to_the_bit(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write("rl", 1, {"objective/scores": 0.1 + 0.2})
    assert log.rows()[0]["objective/scores"] == 0.1 + 0.2


def test_a_jax_scalar_is_a_number(tmp_path):
    import jax.numpy as jnp

    log = MetricsLog(tmp_path, tensorboard=False)
    log.write("rl", 1, {"loss": jnp.float32(0.25), "skipped": jnp.int32(2)})
    assert log.rows() == [{"stage": "rl", "step": 1, "loss": 0.25, "skipped": 2}]


@pytest.mark.parametrize(("values", "message"), [({"step": 1.0}, "'step'"), ({"loss": "low"}, "'loss'.*number.*str 'low'")])
def test_a_metric_that_cannot_be_a_row_is_refused_and_leaves_no_trace(tmp_path, values, message):
    log = MetricsLog(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=message):
        log.write("sft", 1, values)
    assert log.rows() == []


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_resuming_after_a_kill_gives_the_bytes_of_an_uninterrupted_run(tmp_path, cut):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        log_steps(folder, "sft", range(1, 4))
    log_steps(whole, "rl", range(1, 11))

    log_steps(killed, "rl", range(1, 8))
    path = killed / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])  # killed while writing step 7; the last checkpoint is of step 4
    log = MetricsLog(killed, tensorboard=False)
    log.rewind("rl", 4)
    for step in range(5, 11):
        log.write("rl", step, {"loss": 1 / step})
    assert path.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_rows_of_a_killed_process_are_there(tmp_path):
    program = (
        "import sys, os, signal, pathlib; from pe_rlhf_jax.report.metrics import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]))\n"
        "for step in range(1, 4): log.write('rl', step, {'loss': 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert finished.returncode == -signal.SIGKILL
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [event.step for event in events(tmp_path / "tensorboard/rl") if event.HasField("summary")] == [1, 2, 3]


def test_half_a_row_never_joins_the_next_one(tmp_path):
    log_steps(tmp_path, "rl", [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"stage": "rl", "st')
    assert [row["step"] for row in metrics.read(path)] == [1, 2]
    log_steps(tmp_path, "rl", [3])
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3]


def test_rewind_to_the_start_leaves_other_stages(tmp_path):
    log_steps(tmp_path, "sft", [1, 2])
    log_steps(tmp_path, "rl", [1, 2])
    log = MetricsLog(tmp_path, tensorboard=False)
    log.rewind("rl", 0)
    assert [(row["stage"], row["step"]) for row in log.rows()] == [("sft", 1), ("sft", 2)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "rl", "step": 1}\n{"stage": oops}\n{"stage": "rl", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*oops"):
        metrics.read(tmp_path / "metrics.jsonl")


def test_a_full_disk_leaves_whole_rows(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write("rl", 1, {"loss": 0.5})

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # the file may grow by 9 bytes, as on a disk that is nearly full
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 9, limits[1]))
        with pytest.raises(OSError, match="too large"):
            log.write("rl", 2, {"loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in log.rows()] == [1]
    log.write("rl", 3, {"loss": 0.125})
    assert [row["step"] for row in log.rows()] == [1, 3]


def events(folder):
    """Events of all files in TensorBoard's order. Records: length (8 bytes), its checksum (4), data, checksum (4)."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("rl", step, {"objective/kl": step / 10, "grad_norm": math.nan})
    log.rewind("rl", 1)
    log.write("rl", 2, {"objective/kl": 7.0})
    log.rewind("sft", 0)  # a stage without events gets no folder
    log.close()
    assert os.listdir(tmp_path / "tensorboard") == ["rl"]
    found = list(events(tmp_path / "tensorboard/rl"))
    starts = [i for i, event in enumerate(found) if event.session_log.status == SessionLog.START]
    assert [found[i].step for i in starts] == [2]
    values = [(e.step, v.tag, v.simple_value) for e in found[starts[0] :] for v in e.summary.value]
    assert values == [(2, "rl/objective/kl", 7.0)]
    assert [e.step for e in found[: starts[0]] if e.summary.value] == [1, 2, 3]


def test_wandb_missing_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pe_rlhf_jax\[wandb\]"):
        MetricsLog(tmp_path / "run", wandb_project="p")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_rows_and_a_resumed_run_continues_its_own(tmp_path, monkeypatch):
    calls, rows = [], []

    def init(**kwargs):
        calls.append(kwargs)
        return types.SimpleNamespace(
            id=kwargs["id"] or "abc", log=rows.append, define_metric=lambda *a, **k: None, finish=lambda: calls.append("finish")
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        log = MetricsLog(tmp_path, tensorboard=False, wandb_project="p", name="run", config={"a": 1})
        log.write("rl", 3, {"objective/kl": 0.5})
        log.close()
    assert [call["id"] for call in calls if call != "finish"] == [None, "abc"]
    assert calls.count("finish") == 2
    assert rows[0] == {"rl/step": 3, "rl/objective/kl": 0.5}


def test_rewinding_before_the_first_row_does_nothing(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.rewind("sft", 0)
    assert log.rows() == []
