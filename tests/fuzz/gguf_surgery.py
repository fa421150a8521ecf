"""Changes fields of a GGUF file: keys, types, values, tensors; counts and lengths are written so that they fit."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["gguf_surgery"]

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_NUMBERS = (0, 1, 2, 3, 31, 32, 255, 4096, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 47, (1 << 63) - 1,
            (1 << 64) - 1, 0x7F800000, 0x7FC00000)  # fmt: skip


@dataclass
class _Cut:
    """A file in pieces: pairs of a key and the bytes of type and value, tensors of a name and the rest, the values."""

    version: bytes
    pairs: list[tuple[bytes, bytes]]
    tensors: list[tuple[bytes, list[int], int, int]]
    values: bytes


def gguf_surgery(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes | None:
    """Changes a pair or a tensor; None for what cannot be cut into pieces."""
    if data[:4] != b"GGUF":
        return None
    try:
        cut = _cut(data)
    except (struct.error, KeyError, IndexError, MemoryError):
        return None
    if cut.tensors and rng.random() < 0.4:
        _change_tensor(cut, rng, words)
    elif cut.pairs:
        _change_pair(cut, rng, words)
    return _joined(cut)


def _cut(data: bytes) -> _Cut:
    tensors, pairs = struct.unpack_from("<QQ", data, 8)
    if tensors > 1000 or pairs > 1000:
        raise KeyError(tensors)
    place = 24
    found: list[tuple[bytes, bytes]] = []
    for _ in range(pairs):
        key, place = _text(data, place)
        start = place
        place = _after(data, place)
        found.append((key, data[start:place]))
    table = []
    for _ in range(tensors):
        name, place = _text(data, place)
        (dims,) = struct.unpack_from("<I", data, place)
        shape = list(struct.unpack_from(f"<{min(dims, 8)}Q", data, place + 4))
        kind, offset = struct.unpack_from("<IQ", data, place + 4 + 8 * len(shape))
        place += 16 + 8 * len(shape)
        table.append((name, shape, kind, offset))
    return _Cut(data[4:8], found, table, data[place + -place % 32 :])


def _text(data: bytes, place: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, place)
    if length > len(data):
        raise KeyError(length)
    return data[place + 8 : place + 8 + length], place + 8 + length


def _after(data: bytes, place: int) -> int:
    """Gives where a type and its value end."""
    (kind,) = struct.unpack_from("<I", data, place)
    if kind == _STRING:
        return _text(data, place + 4)[1]
    if kind != _ARRAY:
        return place + 4 + _SIZES[kind]
    item, count = struct.unpack_from("<IQ", data, place + 4)
    place += 16
    if count > len(data):
        raise KeyError(count)
    if item != _STRING:
        return place + _SIZES[item] * int(count)
    for _ in range(count):
        place = _text(data, place)[1]
    return place


def _packed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _change_pair(cut: _Cut, rng: random.Random, words: Sequence[bytes]) -> None:
    which = rng.randrange(len(cut.pairs))
    key, value = cut.pairs[which]
    what = rng.randrange(6)
    if what == 0:
        del cut.pairs[which]
    elif what == 1:
        cut.pairs.insert(which, (key + rng.choice((b"", b"x")), value))
    elif what == 2:
        cut.pairs[which] = (rng.choice((b"", b"\xff", b"general.alignment", *words)), value)
    elif what == 3:
        cut.pairs[which] = (key, rng.choice(cut.pairs)[1])
    else:
        cut.pairs[which] = (key, _other_value(value, rng, words))


def _other_value(value: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """Gives another value, most often of the same type."""
    (old,) = struct.unpack_from("<I", value)
    kind = old
    if rng.random() < 0.2:
        kind = rng.choice((*_SIZES, _STRING, _ARRAY))
    if kind == _STRING:
        return struct.pack("<I", kind) + _packed(rng.choice((b"", b"x", b"\0\n", b"\xff", b"y" * 3000, *words)))
    if kind != _ARRAY:
        return struct.pack("<IQ", kind, rng.choice(_NUMBERS))[: 4 + _SIZES[kind]]
    if old != _ARRAY or len(value) < 16 or rng.random() < 0.3:
        item = rng.choice((4, 5, 6, 7, _STRING))
        count = rng.choice((0, 1, 3))
        one = _packed(b"z") if item == _STRING else struct.pack("<Q", rng.choice(_NUMBERS))[: _SIZES[item]]
        return struct.pack("<IIQ", _ARRAY, item, count) + one * count
    return _other_array(value, rng, words)


def _other_array(value: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """Drops, doubles or changes one item."""
    item, count = struct.unpack_from("<IQ", value, 4)
    items, place = [], 16
    for _ in range(count):
        start = place
        place = _text(value, place)[1] if item == _STRING else place + _SIZES.get(item, 4)
        items.append(value[start:place])
    if items:
        which = rng.randrange(len(items))
        size = _SIZES.get(item, 0)
        fresh = (
            _packed(rng.choice((b"", b" ", b"a b", b"\xff\xfe", b"q" * 400, *words)))
            if item == _STRING
            else struct.pack("<Q", rng.choice(_NUMBERS))[:size]
        )
        items[which : which + rng.randrange(2)] = rng.choice(([], [fresh], [items[which]] * 2, [fresh]))
    return struct.pack("<IIQ", _ARRAY, item, len(items)) + b"".join(items)


def _change_tensor(cut: _Cut, rng: random.Random, words: Sequence[bytes]) -> None:
    which = rng.randrange(len(cut.tensors))
    name, shape, kind, offset = cut.tensors[which]
    what = rng.randrange(7)
    if what == 0:
        name = rng.choice((b"", b"x" * 64, b"\n", cut.tensors[0][0], *words))
    elif what == 1:
        shape = [*shape, rng.choice((0, 1, 2))] if rng.random() < 0.5 else shape[1:]
    elif what == 2 and shape:
        shape = [*shape]
        shape[rng.randrange(len(shape))] = rng.choice(_NUMBERS)
    elif what == 3:
        kind = rng.choice((0, 1, 2, 8, 12, 14, 30, 31, 39, 99, (1 << 32) - 1))
    elif what == 4:
        offset = rng.choice(_NUMBERS)
    elif what == 5 and shape:
        shape = shape[::-1]
    else:
        del cut.tensors[which]
        return
    cut.tensors[which] = (name, shape, kind, offset)


def _joined(cut: _Cut) -> bytes:
    head = b"GGUF" + cut.version + struct.pack("<QQ", len(cut.tensors), len(cut.pairs))
    head += b"".join(_packed(key) + value for key, value in cut.pairs)
    for name, shape, kind, offset in cut.tensors:
        head += _packed(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + cut.values
