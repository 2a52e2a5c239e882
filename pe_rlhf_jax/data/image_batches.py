"""Pixel values of the examples in a batch: decoded when the batch is made.

What a batch holds depends on the rows and the step alone, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from pe_rlhf_jax.data.formats import Pictures
from pe_rlhf_jax.data.image_processing import ImageProcessing, Values
from pe_rlhf_jax.data.images import Picture
from pe_rlhf_jax.data.sources import BadRow, DataError, Skipped

CACHED_BYTES = 256 * 2**20
"""Of pixel values that are kept: enough that a batch is not decoded twice, too little to matter."""


class Seen(Protocol):
    """Any of the examples of `formats`."""

    @property
    def pictures(self) -> Pictures: ...
    @property
    def place(self) -> str: ...


Example = TypeVar("Example", bound=Seen)


class PixelReader:
    """Pixel values of pictures; those last used are kept, up to a bound. Safe to call from several threads."""

    def __init__(self, processing: ImageProcessing, cached_bytes: int = CACHED_BYTES):
        self.processing = processing
        self.cached_bytes = cached_bytes
        self._kept: collections.OrderedDict[str, list[Values]] = collections.OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def __call__(self, picture: Picture) -> list[Values]:
        """The picture's tiles [H, W, 3], of which a model without tiles has one. Raises BadRow if it cannot be decoded."""
        with self._lock:
            if picture.key in self._kept:
                self._kept.move_to_end(picture.key)
                return self._kept[picture.key]
        tiles, _, _ = self.processing.tiles(picture.decode())
        with self._lock:
            if picture.key not in self._kept:
                self._kept[picture.key] = tiles
                self._size += sum(tile.nbytes for tile in tiles)
            while self._size > self.cached_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._size -= sum(tile.nbytes for tile in oldest)
        return tiles

    def pad(self, examples: Sequence[Seen], multiple: int = 1) -> np.ndarray | None:
        """Pixel values [B, M, H, W, 3], M the most pictures (or tiles) of a row, rounded up to `multiple`; others are zero.

        None where no example has a picture.

        Raises:
            DataError: a picture cannot be decoded.
        """
        rows = [self.tiles(example) for example in examples]
        most = max(map(len, rows), default=0)
        if not most:
            return None
        first = next(row[0] for row in rows if row)
        values = np.zeros((len(rows), -(-most // multiple) * multiple, *first.shape), np.float32)
        for row, tiles in enumerate(rows):
            for at, tile in enumerate(tiles):
                values[row, at] = tile
        return values

    def tiles(self, example: Seen, picture: Picture | None = None) -> list[Values]:
        """All tiles of an example's pictures, or those of one of them. Raises DataError, which names the row, as `pad` does."""
        pictures = example.pictures if picture is None else (picture,)
        try:
            return [tile for picture in pictures for tile in self(picture)]
        except BadRow as problem:
            mend = "Mend the row, or set data.on_error: skip to use the next row in its place"
            raise DataError(f"{example.place}: {problem}. {mend}") from problem


class WholeExamples(Sequence[Example]):
    """Examples whose pictures can be decoded, found when they are first used.

    In the place of one that cannot comes the next one that can, so which example stands where depends on the data alone. `skipped` is
    told of each row once, and raises DataError unless bad rows are skipped.
    """

    def __init__(self, examples: Sequence[Example], read: PixelReader, skipped: Skipped):
        self.examples = examples
        self.read = read
        self.skipped = skipped
        self._whole: dict[int, bool] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index]
        for offset in range(len(self)):
            at = (start + offset) % len(self)
            if self._is_whole(at):
                return self.examples[at]
        raise DataError(f"none of {len(self)} rows has pictures that can be decoded. {'; '.join(self.skipped.notes())}")

    def _is_whole(self, at: int) -> bool:
        if at not in self._whole:
            example = self.examples[at]
            problem = self._problem(example)
            with self._lock:
                if problem is not None and at not in self._whole:
                    self.skipped.bad(example.place, problem)
                self._whole[at] = problem is None
        return self._whole[at]

    def _problem(self, example: Seen) -> str | None:
        try:
            for picture in example.pictures:
                self.read(picture)
        except BadRow as problem:
            return str(problem)
        return None


def as_read(examples: Sequence[Example]) -> Sequence[Example]:
    """The examples as they were read, whether or not their pictures can be decoded: for figures that need no pixels."""
    return examples.examples if isinstance(examples, WholeExamples) else examples
