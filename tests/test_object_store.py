"""A run folder in an object store: whole objects only, no appending, no locks, no moves of folders that happen at once."""

from __future__ import annotations

import json
import threading
import time
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import run_folder
from pe_rlhf_jax.checkpoint.export import export_policy
from pe_rlhf_jax.checkpoint.store import CheckpointError, Store
from pe_rlhf_jax.config import ConfigError, LoRAConfig
from pe_rlhf_jax.files import passing, path_of
from pe_rlhf_jax.report import html, metrics, samples
from pe_rlhf_jax.report.metrics import MetricsLog


class Bucket(MemoryFileSystem):
    """Takes the place of Google Cloud Storage."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def _open(self, path, mode="rb", **kwargs):
        assert mode in ("rb", "wb"), "objects are read and written as a whole"
        return super()._open(path, mode, **kwargs)


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    monkeypatch.setattr(run_folder, "RENEWED_S", 0.05)
    monkeypatch.setattr(run_folder, "STALE_S", 0.4)
    yield Bucket
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)


@pytest.fixture
def config():
    return configuration.parse("{model: {source: x}, run: {folder: 'gs://bucket/runs', name: one}}")


def test_places():
    assert str(path_of("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert path_of("~/a").is_absolute() and str(path_of("a/b")) == "a/b"


def test_a_folder_is_made_continued_moved_aside_and_left_unlocked(config, bucket):
    for _ in range(2):
        with run_folder.opened(config, restart=False) as folder:
            assert str(folder) == "gs://bucket/runs/one" and run_folder.read_config(folder) == config
    run_folder.write_summary(folder, {"name": "one"})
    (folder / "checkpoints" / "sft" / "0" / "meta.json").write_text("{}")
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    with pytest.raises(ConfigError, match=r"run\.seed: 0 -> 1"), run_folder.opened(other, restart=False):
        pass
    with run_folder.opened(other, restart=True):
        pass
    aside = path_of("gs://bucket/runs/one.old-1")
    assert json.loads((aside / "summary.json").read_text()) == {"name": "one"}
    assert sorted(bucket.store) == [
        f"/bucket/runs/{name}"
        for name in ("one.old-1/checkpoints/sft/0/meta.json", "one.old-1/config.yaml", "one.old-1/summary.json", "one/config.yaml")
    ]


def test_a_second_process_is_refused_while_the_first_one_lives(config):
    with run_folder.opened(config, restart=False) as folder:
        for restart in (False, True):
            with pytest.raises(ConfigError, match="another process is running there"), run_folder.opened(config, restart):
                pass
        assert run_folder.read_config(folder) == config


def test_the_folder_of_a_killed_process_is_free_after_a_while(config):
    note = path_of("gs://bucket/runs/.one.lock")
    note.write_text("killed 7")
    began = time.monotonic()
    with run_folder.opened(config, restart=False):
        assert time.monotonic() - began >= 0.4
        assert not note.read_text().startswith("killed")


def test_of_two_that_start_at_once_one_is_refused(config, monkeypatch):
    ready, outcomes = threading.Barrier(2), []

    def attempt():
        ready.wait()
        try:
            with run_folder.opened(config, restart=False):
                time.sleep(0.6)
                outcomes.append("ran")
        except ConfigError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ran", "refused"]


def test_what_a_move_that_was_killed_left_behind_is_not_continued(config):
    path_of("gs://bucket/runs/one/checkpoints/sft/5/meta.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has checkpoints and no config\.yaml"), run_folder.opened(config, restart=False):
        pass


def test_rows_of_metrics_are_there_when_flushed(config):
    folder = path_of("gs://bucket/runs/one")
    log = MetricsLog(folder)
    for step in (1, 2, 3):
        log.write("sft", step, {"loss": 1 / step})
    assert not (folder / "metrics.jsonl").exists()
    log.flush()
    log.write("sft", 4, {"loss": 0.25})
    assert [row["step"] for row in metrics.read(folder / "metrics.jsonl")] == [1, 2, 3]  # what a kill would leave
    assert [row["step"] for row in log.rows("sft")] == [1, 2, 3, 4]
    again = MetricsLog(folder)
    again.rewind("sft", 2)
    again.write("sft", 3, {"loss": 0.3})
    again.close()
    assert [row["loss"] for row in metrics.read(folder / "metrics.jsonl")] == [1, 0.5, 0.3]


def test_rows_do_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(metrics, "REMOTE_EVERY_S", 0.0)
    log = MetricsLog(path_of("gs://bucket/one"))
    log.write("sft", 1, {"loss": 1.0})
    assert len(metrics.read(log.path)) == 1


def test_a_report_is_built_from_what_lies_there(config):
    with run_folder.opened(config, restart=False) as folder:
        log = MetricsLog(folder)
        log.write("sft", 1, {"loss": 1.0})
        log.close()
        samples.write(folder / "samples" / "evaluation.jsonl", [{"prompt": "p", "reference": "r", "policy": "said"}])
        page = html.build(folder).read_text()
    assert "said" in page and "<title>one" in page


def test_checkpoints_are_kept_found_and_checked():
    """Their arrays go through TensorStore's own driver, which only a real store has."""
    store = Store(path_of("gs://bucket/runs/one/checkpoints"))
    for step in (1, 2, 3):
        store.save("sft", step, {}, {"step": step})
    assert [store.latest("sft"), store.meta("sft")["step"], store.meta("sft", 2)["step"]] == [3, 3, 2]
    with pytest.raises(CheckpointError, match="no checkpoint of step 1"):
        store.meta("sft", 1)
    path_of("gs://bucket/runs/one/checkpoints/sft/3/meta.json").write_text("{}")
    assert Store(path_of("gs://bucket/runs/one/checkpoints")).meta("sft")["step"] == 2


def test_a_store_out_of_reach_is_what_a_failed_save_says(monkeypatch):
    def away(*_, **__):
        raise ConnectionResetError("by peer")

    store = Store(path_of("gs://bucket/runs/one/checkpoints"))
    for name in ("exists", "isdir", "ls", "info", "_open"):
        monkeypatch.setattr(Bucket, name, away)
    with pytest.raises(CheckpointError, match=r"could not save step 1.*by peer\n.*already there \(unknown\)") as error:
        store.save("sft", 1, {}, {})
    assert passing(error.value)


@pytest.mark.parametrize("stage", ["first", "again"])
def test_a_checkpoint_is_there_when_it_is_whole(bucket, monkeypatch, stage):
    """The store fails, or the process is killed, at each of its requests in turn."""
    places, left, failure = path_of("gs://bucket/runs/one/checkpoints"), [0], [Exception]

    def counted(name):
        original = getattr(Bucket, name)

        def request(self, *arguments, **named):
            left[0] -= 1
            if left[0] < 0:
                raise failure[0]
            return original(self, *arguments, **named)

        monkeypatch.setattr(Bucket, name, request)

    for name in ("_open", "rm_file", "cp_file"):
        counted(name)
    for failure[0] in (ConnectionError, KeyboardInterrupt):
        for requests in range(100):
            bucket.store.clear()
            kept, left[0] = Store(places), 1000
            if stage == "again":
                kept.save("sft", 5, {}, {"old": True})
            left[0] = requests
            try:
                Store(places).save("sft", 5, {}, {"old": False})
            except (CheckpointError, KeyboardInterrupt):
                done = False
            else:
                done = True
            left[0] = 1000
            again = Store(places)
            assert again.latest("sft") is None or again.meta("sft") == {"old": False} or (stage == "again" and again.meta("sft")["old"])
            assert not done or again.meta("sft") == {"old": False}
            again.save("sft", 6, {}, {})  # nothing that was left behind is in the way
            if done:
                break
        assert done and 2 <= requests < 99


def test_an_export_replaces_the_one_before(tiny, bucket):
    folder = path_of("gs://bucket/one/export/policy")
    (folder / "old.txt").write_text("old")
    export_policy(folder, tiny.lora, LoRAConfig(r=3, lora_alpha=6.0), base_model="x", sha256="0" * 64)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert np.frombuffer((folder / "adapter_model.safetensors").read_bytes()[:8], "<u8")[0] > 0
