"""Rows out of TFDS and of Hugging Face datasets. Nothing is fetched: the tests prepare a data set, or stand in for the package."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_images import encoded, pixels

from pe_rlhf_jax.data import catalogs
from pe_rlhf_jax.data.sources import DataError


def values(source):
    return [row.values for row in catalogs.read(source)]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A TFDS folder with the data set `tiny_talks`, prepared by TFDS in its random-access format; TensorFlow is not there."""
    import tensorflow_datasets as tfds

    class TinyTalks(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"prompt": tfds.features.Text(), "label": np.int64, "ratio": np.float32, "tags": tfds.features.Sequence(np.str_)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(10), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"prompt": f"día {i}", "label": i % 2, "ratio": i / 4, "tags": ["a", f"b{i}"]}

    folder = tmp_path_factory.mktemp("tfds")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"prompt": tfds.features.Text(), "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"prompt": f"{i}", "image": io.BytesIO(encoded(pixels(seed=i)))}

    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    TinyTalks(data_dir=folder, file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    return folder


@pytest.fixture
def tfds_data(tfds_folder, monkeypatch):
    # As TFDS_DATA_DIR does, which TFDS reads once, at its import.
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tfds_folder))


def test_tfds_rows_are_plain_values_with_places(tfds_data):
    rows = list(catalogs.read("tfds:tiny_talks:train"))
    assert sorted(row.values["prompt"] for row in rows) == [f"día {i}" for i in range(10)]
    for number, row in enumerate(rows, start=1):
        i = int(row.values["prompt"].split()[1])
        assert row.values == {"prompt": f"día {i}", "label": i % 2, "ratio": i / 4, "tags": ["a", f"b{i}"]}
        assert type(row.values["label"]) is int and type(row.values["ratio"]) is float
        assert row.place == f"tfds:tiny_talks:train:{number}" and row.file == "tfds:tiny_talks:train"


def test_tfds_splits_and_versions(tfds_data):
    whole = values("tfds:tiny_talks:train")
    assert values("tfds:tiny_talks:1.0.0:train") == whole
    assert values("tfds:tiny_talks:train[:40%]") == whole[:4]
    assert values("tfds:tiny_talks:train[8:]+test") == whole[8:] + values("tfds:tiny_talks:test")


def test_tfds_pictures_stay_the_bytes_of_their_files(tfds_data):
    rows = values("tfds:tiny_pictures:train")
    assert {int(row["prompt"]): row["image"] for row in rows} == {i: encoded(pixels(seed=i)) for i in range(3)}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:no_such_set:train", "TensorFlow Datasets cannot give it: DatasetNotFoundError"),
        ("tfds:tiny_talks:validation", "cannot give it: .*validation"),
        ("tfds:tiny_talks", r"expected the form tfds:NAME\[/CONFIG\]\[:VERSION\]:SPLIT"),
        ("tfds:a/b/c:train", r"expected the form tfds:NAME"),
        ("hf:only-a-name:train", r"expected the form hf:OWNER/NAME\[/FOLDER\]\[:CONFIG\]:SPLIT"),
        ("hf:owner/name", r"expected the form hf:OWNER/NAME"),
    ],
)
def test_what_a_catalog_does_not_have_is_explained(tfds_data, source, message):
    with pytest.raises(DataError, match=f"^{source}: .*{message}"):
        list(catalogs.read(source))


class Picture:
    """Stands in for `datasets.Image`."""

    def __init__(self, decode=True):
        self.decode = decode


class Several:
    """Stands in for `datasets.List`."""

    def __init__(self, feature):
        self.feature = feature


class Rows(list):
    """Stands in for `datasets.Dataset`."""

    features: dict | None = None

    def cast_column(self, key, feature):
        stored = {"bytes": b"as stored", "path": None}
        assert not getattr(feature, "feature", feature).decode
        cast = Rows({**row, key: [stored] if isinstance(feature, Several) else stored} for row in self)
        cast.features = self.features
        return cast


class Datasets(SimpleNamespace):
    """Stands in for the package `datasets`: keeps what was asked for, and gives two rows."""

    def __init__(self):
        super().__init__(asked=[], Image=Picture)

    def load_dataset(self, *arguments, **named):
        self.asked.append((arguments, named))
        if named["split"] == "none":
            raise ValueError("Unknown split 'none'.\nmore")
        rows = Rows([{"prompt": "a", "turns": [{"role": "user", "content": "x"}]}, {"prompt": "b", "turns": None}])
        if named["split"] == "seen":
            rows.features = {"prompt": None, "image": Picture(), "images": Several(Picture())}
        return rows


def test_hugging_face_names_are_taken_apart(monkeypatch):
    package = Datasets()
    monkeypatch.setitem(sys.modules, "datasets", package)
    sources = ["hf:o/n:train", "hf:o/n.2/a/b:train[:10%]", "hf:o-o/n:config-1:train+test", "hf:o/n/dir:c:test"]
    for source in sources:
        assert [row.place for row in catalogs.read(source)] == [f"{source}:1", f"{source}:2"]
    assert package.asked == [
        (("o/n", None), {"data_dir": None, "split": "train"}),
        (("o/n.2", None), {"data_dir": "a/b", "split": "train[:10%]"}),
        (("o-o/n", "config-1"), {"data_dir": None, "split": "train+test"}),
        (("o/n", "c"), {"data_dir": "dir", "split": "test"}),
    ]
    assert values("hf:o/n:train")[0] == {"prompt": "a", "turns": [{"role": "user", "content": "x"}]}
    with pytest.raises(DataError, match=r"hf:o/n:none: .*cannot give it: ValueError: Unknown split 'none'\.\. Check owner"):
        values("hf:o/n:none")


def test_hugging_face_pictures_are_not_decoded_when_rows_are_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", Datasets())
    stored = {"bytes": b"as stored", "path": None}
    assert [(row["image"], row["images"]) for row in values("hf:o/n:seen")] == [(stored, [stored])] * 2


def test_hugging_face_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"run `pip install 'pe_rlhf_jax\[datasets\]'`"):
        values("hf:o/n:train")


def test_hugging_face_package_itself_reads_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "owner" / "name" / "part").mkdir(parents=True)
    rows = [{"prompt": "día", "turns": [{"role": "user", "content": "x"}]}, {"prompt": "b", "turns": []}]
    (tmp_path / "owner/name/part/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert values("hf:owner/name/part:train") == rows
    with pytest.raises(DataError, match="cannot give it"):
        values("hf:owner/name/part:test")


def test_values_that_are_not_text():
    assert catalogs.plain({"a": np.array([b"x", b"y"], object), "b": (np.int32(3), np.bool_(True)), "c": np.float32(0.5), "d": None}) == {
        "a": ["x", "y"],
        "b": [3, True],
        "c": 0.5,
        "d": None,
    }
