"""From rows to examples: which keys a row may have, and how its texts become tokens.

Conventions (those of TRL): `prompt` + `completion`, or `messages`, for SFT, and with `label` for judged responses; `prompt` + `chosen` +
`rejected` (+ `margin`); `chosen` + `rejected` alone, each a whole text; `prompt` alone. A text is a plain string, used as it stands, or
a list of turns `{"role", "content"}`, which goes through the tokenizer's chat template. Tokens of prompt and response are made apart and
joined, because that is how a policy meets its own response; a response ends with one end token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Int

from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data.sources import BadRow, DataError, Row, Skipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Kind = Literal["sft", "preference", "label", "prompts"]
"""What rows are for."""
Tokens = Int[np.ndarray, " T"]
Sides = tuple[Tokens, Tokens]
"""Tokens of a prompt and of a response."""


@dataclass(frozen=True)
class SFTExample:
    """A prompt and the response to be learned, which holds its end token."""

    prompt: Tokens
    response: Tokens

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

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class LabelExample:
    """A whole sequence, prompt included, with its end token, and how its response was judged."""

    tokens: Tokens
    label: float
    """1 for a good response, 0 for a bad one."""
    group: str | None = None
    """The row's value of `data.group_by`: labels of one group go together, so intervals are to be taken over groups."""

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
    """The row's other keys, for judges."""


class Text(NamedTuple):
    """A prompt and a response before tokenization; without a prompt, the response is the whole text."""

    prompt: str
    response: str


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

    @property
    def prompts(self) -> set[str]:
        """The prompts, or where there are none the whole texts."""
        return {text.prompt or text.response for text in self.texts}

    @property
    def keys(self) -> set[str]:
        """What must not be both in training and in validation: the group, or else the prompts."""
        return self.prompts if self.group is None else {self.group}


class Reader:
    """Reads rows of one kind into `TextRow`s with a tokenizer's chat template.

    Bad rows go to `skipped`, which raises DataError or counts them. With `group_by`, every row must have that key.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skipped: Skipped, group_by: str | None = None):
        self.tokenizer = tokenizer
        self.skipped = skipped
        self.group_by = group_by

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
            try:
                read.append(replace(parse(row), group=self._group(row)))
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

    def _sft(self, row: Row) -> TextRow:
        if row.values.get("messages") is not None:
            return TextRow(row.place, (self._conversation("messages", row.values["messages"]),))
        return TextRow(row.place, (self._answer(row, "completion"),))

    def _preference(self, row: Row) -> TextRow:
        chosen, rejected = self._answer(row, "chosen", whole=True), self._answer(row, "rejected", whole=True)
        if chosen == rejected:
            raise BadRow("expected `chosen` and `rejected` to differ, found the same text twice")
        margin = 0.0 if row.values.get("margin") is None else row.values["margin"]
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin) or margin < 0:
            raise BadRow(f"expected `margin` to be a number of at least 0, found {_shown(margin)}")
        return TextRow(row.place, (chosen, rejected), float(margin))

    def _label(self, row: Row) -> TextRow:
        label = _require(row, "label")
        if not isinstance(label, (bool, int, float)) or label not in (0, 1):
            raise BadRow(f"expected `label` to be 0 or 1, or false or true, found {_shown(label)}")
        return replace(self._sft(row), label=float(label))

    def _prompt(self, row: Row) -> TextRow:
        prompt = _require(row, "prompt")
        text = _text("prompt", prompt) if isinstance(prompt, str) else self._render("prompt", _turns("prompt", prompt))
        columns = {key: value for key, value in row.values.items() if key != "prompt"}
        return TextRow(row.place, (Text(text, ""),), columns=columns)

    def _answer(self, row: Row, key: str, whole: bool = False) -> Text:
        """The text under `key` with its prompt; with `whole`, a row may leave the prompt out."""
        answer = _require(row, key)
        if whole and row.values.get("prompt") is None:
            return Text("", _text(key, answer)) if isinstance(answer, str) else self._conversation(key, answer)
        prompt = _require(row, "prompt")
        if isinstance(prompt, str):
            if not isinstance(answer, str):
                raise BadRow(f"expected `{key}` to be text because `prompt` is, found {_shown(answer)}")
            return Text(_text("prompt", prompt), _text(key, answer))
        turns = _turns("prompt", prompt)
        answer_turns = [{"role": "assistant", "content": _text(key, answer)}] if isinstance(answer, str) else _turns(key, answer)
        return self._split("prompt", key, turns + answer_turns)

    def _conversation(self, key: str, value: Any) -> Text:
        return self._split(key, key, _turns(key, value))

    def _split(self, prompt_key: str, key: str, turns: list[dict[str, str]]) -> Text:
        *prompt, last = turns
        if last["role"] != "assistant":
            raise BadRow(f"expected the last turn of `{key}` to be the assistant's, found role {last['role']!r}")
        if not prompt:
            raise BadRow(f"expected a turn before the assistant's in `{key}`, found none")
        return Text(self._render(prompt_key, prompt), last["content"])

    def _render(self, key: str, turns: list[dict[str, str]]) -> str:
        if turns[-1]["role"] == "assistant":
            raise BadRow(f"expected the turns of `{key}` before the response to end with another role than the assistant's")
        if not self.tokenizer.chat_template:
            raise DataError("the data has chat turns, but the model's tokenizer has no chat template; give `prompt` as plain text instead")
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise BadRow(f"the model's chat template refuses the turns of `{key}`: {error}") from error


class Encoder:
    """Makes tokens of `TextRow`s and applies the length limits."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerFast, skipped: Skipped):
        if tokenizer.eos_token_id is None:
            raise DataError("the model's tokenizer has no end token, so responses cannot be ended")
        self.config = config
        self.tokenizer = tokenizer
        self.skipped = skipped
        # Models that were trained with a start token need it; a chat template writes its own.
        start = tokenizer.bos_token_id
        self.start = [start] if start is not None and tokenizer("x")["input_ids"][:1] == [start] else []

    def sft(self, rows: Sequence[TextRow]) -> list[SFTExample]:
        return [SFTExample(prompt, response) for _, [(prompt, response)] in self._encode(rows)]

    def preference(self, rows: Sequence[TextRow]) -> list[PreferenceExample]:
        return [
            PreferenceExample(np.concatenate(chosen), np.concatenate(rejected), row.margin)
            for row, [chosen, rejected] in self._encode(rows)
        ]

    def label(self, rows: Sequence[TextRow]) -> list[LabelExample]:
        return [LabelExample(np.concatenate(sides), row.label, row.group) for row, [sides] in self._encode(rows)]

    def prompts(self, rows: Sequence[TextRow]) -> list[PromptExample]:
        return [PromptExample(tokens, row.texts[0].prompt, row.columns) for row, [(tokens, _)] in self._encode(rows)]

    def fits(self, rows: Sequence[TextRow]) -> list[bool]:
        """Which rows keep the length limits. `skipped` is told of the others, which may raise DataError."""
        return [self._fits(row, sides) for row, sides in self._sides(rows)]

    def _encode(self, rows: Sequence[TextRow]) -> Iterator[tuple[TextRow, list[Sides]]]:
        for row, sides in self._sides(rows):
            cut = [(self._cut(prompt), response) for prompt, response in sides]
            if self._fits(row, sides):
                if any(len(after[0]) < len(before[0]) for after, before in zip(cut, sides, strict=True)):
                    self.skipped.cut(row.place)
                yield row, cut

    def _cut(self, prompt: np.ndarray) -> np.ndarray:
        """The end of a prompt, which is what a response answers, behind the start token if the model has one."""
        limit = self.config.max_prompt_length
        if self.config.too_long != "truncate" or len(prompt) <= limit:
            return prompt
        start = self.start[:limit]
        return np.concatenate([np.asarray(start, np.int32), prompt[len(prompt) - (limit - len(start)) :]])

    def _sides(self, rows: Sequence[TextRow]) -> Iterator[tuple[TextRow, list[Sides]]]:
        tokens = iter(self._tokens([text for row in rows for text in row.texts]))
        return ((row, [next(tokens) for _ in row.texts]) for row in rows)

    def _fits(self, row: TextRow, sides: list[Sides]) -> bool:
        for text, tokens in zip(row.texts, sides, strict=True):
            limits = [
                ("max_prompt_length", self.config.max_prompt_length),
                ("max_response_length", self.config.max_response_length),
            ]
            if not text.prompt:  # a whole text: nobody knows where its prompt ends
                limits[1] = ("max_prompt_length + data.max_response_length", limits[0][1] + limits[1][1])
            if self.config.too_long == "truncate":
                tokens = (self._cut(tokens[0]), tokens[1])
            for (name, limit), side in zip(limits, tokens, strict=True):
                if len(side) > limit:
                    self.skipped.long(row.place, name, limit, len(side))
                    return False
        return True

    def _tokens(self, texts: Sequence[Text]) -> list[Sides]:
        prompts, responses = self._ids([t.prompt for t in texts]), self._ids([t.response for t in texts])
        pairs = []
        for text, prompt, response in zip(texts, prompts, responses, strict=True):
            first = prompt if text.prompt else response
            if self.start and first[:1] != self.start:
                first[:0] = self.start
            if text.response and response[-1:] != [self.tokenizer.eos_token_id]:
                response.append(self.tokenizer.eos_token_id)
            pairs.append((np.asarray(prompt, np.int32), np.asarray(response, np.int32)))
        return pairs

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _require(row: Row, key: str) -> Any:
    if row.values.get(key) is None:
        raise BadRow(f"expected the key `{key}`, found {'null there' if key in row.values else _keys(row)}")
    return row.values[key]


def _keys(row: Row) -> str:
    return ", ".join(f"`{key}`" for key in row.values) or "no keys"


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"expected `{key}` to be text, found {_shown(value)}")
    if not value.strip():
        raise BadRow(f"expected `{key}` to be text, found only white space" if value else f"expected `{key}` to be text, found none")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"expected `{key}` to be valid Unicode, found half of a surrogate pair at character {error.start + 1}") from error
    return value


def _turns(key: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise BadRow(f"expected `{key}` to be text or a list of turns, found {_shown(value)}")
    if not value:
        raise BadRow(f"expected at least one turn in `{key}`, found none")
    turns = []
    for number, turn in enumerate(value, start=1):
        where = f"turn {number} of {key}"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise BadRow(f"expected {where} to be an object with `role` and `content`, found {_shown(turn)}")
        turns.append({"role": _text(f"role of {where}", turn["role"]), "content": _text(f"content of {where}", turn["content"])})
    return turns


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
