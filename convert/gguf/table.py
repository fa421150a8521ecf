"""Reads the header of one GGUF file and checks its tensor table against the size of the file.

Nothing is allocated that the rest of the file could not fill, and everything a header may make us keep is charged to
one budget. The rules of the data section are llama.cpp's (ggml/src/gguf.cpp): tensors follow one another in the order
of the table, each at the next aligned position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from quantpress.convert.files import shown
from quantpress.convert.gguf.container import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    MAGIC,
    MAX_DIMS,
    MAX_NAME,
    VERSIONS,
    MetadataValue,
    align,
)
from quantpress.convert.gguf.header import HeaderReader
from quantpress.quant.errors import InputError
from quantpress.quant.ggml.types import GGMLType, ggml_type

_TENSOR_COST = 1200  # bytes of memory a row of the tensor table may take, and what bounds the seconds for all of them
_PAIR_COST = 800  # the same for a metadata pair without its value
_MIN_TENSOR, _MIN_PAIR = 24, 13  # bytes of the smallest row and pair in the file
_MAX_ALIGNMENT = 1 << 16  # far above any in use (32); bounds the padding


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a GGUF file.

    Attributes:
        name: llama.cpp's name.
        shape: outermost dimension first; the last one runs along a row.
        type: how the rows are stored.
        nbytes: bytes of its data.
        offset: where its data start, from the start of the file.
        part: which of the files holds it.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    nbytes: int
    offset: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One file, open, with its header read."""

    file: BinaryIO
    nbytes: int
    version: int
    metadata: dict[str, MetadataValue]
    tensors: list[TensorInfo]


def read_part(path: Path, file: BinaryIO, number: int) -> Part:
    """Reads a header.

    Args:
        path: for messages.
        file: an open regular file, left open.
        number: which part of a split model this is, from 0.

    Raises:
        InputError: the file is not GGUF of version 2 or 3, or is damaged.
    """
    reader = HeaderReader(path, file)
    version = _read_version(reader)
    tensor_count, pair_count = reader.number("<Q", "the counts"), reader.number("<Q", "the counts")
    reader.expect_items(pair_count, _MIN_PAIR, _PAIR_COST, "metadata pairs")
    metadata: dict[str, MetadataValue] = {}
    for _ in range(pair_count):
        key = reader.string("a metadata key")
        if not key or not key.isprintable():
            raise InputError(f"{path}: {shown(key)} is not a metadata key")
        if key in metadata:
            raise InputError(f"{path}: metadata key {shown(key)} appears twice")
        metadata[key] = reader.value(f"metadata {shown(key)}")
    alignment = _alignment(path, metadata)
    reader.expect_items(tensor_count, _MIN_TENSOR, _TENSOR_COST, "tensors")
    table = [_read_tensor(reader) for _ in range(tensor_count)]
    tensors = _place(path, table, align(reader.position, alignment), alignment, reader.size, number)
    return Part(file, reader.size, version, metadata, tensors)


def _read_version(reader: HeaderReader) -> int:
    magic = reader.take(4, "the magic")
    if magic != MAGIC:
        raise InputError(f"{reader.path}: not a GGUF file: it starts with {magic!r}, wanted {MAGIC!r}")
    version = reader.number("<I", "the version")
    if version & 0xFFFF == 0:
        raise InputError(f"{reader.path}: big-endian GGUF is not supported; convert it with gguf-convert-endian")
    if version not in VERSIONS:
        raise InputError(f"{reader.path}: GGUF version {version} is not supported, versions 2 and 3 are")
    return version


def _alignment(path: Path, metadata: Mapping[str, MetadataValue]) -> int:
    kind, value = metadata.get(ALIGNMENT_KEY, ("uint32", ALIGNMENT))
    if kind != "uint32" or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise InputError(
            f"{path}: {ALIGNMENT_KEY} is {shown(value)} of type {kind}, "
            f"wanted a uint32 power of two up to {_MAX_ALIGNMENT}"
        )
    return int(value)


def _read_tensor(reader: HeaderReader) -> tuple[str, tuple[int, ...], GGMLType, int, int]:
    """Gives name, shape, type, bytes and offset in the data section."""
    name = reader.string("a tensor's name")
    if not 0 < len(name.encode("utf-8", "surrogateescape")) <= MAX_NAME or not name.isprintable():
        raise InputError(f"{reader.path}: {shown(name)} is not a tensor name of 1 to {MAX_NAME} bytes")
    what = f"tensor {name!r}"
    dims = reader.number("<I", what)
    if dims > MAX_DIMS:
        raise InputError(f"{reader.path}: {what} has {dims} dimensions, at most {MAX_DIMS} are allowed")
    shape = tuple(reader.number("<Q", what) for _ in range(dims))[::-1]
    if 0 in shape:
        raise InputError(f"{reader.path}: {what} has shape {shape}, without any values")
    type_id, offset = reader.number("<I", what), reader.number("<Q", what)
    kind = _known_type(reader.path, what, type_id)
    width = shape[-1] if shape else 1
    if width % kind.block_size:
        raise InputError(
            f"{reader.path}: {what} has rows of {width} values, {kind.name} stores blocks of {kind.block_size}"
        )
    return name, shape, kind, math.prod(shape) // kind.block_size * kind.block_bytes, offset


def _known_type(path: Path, what: str, type_id: int) -> GGMLType:
    try:
        return ggml_type(type_id)
    except InputError as error:
        raise InputError(f"{path}: {what}: {error}") from error


def _place(
    path: Path,
    table: list[tuple[str, tuple[int, ...], GGMLType, int, int]],
    data_start: int,
    alignment: int,
    file_size: int,
    part: int,
) -> list[TensorInfo]:
    """Checks that the tensors fill the data section one after another, and gives their places in the file."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, shape, kind, nbytes, offset in table:
        if name in tensors:
            raise InputError(f"{path}: tensor {shown(name)} appears twice")
        if offset % alignment:
            raise InputError(f"{path}: tensor {name!r} starts at {offset}, not at a multiple of {alignment}")
        if offset != expected:
            fault = "overlaps what comes before it" if offset < expected else "leaves a hole before it"
            raise InputError(f"{path}: tensor {name!r} starts at {offset} and {fault}; {expected} is wanted")
        if data_start + offset + nbytes > file_size:
            raise InputError(
                f"{path}: tensor {name!r} ends at byte {data_start + offset + nbytes}, the file has {file_size}; "
                "it is cut off or damaged, download it again"
            )
        tensors[name] = TensorInfo(name, shape, kind, nbytes, data_start + offset, part)
        expected = align(offset + nbytes, alignment)
    if file_size > data_start + expected:
        raise InputError(f"{path}: {file_size - data_start - expected} bytes follow the last tensor")
    return list(tensors.values())
