"""From RGB pixels to what a vision tower takes, by the plain data of a `preprocessor_config.json`.

Every step is computed as transformers' PIL image processors compute it (their `image_transforms`, version 5): resizing is Pillow's, on
8-bit values; rescaling is in float64 and rounded to float32; normalising is in float32. Pixel values stay [H, W, 3].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float

from pe_rlhf_jax.data.images import Pixels

Size = tuple[int, int]
"""Height and width."""
Values = Float[np.ndarray, "H W 3"]

BILINEAR, BICUBIC, LANCZOS = (int(PIL.Image.Resampling[name]) for name in ("BILINEAR", "BICUBIC", "LANCZOS"))

_CROPPING = ("CLIPImageProcessor", "BitImageProcessor", "LlavaImageProcessor")
"""Image processors that cut out the centre where their file does not say."""
_LARGEST_EDGE = 4096  # Idefics 3's bound, whatever its `longest_edge`


class ProcessingError(ValueError):
    """A preprocessing that is not supported; the message says which key."""


@dataclass(frozen=True)
class ImageProcessing:
    """How pictures become pixel values. The steps come in the order of the fields; None or False leaves one out."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_to_square: bool = False
    """Centre the picture on a square of the mean colour first (LLaVA)."""
    longest_edge: int | None = None
    """Scale so that the longer edge has this length, the other an even one (Idefics 3)."""
    shortest_edge: int | None = None
    """Scale so that the shorter edge has this length."""
    size: Size | None = None
    """Resize to this size whatever the shape; after `longest_edge`, to one square tile."""
    tile: int | None = None
    """Cut into square tiles of this edge, and add the whole picture as one more (Idefics 3)."""
    resample: int = BICUBIC
    """Pillow's number of the filter: 1 Lanczos, 2 bilinear, 3 bicubic."""
    crop: Size | None = None
    """Cut out the centre; what is missing is black before normalisation."""
    rescale_factor: float = 1 / 255
    normalize: bool = True

    def __call__(self, pixels: Pixels) -> Values:
        """Pixel values of one picture that is not cut into tiles, float32."""
        if self.tile is not None:
            raise ValueError("this preprocessing makes several tiles of a picture; call `tiles`")
        return self._finish(self._fit(pixels))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tiles of a picture with this size in pixels; (0, 0) where it stays whole."""
        if self.tile is None:
            return 0, 0
        rows, columns = (side // self.tile for side in self._tiled((height, width), self.tile))
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def tiles(self, pixels: Pixels) -> tuple[list[Values], int, int]:
        """Tiles row by row and the whole picture after them, all [tile, tile, 3], with the numbers of rows and columns.

        Both are 0, and the whole picture is all there is, where `tile` is None or the picture is no larger than one tile.
        """
        if self.tile is None:
            return [self(pixels)], 0, 0
        edge = self.tile
        rows, columns = self.grid(*pixels.shape[:2])
        image = _resized(self._fit(pixels), self._tiled(pixels.shape[:2], edge), self.resample)
        if not rows:
            return [self._finish(image)], 0, 0
        cut = [image[r * edge : (r + 1) * edge, c * edge : (c + 1) * edge] for r in range(rows) for c in range(columns)]
        return [self._finish(tile) for tile in [*cut, _resized(image, (edge, edge), self.resample)]], rows, columns

    def _tiled(self, shape: Size, edge: int) -> Size:
        """The size at which a picture is cut: its shape as nearly as whole tiles allow."""
        height, width = shape if self.longest_edge is None else _longest(shape, self.longest_edge)
        if width >= height:
            full = _up(width, edge)
            return _up(int(full / (width / height)), edge), full
        full = _up(height, edge)
        return full, _up(int(full * (width / height)), edge)

    def _fit(self, image: Pixels) -> Pixels:
        if self.pad_to_square:
            image = _square(image, self.mean)
        if self.longest_edge is not None:
            image = _resized(image, _longest(image.shape[:2], self.longest_edge), self.resample)
        if self.shortest_edge is not None:
            image = _resized(image, _shortest(image.shape[:2], self.shortest_edge), self.resample)
        if self.size is not None:
            image = _resized(image, self.size, self.resample)
        return image if self.crop is None else _cropped(image, self.crop)

    def _finish(self, image: Pixels) -> Values:
        values = (image.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if not self.normalize:
            return values
        return (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def from_hf(config: Mapping[str, Any]) -> ImageProcessing:
    """The preprocessing of a `preprocessor_config.json` (SigLIP, CLIP, BiT and so DINOv2, LLaVA, Gemma 3, Idefics 3, SmolVLM).

    Raises:
        ProcessingError: a key that would change pixels is missing or not supported.
    """
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type", ""))
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    idefics = name in ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
    for key in ("do_pan_and_scan", "do_flip_channel_order", "do_reduce_labels"):
        if config.get(key):
            raise ProcessingError(f"preprocessor_config.json: {key} is not supported; set it to false")
    if config.get("do_pad") and not idefics and name != "LlavaImageProcessor":
        raise ProcessingError(f"preprocessor_config.json: do_pad is supported for LlavaImageProcessor, not for {name or 'others'}")
    mean, std = (_three(config, key) for key in ("image_mean", "image_std"))
    rescaled = config.get("do_rescale", True)
    steps: dict[str, Any] = {"pad_to_square": bool(config.get("do_pad")) and not idefics}
    if config.get("do_resize", True):
        steps |= _resizing(config)
    if idefics:
        if "longest_edge" not in steps:
            raise ProcessingError(f"preprocessor_config.json: expected do_resize, and size with longest_edge, found {config.get('size')!r}")
        tile = (config.get("max_image_size") or {}).get("longest_edge")
        if not isinstance(tile, int):
            found = config.get("max_image_size")
            raise ProcessingError(f"preprocessor_config.json: expected max_image_size with longest_edge, found {found!r}")
        steps |= {"tile": tile} if config.get("do_image_splitting", True) else {"size": (tile, tile)}
    if config.get("do_center_crop", name in _CROPPING):
        steps["crop"] = _height_width(config, "crop_size")
    return ImageProcessing(
        mean,
        std,
        resample=int(config.get("resample", BICUBIC)),
        rescale_factor=float(config.get("rescale_factor", 1 / 255)) if rescaled else 1.0,
        normalize=bool(config.get("do_normalize", True)),
        **steps,
    )


def _resizing(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config.get("size")
    if isinstance(size, int):
        return {"shortest_edge": size}  # CLIP's first files
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if given.keys() == {"height", "width"}:
            return {"size": (int(given["height"]), int(given["width"]))}
        if given.keys() in ({"shortest_edge"}, {"longest_edge"}):
            return {key: int(value) for key, value in given.items()}
    raise ProcessingError(
        f"preprocessor_config.json: expected size with height and width, with shortest_edge or with longest_edge, found {size!r}"
    )


def _height_width(config: Mapping[str, Any], key: str) -> Size:
    size = config.get(key)
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    raise ProcessingError(f"preprocessor_config.json: expected {key} with height and width, found {size!r}")


def _three(config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = config.get(key)
    values = [values] * 3 if isinstance(values, (int, float)) else values
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ProcessingError(f"preprocessor_config.json: expected {key} with three numbers, found {values!r}")
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _resized(image: Pixels, size: Size, resample: int) -> Pixels:
    height, width = size
    return np.array(PIL.Image.fromarray(image).resize((width, height), resample=resample))


def _shortest(shape: Size, edge: int) -> Size:
    height, width = shape
    longer = int(edge * max(shape) / min(shape))
    return (longer, edge) if width <= height else (edge, longer)


def _longest(shape: Size, edge: int) -> Size:
    """Idefics 3: the longer edge to `edge` and the other to an even number, then both under a bound."""
    height, width = shape
    ratio = width / height
    if width >= height:
        width, height = edge, int(edge / ratio)
        height += height % 2
    else:
        height, width = edge, int(edge * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    ratio = width / height
    if width >= height and width > _LARGEST_EDGE:
        width, height = _LARGEST_EDGE, int(_LARGEST_EDGE / ratio)
    elif height > width and height > _LARGEST_EDGE:
        height, width = _LARGEST_EDGE, int(_LARGEST_EDGE * ratio)
    return max(height, 1), max(width, 1)


def _square(image: Pixels, mean: tuple[float, float, float]) -> Pixels:
    height, width = image.shape[:2]
    edge = max(height, width)
    square = np.empty((edge, edge, 3), np.uint8)
    square[:] = [int(value * 255) for value in mean]
    top, left = (edge - height) // 2, (edge - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _cropped(image: Pixels, size: Size) -> Pixels:
    """The centre; where the picture is too small, it is centred on black, one row or column more above and left of it."""
    missing = [max(0, wanted - found) for wanted, found in zip(size, image.shape[:2], strict=True)]
    if any(missing):
        image = np.pad(image, [(math.ceil(m / 2), m // 2) for m in missing] + [(0, 0)])
    top, left = ((found - wanted) // 2 for wanted, found in zip(size, image.shape[:2], strict=True))
    return image[top : top + size[0], left : left + size[1]]


def _up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple
