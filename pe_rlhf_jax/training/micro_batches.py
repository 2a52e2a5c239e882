"""A batch in parts, so that the activations of one of them exist at a time.

Letters: B rows, N parts of M rows each, G groups of devices into which a mesh splits rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Shaped

from pe_rlhf_jax.sharding import BATCH, constrain, row_groups
from pe_rlhf_jax.types import PyTree

Result = TypeVar("Result")


def micro_batches(rows: PyTree, parts: int) -> PyTree:
    """So many parts of the rows, along a new first axis. No row leaves its devices, if they divide a part: each gives as many of its own.

    Neighbours that divide the part and a group of devices' share of it stay together.
    """
    count = len(jax.tree.leaves(rows)[0])
    groups = row_groups(count // parts)
    if groups == 1:
        return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)

    def split(x: Shaped[Array, "B ..."]) -> Shaped[Array, "N M ..."]:
        rest = x.shape[1:]
        x = constrain(x.reshape(groups, parts, -1, *rest), BATCH, *(None for _ in (0, 0, *rest)))
        return constrain(x.swapaxes(0, 1).reshape(parts, -1, *rest), None, BATCH, *(None for _ in rest))

    return jax.tree.map(split, rows)


def in_micro_batches(f: Callable[[PyTree], Result], rows: PyTree, size: int | None) -> Result:
    """What `f` makes of the rows, `size` of them at a time; null for all at once. Inside a compiled program.

    `f` takes and returns trees whose leaves have a row for each, and what it says of a row does not depend on the others.
    """
    count = len(jax.tree.leaves(rows)[0])
    parts = count // (size or count)
    if parts == 1:
        return f(rows)
    return rejoined(jax.lax.map(f, micro_batches(rows, parts)))


def rejoined(parts: PyTree) -> PyTree:
    """The rows of `micro_batches` as they were."""

    def join(x: Shaped[Array, "N M ..."]) -> Shaped[Array, "B ..."]:
        (count, size), rest = x.shape[:2], x.shape[2:]
        x = constrain(x.reshape(count, row_groups(size), -1, *rest), None, BATCH, *(None for _ in (0, *rest)))
        return constrain(x.swapaxes(0, 1).reshape(count * size, *rest), BATCH, *(None for _ in rest))

    return jax.tree.map(join, parts)
