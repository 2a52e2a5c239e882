"""Pixel values against transformers' PIL image processors, exactly, for every preprocessing that a supported model family has."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tiny_processors
from tiny_images import encoded, pixels

from pe_rlhf_jax.data import images
from pe_rlhf_jax.data.image_processing import from_hf

pytestmark = pytest.mark.parity

SIZES = [(37, 53), (53, 37), (20, 20), (9, 61), (14, 12)]


def processor(config):
    """transformers' image processor of a preprocessor_config.json."""
    transformers = pytest.importorskip("transformers")
    name = config["image_processor_type"]
    return getattr(transformers, name.removesuffix("Fast") + "Pil")(**{k: v for k, v in config.items() if k != "image_processor_type"})


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", tiny_processors.CONFIGS)
def test_pixel_values_are_transformers(name, size):
    config = tiny_processors.CONFIGS[name]
    image = pixels(*size, seed=1)
    expected = processor(config)(PIL.Image.fromarray(image), return_tensors="np")["pixel_values"]
    expected = np.moveaxis(np.asarray(expected).reshape(-1, *np.shape(expected)[-3:]), 1, -1)
    found, _, _ = from_hf(config).tiles(image)
    np.testing.assert_array_equal(np.stack(found), expected)
    assert found[0].dtype == np.float32


@pytest.mark.parametrize("name", [name for name in tiny_processors.CONFIGS if "tiles" in name])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_and_columns_of_tiles_are_transformers(name, size):
    config = tiny_processors.CONFIGS[name]
    image = pixels(*size, seed=2)
    found = processor(config)(PIL.Image.fromarray(image), return_row_col_info=True)
    _, rows, columns = from_hf(config).tiles(image)
    assert [[rows], [columns]] == [list(found["rows"][0]), list(found["cols"][0])]


def test_decoding_is_transformers_for_transparent_and_rotated_files(tmp_path):
    from transformers.image_transforms import convert_to_rgb

    shown = pixels(6, 9)
    alpha = np.linspace(0, 255, 54).astype(np.uint8).reshape(6, 9, 1)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    palette = PIL.Image.fromarray(shown).quantize(9)
    files = {
        "alpha.png": encoded(np.concatenate([shown, alpha], 2)),
        "gray.png": encoded(shown[:, :, 0]),
        "gray_alpha.png": encoded(PIL.Image.fromarray(np.concatenate([shown[:, :, :1], alpha], 2), "LA")),
        "palette.png": encoded(palette, transparency=2),
        "rotated.jpg": encoded(shown, "JPEG", exif=exif),
        "cmyk.jpg": encoded(PIL.Image.fromarray(shown).convert("CMYK"), "JPEG"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        # Not by transformers' `load_image`: it drops transparency, which its image processors lay on white.
        with PIL.Image.open(tmp_path / name) as opened:
            expected = convert_to_rgb(PIL.ImageOps.exif_transpose(opened), return_numpy=True)
        np.testing.assert_array_equal(images.find(name, tmp_path, "images").decode(), expected, err_msg=name)
