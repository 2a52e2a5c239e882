"""A file is there as a whole or not at all."""

import contextlib
import errno
import os

import pytest

from pe_rlhf_jax import files


@pytest.mark.parametrize("place", ["file:///x", "http://host/x", "GS://bucket", "://x"])
def test_places_that_cannot_be_are_refused_with_those_that_can(place):
    with pytest.raises(ValueError, match=f"{place} is neither a path nor a place that begins with gs://, s3://, az://"):
        files.path_of(place)


def test_both_names_of_google_cloud_storage_are_one():
    assert files.path_of("gcs://bucket/a") == files.path_of("gs://bucket/a")


def test_a_file_is_made_and_replaced(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"old", b"new"):
        files.write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_gives_the_space_back(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_another_process_is_writing_is_left_alone(tmp_path, monkeypatch):
    """The second writer comes while the first has written but not yet renamed."""
    path, rename, process = tmp_path / "report.html", os.replace, os.getpid()

    def late(source, target):
        monkeypatch.setattr(files.os, "replace", rename)
        monkeypatch.setattr(files.os, "getpid", lambda: process + 1)
        files.write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", late)
    files.write_atomically(path, b"first, and longer")
    assert path.read_bytes() == b"first, and longer"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(("number", "fatal_for_folders"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders_is_no_error_but_a_failing_disk_is(tmp_path, monkeypatch, number, fatal_for_folders):
    def fail(_):
        raise OSError(number, "no")

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        files.sync(tmp_path / "file")
    with pytest.raises(OSError, match="no") if fatal_for_folders else contextlib.nullcontext():
        files.sync(tmp_path)


def test_everything_in_a_folder_is_synced_before_the_folder(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_text(name)
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    files.sync_tree(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in synced] == ["a/b/z", "a/b", "a/y", "a", "x", "."]
