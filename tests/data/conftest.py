"""Fixtures of the data tests: a tokenizer, rows in files, made-up reviews."""

import json

import pytest
from tiny_data import make_tokenizer, review_table
from transformers import PreTrainedTokenizerFast

from pe_rlhf_jax.data.movie_reviews import parse


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (objects, or raw bytes for a line) to a file and returns its path as a string."""

    def write(rows, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def reviews(monkeypatch):
    """Puts 300 made-up sentences in the place of the data set."""
    sentences = parse(review_table(300))
    monkeypatch.setattr("pe_rlhf_jax.data.movie_reviews._read", lambda: sentences)
    return sentences
