"""Pictures of rows: found and checked by their header when rows are read, decoded when batches are made.

A picture may be a path (relative to the folder of the data file), the bytes of an image file, a data URI, Hugging Face's
`{"bytes", "path"}`, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of whole numbers from 0 to 255. Nothing is ever
fetched: a web address is refused. What is decoded is 8-bit RGB, upright by its EXIF orientation, with transparency on white (as
transformers does); of an animation, the first frame.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import struct
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from pe_rlhf_jax.data.sources import BadRow

KEYS = ("images", "image")
"""Keys of a row under which its pictures are."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""File formats that are opened; a short list, because each decoder is code that strangers' bytes run through."""
MAX_PIXELS = 89_478_485
"""Pixels of the largest picture, Pillow's own bound: 24-bit pixels in 256 MiB. A few kilobytes of file can hold more than memory does."""

THUMBNAIL = 256
"""Longest side in pixels of what a report shows."""

Pixels = UInt8[np.ndarray, "H W 3"]

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_ORIENTATION = 0x0112
# Modes in which a pixel is a number without a known range.
_NO_RANGE = ("F", "I")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was found and whose header is good. Equal pictures have equal `key`s."""

    key: str
    """Identity: a hash of the content, or of place, size and time of change of a file. Features of pictures are cached by it."""
    label: str
    """The path as the row has it, or else the key: by it rows are held out, so a moved folder changes nothing."""
    name: str
    """What messages call it: its path, or how it came."""
    height: int
    """In pixels, upright; so is `width`."""
    width: int
    content: Path | bytes | np.ndarray | PIL.Image.Image = field(repr=False)

    def decode(self) -> Pixels:
        """The picture in RGB. Raises BadRow if what follows the header is damaged, or if it changed since it was found."""
        pixels = _array_rgb(self.content) if isinstance(self.content, np.ndarray) else _decoded(self.content, self.name)
        if pixels.shape[:2] != (self.height, self.width):
            raise BadRow(
                f"expected the picture {self.name} to have {self.width} x {self.height} pixels as when it was first read, found "
                f"{pixels.shape[1]} x {pixels.shape[0]}; the file has changed"
            )
        return pixels

    def thumbnail(self) -> str:
        """A data URI of the picture, made smaller where a side is over THUMBNAIL pixels. Raises as `decode` does."""
        small, written = PIL.Image.fromarray(self.decode()), io.BytesIO()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        small.save(written, "WEBP", quality=90)
        return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"


# One object for one picture: many questions about it keep its bytes once, and its header is read once.
_KNOWN: weakref.WeakValueDictionary[str, Picture] = weakref.WeakValueDictionary()


def find(value: Any, folder: Path | None, key: str) -> Picture:
    """The picture that a row's value stands for; reads no more than its header.

    Args:
        folder: paths are relative to it; None where rows come from a catalog, whose rows hold the pictures themselves.
        key: the row's key, for messages.

    Raises:
        BadRow: the value is none of the forms above, or its file is missing, empty, too large or not an image.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, dict):
        value = _of_dict(value, key)
    if isinstance(value, str):
        return _of_text(value, folder, key)
    if isinstance(value, Path):
        return _of_path(str(value), folder, key)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _of_bytes(bytes(value), f"in `{key}`")
    if isinstance(value, PIL.Image.Image):
        return _of_pil(value, f"in `{key}`")
    if isinstance(value, (np.ndarray, list, tuple)):
        return _of_array(value, f"in `{key}`")
    raise BadRow(f"expected a picture in `{key}` (a path, bytes, a data URI, an array or a PIL image), found {shown(value)}")


def _of_dict(value: dict[str, Any], key: str) -> Any:
    """What Hugging Face's and Parquet's `{"bytes", "path"}` holds; JSON has bytes in base64."""
    content, path = value.get("bytes"), value.get("path")
    if isinstance(content, str):
        return _of_base64(content, key)
    if content is not None:
        return content
    if isinstance(path, str) and path:
        return path
    raise BadRow(f"expected a picture in `{key}` with `bytes` or `path`, found {shown(value)}")


def _of_text(text: str, folder: Path | None, key: str) -> Picture:
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise BadRow(f"expected a data URI in `{key}` as data:image/png;base64,..., found {shown(text)}")
        return _of_bytes(_of_base64(body, key), f"in `{key}`")
    if _ADDRESS.match(text):
        raise BadRow(
            f"expected a picture in `{key}`, found the address {shown(text)}. Nothing is fetched while a run reads its data: fetch the "
            "file once, and name its path"
        )
    if not text.strip() or "\0" in text:
        raise BadRow(f"expected the path of a picture in `{key}`, found {shown(text)}")
    return _of_path(text, folder, key)


def _of_base64(text: str, key: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"expected a picture in base64 in `{key}`, found what is not ({error})") from error


def _of_path(text: str, folder: Path | None, key: str) -> Picture:
    path = Path(text).expanduser()
    if folder is None and not path.is_absolute():
        raise BadRow(f"expected the picture itself in `{key}`, found the path {str(path)!r}: in a catalog it is relative to nothing")
    path = path if folder is None else folder / path
    try:
        state = path.stat()
    except OSError as error:
        raise BadRow(f"expected a picture in `{key}`, found no file {path} ({error.strerror}); paths are relative to {folder}") from error
    if not path.is_file():
        raise BadRow(f"expected a picture in `{key}`, found that {path} is {'a folder' if path.is_dir() else 'no plain file'}")
    if not state.st_size:
        raise BadRow(f"expected a picture in `{key}`, found the empty file {path}")
    identity = repr((text, str(path.resolve()), state.st_size, state.st_mtime_ns))
    key = _hash(b"path", identity.encode("utf-8", "surrogatepass"))
    return _KNOWN.get(key) or _new(key, text, str(path), *_header(path, str(path)), path)


def _of_bytes(content: bytes, name: str) -> Picture:
    if not content:
        raise BadRow(f"expected a picture {name}, found no bytes")
    key = _hash(b"file", content)
    return _KNOWN.get(key) or _new(key, key, name, *_header(content, name), content)


def _of_pil(image: PIL.Image.Image, name: str) -> Picture:
    _check_mode(image, name)
    height, width = _upright(image, name)
    try:
        content = image.tobytes()
    except Exception as error:  # as in `_decoded`
        raise BadRow(f"expected a whole picture {name}, found damaged or truncated data ({_said(error)})") from error
    palette = repr((image.mode, image.size, image.getpalette() if image.mode == "P" else None, _orientation(image)))
    key = _hash(b"pil", palette.encode(), content)
    return _KNOWN.get(key) or _new(key, key, name, height, width, image)


def _of_array(value: Any, name: str) -> Picture:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise BadRow(f"expected an array {name}, found lists of different lengths") from error
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise BadRow(f"expected an array [H, W] or [H, W, 1, 3 or 4] {name}, found shape {list(array.shape)}")
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise BadRow(
                f"expected an array of whole numbers from 0 to 255 {name}, found {array.dtype} from {array.min()} to {array.max()}"
            )
        array = array.astype(np.uint8)
    height, width = array.shape[:2]
    _check_size(height, width, name)
    key = _hash(b"array", repr(array.shape).encode(), array.tobytes())
    return _KNOWN.get(key) or _new(key, key, name, height, width, array)


def _new(key: str, label: str, name: str, height: int, width: int, content: Path | bytes | np.ndarray | PIL.Image.Image) -> Picture:
    picture = Picture(key, label, name, height, width, content)
    _KNOWN[key] = picture
    return picture


def _header(content: Path | bytes, name: str) -> tuple[int, int]:
    """Upright height and width, after the checks that need no pixels."""
    try:
        with _open(content) as image:
            _check_mode(image, name)
            return _upright(image, name)
    except BadRow:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise BadRow(f"expected a picture of at most {MAX_PIXELS:,} pixels {_at(name)}, found a larger one ({error})") from error
    except PIL.UnidentifiedImageError as error:
        start = content[:8] if isinstance(content, bytes) else _first_bytes(content)
        raise BadRow(
            f"expected an image file {_at(name)} ({', '.join(FORMATS)}), found another or a damaged one, which begins with {start!r}"
        ) from error
    except Exception as error:  # whatever a decoder raises on a damaged header
        raise BadRow(f"expected an image file {_at(name)}, found a damaged header ({_said(error)})") from error


def _decoded(content: Path | bytes | PIL.Image.Image, name: str) -> Pixels:
    try:
        if isinstance(content, PIL.Image.Image):
            return _rgb(_turned(content))
        with _open(content) as image:
            image.load()
            return _rgb(_turned(image))
    except FileNotFoundError as error:
        raise BadRow(f"expected the picture {name}, found that it was removed since the rows were read") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder raises on damaged data
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, such as too many open files: the picture may be whole
        raise BadRow(f"expected a whole picture {_at(name)}, found damaged or truncated data ({_said(error)})") from error


def _open(content: Path | bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)


def _check_mode(image: PIL.Image.Image, name: str) -> None:
    # Pillow once opened 16-bit PNG files as 32-bit whole numbers; their range is known.
    if image.mode in _NO_RANGE and image.format != "PNG":
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise BadRow(f"expected 8 or 16 bits a channel {_at(name)}, found {kind} pixels, whose range nobody knows; save it with 8 bits")


def _check_size(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise BadRow(f"expected a picture of at most {MAX_PIXELS:,} pixels {_at(name)}, found {width} x {height}; make it smaller")


def _upright(image: PIL.Image.Image, name: str) -> tuple[int, int]:
    width, height = image.size
    _check_size(height, width, name)
    return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF data that cannot be read say nothing about the picture
        return 1


def _turned(image: PIL.Image.Image) -> PIL.Image.Image:
    return image if _orientation(image) == 1 else PIL.ImageOps.exif_transpose(image)


def _rgb(image: PIL.Image.Image) -> Pixels:
    if image.mode in _SIXTEEN_BITS or image.mode in _NO_RANGE:
        # Pillow's own conversion cuts at 255. The high byte is what it takes of 16-bit colours, too.
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _array_rgb(array: np.ndarray) -> Pixels:
    if array.ndim == 2 or array.shape[2] == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return _rgb(PIL.Image.fromarray(array))


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.hexdigest()


def _at(name: str) -> str:
    return name if name.startswith("in ") else f"in {name}"


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
