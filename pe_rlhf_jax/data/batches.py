"""Which rows make up a batch, and the arrays it becomes. Padded lengths are multiples of a number, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from pe_rlhf_jax.data.formats import LabelExample, PreferenceExample, PromptExample, SFTExample
from pe_rlhf_jax.types import Batch, LabelBatch, PreferenceBatch, PromptBatch

# The batch types speak of JAX arrays; what is made here stays NumPy until a step's shardings place it on devices.
HostArray = Any


class BatchOrder:
    """Row indices of the batch at each step: a pure function of the step, so a resumed run goes on where it stopped.

    Rows are shuffled anew in every epoch, and each comes once an epoch. Batches are always full: one may end an epoch and begin the
    next, and with fewer rows than `batch_size` it holds several epochs.

    Args:
        size: number of rows.
        lengths: with the rows' lengths [size], batches hold rows of similar length: every `WINDOW` batches' worth of shuffled rows is
            sorted by length before it is cut into batches, which come in random order.
    """

    WINDOW = 50  # transformers' Trainer sorts as many with `group_by_length`

    def __init__(self, size: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None):
        if size < 1 or batch_size < 1:
            raise ValueError(f"expected at least one row and one row a batch, found {size} rows, batch_size {batch_size}")
        self._seed, self._batch_size = seed, batch_size
        self._lengths = None if lengths is None else np.asarray(lengths)
        # At least four windows an epoch, as the Trainer has it: otherwise the same rows would meet in every epoch.
        self._window = 1 if lengths is None else max(1, min(self.WINDOW, size // (4 * batch_size)))
        self._windows = grain.MapDataset.range(size).seed(seed).shuffle().repeat().batch(batch_size * self._window)
        self._kept: tuple[int, np.ndarray] | None = None  # the window last used: thousands of rows, and the next step's too

    def __call__(self, step: int) -> np.ndarray:
        """Indices [batch_size] of the batch at a step counted from 0."""
        if step < 0:
            raise ValueError(f"expected a step of at least 0, found {step}")
        window, place = divmod(step, self._window)
        if self._kept is None or self._kept[0] != window:
            self._kept = window, self._batches(window)
        return self._kept[1][place]

    def _batches(self, window: int) -> np.ndarray:
        """Row indices [window, batch_size] of the batches of a window, in their order."""
        rows = np.asarray(self._windows[window])
        if self._lengths is None:
            return rows[None]
        batches = rows[np.argsort(self._lengths[rows], kind="stable")].reshape(self._window, self._batch_size)
        return batches[np.random.default_rng((self._seed, window)).permutation(self._window)]


def pad_sft(examples: Sequence[SFTExample], pad_id: int, multiple: int) -> Batch:
    """Right-padded prompt + response; the length is the longest row's, rounded up to `multiple`."""
    rows = [np.concatenate([example.prompt, example.response]) for example in examples]
    tokens, mask = _pad(rows, pad_id, _rounded(rows, multiple))
    prompt_lengths = np.array([len(example.prompt) for example in examples])
    target_mask = mask & (np.arange(tokens.shape[1]) >= prompt_lengths[:, None])
    return Batch(tokens=tokens, mask=mask, target_mask=target_mask)


def pad_preferences(
    examples: Sequence[PreferenceExample],
    pad_id: int,
    multiple: int,
    rows: int | None = None,
    in_one_row: Callable[[int, int], bool] = lambda pair, side: True,
) -> PreferenceBatch:
    """Right-padded pairs, one row each or, where that does not pay, two.

    The length of two rows is a multiple of `multiple`, and that of one, which holds both sides, of twice as much: so it takes about as
    many values.

    Args:
        rows: fill the batch to this many pairs with copies of the first at weight 0.
        in_one_row: whether pairs go into one row of the first number of tokens, rather than into two rows of the second.
    """
    filled = fill(examples, rows)
    sides = [side for example in filled for side in (example.chosen, example.rejected)]
    shared = np.array([example.shared for example in filled])
    last: HostArray
    joined = [np.concatenate([example.chosen, example.rejected[example.shared :]]) for example in filled]
    # A prompt that is read in both directions has to be one for both sides.
    whole = all(example.shared >= example.prompt_length for example in filled)
    length = _rounded(joined, 2 * multiple)
    if whole and in_one_row(length, _rounded(sides, multiple)):
        tokens, mask = _pad(joined, pad_id, length)
        last = np.array([(len(example.chosen), len(row)) for example, row in zip(filled, joined, strict=True)], np.int32)[:, None] - 1
        places: HostArray = np.arange(tokens.shape[1])
        branches = (places >= shared[:, None]).astype(np.int32) + (places > last[:, :, 0])
        shape: tuple[int, ...] = (len(filled), 1, -1)
    else:
        tokens, mask = _pad(sides, pad_id, _rounded(sides, multiple))
        last, branches, shape = np.array([len(side) for side in sides], np.int32) - 1, None, (len(filled), 2, -1)
    margin: HostArray = np.array([example.margin for example in filled], np.float32)
    return PreferenceBatch(
        tokens=tokens.reshape(shape),
        mask=mask.reshape(shape),
        last=last.reshape(shape),
        branches=None if branches is None else branches.reshape(shape),
        margin=margin,
        weight=_weight(examples, filled),
    )


def pad_labels(examples: Sequence[LabelExample], pad_id: int, multiple: int, rows: int | None = None) -> LabelBatch:
    """Right-padded rows with their labels; `multiple` and `rows` as in `pad_preferences`."""
    filled = fill(examples, rows)
    texts = [example.tokens for example in filled]
    tokens, mask = _pad(texts, pad_id, _rounded(texts, multiple))
    label: HostArray = np.array([example.label for example in filled], np.float32)
    return LabelBatch(tokens=tokens, mask=mask, label=label, weight=_weight(examples, filled))


def pad_prompts(examples: Sequence[PromptExample], pad_id: int, multiple: int, rows: int | None = None) -> PromptBatch:
    """Left-padded prompts; `multiple` and `rows` as in `pad_preferences`."""
    prompts = [example.tokens for example in fill(examples, rows)]
    tokens, mask = _pad([prompt[::-1] for prompt in prompts], pad_id, _rounded(prompts, multiple))
    return PromptBatch(tokens=tokens[:, ::-1].copy(), mask=mask[:, ::-1].copy())


def fill(examples: Sequence, rows: int | None) -> list:
    """The examples, and copies of the first up to `rows`. Raises ValueError for none, and for more than that."""
    if not examples or (rows is not None and rows < len(examples)):
        raise ValueError(f"expected between 1 and {rows or 'any number of'} examples, found {len(examples)}")
    return [*examples, *[examples[0]] * ((rows or len(examples)) - len(examples))]


def _weight(examples: Sequence, filled: Sequence) -> HostArray:
    return (np.arange(len(filled)) < len(examples)).astype(np.float32)


def padded(length: int, multiple: int) -> int:
    """The length that rows of at most so many tokens are padded to: a multiple of `multiple`, which doubles wherever 16 of it are not
    enough. So of lengths between n and 2n there are at most 16, for each of which programs are compiled; padding is at most an eighth.
    """
    while 16 * multiple < length:
        multiple *= 2
    return -(-length // multiple) * multiple


def _rounded(rows: Sequence[np.ndarray], multiple: int) -> int:
    return padded(max(len(row) for row in rows), multiple)


def _pad(rows: Sequence[np.ndarray], pad_id: int, length: int) -> tuple[HostArray, HostArray]:
    """Right-padded int32 tokens [B, length] and their mask."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(length) < lengths[:, None]
    tokens = np.full(mask.shape, pad_id, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask
