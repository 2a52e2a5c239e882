"""With how many tokens texts begin alike. Letter: N texts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

Text = Int[np.ndarray, " T"]


def in_order(text: Text) -> bytes:
    """A key by which texts that begin alike are neighbours."""
    return text.astype(">u4").tobytes()


def common(a: Text, b: Text) -> int:
    """With how many tokens both begin."""
    most = min(len(a), len(b))
    same = a[:most] == b[:most]
    return most if np.all(same) else int(np.argmin(same))


def common_prefixes(texts: Sequence[Text]) -> Int[np.ndarray, "N N"]:
    """`common` of each two."""
    order = sorted(range(len(texts)), key=lambda i: in_order(texts[i]))
    # In order, two texts have in common what all neighbours between them have.
    near = np.array([common(texts[a], texts[b]) for a, b in itertools.pairwise(order)], np.int64)
    found = np.diag([len(texts[i]) for i in order])
    for at in range(len(near)):
        found[at, at + 1 :] = found[at + 1 :, at] = np.minimum.accumulate(near[at:])
    back = np.argsort(order)
    return found[back][:, back]


def families(texts: Sequence[Text], share: float, most: int) -> list[list[int]]:
    """Texts, by their numbers, next to others that begin as they do.

    In order, a text goes on the family of the one before it if it has `share` of its own tokens in common with it, or that of its, unless
    the family has `most` members.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(texts)), key=lambda i: in_order(texts[i])):
        text, last = texts[i], texts[found[-1][-1]] if found else None
        if last is not None and len(found[-1]) < most and common(last, text) >= share * min(len(last), len(text)):
            found[-1].append(i)
        else:
            found.append([i])
    return found
