"""Rows out of catalogs of data sets: TensorFlow Datasets (`tfds:`) and Hugging Face (`hf:`).

    tfds:NAME[/CONFIG][:VERSION]:SPLIT      tfds:reddit_tifu/short:train[:90%]
    hf:OWNER/NAME[/FOLDER][:CONFIG]:SPLIT   hf:Anthropic/hh-rlhf/harmless-base:train

Both fetch what is not on the disk yet, into their own cache: the environment variables TFDS_DATA_DIR and HF_HOME say where. TFDS is read
through `tfds.data_source`, which needs no TensorFlow; the data set must have been prepared in a random-access format such as
ArrayRecord, in which TFDS prepares what it fetches for it. Rows are those of the catalog, without decoding of other features than text;
pictures under `images` or `image` stay the bytes of their files, but for a sequence of them in TFDS, which decodes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pe_rlhf_jax.data.images import KEYS
from pe_rlhf_jax.data.sources import DataError, Row

_PART = r"[\w.-]+(\[[^\]]*\])?"  # such as train or train[:90%]
_SPLIT = rf"(?P<split>{_PART}(\+{_PART})*)"
_FORMS = {
    "tfds": ("tfds:NAME[/CONFIG][:VERSION]:SPLIT", re.compile(rf"(?P<name>\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?):{_SPLIT}")),
    "hf": (
        "hf:OWNER/NAME[/FOLDER][:CONFIG]:SPLIT",
        re.compile(rf"(?P<name>[\w.-]+/[\w.-]+)(/(?P<folder>[\w./-]+))?(:(?P<config>[\w.+-]+))?:{_SPLIT}"),
    ),
}


def is_catalog(source: str) -> bool:
    """Whether a source names a catalog, not a file."""
    return source.partition(":")[0] in _FORMS


def read(source: str) -> Iterator[Row]:
    """The rows of `tfds:...` or `hf:...`, in the catalog's order, each at the place `SOURCE:ROW`, rows counted from 1.

    Raises:
        DataError: the name has another form, the package is missing, or the catalog cannot give the data.
    """
    catalog, _, rest = source.partition(":")
    form, pattern = _FORMS[catalog]
    match = pattern.fullmatch(rest)
    if not match:
        raise DataError(f"{source}: expected the form {form}")
    rows = _tfds(source, match) if catalog == "tfds" else _hf(source, match)
    number = 0
    try:
        for number, values in enumerate(rows, start=1):
            yield Row(
                {str(key): value if key in KEYS else plain(value) for key, value in values.items()},
                f"{source}:{number}",
            )
    except UnicodeDecodeError as error:
        raise DataError(f"{source}:{number}: expected text in UTF-8, found {error}") from error


def plain(value: Any) -> Any:
    """TFDS and Hugging Face values as what JSON would give: text instead of bytes, Python numbers, lists and dicts."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _tfds(source: str, match: re.Match[str]) -> Iterable[dict[str, Any]]:
    try:
        import tensorflow_datasets as tfds

        features = dict(tfds.builder(match["name"]).info.features.items())
        decoders = {key: tfds.decode.SkipDecoding() for key in KEYS if isinstance(features.get(key), tfds.features.Image)}
        data = tfds.data_source(match["name"], split=match["split"], decoders=decoders)
        return [data[i] for i in range(len(data))]
    except Exception as error:  # whatever a builder, a download or a file raises
        raise DataError(
            f"{source}: TensorFlow Datasets cannot give it: {_said(error)}. Check name and split, and that TFDS_DATA_DIR holds the data "
            "set in the format array_record, or that this machine can fetch it"
        ) from error


def _hf(source: str, match: re.Match[str]) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: Hugging Face data sets need a further package; run `pip install 'pe_rlhf_jax[datasets]'`") from error
    try:
        data = datasets.load_dataset(match["name"], match["config"], data_dir=match["folder"], split=match["split"])
        coded = datasets.Image(decode=False)
        for key in KEYS:
            feature: Any = (data.features or {}).get(key)
            if isinstance(feature, datasets.Image):
                data = data.cast_column(key, coded)
            elif isinstance(getattr(feature, "feature", None), datasets.Image):  # a list of them
                data = data.cast_column(key, type(feature)(coded))
        return data
    except Exception as error:  # whatever a loader or a download raises
        raise DataError(
            f"{source}: Hugging Face datasets cannot give it: {_said(error)}. Check owner, name, folder, configuration and split, and that "
            "HF_HOME holds the data set or that this machine can fetch it"
        ) from error


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
