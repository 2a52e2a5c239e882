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

    In order, a text goes into the family of the one before it if both have `share` of the shorter one in common, unless the family has
    `most` members. What nearly all begin with, such as a chat template's first words, does not count.
    """
    order = sorted(range(len(texts)), key=lambda i: in_order(texts[i]))
    near = [common(texts[a], texts[b]) for a, b in itertools.pairwise(order)]
    template = int(np.quantile(near, 0.01)) if near else 0
    found = [[i] for i in order[:1]]
    for i, last, both in zip(order[1:], order, near, strict=False):
        own = min(len(texts[last]), len(texts[i])) - template
        if len(found[-1]) < most and both - template >= share * own:
            found[-1].append(i)
        else:
            found.append([i])
    return found
