"""Reads the values of a GGUF header forwards, each bounded by what is left of the file and of a memory budget."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quantpress.convert.gguf.container import (
    ARRAY_ID,
    SCALAR_NAMES,
    SCALARS,
    STRING,
    STRING_ID,
    MetadataValue,
)
from quantpress.quant.errors import InputError

# What a header may make us keep. The largest vocabularies in use (262k tokens and 515k merges) are charged 110 MB.
MEMORY_BUDGET = 160 << 20
_WINDOW = 1 << 18  # bytes read ahead
_STRING_COST = 64  # bytes of a string object and its place in a list
_CHAR_COST = 6  # bytes a byte of text may cost: read, cut out, and four if one character is outside the basic plane

_LENGTH = struct.Struct("<Q")


def _form(dtype: np.dtype[Any]) -> struct.Struct:
    """Gives the struct module's form of a number; numpy's letters differ, its "l" has eight bytes on most systems."""
    if dtype.kind == "b":
        return struct.Struct("<?")
    if dtype.kind == "f":
        return struct.Struct({4: "<f", 8: "<d"}[dtype.itemsize])
    letter = {1: "b", 2: "h", 4: "i", 8: "q"}[dtype.itemsize]
    return struct.Struct("<" + (letter.upper() if dtype.kind == "u" else letter))


_FORMS = {name: _form(dtype) for name, (_, dtype) in SCALARS.items()}


class HeaderReader:
    """Walks through a file from its start.

    Args:
        path: for messages.
        file: an open regular file.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._descriptor = file.fileno()
        self.size = os.fstat(self._descriptor).st_size
        self._buffer = b""
        self._start = 0  # place of the buffer in the file
        self._at = 0  # place in the buffer
        self._budget = MEMORY_BUDGET

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._start + self._at

    @property
    def _left(self) -> int:
        return self.size - self.position

    def _fill(self, nbytes: int, what: str) -> None:
        """Makes `nbytes` bytes available in the buffer."""
        if nbytes > self._left:
            raise InputError(
                f"{self.path}: {what} needs {nbytes} bytes, {self._left} are left; the file is cut off or damaged"
            )
        if self._at + nbytes <= len(self._buffer):
            return
        self._start += self._at
        self._at = 0
        try:
            self._buffer = os.pread(self._descriptor, max(nbytes, _WINDOW), self._start)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(self._buffer) < nbytes:
            raise InputError(f"{self.path}: the file became shorter while it was read")

    def _charge(self, nbytes: int, what: str) -> None:
        self._budget -= nbytes
        if self._budget < 0:
            raise InputError(
                f"{self.path}: {what} would take more memory than the {MEMORY_BUDGET >> 20} MiB a header is allowed"
            )

    def expect_items(self, count: int, smallest: int, cost: int, what: str) -> None:
        """Refuses a count of items that the rest of the file, or of the budget, cannot hold.

        Args:
            count: items promised.
            smallest: bytes that the smallest one takes in the file.
            cost: bytes that one takes in memory.
            what: the items, for the message.
        """
        if count * smallest > self._left:
            raise InputError(f"{self.path}: {count} {what} do not fit into the {self._left} bytes that are left")
        self._charge(count * cost, f"{count} {what}")

    def take(self, nbytes: int, what: str) -> bytes:
        """Gives the next bytes."""
        self._fill(nbytes, what)
        data = self._buffer[self._at : self._at + nbytes]
        self._at += nbytes
        return data

    def number(self, form: str, what: str) -> int:
        """Gives the next integer; `form` as the struct module writes it."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def string(self, what: str) -> str:
        """Gives a string that has to be UTF-8."""
        nbytes = self.number("<Q", what)
        if nbytes > self._left:
            raise InputError(f"{self.path}: {what} has {nbytes} bytes, {self._left} are left in the file")
        self._charge(_STRING_COST + _CHAR_COST * nbytes, what)
        try:
            return self.take(nbytes, what).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what} is not UTF-8") from error

    def value(self, what: str) -> MetadataValue:
        """Gives a metadata value: its type, then what the type says."""
        number = self.number("<I", what)
        if number == STRING_ID:
            return STRING, self.string(what)
        if number == ARRAY_ID:
            return self._array(what)
        if number not in SCALAR_NAMES:
            raise InputError(f"{self.path}: {what} has the unknown value type {number}")
        form = _FORMS[SCALAR_NAMES[number]]
        raw = self.take(form.size, what)
        if SCALAR_NAMES[number] == "bool" and raw[0] > 1:
            raise InputError(f"{self.path}: {what} is the byte {raw[0]}, a bool is 0 or 1")
        return SCALAR_NAMES[number], form.unpack(raw)[0]

    def _array(self, what: str) -> MetadataValue:
        item, count = self.number("<I", what), self.number("<Q", what)
        if item == ARRAY_ID:
            raise InputError(f"{self.path}: {what} is an array of arrays, which llama.cpp does not read either")
        if item == STRING_ID:
            self.expect_items(count, _LENGTH.size, _STRING_COST, f"strings of {what}")
            return f"array[{STRING}]", self._strings(count, what)
        if item not in SCALAR_NAMES:
            raise InputError(f"{self.path}: {what} is an array of the unknown value type {item}")
        name = SCALAR_NAMES[item]
        return f"array[{name}]", self._numbers(name, count, what)

    def _numbers(self, name: str, count: int, what: str) -> np.ndarray[Any, Any]:
        dtype = SCALARS[name][1]
        self.expect_items(count, dtype.itemsize, 2 * dtype.itemsize, f"numbers of {what}")
        raw = self.take(count * dtype.itemsize, what)
        if name == "bool" and raw.strip(b"\x00\x01"):
            raise InputError(f"{self.path}: {what} holds bytes other than 0 and 1, a bool is 0 or 1")
        return np.frombuffer(raw, dtype)

    def _strings(self, count: int, what: str) -> list[str]:
        """Reads many short strings; those that are not UTF-8 keep their bytes as surrogate escapes."""
        strings: list[str] = []
        unpack, width = _LENGTH.unpack_from, _LENGTH.size
        budget = self._budget
        for _ in range(count):
            if self._at + width > len(self._buffer):
                self._fill(width, what)
            nbytes = unpack(self._buffer, self._at)[0]
            self._at += width
            budget -= _CHAR_COST * nbytes
            if self._at + nbytes > len(self._buffer):
                if nbytes > self._left:
                    raise InputError(f"{self.path}: a string of {what} has {nbytes} bytes, {self._left} are left")
                self._budget = budget
                self._charge(0, f"a string of {nbytes} bytes in {what}")
                self._fill(nbytes, what)
            strings.append(self._buffer[self._at : self._at + nbytes].decode("utf-8", "surrogateescape"))
            self._at += nbytes
        self._budget = budget
        self._charge(0, what)
        return strings
