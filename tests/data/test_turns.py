"""Rows with pictures: where they stand in a prompt, in every form of row, for models whose templates take parts and those that do not."""

import numpy as np
import pytest
from tiny_data import CHAT_TEMPLATE, make_tokenizer
from tiny_images import encoded, pixels

from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data.encoder import Encoder
from pe_rlhf_jax.data.formats import Reader
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.sources import DataError, Row, Skipped
from pe_rlhf_jax.data.turns import Vision
from pe_rlhf_jax.image_prompt import ImagePrompt

WHOLE = ImageProcessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), size=(4, 4))
VISION = Vision(ImagePrompt("[picture]", "*", 3, before="<", after=">"), WHOLE)
PARTS_TEMPLATE = (
    "{% for turn in messages %}<|start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part['type'] == 'image' %}[picture]{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""As those of models that see: of a plain text it would show nothing."""
A, B = (encoded(pixels(seed=seed)) for seed in (1, 2))


def read(kind, values, vision=VISION, template=PARTS_TEMPLATE, on_error="error", **tokenizer):
    skipped = Skipped(on_error)
    rows = [Row(row, f"/folder/rows.jsonl:{i + 1}") for i, row in enumerate(values if isinstance(values, list) else [values])]
    tokenizer = make_tokenizer(template, **tokenizer)
    read = getattr(Reader(tokenizer, skipped, vision=vision), kind)(rows)
    encode = Encoder(DataConfig(), tokenizer, skipped, vision)
    return read, [(example, tokenizer) for example in getattr(encode, kind)(read)], skipped


def shown(kind, values, **options):
    """The text of the first row's tokens, and its pictures."""
    _, [(example, tokenizer), *_], _ = read(kind, values, **options)
    tokens = example.tokens if hasattr(example, "tokens") else np.concatenate([example.prompt, example.response])
    return tokenizer.decode(tokens), [picture.content for picture in example.pictures]


TURNS = "<|start|>user\n<***>What?<|end|><|start|>assistant\n"
PROMPTS = {
    "placeholder of this model": ({"prompt": "See [picture], then?", "images": [A]}, "See <***>, then?", [A]),
    "placeholder of any model": ({"prompt": "See <image> and <image>.", "images": [A, B]}, "See <***> and <***>.", [A, B]),
    "no placeholder": ({"prompt": "What?", "image": A}, "<***>What?", [A]),
    "two without placeholder": ({"prompt": "What?", "images": [A, B]}, "<***><***>What?", [A, B]),
    "no picture": ({"prompt": "What?", "images": []}, "What?", []),
    "null": ({"prompt": "What?", "images": None, "image": None}, "What?", []),
    "text turn, column": ({"prompt": [{"role": "user", "content": "What?"}], "images": [A]}, TURNS, [A]),
    "text turn, none": ({"prompt": [{"role": "user", "content": "Hi"}]}, "<|start|>user\nHi<|end|><|start|>assistant\n", []),
    "part, column": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], "images": [A]},
        TURNS,
        [A],
    ),
    "part with its own": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "What?"}]}]},
        TURNS,
        [A],
    ),
    "own and column": (
        {
            "prompt": [
                {"role": "system", "content": "Look."},
                {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "image", "bytes": A}, {"type": "image"}]},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "B"}}, {"type": "text", "text": "?"}]},
            ],
            "images": [B],
        },
        "<|start|>system\nLook.<|end|><|start|>user\n1 <***><***><|end|><|start|>assistant\nYes.<|end|><|start|>user\n<***>?<|end|>"
        "<|start|>assistant\n",
        [A, B, A],
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_pictures_stand_where_the_row_says(name):
    import base64

    row, text, pictures = PROMPTS[name]
    if name == "own and column":
        row["prompt"][3]["content"][0]["image_url"]["url"] = "data:image/png;base64," + base64.b64encode(A).decode()
    assert shown("prompts", row) == (text, pictures)


def test_a_template_for_texts_gets_texts():
    rows = [{"prompt": [{"role": "user", "content": "What?"}], "images": [A]}, {"prompt": [{"role": "user", "content": "Hi"}]}]
    expected = "<|start|>user\n<***>\nWhat?<|end|><|start|>assistant\n"
    assert shown("prompts", rows[0], template=CHAT_TEMPLATE) == (expected, [A])
    assert shown("prompts", rows[1], template=CHAT_TEMPLATE)[0] == "<|start|>user\nHi<|end|><|start|>assistant\n"


PUBLISHED = {  # shortened where it does not matter
    "Idefics 3": (
        "{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}{{ ':' }}"
        "{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}{{ '[picture]' }}{% endif %}{% endfor %}<end>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        "System: Sys.<end>User:[picture][picture]What?<end>Assistant:",
    ),
    "LLaVA 1.5": (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '[picture]\n' }}{% endfor %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "Sys. USER: [picture]\n[picture]\nWhat? ASSISTANT:",
    ),
    "SmolLM2, which sees nothing": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\n[picture]\n[picture]\nWhat?<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_get_what_they_take(name):
    template, expected = PUBLISHED[name]
    prompt = [{"role": "system", "content": "Sys."}, {"role": "user", "content": "What?"}]
    [row], _, _ = read("prompts", {"prompt": prompt, "images": [A, B]}, template=template)
    assert row.texts[0].prompt == expected


def test_parts_that_are_all_text_need_no_model_that_sees():
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]}
    assert shown("prompts", row, vision=None, template=CHAT_TEMPLATE)[0] == "<|start|>user\na b<|end|><|start|>assistant\n"


def test_every_kind_of_row():
    prompt = {"prompt": "What?", "image": A}
    assert shown("sft", {**prompt, "completion": " A cat."}) == ("<***>What? A cat.<|end|>", [A])
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    assert shown("sft", {"messages": messages, "images": [A]}) == (TURNS + "A cat.<|end|>", [A])
    _, [(label, tokenizer)], _ = read("label", {**prompt, "completion": " A cat.", "label": 1})
    assert tokenizer.decode(label.tokens[: label.prompt_length]) == "<***>What?" and [p.content for p in label.pictures] == [A]
    _, [(pair, tokenizer)], _ = read("preference", {**prompt, "chosen": " A cat.", "rejected": " No."})
    assert [tokenizer.decode(side[: pair.prompt_length]) for side in (pair.chosen, pair.rejected)] == ["<***>What?"] * 2
    chosen, rejected = ([messages[0], {"role": "assistant", "content": text}] for text in ("A cat.", "No."))
    [row], [(pair, tokenizer)], _ = read("preference", {"chosen": chosen, "rejected": rejected, "images": [A]})
    assert tokenizer.decode(pair.chosen) == TURNS + "A cat.<|end|>" and len(pair.pictures) == 1
    assert pair.place == "/folder/rows.jsonl:1"
    [row], _, _ = read("prompts", {**prompt, "answers": ["cat"]})
    assert row.columns == {"answers": ["cat"]}, "judges get no pictures"


def test_a_begin_token_after_pictures_is_written_once():
    vision = Vision(ImagePrompt("[picture]", "*", 2, begin_after_pictures=True), WHOLE)
    assert shown("prompts", {"prompt": "What?", "image": A}, vision=vision, adds_start=True)[0] == "**<s>What?\n"
    assert shown("prompts", {"prompt": "What?"}, vision=vision, adds_start=True)[0] == "<s>What?\n"
    assert shown("prompts", {"prompt": "What?", "image": A}, adds_start=True)[0] == "<s><***>What?"


def test_tiles_follow_from_the_size_of_the_picture():
    processing = ImageProcessing((0, 0, 0), (1, 1, 1), longest_edge=8, tile=4)
    vision = Vision(ImagePrompt("[picture]", "*", 1, tile_before="({row},{column})"), processing)
    wide = encoded(pixels(4, 8))
    assert shown("prompts", {"prompt": "What?", "image": wide}, vision=vision)[0] == "(1,1)*(1,2)*\n\n*What?"
    assert len(processing.tiles(pixels(4, 8))[0]) == 3


def test_prompts_with_pictures_are_not_cut():
    skipped = Skipped(too_long="truncate")
    tokenizer = make_tokenizer(PARTS_TEMPLATE)
    rows = [Row({"prompt": "0123456789", "image": image}, f"x.jsonl:{i}") for i, image in enumerate((A, None))]
    rows = Reader(tokenizer, skipped, vision=VISION).prompts(rows)
    config = DataConfig(max_prompt_length=12, too_long="truncate")
    [example] = Encoder(config, tokenizer, skipped, VISION).prompts(rows)
    assert not example.pictures and skipped.notes() == ["1 row over max_prompt_length skipped in x.jsonl"]


REFUSED = {
    "more places than pictures": (
        "prompts",
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "images": [A]},
        r'expected as many pictures in the row as \{"type": "image"\} in `prompt`, found 1 and 2',
    ),
    "more pictures than places": ("prompts", {"prompt": "[picture]?", "images": [A, B]}, r"expected \[picture\] 2 times"),
    "placeholders without pictures": ("prompts", {"prompt": "a [picture]?"}, r"expected \[picture\] 0 times"),
    "the token itself": ("prompts", {"prompt": "2*3", "image": A}, r"expected a text without \*, which is written for pictures only"),
    "both columns": ("prompts", {"prompt": "a", "image": A, "images": [B]}, "expected `images` or `image`, found both"),
    "parts and column": (
        "prompts",
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": A}]}], "images": [B]},
        "found both",
    ),
    "no user": ("prompts", {"prompt": [{"role": "system", "content": "x"}], "image": A}, "expected a user's turn in `prompt`"),
    "a part of another type": (
        "prompts",
        {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
        "expected part 1 of turn 1 of prompt to be",
    ),
    "no parts": ("prompts", {"prompt": [{"role": "user", "content": []}]}, "expected text or parts as content of turn 1"),
    "picture in the response": (
        "sft",
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image", "image": A}]}]},
        "expected the last turn of `messages` to be text, found a picture",
    ),
    "a prompt that its conversations repeat": (
        "preference",
        {
            "prompt": [{"role": "user", "content": "x"}],
            **{
                side: [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
                for side, text in (("chosen", "y"), ("rejected", "z"))
            },
            "images": [A],
        },
        "expected `chosen` to go on where `prompt` ends",
    ),
    "whole texts": ("preference", {"chosen": "a", "rejected": "b", "image": A}, "expected `prompt` beside pictures, found whole texts"),
    "the second picture": ("prompts", {"prompt": "a", "images": [A, "gone.png"]}, r"in `images\[1\]`, found no file /folder/gone.png"),
    "an address": ("prompts", {"prompt": "a", "image": "https://example.org/a.png"}, "Nothing is fetched"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_rows_are_refused_with_their_place_or_counted(name):
    kind, row, message = REFUSED[name]
    with pytest.raises(DataError, match=f"^/folder/rows.jsonl:1: .*{message}"):
        read(kind, row)
    good = {"prompt": "What?", "completion": " x", "chosen": " x", "rejected": " y", "image": A}
    rows, _, skipped = read(kind, [row, good], on_error="skip")
    assert len(rows) == 1 and "1 row skipped as bad in /folder/rows.jsonl; the first:" in skipped.notes()[0]


def test_both_sides_of_a_pair_have_one_prompt():
    chosen, rejected = ([{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in "ab")
    with pytest.raises(DataError, match="expected one prompt for both sides of a pair with pictures, found two"):
        read("preference", {"chosen": chosen, "rejected": rejected, "image": A})


@pytest.mark.parametrize("row", [{"image": "gone.png"}, {"images": ["https://example.org/a.png"]}])
def test_a_model_that_sees_nothing_refuses_pictures_even_where_bad_rows_are_skipped(row):
    with pytest.raises(DataError, match="the row has pictures, but this model takes none"):
        read("prompts", {"prompt": "What?", **row}, vision=None, on_error="skip")
    parts = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "x"}]}]
    with pytest.raises(DataError, match="the row has pictures, but this model takes none"):
        read("prompts", {"prompt": parts}, vision=None, template=CHAT_TEMPLATE)


def test_rows_are_held_out_by_their_pictures():
    rows, _, _ = read("prompts", [{"prompt": "a", "image": A}, {"prompt": "a", "image": B}, {"prompt": "b", "image": A}])
    assert rows[0].keys == rows[2].keys != rows[1].keys
    assert rows[0].prompts != rows[1].prompts and rows[0].prompts != rows[2].prompts
