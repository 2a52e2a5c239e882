"""Every family that sees against transformers and torch: features, logits and all gradients of random tiny models, folders that
transformers writes, prompts that its processors write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import flat
from tiny_vision import ANSWER, CASES, TinyVision, decode, forward

from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.families import family_of, idefics3, seeing, towers
from pe_rlhf_jax.models.vlm import Projector

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("quick_compile")]

# As in test_vision.py, where `test_every_feature_moves_the_logits` shows what a feature left out would do.
LOGITS = 1e-4
GRADIENTS = 5e-5


@pytest.mark.parametrize("name", CASES)
def test_features_logits_and_gradients_equal_torchs(name):
    theirs = pytest.importorskip("torch_vision")
    tiny = TinyVision(name)
    model = theirs.torch_model(tiny)
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    decoder, pads = Decoder(tiny.architecture, remat="none"), (3, 0, 1)
    batch = tiny.batch(pads)
    tokens = batch[0]
    end = pads[0] + len(tiny.row(2))

    @jax.jit
    def compared(params):
        def loss(params):
            logits = forward(decoder, {"params": params}, batch)
            logprobs = jax.nn.log_softmax(logits[0, end - ANSWER - 1 : end - 1])
            return -jnp.mean(jnp.take_along_axis(logprobs, tokens[0, end - ANSWER : end, None], axis=-1)), logits

        projector = Projector(tiny.vision, tiny.architecture.hidden_size, None, jnp.float32, jnp.float32)
        features = projector.apply({"params": params["projector"]}, decoder.encode_images({"params": params}, tiny.pictures()))
        return features, jax.grad(loss, has_aux=True)(params)

    features, (gradients, logits) = compared(params)
    expected = theirs.torch_features(tiny, model)
    errors = {"features": np.abs(features - expected).max()}
    decoded, decode_pads = decode(tiny, params)
    for row, count in enumerate((2, 1, 0)):
        wanted = theirs.torch_logits(tiny, model, count)
        for kind, ours, pad in (("whole", logits, pads[row]), ("with cache", decoded, decode_pads[row])):
            errors[f"{count} pictures {kind}"] = np.abs(ours[row, pad : pad + len(wanted)] - wanted).max()
    found, wanted = flat(gradients), theirs.torch_gradients(tiny, model)
    worst = {leaf: np.abs(found[leaf] - wanted[leaf]).max() for leaf in wanted}
    print(f"{name}: {', '.join(f'{key} {error:.1e}' for key, error in errors.items())}, gradients {max(worst.values()):.1e}")
    assert max(errors.values()) < LOGITS, errors
    assert max(worst.values()) < GRADIENTS, worst
    # The last layers get none where features are taken before them, and a key's bias adds the same to all scores of a query.
    for leaf in found.keys() - wanted.keys():
        assert not np.abs(found[leaf]).any(), leaf
    assert all(np.abs(gradient).max() > 1e-4 for leaf, gradient in wanted.items() if not leaf.endswith("k_proj/bias"))


@pytest.mark.parametrize("name", CASES)
def test_folders_that_transformers_writes_are_read(name, tmp_path):
    """By its own choice of tensors' names and of what `config.json` may leave out; and by the names before version 4.52."""
    theirs = pytest.importorskip("torch_vision")
    tiny = TinyVision(name)
    theirs.torch_model(tiny).save_pretrained(tmp_path)
    reader = SafetensorsFolder(tmp_path)
    assert family_of(reader.config).model_type == tiny.family.model_type
    assert tiny.family.config_from_hf(reader.config) == tiny.architecture
    expected = flat(load_params(tiny, tiny.family, tiny.architecture, jnp.float32))
    found = flat(load_params(reader, tiny.family, tiny.architecture, jnp.float32))
    assert found.keys() == expected.keys()
    for leaf in expected:
        np.testing.assert_array_equal(found[leaf], expected[leaf], err_msg=leaf)


def test_defaults_are_transformers():
    """What sections of `config.json` leave out."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for kind, defaults in {**seeing.DEFAULTS, **towers.DEFAULTS}.items():
        theirs = transformers.AutoConfig.for_model(kind).to_dict()
        assert {key: theirs[key] for key in defaults} == defaults, kind
    assert towers.DEFAULTS["idefics3_vision"].items() <= transformers.AutoConfig.for_model("smolvlm_vision").to_dict().items()


def test_rounded_positions_of_idefics_are_refused():
    """Its lookup of positions is the identity for every number of patches that is not refused."""
    torch = pytest.importorskip("torch")
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

    rounded = set()
    for side in range(1, idefics3.LARGEST_SIDE + 1):
        embeddings = Idefics3VisionEmbeddings(Idefics3VisionConfig(hidden_size=1, image_size=side, patch_size=1))
        with torch.no_grad():
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
            found = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))[0, :, 0]
        if not torch.equal(found, torch.arange(side**2, dtype=torch.float32)):
            rounded.add(side)
    assert rounded == idefics3.ROUNDED_SIDES
