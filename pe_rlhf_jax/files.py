"""Where files are, on a disk or in an object store; and files that are there as a whole or not at all, whatever stops the writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import cast

import fsspec
from etils import epath

STORES = ("gs", "s3", "az")
"""Object stores, as their places begin."""


def path_of(place: str | os.PathLike[str]) -> Path:
    """A local path, `~` expanded, or a place in an object store such as `gs://bucket/folder`.

    The latter has pathlib's methods for names, reading and writing; there is no appending, no lock, and no move that is whole or not at
    all but that of a single file.

    Raises:
        ValueError: it begins like a URL, but not as one of `STORES`.
    """
    if not is_remote(place):
        return Path(place).expanduser()
    store, _, name = os.fspath(place).partition("://")
    store = "gs" if store == "gcs" else store  # Google Cloud Storage has both names
    if store not in STORES:
        raise ValueError(f"{os.fspath(place)} is neither a path nor a place that begins with {', '.join(f'{s}://' for s in STORES)}")
    for protocol in ("gs", "gcs", "s3", "az"):  # other hosts write there too: a remembered listing would be an old one
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return cast(Path, epath.Path(f"{store}://{name}"))


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is in an object store."""
    return "://" in os.fspath(place)


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one move: a reader, or the start after a kill or a power cut, sees the old file or the new one.

    Several processes may write the same file at once; the last one's stays. Raises OSError (a full disk, say), and then the old file is
    as it was.
    """
    if is_remote(path):
        path.write_bytes(data)  # an object appears when it is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named by process, so that two writers do not meet in one file; what a kill leaves is overwritten or stays hidden.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk: give the space back
        raise


def passing(error: BaseException | None) -> bool:
    """Whether it was caused by a store or a network that may be there again in a while, rather than by what was asked of them."""
    if error is None:
        return False
    kind, client = type(error), type(error).__module__.partition(".")[0]
    if client in ("aiohttp", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3"):  # of gs:// and of the hub
        told = (getattr(error, name, None) for name in ("code", "status", "status_code"))
        code = next(
            (code for code in [*told, getattr(getattr(error, "response", None), "status_code", None)] if isinstance(code, int)), None
        )
        if code is not None:
            return code in (408, 429) or code >= 500
        if client == "huggingface_hub":  # its own say what cannot be had; what caused them, whether that may pass
            return passing(error.__cause__)
        return "Credentials" not in kind.__name__ and (client not in ("httpx", "httpx2") or _has_base(kind, "TransportError"))
    return isinstance(error, ConnectionError | TimeoutError) or passing(error.__cause__)


def _has_base(kind: type, name: str) -> bool:
    return any(base.__name__ == name for base in kind.__mro__)


def sync_tree(path: Path) -> None:
    """Waits until a file, or a folder with everything in it, is on the disk: a rename must not get there before what it names."""
    for child in sorted(path.iterdir()) if path.is_dir() else ():
        sync_tree(child)
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk. Raises OSError if they cannot get there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and user-space file systems (a mounted cloud drive) cannot do this for folders, and say so.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
