"""Pixel values by the data of a preprocessor_config.json: against recorded results of transformers, and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_images import pixels
from tiny_processors import CONFIGS

from pe_rlhf_jax.data.image_processing import BICUBIC, BILINEAR, ImageProcessing, ProcessingError, from_hf

RECORDED = Path(__file__).with_name("recorded_image_processing.json")
SIZES = [(37, 53), (53, 37), (9, 61), (14, 12)]


def summary(values: np.ndarray) -> list[float]:
    """Of pixel values [N, H, W, 3]: the shape, and sums with weights that tell every pixel, channel and picture from the others."""
    weights = np.random.default_rng(0).standard_normal(values.shape)
    return [*values.shape[:3], float((values.astype(np.float64) * weights).sum()), float((values.astype(np.float64) ** 2).sum())]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_what_transformers_computed(name, size):
    recorded = json.loads(RECORDED.read_text())["cases"][f"{name}/{size[0]}x{size[1]}"]
    found, _, _ = from_hf(CONFIGS[name]).tiles(pixels(*size))
    # Float sums in another order; one pixel value off by 1 of 255 in one place moves them by more than 1e-3.
    np.testing.assert_allclose(summary(np.stack(found)), recorded, rtol=0, atol=1e-6)


def test_recorded_results_are_of_every_case():
    assert len(json.loads(RECORDED.read_text())["cases"]) == len(CONFIGS) * len(SIZES)


def test_by_hand():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    found = ImageProcessing((0.5, 0.25, 0.0), (0.5, 0.5, 2.0))(image)
    np.testing.assert_allclose(found, (image / 255 - [0.5, 0.25, 0.0]) / [0.5, 0.5, 2.0], atol=1e-6)
    np.testing.assert_array_equal(ImageProcessing((0, 0, 0), (1, 1, 1), rescale_factor=1.0, normalize=False)(image), image)
    padded = ImageProcessing((0.5, 0.2, 1.0), (1, 1, 1), pad_to_square=True, rescale_factor=1.0, normalize=False)(image[:, :1])
    np.testing.assert_array_equal(padded, np.stack([image[:, 0], [[127, 51, 255]] * 2], axis=1))
    cropped = ImageProcessing((0, 0, 0), (1, 1, 1), crop=(1, 3), rescale_factor=1.0, normalize=False)(image)
    np.testing.assert_array_equal(cropped, [[[0, 0, 0], *image[0]]])


def test_config_becomes_plain_data():
    found = from_hf(CONFIGS["dinov2"])
    assert found == ImageProcessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), shortest_edge=18, crop=(14, 14), resample=BICUBIC)
    assert from_hf(CONFIGS["gemma3"]).resample == BILINEAR
    # CLIP's first files have numbers in place of objects, and another name.
    old = {**CONFIGS["clip"], "image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor", "size": 14, "crop_size": 14}
    del old["do_center_crop"]
    assert from_hf(old) == from_hf(CONFIGS["clip"]) == from_hf({**CONFIGS["clip"], "image_processor_type": "CLIPImageProcessorFast"})


REFUSED = {
    "pan and scan": ({"do_pan_and_scan": True}, "do_pan_and_scan is not supported"),
    "padding": ({"do_pad": True}, "do_pad is supported for LlavaImageProcessor, not for SiglipImageProcessor"),
    "no mean": ({"image_mean": None}, "expected image_mean with three numbers, found None"),
    "two numbers": ({"image_std": [1, 2]}, r"expected image_std with three numbers, found \[1, 2\]"),
    "size": ({"size": {"max_height": 3, "max_width": 4}}, "expected size with height and width, .* found {'max_height'"),
    "crop": ({"do_center_crop": True, "crop_size": None}, "expected crop_size with height and width, found None"),
    "tiles": ({"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 3}}, "expected max_image_size"),
    "Idefics": ({"image_processor_type": "Idefics3ImageProcessor"}, "expected do_resize, and size with longest_edge, found"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_pixels_is_refused(name):
    change, message = REFUSED[name]
    with pytest.raises(ProcessingError, match=message):
        from_hf({**CONFIGS["siglip"], **change})


def test_tiles_are_asked_for():
    with pytest.raises(ValueError, match="call `tiles`"):
        from_hf(CONFIGS["smolvlm tiles"])(pixels())
