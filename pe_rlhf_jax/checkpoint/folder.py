"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from etils import epath

from pe_rlhf_jax.files import is_remote, sync, sync_tree


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder under another name to write into, renamed at the end; one that is already there is replaced as a whole.

    What a kill leaves between the two renames of a replacement gets its name back at the next call.
    For an object store, a folder on the disk, whose files are copied at the end; a kill meanwhile can leave some of them.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            _copied(Path(local), cast(epath.Path, folder))
        return
    folder = Path(folder)
    unfinished, replaced = (folder.with_name(f".{word}-{folder.name}") for word in ("writing", "replaced"))
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        sync_tree(unfinished)  # on the disk before it gets its name: a power cut finds the old folder or the new one
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _copied(source: Path, target: epath.Path) -> None:
    target.rmtree(missing_ok=True)
    for file in sorted(source.rglob("*")):
        if file.is_file():
            copy = target / file.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as read, copy.open("wb") as written:
                shutil.copyfileobj(read, written, 1 << 24)
