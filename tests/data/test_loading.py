"""From configuration to examples: sources, held-out texts, notes."""

import hashlib
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pe_rlhf_jax.config import DataConfig, FilesConfig
from pe_rlhf_jax.data import DataError, catalogs, load, loading, movie_reviews
from pe_rlhf_jax.data.formats import Text, TextRow
from pe_rlhf_jax.data.sources import Row

ROWS = [{"prompt": f"Question {i % 60}", "completion": f"answer {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(120)]


def prompts_of(examples, tokenizer):
    return [tokenizer.decode(example.prompt) for example in examples]


def test_only_what_is_needed_is_read(jsonl, tokenizer):
    config = DataConfig(sft=FilesConfig(train=[jsonl(ROWS)]), prompts=FilesConfig(train=["missing.jsonl"]))
    data = load(config, tokenizer, needs={"sft"})
    assert data.prompts is None and data.preference is None and data.notes == []
    assert len(data.sft.train) + len(data.sft.validation) == len(ROWS)


def test_held_out_texts_depend_on_the_texts_alone(jsonl, tokenizer):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    splits = [
        load(DataConfig(sft=FilesConfig(train=[jsonl(rows, f"{n}.jsonl")]), validation_share=0.2), tokenizer, needs={"sft"}).sft
        for n, rows in enumerate((ROWS, shuffled, ROWS[:60]))
    ]
    held_out = [set(prompts_of(split.validation, tokenizer)) for split in splits]
    assert held_out[0] == held_out[1] == held_out[2]
    # The share of SHA-256 values, worked out apart; not Python's hash, which differs between processes.
    digests = {prompt: hashlib.sha256(prompt.encode()).hexdigest() for prompt in (row["prompt"] for row in ROWS)}
    assert held_out[0] == {prompt for prompt, digest in digests.items() if int(digest, 16) < 0.2 * 2**256}
    assert held_out[0].isdisjoint(prompts_of(splits[0].train, tokenizer))
    assert len(splits[0].validation) == 2 * len(held_out[0])


def test_the_first_held_out_rows_are_from_the_whole_file(jsonl, tokenizer, tmp_path):
    rows = [{"prompt": f"Question {i}", "completion": " a", "label": int(i < 100)} for i in range(200)]  # sorted by label
    (tmp_path / "elsewhere").mkdir()
    orders = []
    for name in ("rows.jsonl", "elsewhere/rows.jsonl"):
        files = FilesConfig(train=[jsonl(rows[:2] + rows[-2:], "train.jsonl")], validation=[jsonl(rows, name)])
        found = load(DataConfig(label=files), tokenizer, needs={"label"}).label.validation
        orders.append([example.place.rpartition(":")[2] for example in found])
        assert 20 <= sum(example.label for example in found[:60]) <= 40
    assert orders[0] == orders[1] and len(set(orders[0])) == 200


def test_kinds_hold_out_the_same_prompts(jsonl, tokenizer):
    files = FilesConfig(train=[jsonl(ROWS)])
    data = load(DataConfig(sft=files, preference=files, prompts=files), tokenizer, needs={"sft", "preference", "prompts"})
    held_out = set(prompts_of(data.sft.validation, tokenizer))
    assert {example.text for example in data.prompts.validation} == held_out
    assert {tokenizer.decode(example.chosen).split("yes")[0] for example in data.preference.validation} == held_out


def test_whole_texts_that_meet_through_others_stay_together(jsonl, tokenizer):
    links = [{"chosen": f"{chain} text {i}", "rejected": f"{chain} text {i + 1}"} for chain in range(30) for i in range(6)]
    rows = random.Random(1).sample(links, len(links))
    data = load(DataConfig(preference=FilesConfig(train=[jsonl(rows)])), tokenizer, needs={"preference"})
    chains_of = [
        {tokenizer.decode(example.chosen).split()[0] for example in half} for half in (data.preference.train, data.preference.validation)
    ]
    assert chains_of[0].isdisjoint(chains_of[1])
    assert len(data.preference.validation) == 6 * len(chains_of[1]) > 0


def test_small_sets_still_hold_something_out(jsonl, tokenizer):
    for share in (0.001, 0.999):
        config = DataConfig(sft=FilesConfig(train=[jsonl(ROWS[:3])]), validation_share=share)
        split = load(config, tokenizer, needs={"sft"}).sft
        assert (len(split.train), len(split.validation)) == (2, 1)
    with pytest.raises(DataError, match=r"all rows \(2\) have the same text.*data.sft.validation"):
        load(DataConfig(sft=FilesConfig(train=[jsonl([ROWS[0]] * 2)])), tokenizer, needs={"sft"})


def test_given_validation_file_is_used_and_leaks_are_noted(jsonl, tokenizer):
    files = FilesConfig(train=[jsonl(ROWS[:50], "train.jsonl")], validation=[jsonl(ROWS[45:55], "validation.jsonl")])
    data = load(DataConfig(sft=files), tokenizer, needs={"sft"})
    assert (len(data.sft.train), len(data.sft.validation)) == (50, 10)
    assert data.notes == ["5 of 10 held-out rows of data.sft have a prompt, group or picture that is also in training"]


def test_leaks_between_sections_are_noted(jsonl, tokenizer):
    """Pairs that are held out by a file of their own have prompts that other sections learn from, and the other way about."""
    files = FilesConfig(train=[jsonl(ROWS)])
    pairs = FilesConfig(train=[jsonl(ROWS[:100], "train.jsonl")], validation=[jsonl([{**ROWS[0], "prompt": "New"}], "validation.jsonl")])
    held_out = load(DataConfig(prompts=files), tokenizer, needs={"prompts"}).prompts.validation
    data = load(DataConfig(preference=pairs, prompts=files), tokenizer, needs={"preference", "prompts"})
    count = len(held_out)
    where = f"{count} of {count} held-out rows of data.prompts have a prompt, group or picture that is also in"
    assert count > 5 and data.notes == [f"{where} the training rows of data.preference"]
    assert load(DataConfig(preference=files, prompts=files), tokenizer, needs={"preference", "prompts"}).notes == []


def test_a_group_on_both_sides_is_noted_where_validation_is_given(jsonl, tokenizer):
    train, validation = ([{"prompt": prompt, "completion": "x", "talk": 1}] for prompt in ("a", "b"))
    files = FilesConfig(train=[jsonl(train, "train.jsonl")], validation=[jsonl(validation, "validation.jsonl")])
    assert load(DataConfig(sft=files), tokenizer, needs={"sft"}).notes == []
    [note] = load(DataConfig(sft=files, group_by="talk"), tokenizer, needs={"sft"}).notes
    assert note == "1 of 1 held-out rows of data.sft have a prompt, group or picture that is also in training"


def test_a_picture_on_both_sides_is_noted_beside_groups():
    row = TextRow("file:1", (Text("What?", "x"),), group="talk 1", pictures=(SimpleNamespace(label="a.png"),))
    seen = loading._names(replace(row, group="talk 2", texts=(Text("Where?", "x"),)))
    assert loading._known("sft", [row], {"sft": seen}) == [
        "1 of 1 held-out rows of data.sft have a prompt, group or picture that is also in training"
    ]
    assert loading._known("sft", [replace(row, pictures=())], {"sft": seen}) == []


def test_held_out_rows_of_one_place_are_mixed():
    """Turns of one dialog, or steps of one episode, have one place; a right and a wrong answer stay together."""
    turns = [(dialog, turn) for dialog in range(10) for turn in range(6)]
    rows = [TextRow(f"file:{dialog}", (Text(f"{dialog}.{turn}", answer),)) for dialog, turn in turns for answer in ("yes", "no")]
    mixed = loading.mixed(rows)
    assert len({row.place for row in mixed[:20]}) > 5 and sorted(mixed, key=rows.index) == rows
    assert all(a.texts[0].prompt == b.texts[0].prompt for a, b in zip(mixed[::2], mixed[1::2], strict=True))


def test_notes_say_what_was_left_out(jsonl, tokenizer):
    path = jsonl([*ROWS, {"prompt": "a" * 40, "completion": "b"}, b"not json"])
    data = load(
        DataConfig(sft=FilesConfig(train=[path]), max_prompt_length=30, on_error="skip"),
        tokenizer,
        needs={"sft"},
    )
    assert data.notes[0] == f"1 row over max_prompt_length skipped in {path} (data.sft)"
    assert data.notes[1].startswith(f"1 row skipped as bad in {path}; the first: {path}:122: expected a JSON object")


def test_nothing_left(jsonl, tokenizer):
    config = DataConfig(sft=FilesConfig(train=[jsonl(ROWS)]), max_prompt_length=3)
    with pytest.raises(DataError, match=r"data.sft: no training row is left. 120 rows over max_prompt_length skipped"):
        load(config, tokenizer, needs={"sft"})
    config = DataConfig(sft=FilesConfig(train=[jsonl([b"no json"])]), on_error="skip")
    with pytest.raises(DataError, match=r"data.sft: no training row is left. 1 row skipped as bad in .*:1: expected a JSON object"):
        load(config, tokenizer, needs={"sft"})


LABELED = [
    {"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2, "talk": f"talk {i // 6}", "chosen": "y", "rejected": "n"} for i in range(120)
]


def test_rows_of_a_group_are_on_one_side_in_every_kind(jsonl, tokenizer):
    files = FilesConfig(train=[jsonl(random.Random(2).sample(LABELED, len(LABELED)))])
    config = DataConfig(sft=files, preference=files, label=files, prompts=files, group_by="talk", validation_share=0.3)
    data = load(config, tokenizer, needs={"sft", "preference", "label", "prompts"})
    digests = {row["talk"]: hashlib.sha256(row["talk"].encode()).hexdigest() for row in LABELED}
    held_out = {talk for talk, digest in digests.items() if int(digest, 16) < 0.3 * 2**256}
    prompts = {row["prompt"] for row in LABELED if row["talk"] in held_out}
    assert {example.text for example in data.prompts.validation} == set(prompts_of(data.sft.validation, tokenizer)) == prompts
    assert {tokenizer.decode(example.tokens).split("a")[0] for example in data.label.validation} == prompts
    assert len(data.preference.validation) == len(data.label.validation) == 6 * len(held_out) > 0
    assert len(data.label.train) == 120 - len(data.label.validation)
    assert {example.label for example in data.label.validation} == {0.0, 1.0}
    assert {example.group for example in data.label.validation} == held_out


def test_a_prompt_that_two_groups_share_is_noted(jsonl, tokenizer):
    rows = [{"prompt": "Hello", "completion": "b", "talk": i} for i in range(50)]
    config = DataConfig(sft=FilesConfig(train=[jsonl(rows)]), group_by="talk", validation_share=0.3)
    data = load(config, tokenizer, needs={"sft"})
    count = len(data.sft.validation)
    assert 0 < count < 50 and data.notes == [
        f"{count} of {count} held-out rows of data.sft have a prompt, group or picture that is also in training"
    ]
    one = FilesConfig(train=[jsonl([{**row, "talk": "t"} for row in rows])])
    with pytest.raises(DataError, match=r"all rows \(50\) have the same group 't'"):
        load(DataConfig(sft=one, group_by="talk"), tokenizer, needs={"sft"})


def test_labels_of_one_kind_are_refused(jsonl, tokenizer):
    good = [{**row, "label": 1} for row in LABELED]
    with pytest.raises(DataError, match=r"data.label: all \d+ training rows have label 1"):
        load(DataConfig(label=FilesConfig(train=[jsonl(good)])), tokenizer, needs={"label"})
    files = FilesConfig(train=[jsonl(LABELED, "a.jsonl")], validation=[jsonl(good[:9], "b.jsonl")])
    with pytest.raises(DataError, match=r"data.label: all 9 validation rows have label 1"):
        load(DataConfig(label=files), tokenizer, needs={"label"})
    with pytest.raises(DataError, match=r"needs data.label; give data.label.train a list of files$"):
        load(DataConfig(source="movie-reviews"), tokenizer, needs={"label"})


def test_files_of_an_original_format_are_converted(jsonl, tokenizer):
    rows = [{"id": str(i), "subreddit": "s", "title": "t", "post": f"p{i}", "summary": f"s{i}"} for i in range(30)]
    path = jsonl([*rows, {"post": "no summary"}])
    files = FilesConfig(train=[path], format="openai-tldr-sft")
    with pytest.raises(DataError, match=r"rows.jsonl:31: expected `summary` with text, found `post` \(format openai-tldr-sft\)"):
        load(DataConfig(sft=files), tokenizer, needs={"sft"})
    data = load(DataConfig(sft=files, prompts=files, group_by="post_id", on_error="skip"), tokenizer, needs={"sft", "prompts"})
    assert len(data.sft.train) + len(data.sft.validation) == 30 and "1 row skipped as bad" in data.notes[0]
    assert {example.text for example in data.prompts.validation} == set(prompts_of(data.sft.validation, tokenizer))
    with pytest.raises(DataError, match=r"data.preference.format: openai-tldr-sft gives rows for sft and prompts, not for preference"):
        load(DataConfig(preference=files), tokenizer, needs={"preference"})


def test_several_places_are_read_in_order(jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(catalogs, "read", lambda place: iter([Row({"prompt": "c", "completion": place}, f"{place}:1")]))
    files = FilesConfig(train=[jsonl(ROWS[:2], "a.jsonl"), "hf:o/n:train", jsonl(ROWS[2:3], "b.jsonl")], validation=["tfds:x:test"])
    split = load(DataConfig(sft=files), tokenizer, needs={"sft"}).sft
    assert prompts_of(split.train, tokenizer) == ["Question 0", "Question 1", "c", "Question 2"]
    assert tokenizer.decode(split.validation[0].response) == "tfds:x:test<|end|>"


def test_a_pattern_stands_for_its_files_in_order(jsonl, tokenizer, tmp_path):
    for number in (10, 2, 1):
        jsonl([{"prompt": f"p{number}", "completion": "b"}], f"part-{number:02}.jsonl")
    jsonl([{"prompt": "other", "completion": "b"}], "rest.jsonl")
    files = FilesConfig(train=[f"{tmp_path}/part-*.jsonl"], validation=[f"{tmp_path}/rest.jsonl"])
    split = load(DataConfig(sft=files), tokenizer, needs={"sft"}).sft
    assert prompts_of(split.train, tokenizer) == ["p1", "p2", "p10"]
    with pytest.raises(DataError, match=r"part-\*\.json: no file matches this pattern \(from "):
        load(DataConfig(sft=FilesConfig(train=[f"{tmp_path}/part-*.json"])), tokenizer, needs={"sft"})


def test_no_source(tokenizer):
    with pytest.raises(DataError, match=r"needs data.preference; give data.preference.train a list of files"):
        load(DataConfig(), tokenizer, needs={"preference"})


def test_movie_reviews_serve_all_kinds(reviews, tokenizer):
    config = DataConfig(source="movie-reviews", train_pairs=100, validation_pairs=10, max_response_length=32)
    data = load(config, tokenizer, needs={"sft", "preference", "prompts"})
    assert (len(data.preference.train), len(data.preference.validation)) == (100, 10)
    [note] = data.notes  # once, although three kinds were made of the sentences
    kept = len(data.sft.train) + len(data.sft.validation)
    assert note == f"{300 - kept} rows over max_response_length skipped in movie-reviews" and 0 < kept < 300
    sentences = {tokenizer.decode([*e.prompt, *e.response]) for e in data.sft.train}
    for example in data.preference.train:
        assert tokenizer.decode(example.chosen) in sentences and tokenizer.decode(example.rejected) in sentences
    for example in data.preference.validation:
        assert tokenizer.decode(example.chosen) not in sentences and tokenizer.decode(example.rejected) not in sentences
    assert all(len(example.response) <= 32 for example in data.sft.train)
    assert all(set(example.columns) == {"rating", "original"} for example in data.prompts.train)


def test_files_go_before_the_named_source(reviews, jsonl, tokenizer):
    config = DataConfig(source="movie-reviews", sft=FilesConfig(train=[jsonl(ROWS)]), train_pairs=5, validation_pairs=5)
    data = load(config, tokenizer, needs={"sft", "preference"})
    assert tokenizer.decode(data.sft.train[0].prompt).startswith("Question")
    assert tokenizer.decode(data.preference.train[0].chosen).startswith(movie_reviews.PROMPT)
