"""Rows out of files, each with the place it came from: JSON lines, JSON and Parquet. Other places are the business of `catalogs`.

A row is a dict. What a row must hold is the business of `formats`; here it must only be a readable JSON object or table row.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class DataError(ValueError):
    """Data that cannot be used; the message says where, what was expected and what was found."""


class BadRow(Exception):
    """What was expected of a row and what was found; who catches it knows the place."""


@dataclass(frozen=True)
class Row:
    """One row: its values, and where it stands."""

    values: dict[str, Any]
    place: str
    """`FILE:LINE`, lines counted from 1; for a table, a JSON list or a catalog `SOURCE:ROW`."""

    @property
    def file(self) -> str:
        return self.place.rpartition(":")[0]


@dataclass
class Skipped:
    """What to do with rows that cannot be used: raise at the first one, or count them for a note."""

    on_error: Literal["error", "skip"] = "error"
    too_long: Literal["error", "skip", "truncate"] = "skip"
    mend: str = "Mend the row, or set data.on_error: skip to leave out and count bad rows."
    """What to do about a bad row that is an error."""
    _bad: Counter[str] = field(default_factory=Counter)
    _first: dict[str, str] = field(default_factory=dict)
    _long: Counter[tuple[str, str]] = field(default_factory=Counter)
    _cut: Counter[str] = field(default_factory=Counter)

    def bad(self, place: str, problem: str) -> None:
        """A row that is wrong. Raises DataError unless bad rows are skipped."""
        if self.on_error == "error":
            raise DataError(f"{place}: {problem}. {self.mend}")
        file = place.rpartition(":")[0]
        self._bad[file] += 1
        self._first.setdefault(file, f"{place}: {problem}")

    def long(self, place: str, limit: str, allowed: int, found: int) -> None:
        """A row over a length limit, in tokens. Raises DataError unless such rows are skipped."""
        if self.too_long == "error":
            raise DataError(
                f"{place}: expected at most {allowed} tokens (data.{limit}), found {found}. Shorten it, raise the limit, or set "
                "data.too_long: skip to leave out and count such rows."
            )
        self._long[place.rpartition(":")[0], limit] += 1

    def cut(self, place: str) -> None:
        """A row that is used with a shortened prompt."""
        self._cut[place.rpartition(":")[0]] += 1

    def notes(self) -> list[str]:
        """One line for each file and reason, for the person who runs this."""
        long = [f"{_rows(count)} over {limit} skipped in {file}" for (file, limit), count in self._long.items()]
        long += [f"{_rows(count)} with the start of the prompt cut off (max_prompt_length) in {file}" for file, count in self._cut.items()]
        return long + [f"{_rows(count)} skipped as bad in {file}; the first: {self._first[file]}" for file, count in self._bad.items()]


_LFS = b"version https://git-lfs"


def read(file: str | Path, skipped: Skipped) -> Iterator[Row]:
    """The rows of one file, in order.

    Raises:
        DataError: the file is missing, unreadable, empty or of another kind; or a row is bad and bad rows are not skipped.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, expected a file' if path.is_dir() else 'no such file'} (from {Path.cwd()})")
    reader = next((reader for ending, reader in _READERS.items() if path.name.endswith(ending)), None)
    if reader is None:
        *endings, last = _READERS
        raise DataError(f"{path}: expected a file that ends in {', '.join(endings)} or {last}, found {path.suffix or 'no ending'!r}")
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty; expected at least one row")
    with open(path, "rb") as begun:
        if begun.read(len(_LFS)) == _LFS:
            raise DataError(f"{path}: the file is a pointer of Git LFS, not the data; run `git lfs pull` in its repository")
    try:
        yield from reader(path, skipped)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def expand(pattern: str) -> list[str]:
    """The files that a pattern such as `ratings/*.json` matches, in the order of their names; a name without `*` stands for itself.

    Raises:
        DataError: no file matches.
    """
    if "*" not in pattern:
        return [pattern]
    files = sorted(glob.glob(str(Path(pattern).expanduser())))
    if not files:
        raise DataError(f"{pattern}: no file matches this pattern (from {Path.cwd()})")
    return files


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the text is held out where it is below the held-out share."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def _read_jsonl(path: Path, skipped: Skipped) -> Iterator[Row]:
    with open(path, "rb") as file:
        yield from _lines(file, path, skipped)


def _read_gzip(path: Path, skipped: Skipped) -> Iterator[Row]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _lines(file, path, skipped)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: expected a gzip file, found a damaged one: {error}. Fetch it again") from error


def _lines(file: Iterable[bytes], path: Path, skipped: Skipped) -> Iterator[Row]:
    for number, raw in enumerate(file, start=1):
        place = f"{path}:{number}"
        try:
            # A byte order mark is what some editors put at the start of a UTF-8 file.
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if not text.strip():
                raise BadRow("expected a JSON object, found an empty line")
            yield Row(_object(json.loads(text)), place)
        except UnicodeDecodeError as error:
            found = raw[error.start : error.start + 1].hex()
            skipped.bad(place, f"expected UTF-8, found byte 0x{found} at byte {error.start + 1} of the line")
        except json.JSONDecodeError as error:
            skipped.bad(place, f"expected a JSON object, found invalid JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:
            # a number of thousands of digits, or thousands of nested lists
            skipped.bad(place, f"expected a JSON object, found JSON that cannot be read ({error})")
        except BadRow as problem:
            skipped.bad(place, str(problem))


def _read_json(path: Path, skipped: Skipped) -> Iterator[Row]:
    """One JSON list of objects, or JSON lines under another name."""
    with open(path, "rb") as file:
        starts = (line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] for line in file)
        is_list = next(filter(None, starts), b"") == b"["
    if not is_list:
        yield from _read_jsonl(path, skipped)
        return
    try:
        items = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON list of objects in UTF-8, found what cannot be read: {error}") from error
    for number, item in enumerate(items, start=1):
        try:
            yield Row(_object(item), f"{path}:{number}")
        except BadRow as problem:
            skipped.bad(f"{path}:{number}", str(problem))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(f"expected a JSON object, found {_json_type(value)}")
    return value


def _read_parquet(path: Path, skipped: Skipped) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; run `pip install pyarrow`, or convert the file to .jsonl") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}:{number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a Parquet file with UTF-8 text, found a damaged one after row {number}: {error}") from error


_READERS = {".jsonl": _read_jsonl, ".jsonl.gz": _read_gzip, ".json": _read_json, ".parquet": _read_parquet}


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _json_type(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
