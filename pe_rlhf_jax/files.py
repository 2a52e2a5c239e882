"""Files that are there as a whole or not at all, whatever stops the writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one move: a reader, or the start after a kill or a power cut, sees the old file or the new one.

    Several processes may write the same file at once; the last one's stays. Raises OSError (a full disk, say), and then the old file is
    as it was.
    """
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
