"""Turns of a conversation: text, the pictures among it, and the model's chat template.

The content of a turn is a text, or a list of parts: `{"type": "text", "text"}` and `{"type": "image"}`. A part without a picture of its
own (`image`, `path` or `bytes`; `image_url` with a data URI) stands for the next one of the row's `images`. Where no part says where the
row's pictures belong, they begin the first user turn. What else a turn has (`tool_calls`, `reasoning_content`, `name`), and the row's
`tools` and `chat_template_kwargs`, are given to the template. These are TRL's conventions.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from pe_rlhf_jax.data import catalogs, images
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.images import Picture
from pe_rlhf_jax.data.sources import BadRow, DataError, Row
from pe_rlhf_jax.image_prompt import ImagePrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TODAY = date(2024, 7, 26)
"""What templates are told that ask for the date (`strftime_now`): Llama 3's own default. With today's, the same rows would be other data
tomorrow, divided otherwise into training and held-out ones.
"""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn under which templates look for what was thought before it was said."""
PLACEHOLDER = "<image>"
"""Stands for a picture in a plain text, whatever the model's own placeholder is."""


@dataclass(frozen=True)
class Vision:
    """What a model that sees asks of its data: how pictures are written in a prompt, and how their pixels are prepared."""

    prompt: ImagePrompt
    processing: ImageProcessing

    def write(self, prompt: str, pictures: Sequence[Picture], begin_token: str = "") -> str:
        """The prompt with every picture written out. Raises BadRow where its placeholders are not as many as the pictures."""
        tiles = [self.processing.grid(picture.height, picture.width) for picture in pictures]
        if self.prompt.token != self.prompt.placeholder and self.prompt.token in prompt:
            raise BadRow(f"expected a text without {self.prompt.token}, which is written for pictures only")
        try:
            return self.prompt.write(prompt, tiles, begin_token)
        except ValueError as error:
            raise BadRow(str(error)) from error


@dataclass(frozen=True)
class Turn:
    """One turn; its parts are texts and pictures, in order."""

    role: str
    parts: tuple[str | Picture, ...]
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else it has for the template, such as `tool_calls`."""

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


def folder_of(row: Row) -> Path | None:
    """What the row's paths are relative to: the folder of its file; None in a catalog."""
    return None if catalogs.is_catalog(row.place) else Path(row.file).parent


def has_pictures(row: Row) -> bool:
    """Whether the row has anything under `images` or `image`."""
    values = (row.values.get(key) for key in images.KEYS)
    return any(value is not None and not (isinstance(value, (list, tuple)) and not value) for value in values)


def row_pictures(row: Row) -> list[Picture]:
    """The pictures of the row's key `images` (several, or one) or `image`."""
    given = [(key, row.values[key]) for key in images.KEYS if row.values.get(key) is not None]
    if len(given) > 1:
        raise BadRow("expected `images` or `image`, found both")
    return [
        images.find(value, folder_of(row), key if len(values) == 1 else f"{key}[{number}]")
        for key, several in given
        for values in [_several(key, several)]
        for number, value in enumerate(values)
    ]


def turns(key: str, value: Any, pictures: Sequence[Picture] = (), folder: Path | None = None) -> list[Turn]:
    """The turns under a key, with the row's pictures in their places.

    Raises:
        BadRow: a turn or part has another form, or there are not as many places as pictures.
    """
    if not isinstance(value, list):
        raise BadRow(f"expected `{key}` to be text or a list of turns, found {images.shown(value)}")
    if not value:
        raise BadRow(f"expected at least one turn in `{key}`, found none")
    left = iter(pictures)
    read, places = [], 0
    for number, turn in enumerate(value, start=1):
        where = f"turn {number} of {key}"
        calls = isinstance(turn, dict) and bool(turn.get("tool_calls"))
        if not isinstance(turn, dict) or "role" not in turn or ("content" not in turn and not calls):
            raise BadRow(f"expected {where} to be an object with `role` and `content`, found {images.shown(turn)}")
        role, content = text(f"role of {where}", turn["role"]), turn.get("content")
        silent = content == "" if role == "system" else calls and not content  # as tables have it where there is no system prompt
        parts, found = ((), 0) if silent else _parts(where, content, left, folder)
        more = {name: value for name, value in turn.items() if name not in ("role", "content") and value not in (None, "", [], {})}
        read.append(Turn(role, parts, more))
        places += found
    if places == 0 and pictures:
        return _first(key, read, tuple(pictures))
    if places != len(pictures):
        raise BadRow(f'expected as many pictures in the row as {{"type": "image"}} in `{key}`, found {len(pictures)} and {places}')
    return read


def text(key: str, value: Any) -> str:
    """The value, if it is a text that can be used. Raises BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"expected `{key}` to be text, found {images.shown(value)}")
    if not value.strip():
        raise BadRow(f"expected `{key}` to be text, found only white space" if value else f"expected `{key}` to be text, found none")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"expected `{key}` to be valid Unicode, found half of a surrogate pair at character {error.start + 1}") from error
    return value


class Template:
    """A tokenizer's chat template, applied to turns with pictures as well."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vision: Vision | None):
        self.tokenizer = tokenizer
        self.vision = vision
        self._text = _text_of(tokenizer)
        # Templates of models that see take parts and may drop a plain text without a word; those of others take texts only.
        self._takes_parts = vision is not None and self._text is not None  # as far as is known: what is tried next is given in parts
        self._takes_parts = self._takes_parts and self._shows_parts()

    def settings(self, row: Row) -> dict[str, Any]:
        """What a row itself tells the template: `tools`, a list or its JSON, and what is in `chat_template_kwargs`. Raises BadRow."""
        found: dict[str, Any] = {}
        if more := row.values.get("chat_template_kwargs"):
            taken = inspect.signature(self.tokenizer.apply_chat_template).parameters
            if not isinstance(more, dict) or not more.keys().isdisjoint(taken):
                raise BadRow(
                    f"expected `chat_template_kwargs` to be an object with names of the template's own, found {images.shown(more)}"
                )
            found |= {name: value for name, value in more.items() if value is not None}
        if tools := row.values.get("tools"):
            try:
                given = json.loads(tools) if isinstance(tools, str) else tools
            except ValueError:
                given = None
            if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
                raise BadRow(f"expected `tools` to be a list of objects, or its JSON, found {images.shown(tools)}")
            found |= {"tools": given} if given else {}
        return found

    def prompt(self, key: str, given: Sequence[Turn], settings: Mapping[str, Any]) -> str:
        """The turns as text, ready for a response. Raises BadRow if the template refuses them, DataError if there is none."""
        prompt = self._written(key, given, settings)
        if "tools" in settings and prompt == self._written(key, given, {k: v for k, v in settings.items() if k != "tools"}):
            raise BadRow("expected a model whose chat template shows `tools`, found one that leaves them out")
        return prompt

    def answered(self, key: str, given: Sequence[Turn], answer: Turn, settings: Mapping[str, Any]) -> tuple[str, str]:
        """The prompt, and what the template writes behind it for an assistant's turn, without the turn's end. Raises as `prompt` does.

        Some templates begin a response themselves, as with `<think>`, but show answers without it. An answer that begins so is written
        behind the prompt; for others the prompt ends where the two part, as in TRL.
        """
        prompt, whole = self.prompt(key, given, settings), self._written(key, [*given, answer], settings, respond=False)
        for name in sorted(answer.more):
            less = replace(answer, more={k: v for k, v in answer.more.items() if k != name})
            if name in ("tool_calls", *THOUGHTS) and whole == self._written(key, [*given, less], settings, respond=False):
                raise BadRow(f"expected a model whose chat template shows `{name}` of `{key}`, found one that leaves it out")
        if not whole.startswith(prompt):
            alike = self._alike(prompt, whole)
            begun = prompt[alike:].strip()
            if begun and answer.text.lstrip().startswith(begun):
                return prompt, answer.text.lstrip().removeprefix(begun).lstrip("\n")
            prompt = prompt[:alike]
        response = whole[len(prompt) :]
        end = self._end if response.endswith(self._end) else self._end.rstrip()
        response = response.removesuffix(end) if response.endswith(end) else response.rstrip().removesuffix(end)
        if not response.strip():
            raise BadRow(f"the model's chat template writes nothing of the response of `{key}`")
        return prompt, response

    def end_of_turn(self, end_tokens: Collection[int]) -> int | None:
        """Which of the tokens that end responses the template ends an assistant's turn with; None where there is none."""
        if self._text is None:
            return None
        return next((token for token in self.tokenizer(self._end, add_special_tokens=False)["input_ids"] if token in end_tokens), None)

    @functools.cached_property
    def _end(self) -> str:
        """What the template writes behind an assistant's last turn."""
        said = "I am."
        try:
            shown = self._apply([Turn("user", ("Who?",)), Turn("assistant", (said,))], {}, respond=False)
        except Exception:  # as below
            return ""
        return shown.rpartition(said)[2] if said in shown else ""

    def _alike(self, prompt: str, whole: str) -> int:
        """Characters with which both begin, in whole tokens."""
        one, other = (self.tokenizer(t, add_special_tokens=False, return_offsets_mapping=True) for t in (prompt, whole))
        same = itertools.takewhile(lambda ids: ids[0] == ids[1], zip(one["input_ids"], other["input_ids"], strict=False))
        count = len(list(same))
        return one["offset_mapping"][count - 1][1] if count else 0

    def _written(self, key: str, given: Sequence[Turn], settings: Mapping[str, Any], respond: bool = True) -> str:
        if self._text is None:
            raise DataError("the data has chat turns, but the model's tokenizer has no chat template; give `prompt` as plain text instead")
        try:
            return self._apply(given, settings, respond)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRow(f"the model's chat template refuses the turns of `{key}`: {error}") from error

    def _apply(self, given: Sequence[Turn], settings: Mapping[str, Any], respond: bool = True) -> str:
        messages = [{"role": turn.role, "content": self._content(turn), **turn.more} for turn in given]
        ours: dict[str, Any] = {"chat_template": self._text, "tokenize": False, "add_generation_prompt": respond}
        return str(self.tokenizer.apply_chat_template(messages, **ours, **settings))

    def _content(self, turn: Turn) -> str | list[dict[str, str]]:
        if self._takes_parts:
            return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.parts]
        if self.vision is None or not turn.pictures:
            return turn.text
        lines = [part if isinstance(part, str) else self.vision.prompt.placeholder for part in turn.parts]
        return "\n".join(lines)

    def _shows_parts(self) -> bool:
        probe = "Is this shown?"
        try:
            shown = self._apply([Turn("user", (probe,))], {})
        except Exception:  # whatever a template does to a list where it expects a text
            return False
        return probe in shown and "'type'" not in shown and '"type"' not in shown


def _text_of(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The template, told its date; None where there is none, or several of which none is the default."""
    if not tokenizer.chat_template:
        return None
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError:
        return None
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda found: repr(TODAY.strftime(found[2])), template)


def _several(key: str, value: Any) -> list[Any]:
    """The pictures of a column: a list of them or one; under `image`, lists of numbers are one picture too."""
    if isinstance(value, (list, tuple)):
        return [value] if key == "image" and value and isinstance(value[0], (list, tuple)) else list(value)
    return list(value) if getattr(value, "ndim", 0) == 4 else [value]


def _parts(where: str, content: Any, left: Iterator[Picture], folder: Path | None) -> tuple[tuple[str | Picture, ...], int]:
    """The parts of a turn's content, and how many of the row's pictures they asked for."""
    if not isinstance(content, list):
        return (text(f"content of {where}", content),), 0
    if not content:
        raise BadRow(f"expected text or parts as content of {where}, found none")
    parts: list[str | Picture] = []
    asked = 0
    for number, part in enumerate(content, start=1):
        here = f"part {number} of {where}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append(text(f"text of {here}", part.get("text")))
        elif kind in ("image", "image_url"):
            own = _own(part)
            if own is not None:
                parts.append(images.find(own, folder, here))
                continue
            asked += 1
            parts += [picture for picture in [next(left, None)] if picture is not None]  # too few are counted by the caller
        else:
            raise BadRow(f'expected {here} to be {{"type": "text", "text": ...}} or {{"type": "image"}}, found {images.shown(part)}')
    return tuple(parts), asked


def _own(part: dict[str, Any]) -> Any:
    """The picture that a part holds itself, if it does."""
    address = part.get("image_url")
    if address is not None:
        return address.get("url") if isinstance(address, dict) else address
    if part.get("bytes") is not None:
        return {"bytes": part["bytes"], "path": part.get("path")}
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)


def _first(key: str, read: list[Turn], pictures: tuple[Picture, ...]) -> list[Turn]:
    """The turns, the first user turn beginning with the pictures."""
    if any(turn.pictures for turn in read):
        raise BadRow(f"expected pictures in the parts of `{key}` or in the row's `images`, found both")
    at = next((i for i, turn in enumerate(read) if turn.role == "user"), None)
    if at is None:
        raise BadRow(f"expected a user's turn in `{key}` for the row's pictures to stand in, found none")
    return [*read[:at], Turn("user", pictures + read[at].parts), *read[at + 1 :]]
