"""What a folder says of pictures, and what of a model that sees is held in few bits."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import flat
from tiny_vision_folder import write_model

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.checkpoint.preprocessing import vision_of
from pe_rlhf_jax.checkpoint.source import resolve
from pe_rlhf_jax.checkpoint.weights import WeightsError
from pe_rlhf_jax.config import ModelConfig
from pe_rlhf_jax.loading import decoder_of, load_decoder
from pe_rlhf_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return resolve(ModelConfig(source=str(write_model(tmp_path_factory.mktemp("sees") / "llava"))))


def placed(backbone, tmp_path, files):
    """The backbone with other files beside its weights."""
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    reader = type("Reader", (), {"path": tmp_path})
    return dataclasses.replace(backbone, reader=reader)


def test_the_folder_says_how_pictures_are_written_and_prepared(backbone, tmp_path):
    vision = vision_of(backbone)
    assert vision.prompt.expand() == "<image>" * backbone.config.vision.tokens_per_image
    values = json.loads((backbone.reader.path / "preprocessor_config.json").read_text())
    assert vision_of(placed(backbone, tmp_path, {"processor_config.json": {"image_processor": values}})) == vision
    pixels = np.random.default_rng(0).integers(0, 256, (20, 14, 3)).astype(np.uint8)
    assert vision.processing(pixels).shape == (12, 12, 3)
    assert vision_of(dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, vision=None))) is None


def test_what_does_not_fit_is_said(backbone, tmp_path):
    values = json.loads((backbone.reader.path / "preprocessor_config.json").read_text())
    with pytest.raises(WeightsError, match=r"expected preprocessor_config.json or processor_config.json, which says how pictures"):
        vision_of(placed(backbone, tmp_path, {}))
    other = {**values, "crop_size": {"height": 16, "width": 16}}
    with pytest.raises(WeightsError, match=r"preprocessing to 12 x 12 pixels, which the model's tower takes, found 16 x 16"):
        vision_of(placed(backbone, tmp_path, {"preprocessor_config.json": other}))
    with pytest.raises(WeightsError, match="do_flip_channel_order is not supported"):
        vision_of(placed(backbone, tmp_path, {"preprocessor_config.json": {**values, "do_flip_channel_order": True}}))
    token = dataclasses.replace(backbone.config.vision, image_token=9)
    with pytest.raises(WeightsError, match="expected <image> to be the model's token 9, found 36"):
        vision_of(dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, vision=token)))


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_the_tower_and_its_projector_are_never_quantized(backbone, how):
    config = configuration.parse(f"model: {{source: x, quantization: {how}}}")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    decoder, params = load_decoder(decoder_of(config, backbone), config.model.quantization, backbone, mesh)
    whole = backbone.load_params(jnp.float32)
    for part in ("vision", "projector"):
        assert flat(params[part]).keys() == flat(whole[part]).keys()
        assert all(np.array_equal(x, flat(whole[part])[name]) for name, x in flat(params[part]).items())
    assert all("values" in name or "scale" in name or "bias" in name for name in flat(params["layers"]))
    pictures = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    features = [decoder.encode_images({"params": tree}, pictures) for tree in (params, whole)]
    np.testing.assert_array_equal(*features)
