"""Pixel values of batches: padded, kept within a bound, made ahead of their step; what cannot be decoded is found at first use."""

import contextlib

import numpy as np
import pytest
from tiny_data import make_tokenizer
from tiny_images import encoded, pixels

from pe_rlhf_jax.config import DataConfig, FilesConfig
from pe_rlhf_jax.data import images, load
from pe_rlhf_jax.data.formats import PromptExample
from pe_rlhf_jax.data.image_batches import PixelReader, WholeExamples
from pe_rlhf_jax.data.image_processing import ImageProcessing
from pe_rlhf_jax.data.sources import DataError, Skipped
from pe_rlhf_jax.data.turns import Vision
from pe_rlhf_jax.image_prompt import ImagePrompt

PROCESSING = ImageProcessing((0, 0, 0), (1, 1, 1), size=(3, 5), rescale_factor=1.0)
VISION = Vision(ImagePrompt("[picture]", "*", 3, before="<", after=">"), PROCESSING)
CUT = encoded(pixels(64, 64))[:3000]


def example(number: int, *contents: bytes) -> PromptExample:
    pictures = tuple(images.find(content, None, "images") for content in contents)
    return PromptExample(np.array([number], np.int32), "", {}, pictures, f"rows.jsonl:{number}")


def numbers(examples) -> list[int]:
    return [int(found.tokens[0]) for found in examples]


A, B, C = (encoded(pixels(seed=seed)) for seed in (1, 2, 3))


def expected(content: bytes) -> np.ndarray:
    return PROCESSING(images.find(content, None, "images").decode())


def test_rows_are_padded_to_the_most_pictures():
    read = PixelReader(PROCESSING)
    values = read.pad([example(1, A), example(2), example(3, B, C)])
    assert values.shape == (3, 2, 3, 5, 3) and values.dtype == np.float32
    for (row, at), content in {(0, 0): A, (2, 0): B, (2, 1): C}.items():
        np.testing.assert_array_equal(values[row, at], expected(content))
    assert not values[0, 1].any() and not values[1].any()
    assert read.pad([example(1, A, B, C)], multiple=2).shape[:2] == (1, 4)
    assert read.pad([example(1), example(2)]) is None


def test_tiles_are_pictures_of_their_own():
    tiled = ImageProcessing((0, 0, 0), (1, 1, 1), longest_edge=8, tile=4)
    assert PixelReader(tiled).pad([example(1, encoded(pixels(4, 8))), example(2, encoded(pixels(4, 4)))]).shape == (2, 5, 4, 4, 3)


def test_pixels_are_kept_up_to_a_bound(monkeypatch):
    decoded = []
    decode = images.Picture.decode
    monkeypatch.setattr(images.Picture, "decode", lambda self: decoded.append(self.key) or decode(self))
    a, b, c = (images.find(content, None, "images") for content in (A, B, C))
    read = PixelReader(PROCESSING, cached_bytes=2 * 3 * 5 * 3 * 4)  # two pictures
    for picture in (a, b, a, c, a, b):
        np.testing.assert_array_equal(read(picture)[0], PROCESSING(decode(picture)))
    assert decoded == [a.key, b.key, c.key, b.key]


def test_damage_stops_the_run_with_the_row_s_place():
    with pytest.raises(DataError, match=r"^rows.jsonl:7: expected a whole picture in `images`, found damaged .*data.on_error: skip"):
        PixelReader(PROCESSING).pad([example(3, A), example(7, CUT)])
    with pytest.raises(DataError, match=r"^rows.jsonl:7: expected a whole picture"):
        WholeExamples([example(7, CUT)], PixelReader(PROCESSING), Skipped())[0]


@pytest.mark.parametrize("several", [False, True])
def test_of_several_hosts_none_leaves_out_a_row_alone(several, jsonl, tmp_path):
    """Only this one's copy may be damaged, and then the hosts would learn from different rows."""
    for name, content in (("whole.png", A), ("cut.png", CUT)):
        (tmp_path / name).write_bytes(content)
    rows = [{"prompt": f"{name}?", "completion": " A", "image": name} for name in ("whole.png", "cut.png")]
    files = FilesConfig(train=[jsonl(rows)], validation=[jsonl(rows[:1], "held.jsonl")])
    config = DataConfig(sft=files, on_error="skip")
    loaded = load(config, make_tokenizer(), needs={"sft"}, vision=VISION, several_hosts=several)
    with pytest.raises(DataError, match="of several hosts none can") if several else contextlib.nullcontext():
        assert [row.place[-1] for row in loaded.sft.train[:]] == ["1", "1"]


def test_the_next_row_comes_in_the_place_of_a_damaged_one():
    rows = [example(1, A), example(2, CUT), example(3, B, CUT), example(4), example(5, CUT)]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):  # whatever is used first
        skipped = Skipped("skip")
        whole = WholeExamples(rows, PixelReader(PROCESSING), skipped)
        assert {i: int(whole[i].tokens[0]) for i in order} == {0: 1, 1: 4, 2: 4, 3: 4, 4: 1}
        assert len(whole) == 5 and numbers(whole[1:4]) == [4, 4, 4] and numbers([whole[-1]]) == [1]
        [note] = skipped.notes()
        assert note.startswith("3 rows skipped as bad in rows.jsonl; the first: rows.jsonl:")
    with pytest.raises(DataError, match=r"none of 2 rows has pictures that can be decoded. 2 rows skipped as bad"):
        WholeExamples([rows[1], rows[4]], PixelReader(PROCESSING), Skipped("skip"))[0]
    with pytest.raises(IndexError):
        whole[5]
