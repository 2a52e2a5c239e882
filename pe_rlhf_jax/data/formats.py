"""From rows to texts: which keys a row may have, and what is learned from it. `encoder` makes tokens of them.

Conventions (those of TRL): `prompt` + `completion`, or `messages`, for SFT, and with `label` for judged responses; `prompt` + `chosen` +
`rejected` (+ `margin`); `chosen` + `rejected` alone, each a whole text; `prompt` alone. A text is a plain string, used as it stands, or
a list of turns `{"role", "content"}`, which goes through the tokenizer's chat template. Tokens of prompt and response are made apart and
joined, because that is how a policy meets its own response; a response ends with one end token: the tokenizer's, or in a conversation that
with which the chat template ends a turn. Pictures, under `images` or `image` or
among the parts of a turn, belong to the prompt; `turns` says how they are written there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from pe_rlhf_jax.data.images import KEYS, Picture
from pe_rlhf_jax.data.images import shown as _shown
from pe_rlhf_jax.data.prefixes import common
from pe_rlhf_jax.data.sources import BadRow, DataError, Row, Skipped
from pe_rlhf_jax.data.turns import PLACEHOLDER, Template, Turn, Vision, folder_of, has_pictures, row_pictures, turns
from pe_rlhf_jax.data.turns import text as _text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Kind = Literal["sft", "preference", "label", "prompts"]
"""What rows are for."""
Tokens = Int[np.ndarray, " T"]
Pictures = tuple[Picture, ...]


_SEES_NOTHING = "the row has pictures, but this model takes none; choose a model that does, or leave the pictures out of the rows"


@dataclass(frozen=True)
class SFTExample:
    """A prompt and the response to be learned, which holds its end token."""

    prompt: Tokens
    response: Tokens
    pictures: Pictures = ()
    place: str = ""
    """Where the row stands, for messages about its pictures; so in the other examples."""

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the row, for batches of rows of similar length."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class PreferenceExample:
    """Two whole sequences, prompt included, each with its end token."""

    chosen: Tokens
    rejected: Tokens
    margin: float = 0.0
    """How much better the chosen side was rated; 0 where unknown."""
    pictures: Pictures = ()
    """Of the prompt, which both sides share where there are any."""
    prompt_length: int = 0
    """Tokens of the prompt at the start of each side, where there are pictures: their placeholders are looked for in it only."""
    place: str = ""
    group: str | None = None
    """`TextRow.together`; so in the other examples. None: the row stands alone."""

    @property
    def begins(self) -> Tokens:
        """By which examples that begin alike are found: one of the sides."""
        return self.chosen

    @functools.cached_property
    def shared(self) -> int:
        """Tokens with which both sides begin: the prompt, and as much of the answers as is alike."""
        return common(self.chosen, self.rejected)

    @property
    def length(self) -> int:
        """Tokens of both sides, what they share counted once."""
        return len(self.chosen) + len(self.rejected) - self.shared


@dataclass(frozen=True)
class LabelExample:
    """A whole sequence, prompt included, with its end token, and how its response was judged."""

    tokens: Tokens
    label: float
    """1 for a good response, 0 for a bad one."""
    group: str | None = None
    pictures: Pictures = ()
    prompt_length: int = 0
    """As in `PreferenceExample`."""
    place: str = ""

    @property
    def begins(self) -> Tokens:
        """By which examples that begin alike are found."""
        return self.tokens

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.tokens)


@dataclass(frozen=True)
class PromptExample:
    """A prompt to be answered."""

    tokens: Tokens
    text: str
    """The prompt, whole even where `tokens` lost its start to the length limit."""
    columns: dict[str, Any]
    """The row's other keys, for judges; pictures are not among them."""
    pictures: Pictures = ()
    place: str = ""
    group: str | None = None


class Text(NamedTuple):
    """A prompt and a response before tokenization; without a prompt, the response is the whole text."""

    prompt: str
    response: str
    turn: bool = False
    """Whether the response is an assistant's turn, which ends as the chat template ends one."""
    asked: str = ""
    """The prompt's turns without a template, so that models with other templates hold out the same rows."""


class Seen(NamedTuple):
    """A text and the pictures of its prompt."""

    text: Text
    pictures: Pictures


@dataclass(frozen=True)
class TextRow:
    """A row as text: what all kinds of data are read into."""

    place: str
    texts: tuple[Text, ...]
    """One for SFT and labels; chosen and rejected for preferences; for prompts one with an empty response."""
    margin: float = 0.0
    label: float = 0.0
    group: str | None = None
    """The value by which rows are held out, where the configuration names one."""
    columns: dict[str, Any] = field(default_factory=dict)
    pictures: Pictures = ()
    """Of the prompt, in the order of its placeholders."""

    @property
    def prompts(self) -> set[str]:
        """The prompts with the names of their pictures, or where there are none the whole texts."""
        pictures = "".join(f"{picture.label}\n" for picture in self.pictures)
        return {pictures + (text.asked or text.prompt or text.response) for text in self.texts}

    @property
    def keys(self) -> set[str]:
        """What must not be both in training and in validation: the group, or else the pictures, or else the prompts."""
        if self.group is not None:
            return {self.group}
        return {picture.label for picture in self.pictures} or self.prompts

    @property
    def together(self) -> str:
        """The same for rows that one draw of an interval takes together, because they are not independent: the group, or else for answers
        the prompts with their pictures, and for prompts the pictures, or else the prompt. Long ones as a hash, which is kept for every row.
        """
        if self.group is not None:
            return self.group
        answered = any(text.response for text in self.texts)
        return hashlib.blake2b("\n".join(sorted(self.prompts if answered else self.keys)).encode(), digest_size=8).hexdigest()


class Reader:
    """Reads rows of one kind into `TextRow`s with a tokenizer's chat template.

    Bad rows go to `skipped`, which raises DataError or counts them. With `group_by`, every row must have that key. Without `vision`, the
    model sees no pictures, and rows that have some are refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skipped: Skipped, group_by: str | None = None, vision: Vision | None = None):
        self.template = Template(tokenizer, vision)
        self.skipped = skipped
        self.group_by = group_by
        self.vision = vision

    def sft(self, rows: Iterable[Row]) -> list[TextRow]:
        """Rows with `prompt` and `completion`, or with `messages` whose last turn is the assistant's."""
        return self._read(rows, self._sft)

    def preference(self, rows: Iterable[Row]) -> list[TextRow]:
        """Rows with `chosen` and `rejected`, perhaps with `prompt`, perhaps with `margin`."""
        return self._read(rows, self._preference)

    def label(self, rows: Iterable[Row]) -> list[TextRow]:
        """Rows as for SFT, with `label`: 0 or 1, false or true."""
        return self._read(rows, self._label)

    def prompts(self, rows: Iterable[Row]) -> list[TextRow]:
        """Rows with `prompt`; all other keys travel along as columns."""
        return self._read(rows, self._prompt)

    def _read(self, rows: Iterable[Row], parse: Callable[[Row], TextRow]) -> list[TextRow]:
        read = []
        for row in rows:
            if self.vision is None and has_pictures(row):
                raise DataError(f"{row.place}: {_SEES_NOTHING}")
            try:
                read.append(replace(self._checked(parse(row)), group=self._group(row)))
            except BadRow as problem:
                self.skipped.bad(row.place, str(problem))
        return read

    def _group(self, row: Row) -> str | None:
        if self.group_by is None:
            return None
        value = row.values.get(self.group_by)
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            found = _shown(value) if self.group_by in row.values else _keys(row)
            raise BadRow(f"expected the key `{self.group_by}` (data.group_by) with a text or a whole number, found {found}")
        return str(value)

    def _checked(self, row: TextRow) -> TextRow:
        """The row, if its pictures can be written into its prompts."""
        if self.vision is None:
            if row.pictures:
                raise DataError(f"{row.place}: {_SEES_NOTHING}")
            return row
        for text in row.texts:
            self.vision.write(text.prompt, row.pictures)
        return row

    def _sft(self, row: Row) -> TextRow:
        if row.values.get("messages") is not None:
            return self._text_row(row, self._conversation(row, "messages", row.values["messages"]))
        return self._text_row(row, self._answer(row, "completion"))

    def _preference(self, row: Row) -> TextRow:
        chosen, rejected = self._answer(row, "chosen", whole=True), self._answer(row, "rejected", whole=True)
        if chosen == rejected:
            raise BadRow("expected `chosen` and `rejected` to differ, found the same text twice")
        margin = 0.0 if row.values.get("margin") is None else row.values["margin"]
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin) or margin < 0:
            raise BadRow(f"expected `margin` to be a number of at least 0, found {_shown(margin)}")
        return replace(self._text_row(row, chosen, rejected), margin=float(margin))

    def _label(self, row: Row) -> TextRow:
        label = _require(row, "label")
        if not isinstance(label, (bool, int, float)) or label not in (0, 1):
            raise BadRow(f"expected `label` to be 0 or 1, or false or true, found {_shown(label)}")
        return replace(self._sft(row), label=float(label))

    def _prompt(self, row: Row) -> TextRow:
        prompt = _require(row, "prompt")
        if isinstance(prompt, str):
            given = self._plain(row, prompt, "")
        else:
            asked = turns("prompt", prompt, row_pictures(row), folder_of(row))
            _check_last("prompt", asked)
            given = Seen(
                Text(self.template.prompt("prompt", asked, self.template.settings(row)), "", asked=_asked(asked)), _pictures(asked)
            )
        if taken := [key for key in ("prompts", "completions") if key in row.values]:
            raise BadRow(f"expected other keys than `{taken[0]}`, which reward functions are given in their own right; rename it")
        columns = {key: value for key, value in row.values.items() if key not in ("prompt", *KEYS)}
        return replace(self._text_row(row, given), columns=columns)

    def _text_row(self, row: Row, *sides: Seen) -> TextRow:
        first = sides[0]
        if first.pictures and any((side.pictures, side.text.prompt) != (first.pictures, first.text.prompt) for side in sides[1:]):
            raise BadRow("expected one prompt for both sides of a pair with pictures, found two")
        return TextRow(row.place, tuple(side.text for side in sides), pictures=first.pictures)

    def _answer(self, row: Row, key: str, whole: bool = False) -> Seen:
        """The text under `key` with its prompt; with `whole`, a row may leave the prompt out, or name it again beside a conversation."""
        answer, prompt = _require(row, key), row.values.get("prompt")
        if whole and prompt is None and isinstance(answer, str):
            if has_pictures(row):
                raise BadRow("expected `prompt` beside pictures, found whole texts: pictures belong to a prompt")
            return Seen(Text("", _text(key, answer)), ())
        if whole and (prompt is None or (isinstance(prompt, str) and isinstance(answer, list))):
            return self._conversation(row, key, answer)
        prompt = _require(row, "prompt")
        if isinstance(prompt, str):
            if not isinstance(answer, str):
                raise BadRow(f"expected `{key}` to be text because `prompt` is, found {_shown(answer)}")
            return self._plain(row, prompt, _text(key, answer))
        asked = turns("prompt", prompt, row_pictures(row), folder_of(row))
        given = [Turn("assistant", (_text(key, answer),))] if isinstance(answer, str) else turns(key, answer)
        if [(turn.role, turn.text, turn.more) for turn in given[: len(asked)]] == [(turn.role, turn.text, turn.more) for turn in asked]:
            raise BadRow(f"expected `{key}` to go on where `prompt` ends, found that it begins with the prompt's turns: leave `prompt` out")
        return self._split(row, "prompt", key, asked + given)

    def _plain(self, row: Row, prompt: str, answer: str) -> Seen:
        prompt, pictures = _text("prompt", prompt), tuple(row_pictures(row))
        if pictures and self.vision is not None and self.vision.prompt.placeholder not in prompt:
            prompt = prompt.replace(PLACEHOLDER, self.vision.prompt.placeholder)
        return Seen(Text(prompt, answer), pictures)

    def _conversation(self, row: Row, key: str, value: Any) -> Seen:
        return self._split(row, key, key, turns(key, value, row_pictures(row), folder_of(row)))

    def _split(self, row: Row, prompt_key: str, key: str, given: list[Turn]) -> Seen:
        *asked, last = given
        if last.role != "assistant":
            raise BadRow(f"expected the last turn of `{key}` to be the assistant's, found role {last.role!r}")
        if not asked:
            raise BadRow(f"expected a turn before the assistant's in `{key}`, found none")
        if last.pictures:
            raise BadRow(f"expected the last turn of `{key}` to be text, found a picture: responses have none")
        _check_last(prompt_key, asked)
        prompt, response = self.template.answered(key, asked, last, self.template.settings(row))
        return Seen(Text(prompt, response, turn=True, asked=_asked(asked)), _pictures(asked))


def _check_last(key: str, asked: Sequence[Turn]) -> None:
    if asked[-1].role == "assistant":
        raise BadRow(f"expected the turns of `{key}` before the response to end with another role than the assistant's")


def _asked(given: Sequence[Turn]) -> str:
    return json.dumps([[turn.role, turn.text, *([turn.more] if turn.more else [])] for turn in given], sort_keys=True, default=str)


def _require(row: Row, key: str) -> Any:
    if row.values.get(key) is None:
        raise BadRow(f"expected the key `{key}`, found {'null there' if key in row.values else _keys(row)}")
    return row.values[key]


def _keys(row: Row) -> str:
    return ", ".join(f"`{key}`" for key in row.values) or "no keys"


def _pictures(given: list[Turn]) -> Pictures:
    return tuple(picture for turn in given for picture in turn.pictures)
