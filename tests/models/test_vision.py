"""Models that see against what transformers and torch computed (`record_vision.py`), and what holds of pictures among tokens."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
from tiny_families import flat
from tiny_vision import ANSWER, CASES, IMAGE, RECORDED, TinyVision, decode, forward

from pe_rlhf_jax.checkpoint.weights import WeightsError, load_params, load_tower
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.lora import merge
from pe_rlhf_jax.models.vision import VisionTower, cubic_interpolation
from pe_rlhf_jax.models.vlm import Projector, adapts_tower, condense, insert

pytestmark = pytest.mark.usefixtures("quick_compile")

# Logits are of order 3 to 7, features of 4 to 40, gradients of 0.01 to 1, in float32 on both sides: they were found to differ by 2.1e-5,
# 1.4e-5 and 6e-6 at most. A feature left out moves logits by 5e-4 at least (`test_every_feature_moves_the_logits`).
NAMES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES]
LOGITS = 1e-4
GRADIENTS = 5e-5
GRADED = ("paligemma2", "gemma3", "smolvlm", "llava-dinov2")  # their gradients are compared here, all of them in test_vision_parity.py
COUNTS = (2, 1, 0)


@functools.cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with safetensors.safe_open(RECORDED, framework="numpy") as file:
        assert file.metadata()[name] == str(TinyVision(name).checksum()), "the weights changed: run tests/models/record_vision.py again"
        return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118


@functools.cache
def loaded(name: str):
    tiny = TinyVision(name)
    return tiny, load_params(tiny, tiny.family, tiny.architecture, jnp.float32)


def with_leaves(tree, leaves, path=()):
    if not isinstance(tree, dict):
        return leaves.get("/".join(path), tree)
    return {name: with_leaves(part, leaves, (*path, name)) for name, part in tree.items()}


def assert_rows_equal(logits, name, pads):
    for row, (count, pad) in enumerate(zip(COUNTS, pads, strict=True)):
        expected = recorded(name)[f"logits/{count}"]
        np.testing.assert_allclose(logits[row, pad : pad + len(expected)], expected, atol=LOGITS, rtol=0, err_msg=f"{count} pictures")


@pytest.mark.parametrize("name", NAMES)
def test_features_logits_and_gradients_equal_torchs(name):
    """Rows with two, one and no pictures, padded by 1, 4 and 2 on the left and the rest on the right, beside rows alone in torch."""
    tiny, params = loaded(name)
    leaves = tiny.leaves if name in GRADED else ()
    decoder, pads = Decoder(tiny.architecture, remat="none"), (1, 4, 2)
    batch = tiny.batch(pads)
    answer = slice(pads[0] + len(tiny.row(2)) - ANSWER, pads[0] + len(tiny.row(2)))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def compared(leaves):
        tree = with_leaves(params, leaves)
        logits = forward(decoder, {"params": tree}, batch)
        logprobs = jax.nn.log_softmax(logits[0, answer.start - 1 : answer.stop - 1])
        loss = -jnp.mean(jnp.take_along_axis(logprobs, batch[0][0, answer][:, None], axis=-1))
        projector = Projector(tiny.vision, tiny.architecture.hidden_size, None, jnp.float32, jnp.float32)
        features = decoder.encode_images({"params": tree}, tiny.pictures())
        return loss, (logits, projector.apply({"params": tree["projector"]}, features))

    found, (logits, features) = compared({leaf: flat(params)[leaf] for leaf in leaves})
    np.testing.assert_allclose(features, recorded(name)["features"], atol=LOGITS, rtol=0)
    assert_rows_equal(logits, name, pads)
    for leaf in leaves:
        np.testing.assert_allclose(found[leaf], recorded(name)[leaf], atol=GRADIENTS, rtol=0, err_msg=leaf)
        assert np.abs(recorded(name)[leaf]).max() > 0.01, leaf


@pytest.mark.parametrize("name", [param for param in NAMES if param.values[0] in ("paligemma2", "gemma3", "idefics3", "llava-dinov2")])
def test_decoding_with_a_cache_equals_torchs_whole_rows(name):
    tiny, params = loaded(name)
    logits, pads = decode(tiny, params)
    assert_rows_equal(logits, name, pads)


def test_a_prompt_may_be_read_in_two_parts():
    """The part with the pictures stands behind another in the cache; its blocks are there, and not at the cache's start."""
    tiny, params = loaded("gemma3")
    decoder, row, first = Decoder(tiny.architecture, remat="none"), tiny.row(2), 3
    tokens, mask, places = row[None], np.ones((1, len(row)), bool), np.arange(len(row))[None]
    prompt = places < len(row) - ANSWER

    @jax.jit
    def read(params):
        variables = {"params": params}
        known, cache = mask & (places < first), decoder.new_cache(1, len(row))
        one, cache = decoder.apply(variables, tokens[:, :first], known, cache=cache, prompt=prompt[:, :first])
        features = decoder.encode_images(variables, tiny.pictures()[None])
        rest = (tokens[:, first:], mask, places[:, first:], cache, first)
        two, _ = decoder.apply(variables, *rest, features=features, prompt=prompt[:, first:])
        return decoder.unembed(params, jnp.concatenate([one, two], axis=1))[0]

    np.testing.assert_allclose(read(params), recorded("gemma3")["logits/2"], atol=LOGITS, rtol=0)


def vision(**changes):
    return lambda config: dataclasses.replace(config, vision=dataclasses.replace(config.vision, **changes))


def tower(**changes):
    return lambda config: vision(tower=dataclasses.replace(config.vision.tower, **changes))(config)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("paligemma", vision(attention="causal")),
        ("paligemma2", vision(blocks_beyond_windows=False)),
        ("gemma3", vision(attention="causal")),
        ("gemma3", vision(attention="prefix")),
        ("gemma3", vision(blocks_beyond_windows=True)),
        ("llava", vision(projector_activation="gelu_quick")),
        ("llava", tower(activation="gelu")),
        ("llava-siglip", tower(feature_layers=(1,))),
        ("llava-dinov2", tower(feature_layers=(2, 0))),
    ],
)
def test_every_feature_moves_the_logits(name, change):
    """Otherwise the comparisons above would not notice that it is missing."""
    tiny, params = loaded(name)
    logits = jax.jit(lambda p: forward(Decoder(change(tiny.architecture), remat="none"), {"params": p}, tiny.batch((0, 0, 0))))(params)
    expected = recorded(name)["logits/2"]
    assert np.abs(logits[0, : len(expected)] - expected).max() > 5 * LOGITS


def test_who_sees_whom():
    """Gradients of one token's output by each token's embedding: zero where it is not seen."""
    tiny, params = loaded("gemma3")
    # Every layer sees everything; the windows have their place above.
    decoder = Decoder(dataclasses.replace(tiny.architecture, num_layers=1, sliding_window=None, windowed_layers=None), remat="none")
    params = {**params, "layers": jax.tree.map(lambda x: x[1:], params["layers"])}
    row = tiny.row(2)
    tokens, mask = row[None], np.ones((1, len(row)), bool)
    prompt = np.arange(len(row))[None] < len(row) - ANSWER

    @jax.jit
    def seen(at):
        def of(features, embed):
            hidden, _ = decoder.apply({"params": {**params, "embed": embed}}, tokens, mask, features=features, prompt=prompt)
            return jnp.sum(jnp.sin(hidden[0, at]))

        features = jnp.ones((1, 2, 4, 12))
        return jax.grad(of)(features, params["embed"])

    first, second = 0, 1
    at = np.flatnonzero(row == IMAGE)
    influence = np.abs(seen(at[1])).max(axis=-1)[0] > 0  # the second token of the first picture
    assert influence[first].all() and not influence[second].any()
    influence = np.abs(seen(at[4])).max(axis=-1)[0] > 0  # the first token of the second picture
    assert influence.all()
    influence = np.abs(seen(at[0] - 1)).max(axis=-1)[0] > 0  # the text before
    assert not influence.any()


def test_only_the_prompts_placeholders_stand_for_features():
    """A policy may sample the placeholder's id: it is text then, and takes no feature; features for more than there are become NaN."""
    tiny, params = loaded("llava")
    decoder = Decoder(tiny.architecture, remat="none")
    tokens, mask, prompt, pictures = (part[:1] for part in tiny.batch((0, 0, 0)))
    sampled = np.array(tokens)
    sampled[0, len(tiny.row(2)) - 1] = IMAGE

    @jax.jit
    def of(tokens, prompt, pictures):
        features = decoder.encode_images({"params": params}, pictures)
        return decoder.apply({"params": params}, tokens, mask, features=features, prompt=prompt)[0]

    expected, found = of(tokens, prompt, pictures), of(sampled, prompt, pictures)
    end = len(tiny.row(2)) - 1
    np.testing.assert_array_equal(found[:, :end], expected[:, :end])
    assert np.isfinite(found[:, : end + 1]).all() and np.abs(found[:, end] - expected[:, end]).max() > 0.01
    assert np.isnan(of(sampled, mask, pictures)[:, end]).all()


def test_what_is_missing_is_said():
    tiny, params = loaded("paligemma")
    decoder, variables = Decoder(tiny.architecture), {"params": params}
    tokens, mask, _, pictures = tiny.batch((0, 0, 0))
    with pytest.raises(ValueError, match="reads prompts in both directions: expected `prompt`"):
        decoder.apply(variables, tokens, mask)
    features = decoder.encode_images(variables, pictures)
    with pytest.raises(ValueError, match="together with `prompt`; found no `prompt`"):
        decoder.apply(variables, tokens, mask, features=features)
    with pytest.raises(ValueError, match=r"expected pictures of \[12, 12, 3\], found \[13, 12, 3\]"):
        decoder.encode_images(variables, np.zeros((2, 13, 12, 3), np.float32))
    blind = Decoder(dataclasses.replace(tiny.architecture, vision=None))
    with pytest.raises(ValueError, match="found a model without a vision tower"):
        blind.apply(variables, tokens, mask, features=features, prompt=mask)
    with pytest.raises(ValueError, match="found one for text only"):
        blind.encode_images(variables, pictures)


def test_text_only_rows_need_nothing_of_the_tower():
    """Without pictures the same parameters are a text model."""
    tiny, params = loaded("llava")
    row = tiny.row(0)
    text = {name: tree for name, tree in params.items() if name not in ("vision", "projector")}
    for config in (tiny.architecture, dataclasses.replace(tiny.architecture, vision=None)):
        decoder = Decoder(config, remat="none")
        hidden = jax.jit(lambda p, d=decoder: d.apply({"params": p}, row[None], np.ones((1, len(row)), bool))[0])(text)
        np.testing.assert_allclose(decoder.unembed(text, hidden)[0], recorded("llava")["logits/0"], atol=LOGITS, rtol=0)


LORA = LoRAConfig(r=2, lora_alpha=4.0, target_modules=r"(vision\.)?attention\.[qv]_proj", modules_to_save=("projector",))


def test_adapters_on_tower_and_projector():
    """A fresh adapter changes nothing; every part of it gets a gradient; merged it is the same function."""
    tiny, params = loaded("llava-siglip")
    decoder, batch = Decoder(tiny.architecture, LORA, remat="full"), tiny.batch((0, 0, 0))
    assert adapts_tower(LORA) and not adapts_tower(LoRAConfig()) and not adapts_tower(None)
    fresh = decoder.init_lora(jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in flat(fresh).items()}
    factors = [f"attention/{x}_proj/{ab}" for x in "qv" for ab in "ab"]
    projector = {f"projector/linear_{i}/kernel" for i in (1, 2)}
    assert set(shapes) == {f"{part}layers/{factor}" for part in ("", "vision/") for factor in factors} | projector
    assert all(not np.abs(leaf).any() for name, leaf in flat(fresh).items() if not name.endswith("/a"))
    base = jax.jit(lambda p: forward(decoder, {"params": p}, batch))(params)
    adapted = jax.jit(lambda lora: forward(decoder, {"params": params, "lora": lora}, batch))
    np.testing.assert_allclose(adapted(fresh), base, atol=2e-5, rtol=0)  # another program rounds otherwise
    drawn = jax.tree.map(lambda x: 0.1 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32), fresh)
    gradients = jax.jit(jax.grad(lambda lora: jnp.sum(jnp.sin(forward(decoder, {"params": params, "lora": lora}, batch)))))(drawn)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in flat(gradients).values())
    moved = adapted(drawn)
    assert np.abs(moved - base).max() > 0.1
    merged = merge(params, drawn, LORA)
    np.testing.assert_allclose(jax.jit(lambda p: forward(decoder, {"params": p}, batch))(merged), moved, atol=1e-4, rtol=0)
    back = merge(merged, drawn, LORA, sign=-1.0)
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_dropout_reaches_adapters_on_the_tower():
    tiny, params = loaded("llava-siglip")
    lora = LORA.model_copy(update={"lora_dropout": 0.5})
    decoder = Decoder(tiny.architecture, lora, remat="none")
    adapter = jax.tree.map(lambda x: jnp.ones_like(x) * 0.1, decoder.init_lora(jax.random.key(0)))
    variables, pictures = {"params": params, "lora": adapter}, tiny.pictures()
    encode = jax.jit(lambda key: decoder.encode_images(variables, pictures, deterministic=False, rngs={"dropout": key}))
    one, same, other = (encode(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01
    assert np.abs(one - jax.jit(decoder.encode_images)(variables, pictures)).max() > 0.01


def test_patches_of_a_picture_are_attended_to_in_blocks():
    """The features of the whole at once, in less memory, with adapters on the tower and their gradients too."""
    tiny, params = loaded("llava-siglip")
    lora = LORA.model_copy(update={"target_modules": r"vision\..*"})
    found, memory = [], []
    for block in (None, 4):
        decoder = Decoder(tiny.architecture, lora, attention_block=block)
        adapter = jax.tree.map(lambda x: jnp.ones_like(x) * 0.1, decoder.init_lora(jax.random.key(0)))

        def loss(adapter, decoder=decoder):
            return jnp.sum(jnp.sin(decoder.encode_images({"params": params, "lora": adapter}, tiny.pictures())))

        found.append(jax.jit(jax.value_and_grad(loss))(adapter))
        tower = dataclasses.replace(tiny.architecture.vision.tower, image_size=64 * tiny.architecture.vision.tower.patch_size)
        large = VisionTower(tower, attention_block=block and 256)
        picture = jax.ShapeDtypeStruct((1, tower.image_size, tower.image_size, 3), jnp.float32)
        shapes = jax.eval_shape(large.init, jax.random.key(0), picture)
        memory.append(jax.jit(large.apply).lower(shapes, picture).compile().memory_analysis().temp_size_in_bytes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)
    assert float(optax.global_norm(found[0][1])) > 1e-3
    assert memory[1] < memory[0] / 4


class Alone:
    """A case's tower in a file of its own, under the names that files of DINOv2 had before transformers 5."""

    old = (("attention.q_proj", "attention.attention.query"), ("attention.o_proj", "attention.output.dense"))

    def __init__(self, tiny: TinyVision, prefix: str):
        self.path, self.tensors = tiny.path, {}
        for name, tensor in tiny.tensors.items():
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                for new, old in self.old:
                    name = name.replace(new, old)
                self.tensors[name] = tensor
        self.names = (*self.tensors, "embeddings.mask_token")

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


@pytest.mark.parametrize(("name", "prefix"), [("llava-dinov2", "model.vision_tower."), ("idefics3", "model.vision_model.")])
def test_towers_are_read_from_files_of_their_own(name, prefix):
    tiny, params = loaded(name)
    reader = Alone(tiny, prefix)
    found = flat(load_tower(reader, tiny.vision.tower, jnp.float32))
    assert found.keys() == flat(params["vision"]).keys()
    assert all(np.array_equal(value, flat(params["vision"])[leaf]) for leaf, value in found.items())
    reader.names = (*reader.names, "classifier.weight")
    with pytest.raises(WeightsError, match=r"classifier\.weight would be ignored, so this is not a plain vision tower"):
        load_tower(reader, tiny.vision.tower, jnp.float32)
    reader.names = tuple(name for name in reader.tensors if "layer.1" not in name and "layers.1" not in name)
    with pytest.raises(WeightsError, match="the file lacks encoder"):
        load_tower(reader, tiny.vision.tower, jnp.float32)


def test_condensed_features_by_hand():
    tiny, _ = loaded("gemma3")
    config = dataclasses.replace(tiny.vision, pool=2)
    patches = np.arange(16, dtype=np.float32)[:, None] * np.ones(2, np.float32)  # row by row, 4 x 4
    np.testing.assert_array_equal(condense(config, patches)[:, 0], [2.5, 4.5, 10.5, 12.5])
    shuffled = condense(dataclasses.replace(config, pool=1, shuffle=2), patches)
    np.testing.assert_array_equal(shuffled[:, ::2], [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])


def test_features_are_put_in_order():
    marks = np.array([[False, True, True, False, True], [False, False, False, False, True]])
    features = np.arange(8, dtype=np.float32).reshape(2, 2, 2, 1) + 10
    found = insert(np.zeros((2, 5, 1), np.float32), features, marks)[..., 0]
    np.testing.assert_array_equal(found, [[0, 10, 11, 0, 12], [0, 0, 0, 0, 14]])


def test_cubic_interpolation():
    """Equal sizes change nothing, constants stay, and one row by hand: a quarter of the way lie four neighbours, two at each end."""
    np.testing.assert_array_equal(cubic_interpolation(5, 5), np.eye(5, dtype=np.float32))
    np.testing.assert_allclose(cubic_interpolation(12, 9).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(cubic_interpolation(2, 4)[1], [-0.10546875 + 0.87890625, 0.26171875 - 0.03515625])
