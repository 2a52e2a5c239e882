"""Texts in the rows of a batch: padded, or packed. Lengths are multiples of a number, so that few programs are compiled.

Letters: B rows, T tokens, E examples of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# The batch types speak of JAX arrays; what is made here stays NumPy until a step's shardings place it on devices.
HostArray = Any


MOST_IN_A_ROW = 16
"""Judged examples that a packed row holds at most: a head is computed in so many places of each row, or twice as many for pairs."""


@dataclass(frozen=True)
class Packing:
    """How a batch's examples are packed: several in a row, one after the other, each as if it stood in a row of its own."""

    length: int
    """Tokens of a row; no example is longer."""
    multiple: int
    """Rows of a batch are a multiple of this."""
    most: int = MOST_IN_A_ROW
    """Examples that a row holds at most."""


def packed(lengths: Sequence[int], packing: Packing) -> list[list[int]]:
    """The examples of each row, by their numbers: first-fit decreasing. The last rows may be empty.

    So that few programs are compiled, a batch has one of few numbers of rows (as `padded` has it), and no more than it has examples, but
    for `packing.multiple`. Raises ValueError for an example that is longer than a row.
    """
    if max(lengths) > packing.length:
        raise ValueError(f"expected examples of at most {packing.length} tokens, found one of {max(lengths)}")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, free in enumerate(room):
            if lengths[i] <= free and len(rows[row]) < packing.most:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(packing.length)
        rows[row].append(i)
        room[row] -= lengths[i]
    most = -(-len(lengths) // packing.multiple) * packing.multiple
    return rows + [[] for _ in range(min(padded(len(rows), packing.multiple), most) - len(rows))]


class Rows:
    """Examples in rows of their own, or packed."""

    def __init__(self, texts: Sequence[np.ndarray], multiple: int, packing: Packing | None):
        self.texts, self.packing = texts, packing
        self.rows = [[i] for i in range(len(texts))] if packing is None else packed([len(text) for text in texts], packing)
        self.length = rounded(texts, multiple) if packing is None else packing.length

    def tokens(self, pad_id: int) -> tuple[HostArray, HostArray]:
        """Tokens [B, T] and their mask."""
        return pad([self._joined(row, self.texts) for row in self.rows], pad_id, self.length)

    def marks(self, marks: Sequence[np.ndarray]) -> HostArray:
        """What each example says of each of its tokens, int32 [B, T]; 0 at padding."""
        return pad([self._joined(row, marks) for row in self.rows], 0, self.length)[0]

    def segments(self) -> HostArray | None:
        """The examples of each row, counted from 1, at their tokens."""
        numbers = {i: number for row in self.rows for number, i in enumerate(row, start=1)}
        return None if self.packing is None else self.marks([np.full(len(text), numbers[i]) for i, text in enumerate(self.texts)])

    def places(self, places: Sequence[Sequence[int]]) -> HostArray:
        """Where places of each example are in its row: int32 [B, E times places]; 0 where a row holds fewer examples than E."""
        starts = {i: sum(len(self.texts[j]) for j in row[:at]) for row in self.rows for at, i in enumerate(row)}
        moved = [np.add(starts[i], place) for i, place in enumerate(places)]
        found = self._said(np.asarray(moved, np.int32))
        return found.reshape(len(self.rows), -1)

    def said(self, values: Sequence[float]) -> HostArray:
        """What is said of each example: float32 [B], packed [B, E] with 0 where a row holds fewer than E."""
        found = self._said(np.asarray(values, np.float32))
        return found[:, 0] if self.packing is None else found

    def _said(self, values: np.ndarray) -> np.ndarray:
        found = np.zeros((len(self.rows), 1 if self.packing is None else self.packing.most, *values.shape[1:]), values.dtype)
        for row, members in enumerate(self.rows):
            found[row, : len(members)] = values[members]
        return found

    @staticmethod
    def _joined(row: list[int], values: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *(values[i] for i in row)])


def padded(length: int, multiple: int) -> int:
    """The length that rows of at most so many tokens are padded to: a multiple of `multiple`, which doubles wherever 16 of it are not
    enough. So of lengths between n and 2n there are at most 16, for each of which programs are compiled; padding is at most an eighth.
    """
    while 16 * multiple < length:
        multiple *= 2
    return -(-length // multiple) * multiple


def rounded(rows: Sequence[np.ndarray], multiple: int) -> int:
    return padded(max(len(row) for row in rows), multiple)


def pad(rows: Sequence[np.ndarray], pad_id: int, length: int) -> tuple[HostArray, HostArray]:
    """Right-padded int32 tokens [B, length] and their mask."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(length) < lengths[:, None]
    tokens = np.full(mask.shape, pad_id, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask
