"""How pictures are written in prompts; `tests/models/test_image_prompt_parity.py` compares with transformers' processors."""

from __future__ import annotations

import pytest
from tiny_vision import TinyVision

from pe_rlhf_jax.image_prompt import ImagePrompt

PLAIN = ImagePrompt("<image>", "<image>", 2)
TILED = ImagePrompt("<image>", "<image>", 1, "<around><global>", "<around>", "<around><{row}-{column}>")


def test_placeholders_are_expanded_in_order():
    assert PLAIN.write("a <image> b <image>", [(0, 0), (0, 0)]) == "a <image><image> b <image><image>"
    assert PLAIN.write("a", []) == "a"
    assert PLAIN.write("a", [(0, 0)]) == "<image><image>a"


def test_tiles_come_row_by_row_and_the_whole_picture_after_them():
    tiles = "<around><1-1><image><around><1-2><image>\n<around><2-1><image><around><2-2><image>\n"
    assert TILED.write("<image>.", [(2, 2)]) == f"{tiles}\n<around><global><image><around>."
    assert TILED.write("<image>.", [(0, 0)]) == "<around><global><image><around>."


def test_paligemma_begins_the_text_after_the_pictures():
    prompt = ImagePrompt("<image>", "<image>", 2, begin_after_pictures=True)
    assert prompt.write("caption en", [(0, 0)], "<bos>") == "<image><image><bos>caption en\n"
    assert prompt.write("<image><image>same?", [(0, 0), (0, 0)], "<bos>") == "<image><image><image><image><bos>same?\n"


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="expected <image> 1 times, once for each picture; found it 2 times"):
        PLAIN.write("<image><image>", [(0, 0)])
    with pytest.raises(ValueError, match="a picture in 1 x 2 tiles, but this family takes whole pictures only"):
        PLAIN.expand((1, 2))


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "smolvlm", "llava"])
def test_families_write_as_many_placeholders_as_there_are_features(name):
    tiny = TinyVision(name)
    prompt = tiny.family.image_prompt(tiny.architecture)
    assert prompt.expand().count(prompt.token) == tiny.vision.tokens_per_image
