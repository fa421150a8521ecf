"""Walks protobuf messages in a file without building them: every length is checked against what is left.

The wire format (protobuf.dev, "Encoding"): a message is fields; a field is a varint with number and kind, then a
varint, 4 or 8 bytes, or a length and so many bytes. A protobuf library makes an object of a hundred bytes and more from
two bytes of a hostile file, and holds weights that lie inside the file a second time; here a field is two numbers, and
what is not asked for is skipped without being read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from quantpress.convert.files import read_at, shown
from quantpress.quant.errors import InputError

__all__ = ["BYTES", "FIXED32", "FIXED64", "VARINT", "Field", "MessageFile"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Field = tuple[int, int, int, int]
"""Number, kind, and: the value of a varint (unsigned, 64 bits) and 0; else first byte in the file and the byte after
the last."""

_SHORT = (BYTES, VARINT)
_FIXED = {FIXED32: 4, FIXED64: 8}  # kind -> bytes
_CHUNK = 256 << 10  # bytes read at a time
_LONGEST_HEAD = 20  # bytes of two varints: a field's key and its length or value
# Work that one file may cause: a field is 1, a message _MESSAGE more, a byte of packed numbers 1. A model of 126 layers
# with a hundred nodes a layer, as torch's exporter makes them, has 400,000; this much takes a second.
_MOST_WORK = 800_000
_MESSAGE = 6


class MessageFile:
    """A file that holds one protobuf message."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        """Reads nothing yet.

        Args:
            file: an unbuffered regular file; stays open as long as this object is used.
            label: what messages call it.
        """
        self.label, self.nbytes = label, os.fstat(file.fileno()).st_size
        self._file = file
        self._chunk, self._start = b"", 0
        self._left = _MOST_WORK

    def fields(self, begin: int, end: int, what: str) -> Iterator[Field]:
        """Gives the fields of the message in bytes `[begin, end)` of the file.

        Args:
            begin: first byte.
            end: byte after the last, inside the file.
            what: the message, for errors.

        Raises:
            InputError: no such message, or the file holds more than is walked.
        """
        self._work(_MESSAGE)
        place = begin
        chunk, start, sure = b"", 0, -1
        while place < end:
            if self._left < 0:
                self._work(0)
            if place > sure:  # the head of a field may be cut by the end of the chunk
                chunk, start = self._around(place, end)
                sure = start + len(chunk) - _LONGEST_HEAD if start + len(chunk) < end else end
            self._left -= 1
            key = chunk[place - start]
            place += 1
            if key > 127:
                key, place = self._varint(chunk, start, place - 1, end, what)
            kind = key & 7
            if key < 8:
                raise InputError(f"{self.label}: not an ONNX model: field 0 in {what} at byte {place}")
            if kind in _SHORT:
                if place >= end:
                    raise InputError(f"{self.label}: {what} is cut off at byte {place}")
                value = chunk[place - start]
                place += 1
                if value > 127:
                    value, place = self._varint(chunk, start, place - 1, end, what)
                if kind == VARINT:
                    yield key >> 3, kind, value, 0
                    continue
                stop = place + value
            elif kind in _FIXED:
                stop = place + _FIXED[kind]
            else:
                raise InputError(f"{self.label}: not an ONNX model: field of kind {kind} in {what} at byte {place}")
            if stop > end:
                raise InputError(
                    f"{self.label}: not an ONNX model or cut off: field {key >> 3} of {what} takes {stop - place} bytes"
                    f" from byte {place}, {end - place} are left"
                )
            yield key >> 3, kind, place, stop
            place = stop

    def _work(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise InputError(f"{self.label}: more nodes, tensors and attributes than any model needs, or damaged")

    def _varint(self, chunk: bytes, start: int, place: int, end: int, what: str) -> tuple[int, int]:
        value, shift = 0, 0
        while place < end and shift < 70:
            byte = chunk[place - start]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (1 << 64) - 1, place
            shift += 7
        raise InputError(f"{self.label}: not an ONNX model or cut off: a number in {what} ends nowhere, byte {place}")

    def _around(self, place: int, end: int) -> tuple[bytes, int]:
        """Gives bytes from `place` on, and where they begin: at least the head of a field, or all up to `end`."""
        stop = self._start + len(self._chunk)
        if not (self._start <= place and min(place + 2 * _LONGEST_HEAD, end) <= stop):
            self._chunk, self._start = self.take(place, min(place + _CHUNK, self.nbytes), "what follows"), place
        return self._chunk, self._start

    def take(self, begin: int, end: int, what: str) -> bytes:
        """Gives the bytes `[begin, end)`; the caller bounds their number.

        Raises:
            InputError: the file ends before.
        """
        if self._start <= begin and end <= self._start + len(self._chunk):
            return self._chunk[begin - self._start : end - self._start]
        buffer = bytearray(end - begin)
        if read_at(self._file, begin, memoryview(buffer)) != len(buffer):
            raise InputError(f"{self.label}: the file was cut short while {what} was read")
        return bytes(buffer)

    def text(self, field: Field, what: str, limit: int) -> str:
        """Gives a field as text of at most `limit` bytes.

        Raises:
            InputError: it is of another kind, longer, or not UTF-8.
        """
        begin, end = field[2:]
        if field[1] != BYTES:
            self.need(field, BYTES, what)
        if end - begin > limit:
            raise InputError(f"{self.label}: {what} has {end - begin} bytes, at most {limit} are read")
        if self._start <= begin and end <= self._start + len(self._chunk):
            data = self._chunk[begin - self._start : end - self._start]
        else:
            data = self.take(begin, end, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.label}: {what} is not UTF-8: {shown(data)}") from None

    def need(self, field: Field, kind: int, what: str) -> None:
        """Checks the kind of a field.

        Raises:
            InputError: it is another.
        """
        if field[1] != kind:
            raise InputError(f"{self.label}: {what} is stored as kind {field[1]} of protobuf's, wanted {kind}")

    def integer(self, field: Field, what: str) -> int:
        """Gives a field as a signed 64-bit integer."""
        self.need(field, VARINT, what)
        return signed(field[2])

    def integers(self, field: Field, what: str, limit: int) -> list[int]:
        """Gives one entry of a repeated integer, packed or not; a packed one has at most `limit` bytes."""
        _, kind, begin, end = field
        if kind != BYTES:
            return [self.integer(field, what)]
        if end - begin > limit:
            raise InputError(f"{self.label}: {what} has {end - begin} bytes of numbers, at most {limit} are read")
        self._work(end - begin)
        values, place, chunk = [], begin, self.take(begin, end, what)
        while place < end:
            value, place = self._varint(chunk, begin, place, end, what)
            values.append(signed(value))
        return values

    def floating(self, field: Field, what: str) -> float:
        """Gives a field as a 32-bit float."""
        self.need(field, FIXED32, what)
        value: float = struct.unpack("<f", self.take(field[2], field[3], what))[0]
        return value


def signed(value: int) -> int:
    """Gives the signed number that 64 bits mean."""
    return value - (1 << 64) if value >> 63 else value
