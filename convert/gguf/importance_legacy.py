"""Reads importance matrices in llama.cpp's older form, `imatrix.dat`.

Layout (llama.cpp, common/imatrix-loader.cpp, `common_imatrix_load_legacy`), all little-endian: int32 entries; for each
int32 length and the bytes of a name, int32 calls, int32 values and so many float32; then, in newer files, int32 chunks,
int32 length and the bytes of the text's name. A value divided by its calls is the mean; what each expert saw is not
told apart.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.files import open_regular, read_at, shown
from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.quant.errors import InputError

__all__ = ["read_legacy"]

_INT = struct.Struct("<i")
_FLOAT = 4  # bytes
_MAX_NAME = 4096  # bytes; far above any name in use
_MIN_ENTRY = 16  # bytes of the smallest entry: three numbers and one value


class _Reader:
    """Walks through a file from its start."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size, self._at = os.fstat(file.fileno()).st_size, 0

    @property
    def left(self) -> int:
        """Bytes to come."""
        return self._size - self._at

    def take(self, nbytes: int, what: str) -> bytearray:
        """Gives the next bytes."""
        if nbytes > self.left:
            raise InputError(
                f"{self._path}: {what} needs {nbytes} bytes, {self.left} are left; the file is cut off, or it is "
                "no importance matrix"
            )
        data = bytearray(nbytes)
        if read_at(self._file, self._at, memoryview(data)) != nbytes:
            raise InputError(f"{self._path}: the file ended inside {what}; it changed while it was read")
        self._at += nbytes
        return data

    def number(self, what: str, least: int, most: int) -> int:
        """Gives the next number, which must be in bounds."""
        value = int(_INT.unpack(self.take(_INT.size, what))[0])
        if not least <= value <= most:
            raise InputError(
                f"{self._path}: {what} is {value}, wanted {least} to {most}; the file is damaged, or it is no "
                "importance matrix (GGUF or .dat)"
            )
        return value

    def text(self, what: str, least: int) -> str:
        """Gives the next string; what is not UTF-8 is kept by escapes."""
        return self.take(self.number(f"the length of {what}", least, _MAX_NAME), what).decode(
            "utf-8", "surrogateescape"
        )


def read_legacy(path: Path) -> ImportanceMatrix:
    """Reads a file of the older form; see `importance_file.read_importance` for what is checked besides.

    Raises:
        InputError: the file cannot be read or is damaged.
    """
    entries: dict[str, Importance] = {}
    with open_regular(path) as file:
        reader = _Reader(path, file)
        for _ in range(reader.number("the number of entries", 1, max(1, reader.left // _MIN_ENTRY))):
            name, entry = _entry(reader)
            if name in entries:
                raise InputError(f"{path}: entry {shown(name)} appears twice")
            entries[name] = entry
        chunks = reader.number("the number of chunks", 0, 1 << 30) if reader.left else 0
        dataset = reader.text("the text's name", 0) if reader.left else ""
    return ImportanceMatrix(entries, (dataset,) if dataset else (), chunks)


def _entry(reader: _Reader) -> tuple[str, Importance]:
    name = reader.text("an entry's name", 1)
    what = f"entry {shown(name)}"
    calls = reader.number(f"the calls of {what}", 0, (1 << 31) - 1)
    count = reader.number(f"the values of {what}", 1, max(1, reader.left // _FLOAT))
    sums: NDArray[np.float32] = np.frombuffer(reader.take(count * _FLOAT, what), "<f4").astype(np.float32, copy=False)
    # without calls llama-quantize takes the values as they are
    return name, Importance(sums.reshape(1, -1), np.array([calls or 1], np.float32))
