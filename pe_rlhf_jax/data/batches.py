"""Which examples make up a batch, and the arrays it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grain
import numpy as np

from pe_rlhf_jax.data.formats import LabelExample, PreferenceExample, PromptExample, SFTExample
from pe_rlhf_jax.data.rows import HostArray, Packing, Rows, pad, rounded
from pe_rlhf_jax.types import Batch, LabelBatch, PreferenceBatch, PromptBatch


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
        _check(size, batch_size)
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


class FamilyOrder:
    """As `BatchOrder`, but rows that begin alike stand next to each other, and what is shuffled anew in every epoch are families of them.

    Args:
        families: the rows of each, as `prefixes.families` makes them.
    """

    def __init__(self, families: Sequence[Sequence[int]], batch_size: int, seed: int):
        self._families = [np.asarray(family) for family in families]
        self._size, self._batch_size, self._seed = sum(map(len, families)), batch_size, seed
        _check(self._size, batch_size)
        self._kept: tuple[int, np.ndarray] | None = None  # the epoch last used

    def __call__(self, step: int) -> np.ndarray:
        """Row indices [batch_size] of the batch at a step counted from 0."""
        epochs, places = np.divmod(step * self._batch_size + np.arange(self._batch_size), self._size)
        return np.array([self._epoch(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._families))
            self._kept = epoch, np.concatenate([self._families[i] for i in order])
        return self._kept[1]


def _check(size: int, batch_size: int) -> None:
    if size < 1 or batch_size < 1:
        raise ValueError(f"expected at least one row and one row a batch, found {size} rows, batch_size {batch_size}")


def pad_sft(examples: Sequence[SFTExample], pad_id: int, multiple: int, packing: Packing | None = None) -> Batch:
    """Right-padded prompt + response; the length is the longest row's, rounded up to `multiple`, or the packing's."""
    texts = [(np.concatenate([example.prompt, example.response]),) for example in examples]
    # What is learned of a text is not what is learned of another that begins alike.
    rows = Rows(texts, multiple, packing, share=False)
    tokens, mask = rows.tokens(pad_id)
    # What a text begins with follows on nothing, and so is not learned.
    learned = [np.arange(example.length) >= max(1, example.prompt_length) for example in examples]
    return Batch(tokens=tokens, mask=mask, target_mask=rows.marks(learned), ends=None if packing is None else rows.ends())


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
    filled, weight = fill(examples, rows), _weight(examples, rows)
    sides = [side for example in filled for side in (example.chosen, example.rejected)]
    joined = Rows([(pair.chosen, pair.rejected) for pair in filled], 2 * multiple)
    # A prompt that is read in both directions has to be one for both sides.
    whole = all(example.shared >= example.prompt_length for example in filled)
    if whole and in_one_row(joined.length, rounded(sides, multiple)):
        return _pairs_in_rows(filled, joined, pad_id, weight)
    last: HostArray = np.array([len(side) for side in sides], np.int32) - 1
    tokens, mask, last = (x.reshape(len(filled), 2, -1) for x in (*pad(sides, pad_id, rounded(sides, multiple)), last))
    return PreferenceBatch(tokens, mask, last, None, joined.said([example.margin for example in filled]), joined.said(weight))


def pack_preferences(examples: Sequence[PreferenceExample], pad_id: int, packing: Packing) -> tuple[PreferenceBatch, list[list[int]]]:
    """Several pairs in a row, and the pairs of each row, by their numbers; for models of text."""
    rows = Rows([(pair.chosen, pair.rejected) for pair in examples], packing=packing)
    return _pairs_in_rows(examples, rows, pad_id, _weight(examples)), rows.rows


def _pairs_in_rows(examples: Sequence[PreferenceExample], rows: Rows, pad_id: int, weight: Sequence[float]) -> PreferenceBatch:
    tokens, mask, last, ends = (x[:, None] for x in (*rows.tokens(pad_id), rows.last(), rows.ends()))
    return PreferenceBatch(tokens, mask, last, ends, rows.said([example.margin for example in examples]), rows.said(weight))


def pad_labels(examples: Sequence[LabelExample], pad_id: int, multiple: int, rows: int | None = None) -> LabelBatch:
    """Right-padded rows with their labels; `multiple` and `rows` as in `pad_preferences`."""
    filled = fill(examples, rows)
    return _labels_in_rows(filled, Rows([(example.tokens,) for example in filled], multiple), pad_id, _weight(examples, rows))


def pack_labels(examples: Sequence[LabelExample], pad_id: int, packing: Packing) -> tuple[LabelBatch, list[list[int]]]:
    """Several responses in a row, and the responses of each row, by their numbers; for models of text."""
    rows = Rows([(example.tokens,) for example in examples], packing=packing)
    return _labels_in_rows(examples, rows, pad_id, _weight(examples)), rows.rows


def _labels_in_rows(examples: Sequence[LabelExample], rows: Rows, pad_id: int, weight: Sequence[float]) -> LabelBatch:
    tokens, mask = rows.tokens(pad_id)
    ends = None if rows.packing is None else rows.ends()
    return LabelBatch(tokens, mask, rows.last(), rows.said([example.label for example in examples]), rows.said(weight), ends)


def pad_prompts(examples: Sequence[PromptExample], pad_id: int, multiple: int, rows: int | None = None) -> PromptBatch:
    """Left-padded prompts; `multiple` and `rows` as in `pad_preferences`."""
    prompts = [example.tokens for example in fill(examples, rows)]
    tokens, mask = pad([prompt[::-1] for prompt in prompts], pad_id, rounded(prompts, multiple))
    return PromptBatch(tokens=tokens[:, ::-1].copy(), mask=mask[:, ::-1].copy())


def fill(examples: Sequence, rows: int | None) -> list:
    """The examples, and copies of the first up to `rows`. Raises ValueError for none, and for more than that."""
    if not examples or (rows is not None and rows < len(examples)):
        raise ValueError(f"expected between 1 and {rows or 'any number of'} examples, found {len(examples)}")
    return [*examples, *[examples[0]] * ((rows or len(examples)) - len(examples))]


def _weight(examples: Sequence, rows: int | None = None) -> Sequence[float]:
    return [1.0] * len(examples) + [0.0] * ((rows or len(examples)) - len(examples))
