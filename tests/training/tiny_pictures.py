"""A context around a tiny model that sees: pictures of one colour, prompts that show them, answers that name the colour."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tiny_context import tiny_context
from tiny_vision import BEGIN, END, IMAGE, TinyVision

from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.data import Data, LabelExample, PixelReader, PreferenceExample, PromptExample, SFTExample, Split
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.images import find
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.images import ImageEncoder

END_TOKEN = 1
COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250))
WORDS = (5, 6, 7)
ROWS = 8


def picture(colour: int, shade: int = 0):
    """One colour, a little darker each shade."""
    return find(np.full((6, 6, 3), COLOURS[colour], np.uint8) - np.uint8(2 * shade % 20), None, "image")


def prompt(tiny: TinyVision, pictures: int, word: int = 9) -> np.ndarray:
    """A prompt with so many pictures."""
    one = [BEGIN, *[IMAGE] * tiny.vision.tokens_per_image, END]
    return np.array([3, *one * pictures, word], np.int32)


def seeing_context(
    name: str = "llava", pictures: int = 1, devices: int = 1, target_modules: str = "all-linear", **sections: dict
) -> Context:
    """A context whose rows show `pictures` pictures each; every third row has none, where they show more than one."""
    tiny = TinyVision(name)
    decoder = Decoder(tiny.architecture, LoRAConfig(r=3, lora_alpha=6.0, target_modules=target_modules))
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    model = SimpleNamespace(decoder=decoder, config=tiny.architecture, params=params)
    sections = {**sections, "lora": {"target_modules": target_modules, **sections.get("lora", {})}}
    context = tiny_context(model, devices, **sections)
    sft, pairs, labels, prompts = [], [], [], []
    for i in range(ROWS):
        count = 0 if pictures > 1 and i % 3 == 2 else max(1, pictures - i % 2) if pictures else 0
        seen, place = tuple(picture((i + j) % 3, i) for j in range(count)), f"rows:{i}"
        asked, right, wrong = prompt(tiny, count, 9 + i % 2), WORDS[i % 3], WORDS[(i + 1 + i % 2) % 3]
        good, bad = (np.array([*asked, word, END_TOKEN], np.int32) for word in (right, wrong))
        sft.append(SFTExample(asked, good[len(asked) :], seen, place))
        pairs.append(PreferenceExample(good, bad, 0.5, seen, len(asked), place))
        labels.append(LabelExample((bad, good)[i % 2], float(i % 2), None, seen, len(asked), place))
        prompts.append(PromptExample(asked, f"prompt {i}", {"answer": right}, seen, place))
    size = tiny.vision.tower.image_size
    reader = PixelReader(ImageProcessing((0.5,) * 3, (0.5,) * 3, size=(size, size)))
    splits = {name: Split(rows, rows) for name, rows in (("sft", sft), ("preference", pairs), ("label", labels), ("prompts", prompts))}
    context = dataclasses.replace(context, data=Data(**splits, notes=[], pixels=reader))
    return dataclasses.replace(context, encoder=new_encoder(context))


def new_encoder(context: Context, cached_bytes: int = 2**20) -> ImageEncoder:
    """One that has seen nothing yet."""
    assert context.data.pixels is not None
    return ImageEncoder(context.decoder, context.backbone, context.mesh, context.data.pixels, cached_bytes)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def remainders(prompts, completions, **columns) -> list[float]:
    """A reward that needs no model and differs from answer to answer."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]
