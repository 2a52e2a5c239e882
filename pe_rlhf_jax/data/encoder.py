"""From texts to examples: tokens of a row, with its pictures written out, within the length limits."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data.formats import LabelExample, PreferenceExample, PromptExample, SFTExample, Text, TextRow, Tokens
from pe_rlhf_jax.data.sources import DataError, Skipped
from pe_rlhf_jax.data.turns import Template, Vision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Sides = tuple[Tokens, Tokens]
"""Tokens of a prompt and of a response."""
AT_ONCE = 1000
"""Rows that are tokenized together: until they are arrays, their tokens take some thirty times the memory."""


class Encoder:
    """Makes tokens of `TextRow`s and applies the length limits. `end_tokens` end responses besides the tokenizer's own."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        skipped: Skipped,
        vision: Vision | None = None,
        end_tokens: Collection[int] = (),
    ):
        if tokenizer.eos_token_id is None:
            raise DataError("the model's tokenizer has no end token, so responses cannot be ended")
        self.config = config
        self.tokenizer = tokenizer
        self.skipped = skipped
        self.vision = vision
        # Models that were trained with a start token need it; a chat template writes its own.
        start = tokenizer.bos_token_id
        self.start = [start] if start is not None and tokenizer("x")["input_ids"][:1] == [start] else []
        end = Template(tokenizer, vision).end_of_turn(end_tokens)
        self.end_of_turn = tokenizer.eos_token_id if end is None else end
        # Such tokenizers begin every text with a space: with its own, a response that follows its prompt would have two.
        self.adds_space = bool(re.match("[\u2581\u0120]", "".join(tokenizer.tokenize("x"))))

    @property
    def _begins_after_pictures(self) -> bool:
        return self.vision is not None and self.vision.prompt.begin_after_pictures

    def sft(self, rows: Sequence[TextRow]) -> list[SFTExample]:
        return [SFTExample(prompt, response, row.pictures, row.place) for row, [(prompt, response)] in self._encode(rows)]

    def preference(self, rows: Sequence[TextRow]) -> list[PreferenceExample]:
        return [
            PreferenceExample(
                np.concatenate(chosen), np.concatenate(rejected), row.margin, row.pictures, len(chosen[0]), row.place, row.together
            )
            for row, [chosen, rejected] in self._encode(rows)
        ]

    def label(self, rows: Sequence[TextRow]) -> list[LabelExample]:
        return [
            LabelExample(np.concatenate(sides), row.label, row.together, row.pictures, len(sides[0]), row.place)
            for row, [sides] in self._encode(rows)
        ]

    def prompts(self, rows: Sequence[TextRow]) -> list[PromptExample]:
        return [
            PromptExample(tokens, row.texts[0].prompt, row.columns, row.pictures, row.place, row.together)
            for row, [(tokens, _)] in self._encode(rows)
        ]

    def fits(self, rows: Sequence[TextRow]) -> list[bool]:
        """Which rows keep the length limits. `skipped` is told of the others, which may raise DataError."""
        return [self._fits(row, sides) for row, sides, _ in self._sides(rows)]

    def _encode(self, rows: Sequence[TextRow]) -> Iterator[tuple[TextRow, list[Sides]]]:
        for row, sides, shortened in self._sides(rows):
            if self._fits(row, sides):
                if shortened:
                    self.skipped.cut(row.place)
                yield row, sides

    def _cut(self, row: TextRow, prompt: np.ndarray) -> np.ndarray:
        """The end of a prompt, which is what a response answers, behind the start token if the model has one.

        Prompts with pictures stay whole: their start is where the pictures are.
        """
        limit = self.config.max_prompt_length
        if self.config.too_long != "truncate" or len(prompt) <= limit or row.pictures:
            return prompt
        start = self.start[:limit]
        return np.concatenate([np.asarray(start, np.int32), prompt[len(prompt) - (limit - len(start)) :]])

    def _sides(self, rows: Sequence[TextRow]) -> Iterator[tuple[TextRow, list[Sides], bool]]:
        """Each row, its tokens, and whether one of its prompts was cut."""
        for at in range(0, len(rows), AT_ONCE):
            part = rows[at : at + AT_ONCE]
            tokens = iter(self._tokens([self._written(row, text) for row in part for text in row.texts]))
            for row in part:
                whole = [next(tokens) for _ in row.texts]
                sides = [(self._cut(row, prompt), response) for prompt, response in whole]
                yield row, sides, any(len(side[0]) < len(before[0]) for side, before in zip(sides, whole, strict=True))

    def _fits(self, row: TextRow, sides: list[Sides]) -> bool:
        for text, tokens in zip(row.texts, sides, strict=True):
            limits = [
                ("max_prompt_length", self.config.max_prompt_length),
                ("max_response_length", self.config.max_response_length),
            ]
            if not text.prompt:  # a whole text: nobody knows where its prompt ends
                limits[1] = ("max_prompt_length + data.max_response_length", limits[0][1] + limits[1][1])
            for (name, limit), side in zip(limits, tokens, strict=True):
                if len(side) > limit:
                    self.skipped.long(row.place, name, limit, len(side))
                    return False
        return True

    def _written(self, row: TextRow, text: Text) -> Text:
        if self.vision is None or not text.prompt:
            return text
        return text._replace(prompt=self.vision.write(text.prompt, row.pictures, self.tokenizer.bos_token or ""))

    def _tokens(self, texts: Sequence[Text]) -> list[Sides]:
        prompts, responses = self._ids([t.prompt for t in texts]), self._behind(texts)
        pairs = []
        for text, prompt, response in zip(texts, prompts, responses, strict=True):
            first = prompt if text.prompt else response
            if self.start and first[:1] != self.start and not (text.prompt and self._begins_after_pictures):
                first[:0] = self.start
            end = self.end_of_turn if text.turn else self.tokenizer.eos_token_id
            if text.response and response[-1:] != [end]:
                response.append(end)
            pairs.append((np.asarray(prompt, np.int32), np.asarray(response, np.int32)))
        return pairs

    def _behind(self, texts: Sequence[Text]) -> list[list[int]]:
        """Tokens of responses as they are written behind their prompts."""
        if not self.adds_space:
            return self._ids([text.response for text in texts])
        # A response without a space would get the tokenizer's; behind a line break it does not.
        [line] = self._ids(["\n"])
        breaks = [bool(text.prompt) and not text.response.startswith(" ") for text in texts]
        written = [text.response.removeprefix(" ") if text.prompt else text.response for text in texts]
        found = self._ids(["\n" * behind + text for behind, text in zip(breaks, written, strict=True)])
        for i, text in enumerate(texts):
            if breaks[i]:
                found[i] = found[i][len(line) :] if found[i][: len(line)] == line else self._ids([text.response])[0]
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
