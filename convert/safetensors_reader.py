"""Opens safetensors files: a bounded header parser of our own, and values that are read by rows when asked for.

The format (safetensors, README "Format"): 8 bytes little-endian length of the header, the header as JSON that maps
names to `{"dtype", "shape", "data_offsets": [begin, end]}` counted from the end of the header, then the values, which
cover the rest of the file without holes. Nothing is mapped into memory, so a file that is cut short while it is read is
an error and not a dead process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quantpress.convert.checkpoint import DTYPES, Array, LazyTensor, SourceFile
from quantpress.convert.files import FileStamp, open_regular, read_at, shown
from quantpress.convert.json_reader import many_objects, parse_json
from quantpress.quant.errors import InputError

__all__ = ["MAX_HEADER", "Entry", "Shard", "open_shard", "parse_header"]

MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
_MAX_HEADER_VALUES = 1_500_000  # commas and brackets: about 150,000 tensors
_MAX_WIDE_HEADER = 16 << 20  # bytes of a header with other characters than ASCII: decoded it may be 4 times as large
_MAX_DIM = 1 << 47  # more than any address space holds, and numpy can still multiply a few rows
_MAX_RANK = 8
_MAX_NAME = 1000  # characters
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header: its place is `[begin, end)` counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One open safetensors file.

    Attributes:
        tensors: name -> tensor, in the order of the values in the file.
        metadata: the header's `__metadata__`.
        file: path and size.
    """

    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    file: SourceFile


def open_shard(path: Path, *, label: str = "") -> Shard:
    """Opens one safetensors file without reading values.

    Args:
        path: the file, already checked by `files.inside` if another file named it.
        label: what messages call it; its path by default.

    Raises:
        InputError: not a regular file, or its header is refused by `parse_header`.
    """
    label = label or str(path)
    with open_regular(path) as file:
        stamp = FileStamp.of(file)
        header = _read_header(file, stamp.nbytes, label)
    data_start = 8 + len(header)
    with many_objects():
        entries, metadata = parse_header(header, data_nbytes=stamp.nbytes - data_start, name=label)
        tensors = {entry.name: _lazy(entry, path, stamp, data_start, label) for entry in entries}
    return Shard(tensors=tensors, metadata=metadata, file=SourceFile(path=path, nbytes=stamp.nbytes))


def _read_header(file: BinaryIO, nbytes: int, label: str) -> bytes:
    start = bytearray(8)
    if nbytes < 10 or read_at(file, 0, memoryview(start)) != 8:
        raise InputError(f"{label}: not a safetensors file: {nbytes} bytes are too few for a header")
    length = int.from_bytes(start, "little")
    if bytes(start) == b"version ":
        raise InputError(f"{label}: a Git LFS pointer and not the file itself; fetch it with `git lfs pull`")
    if length > MAX_HEADER or length > nbytes - 8:
        most = min(MAX_HEADER, nbytes - 8)
        raise InputError(f"{label}: not a safetensors file: header of {length} bytes, at most {most} are possible here")
    header = bytearray(length)
    if read_at(file, 8, memoryview(header)) != length:
        raise InputError(f"{label}: the file was cut short while its header was read")
    return bytes(header)


def parse_header(header: bytes, *, data_nbytes: int, name: str) -> tuple[list[Entry], dict[str, str]]:
    """Checks the header of a safetensors file.

    Args:
        header: the JSON text.
        data_nbytes: bytes of the file after it.
        name: the file, for messages.

    Returns:
        The tensors ordered by their place, and `__metadata__`.

    Raises:
        InputError: not such JSON, an unknown type, a shape that does not give the number of bytes, places that overlap,
            leave holes, or do not end with the file.
    """
    if not header.startswith(b"{"):
        raise InputError(f"{name}: not a safetensors file: the header does not start with an opening brace")
    if len(header) > _MAX_WIDE_HEADER and not header.isascii():
        raise InputError(f"{name}: a header of {len(header)} bytes must be plain ASCII")
    table = parse_json(header, name=name, max_depth=4, max_values=_MAX_HEADER_VALUES)
    metadata = _parse_metadata(table.pop("__metadata__", {}), name)
    entries = [_parse_entry(key, fields, name) for key, fields in table.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_places(entries, data_nbytes, name)
    return entries, metadata


def _parse_metadata(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InputError(f"{name}: __metadata__ must map names to text, found {shown(value)}")
    return value


def _parse_entry(key: str, fields: Any, name: str) -> Entry:
    if len(key) > _MAX_NAME or not key:
        raise _refused(name, key, f"a name must have 1 to {_MAX_NAME} characters, this has {len(key)}")
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise _refused(name, key, f"must have dtype, shape and data_offsets, found {shown(fields)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _refused(name, key, f"type {shown(dtype)} is not supported; supported are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > _MAX_RANK or (shape and max(shape) > _MAX_DIM):
        raise _refused(name, key, f"shape {shown(shape)} is not a list of at most {_MAX_RANK} sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _refused(name, key, f"data_offsets {shown(offsets)} are not two places in the file")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise _refused(name, key, f"{dtype} of shape {shape} needs {wanted} bytes, data_offsets give {end - begin}")
    return Entry(key, dtype, tuple(shape), begin, end)


def _refused(name: str, key: str, why: str) -> InputError:
    """Says what is wrong with a tensor; put together only where something is: files name a hundred thousand of them."""
    return InputError(f"{name}: tensor {shown(key)}: {why}")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and (not values or (set(map(type, values)) == {int} and min(values) >= 0))


def _check_places(entries: list[Entry], data_nbytes: int, name: str) -> None:
    position = 0
    for entry in entries:
        if entry.end > data_nbytes:
            why = f"ends at byte {entry.end} of {data_nbytes}; the file is cut short or damaged"
            raise _refused(name, entry.name, why)
        if entry.begin != position:
            what = "overlaps the one before it" if entry.begin < position else "leaves a hole before it"
            raise _refused(name, entry.name, f"{what}: begins at byte {entry.begin}, the last ended at {position}")
        position = entry.end
    if position != data_nbytes:
        raise InputError(f"{name}: {data_nbytes - position} bytes after the last tensor belong to none")


def _lazy(entry: Entry, path: Path, stamp: FileStamp, data_start: int, label: str) -> LazyTensor:
    read_rows = partial(_read_rows, entry, path, stamp, data_start + entry.begin, label)
    inner = partial(_inner, entry, path, stamp, data_start, label) if len(entry.shape) > 2 else None
    return LazyTensor(entry.name, entry.shape, entry.dtype, label, read_rows, inner=inner)


def _inner(entry: Entry, path: Path, stamp: FileStamp, data_start: int, label: str, number: int) -> LazyTensor:
    """Gives one of the tensors along the first dimension."""
    if not 0 <= number < entry.shape[0]:
        raise IndexError(f"{entry.name}: {number} of {entry.shape[0]}")
    nbytes = (entry.end - entry.begin) // entry.shape[0]
    begin = entry.begin + number * nbytes
    return _lazy(Entry(entry.name, entry.dtype, entry.shape[1:], begin, begin + nbytes), path, stamp, data_start, label)


def _read_rows(entry: Entry, path: Path, stamp: FileStamp, begin: int, label: str, first: int, stop: int) -> Array:
    rows = entry.shape[0] if entry.shape else 1
    if not 0 <= first <= stop <= rows:
        raise IndexError(f"{entry.name}: rows [{first}, {stop}) of {rows}")
    dtype, row_shape = DTYPES[entry.dtype], entry.shape[1:]
    row_nbytes = math.prod(row_shape) * dtype.itemsize
    values = np.empty((stop - first) * row_nbytes, np.uint8)
    # Opened each time: no descriptor to share between threads or to run out of, and a changed file is noticed.
    with open_regular(path) as file:
        stamp.check(file, label)
        count = read_at(file, begin + first * row_nbytes, values.data)
    if count != values.size:
        raise InputError(f"{label}: tensor {shown(entry.name)}: the file was cut short while it was read")
    return values.view(dtype).reshape((stop - first, *row_shape) if entry.shape else ())
