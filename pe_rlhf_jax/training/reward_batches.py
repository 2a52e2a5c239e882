"""The batches that reward models learn from and are judged on."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from pe_rlhf_jax.data import Packing, as_read, pack_labels, pack_preferences, pad_labels, pad_preferences
from pe_rlhf_jax.data.prefixes import in_order
from pe_rlhf_jax.sharding import row_multiple
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.shared_rows import pair_in_one_row
from pe_rlhf_jax.types import LabelBatch, PreferenceBatch

DataKind = Literal["preference", "label"]
Batched = Iterator[tuple[Any, Sequence[int]]]
PACKED_AT_ONCE = 512
"""Examples, next to those that begin alike, of which packed rows are made together: its time grows with the square."""
_PACK: dict[DataKind, Callable[..., tuple[Any, list[list[int]]]]] = {"preference": pack_preferences, "label": pack_labels}


def training_batch(context: Context, kind: DataKind) -> Callable[[Sequence[Any]], Any]:
    """What makes a batch of rows, on the host, without their pictures."""
    packing = context.packing("reward", kind)
    if packing is None:
        return functools.partial(padded_batch, context, kind)
    return lambda rows: _PACK[kind](rows, context.pad_token, packing)[0]


def scored_batches(context: Context, kind: DataKind, rows: Sequence[Any]) -> Batched:
    """Batches of rows to be scored, on the host, and the numbers of the rows in each, in the order of places whose weight is not 0.

    Packed where training is, but for those that would make longer rows: then rows of a batch share what they begin with, and all batches
    are of one shape.
    """
    size, packing = context.evaluated_at_once("reward"), context.packing("reward", kind)
    lengths = np.array([row.length for row in as_read(rows)])
    order = np.argsort(lengths, kind="stable")  # rows of similar length need less padding
    fit = [] if packing is None else order[lengths[order] <= packing.length].tolist()
    if packing is not None and fit:
        yield from _packed_batches(context, kind, as_read(rows), fit, packing, size)
    for at in range(len(fit), len(rows), size):
        numbers = order[at : at + size].tolist()
        part = [rows[i] for i in numbers]
        yield context.seen(padded_batch(context, kind, part, size), part), numbers


def padded_batch(context: Context, kind: DataKind, rows: Sequence[Any], size: int | None = None) -> PreferenceBatch | LabelBatch:
    """Rows of their own, on the host; filled to `size` examples with copies of weight 0. Pairs may take one row or two."""
    config, c, devices = context.config, context.decoder.config, row_multiple(context.mesh)
    if kind == "label":
        return pad_labels(rows, context.pad_token, config.data.length_multiple, size)
    fits = functools.partial(pair_in_one_row, config, c, devices)
    return pad_preferences(rows, context.pad_token, config.data.length_multiple, size, fits)


def _packed_batches(context: Context, kind: DataKind, rows: Sequence[Any], fit: list[int], packing: Packing, size: int) -> Batched:
    order = sorted(fit, key=lambda i: in_order(rows[i].begins))
    batches, laid = [], []
    for at in range(0, len(order), PACKED_AT_ONCE):
        numbers = order[at : at + PACKED_AT_ONCE]
        batch, places = _PACK[kind]([rows[i] for i in numbers], context.pad_token, packing)
        count = sum(map(bool, places))  # empty ones are the last
        batches.append(jax.tree.map(lambda x, count=count: x[:count], batch))
        laid += [[numbers[i] for i in row] for row in places[:count]]
    parts, multiple = -(-len(laid) // size), row_multiple(context.mesh)
    size = -(-len(laid) // (parts * multiple)) * multiple  # so that few rows are empty
    empty = jax.tree.map(lambda x: np.zeros((-len(laid) % size, *x.shape[1:]), x.dtype), batches[0])
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *batches, empty)
    for at in range(0, len(laid), size):
        yield jax.tree.map(lambda x, at=at: x[at : at + size], whole), list(itertools.chain(*laid[at : at + size]))
