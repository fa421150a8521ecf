"""Constants of the GGUF container and the bytes of its metadata and tensor table.

Layout (ggml, docs/gguf.md): magic, version, counts, metadata pairs, tensor table, padding, tensor data. All numbers are
little-endian; a string is its length in eight bytes and then its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from quantpress.quant.errors import LayoutError

MAGIC = b"GGUF"
VERSION = 3
VERSIONS = (2, 3)  # 3 differs from 2 only in that big-endian files exist
ALIGNMENT = 32  # bytes, where general.alignment does not say otherwise
ALIGNMENT_KEY = "general.alignment"
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME = 63  # bytes of a tensor's name; GGML_MAX_NAME counts a zero byte as well

STRING = "string"
ARRAY = "array"
STRING_ID, ARRAY_ID = 8, 9

MetadataValue = tuple[str, Any]
"""GGUF type and value: `("uint32", 5)`, `("string", "llama")`, `("array[string]", [...])`, `("array[int32]", array)`"""

SCALARS: Mapping[str, tuple[int, np.dtype[Any]]] = MappingProxyType(
    {
        "uint8": (0, np.dtype("u1")),
        "int8": (1, np.dtype("i1")),
        "uint16": (2, np.dtype("<u2")),
        "int16": (3, np.dtype("<i2")),
        "uint32": (4, np.dtype("<u4")),
        "int32": (5, np.dtype("<i4")),
        "float32": (6, np.dtype("<f4")),
        "bool": (7, np.dtype("?")),
        "uint64": (10, np.dtype("<u8")),
        "int64": (11, np.dtype("<i8")),
        "float64": (12, np.dtype("<f8")),
    }
)
SCALAR_NAMES: Mapping[int, str] = MappingProxyType({number: name for name, (number, _) in SCALARS.items()})


def align(position: int, alignment: int) -> int:
    """Gives the first multiple of `alignment` that is not before `position`."""
    return -(-position // alignment) * alignment


def plain_metadata(metadata: Mapping[str, MetadataValue]) -> dict[str, Any]:
    """Gives the values without their types; arrays become lists."""
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, (_, value) in metadata.items()}


def encode_string(text: str) -> bytes:
    """Encodes a string; what is not UTF-8 in a file we read is kept through surrogate escapes.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair.
    """
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def encode_pair(key: str, value: MetadataValue) -> bytes:
    """Encodes one metadata pair.

    Raises:
        LayoutError: the type is unknown or cannot hold the value.
    """
    kind, content = value
    try:
        if kind.startswith("array[") and kind.endswith("]"):
            body = struct.pack("<I", ARRAY_ID) + _encode_array(kind[len("array[") : -1], content)
        elif kind == STRING:
            body = struct.pack("<I", STRING_ID) + encode_string(content)
        else:
            body = struct.pack("<I", SCALARS[kind][0]) + _encode_numbers(kind, [content])
        return encode_string(key) + body
    except KeyError:
        raise LayoutError(f"metadata {key!r}: GGUF has no type {kind!r}") from None
    except (ValueError, TypeError, OverflowError, AttributeError) as error:
        shown = repr(content)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise LayoutError(f"metadata {key!r}: GGUF type {kind} cannot hold {shown} ({error})") from error


def _encode_array(item: str, content: Any) -> bytes:
    if item == STRING:
        return struct.pack("<IQ", STRING_ID, len(content)) + b"".join([encode_string(text) for text in content])
    return struct.pack("<IQ", SCALARS[item][0], len(content)) + _encode_numbers(item, content)


def _encode_numbers(kind: str, content: Any) -> bytes:
    """Packs numbers and refuses those that the type would change (other than rounding to float32)."""
    dtype = SCALARS[kind][1]
    given = np.asarray(content)
    if given.ndim != 1:
        raise ValueError("an array of one dimension is wanted")
    if given.size and given.dtype.kind not in {"b": "b", "f": "fiu"}.get(dtype.kind, "iu"):
        raise TypeError(f"got {given.dtype} values")
    with np.errstate(over="ignore"):
        packed = given.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(packed, given):
        raise OverflowError("out of range")
    if dtype.kind == "f" and bool(np.any(np.isinf(packed) & ~np.isinf(given))):
        raise OverflowError("out of range")
    return packed.tobytes()


def encode_tensor(name: str, shape: Sequence[int], type_id: int, offset: int) -> bytes:
    """Encodes one row of the tensor table.

    Args:
        name: at most 63 bytes, or llama.cpp refuses the file.
        shape: outermost dimension first; the file holds it innermost first.
        type_id: ggml's number of the type.
        offset: bytes from the start of the data section.

    Raises:
        LayoutError: the name is too long or there are too many dimensions.
    """
    raw = name.encode()
    if not 0 < len(raw) <= MAX_NAME:
        raise LayoutError(f"tensor name {name!r} has {len(raw)} bytes; GGUF holds 1 to {MAX_NAME}")
    if len(shape) > MAX_DIMS or min(shape, default=1) < 1:
        raise LayoutError(
            f"tensor {name!r} of shape {tuple(shape)}: GGUF holds up to {MAX_DIMS} dimensions of 1 or more"
        )
    dims = list(reversed(shape))
    return struct.pack(f"<Q{len(raw)}sI{len(dims)}QIQ", len(raw), raw, len(dims), *dims, type_id, offset)


def encode_header(
    metadata: Mapping[str, MetadataValue], tensors: Sequence[tuple[str, Sequence[int], int, int]]
) -> bytes:
    """Encodes everything before the tensor data, padding included.

    Args:
        metadata: pairs in the order of the file. `general.alignment` is honoured.
        tensors: name, shape, type number and bytes of each tensor, in the order of the file.

    Raises:
        LayoutError: something does not fit the format.
    """
    alignment = metadata.get(ALIGNMENT_KEY, ("uint32", ALIGNMENT))[1]
    parts = [struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(metadata))]
    parts += [encode_pair(key, value) for key, value in metadata.items()]
    offset = 0
    for name, shape, type_id, nbytes in tensors:
        parts.append(encode_tensor(name, shape, type_id, offset))
        offset = align(offset + nbytes, alignment)
    length = sum(map(len, parts))
    parts.append(bytes(align(length, alignment) - length))
    return b"".join(parts)
