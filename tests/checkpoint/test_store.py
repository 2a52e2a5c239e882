"""Checkpoints survive kills, damage and full disks, and come back to the bit."""

import gc
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import with_devices

from pe_rlhf_jax.checkpoint import store as store_module
from pe_rlhf_jax.checkpoint.store import CheckpointError, Store
from pe_rlhf_jax.types import TrainState

SAVER = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from pe_rlhf_jax.checkpoint.store import Store
folder = Path(sys.argv[1])
store, mesh = Store(folder / "checkpoints"), jax.make_mesh((4,), ("fsdp",))
sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
for step in range(1, 100_000):
    for attempt in (0, 1):  # the second replaces the first
        value = jnp.float32(2 * step + attempt)
        state = {f"layer_{i}": jax.device_put(jnp.full((4, 1024), value * i), sharding) for i in range(12)}
        store.save("rl", step, state, {"step": step, "attempt": attempt}, metric=-step)
        (folder / "saved.new").write_text(str(2 * step + attempt))
        (folder / "saved.new").rename(folder / "saved")
"""


def make_state(seed: int = 0) -> TrainState:
    rng = np.random.default_rng(seed)
    trainable = {
        "lora": {
            "a": jnp.asarray(rng.standard_normal((2, 5, 3)), jnp.float32),
            "b": jnp.asarray(rng.standard_normal((2, 3, 7)), jnp.bfloat16),
        },
        "head": {"kernel": jnp.array([[jnp.nan], [-0.0], [jnp.inf], [1e-42]], jnp.float32)},
    }
    masked = optax.masked(optax.sgd(0.1, momentum=0.9), {"lora": True, "head": False})
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), masked)
    counters = {"skipped": jnp.int32(seed), "skipped_in_a_row": jnp.array(2**31 - 1, jnp.int32)}
    return TrainState(step=jnp.int32(7), trainable=trainable, opt_state=transform.init(trainable), **counters)


def assert_identical(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x20
    file.write_bytes(bytes(content))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_state_and_meta_come_back_to_the_bit(tmp_path):
    state = make_state()
    meta = {"data": {"position": 12}, "kl_coef": 0.1 + 0.2, "backbone": {"source": "hf:x", "sha256": None}, "done": True}
    Store(tmp_path / "checkpoints").save("rl", 7, state, meta)
    for like in (state, jax.eval_shape(lambda: state)):
        restored, restored_meta = Store(tmp_path / "checkpoints").restore("rl", like)
        assert_identical(restored, state)
        assert restored_meta == meta
        assert all(isinstance(leaf, jax.Array) and not leaf.committed for leaf in jax.tree.leaves(restored))


def test_numpy_stays_numpy_and_a_given_sharding_is_kept(tmp_path):
    store, sharding = Store(tmp_path), jax.NamedSharding(jax.make_mesh((1,), ("fsdp",)), jax.P("fsdp"))
    store.save("sft", 1, {"n": np.arange(3, dtype=np.int64), "x": jnp.arange(4.0)}, {})
    like = {"n": np.zeros(3, np.int64), "x": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)}
    restored, _ = store.restore("sft", like)
    assert isinstance(restored["n"], np.ndarray) and restored["n"].tolist() == [0, 1, 2]
    assert restored["x"].sharding == sharding and restored["x"].tolist() == [0, 1, 2, 3]


def test_a_state_without_arrays_holds_its_meta(tmp_path):
    Store(tmp_path).save("evaluate", 0, {}, {"done": True})
    assert Store(tmp_path).restore("evaluate", {}) == ({}, {"done": True})
    with pytest.raises(CheckpointError, match="x is expected but was not saved"):
        Store(tmp_path).restore("evaluate", {"x": jnp.ones(2)})


def test_keeps_the_newest_two_and_the_best(tmp_path):
    store = Store(tmp_path)
    for step, metric in [(1, 0.5), (2, 0.9), (3, float("nan")), (4, 0.9), (5, None), (6, 0.1)]:
        store.save("reward", step, {"x": jnp.full(3, step)}, {"step": step}, metric)
    assert sorted(path.name for path in (tmp_path / "reward").iterdir()) == ["2", "5", "6"]
    assert store.latest("reward") == 6 and store.best("reward") == 2
    assert store.restore("reward", {"x": jnp.zeros(3, int)}, step=2)[0]["x"].tolist() == [2, 2, 2]
    assert store.latest("sft") is None and store.best("sft") is None
    store.save("reward", 1, {"x": jnp.full(3, 1)}, {"step": 1})
    assert store.meta("reward", 1) == {"step": 1}


def test_a_step_can_be_saved_again(tmp_path):
    store = Store(tmp_path)
    for value in (1, 2):
        store.save("sft", 5, {"x": jnp.full(3, value)}, {"done": value == 2})
    restored, meta = store.restore("sft", {"x": jnp.zeros(3, int)})
    assert restored["x"].tolist() == [2, 2, 2] and meta == {"done": True}
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["5"]


def test_every_damaged_file_is_found_and_the_one_before_serves(tmp_path, caplog):
    store, state = Store(tmp_path / "whole"), make_state()
    for step in (1, 2):
        store.save("rl", step, state, {"step": step}, metric=float(step))
    files = files_of(tmp_path / "whole/rl/2")
    assert len(files) > 5

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1])

    damages = [lambda file: flip(file, 0), lambda file: flip(file, -1), cut, Path.unlink]
    for index, file in enumerate(files):
        for damage in damages if file.name in ("SHA256SUMS", "meta.json") else [damages[index % len(damages)]]:
            if not file.stat().st_size and damage is not Path.unlink:
                continue
            copy = tmp_path / "damaged"
            shutil.copytree(tmp_path / "whole", copy)
            damage(copy / file.relative_to(tmp_path / "whole"))
            damaged = Store(copy)
            with pytest.raises(CheckpointError, match="damaged"):
                damaged.restore("rl", state, step=2)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                restored, meta = damaged.restore("rl", state)
            assert meta == {"step": 1} and "continuing from step 1" in caplog.text and "damaged" in caplog.text
            assert_identical(restored, state)
            assert damaged.best("rl") == 1
            shutil.rmtree(copy)


def test_a_damaged_checkpoint_makes_way_for_the_next_and_is_the_end_if_none_is_good(tmp_path):
    store, state = Store(tmp_path), make_state()
    for step in (1, 2):
        store.save("rl", step, state, {"step": step}, metric=float(step))
    flip(tmp_path / "rl/2/meta.json", 0)
    assert store.meta("rl") == {"step": 1}
    store.save("rl", 3, state, {"step": 3}, metric=0.5)
    assert sorted(path.name for path in (tmp_path / "rl").iterdir()) == ["1", "3"]
    for step in (1, 3):
        flip(tmp_path / f"rl/{step}/meta.json", 0)
    with pytest.raises(CheckpointError, match=r"rl/3 is damaged.*\n.*rl/1 is damaged.*\nNo good checkpoint is left there: restore"):
        store.restore("rl", state)


def test_what_does_not_fit_is_named(tmp_path):
    store, state = Store(tmp_path), make_state()
    with pytest.raises(CheckpointError, match=r"no checkpoint of stage 'rl' in .* there are: none"):
        store.restore("rl", state)
    store.save("rl", 7, state, {})
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .* there are: step 7"):
        store.restore("rl", state, step=3)
    lora = state.trainable["lora"]
    for change, message in [
        ({"a": jnp.zeros((2, 5, 4))}, r"trainable/lora/a was saved as float32\[2, 5, 3\], expected float32\[2, 5, 4\]"),
        ({"b": jnp.zeros((2, 3, 7))}, r"trainable/lora/b was saved as bfloat16\[2, 3, 7\], expected float32\[2, 3, 7\]"),
        ({"c": jnp.zeros(1)}, "trainable/lora/c is expected but was not saved"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            store.restore("rl", state.replace(trainable={**state.trainable, "lora": {**lora, **change}}))
    with pytest.raises(CheckpointError, match="trainable/lora/a was saved but is not expected"):
        store.restore("rl", state.replace(trainable={**state.trainable, "lora": {"b": lora["b"]}}))
    with pytest.raises(CheckpointError, match="leaf step of the state is int, expected an array"):
        store.save("rl", 8, {"step": 3}, {})


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    store, state = Store(tmp_path), {"x": jnp.asarray(np.random.default_rng(0).standard_normal(1 << 18), jnp.float32)}
    store.save("rl", 1, state, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing more fails in the kernel, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"(?s)could not save step 2 of stage 'rl'.*\(step 1\) are untouched"):
            store.save("rl", 2, state, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with warnings.catch_warnings():  # Orbax drops the coroutines of the arrays that it did not get to
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()
    assert [path.name for path in (tmp_path / "rl").iterdir()] == ["1"]
    assert_identical(store.restore("rl", state)[0], state)
    store.save("rl", 2, state, {"step": 2})
    assert store.meta("rl") == {"step": 2}


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    store, state = Store(tmp_path), {"x": jnp.zeros(2_000_000)}
    store.save("rl", 1, state, {"step": 1})
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
        with pytest.raises(CheckpointError, match="may need 8 MB, but 3 MB are free"):
            store.save("rl", 2, state, {"step": 2})
    assert [path.name for path in (tmp_path / "rl").iterdir()] == ["1"] and store.meta("rl") == {"step": 1}


@pytest.mark.parametrize("call", range(5))
def test_an_error_at_any_rename_or_write_leaves_the_last_good_one(tmp_path, monkeypatch, call):
    store, state, calls = Store(tmp_path), make_state(), []
    for step in (1, 2):
        store.save("rl", step, state, {"attempt": 0})
    cls = type(store.folder)

    def failing(original):
        def method(self, *args, **kwargs):
            if self.name in ("meta.json", "SHA256SUMS", "2", ".saving-2"):  # Orbax's own files are another test's
                calls.append(self)
                if len(calls) - 1 == call:
                    raise OSError(28, "No space left on device")
            return original(self, *args, **kwargs)

        return method

    with monkeypatch.context() as patched:
        for name in ("write_text", "rename"):
            patched.setattr(cls, name, failing(getattr(cls, name)))
        if call < 4:
            with pytest.raises(CheckpointError, match="No space left"):
                store.save("rl", 2, state, {"attempt": 1})
        else:
            store.save("rl", 2, state, {"attempt": 1})
            assert len(calls) == 4  # two writes, two renames: the parameters above cover them all
    for reader in (store, Store(tmp_path)):
        assert reader.latest("rl") == 2 and reader.meta("rl") == {"attempt": int(call == 4)}
    store.save("rl", 2, state, {"attempt": 2})
    assert store.meta("rl") == {"attempt": 2}


def test_files_are_on_the_disk_before_their_name_and_the_name_before_others_go(tmp_path, monkeypatch):
    """The order in which a power cut can do no harm."""
    store, state, order = Store(tmp_path), make_state(), []
    for step in (1, 2):
        store.save("rl", step, state, {})
    cls = type(store.folder)

    def recorded(name, original):
        def call(*arguments):
            order.append((name, arguments[0].name))
            return original(*arguments)

        return call

    for owner, name in [(store_module, "sync_tree"), (store_module, "sync"), (cls, "rename"), (cls, "rmtree")]:
        monkeypatch.setattr(owner, name, recorded(name, getattr(owner, name)))
    store.save("rl", 3, state, {})
    order = [call for call in order if "orbax" not in call[1]]  # Orbax's own renames come before all of these
    assert order == [("sync_tree", ".saving-3"), ("rename", ".saving-3"), ("sync", "rl"), ("rmtree", "1")]


def test_killed_at_any_instant(tmp_path):
    """A stopped process has on disk exactly what a kill would leave: one saver is stopped and copied often, then killed."""
    run, rng = tmp_path / "run", np.random.default_rng()
    run.mkdir()
    environment = {**os.environ, "XLA_FLAGS": with_devices(4), "JAX_PLATFORMS": "cpu"}
    saver = subprocess.Popen([sys.executable, "-c", SAVER, str(run)], env=environment)
    leftovers = 0
    try:
        deadline = time.monotonic() + 60
        while not (run / "saved").exists():
            assert saver.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for instant in range(20):
            time.sleep(rng.uniform(0, 0.1))
            assert saver.poll() is None
            last = instant == 19
            saver.send_signal(signal.SIGKILL if last else signal.SIGSTOP)
            if last:
                saver.wait()
            else:
                os.waitid(os.P_PID, saver.pid, os.WSTOPPED)
            copy = tmp_path / f"copy_{instant}"
            shutil.copytree(run, copy)
            if not last:
                saver.send_signal(signal.SIGCONT)
            leftovers += check_killed(copy)
    finally:
        saver.kill()
        saver.wait()
    assert leftovers  # otherwise no instant was inside a save, and this test has shown nothing


def check_killed(copy: Path) -> bool:
    """The newest checkpoint is whole and not older than the last save that returned; the next save removes leftovers."""
    store, like = Store(copy / "checkpoints"), {f"layer_{i}": jnp.zeros((4, 1024)) for i in range(12)}
    hidden = [path for path in (copy / "checkpoints/rl").iterdir() if path.name.startswith(".")]
    meta = store.meta("rl", store.latest("rl"))
    value = 2 * meta["step"] + meta["attempt"]
    assert value >= int((copy / "saved").read_text())
    state, _ = store.restore("rl", like, meta["step"])
    assert_identical(state, {f"layer_{i}": jnp.full((4, 1024), jnp.float32(value) * i) for i in range(12)})
    store.save("rl", meta["step"] + 1, state, {})
    names = {path.name for path in (copy / "checkpoints/rl").iterdir()}
    assert names == {"1", str(meta["step"]), str(meta["step"] + 1)}
    return bool(hidden)


def test_a_replacement_that_was_cut_short_keeps_the_old_one(tmp_path):
    Store(tmp_path).save("rl", 3, make_state(), {"old": True})
    (tmp_path / "rl/3").rename(tmp_path / "rl/.replaced-3")
    (tmp_path / "rl/.saving-3").mkdir()
    store = Store(tmp_path)
    assert store.latest("rl") == 3 and store.meta("rl") == {"old": True}
    store.save("sft", 1, make_state(), {})
    assert [path.name for path in (tmp_path / "rl").iterdir()] == ["3"] and store.meta("rl") == {"old": True}


def test_no_thread_stays_and_nothing_is_said(tmp_path, capfd, caplog):
    store = Store(tmp_path)
    store.save("rl", 1, make_state(), {})
    store.restore("rl", make_state())
    assert [thread for thread in threading.enumerate() if not thread.daemon] == [threading.main_thread()]
    assert capfd.readouterr() == ("", "") and not [r for r in caplog.records if r.levelno >= logging.WARNING]
