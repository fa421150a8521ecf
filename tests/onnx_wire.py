"""A few bytes of the protobuf wire format, written by hand."""

from __future__ import annotations


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


OPSET = field(8, field(1, b"") + b"\x10\x17")
