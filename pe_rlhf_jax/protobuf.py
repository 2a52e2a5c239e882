"""The wire format of protocol buffers, as far as its reading needs no schema: fields with their numbers, in the order of the bytes.

https://protobuf.dev/programming-guides/encoding. Values are views of the given bytes: nothing is copied, however large a field is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | memoryview
"""A whole number (wire type 0, unsigned as it is written), or bytes: of wire type 2, or 8 and 4 bytes of types 1 and 5."""


class WireError(ValueError):
    """Bytes that are no protocol buffer."""


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message. Raises WireError where the bytes are cut off or are no message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"expected a field's number at byte {at}, found 0")
        value: Value
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 5):
            value, at = _bytes(data, at, 8 if kind == 1 else 4)
        elif kind == 2:
            length, at = _varint(data, at)
            value, at = _bytes(data, at, length)
        else:
            raise WireError(f"expected a field at byte {at}, found wire type {kind}")
        yield number, value


def message(value: Value) -> memoryview:
    """The bytes of a field that holds a message, a text or bytes. Raises WireError if it holds a number."""
    if isinstance(value, int):
        raise WireError("expected bytes in a field, found a number")
    return value


def text(value: Value) -> str:
    """A field that holds text. Raises WireError."""
    try:
        return str(message(value), "utf-8")
    except UnicodeDecodeError as error:
        raise WireError(f"expected text in UTF-8 in a field, found {error}") from error


def number(value: Value) -> int:
    """A field of an int32, int64 or bool, negative numbers included. Raises WireError if it holds bytes."""
    if not isinstance(value, int):
        raise WireError("expected a number in a field, found bytes")
    return value - (1 << 64) if value >> 63 else value


def numbers(value: Value) -> list[int]:
    """A field of repeated int32 or int64: one of them, or all of them packed. Raises WireError."""
    if isinstance(value, int):
        return [number(value)]
    found, at = [], 0
    while at < len(value):
        one, at = _varint(value, at)
        found.append(number(one))
    return found


def floats(value: Value) -> list[float]:
    """A field of repeated float: one of them, or all of them packed. Raises WireError."""
    data = message(value)
    if len(data) % 4:
        raise WireError(f"expected 4 bytes for each float, found {len(data)} bytes")
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        if at >= len(data):
            raise WireError(f"expected a number at byte {at}, found the end")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        shift += 7
        if shift >= 70:
            raise WireError(f"expected a number of at most 10 bytes before byte {at}, found a longer one")


def _bytes(data: memoryview, at: int, length: int) -> tuple[memoryview, int]:
    if at + length > len(data):
        raise WireError(f"expected {length} bytes at byte {at}, found {len(data) - at}")
    return data[at : at + length], at + length
