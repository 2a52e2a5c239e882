"""How pictures are written in a prompt, as plain data; exactly as transformers' processors write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Tiles = tuple[int, int]
"""Rows and columns that a picture was cut into (the whole picture comes after them); (0, 0) is the whole picture alone."""


@dataclass(frozen=True)
class ImagePrompt:
    """A family's way to write a picture. The fields without a default are LLaVA's."""

    placeholder: str
    """What a text or a chat template has where a picture stands."""
    token: str
    """What stands for one feature; its id is `config.vision.image_token`."""
    tokens: int
    """Of these for each picture, and for each tile."""
    before: str = ""
    after: str = ""
    tile_before: str | None = None
    """Before a tile's tokens, with `{row}` and `{column}` from 1 on; None: no tiles (Idefics 3 has them)."""
    begin_after_pictures: bool = False
    """The text's begin token and a line break at its end are written here, so tokenize without special tokens (PaliGemma)."""

    def expand(self, tiles: Tiles = (0, 0)) -> str:
        """What the placeholder of one picture becomes."""
        rows, columns = tiles
        whole = self.before + self.token * self.tokens + self.after
        if (rows, columns) == (0, 0):
            return whole
        if self.tile_before is None:
            raise ValueError(f"a picture in {rows} x {columns} tiles, but this family takes whole pictures only")
        cut = "".join(
            "".join(self.tile_before.format(row=row + 1, column=column + 1) + self.token * self.tokens for column in range(columns)) + "\n"
            for row in range(rows)
        )
        return cut + "\n" + whole

    def write(self, prompt: str, pictures: Sequence[Tiles], begin_token: str = "") -> str:
        """The prompt with each placeholder expanded; a prompt without any gets all pictures at its start.

        Args:
            pictures: tiles of each picture, in the order of the placeholders.
            begin_token: the tokenizer's, used where `begin_after_pictures` is set.

        Raises:
            ValueError: the prompt has placeholders, but not as many as there are pictures.
        """
        parts = prompt.split(self.placeholder)
        if len(parts) == 1:
            parts = ["" for _ in pictures] + [prompt]
        if len(parts) - 1 != len(pictures):
            raise ValueError(f"expected {self.placeholder} {len(pictures)} times, once for each picture; found it {len(parts) - 1} times")
        if self.begin_after_pictures:
            parts[-1] = begin_token + parts[-1] + "\n"
        return parts[0] + "".join(self.expand(tiles) + part for tiles, part in zip(pictures, parts[1:], strict=True))
