"""Prompts with pictures beside what transformers' processors make of the same text and pictures."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_vision import TinyVision

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL = {
    "paligemma": ["<image>", "<bos>"],
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES],
    "llava": ["<image>"],
}


def tokenizer(name: str):
    """A tokenizer of single characters and the family's special tokens."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    extra = (
        {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"} if name == "gemma3" else {}
    )
    begin = {"bos_token": "<bos>"} if name == "paligemma" else {}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=extra, **begin
    )
    made.add_special_tokens({"additional_special_tokens": [t for t in SPECIAL[name] if t not in {*extra.values(), *begin.values()}]})
    return made


def processor(name: str, tiny: TinyVision):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    edge, tokens = tiny.vision.tower.image_size, tiny.vision.tokens_per_image
    square = {"height": edge, "width": edge}
    if name == "paligemma":
        images = SiglipImageProcessorPil(size=square)
        images.image_seq_length = tokens
        return transformers.PaliGemmaProcessor(images, tokenizer(name))
    if name == "gemma3":
        return transformers.Gemma3Processor(Gemma3ImageProcessorPil(size=square), tokenizer(name), image_seq_length=tokens)
    if name == "idefics3":
        images = Idefics3ImageProcessorPil(size={"longest_edge": 3 * edge}, max_image_size={"longest_edge": edge})
        return transformers.Idefics3Processor(images, tokenizer(name), image_seq_len=tokens)
    images = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=square)
    strategy = {"patch_size": tiny.vision.tower.patch_size, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer(name), **strategy)


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("count", [1, 2])
def test_token_ids_equal_the_processors(name, count):
    tiny = TinyVision(name)
    theirs, prompt = processor(name, tiny), tiny.family.image_prompt(tiny.architecture)
    edge = tiny.vision.tower.image_size
    shapes = [(3 * edge, 2 * edge), (edge, edge)][:count]
    pictures = [np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8) for i, shape in enumerate(shapes)]
    # Idefics 3 makes the longer edge three tiles long: 3 x 2 of the first picture, 3 x 3 of the square one.
    tiles = [(3, 2), (3, 3)][:count] if name == "idefics3" else [(0, 0)] * count
    text = {1: f"What is this? {prompt.placeholder} Say.", 2: f"{prompt.placeholder}Or {prompt.placeholder}?"}[count]
    if name == "paligemma":  # pictures first
        text = prompt.placeholder * count + "What is this?"
    found = theirs(images=[pictures], text=[text])
    written = prompt.write(text, tiles, "<bos>")
    inner = theirs.tokenizer
    assert list(found["input_ids"][0]) == inner(written, add_special_tokens=False)["input_ids"]
    token = inner.convert_tokens_to_ids(prompt.token)
    pixels = np.concatenate([np.asarray(part).reshape(-1, 3, edge, edge) for part in found["pixel_values"]])
    assert list(found["input_ids"][0]).count(token) == len(pixels) * tiny.vision.tokens_per_image


def test_smolvlm_writes_pictures_as_idefics3_does():
    """Its processor itself needs torchvision; the function that it calls does not."""
    pytest.importorskip("torch")
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    tiny = TinyVision("smolvlm")
    prompt = tiny.family.image_prompt(tiny.architecture)
    for tiles in ((0, 0), (1, 2), (3, 3)):
        assert prompt.expand(tiles) == get_image_prompt_string(
            *tiles, prompt.tokens, "<fake_token_around_image>", "<image>", "<global-img>"
        )
