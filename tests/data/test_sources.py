"""Files into rows: what is read, and what a person is told about what cannot be read."""

import gzip
import json
import sys

import pytest

from pe_rlhf_jax.data.sources import DataError, Skipped, read

GOOD = {"prompt": "día", "completion": "日本"}


def test_rows_come_in_order_with_their_places(jsonl):
    path = jsonl([{"n": 1}, {"n": 2}])
    rows = list(read(path, Skipped()))
    assert [row.values["n"] for row in rows] == [1, 2]
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:2"]


def test_byte_order_mark_and_missing_last_line_break(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD, ensure_ascii=False).encode())
    assert [row.values for row in read(path, Skipped())] == [GOOD]


BAD_LINES = [
    (b'{"prompt": "caf\xe9"}', "expected UTF-8, found byte 0xe9 at byte 16 of the line"),
    (b"", "expected a JSON object, found an empty line"),
    (b'{"prompt": "a"', "invalid JSON (Expecting ',' delimiter at column 15)"),
    (b'["a"]', "expected a JSON object, found a list"),
    (b'"a"', "expected a JSON object, found a text"),
    (b"12", "expected a JSON object, found a number"),
    (b"null", "expected a JSON object, found null"),
    (b"[" * 100_000, "JSON that cannot be read"),
    (b'{"n": ' + b"9" * 5000 + b"}", "JSON that cannot be read"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message[-20:] for _, message in BAD_LINES])
def test_bad_line_is_named(jsonl, line, message):
    path = jsonl([GOOD, line, GOOD])
    with pytest.raises(DataError) as error:
        list(read(path, Skipped()))
    assert f"{path}:2: " in str(error.value)
    assert message in str(error.value)
    assert "on_error: skip" in str(error.value)


def test_bad_lines_are_skipped_and_counted(jsonl):
    skipped = Skipped(on_error="skip")
    path = jsonl([GOOD, *[line for line, _ in BAD_LINES], GOOD])
    assert [row.place for row in read(path, skipped)] == [f"{path}:1", f"{path}:{len(BAD_LINES) + 2}"]
    assert skipped.notes() == [f"{len(BAD_LINES)} rows skipped as bad in {path}; the first: {path}:2: {BAD_LINES[0][1]}"]


def test_file_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "the file is empty"),
        ("table.csv", "expected a file that ends in .jsonl, .jsonl.gz, .json or .parquet, found '.csv'"),
        ("", "a folder, expected a file"),
    ):
        with pytest.raises(DataError) as error:
            list(read(tmp_path / name, Skipped(on_error="skip")))
        assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps({"n": i, "noise": str(i) * 40}).encode() for i in range(200)]
    path.write_bytes(gzip.compress(b"\n".join([*lines, b"[]"])))
    skipped = Skipped(on_error="skip")
    rows = list(read(path, skipped))
    assert [row.values["n"] for row in rows] == list(range(200)) and rows[-1].place == f"{path}:200"
    assert skipped.notes() == [f"1 row skipped as bad in {path}; the first: {path}:201: expected a JSON object, found a list"]
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"plain text", whole[:10] + b"\xff" * 20):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="expected a gzip file, found a damaged one"):
            list(read(path, Skipped(on_error="skip")))


def test_json_is_a_list_or_lines(tmp_path):
    path = tmp_path / "a.json"
    for text in ("\ufeff\n[\n" + ",\n".join([json.dumps(GOOD, indent=2)] * 2) + "]", (json.dumps(GOOD) + "\n") * 2):
        path.write_text(text, encoding="utf-8")
        rows = list(read(path, Skipped()))
        assert [row.values for row in rows] == [GOOD, GOOD] and rows[1].place == f"{path}:2"
    path.write_text(json.dumps([GOOD, 3]))
    with pytest.raises(DataError, match=r"a.json:2: expected a JSON object, found a number"):
        list(read(path, Skipped()))
    path.write_text('[{"a": 1}')
    with pytest.raises(DataError, match=r"a.json: expected a JSON list of objects in UTF-8, found .*delimiter: line 1 column 10"):
        list(read(path, Skipped(on_error="skip")))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = {"prompt": [{"role": "user", "content": "hi"}], "completion": "x", "margin": None}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({key: [value, value] for key, value in values.items()}), path)
    rows = list(read(path, Skipped()))
    assert [row.values for row in rows] == [values, values]
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged"):
        list(read(path, Skipped()))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        list(read(tmp_path / "a.parquet", Skipped()))


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_called_so(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 133\n")
    with pytest.raises(DataError, match=f"{name}: the file is a pointer of Git LFS, not the data; run `git lfs pull`"):
        list(read(tmp_path / name, Skipped("skip")))
