"""TFRecord files of `tf.train.Example`s, plain or gzipped, without TensorFlow.

A record is its length in 8 bytes, a checksum of those, the bytes, and a checksum of these (masked CRC-32C). The first one is checked: it
tells a TFRecord file from others. The second would take longer than everything else here; gzip has its own.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from pe_rlhf_jax import protobuf
from pe_rlhf_jax.data.sources import DataError

Features = dict[str, list[bytes] | list[int] | list[float]]


def records(path: Path) -> Iterator[bytes]:
    """The records of a file, in order.

    Raises:
        DataError: the file is missing, no TFRecord file, or cut off.
    """
    number = 0
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            while head := file.read(12):
                number += 1
                if len(head) < 12:
                    raise DataError(f"{path}: cut off in record {number}; fetch it again")
                length, checksum = struct.unpack("<QI", head)
                if _masked(head[:8]) != checksum:
                    raise DataError(f"{path}: expected a TFRecord file, found something else, or damage, before record {number}")
                body = file.read(length + 4)
                if len(body) < length + 4:
                    raise DataError(f"{path}: cut off in record {number}; fetch it again")
                yield body[:length]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after record {number}: {error}") from error


def features(record: bytes) -> Features:
    """The features of a `tf.train.Example`. Raises protobuf.WireError if the record is none."""
    found: Features = {}
    for number, value in protobuf.fields(memoryview(record)):
        if number != 1:
            continue
        for _, entry in protobuf.fields(protobuf.message(value)):
            pair = dict(protobuf.fields(protobuf.message(entry)))  # a map's entry: 1 is the key, 2 the value
            if 1 in pair:
                found[protobuf.text(pair[1])] = _values(protobuf.message(pair[2])) if 2 in pair else []
    return found


def _values(feature: memoryview) -> list[bytes] | list[int] | list[float]:
    for kind, listed in protobuf.fields(feature):
        values = [value for _, value in protobuf.fields(protobuf.message(listed))]
        if kind == 1:
            return [bytes(protobuf.message(value)) for value in values]
        if kind == 2:
            return [one for value in values for one in protobuf.floats(value)]
        if kind == 3:
            return [one for value in values for one in protobuf.numbers(value)]
    return []


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _table()


def _masked(data: bytes) -> int:
    """The masked CRC-32C that TFRecord files have."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
