"""Pictures of a batch's rows as the decoder takes them. A frozen tower sees each picture once: its features are kept, up to a bound.

Letters: B rows, M pictures (or tiles) a row, N pictures at once, H and W sides in pixels, F tokens a picture, E size of a feature.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from pe_rlhf_jax.data import PixelReader, fill
from pe_rlhf_jax.data.rows import padded
from pe_rlhf_jax.hosts import fetch
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import TOWER
from pe_rlhf_jax.models.vlm import adapts_tower
from pe_rlhf_jax.sharding import place_rows, row_multiple
from pe_rlhf_jax.types import Images, PromptBatch, PyTree

AT_ONCE = 4
"""Pictures that a device encodes at once. Always as many, so that a picture's features do not depend on which others are encoded."""


class ImageEncoder:
    """Features of pictures, on the host, by the frozen tower; pixels where adapters change the tower.

    Args:
        backbone: parameters, of which the tower is used.
        cached_bytes: of features that are kept, those last used; a picture that is not kept is encoded once a batch.
    """

    def __init__(self, decoder: Decoder, backbone: PyTree, mesh: jax.sharding.Mesh, read: PixelReader, cached_bytes: int):
        self.decoder, self.mesh, self.read, self.cached_bytes = decoder, mesh, read, cached_bytes
        self.tower = {TOWER: backbone[TOWER]}
        self.adapted = adapts_tower(decoder.lora)
        self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._size = 0

    def add(self, batch: PyTree, examples: Sequence[Any]) -> PyTree:
        """A host batch with its examples' pictures, and with the places of its prompts; the first example stands for missing ones."""
        rows = fill(examples, len(batch.tokens))
        images = self(rows)
        if isinstance(batch, PromptBatch):
            return batch.replace(images=images)
        lengths = np.array([row.prompt_length for row in rows]).reshape(-1, *(1,) * (batch.tokens.ndim - 1))
        prompt_mask = np.broadcast_to(np.arange(batch.tokens.shape[-1]) < lengths, batch.tokens.shape)
        return batch.replace(prompt_mask=prompt_mask, images=images)

    def __call__(self, examples: Sequence[Any]) -> Images | None:
        """Pictures of the examples' rows, as NumPy arrays; None where there is none.

        M is the most pictures of a row; beyond 16 rounded up by an eighth at most, so that few programs are compiled.

        Raises:
            DataError: a picture cannot be decoded.
        """
        if self.adapted:
            rows = [self.read.tiles(example) for example in examples]
        else:
            features = self._features(examples)
            rows = [[tile for picture in example.pictures for tile in features[picture.key]] for example in examples]
        most = max(map(len, rows), default=0)
        if not most:
            return None
        first = next(row[0] for row in rows if row)
        images: Any = np.zeros((len(rows), padded(most, 1), *first.shape), first.dtype)
        for row, tiles in enumerate(rows):
            for at, tile in enumerate(tiles):
                images[row, at] = tile
        return Images(pixels=images) if self.adapted else Images(features=images)

    def _features(self, examples: Sequence[Any]) -> dict[str, np.ndarray]:
        """Features [tiles, F, E] of the examples' pictures by their keys: those that are kept, and the others encoded."""
        found: dict[str, np.ndarray] = {}
        missing: dict[str, tuple[Any, Any]] = {}
        for example in examples:
            for picture in example.pictures:
                if picture.key in self._kept:
                    self._kept.move_to_end(picture.key)
                    found[picture.key] = self._kept[picture.key]
                elif picture.key not in missing:
                    missing[picture.key] = example, picture
        tiles: dict[str, int] = {}

        def read() -> Iterator[np.ndarray]:
            for key, (example, picture) in missing.items():
                values = self.read.tiles(example, picture)
                tiles[key] = len(values)
                yield from values

        encoded = self._encode(read())
        at = 0
        for key, count in tiles.items():
            # A copy, so that what is kept does not hold all that was encoded with it.
            found[key] = encoded[at : at + count].copy()
            at += count
            self._kept[key] = found[key]
            self._size += found[key].nbytes
        while self._size > self.cached_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._size -= oldest.nbytes
        return found

    def _encode(self, tiles: Iterator[np.ndarray]) -> np.ndarray:
        """Features of all of them; pixels of so many as are encoded at once, and of those that are read meanwhile, are in memory."""
        size = AT_ONCE * row_multiple(self.mesh)
        parts: list[np.ndarray] = []
        under_way: Any = None
        count = 0
        while some := list(itertools.islice(tiles, size)):
            count += len(some)
            pixels = np.zeros((size, *some[0].shape), np.float32)
            pixels[: len(some)] = some
            before, under_way = under_way, _encode(self.decoder, self.tower, place_rows(pixels, self.mesh))
            if before is not None:
                parts.append(fetch(before))
        return np.concatenate([*parts, fetch(under_way)])[:count] if under_way is not None else np.zeros((0,))


@jax.jit(static_argnums=0)
def _encode(decoder: Decoder, tower: PyTree, pixels: Float[Array, "N H W 3"]) -> Float[Array, "N F E"]:
    return decoder.encode_images({"params": tower}, pixels)
