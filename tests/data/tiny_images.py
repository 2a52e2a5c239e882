"""Small pictures in which every pixel, side and corner is told apart, and image files with what goes wrong in them."""

import io

import numpy as np
import PIL.Image


def pixels(height: int = 6, width: int = 9, seed: int = 0) -> np.ndarray:
    """Smooth in most places, as photographs are, with noise: uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    rows, columns = np.mgrid[:height, :width]
    return (np.stack([200 * rows // height, 200 * columns // width, 100 + 0 * rows], -1) + noise).astype(np.uint8)


def encoded(image: np.ndarray | PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
