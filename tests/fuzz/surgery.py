"""Changes fields of a format and writes the rest so that it still fits: lengths, offsets, checksums.

A surgeon gives None where the bytes are not in its format. What it cuts open is read with loose rules of its own, since
the parser under test is what is doubted.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzz.gguf_surgery import gguf_surgery

__all__ = ["SURGEONS", "Surgeon"]

Random = random.Random
Words = Sequence[bytes]
Surgeon = Callable[[bytes, Random, Words], "bytes | None"]

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 4096, 1 << 31, 1 << 32, (1 << 47) + 1, (1 << 63) - 1, 1 << 63,
    (1 << 64) - 1, 1 << 64, 10**30, 0.5, -0.0, 1e308, 5e-324, "", "x", "\0", "\n", "../x", "/etc/passwd", "é",
    "😀", "\u202e",
    "a" * 1500, [], {}, [[]], [0], ["x"], {"x": 0}, [1 << 40] * 8, [[[[[[]]]]]],
)  # fmt: skip


def json_surgery(data: bytes, rng: Random, words: Words) -> bytes | None:
    """Changes a value or a key anywhere in JSON."""
    if data[:1] not in (b"{", b"["):
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return _dumped(_changed(value, rng))


def safetensors_surgery(data: bytes, rng: Random, words: Words) -> bytes | None:
    """Changes the header and writes its length anew; the values too grow or shrink at times."""
    if data[8:9] != b"{" or len(data) < 10:
        return None
    length = int.from_bytes(data[:8], "little")
    try:
        table = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    header = _dumped(_changed(table, rng))
    header += b" " * (-len(header) % 8)
    values = data[8 + length :]
    if rng.random() < 0.1:
        values = values[: rng.randrange(len(values) + 1)] + bytes(rng.choice((0, 1, 8)))
    return struct.pack("<Q", len(header)) + header + values


def zip_surgery(data: bytes, rng: Random, words: Words) -> bytes | None:
    """Changes the bytes of one member, or its name, and packs the archive again with the right checksums."""
    if data[:2] != b"PK":
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()[:100]]
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        NotImplementedError,
        struct.error,
        zlib.error,
    ):
        return None
    if not members:
        return None
    which = 0 if rng.random() < 0.7 else rng.randrange(len(members))
    name, body = members[which]
    if rng.random() < 0.1:
        members[which] = (rng.choice(("x", name + "/", "../" + name, name.replace("/", ""), "")), body)
    else:
        members[which] = (name, _bytes_changed(body, rng, words))
    if rng.random() < 0.1:
        members.append(rng.choice(members))
    return _zipped(members)


def _zipped(members: Sequence[tuple[str, bytes]]) -> bytes:
    import warnings

    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # a name twice is meant
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name or "empty"), body)
    return out.getvalue()


def _bytes_changed(body: bytes, rng: Random, words: Words) -> bytes:
    result = bytearray(body)
    place = rng.randrange(len(result) + 1)
    what = rng.randrange(5)
    if what == 0 and words:
        word = rng.choice(words)
        result[place : place + rng.choice((0, len(word)))] = word
    elif what == 1:
        del result[place : place + rng.choice((1, 2, 4, 16))]
    elif what == 2 and result:
        result[place : place + 4] = struct.pack("<I", rng.choice((0, 1, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)))
    elif result:
        result[min(place, len(result) - 1)] = rng.choice((0, 1, 255, rng.randrange(256)))
    return bytes(result)


def protobuf_surgery(data: bytes, rng: Random, words: Words) -> bytes | None:
    """Changes a field of a message, or of a message in it, and writes the lengths around it anew."""
    fields = _fields(data)
    return None if fields is None or not fields else _message(_field_changed(fields, rng, words, 0))


Field = tuple[int, bytes | int]


def _fields(data: bytes) -> list[Field] | None:
    """Cuts a message into tags and values; None where it is none."""
    fields: list[Field] = []
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if tag >> 3 == 0 or kind not in (0, 1, 2, 5) or place > len(data):
            return None
        if kind == 0:
            value, place = _varint(data, place)
            fields.append((tag, value))
            continue
        length, place = _varint(data, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
        if place + length > len(data):
            return None
        fields.append((tag, data[place : place + length]))
        place += length
    return fields


def _field_changed(fields: list[Field], rng: Random, words: Words, depth: int) -> list[Field]:
    fields = list(fields)
    which = rng.randrange(len(fields))
    tag, value = fields[which]
    inner = _fields(value) if isinstance(value, bytes) and depth < 8 else None
    if inner and rng.random() < 0.85:
        fields[which] = (tag, _message(_field_changed(inner, rng, words, depth + 1)))
    elif rng.random() < 0.15:
        del fields[which]
    elif rng.random() < 0.2:
        fields.insert(rng.randrange(len(fields) + 1), fields[which])
    elif isinstance(value, int):
        fields[which] = (tag, rng.choice((0, 1, 2, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, value + 1)))
    elif words and rng.random() < 0.4:
        fields[which] = (tag, rng.choice(words) if tag & 7 == 2 else value)
    else:
        changed = _bytes_changed(value, rng, words)
        fields[which] = (tag, changed if tag & 7 == 2 else changed[: len(value)].ljust(len(value), b"\0"))
    return fields


def _message(fields: Sequence[Field]) -> bytes:
    parts = []
    for tag, value in fields:
        parts.append(_encoded(tag))
        if isinstance(value, int):
            parts.append(_encoded(value))
        else:
            parts += [_encoded(len(value)), value] if tag & 7 == 2 else [value]
    return b"".join(parts)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    return value, len(data) + 1


def _encoded(value: int) -> bytes:
    result = bytearray()
    value %= 1 << 64
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: Random, depth: int = 0) -> Any:
    """Walks down to some place and changes what is there."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or (depth > 0 and rng.random() < 0.15):
        return _another(value, rng)
    key = rng.choice(inside)
    result = value.copy()
    what = rng.random()
    if what < 0.1:
        del result[key]
    elif what < 0.2 and isinstance(result, list):
        result.insert(key, rng.choice((result[key], rng.choice(_VALUES))))
    elif what < 0.15:
        return {(key + "x" if one == key else one): inner for one, inner in value.items()}
    elif what < 0.2:
        name = rng.choice(("", "x", "\0", key + "x", key[:-1], rng.choice(inside), "__metadata__", "a" * 1200))
        result[name] = result[key] if rng.random() < 0.5 else rng.choice(_VALUES)
    else:
        result[key] = _changed(value[key], rng, depth + 1)
    return result


def _another(value: Any, rng: Random) -> Any:
    near = type(value) is int and rng.random() < 0.5
    if near:
        return rng.choice((value + 1, value - 1, value * 2, value // 2, -value, value << 32, float(value), str(value)))
    return rng.choice((*_VALUES, [value], {"x": value}, str(value), [value] * 50))


SURGEONS: tuple[Surgeon, ...] = (json_surgery, gguf_surgery, zip_surgery, safetensors_surgery, protobuf_surgery)
