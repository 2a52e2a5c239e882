"""Texts in the rows of a batch: padded, or packed. Lengths are multiples of a number, so that few programs are compiled.

Letters: B rows, T tokens, E examples of a packed row, N texts of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pe_rlhf_jax.data.prefixes import common, common_prefixes, in_order

# The batch types speak of JAX arrays; what is made here stays NumPy until a step's shardings place it on devices.
HostArray = Any


MOST_IN_A_ROW = 16
"""Judged examples that a packed row holds at most: a head is computed in so many places of each row, or twice as many for pairs."""


@dataclass(frozen=True)
class Packing:
    """How a batch's examples are packed: several in a row, each as if it stood in a row of its own."""

    length: int
    """Tokens of a row; no example is longer."""
    multiple: int
    """Rows of a batch are a multiple of this."""
    most: int = MOST_IN_A_ROW
    """Examples that a row holds at most."""


def packed(lengths: Sequence[Sequence[int]], packing: Packing, alike: HostArray | None = None) -> list[list[int]]:
    """The examples of each row, by their numbers. The last rows may be empty.

    First-fit decreasing: of the rows with room, an example goes into that to which it adds least, the first of such. So that few programs
    are compiled, a batch has one of few numbers of rows (as `padded` has it), and no more than it has examples, but for
    `packing.multiple`. Raises ValueError for an example that is longer than a row.

    Args:
        lengths: of the texts of each example.
        alike: int [N, N], with how many tokens each two of all these texts begin alike. None: every text is there whole.
    """
    flat, firsts = np.concatenate(lengths), np.cumsum([0, *map(len, lengths)])
    own = [np.arange(first, end) for first, end in itertools.pairwise(firsts)]
    # Of each text, what texts before it in its example have, and texts of each row.
    known, there = np.zeros(len(flat), np.int64), np.zeros((len(flat), 0), np.int64)
    if alike is not None:
        known = np.array([max(alike[t, texts[0] : t], default=0) for texts in own for t in texts])
    alone = [int(np.sum((flat - known)[texts])) for texts in own]
    if max(alone) > packing.length:
        raise ValueError(f"expected examples of at most {packing.length} tokens, found one of {max(alone)}")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(own)), key=lambda i: -alone[i]):
        texts, adds = own[i], [alone[i]] * len(rows)
        if alike is not None:
            adds = np.sum(flat[texts, None] - np.maximum(there[texts], known[texts, None]), axis=0).tolist()
        fit = [row for row, free in enumerate(room) if adds[row] <= free and len(rows[row]) < packing.most]
        if not fit:
            fit, adds = [len(rows)], [*adds, alone[i]]
            rows.append([])
            room.append(packing.length)
            there = np.pad(there, ((0, 0), (0, 1))) if alike is not None else there
        row = min(fit, key=lambda row: adds[row])
        rows[row].append(i)
        room[row] -= adds[row]
        if alike is not None:
            there[:, row] = np.maximum(there[:, row], np.max(alike[:, texts], axis=1))
    most = -(-len(lengths) // packing.multiple) * packing.multiple
    return rows + [[] for _ in range(min(padded(len(rows), packing.multiple), most) - len(rows))]


class Rows:
    """Examples in rows of their own, or packed. Where they share, what texts of a row begin with alike is there once."""

    def __init__(self, examples: Sequence[Sequence[np.ndarray]], multiple: int = 1, packing: Packing | None = None, share: bool = True):
        self.packing = packing
        self.rows = [[i] for i in range(len(examples))]
        if packing is not None:
            alike = common_prefixes([text for texts in examples for text in texts]) if share else None
            self.rows = packed([[len(text) for text in texts] for texts in examples], packing, alike)
        self.slots: list[dict[tuple[int, int], np.ndarray]] = []
        """Of each row, where the tokens of an example's texts are."""
        self._tokens, self._ends = [], []
        for row in self.rows:
            texts = {(i, at): text for i in row for at, text in enumerate(examples[i])}
            if packing is not None and share:
                texts = dict(sorted(texts.items(), key=lambda item: in_order(item[1])))
            slots, tokens, ends = laid(list(texts.values()), share)
            self.slots.append(dict(zip(texts, slots, strict=True)))
            self._tokens.append(tokens)
            self._ends.append(ends)
        self.length = rounded(self._tokens, multiple) if packing is None else packing.length

    def tokens(self, pad_id: int) -> tuple[HostArray, HostArray]:
        """Tokens [B, T] and their mask."""
        return pad(self._tokens, pad_id, self.length)

    def ends(self) -> HostArray:
        """Where texts end, int32 [B, T], as `models.visibility` has it; 0 at padding."""
        return pad(self._ends, 0, self.length)[0]

    def marks(self, marks: Sequence[np.ndarray]) -> HostArray:
        """What is said of each token of examples of one text, where rows do not share them: bool [B, T]; False at padding."""
        found = np.zeros((len(self.rows), self.length), bool)
        for row, texts in enumerate(self.slots):
            for (i, _), slots in texts.items():
                found[row, slots] = marks[i]
        return found

    def last(self) -> HostArray:
        """Where in its row each text of each example ends: int32 [B, E times texts]; 0 where a row holds fewer examples than E."""
        ends = {name: slots[-1] for texts in self.slots for name, slots in texts.items()}
        each = 1 + max(at for _, at in ends)
        places = np.array([[ends[i, at] for at in range(each)] for i in range(len(ends) // each)], np.int32)
        return self._said(places).reshape(len(self.rows), -1)

    def said(self, values: Sequence[float]) -> HostArray:
        """What is said of each example: float32 [B], packed [B, E] with 0 where a row holds fewer than E."""
        found = self._said(np.asarray(values, np.float32))
        return found[:, 0] if self.packing is None else found

    def _said(self, values: np.ndarray) -> np.ndarray:
        found = np.zeros((len(self.rows), 1 if self.packing is None else self.packing.most, *values.shape[1:]), values.dtype)
        for row, members in enumerate(self.rows):
            found[row, : len(members)] = values[members]
        return found


def laid(texts: Sequence[np.ndarray], share: bool) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """A row of texts, each without what it has in common with the one before it if they `share` it: where the tokens of each are, and the
    row's tokens and ends, as `models.visibility` has them.
    """
    tokens, ends = np.zeros((2, sum(map(len, texts))), np.int32)
    found: list[np.ndarray] = []
    path, length = np.zeros(0, np.int32), 0
    for before, text in itertools.pairwise([path, *texts]):
        shared = common(before, text) if share else 0
        ends[path[shared:]] = length
        path = np.append(path[:shared], np.arange(length, length + len(text) - shared, dtype=np.int32))
        tokens[path[shared:]] = text[shared:]
        length += len(text) - shared
        found.append(path)
    ends[path] = length
    return found, tokens[:length], ends[:length]


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
