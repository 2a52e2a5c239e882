"""Pictures of rows: every form they may come in, every mode and rotation, and what is refused with which words."""

import base64
import errno
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from tiny_images import encoded, pixels

from pe_rlhf_jax.data import images
from pe_rlhf_jax.data.sources import BadRow

SHOWN = pixels()


def decoded(value, folder=None):
    return images.find(value, folder, "images").decode()


def test_every_form_of_a_picture_is_the_same_picture(tmp_path):
    content = encoded(SHOWN)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    forms = {
        "path": "folder/a.png",
        "absolute path": str(tmp_path / "folder" / "a.png"),
        "bytes": content,
        "data URI": f"data:image/png;base64,{text}",
        "Hugging Face's bytes": {"bytes": content, "path": None},
        "Hugging Face's path": {"bytes": None, "path": "folder/a.png"},
        "bytes in JSON": {"bytes": text, "path": "a.png"},
        "array": SHOWN,
        "lists": SHOWN.tolist(),
        "PIL": PIL.Image.fromarray(SHOWN),
    }
    for name, value in forms.items():
        picture = images.find(value, tmp_path, "images")
        assert (picture.height, picture.width) == (6, 9), name
        np.testing.assert_array_equal(picture.decode(), SHOWN, err_msg=name)


def test_keys_tell_pictures_apart_and_only_those(tmp_path):
    content, other = encoded(SHOWN), encoded(SHOWN[::-1])
    for name, data in (("a.png", content), ("b.png", other)):
        (tmp_path / name).write_bytes(data)
    same = [images.find(value, tmp_path, "images").key for value in (content, {"bytes": content}, bytearray(content))]
    assert len(set(same)) == 1
    values = [content, other, "a.png", "b.png", SHOWN, SHOWN[::-1], SHOWN.reshape(9, 6, 3), PIL.Image.fromarray(SHOWN)]
    assert len({images.find(value, tmp_path, "images").key for value in values}) == len(values)
    before = images.find("a.png", tmp_path, "images").key
    (tmp_path / "a.png").write_bytes(encoded(pixels(60, 90)))
    assert images.find("a.png", tmp_path, "images").key != before


GRAY = SHOWN[:, :, 0]
ALPHA = np.linspace(0, 255, GRAY.size).astype(np.uint8).reshape(GRAY.shape)


@pytest.mark.parametrize(("shape", "expected"), [((40, 30), (40, 30)), ((30, 1000), (8, 256)), ((600, 300), (256, 128))])
def test_a_thumbnail_is_a_small_picture_in_a_data_uri(shape, expected):
    picture = images.find(np.full((*shape, 3), (200, 30, 60), np.uint8), None, "images")
    back = images.find(picture.thumbnail(), None, "images").decode()
    assert back.shape == (*expected, 3)
    np.testing.assert_allclose(back, np.broadcast_to((200, 30, 60), back.shape), atol=6)


def test_modes_become_rgb():
    gray = np.repeat(GRAY[:, :, None], 3, axis=2)
    sixteen = GRAY.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(decoded(encoded(GRAY)), gray)
    np.testing.assert_array_equal(decoded(encoded(PIL.Image.fromarray(sixteen))), gray)
    np.testing.assert_array_equal(decoded(encoded(PIL.Image.fromarray(sixteen), "TIFF")), gray)
    np.testing.assert_array_equal(decoded(encoded(GRAY > 100)), np.where(gray > 100, 255, 0))
    np.testing.assert_array_equal(decoded(GRAY), gray)
    np.testing.assert_array_equal(decoded(GRAY[:, :, None]), gray)
    palette = PIL.Image.fromarray(SHOWN).quantize(16)
    np.testing.assert_array_equal(decoded(encoded(palette)), np.asarray(palette.convert("RGB")))
    cmyk = PIL.Image.fromarray(SHOWN).convert("CMYK")
    found = decoded(encoded(cmyk, "JPEG", quality=95)).astype(int)
    assert np.abs(found - SHOWN).mean() < 12, "inverted, or not converted"


@pytest.mark.parametrize("form", ["file", "array"])
def test_transparency_is_laid_on_white(form):
    rgba = np.concatenate([SHOWN, ALPHA[:, :, None]], axis=2)
    found = decoded(encoded(rgba) if form == "file" else rgba)
    share = ALPHA[:, :, None] / 255
    assert np.abs(found - (share * SHOWN + (1 - share) * 255)).max() <= 1
    assert (found[0, 0] == 255).all() and (found[-1, -1] == SHOWN[-1, -1]).all()


def test_a_transparent_palette_is_laid_on_white():
    image = PIL.Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    for transparency in (1, bytes([255, 0])):
        found = decoded(encoded(image, transparency=transparency))
        np.testing.assert_array_equal(found, [[[10, 20, 30], [255] * 3], [[255] * 3, [10, 20, 30]]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    stored = {  # what a camera writes of an upright picture, by the EXIF standard
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](SHOWN)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture = images.find(encoded(np.ascontiguousarray(stored), exif=exif), None, "images")
    assert (picture.height, picture.width) == (6, 9)
    np.testing.assert_array_equal(picture.decode(), SHOWN)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_matter():
    content = encoded(SHOWN, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decoded(content).shape == SHOWN.shape


def test_of_an_animation_the_first_frame():
    frames = [PIL.Image.fromarray(pixels(seed=seed)).quantize(200) for seed in (1, 2)]
    found = decoded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    np.testing.assert_array_equal(found, np.asarray(frames[0].convert("RGB")))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file that claims a size, without the pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


REFUSED = {
    "address": ("https://example.org/a.png", r"found the address 'https://example.org/a.png'. Nothing is fetched .*name its path"),
    "another address": ("s3://bucket/a.png", "Nothing is fetched"),
    "address in a dict": ({"path": "http://example.org/a.png", "bytes": None}, "Nothing is fetched"),
    "missing": ("gone.png", r"found no file .*gone.png \(No such file or directory\); paths are relative to"),
    "folder": (".", "is a folder"),
    "empty": ("empty.png", "found the empty file .*empty.png"),
    "not an image": ("text.png", r"expected an image file in .*text.png \(PNG, JPEG, .*begins with b'Hello, t'"),
    "no bytes": (b"", "found no bytes"),
    "other bytes": (b"<svg xmlns='...'/>", "expected an image file in `images` .* begins with b'<svg xml'"),
    "cut off in the header": (encoded(SHOWN)[:20], "expected an image file in `images`, found a damaged header"),
    "bomb": (png_of_size(30_000, 4000), r"at most 89,478,485 pixels in `images`, found .*(30000 x 4000|exceeds limit)"),
    "large bomb": (png_of_size(60_000, 60_000), "at most 89,478,485 pixels in `images`, found a larger one"),
    "bad data URI": ("data:image/png,abc", "expected a data URI in `images` as data:image/png;base64"),
    "bad base64": ("data:image/png;base64,a!b", "expected a picture in base64"),
    "nothing": (None, "expected a picture in `images` .*found None"),
    "number": (3, "found 3"),
    "empty dict": ({}, "with `bytes` or `path`, found {}"),
    "no path": ("", "expected the path of a picture"),
    "shape": (np.zeros((2, 3, 5), np.uint8), r"found shape \[2, 3, 5\]"),
    "fractions": (np.full((2, 3), 0.5), "whole numbers from 0 to 255 .*found float64 from 0.5 to 0.5"),
    "negative": ([[0, -1]], "found int64 from -1 to 0"),
    "ragged": ([[0, 1], [2]], "lists of different lengths"),
    "no range": (encoded(PIL.Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "found floating-point pixels"),
    "no range either": (encoded(PIL.Image.fromarray(np.ones((2, 2), np.int32)), "TIFF"), "found 32-bit pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused(name, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("Hello, this is text.")
    value, message = REFUSED[name]
    with pytest.raises(BadRow, match=message):
        images.find(value, tmp_path, "images")


def test_a_warning_about_bombs_that_is_an_error_is_refused_as_well():
    with pytest.raises(BadRow, match="found a larger one"):
        images.find(png_of_size(30_000, 4000), None, "images")


def test_paths_need_a_file_to_be_relative_to():
    with pytest.raises(BadRow, match=r"found the path 'a.png': in a catalog it is relative to nothing"):
        images.find({"path": "a.png"}, None, "image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damage_behind_the_header_is_found_when_the_picture_is_decoded(kind, tmp_path):
    content = encoded(pixels(64, 64), kind)
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    picture = images.find("cut", tmp_path, "images")
    assert (picture.height, picture.width) == (64, 64)
    with pytest.raises(BadRow, match=r"expected a whole picture in .*cut, found damaged or truncated data \(.*truncated"):
        picture.decode()


@pytest.mark.parametrize("trouble", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_trouble_of_the_system_is_not_taken_for_damage(trouble, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(SHOWN))
    picture = images.find("a.png", tmp_path, "images")

    def refuse(*_, **__):
        raise trouble

    monkeypatch.setattr(images.PIL.Image, "open", refuse)
    with pytest.raises(type(trouble)):
        picture.decode()


def test_files_that_change_or_go_are_noticed(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(SHOWN))
    picture = images.find("a.png", tmp_path, "images")
    (tmp_path / "a.png").write_bytes(encoded(pixels(4, 4)))
    with pytest.raises(BadRow, match="to have 9 x 6 pixels as when it was first read, found 4 x 4"):
        picture.decode()
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadRow, match="was removed since the rows were read"):
        picture.decode()
