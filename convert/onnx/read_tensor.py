"""Reads what an ONNX file says about a tensor, and checks that its values are where they are said to be."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from quantpress.convert.checkpoint import SourceFile
from quantpress.convert.files import inside, open_regular, shown
from quantpress.convert.onnx.wire import BYTES, FIXED32, FIXED64, Field, MessageFile
from quantpress.quant.errors import InputError

__all__ = ["DATA_TYPES", "DataFiles", "OnnxTensor", "read_tensor"]

# number -> name and bits of a value (onnx/onnx.proto, TensorProto.DataType); 0 bits: not stored as numbers
DATA_TYPES: Mapping[int, tuple[str, int]] = MappingProxyType(
    {
        1: ("FLOAT", 32), 2: ("UINT8", 8), 3: ("INT8", 8), 4: ("UINT16", 16), 5: ("INT16", 16), 6: ("INT32", 32),
        7: ("INT64", 64), 8: ("STRING", 0), 9: ("BOOL", 8), 10: ("FLOAT16", 16), 11: ("DOUBLE", 64), 12: ("UINT32", 32),
        13: ("UINT64", 64), 14: ("COMPLEX64", 64), 15: ("COMPLEX128", 128), 16: ("BFLOAT16", 16),
        17: ("FLOAT8E4M3FN", 8), 18: ("FLOAT8E4M3FNUZ", 8), 19: ("FLOAT8E5M2", 8), 20: ("FLOAT8E5M2FNUZ", 8),
        21: ("UINT4", 4), 22: ("INT4", 4), 23: ("FLOAT4E2M1", 4), 24: ("FLOAT8E8M0", 8), 25: ("UINT2", 2),
        26: ("INT2", 2), 27: ("FLOAT6E2M3", 6), 28: ("FLOAT6E3M2", 6),
    }
)  # fmt: skip
# field of TensorProto -> types whose values may lie there, and the kind of one that is not packed (None: a varint)
_TYPED_FIELDS: Mapping[int, tuple[frozenset[str], int | None]] = MappingProxyType(
    {
        4: (frozenset({"FLOAT", "COMPLEX64"}), FIXED32),
        5: (
            frozenset(name for name, _ in DATA_TYPES.values())
            - {"FLOAT", "INT64", "STRING", "DOUBLE", "UINT32", "UINT64", "COMPLEX64", "COMPLEX128"},
            None,
        ),
        6: (frozenset({"STRING"}), BYTES),
        7: (frozenset({"INT64"}), None),
        10: (frozenset({"DOUBLE", "COMPLEX128"}), FIXED64),
        11: (frozenset({"UINT32", "UINT64"}), None),
    }
)
_DIMS, _TYPE, _SEGMENT, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 3, 8, 9, 13, 14
_MAX_RANK = 16
_MAX_DIM = 1 << 47  # more than any address space holds
_MAX_NAME = 4096  # bytes; torch's exporter puts whole module paths into names
_MAX_ENTRIES = 16  # facts about external data; location, offset, length and checksum are standard
_MAX_STRING = 1 << 20  # bytes of a string in a tensor of strings
_MAX_FILES = 2000
_NUMBER = re.compile(r"[0-9]{1,19}")
# onnxruntime's mark of tensors that lie in its own memory (core/framework/tensorprotoutils.h); in a file it would be
# an address chosen by the file
_MEMORY_MARK = "_ORT_MEM_ADDR_"


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A stored tensor, not read.

    Attributes:
        name: of the initializer, "" for the value of an attribute without a name.
        dtype: name in `DATA_TYPES`.
        shape: outermost dimension first.
        nbytes: bytes of its values as they are stored.
        file: the data file's name in the folder, "" where the values lie in the model file.
        offset: first byte of the values in that file; -1 where they are stored as protobuf's numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class DataFiles:
    """The data files that a model names: each is looked up once, inside the model's folder only."""

    def __init__(self, folder: Path) -> None:
        """Opens nothing yet."""
        self.folder = folder
        self.files: dict[str, SourceFile] = {}

    def nbytes(self, location: str, label: str) -> int:
        """Gives the size of a data file.

        Raises:
            InputError: the name leaves the folder, or there is no such regular file.
        """
        if (known := self.files.get(location)) is not None:
            return known.nbytes
        if _MEMORY_MARK in location:
            raise InputError(f"{label}: is said to be at an address in memory: {shown(location)}")
        if len(self.files) >= _MAX_FILES:
            raise InputError(f"{label}: more than {_MAX_FILES} data files are named")
        try:
            path = inside(self.folder, location)
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
        except InputError as error:
            raise InputError(f"{label}: its values cannot be opened: {error}") from error
        self.files[location] = SourceFile(self.folder / location, size)
        return size


class _Parts:
    """The fields of one TensorProto as they come."""

    __slots__ = ("bits", "dims", "dtype", "external", "is_external", "kind", "name", "raw", "typed", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.dims: list[int] = []
        self.kind = 0
        self.dtype, self.bits = "", 0
        self.name = ""
        self.raw: tuple[int, int] | None = None
        self.typed: dict[int, int] = {}  # field -> values
        self.external: dict[str, str] = {}
        self.is_external = False


def read_tensor(source: MessageFile, field: Field, what: str, data: DataFiles) -> OnnxTensor:
    """Reads a TensorProto without its values.

    Args:
        source: the model file.
        field: where the message is.
        what: which tensor, for messages, until its name is known.
        data: the data files beside the model.

    Raises:
        InputError: damaged, of an unknown type or shape, or its values are not where it says or not as many.
    """
    source.need(field, BYTES, what)
    parts = _Parts(what)
    for part in source.fields(field[2], field[3], what):
        _take(source, parts, part)
    label = f"{source.label}: {parts.what}"
    if parts.kind not in DATA_TYPES:
        raise InputError(f"{label} has the unknown type {parts.kind}")
    parts.dtype, parts.bits = DATA_TYPES[parts.kind]
    if wrong := [size for size in parts.dims if not 0 <= size <= _MAX_DIM]:
        raise InputError(f"{label} has a dimension of {wrong[0]}")
    nbytes = -(-math.prod(parts.dims) * parts.bits // 8)
    if parts.is_external:
        place = _external_place(parts, nbytes, label, data)
    elif parts.external:
        raise InputError(f"{label} names a data file but is not marked as stored there")
    else:
        place = "", _inline_place(parts, nbytes, label)
    return OnnxTensor(parts.name, parts.dtype, tuple(parts.dims), nbytes, *place)


def _take(source: MessageFile, parts: _Parts, part: Field) -> None:
    number, what = part[0], parts.what
    if number == _DIMS:
        parts.dims += source.integers(part, what, 10 * _MAX_RANK)
        if len(parts.dims) > _MAX_RANK:
            raise InputError(f"{source.label}: {what} has more than {_MAX_RANK} dimensions")
    elif number == _TYPE:
        parts.kind = source.integer(part, what)
    elif number == _NAME:
        parts.name = source.text(part, what, _MAX_NAME)
        parts.what = f"tensor {shown(parts.name)}"
    elif number == _RAW:
        source.need(part, BYTES, what)
        if parts.raw is not None:
            raise InputError(f"{source.label}: {what} has two sets of values")
        parts.raw = part[2], part[3]
    elif number in _TYPED_FIELDS:
        parts.typed[number] = parts.typed.get(number, 0) + _count_values(source, part, what)
    elif number == _EXTERNAL:
        key, value = read_entry(source, part, what)
        if key in parts.external or len(parts.external) >= _MAX_ENTRIES:
            raise InputError(f"{source.label}: {what}: {shown(key)} is given twice or too much is said of its place")
        parts.external[key] = value
    elif number == _LOCATION:
        parts.is_external = source.integer(part, what) == 1
    elif number == _SEGMENT:
        raise InputError(f"{source.label}: {what} is stored in segments, which onnxruntime does not read")


def _count_values(source: MessageFile, part: Field, what: str) -> int:
    """Counts the values in one entry of a typed field, packed or not."""
    number, kind, begin, end = part
    single = _TYPED_FIELDS[number][1]
    if number == 6:
        source.need(part, BYTES, f"a string of {what}")
        if end - begin > _MAX_STRING:
            raise InputError(f"{source.label}: {what} holds a string of {end - begin} bytes")
        return 1
    if kind != BYTES:
        source.need(part, 0 if single is None else single, f"a value of {what}")
        return 1
    if single is None:
        return sum(
            int(np.count_nonzero(np.frombuffer(source.take(at, min(at + (1 << 20), end), what), np.uint8) < 128))
            for at in range(begin, end, 1 << 20)
        )
    width = 4 if single == FIXED32 else 8
    if (end - begin) % width:
        raise InputError(f"{source.label}: {what} has {end - begin} bytes of values, no multiple of {width}")
    return (end - begin) // width


def _inline_place(parts: _Parts, nbytes: int, label: str) -> int:
    """Checks the values that lie in the model file."""
    if (parts.raw is not None and parts.typed) or len(parts.typed) > 1:
        raise InputError(f"{label} has two sets of values")
    size = math.prod(parts.dims)
    if parts.raw is not None:
        begin, end = parts.raw
        if not parts.bits or end - begin != nbytes:
            raise InputError(
                f"{label} of type {parts.dtype} and shape {tuple(parts.dims)} has {end - begin} bytes of values,"
                f" wanted {nbytes}"
            )
        return begin
    if size and not parts.typed:
        raise InputError(f"{label} of shape {tuple(parts.dims)} has no values")
    for number, count in parts.typed.items():
        wanted = size
        if parts.bits in (2, 4):
            wanted = nbytes  # several values to a number of 8 bits
        elif parts.dtype.startswith("COMPLEX"):
            wanted = 2 * size
        if parts.dtype not in _TYPED_FIELDS[number][0] or count != wanted:
            raise InputError(
                f"{label} of type {parts.dtype} and shape {tuple(parts.dims)} has {count} values in field {number},"
                f" wanted {wanted}"
            )
    return -1


def _external_place(parts: _Parts, nbytes: int, label: str, data: DataFiles) -> tuple[str, int]:
    """Checks where the values lie in a data file."""
    if parts.raw is not None or parts.typed:
        raise InputError(f"{label} has values in the model file and in a data file")
    if not parts.bits:
        raise InputError(f"{label} of type {parts.dtype} cannot be stored in a data file")
    location = parts.external.get("location")
    if not location:
        raise InputError(f"{label} is stored outside the model, but its place has no location")
    offset, length = (_integer(parts.external, key, label) for key in ("offset", "length"))
    if length is not None and length != nbytes:
        raise InputError(
            f"{label} of type {parts.dtype} and shape {tuple(parts.dims)} takes {nbytes} bytes, but its length is"
            f" {length}"
        )
    offset = offset or 0
    size = data.nbytes(location, label)
    if offset + nbytes > size:
        raise InputError(
            f"{label} takes bytes {offset} to {offset + nbytes} of {shown(location)}, which has {size}; the data file"
            " is cut short or belongs to another model"
        )
    return location, offset


def _integer(external: Mapping[str, str], key: str, label: str) -> int | None:
    text = external.get(key)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text):
        raise InputError(f"{label}: {key} of its place is {shown(text)}, wanted a number of bytes")
    return int(text)


def read_entry(source: MessageFile, field: Field, what: str) -> tuple[str, str]:
    """Reads a StringStringEntryProto of at most 4096 bytes each."""
    source.need(field, BYTES, what)
    key = value = ""
    for part in source.fields(field[2], field[3], what):
        if part[0] == 1:
            key = source.text(part, what, _MAX_NAME)
        elif part[0] == 2:
            value = source.text(part, what, _MAX_NAME)
    return key, value
